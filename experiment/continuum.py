"""Where on the continuum of belief does a loss pay? What `python train.py --continuum` finds, in numbers and words.

    python -m experiment.continuum docs/continuum.json       # the table and the picture of an earlier job, in seconds

The base is told facts in 0 to 18 wordings; at each strength half of them are fine-tuned with wrong labels. Objectives
are compared with sft in two ways. At equal accuracy on what the base was never told ("told 0x"), all along their
frontiers, as in the default job: how many more facts are right, and how many more wrong labels are followed. These
facts are too few for a frontier of each seed: it is that of the means over the seeds. And each at the learning rate
that is best for it at this strength: how many more facts are right, those with right and with wrong labels together.
"""

import math
from typing import NamedTuple

import numpy as np

from experiment.findings import (
    Estimate,
    compared_range,
    estimate_over_seeds,
    frontier_gap,
    judge_between,
    judge_gap,
    score_curves,
)
from experiment.pictures import LOOKS, import_pyplot
from experiment.report import VERDICTS, columns, read_kept, show, with_interval
from runtime.files import replacing
from runtime.process import Parser, UserError, run
from tasks.statistics import jackknife


STRENGTHS = (0, 1, 2, 4, 8, 18)      # wordings
NEVER_TOLD = "told 0x"
REFERENCE = "sft"
KEYS = {"objectives", "seeds", "lrs", "curves"}


class Prediction(NamedTuple):
    """That the difference from sft lies between two bounds."""
    text: str
    strengths: tuple                 # wordings, for each of which it is said
    kind: str                        # one of `Strength.gaps`
    above: float = -math.inf
    below: float = math.inf
    seen: tuple = ()                 # seeds that had been seen when it was made: they do not judge it


FIRST_TEN = tuple(range(10))
PREDICTIONS = (
    Prediction("At equal accuracy on what was never told, bft and bft-v3 follow fewer wrong labels about facts that "
               "were told in 8 and 18 wordings.", (8, 18), "followed", below=0),
    Prediction("About facts that were never told, or in one wording, they follow as many (within 5 points): the model "
               "expects a wrong label there no less than a right one.", (0, 1), "followed", above=-0.05, below=0.05),
    Prediction("Of facts that were told in 1 and 2 wordings, and are told again, they have as many right (within 5 "
               "points).", (1, 2), "right", above=-0.05, below=0.05),
    Prediction("At each one's own best rate, they have more right than sft of facts that were told in 2 and 4 "
               "wordings.", (2, 4), "best", above=0, seen=FIRST_TEN),
    Prediction("At each one's own best rate, they have fewer right of facts that were never told.", (0,), "best",
               below=0, seen=FIRST_TEN),
    Prediction("What they have more right at each one's own best rate is more where facts were told in 2 wordings than "
               "where they were never told.", (2,), "best, since never told", above=0, seen=FIRST_TEN),
)


def predictions_for(seeds):
    """Those that had not seen any of them."""
    return [prediction for prediction in PREDICTIONS if not set(prediction.seen) & set(seeds)]


INTRODUCTION = """\
Where on the continuum of belief does a loss pay?

A small model, the base, is told facts about human genes in 0, 1, 2, 4, 8 or 18 wordings. Then it is fine-tuned: at each
strength half of the facts have wrong labels. {trainings} trainings.

Predictions:
"""


def introduce(objectives, seeds, learning_rates):
    """What is said before anything is trained."""
    trainings = len(objectives) * len(seeds) * len(learning_rates)
    predictions = [f"- {prediction.text}" for prediction in predictions_for(seeds)]
    return INTRODUCTION.format(trainings=trainings) + "\n".join(predictions)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers

def condense(results):
    """Of the job's results, which hold every item's scores, what is kept: {"objectives", "seeds", "lrs", "curves":
    {objective: {stratum: {measure: (seeds, 1 + learning rates)}}}}, means over the stratum's facts, the base's first.
    Measures: acc, confidence (exp(-nll), the right answer's probability a token), of planted facts also followed."""
    curves = {}
    for name in results["objectives"]:
        of_seeds = [score_curves(results, name, seed) for seed in results["seeds"]]
        curves[name] = {}
        for stratum, measure in of_seeds[0]:
            values = [of_seed[stratum, measure] for of_seed in of_seeds]   # (1 + learning rates, facts) each
            if measure == "nll":
                measure, values = "confidence", [np.exp(-nll) for nll in values]
            if measure != "planted_nll":
                means = np.array([value.mean(1) for value in values])     # (seeds, 1 + learning rates)
                curves[name].setdefault(stratum, {})[measure] = means.round(5).tolist()
    return {"objectives": list(results["objectives"]), "seeds": results["seeds"], "lrs": results["lrs"],
            "curves": curves}


class Gain(NamedTuple):
    """More facts right than before fine-tuning, at an objective's own best rate."""
    lr: float                        # the one that is chosen for most seeds
    is_inside: bool                  # not the lowest or the highest rate: a better one may lie beyond those
    estimate: Estimate


class Strength(NamedTuple):
    """What is found of the facts that were told in so many wordings."""
    wordings: int
    confidence: float                # the base's in the right answer, a token
    right: dict                      # {objective: (1 + learning rates,) what share is right}, the base's first
    gains: dict                      # {objective: Gain}
    gaps: dict                       # {(objective, kind): Judged}: minus the reference


# The gaps in the table. At equal accuracy on what was never told: more of the truly told facts right, more wrong labels
# followed. Each at its own best rate: more of all facts right. Only a prediction asks for the fourth kind, "best, since
# never told": how much larger that last gap is than at strength 0.
KINDS = ("right", "followed", "best")


def analyse(condensed):
    """{"objectives", "seeds", "rates": 0 (for the base) and the learning rates, "levels": {objective: (from, to)}: the
    accuracy on what was never told where it is compared with sft, "strengths": [Strength], "gains": {objective: Gain}
    over all strengths, with one rate for all of them, "predictions": [(Prediction, {(objective, wordings): Judged})]}.
    Raises UserError for fewer than two seeds."""
    names = sorted(condensed["objectives"], key=lambda name: name != REFERENCE)
    if names[0] != REFERENCE or len(names) < 2:
        raise UserError(f"objectives {' '.join(names)}; expected sft, with which others are compared, and another one")
    if len(condensed["seeds"]) < 2:
        raise UserError("one seed has no intervals over seeds; expected --seeds 0 1 2, or more of them")
    curves = {name: {stratum: {measure: np.array(values) for measure, values in measures.items()}
                     for stratum, measures in condensed["curves"][name].items()} for name in names}
    rates = [0, *condensed["lrs"]]
    strengths = [analyse_strength(wordings, curves, rates) for wordings in STRENGTHS]
    learnt = {name: curves[name][NEVER_TOLD]["acc"].mean(0, keepdims=True) for name in names}
    levels = {name: compared_range(learnt[name], learnt[REFERENCE]) for name in names[1:]}
    gains = {name: gain_of(facts_right(curves[name], *STRENGTHS), rates, len(names)) for name in names}
    return {"objectives": names, "seeds": condensed["seeds"], "rates": rates, "levels": levels,
            "strengths": strengths, "gains": gains,
            "predictions": [(p, judge(p, names[1:], strengths)) for p in predictions_for(condensed["seeds"])]}


def analyse_strength(wordings, curves, rates):
    """The Strength. curves: {objective: {stratum: {measure: (seeds, 1 + learning rates)}}}, the reference first."""
    reference, *others = curves
    told_truly, planted = strata_of(wordings)
    right = {name: facts_right(curves[name], wordings) for name in curves}
    seeds, comparisons = len(right[reference]), len(others) * len(STRENGTHS)
    gaps = {}
    for name in others:
        more_right = gap_along(curves[name], curves[reference], (told_truly, "acc"), comparisons)
        if told_truly == NEVER_TOLD:
            # At equal ones of these they are compared.
            more_right = Estimate(math.nan, math.nan, math.nan)
        gaps[name, "right"] = judge_gap(more_right, seeds, less_is_better=False)
        followed = gap_along(curves[name], curves[reference], (planted, "followed"), comparisons)
        gaps[name, "followed"] = judge_gap(followed, seeds)
        best = gap_at_best(curves[name], curves[reference], wordings)
        since_never_told = best - gap_at_best(curves[name], curves[reference], 0)
        for kind, values in (("best", best), ("best, since never told", since_never_told)):
            gaps[name, kind] = judge_gap(estimate_over_seeds(values, comparisons), seeds, less_is_better=False)
    gains = {name: gain_of(right[name], rates, len(curves) * len(STRENGTHS)) for name in curves}
    confidence = np.mean([curves[reference][stratum]["confidence"][:, 0] for stratum in (told_truly, planted)])
    return Strength(wordings, confidence, {name: right[name].mean(0) for name in curves}, gains, gaps)


def strata_of(wordings):
    """(facts with right labels, those with wrong ones)"""
    return f"told {wordings}x", f"told {wordings}x, planted"


def gap_along(mine, theirs, key, comparisons):
    """Estimate: more of what `key` names, (stratum, measure), at equal accuracy on what was never told, along frontiers
    of means over seeds."""
    stratum, measure = key
    seeds = len(mine[NEVER_TOLD]["acc"])

    def gap(some):
        paths = []
        for curves in (mine, theirs):
            paths += [curves[NEVER_TOLD]["acc"][some].mean(0), curves[stratum][measure][some].mean(0)]
        return frontier_gap(*paths)

    return Estimate(*jackknife(gap, seeds, comparisons))


def facts_right(curves, *strengths):
    """(seeds, 1 + learning rates): what share is right of the facts of these strengths, those with right and those with
    wrong labels together."""
    strata = [stratum for wordings in strengths for stratum in strata_of(wordings)]
    return np.mean([curves[stratum]["acc"] for stratum in strata], axis=0)


def at_best(right):
    """(what share is right (seeds,), places of the rates (seeds,)) at the best rate, which is chosen for each seed by
    the mean over the others, so that nobody profits from luck. right: (seeds, 1 + learning rates)."""
    trained = right[:, 1:]
    others = (trained.sum(0) - trained) / (len(trained) - 1)
    places = others.argmax(1) + 1
    return right[np.arange(len(right)), places], places


def gap_at_best(mine, theirs, wordings):
    """(seeds,): more facts right, each at its own best rate."""
    return at_best(facts_right(mine, wordings))[0] - at_best(facts_right(theirs, wordings))[0]


def gain_of(right, rates, comparisons):
    best, places = at_best(right)
    place = np.bincount(places).argmax()
    return Gain(rates[place], 1 < place < len(rates) - 1, estimate_over_seeds(best - right[:, 0], comparisons))


def judge(prediction, names, strengths):
    """{(objective, wordings): Judged}"""
    judged = {}
    for strength in strengths:
        if strength.wordings not in prediction.strengths:
            continue
        for name in names:
            estimate = strength.gaps[name, prediction.kind].estimate
            judged[name, strength.wordings] = judge_between(estimate, prediction.above, prediction.below)
    return judged


# ---------------------------------------------------------------------------------------------------------------------
# Words

TITLE = """\
WHERE A LOSS PAYS, BY WHAT THE BASE BELIEVES: {seeds} seeds
Brackets: intervals over seeds by Student's t (at equal accuracy by the jackknife), which hold all at once in a column,
those of all losses, with 95% (Bonferroni). ?: it has 0 in it. confidence: the base's in the right answer, a token."""
AGAINST_THE_BASE = """\
FACTS RIGHT, half of them fine-tuned with wrong labels: points more than before fine-tuning. Each loss at its best
rate, which for each seed the others choose (*: the lowest or the highest one; a better one may lie beyond)"""
AGAINST_THE_REFERENCE = """\
POINTS MORE OR FEWER THAN {reference}
At equal accuracy on what was never told, along frontiers of means over the seeds: facts told truly that are right, and
wrong labels that are followed. Each at its own best rate: facts right, as above."""
HEADINGS = {"right": "told truly: right", "followed": "wrong labels followed", "best": "right, best rate"}


def render(analysis):
    reference, *others = analysis["objectives"]
    lines = [TITLE.format(seeds=len(analysis["seeds"])), "", *render_right(analysis), "", *render_gains(analysis), "",
             AGAINST_THE_REFERENCE.format(reference=reference)]
    for name in others:
        start, end = analysis["levels"][name]
        lines += ["", f"{name} minus {reference}; at equal accuracy: from {start:.1%} to {end:.1%}"]
        headings = [f"{heading} {'':6s}" for heading in HEADINGS.values()]
        lines.append("wordings  confidence" + columns(headings, 32))
        for strength in analysis["strengths"]:
            cells = []
            for kind in KINDS:
                estimate, verdict = strength.gaps[name, kind]
                cells.append(f"{with_interval(estimate, 100, 1, '+')} {VERDICTS[verdict]:6s}")
            lines.append(f"{strength.wordings:8d}{strength.confidence:12.3f}" + columns(cells, 32))
    lines += ["", "PREDICTIONS and what became of them, in points (open: the interval allows both)"]
    for prediction, outcomes in analysis["predictions"]:
        words = [f"{name}, {wordings} wordings: {outcome.verdict} ({with_interval(outcome.estimate, 100, 1, '+')})"
                 for (name, wordings), outcome in outcomes.items()]
        lines += [f"- {prediction.text}", "  " + "; ".join(words)]
    return "\n".join([*lines, ""])


def render_right(analysis):
    lines = ["FACTS RIGHT, %, half of them fine-tuned with wrong labels, by learning rate (0: before fine-tuning)",
             f"{'':10s}wordings" + columns([f"{rate:g}" for rate in analysis["rates"]], 8)]
    for name in analysis["objectives"]:
        for strength in analysis["strengths"]:
            cells = [f"{share:.0%}" for share in strength.right[name]]
            lines.append(f"{name:10s}{strength.wordings:8d}" + columns(cells, 8))
    return lines


def render_gains(analysis):
    names = analysis["objectives"]
    lines = [AGAINST_THE_BASE, "wordings  confidence" + columns(names, 32)]
    for strength in analysis["strengths"]:
        cells = [gain_cell(strength.gains[name]) for name in names]
        lines.append(f"{strength.wordings:8d}{strength.confidence:12.3f}" + columns(cells, 32))
    cells = [gain_cell(analysis["gains"][name]) for name in names]
    return [*lines, "all, at one rate".ljust(20) + columns(cells, 32)]


def gain_cell(gain):
    rate = f"{gain.lr:g}"
    if not gain.is_inside:
        rate += "*"
    return f"{with_interval(gain.estimate, 100, 1, '+')} at {rate:7s}"


# ---------------------------------------------------------------------------------------------------------------------
# A picture

def draw(analysis, path):
    """Writes to a PNG file what render() says of each strength, against the base's confidence; returns its path. Raises
    UserError."""
    plt = import_pyplot()
    reference, *others = analysis["objectives"]
    strengths = analysis["strengths"]
    panels = {
        "Facts with right labels, at equal accuracy\non what was never told: higher is better":
            {name: [strength.gaps[name, "right"].estimate for strength in strengths] for name in others},
        "Wrong labels followed, at equal accuracy\non what was never told: lower is better":
            {name: [strength.gaps[name, "followed"].estimate for strength in strengths] for name in others},
        "All facts, each loss at its own best rate:\nhigher is better":
            {name: [strength.gains[name].estimate for strength in strengths] for name in analysis["objectives"]},
    }
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    confidence = np.array([strength.confidence for strength in strengths])
    for ax, (title, estimates_of_losses) in zip(axes, panels.items()):
        for number, (name, estimates) in enumerate(estimates_of_losses.items()):
            mean, low, high = 100 * np.array(estimates).T
            look = LOOKS[name]
            # Side by side, so that no interval hides another one.
            ax.errorbar(confidence + 0.006 * number, mean, (mean - low, high - mean), color=look.colour,
                        marker=look.marker, capsize=3, label=name)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set(xlabel="the base's confidence in the right answer, a token", ylabel=f"points minus {reference}")
        ax.set_title(title, fontsize="medium")
        ax.grid(alpha=0.3)
        top = ax.secondary_xaxis("top")
        top.set_xticks(confidence, [f"{strength.wordings}x" for strength in strengths], fontsize="small")
    axes[2].set(ylabel="points right minus the base, before fine-tuning")
    axes[2].legend(fontsize="small")
    figure.suptitle(f"Means over {len(analysis['seeds'])} seeds; above, in how many wordings a fact was told")
    with replacing(path) as f:
        figure.savefig(f, format="png", dpi=150)
    plt.close(figure)
    return path


def report(condensed, path):
    """Prints what is found, and draws it beside `path`, where the results are."""
    show(analyse(condensed), render, draw, path)


def of_seeds(condensed, seeds):
    """What is kept of these seeds alone. Raises UserError."""
    missing = set(seeds) - set(condensed["seeds"])
    if missing:
        raise UserError(f"--seeds {' '.join(map(str, sorted(missing)))}: not among {condensed['seeds']}")
    places = [condensed["seeds"].index(seed) for seed in seeds]
    curves = {name: {stratum: {measure: [values[place] for place in places] for measure, values in measures.items()}
                     for stratum, measures in strata.items()} for name, strata in condensed["curves"].items()}
    return {**condensed, "seeds": seeds, "curves": curves}


def main():
    parser = Parser(description="Prints and draws again what a job with --continuum found.")
    parser.add_argument("results", help="its continuum.json")
    parser.add_argument("--seeds", type=int, nargs="+", help="of these seeds alone, without a picture")
    args = parser.parse_args()
    condensed = read_kept(args.results, KEYS)
    if args.seeds:
        print(render(analyse(of_seeds(condensed, args.seeds))))
    else:
        report(condensed, args.results)


if __name__ == "__main__":
    run(main)
