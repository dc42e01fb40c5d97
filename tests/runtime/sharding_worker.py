"""Run by test_sharding.py on several ranks: the function that the first argument names."""

import sys

import split_worker
import torch
from support import tiny
from torch.nn.parallel import DistributedDataParallel

import model as model_module
import train
from runtime.process import run
from runtime.ranks import Ranks
from runtime.sharding import as_rows_of, gather_whole, local, my_rows, rows_of, shard


def rows(ranks):
    """Every rank's rows of every parameter are those that `rows_of` says, and together the whole, also where there are
    fewer than ranks."""
    whole = {name: p.detach().clone() for name, p in tiny(vocab_size=5, hidden_size=16, num_attention_heads=2).named_parameters()}
    model = tiny(vocab_size=5, hidden_size=16, num_attention_heads=2)
    shard(model, "all", torch.float32, ranks)
    for name, p in model.named_parameters():
        first, stop = rows_of(p)
        assert torch.equal(local(p), whole[name][first:stop]), name
        mine = my_rows(whole[name], p)
        again = as_rows_of(p, mine.double(), ranks.device)
        assert again.dtype == p.dtype and again.placements == p.placements and torch.equal(gather_whole(again), whole[name]), name
        # No more than the rows is kept of what came.
        assert mine.untyped_storage().nbytes() == mine.nbytes, name
    ranks.print("rows", *ranks.texts(str(rows_of(model.embed_tokens.weight))))


def rounding(ranks):
    """The gradient under bfloat16 autocast of DDP, and how far sharding's is from it: with weights of norms that
    bfloat16 has, and with others."""
    for norms_are_rounded in (True, False):
        gradients = []
        for how in ("no", "all"):
            model, batch = split_worker.setup(False)
            for name, p in model.named_parameters():
                if "norm" in name and norms_are_rounded:
                    p.data = p.data.bfloat16().float()
            shard(model, how, torch.bfloat16, ranks)
            net = DistributedDataParallel(model) if how == "no" else model
            settings = train.Settings(micro_tokens=60, compile=False, group_size=split_worker.GROUP_SIZE)
            train.forward_backward(net, batch, "bft", settings, ranks, torch.bfloat16)
            gradients.append({name: gather_whole(p.grad) for name, p in model.named_parameters()})
            # Of the whole gradient, and a number for whoever looks at it on one rank.
            norm = train.clip_gradient(train.trained_parameters(model), 0)
            expected = sum(gradient.double().square().sum() for gradient in gradients[-1].values()).sqrt()
            assert type(norm) is torch.Tensor and torch.isclose(norm, expected)
        plain, sharded = gradients
        assert all(gradient.dtype == torch.float32 for gradient in sharded.values())
        for kind in ("norm", "proj", "embed"):
            names = [name for name in plain if kind in name and (name.startswith("layers.") or kind == "embed")]
            error = sum((plain[name] - sharded[name]).square().sum() for name in names).sqrt()
            ranks.print(norms_are_rounded, kind, float(error / sum(plain[name].square().sum() for name in names).sqrt()))


def ends(ranks):
    """Generation ends on all ranks after the same token, although one sees another one."""
    model = tiny(vocab_size=11, hidden_size=16, num_attention_heads=2)
    free, = model.generate([[1, 2, 3]], 6)
    shard(model, "all", torch.float32, ranks)
    next_tokens = model_module.next_tokens
    if ranks.rank == 1:
        model_module.next_tokens = lambda *given: torch.full_like(next_tokens(*given), 10)
    ids, = model.generate([[1, 2, 3]], 6, stop=[10])
    assert torch.equal(ids, free) and 10 not in free
    ranks.print("ended")


def main():
    ranks = Ranks("cpu")
    ranks.start()
    globals()[sys.argv[1]](ranks)


if __name__ == "__main__":
    run(main)
