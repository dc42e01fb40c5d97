"""Intervals against closed forms and other libraries, and what becomes of items in a table."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest

from tasks import statistics
from tasks.choice import MEASURES as CHOICE
from tasks.nll import MEASURES as NLL
from tasks.statistics import MEAN, PROPORTION, Estimate, Measure


# ---------------------------------------------------------------------------------------------------------------------
# Over items

def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    rng = np.random.RandomState(1)
    a = rng.normal(0.3, 2.0, 400)
    b = 0.5 * a + rng.normal(0, 0.5, 400)
    half = 1.96 * a.std() / 20
    low, high = statistics.interval(statistics.bootstrap(a))
    assert low == pytest.approx(a.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(a.mean() + half, abs=0.1 * half)
    # Paired: the interval of the differences.
    d = a - b
    low, high = statistics.interval(statistics.bootstrap(a) - statistics.bootstrap(b))
    assert (high - low) / 2 == pytest.approx(1.96 * d.std() / 20, rel=0.1) and low < d.mean() < high


def test_bootstrap_of_a_ratio_weighs_by_tokens():
    values, weights = np.array([2.0, 30.0, 5.0]), np.array([1, 10, 4])
    drawn = statistics.bootstrap(values, weights)
    possible = set()
    for i, j, k in itertools.product(range(3), repeat=3):
        possible.add((values[[i, j, k]].sum() / weights[[i, j, k]].sum()).round(9))
    assert set(drawn.round(9)) == possible


@pytest.mark.parametrize("at_a_time", [1, 700, 2_000_000])
def test_the_draws_are_the_same_however_many_are_made_at_a_time(at_a_time, monkeypatch):
    drawn = np.random.RandomState(7).randint(30, size=(100, 30))
    values = np.random.RandomState(8).normal(size=30)
    monkeypatch.setattr(statistics, "RESAMPLES", 100)
    monkeypatch.setattr(statistics, "AT_A_TIME", at_a_time)
    assert np.concatenate(list(statistics.resamples(30, seed=7))).tolist() == drawn.tolist()
    assert statistics.bootstrap(values, seed=7).tolist() == values[drawn].mean(1).tolist()


def test_many_items_are_drawn_in_groups(monkeypatch):
    """Sorted ones, so that neighbours are alike; their tokens as weights, and a pair that differs little."""
    monkeypatch.setattr(statistics, "LARGEST", 2000)
    rng = np.random.RandomState(1)
    a = np.sort(rng.exponential(size=50_001))
    b = a + rng.normal(0, 0.1, len(a))
    weights = rng.randint(1, 50, len(a))
    resampled = [statistics.bootstrap(values, weights) for values in (a, b)]
    for drawn, values in ((resampled[0], a), (resampled[1] - resampled[0], b - a)):
        ratio = values.sum() / weights.sum()
        half = 1.96 * (values - ratio * weights).std() / weights.mean() / len(a) ** 0.5
        assert statistics.interval(drawn) == (pytest.approx(ratio - half, abs=0.1 * half), pytest.approx(ratio + half, abs=0.1 * half))


def test_a_million_items_take_bounded_memory_and_draws(monkeypatch):
    """(Of a tenth of the resamples.)"""
    drawn, draw = [], statistics.resamples
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    monkeypatch.setattr(statistics, "resamples", lambda *arguments: (drawn.append(some.size) or some for some in draw(*arguments)))
    values, weights = np.arange(1e6), np.ones(10 ** 6)
    tracemalloc.start()
    assert statistics.bootstrap(values, weights).mean() == pytest.approx(5e5, rel=1e-2)
    assert tracemalloc.get_traced_memory()[1] < 50e6 + 50 * len(values)
    tracemalloc.stop()
    assert sum(drawn) == 1000 * statistics.LARGEST


def test_wilson_interval():
    low, high = statistics.wilson(0.8, 10)                                # by hand
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert statistics.wilson(1.0, 20) == (pytest.approx(0.8389, abs=1e-4), pytest.approx(1.0))


# ---------------------------------------------------------------------------------------------------------------------
# Over seeds

def test_interval_over_seeds():
    for comparisons, t in ((1, 4.30265273), (4, 8.86020003)):
        expected = 2, 2 - t / 3 ** 0.5, 2 + t / 3 ** 0.5
        assert statistics.seed_interval([1, 2, 3], comparisons=comparisons) == pytest.approx(expected)
    assert statistics.seed_interval([7]) == (7, -math.inf, math.inf)
    # Any table of Student's t.
    for n, t in ((2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (6, 2.571), (7, 2.447), (8, 2.365), (9, 2.306), (10, 2.262),
                 (11, 2.228), (21, 2.086), (121, 1.980)):
        values = np.arange(n) % 2
        half = t * values.std(ddof=1) / n ** 0.5
        mean, low, high = statistics.seed_interval(values)
        assert (mean - low, high - mean) == (pytest.approx(half, rel=3e-4), pytest.approx(half, rel=3e-4))
    # It covers what it says: the mean of normal draws, three at a time.
    draws = np.random.RandomState(0).normal(size=(4000, 3))
    covered = np.mean([low <= 0 <= high for _, low, high in map(statistics.seed_interval, draws)])
    assert abs(covered - 0.95) < 0.012


@pytest.mark.slow
def test_intervals_over_seeds_are_students_and_welchs():
    from scipy import stats
    rng = np.random.RandomState(3)
    for n, m in ((2, 2), (3, 3), (5, 2), (12, 30)):
        a, b = rng.normal(1.0, 2.0, n), rng.normal(0.0, 0.5, m)
        theirs = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
        mean, low, high = statistics.seed_interval(a, b)
        assert mean == pytest.approx(a.mean() - b.mean()) and (low, high) == pytest.approx(tuple(theirs), rel=1e-4)
        alone = stats.ttest_1samp(a, 0).confidence_interval(1 - 0.05 / 16)
        assert statistics.seed_interval(a, comparisons=16)[1:] == pytest.approx(alone, rel=1e-4)
    # Who knows what another seed would do.
    assert statistics.seed_interval([0.1], [0.2, 0.3])[1:] == (-math.inf, math.inf)


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a table

def rows_of(measures, results):
    return {(row["group"], row["measure"]): row for row in statistics.summarise(measures, results)}


def test_the_jackknife_of_a_mean_is_students_interval():
    values = np.random.RandomState(0).normal(0, 1, 9)
    for comparisons in (1, 5):
        expected = statistics.seed_interval(values, comparisons=comparisons)
        assert statistics.jackknife(lambda some: values[some].mean(), 9, comparisons) == pytest.approx(expected)
    assert math.isnan(statistics.jackknife(lambda some: math.nan, 9)[0])


def test_summary_by_group_with_paired_differences():
    def items(shift):
        answers = (("x", 1, 0.5), ("x", 0, 1.5), ("y", 1, 3.0))
        return [{"group": g, "acc": a, "acc_norm": a, "acc_bytes": a, "nll": n + shift} for g, a, n in answers]

    rows = rows_of(CHOICE, {"first": [items(0)], "second": [items(0.25)]})
    assert {g for g, _ in rows} == {None, "x", "y"} and (None, "followed") not in rows
    row = rows["x", "nll"]
    assert row["n"] == 2 and row["models"]["first"]["value"] == 1.0
    pair, = row["pairs"]
    assert (pair["model"], pair["minus"]) == ("second", "first")
    assert [pair[k] for k in ("difference", "difference_low", "difference_high")] == pytest.approx([0.25] * 3)
    assert rows[None, "acc"]["models"]["first"]["value"] == pytest.approx(2 / 3)


def test_perplexity_is_the_exponential_of_the_row_above():
    items = [{"group": g, "nll": n, "tokens": t, "confidence": 0.5} for g, n, t in (("x", 4.0, 2), (None, 5.0, 1))]
    rows = {key: row["models"]["m"] for key, row in rows_of(NLL, {"m": [items]}).items()}
    assert {g for g, _ in rows} == {None, "x"}                            # the group is not the same as all
    for key in ("value", "value_low", "value_high"):
        assert rows[None, "perplexity"][key] == pytest.approx(math.exp(rows[None, "nll"][key]))
    assert rows[None, "nll"]["value"] == 3.0


def test_what_a_score_is_is_declared_and_not_guessed():
    """Counts that happen to be whole, and even zeros and ones, are resampled; proportions have Wilson's interval."""
    items = [{"group": None, "score": value} for value in (0, 1, 1, 1, 0, 1, 1, 1)]
    measure = Measure("score", "score", PROPORTION)
    drawn = statistics.interval(statistics.bootstrap([item["score"] for item in items]))
    for kind, expected in ((PROPORTION, statistics.wilson(0.75, 8)), (MEAN, drawn)):
        row, = statistics.summarise([measure._replace(kind=kind)], {"m": [items]})
        assert (row["models"]["m"]["value_low"], row["models"]["m"]["value_high"]) == pytest.approx(expected)
    assert drawn != pytest.approx(statistics.wilson(0.75, 8))
    counts = [{"group": None, "score": value} for value in (3, 0, 12, 7)]
    row, = statistics.summarise([measure._replace(kind=MEAN)], {"m": [counts]})
    cell = row["models"]["m"]
    assert cell["value"] == 5.5 and 0 <= cell["value_low"] < 5.5 < cell["value_high"] <= 12
    floats = [{"group": None, "score": float(item["score"])} for item in items]
    assert statistics.summarise([measure], {"m": [floats]}) == statistics.summarise([measure], {"m": [items]})


def test_what_cannot_be_compared_has_no_pairs():
    items = [{"group": None, "cosine": 0.1}, {"group": None, "cosine": 0.5}]
    row, = statistics.summarise([Measure("cosine", "cosine", MEAN, comparable=False)], {"a": [items], "b": [items]})
    assert row["pairs"] == [] and set(row["models"]) == {"a", "b"}


def test_seeds_are_one_column_with_an_interval_over_seeds():
    rng = np.random.RandomState(4)
    drawn = {name: rng.normal(size=1000) for name in ("a0", "a1", "b0", "b1", "c0")}

    def column(*seeds):
        return [Estimate(value, drawn[name]) for name, value in seeds]

    estimates = {"a": column(("a0", 1.0), ("a1", 3.0)), "b": column(("b0", 5.0), ("b1", 5.5)), "c": column(("c0", 2.0)),
                 "d": column(("b0", 5.0), ("b1", 5.0))}
    found = statistics.compare(estimates)
    a, c, d = (found["models"][name] for name in "acd")
    assert (a["value"], a["value_low"], a["value_high"]) == statistics.seed_interval([1.0, 3.0]) and a["seeds"] == [1.0, 3.0]
    assert (c["value_low"], c["value_high"]) == statistics.interval(drawn["c0"])
    # Seeds that agree say nothing of other seeds: over items.
    both = (drawn["b0"] + drawn["b1"]) / 2
    assert (d["value_low"], d["value_high"]) == pytest.approx(statistics.interval(both))
    assert [(p["model"], p["minus"]) for p in found["pairs"]] == [("b", "a"), ("c", "a"), ("d", "a"), ("c", "b"), ("d", "b"), ("d", "c")]
    first = found["pairs"][0]
    assert first["difference"] == 3.25
    paired = both - (drawn["a0"] + drawn["a1"]) / 2
    assert (first["difference_low"], first["difference_high"]) == pytest.approx(statistics.interval(paired))
    assert (3.25, first["seeds_low"], first["seeds_high"]) == pytest.approx(statistics.seed_interval([5.0, 5.5], [1.0, 3.0]))
    assert ["seeds_low" in pair for pair in found["pairs"]] == [True] + [False] * 5
