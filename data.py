"""Rows to samples to packed batches, and the order of samples.

    python data.py FILE [FILE ...] --tokenizer DIR -n 2     # samples with the response marked, and length percentiles
    python data.py FILE --tokenizer DIR --json              # {"line", "ids", "response"} of each sample

A row of a file (`runtime/rows.py` reads them) becomes a conversation, a list of `hf.Turn` (`hf/conversation.py` has the
shapes of rows). The chat format and the tokenizer (`hf/`) make it a `Sample`. The samples of a global batch are dealt
to ranks, and packed into a `Batch` for each forward pass.
"""

import copy
import functools
import heapq
import itertools
import json
import sys
from array import array
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import hf
from hf.conversation import READ, add_template_flags, as_conversation, holds_question_and_answer, parse_templates
from runtime.process import Parser, UserError, run
from runtime.progress import with_progress
from runtime.rows import Row, read_rows


# ---------------------------------------------------------------------------------------------------------------------
# Rows to samples

class Sample(NamedTuple):
    ids: np.ndarray                  # (L,) int64, all tokens
    # (L,) bool: true for the response tokens, which are trained: every token of an assistant's turn that is to be
    # learnt, the one that ends the turn included (`hf.ChatFormat.encode`). Never for a first token: it has no context.
    response: np.ndarray
    group: str | None                # of an evaluation's table; not one of bft's groups
    line: int                        # in its file; of an array or parquet, the row, from 1
    where: str = ""                  # "FILE:LINE" or "FILE: row NUMBER", for errors
    ref_logp: np.ndarray | None = None   # (n_b,) float32, see `Samples.with_reference`


class Samples:
    """Behaves as a list of Sample, but stores flat arrays: 5 bytes a token and 24 a sample, and no object for each.

    It has `append`, `len` and [number or slice]. `Samples.load` maps the files that `save` wrote, and is read-only.
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
        """The samples that `save` wrote. Their arrays are mapped from the files, which may be deleted meanwhile."""
        samples = cls()
        for name in cls.COLUMNS:
            setattr(samples, name, np.asarray(np.load(directory / f"{name}.npy", mmap_mode="r")))
        samples.table = json.loads((directory / "table.json").read_text(encoding="utf-8"))
        return samples


def load_samples(path, tokenizer, chat_format="auto", max_length=None, rows=None, templates=None):
    """All samples of a file, or of a list of files one after the other: (Samples, counts).

    A sample of more than max_length tokens is cut at its end, so that its response ends without the token that ends a
    turn. One without a response token left is dropped. counts has the numbers of "samples", "cut" and "dropped", the
    keys that were "unread" as text, and a list of sentences under "warnings".

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
        limit = f" within {max_length} tokens" if max_length else ""
        raise UserError(f"{', '.join(map(str, paths))}: no sample has a response token{limit}")
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
# The order of samples

def global_batch(step, n, batch_size, seed):
    """(epoch, sample numbers) of optimizer step `step` (from 0). A function of its arguments alone: neither the world
    size nor packing changes what a step learns from. The last batch of an epoch may be smaller: the loss is divided by
    its own N or B, so that each of its samples counts for more."""
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


def pack(indices, lengths, micro_tokens):
    """The micro-batches of one rank: each of its samples, the longest first, goes into the first with room.

    Since samples only become shorter, a micro-batch with room for one of them has room for all later ones, until
    something is added to it.
    """
    micro_batches = []
    with_room = []                   # a heap of (place, tokens left): there is room for the next sample
    others = []                      # a heap of (-tokens left, place)
    for i in indices:
        while others and -others[0][0] >= lengths[i]:
            negative_left, place = heapq.heappop(others)
            heapq.heappush(with_room, (place, -negative_left))
        if with_room:
            place, left = heapq.heappop(with_room)
        else:
            place, left = len(micro_batches), micro_tokens
            micro_batches.append([])
        micro_batches[place].append(i)
        left -= lengths[i]
        heapq.heappush(others, (-left, place))
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
    """The size that a micro-batch is filled up to under --compile: the next quarter of micro_tokens. So a run has four
    sizes to compile, and a few more if it has samples longer than micro_tokens."""
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
    limit = f" at {args.max_length} tokens" if args.max_length else ""
    print(f"--- {counts['samples']} samples; {counts['cut']} cut{limit}, {counts['dropped']} dropped, which have no "
          "response token")
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
