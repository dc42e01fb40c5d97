"""Attention within packed samples: one layer, forward and backward, in the ways that it can be done.

    python bench/attention.py                # a GPU is used where there is one
    python bench/attention.py --dry          # tiny sizes, to see that it runs

Heads and sizes are SmolLM2's, lengths those of MedQuAD. Ratios are to `Packing.attend`, which is what the loop does.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import heading, interleave, medquad_batch, print_rows


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import Packing  # noqa: E402


def attention(q, k, v, **options):                                        # (S, n, L, D)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


def padded_rows(q, k, v, lengths):
    """Every sample padded to the longest."""
    rows = (torch.nn.utils.rnn.pad_sequence(y.split(lengths), batch_first=True).transpose(1, 2) for y in (q, k, v))
    y = attention(*rows, is_causal=True).transpose(1, 2)                  # (S, L, n, D)
    return torch.cat([row[:n] for row, n in zip(y, lengths)])


def length_buckets(q, k, v, lengths):
    """Samples, which come sorted, padded in groups whose longest is at most a quarter longer than the shortest."""
    groups = [[]]
    for n in lengths:
        groups[-1].append(n) if not groups[-1] or groups[-1][0] <= 1.25 * n else groups.append([n])
    parts = zip(*(y.split([sum(g) for g in groups]) for y in (q, k, v)))
    return torch.cat([padded_rows(*part, group) for part, group in zip(parts, groups)])


def block_mask(q, k, v, lengths):
    """All tokens as one row, under a mask (T, T)."""
    sample = torch.arange(len(lengths), device=q.device).repeat_interleave(torch.tensor(lengths, device=q.device))
    mask = (sample[:, None] == sample).tril()
    return attention(*(y.transpose(0, 1)[None] for y in (q, k, v)), attn_mask=mask)[0].transpose(0, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    if args.dry:
        args.tokens, args.repeats = [1024], 1
    device = torch.device(args.device)
    print(f"{heading(device)}\n{args.dtype}, 9 heads of 64, 3 of keys and values; medians of {args.repeats} or more")
    for tokens in args.tokens:
        count = max(2, round(tokens / 280))                               # their mean, cut at 1,024
        lengths = sorted((len(x.ids) for x in medquad_batch(2, count, 1024)), reverse=True)
        qkv = [torch.randn(sum(lengths), n, 64, device=device, dtype=getattr(torch, args.dtype)) for n in (9, 3, 3)]
        gradient = torch.randn_like(qkv[0])

        def step(function, qkv=qkv, gradient=gradient, lengths=lengths):
            function(*(y.detach().requires_grad_() for y in qkv), lengths).backward(gradient)

        ways = {"Packing.attend": lambda q, k, v, lengths: Packing(lengths, device).attend(None, q, k, v),
                "length buckets": length_buckets, "padded rows": padded_rows, "block mask": block_mask}
        result = interleave({name: lambda way=way: step(way) for name, way in ways.items()}, args.repeats, device)
        print_rows(f"{sum(lengths)} tokens, {count} samples", result)


if __name__ == "__main__":
    main()
