"""Run by test_train.py, alone or under torchrun: the gradient of one global batch in several layouts, by the loop's own
`train.backward`; rank 0 saves {"objective micro_tokens": (loss, gradient, statistics of each sample)}."""

import sys

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import bft
import train
from data import Sample, run
from model import GPT, GPTConfig


GROUP_SIZE = 5


def setup():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=61, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, n_ff=24))
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
    rng, batch = np.random.RandomState(0), []
    for n in rng.randint(2, 40, size=13):
        response = rng.rand(n) < 0.6
        response[0], response[-1] = False, True
        batch.append(Sample(rng.randint(0, 61, n), response, None, 0))
    return model, batch


def main(out, *layouts):
    ranks = train.Ranks("cpu")
    ranks.start()
    model, batch = setup()
    net = DistributedDataParallel(model) if ranks.world > 1 else model
    results = {}
    for objective in bft.OBJECTIVES:
        for micro_tokens in map(int, layouts):
            model.zero_grad()
            s = train.Settings(micro_tokens=micro_tokens, group_size=GROUP_SIZE)
            loss, statistics = train.backward(net, batch, objective, s, ranks, torch.float32)
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            results[f"{objective} {micro_tokens}"] = (loss, gradient, torch.from_numpy(statistics))
    if ranks.rank == 0:
        torch.save(results, out)
    ranks.stop()


if __name__ == "__main__":
    run(lambda: main(*sys.argv[1:]))
