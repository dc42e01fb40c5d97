"""Measured gradients are the theory, and their table says what was measured."""

import math
import re

import numpy as np
import pytest
import torch
from support import tiny
from test_bft import reference

import bft
from data import Sample
from experiment.gradient import P_EDGES, analyse_gradient, gradient_items
from experiment.report import render_gradient


@pytest.fixture(scope="module")
def model():
    return tiny(1, std=0.5)


@pytest.fixture(scope="module")
def samples():
    rng, samples = np.random.RandomState(0), []
    for n in (9, 30, 17):
        ids = rng.randint(0, 97, n)
        samples.append(Sample(ids, (np.arange(n) >= 3) & (np.arange(n) % 5 != 0), None, 1))
    return samples


@pytest.fixture(scope="module")
def found(model, samples):
    return gradient_items(model, samples, tuple(bft.OBJECTIVES), group_size=4)


def test_gradients_are_the_theory(model, samples, found):
    position = 0
    for sample in samples:
        with torch.no_grad():
            full = model(torch.from_numpy(sample.ids)[None])[0].log_softmax(-1)
        logp = [full[t - 1, sample.ids[t]].item() for t in range(len(sample.ids)) if sample.response[t]]
        p, n = np.exp(logp), len(logp)
        C = math.exp(min(sum(logp[i:i + 4]) / 4 for i in range(n - 3)))
        here = {key: values[position:position + n] for key, values in found.items()}
        assert here["p"] == pytest.approx(p, rel=1e-3) and here["C"] == pytest.approx([C] * n, rel=1e-3)
        for name, theory in (("sft", 1 - p), ("sft-sample", 1 - p), ("dft", p * (1 - p)), ("bft-token", p * (1 - p)),
                             ("bft", (1 - C) * p * (1 - p)), ("bft-sample", (1 - C) * (1 - p))):
            assert here[name] == pytest.approx(theory, rel=2e-3), name
        _, gradient, _ = reference([logp], "bft-v3", 4)                   # d loss / d log p, by loops
        assert here["bft-v3"] == pytest.approx([-g * n * (1 - q) for g, q in zip(gradient, p)], rel=2e-3)
        position += n
    assert position == len(found["p"])


def test_the_table_by_p(found):
    p, C, sft, of_bft = (np.array(found[key]) for key in ("p", "C", "sft", "bft"))
    theory = (1 - C) * p * (1 - p)
    lines = render_gradient(analyse_gradient(found))
    first = next(k for k, line in enumerate(lines) if line.startswith("0 to 0.01"))
    assert f"{len(p)} tokens" in lines[first - 3]
    blocks = [line.split()[2:] for line in lines if line.startswith("p ") and "tokens" in line]
    assert [name for block in blocks for name in block] == list(bft.OBJECTIVES) and max(map(len, blocks)) == 5
    for low, high, line in zip(P_EDGES, P_EDGES[1:], lines[first:]):
        inside = (low <= p) & (p < high)
        assert line.startswith(f"{low:g} to {high:g}") and f"{inside.mean():.1%}" in line
        if inside.any():
            assert f"{sft[inside].mean():.3f} ({(1 - p[inside]).mean():.3f})" in line
            assert f"{sft[inside].sum() / sft.sum():.0%}" in line
            assert f"{of_bft[inside].mean():.3f} ({theory[inside].mean():.3f}){of_bft[inside].sum() / of_bft.sum():5.0%}" in line


def test_the_table_of_bft_by_C(found):
    p, C, of_bft = (np.array(found[key]) for key in ("p", "C", "bft"))
    theory = (1 - C) * p * (1 - p)
    lines = render_gradient(analyse_gradient(found))
    thirds = lines[lines.index(next(line for line in lines if "bft, by" in line)) + 2:]
    cuts = sorted(C)[len(C) // 3], sorted(C)[2 * len(C) // 3]
    for low, high, line in zip(P_EDGES, P_EDGES[1:], thirds):
        cells = re.findall(r"-|[\d.]+ \([\d.]+\)", line[12:])
        assert len(cells) == 3
        for cell, inside in zip(cells, (C < cuts[0], (C >= cuts[0]) & (C < cuts[1]), C >= cuts[1])):
            inside = inside & (low <= p) & (p < high)
            expected = f"{of_bft[inside].mean():.4f} ({theory[inside].mean():.4f})" if inside.any() else "-"
            assert cell == expected
    without = {key: values for key, values in found.items() if key in ("p", "C", "sft")}
    assert not any("bft, by" in line for line in render_gradient(analyse_gradient(without)))
