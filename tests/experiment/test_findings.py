"""What is concluded from the default job's scores, by numbers that are known beforehand."""

import math

import numpy as np
import pytest
from made_up_results import ITEMS, make_random_results, make_results, make_simple_results

from experiment.findings import (
    FOLLOWED,
    HELD_OUT,
    LOST,
    NLLS,
    NOVEL,
    NOVEL_NLL,
    SHARES,
    STRATA,
    along,
    analyse,
    crossing,
    frontier_gap,
)
from tasks.statistics import seed_interval, wilson


# Objectives whose findings are worked out by hand below.
BY_HAND = {"bft": [8, 12], "sft": [10, 15], "bft-v3": [10, 15], "bft-token": [4, 3], "sft-sample": [10, 15]}
FOLLOWED_BY_HAND = {"bft": [1, 2], "sft": [6, 12], "bft-v3": [9, 17], "bft-token": [1, 2], "sft-sample": [6, 12]}


def gaps_by_hand():
    """sft has (6 + s) / 5 wrong labels for each fact above 5, bft (1 + s) / 3 and then 1/4; compared up to 5 + 0.9 x 7."""
    xs = 5 + 0.9 * 7 * (np.arange(50) + 0.5) / 50
    gaps = []
    for s in range(3):
        bft = np.interp(xs, [5, 8, 12], [0, 1 + s, 2 + s])
        sft = np.interp(xs, [5, 10, 15], [0, 6 + s, 12 + s])
        gaps.append(np.mean(bft - sft) / 20)
    return gaps


def student(values, t=4.30265273):
    """Mean and 95% interval of three values."""
    mean = sum(values) / 3
    half = t * (sum((v - mean) ** 2 for v in values) / 2) ** 0.5 / 3 ** 0.5
    return pytest.approx((mean, mean - half, mean + half), abs=1e-6)


def test_frontiers_are_compared_at_equal_height():
    assert crossing([0.2, 0.3, 0.1, 0.5], 0.25) == pytest.approx(0.5)
    assert crossing([0.2, 0.1, 0.5], 0.2) == pytest.approx(1.25)          # where it rises to it, not where it starts
    assert math.isnan(crossing([0.2, 0.3], 0.31)) and math.isnan(along([1, 2], math.nan))
    assert along([1, 2, 4], 1.5) == 3
    # y is x/2 up to 0.2 and then steeper, by x - 0.2 more at x: 0 up to 0.2, then on average 0.08 more up to 0.9 x 0.4.
    gap = frontier_gap([0, 0.2, 0.4], [0, 0.1, 0.4], [0, 0.4], [0, 0.2])
    assert gap == pytest.approx(0.08 * 0.16 / 0.36, rel=1e-3) == -frontier_gap([0, 0.4], [0, 0.2], [0, 0.2, 0.4], [0, 0.1, 0.4])
    # What comes after the highest point, and beyond the other's, does not count.
    assert frontier_gap([0, 0.2, 0.4, 0.1], [0, 0.1, 0.4, 1], [0, 0.4, 0.9], [0, 0.2, 1]) == pytest.approx(gap)
    assert frontier_gap([0, 0.2, 0.4], [0, 0.1, 0.4], [0, 0.4, 0.1], [0, 0.2, 1]) == pytest.approx(gap)
    assert math.isnan(frontier_gap([0.3, 0.2], [0, 0.1], [0.3, 0.4], [0, 0.2]))


def test_verdicts_are_computed_from_intervals():
    analysis = analyse(make_simple_results(BY_HAND, FOLLOWED_BY_HAND))
    # sft is what is compared with, wherever it stands; the others keep their order.
    assert analysis["objectives"] == ["sft", "bft", "bft-v3", "bft-token", "sft-sample"]
    frontier = analysis["frontiers"][NOVEL]
    comparisons = frontier["comparisons"]
    bft = comparisons["bft"]
    # Four are compared with sft.
    assert bft.followed.estimate == pytest.approx(seed_interval(gaps_by_hand(), comparisons=4))
    assert bft.followed.estimate == student(gaps_by_hand(), 8.86020003)
    assert bft.followed.estimate.high < 0 and bft.followed.verdict == "better"
    assert (bft.start, bft.end) == pytest.approx((5 / 20, (5 + 0.9 * 7) / 20))
    assert frontier["reach"] == pytest.approx({"sft": 15 / 20, "bft": 12 / 20, "bft-v3": 15 / 20, "bft-token": 5 / 20,
                                               "sft-sample": 15 / 20})
    assert comparisons["bft-v3"].followed.verdict == "worse"
    assert comparisons["sft-sample"].followed.verdict == "cannot tell"
    assert comparisons["bft-token"].followed.verdict == comparisons["bft-token"].lost.verdict == "no gap"
    # Nothing here changes the NLL of novel facts.
    by_nll = analysis["frontiers"][NOVEL_NLL]["comparisons"]["bft"]
    assert by_nll.followed.verdict == by_nll.lost.verdict == "no gap"
    assert analysis["equal_accuracy"] is None                             # bft-token never gets above the base
    fewer_novel, fewer_wrong, less_lost, at_equal_accuracy, near = (outcomes for _, outcomes in analysis["predictions"])
    # Novel facts: -2/20 and -3/20 for bft, the same for bft-v3.
    assert fewer_novel["bft"].verdict == "held" and fewer_novel["bft"].estimate == pytest.approx((-0.125, -0.125, -0.125))
    assert fewer_novel["bft-v3"].verdict == "open" and fewer_novel["bft-v3"].estimate == (0, 0, 0)
    assert fewer_wrong["bft-v3"].verdict == "failed" and fewer_wrong["bft-v3"].estimate.mean == pytest.approx(0.2)
    assert list(less_lost) == ["bft-token", "bft", "bft-v3"]
    assert at_equal_accuracy["bft"].verdict == "held" and at_equal_accuracy["bft-token"].verdict == "no gap"
    assert at_equal_accuracy["bft"].estimate == bft.followed.estimate
    assert near["sft-sample"].verdict == "held" and near["sft-sample"].estimate == (0, 0, 0)


def test_what_all_reach_is_compared_and_what_is_not_near_has_failed():
    novel = {name: path for name, path in BY_HAND.items() if name != "bft-token"}
    followed = {**FOLLOWED_BY_HAND, "sft-sample": [12, 19]}
    analysis = analyse(make_simple_results(novel, followed))
    assert analysis["equal_accuracy"]["level"] == pytest.approx((5 + 0.9 * 7) / 20)
    _, near = analysis["predictions"][-1]
    assert near["sft-sample"].verdict == "failed" and near["sft-sample"].estimate.mean > 0.05


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_allow_no_verdict(seeds):
    analysis = analyse(make_simple_results(BY_HAND, FOLLOWED_BY_HAND, seeds))
    assert analysis["predictions"] == []
    for comparison in analysis["frontiers"][NOVEL]["comparisons"].values():
        assert {comparison.followed.verdict, comparison.lost.verdict} <= {"cannot tell", "no gap"}
    assert analysis["frontiers"][NOVEL]["comparisons"]["bft"].followed.verdict == "cannot tell"


def test_without_sft_or_with_one_objective_there_is_still_a_finding():
    alone = analyse(make_simple_results({"dft": [10]}, {"dft": [6]}))
    assert alone["frontiers"][NOVEL]["comparisons"] == {} and alone["predictions"] == []
    assert alone["equal_accuracy"]["level"] == pytest.approx((5 + 0.9 * 5) / 20)
    without = analyse(make_simple_results({"dft": [10], "bft": [9]}, {"dft": [6], "bft": [3]}))
    assert list(without["frontiers"][NOVEL]["comparisons"]) == ["bft"] and without["predictions"] == []


# ---------------------------------------------------------------------------------------------------------------------
# Every number is what it says, by other ways than the code's

NAMES = ["sft", "a-long-name-of-a-fork", "bft"]


class Drawn:
    """The numbers that some results were made from."""

    def __init__(self):
        self.results, self.numbers = make_random_results(np.random.RandomState(3), NAMES)

    def at(self, name, seed, i):
        return self.numbers["base" if i < 0 else name, seed, i]

    def lost(self, name, seed, i):
        held_out = STRATA[4:]
        return sum(self.at(name, seed, -1)[g, "acc"] - self.at(name, seed, i)[g, "acc"] for g in held_out) / 40

    def value(self, name, seed, i, key):
        if key == LOST:
            return self.lost(name, seed, i)
        return self.at(name, seed, i)[key] / (1 if key in NLLS else ITEMS)

    def between(self, name, seed, place, key):
        """At a place (i, f) of the curve: f of the way from its point i to the next; point 0 is the base."""
        i, f = place
        value = self.value(name, seed, i - 1, key) * (1 - f)
        if f:
            value += self.value(name, seed, i, key) * f
        return value


@pytest.fixture(scope="module")
def drawn():
    return Drawn()


def test_curves_are_means_over_seeds(drawn):
    curves = analyse(drawn.results)["curves"]
    assert list(curves) == NAMES
    for name in NAMES:
        for key in (NOVEL, FOLLOWED, LOST):
            expected = [np.mean([drawn.value(name, s, i, key) for s in range(3)]) for i in range(-1, 3)]
            assert curves[name][key] == pytest.approx(np.array(expected)), (name, key)
    assert (curves["bft"][LOST][1:] != 0).all()


def test_objectives_side_by_side(drawn):
    analysis = analyse(drawn.results)
    novel = {name: [np.mean([drawn.value(name, s, i, NOVEL) for s in range(3)]) for i in range(-1, 3)] for name in NAMES}
    base = novel["sft"][0]
    level = base + 0.9 * (min(max(path) for path in novel.values()) - base)
    assert analysis["equal_accuracy"]["level"] == pytest.approx(level)
    equal_accuracy = {}
    for name, path in novel.items():
        i = next(i for i in range(3) if path[i] < level <= path[i + 1])
        equal_accuracy[name] = (i, (level - path[i]) / (path[i + 1] - path[i]))
    equal_rate = {"base": (0, 0), **{name: (2, 0) for name in NAMES}}
    for which, places in (("equal_accuracy", equal_accuracy), ("equal_rate", equal_rate)):
        found = analysis[which]
        assert list(found["scores"]) == list(found["lr"]) == list(places)
        values = {}
        for name, place in places.items():
            assert found["lr"][name] == pytest.approx(0.1 * sum(place))
            for key in (*SHARES, *NLLS, LOST):
                values[name, key] = [drawn.between(name, s, place, key) for s in range(3)]
                mean, low, high = student(values[name, key]).expected
                if key in SHARES:
                    item_low, item_high = wilson(mean, ITEMS)
                    low, high = max(0, min(low, item_low)), min(1, max(high, item_high))
                assert found["scores"][name][key] == pytest.approx((mean, low, high), abs=1e-6), (which, name, key)
        assert list(found["differences"]) == NAMES[1:]
        for name in NAMES[1:]:
            assert set(found["differences"][name]) == {*SHARES, *NLLS}
            for key, estimate in found["differences"][name].items():
                paired = [a - b for a, b in zip(values[name, key], values["sft", key])]
                assert estimate == student(paired), (which, name, key)


def test_frontiers_by_nll_and_means_over_the_rates(drawn):
    analysis = analyse(drawn.results)

    def path(name, key, seed):
        return [drawn.value(name, seed, i, key) for i in range(-1, 3)]

    gaps = []
    for s in range(3):
        lower = {name: [-v for v in path(name, NOVEL_NLL, s)] for name in ("bft", "sft")}
        gaps.append(frontier_gap(lower["bft"], path("bft", LOST, s), lower["sft"], path("sft", LOST, s)))
    by_nll = analysis["frontiers"][NOVEL_NLL]
    if not any(map(math.isnan, gaps)):
        assert by_nll["comparisons"]["bft"].lost.estimate == student(gaps, 6.20534682)   # the first of two
    assert by_nll["reach"]["bft"] == pytest.approx(min(np.mean([path("bft", NOVEL_NLL, s) for s in range(3)], axis=0)))
    _, less_lost = analysis["predictions"][2]
    over_rates = [np.mean([drawn.lost("bft", s, i) - drawn.lost("sft", s, i) for i in range(3)]) for s in range(3)]
    assert less_lost["bft"].estimate == student(over_rates)
    base = {g: [drawn.value("sft", s, -1, (g, "acc")) for s in range(3)] for g in ("known", "planted", HELD_OUT[0])}
    assert analysis["base"]["knows"] == pytest.approx(np.mean(list(base.values())))
    planted_nll = np.mean([drawn.at("sft", s, -1)["planted", "planted_nll"] for s in range(3)])
    assert analysis["base"]["planted_nll"] == pytest.approx(planted_nll)
    assert analysis["base"]["novel_nll"] == pytest.approx(np.mean([drawn.value("sft", s, -1, NOVEL_NLL) for s in range(3)]))
    assert analysis["facts"] == {g: ITEMS for g in STRATA}


def test_one_seed_has_intervals_over_items():
    """Of which none says anything about a difference between trainings."""
    results, _ = make_random_results(np.random.RandomState(5), NAMES, seeds=1)
    rng = np.random.RandomState(6)
    for model in results["models"]:
        for item in model["items"]:
            item["nll"] = rng.uniform(0, 3)
    items = {(m["objective"], round(m["lr"], 1)): m["items"] for m in results["models"]}
    analysis = analyse(results)
    scores = analysis["equal_rate"]["scores"]["bft"]
    nll = [item["nll"] for item in items["bft", 0.2] if item["group"] == "novel"]
    assert scores[NOVEL_NLL] == pytest.approx(seed_interval(nll)) and len(nll) == ITEMS
    lost = [before["acc"] - after["acc"] for before, after in zip(items["base", 0], items["bft", 0.2])
            if before["group"] in HELD_OUT]
    assert scores[LOST] == pytest.approx(seed_interval(lost)) and len(lost) == 2 * ITEMS and np.mean(lost) != 0
    right = sum(item["acc"] for item in items["bft", 0.2] if item["group"] == "novel") / ITEMS
    assert scores[NOVEL] == pytest.approx((right, *wilson(right, ITEMS)))
    # Between two learning rates each item is read off too.
    lr = analysis["equal_accuracy"]["lr"]["bft"]
    i = math.floor(lr / 0.1)
    f = lr / 0.1 - i
    assert 0.01 < f < 0.99
    pairs = zip(items["bft" if i else "base", round(0.1 * i, 1)], items["bft", round(0.1 * (i + 1), 1)])
    nll = [a["nll"] * (1 - f) + b["nll"] * f for a, b in pairs if a["group"] == "novel"]
    assert analysis["equal_accuracy"]["scores"]["bft"][NOVEL_NLL] == pytest.approx(seed_interval(nll))
    for difference in analysis["equal_rate"]["differences"]["bft"].values():
        assert math.isinf(difference.low) and math.isinf(difference.high)


def test_items_of_several_seeds_are_not_mixed():
    def numbers(name, seed, i):
        given = {(stratum, measure): 10 for stratum in STRATA for measure in ("acc", "nll")}
        return {**given, FOLLOWED: 5 * seed, ("planted", "planted_nll"): 1.0, NOVEL: 5 + seed + 2 * (i + 1)}

    results = make_results(["sft", "bft"], numbers, seeds=2)
    results["models"].reverse()                                           # their order says nothing
    analysis = analyse(results)
    assert analysis["equal_rate"]["differences"]["bft"][FOLLOWED] == (0, 0, 0)   # paired by seed
    assert analysis["equal_rate"]["scores"]["bft"][FOLLOWED].mean == pytest.approx(2.5 / 20)
