"""The benchmarks run and print what they promise; what they measure is no test."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from forked import forked


BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.slow
@pytest.mark.parametrize("script,rows", [
    # Attention in bfloat16 takes a CPU long.
    ("attention.py --dtype float32", ["Packing.attend", "length buckets", "padded rows", "block mask"]),
    ("loss.py", 2 * ["bft", "sft", "dft", "bft-v3", "bft and entropy", "bft and collision", "bft and top20_entropy",
                     "cross-entropy, all logits", "materialised BFT"]),
    ("train.py", ["ours", "transformers", "transformers, by length"]),
    ("generate.py", 2 * ["ours", "transformers"]),
    ("evaluate.py", 2 * ["ours", "products alone", "lm-eval"])])
def test_each_prints_its_table(script, rows):
    script, *flags = script.split()
    done = forked(1, BENCH / script, "--dry", *flags, path=())
    assert done.returncode == 0, done.stderr
    heading, *lines = done.stdout.splitlines()
    assert "torch" in heading and lines[0].startswith("$ python") and script in lines[0]
    found = [line.split("  ")[0] for line in done.stdout.split("Growth")[0].splitlines()]
    assert [name for name in found if name in rows] == rows and "time ratio" in done.stdout


@pytest.mark.slow
def test_the_precision_of_p_is_measured():
    done = forked(1, BENCH / "precision.py", "--dry", path=())
    assert done.returncode == 0, done.stderr
    rows = [re.split("  +", line.strip()) for line in done.stdout.splitlines()[3:]]
    errors = {name: [float(value.rstrip("%")) for value in values] for name, *values in rows}
    assert set(map(len, errors.values())) == {3} and len(errors) == 4
    # The common number spoils what is rounded, and nothing else.
    worst = [errors[name][2] for name in ("all logits rounded", "the target's logit in float32 (ours)")]
    assert worst[1] < worst[0] / 2 and errors["the head less its mean row"][2] < worst[0] / 2


THEIRS = '''
import not_installed


def bft_loss_func(outputs, labels, num_items_in_batch=None):
    total, g = 0.0, int(__import__("os").environ["BFT_GROUP_SIZE"])
    for logits, row in zip(outputs["logits"], labels):
        logp = [logits[t - 1].log_softmax(-1)[row[t]] for t in range(1, len(row)) if row[t] != -100]
        n = min(g, len(logp))
        means = [sum(logp[i:i + n]) / n for i in range(len(logp) - n + 1)] if logp else []
        C = min(means).exp().detach() if logp else 0
        total = total + (1 - C) * -sum(x.exp().detach() * x for x in logp) / max(1, len(logp))
    return total / len(labels)


def dft_loss_func(outputs, labels, num_items_in_batch=None):
    logp = outputs["logits"][:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None].clamp(min=0))[..., 0][labels[:, 1:] != -100]
    return -FACTOR * (logp.exp().detach() * logp).mean()
'''


@pytest.mark.slow
@pytest.mark.parametrize("factor, apart", [("1", "e-0"), ("1.01", "1.0e-02")])
def test_the_authors_losses_are_compared_with_ours(factor, apart, tmp_path):
    (tmp_path / "theirs.py").write_text(THEIRS.replace("FACTOR", factor))
    done = forked(1, BENCH / "authors.py", tmp_path / "theirs.py", "--batches", 3, path=())
    assert done.returncode == 0, done.stderr
    ours, dft, empty = done.stdout.splitlines()
    assert max(float(v) for v in re.findall(r"[\d.]+e-\d+", ours)) < 1e-5 and "0.800 of ours" in empty
    assert apart in dft and dft.count(apart) == 2


@pytest.mark.slow
def test_growth_has_a_row_for_each_size(monkeypatch, capsys):
    """Of each it asks a new process, which is a fork here."""
    monkeypatch.setattr(subprocess, "run", lambda command, **_: forked(1, *command[1:], path=()))
    monkeypatch.setattr(sys, "argv", ["growth.py", "--dry"])
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    runpy.run_path(str(BENCH / "growth.py"), run_name="__main__")
    samples, steps = capsys.readouterr().out.split("logged steps")
    assert [line.split()[0] for line in samples.splitlines()[4:6]] == [line.split()[0] for line in steps.splitlines()[1:]] == ["10", "40"]
