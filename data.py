"""Rows to samples to packed batches, and the order of samples.

    python data.py FILE [FILE ...] --tokenizer DIR -n 2     # samples with the response marked, and length percentiles
    python data.py FILE --tokenizer DIR --json              # {"line", "ids", "response"} of each sample

A file is JSONL (.gz too), a JSON array or parquet. A row is one of these; further keys are allowed, `group` names the
group that evaluations report by:

    {"prompt": str, "response": str}
    {"messages": [{"role": "system" | "user" | "assistant", "content": str}, ...]}     every assistant turn is response
    {"conversations": [{"from": "system" | "human" | "gpt", "value": str}, ...]}       ShareGPT, likewise
    {"instruction": str, "input"?: str, "output": str}                                 Alpaca
    {"text": str}                                                                      all is response

or anything else with --prompt-template and --response-template, in whose braces the row's keys stand. A "system" text
may stand beside all but the last of them, a "history" beside the first and Alpaca's.

A row becomes a conversation, a list of `hf.Turn`; the chat format and the tokenizer (`hf/`) make it a `Sample`; the
samples of a global batch are dealt to ranks, and packed into a `Batch` for each forward pass.
"""

import codecs
import copy
import functools
import gzip
import heapq
import itertools
import json
import math
import re
import sys
import zlib
from array import array
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import hf
from runtime.process import Parser, UserError, run
from runtime.progress import with_progress


# ---------------------------------------------------------------------------------------------------------------------
# Rows to samples

class Sample(NamedTuple):
    ids: np.ndarray                  # (L,) int64, all tokens
    response: np.ndarray             # (L,) bool: targets that count; the first token has no context and never does
    group: str | None
    line: int                        # in its file; of an array or parquet, the row, from 1
    where: str = ""                  # "FILE:LINE" or "FILE: row NUMBER", for errors
    ref_logp: np.ndarray | None = None   # (n_b,) float32, see `Samples.with_reference`


class Samples:
    """A list of Sample that keeps no object for each: flat arrays, of 5 bytes a token and 24 a sample.

    It has `append` and `len`, and gives a new Sample for each number asked for, a list of them for a slice. Of files
    that `save` wrote, `Samples.load` makes one that is read from there, and cannot grow.
    """

    COLUMNS = ("ids", "response", "offsets", "counts", "lines", "labels")

    def __init__(self):
        self.ids = array("i")            # (T,) int32: the samples' tokens, one sample after the other
        self.response = array("b")       # (T,) int8: 0 or 1
        self.offsets = array("q", [0])   # (S+1,) int64: where each sample begins and ends in the T
        self.counts = array("i")         # (S,) int32: n_b
        self.lines = array("q")          # (S,) int64
        self.labels = array("i")         # (S,) int32: places in the table
        self.table = []                  # each [what `where` has before the line, group] that there is
        self.numbers = {}                # {the same as a tuple: its place in the table}
        self.ref_logp, self.ref_offsets = None, None

    def append(self, ids, response, group, line, where=""):
        """The fields of a Sample; ids and response are lists."""
        self.ids.extend(ids)
        self.response.extend(response)
        self.offsets.append(len(self.ids))
        self.counts.append(sum(response))
        self.lines.append(line)
        label = (where.removesuffix(str(line)), group)
        if label not in self.numbers:
            self.numbers[label] = len(self.table)
            self.table.append(label)
        self.labels.append(self.numbers[label])

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, which):
        if isinstance(which, slice):
            return [self[i] for i in range(len(self))[which]]
        i = range(len(self))[which]                                       # IndexError ends a loop over the samples
        tokens = slice(self.offsets[i], self.offsets[i + 1])
        line = int(self.lines[i])
        place, group = self.table[self.labels[i]]
        reference = None
        if self.ref_logp is not None:
            reference = self.ref_logp[self.ref_offsets[i]:self.ref_offsets[i + 1]]
        return Sample(np.array(self.ids[tokens], dtype=np.int64), np.array(self.response[tokens], dtype=bool), group,
                      line, f"{place}{line}", reference)

    def with_reference(self, logp):
        """The same samples, and of each the log-probs of its response tokens under the weights that a training starts
        from: logp (N,) float32, sample after sample."""
        samples = copy.copy(self)
        samples.ref_logp, samples.ref_offsets = logp, np.cumsum([0, *self.response_lengths])
        return samples

    @property
    def lengths(self):
        """(S,) int64, in tokens."""
        return np.diff(self.offsets)

    @property
    def response_lengths(self):
        """(S,) int32, likewise."""
        return np.asarray(self.counts)

    def save(self, directory):
        for name in self.COLUMNS:
            np.save(directory / f"{name}.npy", getattr(self, name))
        (directory / "table.json").write_text(json.dumps(self.table), encoding="utf-8")

    @classmethod
    def load(cls, directory):
        """The samples that `save` wrote. Their arrays stay in the files, and there alone, even if these are deleted."""
        samples = cls()
        for name in cls.COLUMNS:
            setattr(samples, name, np.asarray(np.load(directory / f"{name}.npy", mmap_mode="r")))
        samples.table = json.loads((directory / "table.json").read_text(encoding="utf-8"))
        return samples


def load_samples(path, tokenizer, chat_format="auto", max_length=None, rows=None, templates=None):
    """All samples of a file, or of a list of files one after the other: (Samples, counts).

    A sample of more than max_length tokens is cut at its end; one without a response token left is dropped. counts has
    the numbers of "samples", "cut" and "dropped", the keys that were "unread" as text, and a list of sentences under
    "warnings".
    rows: [(line number, object), ...] to use in place of the file's content, path then only names them in errors.
    templates: what `parse_templates` makes of --prompt-template and --response-template.
    Raises UserError naming file and row.
    """
    if isinstance(chat_format, str):
        chat_format = hf.load_chat_format(None, tokenizer, chat_format)
    paths = [path] if isinstance(path, (str, Path)) else path
    if rows is None:
        rows = itertools.chain.from_iterable(map(read_rows, paths))
    else:
        rows = [Row(line, f"{path}:{line}", content) for line, content in rows]
    samples, cut, dropped = Samples(), 0, 0
    mixed = []                       # where a question would be trained together with its answer
    lookalikes = []                  # where a text spells special tokens, and the first that it spells
    unread = Counter()               # keys without a meaning here
    for row in with_progress(rows, f"rows of {', '.join(map(str, paths))}"):
        conversation = as_conversation(row.content, row.where, templates)
        if not templates:
            unread.update(key for key in row.content if key not in READ)
        if holds_question_and_answer(conversation, templates):
            mixed.append(row.where)
        spelled = [token for turn in conversation for token in chat_format.find_lookalikes(turn)]
        if spelled:
            lookalikes.append((row.where, spelled[0]))
        try:
            ids, response = chat_format.encode(conversation)
        except UserError as e:
            raise UserError(f"{row.where}: {e}") from None
        response[0] = False
        if max_length is not None and len(ids) > max_length:
            ids, response = ids[:max_length], response[:max_length]
            cut += 1
        if not any(response):
            dropped += 1
            continue
        group = row.content.get("group")
        if group is not None:
            group = str(group)
        samples.append(ids, response, group, row.number, row.where)
    if not samples:
        raise UserError(f"{', '.join(map(str, paths))}: no sample has a response token left within {max_length} tokens")
    counts = {"samples": len(samples), "cut": cut, "dropped": dropped, "unread": spelled_counts(unread),
              "warnings": warnings_of(mixed, lookalikes)}
    return samples, counts


def spelled_counts(keys):
    """A Counter of keys as text, the first ten."""
    return ", ".join(f"{key!r} ({number})" for key, number in list(keys.items())[:10]) or "none"


def warnings_of(mixed, lookalikes):
    """Sentences about rows that may not be what was meant, at these places."""
    warnings = []
    if mixed:
        warnings.append(f"texts that look like a question with its answer: {len(mixed)}, the first at {mixed[0]}; both "
                        'are trained (where the question is only context, expected {"prompt", "response"})')
    if lookalikes:
        where, token = lookalikes[0]
        warnings.append(f"rows that spell special tokens, which stay text: {len(lookalikes)}, the first at {where}: "
                        f"{token} (the chat format writes turns and their ends itself; expected rows without them)")
    return warnings


# ---------------------------------------------------------------------------------------------------------------------
# Files to rows

LINE_BYTES = 2 ** 24                                                      # of a line, at most: some four million tokens
BLANK_LINES = 100_000                                                     # one after another, at most
ARRAY_BYTES = 2 ** 31                                                     # of a JSON array, which is read in one piece
EXPECTED_FILE = "JSONL, a JSON array or parquet"

# How files begin that hold no JSON as we read it: what they are, and what to do.
OTHER_FILES = {
    b"\xff\xfe": "UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    b"{\0": "UTF-16; convert it: iconv -f UTF-16LE -t UTF-8",
    b"[\0": "UTF-16; convert it: iconv -f UTF-16LE -t UTF-8",
    b"\0{": "UTF-16; convert it: iconv -f UTF-16BE -t UTF-8",
    b"\0[": "UTF-16; convert it: iconv -f UTF-16BE -t UTF-8",
    b"PAR1": "parquet; give it a name that ends in .parquet",
    b"ARROW1": "an Arrow file; save it as parquet",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x1f\x8b": "gzip; give it a name that ends in .gz",
    b"\x28\xb5\x2f\xfd": "zstd; unpack it",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; git lfs pull brings that",
    b"<!doctype html": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
}


class Row(NamedTuple):
    number: int                      # of its line in JSONL; of the row, from 1, in an array or parquet
    where: str                       # "FILE:LINE" or "FILE: row NUMBER", for errors
    content: dict


def read_rows(path):
    """Yields each Row of a file: JSONL, a JSON array (either of them .gz too), or parquet. Raises UserError."""
    path = Path(path)
    check_is_file(path)
    head = read_head(path)
    if path.suffix == ".parquet":
        objects = read_parquet(path)
    elif head.startswith(b"["):
        objects = read_array(path)
    else:
        refuse_other_files(path, head)
        for line, content in read_jsonl(path):
            yield Row(line, f"{path}:{line}", content)
        return
    number = 0
    for number, content in enumerate(objects, 1):
        yield Row(number, f"{path}: row {number}", content)
    if number == 0:
        raise UserError(f"{path}: the file has no rows; expected one or more")


def check_is_file(path):
    if not path.is_file():
        raise UserError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")


def open_bytes(path):
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def read_head(path):
    """The first bytes of a file, without a byte order mark of UTF-8 and white space."""
    try:
        with open_bytes(path) as f:
            return f.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    except (OSError, EOFError, zlib.error):
        # Whoever reads on will say what is wrong.
        return b""


def refuse_other_files(path, head):
    """Raises UserError, with what to do, for a file that does not begin as JSONL does."""
    for beginning, words in OTHER_FILES.items():
        if head[:len(beginning)].lower() == beginning.lower():
            raise UserError(f"{path}: this is {words} (expected {EXPECTED_FILE})")
    first_line = head.split(b"\n")[0]
    separates = re.search(rb"""\w["']?[,;\t] ?["'\w]""", first_line)
    if path.suffix in (".csv", ".tsv") or (separates and not head.startswith(b"{")):
        raise UserError(f"{path}: this is CSV, by its first line; docs/data.md has a command that converts it "
                        f"(expected {EXPECTED_FILE})")


def read_jsonl(path):
    """Yields (line number, object) of a JSONL or .jsonl.gz file; blank lines hold nothing, nor does a byte order mark.
    Raises UserError."""
    path = Path(path)
    check_is_file(path)
    number, blank, empty = 0, 0, True
    try:
        with open_bytes(path) as f:
            while line := f.readline(LINE_BYTES + 1):
                number += 1
                if len(line) > LINE_BYTES:
                    raise UserError(f"{path}:{number}: a line of more than {LINE_BYTES >> 20} MiB; expected one JSON "
                                    "object a line")
                line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    blank, empty = 0, False
                    yield number, parse_line(line, f"{path}:{number}")
                    continue
                blank += 1
                if blank > BLANK_LINES:
                    raise UserError(f"{path}:{number}: more than {BLANK_LINES} blank lines in a row; expected one JSON "
                                    "object a line")
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read after line {number}: {e}") from None
    if empty:
        raise UserError(f"{path}: the file is empty; expected one JSON object a line")


def parse_line(line, where):
    """The object of a line, bytes. Raises UserError."""
    row = parse_json(line, where, "one JSON object a line")
    check_object(row, where)
    return row


def read_array(path):
    """Yields the objects of a JSON array. Raises UserError."""
    try:
        with open_bytes(path) as f:
            content = f.read(ARRAY_BYTES + 1)
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read: {e}") from None
    if len(content) > ARRAY_BYTES:
        raise UserError(f"{path}: an array of more than {ARRAY_BYTES >> 20} MiB, which would be read in one piece; "
                        "expected JSONL or parquet")
    rows = parse_json(content.removeprefix(codecs.BOM_UTF8), path, "an array of JSON objects")
    for number, row in enumerate(rows, 1):
        check_object(row, f"{path}: row {number}")
        yield row


def parse_json(content, where, expected):
    """What bytes say in JSON. Raises UserError."""
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: not UTF-8 at byte {e.start}; expected {expected}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not JSON: {e}; expected {expected}") from None


def check_object(row, where):
    """Raises UserError for what is no object, or not of whole characters: JSON can spell half of one ("\\ud83d")."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}; expected an object")
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as e:
        raise UserError(f"{where}: {ascii(e.object[e.start])} is half a character (a lone surrogate); expected Unicode "
                        "text") from None


def read_parquet(path):
    """Yields the rows of a parquet file as dicts, a batch in memory at a time. Raises UserError."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f'{path}: parquet is read with pyarrow: pip install -e ".[parquet]"') from None
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield row
    except (ArrowException, OSError, ValueError) as e:
        words = "not parquet" if number == 0 else f"cannot be read after row {number}"
        raise UserError(f"{path}: {words}: {e}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Rows to conversations

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
    """A row's turns, a list of hf.Turn; role None is {"text"}: bare text, all of it response. Raises UserError."""
    if templates:
        filled = {name: fill_template(template, row, where) for name, template in templates.items()}
        response = text_of(filled, "response", where)
        refuse_turn_marks(response, "the response", where)
        return [hf.Turn("user", filled["prompt"]), hf.Turn("assistant", response)]
    refuse_unread(row, where)
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
        whole[("text",)] = [hf.Turn(None, text)]
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
        turns.append(hf.Turn(role, text_of(message, text_key, where, may_be_blank), thoughts, is_trained))
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
        turns.append(hf.Turn("user", text_of(pair, "question", inside, may_be_blank=True)))
        turns.append(hf.Turn("assistant", text_of(pair, "answer", inside)))
    question = text_of(row, question_key, where, may_be_blank=True)
    if question_key == "instruction" and row.get("input") is not None:
        extra = text_of(row, "input", where, may_be_blank=True)
        # Self-Instruct's word for none.
        if extra.strip() and extra.strip() != "<noinput>":
            question = f"{question}\n{extra}" if question else extra
    turns.append(hf.Turn("user", question))
    turns.append(hf.Turn("assistant", text_of(row, answer_key, where), thoughts_of(row, where)))
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
            turns = [hf.Turn("system", text), *turns]
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
UNREAD = ("tools", "tool_calls", "tool_call_id", "available_tools", "functions", "function_call", "function_calls",
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


def refuse_unread(row, where):
    """Raises UserError for what would be lost without a word, in a row or its messages."""
    holders = [row]
    for key in LISTS:
        if isinstance(row.get(key), list):
            holders += [message for message in row[key] if isinstance(message, dict)]
    unread = []
    for holder in holders:
        unread += [key for key, value in holder.items()
                   if key.lower() in UNREAD and not is_empty(value) and key not in unread]
    if unread:
        raise UserError(f"{where}: {spelled_keys(unread)} would be lost, since no chat format here writes it; expected "
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


# ---------------------------------------------------------------------------------------------------------------------
# The order of samples

def global_batch(step, n, batch_size, seed):
    """(epoch, sample numbers) of optimizer step `step` (from 0). A function of its arguments alone: neither the world
    size nor packing changes what a step learns from. The last batch of an epoch may be smaller."""
    epoch, i = divmod(step, -(-n // batch_size))
    return epoch, order_of_epoch(epoch, n, seed)[i * batch_size:(i + 1) * batch_size].tolist()


# Drawn once an epoch: for ten million samples it takes 0.8 s, and 80 MB while it is kept.
@functools.lru_cache(maxsize=1)
def order_of_epoch(epoch, n, seed):
    # RandomState: its stream is frozen by numpy's policy, a Generator's is not.
    return np.random.RandomState([seed, epoch]).permutation(n)


# ---------------------------------------------------------------------------------------------------------------------
# Packing

def deal(lengths, world, micro_tokens):
    """Deals samples of the given token lengths to `world` ranks and packs each rank's into micro-batches.

    Returns plan[rank][micro-batch] = list of indices into lengths. The longest go first, to the rank with the fewest
    tokens, there into the first micro-batch with room for them; a sample longer than micro_tokens is one by itself.
    Every rank gets the same number of micro-batches, some may be empty: DDP needs as many backward passes from each.
    """
    shares = [[] for _ in range(world)]
    loads = [(0, rank) for rank in range(world)]                          # a heap
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + lengths[i], rank))
        shares[rank].append(i)
    plan = [pack(share, lengths, micro_tokens) for share in shares]
    most = max(map(len, plan))
    return [micro_batches + [[] for _ in range(most - len(micro_batches))] for micro_batches in plan]


def pack(share, lengths, micro_tokens):
    """The micro-batches of one rank: each sample of its share, the longest first, goes into the first with room.

    Samples only become shorter: what has room for one has room for the next, until it is filled.
    """
    micro_batches = []
    with_room = []                   # a heap of (place, tokens left): there is room for the next sample
    others = []                      # a heap of (-tokens left, place)
    for i in share:
        while others and -others[0][0] >= lengths[i]:
            room, place = heapq.heappop(others)
            heapq.heappush(with_room, (place, -room))
        if with_room:
            place, room = heapq.heappop(with_room)
        else:
            place, room = len(micro_batches), micro_tokens
            micro_batches.append([])
        micro_batches[place].append(i)
        heapq.heappush(others, (lengths[i] - room, place))
    return micro_batches


class Batch(NamedTuple):
    """Packed samples, as `GPT.forward` takes them, and the ragged layout of their response tokens for `bft`."""
    input_ids: torch.Tensor          # (T,) the samples' tokens, one sample after the other
    lengths: list                    # of the S samples in tokens, and of what fills up the rest, if any; adds up to T
    at: torch.Tensor                 # (N,) positions whose next token is a response token
    targets: torch.Tensor            # (N,) those tokens
    offsets: torch.Tensor            # (S+1,) where each sample begins and ends in the N; stays on the CPU
    ref_logp: torch.Tensor           # (N,) float32 where the samples have it, else (0,)

    def to(self, device):
        """With its tensors on the device, but for `offsets`; to a GPU from pinned memory, without waiting."""
        names = ["input_ids", "at", "targets", "offsets"]
        if len(self.ref_logp) > 0:
            names.append("ref_logp")
        tensors = {name: getattr(self, name) for name in names}
        if device.type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        # These stay, pinned, where their values can be looked at; whoever computes with them moves them.
        offsets = tensors.pop("offsets")
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return self._replace(offsets=offsets, **moved)


def collate(samples, size=1):
    """Packs samples into a Batch of at least `size` tokens: what lacks is filled with samples that have no response.

    So a batch without any sample becomes one token that counts nowhere: its forward pass still reaches every parameter,
    and DDP gets its zero gradients. The filling is cut into pieces no longer than the longest real sample (or 16
    tokens), since a model may have no positions beyond.
    """
    lengths = [len(sample.ids) for sample in samples]
    filling = max(0, size - sum(lengths))
    longest = max([16, *lengths])
    ids = np.concatenate([sample.ids for sample in samples] + [np.zeros(filling, dtype=np.int64)])
    response = np.concatenate([sample.response for sample in samples] + [np.zeros(filling, dtype=bool)])
    offsets = np.cumsum([0] + [sample.response.sum() for sample in samples], dtype=np.int64)
    at = np.flatnonzero(response) - 1                                     # never -1: a first token is no response
    lengths += [longest] * (filling // longest)
    if filling % longest:
        lengths.append(filling % longest)
    reference = [sample.ref_logp for sample in samples if sample.ref_logp is not None]
    reference = np.concatenate([np.zeros(0, dtype=np.float32), *reference])
    return Batch(torch.from_numpy(ids), lengths, torch.from_numpy(at), torch.from_numpy(ids[at + 1]),
                 torch.from_numpy(offsets), torch.from_numpy(reference))


def bucket(tokens, micro_tokens):
    """What a micro-batch is filled up to where its size is compiled in: the next quarter of micro_tokens. So a run has
    four sizes to compile, and a few more if it has samples longer than micro_tokens."""
    quarter = -(-micro_tokens // 4)
    return quarter * max(1, -(-tokens // quarter))


# ---------------------------------------------------------------------------------------------------------------------
# The command

def main():
    parser = Parser(description="Shows samples as the training loop sees them.")
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--tokenizer", required=True, help="directory with tokenizer.json, or a tiktoken name")
    parser.add_argument("--chat-format", choices=("auto", *hf.CHAT_FORMATS), default="auto",
                        help="auto: the chat template beside the tokenizer, or what its special tokens suggest")
    add_template_flags(parser)
    parser.add_argument("--max-length", type=int, help="cut samples after so many tokens")
    parser.add_argument("-n", type=int, help="how many samples to show (default: 2; with --json all)")
    parser.add_argument("--json", action="store_true", help='a line {"line", "ids", "response"} for each sample, and '
                        "nothing else")
    args = parser.parse_args()
    if args.n is None and not args.json:
        args.n = 2
    if (args.n or 0) < 0 or (args.max_length is not None and args.max_length < 1):
        raise UserError(f"-n is {args.n} and --max-length {args.max_length}; expected 0 or more, and 1 or more")
    templates = parse_templates(args.prompt_template, args.response_template)
    tokenizer = hf.load_tokenizer(args.tokenizer)
    chat_format = hf.load_chat_format(None, tokenizer, args.chat_format)
    samples, counts = load_samples(args.files, tokenizer, chat_format, args.max_length, templates=templates)
    warnings = [chat_format.warning] if chat_format.warning else []
    for warning in warnings + counts["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if args.json:
        for sample in itertools.islice(samples, args.n):
            print(json.dumps({"line": sample.line, "ids": sample.ids.tolist(),
                              "response": sample.response.astype(int).tolist()}))
        return
    print(f"chat format {chat_format.name}; keys that are not read: {counts['unread']}")
    for sample in samples[:args.n]:
        print(f"--- {sample.where}: {len(sample.ids)} tokens, {sample.response.sum()} of response (between [[ and ]])")
        print(marked(sample, chat_format))
    print(f"--- {counts['samples']} samples; {counts['cut']} cut at {args.max_length} tokens, {counts['dropped']} "
          "dropped for want of a response token")
    percentiles = (0, 5, 25, 50, 75, 95, 100)
    print(f"{'percentile':17s}" + "".join(f"{q:>8}" for q in percentiles))
    print_percentiles("tokens", samples.lengths, percentiles)
    print_percentiles("response tokens", samples.response_lengths, percentiles)


def marked(sample, chat_format):
    """A sample's text, its response between [[ and ]], and a backslash in what only spells a special token."""
    edges = [0, *(np.flatnonzero(np.diff(sample.response)) + 1), len(sample.ids)]
    parts = []
    for start, stop in itertools.pairwise(edges):
        text = chat_format.show(sample.ids[start:stop])
        parts.append(f"[[{text}]]" if sample.response[start] else text)
    return "".join(parts)


def print_percentiles(name, values, percentiles):
    print(f"{name:17s}" + "".join(f"{value:>8.0f}" for value in np.percentile(values, percentiles)))


if __name__ == "__main__":
    run(main)
