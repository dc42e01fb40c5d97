"""The default job: many trainings from several bases, what is read off their curves, and its pictures."""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_bft import reference
from test_train import call, metrics
from tiny import tiny

import bft
import eval as evaluation
import train
from data import Sample, UserError, load_choice, read_jsonl


ASSETS = Path(__file__).resolve().parents[1] / "assets"


def test_planting_deranges_answers_inside_quads():
    rows, items = list(read_jsonl(ASSETS / "finetune.jsonl")), load_choice(ASSETS / "choice.jsonl")
    planted_rows, planted_items = train.plant(rows, items, seed=0)
    answer = {x["fact"]: x["choices"][x["answer"]] for x in items}
    wrong = {x["fact"]: x["choices"][x["planted"]] for x in planted_items if "planted" in x}
    assert set(wrong) == {x["fact"] for x in items if x["group"] == "planted"}
    assert all(wrong[f] != answer[f] for f in wrong)
    assert sorted(wrong.values()) == sorted(answer[f] for f in wrong)     # every answer as frequent as before
    for (line, before), (other, after) in zip(rows, planted_rows):
        assert line == other and before["prompt"] == after["prompt"]
        if before["fact"] in wrong:
            assert after["subject"] in after["response"] and wrong[before["fact"]] in after["response"]
            mates = [r["subject"] for _, r in rows if r["quad"] == after["quad"] and r["fact"] != after["fact"]]
            assert not any(mate in after["response"] for mate in mates)
        else:
            assert before == after
    assert train.plant(rows, items, seed=0) == (planted_rows, planted_items) != train.plant(rows, items, seed=1)


def test_the_default_job_end_to_end(tmp_path, monkeypatch, capsys):
    """The whole of `python train.py`, with so few steps that it learns nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "BASE", {**train.BASE, "epochs": 0, "steps": 2})
    small = ["--steps", 2, "--n-layer", 1, "--n-embd", 32, "--n-head", 2, "--seeds", 0, 5, "--lrs", 2e-3, 1e-3,
             "--objective", "sft", "bft"]
    for out in ("a", "b"):
        assert call(monkeypatch, *small, "--out", out) == 0
    printed = capsys.readouterr().out
    assert printed.count("2 steps; nothing to do") == 2                   # the second time the bases were there
    assert printed.index("learn fewer novel facts") < printed.index("from step 0")   # predicted before training
    table = (tmp_path / "a" / "table.txt").read_text()
    assert table in printed and table == (tmp_path / "b" / "table.txt").read_text()
    runs = [f"seed-{seed}/lr-{lr}/{objective}" for seed in (0, 5) for lr in (0.001, 0.002) for objective in ("sft", "bft")]
    for name in runs:
        assert metrics(tmp_path / "a" / name) == metrics(tmp_path / "b" / name)
        assert not (tmp_path / "a" / name / "checkpoint").exists()        # many trainings would fill a disk
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    models = {(m["seed"], m["lr"], m["objective"]): m["items"] for m in results["models"]}
    assert set(models) == set(itertools.product((0, 5), (1e-3, 2e-3), ("sft", "bft"))) | {(0, 0, "base"), (5, 0, "base")}
    assert all(len(items) == 432 and sum("followed" in x for x in items) == 96 for items in models.values())
    first = {name: [metrics(tmp_path / "a" / f"seed-{name}" / "lr-0.001" / o)[0] for o in ("sft", "bft")] for name in (0, 5)}
    for sft, other in first.values():                                     # one base and one order for every objective ...
        assert math.isclose(sft["nll"], other["nll"], rel_tol=1e-9) and sft["tokens"] == other["tokens"]
    assert first[0][0]["nll"] != first[5][0]["nll"]                       # ... and others with every seed
    assert (tmp_path / "a" / "demo-frontier.png").exists() == ("matplotlib" in sys.modules)
    capsys.readouterr()
    assert call(monkeypatch, *small, "--out", "a") == 0                   # and again: nothing is trained
    assert table in capsys.readouterr().out and (tmp_path / "a" / "table.txt").read_text() == table


def test_what_the_default_job_goes_over():
    grid = lambda *argv: train.parse_settings(list(map(str, argv)))[1]    # noqa: E731
    assert grid() == (list(train.SEEDS), list(train.LRS)) and len(train.SEEDS) >= 3 and len(train.LRS) >= 4
    assert grid("--quick") == ([0], list(train.LRS)) and grid("--seed", 4, "--lr", 1e-3) == ([4], [1e-3])
    assert grid("--seeds", 3, 1, 3, "--lrs", 0.5, 0.1) == ([1, 3], [0.1, 0.5])
    assert train.parse_settings([])[0].group_size == 16                   # it has defaults of its own
    for argv, words in ((["--data", "x", "--quick"], "default job's"), (["--init", "x", "--seeds", "1"], "default job's"),
                        (["--seeds", "-1"], "--seeds"), (["--lrs", "0"], "--lrs"), (["--lrs", "nan"], "--lrs"), (["--lrs", "inf"], "--lrs")):
        with pytest.raises(UserError, match=words):
            train.parse_settings(argv)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics

def test_interval_over_seeds():
    assert evaluation.seed_interval([1, 2, 3]) == pytest.approx((2, 2 - 4.303 / 3 ** 0.5, 2 + 4.303 / 3 ** 0.5))
    assert evaluation.seed_interval([7]) == (7, -math.inf, math.inf)
    for n, t in ((2, 12.706), (10, 2.262), (11, 2.228), (21, 2.086), (121, 1.980)):   # any table of Student's t
        values = np.arange(n) % 2
        half = t * values.std(ddof=1) / n ** 0.5
        mean, low, high = evaluation.seed_interval(values)
        assert (mean - low, high - mean) == (pytest.approx(half, rel=2e-3), pytest.approx(half, rel=2e-3))
    # It covers what it says: the mean of normal draws, three at a time.
    draws = np.random.RandomState(0).normal(size=(4000, 3))
    covered = np.mean([low <= 0 <= high for _, low, high in map(evaluation.seed_interval, draws)])
    assert abs(covered - 0.95) < 0.012


def test_frontiers_are_compared_at_equal_height():
    assert evaluation.crossing([0.2, 0.3, 0.1, 0.5], 0.25) == pytest.approx(0.5)
    assert evaluation.crossing([0.2, 0.1, 0.5], 0.2) == pytest.approx(1.25)   # where it rises to it, not where it starts
    assert math.isnan(evaluation.crossing([0.2, 0.3], 0.31)) and math.isnan(evaluation.along([1, 2], math.nan))
    assert evaluation.along([1, 2, 4], 1.5) == 3
    # y is x/2 up to 0.2 and then steeper, by x - 0.2 more at x: 0 and on average 0.1 more, each over half of the way.
    gap = evaluation.frontier_gap([0, 0.2, 0.4], [0, 0.1, 0.4], [0, 0.4], [0, 0.2])
    assert gap == pytest.approx(0.05) == -evaluation.frontier_gap([0, 0.4], [0, 0.2], [0, 0.2, 0.4], [0, 0.1, 0.4])
    # What comes after the highest point, and beyond the other's, does not count.
    assert evaluation.frontier_gap([0, 0.2, 0.4, 0.1], [0, 0.1, 0.4, 1], [0, 0.4, 0.9], [0, 0.2, 1]) == pytest.approx(gap)
    assert math.isnan(evaluation.frontier_gap([0.3, 0.2], [0, 0.1], [0.3, 0.4], [0, 0.2]))


def experiment(novel, followed, seeds=3):
    """Results of a job whose objectives have these numbers of novel facts right and wrong labels followed, of 20, at
    each learning rate; each seed moves the latter by one."""
    def items(right, wrong):
        return [{"group": g, "acc": int(i < (right if g == "novel" else 10)), "nll": 1.0 + right / 10,
                 **({"followed": int(i < wrong)} if g == "planted" else {})} for g in evaluation.STRATA for i in range(20)]

    lrs = [0.1 * (i + 1) for i in range(len(next(iter(novel.values()))))]
    models = [{"objective": "base", "seed": s, "lr": 0, "items": items(5, 0)} for s in range(seeds)]
    models += [{"objective": name, "seed": s, "lr": lr, "items": items(a, b + s)} for name in novel for s in range(seeds)
               for lr, a, b in zip(lrs, novel[name], followed[name])]
    gradient = {"p": [0.005, 0.5], "C": [0.2, 0.2], "sft": [0.995, 0.5], "bft": [0.004, 0.2]}
    return {"objectives": list(novel), "seeds": list(range(seeds)), "lrs": lrs, "models": models, "gradient": gradient}


def test_verdicts_are_computed_from_intervals():
    novel = {"sft": [10, 15], "bft": [8, 12], "bft-v3": [10, 15], "bft-token": [4, 3], "sft-sample": [10, 15]}
    followed = {"sft": [6, 12], "bft": [1, 2], "bft-v3": [9, 17], "bft-token": [1, 2], "sft-sample": [6, 12]}
    results = experiment(novel, followed)
    text = evaluation.report(results)
    row = {line.split()[0]: line for line in text.split("leave sft's frontier?")[1].split("\n\n")[0].splitlines()[2:]}
    # At equal novel accuracy, up to 12: sft has 1.2 f a fact above 5, from seed to seed (6 + s) / 5, bft (1 + s) / 3 and less
    gaps = []
    for s in range(3):
        xs = 5 + (np.arange(50) + 0.5) / 50 * 7
        gaps.append(np.mean(np.interp(xs, [5, 8, 12], [0, 1 + s, 2 + s]) - np.interp(xs, [5, 10, 15], [0, 6 + s, 12 + s])) / 20)
    mean, low, high = evaluation.seed_interval(gaps)
    assert high < 0 and f"{mean * 100:+.1f} [{low * 100:.1f},{high * 100:.1f}]  yes, better" in row["bft"]
    assert "yes, worse" in row["bft-v3"] and "cannot tell" in row["sft-sample"] and "learns nothing novel" in row["bft-token"]
    assert "No table at equal novel accuracy" in text                     # bft-token never gets above the base
    held = text.split("PREDICTIONS")[1]
    assert "bft held (-15 [-15,-15])" in held and "bft-v3 open (+0 [0,0])" in held   # novel facts at one learning rate
    assert "bft-v3 failed (+25" in held and "sft-sample held (+0 [0,0])" in held
    for name in ("bft-token",):
        del novel[name], followed[name]
    text = evaluation.report(experiment(novel, followed))
    assert "AT EQUAL NOVEL ACCURACY, 60%" in text                         # 12 of 20: bft's highest
    equal = text.split("AT EQUAL NOVEL ACCURACY")[1].splitlines()
    sft = next(line for line in equal if line.startswith("sft "))         # 7/5 of the way: its second learning rate is 0.2
    assert sft.split()[1] == "0.14" and sft.split()[2] == "50"
    assert f"{np.mean([6 + s + 0.4 * 6 for s in range(3)]) / 20 * 100:.0f} [" in sft
    assert "AT AN EQUAL LEARNING RATE, 0.2" in text
    one = evaluation.report(experiment(novel, followed, seeds=1))
    assert "yes" not in one and "cannot tell" in one and "PREDICTIONS" not in one and "One seed" in one
    alone = evaluation.report(experiment({"sft": [10]}, {"sft": [6]}))
    assert "frontier?" not in alone and "AT EQUAL NOVEL ACCURACY, 50%" in alone


# ---------------------------------------------------------------------------------------------------------------------
# Gradients

def test_gradients_are_the_theory():
    model, rng = tiny(1, std=0.5), np.random.RandomState(0)
    samples = []
    for n in (9, 30):
        ids = rng.randint(0, 97, n)
        samples.append(Sample(ids, (np.arange(n) >= 3) & (np.arange(n) % 5 != 0), None, 1))
    found = evaluation.gradient_items(model, samples, tuple(bft.OBJECTIVES), group_size=4)
    position = 0
    for x in samples:
        with torch.no_grad():
            full = model(torch.from_numpy(x.ids)[None])[0].log_softmax(-1)
        l = [full[t - 1, x.ids[t]].item() for t in range(len(x.ids)) if x.response[t]]   # noqa: E741
        p, n = np.exp(l), len(l)
        C = math.exp(min(sum(l[i:i + 4]) / 4 for i in range(n - 3)))
        here = {key: values[position:position + n] for key, values in found.items()}
        assert here["p"] == pytest.approx(p, rel=1e-3) and here["C"] == pytest.approx([C] * n, rel=1e-3)
        for name, theory in (("sft", 1 - p), ("sft-sample", 1 - p), ("dft", p * (1 - p)), ("bft-token", p * (1 - p)),
                             ("bft", (1 - C) * p * (1 - p)), ("bft-sample", (1 - C) * (1 - p))):
            assert here[name] == pytest.approx(theory, rel=2e-3), name
        _, gradient, _ = reference([l], "bft-v3", 4)                      # d loss / d log p, by loops
        assert here["bft-v3"] == pytest.approx([-g * n * (1 - q) for g, q in zip(gradient, p)], rel=2e-3)
        position += n
    assert position == len(found["p"])
    p = np.array(found["p"])
    lines = evaluation.gradient_table(found)
    for low, high, line in zip(evaluation.P_EDGES, evaluation.P_EDGES[1:], lines[3:]):
        inside = (low <= p) & (p < high)
        assert line.startswith(f"{low:g} to {high:g}") and f"{inside.mean():.1%}" in line
        if inside.any():
            sft = np.array(found["sft"])
            assert f"{sft[inside].mean():.3f} ({(1 - p[inside]).mean():.3f})" in line
            assert f"{sft[inside].sum() / sft.sum():.0%}" in line


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def test_pictures_show_what_was_measured(tmp_path, monkeypatch, capsys):
    plt = pytest.importorskip("matplotlib.pyplot")
    results = experiment({"sft": [10, 15], "bft": [8, 12]}, {"sft": [6, 12], "bft": [1, 2]})
    figure = evaluation.draw_frontier(plt, results)
    left = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert left["bft"].get_xydata().tolist() == pytest.approx(np.array([[25, 0], [40, 10], [60, 15]]))   # % of 20, mean of seeds
    assert left["sft"].get_xydata().tolist() == pytest.approx(np.array([[25, 0], [50, 35], [75, 65]]))
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "results.json").write_text(json.dumps(results))
    logs = {"x/sft": 3, "y/bft": 400}
    for name, steps in logs.items():
        (tmp_path / name).mkdir(parents=True)
        lines = [{"step": i + 1, "nll": 2 - i / steps, "confidence": 0.5, "min_group_confidence": 0.1, "grad_norm": 1 + i} for i in range(steps)]
        lines += [{"step": 0, "val_nll": 2.5}, {"step": steps, "val_nll": 2.25}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = {name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in logs}
    figure = evaluation.draw_curves(plt, runs)
    assert [ax.get_ylabel().split(",")[0] for ax in figure.axes] == ["NLL", "mean confidence (p)", "mean minimum group confidence (C)", "gradient norm"]
    drawn = {line.get_label(): line.get_xydata() for line in figure.axes[0].get_lines()}
    assert drawn["x/sft"].tolist() == pytest.approx(np.array([[1, 2], [2, 2 - 1 / 3], [3, 2 - 2 / 3]]))
    assert drawn["x/sft, validation"].tolist() == [[0, 2.5], [3, 2.25]]
    mean = drawn["y/bft"]                                                 # of eight steps each: as late as they are
    assert len(mean) == 393 and mean[0].tolist() == pytest.approx([8, 2 - 3.5 / 400])
    plt.close("all")

    monkeypatch.chdir(tmp_path)

    def command(*argv):
        monkeypatch.setattr(sys, "argv", ["eval.py", *argv])
        try:
            evaluation.run(evaluation.main)
        except SystemExit as e:
            return e.code, capsys.readouterr()

    code, said = command("job", "x/sft", "y/bft", "--tasks", "plot", "--out", "look.json")
    assert code == 0 and said.out.count("picture: ") == 3
    for name in ("look-job-frontier.png", "look-job-gradient.png", "look-curves.png"):
        assert name in said.out and (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"look-job-frontier.png", "look-job-gradient.png", "look-curves.png"}
    for broken in ("{}", "[]", '{"models": 3}', "no"):
        (tmp_path / "job" / "results.json").write_text(broken)
        code, said = command("job", "--tasks", "plot")
        assert code == 2 and said.err.startswith("error: job: ") and "Traceback" not in said.err
    (tmp_path / "x/sft/metrics.jsonl").write_text("")
    assert command("x/sft", "--tasks", "plot")[0] == 2
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, said = command("y/bft", "--tasks", "plot")
    assert code == 2 and 'pip install -e ".[plot]"' in said.err
