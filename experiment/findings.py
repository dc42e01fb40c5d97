"""What the default job finds: numbers in, numbers out. `report.py` puts them into words.

`results` is what job.py saves as results.json:

    objectives, seeds, lrs    what was gone over
    models                    [{"objective", "seed", "lr", "items"}, ...]; a base has the objective "base" and lr 0
    gradient                  what `gradient.gradient_items` returns for the first base

An item is a question about one fact: its "group" (the stratum), "acc" (1: the right answer is picked) and "nll" (of the
right answer); of planted facts also "followed" (1: the wrong label is picked) and "planted_nll" (of the wrong label).
"""

import math
from typing import NamedTuple

import numpy as np

from experiment.gradient import analyse_gradient
from tasks.statistics import seed_interval, wilson


STRATA = ("known", "weak", "novel", "planted", "known, held out", "weak, held out")
HELD_OUT = ("known, held out", "weak, held out")

MEASURES = ("acc", "nll", "followed", "planted_nll")
# Of what is measured, by (stratum, measure).
NOVEL = ("novel", "acc")
NOVEL_NLL = ("novel", "nll")
FOLLOWED = ("planted", "followed")
LOST = ("held out", "lost")
SHARES = (("known", "acc"), ("weak", "acc"), NOVEL, ("planted", "acc"), FOLLOWED, *((g, "acc") for g in HELD_OUT))
NLLS = tuple((stratum, "nll") for stratum in STRATA)


class Estimate(NamedTuple):
    """A mean and its 95% interval; infinite where one seed says nothing of others, nan where there is no value."""

    mean: float
    low: float
    high: float


class Prediction(NamedTuple):
    """That a difference from sft lies between two bounds."""

    text: str
    objectives: tuple
    key: tuple              # of what ...
    where: str              # ... in the mean over the "rates", or at equal novel accuracy along the "frontier"
    above: float = -math.inf
    below: float = 0


WEIGHTED = ("bft-token", "bft", "bft-v3")
# Those of variants/ that, where the base is sure of another token, push the target hardly at all at first.
VANISHING = ("dft", "power-0.5", "power-2", "power-10", "only-top", "only-top-p", "profit", "infosft", "deft", "asft",
             "bft-gamma-0.5", "bft-gamma-2")
PREDICTIONS = (
    Prediction("Over the learning rates bft-token, bft and bft-v3 learn fewer novel facts than sft.",
               WEIGHTED, NOVEL, "rates"),
    Prediction("Over the learning rates they follow fewer wrong labels.",
               WEIGHTED, FOLLOWED, "rates"),
    Prediction("Over the learning rates they lose less of the held-out facts.",
               WEIGHTED, LOST, "rates"),
    Prediction("At equal novel accuracy they still follow fewer wrong labels, since the base expects those even less.",
               WEIGHTED, FOLLOWED, "frontier"),
    Prediction("sft-sample stays within 5 points of sft's frontier, since answers are of much the same length.",
               ("sft-sample",), FOLLOWED, "frontier", above=-0.05, below=0.05),
    Prediction("Over the learning rates the relatives that weigh by p, or leave out what is improbable, learn fewer "
               "novel facts than sft.", VANISHING, NOVEL, "rates"),
    Prediction("At equal novel accuracy these, too, follow fewer wrong labels.", VANISHING, FOLLOWED, "frontier"),
    Prediction("At equal novel accuracy these, too, lose less of the held-out facts.", VANISHING, LOST, "frontier"),
    Prediction("eaft, which pushes where the base hesitates, follows fewer wrong labels at equal novel accuracy: the "
               "base is sure there.", ("eaft",), FOLLOWED, "frontier"),
    Prediction("iw-sft stays within 5 points of sft's frontier, since all answers are learnt at much the same pace.",
               ("iw-sft",), FOLLOWED, "frontier", above=-0.05, below=0.05),
)


def analyse(results):
    """All that report.py prints, as numbers:

    objectives       names, first the reference that others are compared with: sft, if it is there
    seeds, rates     the seeds; 0 (for the base) and the learning rates
    facts            {stratum: how many}
    base             {"knows": share of known and planted facts, "novel_nll", "planted_nll"}, means over the bases
    curves           {objective: {key: mean over seeds at each of `rates`}} for NOVEL, FOLLOWED and LOST
    frontiers        {NOVEL, NOVEL_NLL: {"reach": {objective: its best}, "comparisons": {objective: Comparison}}}
    equal_accuracy   what `read_off` returns at equal novel accuracy, and "level"; None if not all rise above the base
    equal_rate       what `read_off` returns at the middle learning rate
    gradient         what `analyse_gradient` returns
    predictions      [(Prediction, {objective: Judged})]; empty with fewer than three seeds, or without sft
    """
    names = sorted(results["objectives"], key=lambda name: name != "sft")
    curves = rate_curves(results)
    base = {key: values[:, 0] for key, values in curves[names[0]].items()}
    items = results["models"][0]["items"]
    analysis = {
        "objectives": names,
        "seeds": results["seeds"],
        "rates": [0, *results["lrs"]],
        "facts": {stratum: sum(item["group"] == stratum for item in items) for stratum in STRATA},
        "base": {"knows": np.mean([base[g, "acc"].mean() for g in ("known", "known, held out", "planted")]),
                 "novel_nll": base[NOVEL_NLL].mean(),
                 "planted_nll": base["planted", "planted_nll"].mean()},
        "curves": {name: {key: curves[name][key].mean(0) for key in (NOVEL, FOLLOWED, LOST)} for name in names},
        "frontiers": {key: compare_frontiers(curves, names, key) for key in (NOVEL, NOVEL_NLL)},
        "gradient": analyse_gradient(results["gradient"]),
    }
    analysis["equal_accuracy"] = at_equal_accuracy(results, curves, analysis)
    analysis["equal_rate"] = at_equal_rate(results, curves, analysis)
    analysis["predictions"] = judge_all(curves, analysis)
    return analysis


# ---------------------------------------------------------------------------------------------------------------------
# Curves over the learning rates

def rate_curves(results):
    """{objective: {(stratum, measure): (seeds, 1 + learning rates)}}: means over items, the base's first. Measures: acc
    and nll of the right answer; of planted facts also followed and planted_nll; of both "held out" strata together
    `lost`, the fall of acc since the base, what was gained counted against it."""
    curves = {}
    for name in results["objectives"]:
        of_seeds = [item_curves(results, name, seed) for seed in results["seeds"]]
        curves[name] = {key: np.array([of_seed[key].mean(1) for of_seed in of_seeds]) for key in of_seeds[0]}
    return curves


def item_curves(results, name, seed):
    """The same of one objective and seed before its means: {(stratum, measure): (1 + learning rates, items)}."""
    curves = score_curves(results, name, seed)
    kept = np.concatenate([curves[stratum, "acc"] for stratum in HELD_OUT], axis=1)
    return {**curves, LOST: kept[:1] - kept}


def score_curves(results, name, seed):
    """Those that are asked for, `lost` left out, whatever the strata are."""
    models = {(m["objective"], m["lr"]): m["items"] for m in results["models"] if m["seed"] == seed}
    path = [models["base", 0], *(models[name, lr] for lr in results["lrs"])]
    scores = {}
    for items in zip(*path):
        # One item, as each of these models answers it.
        for measure in MEASURES:
            if measure in items[0]:
                scores.setdefault((items[0]["group"], measure), []).append([item[measure] for item in items])
    return {key: np.array(columns, dtype=float).T.copy() for key, columns in scores.items()}


def crossing(path, levels):
    """Where the broken line through path (P,) first rises to each of the levels: i + f, between points i and i + 1;
    nan: nowhere. (The first time: a path that is noisy and flat gets there by luck sooner than it should.)"""
    path, levels = np.asarray(path), np.asarray(levels)
    rises = (path[:-1] < levels[..., None]) & (levels[..., None] <= path[1:])   # (levels, P - 1)
    i = rises.argmax(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        position = i + (levels - path[i]) / (path[i + 1] - path[i])
    return np.where(rises.any(-1), position, math.nan)


def along(path, positions):
    """The heights of the broken line through path (P,) at positions as `crossing` gives them."""
    return np.interp(positions, np.arange(len(path)), path)


# ---------------------------------------------------------------------------------------------------------------------
# Frontiers: what is followed and lost, against what is learnt

class Judged(NamedTuple):
    estimate: Estimate      # more (or less, if negative) than the reference
    verdict: str            # as `judge_gap` or `judge_between` has it


class Comparison(NamedTuple):
    """An objective's frontier beside the reference's."""

    start: float            # the heights that were compared: from the base ...
    end: float              # ... to here, means over seeds
    followed: Judged
    lost: Judged


def compare_frontiers(curves, names, key):
    """{"reach": {objective: its best height}, "comparisons": {objective: Comparison}} with the first of names, at equal
    heights of `key`: NOVEL (the higher the better) or NOVEL_NLL (the lower)."""
    sign = -1 if key == NOVEL_NLL else 1
    reach = {name: sign * (sign * curves[name][key].mean(0)).max() for name in names}
    reference = curves[names[0]]
    other_x = sign * reference[key]                                       # (seeds, 1 + rates), the higher the better
    comparisons = {}
    for name in names[1:]:
        x = sign * curves[name][key]
        start, end = compared_range(x, other_x)
        gaps = []
        for y_key in (FOLLOWED, LOST):
            curves_of_seeds = zip(x, curves[name][y_key], other_x, reference[y_key])
            gaps_of_seeds = [frontier_gap(*of_seed) for of_seed in curves_of_seeds]
            gaps.append(judge_gap(estimate_over_seeds(gaps_of_seeds, len(names) - 1), len(gaps_of_seeds)))
        comparisons[name] = Comparison(sign * start, sign * end, *gaps)
    return {"reach": reach, "comparisons": comparisons}


def compared_range(x, other_x):
    """(start, end): from where to where `frontier_gap` goes in the mean over seeds. (seeds, P) each."""
    tops = np.minimum(x.max(1), other_x.max(1))
    start = x[:, 0].mean()
    return start, start + 0.9 * (tops - x[:, 0]).mean()


def frontier_gap(x, y, other_x, other_y):
    """The mean of y minus other_y at equal x, over all x from the common first point (the base) to nine tenths of the
    way to the lower of the two maxima (a highest point is partly luck). x, y: (P,) heights along one objective's
    learning rates. nan if one of them never rises above the base."""
    top = min(max(x), max(other_x))
    if not top > x[0]:
        return math.nan
    levels = x[0] + 0.9 * (top - x[0]) * (np.arange(50) + 0.5) / 50
    return np.mean(along(y, crossing(x, levels)) - along(other_y, crossing(other_x, levels)))


def judge_gap(estimate, seeds, less_is_better=True):
    """Of a difference from the reference: "no gap", "cannot tell", "better" or "worse". Two seeds are too few for a
    verdict."""
    if math.isnan(estimate.mean):
        verdict = "no gap"
    elif seeds < 3 or not (estimate.low > 0 or estimate.high < 0):
        verdict = "cannot tell"
    elif (estimate.high < 0) == less_is_better:
        verdict = "better"
    else:
        verdict = "worse"
    return Judged(estimate, verdict)


# ---------------------------------------------------------------------------------------------------------------------
# All objectives side by side, at one place of each one's curves

def at_equal_accuracy(results, curves, analysis):
    """At nine tenths of the way from the base to the novel accuracy that all come to."""
    novel = {name: curves[name][NOVEL].mean(0) for name in analysis["objectives"]}
    start = curves[analysis["objectives"][0]][NOVEL][:, 0].mean()
    level = start + 0.9 * (min(path.max() for path in novel.values()) - start)
    if not level > start:
        return None
    positions = {name: crossing(path, level) for name, path in novel.items()}
    return {"level": level, **read_off(results, curves, analysis, positions)}


def at_equal_rate(results, curves, analysis):
    middle = len(results["lrs"]) // 2 + 1
    positions = {"base": 0, **{name: middle for name in analysis["objectives"]}}
    return read_off(results, curves, analysis, positions)


def read_off(results, curves, analysis, positions):
    """Each objective at its position on its curves, the same for every seed, and minus the reference:
    {"lr": {objective: rate}, "scores": {objective: {key: Estimate}}, "differences": {objective: {key: Estimate}}}.

    Keys are SHARES, NLLS and LOST. The intervals are over seeds, for one seed over items. They are for that position:
    how uncertain it is itself, they do not say. A difference has no interval for one seed.
    """
    reference, *others = analysis["objectives"]
    rates, scores, values = {}, {}, {}
    for name, position in positions.items():
        # The base is the first point of all curves.
        curve_name = reference if name == "base" else name
        rates[name] = along(analysis["rates"], position)
        scores[name], values[name] = {}, {}
        of_items = {}
        if len(results["seeds"]) == 1:
            of_items = item_curves(results, curve_name, results["seeds"][0])
        for key in (*SHARES, *NLLS, LOST):
            by_seed = np.array([along(path, position) for path in curves[curve_name][key]])
            values[name][key] = by_seed
            if key in SHARES:
                scores[name][key] = estimate_share(by_seed, analysis["facts"][key[0]])
            elif of_items:
                scores[name][key] = estimate_over_items(by_seed[0], of_items[key], position)
            else:
                scores[name][key] = estimate_over_seeds(by_seed)
    differences = {}
    for name in others:
        pairs = {key: (values[name][key], values[reference][key]) for key in (*SHARES, *NLLS)}
        differences[name] = {key: estimate_over_seeds(mine - theirs) for key, (mine, theirs) in pairs.items()}
    return {"lr": rates, "scores": scores, "differences": differences}


def estimate_over_seeds(values, comparisons=1):
    return Estimate(*seed_interval(values, comparisons=comparisons))


def estimate_share(values, items):
    """Of a share of so many items, one value for each seed: never narrower than over the items alone."""
    mean, low, high = seed_interval(values)
    item_low, item_high = wilson(min(max(mean, 0), 1), items)
    if len(values) == 1:
        return Estimate(mean, item_low, item_high)
    return Estimate(mean, max(0, min(low, item_low)), min(1, max(high, item_high)))


def estimate_over_items(mean, curves, position):
    """Of one training: its mean, and Student's interval over the items. curves: (1 + learning rates, items)."""
    scores = [along(path, position) for path in curves.T]
    _, low, high = seed_interval(scores)
    return Estimate(mean, low, high)


# ---------------------------------------------------------------------------------------------------------------------
# What became of the predictions

def judge_all(curves, analysis):
    names = analysis["objectives"]
    if len(analysis["seeds"]) < 3 or names[0] != "sft":
        return []
    judged = []
    for prediction in predictions_of(names):
        trained = [name for name in prediction.objectives if name in names]
        judged.append((prediction, {name: judge_prediction(prediction, name, curves, analysis) for name in trained}))
    return judged


def predictions_of(objectives):
    """Those of PREDICTIONS that are about some of these objectives."""
    return [prediction for prediction in PREDICTIONS if set(prediction.objectives) & set(objectives)]


def judge_prediction(prediction, name, curves, analysis):
    if prediction.where == "frontier":
        comparison = analysis["frontiers"][NOVEL]["comparisons"][name]
        estimate = (comparison.followed if prediction.key == FOLLOWED else comparison.lost).estimate
    else:
        more = curves[name][prediction.key] - curves["sft"][prediction.key]   # (seeds, 1 + rates)
        estimate = estimate_over_seeds(more[:, 1:].mean(1))
    return judge_between(estimate, prediction.above, prediction.below)


def judge_between(estimate, above, below):
    """Of the prediction of a difference between two bounds: "held", "failed", "open" (the interval allows both) or "no
    gap"."""
    mean, low, high = estimate
    if math.isnan(mean):
        verdict = "no gap"
    elif above < low and high < below:
        verdict = "held"
    elif high < above or low > below:
        verdict = "failed"
    else:
        verdict = "open"
    return Judged(estimate, verdict)
