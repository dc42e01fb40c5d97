"""Text to tokens: the tokenizer, the chat formats, JSONL files, the order of samples, and packing.

    python data.py FILE --tokenizer DIR -n 2        # decoded samples with the response marked, and length percentiles

A file is JSONL (or .jsonl.gz), one sample a line, in one of these shapes; further keys are allowed, `group` names the
group that evaluations report by:

    {"prompt": str, "response": str}
    {"messages": [{"role": "system" | "user" | "assistant", "content": str}, ...]}     every assistant turn is response
    {"instruction": str, "input": str (optional), "output": str}                       Alpaca
    {"text": str}                                                                      all is response
"""

import argparse
import codecs
import gzip
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import unicodedata
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex  # tiktoken brings it
import tiktoken
import torch


class UserError(Exception):
    """A mistake in what the user gave us. Its message is one sentence: what is wrong, where, what was expected."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def run(main):
    """Calls main(), then exits: with 2 after a user's mistake, with 1 where a file cannot be read or written, each said
    in one line on stderr, without a traceback; with 130 after SIGINT and 143 after SIGTERM, as a shell has it.

    Under torchrun the first rank to exit is named as the cause and has the others killed. Who only lost a peer is not
    the cause, and a user's mistake, which every rank makes, is for rank 0 to say: these give the others some time.
    """
    code, error, patient = 0, None, False
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))               # an exception: no file is left half-written
    if hasattr(sys.stdout, "reconfigure"):                                # a terminal may lack characters of the data
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except SystemExit as e:
        code = e.code
    except KeyboardInterrupt:
        code = 130
    except UserError as e:
        code, error, patient = 2, str(e), rank > 0
    except torch.OutOfMemoryError as e:
        code, error = 1, f"out of GPU memory ({e}); a smaller --micro-tokens, --recompute or --lora-rank needs less"
    except OSError as e:
        code, error = 1, f"{e.filename}: {e.strerror}" if e.filename else str(e)
    except Exception as e:
        if world == 1:
            raise
        code, patient = 1, re.search("gloo|NCCL", str(e)) is not None     # what both say when a connection breaks
        error = f"rank {rank} cannot reach another rank: {e}" if patient else None
        if not patient:
            traceback.print_exc()
    if patient:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    if error:
        print("error: " + " ".join(error.split())[:1000], file=sys.stderr, flush=True)
    if world > 1:
        # Everything is written. With gloo the interpreter's own teardown now and then aborts ("terminate called without
        # an active exception": seen in 1 of some 20 runs on three ranks), and torchrun would call the run a failure.
        sys.stdout.flush()
        os._exit(code or 0)
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer

# How text is cut into pieces before merges, by the steps of a tokenizer.json's pre_tokenizer.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Each digit by itself first, and no piece across one: spaces before a digit are as spaces before the end.
DIGITS_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
STYLES = [(GPT2_PATTERN, [BYTES]), (DIGITS_PATTERN, [{"type": "Digits", "individual_digits": True}, BYTES]),
          *((pattern, [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                       {**BYTES, "use_regex": False}]) for pattern in (LLAMA3_PATTERN, QWEN_PATTERN))]


class Tokenizer:
    """encode(text) -> ids, decode(ids) -> text, n_vocab, special {text: id}, eos_id (None if there is none).

    path: its tokenizer.json, None for one of tiktoken's own.
    encoding: a tiktoken.Encoding, whose ranks are the order of merges. ids: {rank: id} (None: the same numbers).
    added: those of `special` that the text may contain as tokens ("<think>"). nfc: normalise the text first. missing:
    the bytes that are no token; they leave the text, as in Hugging Face's `tokenizers`.
    """
    def __init__(self, encoding, eos_id, special, ids=None, added=(), nfc=False, missing=b"", path=None):
        self.encoding, self.eos_id, self.special, self.ids = encoding, eos_id, special, ids
        self.nfc, self.missing, self.path = nfc, missing, path
        self.added = added and re.compile("(" + "|".join(sorted(map(re.escape, added), key=len, reverse=True)) + ")")
        self.bytes = {ids[rank] if ids else rank: token for token, rank in encoding._mergeable_ranks.items()}
        self.bytes |= {i: text.encode() for text, i in special.items()}
        self.n_vocab = max(self.bytes) + 1

    def encode(self, text):
        """Special tokens in the text stay text. Raises UserError for marks that no text has, with NFC."""
        ids = []
        for i, part in enumerate(self.added.split(text) if self.added else [text]):
            if i % 2:                                                     # re.split: what separates is at odd places
                ids.append(self.special[part])
                continue
            if self.nfc:
                if any(len(m.group()) > 1000 for m in regex.finditer(r"\p{M}+", part)):   # which take time squared
                    raise UserError("more than 1,000 combining marks in a row; expected text")
                part = unicodedata.normalize("NFC", part)
            raw = part.encode(errors="replace")
            # Bytes that are no token go after the cut, before merges; and tiktoken's own cut dies of a million spaces.
            if self.missing and len(raw.translate(None, self.missing)) < len(raw) or len(part) > 500_000:
                pieces = (p.group().encode(errors="replace").translate(None, self.missing)
                          for p in regex.finditer(self.encoding._pat_str, part))
                ranks = [rank for p in pieces if p for rank in self.encoding._encode_single_piece(p)]
            else:
                ranks = self.encoding.encode_ordinary(part)
            ids += [self.ids[rank] for rank in ranks] if self.ids else ranks
        return ids

    def decode(self, ids):
        """Ids that are no token, and bytes that are no text, become U+FFFD."""
        return b"".join(self.bytes.get(int(i), b"\xef\xbf\xbd") for i in ids).decode(errors="replace")


def load_tokenizer(name_or_path):
    """A Tokenizer from a directory with tokenizer.json, from such a file, or a tiktoken encoding by name ("gpt2").

    The ids are those of Hugging Face's `tokenizers` with add_special_tokens=False and special tokens as text:
    byte-level BPE as GPT-2, SmolLM2, Llama 3 and Qwen have it. Raises UserError for others, by name.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        try:
            encoding = tiktoken.get_encoding(str(name_or_path))
        except Exception:                                                 # an unknown name, or no network for its file
            raise UserError(f"tokenizer {name_or_path}: no tokenizer.json there, and no encoding of that name that "
                            f"tiktoken can load (it knows {', '.join(tiktoken.list_encoding_names())})") from None
        return Tokenizer(encoding, encoding.eot_token, dict(encoding._special_tokens))
    try:
        spec = json.loads(path.read_bytes())
        model, vocab, added = spec["model"], spec["model"]["vocab"], spec.get("added_tokens", [])

        def steps(key, inner):                                            # a sequence of them, one, or none
            part = spec.get(key) or {"type": "Sequence", inner: []}
            return part[inner] if part["type"] == "Sequence" else [part]

        cut = [{**({"use_regex": True} if step["type"] == "ByteLevel" else {}), **step}
               for step in steps("pre_tokenizer", "pretokenizers")]
        cut = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in cut]
        pattern = next((pattern for pattern, known in STYLES if known == cut), None)
        normalizers = [step["type"] for step in steps("normalizer", "normalizers")]
        to_byte = {c: b for b, c in bytes_to_unicode().items()}
        missing = bytes(b for c, b in to_byte.items() if c not in vocab)
        odd = [f"pre-tokenizer {cut}"] * (pattern is None) + [f"normalizer {n}" for n in normalizers if n != "NFC"]
        odd += [f"{key} {model[key]}" for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
                + ("unk_token", "byte_fallback") * bool(missing) if model.get(key)]
        odd += [f"added token {t['content']} with {key}" for t in added for key in ("lstrip", "rstrip", "single_word")
                if t.get(key) and not t["special"]]
        kind = model.get("type", "BPE")                                   # which old files leave out
        odd = [f"model {kind}"] if kind != "BPE" else odd
        if odd:
            raise UserError(f"{path}: {', '.join(odd)[:400]} is not supported; supported: byte-level BPE as GPT-2, "
                            "SmolLM2, Llama 3 and Qwen have it")
        special = {t["content"]: t["id"] for t in added}
        if stray := [i for i in [*vocab.values(), *special.values()] if type(i) is not int or not 0 <= i < 2 ** 31]:
            raise ValueError(f"an id is {stray[0]!r}; expected whole numbers from 0 on")
        new = itertools.count(len(vocab))                                 # the library counts, whatever the file says
        for t, i in special.items():
            if i != (other := vocab[t] if t in vocab else next(new)):
                raise ValueError(f"the added token {t} has id {i}; `tokenizers` would give it {other}")
        merges = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
        tokens = dict.fromkeys([c for c in to_byte if c in vocab] + ["".join(m) for m in merges])   # in order of ranks
        if model.get("ignore_merges"):                                    # a whole piece that is a token is that token
            tokens |= dict.fromkeys(t for t in vocab if t not in special)
        elif stray := stray_merge(merges):
            raise UserError(f"{path}: {stray} is a merge that its own parts forestall; tiktoken would give other ids")
        special = {t: i for t, i in vocab.items() if t not in tokens} | special   # no text leads to these either
        ranks = {bytes(to_byte[c] for c in token): rank for rank, token in enumerate(tokens)}
        encoding = tiktoken.Encoding(str(path), pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        return Tokenizer(encoding, find_eos(path.parent, special | vocab), special, [vocab[token] for token in tokens],
                         [t["content"] for t in added if not t["special"]], bool(normalizers), missing, path)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} is not a tokenizer.json that we can read: {e!r}") from None


def stray_merge(merges):
    """The first merge that the merges before it never lead to, None if there is none.

    tiktoken joins any two neighbours that together are a token, `tokenizers` only pairs that are listed. They agree if
    each token's listed pair is what its own bytes come to: if no earlier merge crosses the border between the two.
    """
    rank, pair = {}, {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    for left, right in merges:
        a, b, limit = left, right, rank[left + right]                     # a, b: the tokens that once met at the border
        met = all(len(x) == 1 or x in pair and rank[x] < limit for x in (a, b))
        while met and max(len(a), len(b)) > 1:
            if len(b) == 1 or len(a) > 1 and rank[a] > rank[b]:           # the later of the two came to be last
                limit, a = rank[a], pair[a][1]
            else:
                limit, b = rank[b] + 1, pair[b][0]
            met = rank.get(a + b, limit) >= limit
        if met:
            pair.setdefault(left + right, (left, right))
    return next((" ".join(m) for m in merges if "".join(m) not in pair), None)


def find_eos(directory, ids):
    """The id that ends a text, None if the directory names none: in its tokenizer's configuration, else the model's."""
    for file, key in (("tokenizer_config.json", "eos_token"), ("config.json", "eos_token_id")):
        path, known = directory / file, set(ids.values())
        try:
            eos = json.loads(path.read_bytes()).get(key) if path.is_file() else None
        except (ValueError, AttributeError, RecursionError) as e:
            raise UserError(f"{path} is not a configuration that we can read: {e}") from None
        eos = eos.get("content") if isinstance(eos, dict) else eos
        eos = [ids.get(eos)] if isinstance(eos, str) else eos if isinstance(eos, list) else [eos]
        if found := [i for i in eos if type(i) is int and i in known]:
            return found[0]
    return None


def bytes_to_unicode():
    """GPT-2's spelling of bytes: printable ones as themselves, the others from U+0100 on; {byte: character}."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


# ---------------------------------------------------------------------------------------------------------------------
# JSONL

class Sample(NamedTuple):
    ids: np.ndarray                  # (L,) int64, all tokens
    response: np.ndarray             # (L,) bool: targets that count; the first token has no context and never does
    group: str | None
    line: int                        # in its file


SHAPES = ('{"prompt", "response"}, {"messages": [{"role", "content"}, ...]}, {"instruction", "input", "output"} '
          'or {"text"}')


LINE_BYTES = 2 ** 24                                                      # some four million tokens


def read_jsonl(path):
    """Yields (line number, object) of a JSONL or .jsonl.gz file; blank lines hold nothing, nor does a byte order mark.
    Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    number, found = 0, False
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            while line := f.readline(LINE_BYTES + 1):
                number += 1
                if len(line) > LINE_BYTES:                                # of another kind of file, without an end
                    raise UserError(f"{path}:{number}: a line of more than {LINE_BYTES >> 20} MiB; expected one JSON "
                                    "object a line")
                line = line.removeprefix(codecs.BOM_UTF8)
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8"))
                    if b"\\ud" in line or b"\\uD" in line:                # halves of characters can be written alone
                        json.dumps(row, ensure_ascii=False).encode("utf-8")
                except UnicodeDecodeError as e:
                    raise UserError(f"{path}:{number}: not UTF-8 at byte {e.start} of the line") from None
                except UnicodeEncodeError as e:
                    half = ascii(e.object[e.start])
                    raise UserError(f"{path}:{number}: {half} is half a character (a lone surrogate); expected Unicode "
                                    "text") from None
                except (ValueError, RecursionError) as e:
                    raise UserError(f"{path}:{number}: not JSON: {e}; expected one JSON object a line") from None
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{number}: a JSON {type(row).__name__}; expected an object")
                found = True
                yield number, row
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read after line {number}: {e}") from None
    if not found:
        raise UserError(f"{path}: the file is empty; expected one JSON object a line")


def as_messages(row, where):
    """A line's turns, (role, text) each; role None is {"text"}: bare text, all of it response. Raises UserError."""
    def text(mapping, key, blank=False):
        value = mapping.get(key)
        if not isinstance(value, str):
            raise UserError(f"{where}: {key!r} is {'missing' if value is None else type(value).__name__}; "
                            "expected a string")
        if not blank and not value.strip():
            raise UserError(f"{where}: {key!r} is {'blank' if value else 'empty'}; expected some text")
        return value

    if "prompt" in row or "response" in row:
        return [("user", text(row, "prompt", blank=True)), ("assistant", text(row, "response"))]
    if "messages" in row:
        turns = row["messages"]
        if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
            raise UserError(f"{where}: 'messages' must be a list of objects with 'role' and 'content'")
        for t in turns:
            if t.get("role") not in ("system", "user", "assistant"):
                raise UserError(f"{where}: 'role' is {t.get('role')!r}; expected system, user or assistant")
        if not any(t["role"] == "assistant" for t in turns):
            raise UserError(f"{where}: no turn of the assistant in 'messages'; nothing to learn from")
        return [(t["role"], text(t, "content", blank=t["role"] != "assistant")) for t in turns]
    if "instruction" in row or "output" in row:
        prompt = text(row, "instruction", blank=True)
        extra = "" if row.get("input") is None else text(row, "input", blank=True)
        return [("user", f"{prompt}\n{extra}" if extra.strip() else prompt), ("assistant", text(row, "output"))]
    if "text" in row:
        return [(None, text(row, "text"))]
    raise UserError(f"{where}: the keys are {', '.join(map(repr, row)) or 'none'}; expected {SHAPES}")


# A chat format turns (role, text) turns into pieces (ids, whether they are response). A last turn of the assistant
# whose text is None is the one that a model is to write.

def plain(messages, tokenizer):
    """prompt + "\\n" + response + eos, each turn encoded by itself."""
    for role, text in messages:
        if role != "assistant":
            yield tokenizer.encode(text) + tokenizer.encode("\n"), False
        elif text is not None:
            yield tokenizer.encode(text) + [tokenizer.eos_id], True


def chatml(messages, tokenizer):
    """<|im_start|>role + "\\n" + text + <|im_end|> + "\\n", of SmolLM2 and Qwen."""
    start, end = tokenizer.special["<|im_start|>"], tokenizer.special["<|im_end|>"]
    for role, text in messages:
        if role != "assistant":
            yield [start] + tokenizer.encode(f"{role}\n{text}") + [end] + tokenizer.encode("\n"), False
            continue
        yield [start] + tokenizer.encode("assistant\n"), False
        if text is not None:
            yield tokenizer.encode(text) + [end], True
            yield tokenizer.encode("\n"), False


def llama3(messages, tokenizer):
    """<|begin_of_text|>, then <|start_header_id|>role<|end_header_id|> + "\\n\\n" + text, stripped, + <|eot_id|>."""
    begin, start, stop, end = (tokenizer.special[token] for token in CHAT_TOKENS["llama3"])
    yield [begin], False
    for role, text in messages:
        header = [start] + tokenizer.encode(role) + [stop]
        if role != "assistant":
            yield header + tokenizer.encode("\n\n" + text.strip()) + [end], False
            continue
        yield header + tokenizer.encode("\n\n"), False
        if text is not None:
            yield tokenizer.encode(text.strip()) + [end], True


CHAT_FORMATS = {"plain": plain, "chatml": chatml, "llama3": llama3}
CHAT_TOKENS = {"llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
               "chatml": ("<|im_start|>", "<|im_end|>"), "plain": ()}     # the last one ends a turn


def find_format(name, tokenizer):
    """The chat format of --chat-format; "auto": the first whose special tokens the tokenizer has. Raises UserError."""
    if name == "auto":
        return next(name for name, tokens in CHAT_TOKENS.items() if set(tokens) <= tokenizer.special.keys())
    if lacking := [token for token in CHAT_TOKENS[name] if token not in tokenizer.special]:
        raise UserError(f"chat format {name} needs the special token {lacking[0]}, which the tokenizer lacks")
    return name


def encode_turns(messages, tokenizer, chat_format="plain"):
    """(ids, whether each is response) of a conversation, [(role, text), ...]; role None is bare text and an eos."""
    if messages[0][0] is None:
        begin = [tokenizer.special[t] for t in CHAT_TOKENS[chat_format][:1] if chat_format == "llama3"]
        pieces = [(begin, False), (tokenizer.encode(messages[0][1]) + [tokenizer.eos_id], True)]
    else:
        pieces = list(CHAT_FORMATS[chat_format](messages, tokenizer))
    return [i for piece, _ in pieces for i in piece], [kind for piece, kind in pieces for _ in piece]


# A template is a program that we did not write: in a sandbox, in a process of its own, of bounded time and memory.
RENDER = """import json, resource, sys, time
from jinja2 import sandbox  # which torch brings
resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
resource.setrlimit(resource.RLIMIT_AS, (2 ** 30, 2 ** 30))
template, names = json.load(sys.stdin)
environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])
print(json.dumps(environment.from_string(template).render(strftime_now=time.strftime, **names)))"""


def compare_template(directory, tokenizer, chat_format):
    """What the chat template of a model directory makes of a question and its answer and we do not, in a sentence;
    None if they agree or it has no template."""
    config, file = Path(directory, "tokenizer_config.json"), Path(directory, "chat_template.jinja")
    turns = [("user", "QUESTION"), ("assistant", "ANSWER")]
    try:
        template = json.loads(config.read_bytes()).get("chat_template") if config.is_file() else None
        template = file.read_text() if file.is_file() else template
        if isinstance(template, list):                                    # several, by name
            template = next(t["template"] for t in template if t["name"] == "default")
        if template is None:
            return None
        ours = tokenizer.decode(encode_turns(turns, tokenizer, chat_format)[0])
        names = {"messages": [{"role": role, "content": text} for role, text in turns], "tools": None,
                 "documents": None, "bos_token": min(tokenizer.special.keys() & {"<|begin_of_text|>"}, default="")}
        done = subprocess.run([sys.executable, "-c", RENDER], input=json.dumps([template, names]), text=True,
                              capture_output=True, timeout=60)
        if done.returncode:
            raise ValueError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
        theirs = json.loads(done.stdout)
    except Exception as e:                                                # bugs and all
        return (f"{directory}: its chat template could not be rendered ({str(e)[:200]}); chat format {chat_format} may "
                "differ")
    return None if ours == theirs else (f"{directory}: its chat template would write {theirs[:500]!r}, chat format "
                                        f"{chat_format} writes {ours!r}")


def encode_sample(messages, tokenizer, chat_format="plain", group=None, line=0):
    """The Sample of a conversation, [(role, text), ...]."""
    ids, response = encode_turns(messages, tokenizer, chat_format)
    response[0] = False
    return Sample(np.array(ids, dtype=np.int64), np.array(response), group, line)


def load_samples(path, tokenizer, chat_format="auto", max_length=None, rows=None):
    """All samples of a file: (list of Sample, {"samples", "cut", "dropped"} counts).

    A sample of more than max_length tokens is cut at its end; one without a response token left is dropped.
    rows: [(line number, object), ...] to use in place of the file's content, path then only names them in errors.
    Raises UserError naming file and line.
    """
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer names no end-of-text token; expected eos_token in tokenizer_config.json or "
                        "eos_token_id in config.json")
    chat_format = find_format(chat_format, tokenizer)
    samples, cut, dropped = [], 0, 0
    for line, row in read_jsonl(path) if rows is None else rows:
        group = None if row.get("group") is None else str(row["group"])
        messages = as_messages(row, f"{path}:{line}")
        try:
            sample = encode_sample(messages, tokenizer, chat_format, group, line)
        except UserError as e:
            raise UserError(f"{path}:{line}: {e}") from None
        if max_length is not None and len(sample.ids) > max_length:
            sample = sample._replace(ids=sample.ids[:max_length], response=sample.response[:max_length])
            cut += 1
        if sample.response.any():
            samples.append(sample)
        else:
            dropped += 1
    if not samples:
        raise UserError(f"{path}: no sample has a response token left within {max_length} tokens")
    return samples, {"samples": len(samples), "cut": cut, "dropped": dropped}


def load_choice(path):
    """Multiple-choice items, {"question", "choices", "answer", "context"?}: a list of them, each with its "line".
    Raises UserError."""
    items = []
    for line, row in read_jsonl(path):
        question, choices, answer = row.get("question"), row.get("choices"), row.get("answer")
        if not isinstance(question, str) or not isinstance(row.get("context", ""), str):
            raise UserError(f"{path}:{line}: 'question' (and 'context', if any) must be a string")
        if not isinstance(choices, list) or len(choices) < 2 or \
                not all(isinstance(c, str) and c.strip() for c in choices):
            raise UserError(f"{path}:{line}: 'choices' must be a list of two or more texts")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise UserError(f"{path}:{line}: 'answer' is {answer!r}; expected the index of the right choice, "
                            f"0 to {len(choices) - 1}")
        planted = row.get("planted", 0)
        if type(planted) is not int or not 0 <= planted < len(choices):
            raise UserError(f"{path}:{line}: 'planted' is {planted!r}; expected the index of a choice, if there is any")
        items.append({**row, "line": line, "group": None if row.get("group") is None else str(row["group"])})
    return items


KINDS = {"text": ("some text", lambda v: isinstance(v, str) and v.strip() != ""),
         "texts": ("a list of texts", lambda v: isinstance(v, list) and v and all(map(KINDS["text"][1], v))),
         "label": ("0 or 1", lambda v: v in (0, 1)),
         "numbers": ("a list of numbers, as many on each line", lambda v: isinstance(v, list) and v and all(
             type(x) in (int, float) and abs(x) < 1e30 for x in v))}


def load_items(path, **keys):
    """Lines that have these keys, {key: its kind}, further ones allowed: a list of them, each with its "line" and
    "group". Raises UserError."""
    items = []
    for line, row in read_jsonl(path):
        for key, kind in keys.items():
            expected, fits = KINDS[kind]
            if not fits(row.get(key)) or kind == "numbers" and items and len(row[key]) != len(items[0][key]):
                raise UserError(f"{path}:{line}: {key!r} is {str(row.get(key, 'missing'))[:50]}; expected {expected}")
        items.append({**row, "line": line, "group": None if row.get("group") is None else str(row["group"])})
    return items


# ---------------------------------------------------------------------------------------------------------------------
# Order and packing

def global_batch(step, n, batch_size, seed):
    """(epoch, sample numbers) of optimizer step `step` (from 0). A function of its arguments alone: neither the world
    size nor packing changes what a step learns from. The last batch of an epoch may be smaller."""
    epoch, i = divmod(step, -(-n // batch_size))
    # RandomState: its stream is frozen by numpy's policy, a Generator's is not.
    order = np.random.RandomState([seed, epoch]).permutation(n)
    return epoch, order[i * batch_size:(i + 1) * batch_size].tolist()


def deal(lengths, world, micro_tokens):
    """Deals samples of the given token lengths to `world` ranks and packs each rank's into micro-batches.

    Returns plan[rank][micro-batch] = list of indices into lengths. The longest go first, to the rank with the fewest
    tokens, there into the first micro-batch with room for them; a sample longer than micro_tokens is one by itself.
    Every rank gets the same number of micro-batches, some may be empty: DDP needs as many backward passes from each.
    """
    plan, room = [[] for _ in range(world)], [[] for _ in range(world)]
    load = [0] * world
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(world), key=lambda r: (load[r], r))
        load[rank] += lengths[i]
        m = next((m for m, free in enumerate(room[rank]) if free >= lengths[i]), None)
        if m is None:
            plan[rank].append([i])
            room[rank].append(micro_tokens - lengths[i])
        else:
            plan[rank][m].append(i)
            room[rank][m] -= lengths[i]
    count = max(map(len, plan))
    return [micros + [[] for _ in range(count - len(micros))] for micros in plan]


def bucket(tokens, micro_tokens):
    """What a micro-batch is filled up to where its size is compiled in: the next quarter of micro_tokens. So a run has
    four sizes to compile, and a few more if it has samples longer than micro_tokens."""
    quarter = -(-micro_tokens // 4)
    return quarter * max(1, -(-tokens // quarter))


class Batch(NamedTuple):
    """Packed samples, as `GPT.forward` takes them, and the ragged layout of their response tokens for `bft`."""
    input_ids: torch.Tensor          # (T,) the samples' tokens, one sample after the other
    lengths: list                    # of the S samples in tokens, and of what fills up the rest, if any; adds up to T
    at: torch.Tensor                 # (N,) positions whose next token is a response token
    targets: torch.Tensor            # (N,) those tokens
    offsets: torch.Tensor            # (S+1,) where each sample begins and ends in the N; stays on the CPU

    def to(self, device):
        """With its tensors on the device, but for `offsets`; to a GPU from pinned memory, without waiting."""
        move = lambda t: (t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True)   # noqa: E731
        return self._replace(**{k: move(getattr(self, k)) for k in ("input_ids", "at", "targets")})


def collate(samples, size=1):
    """Packs samples into a Batch, filled up to `size` tokens with samples without response, none longer than the real
    ones or 16. So no samples at all become tokens that are nobody's response: the forward pass still reaches every
    parameter, and DDP gets its zero gradients.
    """
    lengths = [len(s.ids) for s in samples]
    fill, piece = max(0, size - sum(lengths)), max([16, *lengths])        # (positions may end soon after them)
    ids = np.concatenate([s.ids for s in samples] + [np.zeros(fill, dtype=np.int64)])
    response = np.concatenate([s.response for s in samples] + [np.zeros(fill, dtype=bool)])
    offsets = np.cumsum([0] + [s.response.sum() for s in samples], dtype=np.int64)
    at = np.flatnonzero(response) - 1                                     # never -1: a first token is no response
    return Batch(torch.from_numpy(ids), lengths + [piece] * (fill // piece) + [fill % piece] * (fill % piece > 0),
                 torch.from_numpy(at), torch.from_numpy(ids[at + 1]), torch.from_numpy(offsets))


# ---------------------------------------------------------------------------------------------------------------------

def main():
    parser = Parser(description="Shows samples as the training loop sees them.")
    parser.add_argument("file")
    parser.add_argument("--tokenizer", required=True, help="directory with tokenizer.json, or a tiktoken name")
    parser.add_argument("--chat-format", choices=("auto", *CHAT_FORMATS), default="auto",
                        help="auto: the one whose special tokens the tokenizer has")
    parser.add_argument("--max-length", type=int, help="cut samples after so many tokens")
    parser.add_argument("-n", type=int, default=2, help="how many samples to show")
    args = parser.parse_args()
    if args.n < 0 or (args.max_length is not None and args.max_length < 1):
        raise UserError(f"-n is {args.n} and --max-length {args.max_length}; expected 0 or more, and 1 or more")
    tokenizer = load_tokenizer(args.tokenizer)
    chat_format = find_format(args.chat_format, tokenizer)
    samples, counts = load_samples(args.file, tokenizer, chat_format, args.max_length)
    print(f"chat format {chat_format}")
    if difference := compare_template(args.tokenizer, tokenizer, chat_format):
        print(f"warning: {difference}")
    for s in samples[:args.n]:
        edges = [0, *(np.flatnonzero(np.diff(s.response)) + 1), len(s.ids)]
        print(f"--- line {s.line}: {len(s.ids)} tokens, {s.response.sum()} of response (between [[ and ]])")
        print("".join(f"[[{text}]]" if s.response[i] else text
                      for i, text in ((i, tokenizer.decode(s.ids[i:j])) for i, j in itertools.pairwise(edges))))
    print(f"--- {counts['samples']} samples; {counts['cut']} cut at {args.max_length} tokens, {counts['dropped']} "
          "dropped for want of a response token")
    percentiles = (0, 5, 25, 50, 75, 95, 100)
    print(f"{'percentile':17s}" + "".join(f"{q:>8}" for q in percentiles))
    for name, of in (("tokens", lambda s: len(s.ids)), ("response tokens", lambda s: s.response.sum())):
        print(f"{name:17s}" + "".join(f"{v:>8.0f}" for v in np.percentile([of(s) for s in samples], percentiles)))


if __name__ == "__main__":
    run(main)
