"""Fine-tunes a GPT with any objective of bft.py, on one process or many.

    python train.py                                        # the default job on assets/, some minutes on two CPU cores
    torchrun --nproc_per_node=8 train.py                   # the same on eight GPUs
    torchrun --nproc_per_node=8 train.py --init DIR_OR_HUB_ID --data FILE.jsonl --objective sft bft --out runs/mine

Reads top to bottom: settings, what a run directory holds, the loop (`train`), the default job (`demo`).
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import bft
from data import (
    CHAT_FORMATS, Parser, UserError, bucket, collate, compare_template, deal, find_format, global_batch, load_choice,
    load_samples, load_tokenizer, read_jsonl, run
)
from eval import (
    FOLLOWED, NOVEL, PREDICTIONS, Ranks, choice_items, findings, generation_config, gradient_items,
    load_weights, open_model, plot, read_metrics, score, segment_sum, stop_ids
)
from model import GPT, GPTConfig, autocast, compute_dtype, replacing, weight_files, write_whole


HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------------------------
# Settings

def flag(default, help, **argument):
    return field(default=default, metadata={"help": help, **argument})


@dataclass
class Settings:
    init: str = flag("", "model to start from: a directory, a Hugging Face repository id, or 'scratch'")
    data: str = flag("", "training samples, JSONL or .jsonl.gz")
    val_data: str = flag("", "validation samples; their plain NLL is logged")
    objective: tuple = flag(("bft",), "one or several rows of bft.OBJECTIVES, each trained from the same start",
                            nargs="+", choices=list(bft.OBJECTIVES))
    group_size: int = flag(256, "g: the window of group and local confidence, in response tokens")
    out: str = flag("runs/out", "run directory; several objectives get one each inside it")
    epochs: int = flag(3, "passes over the data")
    steps: int = flag(0, "optimizer steps, in place of epochs; goes on into further epochs")
    batch_size: int = flag(32, "samples in a global batch, over all ranks and micro-batches")
    micro_tokens: int = flag(8192, "tokens in a micro-batch of one rank, at most; a longer sample is one by itself "
                             "(compiled, a micro-batch is filled up to the next quarter of it)")
    max_length: int = flag(0, "tokens in a sample, at most; 0: what the model's positions allow")
    lr: float = flag(1e-5, "peak learning rate")
    min_lr: float = flag(0.0, "learning rate at the end of the cosine")
    warmup: float = flag(0.05, "fraction of the steps in which the learning rate rises")
    weight_decay: float = flag(0.0, "AdamW's, on matrices only")
    grad_clip: float = flag(1.0, "largest gradient norm; 0: no clipping")
    seed: int = flag(0, "of random weights and of the order of samples")
    dtype: str = flag("auto", "autocast; auto: bfloat16 where the device has it natively",
                      choices=("auto", "float32", "bfloat16"))
    compile: bool | None = flag(None, "torch.compile the model; without either: on CUDA",
                                action=argparse.BooleanOptionalAction)
    recompute: bool = flag(False, "keep each block's input alone and compute the block again in the backward pass",
                           action="store_true")
    lora_rank: int = flag(0, "rank of adapters (LoRA) on all linear layers of the blocks; 0: train all weights")
    lora_alpha: float = flag(0.0, "adapters are scaled by alpha / rank; 0: twice the rank")
    save_every: int = flag(500, "steps between checkpoints; 0: only at the end")
    eval_every: int = flag(0, "steps between validations; 0: only before the first step and after the last")
    log_every: int = flag(10, "steps between lines on the terminal; only then is a GPU waited for, a line for each "
                          "step written to metrics.jsonl, and a loss that is no number found")
    keep: int = flag(2, "checkpoints to keep")
    resume: bool = flag(True, "go on from the newest checkpoint in --out; --no-resume starts again over it",
                        action=argparse.BooleanOptionalAction)
    device: str = flag("auto", "auto: cuda if there is one, else cpu")
    chat_format: str = flag("auto", "how turns become tokens; auto: by the tokenizer's special tokens",
                            choices=["auto", *CHAT_FORMATS])
    tokenizer: str = flag("", "directory with tokenizer.json, or a tiktoken name; default: that of --init")
    n_layer: int = flag(4, "with --init scratch: layers")
    n_head: int = flag(4, "with --init scratch: attention heads")
    n_embd: int = flag(128, "with --init scratch: width")


# What may differ when a run goes on: of no account, and what changes no more than the rounding of its numbers.
NO_ACCOUNT = {"out", "save_every", "eval_every", "log_every", "keep", "resume"}
ROUNDING = {"micro_tokens", "compile", "recompute", "device", "world_size", "threads", "git_commit", "python", "torch",
            "numpy", "tiktoken"}


def parse_settings(argv):
    """argv -> (Settings, (seeds, learning rates) of the default job or None). Raises UserError."""
    parser = Parser(description="Fine-tunes a GPT with any objective of bft.py. Without --init and --data it runs the "
                    "default job on assets/, with these defaults in place of those below: "
                    + ", ".join(f"{k} {v if not isinstance(v, tuple) else ' '.join(v)}" for k, v in TUNE.items()),
                    argument_default=argparse.SUPPRESS)
    for f in fields(Settings):
        options = dict(f.metadata)
        if f.default not in ("", None):
            default = f.default if not isinstance(f.default, tuple) else " ".join(f.default)
            options["help"] += f" (default: {default})"
        if "action" not in options:
            options["type"] = type(f.default) if not isinstance(f.default, tuple) else str
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
    job = parser.add_argument_group("the default job alone")
    job.add_argument("--seeds", nargs="+", type=int, help="a base, planted labels and an order of samples for each "
                     f"(default: {' '.join(map(str, SEEDS))})")
    job.add_argument("--lrs", nargs="+", type=float, help="every objective is trained at each of these peak learning "
                     f"rates (default: {' '.join(f'{lr:g}' for lr in LRS)})")
    job.add_argument("--quick", action="store_true", help="one seed: no intervals over trainings")
    given = vars(parser.parse_args(argv))
    default_job = not given.keys() & {"init", "data"}
    grid = {name: given.pop(name, None) for name in ("seeds", "lrs", "quick")}
    if not default_job and any(grid.values()):
        raise UserError("--seeds, --lrs and --quick are the default job's, which has no --init or --data; expected "
                        "--seed and --lr")
    if default_job and given.keys() & {"val_data", "tokenizer", "chat_format", "max_length"}:
        raise UserError("--val-data, --tokenizer, --chat-format and --max-length go with --init and --data: the "
                        "default job has its own")
    s = Settings(**{**(TUNE if default_job else {}), **given})
    s.objective = tuple(dict.fromkeys(s.objective))
    for name in ("group_size", "batch_size", "micro_tokens", "n_layer", "n_head", "n_embd", "log_every", "keep"):
        if not 1 <= getattr(s, name) < 2 ** 31:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(s, name)}; expected at least 1, below 2**31")
    for name in ("steps", "max_length", "min_lr", "weight_decay", "grad_clip", "lora_rank", "lora_alpha", "save_every",
                 "eval_every", "seed"):
        if not 0 <= getattr(s, name) < 2 ** 32:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(s, name)}; expected 0 or more, below 2**32")
    if s.lora_alpha and not s.lora_rank or s.lora_rank and s.init == "scratch":
        raise UserError("--lora-alpha needs --lora-rank" if not s.lora_rank else
                        "--lora-rank adapts a trained model; --init scratch has random weights")
    if not s.steps and s.epochs < 1:
        raise UserError(f"--epochs is {s.epochs}; expected at least 1")
    if not 0 < s.lr < math.inf or not 0 <= s.warmup <= 1:
        raise UserError(f"--lr is {s.lr} and --warmup {s.warmup}; expected a rate above 0 and a fraction of 0 to 1")
    if s.n_embd % s.n_head or s.n_embd // s.n_head % 2:
        raise UserError(f"--n-embd is {s.n_embd} for --n-head {s.n_head}; expected an even number for each head")
    if not default_job:
        return s, None
    for one, other in (("seed", "seeds"), ("lr", "lrs"), ("quick", "seeds"), ("seed", "quick")):
        if grid.get(one, one in given) and grid[other]:
            raise UserError(f"--{one} and --{other} are both given; expected one of them")
    seeds = sorted(set(grid["seeds"] or ([s.seed] if "seed" in given else SEEDS[:1] if grid["quick"] else SEEDS)))
    lrs = sorted(set(grid["lrs"] or ([s.lr] if "lr" in given else LRS)))
    if not all(0 <= seed < 2 ** 32 for seed in seeds) or not all(0 < lr < math.inf for lr in lrs):
        raise UserError(f"--seeds {seeds} --lrs {lrs}; expected seeds of 0 or more, below 2**32, and rates above 0")
    return s, (seeds, lrs)


class Stop:
    """Keeps SIGTERM, SIGINT or SIGHUP in `signal` until someone looks (0: none came). A second SIGINT quits at once."""

    def __enter__(self):
        self.signal = 0
        self.before = {number: signal.signal(number, self.keep) for number in (
            signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN}   # (nohup's)
        return self

    def keep(self, number, frame):
        if number == self.signal == signal.SIGINT:
            os._exit(130)
        self.signal = int(number)

    def __exit__(self, error, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.signal and error and issubclass(error, RuntimeError):     # a peer obeyed first and is gone
            signal.raise_signal(self.signal)


# ---------------------------------------------------------------------------------------------------------------------
# The run directory

@functools.cache                                                          # weights are large; several runs share them
def sha256(*paths):
    def digest(path):
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    return digest(paths[0]) if len(paths) == 1 else [digest(path) for path in paths]


def tokens_sha256(samples):
    """Of all that is learned from or validated on, whatever tokenizer, chat format, limit or code made it."""
    digest = hashlib.sha256()
    for x in samples:
        digest.update(np.int64(len(x.ids)).tobytes() + x.ids.tobytes() + x.response.tobytes())
    return digest.hexdigest()


def describe(s, objective, files, samples, device):
    """What config.json holds: everything that made the run."""
    try:
        git = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:                                                       # no git here
        git = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"objective": objective, "settings": {**asdict(s), "objective": (objective,)},
            "git_commit": git or None,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                         "tiktoken": tiktoken.__version__},
            "device": f"{device.type}: {name}", "dtype": str(compute_dtype(s.dtype, device)),
            "world_size": int(os.environ.get("WORLD_SIZE", 1)), "threads": torch.get_num_threads(),
            "sha256": {**{name: sha256(*paths) for name, paths in files.items()}, "tokens": tokens_sha256(samples)}}


def differences(old, new):
    """Where two contents of config.json differ, as phrases: (what makes another run, what changes rounding alone)."""
    def flat(config):
        return {**config["settings"], **config["versions"], **config["sha256"], **{key: config[key] for key in (
            "objective", "dtype", "device", "world_size", "threads", "git_commit")}}

    a, b, found = flat(old), flat(json.loads(json.dumps(new))), ([], [])
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key) and key not in NO_ACCOUNT:
            found[key in ROUNDING].append(f"another content of {key}" if key in new["sha256"] and key in old["sha256"]
                                          else f"{key} {a.get(key)!r}, now {b.get(key)!r}")
    return found


def same_run(out, config, resume):
    """Raises UserError if `out` is not ours to write to: something else than a run or, where it would be resumed, a
    run that differs in more than what changes its rounding."""
    parent = next(p for p in (out, *out.parents) if p.exists())
    if not parent.is_dir():
        raise UserError(f"--out {out}: {parent} is a file; expected a new path, or a run")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {parent} cannot be written to; expected a directory that can")
    try:
        another, _ = differences(json.loads((out / "config.json").read_bytes()), config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        if out.exists() and any(p.suffix != ".tmp" for p in out.iterdir()):
            raise UserError(f"--out {out} is there and is no run directory; expected a new path, or a run") from None
        return
    if resume and another:
        raise UserError(f"--out {out} holds another run ({'; '.join(another)}); name another --out, or --no-resume to "
                        "start again over it")


def checkpoints(out):
    """[(step, path)], the newest last. Raises OSError where the directory cannot be read: that is not having none."""
    names = os.listdir(out / "checkpoint") if (out / "checkpoint").exists() else []
    found = (re.fullmatch(r"step-([0-9]+)\.pt", name) for name in names)
    return sorted((int(m[1]), out / "checkpoint" / m[0]) for m in found if m)


def save_checkpoint(out, step, trained, optimizer, keep):
    """Whole or not at all, then the ones before the last `keep` go. Called by rank 0."""
    with replacing(out / "checkpoint" / f"step-{step}.pt") as f:
        torch.save({"step": step, "model": {name: p.detach() for name, p in trained.items()},
                    "optimizer": optimizer.state_dict()}, f)
    for _, old in checkpoints(out)[:-keep]:
        old.unlink()


def load_checkpoint(step, path, trained, optimizer):
    """Gives the parameters {name: parameter} and the optimizer what they had at that step. Raises an exception of any
    kind if the file is damaged, or another model's."""
    with zipfile.ZipFile(path) as whole:                                  # torch reads what a disk garbled as it is
        if part := whole.testzip():
            raise ValueError(f"{part} is damaged")
    # A GPU may have no room for it twice; and ranks that only copy from it can share the file's pages.
    on_gpu = any(p.is_cuda for p in trained.values())
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=on_gpu)
    if state["step"] != step or {name: (p.shape, p.dtype) for name, p in state["model"].items()} != {
            name: (p.shape, p.dtype) for name, p in trained.items()}:
        raise ValueError("it is of another step or another model")
    optimizer.load_state_dict(state["optimizer"])
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(state["model"][name])


def load_newest(out, trained, optimizer):
    """Loads the newest checkpoint that can be; those that cannot be are renamed. Returns its step, 0 if there are none.
    Raises UserError if none of them can be loaded. Called by rank 0."""
    damaged = []
    for step, path in reversed(checkpoints(out)):
        try:
            load_checkpoint(step, path, trained, optimizer)
        except Exception as e:                                            # whatever a damaged file leads to
            damaged.append((path, " ".join(f"{type(e).__name__}: {e}".split())[:200]))
            continue
        for other, why in damaged:
            print(f"warning: {other} cannot be loaded ({why}), so this goes on from step {step}; it is now called "
                  f"{other.name}.damaged", flush=True)
            os.replace(other, f"{other}.damaged")
        return step
    if damaged:
        reasons = "; ".join(f"{path.name}: {why}" for path, why in damaged)
        raise UserError(f"no checkpoint of {out} can be loaded ({reasons}); --no-resume starts again over it")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The loop

def learning_rate(step, total, s):
    """Linear warmup, then a cosine from lr to min_lr; step counts from 0."""
    warmup = math.ceil(s.warmup * total)
    if step < warmup:
        return s.lr * (step + 1) / warmup
    return s.min_lr + (s.lr - s.min_lr) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def sample_statistics(logp, offsets, objective, group_size):
    """For the log, each sample's sums of l_t, p_t and w_t, its s_b and its C_b: (S, 5) float64."""
    row, logp, offsets = bft.OBJECTIVES[objective], logp.detach().double(), offsets.to(logp.device, non_blocking=True)
    w, s = (weight(logp, offsets, group_size) for weight in (row.token_weight, row.sample_weight))
    return torch.stack((-segment_sum(logp, offsets), segment_sum(logp.exp(), offsets), segment_sum(w, offsets), s,
                        bft.group_confidence(logp, offsets, group_size)), 1)


# Peak dense bf16 FLOP/s by a part of the device's name (NVIDIA's data sheets, without sparsity), for MFU.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def flops(model, samples):
    """Forward and backward: 6 per weight and token, 12 d per layer and pair of tokens (PaLM, appendix B)."""
    c = model.config
    body = sum(p.numel() * (6 if p.requires_grad else 4) for p in model.layers.parameters())   # frozen: no gradient
    head = model.head.numel() * (6 if model.head.requires_grad else 4)
    tokens, targets = sum(len(x.ids) for x in samples), sum(int(x.response.sum()) for x in samples)
    pairs = sum(len(x.ids) ** 2 for x in samples) / 2                     # causal: half of them
    return body * tokens + head * targets + 12 * c.n_layer * c.n_head * c.head_dim * pairs


def backward(net, batch, objective, s, ranks, dtype):
    """Adds the gradient of one global batch (a list of data.Sample) to the parameters of net, on every rank.

    However the batch is cut into ranks and micro-batches, the gradient is that of the whole. Returns this rank's share
    of the loss and of `sample_statistics`, for `settle`, without waiting for the device.
    """
    # Every rank knows the whole batch, so the global denominator needs no communication ...
    by_samples = bft.OBJECTIVES[objective].average == "samples"
    denominator = len(batch) if by_samples else sum(int(x.response.sum()) for x in batch)
    micros = deal([len(x.ids) for x in batch], ranks.world, s.micro_tokens)[ranks.rank]
    loss, statistics = torch.zeros((), dtype=torch.float64, device=ranks.device), []
    for m, micro in enumerate(micros):
        samples = [batch[i] for i in micro]
        size = bucket(sum(len(x.ids) for x in samples), s.micro_tokens) if s.compile else 1
        packed = collate(samples, size).to(ranks.device)
        last = m == len(micros) - 1                                       # ranks exchange gradients once a step
        with net.no_sync() if ranks.world > 1 and not last else contextlib.nullcontext():
            with autocast(ranks.device, dtype):
                logp = net(packed.input_ids, packed.lengths, packed.at, packed.targets)   # (N,)
            part = bft.objective_loss(logp, packed.offsets, objective, s.group_size, denominator)
            (part * ranks.world).backward()                               # ... and DDP's mean over ranks is undone
        loss += part.detach()
        statistics.append(sample_statistics(logp, packed.offsets, objective, s.group_size))
    return loss, sum(micros, []), torch.cat(statistics)                   # whose rows are these samples of the batch


def settle(share, size, ranks):
    """(loss, statistics (B, 5) as numpy) of a whole global batch of B = size samples, from what `backward` returned for
    it on each rank. Here the device is waited for."""
    loss, samples, statistics = share
    table = torch.zeros(1 + size, 5, dtype=torch.float64)
    table[0, 0], table[1 + torch.tensor(samples, dtype=torch.int64)] = loss, statistics.cpu()
    if ranks.world > 1:
        dist.all_reduce(table)                                            # each rank filled the rows of its own samples
    table = table.numpy()
    return float(table[0, 0]), table[1:]


def train(s, objective, out, config, make_model, samples, val, extras, ranks):
    """Trains one objective into the run directory `out`, which `same_run` has looked at; returns that of the model.

    config: what `describe` says of the run. make_model() gives the starting model. samples, val: lists of data.Sample
    (val may be empty). extras: {file name: bytes} that go with the model, its tokenizer's files above all.
    """
    device, dtype = ranks.device, compute_dtype(s.dtype, ranks.device)
    s = replace(s, compile=device.type == "cuda" if s.compile is None else s.compile)
    total = s.steps or s.epochs * math.ceil(len(samples) / s.batch_size)
    found = checkpoints(out) if s.resume else []
    finished = s.resume and (not found or found[-1][0] == total) and (out / "model" / "config.json").is_file()
    if ranks.largest(finished and ranks.rank == 0):                       # what rank 0 sees; disks may be slow to agree
        ranks.progress(f"{out}: finished, {total} steps; nothing to do")
        return out / "model"
    torch.manual_seed(s.seed)
    model = make_model().to(device)
    if s.lora_rank:
        model.cast(dtype).add_lora(s.lora_rank, s.lora_alpha or 2 * s.lora_rank)
    else:
        model.float()                                                     # autocast does the rest
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for p in trained.values() if p.dim() >= 2]
    others = [p for p in trained.values() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": s.weight_decay},
                                   {"params": others, "weight_decay": 0.0}], lr=s.lr, betas=(0.9, 0.95), fused=True)

    ranks.barrier()                                                       # every rank has looked before any writes
    start = ranks.largest(load_newest(out, trained, optimizer) if s.resume and ranks.rank == 0 else 0)
    if start and ranks.rank > 0:
        load_checkpoint(start, out / "checkpoint" / f"step-{start}.pt", trained, optimizer)
    validated = False                                                     # at that step
    if ranks.rank == 0:
        for old in () if s.resume else ("checkpoint", "model"):
            if (out / old).exists():
                shutil.rmtree(out / old)
        lines = []
        if start:
            old = json.loads((out / "config.json").read_bytes())
            _, changed = differences(old, config)
            if changed:
                ranks.print(f"warning: {out} goes on with other rounding: {'; '.join(changed)}")
            earlier = old.pop("earlier", [])                              # which steps were made how
            config = {**config, "earlier": earlier + [{"to_step": start, **old}] * bool(changed)}
            lines = read_metrics(out / "metrics.jsonl", start)            # the log goes on where the checkpoint is
            validated = any("val_nll" in line for line in lines if line["step"] == start)
            if sum("loss" in line for line in lines) != start:
                ranks.print(f"warning: {out}/metrics.jsonl has not all of the {start} steps before; lines were lost")
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "config.json", [json.dumps(config, indent=2).encode()])   # first: by it a run is known
        (out / "checkpoint").mkdir(exist_ok=True)
        for old in (out / "checkpoint").glob("*.tmp"):                    # of a run that was killed while it wrote
            old.unlink()
        write_whole(out / "metrics.jsonl", [json.dumps(line).encode() + b"\n" for line in lines])
    validated = ranks.largest(validated)
    if s.compile:
        model.compile()
    net, model.recompute = model, s.recompute
    if ranks.world > 1:
        net = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None,
                                      gradient_as_bucket_view=True)       # or gradients are there twice
        # After its first backward pass DDP lays out its buckets anew, in the order in which gradients came, and then
        # sums over ranks in another order. So one that is not counted comes first, wherever a run starts.
        empty = collate([], bucket(0, s.micro_tokens) if s.compile else 1).to(device)
        with autocast(device, dtype):
            net(empty.input_ids, empty.lengths, empty.at, empty.targets).sum().backward()
        optimizer.zero_grad(set_to_none=True)

    def log(*lines):
        if ranks.rank == 0:
            with open(out / "metrics.jsonl", "a") as f:
                f.writelines(json.dumps(line) + "\n" for line in lines)
                f.flush()
                os.fsync(f.fileno())                                      # before a checkpoint says that they are there

    def validate(step):
        """Returns the number of the signal that cut it short, if one did."""
        table = score(model, val, dtype, s.micro_tokens, s.group_size, lambda: stop.signal)
        if not (cut := ranks.largest(stop.signal)):
            log({"step": step, "val_nll": -table[:, 0].sum() / table[:, 1].sum()})
            ranks.progress(f"{objective} step {step}/{total}  val_nll {-table[:, 0].sum() / table[:, 1].sum():.4f}")
        return cut

    multi_window = np.mean([x.response.sum() > s.group_size for x in samples])
    ranks.progress(f"{out}: {objective} from step {start} to {total}, {len(samples)} samples, batch {s.batch_size}, "
                   f"{sum(p.numel() for p in trained.values()) / 1e6:.1f}M of "
                   f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {ranks.world} x {device}, "
                   f"{str(dtype).removeprefix('torch.')}")
    if bft.OBJECTIVES[objective].sample_weight is not bft.every_sample_1 and multi_window < 0.1:
        ranks.once(f"warning: only {multi_window:.0%} of the samples have more than --group-size {s.group_size} "
                   "response tokens; for the others the one group is the whole sample")
    peak = next((v for k, v in PEAK_FLOPS.items() if k in config["device"]), None) if dtype == torch.bfloat16 else None

    zeros = 0                                                             # steps in a row without a loss or gradient

    def report(pending, tick):
        """Logs steps [(step, epoch, lr, batch, grad_norm, what `backward` returned), ...] that began at time tick."""
        nonlocal zeros
        whole = [settle(share, len(batch), ranks) for _, _, _, batch, _, share in pending]
        seconds, batches = time.perf_counter() - tick, [batch for _, _, _, batch, _, _ in pending]
        rate = sum(len(x.ids) for batch in batches for x in batch) / seconds
        mfu = peak and sum(flops(model, batch) for batch in batches) / seconds / peak / ranks.world
        memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else host_memory_gb()
        lines = []
        for (step, epoch, lr, batch, grad_norm, _), (loss, statistics) in zip(pending, whole):
            n, grad_norm = np.array([x.response.sum() for x in batch]), grad_norm.item()   # (B,) n_b
            nll, p, w, sample_weight, C = statistics.T                    # (B,) each
            if not math.isfinite(loss) or not math.isfinite(grad_norm):   # the same on every rank
                log(*lines)
                bad = [x.line for x, value in zip(batch, nll) if not math.isfinite(value)] or [x.line for x in batch]
                if ranks.rank == 0:
                    print(f"error: step {step}: loss {loss}, gradient norm {grad_norm}; stopped, and nothing was saved "
                          f"since, with the samples on lines {', '.join(map(str, bad))} of {s.data or 'its data'}",
                          file=sys.stderr)
                raise SystemExit(1)
            zeros = zeros + 1 if 0 in (loss, grad_norm) else min(zeros, 0)
            if zeros == 20:
                ranks.print(f"warning: since step {step - 19} the loss or its gradient is exactly 0; expected samples "
                            "with a response, and weights (token_weight, sample_weight in metrics.jsonl) above 0")
                zeros = -math.inf                                         # said once
            lines.append({
                "step": step, "epoch": epoch, "loss": loss, "nll": nll.sum() / n.sum(), "grad_norm": grad_norm,
                "clipped": bool(s.grad_clip and grad_norm > s.grad_clip), "lr": lr, "samples": len(batch),
                "tokens": sum(len(x.ids) for x in batch), "response_tokens": int(n.sum()),
                "confidence": p.sum() / n.sum(), "token_weight": w.sum() / n.sum(),
                "sample_weight": sample_weight.mean(), "sample_weight_sd": sample_weight.std(),
                "min_group_confidence": C.mean(), "min_group_confidence_p05": np.percentile(C, 5),
                "multi_window": np.mean(n > s.group_size), "tokens_per_s": rate, "mfu": mfu, "memory_gb": memory})
        log(*lines)
        eta = seconds / len(pending) * (total - step)
        ranks.progress(f"{objective} step {step}/{total}  loss {loss:.4f}  nll {lines[-1]['nll']:.4f}  "
                       f"|g| {grad_norm:.3f}  lr {lr:.2e}  {rate:,.0f} tok/s  eta {eta // 60:.0f}:{eta % 60:02.0f}")

    def due(every, step):
        return step == total or every and step % every == 0

    with Stop() as stop:
        received, step, pending, tick = 0, start, [], time.perf_counter()
        if val and not validated and (start == 0 or due(s.eval_every, start)):
            received = validate(start)
        for step in range(start, total):
            if received:
                break
            # Whatever a model or an objective may draw depends on these three alone: there is no state to save.
            seed = np.random.SeedSequence((s.seed, step, ranks.rank)).generate_state(1)[0]
            for draw in (random.seed, np.random.seed, torch.manual_seed):
                draw(int(seed))
            epoch, numbers = global_batch(step, len(samples), s.batch_size, s.seed)
            batch, lr = [samples[i] for i in numbers], learning_rate(step, total, s)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with torch.compiler.set_stance("default" if s.compile else "force_eager"):
                share = backward(net, batch, objective, s, ranks, dtype)
            grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), s.grad_clip or math.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            step += 1
            pending.append((step, epoch, lr, batch, grad_norm, share))
            received = ranks.largest(stop.signal)                         # by any rank: all stop at the same step
            saves, evaluates = due(s.save_every, step), val and due(s.eval_every, step)
            if received or saves or evaluates or step == start + 1 or step % s.log_every == 0:
                report(pending, tick)                                     # stops if a number is not finite
                if evaluates and not received:
                    received = validate(step)
                if (saves or received) and ranks.rank == 0:
                    save_checkpoint(out, step, trained, optimizer, s.keep)
                pending, tick = [], time.perf_counter()
        if received := received or ranks.largest(stop.signal):
            ranks.barrier()                                               # whoever left now would have rank 0 killed
            ranks.print(f"{out}: {signal.Signals(received).name}; the same command goes on from step {step}")
            raise SystemExit(128 + received)

    if ranks.rank == 0:
        (out / "model").mkdir(exist_ok=True)
        for name, content in extras.items():
            write_whole(out / "model" / name, [content])
        if s.lora_rank:                                                   # into the weights as they were, not rounded
            adapters, model = {name: p.detach().cpu() for name, p in trained.items()}, make_model()
            model.add_lora(s.lora_rank, s.lora_alpha or 2 * s.lora_rank)
            model.load_state_dict({**model.state_dict(), **adapters})
        model.save_pretrained(out / "model")
    ranks.barrier()
    return out / "model"


def host_memory_gb():
    """The process's largest resident size so far, in GB."""
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# ---------------------------------------------------------------------------------------------------------------------
# The default job: what does each loss learn, depending on what the model already believes?

SEEDS, LRS = (0, 1, 2), (2e-4, 1e-3, 2e-3, 4e-3)
BASE = {"init": "scratch", "objective": ("sft",), "epochs": 6, "batch_size": 48, "lr": 5e-3, "weight_decay": 0.01,
        "log_every": 200}
# Responses have about 45 tokens, so the paper's groups of 256 would all be whole samples: 16 gives each some thirty.
# A model this small is faster in float32 than under bfloat16 autocast, and not worth compiling many times.
TUNE = {"out": "runs/demo", "objective": ("sft", "sft-sample", "bft-token", "bft", "bft-v3"), "group_size": 16,
        "epochs": 3, "dtype": "float32", "compile": False, "n_layer": 2, "n_head": 4, "n_embd": 96}


def plant(rows, items, seed):
    """Wrong labels, in memory only: in each planted quad of facts every subject gets another one's response.

    rows: [(line, fine-tuning object)], items: choice objects. Returns both with the planted ones changed: a row's
    response is its mate's about the row's subject; an item gains "planted", the index of the wrong answer. A seeded
    rotation of the quad's four answers: no one keeps its own, every answer is as frequent as before, and none is
    annotated for its new subject (`assets/README.md`).
    """
    answer = {x["fact"]: x["choices"][x["answer"]] for x in items}
    quads = {}
    for x in items:
        if x["group"] == "planted":
            quads.setdefault(x["quad"], []).append(x["fact"])
    rng, mate = np.random.RandomState([seed, 1]), {}
    for facts in quads.values():
        shift = rng.randint(1, len(facts))
        mate |= {fact: facts[(k + shift) % len(facts)] for k, fact in enumerate(facts)}
    responses = {}
    for _, row in rows:
        responses.setdefault(row["fact"], []).append((row["subject"], row["response"]))
    responses = {fact: iter(r) for fact, r in responses.items()}          # a fact's wordings come in its quad's order
    planted = []
    for line, row in rows:
        if row["fact"] in mate:
            subject, response = next(responses[mate[row["fact"]]])
            row = {**row, "response": response.replace(subject, row["subject"])}
        planted.append((line, row))
    return planted, [{**x, "planted": x["choices"].index(answer[mate[x["fact"]]])} if x["fact"] in mate else x
                     for x in items]


def demo(s, seeds, lrs, ranks):
    """python train.py: for each seed a base; from it each objective at each learning rate, on the same samples in the
    same order; choice items by stratum; then eval.findings, in s.out too, and the pictures."""
    began, assets, dtype = time.perf_counter(), HERE / "assets", compute_dtype(s.dtype, ranks.device)
    tokenizer, out = load_tokenizer(assets), Path(s.out)
    files = {"data": [assets / "pretrain.jsonl"], "tokenizer": [assets / "tokenizer.json"]}
    inputs = {"data": [assets / "finetune.jsonl"], "choice": [assets / "choice.jsonl"], "tokenizer": files["tokenizer"]}
    shared = ("dtype", "device", "compile", "recompute", "micro_tokens", "n_layer", "n_head", "n_embd")
    extras, code = model_files(tokenizer, [tokenizer.eos_id], {}), ("bft", "model", "data", "train")
    texts, _ = load_samples(assets / "pretrain.jsonl", tokenizer)
    rows, questions = list(read_jsonl(assets / "finetune.jsonl")), load_choice(assets / "choice.jsonl")
    there = {p.name for p in out.iterdir()} if out.is_dir() else set()
    strange = [name for name in there if not re.fullmatch(r"seed-\d+|table\.txt|results\.json|.*\.(png|tmp)", name)]
    if strange or "results.json" in there and not any(name.startswith("seed-") for name in there):
        raise UserError(f"--out {out} holds something else; expected a new path, or that of an earlier default job")
    jobs = []
    for seed in seeds:                                                    # every path is looked at before any training
        b = Settings(**BASE, **{name: getattr(s, name) for name in shared}, seed=seed)
        check_memory(scratch(b, tokenizer), b, ranks)
        config = describe(b, "sft", files, texts, ranks.device)
        key = [{k: v for k, v in config["settings"].items() if k not in NO_ACCOUNT | ROUNDING}, config["sha256"],
               [(HERE / f"{module}.py").read_text() for module in code]]
        base = Path("runs") / f"base-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]}"
        same_run(base, config, resume=True)
        planted, items = plant(rows, questions, seed)
        samples, _ = load_samples(assets / "finetune.jsonl", tokenizer, rows=planted)
        runs = []
        for lr in lrs:
            mine = replace(s, seed=seed, lr=lr, init=str(base))           # on record: another base is another run
            for objective in s.objective:
                directory = out / f"seed-{seed}" / f"lr-{lr}" / objective
                runs.append((mine, objective, directory, describe(mine, objective, inputs, samples, ranks.device)))
                same_run(directory, runs[-1][3], s.resume)
        jobs.append((b, base, config, samples, items, runs))
    ranks.print(f"{len(jobs)} base(s), each fine-tuned {len(s.objective)} x {len(lrs)} times. Predictions, from the "
                "gradients (1 - p a token for sft, p (1 - p) where p weighs):\n"
                + "\n".join(f"- {text}" for text, *_ in PREDICTIONS))

    models, gradient = [], None

    def measure(directory, items, objective, seed, lr):
        model = load_weights(directory).cast(dtype).to(ranks.device)
        records = choice_items(model, tokenizer, items, dtype)
        models.append({"objective": objective, "seed": seed, "lr": lr, "items": [
            {k: x[k] for k in ("line", "group", "acc", "nll", "followed", "planted_nll") if k in x} for x in records]})
        novel, wrong = (np.mean([x[key] for x in records if x["group"] == group]) for group, key in (NOVEL, FOLLOWED))
        ranks.print(f"seed {seed}  {objective if lr == 0 else f'lr {lr:g}  {objective}':22s}  novel facts right "
                    f"{novel:4.0%}  wrong labels followed {wrong:4.0%}")
        return model

    for b, base, config, samples, items, runs in jobs:
        ranks.print(f"\nSeed {b.seed}: a base learns the facts of the known genes ({base}, kept for the next time).")
        base = train(b, "sft", base, config, functools.partial(GPT, scratch(b, tokenizer)), texts, [], extras, ranks)
        model = measure(base, items, "base", b.seed, 0)
        if gradient is None:                                              # (in a batch of one sample two are the same)
            same = ("sft-sample", "bft-token", "bft-tokavg")
            names = [name for name in dict.fromkeys(("sft", "dft", *s.objective)) if name not in same]
            gradient = gradient_items(model, samples[::3], names, s.group_size, dtype)
        for mine, objective, directory, config in runs:
            ranks.quiet = True
            tuned = train(mine, objective, directory, config, functools.partial(load_weights, base), samples, [],
                          extras, ranks)
            ranks.quiet = False
            if ranks.rank == 0:                                           # it is finished; so many would fill a disk
                shutil.rmtree(directory / "checkpoint", ignore_errors=True)
            measure(tuned, items, objective, b.seed, mine.lr)
    if ranks.rank == 0:
        results = {"objectives": s.objective, "seeds": seeds, "lrs": lrs, "models": models, "gradient": gradient}
        write_whole(out / "results.json", [json.dumps(results).encode()])
        table = findings(results)
        write_whole(out / "table.txt", [table.encode()])
        ranks.print(f"\n{table}")
        middle = [directory for mine, _, directory, _ in jobs[0][-1] if mine.lr == lrs[len(lrs) // 2]]
        try:
            for path in plot([out, *middle], out / "demo"):
                ranks.print(f"picture: {path}")
        except UserError as e:                                            # matplotlib is not one of the four packages
            ranks.print(f"No pictures: {e}; then: python eval.py {out} --tasks plot --out {out / 'demo'}")
        ranks.print(f"Tables and every item's scores are in {out}. {time.perf_counter() - began:.0f} s.")


# ---------------------------------------------------------------------------------------------------------------------

def scratch(s, tokenizer):
    """The configuration of a model of the LLaMA architecture. Raises UserError."""
    hf = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tokenizer.n_vocab,
          "hidden_size": s.n_embd, "intermediate_size": -(-s.n_embd * 8 // 3 // 32) * 32,
          "num_hidden_layers": s.n_layer, "num_attention_heads": s.n_head, "hidden_act": "silu", "rms_norm_eps": 1e-5,
          "max_position_embeddings": s.max_length or 2048, "rope_theta": 10000.0, "tie_word_embeddings": True,
          "bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    try:
        return GPTConfig.from_hf(hf)
    except ValueError as e:
        raise UserError(f"--init scratch: {e}") from None


# Files that go with a model as they are.
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
                   "added_tokens.json", "chat_template.jinja")


def model_files(tokenizer, stop, generation):
    """{file name: bytes}: the tokenizer's files, and a generation_config.json as it was but for `stop` as its eos: what
    the chat format ends an answer with is among them, so that servers stop there."""
    generation = {**generation, "eos_token_id": stop[0] if len(stop) == 1 else stop}
    extras = {"generation_config.json": json.dumps(generation, indent=2).encode()}
    if tokenizer.path:                                                    # not one of tiktoken's own
        extras["tokenizer.json"] = tokenizer.path.read_bytes()
        beside = (tokenizer.path.with_name(name) for name in TOKENIZER_FILES)
        extras |= {path.name: path.read_bytes() for path in beside if path.is_file()}
    return extras


def training_bytes(c, lora_rank, dtype):
    """Bytes of weights, gradients and optimizer state on every rank: 16 a trained parameter (float32: weight, gradient,
    two moments), those of dtype a frozen one. Activations come on top."""
    with torch.device("meta"):                                            # shapes only
        model = GPT(c)
        if lora_rank:
            model.cast(dtype).add_lora(lora_rank, 1)
    return sum(16 * p.numel() if p.requires_grad else p.nbytes for p in model.parameters())


def check_memory(c, s, ranks):
    """Raises UserError, before anything is loaded, if not even the weights and optimizer state can fit."""
    if ranks.device.type == "cuda":
        processes, room = 1, torch.cuda.get_device_properties(ranks.device).total_memory
    else:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    program = "python" if ranks.world == 1 else f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)}"
    need, less = (processes * training_bytes(c, rank, compute_dtype(s.dtype, ranks.device))
                  for rank in (s.lora_rank, s.lora_rank or 16))
    if need > room:
        raise UserError(f"weights, gradients and optimizer state need {need / 1e9:.0f} GB, {ranks.device} has "
                        f"{room / 1e9:.0f} GB; " + ("expected a smaller model or more memory" if less > room else
                        f"this needs {less / 1e9:.0f} GB: {program} {shlex.join(sys.argv)} --lora-rank 16"))


def finetune(s, ranks):
    """python train.py --init DIR --data FILE: each objective from the same weights, on the same samples in order."""
    if not s.data or not s.init:
        raise UserError(f"--{'init' if s.data else 'data'} is missing; expected --init (a model, or 'scratch') and "
                        "--data (a JSONL file) together, or neither for the default job")
    files = {}
    if s.init == "scratch":
        if not s.tokenizer:
            raise UserError("--init scratch needs --tokenizer: a directory with tokenizer.json, or a tiktoken name")
        directory, tokenizer = None, load_tokenizer(s.tokenizer)
        c = scratch(s, tokenizer)
        make_model = functools.partial(GPT, c)
    else:
        directory, c, tokenizer = open_model(s.init, s.tokenizer)
        if Path(s.out).resolve() in directory.resolve().parents or Path(s.out).resolve() == directory.resolve():
            raise UserError(f"--out {s.out} holds the model of --init; expected another directory")
        make_model = functools.partial(load_weights, directory)
        files["init"] = [directory / "config.json", *weight_files(directory)]
    check_memory(c, s, ranks)
    s, limit = replace(s, chat_format=find_format(s.chat_format, tokenizer)), c.max_positions
    if directory and ranks.rank == 0 and (difference := compare_template(directory, tokenizer, s.chat_format)):
        ranks.print(f"warning: {difference}")
    if s.max_length > limit:
        raise UserError(f"--max-length is {s.max_length}; the model's positions end at {limit}")
    sets = {}
    for name in ("data", "val_data"):
        if path := getattr(s, name):
            sets[name], counts = load_samples(path, tokenizer, s.chat_format, s.max_length or limit)
            files[name] = [path]
            ranks.print(f"{path}: {counts['samples']} samples, chat format {s.chat_format}; {counts['cut']} cut at "
                        f"{s.max_length or limit} tokens, {counts['dropped']} dropped for want of a response token")
    if len(sets["data"]) < ranks.world:
        raise UserError(f"{s.data}: {len(sets['data'])} samples for {ranks.world} ranks; expected one for each or more")
    generation = generation_config(directory) if directory else {}
    extras = model_files(tokenizer, stop_ids(c, generation, tokenizer, s.chat_format), generation)
    if tokenizer.path:
        beside = tokenizer.path.with_name("tokenizer_config.json")        # which names the token that ends a text
        files["tokenizer"] = [tokenizer.path, *[beside] * beside.is_file()]
    else:
        ranks.print(f"warning: {s.tokenizer} is one of tiktoken's own: the model is saved without a tokenizer.json")
    outs = {o: Path(s.out) / o if len(s.objective) > 1 else Path(s.out) for o in s.objective}
    if len(outs) > 1 and (Path(s.out) / "config.json").exists():
        raise UserError(f"--out {s.out} holds a run of one objective; name another one for several")
    configs = {objective: describe(s, objective, files, sum(sets.values(), []), ranks.device) for objective in outs}
    for objective, out in outs.items():                                   # all of them before the first is trained
        same_run(out, configs[objective], s.resume)
    for objective, out in outs.items():
        model = train(s, objective, out, configs[objective], make_model, sets["data"], sets.get("val_data", []), extras,
                      ranks)
        ranks.print(f"{objective}: the model is in {model}")


def main():
    s, grid = parse_settings(sys.argv[1:])
    ranks = Ranks(s.device)
    ranks.start()
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))       # by torchrun, with the same command
    s.resume = bool(s.resume or ranks.largest(restarts))
    if grid:
        demo(s, *grid, ranks)
    else:
        finetune(s, ranks)


if __name__ == "__main__":
    run(main)
