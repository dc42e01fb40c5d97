"""Run by test_train.py, alone or under torchrun: the gradient of one global batch in several layouts, by the loop's own
`train.forward_backward`; rank 0 saves {"objective layout adapters": (loss, gradient, statistics of each sample)}, of all weights and of adapters.
Beside the rows of bft.py there are some that need more of a token than its log-prob.

A layout is a number of micro_tokens, with a + filled up as for compiled blocks, with an r recomputed, with a c compiled."""

import sys

import numpy as np
import torch
from support import ROOT, tiny
from torch.nn.parallel import DistributedDataParallel

import bft
import train
from data import Sample
from runtime.process import run
from runtime.ranks import Ranks
from runtime.sharding import gather_whole, is_sharded, shard
from variants import load_variants


GROUP_SIZE = 5
VARIANTS = ("deft", "eaft", "iw_sft")
# No more than these with adapters, which know nothing of objectives: an average over tokens, one over samples, and all needs.
WITH_ADAPTERS = ("sft", "bft", "everything")


def all_needs(tokens):
    """A weight that each of what a row may need has a part in."""
    return sum(tokens.extra[name] for name in bft.DISTRIBUTION) + (tokens.extra["ref_logp"] - tokens.logp).exp()


def add_rows():
    """To the table of this process."""
    load_variants([str(ROOT / "variants" / f"{name}.py") for name in VARIANTS])
    bft.OBJECTIVES["everything"] = bft.Objective(all_needs, bft.every_sample_1, "tokens", (*bft.DISTRIBUTION, "ref_logp"))


def objectives(adapters):
    return WITH_ADAPTERS if adapters else list(bft.OBJECTIVES)


def gradient(model):
    return torch.cat([gather_whole(p.grad).flatten() for p in model.parameters() if p.requires_grad])


def setup(adapters):
    model = tiny(std=0.3, vocab_size=61, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1)
    if adapters:
        model.add_lora(2, 4)
        for name, p in model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(p, 0.0, 0.3)
    rng, reference, batch = np.random.RandomState(0), np.random.RandomState(1), []
    for n in rng.randint(2, 40, size=13):
        response = rng.rand(n) < 0.6
        response[0], response[-1] = False, True
        ref_logp = reference.uniform(-6, -2, response.sum()).astype(np.float32)
        batch.append(Sample(rng.randint(0, 61, n), response, None, 0, ref_logp=ref_logp))
    return model, batch


def main(how, out, *layouts):
    ranks = Ranks("cpu")
    ranks.start()
    add_rows()
    results = {}
    for adapters in (False, True):
        model, batch = setup(adapters)
        shard(model, how, torch.float32, ranks)
        net = DistributedDataParallel(model) if ranks.world > 1 and not is_sharded(model) else model
        for layout in sorted(layouts, key=lambda layout: "c" in layout):   # once compiled it stays so
            model.recompute = "r" in layout
            if "c" in layout:
                model.compile(backend="eager")
            micro_tokens = int(layout.rstrip("+rc"))
            for objective in objectives(adapters):
                model.zero_grad()
                s = train.Settings(micro_tokens=micro_tokens, compile="+" in layout or "c" in layout, group_size=GROUP_SIZE)
                outcome = train.forward_backward(net, batch, objective, s, ranks, torch.float32)
                loss, statistics = train.gather(outcome, len(batch), ranks)
                results[f"{objective} {layout} {adapters}"] = (loss, gradient(model), torch.from_numpy(statistics))
    if ranks.rank == 0:
        torch.save(results, out)


if __name__ == "__main__":
    run(lambda: main(*sys.argv[1:]))
