"""How hard each loss pushes a token, measured by autograd, beside the theory."""

import itertools
from typing import NamedTuple

import numpy as np
import torch

import bft
from runtime.device import autocast


@torch.no_grad()
def gradient_items(model, samples, objectives, group_size=256, dtype=torch.float32):
    """How hard each objective pushes each response token: {"p": (N,) p_t, "C": (N,) C_b of its sample, objective: (N,)
    |d loss / d logit| of the token's own logit in a batch of its sample alone, times n_b (both averages divide by it)}.

    By autograd through `bft.loss_from_logits`, and C by its definition, so that theory has something to be compared
    with: see THEORY. Over all logits absolute values add up to twice that.
    """
    device = next(model.parameters()).device
    pushes = {key: [] for key in ("p", "C", *objectives)}
    for sample in samples:
        ids = torch.from_numpy(sample.ids)[None].to(device)               # (1, T)
        is_response = torch.from_numpy(sample.response).to(device)
        labels = torch.where(is_response, ids, -100)
        with autocast(device, dtype):
            logits = model(ids).float()                                   # (1, T, V)
        at = (labels[0, 1:] != -100).nonzero()[:, 0]                      # (n_b,) what predicts the response tokens
        own_logits = (0, at, ids[0, at + 1])
        n = len(at)
        window = min(group_size, n)
        logp = logits.log_softmax(-1)[own_logits]                         # (n_b,)
        # The model that is looked at is the one that training starts from.
        reference = torch.zeros(ids.shape, device=device)                 # (1, T)
        reference[0, at + 1] = logp
        logp = logp.double().cpu().numpy()
        group_means = np.convolve(logp, np.full(window, 1 / window), "valid")
        pushes["p"] += np.exp(logp).tolist()
        pushes["C"] += [float(np.exp(group_means.min()))] * n
        for name in objectives:
            with torch.enable_grad():
                loss = bft.loss_from_logits(logits.requires_grad_(), labels, name, group_size,
                                            extra={"ref_logp": reference})
                gradient, = torch.autograd.grad(loss, logits)
            pushes[name] += (gradient[own_logits].abs() * n).tolist()
    return {key: [float(f"{v:.4g}") for v in values] for key, values in pushes.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The theory: |d loss / d logit| of a token by its p and its sample's C, where it is known without a measurement.

def push_of_sft(p, C):
    return 1 - p


def push_of_dft(p, C):
    return p * (1 - p)


def push_of_bft(p, C):
    return (1 - C) * p * (1 - p)


THEORY = {"sft": push_of_sft, "dft": push_of_dft, "bft": push_of_bft}


# ---------------------------------------------------------------------------------------------------------------------
# By bucket of p

P_EDGES = (0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1)


class Push(NamedTuple):
    """How hard an objective pushes the tokens of a bucket."""

    measured: float         # mean
    theory: float | None    # mean; None where we have no formula
    share: float            # of all that the objective pushes


class Bucket(NamedTuple):
    low: float              # p from here ...
    high: float             # ... to here
    share: float            # of all tokens
    pushes: dict            # {objective: Push}; empty where there is no token
    bft_by_C: list          # Push of bft for each third of C, None where there is no token; empty without bft


def analyse_gradient(gradient):
    """{"tokens": N, "objectives", "C_edges": the four ends of the thirds of C, "buckets": [Bucket]} of what
    `gradient_items` returns."""
    values = {key: np.array(column) for key, column in gradient.items()}
    names = [key for key in values if key not in ("p", "C")]
    C_edges = [0, *np.quantile(values["C"], (1 / 3, 2 / 3)), 1]
    bucket_of_token = np.digitize(values["p"], P_EDGES[1:-1])
    third_of_token = np.digitize(values["C"], C_edges[1:-1])
    buckets = []
    for number, (low, high) in enumerate(itertools.pairwise(P_EDGES)):
        inside = bucket_of_token == number
        pushes = {name: push_inside(values, name, inside) for name in names if inside.any()}
        bft_by_C = []
        if "bft" in names:
            bft_by_C = [push_inside(values, "bft", inside & (third_of_token == third)) for third in range(3)]
        buckets.append(Bucket(low, high, inside.mean(), pushes, bft_by_C))
    return {"tokens": len(values["p"]), "objectives": names, "C_edges": C_edges, "buckets": buckets}


def push_inside(values, name, inside):
    if not inside.any():
        return None
    theory = None
    if name in THEORY:
        theory = THEORY[name](values["p"], values["C"])[inside].mean()
    return Push(values[name][inside].mean(), theory, values[name][inside].sum() / values[name].sum())
