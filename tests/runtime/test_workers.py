"""Worker processes: tasks in order, errors that reach the parent, and an end with the parent."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from support import ROOT

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
def test_workers_import_nothing_of_the_current_directory(tmp_path):
    """Of a command, which `run` calls."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("multiprocessing", "pickle", "torch"):
        (here / f"{name}.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")
    (tmp_path / "command.py").write_text("""
from runtime.process import run
from runtime.workers import map_in_workers
from test_workers import square


if __name__ == "__main__":
    run(lambda: print([number for number, _, _ in map_in_workers(square, [3, 2], 2)]))
""")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'runtime'}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, tmp_path / "command.py"], cwd=here, env=environment, capture_output=True, text=True)
    assert done.stdout == "[9, 4]\n" and not (tmp_path / "trace").exists(), done.stderr


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
