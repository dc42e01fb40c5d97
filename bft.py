"""Balanced Fine-Tuning (BFT, arXiv 2511.21075) and its neighbours, as weightings of one log-likelihood.

An objective is three independent choices: a weight w_t for each token, a weight s_b for each sample, and an average.

    tokens:    L = (1/N) sum_b       s_b sum_t w_t l_t        l_t = -log p_t,   p_t = pi(y_t | context)
    samples:   L = (1/B) sum_b (1/n_b) s_b sum_t w_t l_t      n_b = response tokens of sample b

N response tokens and B samples are those of the *global* batch: all micro-batches of all ranks of one optimizer step,
counting only samples with n_b > 0. The weights carry no gradient: they say how hard to push, l_t alone says where.

Everything here works on the ragged layout: the log-probs of all response tokens, sample after sample, in one vector
`logp` (N,) float32, and `offsets` (S+1,) int64 with offsets[0] == 0 and offsets[-1] == N, so that sample s is
logp[offsets[s]:offsets[s+1]]. Prompts, padding and packing are gone by then, so no window can cross two samples.
A conversation is one sample: windows run across its turns. Arithmetic inside is float64 (N numbers: cheap).

This file needs only torch and can be copied into any other code base. `python bft.py` prints a worked example. Checks:
tests/test_bft.py (loops after these equations, which share no code with it), bench/authors.py (the authors' own code).
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------------------------------------
# The ragged layout

def _samples(logp, offsets):
    """Each token's number, and that of its sample: (N,) each."""
    token = torch.arange(len(logp), device=logp.device)
    ends = offsets[1:].to(logp.device, non_blocking=True)             # exclusive: at t = end the next sample begins
    return token, torch.searchsorted(ends, token, right=True)


def _bounds(logp, offsets):
    """Each token's number, that of its sample, and where this sample begins and ends (exclusive): (N,) each."""
    offsets = offsets.to(logp.device, non_blocking=True)
    token, sample_index = _samples(logp, offsets)
    return token, sample_index, offsets[sample_index], offsets[1:][sample_index]


# ---------------------------------------------------------------------------------------------------------------------
# The two confidences. "Confidence" is the probability of the target token (not DeepConf's mean top-k log-prob).

def group_confidence(logp, offsets, group_size=256):
    """C_b, the minimum group confidence of each sample (arXiv 2511.21075 v1/v2): (S,) float64.

        C_b = min over windows of exp( (1/g) sum_{t in window} log p_t )

    over every *full* window of g = group_size consecutive response tokens, stride 1; a sample shorter than g has one
    window, all its tokens. The mean is geometric, as in the authors' released code (whose README speaks of a mean).
    Their exponent gamma (default 1) is left out. An empty sample gets 1, so that its weight 1 - C_b is 0.

    logp: (N,) log-probs of the response tokens; no gradient flows back to them. offsets: (S+1,) int64.
    Raises ValueError as `token_weights` does.
    """
    _check(logp, offsets, group_size)
    token, sample_index, first, end_of_sample = _bounds(logp, offsets)  # (N,) each
    # After a -inf in the running sum every difference would be NaN.
    total = logp.detach().double().clamp(min=-1e6).cumsum(0)
    total = F.pad(total, (1, 0))                                      # (N+1,) total[j] - total[i] sums tokens i..j-1
    # Each token has a window: the g tokens from it on, or the sample's last g, or all of a shorter sample.
    end = torch.minimum(token + group_size, end_of_sample)
    start = torch.maximum(end - group_size, first)
    mean_logp = (total[end] - total[start]) / (end - start)           # (N,); log p <= 0, so 0 is neutral below
    lowest = mean_logp.new_zeros(len(offsets) - 1).scatter_reduce(0, sample_index, mean_logp, "amin")  # (S,)
    return lowest.exp()


def local_confidence(logp, offsets, group_size=256):
    """c_t, the local confidence of each token (arXiv 2511.21075 v3, restated in PertMind, appendix A.2): (N,) float64.

        c_t = arithmetic mean of p over [t - g//2, t - g//2 + g - 1], cut off at the sample's ends

    and divided by the number of tokens really in the window. Where an even window is centred is our reading.
    Arguments, gradient and errors: as `group_confidence`.
    """
    _check(logp, offsets, group_size)
    token, _, first, end_of_sample = _bounds(logp, offsets)           # (N,) each
    total = F.pad(logp.detach().double().exp().cumsum(0), (1, 0))     # (N+1,)
    left = token - group_size // 2
    start, end = torch.maximum(left, first), torch.minimum(left + group_size, end_of_sample)
    return (total[end] - total[start]) / (end - start)


# ---------------------------------------------------------------------------------------------------------------------
# The weights. An objective is two of these functions, Tokens -> weights, and an average: a row of the table.

class Tokens(NamedTuple):
    """What a weighting may look at: the N response tokens of S samples. No gradient flows through it."""
    logp: torch.Tensor                                                # (N,) log p_t, float64
    offsets: torch.Tensor                                             # (S+1,)
    group_size: int
    extra: dict                                                       # {name: (N,) float64} of the objective's `needs`


def every_token_1(tokens):
    """w_t = 1."""
    return torch.ones_like(tokens.logp)                               # (N,)


def token_probability(tokens):
    """w_t = p_t (DFT, arXiv 2508.05629; BFT v1/v2)."""
    return tokens.logp.exp()                                          # (N,)


def relative_probability(tokens, eps=1e-8):
    """w_t = clip(p_t / (c_t + eps), 0, 1) (BFT v3)."""
    c = local_confidence(tokens.logp, tokens.offsets, tokens.group_size)  # (N,)
    return (tokens.logp.exp() / (c + eps)).clamp(0, 1)                # (N,)


def every_sample_1(tokens):
    """s_b = 1."""
    return tokens.logp.new_ones(len(tokens.offsets) - 1)              # (S,)


def group_difficulty(tokens):
    """s_b = 1 - C_b (BFT v1/v2)."""
    return 1 - group_confidence(tokens.logp, tokens.offsets, tokens.group_size)  # (S,)


def local_difficulty(tokens):
    """s_b = 1 - min_t c_t (BFT v3)."""
    _, sample_index = _samples(tokens.logp, tokens.offsets)
    c = local_confidence(tokens.logp, tokens.offsets, tokens.group_size)  # (N,)
    return 1 - every_sample_1(tokens).scatter_reduce(0, sample_index, c, "amin")  # (S,); c <= 1, so 1 is neutral


class Objective(NamedTuple):
    token_weight: Callable                                            # Tokens -> (N,)  w_t
    sample_weight: Callable                                           # Tokens -> (S,)  s_b
    average: str                                                      # "tokens" or "samples"
    needs: tuple = ()                                                 # keys of DISTRIBUTION, or "ref_logp"


OBJECTIVES = {
    #                       token weight w_t      sample weight s_b  average
    "sft":        Objective(every_token_1,        every_sample_1,    "tokens"),
    "dft":        Objective(token_probability,    every_sample_1,    "tokens"),   # arXiv 2508.05629
    "bft":        Objective(token_probability,    group_difficulty,  "samples"),  # arXiv 2511.21075 v1/v2 and its code
    "bft-v3":     Objective(relative_probability, local_difficulty,  "samples"),  # v3, from a secondary source
    # ablations: one choice of BFT at a time
    "sft-sample": Objective(every_token_1,        every_sample_1,    "samples"),
    "bft-token":  Objective(token_probability,    every_sample_1,    "samples"),
    "bft-sample": Objective(every_token_1,        group_difficulty,  "samples"),
    "bft-tokavg": Objective(token_probability,    group_difficulty,  "tokens"),
}


# ---------------------------------------------------------------------------------------------------------------------
# The loss.

class Weights(NamedTuple):
    """The weights of N response tokens and S samples, without gradient, on the device of the log-probs."""
    token: torch.Tensor                                               # (N,) w_t, float64
    sample: torch.Tensor                                              # (S,) s_b, float64
    sample_index: torch.Tensor                                        # (N,) the number of each token's sample
    offsets: torch.Tensor                                             # (S+1,)
    average: str                                                      # the objective's


def weigh(logp, offsets, objective="bft", group_size=256, extra=None):
    """The weights that an objective gives: Weights. Call it, and `weighted_loss`, if you need them beside the loss.

    The stop-gradient of every equation is the detach() here (the confidences have one of their own for those who call
    them directly). Arguments and errors: as `token_weights`.
    """
    row = _row(objective)
    _check(logp, offsets, group_size)
    needed = _needed(row, objective, logp, extra or {})
    logp, offsets = logp.detach().double(), offsets.to(logp.device, non_blocking=True)
    _, sample_index = _samples(logp, offsets)
    tokens = Tokens(logp, offsets, group_size, needed)
    token_weight, sample_weight = row.token_weight(tokens), row.sample_weight(tokens)
    shapes = tuple(token_weight.shape), tuple(sample_weight.shape)
    expected = (len(logp),), (len(offsets) - 1,)
    if shapes != expected:
        raise ValueError(f"the weights of {objective!r} must be (N,) and (S,), {expected}; they are {shapes}")
    return Weights(token_weight.double(), sample_weight.double(), sample_index, offsets, row.average)


def token_weights(logp, offsets, objective="bft", group_size=256, extra=None):
    """The weight s_b * w_t of each response token, before averaging: (N,), detached, float32 (float64 if logp is).

    logp: (N,) log-probs of the response tokens, float32. offsets: (S+1,) int64; their values are checked where they lie
    on the CPU and nothing is being compiled.
    objective: a row of OBJECTIVES. group_size: g, in tokens. extra: {name: (N,)} of what the row needs, if anything.
    Raises ValueError for an unknown objective, group_size < 1, offsets that do not start at 0, fall, or do not end at
    N, and an extra that is missing or not (N,).
    """
    return _product(weigh(logp, offsets, objective, group_size, extra)).to(_precision(logp))


def objective_loss(logp, offsets, objective="bft", group_size=256, denominator=None, extra=None):
    """The loss of one call's share of the global batch: a scalar in the dtype of `token_weights`.

    denominator: N (average "tokens") or B (average "samples") of the *global* batch, a number or a 0-d tensor; None
    means that of this call. Losses of micro-batches that share one denominator add up to the loss of the whole batch.
    Samples without response tokens contribute nothing; a call with none at all is a zero that backward() accepts.
    Other arguments and errors: as `token_weights`; also ValueError for a number as denominator that is not positive.
    """
    return weighted_loss(logp, weigh(logp, offsets, objective, group_size, extra), denominator)


def weighted_loss(logp, weights, denominator=None):
    """`objective_loss` with the weights that `weigh` has made of the same log-probs."""
    if denominator is not None and not isinstance(denominator, torch.Tensor) and not denominator > 0:
        what = "samples" if weights.average == "samples" else "response tokens"
        raise ValueError(f"denominator must be the global batch's number of {what}, above 0; it is {denominator!r}")
    if len(logp) == 0:
        return logp.sum().to(_precision(logp))
    weight = _product(weights)                                        # (N,) s_b * w_t, no gradient
    n = weights.offsets.diff()                                        # (S,) n_b
    # "samples" divides twice: here each sample by its n_b, below their sum by B. "tokens" divides once, by N.
    if weights.average == "samples":
        weight = weight / n[weights.sample_index]
    if denominator is None:
        denominator = _count(weights.average, n)
    return -((weight * logp.double()).sum() / denominator).to(_precision(logp))


def global_denominator(objective, response_lengths):
    """What the global batch's loss is divided by: N for the average "tokens", B for "samples".

    response_lengths: n_b of every sample of the global batch; those with n_b = 0 do not count in B. A list gives an
    int, a tensor a 0-d tensor on its device. Raises ValueError for an unknown objective.
    """
    return _count(_row(objective).average, response_lengths)


def _count(average, response_lengths):
    by_samples = average == "samples"
    if isinstance(response_lengths, torch.Tensor):
        return (response_lengths > 0).sum() if by_samples else response_lengths.sum()
    return sum(n > 0 for n in response_lengths) if by_samples else sum(response_lengths)


def loss_from_logits(logits, labels, objective="bft", group_size=256, denominator=None, extra=None):
    """`objective_loss` in Hugging Face's convention, for other people's training loops.

    logits: (B, T, V), any float dtype. labels: (B, T) int64, aligned with the inputs (shifted here), -100 is ignored.
    One row is one sample: do not pack. extra: {name: (B, T)}, aligned with labels, of what the objective needs and
    logits do not tell: `ref_logp`. Raises ValueError for shapes that do not fit, and as `objective_loss`.
    """
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(f"logits must be (B, T, V) and labels (B, T); they are {tuple(logits.shape)} "
                         f"and {tuple(labels.shape)}")
    extra = extra or {}
    for name, values in extra.items():
        if values.shape != labels.shape:
            raise ValueError(f"extra[{name!r}] must be (B, T) = {tuple(labels.shape)}; it is {tuple(values.shape)}")
    labels = labels[:, 1:]                                            # logits at t predict the token at t + 1
    response = labels != -100                                         # (B, T-1)
    logits = logits[:, :-1][response].to(_precision(logits))          # (N, V) row by row: the ragged order
    logp = -F.cross_entropy(logits, labels[response], reduction="none")  # (N,)
    offsets = F.pad(response.sum(1).cumsum(0), (1, 0))                # (B+1,)
    extra = {name: values[:, 1:][response] for name, values in extra.items()}   # (N,) each
    functions = distribution_needs(objective)
    if functions:
        with torch.no_grad():
            log_p = logits.log_softmax(-1)                            # (N, V)
            extra |= {name: function(log_p) for name, function in functions.items()}
    return objective_loss(logp, offsets, objective, group_size, denominator, extra)


# ---------------------------------------------------------------------------------------------------------------------
# What an objective may need beside p_t: functions of the model's whole distribution at a token, (n, V) log-probs,
# float32 or more -> (n,). They are computed from the logits, and only if the objective needs them. There is one more,
# `ref_logp`: log p_t under the weights that the training started from.

def entropy(log_p):
    """H = -sum_v p_v log p_v, in nats."""
    return torch.special.entr(log_p.exp()).sum(-1)


def collision(log_p):
    """sum_v p_v^2, the probability that two draws are the same token."""
    return log_p.exp().square().sum(-1)


def top20_entropy(log_p):
    """The entropy of the 20 likeliest tokens, their probabilities divided by their sum."""
    top = log_p.topk(min(20, log_p.shape[-1])).values                 # (n, 20)
    return entropy(top.log_softmax(-1))


DISTRIBUTION = {"entropy": entropy, "collision": collision, "top20_entropy": top20_entropy}


def distribution_needs(objective):
    """{name: function} of DISTRIBUTION that an objective needs. Raises ValueError for an unknown objective."""
    return {name: DISTRIBUTION[name] for name in _row(objective).needs if name in DISTRIBUTION}


# ---------------------------------------------------------------------------------------------------------------------

def _product(weights):
    return weights.sample[weights.sample_index] * weights.token       # (N,) s_b * w_t, float64


def _row(objective):
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; there are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective]


def _needed(row, objective, logp, extra):
    """Of the extras those that a row needs, (N,) float64 each."""
    for name in row.needs:
        if name not in extra:
            raise ValueError(f"objective {objective!r} needs extra[{name!r}], {len(logp)} numbers; there are "
                             f"{', '.join(extra) or 'none'}")
        if extra[name].shape != logp.shape:
            raise ValueError(f"extra[{name!r}] must be (N,) = {tuple(logp.shape)}; it is {tuple(extra[name].shape)}")
    return {name: extra[name].detach().to(logp.device).double() for name in row.needs}


def _precision(x):
    return torch.promote_types(x.dtype, torch.float32)                # nothing is rounded to half precision


def _check(logp, offsets, group_size):
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1; it is {group_size}")
    if logp.dim() != 1 or offsets.dim() != 1 or len(offsets) == 0:
        raise ValueError(f"logp must be (N,) and offsets (S+1,); they are {tuple(logp.shape)} and "
                         f"{tuple(offsets.shape)}")
    if offsets.is_cuda or torch.compiler.is_compiling():              # looking at the values would synchronise
        return
    if offsets[0] != 0 or offsets[-1] != len(logp) or (offsets.diff() < 0).any():
        fall = next((f", falling from {a} to {b}" for a, b in itertools.pairwise(offsets.tolist()) if b < a), "")
        raise ValueError(f"offsets must start at 0, never fall and end at N = {len(logp)}; they go from {offsets[0]} "
                         f"to {offsets[-1]}{fall}")


# ---------------------------------------------------------------------------------------------------------------------
# Beside the loss

def sample_sums(values, offsets):
    """The sum of each sample's values, (N,) in the ragged layout: (S,) float64. Nothing is checked."""
    _, sample_index = _samples(values, offsets)
    return values.new_zeros(len(offsets) - 1, dtype=torch.float64).index_add(0, sample_index, values.double())


def worked_example(names=None):
    """Six tokens and the rows of the table with these names (None: all), as text: each number can be had with a pocket
    calculator."""
    p, offsets, g = torch.tensor([0.9, 0.8, 0.1, 0.5, 0.6, 0.9], dtype=torch.float64), torch.tensor([0, 4, 6]), 3
    logp, n = p.log().requires_grad_(), offsets.diff()                # n_b = 4 and 2
    rows = {name: OBJECTIVES[name] for name in names or OBJECTIVES}
    needs = dict.fromkeys(need for row in rows.values() for need in row.needs)
    # In this vocabulary there are three tokens, and the two others are equally likely.
    log_p = torch.stack((p, (1 - p) / 2, (1 - p) / 2), 1).log()       # (6, 3)
    extra = {name: DISTRIBUTION[name](log_p) for name in needs if name in DISTRIBUTION}
    extra["ref_logp"] = torch.tensor([0.9, 0.6, 0.3, 0.5, 0.3, 0.8], dtype=torch.float64).log()
    lines = [f"Two samples, of the tokens 1 to 4 and 5 to 6; groups of g = {g}, so that the second is one group.", "",
             f"{'token':24s}" + "".join(f"{t:9d}" for t in range(1, 7))]

    def show(name, values):
        lines.append(f"{name:24s}" + "".join(f"{v:9.4f}" for v in values.tolist()))

    show("p_t", p)
    show("l_t = -log p_t", -logp)
    show("C_b", group_confidence(logp, offsets, g).repeat_interleave(n))
    show("c_t", local_confidence(logp, offsets, g))
    for need in needs:
        show(need, extra[need])
    for name, row in rows.items():
        weights = weigh(logp, offsets, name, g, extra)
        loss = weighted_loss(logp, weights)
        gradient, = torch.autograd.grad(loss, logp)                   # d loss / d log p_t
        divisor = "6 tokens" if row.average == "tokens" else "n_b / 2 samples"
        lines += ["", f"{name}: loss {loss:.4f} = sum of s_b w_t l_t / {divisor}"]
        show("  w_t", weights.token)
        show("  s_b", weights.sample.repeat_interleave(n))
        show("  d loss / d logit", gradient * (1 - p))                # d log p_t / d logit of token t = 1 - p_t
    if any(need in DISTRIBUTION for need in needs):
        lines += ["", "The vocabulary has three tokens here: the two others share 1 - p_t evenly."]
    return "\n".join([*lines, "", "The logit is that of the token itself: -s_b w_t (1 - p_t), divided as the loss is."])


if __name__ == "__main__":
    print(worked_example())
