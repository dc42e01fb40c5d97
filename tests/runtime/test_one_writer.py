"""One command at a time writes into a run directory, one run is in it, and what it started from stays what it was."""

import errno
import fcntl
import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import kill
import pytest
from kill import assert_same, checkpoint_of, children, finish, launch
from support import ASSETS, SMALL, call, metrics

import train
from runtime import one_writer
from runtime.checkpoint import checkpoints
from runtime.files import load_safetensors, save_safetensors
from runtime.one_writer import check_still_ours, only_writer
from runtime.process import UserError
from runtime.ranks import Ranks


DATA = ["--data", ASSETS / "finetune.jsonl", "--batch-size", 8]


def wait_for_step(out, step, process):
    deadline = time.time() + 120
    while max((line["step"] for line in metrics(out)), default=0) < step:
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.01)


def end(process):
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def change(file):
    """One number of it."""
    tensors = load_safetensors(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_safetensors(tensors, file)


@pytest.fixture
def no_patience(monkeypatch):
    monkeypatch.setattr(one_writer, "PATIENCE", 0.3)


# ---------------------------------------------------------------------------------------------------------------------
# The lock

def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path, no_patience):
    out, ranks = tmp_path / "a" / "run", Ranks("cpu")
    with only_writer(out, ranks):
        with pytest.raises(UserError, match=f"^{out} is being written by process {os.getpid()} on .*; expected to be its only"):
            with only_writer(out, ranks):
                pass
        with only_writer(tmp_path / "b", ranks):
            pass
    with only_writer(out, ranks):
        (out / "kept").touch()
    assert os.listdir(out) == ["kept"] and not (tmp_path / "b").exists()  # where nothing was written nothing stays


def test_whoever_waited_for_a_lock_that_is_gone_takes_the_next_one(tmp_path, monkeypatch, no_patience):
    """Or it would hold a deleted file, and whoever comes then another."""
    ranks, real, to_delete = Ranks("cpu"), fcntl.flock, ["writer.lock"]

    def lock_what_is_deleted_meanwhile(file, how):
        real(file, how)
        if to_delete:
            (tmp_path / to_delete.pop()).unlink()
    monkeypatch.setattr(fcntl, "flock", lock_what_is_deleted_meanwhile)
    with only_writer(tmp_path, ranks):
        assert (tmp_path / "writer.lock").read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(UserError, match="is being written"), only_writer(tmp_path, ranks):
            pass


def hold(out, seconds, meanwhile=lambda: None):
    """Somebody else does, for so long; returns once it is held."""
    held = threading.Event()

    def holder():
        with only_writer(out, Ranks("cpu")):
            held.set()
            time.sleep(seconds)
            meanwhile()
    threading.Thread(target=holder).start()
    held.wait()


def test_some_wait_without_end(tmp_path, no_patience, capsys):
    hold(tmp_path / "run", 1)
    with only_writer(tmp_path / "run", Ranks("cpu"), math.inf):
        pass
    assert "is being written by process" in capsys.readouterr().out


def test_whoever_waited_looks_again_whose_run_it_is(tmp_path, monkeypatch, capsys):
    """Between its first look and the lock another command has begun a run there."""
    argv, out = [*SMALL, *DATA, "--steps", 1], tmp_path / "run"
    assert call(monkeypatch, *argv, "--lr", 1e-2, "--out", tmp_path / "other") == 0
    hold(out, 2, lambda: shutil.copytree(tmp_path / "other", out, dirs_exist_ok=True))
    before = (tmp_path / "other" / "config.json").read_bytes()
    assert call(monkeypatch, *argv, "--out", out) == 2
    assert f"--out {out} holds another run (lr 0.01, now 0.001)" in capsys.readouterr().err and (out / "config.json").read_bytes() == before


def test_a_lock_is_deleted_by_its_holder_alone(tmp_path):
    with only_writer(tmp_path / "run", Ranks("cpu")):
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "writer.lock").touch()
    assert (tmp_path / "run" / "writer.lock").exists()


def test_a_disk_that_cannot_lock_is_remarked_upon_once(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(fcntl, "flock", refuse)
    ranks = Ranks("cpu")
    for _ in range(2):
        with only_writer(tmp_path, ranks):
            pass
    assert capsys.readouterr().out.count("warning: ") == 1


@pytest.mark.slow
def test_a_running_run_is_nobody_elses(tmp_path, monkeypatch, capsys, no_patience):
    """The same command, and one that would begin anew with other settings."""
    argv, out = [*SMALL, *DATA, "--log-every", 1], tmp_path / "run"
    first = launch(1, "slow", *argv, "--steps", 10_000, "--out", out)
    wait_for_step(out, 2, first)
    before = (out / "config.json").read_bytes()
    for more in (["--steps", 10_000], ["--steps", 1, "--lr", 1e-2, "--no-resume"]):
        assert call(monkeypatch, *argv, *more, "--out", out) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"error: {out} is being written by process {first.pid} on " in error
    assert (out / "config.json").read_bytes() == before
    code, output = end(first)
    assert code == 143, output
    steps = [line["step"] for line in metrics(out)]
    assert steps == list(range(1, steps[-1] + 1)) == list(range(1, checkpoints(out)[-1][0] + 1))


@pytest.mark.slow
def test_ranks_end_with_their_launcher_and_the_next_command_has_the_directory(tmp_path):
    """torchrun is killed, and what is left writes nothing into the run that begins next."""
    argv = kill.command("three ranks", tmp_path)
    for out in (tmp_path / "run", tmp_path / "alone"):
        if out.name == "run":
            process = launch(2, "slow", *argv, "--steps", 10_000, "--out", out)
            wait_for_step(out, 2, process)
            ranks = children(process.pid)
            os.kill(process.pid, signal.SIGKILL)
        code, output = finish(1, "draws", *argv, "--lr", 1e-2, "--no-resume", "--out", out)
        assert code == 0, output
    assert not any(os.path.exists(f"/proc/{pid}") and "train" in open(f"/proc/{pid}/cmdline").read() for pid in ranks)
    assert_same(tmp_path / "run", tmp_path / "alone")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"]["lr"] == 1e-2 and config["world_size"] == 1
    process.communicate(timeout=60)


# ---------------------------------------------------------------------------------------------------------------------
# The run's id

def test_a_run_that_was_begun_anew_elsewhere_stops(tmp_path, monkeypatch, capsys):
    """As it can on a disk without locks: config.json is another run's from step 2 on, or when the model is saved."""
    def another_begins(config=tmp_path / "run" / "config.json"):
        config.write_text(json.dumps({**json.loads(config.read_text()), "run_id": "another"}))
    argv = [*SMALL, *DATA, "--steps", 3, "--save-every", 2, "--out", tmp_path / "run"]
    steps, forward_backward = [], train.forward_backward

    def at_step_2(*arguments):
        steps.append(0)
        if len(steps) == 2:
            another_begins()
        return forward_backward(*arguments)
    with monkeypatch.context() as patches:
        patches.setattr(train, "forward_backward", at_step_2)
        assert call(patches, *argv) == 2
    assert "another run has begun there since" in capsys.readouterr().err and checkpoints(tmp_path / "run") == []
    save_checkpoint = train.save_checkpoint

    def after_the_last(out, step, *arguments):
        save_checkpoint(out, step, *arguments)
        if step == 3:
            another_begins()
    with monkeypatch.context() as patches:
        patches.setattr(train, "save_checkpoint", after_the_last)
        assert call(patches, *argv) == 2
    assert "another run has begun there since" in capsys.readouterr().err and not (tmp_path / "run" / "model").exists()


def test_a_record_that_cannot_be_read_is_not_another_runs(tmp_path, monkeypatch):
    """A stale handle of a shared disk, say: the error names the file."""
    record = tmp_path / "config.json"
    record.write_text('{"run_id": "ours"}')
    check_still_ours(tmp_path, "ours", Ranks("cpu"))

    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))
    monkeypatch.setattr(Path, "read_bytes", stale)
    with pytest.raises(OSError, match="Stale file handle.*config.json"):
        check_still_ours(tmp_path, "ours", Ranks("cpu"))


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path, monkeypatch, capsys):
    """Whatever is beside it: a model too, and a config.json with other settings."""
    argv = [*SMALL, *DATA, "--steps", 4, "--save-every", 2]
    assert call(monkeypatch, *argv, "--out", tmp_path / "other") == call(monkeypatch, *argv, "--lr", 1e-2, "--out", tmp_path / "run") == 0
    whole, log = checkpoint_of(checkpoints(tmp_path / "run")[-1][1]), metrics(tmp_path / "run")
    for name in ("checkpoint/step-4", "model"):
        shutil.rmtree(tmp_path / "run" / name)
        shutil.copytree(tmp_path / "other" / name, tmp_path / "run" / name)
    capsys.readouterr()
    assert call(monkeypatch, *argv, "--lr", 1e-2, "--out", tmp_path / "run") == 0
    assert "it is of another run than config.json), so this goes on from step 2" in capsys.readouterr().out
    assert checkpoint_of(checkpoints(tmp_path / "run")[-1][1]) == whole and metrics(tmp_path / "run") == log
    # And where there is no other.
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    shutil.copytree(tmp_path / "other" / "checkpoint", tmp_path / "run" / "checkpoint")
    assert call(monkeypatch, *argv, "--lr", 1e-2, "--out", tmp_path / "run") == 2
    assert "another run than config.json" in capsys.readouterr().err


def test_a_run_keeps_its_id_and_a_new_one_has_another(tmp_path, monkeypatch):
    def run_id(*more):
        assert call(monkeypatch, *SMALL, *DATA, "--steps", 2, "--out", tmp_path / "run", *more) == 0
        return json.loads((tmp_path / "run" / "config.json").read_text())["run_id"]
    first = run_id()
    (tmp_path / "run" / "model" / "config.json").unlink()
    assert run_id() == first
    another = run_id("--no-resume")
    assert another not in ("", first)
    state, = (json.loads((path / "state.json").read_text()) for _, path in checkpoints(tmp_path / "run"))
    assert state["run_id"] == another


# ---------------------------------------------------------------------------------------------------------------------
# The model that it starts from

@pytest.mark.parametrize("more", [["--lora-rank", 2], ["--objective", "bft", "sft"]], ids=["adapters", "two objectives"])
def test_a_base_that_changes_under_a_run_ends_it(more, tmp_path, monkeypatch, capsys):
    """Adapters are not merged into what they were not trained on; no objective starts from other weights."""
    kill.command("adapters", tmp_path)
    base, out = tmp_path / "base", tmp_path / "run"
    steps, forward_backward = [], train.forward_backward

    def at_step_3(*arguments):
        steps.append(0)
        if len(steps) == 3:
            change(base / "model.safetensors")
        return forward_backward(*arguments)
    monkeypatch.setattr(train, "forward_backward", at_step_3)
    assert call(monkeypatch, "--init", base, "--data", tmp_path / "data.jsonl", "--batch-size", 8, "--steps", 5, *more, "--out", out) == 2
    assert capsys.readouterr().err == (f"error: {base}: its files have changed since the command began; expected the weights that this "
                                       "run started from\n")
    first = out / "bft" if "bft" in more else out
    assert checkpoints(first)[-1][0] == 5                                 # what was trained is kept
    assert (first / "model" / "config.json").exists() == ("bft" in more) and not (out / "sft" / "checkpoint" / "step-5").exists()


def test_a_base_that_changes_while_adapters_are_merged_is_noticed(tmp_path, monkeypatch, capsys):
    kill.command("adapters", tmp_path)
    base, save_model = tmp_path / "base", train.hf.save_model

    def meanwhile(*arguments, **options):
        save_model(*arguments, **options)
        change(base / "model.safetensors")
    monkeypatch.setattr(train.hf, "save_model", meanwhile)
    assert call(monkeypatch, "--init", base, "--data", tmp_path / "data.jsonl", "--steps", 1, "--lora-rank", 2, "--out", tmp_path / "run") == 2
    assert "its files have changed" in capsys.readouterr().err and not (tmp_path / "run" / "model" / "config.json").exists()


def test_a_base_that_is_only_touched_is_the_same(tmp_path, monkeypatch):
    kill.command("adapters", tmp_path)
    forward_backward = train.forward_backward

    def touch(*arguments):
        (tmp_path / "base" / "model.safetensors").touch()
        return forward_backward(*arguments)
    monkeypatch.setattr(train, "forward_backward", touch)
    assert call(monkeypatch, "--init", tmp_path / "base", "--data", tmp_path / "data.jsonl", "--steps", 1, "--lora-rank", 2,
                "--objective", "bft", "sft", "--out", tmp_path / "run") == 0
