"""Intervals and comparisons: numbers in, numbers out."""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np


# ---------------------------------------------------------------------------------------------------------------------
# What a table shows

PROPORTION = "proportion"            # the mean of zeros and ones
MEAN = "mean"
RATIO = "ratio"                      # the sum of one key over the sum of another
EXP_RATIO = "exp of a ratio"


class Measure(NamedTuple):
    """A row of a task's table: which key of its items is shown, and what kind of number it becomes."""
    key: str                         # of results.json's rows and, unless `source` says otherwise, of the items
    heading: str
    kind: str                        # one of the four above
    percent: bool = False            # shown times 100
    source: str | None = None        # key of the items
    per: str | None = None           # of ratios: the key that is summed below the line
    comparable: bool = True          # between models; False: their difference means nothing


class Estimate(NamedTuple):
    """A number and how uncertain it is."""
    value: float
    resampled: Any                   # (RESAMPLES,) the same number of each resample of the items
    interval: tuple | None = None    # (low, high) where there is something better than the resamples' percentiles


def summarise(measures, results):
    """Rows of the table of one task: results {column: [items, of each seed]}, over the same items in every column.

    Each row: group, measure, heading, percent, n, and what `compare` gives; first all items and then, where there are
    several groups, each. An item that lacks a measure's key does not count in its row.
    """
    first = next(iter(results.values()))[0]
    groups = {item["group"] for item in first}
    shown = [None]
    if len(groups) > 1:
        shown += sorted(groups - {None})
    rows = [summary_row(measure, group, results) for group in shown for measure in measures]
    return [row for row in rows if row is not None]


def summary_row(measure, group, results):
    """One row of `summarise`; None where no item has the measure. group: None for all items."""
    estimates = {}
    n = 0
    for column, seeds in results.items():
        for items in seeds:
            source = measure.source or measure.key
            items = [item for item in items if source in item]
            if group is not None:
                items = [item for item in items if item["group"] == group]
            if not items:
                break
            n = len(items)
            estimates.setdefault(column, []).append(estimate(measure, items))
    if not estimates:
        return None
    row = {
        "group": group,
        "measure": measure.key,
        "heading": measure.heading,
        "percent": measure.percent,
        "n": n,
        **compare(estimates),
    }
    if not measure.comparable:
        row["pairs"] = []
    return row


def estimate(measure, items):
    """The Estimate of a measure over items."""
    values = [item[measure.source or measure.key] for item in items]
    weights = [item[measure.per] for item in items] if measure.per else [1] * len(items)
    value = np.sum(values) / np.sum(weights)
    resampled = bootstrap(values, weights)
    if measure.kind == EXP_RATIO:
        value, resampled = np.exp(value), np.exp(resampled)
    value = float(value)
    if measure.kind == PROPORTION:
        return Estimate(value, resampled, wilson(value, len(items)))
    return Estimate(value, resampled)


def compare(estimates):
    """{"models": {column: cell}, "pairs": [...]} of {column: [Estimate, of each seed]}.

    A cell has the value, the mean over seeds, and its 95% interval: over items for one seed, over seeds for several;
    over items too if all seeds have the very same value, which tells nothing of other seeds. A pair has the difference
    of two columns, its paired interval over items, and, where both have several seeds, over seeds.
    """
    models = {}
    means = {}                       # {column: (RESAMPLES,) the mean over its seeds}
    for column, seeds in estimates.items():
        values = [seed.value for seed in seeds]
        means[column] = np.mean([seed.resampled for seed in seeds], axis=0)
        if len(set(values)) > 1:
            _, low, high = seed_interval(values)
        elif seeds[-1].interval is not None:
            low, high = seeds[-1].interval
        else:
            low, high = interval(means[column])
        models[column] = {
            "value": float(np.mean(values)),
            "value_low": low,
            "value_high": high,
            "seeds": values,
        }
    pairs = []
    for minus, column in itertools.combinations(estimates, 2):
        low, high = interval(means[column] - means[minus])
        pair = {
            "model": column,
            "minus": minus,
            "difference": models[column]["value"] - models[minus]["value"],
            "difference_low": low,
            "difference_high": high,
        }
        seeds, other_seeds = models[column]["seeds"], models[minus]["seeds"]
        if len(set(seeds)) > 1 and len(set(other_seeds)) > 1:
            _, pair["seeds_low"], pair["seeds_high"] = seed_interval(seeds, other_seeds)
        pairs.append(pair)
    return {"models": models, "pairs": pairs}


# ---------------------------------------------------------------------------------------------------------------------
# Over items

RESAMPLES = 10_000
LARGEST = 10_000                     # items that are drawn one by one
AT_A_TIME = 2_000_000                # draws, for bounded memory


def resamples(n, seed=0):
    """Draws of n items with replacement, RESAMPLES in all: yields (some, n) indices.

    The same seed and n give the same draws, however many are yielded at a time, so what is computed from them is
    paired.
    """
    rng = np.random.RandomState(seed)
    some = max(1, AT_A_TIME // n)
    for start in range(0, RESAMPLES, some):
        yield rng.randint(n, size=(min(some, RESAMPLES - start), n))


def resample_counts(drawn, n):
    """How often each of n items is in each row of drawn (R, n): (R, n) float64."""
    first_of_row = np.arange(len(drawn))[:, None] * n
    counts = np.bincount((drawn + first_of_row).ravel(), minlength=len(drawn) * n)
    return counts.reshape(len(drawn), n).astype(np.float64)


def bootstrap(values, weights=None, seed=0):
    """sum(values) / sum(weights) of each resample of the items: (RESAMPLES,). weights None: all 1, the mean.

    More than LARGEST items are dealt at random to as many groups, the same ones for the same n, which are drawn in
    their place: sums of groups vary as the items do. It adds a noise of 0.7% to the width of an interval; that of
    RESAMPLES is as large. Memory: 50 MB, and 50 bytes an item.
    """
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(values) > LARGEST:
        group = np.random.RandomState(seed).permutation(len(values)) % LARGEST
        values, weights = np.bincount(group, values), np.bincount(group, weights)
    ratios = [values[drawn].sum(1) / weights[drawn].sum(1) for drawn in resamples(len(values), seed)]
    return np.concatenate(ratios)


def interval(resampled):
    """(low, high) of the 95% percentile interval (of the resamples in which there is a value)."""
    return tuple(np.nanpercentile(resampled, (2.5, 97.5)).tolist())


def wilson(p, n, z=1.959964):
    """(low, high) of the 95% Wilson score interval of a proportion p of n; unlike the bootstrap's it has a width at 0%
    and 100%."""
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


# ---------------------------------------------------------------------------------------------------------------------
# Over seeds

def t_quantile(freedom, tail=0.025):
    """What Student's t exceeds with probability `tail`. With t = sqrt(freedom) tan(angle), the angle's density is
    cos(angle) to the power of freedom - 1, which can be added up."""
    edges = np.linspace(-math.pi / 2, math.pi / 2, 20_001)
    middles = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(np.cos(middles) ** (freedom - 1))
    angle = np.interp(1 - tail, below / below[-1], edges[1:])
    return math.sqrt(freedom) * math.tan(angle)


def jackknife(statistic, seeds, comparisons=1):
    """(value, low, high) of statistic(numbers of seeds), a number of some seeds together, for one that no seed has by
    itself: of all, and its 95% interval by Student's t over what leaving out each one does. comparisons: see
    `seed_interval`."""
    everything = np.arange(seeds)
    value = statistic(everything)
    without = np.array([statistic(np.delete(everything, seed)) for seed in everything])
    error = math.sqrt((seeds - 1) / seeds * np.sum((without - without.mean()) ** 2))
    half = t_quantile(seeds - 1, 0.025 / comparisons) * error
    return value, value - half, value + half


def seed_interval(values, other=None, comparisons=1):
    """(mean, low, high) of values (S,), one of each seed: the mean and its 95% t interval over trainings, which has no
    bounds for one seed. With others, (S',): of the difference of the means, by Welch's t. comparisons: of how many such
    intervals all are to be right at once, with 95% (Bonferroni)."""
    mean = float(np.mean(values))
    both = [values]
    if other is not None:
        mean -= float(np.mean(other))
        both.append(other)
    if min(map(len, both)) < 2:
        return mean, -math.inf, math.inf
    variances = [np.var(seeds, ddof=1) / len(seeds) for seeds in both]
    freedoms = [len(seeds) - 1 for seeds in both]
    total = sum(variances)
    freedom = freedoms[0]
    if total > 0:
        freedom = total ** 2 / sum(v ** 2 / f for v, f in zip(variances, freedoms))
    half = t_quantile(freedom, 0.025 / comparisons) * math.sqrt(total)
    return mean, mean - half, mean + half
