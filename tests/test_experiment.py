"""The default job: many trainings from several bases, what is read off their curves, and its pictures."""

import itertools
import json
import math
import re
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
    seen, choice_items, loaded, load_weights = [], train.choice_items, [], train.load_weights
    monkeypatch.setattr(train, "load_weights", lambda path: loaded.append(str(path)) or load_weights(path))
    for out in ("b", "a"):
        seen.clear()
        monkeypatch.setattr(train, "choice_items", lambda model, tokenizer, items, dtype: seen.append(
            [x.get("planted") for x in items]) or choice_items(model, tokenizer, items, dtype))
        assert call(monkeypatch, *small, "--out", out) == 0
    printed = capsys.readouterr().out
    assert printed.count("2 steps; nothing to do") == 2                   # the second time the bases were there
    assert printed.index("learn fewer novel facts") < printed.index("from step 0")   # predicted before training
    assert "lr 0.002  bft" in printed and "from step 0 to 2" in printed and printed.count("step 2/2") == 2   # only bases say more
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
    rows, items = list(read_jsonl(ASSETS / "finetune.jsonl")), load_choice(ASSETS / "choice.jsonl")
    planted = {seed: [x.get("planted") for x in train.plant(rows, items, seed)[1]] for seed in (0, 5)}
    assert seen == [planted[0]] * 5 + [planted[5]] * 5 and planted[0] != planted[5]
    configs = {name: json.loads((tmp_path / "a" / name / "config.json").read_text()) for name in runs}
    for name, config in configs.items():                                  # from the base of its seed
        assert loaded[loaded.index(f"a/{name}/model") - 1] == config["settings"]["init"] + "/model"
    assert len({config["settings"]["init"] for config in configs.values()}) == 2
    tokens = [config["sha256"]["tokens"] for config in configs.values()]
    assert len(set(tokens[:4])) == len(set(tokens[4:])) == 1 and tokens[0] != tokens[4]
    assert (tmp_path / "a" / "demo-frontier.png").exists() == ("matplotlib" in sys.modules)
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call(monkeypatch, *small, "--out", "a") == 0                   # and again: nothing is trained, nor drawn
    printed = capsys.readouterr().out
    assert table in printed and (tmp_path / "a" / "table.txt").read_text() == table
    assert 'No pictures: pictures need matplotlib' in printed and 'pip install -e ".[plot]"' in printed and "Tables and" in printed


def test_what_the_default_job_goes_over():
    grid = lambda *argv: train.parse_settings(list(map(str, argv)))[1]    # noqa: E731
    assert grid() == (list(train.SEEDS), list(train.LRS)) and len(train.SEEDS) >= 3 and len(train.LRS) >= 4
    assert grid("--quick") == ([0], list(train.LRS)) and grid("--quick", "--lrs", 1) == ([0], [1]) and grid("--seed", 4, "--lr", 1e-3) == ([4], [1e-3])
    assert grid("--seeds", 3, 1, 3, "--lrs", 0.5, 0.1) == ([1, 3], [0.1, 0.5])
    assert train.parse_settings([])[0].group_size == 16                   # it has defaults of its own
    for argv, words in ((["--data", "x", "--quick"], "default job's"), (["--init", "x", "--seeds", "1"], "default job's"),
                        (["--seed", "1", "--seeds", "2"], "both"), (["--lr", "1", "--lrs", "2"], "both"),
                        (["--quick", "--seeds", "1"], "both"), (["--quick", "--seed", "1"], "both"), (["--lrs", "1", "nan", "2"], "--lrs"),
                        (["--seeds", "-1"], "--seeds"), (["--lrs", "0"], "--lrs"), (["--lrs", "nan"], "--lrs"), (["--lrs", "inf"], "--lrs")):
        with pytest.raises(UserError, match=words):
            train.parse_settings(argv)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics

def test_interval_over_seeds():
    assert evaluation.seed_interval([1, 2, 3]) == pytest.approx((2, 2 - 4.303 / 3 ** 0.5, 2 + 4.303 / 3 ** 0.5))
    assert evaluation.seed_interval([7]) == (7, -math.inf, math.inf)
    for n, t in ((2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (6, 2.571), (7, 2.447), (8, 2.365), (9, 2.306), (10, 2.262),
                 (11, 2.228), (21, 2.086), (121, 1.980)):                 # any table of Student's t
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
    # y is x/2 up to 0.2 and then steeper, by x - 0.2 more at x: 0 up to 0.2, then on average 0.08 more up to 0.9 x 0.4.
    gap = evaluation.frontier_gap([0, 0.2, 0.4], [0, 0.1, 0.4], [0, 0.4], [0, 0.2])
    assert gap == pytest.approx(0.08 * 0.16 / 0.36, rel=1e-3) == -evaluation.frontier_gap([0, 0.4], [0, 0.2], [0, 0.2, 0.4], [0, 0.1, 0.4])
    # What comes after the highest point, and beyond the other's, does not count.
    assert evaluation.frontier_gap([0, 0.2, 0.4, 0.1], [0, 0.1, 0.4, 1], [0, 0.4, 0.9], [0, 0.2, 1]) == pytest.approx(gap)
    assert evaluation.frontier_gap([0, 0.2, 0.4], [0, 0.1, 0.4], [0, 0.4, 0.1], [0, 0.2, 1]) == pytest.approx(gap)
    assert math.isnan(evaluation.frontier_gap([0.3, 0.2], [0, 0.1], [0.3, 0.4], [0, 0.2]))


def job(objectives, numbers, seeds=3, rates=2):
    """Results of a job; numbers(objective, seed, i-th learning rate or -1) -> {(stratum, measure): how many of 20 items,
    or for nll and planted_nll the value}."""
    models = []
    for name, s, i in [("base", s, -1) for s in range(seeds)] + list(itertools.product(objectives, range(seeds), range(rates))):
        given = numbers(name, s, i)
        items = [{"group": g, "acc": int(k < given[g, "acc"]), "nll": given[g, "nll"]} for g in evaluation.STRATA for k in range(20)]
        for k, x in enumerate(x for x in items if x["group"] == "planted"):
            x |= {"followed": int(k < given["planted", "followed"]), "planted_nll": given["planted", "planted_nll"]}
        models.append({"objective": name, "seed": s, "lr": 0.1 * (i + 1), "items": items})
    gradient = {"p": [0.005, 0.5], "C": [0.2, 0.2], "sft": [0.995, 0.5], "bft": [0.004, 0.2]}
    return {"objectives": list(objectives), "seeds": list(range(seeds)), "lrs": [0.1 * (i + 1) for i in range(rates)],
            "models": models, "gradient": gradient}


def simple(novel, followed, seeds=3):
    """Each seed adds one to the wrong labels; all else is the same for all."""
    def numbers(name, s, i):
        same = {(g, m): 10 if m == "acc" else 1.0 for g in evaluation.STRATA for m in ("acc", "nll")}
        return {**same, evaluation.NOVEL: 5 if i < 0 else novel[name][i], evaluation.FOLLOWED: 0 if i < 0 else followed[name][i] + s,
                ("planted", "planted_nll"): 4.0}
    return job(novel, numbers, seeds, len(next(iter(novel.values()))))


def verdicts(text, x):
    block = text.split(f"at equal {x}")[1].split("\n\n")[0].splitlines()[2:]
    return {line.split()[0]: line for line in block}


def test_verdicts_are_computed_from_intervals():
    novel = {"bft": [8, 12], "sft": [10, 15], "bft-v3": [10, 15], "bft-token": [4, 3], "sft-sample": [10, 15]}
    followed = {"bft": [1, 2], "sft": [6, 12], "bft-v3": [9, 17], "bft-token": [1, 2], "sft-sample": [6, 12]}
    text = evaluation.findings(simple(novel, followed))                   # sft is what is compared with, wherever it stands
    row = verdicts(text, "accuracy on novel facts")
    # sft has (6 + s) / 5 wrong labels for each fact above 5, bft (1 + s) / 3 and then 1/4; compared up to 5 + 0.9 x 7.
    gaps, xs = [], 5 + 0.9 * 7 * (np.arange(50) + 0.5) / 50
    for s in range(3):
        gaps.append(np.mean(np.interp(xs, [5, 8, 12], [0, 1 + s, 2 + s]) - np.interp(xs, [5, 10, 15], [0, 6 + s, 12 + s])) / 20)
    mean, low, high = evaluation.seed_interval(gaps)
    assert high < 0 and f"{mean * 100:+.1f} [{low * 100:.1f},{high * 100:.1f}]  yes, better" in row["bft"]
    assert row["bft"].split()[1:3] == ["25-56%", "60%"] and "sft reaches 75%" in text
    assert "yes, worse" in row["bft-v3"] and "cannot tell" in row["sft-sample"] and row["bft-token"].count("no gap") == 2
    assert verdicts(text, "NLL of novel facts")["bft"].count("no gap") == 2   # which nothing here changes
    assert "No table at equal novel accuracy" in text                     # bft-token never gets above the base
    held = text.split("PREDICTIONS")[1]
    assert f"bft held ({mean * 100:+.0f} [{low * 100:.0f},{high * 100:.0f}])" in held.split("At equal novel accuracy")[1]
    assert "bft held (-12 [-12,-12])" in held and "bft-v3 open (+0 [0,0])" in held   # novel: -2/20 and -3/20
    assert "bft-v3 failed (+20" in held and "sft-sample held (+0 [0,0])" in held
    del novel["bft-token"], followed["bft-token"]
    followed["sft-sample"] = [12, 19]
    text = evaluation.findings(simple(novel, followed))
    assert "AT EQUAL NOVEL ACCURACY: 56%," in text and "sft-sample failed (+" in text
    for s in (1, 2):
        few = evaluation.findings(simple(novel, followed, seeds=s))
        assert "yes" not in few and "cannot tell" in few and "They need three seeds" in few and ("One seed" in few) == (s == 1)
    alone = evaluation.findings(simple({"dft": [10]}, {"dft": [6]}))
    assert "frontier?" not in alone and "AT EQUAL NOVEL ACCURACY: 48%" in alone


def test_every_cell_is_what_it_says():
    rng, names, drawn = np.random.RandomState(3), ["sft", "a-long-name-of-a-fork", "bft"], {}

    def numbers(name, s, i):
        strata = evaluation.STRATA
        drawn[name, s, i] = {**{(g, "acc"): rng.randint(6, 18) for g in strata}, **{(g, "nll"): rng.uniform(0.5, 4) for g in strata},
                             ("planted", "followed"): rng.randint(3, 12), ("planted", "planted_nll"): rng.uniform(4, 5)}
        drawn[name, s, i]["novel", "acc"] = 4 + 2 * (i + 1) + rng.randint(0, 3) - 4 * (i == 2 and name == "bft")   # a peak before it
        return drawn[name, s, i]

    text = evaluation.findings(job(names, numbers, seeds=3, rates=3))
    at = lambda name, s, i: drawn["base" if i < 0 else name, s, i]        # noqa: E731
    lost = lambda name, s, i: sum(at(name, s, -1)[g, "acc"] - at(name, s, i)[g, "acc"] for g in evaluation.STRATA[4:]) / 40   # noqa: E731

    def t(values):
        mean = sum(values) / 3
        half = 4.303 * (sum((v - mean) ** 2 for v in values) / 2) ** 0.5 / 3 ** 0.5
        return mean, mean - half, mean + half

    def cells(line):
        return [tuple(float(v) for v in re.findall(r"-?[\d.]+", cell)) for cell in re.findall(r"[+-]?[\d.]+ \[[^]]*\]", line)]

    def close(cell, expected, scale, digits):
        assert cell == pytest.approx([v * scale for v in expected], abs=0.51 * 10 ** -digits), (cell, expected)

    triples = text.split("FRONTIER")[1].splitlines()[2:5]
    for name, line in zip(names, triples):
        assert line.startswith(name)
        for i, cell in enumerate(re.findall(r"(-?\d+) / (-?\d+) / (-?\d+)", line)):
            means = [np.mean([at(name, s, i - 1)["novel", "acc"] / 20 for s in range(3)]),
                     np.mean([at(name, s, i - 1)["planted", "followed"] / 20 for s in range(3)]), np.mean([lost(name, s, i - 1) for s in range(3)])]
            close([float(v) for v in cell], means, 100, 0)
    mean_novel = {name: [np.mean([at(name, s, i)["novel", "acc"] / 20 for s in range(3)]) for i in range(-1, 3)] for name in names}
    base = mean_novel["sft"][0]
    level = base + 0.9 * (min(max(m) for m in mean_novel.values()) - base)
    assert f"AT EQUAL NOVEL ACCURACY: {level:.0%}" in text
    place = {}
    for name, m in mean_novel.items():
        i = next(i for i in range(3) if m[i] < level <= m[i + 1])
        place[name] = (i, (level - m[i]) / (m[i + 1] - m[i]))
    middle = {"base": (0, 0), **{name: (2, 0) for name in names}}
    for heading, places in (("AT EQUAL NOVEL", place), ("AT AN EQUAL LEARNING RATE, the middle one, 0.2", middle)):
        block, values = text.split(heading)[1].split("\n\n")[0].splitlines(), {}
        shares = [*((g, "acc") for g in evaluation.STRATA[:4]), ("planted", "followed"), *((g, "acc") for g in evaluation.STRATA[4:])]
        for first, keys, scale, digits in ((3, shares, 100, 0), (3 + len(places) + 2 + 2, [(g, "nll") for g in evaluation.STRATA], 1, 2)):
            for k, (name, (i, f)) in enumerate(places.items()):
                line = block[first + k]
                assert line.startswith(name) and float(line[len(name):].split()[0]) == pytest.approx(0.1 * (i + f), rel=0.06)
                assert len(cells(line)) == len(keys)
                for key, cell in zip(keys, cells(line)):
                    of = 20 if digits == 0 else 1
                    v = [at(name, s, i - 1)[key] / of * (1 - f) + (at(name, s, i)[key] / of * f if f else 0) for s in range(3)]
                    values[name, key] = v
                    mean, low, high = t(v)
                    if digits == 0:
                        w = evaluation.wilson(mean, 20)
                        low, high = max(0, min(low, w[0])), min(1, max(high, w[1]))
                    close(cell, (mean, low, high), scale, digits)
            for k, name in enumerate(names[1:]):
                line = block[first + len(places) + k]
                assert line.startswith(f"{name} - sft")
                for key, cell in zip(keys, cells(line)):
                    close(cell, t([a - b for a, b in zip(values[name, key], values["sft", key])]), scale, digits)
    by_nll = verdicts(text, "NLL of novel facts")["bft"]
    path = lambda name, key, s: [at(name, s, i)[key] for i in range(-1, 3)]   # noqa: E731
    gaps = [evaluation.frontier_gap([-v for v in path("bft", ("novel", "nll"), s)], [lost("bft", s, i) for i in range(-1, 3)],
                                    [-v for v in path("sft", ("novel", "nll"), s)], [lost("sft", s, i) for i in range(-1, 3)]) for s in range(3)]
    if not any(map(math.isnan, gaps)):
        close(cells(by_nll)[-1], t(gaps), 100, 1)
    losses = t([np.mean([lost("bft", s, i) - lost("sft", s, i) for i in range(3)]) for s in range(3)])
    close(cells(text.split("they lose less of the held-out facts.")[1].splitlines()[1])[0], losses, 100, 0)
    assert f"wrong label {np.mean([at('sft', s, -1)['planted', 'planted_nll'] for s in range(3)]):.1f}." in text


# ---------------------------------------------------------------------------------------------------------------------
# Gradients

def test_gradients_are_the_theory():
    model, rng = tiny(1, std=0.5), np.random.RandomState(0)
    samples = []
    for n in (9, 30, 17):
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
    for low, high, line in zip(evaluation.P_EDGES, evaluation.P_EDGES[1:], lines[4:]):
        inside = (low <= p) & (p < high)
        assert line.startswith(f"{low:g} to {high:g}") and f"{inside.mean():.1%}" in line
        if inside.any():
            sft = np.array(found["sft"])
            assert f"{sft[inside].mean():.3f} ({(1 - p[inside]).mean():.3f})" in line
            assert f"{sft[inside].sum() / sft.sum():.0%}" in line
            dft, C = np.array(found["bft"]), np.array(found["C"])
            assert f"{dft[inside].mean():.3f} ({((1 - C) * p * (1 - p))[inside].mean():.3f}){dft[inside].sum() / dft.sum():5.0%}" in line
    thirds = lines[lines.index(next(x for x in lines if "bft, by" in x)) + 2:]
    cuts = sorted(C)[len(C) // 3], sorted(C)[2 * len(C) // 3]
    for low, high, line in zip(evaluation.P_EDGES, evaluation.P_EDGES[1:], thirds):
        found_cells = re.findall(r"-|[\d.]+ \([\d.]+\)", line[12:])
        for cell, inside in zip(found_cells, (C < cuts[0], (C >= cuts[0]) & (C < cuts[1]), C >= cuts[1])):
            inside = inside & (low <= p) & (p < high)
            theory = ((1 - C) * p * (1 - p))[inside]
            assert cell == (f"{dft[inside].mean():.4f} ({theory.mean():.4f})" if inside.any() else "-")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def test_pictures_show_what_was_measured(tmp_path, monkeypatch, capsys):
    plt = pytest.importorskip("matplotlib.pyplot")
    results = simple({"sft": [10, 15], "bft": [8, 12]}, {"sft": [6, 12], "bft": [1, 2]})
    for m in results["models"]:                                           # a tenth of the held-out is lost each time
        for x in m["items"]:
            x["acc"] = x["acc"] if "held" not in x["group"] else int(m["lr"] == 0)
    figure = evaluation.draw_frontier(plt, results)
    right = {line.get_label(): line for line in figure.axes[1].get_lines()}
    assert right["bft"].get_xydata().tolist() == [[25, 0], [40, 100], [60, 100]]
    gradient = {"p": [0.1, 0.6], "C": [0.5, 0.5], "sft": [0.9, 0.4], "bft": [0.045, 0.12], "new": [1.0, 2.0]}
    figures = evaluation.draw_gradient(plt, gradient).axes
    for ax, name in zip(figures, ("sft", "bft", "new")):
        assert ax.get_title() == name and ax.collections[0].get_offsets().tolist() == pytest.approx(np.array([*zip(gradient["p"], gradient[name])]))
        for line in ax.get_lines():
            p = line.get_xdata()
            assert line.get_ydata() == pytest.approx(1 - p if name == "sft" else 0.5 * p * (1 - p))
    assert [len(ax.get_lines()) for ax in figures[:3]] == [1, 3, 0]
    left = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert left["bft"].get_xydata().tolist() == pytest.approx(np.array([[25, 0], [40, 10], [60, 15]]))   # % of 20, mean of seeds
    assert left["sft"].get_xydata().tolist() == pytest.approx(np.array([[25, 0], [50, 35], [75, 65]]))
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "results.json").write_text(json.dumps(results))
    logs = {"x/sft": 3, "y/bft": 400}
    for name, steps in logs.items():
        (tmp_path / name).mkdir(parents=True)
        lines = [{"step": i + 1, "loss": 9, "nll": 2 - i / steps, "confidence": 0.5, "min_group_confidence": 0.1, "grad_norm": 1 + i} for i in range(steps)]
        lines += [{"step": 0, "val_nll": 2.5}, {"step": steps, "val_nll": 2.25}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = {name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in logs}
    figure = evaluation.draw_curves(plt, runs)
    assert [ax.get_ylabel().split(",")[0] for ax in figure.axes] == ["NLL", "mean confidence (p)", "mean minimum group confidence (C)", "gradient norm"]
    for ax, start in zip(figure.axes, (2, 0.5, 0.1, 1)):
        assert next(line for line in ax.get_lines() if line.get_label() == "x/sft").get_ydata()[0] == start
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
    for name in ("look-frontier.png", "look-gradient.png", "look-curves.png"):
        assert name in said.out and (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"look-frontier.png", "look-gradient.png", "look-curves.png"}
    (tmp_path / "x" / "dft").mkdir()
    (tmp_path / "x" / "dft" / "metrics.jsonl").write_bytes((tmp_path / "x" / "sft" / "metrics.jsonl").read_bytes())
    drawn = []
    monkeypatch.setattr(evaluation, "draw_curves", lambda plt, runs, draw=evaluation.draw_curves: drawn.append(list(runs)) or draw(plt, runs))
    assert command("x", "y", "--tasks", "plot")[0] == 0 and drawn == [["x/dft", "x/sft", "y/bft"]]   # what several objectives left
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text(json.dumps(results))
    code, said = command("job", "../" + tmp_path.name + "/other", "--tasks", "plot", "--out", "two")
    assert code == 0 and len({line for line in said.out.splitlines() if "two-" in line}) == 4
    whole = json.dumps(results)
    for broken in ("{}", "[]", '{"models": 3}', "no", whole.replace('"gradient": {', '"gradient": null, "x": {'), '"objectives": []'.join(
            whole.split('"objectives": ["sft", "bft"]')), whole.replace('"seeds": [0, 1, 2]', '"seeds": []')):
        assert broken != whole
        (tmp_path / "job" / "results.json").write_text(broken)
        code, said = command("job", "--tasks", "plot")
        assert code == 2 and said.err.startswith("error: job: ") and "Traceback" not in said.err
    with open(tmp_path / "x/sft/metrics.jsonl", "a") as f:
        f.write('{"step": 9, "los')                                       # a run that is writing just now
    assert command("x/sft", "--tasks", "plot")[0] == 0
    for broken in ("", '{"step": "a", "loss": 1, "nll": 2}\n', '{"loss": 1}\n'):
        (tmp_path / "x/sft/metrics.jsonl").write_text(broken)
        code, said = command("x/sft", "--tasks", "plot")
        assert code == 2 and said.err.startswith("error: x/sft: ")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, said = command("y/bft", "--tasks", "plot")
    assert code == 2 and 'pip install -e ".[plot]"' in said.err


def test_what_is_not_ours_is_not_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("notes.txt", "config.json", "results.json"):             # an evaluation's, of another program
        (tmp_path / name / "out").mkdir(parents=True)
        (tmp_path / name / "out" / name).write_text("mine")
        assert call(monkeypatch, "--quick", "--out", f"{name}/out") == 2
        assert "holds something else" in capsys.readouterr().err
        assert [p.name for p in (tmp_path / name / "out").iterdir()] == [name] and not (tmp_path / "runs").exists()
