"""How far the head's probabilities are off under bfloat16 autocast, by what of the logits is rounded.

    python bench/precision.py MODEL SAMPLES     # the table of bench/RESULTS.md; a model's directory, a file of samples
    python bench/precision.py --dry             # made-up tokens of tiny sizes alone, to see that it runs

A figure is the relative error of the target's p against float64, root mean square over response tokens. GPT-2's columns
have its sizes and random weights, and logits about a common number: what a softmax ignores and a rounding does not.
"""

import argparse
import sys
from pathlib import Path

import torch
from measure import heading


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import collate, load_samples  # noqa: E402
from hf import load_model, load_tokenizer  # noqa: E402
from model import Packing, linear_logprobs  # noqa: E402
from runtime.device import autocast  # noqa: E402


ROWS = 256                           # of logits at a time
SAMPLES = 12
MAX_LENGTH = 200                     # tokens of a sample


def in_parts(function):
    """A function of (hidden, weight, targets) that holds few logits at a time."""
    def whole(h, w, y):
        return torch.cat([function(part, w, y_part) for part, y_part in zip(h.split(ROWS), y.split(ROWS))])
    return whole


def logp_of(z, y):
    return z.gather(1, y[:, None])[:, 0] - z.logsumexp(1)


def exact(h, w, y):
    return logp_of(h.double() @ w.double().T, y)


def rounded(h, w, y):
    return logp_of((h.bfloat16() @ w.bfloat16().T).float(), y)


def less_mean_row(h, w, y):
    return rounded(h, w - w.mean(0), y)


def ours(h, w, y):
    with autocast("cpu", torch.bfloat16):
        return linear_logprobs(h, w, y)


def float32_logits(h, w, y):
    return logp_of(h.bfloat16().float() @ w.bfloat16().float().T, y)


WAYS = {
    "all logits rounded": in_parts(rounded),
    "the head less its mean row": in_parts(less_mean_row),
    "the target's logit in float32 (ours)": ours,
    "all logits in float32": in_parts(float32_logits),
}


def of_a_model(directory, file):
    """(hidden (N, d), head (V, d), targets (N,)) of the response tokens of a file's first samples."""
    model = load_model(directory).float()
    samples, _ = load_samples(file, load_tokenizer(directory), max_length=MAX_LENGTH)
    batch = collate(samples[:SAMPLES])
    with autocast("cpu", torch.bfloat16):
        x = model.trunk(batch.input_ids, Packing(batch.lengths, "cpu"))   # (T, d)
    return x[batch.at].float(), model.head, batch.targets


def made_up(shift, N, V, d):
    """The same, random; the logits lie about `shift`, and a target's is 2 to 18 above the others."""
    torch.manual_seed(0)
    w, h, y = 0.09 * torch.randn(V, d), torch.randn(N, d), torch.randint(V, (N,))
    h = h + torch.linspace(2, 18, N)[:, None] * w[y] / w[y].square().sum(1, keepdim=True)
    common = torch.nn.functional.normalize(torch.randn(d), dim=0)
    h = h + (10 - h @ common)[:, None] * common
    return h, w + shift / 10 * common, y


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("samples", nargs="?")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    columns = {}
    if args.samples:
        h, w, y = columns["model"] = of_a_model(args.model, args.samples)
        torch.manual_seed(0)
        # As after some training in float32.
        columns["not bf16"] = h, w * (1 + 2e-3 * torch.randn_like(w)), y
    sizes = (64, 512, 64) if args.dry else (1024, 50257, 768)
    for shift in (0, -35, -100):
        columns[f"GPT-2 {shift}"] = made_up(shift, *sizes)
    print(heading(torch.device("cpu")))
    print("  ".join([f"{'N = ' + ', '.join(str(len(y)) for _, _, y in columns.values()):36s}",
                     *(f"{name:>10s}" for name in columns)]))
    errors = {name: [] for name in WAYS}
    for h, w, y in columns.values():
        expected = in_parts(exact)(h, w, y)
        for name, way in WAYS.items():
            off = (way(h, w, y).double() - expected).expm1()              # (N,)
            errors[name].append(off.square().mean().sqrt().item())
    for name, values in errors.items():
        print("  ".join([f"{name:36s}", *(f"{value:>10.2%}" for value in values)]))


if __name__ == "__main__":
    main()
