"""The `answer` task: multiple choice in words. The model writes, and what it answers is read out of the text."""

import re
import string
import unicodedata
from collections import Counter
from typing import NamedTuple

import numpy as np

from runtime.process import UserError
from tasks import Answers, items_of, writing
from tasks.choice import LAYOUTS, add_layout_flag, check_layouts, layout_of, load_choice, majority, scored_texts
from tasks.statistics import MEAN, PROPORTION, Measure, summarise


INSTRUCTION = "Think it over, then end with a line that says 'Answer:' and one of {choices}."
NEW_TOKENS = 1024


def measures(samples):
    # A question's share of several samples is no zero or one: its interval is the bootstrap's, over questions.
    kind = PROPORTION if samples == 1 else MEAN
    return [
        Measure("right", "right %", kind, percent=True),
        Measure("vote", "right by vote of the samples %", PROPORTION, percent=True),
        Measure("no_answer", "no answer %", kind, percent=True),
        Measure("out_of_budget", "out of budget %", kind, percent=True),
        Measure("tokens", "tokens written", MEAN),
        Measure("followed", "planted answer followed %", kind, percent=True),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What a text answers. Nothing is guessed: what no rule reads is no answer.
#
#   1. What precedes the last </think> is dropped. Thoughts that do not end have no answer.
#   2. The last mark counts, whatever it says: what follows "Answer:", or stands in \boxed{} or in <answer></answer>.
#   3. Without a mark the last statement counts, whatever it says: what follows "the answer is", "the correct option is"
#      and the like. Without that, what precedes "is the correct answer".
#   4. Without any of these the first or the last line counts, if no line names another choice.
#   5. A mark, a statement or a line names a choice if it begins with the choice's letter or words, and these end there:
#      at its end, at punctuation, or before "because". Before them "option", "most likely" and the like may stand. So
#      "A patient" is not A, and neither is "A. baumannii"; "No evidence" is not no. Case, quotes and marks of LaTeX and
#      markdown do not matter. Of choices that begin alike the longest counts.
#   6. What names two ("A or B", or A with the words of B) names none.

# Marks of markdown and LaTeX, and quotes.
MARKS = re.compile(r"[*_$`\\\"'\u2018\u2019\u201c\u201d]")
STYLED = re.compile(r"\\(?:text|math)\w*\s*\{([^{}]*)\}")
BOXED = re.compile(r"\\f?boxed\s*\{([^{}]*)\}|<answer>(.*?)</answer>", re.DOTALL)
# Stands for the full stop of an abbreviation, "A. baumannii", which ends nothing.
DOT = "\u00b7"
ABBREVIATION = re.compile(r"\b([A-Z])\. (?=[a-z])")
MARK = re.compile(r"\banswer(?: to (?:the|this) question)?(?:\s*[:=\u2013\u2014]|\s-\s)"
                  r"|\b(?:correct|right|best) (?:option|choice)\s*[:=]")
STATEMENT = re.compile(r"\b(?:answer|(?:correct|right|best) (?:option|choice))(?: to (?:the|this) question)?"
                       r" (?:is|would be|should be|must be)\b:?")
# What is around a choice that is stated the other way round.
SO = r"(?:^|[.,:;\n]|\b(?:so|thus|hence|therefore|option|choice)\b) ?\(?"
IS_RIGHT = (r"\)? is (?:therefore |thus )?(?:the )?(?:correct|right|best) (?:answer|option|choice)"
            r"(?=\s*(?:[.!\n]|$)|,? (?:because|since|as)\b)")
# What may stand before a choice, what ends it, and what comes before a second one.
BEFORE = r"\W*?(?:(?:option|choice|letter|therefore|most|likely|probably|answer)\W+)*?"
END = r"(?:$|\s*[.,:;()\]}<!\u2013\u2014](?!\d)|\s-\s|\s(?:because|since|as|due|rather)\b)"
AND = r"[)\].]*(?:\s*(?:[,;/&+]|\b(?:and|or)\b))+"


def find_answer(text, choices, letters):
    """The index of the choice that a text answers with, None if there is no answer, by the rules above.

    text: without thoughts. letters: whether letters stand for the choices.
    """
    text = BOXED.sub(r"\nAnswer: \1\2\n", STYLED.sub(r"\1", text))
    text = plain(text)
    names = names_of(choices, letters)
    for pattern in (MARK, STATEMENT):
        *_, last = [None, *pattern.finditer(text)]
        if last:
            line, *_ = text[last.end():].strip().split("\n")
            return named(line, names)
    *_, last = [None, *re.finditer(f"{SO}({any_of(names)}){IS_RIGHT}", text)]
    if last:
        return names[last[1]]
    picks = [named(line, names) for line in text.strip().split("\n")]
    if len(set(picks) - {None}) > 1:
        return None
    return picks[-1] if picks[0] is None else picks[0]


def plain(text):
    """Lower case, full-width characters as others, without marks."""
    text = MARKS.sub("", unicodedata.normalize("NFKC", text))
    text = ABBREVIATION.sub(r"\1" + DOT, text).casefold()
    return re.sub(r"[^\S\n]+", " ", text)


def names_of(choices, letters):
    """{what may be written: index of the choice, None where two are written so}."""
    texts = [" ".join(plain(choice).split()).rstrip(". ") for choice in choices]
    names = {}
    for index, text in enumerate(texts):
        if text:
            names[text] = None if text in names else index
    if letters:
        for index, (letter, text) in enumerate(zip(string.ascii_lowercase, texts)):
            names[letter] = names[f"{letter} {text}"] = names[f"{letter}{DOT}{text}"] = index
    return names


def any_of(names):
    """A regular expression; the longest comes first."""
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))


def named(line, names):
    """The index of the choice that a line names, None if it names none, or two."""
    alone = re.fullmatch(r"\W*([a-z])\W*", line)
    if alone:
        return names.get(alone[1])
    name = any_of(names)
    first = re.match(f"{BEFORE}({name}){END}", line)
    if first is None:
        return None
    rest = line[first.end(1):]
    # After "and" or a comma any name, letters too: "A, B". (In "B. A is wrong" there is one.)
    second = re.match(rf"{AND}{BEFORE}({name})(?:{END}|\s*{AND})", rest)
    if second is None:
        # After other punctuation words alone: "A (carbamazepine)".
        second = re.match(rf"\W+(?!\w\b)({name})(?:{END}|\s*{AND})", rest)
    if second and names[second[1]] not in (None, names[first[1]]):
        return None
    return names[first[1]]


# ---------------------------------------------------------------------------------------------------------------------
# The task

class Questions(NamedTuple):
    file: str
    items: list                      # of `load_choice`
    layout: str
    prompts: writing.Prompts


def add_flags(parser):
    add_layout_flag(parser)
    parser.add_argument("--instruction", default=INSTRUCTION, help="of answer: what stands below a question in the "
                        "place of the layout's 'Answer:', with {choices} for the letters or words to choose from; '' "
                        f"leaves the layout as it is (default: {INSTRUCTION})")
    parser.add_argument("--samples", type=int, default=1, help="of answer: how often each question is asked, with "
                        "--temperature above 0 (default: 1)")


def check_flags(args):
    check_layouts(args)
    if args.samples < 1:
        raise UserError(f"--samples is {args.samples}; expected at least 1")
    if args.samples > 1 and args.temperature == 0:
        raise UserError(f"--samples is {args.samples} and --temperature 0, where all samples are the same; expected "
                        "--temperature above 0, or one sample")


def read(file, number, evaluation):
    layout = layout_of("answer", number, evaluation.args)
    items = load_choice(file, layout)[:evaluation.args.limit]
    questions = [(f"the question of {item['where']}", turns_of(item, LAYOUTS[layout], evaluation.args.instruction))
                 for item in items]
    return Questions(file, items, layout, writing.encode_questions(questions, NEW_TOKENS, evaluation))


def turns_of(item, layout, instruction):
    prompt = layout.prompt(item)
    if instruction:
        choices = ", ".join(scored_texts(item, layout))
        # No str.format: an instruction may speak of \boxed{}.
        prompt = prompt.removesuffix("Answer:") + instruction.replace("{choices}", choices)
    system = layout.system(item) if layout.system else ""
    return writing.question_turns(prompt, system)


def ask(questions, model, opened, evaluation):
    samples = evaluation.args.samples
    label = f"{opened.path}: answer of {questions.file}"
    written = writing.write_answers(questions.prompts, model, opened, evaluation, label, samples)
    writing.warn_of_empty([answer.text for answer in written], questions.file, opened, evaluation)
    letters = LAYOUTS[questions.layout].letters
    items = []
    for number, item in enumerate(questions.items):
        first = number * samples
        items.append(record(item, written[first:first + samples], letters))
    return Answers(items)


def record(item, written, letters):
    """What results.json has of an item, of which these samples were written."""
    picked = [find_answer(answer.answer(), item["choices"], letters) for answer in written]
    result = {
        "line": item["line"],
        "group": item["group"],
        "texts": [answer.text for answer in written],
        "picked": picked,
        "right": share(pick == item["answer"] for pick in picked),
        "no_answer": share(pick is None for pick in picked),
        "out_of_budget": share(not answer.ended for answer in written),
        "tokens": share(answer.tokens for answer in written),
    }
    if len(written) > 1:
        result["vote"] = int(most_frequent(picked) == item["answer"])
    if "planted" in item:
        result["followed"] = share(pick == item["planted"] for pick in picked)
    return result


def share(values):
    return float(np.mean(list(values)))


def most_frequent(picked):
    """Of equally frequent ones the first; None, where there is no answer, has no vote."""
    votes = Counter(pick for pick in picked if pick is not None)
    return max(votes, key=votes.get, default=None)


def finish(questions, answers, evaluation):
    args = evaluation.args
    return {"layout": questions.layout, "chat": evaluation.chat_formats(), "instruction": args.instruction,
            "samples": args.samples, "temperature": args.temperature, "new_tokens": questions.prompts.new_tokens,
            "majority": majority(questions.items)}


def rows(questions, answers, details, evaluation):
    how = "greedy"
    if details["temperature"] > 0:
        how = f"{details['samples']} of each drawn at temperature {details['temperature']:g}"
    title = (f"answer: {questions.file}, {details['layout']} layout, {details['chat']} chat format, instruction "
             f"{details['instruction']!r}, {how}, at most {details['new_tokens']} tokens (always the most frequent "
             f"answer: {details['majority']:.1%})")
    return title, summarise(measures(details["samples"]), items_of(answers, evaluation.columns))
