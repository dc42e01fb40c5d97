"""--report: tensorboard and wandb have the lines of metrics.jsonl, also of a run that goes on, and change nothing."""

import json
import math
import os
import shutil
import sys
import threading
import time

import pytest
from forked import forked
from support import ROOT, SMALL, call, metrics, torchrun

import bft
from runtime import run_directory
from runtime.checkpoint import checkpoints


ARGV = [*SMALL, "--data", "data.jsonl", "--val-data", "data.jsonl", "--steps", 6, "--batch-size", 4, "--save-every", 2, "--eval-every", 3,
        "--keep", 3, "--log-every", 4, "--device", "cpu"]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """A directory with data, and nobody's account of wandb."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "response": "b c d"}\n' * 12)


def tensorboard_lines(out):
    """{(step, name): value} that tensorboard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    shown = [((event.step, name), event.value) for name in events.Tags()["scalars"] for event in events.Scalars(name)]
    assert len(dict(shown)) == len(shown)                                 # no step twice
    return dict(shown)


def wandb_records(path):
    """The protobuf records of a .wandb file: after 7 bytes, pieces in blocks of 32 kB, each after its crc, size and type
    (1: whole, 2 to 4: first, middle, last)."""
    from wandb.proto.wandb_internal_pb2 import Record
    content, at, pieces = path.read_bytes(), 7, []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(content[at + 4:at + 6], "little"), content[at + 6]
        if at + 7 + size > len(content):
            # Not all of it is written yet.
            return
        pieces.append(content[at + 7:at + 7 + size])
        at += 7 + size
        if kind in (1, 4):
            yield Record.FromString(b"".join(pieces))
            pieces = []


def wandb_lines(path):
    """({(step, name): value}, settings, run) of a .wandb file."""
    lines, settings, run = {}, {}, None
    # A process of wandb's own writes it, to its end.
    deadline = time.monotonic() + 20
    while not any(record.HasField("exit") for record in wandb_records(path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for record in wandb_records(path):
        if record.HasField("history"):
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            lines |= {(row["_step"], name): float(value) for name, value in row.items() if not name.startswith("_")}
        if record.HasField("run"):
            run = run or record.run
            settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return lines, settings, run


def logged_lines(out):
    """{(step, name): value} of metrics.jsonl."""
    return {(line["step"], name): float(value) for line in metrics(out, timings=True) for name, value in line.items()
            if name != "step" and value is not None}


def wandb_files(out):
    return sorted(out.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
def test_both_have_the_lines_of_the_log_and_change_nothing(tmp_path, monkeypatch):
    for out, report in ((tmp_path / "plain", []), (tmp_path / "run", ["--report", "tensorboard", "wandb"])):
        assert call(monkeypatch, *ARGV, *report, "--out", out) == 0
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("plain", "run")]
    assert weights[0] == weights[1] and metrics(tmp_path / "plain") == metrics(out)
    expected = logged_lines(out)
    assert {name for step, name in expected if step == 3} >= {"loss", "nll", "val_nll", "tokens_per_s"} and (0, "val_nll") in expected
    assert tensorboard_lines(out) == pytest.approx(expected, rel=1e-6)
    file, = wandb_files(out)
    lines, settings, run = wandb_lines(file)
    config = json.loads((out / "config.json").read_text())
    assert lines == pytest.approx(expected) and {key: settings[key] for key in config} == config
    assert (run.project, run.display_name, run.run_id) == ("balanced-fine-tuning", str(out), json.loads((out / "config.json").read_text())["run_id"])


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_same_there_and_one_that_starts_again_another(tmp_path, monkeypatch):
    out = tmp_path / "run"
    argv = [*ARGV, "--report", "wandb", "tensorboard", "--out", out]
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert call(monkeypatch, *argv) == 0
    before = logged_lines(out)
    shutil.rmtree(checkpoints(out)[-1][1])
    assert call(monkeypatch, *argv) == 0
    # The lines up to step 4 were kept, those after it are new.
    assert logged_lines(out).items() >= {key: value for key, value in before.items() if key[0] <= 4}.items()
    assert tensorboard_lines(out) == pytest.approx(logged_lines(out), rel=1e-6) and logged_lines(out) != before
    first, second = (wandb_lines(file) for file in wandb_files(out))
    assert first[2].run_id == second[2].run_id and second[2].project == "mine" and {step for step, _ in second[0]} == {5, 6}
    # Where it is reported has no effect on it.
    assert call(monkeypatch, *ARGV, "--out", out) == 0
    assert call(monkeypatch, *argv, "--no-resume") == 0
    third, = (wandb_lines(file) for file in wandb_files(out))
    assert third[2].run_id not in (first[2].run_id, "") and len(list((out / "tensorboard").iterdir())) == 1


@pytest.mark.slow
def test_only_rank_0_reports_and_its_exit_is_clean(tmp_path):
    done = torchrun(2, ROOT / "train.py", *ARGV, "--objective", "sft", "bft", "--report", "tensorboard", "wandb", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    ids = []
    for out in (tmp_path / "run" / "sft", tmp_path / "run" / "bft"):
        file, = wandb_files(out)
        lines, _, run = wandb_lines(file)
        ids.append(run.run_id)
        assert lines == pytest.approx(logged_lines(out)) and len(list((out / "tensorboard").iterdir())) == 1
    assert ids[0] != ids[1]


@pytest.mark.slow
def test_a_run_that_stops_reports_what_it_has(tmp_path, monkeypatch):
    broken = bft.Objective(lambda tokens: tokens.logp * math.nan, bft.every_sample_1, "tokens")
    monkeypatch.setitem(bft.OBJECTIVES, "sft", broken)
    assert call(monkeypatch, *ARGV, "--objective", "sft", "--report", "wandb", "--out", tmp_path / "run") == 1
    file, = wandb_files(tmp_path / "run")
    assert wandb_lines(file)[0] == pytest.approx(logged_lines(tmp_path / "run")) and metrics(tmp_path / "run")[-1]["step"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("report, room, name", [([], 1200, "metrics.jsonl"), (["--report", "tensorboard"], 7000, "tensorboard")])
def test_a_full_disk_names_what_has_no_room(report, room, name, tmp_path, monkeypatch, capfd):
    import resource
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    monkeypatch.setattr(run_directory, "write_whole", lambda *_: None)    # config.json may be larger
    monkeypatch.setattr(run_directory, "git", lambda *_: b"")             # git would end in the middle of its index
    (tmp_path / "run").mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        code = call(monkeypatch, *ARGV, *report, "--log-every", 1, "--steps", 30, "--save-every", 0, "--out", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and capfd.readouterr().err == f"error: {tmp_path}/run/{name}: File too large\n"


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_its_command(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    assert call(monkeypatch, *ARGV, "--report", name, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert f"error: --report {name} needs" in error and 'pip install -e ".[log]"' in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_without_a_key_nothing_is_trained(tmp_path):
    environment = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path)}
    done = forked(1, ROOT / "train.py", *ARGV, "--report", "wandb", "--out", tmp_path / "run", env=environment, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: --report wandb: ") and "key" in done.stderr
    assert done.stderr.count("\n") == 1 and metrics(tmp_path / "run") == []


def test_the_default_job_has_no_report(monkeypatch, capsys):
    assert call(monkeypatch, "--report", "wandb") == 2
    assert "--report: not for the default job; expected --init and --data with it" in capsys.readouterr().err
