"""Rows to samples to packed batches, and the order of samples.

    python data.py FILE --tokenizer DIR -n 2        # decoded samples with the response marked, and length percentiles

A file is JSONL (or .jsonl.gz), one sample a line, in one of these shapes; further keys are allowed, `group` names the
group that evaluations report by:

    {"prompt": str, "response": str}
    {"messages": [{"role": "system" | "user" | "assistant", "content": str}, ...]}     every assistant turn is response
    {"instruction": str, "input": str (optional), "output": str}                       Alpaca
    {"text": str}                                                                      all is response

A line becomes a conversation, [(role, text), ...]; the chat format and the tokenizer (`hf/`) make it a `Sample`; the
samples of a global batch are dealt to ranks, and packed into a `Batch` for each forward pass.
"""

import codecs
import gzip
import itertools
import json
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import hf
from runtime.process import Parser, UserError, run


# ---------------------------------------------------------------------------------------------------------------------
# Rows to samples

class Sample(NamedTuple):
    ids: np.ndarray                  # (L,) int64, all tokens
    response: np.ndarray             # (L,) bool: targets that count; the first token has no context and never does
    group: str | None
    line: int                        # in its file


SHAPES = ('{"prompt", "response"}, {"messages": [{"role", "content"}, ...]}, {"instruction", "input", "output"} '
          'or {"text"}')
LINE_BYTES = 2 ** 24                                                      # of a line, at most: some four million tokens


def load_samples(path, tokenizer, chat_format="auto", max_length=None, rows=None):
    """All samples of a file: (list of Sample, {"samples", "cut", "dropped"} counts).

    A sample of more than max_length tokens is cut at its end; one without a response token left is dropped.
    rows: [(line number, object), ...] to use in place of the file's content, path then only names them in errors.
    Raises UserError naming file and line.
    """
    if isinstance(chat_format, str):
        chat_format = hf.load_chat_format(None, tokenizer, chat_format)
    samples, cut, dropped = [], 0, 0
    for line, row in read_jsonl(path) if rows is None else rows:
        conversation = as_conversation(row, f"{path}:{line}")
        try:
            ids, response = chat_format.encode(conversation)
        except UserError as e:
            raise UserError(f"{path}:{line}: {e}") from None
        response[0] = False
        if max_length is not None and len(ids) > max_length:
            ids, response = ids[:max_length], response[:max_length]
            cut += 1
        if not any(response):
            dropped += 1
            continue
        group = None if row.get("group") is None else str(row["group"])
        samples.append(Sample(np.array(ids, dtype=np.int64), np.array(response), group, line))
    if not samples:
        raise UserError(f"{path}: no sample has a response token left within {max_length} tokens")
    return samples, {"samples": len(samples), "cut": cut, "dropped": dropped}


def read_jsonl(path):
    """Yields (line number, object) of a JSONL or .jsonl.gz file; blank lines hold nothing, nor does a byte order mark.
    Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    open_file = gzip.open if path.suffix == ".gz" else open
    number, empty = 0, True
    try:
        with open_file(path, "rb") as f:
            while line := f.readline(LINE_BYTES + 1):
                number += 1
                line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    empty = False
                    yield number, parse_line(line, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read after line {number}: {e}") from None
    if empty:
        raise UserError(f"{path}: the file is empty; expected one JSON object a line")


def parse_line(line, where):
    """The object of a line, bytes. Raises UserError."""
    if len(line) > LINE_BYTES:                                            # of another kind of file, without an end
        raise UserError(f"{where}: a line of more than {LINE_BYTES >> 20} MiB; expected one JSON object a line")
    try:
        row = json.loads(line.decode("utf-8"))
        if b"\\ud" in line or b"\\uD" in line:                            # halves of characters can be written alone
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: not UTF-8 at byte {e.start} of the line") from None
    except UnicodeEncodeError as e:
        raise UserError(f"{where}: {ascii(e.object[e.start])} is half a character (a lone surrogate); expected Unicode "
                        "text") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not JSON: {e}; expected one JSON object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}; expected an object")
    return row


def as_conversation(row, where):
    """A row's turns, [(role, text), ...]; role None is {"text"}: bare text, all of it response. Raises UserError."""
    if "prompt" in row or "response" in row:
        return [hf.Turn("user", text_of(row, "prompt", where, may_be_blank=True)),
                hf.Turn("assistant", text_of(row, "response", where))]
    if "messages" in row:
        return as_turns(row["messages"], where)
    if "instruction" in row or "output" in row:
        prompt = text_of(row, "instruction", where, may_be_blank=True)
        if row.get("input") is not None:
            extra = text_of(row, "input", where, may_be_blank=True)
            if extra.strip():
                prompt = f"{prompt}\n{extra}"
        return [hf.Turn("user", prompt), hf.Turn("assistant", text_of(row, "output", where))]
    if "text" in row:
        return [hf.Turn(None, text_of(row, "text", where))]
    raise UserError(f"{where}: the keys are {', '.join(map(repr, row)) or 'none'}; expected {SHAPES}")


def as_turns(messages, where):
    """[(role, text), ...] of a row's "messages". Raises UserError."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{where}: 'messages' must be a list of objects with 'role' and 'content'")
    for message in messages:
        if message.get("role") not in ("system", "user", "assistant"):
            raise UserError(f"{where}: 'role' is {message.get('role')!r}; expected system, user or assistant")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{where}: no turn of the assistant in 'messages'; nothing to learn from")
    return [hf.Turn(message["role"], text_of(message, "content", where, may_be_blank=message["role"] != "assistant"))
            for message in messages]


def text_of(mapping, key, where, may_be_blank=False):
    """The text under a key. Raises UserError."""
    value = mapping.get(key)
    if not isinstance(value, str):
        kind = "missing" if value is None else type(value).__name__
        raise UserError(f"{where}: {key!r} is {kind}; expected a string")
    if not may_be_blank and not value.strip():
        raise UserError(f"{where}: {key!r} is {'blank' if value else 'empty'}; expected some text")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# The order of samples

def global_batch(step, n, batch_size, seed):
    """(epoch, sample numbers) of optimizer step `step` (from 0). A function of its arguments alone: neither the world
    size nor packing changes what a step learns from. The last batch of an epoch may be smaller."""
    epoch, i = divmod(step, -(-n // batch_size))
    # RandomState: its stream is frozen by numpy's policy, a Generator's is not.
    order = np.random.RandomState([seed, epoch]).permutation(n)
    return epoch, order[i * batch_size:(i + 1) * batch_size].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Packing

def deal(lengths, world, micro_tokens):
    """Deals samples of the given token lengths to `world` ranks and packs each rank's into micro-batches.

    Returns plan[rank][micro-batch] = list of indices into lengths. The longest go first, to the rank with the fewest
    tokens, there into the first micro-batch with room for them; a sample longer than micro_tokens is one by itself.
    Every rank gets the same number of micro-batches, some may be empty: DDP needs as many backward passes from each.
    """
    plan = [[] for _ in range(world)]
    room = [[] for _ in range(world)]                                     # tokens left in each micro-batch of the plan
    load = [0] * world
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(world), key=lambda r: (load[r], r))
        load[rank] += lengths[i]
        micro_batch = next((m for m, free in enumerate(room[rank]) if free >= lengths[i]), None)
        if micro_batch is None:
            plan[rank].append([i])
            room[rank].append(micro_tokens - lengths[i])
        else:
            plan[rank][micro_batch].append(i)
            room[rank][micro_batch] -= lengths[i]
    most = max(map(len, plan))
    return [micro_batches + [[] for _ in range(most - len(micro_batches))] for micro_batches in plan]


class Batch(NamedTuple):
    """Packed samples, as `GPT.forward` takes them, and the ragged layout of their response tokens for `bft`."""
    input_ids: torch.Tensor          # (T,) the samples' tokens, one sample after the other
    lengths: list                    # of the S samples in tokens, and of what fills up the rest, if any; adds up to T
    at: torch.Tensor                 # (N,) positions whose next token is a response token
    targets: torch.Tensor            # (N,) those tokens
    offsets: torch.Tensor            # (S+1,) where each sample begins and ends in the N; stays on the CPU

    def to(self, device):
        """With its tensors on the device, but for `offsets`; to a GPU from pinned memory, without waiting."""
        moved = {}
        for name in ("input_ids", "at", "targets"):
            tensor = getattr(self, name)
            if device.type == "cuda":
                tensor = tensor.pin_memory()
            moved[name] = tensor.to(device, non_blocking=True)
        return self._replace(**moved)


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
    return Batch(torch.from_numpy(ids), lengths, torch.from_numpy(at), torch.from_numpy(ids[at + 1]),
                 torch.from_numpy(offsets))


def bucket(tokens, micro_tokens):
    """What a micro-batch is filled up to where its size is compiled in: the next quarter of micro_tokens. So a run has
    four sizes to compile, and a few more if it has samples longer than micro_tokens."""
    quarter = -(-micro_tokens // 4)
    return quarter * max(1, -(-tokens // quarter))


# ---------------------------------------------------------------------------------------------------------------------
# The command

def main():
    parser = Parser(description="Shows samples as the training loop sees them.")
    parser.add_argument("file")
    parser.add_argument("--tokenizer", required=True, help="directory with tokenizer.json, or a tiktoken name")
    parser.add_argument("--chat-format", choices=("auto", *hf.CHAT_FORMATS), default="auto",
                        help="auto: the chat template beside the tokenizer, or what its special tokens suggest")
    parser.add_argument("--max-length", type=int, help="cut samples after so many tokens")
    parser.add_argument("-n", type=int, default=2, help="how many samples to show")
    args = parser.parse_args()
    if args.n < 0 or (args.max_length is not None and args.max_length < 1):
        raise UserError(f"-n is {args.n} and --max-length {args.max_length}; expected 0 or more, and 1 or more")
    tokenizer = hf.load_tokenizer(args.tokenizer)
    chat_format = hf.load_chat_format(tokenizer.path and tokenizer.path.parent, tokenizer, args.chat_format)
    samples, counts = load_samples(args.file, tokenizer, chat_format, args.max_length)
    print(f"chat format {chat_format.name}")
    if chat_format.warning:
        print(f"warning: {chat_format.warning}")
    for sample in samples[:args.n]:
        print(f"--- line {sample.line}: {len(sample.ids)} tokens, {sample.response.sum()} of response (between [[ and "
              "]])")
        print(marked(sample, tokenizer))
    print(f"--- {counts['samples']} samples; {counts['cut']} cut at {args.max_length} tokens, {counts['dropped']} "
          "dropped for want of a response token")
    percentiles = (0, 5, 25, 50, 75, 95, 100)
    print(f"{'percentile':17s}" + "".join(f"{q:>8}" for q in percentiles))
    print_percentiles("tokens", [len(sample.ids) for sample in samples], percentiles)
    print_percentiles("response tokens", [sample.response.sum() for sample in samples], percentiles)


def marked(sample, tokenizer):
    """A sample's text, its response between [[ and ]]."""
    edges = [0, *(np.flatnonzero(np.diff(sample.response)) + 1), len(sample.ids)]
    parts = []
    for start, stop in itertools.pairwise(edges):
        text = tokenizer.decode(sample.ids[start:stop])
        parts.append(f"[[{text}]]" if sample.response[start] else text)
    return "".join(parts)


def print_percentiles(name, values, percentiles):
    print(f"{name:17s}" + "".join(f"{value:>8.0f}" for value in np.percentile(values, percentiles)))


if __name__ == "__main__":
    run(main)
