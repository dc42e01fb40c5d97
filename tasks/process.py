"""The `process` task: the model names the biological process behind a set of genes, as in GeneAgent's evaluation."""

import re
from typing import Any, NamedTuple

import numpy as np

from runtime.process import UserError
from tasks import Answers, items_of, writing
from tasks.items import load_items
from tasks.statistics import MEAN, Measure, summarise


TEMPLATE = ("Here is a set of human genes: {genes}. Name the most prominent biological process that they perform "
            "together. Answer with one line, the name alone, as in\nProcess: <name>")
NEW_TOKENS = 48

MEASURES = [
    Measure("rouge1", "ROUGE-1 %", MEAN, percent=True),
    Measure("rouge2", "ROUGE-2 %", MEAN, percent=True),
    Measure("rougeL", "ROUGE-L %", MEAN, percent=True),
]


def encoder_measures(name):
    return [
        # Cosines in two models' own spaces cannot be compared.
        Measure(f"cosine {name}", f"cosine similarity, {name}", MEAN, comparable=name != "self"),
        Measure(f"percentile {name}", f"percentile of the true name, {name}", MEAN, percent=True),
    ]


class Questions(NamedTuple):
    file: str
    items: list                      # {"genes", "process", "line", "group"} each
    prompts: writing.Prompts
    candidates: list                 # names that the true one is compared with
    encoders: dict                   # of `writing.load_encoders`
    rouge: Any                       # rouge_score's scorer


def add_flags(parser):
    writing.add_flags(parser)
    parser.add_argument("--candidates", help="of process: a file with 'process' on each line, further names that the "
                        "true one is compared with; without: those of --data alone")


def check_flags(args):
    writing.check_flags(args)


def read(file, number, evaluation):
    args = evaluation.args
    items = load_items(file, genes="texts", process="text")[:args.limit]
    further = load_items(args.candidates, process="text") if args.candidates else []
    candidates = sorted({plain_name(item["process"]) for item in [*further, *items]})
    prompts = writing.encode_items(file, items, TEMPLATE, NEW_TOKENS, evaluation)
    rouge = load_rouge()
    if len(candidates) < 2:
        raise UserError(f"{file}: one name is compared with no other; expected two, or --candidates")
    return Questions(file, items, prompts, candidates, writing.load_encoders(evaluation), rouge)


def load_rouge():
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as e:
        raise UserError(f'the process task needs rouge-score ({e}): pip install -e ".[eval]"') from None
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def ask(questions, model, opened, evaluation):
    label = f"{opened.path}: process of {questions.file}"
    written = writing.write_answers(questions.prompts, model, opened, evaluation, label)
    named = [process_name(answer.answer()) for answer in written]
    writing.warn_of_empty(named, questions.file, opened, evaluation)
    items = []
    for question, answer, name in zip(questions.items, written, named):
        item = {key: question[key] for key in ("line", "group", "process")}
        item |= {"text": answer.text, "name": name}
        # F1, with stemmer.
        for kind, value in questions.rouge.score(plain_name(question["process"]), name).items():
            item[kind] = float(value.fmeasure)
        items.append(item)
    vectors = {}
    if "self" in questions.encoders:
        for key, names in (("named", named), ("candidates", questions.candidates)):
            vectors[key] = writing.embed_self(model, opened.tokenizer, names, evaluation.dtype, label)
    return Answers(items, vectors)


def process_name(text):
    """The name in what a model wrote, as GeneAgent's evaluation has it: the first line, after "Process:" or a label
    like it, without anything in parentheses. (Theirs takes what follows the first colon, whatever precedes it.)"""
    label = r"^\W*((the|most|prominent|biological|process|pathway|name|is|answer)\b[ *_]*)+:"
    without_parentheses = re.sub(r"\([^)]*\)", "", text)
    text = re.sub(label, "", without_parentheses, flags=re.IGNORECASE)
    names = [plain_name(line) for line in text.splitlines()]
    return next((name for name in names if name), "")


def plain_name(name):
    """A name as GeneAgent's evaluation compares it, slashes, commas, quotes and hyphens being spaces; also without
    asterisks, angle brackets and a final full stop."""
    return " ".join(re.sub(r'[/,"*<>-]', " ", name).rstrip(". ").split())


def finish(questions, answers, evaluation):
    """Adds to every item, for each encoder, the cosine of what was named with the true name, and its percentile."""
    candidates = questions.candidates
    places = {name: place for place, name in enumerate(candidates)}
    truth = [places[plain_name(item["process"])] for item in questions.items]
    for encoder, encode in questions.encoders.items():
        fixed = encode(candidates) if encode else None
        for items, vectors in answers.values():
            if encode:
                named, names = encode([item["name"] for item in items]), fixed
            else:
                named, names = vectors["named"], vectors["candidates"]
            for item, cosine, percentile in zip(items, *similarities(named, names, truth)):
                item[f"cosine {encoder}"] = float(cosine)
                item[f"percentile {encoder}"] = float(percentile)
    return {}


def similarities(named, candidates, truth):
    """(cosine of each name with the true one (S,), its percentile (S,): the share of the *other* candidates that are
    less similar to the name, equal ones by half). named (S, d), candidates (C, d), truth (S,) indices of candidates."""
    # Rounded, or equal ones may differ.
    cosines = (unit_rows(named) @ unit_rows(candidates).T).round(9)                             # (S, C)
    true = cosines[np.arange(len(truth)), truth]                                                # (S,)
    less = (cosines < true[:, None]).sum(1)
    equal = (cosines == true[:, None]).sum(1) - 1
    return true, (less + equal / 2) / max(1, len(candidates) - 1)


def unit_rows(vectors):
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def rows(questions, answers, details, evaluation):
    title = f"process: {questions.file}, {evaluation.chat_formats()} chat format"
    measures = list(MEASURES)
    for encoder in questions.encoders:
        measures += encoder_measures(encoder)
    return title, summarise(measures, items_of(answers, evaluation.columns))
