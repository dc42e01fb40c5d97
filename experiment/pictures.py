"""Pictures: the frontiers and gradients of the default job, and the training curves of any runs."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiment.findings import FOLLOWED, LOST, NOVEL, rate_curves
from experiment.gradient import THEORY
from runtime.files import replacing
from runtime.log import read_metrics
from runtime.process import UserError


class Look(NamedTuple):
    colour: str | None = None       # None: matplotlib's next one
    marker: str = "o"


# Okabe and Ito's colours, which the colour-blind can tell apart, and a marker each.
LOOKS = {
    "sft": Look("#000000", "o"),
    "bft": Look("#D55E00", "s"),
    "bft-token": Look("#0072B2", "^"),
    "bft-v3": Look("#009E73", "D"),
    "sft-sample": Look("#999999", "v"),
    "dft": Look("#CC79A7", "P"),
    "bft-sample": Look("#56B4E9", "X"),
    "bft-tokavg": Look("#E69F00", "p"),
}
# Of those that a variant adds, in one panel.
UNKNOWN = (Look("#0072B2", "^"), Look("#CC79A7", "P"), Look("#E69F00", "v"))


def plot(paths, out):
    """Draws what directories hold, into files beside `out`; returns their paths. A directory of the default job gives
    its frontiers and gradients, runs (or a directory of runs) give their training curves, all on the same axes. Raises
    UserError."""
    plt = import_pyplot()
    jobs, runs = find_directories(paths)
    figures = {}
    for number, job in enumerate(jobs, 1):
        prefix = f"{number}-" if len(jobs) > 1 else ""
        with damage_reported(job):
            results = json.loads((job / "results.json").read_text(encoding="utf-8"))
            figures[f"{prefix}frontier"] = draw_frontier(plt, results)
            figures[f"{prefix}gradient"] = draw_gradient(plt, results["gradient"])
    if runs:
        with damage_reported(", ".join(runs)):
            logs = {name: read_metrics(run / "metrics.jsonl") for name, run in runs.items()}
            figures["curves"] = draw_curves(plt, logs)
    files = []
    for kind, figure in figures.items():
        path = Path(out).with_name(f"{Path(out).stem}-{kind}.png")
        with replacing(path) as f:
            figure.savefig(f, format="png", dpi=150)
        plt.close(figure)
        files.append(path)
    return files


def import_pyplot():
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except Exception as e:
        # It is not there, or not fit for this numpy.
        raise UserError(f'pictures need matplotlib ({e}): pip install -e ".[plot]"') from None
    return plt


def find_directories(paths):
    """([directory of a default job], {name: directory of a run}). A path that is neither stands for the runs in it."""
    found = []
    for path in map(Path, paths):
        runs_inside = sorted(file.parent for file in path.glob("*/metrics.jsonl"))
        is_itself_one = (path / "metrics.jsonl").is_file() or (path / "results.json").is_file()
        if is_itself_one or not runs_inside:
            found.append(path)
        else:
            found += runs_inside
    jobs = [path for path in found if not (path / "metrics.jsonl").is_file()]
    runs = {os.path.relpath(path): path for path in found if path not in jobs}
    return jobs, runs


@contextlib.contextmanager
def damage_reported(name):
    try:
        yield
    except Exception as e:
        # Whatever a damaged file leads to.
        raise UserError(f"{name}: {type(e).__name__} ({e}); expected runs with a step in metrics.jsonl, or what "
                        "`python train.py` left (with --continuum: `python -m experiment.continuum`)") from None


# ---------------------------------------------------------------------------------------------------------------------
# The default job

MOST_IN_ONE = 8                 # curves; more are dealt to several panels ...
EVERYWHERE = ("sft", "bft")     # ... each of which has these, and so many others
OTHERS_IN_ONE = 3


def draw_frontier(plt, results):
    """Novel facts learned against wrong labels followed, and against accuracy lost: a curve for each objective from the
    base over its learning rates, the mean over seeds; a small mark for each seed."""
    curves = rate_curves(results)
    groups = panels_of(list(curves))
    if len(groups) == 1:
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
        axes = axes[:, None]                                              # (2, 1): what is followed, what is lost
    else:
        figure, axes = plt.subplots(2, len(groups), figsize=(3.6 * len(groups), 8), layout="constrained", sharex=True,
                                    sharey="row")
    for column, group in zip(axes.T, groups):
        shown = {name: curves[name] for name in group}
        draw_frontier_on(column[0], shown, FOLLOWED)
        draw_frontier_on(column[1], shown, LOST)
    axes[0, 0].set_ylabel("planted wrong labels followed, %")
    axes[1, 0].set_ylabel("held-out accuracy lost, points")
    rates = [f"{lr:g}" for lr in results["lrs"]]
    if len(groups) == 1:
        lines = [", ".join(rates[i:i + 3]) for i in range(0, len(rates), 3)]
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False,
                      title="From the base through\nlearning rates\n" + ",\n".join(lines))
    else:
        for ax in axes[0]:
            ax.legend(fontsize="small")
    seeds = len(results["seeds"])
    marks = f"Means over {seeds} seeds; small marks are seeds" if seeds > 1 else "One seed"
    through = f". From the base through learning rates {', '.join(rates)}" if len(groups) > 1 else ""
    figure.suptitle(f"Further right and further down is better. {marks}{through}")
    return figure


def panels_of(names):
    """The objectives of each panel: few enough to be told apart."""
    if len(names) <= MOST_IN_ONE:
        return [names]
    everywhere = [name for name in names if name in EVERYWHERE]
    others = [name for name in names if name not in EVERYWHERE]
    return [everywhere + others[i:i + OTHERS_IN_ONE] for i in range(0, len(others), OTHERS_IN_ONE)]


def draw_frontier_on(ax, curves, key):
    unknown = iter(UNKNOWN)
    for name, measured in curves.items():
        look = LOOKS[name] if name in LOOKS else next(unknown, Look())
        x = 100 * measured[NOVEL]                                         # (seeds, 1 + learning rates)
        y = 100 * measured[key]
        line, = ax.plot(x.mean(0), y.mean(0), color=look.colour, marker=look.marker, label=name, zorder=3)
        ax.scatter(x[:, 1:], y[:, 1:], s=9, color=line.get_color(), marker=look.marker, alpha=0.35, linewidth=0)
    # Every curve starts at the base.
    ax.plot(x[:, 0].mean(), y[:, 0].mean(), "*", color="gold", markeredgecolor="black", markersize=16, zorder=4,
            label="base")
    ax.set_xlabel("novel facts right, % (chance 25)")
    ax.grid(alpha=0.3)


def draw_gradient(plt, gradient):
    """|d loss / d logit| of each token against its p, measured; lines are the theory."""
    values = {key: np.array(column) for key, column in gradient.items()}
    names = [key for key in values if key not in ("p", "C")]
    columns = len(names) if len(names) <= MOST_IN_ONE else 6
    rows = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.3 * columns, 3.6 * rows), layout="constrained", squeeze=False,
                                sharey=True)
    for ax in axes.flat[len(names):]:
        ax.set_axis_off()
    for ax, name in zip(axes.flat, names):
        draw_theory_on(ax, name, values["C"])
        dots = ax.scatter(values["p"], values[name], s=3, c=values["C"], cmap="viridis", vmin=0, vmax=1, linewidth=0,
                          zorder=3, rasterized=True)
        ax.set(title=name, xlabel="p of the token")
        ax.grid(alpha=0.3)
        if name in THEORY:
            ax.legend(fontsize="small")
    for ax in axes[:, 0]:
        ax.set_ylabel("|d loss / d logit| x n_b")
    figure.colorbar(dots, label="C of its sample")
    return figure


def draw_theory_on(ax, name, C):
    """One line; for bft, which depends on C, at three of its quantiles."""
    if name not in THEORY:
        return
    styles = {0.5: "--"}
    if name == "bft":
        styles = {0.5: "--", 0.1: "-", 0.9: ":"}
    p = np.linspace(0, 1, 200)
    for quantile, style in styles.items():
        level = np.quantile(C, quantile)
        label = f"theory, C = {level:.2f}" if name == "bft" else "theory"
        ax.plot(p, THEORY[name](p, level), color="black", linewidth=1.2, linestyle=style, zorder=4, label=label)


# ---------------------------------------------------------------------------------------------------------------------
# Training curves

CURVES = {
    "nll": "NLL, nats per response token",
    "confidence": "mean confidence (p)",
    "min_group_confidence": "mean minimum group confidence (C)",
    "grad_norm": "gradient norm, before clipping",
}


def draw_curves(plt, logs):
    """What every run logs in the same unit, whatever its loss. logs: {name: lines of metrics.jsonl}."""
    common = os.path.commonpath(logs) if len(logs) > 1 else ""
    last_parts = [Path(name).name for name in logs]
    named_by_objective = len(set(last_parts)) == len(last_parts) and set(last_parts) <= set(LOOKS)
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained", sharex=True)
    for ax, (key, label) in zip(axes.flat, CURVES.items()):
        for number, (name, lines) in enumerate(logs.items()):
            shown = os.path.relpath(name, common) if common else name
            colour = LOOKS[Path(name).name].colour if named_by_objective else None
            # Every other one is dashed, since curves may coincide.
            style = "-" if number % 2 == 0 else "--"
            draw_curve_on(ax, lines, key, shown, colour, style)
        ax.set(ylabel=label, yscale="log" if key == "grad_norm" else "linear")
        ax.grid(alpha=0.3)
    for ax in axes[1]:
        ax.set_xlabel("step")
    axes[0, 0].legend(fontsize="small")
    figure.suptitle(common)
    return figure


def draw_curve_on(ax, lines, key, shown, colour, style):
    steps, values = np.array([(line["step"], line[key]) for line in lines if "loss" in line]).T
    if len(steps) <= 100:
        curve, = ax.plot(steps, values, linewidth=0.8, label=shown, color=colour, linestyle=style)
    else:
        # A long one is pale, and its running mean is drawn over it.
        curve, = ax.plot(steps, values, linewidth=0.8, alpha=0.35, color=colour, linestyle=style)
        width = len(steps) // 50
        means = np.convolve(values, np.full(width, 1 / width), "valid")
        ax.plot(steps[width - 1:], means, color=curve.get_color(), label=shown)
    validations = [(line["step"], line["val_nll"]) for line in lines if "val_nll" in line]
    if key == "nll" and validations:
        ax.plot(*zip(*validations), "o--", color=curve.get_color(), markersize=4, label=f"{shown}, validation")
