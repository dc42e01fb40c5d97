"""Run by test_train.py on two ranks: `train.py` with the arguments given, which fails where a gradient lies outside of
DDP's buckets, after the pass that is discarded, after any micro-batch, or between steps. Rank 0 prints how often it looked."""

import train
from runtime.process import run
from runtime.ranks import Ranks


looks = []                           # the storages in which the gradients lay: {addresses}


def look(model):
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    storages = {gradient.untyped_storage().data_ptr(): gradient.untyped_storage().nbytes() for gradient in gradients}
    # A bucket has many of them and nothing else; a gradient by itself has a storage of its own.
    assert len(storages) < len(gradients) and sum(storages.values()) == sum(gradient.nbytes for gradient in gradients)
    looks.append(set(storages))
    assert looks[-1] == looks[0], f"look {len(looks)}"


def main():
    nets = []
    wrap, forward_backward, sample_statistics = train.wrap, train.forward_backward, train.sample_statistics

    def wrap_and_look(model, *arguments):
        nets.append(wrap(model, *arguments))
        look(model)
        return nets[-1]

    def step_and_look(net, *arguments):
        look(net)
        assert all(not p.grad.any() for p in net.parameters() if p.requires_grad)
        return forward_backward(net, *arguments)

    def statistics_and_look(*arguments):
        look(nets[-1])                                                    # a backward pass was just before
        return sample_statistics(*arguments)

    train.wrap, train.forward_backward, train.sample_statistics = wrap_and_look, step_and_look, statistics_and_look
    train.main()
    Ranks("cpu").print(f"looked {len(looks)} times")


if __name__ == "__main__":
    run(main)
