"""Pictures show what was measured, and damaged files are a user's mistake."""

import json
import sys

import numpy as np
import pytest
from made_up_results import make_simple_results

from experiment import pictures
from experiment.pictures import draw_curves, draw_frontier, draw_gradient, plot
from runtime.process import UserError


# matplotlib is an extra.
pytestmark = pytest.mark.slow

TWO = ("sft", "bft")


@pytest.fixture
def plt():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    yield plt
    plt.close("all")


@pytest.fixture(scope="module")
def results():
    results = make_simple_results({"sft": [10, 15], "bft": [8, 12]}, {"sft": [6, 12], "bft": [1, 2]})
    for model in results["models"]:                                       # all that was held out is lost at once
        for item in model["items"]:
            if "held" in item["group"]:
                item["acc"] = int(model["lr"] == 0)
    return results


def lines_of_a_run(steps):
    lines = [{"step": i + 1, "loss": 9, "nll": 2 - i / steps, "confidence": 0.5, "min_group_confidence": 0.1, "grad_norm": 1 + i}
             for i in range(steps)]
    return [*lines, {"step": 0, "val_nll": 2.5}, {"step": steps, "val_nll": 2.25}]


@pytest.fixture
def folder(tmp_path, results, monkeypatch):
    """A job, a short run and a long one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "results.json").write_text(json.dumps(results))
    for name, steps in (("x/sft", 3), ("y/bft", 400)):
        (tmp_path / name).mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines_of_a_run(steps))
        (tmp_path / name / "metrics.jsonl").write_text(text)
    return tmp_path


def by_label(ax):
    return {line.get_label(): line for line in ax.get_lines()}


def test_frontiers(plt, results):
    figure = draw_frontier(plt, results)
    left, right = map(by_label, figure.axes[:2])
    # In % of 20 items, the mean of the seeds.
    assert left["bft"].get_xydata().tolist() == pytest.approx(np.array([[25, 0], [40, 10], [60, 15]]))
    assert left["sft"].get_xydata().tolist() == pytest.approx(np.array([[25, 0], [50, 35], [75, 65]]))
    assert right["bft"].get_xydata().tolist() == [[25, 0], [40, 100], [60, 100]]
    assert "Means over 3 seeds" in figure.get_suptitle()
    assert left["base"].get_xydata().tolist() == [[25, 0]]
    assert left["sft"].get_color() == "#000000" and left["bft"].get_color() == "#D55E00" and left["bft"].get_marker() == "s"
    seeds = figure.axes[0].collections[list(left).index("bft")].get_offsets()
    assert seeds.tolist() == pytest.approx(np.array([[40, 5 + 5 * s] if i == 0 else [60, 10 + 5 * s] for s in range(3) for i in range(2)]))


def test_gradients(plt):
    gradient = {"p": [0.1, 0.6], "C": [0.5, 0.5], "sft": [0.9, 0.4], "bft": [0.045, 0.12], "new": [1.0, 2.0]}
    axes = draw_gradient(plt, gradient).axes
    for ax, name in zip(axes, ("sft", "bft", "new")):
        assert ax.get_title() == name
        assert ax.collections[0].get_offsets().tolist() == pytest.approx(np.array([*zip(gradient["p"], gradient[name])]))
        for line in ax.get_lines():
            p = line.get_xdata()
            assert line.get_ydata() == pytest.approx(1 - p if name == "sft" else 0.5 * p * (1 - p))
    assert [len(ax.get_lines()) for ax in axes[:3]] == [1, 3, 0]


def test_curves(plt):
    figure = draw_curves(plt, {"x/sft": lines_of_a_run(3), "y/bft": lines_of_a_run(400)})
    labels = [ax.get_ylabel().split(",")[0] for ax in figure.axes]
    assert labels == ["NLL", "mean confidence (p)", "mean minimum group confidence (C)", "gradient norm"]
    for ax, start in zip(figure.axes, (2, 0.5, 0.1, 1)):
        assert by_label(ax)["x/sft"].get_ydata()[0] == start
    drawn = {label: line.get_xydata() for label, line in by_label(figure.axes[0]).items()}
    assert drawn["x/sft"].tolist() == pytest.approx(np.array([[1, 2], [2, 2 - 1 / 3], [3, 2 - 2 / 3]]))
    assert drawn["x/sft, validation"].tolist() == [[0, 2.5], [3, 2.25]]
    # Means of eight steps each, as late as the last of them.
    mean = drawn["y/bft"]
    assert len(mean) == 393 and mean[0].tolist() == pytest.approx([8, 2 - 3.5 / 400])


def test_files(folder, results, monkeypatch):
    names = [str(path) for path in plot(["job", "x/sft", "y/bft"], "look.json")]
    assert names == ["look-frontier.png", "look-gradient.png", "look-curves.png"]
    for name in names:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in folder.iterdir() if path.is_file()} == set(names)
    # A directory that holds the runs of several objectives stands for them.
    (folder / "x" / "dft").mkdir()
    (folder / "x" / "dft" / "metrics.jsonl").write_bytes((folder / "x" / "sft" / "metrics.jsonl").read_bytes())
    drawn = []

    def note(plt, logs):
        drawn.append(list(logs))
        return plt.figure()

    monkeypatch.setattr(pictures, "draw_curves", note)
    plot(["x", "y"], "look.json")
    assert drawn == [["x/dft", "x/sft", "y/bft"]]
    # Of two jobs, each has its number. (Empty figures are drawn faster.)
    (folder / "other").mkdir()
    (folder / "other" / "results.json").write_text(json.dumps(results))
    for name in ("draw_frontier", "draw_gradient"):
        monkeypatch.setattr(pictures, name, lambda plt, measured: plt.figure())
    two = plot(["job", f"../{folder.name}/other"], "two")
    assert sorted(path.name for path in two) == ["two-1-frontier.png", "two-1-gradient.png", "two-2-frontier.png", "two-2-gradient.png"]


def test_damaged_files(folder, results, monkeypatch):
    whole = json.dumps(results)
    for broken in ("{}", "[]", '{"models": 3}', "no", whole.replace('"gradient": {', '"gradient": null, "x": {'),
                   whole.replace('"objectives": ["sft", "bft"]', '"objectives": []'),
                   whole.replace('"seeds": [0, 1, 2]', '"seeds": []')):
        assert broken != whole
        (folder / "job" / "results.json").write_text(broken)
        with pytest.raises(UserError, match="^job: "):
            plot(["job"], "look")
    with open(folder / "x/sft/metrics.jsonl", "a") as f:
        f.write('{"step": 9, "los')                                       # a run that is writing just now
    plot(["x/sft"], "look")
    for broken in ("", '{"step": "a", "loss": 1, "nll": 2}\n', '{"loss": 1}\n'):
        (folder / "x/sft/metrics.jsonl").write_text(broken)
        with pytest.raises(UserError, match="^x/sft: "):
            plot(["x/sft"], "look")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[plot\]"'):
        plot(["y/bft"], "look")


def test_the_command(folder, monkeypatch, capsys):
    import eval as evaluation
    from runtime.process import run

    def command(*argv):
        monkeypatch.setattr(sys, "argv", ["eval.py", *argv])
        with pytest.raises(SystemExit) as ended:
            run(evaluation.main)
        return ended.value.code or 0, capsys.readouterr()

    code, said = command("job", "x/sft", "y/bft", "--tasks", "plot", "--out", "look.json")
    assert code == 0 and said.out.count("picture: ") == 3
    for name in ("look-frontier.png", "look-gradient.png", "look-curves.png"):
        assert name in said.out and (folder / name).is_file()
    (folder / "job" / "results.json").write_text("{}")
    code, said = command("job", "--tasks", "plot")
    assert code == 2 and said.err.startswith("error: job: ") and "Traceback" not in said.err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, said = command("y/bft", "--tasks", "plot")
    assert code == 2 and 'pip install -e ".[plot]"' in said.err
