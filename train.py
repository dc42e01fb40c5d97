"""Fine-tunes a GPT with any objective of bft.py, on one process or many.

    python train.py                                        # the default job on assets/: some 80 seconds on two cores
    torchrun --nproc_per_node=8 train.py                   # the same on eight GPUs
    torchrun --nproc_per_node=8 train.py --init DIR_OR_HUB_ID --data FILE.jsonl --objective sft bft --out runs/mine

From top to bottom: settings, the command, the loop (`train`), what it calls (`forward_backward` is the middle of a
step), what is logged, and the memory that a run needs.
"""

import argparse
import contextlib
import itertools
import math
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import bft
import hf
from data import Samples, bucket, collate, deal, global_batch, load_samples
from experiment import job as default_job
from hf.conversation import TEMPLATE_HELP, parse_templates
from hf.start import check_base, files_of_the_model, name_of_base, open_start, settings_of_adapter, warnings_of
from model import GPT
from runtime.checkpoint import not_finite, resume_from_checkpoint, save_checkpoint
from runtime.device import autocast, compute_dtype, memory_bytes, peak_memory_gb
from runtime.files import write_whole
from runtime.flags import add_flags, check_bounds, flag, flag_name, spelled
from runtime.log import append_metrics
from runtime.node import once_a_node
from runtime.one_writer import check_still_ours, only_writer
from runtime.process import Parser, Stop, UserError, leave_after_a_signal, read_launch, run
from runtime.ranks import Ranks
from runtime.report import check_packages, open_reports
from runtime.run_directory import begin_run, check_out, check_unchanged, describe, is_finished, tokens_sha256
from runtime.sharding import (
    SHARDS,
    draw_parameters,
    gradient_exchange,
    gradient_norm,
    is_sharded,
    ranks_per_copy,
    shard,
)
from tasks.reference import with_reference
from tasks.scoring import score
from variants import load_variants, variant_of, variants_in


# ---------------------------------------------------------------------------------------------------------------------
# Settings

@dataclass
class Settings:
    init: str = flag("", "model to start from: a directory, a Hugging Face repository id, or 'scratch'")
    data: tuple = flag((), "training samples: files of JSONL, JSON arrays or parquet", nargs="+")
    val_data: tuple = flag((), "validation samples, likewise; their plain NLL is logged", nargs="+")
    prompt_template: str = flag("", f"the question of rows of other keys, {TEMPLATE_HELP}")
    response_template: str = flag("", "what the model is to answer to it, likewise")
    objective: tuple = flag(("bft",), "one or several rows of bft.OBJECTIVES, each trained from the same start",
                            nargs="+", choices=bft.OBJECTIVES.keys())
    variant: tuple = flag((), "Python files that add rows to bft.OBJECTIVES, such as those in variants/", nargs="+")
    group_size: int = flag(256, "g: the window of group and local confidence, in response tokens", at_least=1)
    out: str = flag("runs/out", "run directory; several objectives get one each inside it")
    epochs: int = flag(3, "passes over the data")
    steps: int = flag(0, "optimizer steps, in place of epochs; goes on into further epochs", at_least=0)
    batch_size: int = flag(32, "samples in a global batch, over all ranks and micro-batches", at_least=1)
    micro_tokens: int = flag(8192, "tokens in a micro-batch of one rank, at most; a longer sample has one for itself "
                             "(with --compile a micro-batch is padded to the next quarter of this number)", at_least=1)
    max_length: int = flag(0, "tokens in a sample, at most; 0: what the model's positions allow", at_least=0)
    lr: float = flag(1e-5, "peak learning rate; adapters need more, some 1e-4 and up, and random weights some 1e-3",
                     above=0)
    min_lr: float = flag(0.0, "what the cosine of the learning rate falls towards", at_least=0)
    warmup: float = flag(0.05, "fraction of the steps in which the learning rate rises", at_least=0, at_most=1)
    weight_decay: float = flag(0.0, "AdamW's, on matrices only (embeddings and adapters among them)", at_least=0)
    grad_clip: float = flag(1.0, "largest gradient norm; 0: no clipping", at_least=0)
    seed: int = flag(0, "of random weights and of the order of samples", at_least=0, below=2 ** 32)
    dtype: str = flag("auto", "autocast; auto: bfloat16 where the device has it natively",
                      choices=("auto", "float32", "bfloat16"))
    compile: bool | None = flag(None, "torch.compile the model (with neither flag: on CUDA)",
                                action=argparse.BooleanOptionalAction)
    recompute: bool = flag(False, "keep only each block's input, and compute the block again in the backward pass",
                           action="store_true")
    shard: str = flag("no", "split each parameter's rows over all ranks, or over those of each node (FSDP2); no: every "
                      "rank holds the whole model", choices=SHARDS)
    lora_rank: int = flag(0, "rank of adapters (LoRA) on all linear layers of the blocks; 0: train all weights",
                          at_least=0)
    lora_alpha: float = flag(0.0, "adapters are scaled by alpha / rank; 0: twice the rank", at_least=0)
    adapter: str = flag("", "adapters to go on from, with their rank and alpha: a directory in PEFT's format, such as "
                        "OUT/adapter of a run, or a repository id; --init is the model that they were trained on")
    save_every: int = flag(500, "steps between checkpoints; 0: only at the end", at_least=0)
    eval_every: int = flag(0, "steps between validations; 0: only before the first step and after the last",
                           at_least=0)
    log_every: int = flag(10, "steps between lines on the terminal. Only then are the steps since the last line "
                          "written to metrics.jsonl, and is a loss that is no number found", at_least=1)
    keep: int = flag(2, "checkpoints to keep", at_least=1)
    resume: bool = flag(True, "go on from the newest checkpoint in --out; --no-resume starts again over it",
                        action=argparse.BooleanOptionalAction)
    report: tuple = flag((), "where the lines of metrics.jsonl go too", nargs="+", choices=("tensorboard", "wandb"))
    device: str = flag("auto", "auto: cuda if there is one, else cpu")
    chat_format: str = flag("auto", "how turns become tokens; auto: by the model's own chat template, or what its "
                            "special tokens suggest",
                            choices=["auto", *hf.CHAT_FORMATS])
    tokenizer: str = flag("", "directory with tokenizer.json, or a tiktoken name; default: that of --init")
    n_layer: int = flag(4, "with --init scratch: layers", at_least=1)
    n_head: int = flag(4, "with --init scratch: attention heads", at_least=1)
    n_embd: int = flag(128, "with --init scratch: width", at_least=1)


NOT_IN_THE_DEFAULT_JOB = ("val_data", "prompt_template", "response_template", "tokenizer", "chat_format", "max_length",
                          "report", "adapter")


def parse_settings(argv):
    """argv -> (Settings, Grid of the default job or None). Raises UserError."""
    changed = ", ".join(f"{name} {spelled(value)}" for name, value in default_job.DEFAULTS.items())
    parser = Parser(description="Fine-tunes a GPT with any objective of bft.py. Without --init and --data it runs the "
                    f"default job on assets/, with these defaults in place of those below: {changed}",
                    argument_default=argparse.SUPPRESS)
    # Their rows are among what --objective may name.
    load_variants(variants_in(argv))
    add_flags(parser, Settings)
    default_job.add_flags(parser)
    given = vars(parser.parse_args(argv))
    grid = {name: given.pop(name) for name in ("seeds", "lrs", "continuum") if name in given}
    is_default_job = not given.keys() & {"init", "data"}
    if grid and not is_default_job:
        raise UserError("--seeds, --lrs and --continuum are the default job's, which has no --init or --data; expected "
                        "--seed and --lr")
    misplaced = [flag_name(name) for name in NOT_IN_THE_DEFAULT_JOB if name in given]
    if is_default_job and misplaced:
        raise UserError(f"{', '.join(misplaced)}: not for the default job; expected --init and --data with it")
    defaults = default_job.DEFAULTS if is_default_job else {}
    settings = Settings(**{**defaults, **given})
    settings.objective = tuple(dict.fromkeys(settings.objective))         # one that is named twice is trained once
    for name in ("data", "val_data", "variant"):
        setattr(settings, name, tuple(getattr(settings, name)))
    check_settings(settings)
    if not is_default_job:
        return settings, None
    return settings, default_job.parse_grid(given, **grid)


def check_settings(settings):
    """Raises UserError for what cannot be meant."""
    check_bounds(settings)
    parse_templates(settings.prompt_template, settings.response_template)
    if settings.lora_alpha and not settings.lora_rank and not settings.adapter:
        raise UserError("--lora-alpha needs --lora-rank")
    if settings.init == "scratch" and (settings.lora_rank or settings.adapter):
        raise UserError("--lora-rank and --adapter are for a trained model; --init scratch has random weights")
    if not settings.steps and settings.epochs < 1:
        raise UserError(f"--epochs is {settings.epochs}; expected at least 1")
    if settings.n_embd % settings.n_head or settings.n_embd // settings.n_head % 2:
        raise UserError(f"--n-embd is {settings.n_embd} for --n-head {settings.n_head}; expected an even number for "
                        "each head")


# ---------------------------------------------------------------------------------------------------------------------
# The command

def main():
    settings, grid = parse_settings(sys.argv[1:])
    ranks = Ranks(settings.device)
    ranks.start()
    # torchrun restarts a job with the same command: then it goes on, whatever --no-resume said the first time.
    restarts = read_launch().restarts
    settings.resume = bool(settings.resume or ranks.largest(restarts))
    if grid:
        default_job.run_job(settings, grid, ranks, train, describe_run, check_memory)
    else:
        finetune(settings, ranks)


def finetune(settings, ranks):
    """python train.py --init DIR --data FILE: each objective from the same weights, on the same samples in order."""
    if not settings.data or not settings.init:
        raise UserError(f"--{'init' if settings.data else 'data'} is missing; expected --init (a model, or 'scratch') "
                        "and --data (a file) together, or neither for the default job")
    if ranks.rank == 0:
        check_packages(settings.report)
    start = open_start(settings)
    check_base(settings, start)
    settings = settings_of_adapter(settings, start.adapter)
    check_memory(start.config, settings, ranks)
    for warning in warnings_of(settings, start):
        ranks.print(f"warning: {warning}")
    settings = replace(settings, chat_format=start.chat_format.name)
    extra_files = files_of_the_model(start)
    samples, validation = load_sets(settings, start, ranks)
    outs = {objective: Path(settings.out) / objective for objective in settings.objective}
    if len(outs) == 1:
        outs = {objective: Path(settings.out) for objective in outs}
    elif (Path(settings.out) / "config.json").exists():
        raise UserError(f"--out {settings.out} holds a run of one objective; name another one for several")
    records = {objective: describe_run(settings, objective, start.files, [samples, validation], ranks)
               for objective in outs}
    # All of them are looked at before the first is trained.
    for objective, out in outs.items():
        check_out(out, records[objective], settings.resume)
    for objective, out in outs.items():
        with only_writer(out, ranks):
            # Another command may have written there meanwhile.
            check_out(out, records[objective], settings.resume)
            directory = train(settings, objective, out, records[objective], start.config, start.directory, samples,
                              validation, extra_files, ranks)
        ranks.print(f"{objective}: the model is in {directory}")


def load_sets(settings, start, ranks):
    """[training samples, validation samples], data.Samples that each node has once. Raises UserError."""
    limit = start.config.max_positions
    if settings.max_length > limit:
        raise UserError(f"--max-length is {settings.max_length}; expected at most {limit}, where the model's positions "
                        "end (max_position_embeddings in its config.json, or sliding_window if that is smaller)")
    sets = []
    for paths in (settings.data, settings.val_data):
        longest = settings.max_length or limit
        sets.append(once_a_node(ranks, Samples.load, read_set, paths, longest, settings, start, ranks))
    if len(sets[0]) < ranks.world:
        raise UserError(f"{' '.join(settings.data)}: {len(sets[0])} samples for {ranks.world} ranks; expected one for "
                        "each or more")
    if len(set(ranks.texts(tokens_sha256(*sets)))) > 1:
        raise UserError(f"{' '.join(settings.data + settings.val_data)}: nodes read different samples; expected the "
                        "same files on each")
    return sets


def read_set(paths, longest, settings, start, ranks):
    """The samples of these files, none for no file; rank 0 says how many. Raises UserError."""
    if not paths:
        return Samples()
    templates = parse_templates(settings.prompt_template, settings.response_template)
    samples, counts = load_samples(paths, start.tokenizer, start.chat_format, longest, templates=templates)
    ranks.print(f"{' '.join(paths)}: {counts['samples']} samples, chat format {settings.chat_format}; "
                f"{counts['cut']} cut at {longest} tokens, {counts['dropped']} dropped, which have no "
                f"response token; keys that are not read: {counts['unread']}")
    for warning in counts["warnings"]:
        ranks.print(f"warning: {warning}")
    return samples


def describe_run(settings, objective, files, sets, ranks):
    """What config.json of a run holds; see `runtime.run_directory.describe`. Of variants only the objective's own."""
    variant = variant_of(objective)
    if variant:
        files = {**files, "variant": variant}
    return describe(replace(settings, variant=variant), objective, files, sets, optimizer_options(settings), ranks)


# ---------------------------------------------------------------------------------------------------------------------
# The loop

class Outcome(NamedTuple):
    """What a forward and backward pass over a global batch gave on this rank. The device may still compute it."""
    loss: torch.Tensor               # 0-d float64: this rank's share
    mine: list                       # the numbers in the batch of the samples that this rank had
    statistics: torch.Tensor         # (len(mine), 5): `sample_statistics` of these


class Step(NamedTuple):
    """An optimizer step as the log will look at it."""
    number: int                      # from 1
    epoch: int
    lr: float
    batch: list                      # of data.Sample
    grad_norm: torch.Tensor          # 0-d, before clipping
    outcome: Outcome


def train(settings, objective, out, record, config, model_directory, samples, validation, extra_files, ranks):
    """Trains one objective into the run directory `out`; returns the directory of the trained model. The caller has
    called `check_out`, and holds `only_writer`.

    record: what `describe_run` says of the run. config: the GPTConfig of the starting model. model_directory: where it
    is (None: random weights). samples, validation: data.Samples (validation may be empty). extra_files: {file name:
    bytes} that go with the trained model.
    """
    total = settings.steps or settings.epochs * math.ceil(len(samples) / settings.batch_size)
    if is_finished(out, total, settings.resume, ranks):
        ranks.progress(f"{out}: finished, {total} steps; nothing to do")
        return out / "model"
    if settings.compile is None:
        settings = replace(settings, compile=ranks.device.type == "cuda")
    dtype = compute_dtype(settings.dtype, ranks.device)
    model = prepare_model(config, model_directory, settings, dtype, ranks)
    check_weights_on_record(model_directory, record, ranks)
    if settings.adapter:
        check_unchanged(record, "adapter", hf.adapter_files(settings.adapter), ranks)
    trained = trained_parameters(model)
    optimizer = make_optimizer(trained, settings)
    first_step = resume_from_checkpoint(out, trained, optimizer, settings.resume, ranks)   # steps done
    # The log may have the validation of this step already.
    run_id, validated = begin_run(out, record, first_step, settings.resume, ranks)
    if "ref_logp" in bft.OBJECTIVES[objective].needs:
        samples = with_reference(out, run_id, model, samples, first_step, dtype, settings.micro_tokens, ranks)
    net = wrap(model, settings, dtype, ranks)
    log = StepLog(out, objective, model, samples, first_step, total, settings, dtype, ranks)

    with Stop() as stop, contextlib.closing(log):
        done = first_step                                                 # steps
        received = 0                                                      # number of the signal that stops us; 0: none
        if what_is_due(first_step, total, settings, validation).validate and not validated:
            received = validate(model, validation, first_step, log, stop)
            log.restart_clock()
        for step in range(first_step, total):
            if received:
                break
            epoch, numbers = global_batch(step, len(samples), settings.batch_size, settings.seed)
            batch = [samples[i] for i in numbers]
            lr = set_learning_rate(optimizer, step, total, settings)
            seed_generators(settings.seed, step, ranks.rank)
            outcome = forward_backward(net, batch, objective, settings, ranks, dtype)
            grad_norm = clip_gradient(trained, settings.grad_clip)
            optimizer.step()
            # Under DDP gradients become zeros and stay in its buckets. If they were None, a pass without exchange would
            # allocate them outside of the buckets, and they would take twice the memory.
            optimizer.zero_grad(set_to_none=net is model)

            # The step is done. What follows only looks at it, keeps it, or stops.
            done = step + 1
            log.add(Step(done, epoch, lr, batch, grad_norm, outcome))
            received = ranks.largest(stop.signal)                         # by any rank: all stop at the same step
            due = what_is_due(done, total, settings, validation)
            if due.log or done == first_step + 1 or received:
                log.write()                                               # ends the run if a number is not finite
                if due.validate or due.save or received:
                    check_numbers(model, trained, optimizer, done, ranks)   # likewise
                if due.validate and not received:
                    received = validate(model, validation, done, log, stop)
                if due.save or received:
                    save_checkpoint(out, done, trained, optimizer, settings.keep, ranks, run_id)
                log.restart_clock()
        leave_after_a_signal(received or ranks.largest(stop.signal), out, done, ranks)
    check_still_ours(out, run_id, ranks)
    save_result(out, model, model_directory, record, extra_files, ranks)
    return out / "model"


# ---------------------------------------------------------------------------------------------------------------------
# What the loop calls, in the order in which it does

def prepare_model(config, model_directory, settings, dtype, ranks):
    """The starting model, on each rank what it holds of it. Tensors are read or drawn one at a time."""
    model = model_on_meta(config, settings, dtype)
    shard(model, settings.shard, dtype, ranks)
    if model_directory:
        hf.fill_weights(model, model_directory, ranks.device)
    torch.manual_seed(settings.seed)
    draw_parameters(model, ranks.device)                                  # all of them, or adapters
    if settings.adapter:
        hf.fill_adapter(model, settings.adapter)
    model.recompute = settings.recompute
    return model


def model_on_meta(config, settings, dtype):
    """The model that is trained, without memory: all of it float32 (autocast does the rest), or with adapters, the
    frozen base in autocast's dtype."""
    with torch.device("meta"):
        model = GPT(config)
        if settings.lora_rank:
            model.cast(dtype).add_lora(settings.lora_rank, settings.lora_alpha or 2 * settings.lora_rank)
    return model


def trained_parameters(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizer(trained, settings):
    """The optimizer of {name: parameter}. Its name and options are on record: see `optimizer_options`."""
    matrices = [p for p in trained.values() if p.dim() >= 2]
    others = [p for p in trained.values() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # These betas are GPT-3's and nanoGPT's. The Trainer of transformers has 0.9 and 0.999.
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)


def optimizer_options(settings):
    """What config.json says of the optimizer: its name, and its options but for the learning rate and what is 0 or off;
    one value, or a list with one of each group of parameters."""
    optimizer = make_optimizer({"matrix": torch.zeros(1, 1), "vector": torch.zeros(1)}, settings)
    options = {"name": type(optimizer).__name__}
    for key in sorted(optimizer.param_groups[0].keys() - {"params", "lr"}):
        values = [group[key] for group in optimizer.param_groups]
        if any(values):
            options[key] = values[0] if all(value == values[0] for value in values) else values
    return options


def wrap(model, settings, dtype, ranks):
    """The module whose backward pass exchanges gradients: the model itself, compiled or not, or under DDP."""
    if settings.compile:
        model.compile()
    if ranks.world == 1 or is_sharded(model):
        return model
    net = DistributedDataParallel(model, device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
                                  gradient_as_bucket_view=True)           # or gradients are there twice
    # After its first backward pass DDP lays out its buckets anew, in the order in which gradients came, and from then
    # on sums over ranks in another order. A run that goes on must sum as one that was never stopped. We therefore run
    # one discarded backward pass first, in every run, and another, which leaves its gradients, zeros, in the new
    # buckets.
    empty = collate([], bucket(0, settings.micro_tokens) if settings.compile else 1).to(ranks.device)
    for _ in range(2):
        net.zero_grad(set_to_none=True)
        with autocast(ranks.device, dtype):
            net(empty.input_ids, empty.lengths, empty.at, empty.targets).sum().backward()
    return net


class Due(NamedTuple):
    log: bool
    validate: bool
    save: bool


def what_is_due(step, total, settings, validation):
    """What follows the step of this number: 0 before the first, total after the last."""
    def is_due(every):
        if step == total:
            return True
        return every > 0 and step > 0 and step % every == 0

    validates = bool(validation) and (step == 0 or is_due(settings.eval_every))
    saves = is_due(settings.save_every)
    return Due(validates or saves or is_due(settings.log_every), validates, saves)


def set_learning_rate(optimizer, step, total, settings):
    """Gives the optimizer the learning rate of this step, and returns it."""
    lr = learning_rate(step, total, settings)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def learning_rate(step, total, settings):
    """Linear warmup, then a cosine from lr towards min_lr; step counts from 0."""
    warmup = math.ceil(settings.warmup * total)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    angle = math.pi * (step - warmup) / max(1, total - warmup)
    return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + math.cos(angle))


def seed_generators(seed, step, rank):
    """Whatever a model or an objective may draw depends on these three alone: there is no state to save."""
    number = int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def forward_backward(net, batch, objective, settings, ranks, dtype):
    """Adds the gradient of one global batch (a list of data.Sample) to the parameters of net, on every rank.

    However the batch is cut into ranks and micro-batches, the gradient is that of the whole. Returns this rank's
    Outcome, without waiting for the device.
    """
    # Every rank knows the whole batch, so that the global denominator needs no communication.
    denominator = bft.global_denominator(objective, [int(sample.response.sum()) for sample in batch])
    plan = deal([len(sample.ids) for sample in batch], ranks.world, settings.micro_tokens)
    my_micro_batches = plan[ranks.rank]
    stance = "default" if settings.compile else "force_eager"
    loss, statistics = torch.zeros((), dtype=torch.float64, device=ranks.device), []
    for number, micro_batch in enumerate(my_micro_batches):
        samples = [batch[i] for i in micro_batch]
        size = bucket(sum(len(sample.ids) for sample in samples), settings.micro_tokens) if settings.compile else 1
        packed = collate(samples, size).to(ranks.device)
        is_last = number == len(my_micro_batches) - 1
        with gradient_exchange(net, is_last), torch.compiler.set_stance(stance):
            with autocast(ranks.device, dtype):
                logp, extra = log_probs(net, packed, objective)           # (N,), {name: (N,)}
            weights = bft.weigh(logp, packed.offsets, objective, settings.group_size, extra)
            # All parts share the denominator: over micro-batches and ranks they add up to the loss of the global batch.
            part = bft.weighted_loss(logp, weights, denominator)
            # DDP and FSDP take the mean of gradients over ranks; we need their sum.
            (part * ranks.world).backward()
        loss += part.detach()
        statistics.append(sample_statistics(logp, weights, settings.group_size))
    return Outcome(loss, list(itertools.chain.from_iterable(my_micro_batches)), torch.cat(statistics))


def log_probs(net, packed, objective):
    """(log p_t (N,), {name: (N,)} of what the objective may need besides) of a micro-batch."""
    arguments = packed.input_ids, packed.lengths, packed.at, packed.targets
    looks = bft.distribution_needs(objective)
    extra = {}
    if looks:
        logp, extra = net(*arguments, looks=looks)
    else:
        logp = net(*arguments)
    return logp, {**extra, "ref_logp": packed.ref_logp}


def sample_statistics(logp, weights, group_size):
    """For the log, each sample's sums of l_t, p_t and w_t, its s_b and its C_b: (S, 5) float64."""
    logp = logp.detach().double()
    values = torch.stack((-logp, logp.exp(), weights.token), 1)           # (N, 3)
    sums = values.new_zeros(len(weights.sample), 3).index_add(0, weights.sample_index, values)   # (S, 3)
    C = bft.group_confidence(logp, weights.offsets, group_size)           # (S,)
    return torch.cat((sums, weights.sample[:, None], C[:, None]), 1)


def clip_gradient(trained, largest):
    """Scales the gradient down to the norm `largest` (0: leaves it); returns its norm before, 0-d, on the device."""
    norm = gradient_norm(trained.values())
    if largest:
        # In the gradients' dtype, for one product over all of them.
        torch.nn.utils.clip_grads_with_norm_(trained.values(), largest, norm.float())
    return norm


def validate(model, samples, step, log, stop):
    """Logs the plain NLL of a response token. Returns the signal that cut it short, 0 if none did."""
    settings = log.settings
    # Ranks stop at the same micro-batch: a sharded model has no forward pass on one of them alone.
    table = score(model, samples, log.dtype, settings.micro_tokens, settings.group_size,
                  lambda: log.ranks.largest(stop.signal))
    received = log.ranks.largest(stop.signal)
    if not received:
        logp, count, _ = table.T                                          # (S,) each
        log.add_validation(step, -logp.sum() / count.sum())
    return received


def check_numbers(model, trained, optimizer, step, ranks):
    """On every rank it exits with code 1 if not all numbers of a checkpoint, or of the model that will be saved, are
    finite: nothing is saved from there on."""
    names = not_finite(trained, optimizer, model.file_dtypes)
    names = " ".join(ranks.texts(" ".join(names))).split()
    if not names:
        return
    if ranks.rank == 0:
        print(f"error: step {step}: {', '.join(names[:5])}: infinite or no number, or beyond the dtype of the model's "
              "file; stopped, and nothing was saved since", file=sys.stderr)
    raise SystemExit(1)


def save_result(out, model, model_directory, record, extra_files, ranks):
    """Saves the trained model as a Hugging Face directory, with the files that go with it. Of adapters first those by
    themselves: the model has them merged. Raises UserError."""
    directory = out / "model"
    is_first = ranks.rank == 0
    # Adapters go into the weights as they were, not as they were rounded for training.
    base = None
    if record["settings"]["lora_rank"]:
        base = model_directory
        name = name_of_base(record["settings"]["init"], model_directory)
        hf.save_adapter(model, out / "adapter", name, writes=is_first)
    if is_first:
        directory.mkdir(exist_ok=True)
        for name, content in extra_files.items():
            write_whole(directory / name, [content])
    try:
        hf.save_model(model, directory, base, writes=is_first)
    except ValueError as e:
        raise UserError(f"{directory} was not saved: {e}") from None
    try:
        check_weights_on_record(base, record, ranks)
    except UserError:
        # A directory without it is unfinished.
        (directory / "config.json").unlink(missing_ok=True)
        raise
    # No rank may read the model before it is whole.
    ranks.barrier()


def check_weights_on_record(model_directory, record, ranks):
    """Raises UserError, on every rank, if the starting model's files, which were read again, are not those on record.
    """
    if model_directory and "init" in record["sha256"]:
        check_unchanged(record, "init", [model_directory / "config.json", *hf.weight_files(model_directory)], ranks)


# ---------------------------------------------------------------------------------------------------------------------
# The log

# Peak dense bf16 FLOP/s by a part of the device's name, for MFU (NVIDIA's data sheets, without sparsity). The first
# that fits counts.
PEAK_FLOPS = {"A100": 312e12, "L40S": 362e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
              "H200 NVL": 835e12, "H200": 989e12, "GB200": 2500e12, "B200": 2250e12}
ZEROS = 20                                                                # steps in a row without a gradient: a warning


class StepLog:
    """metrics.jsonl, --report and the terminal. Steps wait here until `write`, where the device is waited for."""

    def __init__(self, out, objective, model, samples, first_step, total, settings, dtype, ranks):
        self.path, self.objective, self.model, self.total = out / "metrics.jsonl", objective, model, total
        self.settings, self.dtype, self.ranks = settings, dtype, ranks
        self.reports = open_reports(settings.report, out, first_step) if ranks.rank == 0 else []
        self.waiting = []                                                 # of Step
        self.zeros = 0                                                    # steps in a row whose loss or gradient is 0
        self.warned_of_zeros = False
        self.peak = None                                                  # FLOP/s
        if ranks.device.type == "cuda" and dtype == torch.bfloat16:
            self.peak = peak_flops(torch.cuda.get_device_name(ranks.device))
        self.restart_clock()
        parameters = list(model.parameters())
        ranks.progress(f"{out}: {objective} from step {first_step} to {total}, {len(samples)} samples, batch "
                       f"{settings.batch_size}, {sum(p.numel() for p in parameters if p.requires_grad) / 1e6:.1f}M of "
                       f"{sum(p.numel() for p in parameters) / 1e6:.1f}M parameters, {ranks.world} x {ranks.device}, "
                       f"{str(dtype).removeprefix('torch.')}")
        multi_window = np.mean(samples.response_lengths > settings.group_size)
        if has_groups(objective) and multi_window < 0.1:
            ranks.once(f"warning: only {multi_window:.0%} of the samples have more than --group-size "
                       f"{settings.group_size} response tokens; the others fit into one window")

    def restart_clock(self):
        self.clock = time.perf_counter()

    def add(self, step):
        self.waiting.append(step)

    def write(self):
        """Logs the steps that wait. On every rank it exits with code 1 at the first whose loss or gradient is not
        finite: nothing is saved from there on."""
        gathered = [gather(step.outcome, len(step.batch), self.ranks) for step in self.waiting]
        seconds = time.perf_counter() - self.clock
        speed = self.speed(seconds)
        lines = []
        for step, (loss, statistics) in zip(self.waiting, gathered):
            line = metrics_line(step, loss, statistics, self.settings)
            if not math.isfinite(loss) or not math.isfinite(line["grad_norm"]):
                self.append(lines)
                self.end_the_run(step, line, statistics)
            self.look_for_zeros(line)
            lines.append(line | speed)
        self.append(lines)
        eta = round(seconds / len(lines) * (self.total - line["step"]))
        self.ranks.progress(f"{self.objective} step {line['step']}/{self.total}  loss {loss:.4f}  nll {line['nll']:.4f}"
                            f"  |g| {line['grad_norm']:.3g}  lr {line['lr']:.2e}  {speed['tokens_per_s']:,.0f} tok/s  "
                            f"eta {eta // 60}:{eta % 60:02}")
        self.waiting = []

    def add_validation(self, step, nll):
        self.append([{"step": step, "val_nll": nll}])
        self.ranks.progress(f"{self.objective} step {step}/{self.total}  val_nll {nll:.4f}")

    def append(self, lines):
        if self.ranks.rank == 0:
            append_metrics(self.path, lines)
        for line in lines:
            values = {name: value for name, value in line.items() if name != "step" and value is not None}
            for report in self.reports:
                report.add(line["step"], values)

    def close(self):
        for report in self.reports:
            report.close()

    def speed(self, seconds):
        """Of the steps that wait, which took so long together."""
        samples = [sample for step in self.waiting for sample in step.batch]
        mfu = self.peak and flops(self.model, samples) / seconds / self.peak / self.ranks.world
        return {"tokens_per_s": sum(len(sample.ids) for sample in samples) / seconds, "mfu": mfu,
                "memory_gb": peak_memory_gb(self.ranks.device)}

    def look_for_zeros(self, line):
        """Warns, once, where nothing has been learned for a while."""
        self.zeros = self.zeros + 1 if 0 in (line["loss"], line["grad_norm"]) else 0
        if self.zeros == ZEROS and not self.warned_of_zeros:
            self.warned_of_zeros = True
            self.ranks.print(f"warning: since step {line['step'] - ZEROS + 1} the loss or its gradient is exactly 0; "
                             "expected samples with a response, and weights (token_weight, sample_weight in "
                             "metrics.jsonl) above 0")

    def end_the_run(self, step, line, statistics):
        nll, *_ = statistics.T                                            # (B,)
        bad = [sample.where for sample, value in zip(step.batch, nll) if not math.isfinite(value)]
        if self.ranks.rank == 0:
            places = ", ".join(bad or [sample.where for sample in step.batch])
            print(f"error: step {step.number}: loss {line['loss']}, gradient norm {line['grad_norm']}; stopped, and "
                  f"nothing was saved since, with the samples at {places}", file=sys.stderr)
        raise SystemExit(1)


def has_groups(objective):
    """Whether an objective's weights depend on --group-size: those of two tokens, in groups of one and of two."""
    logp, offsets = torch.tensor([0.9, 0.5]).log(), torch.tensor([0, 2])
    extra = {name: torch.full((2,), -0.5 if name == "ref_logp" else 0.5) for name in bft.OBJECTIVES[objective].needs}
    one, two = (bft.token_weights(logp, offsets, objective, group_size, extra) for group_size in (1, 2))
    return not torch.equal(one, two)


def gather(outcome, size, ranks):
    """(loss, statistics (B, 5) as numpy) of a whole global batch of B = size samples, from every rank's Outcome. Here
    the device is waited for."""
    table = torch.zeros(1 + size, 5, dtype=torch.float64)
    table[0, 0] = outcome.loss
    table[1 + torch.tensor(outcome.mine, dtype=torch.int64)] = outcome.statistics.cpu()
    if ranks.world > 1:
        dist.all_reduce(table)                                            # each rank filled the rows of its own samples
    table = table.numpy()
    return float(table[0, 0]), table[1:]


def metrics_line(step, loss, statistics, settings):
    """A step's line of metrics.jsonl, but for its speed: confidence is the mean p_t, token_weight the mean w_t (without
    s_b), sample_weight the mean s_b, min_group_confidence the mean C_b, multi_window the share of samples with n_b > g.
    """
    n = np.array([sample.response.sum() for sample in step.batch])        # (B,) n_b
    nll, p, w, sample_weight, C = statistics.T                            # (B,) each
    grad_norm = step.grad_norm.item()
    return {"step": step.number, "epoch": step.epoch, "loss": loss, "nll": nll.sum() / n.sum(), "grad_norm": grad_norm,
            "clipped": bool(settings.grad_clip and grad_norm > settings.grad_clip), "lr": step.lr,
            "samples": len(step.batch), "tokens": sum(len(sample.ids) for sample in step.batch),
            "response_tokens": int(n.sum()), "confidence": p.sum() / n.sum(), "token_weight": w.sum() / n.sum(),
            "sample_weight": sample_weight.mean(), "sample_weight_sd": sample_weight.std(),
            "min_group_confidence": C.mean(), "min_group_confidence_p05": np.percentile(C, 5),
            "multi_window": np.mean(n > settings.group_size)}


def peak_flops(device_name):
    """None where it is not known."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)


def flops(model, samples):
    """Forward and backward: 6 per weight and token, 12 d per layer and pair of tokens (PaLM, appendix B)."""
    c = model.config
    body = sum(p.numel() * (6 if p.requires_grad else 4) for p in model.layers.parameters())   # frozen: no gradient
    head = model.head.numel() * (6 if model.head.requires_grad else 4)
    tokens = sum(len(sample.ids) for sample in samples)
    targets = sum(int(sample.response.sum()) for sample in samples)
    pairs = sum(len(sample.ids) ** 2 for sample in samples) / 2           # causal: half of them
    return body * tokens + head * targets + 12 * c.n_layer * c.n_head * c.head_dim * pairs


# ---------------------------------------------------------------------------------------------------------------------
# Memory

def training_bytes(config, settings, dtype, sharing=1):
    """(held, gathered), in bytes. held: a rank's weights, gradients and optimizer state, 16 a trained parameter
    (float32: weight, gradient, two moments), those of dtype a frozen one. gathered: what comes on top where `sharing`
    ranks have one copy of the model among them, which FSDP holds whole at its peak, in the backward pass: what is
    outside of the blocks, with its gradient; one block with its gradient, the next block, and the gradients of the
    last one, which are being summed. Activations come on top of both.
    """
    held, outside, blocks = 0, 0, Counter()
    wire = 4 if settings.lora_rank else dtype.itemsize                    # bytes of a trained number of a block
    for name, p in model_on_meta(config, settings, dtype).named_parameters():
        held += math.ceil(len(p) / sharing) * p[0].numel() * (16 if p.requires_grad else p.itemsize)
        if name.startswith("layers."):
            blocks[name.split(".")[1]] += p.numel() * (3 * wire + 4 if p.requires_grad else 2 * p.itemsize)
        else:
            outside += p.numel() * (8 if p.requires_grad else p.itemsize)
    gathered = outside + max(blocks.values()) if sharing > 1 else 0
    return held, gathered


def check_memory(config, settings, ranks):
    """Raises UserError, before anything is loaded, if not even the weights and optimizer state can fit; it says which
    change of the command would help."""
    room = memory_bytes(ranks.device)
    if room is None:
        return
    here = read_launch().local_world
    dtype = compute_dtype(settings.dtype, ranks.device)

    def needed(change):
        changed = replace(settings, **change)
        of_a_rank = sum(training_bytes(config, changed, dtype, ranks_per_copy(changed.shard, ranks)))
        return of_a_rank * (here if ranks.device.type == "cpu" else 1)

    if needed({}) <= room:
        return
    ways = [{"shard": "all"}, {"lora_rank": 16}, {"shard": "all", "lora_rank": 16}]
    advice = "expected a smaller model, more memory, or more GPUs and --shard all"
    for way in ways:
        takes_any_rank = settings.init != "scratch" and not settings.adapter
        if needed(way) <= room and (takes_any_rank or "lora_rank" not in way):
            flags = " ".join(f"{flag_name(name)} {value}" for name, value in way.items())
            advice = f"this needs {needed(way) / 1e9:.0f} GB: {ranks.command()} {flags}"
            break
    raise UserError(f"weights, gradients and optimizer state need {needed({}) / 1e9:.0f} GB, {ranks.device} has "
                    f"{room / 1e9:.0f} GB; {advice}")


if __name__ == "__main__":
    run(main)
