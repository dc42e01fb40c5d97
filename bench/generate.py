"""Greedy generation beside transformers': tokens a second, and memory.

    python bench/generate.py                 # SmolLM2's shape, batches of 1, 8 and 33; a GPU is used where there is one
    python bench/generate.py --dry           # tiny sizes, to see that it runs

Both have the same shape (random weights) and the same prompts, of lengths spread as those of MedQuAD's questions; no
continuation ends before --new tokens. transformers pads prompts on the left. Ratios are to ours, so that above 1 is
slower or larger. Memory is what comes on top of the weights.
"""

import argparse
import functools
import sys
from pathlib import Path

import numpy as np
import torch
from measure import PROMPTS, SHAPES, heading, interleave, print_rows


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hf  # noqa: E402
from model import GPT  # noqa: E402
from runtime.device import autocast, find_device  # noqa: E402


def ours(shape, dtype, device):
    model = GPT(hf.config_from_dict(shape)).cast(dtype).to(device)

    def generate(prompts, new):
        with autocast(device, dtype):
            return model.generate(prompts, new)
    return generate


def theirs(shape, dtype, device):
    import transformers
    config = transformers.AutoConfig.for_model(**shape)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device, dtype).eval()

    def generate(prompts, new):
        ids, mask = torch.zeros(2, len(prompts), max(map(len, prompts)), dtype=torch.int64)
        for row, kept, prompt in zip(ids, mask, prompts):
            row[-len(prompt):], kept[-len(prompt):] = torch.tensor(prompt), 1
        return model.generate(ids.to(device), attention_mask=mask.to(device), max_new_tokens=new, min_new_tokens=new,
                              do_sample=False, pad_token_id=0)
    return generate


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 33])
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    if args.dry:
        args.shape, args.batches, args.new, args.repeats = "dry", [1, 4], 4, 1
    import transformers
    device, dtype, shape = find_device(args.device), getattr(torch, args.dtype), SHAPES[args.shape]
    models = {"ours": ours(shape, dtype, device), "transformers": theirs(shape, dtype, device)}
    print(heading(device, transformers))
    print(f"{args.shape}, {args.dtype}, {args.new} new tokens a prompt, greedy; medians of {args.repeats} interleaved "
          "rounds or more")
    rng = np.random.RandomState(0)
    for batch in args.batches:
        lengths = np.interp((np.arange(batch) + 0.5) / batch, np.linspace(0, 1, len(PROMPTS)), PROMPTS).astype(int)
        prompts = [rng.randint(shape["vocab_size"], size=length).tolist() for length in rng.permutation(lengths)]
        runs = {name: functools.partial(generate, prompts, args.new) for name, generate in models.items()}
        result = interleave(runs, args.repeats, device)
        print_rows(f"{batch} prompts", result)
        speeds = ", ".join(f"{name} {batch * args.new / seconds:.0f}" for name, (_, _, seconds, _) in result.items())
        print(f"tokens a second: {speeds}")


if __name__ == "__main__":
    main()
