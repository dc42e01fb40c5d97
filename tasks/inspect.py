"""The `inspect` task: what each loss looks at, as a page of HTML."""

import html
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import bft
from data import collate
from runtime.device import autocast
from runtime.files import write_whole
from runtime.process import UserError
from tasks import Answers
from tasks.items import add_flags_of_samples, check_flags_of_samples, load_samples_of_models
from tasks.scoring import refuse_nan
from variants import add_variant_flag, load_variants


PAGE = Path(__file__).resolve().parents[1] / "assets" / "inspect.html"


class Questions(NamedTuple):
    samples: dict                    # {path of a model: [Sample, ...]}
    page: Path


def add_flags(parser):
    add_flags_of_samples(parser)
    add_variant_flag(parser)
    parser.add_argument("--lines", nargs="+", type=int, default=[], help="of the inspect task's file, which samples to "
                        "show (default: the first four)")


def check_flags(args):
    # Lines are looked for in the file.
    check_flags_of_samples(args)
    if Path(args.out).suffix.lower() == ".html":
        raise UserError(f"--out {args.out}: the page goes beside it, under a name that ends in .html; expected another "
                        "ending, such as .json")


def read(file, number, evaluation):
    args = evaluation.args
    load_variants(args.variant)
    page = Path(args.out).with_suffix(".html")
    if number > 0:
        page = page.with_stem(f"{page.stem}-{number + 1}")
    return Questions(load_samples_of_models(file, evaluation, limit=4, lines=args.lines), page)


def ask(questions, model, opened, evaluation):
    items = []
    for sample in questions.samples[opened.path]:
        items.append(inspect_item(model, opened.tokenizer, sample, evaluation.dtype, evaluation.args.group_size))
    return Answers(items)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def inspect_item(model, tokenizer, sample, dtype=torch.float32, group_size=256):
    """A sample's tokens as text, and of its n_b response tokens p_t, c_t, the first and last of the minimum group, and
    for every objective w_t and s_b: the weights that a step on this sample would have now. Raises UserError."""
    device = next(model.parameters()).device
    batch = collate([sample]).to(device)
    with autocast(device, dtype):
        logp, extra = model(batch.input_ids, batch.lengths, batch.at, batch.targets, looks=bft.DISTRIBUTION)   # (n_b,)
    logp = logp.cpu().double()
    refuse_nan(logp)
    # As if the training started from here.
    extra["ref_logp"] = logp
    sums = F.pad(logp.cumsum(0), (1, 0))                                                        # (n_b + 1,)
    group = min(group_size, len(logp))
    # The first of equal ones.
    first = int((sums[group:] - sums[:-group]).argmin())
    weights = {}
    for name in bft.OBJECTIVES:
        found = bft.weigh(logp, batch.offsets, name, group_size, extra)
        weights[name] = {"w": found.token.tolist(), "s": found.sample.item()}
    texts = [tokenizer.bytes.get(i, b"?").decode(errors="backslashreplace") for i in sample.ids.tolist()]
    return {
        "line": sample.line,
        "group": sample.group,
        "tokens": texts,
        "response": sample.response.tolist(),
        "p": logp.exp().tolist(),
        "c": bft.local_confidence(logp, batch.offsets, group_size).tolist(),
        "confidence": bft.group_confidence(logp, batch.offsets, group_size).item(),
        "minimum_group": [first, first + group - 1],
        "weights": weights,
    }


def finish(questions, answers, evaluation):
    """Writes the page."""
    results = {path: items for path, (items, _) in answers.items()}
    page = inspect_page(results, evaluation.args.group_size)
    write_whole(questions.page, [page.encode(errors="replace")])
    evaluation.ranks.print(f"page: {questions.page}")
    return {}


def rows(questions, answers, details, evaluation):
    """A page has no rows."""
    return "", []


# ---------------------------------------------------------------------------------------------------------------------
# The page

def inspect_page(results, group_size):
    """A page of HTML, all by itself, of {model: [items of `inspect_item`]}. Colours are numbers from 0 to 1, light to
    dark (ColorBrewer's YlGnBu, which the colour-blind can read); what a token's numbers are shows on hover. Numbers go
    to the script, text is escaped and never does."""
    blocks, numbers = [], []
    samples = len(next(iter(results.values())))
    for i in range(samples):
        for name, items in results.items():
            blocks.append(block(name, items[i], len(blocks)))
            numbers.append(numbers_of(items[i]))
    parts = {"GROUP": str(group_size), "BLOCKS": "".join(blocks),
             "DATA": json.dumps(numbers).replace("<", "\\u003c")}
    # In one pass: text may hold such a word.
    return re.sub("@(GROUP|BLOCKS|DATA)@", lambda match: parts[match[1]], PAGE.read_text(encoding="utf-8"))


def block(model, item, number):
    """One sample as HTML."""
    first, last = item["minimum_group"]
    spans = []
    t = 0                            # counts response tokens
    for text, is_response in zip(item["tokens"], item["response"]):
        shown = html.escape(text).replace("\n", "\u23ce\n").replace("\r", "\u240d")
        if not is_response:
            spans.append(shown)
            continue
        mark = f" id=g{number}" if t == first else ""
        if first <= t <= last:
            mark += " class=g"
        spans.append(f"<b{mark}>{shown}</b>")
        t += 1
    return (f"<h2>{html.escape(model)}, line {item['line']}</h2><p>{len(item['tokens'])} tokens, {t} of response; "
            f"<a href=#g{number}>minimum group</a> confidence C = {item['confidence']:.4f}, smallest local confidence "
            f"c = {min(item['c']):.4f}</p><div class=t>{''.join(spans)}</div>")


def numbers_of(item):
    """What the script colours by."""
    weights = item["weights"]
    return {
        "p": rounded(item["p"]),
        "c": rounded(item["c"]),
        "s": {objective: row["s"] for objective, row in weights.items()},
        "w": {objective: rounded(row["w"]) for objective, row in weights.items()},
    }


def rounded(values):
    return [float(f"{value:.4g}") for value in values]
