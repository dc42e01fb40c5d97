"""What a run was trained in goes with it: one number from its own validation, eval.py, and a run that goes on from it."""

import json

import pytest
from evaluation_files import evaluate, make_work
from support import call, metrics


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("work"))


@pytest.mark.parametrize("name", ["plain", "own"])
def test_the_format_travels_with_the_model(work, tmp_path, monkeypatch, capsys, name):
    """The run's own validation, eval.py and a run that goes on from it: one NLL, to the bit."""
    argv = ["--data", work / "samples.jsonl", "--val-data", work / "samples.jsonl", "--steps", 2, "--lr", 1e-2, "--dtype", "float32"]
    chosen = ["--chat-format", name] if name == "plain" else []
    assert call(monkeypatch, "--init", work / "base", *argv, *chosen, "--out", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["chat_format"] == name
    validated = [line["val_nll"] for line in metrics(tmp_path / "run") if "val_nll" in line][-1]
    said = capsys.readouterr().out
    assert ("--chat-format plain is another format" in said) == (name == "plain")
    task, = evaluate(monkeypatch, tmp_path, "run", "--tasks", "nll", "--data", work / "samples.jsonl")
    items = task["items"]["run"]
    assert sum(item["nll"] for item in items) / sum(item["tokens"] for item in items) == validated
    assert call(monkeypatch, "--init", tmp_path / "run", *argv, "--out", tmp_path / "next") == 0
    assert metrics(tmp_path / "next")[0] == {"step": 0, "val_nll": validated}
    # Told otherwise it says so, and is another model.
    capsys.readouterr()
    other, = evaluate(monkeypatch, tmp_path, "run", "--tasks", "nll", "--data", work / "samples.jsonl", "--chat-format", "chatml" if name == "plain" else "plain")
    assert "has a chat template of its own" in capsys.readouterr().out
    assert other["items"]["run"] != items
