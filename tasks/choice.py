"""The `choice` task: multiple choice by log-likelihood, as lm-evaluation-harness has it."""

import math
import string
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

import hf
from runtime.process import UserError
from runtime.rows import read_rows
from tasks import Answers, items_of
from tasks.items import group_of, is_text, warn_of_template
from tasks.scoring import Request, loglikelihood
from tasks.statistics import MEAN, PROPORTION, Measure, summarise
from tasks.writing import question_turns


MEASURES = [
    Measure("acc", "acc %", PROPORTION, percent=True),
    Measure("acc_norm", "acc_norm %", PROPORTION, percent=True),
    Measure("acc_bytes", "acc_bytes %", PROPORTION, percent=True),
    Measure("nll", "NLL of the right answer, per token", MEAN),
    Measure("followed", "planted answer followed %", PROPORTION, percent=True),
]


# ---------------------------------------------------------------------------------------------------------------------
# How a question is asked. The layouts with names of data sets are those of lm-evaluation-harness's tasks pubmedqa,
# medqa_4options, medmcqa and mmlu_*, without examples.

class Layout(NamedTuple):
    prompt: Callable                 # item -> text
    system: Callable | None = None   # item -> text before the prompt; a turn by itself in a chat format
    letters: bool = False            # whether letters stand for the choices
    needs: str | None = None         # a key that it shows, which is not in every file


def options(item):
    lines = [f"{letter}. {choice}\n" for letter, choice in zip(string.ascii_uppercase, item["choices"])]
    return "".join(lines)


def cloze_prompt(item):
    before = item["context"] + "\n" if item.get("context") else ""
    return f"{before}{item['question']}\nAnswer:"


def pubmedqa_prompt(item):
    return f"Abstract: {item['context']}\nQuestion: {item['question']}\nAnswer:"


def medqa_prompt(item):
    return f"Question: {item['question']}\n{options(item)}Answer:"


def medmcqa_prompt(item):
    return f"Question: {item['question']}\nChoices:\n{options(item)}Answer:"


def mmlu_prompt(item):
    return f"{item['question'].strip()}\n{options(item)}Answer:"


def mmlu_system(item):
    subject = item["subject"].replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


LAYOUTS = {
    "cloze": Layout(cloze_prompt),
    "pubmedqa": Layout(pubmedqa_prompt, needs="context"),
    "medqa": Layout(medqa_prompt, letters=True),
    "medmcqa": Layout(medmcqa_prompt, letters=True),
    "mmlu": Layout(mmlu_prompt, mmlu_system, letters=True, needs="subject"),
}


def add_layout_flag(parser):
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["cloze"], help="how questions of choice and "
                        "answer are asked, one for all or one for each of these tasks: those with names of data sets "
                        "as lm-evaluation-harness asks them; cloze shows no choices (default: cloze)")


def tasks_with_layout(args):
    return [name for name in args.tasks if name in ("choice", "answer")]


def check_layouts(args):
    tasks = len(tasks_with_layout(args))
    if len(args.layout) not in (1, tasks):
        raise UserError(f"--layout names {len(args.layout)} for {tasks} choice and answer tasks; expected one, or one "
                        "for each")


def layout_of(task, number, args):
    """The name of the layout for the task's file of this number."""
    places = [place for place, name in enumerate(tasks_with_layout(args)) if name == task]
    return args.layout[places[number] % len(args.layout)]


# ---------------------------------------------------------------------------------------------------------------------
# The task

class Questions(NamedTuple):
    file: str
    items: list                      # of `load_choice`
    layout: str
    chat: bool


def add_flags(parser):
    add_layout_flag(parser)
    parser.add_argument("--chat", action="store_true", help="ask choice questions in the chat format, not plain")


def check_flags(args):
    check_layouts(args)


def read(file, number, evaluation):
    args = evaluation.args
    layout = layout_of("choice", number, args)
    items = load_choice(file, layout)[:args.limit]
    if args.chat:
        for opened in evaluation.models.values():
            warn_of_template(opened, evaluation.ranks)
    return Questions(file, items, layout, args.chat)


def load_choice(path, layout="cloze"):
    """Multiple-choice items, {"question", "choices", "answer", "context"?, "planted"?}: a list of dicts, each with its
    "line" (or row), "where" it is, for errors, and "group". Raises UserError, also for what the layout cannot show."""
    needs = LAYOUTS[layout].needs
    most = len(string.ascii_uppercase) if LAYOUTS[layout].letters else math.inf
    items = []
    for line, where, row in read_rows(path):
        question, choices, answer = row.get("question"), row.get("choices"), row.get("answer")
        if not isinstance(question, str) or not isinstance(row.get("context", ""), str):
            raise UserError(f"{where}: 'question' (and 'context', if any) must be a string")
        if not isinstance(choices, list) or len(choices) < 2 or not all(map(is_text, choices)):
            raise UserError(f"{where}: 'choices' must be a list of two or more texts")
        if not is_index(answer, choices):
            raise UserError(f"{where}: 'answer' is {answer!r}; expected the index of the right choice, 0 to "
                            f"{len(choices) - 1}")
        planted = row.get("planted", 0)
        if not is_index(planted, choices):
            raise UserError(f"{where}: 'planted' is {planted!r}; expected the index of a choice, if there is any")
        if needs and not is_text(row.get(needs)):
            raise UserError(f"{where}: --layout {layout} shows {needs!r}; expected some text there")
        if len(choices) > most:
            raise UserError(f"{where}: {len(choices)} choices; expected at most 26, as letters")
        items.append({**row, "line": line, "where": where, "group": group_of(row)})
    return items


def is_index(value, choices):
    return type(value) is int and 0 <= value < len(choices)


def ask(questions, model, opened, evaluation):
    file = questions.file
    chat_format = opened.chat_format if questions.chat else None
    items = choice_items(model, opened.tokenizer, questions.items, evaluation.dtype, questions.layout, chat_format,
                         f"{opened.path}: choice of {file}")
    cut = sum(item["cut"] > 0 for item in items)
    if cut:
        evaluation.ranks.print(f"warning: {opened.path}: {cut} of {len(items)} questions of {file} are longer than its "
                               f"{opened.config.max_positions} positions and lost their beginning")
    return Answers(items)


def choice_items(model, tokenizer, items, dtype=torch.float32, layout="cloze", chat_format=None, label=None):
    """For each item the log-likelihood of every choice, and which is picked by which measure.

    As in lm-evaluation-harness: what is scored is a choice, or its letter, as the continuation of the prompt, after a
    space and with the tokens that the whole text has beyond the prompt's; with a chat_format the prompt is a user's
    turn, the choice begins the answer, and the white space before it is scored too. acc picks the highest
    log-likelihood, acc_norm the highest per character of what is scored, acc_bytes per byte. `nll` is that of the right
    answer per token, `cut` the tokens that a prompt lost at its beginning, being longer than the positions. An item's
    `planted` is the index of a wrong answer that training asserted: `followed` says whether acc's pick is that one,
    `planted_nll` is its NLL. label: see `with_progress`. Raises UserError.
    """
    positions = model.config.max_positions
    requests_of_items = [requests_of(item, tokenizer, LAYOUTS[layout], chat_format, positions) for item in items]
    flat = [request for requests in requests_of_items for request in requests]
    logliks = loglikelihood(model, flat, dtype, label=label)
    records = []
    first = 0
    for item, requests in zip(items, requests_of_items):
        loglik = logliks[first:first + len(requests)]                                           # (choices,)
        first += len(requests)
        records.append(record(item, loglik, requests, scored_texts(item, LAYOUTS[layout]), positions))
    return records


def scored_texts(item, layout):
    """What stands for the choices: letters, or they themselves."""
    if layout.letters:
        return string.ascii_uppercase[:len(item["choices"])]
    return item["choices"]


def requests_of(item, tokenizer, layout, chat_format, positions):
    """A Request for each choice of an item. Raises UserError for one without tokens, or of more than there are
    positions."""
    prompt = layout.prompt(item)
    system = layout.system(item) if layout.system else ""
    requests = []
    if chat_format:
        try:
            context, white_space = chat_context(system, prompt, chat_format)
        except UserError as e:
            raise UserError(f"{item['where']}: {e}") from None
    else:
        context, white_space = hf.begin_ids(tokenizer) + tokenizer.encode(system + prompt), []
    for text in scored_texts(item, layout):
        if chat_format:
            continuation = white_space + tokenizer.encode(text, chat_format.end_of(context + white_space))
        else:
            whole = hf.begin_ids(tokenizer) + tokenizer.encode(f"{system}{prompt} {text}")
            continuation = whole[len(context):]
        if not len(white_space) < len(continuation) <= positions:
            raise UserError(f"{item['where']}: the choice {text[:50]!r} has {len(continuation) - len(white_space)} "
                            f"tokens; expected 1 to {positions}, the positions of the model")
        requests.append(Request(context, continuation))
    return requests


def chat_context(system, prompt, chat_format):
    """(ids up to the last that is not white space, the rest) of a question in a chat format, ready for the answer."""
    ids, _ = chat_format.encode(question_turns(prompt, system))
    end = len(ids)
    while not chat_format.tokenizer.decode(ids[end - 1:]).strip():
        end -= 1
    return ids[:end], ids[end:]


def record(item, loglik, requests, texts, positions):
    """What results.json has of an item. loglik: (choices,) of the requests, which stand for these texts."""
    answer = item["answer"]
    tokens = [len(request.continuation) for request in requests]
    picks = {
        "acc": loglik.argmax(),
        "acc_norm": (loglik / [len(text) for text in texts]).argmax(),
        "acc_bytes": (loglik / [len(text.encode(errors="replace")) for text in texts]).argmax(),
    }
    # The last token is not read.
    longest = max(len(context) + len(continuation) for context, continuation in requests) - 1
    result = {
        "line": item["line"],
        "group": item["group"],
        "loglik": loglik.tolist(),
        "cut": max(0, longest - positions),
        "nll": -loglik[answer] / tokens[answer],
    }
    for measure, pick in picks.items():
        result[measure] = int(pick == answer)
    if "planted" in item:
        planted = item["planted"]
        result["followed"] = int(picks["acc"] == planted)
        result["planted_nll"] = -loglik[planted] / tokens[planted]
    return result


def finish(questions, answers, evaluation):
    return {"layout": questions.layout, "chat": questions.chat and evaluation.chat_formats(),
            "majority": majority(questions.items)}


def majority(items):
    """The share of the most frequent answer."""
    _, counts = np.unique([item["answer"] for item in items], return_counts=True)
    return int(counts.max()) / len(items)


def rows(questions, answers, details, evaluation):
    title = (f"choice: {questions.file}, {details['layout']} layout, {details['chat'] or 'no'} chat format (always the "
             f"most frequent answer: {details['majority']:.1%})")
    return title, summarise(MEASURES, items_of(answers, evaluation.columns))
