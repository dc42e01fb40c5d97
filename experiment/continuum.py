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

from experiment.findings import Estimate, estimate_over_seeds, frontier_gap, judge_between, judge_gap, score_curves
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


class Strength(NamedTuple):
    """What is found of the facts that were told in so many wordings."""
    wordings: int
    confidence: float                # the base's in the right answer, a token
    right: float                     # what share of them the base has right
    gaps: dict                       # {(objective, kind): Judged}: minus the reference


# At equal accuracy on what was never told: more of the truly told facts right, more wrong labels followed. And each at
# its own best rate: more of all right. (A fourth kind, "best, since never told", is in no table: how much more that is
# than at strength 0.)
KINDS = ("right", "followed", "best")


def analyse(condensed):
    """{"objectives", "seeds", "levels": (from, to) accuracy on what was never told, "strengths": [Strength],
    "predictions": [(Prediction, {(objective, wordings): Judged})]}. Raises UserError for fewer than two seeds."""
    names = sorted(condensed["objectives"], key=lambda name: name != REFERENCE)
    if names[0] != REFERENCE or len(names) < 2:
        raise UserError(f"objectives {' '.join(names)}; expected sft, with which others are compared, and another one")
    if len(condensed["seeds"]) < 2:
        raise UserError("one seed has no intervals over seeds; expected --seeds 0 1 2, or more of them")
    curves = {name: {stratum: {measure: np.array(values) for measure, values in measures.items()}
                     for stratum, measures in condensed["curves"][name].items()} for name in names}
    seeds, comparisons = len(condensed["seeds"]), (len(names) - 1) * len(STRENGTHS)
    strengths = []
    for wordings in STRENGTHS:
        strata = strata_of(wordings)
        base = {measure: np.mean([curves[REFERENCE][stratum][measure][:, 0] for stratum in strata])
                for measure in ("confidence", "acc")}
        gaps = {}
        for name in names[1:]:
            mine, theirs = curves[name], curves[REFERENCE]
            right = gap_along(mine, theirs, (strata[0], "acc"), comparisons)
            followed = gap_along(mine, theirs, (strata[1], "followed"), comparisons)
            gaps[name, "right"] = judge_gap(right, seeds, less_is_better=False)
            gaps[name, "followed"] = judge_gap(followed, seeds)
            best = gap_at_best(mine, theirs, wordings)
            since_never_told = best - gap_at_best(mine, theirs, 0)
            for kind, values in (("best", best), ("best, since never told", since_never_told)):
                estimate = estimate_over_seeds(values, comparisons)
                gaps[name, kind] = judge_gap(estimate, seeds, less_is_better=False)
        strengths.append(Strength(wordings, base["confidence"], base["acc"], gaps))
    learnt = [curves[name][NEVER_TOLD]["acc"].mean(0) for name in names]   # (1 + learning rates,) each
    start = learnt[0][0]
    end = start + 0.9 * (min(path.max() for path in learnt) - start)
    return {"objectives": names, "seeds": condensed["seeds"], "levels": (start, end), "strengths": strengths,
            "predictions": [(p, judge(p, names[1:], strengths)) for p in predictions_for(condensed["seeds"])]}


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


def gap_at_best(mine, theirs, wordings):
    """(seeds,): more facts right, of those with right and with wrong labels together, each at its own best rate. That
    is chosen for each seed by the mean over the others, so that nobody profits from luck."""
    at_best = []
    for curves in (mine, theirs):
        right = np.mean([curves[stratum]["acc"][:, 1:] for stratum in strata_of(wordings)], axis=0)   # (seeds, rates)
        others = (right.sum(0) - right) / (len(right) - 1)
        at_best.append(right[np.arange(len(right)), others.argmax(1)])    # (seeds,)
    return at_best[0] - at_best[1]


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
WHERE A LOSS PAYS, BY WHAT THE BASE BELIEVES: {seeds} seeds, points more or fewer than {reference}
At equal accuracy on what was never told, from {start:.0%} to {end:.0%}, along frontiers of means over the seeds: facts
that are told truly and are right, wrong labels that are followed. At each one's own best rate: facts that are right,
half of them with wrong labels. Brackets: intervals over seeds by Student's t (the first two by the jackknife), which
hold all at once in a column of all losses, with 95% (Bonferroni). confidence: the base's in the right answer, a
token."""
HEADINGS = {"right": "right, told truly", "followed": "wrong labels followed", "best": "right, at the best rate"}


def render(analysis):
    reference, *others = analysis["objectives"]
    start, end = analysis["levels"]
    lines = [TITLE.format(seeds=len(analysis["seeds"]), reference=reference, start=start, end=end)]
    for name in others:
        lines += ["", f"{name} minus {reference}"]
        lines.append("wordings  confidence  right" + columns(HEADINGS.values(), 28))
        for strength in analysis["strengths"]:
            cells = []
            for kind in KINDS:
                estimate, verdict = strength.gaps[name, kind]
                cells.append(f"{with_interval(estimate, 100, 1, '+')} {VERDICTS[verdict]:6s}")
            lines.append(f"{strength.wordings:8d}{strength.confidence:12.3f}{strength.right:7.0%}" + columns(cells, 28))
    lines += ["", "PREDICTIONS and what became of them, in points (open: the interval allows both)"]
    for prediction, outcomes in analysis["predictions"]:
        words = [f"{name} at {wordings} {outcome.verdict} ({with_interval(outcome.estimate, 100, 1, '+')})"
                 for (name, wordings), outcome in outcomes.items()]
        lines += [f"- {prediction.text}", "  " + "; ".join(words)]
    return "\n".join([*lines, ""])


# ---------------------------------------------------------------------------------------------------------------------
# A picture

def draw(analysis, path):
    """Writes to a PNG file what render() says of each strength, against the base's confidence; returns its path. Raises
    UserError."""
    plt = import_pyplot()
    reference, *others = analysis["objectives"]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    confidence = np.array([strength.confidence for strength in analysis["strengths"]])
    for ax, (kind, heading) in zip(axes, HEADINGS.items()):
        for number, name in enumerate(others):
            gaps = [strength.gaps[name, kind].estimate for strength in analysis["strengths"]]
            mean, low, high = 100 * np.array(gaps).T
            look = LOOKS[name]
            # Side by side, so that no interval hides another one.
            ax.errorbar(confidence + 0.006 * number, mean, (mean - low, high - mean), color=look.colour,
                        marker=look.marker, capsize=3, label=name)
        ax.axhline(0, color=LOOKS[reference].colour, linewidth=0.8, label=reference)
        ax.set(xlabel="the base's confidence in the right answer, a token",
               ylabel=f"{heading}: points minus {reference}")
        ax.grid(alpha=0.3)
        top = ax.secondary_xaxis("top")
        top.set_xticks(confidence, [f"{strength.wordings}x" for strength in analysis["strengths"]], fontsize="small")
    axes[0].legend(fontsize="small")
    axes[0].set_title("At equal accuracy on what was never told:\nhigher is better", fontsize="medium")
    axes[1].set_title("At equal accuracy on what was never told:\nlower is better", fontsize="medium")
    axes[2].set_title("Each at its own best rate, half of the labels wrong:\nhigher is better", fontsize="medium")
    figure.suptitle(f"Means over {len(analysis['seeds'])} seeds; above, in how many wordings a fact was told")
    with replacing(path) as f:
        figure.savefig(f, format="png", dpi=150)
    plt.close(figure)
    return path


def report(condensed, path):
    """Prints what is found, and draws it beside `path`, where the results are."""
    show(analyse(condensed), render, draw, path)


def main():
    parser = Parser(description="Prints and draws again what a job with --continuum found.")
    parser.add_argument("results", help="its continuum.json")
    path = parser.parse_args().results
    report(read_kept(path, KEYS), path)


if __name__ == "__main__":
    run(main)
