"""Evaluation: what models know, side by side, with intervals.

    python eval.py RUN_OR_MODEL [...] --tasks nll choice --data FILE [...] --out results.json
    python eval.py RUN_OR_MODEL [...] --prompt "What causes gout?"
    python eval.py RUN [...] --tasks plot --out look

A model is a run of `train.py`, a Hugging Face directory or repository id; a pattern in quotes ('runs/bft-s*') is one
column of several seeds. `torchrun --nproc_per_node=8 eval.py ...` shares the work. `--shard all` shares the weights of
models that are too large for one GPU; every rank then writes every answer. The first task reads the first --data file,
the second one the second, and so on:

    nll       samples (any shape of data.py): NLL and perplexity per response token, minimum group confidence
    choice    {"question", "choices", "answer", "context"?, "subject"?}: multiple choice by log-likelihood, asked as
              --layout says; acc, acc_norm (by characters) and acc_bytes as lm-evaluation-harness defines them
    answer    the same files, asked in words (--instruction): the model writes, and its answer is read out of the text;
              right, no answer, out of budget. --samples asks each question several times
    process   {"genes": [...], "process"}: the model names the process behind a set of genes; ROUGE, and similarity to
              the true name by --encoder, as GeneAgent's evaluation has them
    profile   {"gene", ...}: the model describes each gene; how well embeddings of the descriptions (--encoder) predict
              the properties in --labels files of {"gene", "label"}: ROC-AUC of logistic regression
    inspect   samples: a page of HTML beside --out with some samples' tokens coloured by p, c, and each loss's weights
    plot      no file and no other task: pictures beside --out: the training curves of runs on shared axes, and for a
              directory of `python train.py` its frontiers and its gradients

Models are columns; where lines carry a `group`, each group is a row. Differences are those of each pair of columns,
over the same items, with a paired bootstrap 95% interval, and over seeds where there are several. While models are
asked, results.unfinished.json has what is scored so far; it stays there if one of them fails.
"""

import gc
import glob
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

import hf
from experiment.pictures import plot
from model import GPT
from runtime.device import compute_dtype
from runtime.files import write_whole
from runtime.flags import flag_name
from runtime.process import Parser, UserError, run
from runtime.ranks import Ranks
from runtime.sharding import SHARDS, shard
from tasks import Evaluation, OpenedModel, answer, choice, inspect, nll, process, profile, writing
from tasks.table import render_notes, render_table


# What each of them must have: see tasks/__init__.py.
TASKS = {"nll": nll, "choice": choice, "answer": answer, "process": process, "profile": profile, "inspect": inspect}


class Job(NamedTuple):
    """One task on one file."""
    name: str                        # of the task
    task: Any                        # its module
    file: str
    questions: Any                   # what the task has read
    answers: dict                    # {path of a model: tasks.Answers}


def main():
    args = parse_arguments()
    columns = find_columns(args.models)
    if args.tasks == ["plot"]:
        for path in plot(itertools.chain.from_iterable(columns.values()), args.out):
            print(f"picture: {path}")
        return
    ranks = Ranks(args.device)
    ranks.start()
    models = open_models(columns, args)
    evaluation = Evaluation(args, ranks, compute_dtype(args.dtype, ranks.device), columns, models)

    # Every file is read, and every library found, before any model is loaded.
    jobs = read_jobs(evaluation)
    prompt = None
    if args.prompt is not None:
        question = ("--prompt", writing.question_turns(args.prompt))
        prompt = writing.encode_questions([question], writing.NEW_TOKENS, evaluation)
    unfinished = Path(args.out).with_suffix(".unfinished.json")
    unfinished_is_there = False      # on rank 0
    try:
        for opened in models.values():
            ask_model(opened, jobs, prompt, evaluation)
            if jobs and ranks.rank == 0:
                save(unfinished, columns, [entry_of(job) for job in jobs], unfinished=True)
                unfinished_is_there = True
        if unfinished_is_there:
            entries, tables = conclude(jobs, evaluation)
            save(args.out, columns, entries)
            unfinished.unlink()
            unfinished_is_there = False
            print_tables(tables)
            print(f"per-item scores: {args.out}")
    finally:
        if unfinished_is_there:
            print(f"what was scored before this is in {unfinished}", file=sys.stderr, flush=True)


def read_jobs(evaluation):
    jobs = []
    for name, file in zip(evaluation.args.tasks, evaluation.args.data):
        number = sum(job.name == name for job in jobs)
        questions = TASKS[name].read(file, number, evaluation)
        jobs.append(Job(name, TASKS[name], file, questions, {}))
    return jobs


def ask_model(opened, jobs, prompt, evaluation):
    """Adds one model's answers to those of the jobs. Only here is a model in memory, one at a time."""
    ranks = evaluation.ranks
    model = load_model(opened, evaluation)
    if prompt is not None:
        writing.answer_prompt(prompt, model, opened, evaluation)
    for job in jobs:
        start = time.monotonic()
        job.answers[opened.path] = job.task.ask(job.questions, model, opened, evaluation)
        ranks.print(f"{opened.path}: {job.name} of {job.file}, {time.monotonic() - start:.0f} s")


def load_model(opened, evaluation):
    """One model, on each rank what --shard has it hold. Tensors are read one at a time. Raises UserError."""
    ranks = evaluation.ranks
    # A sharded model refers to itself: the memory of the one before is only freed here.
    gc.collect()
    with torch.device("meta"):
        model = GPT(opened.config).cast(evaluation.dtype).requires_grad_(False)
    shard(model, evaluation.args.shard, evaluation.dtype, ranks)
    hf.fill_weights(model, opened.directory, ranks.device)
    return model


def conclude(jobs, evaluation):
    """(what --out has of each job, [(title, rows) of each table]), when every model has been asked. On rank 0."""
    entries, tables = [], []
    for job in jobs:
        details = job.task.finish(job.questions, job.answers, evaluation)
        title, rows = job.task.rows(job.questions, job.answers, details, evaluation)
        entries.append(entry_of(job, details, rows))
        if rows:
            tables.append((title, rows))
    return entries, tables


def print_tables(tables):
    for title, rows in tables:
        print(render_table(rows, title))
    if tables:
        print(render_notes([row for _, rows in tables for row in rows]))


def entry_of(job, details=None, rows=()):
    """What --out has of one job."""
    items = {path: answers.items for path, answers in job.answers.items()}
    return {"task": job.name, "data": job.file, **(details or {}), "rows": list(rows), "items": items}


def save(path, columns, entries, **more):
    write_whole(Path(path), [json.dumps({"models": columns, **more, "tasks": entries}, indent=1).encode()])


# ---------------------------------------------------------------------------------------------------------------------
# What the command names

def find_columns(names):
    """{column: [paths]} of what the command names: a model alone, or those that a pattern finds. Raises UserError."""
    columns = {}
    for name in names:
        if os.path.exists(name) or not glob.has_magic(name):
            columns[name] = [name]
            continue
        columns[name] = [path for path in sorted(glob.glob(name)) if os.path.isdir(path)]
        if not columns[name]:
            raise UserError(f"no directory fits the pattern {name!r}; expected runs or model directories")
    paths = [path for found in columns.values() for path in found]
    if len(set(map(os.path.normpath, paths))) < len(paths) or len(columns) < len(names):
        raise UserError(f"a model is named twice: {' '.join(paths)}")
    return columns


def open_models(columns, args):
    """{path: OpenedModel}. Raises UserError."""
    models = {}
    for path in (path for paths in columns.values() for path in paths):
        directory, config, tokenizer = hf.open_model(path, args.tokenizer)
        template_directory = None if args.tokenizer else directory
        models[path] = OpenedModel(path, directory, config, tokenizer, template_directory, args.chat_format)
    return models


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def parse_arguments():
    """The arguments of the command line. Raises UserError."""
    # Tasks may share flags: each adds them, and the last one stands.
    parser = Parser(description=__doc__.split("\n")[0], conflict_handler="resolve")
    add_flags(parser)
    for task in TASKS.values():
        task.add_flags(parser)
    args = parser.parse_args()
    check_flags(args)
    refuse_flags_of_other_tasks(args)
    for name in dict.fromkeys(args.tasks):
        if name in TASKS:
            TASKS[name].check_flags(args)
    return args


def add_flags(parser):
    parser.add_argument("models", nargs="+", help="runs, model directories or Hugging Face repository ids; a pattern "
                        "in quotes, 'runs/bft-s*', is one column: several seeds of one objective")
    parser.add_argument("--tasks", nargs="+", choices=(*TASKS, "plot"), default=[], help="what to evaluate")
    parser.add_argument("--data", nargs="+", default=[], help="a file for each task, in the same order")
    parser.add_argument("--limit", type=int, help="read only the first so many lines of each file in --data (default: "
                        "all; inspect has --lines)")
    parser.add_argument("--prompt", help="print each model's answer to this")
    parser.add_argument("--max-new-tokens", type=int, help=f"of an answer (default: {writing.NEW_TOKENS} for prompt, "
                        f"{answer.NEW_TOKENS} for answer, {process.NEW_TOKENS} for process, {profile.NEW_TOKENS} for "
                        "profile)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of an answer; 0: greedy (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of an answer that is drawn (default: 0)")
    parser.add_argument("--out", default="results.json", help="where the table and the per-item scores go, pages and "
                        "pictures beside it (default: results.json)")
    parser.add_argument("--tokenizer", help="directory with tokenizer.json, or a tiktoken name; without: the model's")
    parser.add_argument("--chat-format", choices=("auto", *hf.CHAT_FORMATS), default="auto", help="of samples and "
                        "prompts; auto: the model's own template, or what its special tokens suggest (default: auto)")
    parser.add_argument("--max-length", type=int, help="cut samples after so many tokens; without: where the model's "
                        "positions end")
    parser.add_argument("--group-size", type=int, default=256, help="g, in response tokens, whatever "
                        "runs were trained with (default: 256)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="float32",
                        help="autocast; auto: bfloat16 where the device has it natively (default: float32)")
    parser.add_argument("--shard", choices=SHARDS, default="no", help="what ranks share instead of holding all of a "
                        "model: its rows, over all ranks or within each node (default: no)")
    parser.add_argument("--device", default="auto", help="auto: cuda if there is one, else cpu")


def check_flags(args):
    """Raises UserError for values of the flags of all tasks that make no sense."""
    if not args.tasks and args.prompt is None:
        raise UserError("nothing to do; expected --tasks and --data, or --prompt")
    if "plot" in args.tasks and (len(args.tasks) > 1 or args.data or args.prompt is not None):
        raise UserError("--tasks plot draws what runs have logged; expected no other task, no --data and no --prompt")
    if args.tasks != ["plot"] and len(args.data) != len(args.tasks):
        raise UserError(f"--data names {len(args.data)} files for {len(args.tasks)} tasks; expected one for each")
    if not 0 <= args.temperature < math.inf or not 0 <= args.seed < 2 ** 32:
        raise UserError(f"--temperature is {args.temperature} and --seed {args.seed}; expected a finite "
                        "temperature of 0 or more, and a seed of 0 or more, below 2 ** 32")
    for name in ("group_size", "max_length", "max_new_tokens", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{flag_name(name)} is {value}; expected at least 1")
    out = Path(args.out).resolve()
    if not os.access(out.parent, os.W_OK | os.X_OK) or out.is_dir():
        raise UserError(f"--out {args.out}: expected a file in a directory that is there and can be written to")
    if out in [Path(file).resolve() for file in args.data]:
        raise UserError(f"--out {args.out} is a file of --data, which would be overwritten; expected another name")


def refuse_flags_of_other_tasks(args):
    """Raises UserError for a flag of tasks that are not in --tasks."""
    owners, defaults = {}, {}
    for name, task in TASKS.items():
        parser = Parser(add_help=False)
        task.add_flags(parser)
        for flag, default in vars(parser.parse_args([])).items():
            owners.setdefault(flag, []).append(name)
            defaults[flag] = default
    for flag, names in owners.items():
        if getattr(args, flag) != defaults[flag] and not set(names) & set(args.tasks):
            raise UserError(f"{flag_name(flag)} is of {' and '.join(names)} alone; expected that in --tasks")


if __name__ == "__main__":
    run(main)
