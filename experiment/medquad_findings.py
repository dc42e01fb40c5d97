"""What the experiment of medquad.py finds: numbers, words and a picture from its results.

`results` is what medquad.py saves: init, objectives, seeds, lrs, and under "models" what each was scored, the base
(objective "base", lr 0) once for each seed:

    val_nll, val_tokens, val_confidence      of each row about other diseases: summed NLL, tokens, C_b
    rouge, tokens                            of each answer: ROUGE-L (F1) with the reference, and its length
    followed, planted_nll, true_nll          of each row with a wrong label: whether that is likelier per token than
                                             the right one, and both NLLs per token
    other_nll, other_tokens                  of each text of another kind
"""

import math
from typing import NamedTuple

import numpy as np

from experiment.findings import Estimate, compared_range, estimate_over_seeds, frontier_gap, judge_between, judge_gap
from experiment.pictures import LOOKS, import_pyplot
from experiment.report import VERDICTS, columns, number, with_interval
from runtime.files import replacing
from tasks.statistics import interval


RESULTS = {"init", "objectives", "seeds", "lrs", "models"}
REFERENCE = "sft"
# As planned; and what is trained, too, if by NLL a loss is best at the lowest or the highest of them.
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
BELOW, BEYOND = 1e-4, 1e-2


class Measure(NamedTuple):
    """A number of a model: the sum of one key over its rows, by the sum of another, or the mean."""
    heading: str
    key: str
    per: str | None = None
    scale: float = 1                 # as it is shown
    digits: int = 3
    less_is_better: bool | None = True   # None: neither is


MEASURES = {
    "nll": Measure("NLL", "val_nll", "val_tokens"),
    "rouge": Measure("ROUGE-L %", "rouge", scale=100, digits=1, less_is_better=False),
    "followed": Measure("wrong labels followed %", "followed", scale=100, digits=1),
    "other": Measure("NLL of other texts", "other_nll", "other_tokens"),
    "confidence": Measure("min group confidence", "val_confidence", less_is_better=None),
}
ANSWER_TOKENS = Measure("answer's tokens", "tokens", digits=0, less_is_better=None)
# Which rows a key is of: those of one kind are drawn together.
ROWS = {"val_nll": 0, "val_confidence": 0, "rouge": 1, "other_nll": 2, "followed": 3}


class Prediction(NamedTuple):
    """That a difference from sft lies between two bounds."""
    text: str
    objectives: tuple
    measure: str                     # of what ...
    where: str                       # ... in the mean over the "rates", or at equal "nll"
    above: float = -math.inf
    below: float = math.inf


WEIGHTED = ("dft", "bft", "bft-v3")
PREDICTIONS = (
    Prediction("In the mean over the learning rates the weighted losses have a higher NLL on other diseases than sft, "
               "since they give up on what the model finds unlikely.", WEIGHTED, "nll", "rates", above=0),
    Prediction("They follow fewer wrong labels.", WEIGHTED, "followed", "rates", below=0),
    Prediction("They lose less on texts of another kind.", WEIGHTED, "other", "rates", below=0),
    Prediction("Their minimum group confidence on other diseases is lower.", WEIGHTED, "confidence", "rates", below=0),
    Prediction("Their answers' ROUGE-L is within 2 points of sft's.", WEIGHTED, "rouge", "rates", above=-0.02,
               below=0.02),
    Prediction("At equal NLL they follow as many wrong labels as sft, within 5 points: a lower rate of sft would do as "
               "well.", WEIGHTED, "followed", "nll", above=-0.05, below=0.05),
)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers

def analyse(results):
    """All that is printed and drawn, as numbers:

    objectives, seeds, rates     sft first; 0 (for the base) and the learning rates
    planned                      the places of the planned rates among `rates`; all places where one of them is missing
    counts                       {"val", "answers", "planted", "other": rows; "planted" those of the first seed}
    curves                       {objective: {measure: (seeds, 1 + learning rates)}}
    answer_tokens                {objective: (1 + learning rates,)} of an answer, in the mean
    frontiers                    {"nll", "rouge": {objective: {other measure: Gap}}} beside sft at equal ones
    best                         {"nll", "rouge": {objective: Best}}: each at its own best rate
    predictions                  [(Prediction, {objective: Gap})]
    """
    names = sorted(results["objectives"], key=lambda name: name != REFERENCE)
    models = {(m["objective"], m["seed"], m["lr"]): m for m in results["models"]}
    paths = {name: paths_of(models, name, results) for name in names}
    curves = {name: curves_of(value_of, paths[name]) for name in names}
    resampled = {name: curves_of(resample, paths[name]) for name in names}
    first = models["base", results["seeds"][0], 0]
    counts = {"val": len(first["val_nll"]), "answers": len(first["rouge"]), "planted": len(first["followed"]),
              "other": len(first["other_nll"])}
    rates = [0, *results["lrs"]]
    planned = LEARNING_RATES if set(LEARNING_RATES) <= set(rates) else rates[1:]
    tokens = {name: curve_of(value_of, ANSWER_TOKENS, paths[name]).mean(0) for name in names}
    analysis = {"objectives": names, "seeds": results["seeds"], "rates": rates, "counts": counts, "curves": curves,
                "planned": [rates.index(rate) for rate in planned], "answer_tokens": tokens}
    analysis["frontiers"] = {at: {name: gaps_at_equal(at, name, curves, resampled) for name in names[1:]}
                             for at in BY}
    analysis["best"] = {by: {name: best_of(by, name, curves, resampled, results["lrs"]) for name in names} for by in BY}
    analysis["predictions"] = []
    for prediction in PREDICTIONS:
        trained = [name for name in prediction.objectives if name in names]
        outcomes = {name: judge(prediction, name, analysis, resampled) for name in trained}
        analysis["predictions"].append((prediction, outcomes))
    return analysis


BY = ("nll", "rouge")


def paths_of(models, name, results):
    """For each seed, the base and an objective's models at each rate."""
    return [[models["base", seed, 0], *(models[name, seed, lr] for lr in results["lrs"])] for seed in results["seeds"]]


def curves_of(number_of, paths):
    return {key: curve_of(number_of, measure, paths) for key, measure in MEASURES.items()}


def curve_of(number_of, measure, paths):
    """(seeds, 1 + learning rates, ...) of what number_of(measure, model) returns."""
    return np.array([[number_of(measure, model) for model in path] for path in paths])


def value_of(measure, model):
    values, weights = rows_of(measure, model)
    return values.sum() / weights.sum()


DRAWS = 1000


def resample(measure, model):
    """The value over rows that are drawn with replacement, the same ones of all models: (DRAWS,). Those with wrong
    labels are drawn for each seed by itself."""
    values, weights = rows_of(measure, model)
    seed = model["seed"] if measure.key == "followed" else 0
    rng = np.random.RandomState([ROWS[measure.key], seed])
    drawn = rng.randint(len(values), size=(DRAWS, len(values)))
    return values[drawn].sum(1) / weights[drawn].sum(1)


def interval_over_rows(of_draws):
    """(low, high), 95%; without bounds where more than one draw in twenty has no value."""
    if np.isnan(of_draws).mean() > 0.05:
        return -math.inf, math.inf
    return interval(of_draws)


def rows_of(measure, model):
    """(values, weights) of the rows: (R,) each."""
    values = np.array(model[measure.key], dtype=float)
    return values, np.array(model[measure.per], dtype=float) if measure.per else np.ones_like(values)


class Gap(NamedTuple):
    """A difference from sft."""
    estimate: Estimate               # over seeds
    over_rows: tuple                 # (low, high), 95%
    verdict: str                     # by both


def wider(estimate, over_rows):
    """The Estimate that is as uncertain as both over seeds and over rows."""
    return Estimate(estimate.mean, min(estimate.low, over_rows[0]), max(estimate.high, over_rows[1]))


def gaps_at_equal(at, name, curves, resampled):
    """{other measure: Gap}: more (or less) than sft at equal NLL or ROUGE-L, all along what both reach from the base.
    """
    gaps = {}
    for key, measure in MEASURES.items():
        if key == at:
            continue
        of_seeds = gaps_of_seeds(at, key, curves[name], curves[REFERENCE])
        estimate = estimate_over_seeds(of_seeds, len(curves) - 1)
        of_draws = []
        for draw in range(DRAWS):
            mine, theirs = ({k: resampled[who][k][:, :, draw] for k in (at, key)} for who in (name, REFERENCE))
            of_draws.append(np.mean(gaps_of_seeds(at, key, mine, theirs)))
        over_rows = interval_over_rows(of_draws)
        verdict = judge_gap(wider(estimate, over_rows), len(of_seeds), measure.less_is_better).verdict
        gaps[key] = Gap(estimate, over_rows, verdict)
    return gaps


def gaps_of_seeds(at, key, mine, theirs):
    sign = -1 if MEASURES[at].less_is_better else 1
    return [frontier_gap(*of_seed) for of_seed in zip(sign * mine[at], mine[key], sign * theirs[at], theirs[key])]


class Best(NamedTuple):
    """An objective at the learning rate that is best for it, and minus sft at sft's."""
    lr: float
    is_inside: bool                  # not the lowest or the highest rate: a better one may lie beyond those
    scores: dict                     # {measure: Estimate}, over seeds
    over_seeds: dict                 # {measure: Estimate} of the difference; none for sft itself
    over_rows: dict                  # {measure: (low, high)} of the difference, 95%


def best_of(by, name, curves, resampled, lrs):
    place, other_place = (best_place(by, curves[key]) for key in (name, REFERENCE))
    scores, over_seeds, over_rows = {}, {}, {}
    for key in MEASURES:
        values = curves[name][key][:, place]                              # (seeds,)
        scores[key] = estimate_over_seeds(values)
        if name == REFERENCE:
            continue
        over_seeds[key] = estimate_over_seeds(values - curves[REFERENCE][key][:, other_place], len(curves) - 1)
        differences = resampled[name][key][:, place] - resampled[REFERENCE][key][:, other_place]   # (seeds, DRAWS)
        over_rows[key] = interval_over_rows(differences.mean(0))
    return Best(lrs[place - 1], 1 < place < len(lrs), scores, over_seeds, over_rows)


def best_place(by, curve):
    """Of the learning rates (the base is none) that whose mean over seeds is best."""
    mean = curve[by][:, 1:].mean(0)
    return 1 + int(mean.argmin() if MEASURES[by].less_is_better else mean.argmax())


def judge(prediction, name, analysis, resampled):
    """The Gap that was predicted, in the mean over the planned rates or at equal NLL."""
    if prediction.where == "rates":
        curve, reference = (analysis["curves"][key][prediction.measure] for key in (name, REFERENCE))
        differences = (curve - reference)[:, analysis["planned"]].mean(1)   # (seeds,)
        estimate = estimate_over_seeds(differences, len(analysis["objectives"]) - 1)
        of_draws = resampled[name][prediction.measure] - resampled[REFERENCE][prediction.measure]
        over_rows = interval_over_rows(of_draws[:, analysis["planned"]].mean((0, 1)))
    else:
        estimate, over_rows, _ = analysis["frontiers"][prediction.where][name][prediction.measure]
    verdict = judge_between(wider(estimate, over_rows), prediction.above, prediction.below).verdict
    return Gap(estimate, over_rows, verdict)


def rates_to_add(analysis):
    """{rate: losses}: what the plan demands beside the planned rates, and the losses for which it does."""
    wanted = {}
    if [analysis["rates"][place] for place in analysis["planned"]] != list(LEARNING_RATES):
        return wanted
    for name in analysis["objectives"]:
        best = analysis["curves"][name]["nll"].mean(0)[analysis["planned"]].argmin()
        if best == 0:
            wanted.setdefault(BELOW, []).append(name)
        elif best == len(LEARNING_RATES) - 1:
            wanted.setdefault(BEYOND, []).append(name)
    return wanted


# ---------------------------------------------------------------------------------------------------------------------
# Words

TITLE = """\
What each loss does to a pretrained model: {seeds} seeds. Measured on {val} rows about other diseases, {answers} of them
answered; on {other} texts of another kind; and on the rows with wrong labels ({planted} with the first seed).
Brackets: 95% intervals. Over seeds by Student's t, those of differences from {reference} for all {others} losses
at once (Bonferroni); over rows by the paired bootstrap, each by itself, for these trainings alone. A verdict needs
both. ? means that an interval includes 0."""
WIDTH = 26


def render(analysis):
    reference, *others = analysis["objectives"]
    lines = [TITLE.format(seeds=len(analysis["seeds"]), reference=reference, others=len(others), **analysis["counts"])]
    lines += ["", "AT EACH LEARNING RATE (0: the start), means over seeds", *render_curves(analysis)]
    for at in BY:
        heading = MEASURES[at].heading.removesuffix(" %")
        lines += ["", f"AT EQUAL {heading}, all along from the start to nine tenths of what both reach: minus "
                  f"{reference}", "(-: from one seed at least they reach nothing in common)"]
        lines += render_gaps(analysis, at)
    for by in BY:
        heading = MEASURES[by].heading.removesuffix(" %")
        lines += ["", f"EACH AT ITS OWN BEST RATE BY {heading} (of the mean over seeds); below it, minus {reference} "
                  "over seeds, and over rows", *render_best(analysis["best"][by])]
    lines += ["", *render_predictions(analysis)]
    return "\n".join([*lines, ""])


def cell(estimate, measure, sign=""):
    return with_interval(estimate, measure.scale, measure.digits, sign)


def headings(measures, first=""):
    return first.ljust(18) + columns([measure.heading for measure in measures], WIDTH)


def render_curves(analysis):
    lines = [headings([*MEASURES.values(), ANSWER_TOKENS], "loss, rate")]
    for name, curves in analysis["curves"].items():
        for place, rate in enumerate(analysis["rates"]):
            cells = []
            for key, measure in MEASURES.items():
                cells.append(f"{curves[key][:, place].mean() * measure.scale:.{measure.digits}f}")
            cells.append(f"{analysis['answer_tokens'][name][place]:.0f}")
            if rate or name == REFERENCE:
                lines.append(f"{name if rate else 'start':10s}{rate:<8g}" + columns(cells, WIDTH))
    return lines


def render_gaps(analysis, at):
    measures = {key: measure for key, measure in MEASURES.items() if key != at}
    sign = -1 if MEASURES[at].less_is_better else 1
    reference = sign * analysis["curves"][REFERENCE][at]
    # A verdict stands after each difference.
    lines = [f"{'':8s}compared" + columns([f"{measure.heading} {'':6s}" for measure in measures.values()], WIDTH + 6)]
    for name, gaps in analysis["frontiers"][at].items():
        start, end = compared_range(sign * analysis["curves"][name][at], reference)
        over_seeds, over_rows = [], []
        for key, measure in measures.items():
            estimate, of_rows, verdict = gaps[key]
            word = "" if measure.less_is_better is None else VERDICTS[verdict]
            over_seeds.append(f"{cell(estimate, measure, '+')} {word:6s}")
            over_rows.append(f"{cell(Estimate(estimate.mean, *of_rows), measure, '+')} {'':6s}")
        ends = [number(sign * value * MEASURES[at].scale, 2) for value in (start, end)]
        lines.append(f"{name:8s}{'-'.join(ends):10s}" + columns(over_seeds, WIDTH + 6))
        lines.append("  over rows".ljust(18) + columns(over_rows, WIDTH + 6))
    return lines


def render_best(best):
    lines = [headings(MEASURES.values(), "loss, rate")]
    for name, own in best.items():
        at_the_end = "" if own.is_inside else "*"
        cells = [cell(own.scores[key], measure) for key, measure in MEASURES.items()]
        lines.append(f"{name:10s}{f'{own.lr:g}{at_the_end}':8s}" + columns(cells, WIDTH))
        if own.over_seeds:
            cells = [cell(own.over_seeds[key], measure, "+") for key, measure in MEASURES.items()]
            lines.append("  over seeds".ljust(18) + columns(cells, WIDTH))
            cells = [cell(Estimate(own.over_seeds[key].mean, *own.over_rows[key]), measure, "+")
                     for key, measure in MEASURES.items()]
            lines.append("  over rows".ljust(18) + columns(cells, WIDTH))
    if not all(own.is_inside for own in best.values()):
        lines.append("* at an end of the rates: a better one may lie beyond")
    return lines


def render_predictions(analysis):
    rates = " ".join(f"{analysis['rates'][place]:g}" for place in analysis["planned"])
    lines = [f"PREDICTIONS and what became of them (mean over the rates {rates}; open: an interval allows both)"]
    for prediction, outcomes in analysis["predictions"]:
        measure = MEASURES[prediction.measure]
        words = []
        for name, (estimate, over_rows, verdict) in outcomes.items():
            of_rows = cell(Estimate(estimate.mean, *over_rows), measure, "+")
            words.append(f"{name} {verdict} (over seeds {cell(estimate, measure, '+')}, over rows {of_rows})")
        lines += [f"- {prediction.text}", "  " + "; ".join(words)]
    for rate, losses in rates_to_add(analysis).items():
        is_here = "is here" if rate in analysis["rates"] else "is not here yet"
        lines += ["", f"By NLL the best of the planned rates is at an end for {', '.join(losses)}: by the plan "
                  f"{rate:g} is trained, too, and {is_here}."]
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# A picture

PANELS = (("nll", "followed"), ("nll", "other"), ("rouge", "followed"))


def draw(analysis, path):
    """Writes three frontiers, from the start over the learning rates, to a PNG file; returns its path. Raises
    UserError."""
    plt = import_pyplot()
    figure, axes = plt.subplots(1, len(PANELS), figsize=(5 * len(PANELS), 4.6), layout="constrained")
    for ax, (x_key, y_key) in zip(axes, PANELS):
        x_measure, y_measure = MEASURES[x_key], MEASURES[y_key]
        for name, curves in analysis["curves"].items():
            x, y = curves[x_key] * x_measure.scale, curves[y_key] * y_measure.scale   # (seeds, 1 + learning rates)
            look = LOOKS[name]
            ax.plot(x.mean(0), y.mean(0), color=look.colour, marker=look.marker, label=name, zorder=3)
            ax.scatter(x[:, 1:], y[:, 1:], s=9, color=look.colour, marker=look.marker, alpha=0.35, linewidth=0)
        ax.plot(x[:, 0].mean(), y[:, 0].mean(), "*", color="gold", markeredgecolor="black", markersize=16, zorder=4,
                label="start")
        ax.set(xlabel=f"{x_measure.heading} (other diseases)", ylabel=y_measure.heading)
        ax.grid(alpha=0.3)
        if x_measure.less_is_better:
            # To the right is better, as elsewhere.
            ax.invert_xaxis()
    axes[0].legend(fontsize="small")
    rates = ", ".join(f"{rate:g}" for rate in analysis["rates"][1:])
    figure.suptitle(f"Further right and further down is better. Means over {len(analysis['seeds'])} seeds; small marks "
                    f"are seeds. From the start through learning rates {rates}")
    with replacing(path) as f:
        figure.savefig(f, format="png", dpi=150)
    plt.close(figure)
    return path
