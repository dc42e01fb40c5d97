"""The default job from its command to what it leaves, with so few steps that nothing is learned."""

import itertools
import json
import math
import os
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from forked import forked
from support import ASSETS, ROOT, call, metrics

import train
from experiment import continuum, job
from experiment.planting import plant
from runtime.process import UserError
from runtime.ranks import Ranks
from runtime.rows import read_jsonl
from tasks.choice import load_choice


SMALL = ["--steps", 2, "--n-layer", 1, "--n-embd", 32, "--n-head", 2]
GRID = ["--seeds", 0, 5, "--lrs", 2e-3, 1e-3, "--objective", "sft", "bft"]


@pytest.fixture
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "BASE", {**job.BASE, "epochs": 0, "steps": 2})
    return tmp_path


def test_a_base_by_itself_has_two_threads(monkeypatch):
    threads, entry = [], {"seed": 0, "lr": 0, "objective": "base", "items": []}
    here = types.SimpleNamespace(workers=2, ranks=types.SimpleNamespace(print=lambda _: None),
                                 train_and_ask=lambda _: threads.append(torch.get_num_threads()) or entry)
    monkeypatch.setattr(np, "mean", lambda values: 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert list(job.Job.train_all(here, ["base"])) == [entry] and threads == [2]
        torch.set_num_threads(1)
        here.workers = 1                                                  # a machine of one core, or one of several ranks
        assert list(job.Job.train_all(here, ["base"])) == [entry] and threads == [2, 1]
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_the_default_job_end_to_end(in_a_folder, monkeypatch, capsys):
    asked, started = [], {}
    choice_items, prepare_model = job.choice_items, train.prepare_model

    def note_questions(model, tokenizer, items, dtype):
        asked.append([item.get("planted") for item in items])
        return choice_items(model, tokenizer, items, dtype)

    def note_start(config, start, settings, *rest):
        started.setdefault(settings.seed, set()).add(str(start))
        return prepare_model(config, start, settings, *rest)

    monkeypatch.setattr(job, "choice_items", note_questions)
    monkeypatch.setattr(train, "prepare_model", note_start)
    for out in ("b", "a"):
        asked.clear()
        assert call(monkeypatch, *SMALL, *GRID, "--out", out) == 0
    printed = capsys.readouterr().out
    assert printed.count("2 steps; nothing to do") == 2                   # the second time the bases were there
    assert printed.index("learn fewer novel facts") < printed.index("from step 0")   # predicted before training
    # Only bases say more than a line.
    assert "lr 0.002  bft" in printed and "from step 0 to 2" in printed and printed.count("step 2/2") == 2
    table = (in_a_folder / "a" / "table.txt").read_text()
    assert table in printed and table == (in_a_folder / "b" / "table.txt").read_text()
    assert table.index("WHAT EACH LOSS LEARNT") < table.index("FRONTIER") < table.index("PREDICTIONS")

    runs = [f"seed-{seed}/lr-{lr}/{objective}" for seed in (0, 5) for lr in (0.001, 0.002) for objective in ("sft", "bft")]
    for name in runs:
        assert metrics(in_a_folder / "a" / name) == metrics(in_a_folder / "b" / name)
        assert not (in_a_folder / "a" / name / "checkpoint").exists()     # many trainings would fill a disk
    results = json.loads((in_a_folder / "a" / "results.json").read_text())
    models = {(m["seed"], m["lr"], m["objective"]): m["items"] for m in results["models"]}
    assert set(models) == set(itertools.product((0, 5), (1e-3, 2e-3), ("sft", "bft"))) | {(0, 0, "base"), (5, 0, "base")}
    assert all(len(items) == 432 and sum("followed" in item for item in items) == 96 for items in models.values())

    # One base and one order of samples for every objective, and others with every seed.
    first = {seed: [metrics(in_a_folder / "a" / f"seed-{seed}" / "lr-0.001" / name)[0] for name in ("sft", "bft")] for seed in (0, 5)}
    for sft, bft in first.values():
        assert math.isclose(sft["nll"], bft["nll"], rel_tol=1e-9) and sft["tokens"] == bft["tokens"]
    assert first[0][0]["nll"] != first[5][0]["nll"]
    rows, items = list(read_jsonl(ASSETS / "finetune.jsonl")), load_choice(ASSETS / "choice.jsonl")
    planted = {seed: [item.get("planted") for item in plant(rows, items, seed)[1]] for seed in (0, 5)}
    # The bases come first.
    assert asked == [planted[0], planted[5]] + [planted[0]] * 4 + [planted[5]] * 4 and planted[0] != planted[5]
    configs = {name: json.loads((in_a_folder / "a" / name / "config.json").read_text()) for name in runs}
    bases = {name: config["settings"]["init"] for name, config in configs.items()}
    for name, base in bases.items():                                      # from the base of its seed
        seed = int(name.split("/")[0].removeprefix("seed-"))
        assert started[seed] == {"None", f"{base}/model"}                 # the base itself begins with random weights
        assert json.loads((in_a_folder / base / "config.json").read_text())["settings"]["seed"] == seed
    assert len(set(bases.values())) == 2
    tokens = [config["sha256"]["tokens"] for config in configs.values()]
    assert len(set(tokens[:4])) == len(set(tokens[4:])) == 1 and tokens[0] != tokens[4]

    # Again, and where there is no matplotlib: nothing is trained, nor drawn.
    assert (in_a_folder / "a" / "demo-frontier.png").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call(monkeypatch, *SMALL, *GRID, "--out", "a") == 0
    printed = capsys.readouterr().out
    assert table in printed and (in_a_folder / "a" / "table.txt").read_text() == table
    assert "No pictures: pictures need matplotlib" in printed and 'pip install -e ".[plot]"' in printed
    assert "results.json" in printed


@pytest.mark.slow
def test_the_continuum_has_facts_and_findings_of_its_own(in_a_folder, monkeypatch, capsys):
    assert call(monkeypatch, *SMALL, "--continuum", *GRID, "--out", "c") == 0
    printed = capsys.readouterr().out
    assert printed.index("At equal accuracy on what was never told") < printed.index("from step 0")   # predicted before training
    assert "WHERE A LOSS PAYS" in printed and "picture: c/continuum.png" in printed
    condensed = json.loads((in_a_folder / "c" / "continuum.json").read_text())
    models = json.loads((in_a_folder / "c" / "results.json").read_text())["models"]
    assert condensed == json.loads(json.dumps(continuum.condense({**condensed, "models": models})))
    assert len(models) == 2 * (1 + 4) and all(len(model["items"]) == 480 for model in models)
    assert all(sum("followed" in item for item in model["items"]) == 240 for model in models)
    # Of the default job's bases none is taken, and its directory is another one.
    assert call(monkeypatch, *SMALL, *GRID, "--out", "c") == 2 and "holds another run" in capsys.readouterr().err


@pytest.mark.slow
def test_one_seed_prints_one_table(in_a_folder, monkeypatch, capsys):
    """And one learning rate and one objective are enough."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call(monkeypatch, *SMALL, "--lr", 1e-3, "--objective", "bft", "--out", "one") == 0
    printed = capsys.readouterr().out
    table = (in_a_folder / "one" / "table.txt").read_text()
    summary, rest = table.split("What each loss learns, by what")
    assert summary.strip() in printed and rest not in printed and "FRONTIER" in rest
    assert "One seed says nothing of other trainings" in printed
    assert "one/table.txt" in printed.split(summary.strip())[1].splitlines()[2]
    assert printed.count("seed 0  ") == 2                                 # a line for the base and one for the training


@pytest.mark.slow
def test_workers_give_the_same_and_end_with_the_command(in_a_folder, monkeypatch):
    """Two workers, stopped and started again, against one process. They know the rows of --variant, and what these need."""
    # Pictures have tests of their own.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = [*SMALL[2:], "--steps", 100, "--batch-size", 4, "--lr", 1e-3, "--variant", ROOT / "variants" / "iw_sft.py", ROOT / "variants" / "eaft.py",
            "--objective", "eaft", "iw-sft", "--log-every", 1, "--out", "job"]
    assert call(monkeypatch, *argv) == 0
    expected = (in_a_folder / "job" / "results.json").read_bytes()
    (in_a_folder / "job").rename("one-process")
    command = [sys.executable, ROOT / "tests" / "experiment" / "small_job.py", *map(str, argv)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": path}
    runs = [in_a_folder / "job" / "seed-0" / "lr-0.001" / name for name in ("eaft", "iw-sft")]

    process = subprocess.Popen(command, env={**environment, "SECONDS_OF_A_STEP": "0.5"}, stdout=subprocess.DEVNULL)
    while process.poll() is None and not all(metrics(run) for run in runs):
        time.sleep(0.05)
    process.terminate()
    assert process.wait(120) == 143
    for run in runs:
        assert 0 < len(metrics(run)) < 100 and list((run / "checkpoint").iterdir()) and not (run / "model").exists()
    assert subprocess.run(command, timeout=240, env=environment, stdout=subprocess.DEVNULL).returncode == 0
    assert (in_a_folder / "job" / "results.json").read_bytes() == expected
    for run in runs:
        assert metrics(run) == metrics(in_a_folder / "one-process" / "seed-0" / "lr-0.001" / run.name)


@pytest.mark.slow
def test_eight_ranks_print_what_one_does(tmp_path):
    """Whole or sharded. A batch has fewer samples than there are ranks, and of some matrices the last rank has no row."""
    argv = ["--device", "cpu", "--seeds", 0, "--lrs", 1e-3, "--objective", "sft", "bft", "--steps", 3, "--batch-size", 6,
            "--n-layer", 1, "--n-embd", 20, "--n-head", 2]
    nlls = {}
    for ranks, shard in ((1, "no"), (8, "no"), (8, "all")):
        # Each trains a base of its own.
        folder = tmp_path / f"{ranks} {shard}"
        folder.mkdir()
        result = forked(ranks, ROOT / "tests" / "experiment" / "small_job.py", *argv, "--shard", shard, cwd=folder)
        # Where this is slow, one rank says how far it has come.
        errors = [line for line in result.stderr.splitlines() if not line.startswith("rows of ")]
        assert (result.returncode, errors) == (0, [])
        assert result.stdout.count("WHAT EACH LOSS LEARNT") == 1
        assert [line.split()[:2] for line in result.stdout.splitlines()].count(["seed", "0"]) == 3
        models = json.loads((folder / "runs" / "demo" / "results.json").read_text())["models"]
        nlls[ranks, shard] = [item["nll"] for model in models for item in model["items"]]
    assert len(nlls[1, "no"]) == 3 * 432
    for layout in nlls:
        assert nlls[layout] == pytest.approx(nlls[1, "no"], abs=1e-4)


def test_what_the_default_job_goes_over():
    def grid(*argv):
        seeds, learning_rates, _ = train.parse_settings(list(map(str, argv)))[1]
        return seeds, learning_rates

    assert not train.parse_settings([])[1].is_continuum and train.parse_settings(["--continuum"])[1].is_continuum
    assert grid() == ([0], list(job.FIRST_LOOK)) and len(job.FIRST_LOOK) >= 3
    assert grid("--seeds", 0, 1) == ([0, 1], list(job.LEARNING_RATES)) and len(job.LEARNING_RATES) >= 4
    assert grid("--seed", 4, "--lr", 1e-3) == ([4], [1e-3]) and grid("--lrs", 1) == ([0], [1])
    assert grid("--seeds", 3, 1, 3, "--lrs", 0.5, 0.1) == ([1, 3], [0.1, 0.5])
    assert train.parse_settings([])[0].group_size == 16                   # it has defaults of its own
    for argv, words in ((["--data", "x", "--seeds", "0"], "default job's"), (["--init", "x", "--seeds", "1"], "default job's"),
                        (["--init", "x", "--lrs", "1"], "default job's"), (["--data", "x", "--continuum"], "default job's"),
                        (["--quick"], "--quick"),
                        (["--seed", "1", "--seeds", "2"], "both"), (["--lr", "1", "--lrs", "2"], "both"),
                        (["--lrs", "1", "nan", "2"], "--lrs"), (["--seeds", "-1"], "--seeds"), (["--lrs", "0"], "--lrs"),
                        (["--lrs", "nan"], "--lrs"), (["--lrs", "inf"], "--lrs")):
        with pytest.raises(UserError, match=words):
            train.parse_settings(argv)


@pytest.mark.slow
def test_a_base_is_kept_until_something_changes_it(in_a_folder, monkeypatch):
    def base(*argv, seed=0):
        settings, _ = train.parse_settings(list(map(str, argv)))
        return job.Job(settings, ASSETS, Ranks("cpu"), train.train, train.describe_run).plan_base(seed, [])

    kept = base()
    assert kept.out.parent.name == "runs" and kept.settings.seed == 0
    assert base("--group-size", 8, "--lr", 1, "--epochs", 9, "--out", "x").out == kept.out
    assert base(seed=1).out != kept.out and base(seed=1).settings.seed == 1
    assert base("--n-embd", 32).out != kept.out
    code = job.read_code()
    for name in ("bft.py", "model.py", "data.py", "train.py", "hf/weights.py", "hf/tokenizer.py", "runtime/files.py"):
        assert (ROOT / name).read_text(encoding="utf-8") in code
    monkeypatch.setattr(job, "read_code", lambda: [*code[:-1], code[-1] + "\n"])
    assert base().out != kept.out


def test_what_is_not_ours_is_not_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("notes.txt", "config.json", "results.json"):             # an evaluation's, of another program
        (tmp_path / name / "out").mkdir(parents=True)
        (tmp_path / name / "out" / name).write_text("mine")
        assert call(monkeypatch, "--out", f"{name}/out") == 2
        assert "holds something else" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / name / "out").iterdir()] == [name] and not (tmp_path / "runs").exists()
