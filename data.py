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
import gzip
import itertools
import json
import os
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch


class UserError(Exception):
    """A mistake in what the user gave us. Its message is one sentence: what is wrong, where, what was expected."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def run(main):
    """Calls main(); a user's mistake becomes one line on stderr and exit code 2, without a traceback.

    Under torchrun every rank makes the same mistake and rank 0 should be the one to say so. The first to exit has the
    others killed, so they leave it some time; who is then still alive had a mistake of its own.
    """
    code = 0
    try:
        main()
    except SystemExit as e:
        code = e.code
    except UserError as e:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)
        print(f"error: {e}", file=sys.stderr, flush=True)
        code = 2
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Everything is written. With gloo the interpreter's own teardown now and then aborts ("terminate called without
        # an active exception": seen in 1 of some 20 runs on three ranks), and torchrun would call the run a failure.
        sys.stdout.flush()
        os._exit(code or 0)
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer

# GPT-2's pre-tokenizer, which a tokenizer.json calls ByteLevel.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """encode(text) -> ids, decode(ids) -> text, n_vocab, special {text: id}, eos_id (None if there is none)."""

    def __init__(self, encoding, eos_id):
        self.encoding, self.eos_id = encoding, eos_id
        self.n_vocab = encoding.max_token_value + 1
        self.special = dict(encoding._special_tokens)

    def encode(self, text):
        return self.encoding.encode_ordinary(text)                        # special tokens in user text stay text

    def decode(self, ids):
        return self.encoding.decode([int(i) for i in ids])


def load_tokenizer(name_or_path):
    """A Tokenizer from a directory with tokenizer.json, from such a file, or a tiktoken encoding by name ("gpt2").

    The ids are those of Hugging Face's `tokenizers` with add_special_tokens=False. Raises UserError.
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
        return Tokenizer(encoding, encoding.eot_token)
    try:
        spec = json.loads(path.read_bytes())
        model, pre = spec["model"], spec.get("pre_tokenizer") or {}
        if (model["type"], pre.get("type"), spec.get("normalizer")) != ("BPE", "ByteLevel", None) \
                or pre.get("add_prefix_space") or not pre.get("use_regex", True) or model.get("byte_fallback"):
            raise UserError(f"{path}: model {model['type']} with pre-tokenizer {pre.get('type')} is not supported; "
                            "supported: byte-level BPE with GPT-2's ByteLevel pre-tokenizer and no normalizer")
        special = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
        to_byte = {c: b for b, c in bytes_to_unicode().items()}
        ranks = {bytes(to_byte[c] for c in token): i for token, i in model["vocab"].items() if token not in special}
        # tiktoken merges in the order of ids; the file must do so too: each new token's id above the last one's.
        merged = [model["vocab"]["".join(m if isinstance(m, list) else m.split(" "))] for m in model["merges"]]
        if merged != sorted(merged):
            raise UserError(f"{path}: ids do not rise in the order of the merges, which is not supported")
        if not all(bytes([b]) in ranks for b in range(256)):
            raise UserError(f"{path}: some of the 256 bytes are no tokens, which is not supported")
        eos = path.with_name("tokenizer_config.json")
        eos = json.loads(eos.read_bytes()).get("eos_token") if eos.is_file() else None
        eos = special.get(eos["content"] if isinstance(eos, dict) else eos)
        return Tokenizer(tiktoken.Encoding(str(path), pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                           special_tokens=special), eos)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is not a tokenizer.json that we can read: {e!r}") from None


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


def read_jsonl(path):
    """Yields (line number, object) of a JSONL or .jsonl.gz file; blank lines hold nothing. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    number, found = 0, False
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8"))
                except UnicodeDecodeError as e:
                    raise UserError(f"{path}:{number}: not UTF-8 at byte {e.start} of the line") from None
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


def plain(messages, tokenizer):
    """prompt + "\\n" + response + eos, each turn encoded by itself: yields (ids, whether they are response)."""
    for role, text in messages:
        if role in (None, "assistant"):
            yield tokenizer.encode(text) + [tokenizer.eos_id], True
        else:
            yield tokenizer.encode(text) + tokenizer.encode("\n"), False


CHAT_FORMATS = {"plain": plain}


def encode_sample(messages, tokenizer, chat_format="plain", group=None, line=0):
    """The Sample of a conversation, [(role, text), ...]."""
    ids, response = [], []
    for piece, is_response in CHAT_FORMATS[chat_format](messages, tokenizer):
        ids += piece
        response += [is_response] * len(piece)
    response[0] = False
    return Sample(np.array(ids, dtype=np.int64), np.array(response), group, line)


def load_samples(path, tokenizer, chat_format="plain", max_length=None, rows=None):
    """All samples of a file: (list of Sample, {"samples", "cut", "dropped"} counts).

    A sample of more than max_length tokens is cut at its end; one without a response token left is dropped.
    rows: [(line number, object), ...] to use in place of the file's content, path then only names them in errors.
    Raises UserError naming file and line.
    """
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer names no end-of-text token (eos_token in tokenizer_config.json); "
                        f"chat format {chat_format} ends a response with it")
    samples, cut, dropped = [], 0, 0
    for line, row in read_jsonl(path) if rows is None else rows:
        group = None if row.get("group") is None else str(row["group"])
        sample = encode_sample(as_messages(row, f"{path}:{line}"), tokenizer, chat_format, group, line)
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


class Batch(NamedTuple):
    """Packed samples, as `GPT.forward` takes them, and the ragged layout of their response tokens for `bft`."""
    input_ids: torch.Tensor          # (T,) the samples' tokens, one sample after the other
    bounds: torch.Tensor             # (S+1,) where each sample begins and ends in them
    longest: int                     # tokens in the longest sample
    at: torch.Tensor                 # (N,) positions whose next token is a response token
    targets: torch.Tensor            # (N,) those tokens
    offsets: torch.Tensor            # (S+1,) where each sample begins and ends in the N; stays on the CPU

    def to(self, device):
        return self._replace(**{k: getattr(self, k).to(device, non_blocking=True)
                                for k in ("input_ids", "bounds", "at", "targets")})


def collate(samples):
    """Packs samples into a Batch. None at all become one token that is nobody's response: the forward pass then still
    reaches every parameter, and DDP gets its zero gradients."""
    ids = [s.ids for s in samples] or [np.zeros(1, dtype=np.int64)]
    response = np.concatenate([s.response for s in samples] or [np.zeros(1, dtype=bool)])
    bounds = np.cumsum([0] + [len(i) for i in ids])
    offsets = np.cumsum([0] + [s.response.sum() for s in samples])
    ids, at = np.concatenate(ids), np.flatnonzero(response) - 1           # never -1: a first token is no response
    return Batch(torch.from_numpy(ids), torch.from_numpy(bounds), int(np.diff(bounds).max()), torch.from_numpy(at),
                 torch.from_numpy(ids[at + 1]), torch.from_numpy(offsets.astype(np.int64)))


# ---------------------------------------------------------------------------------------------------------------------

def main():
    parser = Parser(description="Shows samples as the training loop sees them.")
    parser.add_argument("file")
    parser.add_argument("--tokenizer", required=True, help="directory with tokenizer.json, or a tiktoken name")
    parser.add_argument("--chat-format", choices=CHAT_FORMATS, default="plain")
    parser.add_argument("--max-length", type=int, help="cut samples after so many tokens")
    parser.add_argument("-n", type=int, default=2, help="how many samples to show")
    args = parser.parse_args()
    if args.n < 0 or (args.max_length is not None and args.max_length < 1):
        raise UserError(f"-n is {args.n} and --max-length {args.max_length}; expected 0 or more, and 1 or more")
    tokenizer = load_tokenizer(args.tokenizer)
    samples, counts = load_samples(args.file, tokenizer, args.chat_format, args.max_length)
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
