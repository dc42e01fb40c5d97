"""Worker processes: tasks in order, errors that reach the parent, and an end with the parent."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT
from worker_tasks import die, say, square

from runtime.process import UserError
from runtime.workers import map_in_workers


ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "runtime")])}


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
from worker_tasks import square


if __name__ == "__main__":
    run(lambda: print([number for number, _, _ in map_in_workers(square, [3, 2], 2)]))
""")
    done = subprocess.run([sys.executable, tmp_path / "command.py"], cwd=here, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout == "[9, 4]\n" and not (tmp_path / "trace").exists(), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_workers_end_with_the_command_even_if_it_is_killed(tmp_path):
    (tmp_path / "command.py").write_text("""
from runtime.process import run
from runtime.workers import map_in_workers
from worker_tasks import take_long


if __name__ == "__main__":
    run(lambda: list(map_in_workers(take_long, ["1", "2"], 2)))
""")
    process = subprocess.Popen([sys.executable, tmp_path / "command.py"], cwd=tmp_path, env=ENVIRONMENT)
    while process.poll() is None and not all((tmp_path / name).exists() for name in "12"):
        time.sleep(0.05)
    workers = [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(workers) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


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
