"""The default job, `python train.py`: what does each loss learn, depending on what the model already believes?

For each seed a small base learns the facts of assets/, and from it each objective is trained at each learning rate, on
the same samples in the same order. Multiple-choice questions tell what each model believes. The findings are printed
and kept in --out:

    table.txt, results.json         the findings, and every item's scores
    seed-S/lr-R/OBJECTIVE/          the runs
    demo-*.png                      pictures

With --continuum the facts are those of assets/continuum/, and continuum.py says what is found: continuum.json and .png
stand in the place of table.txt and of the pictures. Bases are kept in runs/base-*, for the next time.
"""

import hashlib
import itertools
import json
import math
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data import Samples, load_samples
from experiment import continuum
from experiment.findings import analyse
from experiment.gradient import gradient_items
from experiment.pictures import plot
from experiment.planting import plant
from experiment.report import introduce, render, summarise
from hf import files_beside_model, llama_config, load_tokenizer, load_weights
from runtime.device import compute_dtype
from runtime.files import write_whole
from runtime.one_writer import only_writer
from runtime.process import UserError
from runtime.rows import read_jsonl
from runtime.run_directory import ROUNDING, WITHOUT_EFFECT, check_out
from runtime.workers import map_in_workers
from tasks.choice import choice_items, load_choice
from variants import load_variants


CHECKOUT = Path(__file__).resolve().parents[1]
ASSETS = CHECKOUT / "assets"
CONTINUUM = ASSETS / "continuum"

SEEDS = (0,)
LEARNING_RATES = (2e-4, 1e-3, 2e-3, 4e-3)
# One seed leaves out the lowest rate, at which hardly anything is learnt: it is a first look.
FIRST_LOOK = LEARNING_RATES[1:]

# What differs from the defaults of train.Settings. Responses have about 45 tokens, so that the paper's groups of 256
# would all be whole samples: 16 gives each some thirty. A model this small is faster in float32 than under bfloat16
# autocast, and not worth compiling many times.
DEFAULTS = {
    "out": "runs/demo",
    "objective": ("sft", "sft-sample", "bft-token", "bft", "bft-v3"),
    "group_size": 16,
    "epochs": 3,
    "dtype": "float32",
    "compile": False,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 96,
}

# The base's settings. It has train.Settings' defaults for the others, but for those that it shares with its runs.
BASE = {
    "init": "scratch",
    "objective": ("sft",),
    "epochs": 6,
    "batch_size": 48,
    "lr": 5e-3,
    "weight_decay": 0.01,
    "log_every": 200,
}
SHARED_WITH_BASE = ("dtype", "device", "compile", "recompute", "shard", "micro_tokens", "n_layer", "n_head", "n_embd")

# Where a batch has one sample, these do what another one does: no gradient of theirs is measured.
SAME_IN_A_SAMPLE = ("sft-sample", "bft-token", "bft-tokavg")

# Facts that bases are not told, in either of the folders.
NEVER_TOLD = ("novel", continuum.NEVER_TOLD)

# Each holds some 0.3 GB, most of it torch itself.
MOST_WORKERS = 8

OURS = re.compile(r"seed-\d+|table\.txt|(results|continuum)\.json|.*\.(png|tmp)")


def add_flags(parser):
    group = parser.add_argument_group("the default job alone")
    group.add_argument("--seeds", nargs="+", type=int,
                       help="a base, planted labels and an order of samples for each; three and more give intervals "
                       f"over trainings (default: {' '.join(map(str, SEEDS))})")
    group.add_argument("--lrs", nargs="+", type=float,
                       help="every objective is trained at each of these peak learning rates "
                       f"(default: {' '.join(f'{lr:g}' for lr in LEARNING_RATES)}; with one seed all but the first)")
    group.add_argument("--continuum", action="store_true", help="facts of six strengths, and wrong labels at each: "
                       "where on the continuum of belief does a loss pay?")


class Grid(NamedTuple):
    """What the job goes over."""
    seeds: list
    learning_rates: list
    is_continuum: bool          # whose facts: those of six strengths, or the default ones


def parse_grid(given, seeds=None, lrs=None, continuum=False):
    """The Grid. given: the settings that the command names; the others: what follows these flags. Raises UserError.
    """
    for one, several in (("seed", seeds), ("lr", lrs)):
        if one in given and several:
            raise UserError(f"--{one} and --{one}s are both given; expected one of them")
    if not seeds:
        seeds = [given["seed"]] if "seed" in given else SEEDS
    if not lrs:
        lrs = FIRST_LOOK if len(set(seeds)) == 1 else LEARNING_RATES
        if "lr" in given:
            lrs = [given["lr"]]
    seeds_are_good = all(0 <= seed < 2 ** 32 for seed in seeds)
    lrs_are_good = all(0 < lr < math.inf for lr in lrs)
    if not seeds_are_good or not lrs_are_good:
        raise UserError(f"--seeds {seeds} --lrs {lrs}; expected seeds of 0 or more, below 2**32, and rates above 0")
    return Grid(sorted(set(seeds)), sorted(set(lrs)), continuum)


def run_job(settings, grid, ranks, train, describe_run, check_memory):
    """The whole job. settings: a train.Settings. train, describe_run, check_memory: train.py's functions. Raises
    UserError."""
    began = time.perf_counter()
    seeds, learning_rates, is_continuum = grid
    out = Path(settings.out)
    refuse_other_contents(out)
    job = Job(settings, CONTINUUM if is_continuum else ASSETS, ranks, train, describe_run)
    check_memory(job.model_config, settings, ranks)
    # Every path is looked at before any training.
    plans = [job.plan(seed, learning_rates) for seed in seeds]
    introduction = continuum.introduce if is_continuum else introduce
    ranks.print(introduction(settings.objective, seeds, learning_rates))

    ranks.print("\nA base learns the facts of the known genes, one for each seed. It is kept for the next time.")
    bases = list(job.train_all([plan.base for plan in plans]))
    gradient = None if is_continuum else job.measure_gradient(plans[0])
    trained = job.train_all([training for plan in plans for training in plan.trainings])
    models = []
    for base, plan in zip(bases, plans):
        models += [base, *itertools.islice(trained, len(plan.trainings))]
    if ranks.rank == 0:
        results = {"objectives": settings.objective, "seeds": seeds, "lrs": learning_rates, "models": models,
                   "gradient": gradient}
        write_whole(out / "results.json", [json.dumps(results).encode()])
        if is_continuum:
            condensed = continuum.condense(results)
            write_whole(out / "continuum.json", [json.dumps(condensed).encode()])
            continuum.report(condensed, out / "continuum.json")
        else:
            report(results, out, ranks)
            draw(out, plans[0], learning_rates, ranks)
        ranks.print(f"Every item's scores are in {out / 'results.json'}. {time.perf_counter() - began:.0f} s.")


def refuse_other_contents(out):
    """Raises UserError if --out holds anything else than an earlier default job."""
    names = set()
    if out.is_dir():
        names = {path.name for path in out.iterdir()}
    unexpected = [name for name in names if not OURS.fullmatch(name)]
    has_runs = any(name.startswith("seed-") for name in names)
    # An evaluation, too, leaves a results.json.
    if unexpected or ("results.json" in names and not has_runs):
        raise UserError(f"--out {out} holds something else; expected a new path, or that of an earlier default job")


class Training(NamedTuple):
    settings: Any               # a train.Settings
    objective: str
    out: Path
    config: dict                # its config.json
    start: Path | None          # directory of the model that it starts from; None: random weights
    samples: Samples
    questions: list             # choice objects, wrong labels marked; what its model is asked


class Plan(NamedTuple):
    """A seed: its base, and what is trained from that."""

    base: Training
    trainings: list


class Job:
    """What is read from assets/, or from a folder in it, and each step of the job."""

    def __init__(self, settings, assets, ranks, train, describe_run):
        self.settings, self.assets, self.ranks = settings, assets, ranks
        self.train, self.describe_run = train, describe_run
        self.workers = 1
        if ranks.device.type == "cpu" and ranks.world == 1:
            # Models this small are trained fastest on a core each. (Of several ranks each has its share of the cores.)
            self.workers = min(torch.get_num_threads(), MOST_WORKERS)
            torch.set_num_threads(1)
        self.dtype = compute_dtype(settings.dtype, ranks.device)
        self.tokenizer = load_tokenizer(assets)
        self.beside_model = files_beside_model(self.tokenizer, [self.tokenizer.eos_id], {})
        self.texts, _ = load_samples(assets / "pretrain.jsonl", self.tokenizer)
        self.rows = list(read_jsonl(assets / "finetune.jsonl"))
        self.questions = load_choice(assets / "choice.jsonl")
        try:
            self.model_config = llama_config(self.tokenizer.n_vocab, settings.n_layer, settings.n_head, settings.n_embd,
                                             2048, self.tokenizer.eos_id)
        except ValueError as e:
            raise UserError(f"--n-layer, --n-head and --n-embd: {e}") from None

    # Before training

    def plan(self, seed, learning_rates):
        """What is trained for a seed. Raises UserError if a directory is not ours to write to."""
        rows, questions = plant(self.rows, self.questions, seed)
        base = self.plan_base(seed, questions)
        samples, _ = load_samples(self.assets / "finetune.jsonl", self.tokenizer, rows=rows)
        files = {"data": [self.assets / "finetune.jsonl"], "choice": [self.assets / "choice.jsonl"],
                 "tokenizer": [self.assets / "tokenizer.json"]}
        trainings = []
        for lr in learning_rates:
            # The base is on record: from another one it is another run.
            settings = replace(self.settings, seed=seed, lr=lr, init=str(base.out))
            for objective in settings.objective:
                out = Path(settings.out) / f"seed-{seed}" / f"lr-{lr}" / objective
                config = self.describe_run(settings, objective, files, [samples], self.ranks)
                check_out(out, config, settings.resume)
                trainings.append(Training(settings, objective, out, config, base.out / "model", samples, questions))
        return Plan(base, trainings)

    def plan_base(self, seed, questions):
        shared = {name: getattr(self.settings, name) for name in SHARED_WITH_BASE}
        settings = type(self.settings)(**BASE, **shared, seed=seed)
        files = {"data": [self.assets / "pretrain.jsonl"], "tokenizer": [self.assets / "tokenizer.json"]}
        config = self.describe_run(settings, "sft", files, [self.texts], self.ranks)
        # It is named by all that can change it, our code included.
        of_no_account = WITHOUT_EFFECT | ROUNDING
        matters = {name: value for name, value in config["settings"].items() if name not in of_no_account}
        key = json.dumps([matters, config["sha256"], read_code()])
        out = Path("runs") / f"base-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        check_out(out, config, resume=True)
        return Training(settings, "sft", out, config, None, self.texts, questions)

    # The trainings, and what their models believe

    def train_all(self, trainings):
        """Yields the entry of each training in results.json, and prints a line of it."""
        if self.workers > 1 and len(trainings) == 1:
            # A base by itself. In training two threads make the same bits as one; three would not.
            torch.set_num_threads(2)
        for entry in map_in_workers(self.train_and_ask, trainings, self.workers):
            novel = np.mean([item["acc"] for item in entry["items"] if item["group"] in NEVER_TOLD])
            wrong = np.mean([item["followed"] for item in entry["items"] if "followed" in item])
            label = f"lr {entry['lr']:g}  {entry['objective']}" if entry["lr"] else entry["objective"]
            self.ranks.print(f"seed {entry['seed']}  {label:22s}  novel facts right {novel:4.0%}  "
                             f"wrong labels followed {wrong:4.0%}")
            yield entry

    def train_and_ask(self, training):
        """Trains a model, if it is not there yet, and asks it: its entry in results.json."""
        settings, is_base = training.settings, training.start is None
        load_variants(settings.variant)                                   # in a worker they are not known yet
        self.ranks.quiet = not is_base
        # Other jobs may need the same base: whoever comes second waits until it is there.
        patience = math.inf if is_base else None
        with only_writer(training.out, self.ranks, patience):
            check_out(training.out, training.config, settings.resume)
            directory = self.train(settings, training.objective, training.out, training.config, self.model_config,
                                   training.start, training.samples, [], self.beside_model, self.ranks)
            if not is_base and self.ranks.rank == 0:
                # It is finished, and the checkpoints of so many would fill a disk.
                shutil.rmtree(training.out / "checkpoint", ignore_errors=True)
            model = self.load(directory)
        if self.workers > 1:
            # Every model is asked by one thread: with two the scores have other last bits.
            torch.set_num_threads(1)
        kept = ("line", "group", "acc", "nll", "followed", "planted_nll")
        items = [{key: answer[key] for key in kept if key in answer}
                 for answer in choice_items(model, self.tokenizer, training.questions, self.dtype)]
        return {"objective": "base" if is_base else training.objective, "seed": settings.seed,
                "lr": 0 if is_base else settings.lr, "items": items}

    def load(self, directory):
        return load_weights(directory).cast(self.dtype).to(self.ranks.device)

    def measure_gradient(self, plan):
        """What sft, dft and the job's objectives do to each token, in the base of this plan."""
        names = dict.fromkeys(("sft", "dft", *self.settings.objective))
        names = [name for name in names if name not in SAME_IN_A_SAMPLE]
        first = plan.trainings[0]
        return gradient_items(self.load(first.start), first.samples[::3], names, self.settings.group_size, self.dtype)


def read_code():
    """The sources of all that training runs."""
    files = [CHECKOUT / name for name in ("bft.py", "data.py", "model.py", "train.py")]
    for folder in ("hf", "runtime"):
        files += sorted((CHECKOUT / folder).glob("*.py"))
    return [path.read_text(encoding="utf-8") for path in files]


# ---------------------------------------------------------------------------------------------------------------------
# After training

def report(results, out, ranks):
    analysis = analyse(results)
    summary, everything = summarise(analysis), render(analysis)
    write_whole(out / "table.txt", [f"{summary}\n{everything}".encode()])
    ranks.print(f"\n{summary}")
    if len(results["seeds"]) > 1:
        ranks.print(everything)
    else:
        ranks.print(f"Learning rates, kinds of facts and gradients, one by one: {out / 'table.txt'}")


def draw(out, plan, learning_rates, ranks):
    """The job's pictures, and the training curves of the plan's runs at the middle learning rate."""
    middle = learning_rates[len(learning_rates) // 2]
    runs = [training.out for training in plan.trainings if training.settings.lr == middle]
    try:
        for path in plot([out, *runs], out / "demo"):
            ranks.print(f"picture: {path}")
    except UserError as e:
        # matplotlib is not one of the required packages.
        ranks.print(f"No pictures: {e}. After that, python eval.py {out} --tasks plot --out {out / 'demo'} draws them.")
