"""The default job in words: every number stands where its heading says, and a newcomer can read it."""

import re

import numpy as np
import pytest
from made_up_results import make_random_results, make_results, make_simple_results
from test_findings import BY_HAND, FOLLOWED_BY_HAND, NAMES, gaps_by_hand

from experiment.findings import FOLLOWED, LOST, NLLS, NOVEL, NOVEL_NLL, PREDICTIONS, SHARES, STRATA, Estimate, analyse
from experiment.report import introduce, number, render, summarise, with_interval
from tasks.statistics import seed_interval


def frontier_rows(text, what):
    """{objective: line} of the frontier at equal `what`."""
    block = text.split(f"at equal {what}")[1].split("\n\n")[0].split("accuracy lost\n")[1].splitlines()
    return {line.split()[0]: line for line in block}


def cells(line):
    """The numbers of each cell with an interval: [mean, low, high] or [mean, half]."""
    found = re.findall(r"[+-]?[\d.]+ (?:\[[^]]*\]|±[\d.]+)", line)
    return [[float(v) for v in re.findall(r"-?[\d.]+", cell)] for cell in found]


def close(cell, estimate, scale, digits):
    mean, low, high = estimate
    expected = [mean, low, high] if len(cell) == 3 else [mean, (high - low) / 2]
    assert cell == pytest.approx([v * scale for v in expected], abs=0.51 * 10 ** -digits), (cell, estimate)


def test_numbers():
    assert number(-0.001, 2) == "0.00" and number(-0.001, 0, "+") == "+0" and number(1.256, 2) == "1.26"
    assert with_interval(Estimate(0.5, 0.25, 0.755), 100, 0) == "50 [25,76]"
    assert with_interval(Estimate(0.5, -np.inf, np.inf), 100, 0, "+") == "+50"
    assert with_interval(Estimate(0.5, np.nan, np.nan), 100, 0, "+") == "+50"
    assert with_interval(Estimate(np.nan, np.nan, np.nan), 100, 0) == "-"
    assert with_interval(Estimate(-0.5, -0.75, -0.25), 1, 2, "+", half=True) == "-0.50 ±0.25"
    assert with_interval(Estimate(1.5, -np.inf, np.inf), 1, 2, half=True) == "1.50"


def test_verdicts_in_words():
    text = render(analyse(make_simple_results(BY_HAND, FOLLOWED_BY_HAND)))
    rows = frontier_rows(text, "accuracy on novel facts")
    mean, low, high = (100 * v for v in seed_interval(gaps_by_hand(), comparisons=4))
    assert f"{mean:+.1f} [{low:.1f},{high:.1f}]  yes, better" in rows["bft"]
    assert rows["bft"].split()[1:3] == ["25-56%", "60%"] and "sft reaches 75%" in text
    assert "yes, worse" in rows["bft-v3"] and "cannot tell" in rows["sft-sample"] and rows["bft-token"].count("no gap") == 2
    assert frontier_rows(text, "NLL of novel facts")["bft"].count("no gap") == 2
    assert "No table at equal novel accuracy" in text
    predictions = text.split("PREDICTIONS")[1]
    assert f"bft held ({mean:+.0f} [{low:.0f},{high:.0f}])" in predictions.split("At equal novel accuracy")[1]
    assert "bft held (-12 [-12,-12])" in predictions and "bft-v3 open (+0 [0,0])" in predictions
    assert "bft-v3 failed (+20" in predictions and "sft-sample held (+0 [0,0])" in predictions
    novel = {name: path for name, path in BY_HAND.items() if name != "bft-token"}
    text = render(analyse(make_simple_results(novel, {**FOLLOWED_BY_HAND, "sft-sample": [12, 19]})))
    assert "AT EQUAL NOVEL ACCURACY: 56%," in text and "sft-sample failed (+" in text
    text = render(analyse(make_simple_results({"sft": [10], "bft": [8]}, {"sft": [6], "bft": [1]})))
    assert "sft-sample" not in text.split("PREDICTIONS")[1] and "hold at once" not in text


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_in_words(seeds):
    text = render(analyse(make_simple_results(BY_HAND, FOLLOWED_BY_HAND, seeds)))
    assert "yes" not in text and "cannot tell" in text and "They need three seeds" in text
    assert ("One seed" in text) == (seeds == 1)


def test_one_objective_is_compared_with_none():
    text = render(analyse(make_simple_results({"dft": [10]}, {"dft": [6]})))
    assert "frontier?" not in text and "AT EQUAL NOVEL ACCURACY: 48%" in text


def test_every_cell_is_where_its_heading_says():
    results, _ = make_random_results(np.random.RandomState(3), NAMES)
    analysis = analyse(results)
    text = render(analysis)
    curves = text.split("FRONTIER")[1].splitlines()
    assert curves[1].split() == ["0", "0.1", "0.2", "0.3"]
    for name, line in zip(NAMES, curves[2:5]):
        assert line.startswith(name)
        triples = re.findall(r"(-?\d+) / (-?\d+) / (-?\d+)", line)
        expected = [100 * analysis["curves"][name][key] for key in (NOVEL, FOLLOWED, LOST)]
        assert np.array(triples, dtype=float) == pytest.approx(np.array(expected).T, abs=0.51)
    for heading, which in (("AT EQUAL NOVEL", "equal_accuracy"),
                           ("AT AN EQUAL LEARNING RATE, the middle one, 0.2", "equal_rate")):
        block = text.split(heading)[1].split("\n\n")[0].splitlines()
        place = analysis[which]
        names = list(place["scores"])
        first_nll = 3 + len(names) + 2 + 2
        for first, keys, scale, digits in ((3, SHARES, 100, 0), (first_nll, NLLS, 1, 2)):
            headings = re.findall(r"wrong label|held-out \w+|\w+", block[first - 1])
            strata = ["wrong label" if key == FOLLOWED else "held-out " * ("," in key[0]) + key[0].split(",")[0] for key in keys]
            assert headings == ["lr", *strata]
            for k, name in enumerate(names):
                line = block[first + k]
                assert line.startswith(name)
                assert float(line[len(name):].split()[0]) == pytest.approx(place["lr"][name], rel=0.06)
                assert len(cells(line)) == len(keys)
                for key, cell in zip(keys, cells(line)):
                    close(cell, place["scores"][name][key], scale, digits)
            for k, name in enumerate(NAMES[1:]):
                line = block[first + len(names) + k]
                assert line.startswith(f"{name} - sft") and len(cells(line)) == len(keys)
                signs = re.findall(r"([+-])[\d.]+ ±", line)              # zero, too, is shown as a difference
                assert len(signs) == len(keys)
                for key, cell in zip(keys, cells(line)):
                    close(cell, place["differences"][name][key], scale, digits)
    lost = analysis["frontiers"][NOVEL_NLL]["comparisons"]["bft"].lost.estimate
    if not np.isnan(lost.mean):
        close(cells(frontier_rows(text, "NLL of novel facts")["bft"])[-1], lost, 100, 1)
    _, less_lost = analysis["predictions"][2]
    outcome_line = text.split("they lose less of the held-out facts.")[1].splitlines()[1]
    close(cells(outcome_line)[0], less_lost["bft"].estimate, 100, 0)
    assert f"wrong label {analysis['base']['planted_nll']:.1f}." in text
    assert f"answer {analysis['base']['knows']:.0%} of their known" in text


# ---------------------------------------------------------------------------------------------------------------------
# What a newcomer sees

FIVE = ["sft", "sft-sample", "bft-token", "bft", "bft-v3"]


def rising(name, seed, i):
    """Every objective learns, follows and forgets more with the learning rate; no two do the same."""
    n = FIVE.index(name) if name in FIVE else 0
    given = {(stratum, "acc"): 15 - i - n for stratum in STRATA} | {(stratum, "nll"): 2 - 0.1 * n for stratum in STRATA}
    return {**given, FOLLOWED: 1 + n + i + seed, ("planted", "planted_nll"): 4.5, NOVEL: 5 + (i + 1) * (7 - n) // 2}


@pytest.mark.parametrize("objectives", [FIVE, ["bft"], ["bft-token", "bft"]])
@pytest.mark.parametrize("rates", [1, 4])
@pytest.mark.parametrize("seeds", [1, 3])
def test_one_table_of_few_lines(objectives, rates, seeds):
    analysis = analyse(make_results(objectives, rising, seeds, rates))
    text = summarise(analysis)
    lines = text.splitlines()
    assert len(lines) <= 25
    assert ("One seed says nothing of other trainings" in text) == (seeds == 1)
    for which, heading in (("equal_rate", "same learning rate, "), ("equal_accuracy", "of the novel facts right")):
        first = next(k for k, line in enumerate(lines) if heading in line) + 1
        for name, line in zip(analysis["objectives"], lines[first:]):
            assert line.startswith(f"{name} ")
            for key, scale, digits, cell in zip((NOVEL, FOLLOWED, LOST, NOVEL_NLL), (100, 100, 100, 1), (0, 0, 0, 2), cells(line)):
                close(cell, analysis[which]["scores"][name][key], scale, digits)
            assert len(cells(line)) == 4
    lost = [analysis["equal_rate"]["scores"][name][LOST].mean for name in objectives]
    assert min(lost) > 0                                                  # what was forgotten counts as lost
    rate = 0.1 * (rates // 2 + 1)
    assert f"same learning rate, {rate:g}:" in text
    # Nobody's terminal is wider.
    everything = [introduce(objectives, range(seeds), range(rates)), text, render(analysis)]
    assert [line for part in everything for line in part.splitlines() if len(line) > 120] == []


def test_no_table_at_an_accuracy_that_not_all_reach():
    text = summarise(analyse(make_simple_results(BY_HAND, FOLLOWED_BY_HAND)))
    assert "No comparison at equal novel accuracy" in text and len(text.splitlines()) <= 25


def test_predictions_are_said_before():
    text = introduce(FIVE, [0, 1], [0.1, 0.2, 0.3])
    said = [prediction.text in text for prediction in PREDICTIONS]
    assert said == [bool({*prediction.objectives} & {*FIVE}) for prediction in PREDICTIONS] and sum(said) == 5
    assert "eaft, which" in introduce(("sft", "eaft"), [0], [0.1])
    assert "5 loss(es)" in text and "3 learning rate(s)" in text and "2 base(s)" in text and "30 trainings" in text
