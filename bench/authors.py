"""The authors' BFT and DFT beside ours on random batches: how far losses and gradients are apart.

    git clone https://github.com/TencentAILabHealthcare/BFT theirs && git -C theirs checkout e54ca5c
    python bench/authors.py theirs/LLaMA-Factory/src/llamafactory/train/trainer_utils.py

Four functions of that file are run as they stand there, and nothing else of it; none of it is in this repository.
"""

import argparse
import ast
import os
import sys
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bft  # noqa: E402


NEEDED = ("_lowest_group_confidence", "bft_loss_func", "_dft_cross_entropy", "dft_loss_func")


def load(path):
    """{name: function} of those NEEDED that the file defines."""
    tree, scope = ast.parse(path.read_text(encoding="utf-8")), {"torch": torch, "F": F, "Optional": Optional}
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in NEEDED]
    exec(compile(tree, str(path), "exec"), scope)
    return scope


def batch(seed, empty=False):
    """Logits (5, 60, 37) and labels (5, 60) of samples with random prompts and lengths; empty: the first has no
    response."""
    rng = torch.Generator().manual_seed(seed)
    logits, labels = 2 * torch.randn(5, 60, 37, generator=rng), torch.randint(37, (5, 60), generator=rng)
    for row in labels:
        first, last = sorted((1 + torch.randperm(59, generator=rng)[:2]).tolist())
        row[:first], row[last:] = -100, -100
    labels[0, :60 * empty] = -100
    return logits.requires_grad_(), labels, int(torch.randint(1, 40, (1,), generator=rng))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, help="their trainer_utils.py")
    parser.add_argument("--batches", type=int, default=50)
    args = parser.parse_args()
    if not args.path.is_file():
        sys.exit(f"{args.path}: no such file")
    theirs = load(args.path)
    for name in ("bft", "dft"):
        worst_loss = worst_gradient = 0.0
        for seed in range(args.batches):
            logits, labels, g = batch(seed)
            os.environ["BFT_GROUP_SIZE"] = str(g)
            a = theirs[f"{name}_loss_func"]({"logits": logits}, labels)
            b = bft.loss_from_logits(logits, labels, name, g)
            ga, gb = (torch.autograd.grad(loss, logits)[0] for loss in (a, b))
            worst_loss = max(worst_loss, abs(a.item() / b.item() - 1))
            worst_gradient = max(worst_gradient, ((ga - gb).norm() / gb.norm()).item())
        print(f"{name}: {args.batches} batches, largest relative difference of the loss {worst_loss:.1e}, of the "
              f"gradient {worst_gradient:.1e}")
    logits, labels, g = batch(0, empty=True)
    os.environ["BFT_GROUP_SIZE"] = str(g)
    ratio = theirs["bft_loss_func"]({"logits": logits}, labels) / bft.loss_from_logits(logits, labels, "bft", g)
    print(f"bft with one of five samples empty: their loss is {ratio.item():.3f} of ours")


if __name__ == "__main__":
    main()
