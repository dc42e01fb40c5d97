"""Log-likelihoods of what models are given: the same on any number of ranks."""

import itertools
from typing import NamedTuple

import torch
import torch.distributed as dist

import bft
from data import collate, deal
from runtime.device import autocast
from runtime.process import UserError
from runtime.progress import with_progress


# Whoever asks a model for log-probs outside of training compiles nothing: sizes are as they come, none of them is worth
# it, and there may be no C compiler.
@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def score(model, samples, dtype=torch.float32, micro_tokens=8192, group_size=256, stopped=lambda: False, label=None):
    """Log-likelihood of each sample's response tokens: (S, 3) float64 numpy: sum of log p, number of tokens, C_b.

    Once stopped() says True, at the same micro-batch on every rank, the rest is left undone, and what is returned is of
    no use. label: see `with_progress`. Raises UserError for a model that gives NaN.
    """
    device = next(model.parameters()).device
    table = torch.zeros(len(samples), 3, dtype=torch.float64, device=device)                    # (S, 3)
    my_micro_batches = micro_batches_of_rank([len(sample.ids) for sample in samples], micro_tokens)
    for micro_batch in with_progress(my_micro_batches, label):
        if stopped():
            break
        batch = collate([samples[i] for i in micro_batch]).to(device)
        with autocast(device, dtype):
            logp = model(batch.input_ids, batch.lengths, batch.at, batch.targets)               # (N,)
        sums = bft.sample_sums(logp, batch.offsets)
        counts = batch.offsets.diff().to(device).double()
        confidence = bft.group_confidence(logp, batch.offsets, group_size)
        table[micro_batch] = torch.stack((sums, counts, confidence), 1)
    return sum_over_ranks(table)


class Request(NamedTuple):
    """A text whose end is scored."""
    context: list                    # ids
    continuation: list               # ids


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def loglikelihood(model, requests, dtype=torch.float32, micro_tokens=8192, label=None):
    """Sum of log p of the continuation of each Request: (R,) float64 numpy.

    As in lm-evaluation-harness the last id is not read, an input longer than the positions loses its beginning, and
    requests that read the same (the letters of one question) share a row. Raises UserError for a model that gives NaN.
    """
    device = next(model.parameters()).device
    readers = {}                     # {ids that the model reads: numbers of the requests that read them}
    for number, request in enumerate(requests):
        ids = request.context + request.continuation[:-1]
        readers.setdefault(tuple(ids[-model.config.max_positions:]), []).append(number)
    inputs = list(readers)
    table = torch.zeros(len(requests), dtype=torch.float64, device=device)                      # (R,)
    my_micro_batches = micro_batches_of_rank([len(ids) for ids in inputs], micro_tokens)
    for micro_batch in with_progress(my_micro_batches, label):
        rows = [inputs[i] for i in micro_batch]
        packed, lengths = pack(rows, device)
        numbers, at, targets = [], [], []
        end = 0
        for row in rows:
            end += len(row)
            for number in readers[row]:
                continuation = requests[number].continuation
                numbers.append(number)
                at.extend(range(end - len(continuation), end))
                targets.extend(continuation)
        ends = itertools.accumulate(len(requests[number].continuation) for number in numbers)
        offsets = torch.tensor([0, *ends])                                                      # (requests + 1,)
        at = torch.tensor(at, dtype=torch.int64, device=device)                                 # (N,)
        targets = torch.tensor(targets, dtype=torch.int64, device=device)                       # (N,)
        with autocast(device, dtype):
            logp = model(packed, lengths, at, targets)                                          # (N,)
        table[numbers] = bft.sample_sums(logp, offsets)
    return sum_over_ranks(table)


def pack(rows, device):
    """(their ids one after the other (T,), their lengths) of rows of ids; of no rows one token, which nobody reads."""
    rows = rows or [[0]]
    packed = torch.tensor(list(itertools.chain.from_iterable(rows)), device=device)
    return packed, [len(row) for row in rows]


def micro_batches_of_rank(lengths, micro_tokens=8192, dealt=True):
    """This rank's micro-batches of rows with these lengths: lists of indices.

    Micro-batches are formed first and dealt to the ranks then, so that no number depends on how many ranks there are.
    Every rank gets as many, the last may be empty: a sharded model needs as many forward passes from each. dealt: False
    if every rank is to have all of them.
    """
    rank, world = 0, 1
    if dealt and dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    all_micro_batches, = deal(lengths, 1, micro_tokens)
    all_micro_batches += [[] for _ in range(-len(all_micro_batches) % world)]
    return all_micro_batches[rank::world]


def sum_over_ranks(table):
    """What the ranks have put into their tables of zeros, as numpy. Raises UserError for a NaN."""
    if dist.is_initialized():
        dist.all_reduce(table)
    refuse_nan(table)
    return table.cpu().numpy()


def refuse_nan(values):
    if values.isnan().any():
        raise UserError("the model gives probabilities that are no numbers (NaN); expected a model that was not ruined")
