"""Rows, in the shapes in which data sets are published, to conversations. A row is one of these:

    {"prompt": str, "response": str}
    {"messages": [{"role": "system" | "user" | "assistant", "content": str}, ...]}     every assistant turn is response
    {"conversations": [{"from": "system" | "human" | "gpt", "value": str}, ...]}       ShareGPT, likewise
    {"instruction": str, "input"?: str, "output": str}                                 Alpaca
    {"text": str}                                                                      all is response

or anything else with --prompt-template and --response-template, in whose braces the row's keys stand. A "system" text
may stand beside all but the last of them, a "history" beside the first and Alpaca's. Further keys are allowed; `group`
names the group that evaluations report by. But what no chat format can write is an error: nothing is lost silently.
"""

import math
import re
from typing import NamedTuple

from hf.chat import Turn
from runtime.process import UserError


SHAPES = ('{"prompt", "response"}, {"messages": [{"role", "content"}, ...]}, {"conversations": [{"from", "value"}, '
          '...]}, {"instruction", "input", "output"}, {"text"}, or for other keys --prompt-template and '
          "--response-template")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}

# Keys of a row that may hold a conversation, or a part of one.
LISTS = ("messages", "conversations", "conversation")
PAIRS = (("prompt", "response"), ("instruction", "output"))
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
PARTS = (*LISTS, "prompt", "response", "completion", "instruction", "instructions", "input", "inputs", "output",
         "history", "text", "context", "suffix", *THOUGHTS, "thought", "thoughts", "think", "cot")
SYSTEM = ("system", "system_prompt")
# Of a message: whether the model is to learn it.
WEIGHTS = ("weight", "train", "train_on_turn", "training", "loss", "loss_mask", "mask")


def as_conversation(row, where, templates=None):
    """A row's turns, a list of Turn; role None is {"text"}: bare text, all of it response. Raises UserError."""
    if templates:
        filled = {name: fill_template(template, row, where) for name, template in templates.items()}
        response = text_of(filled, "response", where)
        refuse_turn_marks(response, "the response", where)
        return [Turn("user", filled["prompt"]), Turn("assistant", response)]
    refuse_lost_keys(row, where)
    whole = read_shapes(row, where)
    if not whole:
        raise UserError(f"{where}: the keys are {spelled_keys(row)}; expected {SHAPES}")
    first, *others = whole
    turns = whole[first]
    for other in others:
        if whole[other] != turns:
            raise UserError(f"{where}: {first[0]!r} and {other[0]!r} hold different conversations; expected one of "
                            "them, or twice the same")
    used = [key for key in row if any(key in keys for keys in whole)]
    refuse_other_parts(row, used, turns, where)
    return with_system(turns, row, where)


def read_shapes(row, where):
    """{the keys that it stands in: turns} of every conversation that is whole in a row. Raises UserError."""
    whole = {}
    for key in LISTS:
        if not is_empty(row.get(key)):
            whole[(key,)] = as_turns(row, key, where)
    for question, answer in PAIRS:
        if row.get(question) is not None and not is_empty(row.get(answer)):
            keys = (question, answer, "history", *THOUGHTS)
            if question == "instruction":
                keys += ("input",)
            whole[keys] = as_rounds(row, question, answer, where)
    if not is_empty(row.get("text")):
        text = text_of(row, "text", where)
        refuse_turn_marks(text, "'text'", where)
        whole[("text",)] = [Turn(None, text)]
    return whole


def as_turns(row, key, where):
    """The turns of a row's "messages", or of ShareGPT's "conversations". Raises UserError."""
    messages = row[key]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{where}: {key!r} must be a list of objects with 'role' and 'content' (or 'from' and 'value')")
    turns = []
    names = {}                       # who speaks, by role
    for message in messages:
        role_key, text_key = ("from", "value") if "from" in message else ("role", "content")
        role = message.get(role_key)
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(f"{where}: {role_key!r} is {role!r}; expected system, user or assistant (or human or gpt)")
        role = ROLES[role]
        if names.setdefault(role, message.get("name")) != message.get("name"):
            raise UserError(f"{where}: 'name' tells several speakers with the role {role} apart, which no chat format "
                            "writes; expected one of each role, or the names in the texts")
        thoughts = thoughts_of(message, where)
        if thoughts is not None and role != "assistant":
            raise UserError(f"{where}: thoughts in a turn of the {role}; expected them in the assistant's")
        is_trained = weight_of(message, role, where)
        may_be_blank = role != "assistant" or not is_trained
        turns.append(Turn(role, text_of(message, text_key, where, may_be_blank), thoughts, is_trained))
    if not any(turn.role == "assistant" for turn in turns):
        raise UserError(f"{where}: no turn of the assistant in {key!r}; nothing to learn from")
    return turns


def as_rounds(row, question_key, answer_key, where):
    """The turns of a row with a question and an answer, after those of its history. Raises UserError."""
    turns = []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError(f"{where}: 'history' must be a list of [question, answer]")
    for question, answer in history:
        pair = {"question": question, "answer": answer}
        inside = f"{where}: 'history'"
        turns.append(Turn("user", text_of(pair, "question", inside, may_be_blank=True)))
        turns.append(Turn("assistant", text_of(pair, "answer", inside)))
    question = text_of(row, question_key, where, may_be_blank=True)
    if question_key == "instruction" and row.get("input") is not None:
        extra = text_of(row, "input", where, may_be_blank=True)
        # Self-Instruct's word for none.
        if extra.strip() and extra.strip() != "<noinput>":
            question = f"{question}\n{extra}" if question else extra
    turns.append(Turn("user", question))
    turns.append(Turn("assistant", text_of(row, answer_key, where), thoughts_of(row, where)))
    return turns


def with_system(turns, row, where):
    """The turns after that of a "system" text beside them, if there is one. Raises UserError."""
    for key in SYSTEM:
        if is_empty(row.get(key)):
            continue
        text = text_of(row, key, where)
        if turns[0].role is None:
            raise UserError(f"{where}: {key!r} stands beside 'text', which has no turns; expected \"prompt\" and "
                            '"response", or the text alone')
        if turns[0].role != "system":
            turns = [Turn("system", text), *turns]
        elif turns[0].content != text:
            raise UserError(f"{where}: {key!r} is another text than that of the first turn; expected one of them")
    return turns


def thoughts_of(mapping, where):
    """What the assistant thought before it answered, or None. Raises UserError."""
    texts = {key: text_of(mapping, key, where) for key in THOUGHTS if not is_empty(mapping.get(key))}
    if len(set(texts.values())) > 1:
        raise UserError(f"{where}: {spelled_keys(texts)} hold different thoughts; expected one of them")
    return next(iter(texts.values()), None)


def weight_of(message, role, where):
    """Whether a turn is to be learned, by whichever key says so. Raises UserError."""
    weights = {key: message[key] for key in WEIGHTS if message.get(key) is not None}
    for key, weight in weights.items():
        if weight not in (0, 1):
            raise UserError(f"{where}: {key!r} of a turn is {weight!r}; expected 0 or 1 (or false or true)")
        if weight and role != "assistant":
            raise UserError(f"{where}: {key!r} of a turn of the {role} is {weight!r}; only the assistant's are trained")
    if len(set(weights.values())) > 1:
        raise UserError(f"{where}: {spelled_keys(weights)} of a turn contradict each other; expected one of them")
    return all(weights.values())


def text_of(mapping, key, where, may_be_blank=False):
    """The text under a key, or the texts of a list of parts. Raises UserError."""
    value = mapping.get(key)
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        for part in value:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise UserError(f"{where}: {key!r} has a part of type {part.get('type')!r}; expected parts of type "
                                "'text' alone")
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        kind = "missing" if value is None else type(value).__name__
        raise UserError(f"{where}: {key!r} is {kind}; expected a string")
    if not may_be_blank and not value.strip():
        raise UserError(f"{where}: {key!r} is {'blank' if value else 'empty'}; expected some text")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# What a row may not hold

# What no chat format here writes: rows with it would be read as something smaller.
REFUSED = ("tools", "tool_calls", "tool_call_id", "available_tools", "functions", "function_call", "function_calls",
          "image", "images", "image_url", "image_path", "image_bytes", "audio", "audios", "video", "videos", "refusal",
          "chosen", "rejected", "rejected_response", "rejected_messages", "kto_tag", "system_message", "systemprompt",
          "reasoning_details", "weights", "masks", "labels", "loss_weight", "loss_scale", "train_detail")
READ = {*PARTS, *SYSTEM, *WEIGHTS, "group"}
# What begins or ends a turn in chat formats.
TURN_MARKS = re.compile(r"<\|(?:im_start|im_end|start_header_id|eot_id|user|assistant|end|turn)\|>|"
                        r"<(?:start|end)_of_turn>|\[/?INST\]|<｜(?:User|Assistant)｜>")
# What begins a turn in texts of one piece: "<human>:", "### Instruction:", "Q:".
QUESTION = re.compile(r"(?<!\w)(?:human|user|instruction|question|patient|q|问)[>\]* ]{0,3}[:：]", re.I)
ANSWER = re.compile(r"(?<!\w)(?:bot|gpt|assistant|ai|response|answer|output|doctor|a|答)[>\]* ]{0,3}[:：]", re.I)


def refuse_lost_keys(row, where):
    """Raises UserError for keys of a row or its messages that would silently be lost."""
    holders = [row]
    for key in LISTS:
        if isinstance(row.get(key), list):
            holders += [message for message in row[key] if isinstance(message, dict)]
    lost = []
    for holder in holders:
        lost += [key for key, value in holder.items()
                 if key.lower() in REFUSED and not is_empty(value) and key not in lost]
    if lost:
        raise UserError(f"{where}: {spelled_keys(lost)} would be lost, since no chat format here writes it; expected "
                        "rows without, or the texts as the model is to write them")
    if row.get("label") is False:
        raise UserError(f"{where}: 'label' is false, which marks an answer that is not to be learned; expected no such "
                        "row")
    for key in WEIGHTS:
        if row.get(key) is not None and row[key] != 1:
            raise UserError(f"{where}: {key!r} is {str(row[key])[:50]!r}; rows have no weights here, turns of "
                            "'messages' may have 0 or 1: expected a row without it, or no such row")


def refuse_other_parts(row, used, turns, where):
    """Raises UserError for a part of a conversation that is not in these turns, which were read from the keys used."""
    texts = [text for turn in turns for text in (turn.content, turn.thoughts)]
    for key, value in row.items():
        is_part = key.lower() in PARTS or (key.lower() in SYSTEM and key not in SYSTEM)
        if is_part and key not in used and not is_empty(value) and value not in texts:
            raise UserError(f"{where}: {key!r} holds another text than {spelled_keys(used)}; expected one "
                            "conversation, or --prompt-template and --response-template that say what is meant")


def refuse_turn_marks(text, name, where):
    """Raises UserError for a text that a chat format has been applied to: its marks would be learned as letters."""
    mark = TURN_MARKS.search(text)
    if mark:
        raise UserError(f"{where}: {name} holds {mark[0]}, the mark of a turn, which would be learned as letters; "
                        'expected the conversation itself ({"messages"}, {"prompt", "response"}), or templates')


def holds_question_and_answer(conversation, templates):
    """Whether a bare text, or what a template made, looks like a question with its answer, both to be trained."""
    last = conversation[-1]
    if last.role is not None and not templates:
        return False
    question = QUESTION.search(last.content)
    return question is not None and ANSWER.search(last.content, question.end()) is not None


def is_empty(value):
    return value is None or value in ("", [], {})


def spelled_keys(mapping):
    """Keys in quotes; of a row, those that hold nothing are marked."""
    names = []
    for key in mapping:
        holds_nothing = isinstance(mapping, dict) and is_empty(mapping[key])
        names.append(f"{key!r} (empty)" if holds_nothing else repr(key))
    return ", ".join(names) or "none"


# ---------------------------------------------------------------------------------------------------------------------
# Templates for rows of other keys

TEMPLATE_WORDS = re.compile(r"\{\{|\}\}|\\n|\{[^{}]+\}|.", re.S)
ESCAPES = {"{{": "{", "}}": "}", "\\n": "\n"}


class Piece(NamedTuple):
    """A piece of a template."""
    text: str                        # as it stands, or the name of a key
    is_key: bool


TEMPLATE_HELP = "with the row's keys in braces, such as {question}; \\n is a line break"


def add_template_flags(parser):
    parser.add_argument("--prompt-template", help=f"the question of rows of other keys, {TEMPLATE_HELP}")
    parser.add_argument("--response-template", help="what the model is to answer to it, likewise")


def parse_templates(prompt_template, response_template):
    """{"prompt": [Piece, ...], "response": [Piece, ...]}; None without templates. Raises UserError."""
    if not prompt_template and not response_template:
        return None
    if not prompt_template or not response_template:
        raise UserError("--prompt-template and --response-template go together; expected both, or neither")
    templates = {"prompt": parse_template("--prompt-template", prompt_template),
                 "response": parse_template("--response-template", response_template)}
    if not any(piece.is_key for piece in templates["response"]):
        raise UserError(f"--response-template {response_template!r} names no key; expected keys of the rows in braces, "
                        "such as {answer}")
    return templates


def parse_template(flag, template):
    pieces = []
    for word in TEMPLATE_WORDS.findall(template):
        if word in ("{", "}"):
            raise UserError(f"{flag} {template!r} has a brace alone; expected keys of the rows in braces, such as "
                            "{question}, and {{ and }} for braces themselves")
        is_key = len(word) > 2 and word[0] == "{"
        pieces.append(Piece(word[1:-1] if is_key else ESCAPES.get(word, word), is_key))
    return pieces


def fill_template(template, row, where):
    """The text of a template with the row's values in it. Raises UserError."""
    parts = []
    for piece in template:
        parts.append(template_value(row, piece.text, where) if piece.is_key else piece.text)
    return "".join(parts)


def template_value(row, name, where):
    """The text under a key, or under a path of keys with points between ("context.contexts"). Raises UserError."""
    value = row
    for key in [name] if name in row else name.split("."):
        if not isinstance(value, dict) or key not in value:
            raise UserError(f"{where}: no key {name!r}, which a template names; the keys are {spelled_keys(row)}")
        value = value[key]
    if isinstance(value, list) and value and all(isinstance(element, str) for element in value):
        return "\n".join(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not isinstance(value, str) and not is_number:
        kind = "null" if value is None else type(value).__name__
        raise UserError(f"{where}: {name!r}, which a template names, is {kind}; expected a text, a number or a list of "
                        "texts")
    return str(value)
