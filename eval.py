"""Evaluation: what models know, side by side, with intervals.

    python eval.py RUN_OR_MODEL [...] --tasks nll choice --data FILE [...] --out results.json
    python eval.py RUN_OR_MODEL [...] --prompt "What causes gout?"

A model is a run of `train.py`, a Hugging Face directory or repository id. Each task reads the --data file of its place:

    nll       samples (any shape of data.py): NLL and perplexity per response token, minimum group confidence
    choice    {"question", "choices", "answer", "context"?}: multiple choice by log-likelihood; acc, acc_norm (by
              characters) and acc_bytes as lm-evaluation-harness defines them
    inspect   samples: a page of HTML beside --out with some samples' tokens coloured by p, c, and each loss's weights

Models are columns; where lines carry a `group`, each group is a row. Differences are to the first model, over the same
items, with a paired bootstrap 95% interval.
"""

import html
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import bft
from data import (
    CHAT_FORMATS, CHAT_TOKENS, Parser, Sample, UserError, collate, compare_template, deal, encode_turns, find_format,
    load_choice, load_samples, load_tokenizer, run
)
from model import GPT, autocast, compute_dtype, find_directory, read_config, weight_files, write_whole


# ---------------------------------------------------------------------------------------------------------------------
# Scores

@torch.no_grad()
@torch.compiler.set_stance("force_eager")                                 # its sizes are as they come
def score(model, samples, dtype=torch.float32, micro_tokens=8192, group_size=256, stopped=lambda: False):
    """Log-likelihood of each sample's response tokens: (S, 3) float64: sum of log p, number of tokens, C_b.

    Micro-batches are formed first and dealt to the ranks then, so the figures do not depend on how many there are. Once
    stopped() says True the rest is left undone, and what is returned is of no use.
    """
    device = next(model.parameters()).device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    table = torch.zeros(len(samples), 3, dtype=torch.float64, device=device)
    for micro in deal([len(s.ids) for s in samples], 1, micro_tokens)[0][rank::world]:
        if stopped():
            break
        batch = collate([samples[i] for i in micro]).to(device)
        with autocast(device, dtype):
            logp = model(batch.input_ids, batch.lengths, batch.at, batch.targets)   # (N,)
        table[micro] = torch.stack((segment_sum(logp, batch.offsets), batch.offsets.diff().to(device).double(),
                                    bft.group_confidence(logp, batch.offsets, group_size)), 1)
    if world > 1:
        dist.all_reduce(table)
    refuse_nan(table)
    return table.cpu().numpy()


def refuse_nan(values):
    if values.isnan().any():
        raise UserError("the model gives probabilities that are no numbers (NaN); expected a model that was not ruined")


def segment_sum(values, offsets):
    """The sum of each sample's values in the ragged layout: (S,) float64."""
    tokens = torch.arange(len(values), device=values.device)
    sample = torch.searchsorted(offsets.to(values.device), tokens, right=True) - 1   # (N,)
    return values.new_zeros(len(offsets) - 1, dtype=torch.float64).index_add(0, sample, values.double())


def nll_items(model, samples, dtype=torch.float32, group_size=256):
    """The `nll` task: for each sample its group, summed NLL, tokens, and minimum group confidence."""
    return [{"line": s.line, "group": s.group, "nll": -row[0], "tokens": int(row[1]), "confidence": row[2]}
            for s, row in zip(samples, score(model, samples, dtype, group_size=group_size).tolist())]


def choice_items(model, tokenizer, items, dtype=torch.float32):
    """The `choice` task: for each item the log-likelihood of every choice, and which is picked by which measure.

    As in lm-evaluation-harness: a choice is the continuation " " + choice of the prompt, its tokens those that the
    whole text has beyond the prompt's; acc picks the highest log-likelihood, acc_norm the highest per character of the
    choice, acc_bytes per byte. `nll` is that of the right answer per token. An item's `planted` is the index of a
    wrong answer that training asserted; `followed` says whether acc's pick is that one.
    """
    requests = []
    for item in items:
        prompt = (item["context"] + "\n" if item.get("context") else "") + item["question"] + "\nAnswer:"
        start = len(tokenizer.encode(prompt))
        for choice in item["choices"]:
            ids = np.array(tokenizer.encode(prompt + " " + choice), dtype=np.int64)
            requests.append(Sample(ids, np.arange(len(ids)) >= start, None, item["line"]))
            if len(ids) > model.config.max_positions:
                raise UserError(f"the choice item on line {item['line']} has {len(ids)} tokens; the model's positions "
                                f"end at {model.config.max_positions}")
    scores, records, first = score(model, requests, dtype), [], 0
    for item in items:
        choices, answer = item["choices"], item["answer"]
        loglik, tokens, _ = scores[first:first + len(choices)].T
        first += len(choices)
        picks = {"acc": loglik.argmax(), "acc_norm": (loglik / [len(c) for c in choices]).argmax(),
                 "acc_bytes": (loglik / [len(c.encode(errors="replace")) for c in choices]).argmax()}
        record = {"line": item["line"], "group": item["group"], "loglik": loglik.tolist(),
                  "nll": -loglik[answer] / tokens[answer]}
        record |= {measure: int(pick == answer) for measure, pick in picks.items()}
        if "planted" in item:
            record["followed"] = int(picks["acc"] == item["planted"])
        records.append(record)
    return records


# ---------------------------------------------------------------------------------------------------------------------
# What each loss looks at, as a page

@torch.no_grad()
def inspect_items(model, tokenizer, samples, dtype=torch.float32, group_size=256):
    """The `inspect` task: each sample's tokens as text, and of its n_b response tokens p_t, c_t, the first and last of
    the minimum group, and for every objective w_t and s_b: the weights that a step on this sample would have now."""
    device, records = next(model.parameters()).device, []
    for sample in samples:
        batch = collate([sample]).to(device)
        with autocast(device, dtype):
            logp = model(batch.input_ids, batch.lengths, batch.at, batch.targets).cpu().double()   # (n_b,)
        refuse_nan(logp)
        sums, g = F.pad(logp.cumsum(0), (1, 0)), min(group_size, len(logp))
        first = int((sums[g:] - sums[:-g]).argmin())                      # the first of equal ones
        rest = logp, batch.offsets, group_size
        weights = {name: {"w": row.token_weight(*rest).tolist(), "s": row.sample_weight(*rest).item()}
                   for name, row in bft.OBJECTIVES.items()}
        text = [tokenizer.bytes.get(i, b"?").decode(errors="backslashreplace") for i in sample.ids.tolist()]
        records.append({"line": sample.line, "group": sample.group, "tokens": text,
                        "response": sample.response.tolist(), "p": logp.exp().tolist(),
                        "c": bft.local_confidence(*rest).tolist(),
                        "confidence": bft.group_confidence(*rest).item(), "minimum_group": [first, first + g - 1],
                        "weights": weights})
    return records


def inspect_page(results, group_size):
    """A page of HTML, all by itself, of `inspect_items` for each model: {model: [item, ...]}. Colours are numbers from
    0 to 1, light to dark (ColorBrewer's YlGnBu, which the colour-blind can read); what a token's numbers are shows on
    hover. Numbers go to the script, text is escaped and never does."""
    def numbers(values):
        return [float(f"{v:.4g}") for v in values]

    blocks, data = [], []
    for number in range(len(next(iter(results.values())))):
        for name, items in results.items():
            item, spans, t = items[number], [], 0
            first, last = item["minimum_group"]
            for text, response in zip(item["tokens"], item["response"]):
                shown = html.escape(text).replace("\n", "\u23ce\n").replace("\r", "\u240d")
                mark = f" id=g{len(blocks)}" * (t == first) + " class=g" * (first <= t <= last)
                spans.append(f"<b{mark}>{shown}</b>" if response else shown)
                t += response
            blocks.append(
                f"<h2>{html.escape(name)}, line {item['line']}</h2><p>{len(item['tokens'])} tokens, {t} of response; "
                f"<a href=#g{len(blocks)}>minimum group</a> confidence C = {item['confidence']:.4f}, smallest local "
                f"confidence c = {min(item['c']):.4f}</p><div class=t>{''.join(spans)}</div>")
            data.append({"p": numbers(item["p"]), "c": numbers(item["c"]),
                         "s": {objective: row["s"] for objective, row in item["weights"].items()},
                         "w": {objective: numbers(row["w"]) for objective, row in item["weights"].items()}})
    parts = {"GROUP": str(group_size), "BLOCKS": "".join(blocks), "DATA": json.dumps(data).replace("<", "\\u003c")}
    page = (Path(__file__).resolve().parent / "assets" / "inspect.html").read_text(encoding="utf-8")
    return re.sub("@(GROUP|BLOCKS|DATA)@", lambda m: parts[m[1]], page)   # in one pass: text may hold such a word


# ---------------------------------------------------------------------------------------------------------------------
# Statistics

def bootstrap(values, weights=None, resamples=10_000, seed=0):
    """sum(values) / sum(weights) over items drawn with replacement: (resamples,). The same seed and number of items
    draw the same items, so the difference of two calls is paired. weights None: all 1, the mean."""
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    rng, out = np.random.RandomState(seed), np.empty(resamples)
    for i in range(0, resamples, 500):                                    # a few at a time: bounded memory
        drawn = rng.randint(len(values), size=(min(500, resamples - i), len(values)))
        out[i:i + 500] = values[drawn].sum(1) / weights[drawn].sum(1)
    return out


def interval(resampled):
    """95% percentile interval."""
    return tuple(np.percentile(resampled, (2.5, 97.5)).tolist())


def wilson(hits, z=1.959964):
    """95% Wilson score interval of a proportion; unlike the bootstrap's it has a width at 0% and 100%."""
    n, p = len(hits), float(np.mean(hits))
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


# What a row of a table shows: task, measure, heading, weights, percent?
MEASURES = [
    ("nll", "nll", "NLL per response token", "tokens", False),
    ("nll", "perplexity", "perplexity", "tokens", False),                 # exp of the row above
    ("nll", "confidence", "minimum group confidence", None, False),
    ("choice", "acc", "acc %", None, True),
    ("choice", "acc_norm", "acc_norm %", None, True),
    ("choice", "acc_bytes", "acc_bytes %", None, True),
    ("choice", "nll", "NLL of the right answer", None, False),
    ("choice", "followed", "planted answer followed %", None, True),
]


def summarise(task, results, measures=None):
    """Rows of the table: results {model: [item, ...]} of one task, over the same items for every model. measures: those
    wanted, None for all.

    Each row: group, measure, heading, n, and for each model {value, value_low, value_high} and, but for the first,
    {difference, difference_low, difference_high}: paired, to the first model.
    """
    first = next(iter(results))
    groups = {r["group"] for r in results[first]}
    groups = [None, *sorted(groups - {None})] if len(groups) > 1 else [None]   # all; and each, if there are several
    wanted = [m[1:] for m in MEASURES if m[0] == task and (measures is None or m[1] in measures)]
    rows = []
    for group in groups:
        for measure, heading, weight, percent in wanted:
            source, of = ("nll", np.exp) if measure == "perplexity" else (measure, np.asarray)
            row, drawn = {"group": group, "measure": measure, "heading": heading, "percent": percent, "models": {}}, {}
            for name, items in results.items():
                items = [r for r in items if (group is None or r["group"] == group) and source in r]
                if not items:
                    break
                values = [r[source] for r in items]
                weights = [r[weight] for r in items] if weight else None
                drawn[name] = of(bootstrap(values, weights))
                low, high = wilson(values) if percent else interval(drawn[name])
                cell = {"value": float(of(np.sum(values) / np.sum(weights or len(values)))), "value_low": low,
                        "value_high": high}
                if name != first:
                    low, high = interval(drawn[name] - drawn[first])
                    cell |= {"difference": cell["value"] - row["models"][first]["value"], "difference_low": low,
                             "difference_high": high}
                row["models"][name], row["n"] = cell, len(items)
            if row["models"]:
                rows.append(row)
    return rows


def print_table(rows, title):
    """Values and intervals, models as columns; under each column but the first the paired difference to the first."""
    names = list(rows[0]["models"])
    table = [["", *names]]
    for row in rows:
        scale, form = (100, ".1f") if row["percent"] else (1, ".3f")
        table.append([f"{row['group'] or 'all'} ({row['n']})  {row['heading']}"])
        if len(names) > 1:
            table.append(["    minus the first"])
        for c in row["models"].values():
            for line, key, sign in zip(table[-min(2, len(names)):], ("value", "difference"), ("", "+")):
                value, low, high = (c.get(k, math.nan) * scale for k in (key, key + "_low", key + "_high"))
                line.append(f"{value:{sign}{form}} [{low:{sign}{form}}, {high:{sign}{form}}]" if key in c else "")
    widths = [max(map(len, column)) for column in zip(*table)]
    print(f"\n{title}")
    for label, *cells in table:
        print(label.ljust(widths[0]) + "".join("  " + c.rjust(w) for c, w in zip(cells, widths[1:])))


# ---------------------------------------------------------------------------------------------------------------------

def find_device(name):
    """The torch.device of --device. Raises UserError if it cannot be used here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":                                                    # one for each of torchrun's processes
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if local > torch.cuda.device_count():
            raise UserError(f"{local} processes on this node, which has {torch.cuda.device_count()} CUDA devices; "
                            "expected one for each (--nproc_per_node), or --device cpu")
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise TypeError("expected cpu or cuda")
        torch.empty(1, dtype=torch.float64, device=device)                # the objectives compute in float64
    except (RuntimeError, AssertionError, TypeError) as e:
        raise UserError(f"--device {name} cannot be used here: {str(e).splitlines()[0]}") from None
    return device


def open_model(path, tokenizer=None):
    """(directory, GPTConfig, Tokenizer) of a run, model directory or Hugging Face repository id, the weights unread.
    tokenizer: another one than the directory's. Raises UserError."""
    try:
        directory = Path(path) / "model" if Path(path, "model", "config.json").is_file() else find_directory(path)
        weight_files(directory)
        config = read_config(directory)
    except (ValueError, OSError) as e:
        raise UserError(str(e)) from None
    tokenizer = load_tokenizer(tokenizer or directory)
    if tokenizer.n_vocab > config.vocab_size:
        raise UserError(f"{directory}: the tokenizer has {tokenizer.n_vocab} tokens, the model only "
                        f"{config.vocab_size}")
    return directory, config, tokenizer


def load_weights(directory):
    """The GPT of a directory. Raises UserError."""
    try:
        return GPT.from_pretrained(directory)
    except (ValueError, OSError) as e:
        raise UserError(str(e)) from None


def generation_config(directory):
    """The content of generation_config.json, {} if there is none. Raises UserError."""
    path = Path(directory, "generation_config.json")
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
        if not isinstance(content, dict):
            raise ValueError("it is no object")
        return content
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not a generation configuration that we can read: {e}") from None


def stop_ids(config, generation, tokenizer, chat_format):
    """Every id that ends an answer: those of config.json, generation_config.json, the tokenizer and the chat format."""
    eos = generation.get("eos_token_id")
    eos = [*config.eos_token_ids, *(eos if isinstance(eos, list) else [eos]), tokenizer.eos_id]
    eos += [tokenizer.special[token] for token in CHAT_TOKENS[chat_format][-1:]]
    return list(dict.fromkeys(i for i in eos if type(i) is int))


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", help="runs, model directories or Hugging Face repository ids")
    parser.add_argument("--tasks", nargs="+", choices=("nll", "choice", "inspect"), default=[], help="what to evaluate")
    parser.add_argument("--data", nargs="+", default=[], help="a file for each task, in the same order")
    parser.add_argument("--lines", nargs="+", type=int, default=[], help="of the inspect task's file, which samples to "
                        "show (default: the first four)")
    parser.add_argument("--prompt", help="print each model's answer to this")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of the answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the answer; 0: greedy (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of an answer that is drawn (default: 0)")
    parser.add_argument("--out", default="results.json",
                        help="where the table and the per-item scores go (default: results.json)")
    parser.add_argument("--tokenizer", help="directory with tokenizer.json, or a tiktoken name; without: the model's")
    parser.add_argument("--chat-format", choices=("auto", *CHAT_FORMATS), default="auto", help="of samples and "
                        "the prompt; auto: the one whose special tokens the tokenizer has (default: auto)")
    parser.add_argument("--max-length", type=int, help="cut samples after so many tokens; without: where "
                        " the model's positions end")
    parser.add_argument("--group-size", type=int, default=256, help="g, in response tokens (default: 256)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="float32",
                        help="autocast; auto: bfloat16 where the device has it natively (default: float32)")
    parser.add_argument("--device", default="auto", help="auto: cuda if there is one, else cpu")
    args = parser.parse_args()
    if not args.tasks and args.prompt is None:
        raise UserError("nothing to do; expected --tasks and --data, or --prompt")
    if len(args.data) != len(args.tasks):
        raise UserError(f"--data names {len(args.data)} files for {len(args.tasks)} tasks; expected one for each")
    if len(set(args.models)) < len(args.models):
        raise UserError(f"a model is named twice: {' '.join(args.models)}")
    if not 0 <= args.temperature < math.inf or not 0 <= args.seed < 2 ** 32:
        raise UserError(f"--temperature is {args.temperature} and --seed {args.seed}; expected 0 or more each")
    for name in ("group_size", "max_length", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected at least 1")
    out = Path(args.out).resolve()
    if not os.access(out.parent, os.W_OK | os.X_OK) or out.is_dir():
        raise UserError(f"--out {args.out}: expected a file in a directory that is there and can be written to")
    device = find_device(args.device)
    dtype, output = compute_dtype(args.dtype, device), {"models": args.models, "tasks": []}
    opened = {path: open_model(path, args.tokenizer) for path in args.models}
    formats = {path: find_format(args.chat_format, tokenizer) for path, (_, _, tokenizer) in opened.items()}
    sets = {}                                                             # every file is read before any model is
    for path, (directory, config, tokenizer) in opened.items():
        needed = args.prompt is not None or {"nll", "inspect"} & set(args.tasks)
        if needed and (difference := compare_template(directory, tokenizer, formats[path])):
            print(f"warning: {difference}")
        for task, file in zip(args.tasks, args.data):
            if task == "choice":
                sets[path, task, file] = load_choice(file)
                continue
            longest = args.max_length or config.max_positions
            samples, counts = load_samples(file, tokenizer, formats[path], longest)
            print(f"{path}: {counts['cut']} of {file} cut at {longest} tokens, {counts['dropped']} dropped")
            if task == "inspect":
                samples = [s for s in samples if s.line in args.lines] if args.lines else samples[:4]
                if lacking := set(args.lines) - {s.line for s in samples}:
                    raise UserError(f"{file}: --lines: there is no sample on line {min(lacking)}")
            if [s.line for s in samples] != [s.line for s in sets.get((args.models[0], task, file), samples)]:
                raise UserError(f"{file}: {path} and {args.models[0]} keep different samples within their positions; "
                                "expected a --max-length that both have, to compare them on the same ones")
            sets[path, task, file] = samples
    results = [{} for _ in args.tasks]
    for path, (directory, config, tokenizer) in opened.items():           # one model at a time in memory
        model = load_weights(directory).cast(dtype).to(device)
        if args.prompt is not None:
            ids, _ = encode_turns([("user", args.prompt), ("assistant", None)], tokenizer, formats[path])
            try:
                with autocast(device, dtype):
                    stop = stop_ids(config, generation_config(directory), tokenizer, formats[path])
                    answer, = model.generate([ids], args.max_new_tokens, args.temperature, stop, args.seed)
            except ValueError as e:
                raise UserError(f"{path}: {e}") from None
            print(f"--- {path} ({formats[path]})\n{tokenizer.decode(answer)}")
        for task, file, result in zip(args.tasks, args.data, results):
            data = sets[path, task, file]
            result[path] = choice_items(model, tokenizer, data, dtype) if task == "choice" else \
                nll_items(model, data, dtype, args.group_size) if task == "nll" else \
                inspect_items(model, tokenizer, data, dtype, args.group_size)
    if not args.tasks:
        return
    for task, file, result in zip(args.tasks, args.data, results):
        output["tasks"].append({"task": task, "data": file, "rows": summarise(task, result), "items": result})
        if task == "inspect":
            write_whole(out.with_suffix(".html"), [inspect_page(result, args.group_size).encode(errors="replace")])
            print(f"page: {Path(args.out).with_suffix('.html')}")
    write_whole(out, [json.dumps(output, indent=1).encode()])
    for t in output["tasks"]:
        if t["rows"]:
            print_table(t["rows"], f"{t['task']}: {t['data']}")
    print(f"\nper-item scores: {args.out}")


if __name__ == "__main__":
    run(main)
