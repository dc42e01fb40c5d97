"""Run by test_train.py under torchrun: `train.py` with the arguments given; then every rank saves the parameters that it
trained to rank-N.pt beside --out."""

import os
import sys
from pathlib import Path

import torch

import train
from runtime.process import run


def main():
    nets, wrap = [], train.DistributedDataParallel
    train.DistributedDataParallel = lambda net, **options: nets.append(net) or wrap(net, **options)
    train.main()
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    torch.save({name: p.detach() for name, p in nets[0].named_parameters() if p.requires_grad}, out / f"rank-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    run(main)
