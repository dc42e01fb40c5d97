"""Windows lacks what these tests take away: a run and the default job do without it."""

import mmap
import os
import shutil
import signal
import sys

import pytest
from support import ASSETS, SMALL, call, metrics

from experiment import job
from runtime.checkpoint import checkpoints


@pytest.fixture
def windows(monkeypatch):
    """No SIGHUP, no modules resource and fcntl, no sysconf, no directory that can be opened, no flags of mmap."""
    for module, name in ((signal, "SIGHUP"), (os, "sysconf"), (os, "O_DIRECTORY"), (mmap, "MAP_PRIVATE"), (mmap, "MAP_ANONYMOUS")):
        monkeypatch.delattr(module, name, raising=False)
    for name in ("resource", "fcntl"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)               # how rmtree goes about it
    os_open = os.open

    def refuse_directories(path, *flags, **options):
        if isinstance(path, (str, os.PathLike)) and os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return os_open(path, *flags, **options)
    monkeypatch.setattr(os, "open", refuse_directories)


def test_a_run_is_trained_saved_and_resumed(windows, tmp_path, monkeypatch):
    argv = [*SMALL, "--data", ASSETS / "finetune.jsonl", "--steps", 4, "--batch-size", 8, "--save-every", 1, "--keep", 2]
    assert call(monkeypatch, *argv, "--out", tmp_path / "base") == 0
    for init in ([], ["--init", tmp_path / "base"]):
        out = tmp_path / f"run {len(init)}"
        assert call(monkeypatch, *argv, *init, "--out", out) == 0
        assert metrics(out, timings=True)[-1]["memory_gb"] is None        # nobody says how much it is
        whole = metrics(out)
        (out / "model" / "config.json").unlink()
        shutil.rmtree(checkpoints(out)[-1][1])
        assert call(monkeypatch, *argv, *init, "--out", out) == 0
        assert metrics(out) == whole and len(whole) == 4 and (out / "model" / "config.json").exists()


@pytest.mark.slow
def test_the_default_job_runs(windows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "BASE", {**job.BASE, "epochs": 0, "steps": 1})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call(monkeypatch, "--steps", 1, "--n-layer", 1, "--n-embd", 16, "--n-head", 2, "--lrs", 1e-3, "--objective", "sft", "bft") == 0
    assert "bft" in capsys.readouterr().out and (tmp_path / "runs" / "demo" / "table.txt").exists()
