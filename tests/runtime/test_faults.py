"""Nothing is lost and nothing hangs: kills, signals, dead ranks, full disks, damaged checkpoints, numbers gone wrong."""

import json
import math
import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path

import kill
import numpy as np
import pytest
import torch
from kill import assert_same, contents, finish, finish_launched
from support import call, metrics
from tokenizer_files import assets_with

import hf
import train
from runtime import run_directory
from runtime.checkpoint import checkpoints
from runtime.files import load_safetensors, save_safetensors
from runtime.process import run


for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    number = getattr(signal, name, None)                                  # Windows has no SIGHUP
    if number is not None and signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)                                    # of a job in the background: what is started here
                                                                          # would ignore it too


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where the unbroken runs are kept that the broken ones are compared with."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture
def one(directory):
    """(arguments of a run of one process but for --out, that run unbroken)."""
    return kill.unbroken("one process", directory)


@pytest.fixture
def three(directory):
    """The same on three ranks."""
    return kill.unbroken("three ranks", directory)


@pytest.fixture
def sharded(directory):
    """On three ranks, each of which holds its rows."""
    return kill.unbroken("three sharded ranks", directory)


def steps_saved(out):
    return [step for step, _ in checkpoints(out)]


def errors(output):
    return [line for line in output.splitlines() if line.startswith("error: ")]


# ---------------------------------------------------------------------------------------------------------------------
# Invariant 2

@pytest.mark.slow
@pytest.mark.parametrize("kind, seed, saving, one_rank", [("one process", 22, True, False), ("adapters", 28, False, False), ("three ranks", 12, False, True),
                                                          ("three sharded ranks", 9, True, True)])
def test_a_killed_run_ends_as_if_nothing_had_been(kind, seed, saving, one_rank, directory):
    """One process while it saves step 6, adapters some time after step 5, one of three ranks some time after step 9, one of three that hold their rows
    while it saves."""
    done = kill.kill_once(kind, directory, random.Random(seed))
    assert ("saving" in done) == saving and ("one rank" in done) == one_rank


@pytest.mark.slow
@pytest.mark.parametrize("fault, code, saved", [("sigterm 0 5", 143, 5), ("sigint 0 5", 130, 5), ("sighup 0 5", 129, 5),
                                                ("sigint2 0 5", 130, 3), ("validating 0 3", 143, 6)])
def test_a_signal_stops_after_the_step_and_its_checkpoint(fault, code, saved, one, tmp_path):
    argv, whole = one
    run_it = finish_launched if fault == "sigterm 0 5" else finish        # one of them as a user starts it
    stopped, output = run_it(1, fault, *argv, "--out", tmp_path)
    assert stopped == code and "Traceback" not in output and not (tmp_path / "model").exists()
    assert steps_saved(tmp_path)[-1] == saved == metrics(tmp_path)[-1]["step"]
    if fault.startswith("validating"):                                    # of step 6: cut short, and done again below
        assert [x["step"] for x in metrics(tmp_path) if "val_nll" in x] == [0, 3]
    if saved != 3:
        assert f"the same command goes on from step {saved}" in output
    code, output = finish(1, "draws", *argv, "--out", tmp_path)
    assert code == 0 and f"bft from step {saved} to" in output and "warning" not in output
    assert_same(whole, tmp_path)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_step(three, tmp_path):
    argv, whole = three
    code, output = finish_launched(3, "sigterm 1 5", *argv, "--out", tmp_path)
    assert code != 0 and re.findall(r"exitcode +: (\S+)", output)[-1] == "143" and "SIGTERM; the same command" in output
    assert steps_saved(tmp_path) == [3, 5] and metrics(tmp_path)[-1]["step"] == 5
    code, output = finish(3, "draws", *argv, "--out", tmp_path)
    assert code == 0 and "from step 5" in output
    assert_same(whole, tmp_path)


@pytest.mark.slow
def test_torchrun_restarts_go_on_by_themselves(three, tmp_path):
    """Whatever --no-resume meant the first time."""
    argv, whole = three
    code, output = finish_launched(3, "sigkill 2 8 once", *argv, "--no-resume", "--out", tmp_path, restarts=1)
    assert code == 0 and "from step 0" in output and "from step 6" in output, output
    assert_same(whole, tmp_path)


@pytest.mark.slow
def test_another_world_size_goes_on_with_the_same_samples(one, tmp_path):
    """(The objective of the other tests draws other random numbers on each rank; this one is train.py as it is.)"""
    argv, _ = one
    code, output = finish(1, None, *argv, "--out", tmp_path / "whole")
    assert code == 0, output
    code, output = finish(1, None, *argv, "--keep", 9, "--out", tmp_path / "cut")
    assert code == 0, output
    for step in (12, 14):                                                 # as if it had been killed before step 12 was saved
        shutil.rmtree(tmp_path / "cut" / "checkpoint" / f"step-{step}")
    code, output = finish(2, None, *argv, "--micro-tokens", 200, "--keep", 9, "--out", tmp_path / "cut")
    assert code == 0 and "from step 9" in output
    assert "goes on with other rounding: micro_tokens 300, now 200; world_size 1, now 2\n" in output
    earlier, = json.loads((tmp_path / "cut" / "config.json").read_text())["earlier"]
    assert earlier["to_step"] == 9 and earlier["world_size"] == 1
    whole, cut = metrics(tmp_path / "whole"), metrics(tmp_path / "cut")
    assert len(whole) == len(cut) and whole[:9] == cut[:9]
    for a, b in zip(whole, cut):
        assert a.keys() == b.keys() and all(math.isclose(v, b[k], rel_tol=1e-5, abs_tol=1e-9) for k, v in a.items())


@pytest.mark.parametrize("change", [
    ("--objective", "sft"), ("--lr", "2e-3"), ("--min-lr", "1e-5"), ("--warmup", "0.5"), ("--steps", 15), ("--batch-size", 9), ("--seed", 1),
    ("--dtype", "bfloat16"), ("--group-size", 8), ("--grad-clip", 2), ("--weight-decay", 0.1), ("--n-layer", 1), "data", "val_data", "init"],
    ids=lambda c: c if isinstance(c, str) else c[0])
def test_other_settings_are_another_run(change, directory, tmp_path, monkeypatch, capsys):
    kind = "adapters" if change == "init" else "one process"
    argv = [str(x) for x in kill.command(kind, directory)]
    data = [tmp_path / "data.jsonl", tmp_path / "val.jsonl"]
    for path in data:
        path.write_bytes((directory / "data.jsonl").read_bytes())
    argv += ["--steps", "1", "--data", str(data[0]), "--val-data", str(data[1])]
    if change == "init":
        (tmp_path / "base").mkdir()
        for file in (directory / "base").iterdir():
            (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
        argv += ["--init", str(tmp_path / "base")]
    assert call(monkeypatch, *argv, "--out", tmp_path / "run") == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    if change == "init":                                                  # not even the weights
        config = tmp_path / "base" / "config.json"
        config.write_text(config.read_text().replace("5000.0", "6000.0"))
    elif isinstance(change, str):
        path = data[change == "val_data"]
        path.write_text(path.read_text() + '{"text": "one more"}\n')
    else:
        argv += change
    capsys.readouterr()
    assert call(monkeypatch, *argv, "--out", tmp_path / "run") == 2
    name = f"another content of {change}" if isinstance(change, str) else change[0].strip("-").replace("-", "_")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "holds another run (" in error and name in error
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_other_tokens_are_another_run_whatever_made_them(directory, tmp_path, monkeypatch, capsys):
    """Here the id that ends a text, which config.json names where tokenizer_config.json does not."""
    other = hf.load_tokenizer(assets_with(tmp_path, ["<|end|>"])).special["<|end|>"]
    (tmp_path / "tokenizer_config.json").unlink()
    argv = [*kill.command("one process", directory), "--tokenizer", tmp_path, "--steps", 1, "--out", tmp_path / "run"]
    for eos, code in ((0, 0), (other, 2)):
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert call(monkeypatch, *argv) == code
    assert "holds another run (another content of tokens)" in capsys.readouterr().err


def test_another_optimizer_is_another_run(directory, tmp_path, monkeypatch, capsys):
    argv, make = [*kill.command("one process", directory), "--steps", 1, "--out", tmp_path], train.make_optimizer
    assert call(monkeypatch, *argv) == 0
    recorded = json.loads((tmp_path / "config.json").read_text())["optimizer"]
    assert recorded == {"name": "AdamW", "betas": [0.9, 0.95], "eps": 1e-8, "fused": True, **{
        key: recorded[key] for key in recorded if key == "decoupled_weight_decay"}}

    def other_betas(trained, settings):
        optimizer = make(trained, settings)
        for group in optimizer.param_groups:
            group["betas"] = (0.9, 0.99)
        return optimizer

    for other, words in ((other_betas, "optimizer's betas [0.9, 0.95], now [0.9, 0.99]"),
                         (lambda trained, settings: torch.optim.SGD(trained.values(), lr=settings.lr), "optimizer's name 'AdamW', now 'SGD'")):
        monkeypatch.setattr(train, "make_optimizer", other)
        assert call(monkeypatch, *argv, "--steps", 2) == 2
        error = capsys.readouterr().err
        assert words in error and "holds another run" in error and error.count("\n") == 1


def test_it_is_the_dtype_that_counts_not_what_it_was_called():
    def config(asked, dtype, **change):
        return {"objective": "bft", "settings": {"dtype": asked, "lr": 1.0, "data": "here"}, "versions": {"torch": "2"}, "sha256": {"data": "a"}, "optimizer": {}, "threads": 1,
                "dtype": f"torch.{dtype}", "device": "cpu", "world_size": 1, "git_commit": None, **change}
    old = config("auto", "bfloat16")
    assert run_directory.differences(old, config("bfloat16", "bfloat16")) == ([], [])
    assert run_directory.differences(old, config("auto", "float32")) == (["dtype 'torch.bfloat16', now 'torch.float32'"], [])   # on another machine
    assert run_directory.differences(old, config("auto", "bfloat16", git_commit="c", versions={"torch": "3"})) == (
        [], ["git_commit None, now 'c'", "torch '2', now '3'"])
    moved = config("auto", "bfloat16", sha256={"data": "b"})
    moved["settings"]["data"] = "there"                                   # the place is of no account, the content is
    assert run_directory.differences(old, moved) == (["another content of data"], [])


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

FILE = "shard-00001-of-00001.safetensors"                                # of a run in which every rank holds everything


class Planted:
    """What unpickling would run."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "run"))


def flip(path):
    raw = bytearray((path / FILE).read_bytes())
    raw[len(raw) // 2] ^= 1                                               # in the middle of the weights
    (path / FILE).write_bytes(raw)


def cut(path):
    raw = (path / FILE).read_bytes()
    (path / FILE).write_bytes(raw[:-1000])


def another_file(path):
    tensors = load_safetensors(path / FILE)
    save_safetensors({name: t[:1] for name, t in tensors.items()}, path / FILE)   # which could be spread over ours


def another_step(path):
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-3"), path)


def missing_state(path):
    (path / "state.json").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip, cut, another_file, another_step, missing_state])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, directory, tmp_path, monkeypatch, capsys):
    argv = kill.command("one process", directory)
    for name in ("whole", "run"):
        assert call(monkeypatch, *argv, "--steps", 6, "--out", tmp_path / name) == 0
    whole, out = tmp_path / "whole", tmp_path / "run"
    newest = out / "checkpoint" / "step-6"
    damage(newest)
    (out / "model" / "config.json").unlink()                              # as if it had not been finished
    (out / "checkpoint" / "step-5.tmp").mkdir()                           # and had been killed at that before
    (out / "checkpoint" / "step-5.tmp" / f"{FILE}.tmp").write_bytes(b"half")
    capsys.readouterr()
    damaged = contents(newest)
    assert call(monkeypatch, *argv, "--steps", 6, "--keep", 1, "--out", out) == 0
    output = capsys.readouterr().out
    assert f"warning: {newest} cannot be loaded" in output and "from step 3 to 6" in output
    assert metrics(out) == metrics(whole) and steps_saved(out) == [6]
    assert (out / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    assert contents(out / "checkpoint" / "step-6.damaged") == damaged     # nothing is thrown away
    assert not list(out.rglob("*.tmp"))
    (out / "model" / "config.json").unlink()
    flip(newest)
    before = contents(out)
    assert call(monkeypatch, *argv, "--steps", 6, "--out", out) == 2      # it does not start again by itself
    error = capsys.readouterr().err
    assert "no checkpoint of" in error and f"step-6: ValueError: {FILE} is damaged" in error and error.count("\n") == 1
    assert contents(out) == before


@pytest.mark.slow
def test_a_run_goes_on_on_any_number_of_ranks(sharded, tmp_path):
    """Begun on three that hold their rows; then on two, with one of the newest files damaged; on one; and on three again."""
    argv, _ = sharded
    code, output = finish(3, None, *argv, "--keep", 9, "--out", tmp_path / "whole")
    assert code == 0, output
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    saved, whole = tmp_path / "cut" / "checkpoint", metrics(tmp_path / "whole")
    for step in (12, 14):
        shutil.rmtree(saved / f"step-{step}")
    file = saved / "step-9" / "shard-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    for ranks, how, start in ((2, "all", 6), (1, "no", 9), (3, "all", 12)):
        (tmp_path / "cut" / "model" / "config.json").unlink()
        code, output = finish(ranks, None, *argv, "--shard", how, "--keep", 9, "--out", tmp_path / "cut")
        assert code == 0 and f"from step {start} to" in output and ("cannot be loaded" in output) == (ranks == 2), output
        assert f"{file.parent} cannot be loaded (ValueError: {file.name} is damaged)" in output or ranks != 2
        # Of each part of the run the next one keeps the first steps.
        for step in range(start + 4, 15):
            shutil.rmtree(saved / f"step-{step}", ignore_errors=True)
    cut = metrics(tmp_path / "cut")
    assert len(whole) == len(cut) and whole[:6] == cut[:6]
    for a, b in zip(whole, cut):
        assert a.keys() == b.keys() and all(math.isclose(v, b[k], rel_tol=1e-5, abs_tol=1e-9) for k, v in a.items())


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_rank_ends_all(rank, sharded, tmp_path):
    argv, whole = sharded
    code, output = finish(3, f"full {rank} 5", *argv, "--out", tmp_path)
    file = f"{tmp_path}/checkpoint/step-6.tmp/shard-0000{rank + 1}-of-00003.safetensors"
    assert code == 1 and errors(output) == [f"error: {file}: File too large"] and "train.py\", line" not in output, output
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["step-3"]
    code, output = finish(3, "draws", *argv, "--out", tmp_path)
    assert code == 0 and "from step 3" in output
    assert_same(whole, tmp_path)


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_costs_nothing(one, tmp_path):
    argv, whole = one
    code, output = finish(1, "full 0 5", *argv, "--out", tmp_path)
    assert code == 1 and errors(output) == [f"error: {tmp_path}/checkpoint/step-6.tmp/{FILE}: File too large"] and "Traceback" not in output
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["step-3"]
    code, output = finish(1, "draws", *argv, "--out", tmp_path)
    assert code == 0 and "from step 3" in output
    assert_same(whole, tmp_path)


@pytest.mark.slow
def test_a_full_disk_is_not_hidden_by_a_signal(one, tmp_path):
    argv, _ = one
    code, output = finish(1, "sigterm-full 0 5", *argv, "--out", tmp_path)
    assert code == 1 and errors(output) == [f"error: {tmp_path}/checkpoint/step-5.tmp/{FILE}: File too large"]
    assert steps_saved(tmp_path) == [3]


@pytest.mark.slow
def test_a_signal_in_the_last_checkpoint_is_heard(directory, tmp_path, monkeypatch, capsys):
    argv = [*kill.command("one process", directory), "--steps", 4, "--objective", "sft", "bft", "--out", tmp_path]
    save = train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda *a: save(*a) or a[1] == 4 and os.kill(os.getpid(), signal.SIGTERM))
    assert call(monkeypatch, *argv) == 143 and not (tmp_path / "bft").exists()
    monkeypatch.setattr(train, "save_checkpoint", save)
    assert call(monkeypatch, *argv) == 0 and steps_saved(tmp_path / "bft") == [3, 4]
    for step in (3, 4):                                                   # to save space: what is finished stays finished
        shutil.rmtree(tmp_path / "sft" / "checkpoint" / f"step-{step}")
    capsys.readouterr()
    assert call(monkeypatch, *argv) == 0 and capsys.readouterr().out.count("finished, 4 steps") == 2


def test_a_run_killed_before_its_first_file_was_whole(directory, tmp_path, monkeypatch):
    argv = [*kill.command("one process", directory), "--steps", 1, "--out", tmp_path / "run"]
    write, written = run_directory.write_whole, []

    def killed(path, chunks):
        written.append(Path(path).name)
        Path(f"{path}.tmp").write_bytes(b"half")
        raise SystemExit(-9)
    monkeypatch.setattr(run_directory, "write_whole", killed)
    assert call(monkeypatch, *argv) == -9 and written == ["config.json"]
    assert os.listdir(tmp_path / "run") == ["config.json.tmp"]   # by config.json a run is known: it comes first
    monkeypatch.setattr(run_directory, "write_whole", write)
    assert call(monkeypatch, *argv) == 0 and steps_saved(tmp_path / "run") == [1]


def test_checkpoints_that_cannot_be_listed_are_not_none(directory, tmp_path, monkeypatch, capsys):
    argv = [*kill.command("one process", directory), "--steps", 4]
    assert call(monkeypatch, *argv, "--out", tmp_path) == 0
    (tmp_path / "model" / "config.json").unlink()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    listdir = os.listdir

    def refuse(path="."):
        if Path(path).name == "checkpoint":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)
    monkeypatch.setattr(os, "listdir", refuse)
    capsys.readouterr()
    assert call(monkeypatch, *argv, "--out", tmp_path) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/checkpoint: Permission denied\n"
    monkeypatch.setattr(os, "listdir", listdir)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_lost_lines_of_the_log_are_missed(directory, tmp_path, monkeypatch, capsys):
    argv = [*kill.command("one process", directory), "--steps", 4, "--out", tmp_path]
    assert call(monkeypatch, *argv) == 0
    (tmp_path / "model" / "config.json").unlink()
    shutil.rmtree(tmp_path / "checkpoint" / "step-4")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    for garbled in (lines[:1] + ["[" * 100_000 + "\n"] + lines[2:], []):
        (tmp_path / "metrics.jsonl").write_text("".join(garbled))
        capsys.readouterr()
        assert call(monkeypatch, *argv) == 0
        assert "has not all of the 3 steps before" in capsys.readouterr().out
        (tmp_path / "model" / "config.json").unlink()
        shutil.rmtree(tmp_path / "checkpoint" / "step-4")


def make_link(path):
    shutil.copytree(path, path.with_name("elsewhere"))
    shutil.rmtree(path)
    path.symlink_to("elsewhere")


def make_file(path):
    shutil.rmtree(path, ignore_errors=True)
    path.write_bytes(b"mine")


def make_directory(path):
    path.unlink()
    path.mkdir()


def make_dangling(path):
    shutil.rmtree(path)
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make, names, flags, words", [
    (make_file, ["model", "adapter", "checkpoint", "tensorboard", "wandb"], [], "is no directory that can be written to; expected a new path, or a run"),
    (make_dangling, ["model", "checkpoint"], [], "is no directory that can be written to; expected a new path, or a run"),
    (make_directory, ["metrics.jsonl", "config.json"], [], "is no regular file; expected a new path, or a run"),
    (make_link, ["model", "checkpoint"], ["--no-resume"], "is a link, through which --no-resume deletes nothing; remove it, or name another --out"),
    (make_link, ["model", "checkpoint"], [], None)])
def test_parts_of_another_kind_are_seen_before_training(make, names, flags, words, directory, tmp_path, monkeypatch, capsys):
    argv = [*kill.command("one process", directory), "--steps", 2]
    assert call(monkeypatch, *argv, "--out", tmp_path / "run") == 0
    for name in names:
        out = tmp_path / name
        shutil.copytree(tmp_path / "run", out)
        make(out / name)
        if words is None:
            # To another disk, say. The run goes on.
            (out / "model" / "config.json").unlink()
        before = sorted(out.rglob("*"))
        capsys.readouterr()
        code = call(monkeypatch, *argv, *flags, "--out", out)
        if words is None:
            assert code == 0 and (out / "model" / "config.json").is_file() and (out / name).is_symlink()
            continue
        assert code == 2 and capsys.readouterr().err == f"error: --out {out}: {out / name} {words}\n"
        assert sorted(out.rglob("*")) == before


@pytest.mark.slow
def test_a_directory_that_cannot_be_written_to(directory, monkeypatch, capsys, tmp_path):
    argv = kill.command("one process", directory)
    assert call(monkeypatch, *argv, "--out", "/proc/run") in (1, 2)       # 1: the superuser may write there, but cannot
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "/proc" in error and error.count("\n") == 1
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    assert call(monkeypatch, *argv, "--out", tmp_path / "run") == 2
    assert f"{tmp_path} cannot be written to" in capsys.readouterr().err and not (tmp_path / "run").exists()
    monkeypatch.setattr(os, "access", access)
    assert call(monkeypatch, *argv, "--steps", 1, "--out", tmp_path / "run") == 0
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "model" and access(path, mode))
    assert call(monkeypatch, *argv, "--steps", 1, "--out", tmp_path / "run") == 2
    assert f"{tmp_path}/run/model is no directory that can be written to" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Numbers gone wrong, ranks gone

@pytest.mark.slow
def test_a_number_that_is_none_stops_every_rank_at_its_step(three, tmp_path):
    argv, _ = three
    code, output = finish(3, "nan 0 5", *argv, "--out", tmp_path)
    assert code == 1 and len(errors(output)) == 1 and "error: step 5: loss nan" in output and "with the samples at " in output
    assert 'train.py", line' not in output                                # no traceback of ours
    assert metrics(tmp_path)[-1]["step"] == 4 and steps_saved(tmp_path) == [3]
    saved = load_safetensors(tmp_path / "checkpoint" / "step-3" / FILE)
    assert all(t.isfinite().all() for t in saved.values())


@pytest.mark.parametrize("number, dtype, is_saved", [(math.inf, torch.float32, False), (math.nan, torch.float32, False), (7e4, torch.float32, True),
                                                     (7e4, torch.float16, False), (6e4, torch.float16, True)])
def test_weights_that_their_file_cannot_hold_are_not_saved(number, dtype, is_saved, tmp_path, directory, monkeypatch, capsys):
    """The loss and the gradient of the step before were finite. A base in float16, which ends at 65,504, is trained in float32."""
    argv = kill.command("three ranks", directory)
    base = shutil.copytree(directory / "base", tmp_path / "base")
    tensors = load_safetensors(base / "model.safetensors")
    save_safetensors({name: t.to(dtype) for name, t in tensors.items()}, base / "model.safetensors")
    step = torch.optim.AdamW.step

    def grow(self):
        step(self)
        self.param_groups[0]["params"][0].data[190] = number                # of a byte that no text has
    monkeypatch.setattr(torch.optim.AdamW, "step", grow)
    code = call(monkeypatch, *argv, "--init", base, "--steps", 1, "--out", tmp_path / "run")
    if is_saved:
        assert code == 0 and load_safetensors(tmp_path / "run" / "model" / "model.safetensors")["model.embed_tokens.weight"][190, 0] == number
    else:
        assert code == 1 and steps_saved(tmp_path / "run") == [] and not (tmp_path / "run" / "model").exists()
        error = capsys.readouterr().err
        assert error.startswith("error: step 1: embed_tokens.weight: infinite or no number, or beyond the dtype of the model's file;")


@pytest.mark.slow
def test_a_weight_of_one_rank_that_is_no_number_ends_all(sharded, tmp_path):
    """The last rows are rank 2's alone."""
    argv, _ = sharded
    code, output = finish(3, "infinite 2 3", *argv, "--out", tmp_path / "run")
    assert code == 1 and errors(output) == ["error: step 3: norm.weight: infinite or no number, or beyond the dtype of the model's file; stopped, "
                                            "and nothing was saved since"], output
    assert steps_saved(tmp_path / "run") == []


@pytest.mark.slow
def test_nobody_goes_on_before_the_model_is_whole(three, tmp_path):
    """The default job's ranks read it at once."""
    argv, _ = three
    code, output = finish(3, "late", *argv, "--out", tmp_path / "run")
    assert code == 0, output


@pytest.mark.slow
def test_a_loss_of_zero_is_remarked_upon_once(one, tmp_path):
    argv, _ = one
    code, output = finish(1, "zero 0 8", *argv, "--steps", 60, "--save-every", 0, "--eval-every", 0, "--out", tmp_path)
    assert code == 0 and output.count("warning: since step 8 the loss or its gradient is exactly 0") == 1 == output.count("warning")


@pytest.mark.slow
def test_a_rank_that_is_killed_takes_the_others_down(three, tmp_path):
    argv, _ = three
    code, output = finish_launched(3, "sigkill 1 5", *argv, "--out", tmp_path)
    cause = output.split("Root Cause")[1]
    assert code != 0 and "rank      : 1 " in cause and "SIGKILL" in cause and "cannot reach another" not in output
    assert steps_saved(tmp_path) == [3]


@pytest.mark.slow
def test_a_rank_with_a_bug_is_the_first_that_ends(three, tmp_path):
    """torchrun takes it for the cause then, and ends the others."""
    argv, _ = three
    code, output = finish(3, "raise 1 5", *argv, "--out", tmp_path)
    assert code == 1 and output.count("Traceback") == 1 and "ZeroDivisionError: a bug of this rank alone" in output
    assert "cannot reach another" not in output and steps_saved(tmp_path) == [3]


@pytest.mark.slow
def test_fewer_samples_than_ranks_in_a_batch(tmp_path, directory):
    """Some lines keep no response token; of what is left the last batch of an epoch has one sample for three ranks."""
    lines = (directory / "data.jsonl").read_text().splitlines(keepends=True)[:7]
    dropped = json.dumps({"prompt": "long " * 200, "response": "x"}) + "\n"
    (tmp_path / "data.jsonl").write_text("".join(dropped + line for line in lines))
    argv = [*kill.command("one process", directory), "--data", tmp_path / "data.jsonl", "--batch-size", 3, "--max-length", 150, "--steps", 6]
    for ranks in (1, 3):
        code, output = finish(ranks, None, *argv, "--out", tmp_path / str(ranks))
        assert code == 0 and "7 samples" in output and "7 dropped" in output, output
    ours, theirs = metrics(tmp_path / "1"), metrics(tmp_path / "3")
    assert [x["samples"] for x in ours if "loss" in x] == [3, 3, 1] * 2
    for a, b in zip(ours, theirs, strict=True):
        assert all(math.isclose(v, b[k], rel_tol=1e-4, abs_tol=1e-9) for k, v in a.items())


# ---------------------------------------------------------------------------------------------------------------------
# What data and models cannot do

WRITTEN = []                                                              # a list while it is of interest


def audit(event, arguments):
    # (A number is a pipe that is open already.)
    if WRITTEN and event == "open" and not isinstance(arguments[0], int) and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        WRITTEN.append(arguments[0])
    elif WRITTEN and event in ("os.rename", "os.mkdir", "os.remove", "os.link", "os.symlink", "os.rmdir", "os.truncate"):
        WRITTEN.extend(x for x in arguments[:2] if isinstance(x, (str, os.PathLike)))
    elif WRITTEN and event in ("pickle.find_class", "exec", "os.system", "os.exec") and any("planted" in str(x) for x in arguments):
        WRITTEN.append(f"/{event}")


@pytest.mark.slow
def test_nothing_but_the_run_is_written_and_no_code_of_a_model_is_run(tmp_path, directory, monkeypatch):
    argv, base, out = kill.command("adapters", directory), tmp_path / "base", tmp_path / "run"
    base.mkdir()
    for file in (directory / "base").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    elsewhere = str(tmp_path / "planted")
    config = {**json.loads((base / "config.json").read_text()), "_name_or_path": elsewhere, "auto_map": {"AutoModelForCausalLM": "planted.Model"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "planted.py").write_text(f"open({elsewhere!r}, 'w')")
    torch.save({"planted": Planted(tmp_path / "planted")}, base / "pytorch_model.bin")
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "tokenizer_file": elsewhere, "name_or_path": elsewhere}))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": elsewhere, "response": "x", "group": elsewhere, "file": elsewhere}) + "\n"
                                                 for _ in range(4)))
    sys.addaudithook(audit)                                               # which stays, so it only looks while WRITTEN is not empty
    WRITTEN.append(str(out))
    try:
        assert call(monkeypatch, *argv, "--init", base, "--data", tmp_path / "data.jsonl", "--steps", 3, "--out", out) == 0
        written = {str(x) for x in WRITTEN}
    finally:
        WRITTEN.clear()
    assert len(written) > 8 and not (tmp_path / "planted").exists()
    assert {x for x in written if not x.startswith(str(out)) and not x.startswith("/dev/")} == set()
    assert (out / "model" / "model.safetensors").exists() and not list(out.rglob("*.py")) and not list(out.rglob("*.bin"))


@pytest.mark.parametrize("allocate", [lambda: bytearray(2 ** 60), lambda: torch.empty(2 ** 50), lambda: np.empty(2 ** 55)])
def test_memory_that_runs_out_is_one_sentence(allocate, capsys):
    with pytest.raises(SystemExit) as e:
        run(allocate)
    error = capsys.readouterr().err
    assert e.value.code == 1 and error.startswith("error: out of memory; ") and error.count("\n") == 1


def test_an_interrupt_says_nothing_and_exits_with_130(capsys):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as e:
        run(main)
    assert e.value.code == 130 and capsys.readouterr().err == ""

