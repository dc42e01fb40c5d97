"""How a command begins and ends, whatever its environment and whoever reads what it says."""

import os
import subprocess
import sys

import pytest
from support import ROOT, SMALL, call

from runtime.process import UserError, read_launch


# ---------------------------------------------------------------------------------------------------------------------
# What torchrun says

@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"])
@pytest.mark.parametrize("value", ["abc", "", "-1", "1.0", " 1", "9" * 30, "\u0663"])
def test_a_launcher_that_says_no_number_is_one_sentence(name, value, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    assert call(monkeypatch, *SMALL, "--data", "none.jsonl", "--device", "cpu", "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {name} is {value!r} in the environment; expected a number from ") and error.count("\n") == 1


@pytest.mark.parametrize("values, words", [
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"), ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'"), ({"GROUP_WORLD_SIZE": "0"}, "GROUP_WORLD_SIZE is '0'"),
    ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE 1"), ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK is 5 and WORLD_SIZE 2")])
def test_numbers_that_no_launcher_has_are_refused(values, words, monkeypatch):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        read_launch()


def test_what_torchrun_says(monkeypatch):
    assert read_launch() == (0, 1, 0, 1, 1, 0)
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4, "TORCHELASTIC_RESTART_COUNT": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert read_launch() == (5, 8, 1, 4, 2, 2)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    assert read_launch().nodes == 3


# ---------------------------------------------------------------------------------------------------------------------
# Whoever reads

def start(ranks, arguments, **streams):
    """Starts streams_worker.py with its stdout and stderr as told: "closed", "gone" (a pipe whose reader has left), "full" (a disk), or kept in a
    file."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    # Output waits in buffers, if Python was not told otherwise.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    descriptors, closed = {}, []
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        how = streams.get(name)
        if how == "closed":
            closed.append(number)
        elif how == "gone":
            reader, descriptors[name] = os.pipe()
            os.close(reader)
        elif how is not None:
            descriptors[name] = os.open("/dev/full" if how == "full" else how, os.O_WRONLY | os.O_CREAT)
    process = subprocess.Popen([sys.executable, *launch, ROOT / "tests" / "runtime" / "streams_worker.py", *map(str, arguments)], env=environment,
                               preexec_fn=lambda: [os.close(number) for number in closed], **descriptors)
    for descriptor in descriptors.values():
        os.close(descriptor)
    return process


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full")
@pytest.mark.parametrize("ranks, ways", [
    (1, ["stdout=closed", "stderr=closed", "stdin=closed stdout=closed stderr=closed", "stdout=gone", "stdout=gone stderr=gone", "stderr=full"]),
    (2, ["stdout=closed stderr=closed", "stdout=gone stderr=gone"])])
def test_a_run_ends_well_whoever_reads(ranks, ways, tmp_path):
    processes = []
    for number, way in enumerate(ways):
        streams = {"stdout": tmp_path / "said", "stderr": tmp_path / "said", **dict(pair.split("=") for pair in way.split())}
        processes.append(start(ranks, [tmp_path / str(number), "print"], **streams))
    assert [process.wait(120) for process in processes] == [0] * len(ways)
    for number in range(len(ways)):
        for rank in range(ranks):
            assert (tmp_path / f"{number}-{rank}-done").read_text() == "True"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full")
def test_an_end_is_the_same_whoever_reads(tmp_path):
    """Of a mistake, and of a disk with no room for what is said."""
    ways = [{"stdout": "gone"}, {"stdout": "full"}, {"stdout": "closed", "stderr": "gone"}, {"stderr": "closed"}]
    processes = [start(1, ["none", "mistake"], **{"stderr": tmp_path / str(number), **way}) for number, way in enumerate(ways)]
    processes.append(start(1, [tmp_path / "run"], stdout="full", stderr=tmp_path / "said"))
    assert [process.wait(120) for process in processes] == [2, 2, 2, 2, 1]
    assert [(tmp_path / name).read_text() for name in "01"] == ["error: a mistake\n"] * 2
    assert (tmp_path / "said").read_text() == "error: standard output: No space left on device\n"
