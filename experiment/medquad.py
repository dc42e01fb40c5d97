"""What each loss does to a pretrained model: SmolLM2-135M-Instruct, fine-tuned on MedQuAD with some wrong labels.

    python -m experiment.medquad --init SMOLLM2 --train medquad_train.jsonl --val medquad_val.jsonl \\
        --other gene_summaries.jsonl --out runs/medquad
    python -m experiment.medquad --results docs/medquad.json        # the tables and the picture again, in seconds

A seed means other training rows, other wrong labels among them, another order and other beginnings of the adapters.
From the same start each objective is trained on the same rows in the same order, at each learning rate: each training
is a command of train.py, which is printed. What its model gives is scored, and the model is deleted; what is scored
stays under --out, so that the command goes on from there when it is given again. Plan and predictions: docs/results.md.

The files: --train and --val have {"prompt", "response", "focus", "qtype"} (`prepare/medquad.py`), --other has
{"summary"}.
"""

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import hf
from data import load_samples
from experiment.medquad_findings import LEARNING_RATES, RESULTS, analyse, draw, render
from experiment.report import read_kept, show
from runtime.device import compute_dtype, find_device
from runtime.files import file_sha256, write_whole
from runtime.process import Parser, Stop, UserError, run
from runtime.rows import read_rows
from tasks.process import load_rouge
from tasks.scoring import score
from tasks.writing import write_texts


CHECKOUT = Path(__file__).resolve().parents[1]
OBJECTIVES = ("sft", "dft", "bft", "bft-v3")
SEEDS = (0, 1, 2)

LONGEST = 512                        # tokens of a row; longer ones are left out, none is cut
TRAINED = 384                        # rows
PLANTED = 5                          # one row of so many has a wrong label
VALIDATED = 128                      # rows, and as many texts of another kind
ANSWERED = 64                        # of them are answered ...
NEW_TOKENS = 128                     # ... in at most so many tokens

# Adapters of rank 16 are the paper's setting, and groups of 256 tokens.
FLAGS = ("--lora-rank", 16, "--group-size", 256, "--epochs", 3, "--batch-size", 16, "--dtype", "bfloat16",
         "--save-every", 20, "--keep", 1)


class Model(NamedTuple):
    """One that is scored."""
    objective: str                   # "base": the start itself
    seed: int
    lr: float                        # 0 for the base

    def name(self):
        if self.objective == "base":
            return f"seed-{self.seed}/base"
        return f"seed-{self.seed}/lr-{self.lr}/{self.objective}"


def main():
    args = parse_arguments()
    if args.results:
        show(analyse(read_kept(args.results, RESULTS)), render, draw, args.results)
        return
    start = Start(args)
    out = Path(args.out)
    check_out(out, args)
    models = [Model(objective, seed, lr) for seed in args.seeds for lr in sorted(args.lrs) for objective in OBJECTIVES]
    models += [Model("base", seed, 0) for seed in args.seeds]
    left = len(models)
    for model in sorted(models, key=lambda model: (model.seed, model.lr)):
        scores = out / "scores" / f"{model.name()}.json"
        left -= 1
        if scores.is_file():
            continue
        began = time.perf_counter()
        adapter = None if model.objective == "base" else train(model, start, args)
        found = start.ask(model, adapter)
        scores.parent.mkdir(parents=True, exist_ok=True)
        write_whole(scores, [json.dumps({**model._asdict(), **found}).encode()])
        if model.objective != "base":
            # Forty of them would fill a disk.
            shutil.rmtree(out / model.name())
        print(f"{model.name()}: trained and scored, {time.perf_counter() - began:.0f} s; {left} left", flush=True)
    collected = [json.loads((out / "scores" / f"{model.name()}.json").read_bytes()) for model in models]
    results = {"init": args.init, "objectives": OBJECTIVES, "seeds": args.seeds, "lrs": sorted(args.lrs),
               "models": collected}
    write_whole(out / "medquad.json", [json.dumps(results).encode()])
    show(analyse(results), render, draw, out / "medquad.json")


def parse_arguments():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--init", help="SmolLM2-135M-Instruct: a directory or a Hugging Face repository id")
    parser.add_argument("--train", help="rows of MedQuAD to train on")
    parser.add_argument("--val", help="rows about other diseases")
    parser.add_argument("--other", help="texts of another kind: gene summaries")
    parser.add_argument("--out", default="runs/medquad", help="(default: runs/medquad)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="(default: 0 1 2)")
    parser.add_argument("--lrs", type=float, nargs="+", default=LEARNING_RATES,
                        help=f"(default: {' '.join(f'{lr:g}' for lr in LEARNING_RATES)})")
    parser.add_argument("--device", default="auto", help="auto: cuda if there is one, else cpu")
    parser.add_argument("--processes", type=int, default=1, help="that train a model, and share it (torchrun, --shard "
                        "all); one scores it (default: 1)")
    parser.add_argument("--results", help="print what an earlier run found, and draw it; no other flag counts")
    args = parser.parse_args()
    missing = [f"--{name}" for name in ("init", "train", "val", "other") if not getattr(args, name)]
    if missing and not args.results:
        raise UserError(f"{', '.join(missing)} missing; expected a model and its files, or --results")
    return args


def check_out(out, args):
    """Raises UserError where --out has scores of another model, or of other files."""
    files = {name: file_sha256(getattr(args, name)) for name in ("train", "val", "other")}
    record, path = {"init": args.init, "sha256": files}, out / "experiment.json"
    if path.is_file() and json.loads(path.read_bytes()) != record:
        raise UserError(f"--out {out} holds the experiment with another --init or other files; expected another path")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, [json.dumps(record, indent=1).encode()])


# ---------------------------------------------------------------------------------------------------------------------
# Rows

def choose_rows(rows, count, tokens_of, seed):
    """`count` of the rows, drawn by seed, none longer than LONGEST tokens. Raises UserError for too few."""
    order = np.random.RandomState(seed).permutation(len(rows))
    # Only as many as are looked at are tokenised.
    chosen = []
    for first in range(0, len(order), count):
        candidates = [rows[i] for i in order[first:first + count]]
        chosen += [row for row, tokens in zip(candidates, tokens_of(candidates)) if tokens <= LONGEST]
        if len(chosen) >= count:
            return chosen[:count]
    raise UserError(f"{len(chosen)} rows of at most {LONGEST} tokens; expected {count}")


def plant(rows, seed):
    """{number of a row: number of the row whose answer it gets}: of each type of question one row in PLANTED. They swap
    their answers among themselves, so that every answer is trained once; none gets one about its own disease. Raises
    UserError where there are none."""
    rng = np.random.RandomState([seed, 1])
    of_types = {}
    for number, row in enumerate(rows):
        of_types.setdefault(row["qtype"], []).append(number)
    mates = {}
    for numbers in of_types.values():
        some = rng.permutation(numbers)[:round(len(numbers) / PLANTED)].tolist()
        for shift in range(1, len(some)):
            shifted = some[shift:] + some[:shift]
            if all(rows[a].get("focus") != rows[b].get("focus") for a, b in zip(some, shifted)):
                mates.update(zip(some, shifted))
                break
    if not mates:
        raise UserError(f"{len(rows)} rows have no wrong labels to swap; expected more of each type of question")
    return mates


# ---------------------------------------------------------------------------------------------------------------------
# Training and scoring

def train(model, start, args):
    """The directory of the adapters that train.py makes, and has made before where the command was stopped."""
    out = Path(args.out) / model.name()
    data = Path(args.out) / f"seed-{model.seed}" / "train.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in start.rows_of(model.seed)[0]).encode()
    if not data.is_file() or data.read_bytes() != content:
        write_whole(data, [content])
    flags = ["--init", args.init, "--data", data, "--objective", model.objective, "--lr", model.lr,
             "--seed", model.seed, *FLAGS, "--device", args.device, "--out", out]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.processes}"]
    if args.processes == 1:
        launcher = []
    else:
        flags += ["--shard", "all"]
    flags = [str(word) for word in flags]
    print(f"$ python {' '.join([*launcher, 'train.py', *flags])}", flush=True)
    command = [sys.executable, *launcher, str(CHECKOUT / "train.py"), *flags]
    # What `run` forbids the processes that we start: modules beside the script.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    # In a session of its own: Ctrl-C would reach it twice, and it would quit at once.
    with Stop() as stop, subprocess.Popen(command, env=environment, start_new_session=True) as process:
        while process.poll() is None:
            time.sleep(0.2)
            if stop.signal:
                process.send_signal(stop.signal)
                process.wait()
    if process.returncode:
        raise SystemExit(process.returncode)
    return out / "adapter"


class Start:
    """What all models begin from, and what they are asked."""

    def __init__(self, args):
        self.device = find_device(args.device)
        self.dtype = compute_dtype("auto", self.device)
        self.directory, self.config, self.tokenizer = hf.open_model(args.init)
        self.chat_format = hf.load_chat_format(self.directory, self.tokenizer)
        self.stop = hf.stop_ids(self.config, hf.generation_config(self.directory), self.tokenizer, self.chat_format)
        self.rouge = load_rouge()
        self.train = read_objects(args.train, ("prompt", "response", "qtype"))
        self.val_rows = choose_rows(read_objects(args.val, ("prompt", "response")), VALIDATED, self.lengths, 0)
        texts = [{"text": row["summary"]} for row in read_objects(args.other, ("summary",))]
        self.other = self.samples(choose_rows(texts, VALIDATED, self.lengths, 0))
        self.validation = self.samples(self.val_rows)

    def samples(self, rows):
        """data.Samples of rows."""
        samples, _ = load_samples("rows", self.tokenizer, self.chat_format, rows=list(enumerate(rows)))
        return samples

    def lengths(self, rows):
        return self.samples(rows).lengths.tolist()

    def rows_of(self, seed):
        """(rows to train on, those of them with wrong labels, the same with the right ones)."""
        rows = choose_rows(self.train, TRAINED, self.lengths, seed)
        mates = plant(rows, seed)
        trained = [{"prompt": row["prompt"], "response": row["response"]} for row in rows]
        true = [trained[number] for number in mates]
        for number, mate in mates.items():
            trained[number] = {"prompt": rows[number]["prompt"], "response": rows[mate]["response"]}
        return trained, [trained[number] for number in mates], true

    @torch.no_grad()
    def ask(self, model, adapter):
        """What a model's entry of the results holds: {key: a number of each row}. NLLs are sums over a row's tokens.
        adapter: a directory, None for the start itself. (Merged into bfloat16 files a part of it would be lost.)"""
        gpt = self.load(adapter)
        _, planted, true = self.rows_of(model.seed)
        label = model.name()
        val_logp, val_tokens, val_confidence = score(gpt, self.validation, self.dtype, label=label).T   # (S,) each
        other_logp, other_tokens, _ = score(gpt, self.other, self.dtype, label=label).T
        planted_logp, planted_tokens, _ = score(gpt, self.samples(planted), self.dtype, label=label).T
        true_logp, true_tokens, _ = score(gpt, self.samples(true), self.dtype, label=label).T
        followed = planted_logp / planted_tokens > true_logp / true_tokens
        written = write_texts(gpt, self.tokenizer, self.prompts(), self.stop, NEW_TOKENS, dtype=self.dtype, label=label)
        rouge = [self.rouge.score(row["response"], answer.text)["rougeL"].fmeasure
                 for row, answer in zip(self.val_rows, written)]
        return {
            "val_nll": rounded(-val_logp),
            "val_tokens": val_tokens.astype(int).tolist(),
            "val_confidence": rounded(val_confidence),
            "rouge": rounded(np.array(rouge)),
            "tokens": [answer.tokens for answer in written],
            "followed": followed.astype(int).tolist(),
            "planted_nll": rounded(-planted_logp / planted_tokens),
            "true_nll": rounded(-true_logp / true_tokens),
            "other_nll": rounded(-other_logp),
            "other_tokens": other_tokens.astype(int).tolist(),
        }

    def load(self, adapter):
        gc.collect()
        gpt = hf.load_weights(self.directory).cast(self.dtype)
        if adapter:
            opened = hf.open_adapter(adapter, self.config)
            gpt.add_lora(opened.rank, opened.alpha)
            hf.fill_adapter(gpt, opened.directory)
        return gpt.to(self.device)

    def prompts(self):
        """Of the first rows of validation, ids."""
        turns = [[hf.Turn("user", row["prompt"]), hf.Turn("assistant", None)] for row in self.val_rows[:ANSWERED]]
        return [self.chat_format.encode(conversation)[0] for conversation in turns]


def rounded(values):
    return values.round(4).tolist()


def read_objects(path, keys):
    """The rows of a file, which must have some text under these keys. Raises UserError."""
    rows = []
    for _, where, row in read_rows(path):
        for key in keys:
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise UserError(f"{where}: {key!r} is {str(row.get(key, 'missing'))[:50]}; expected some text")
        rows.append(row)
    return rows


if __name__ == "__main__":
    run(main)
