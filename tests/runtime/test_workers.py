"""Worker processes: tasks in order, errors that reach the parent, and an end with the parent."""

import os
import signal
import sys

import pytest
import torch

from runtime.process import UserError
from runtime.workers import map_in_workers


def square(number):
    if number == 0:
        raise UserError("0 is not to be squared")
    return number ** 2, torch.get_num_threads(), os.getpid()


def die(number):
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def say(words):
    print(words)
    print(words, file=sys.stderr, flush=True)


def test_one_worker_is_this_process():
    assert list(map_in_workers(square, [3, 2], 1)) == [square(3), square(2)]
    assert list(map_in_workers(square, [3], 2)) == [square(3)]
    assert list(map_in_workers(square, [], 2)) == []


@pytest.mark.slow
def test_workers_import_nothing_of_the_current_directory(tmp_path, monkeypatch):
    for name in ("multiprocessing", "pickle", "torch"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    environment = dict(os.environ)
    assert [square for square, _, _ in map_in_workers(square, [3, 2], 2)] == [9, 4]
    assert not (tmp_path / "trace").exists() and os.environ == environment


@pytest.mark.slow
def test_results_come_in_order_and_errors_as_they_are():
    results = map_in_workers(square, [3, 1, 2, 0], 2)
    squares, threads, processes = zip(*[next(results) for _ in range(3)])
    assert squares == (9, 1, 4) and set(threads) == {1} and os.getpid() not in processes
    with pytest.raises(UserError, match="0 is not to be squared"):
        next(results)


@pytest.mark.slow
def test_what_others_wrote_does_not_drive_the_terminal(capfd):
    list(map_in_workers(say, ["a\x1b[2J\rb", "c"], 2))
    captured = capfd.readouterr()
    assert r"a\x1b[2J\rb" in captured.out and r"a\x1b[2J\rb" in captured.err


@pytest.mark.slow
def test_a_killed_worker_is_one_sentence():
    with pytest.raises(ChildProcessError, match="a worker process was killed"):
        list(map_in_workers(die, [0, 1, 2], 2))
