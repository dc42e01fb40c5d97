"""What a run directory says of the code that made it, and its log where a run goes on."""

import json
import math
import os
import re
import shutil
import subprocess
import tracemalloc

import pytest

from runtime import log, run_directory
from runtime.log import cut_metrics, read_metrics


def git(directory, *arguments):
    user = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", directory, *user, *arguments], check=True, capture_output=True)


def test_the_commit_and_what_was_changed_since_are_on_record(tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "CHECKOUT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))   # no repository around it is meant
    assert run_directory.git_commit() is None
    git(tmp_path, "init")
    assert run_directory.git_commit() is None                             # nothing is committed
    code = tmp_path / "code.py"
    code.write_text("a = 1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-m", "a")
    commit = run_directory.git_commit()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "samples.jsonl").write_text("{}\n")
    assert run_directory.git_commit() == commit                           # git does not know this file
    seen = {commit}
    for text in ("a = 2\n", "a = 3\n"):
        code.write_text(text)
        dirty = run_directory.git_commit()
        assert re.fullmatch(f"{commit}-dirty-[0-9a-f]{{8}}", dirty) and dirty not in seen
        seen.add(dirty)
    git(tmp_path, "add", "code.py")
    assert run_directory.git_commit() == dirty                            # staged or not
    code.write_text("a = 1\n")
    assert run_directory.git_commit() == commit


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_directory.git_commit() is None


# ---------------------------------------------------------------------------------------------------------------------
# The log of a run that goes on

# Lines as a crash may leave them: cut, joined to the next, zeros of a file that was growing; and what is no line of ours.
BROKEN = [b'{"step": 2, "loss": 1.2', b'{"step": 2, "lo{"step": 2, "loss": 1.5}', b'{"step": 2, "loss": \0\0\0}', b"\0" * 4000, b"", b"[1, 2]", b"3", b'"step"',
          b"null", b'{"loss": 1.0}', b'{"step": "2"}', b'{"step": null}', b'{"step": 2, "loss": }', b'{"step": 2,}', b"[" * 100_000, b"\xff", b'{"step": 2} {"step": 2}']


def logged(step, **values):
    return json.dumps({"step": step, **(values or {"loss": step / 7, "mfu": None, "clipped": False, "lr": 1e-5, "nll": math.nan})}).encode()


@pytest.mark.parametrize("name", [None, "linked", "copy"])
def test_what_has_another_name_too_is_not_cut(name, tmp_path):
    path, other = tmp_path / "metrics.jsonl", tmp_path / "other"
    other.write_bytes(logged(1) + b"\n" + logged(2) + b"\n")
    if name == "linked":
        path.symlink_to(other)
    else:
        (os.link if name else shutil.copy)(other, path)
    before, inode = other.read_bytes(), path.stat().st_ino
    assert cut_metrics(path, 1) == (1, False)
    assert path.read_bytes() == logged(1) + b"\n" and other.read_bytes() == before
    # In place, where it may be.
    assert (path.stat().st_ino == inode) == (name is None)


@pytest.mark.parametrize("last", [1, 3, 4, 9])
def test_a_log_is_cut_back_to_a_step_and_keeps_its_bytes(last, tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [(0, logged(0, val_nll=2.5)), (1, logged(1)), (2, logged(2)), (3, logged(3)), (3, logged(3, val_nll=1 / 3)), (4, logged(4)),
             (4, b'{"note": {"of": "another"}, "step": 4}')]
    torn = [line for pair in zip(lines, [*BROKEN, *BROKEN]) for line in (pair[0][1], pair[1])] + BROKEN
    path.write_bytes(b"\n".join(torn))
    assert len(read_metrics(path)) == len(lines)
    assert cut_metrics(path, last) == (min(last, 4), last == 3)
    assert path.read_bytes() == b"".join(line + b"\n" for step, line in lines if step <= last)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_last_line_of_a_log_may_lack_its_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for content in (logged(1), b"\n" + logged(1), logged(1) + b"\n" + logged(2), logged(1) + b"\n{"):
        path.write_bytes(content)
        assert cut_metrics(path, 1) == (1, False) and path.read_bytes() == logged(1) + b"\n"
    path.unlink()
    assert cut_metrics(path, 1) == (0, False) and path.read_bytes() == b""


def test_a_long_log_is_cut_in_little_memory_and_not_read_as_json(tmp_path, monkeypatch):
    path, parsed = tmp_path / "metrics.jsonl", []
    monkeypatch.setattr(log.json, "loads", lambda line: parsed.append(len(line)))
    with open(path, "wb") as f:
        for step in range(1, 30_001):
            f.write(json.dumps({"step": step, "loss": step / 7, "lr": 1e-5, "mfu": None, "clipped": False, "tokens": 9000}).encode() + b"\n")
        f.write(bytes(20_000_000))
    tracemalloc.start()
    assert cut_metrics(path, 29_999) == (29_999, False)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    # Of the zeros at its end alone.
    assert len(parsed) == 20
