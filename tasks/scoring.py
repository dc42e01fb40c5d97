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


MICRO_TOKENS = 8192                  # read at a time
# A CPU reads fastest so few at a time: what a layer makes of them stays in its caches (bench/RESULTS.md).
CPU_MICRO_TOKENS = 1024


# Whoever asks a model for log-probs outside of training compiles nothing: sizes are as they come, none of them is worth
# it, and there may be no C compiler.
@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def score(model, samples, dtype=torch.float32, micro_tokens=MICRO_TOKENS, group_size=256, stopped=lambda: False,
          label=None):
    """Log-likelihood of each sample's response tokens: (S, 3) float64 numpy: sum of log p, number of tokens, C_b.

    Once stopped() says True, at the same micro-batch on every rank, the rest is left undone, and what is returned is of
    no use. label: see `with_progress`. Raises UserError for a model that gives NaN.
    """
    device = next(model.parameters()).device
    table = torch.zeros(len(samples), 3, dtype=torch.float64, device=device)                    # (S, 3)
    lengths = [len(sample.ids) for sample in samples]
    my_micro_batches = micro_batches_of_rank(lengths, as_device_likes(micro_tokens, device))
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
def loglikelihood(model, requests, dtype=torch.float32, micro_tokens=MICRO_TOKENS, label=None):
    """Sum of log p of the continuation of each Request: (R,) float64 numpy.

    As in lm-evaluation-harness the last id is not read, and an input longer than the positions loses its beginning.
    A context is read once for all of its continuations, and what they have in common beyond it too, if only their last
    ids differ (the letters of one question). Raises UserError for a model that gives NaN.
    """
    device = next(model.parameters()).device
    questions = questions_of(requests, model.config.max_positions)
    contexts = list(questions)
    lengths = [len(context) + sum(map(len, endings)) for context, endings in questions.items()]
    table = torch.zeros(len(requests), dtype=torch.float64, device=device)                      # (R,)
    my_micro_batches = micro_batches_of_rank(lengths, as_device_likes(micro_tokens, device))
    for micro_batch in with_progress(my_micro_batches, label):
        samples, after, numbers, at = lay_out({contexts[i]: questions[contexts[i]] for i in micro_batch})
        continuations = [requests[number].continuation for number in numbers]
        offsets = torch.tensor([0, *itertools.accumulate(map(len, continuations))])             # (requests + 1,)
        targets = list(itertools.chain.from_iterable(continuations))
        at = torch.tensor(at, dtype=torch.int64, device=device)                                 # (N,)
        targets = torch.tensor(targets, dtype=torch.int64, device=device)                       # (N,)
        packed, lengths = pack(samples, device)
        with autocast(device, dtype):
            logp = model(packed, lengths, at, targets, after)                                   # (N,)
        table[numbers] = bft.sample_sums(logp, offsets)
    return sum_over_ranks(table)


def questions_of(requests, positions):
    """What is read for some Requests: {context: {ending: numbers of the requests that read these}}, tuples of ids."""
    questions = {}
    for number, (context, continuation) in enumerate(requests):
        ending = tuple(continuation[:-1])
        ids = (*context, *ending)[-positions:]
        context = ids[:len(ids) - len(ending)]
        questions.setdefault(context, {}).setdefault(ending, []).append(number)
    return questions


def lay_out(questions):
    """(samples, after, numbers, at) of some of `questions_of`: what the model reads, contexts and endings that go on
    from them, as `Packing` has it; the numbers of the requests; where their tokens are predicted, one after the other.
    """
    samples, after, numbers, at = [], {}, [], []
    end = 0                                                               # tokens so far
    for context, endings in questions.items():
        question = len(samples)
        samples.append(context)
        end += len(context)
        last = end - 1
        for ending, readers in endings.items():
            for number in readers:
                numbers.append(number)
                at += [last, *range(end, end + len(ending))]
            if ending:
                after[len(samples)] = question
                samples.append(ending)
                end += len(ending)
    return samples, after, numbers, at


def pack(rows, device):
    """(their ids one after the other (T,), their lengths) of rows of ids; of no rows one token, which nobody reads."""
    rows = rows or [[0]]
    packed = torch.tensor(list(itertools.chain.from_iterable(rows)), device=device)
    return packed, [len(row) for row in rows]


def as_device_likes(micro_tokens, device):
    return min(micro_tokens, CPU_MICRO_TOKENS) if device.type == "cpu" else micro_tokens


def micro_batches_of_rank(lengths, micro_tokens=MICRO_TOKENS, dealt=True):
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
