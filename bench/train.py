"""An optimizer step of train.py's loop beside transformers with the materialised BFT loss on padded batches.

    pip install -e ".[dev]"
    python bench/train.py                                  # SmolLM2's shape; a GPU is used where there is one
    python bench/train.py --shape gpt2 --batch-size 256 --micro-tokens 32768 --rows 32    # an H100
    python bench/train.py --dry                            # tiny sizes, to see that it runs

Both have the same shape (random weights), the same batch of samples, autocast and fused AdamW; only the lengths of the
samples are real: spread as MedQuAD's in SmolLM2's tokens, cut at --max-length. Ours packs them into --micro-tokens, and
on a GPU is compiled. transformers gets --rows samples at a time, padded to the longest: in the order they come, and
sorted by length; as its Trainer has it by default, it is not compiled. A step is forward, backward, clipping, update.
Ratios are to ours.
"""

import argparse
import sys
from pathlib import Path

import torch
from loss import materialised_bft
from measure import SHAPES, gigabytes, heading, interleave, medquad_batch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hf  # noqa: E402
import train  # noqa: E402
from model import GPT  # noqa: E402
from runtime.device import autocast  # noqa: E402
from runtime.ranks import Ranks  # noqa: E402


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)


def update(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def ours(shape, s, ranks):
    model = GPT(hf.config_from_dict(shape)).to(ranks.device)
    model.recompute = s.recompute
    if s.compile:
        model.compile()
    optimizer = optimizer_of(model)

    def step(batch, dtype):
        loss, *_ = train.forward_backward(model, batch, "bft", s, ranks, dtype)
        update(model, optimizer)
        return loss.item()
    return step, model


def row_batches(batch, rows, by_length):
    """The samples of a batch, `rows` at a time."""
    batch = sorted(batch, key=lambda x: len(x.ids)) if by_length else batch
    return [batch[i:i + rows] for i in range(0, len(batch), rows)]


def theirs(shape, device):
    from transformers import AutoConfig, AutoModelForCausalLM
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), attn_implementation="sdpa")
    model = model.float().to(device).train()
    optimizer = optimizer_of(model)

    def step(batch, dtype, rows, by_length):
        total = torch.zeros((), device=device)
        for some in row_batches(batch, rows, by_length):
            ids, mask = torch.zeros(2, len(some), max(len(x.ids) for x in some), dtype=torch.int64)
            labels = torch.full_like(ids, -100)
            for k, x in enumerate(some):
                n = len(x.ids)
                ids[k, :n], mask[k, :n] = torch.from_numpy(x.ids), 1
                labels[k, :n] = torch.where(torch.from_numpy(x.response), ids[k, :n], -100)
            with autocast(device, dtype):
                logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
                loss = materialised_bft(logits, labels.to(device)) * len(some) / len(batch)
            loss.backward()
            total += loss.detach()
        update(model, optimizer)
        return total.item()
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--micro-tokens", type=int, default=2048, help="of ours")
    parser.add_argument("--rows", type=int, default=8, help="of a micro-batch of transformers")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--recompute", action="store_true", help="ours: activation checkpointing by block")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    if args.dry:
        args.shape, args.batch_size, args.repeats, args.micro_tokens = "dry", 4, 1, 512
    shape, dtype, ranks = SHAPES[args.shape], getattr(torch, args.dtype), Ranks(args.device)
    s = train.Settings(micro_tokens=args.micro_tokens, compile=args.compile, recompute=args.recompute)
    torch.compiler.set_stance("default" if args.compile else "force_eager")
    packages = []
    if not args.ours_only:
        import transformers
        packages = [transformers]
    batch = medquad_batch(shape["vocab_size"], args.batch_size, args.max_length)
    step, model = ours(shape, s, ranks)
    runs = {"ours": lambda: step(batch, dtype)}
    if not args.ours_only:
        their_step = theirs(shape, ranks.device)
        runs["transformers"] = lambda: their_step(batch, dtype, args.rows, False)
        runs["transformers, by length"] = lambda: their_step(batch, dtype, args.rows, True)
    result = interleave(runs, args.repeats, ranks.device)

    tokens, response = (sum(map(of, batch)) for of in (lambda x: len(x.ids), lambda x: x.response.sum()))
    padded, sorted_padded = (sum(len(some) * max(len(x.ids) for x in some) for some in
                                 row_batches(batch, args.rows, by_length)) for by_length in (False, True))
    work = train.flops(model, batch)
    peak = train.peak_flops(torch.cuda.get_device_name(ranks.device)) if ranks.device.type == "cuda" else None
    print(heading(ranks.device, *packages))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.shape}, {parameters / 1e6:.0f}M parameters, {args.dtype}, compile {args.compile}, --micro-tokens "
          f"{args.micro_tokens}, --rows {args.rows}; medians of {args.repeats} interleaved steps or more")
    print(f"{args.batch_size} samples: {tokens} tokens, {response} of response; padded {padded}, by length "
          f"{sorted_padded}")
    print("MFU: " + (f"of {peak / 1e12:.0f} TFLOP/s, dense bf16" if peak else "the peak of this device is not known"))
    print(f"\n{'':23}  time ratio  memory ratio  tokens/s  response tokens/s   MFU   peak memory")
    first = 12 * parameters + result["ours"][3]                           # weights and moments, and what is above them
    for name, (time_ratio, _, seconds, above) in result.items():
        mfu, memory = f"{work / seconds / peak:4.0%}" if peak else "   -", 12 * parameters + above
        print(f"{name:23}  {time_ratio:10.2f}  {memory / first:12.2f}  {tokens / seconds:8.0f}  "
              f"{response / seconds:17.0f}  {mfu}  {gigabytes(memory):>12}")


if __name__ == "__main__":
    main()
