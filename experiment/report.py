"""The default job in words: what is said before training, the one table, and all the findings of `findings.analyse`."""

import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

from experiment.findings import FOLLOWED, HELD_OUT, LOST, NLLS, NOVEL, NOVEL_NLL, SHARES, predictions_of
from runtime.process import UserError


INTRODUCTION = """\
What does each loss learn, depending on what the model already believes?

A small model, the base, learns facts about human genes from short texts. Then it is fine-tuned, each time on the same
samples in the same order: from {bases} base(s) with {losses} loss(es) (rows of the table in bft.py) at
{rates} learning rate(s), {trainings} trainings.
  novel facts      are new to the base: are they learnt?
  wrong labels     contradict facts that the base knows: are they followed?
  held-out facts   were taught to the base, and are not fine-tuned: are they forgotten?

Predictions, from how hard a loss pushes a token that the model gives probability p: 1 - p under sft, p (1 - p) where
the loss weighs a token by its p (bft-token, bft, bft-v3):
"""


def introduce(objectives, seeds, learning_rates):
    """What is said before anything is trained."""
    losses, rates, bases = len(objectives), len(learning_rates), len(seeds)
    setting = INTRODUCTION.format(losses=losses, rates=rates, bases=bases, trainings=losses * rates * bases)
    return setting + "\n".join(f"- {prediction.text}" for prediction in predictions_of(objectives))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers as text

def number(value, digits, sign=""):
    rounded = round(value, digits) + 0.0                                  # no -0
    return f"{rounded:{sign}.{digits}f}"


def with_interval(estimate, scale, digits, sign="", half=False):
    """A cell: "46 [36,56]"; with half "46 ±10", for an interval with the mean in its middle; "46" where there is no
    interval, "-" where there is no value."""
    mean, low, high = (value * scale for value in estimate)
    if math.isnan(mean):
        return "-"
    text = number(mean, digits, sign)
    if not math.isfinite(low):
        return text
    if half:
        return f"{text} ±{number((high - low) / 2, digits)}"
    return f"{text} [{number(low, digits)},{number(high, digits)}]"


def columns(cells, width):
    """Cells in columns of this width, a space between them at least."""
    return "".join(f" {cell}".rjust(width) for cell in cells)


# A verdict of `findings.judge_gap` in a narrow column.
VERDICTS = {"better": "better", "worse": "worse", "cannot tell": "?", "no gap": " "}


def label_width(analysis):
    return max(map(len, analysis["objectives"])) + 2


# ---------------------------------------------------------------------------------------------------------------------
# The one table

OVER_ITEMS = """\
Brackets: 95% intervals over the questions, for this one base. One seed says nothing of other trainings:
`python train.py --seeds 0 1 2` trains from three bases, and gives intervals over them."""
OVER_SEEDS = """\
Brackets: 95% intervals over {} seeds (bases, wrong labels, orders of samples) by Student's t, for shares never
narrower than over the questions, which are the same with every seed. One interval in twenty misses."""


def summarise(analysis):
    """The objectives side by side, in at most 25 lines: learnt, followed, forgotten, and the NLL of what is new."""
    names = analysis["objectives"]
    equal_rate, equal_accuracy = analysis["equal_rate"], analysis["equal_accuracy"]
    wide = max(label_width(analysis) + 8, len("base, not tuned"))
    lines = ["WHAT EACH LOSS LEARNT, FOLLOWED AND FORGOT", ""]
    for heading in (("learnt:", "followed:", "forgotten:", "NLL of novel facts:"),
                    ("novel facts", "wrong labels", "held-out facts", "of the right answer,"),
                    ("right, %", "believed, %", "lost, points", "nats per token")):
        lines.append(" " * wide + columns(heading, 22))
    lines.append("base, not tuned".ljust(wide) + summary_cells(equal_rate["scores"]["base"]))
    lines.append(f"All at the same learning rate, {equal_rate['lr'][names[0]]:g}:")
    for name in names:
        lines.append(name.ljust(wide) + summary_cells(equal_rate["scores"][name]))
    if equal_accuracy:
        lines.append(f"Each at the learning rate (read off between those tried) with {equal_accuracy['level']:.0%} of "
                     "the novel facts right:")
        for name in names:
            label = f"{name.ljust(wide - 8)}{equal_accuracy['lr'][name]:<8.2g}"
            lines.append(label + summary_cells(equal_accuracy["scores"][name]))
    else:
        lines.append("No comparison at equal novel accuracy: not every loss gets above the base.")
    seeds = len(analysis["seeds"])
    lines += ["", "Each question has four options: chance is 25% right. NLL is 0 where the right answer is certain.",
              OVER_ITEMS if seeds == 1 else OVER_SEEDS.format(seeds), ""]
    return "\n".join(lines)


def summary_cells(scores):
    cells = [with_interval(scores[key], 100, 0) for key in (NOVEL, FOLLOWED, LOST)]
    cells.append(with_interval(scores[NOVEL_NLL], 1, 2))
    return columns(cells, 22)


# ---------------------------------------------------------------------------------------------------------------------
# Everything

def render(analysis):
    """The findings as text: frontiers, strata at equal novel accuracy and at an equal learning rate, gradients, and
    what became of the predictions."""
    lines = [*render_setting(analysis), *render_curves(analysis)]
    for key in (NOVEL, NOVEL_NLL):
        lines += render_frontiers(analysis, key)
    equal_accuracy = analysis["equal_accuracy"]
    if equal_accuracy:
        lines += ["", f"AT EQUAL NOVEL ACCURACY: {equal_accuracy['level']:.0%}, nine tenths of the way that all come, "
                  "read off between rates", *render_strata(analysis, equal_accuracy)]
    else:
        lines += ["", "No table at equal novel accuracy: not every objective gets above the base."]
    equal_rate = analysis["equal_rate"]
    rate = equal_rate["lr"][analysis["objectives"][0]]
    lines += ["", f"AT AN EQUAL LEARNING RATE, the middle one, {rate:g}", *render_strata(analysis, equal_rate)]
    lines += render_gradient(analysis["gradient"])
    lines += render_predictions(analysis)
    return "\n".join([*lines, ""])


SETTING = """\
What each loss learns, by what the model already believes: {bases} base(s), each fine-tuned {losses} x {rates} times.
Facts: {facts}.
Four options, so that chance is 25%.
Known genes were pre-trained often, weak ones a few times, novel ones never; planted facts are known ones
fine-tuned on a wrong label; held-out ones are not fine-tuned. Who merely forgets a planted fact picks its
wrong label in a third of the errors.
The bases answer {knows:.0%} of their known and planted facts; their NLL of a novel answer is {novel_nll:.1f} nats per
token, of a wrong label {planted_nll:.1f}."""
INTERVALS_OVER_SEEDS = """\
Brackets and ±: 95% intervals over seeds (Student's t), for shares never narrower than over items. The facts
are the same with every seed; bases, wrong labels and order are not. One interval in twenty misses."""
INTERVALS_OVER_ITEMS = """\
One seed: brackets and ± are over items alone, and say nothing of other trainings. --seeds 0 1 2 trains three."""


def render_setting(analysis):
    facts = "; ".join(f"{count} {stratum}" for stratum, count in analysis["facts"].items())
    bases, losses, rates = len(analysis["seeds"]), len(analysis["objectives"]), len(analysis["rates"]) - 1
    text = SETTING.format(bases=bases, losses=losses, rates=rates, facts=facts, **analysis["base"])
    return [text, INTERVALS_OVER_SEEDS if bases > 1 else INTERVALS_OVER_ITEMS]


def render_curves(analysis):
    wide = label_width(analysis)
    lines = ["", "FRONTIER: novel facts right / wrong labels followed / held-out accuracy lost, % (lr 0: the base)",
             " " * wide + columns([f"{rate:g}" for rate in analysis["rates"]], 13)]
    for name in analysis["objectives"]:
        curves = analysis["curves"][name]
        cells = []
        for at_rate in zip(curves[NOVEL], curves[FOLLOWED], curves[LOST]):
            cells.append(" / ".join(number(value * 100, 0) for value in at_rate))
        lines.append(name.ljust(wide) + columns(cells, 13))
    return lines


def render_frontiers(analysis, key):
    """At equal NOVEL or NOVEL_NLL: is an objective's curve the reference's?"""
    reference, *others = analysis["objectives"]
    if not others:
        return []
    what, scale, digits, unit = "accuracy on novel facts", 100, 0, "%"
    if key == NOVEL_NLL:
        what, scale, digits, unit = "NLL of novel facts", 1, 2, ""
    frontiers = analysis["frontiers"][key]
    reach = {name: number(value * scale, digits) + unit for name, value in frontiers["reach"].items()}
    wide = label_width(analysis)
    lines = ["", f"Does it leave {reference}'s frontier? Points more or fewer at equal {what},",
             f"read off straight lines between the rates; {reference} reaches {reach[reference]}"]
    if len(others) > 1:
        lines.append(f"The {len(others)} intervals of a column hold at once, with 95% (Bonferroni)")
    lines.append(f"{'':{wide}s}    compared  reaches{'wrong labels followed':>36s}{'held-out accuracy lost':>36s}")
    for name in others:
        comparison = frontiers["comparisons"][name]
        start, end = (number(value * scale, digits) for value in (comparison.start, comparison.end))
        line = f"{name.ljust(wide)}{f'{start}-{end}{unit}':>12s}{reach[name]:>9s}"
        for gap in (comparison.followed, comparison.lost):
            verdict = gap.verdict
            if verdict in ("better", "worse"):
                verdict = f"yes, {verdict}"
            line += f"{with_interval(gap.estimate, 100, 1, '+')}  {verdict:11s}".rjust(36)
        lines.append(line)
    return lines


class Block(NamedTuple):
    """Columns of numbers of one kind."""

    title: str
    keys: tuple
    scale: int
    digits: int
    width: int
    half: bool          # whether the intervals have the mean in their middle


BLOCKS = (Block("Right answer picked, %; wrong label: the planted one picked, %", SHARES, 100, 0, 14, half=False),
          Block("NLL of the right answer, nats per token", NLLS, 1, 2, 16, half=True))


def render_strata(analysis, place):
    """What `findings.read_off` found at one place of the curves: scores, and under them the differences."""
    wide = label_width(analysis)
    lines = []
    for block in BLOCKS:
        headings = columns(map(heading_of, block.keys), block.width)
        lines += [block.title, " " * wide + "lr".rjust(8) + headings]
        for name, scores in place["scores"].items():
            cells = [with_interval(scores[key], block.scale, block.digits, half=block.half) for key in block.keys]
            lines.append(f"{name.ljust(wide)}{place['lr'][name]:8.2g}" + columns(cells, block.width))
        if len(analysis["seeds"]) == 1:
            continue
        for name, differences in place["differences"].items():
            cells = [with_interval(differences[key], block.scale, block.digits, "+", half=True) for key in block.keys]
            label = f"{name} - {analysis['objectives'][0]}"
            lines.append(label.ljust(wide + 8) + columns(cells, block.width))
    return lines


def heading_of(key):
    if key == FOLLOWED:
        return "wrong label"
    stratum, _ = key
    return f"held-out {stratum.split(',')[0]}" if stratum in HELD_OUT else stratum


PUSHES_IN_A_LINE = 5


def render_gradient(gradient):
    """What `gradient.analyse_gradient` returns, by bucket of p; bft's also by thirds of C."""
    names = gradient["objectives"]
    lines = ["", "GRADIENT: |d loss / d logit| of a response token, times n_b: measured (theory) share of all,",
             f"at the first base, {gradient['tokens']} tokens.",
             "Within a sample sft-sample pushes as sft does, bft-token as dft, bft-tokavg as bft."]
    for first in range(0, len(names), PUSHES_IN_A_LINE):
        lines += render_pushes(gradient["buckets"], names[first:first + PUSHES_IN_A_LINE])
    if "bft" in names:
        thirds = [f"C {low:.3f} to {high:.3f}" for low, high in itertools.pairwise(gradient["C_edges"])]
        lines += ["bft, by its sample's minimum group confidence C as well: measured (theory)",
                  "p".ljust(12) + columns(thirds, 22)]
        for bucket in gradient["buckets"]:
            cells = ["-" if push is None else f"{push.measured:.4f} ({push.theory:.4f})" for push in bucket.bft_by_C]
            lines.append(f"{bucket.low:g} to {bucket.high:g}".ljust(12) + columns(cells, 22))
    return lines


def render_pushes(buckets, names):
    """A line for each bucket of p, a column for each of these objectives."""
    widths = {name: max(20, len(name) + 1) for name in names}
    lines = ["p".ljust(12) + "tokens".rjust(7) + "".join(name.rjust(widths[name]) for name in names)]
    for bucket in buckets:
        line = f"{bucket.low:g} to {bucket.high:g}".ljust(12) + f"{bucket.share:7.1%}"
        for name in names:
            if name in bucket.pushes:
                push = bucket.pushes[name]
                theory = "" if push.theory is None else f" ({push.theory:.3f})"
                line += f"{push.measured:.3f}{theory}{push.share:5.0%}".rjust(widths[name])
        lines.append(line)
    return lines


def render_predictions(analysis):
    lines = ["", "PREDICTIONS and what became of them, in points (open: the interval allows both)"]
    if not analysis["predictions"]:
        return [*lines, "They need three seeds, and sft among the objectives."]
    for prediction, outcomes in analysis["predictions"]:
        words = [f"{name} {outcome.verdict} ({with_interval(outcome.estimate, 100, 0, '+')})"
                 for name, outcome in outcomes.items()]
        lines += [f"- {prediction.text}", "  " + "; ".join(words)]
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Other experiments, whose results are small enough to be kept

def read_kept(path, keys):
    """The results that an experiment left, an object with these keys. Raises UserError."""
    try:
        results = json.loads(Path(path).read_bytes())
        if results.keys() != keys:
            raise ValueError(f"it has the keys {', '.join(results)}")
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(f"{path}: {e}; expected what an earlier run of this experiment left") from None
    return results


def show(analysis, render, draw, path):
    """Prints an analysis, and draws it beside its results, which are at `path`."""
    print(render(analysis))
    try:
        print(f"picture: {draw(analysis, Path(path).with_suffix('.png'))}")
    except UserError as e:
        # matplotlib is not one of the required packages.
        print(f"No picture: {e}")
