"""The `nll` task: how likely models find the responses of samples."""

from typing import NamedTuple

import torch

from tasks import Answers, items_of
from tasks.items import add_flags_of_samples, check_flags_of_samples, load_samples_of_models
from tasks.scoring import score
from tasks.statistics import EXP_RATIO, MEAN, RATIO, Measure, summarise


MEASURES = [
    Measure("nll", "NLL per response token", RATIO, per="tokens"),
    Measure("perplexity", "perplexity", EXP_RATIO, source="nll", per="tokens"),
    Measure("confidence", "minimum group confidence", MEAN),
]


class Questions(NamedTuple):
    file: str
    samples: dict                    # {path: [Sample, ...]}


def add_flags(parser):
    add_flags_of_samples(parser)


def check_flags(args):
    check_flags_of_samples(args)


def read(file, number, evaluation):
    samples = load_samples_of_models(file, evaluation, limit=evaluation.args.limit)
    first, *others = evaluation.models.values()
    for opened in others:
        if opened.tokenizer.bytes != first.tokenizer.bytes:
            evaluation.ranks.print(f"warning: {opened.path} and {first.path} have different tokens: NLL per token "
                                   "cannot be compared")
    return Questions(file, samples)


def ask(questions, model, opened, evaluation):
    label = f"{opened.path}: nll of {questions.file}"
    samples = questions.samples[opened.path]
    return Answers(nll_items(model, samples, evaluation.dtype, evaluation.args.group_size, label))


def nll_items(model, samples, dtype=torch.float32, group_size=256, label=None):
    """For each sample its group, summed NLL, tokens, and minimum group confidence."""
    scores = score(model, samples, dtype, group_size=group_size, label=label)
    items = []
    for sample, (logp, tokens, confidence) in zip(samples, scores.tolist()):
        items.append({
            "line": sample.line,
            "group": sample.group,
            "nll": -logp,
            "tokens": int(tokens),
            "confidence": confidence,
        })
    return items


def finish(questions, answers, evaluation):
    return {}


def rows(questions, answers, details, evaluation):
    title = (f"nll: {questions.file}, {evaluation.chat_formats()} chat format, groups of {evaluation.args.group_size} "
             "response tokens")
    return title, summarise(MEASURES, items_of(answers, evaluation.columns))
