"""The head, from hidden states to their gradient: our chunked log-probs under four objectives, and with what a row may
need of the model's distribution, beside two that hold all logits.

    python bench/loss.py                     # the table of bench/RESULTS.md; a GPU is used where there is one
    python bench/loss.py --dry               # the same on tiny sizes, to see that it runs

One step is a forward and a backward pass: hidden states (N, d) and a head (V, d) in float32 under bfloat16 autocast,
rows of 1,024 tokens whose first 30% are a prompt (of which ours computes no logits, the others do). Ratios are time and
peak memory over those of our `bft`, so that above 1 is worse than it; memory is what comes on top of the inputs, their
gradients included.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import heading, interleave, print_rows


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bft  # noqa: E402
from model import linear_logprobs  # noqa: E402
from runtime.device import autocast  # noqa: E402


def ours(objective, labels, looks=None):
    targets = labels[:, 1:]
    at = F.pad(targets != -100, (0, 1)).flatten().nonzero()[:, 0]         # `data.collate` knows it ahead of the step
    targets, offsets = targets[targets != -100], F.pad((targets != -100).sum(1).cumsum(0), (1, 0)).cpu()

    def loss(hidden, weight):
        found = linear_logprobs(hidden.flatten(0, 1).index_select(0, at), weight, targets, looks)
        logp = found[0] if looks else found                               # (N,)
        return bft.objective_loss(logp, offsets, objective)
    return loss


def cross_entropy(logits, labels):
    """What transformers' models compute: logits of every position, in float32."""
    return F.cross_entropy(logits.float()[:, :-1].flatten(0, 1), labels[:, 1:].flatten())   # logits (B, T, V)


def materialised_bft(logits, labels, group_size=256):
    """BFT from the paper's formula, taken literally: the log-softmax of all logits in float32, a loop over samples."""
    logp = logits.float()[:, :-1].log_softmax(-1)                         # (B, T-1, V)
    logp = logp.gather(2, labels[:, 1:, None].clamp(min=0))[:, :, 0]      # (B, T-1)
    losses = []
    for row, response in zip(logp, labels[:, 1:] != -100):
        row = row[response]                                               # (n_b,)
        p = row.detach().exp()
        confidence = row.detach().unfold(0, min(group_size, len(row)), 1).mean(1).exp().min()
        losses.append((1 - confidence) * (p * -row).mean())
    return torch.stack(losses).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[4096, 49152, 131072])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--width", type=int, default=576, help="d (default: SmolLM2-135M's 576)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    if args.dry:
        args.vocab, args.tokens, args.width, args.repeats = [512], [1024, 2048], 32, 1
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else \
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print(f"{heading(device)}\nd = {args.width}, {args.dtype}, medians of {args.repeats} interleaved steps or more")
    growth = {}
    for V in args.vocab:
        for N in args.tokens:
            torch.manual_seed(0)
            hidden = torch.randn(-(-N // 1024), min(N, 1024), args.width, device=device)
            weight = torch.randn(V, args.width, device=device) * 0.05
            labels = torch.randint(V, hidden.shape[:2], device=device)
            labels[:, :int(0.3 * labels.shape[1])] = -100
            chunked = {objective: ours(objective, labels) for objective in ("bft", "sft", "dft", "bft-v3")}
            for name, look in bft.DISTRIBUTION.items():
                chunked[f"bft and {name}"] = ours("bft", labels, {name: look})
            alternatives = {
                **chunked,
                "cross-entropy, all logits": lambda h, w, y=labels: cross_entropy(F.linear(h, w), y),
                "materialised BFT": lambda h, w, y=labels: materialised_bft(F.linear(h, w), y)}
            need = 18 * N * V                                             # bytes: bf16 logits, four times float32

            def step(loss, hidden=hidden, weight=weight):
                h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
                with autocast(device, dtype):
                    value = loss(h, w)
                value.backward()

            runs = {name: lambda loss=loss: step(loss) for name, loss in alternatives.items()
                    if need < 0.7 * room or name in chunked}
            result = interleave(runs, args.repeats, device)
            print_rows(f"V = {V}, N = {N}", result)
            if len(result) < len(alternatives):
                print(f"(the others not run: about {need / 1e9:.0f} GB of logits)")
            for name, (_, _, seconds, peak) in result.items():
                growth.setdefault((V, name), []).append((N, seconds, peak))
    print("\nGrowth with each token more, from the fewest to the most that were run:")
    for (V, name), points in growth.items():
        (n0, t0, m0), (n1, t1, m1) = points[0], points[-1]
        if n1 > n0:
            print(f"V = {V:6}  {name:25}  {(t1 - t0) / (n1 - n0) * 1e6:7.0f} us  {(m1 - m0) / (n1 - n0) / 1e3:8.1f} kB"
                  f"  ({n0} to {n1} tokens; a float32 row of logits is {4 * V / 1e3:.0f} kB)")


if __name__ == "__main__":
    main()
