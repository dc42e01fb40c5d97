"""Kills runs at random moments and looks whether they end as if nothing had been. test_faults.py does it four times.

    PYTHONPATH=.:tests python tests/runtime/kill.py 20 [--seed 0]

A run is one process from random weights, one with adapters, or three ranks from trained ones, each with the whole model (under torchrun) or with
its rows of it, in turn. SIGKILL comes when its log has reached a random step, or while it writes a checkpoint, to all of its processes or to one of
its ranks. The same command must then go on from a checkpoint, and end with the bits of a run that was never stopped: log, weights, optimizer.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from forked import forked
from support import ASSETS, ROOT, metrics, save_with_tokenizer, tiny

import hf


KINDS = ("one process", "adapters", "three ranks", "three sharded ranks")
STEPS = 14


def script(fault):
    """train.py with this fault (see fault_worker.py), or as it is if it is None."""
    return [ROOT / "train.py"] if fault is None else [ROOT / "tests" / "runtime" / "fault_worker.py", *fault.split(), "--"]


def launch(ranks, fault, *arguments, restarts=0):
    """Starts `script(fault)` as a user does, with python or torchrun; returns the Popen."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", f"--max_restarts={restarts}"]
    return subprocess.Popen(
        [sys.executable, *(torchrun if ranks > 1 else []), *map(str, [*script(fault), *arguments])], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})


def finish_launched(*arguments, **options):
    """(exit code, output) of `launch`, which must end by itself."""
    process = launch(*arguments, **options)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def finish(ranks, fault, *arguments):
    """(exit code, output) of the same in forked processes: see forked.py."""
    done = forked(ranks, *script(fault), *arguments)
    return done.returncode, done.stdout + done.stderr


def children(pid):
    """The processes that this one has started: of torchrun, its ranks."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def workers(pid):
    """Them, and those that they have started."""
    return [p for child in children(pid) for p in (child, *workers(child))]


def command(kind, directory):
    """What train.py is told, but for --out: 42 samples, a checkpoint and a validation every third of 14 steps."""
    lines = (ASSETS / "finetune.jsonl").read_text().splitlines(keepends=True)[::16]
    (directory / "data.jsonl").write_text("".join(lines))
    base = directory / "base"
    if kind != "one process" and not base.exists():
        save_with_tokenizer(tiny(vocab_size=hf.load_tokenizer(ASSETS).n_vocab, max_position_embeddings=512), base)
    init = ["--init", "scratch", "--tokenizer", ASSETS, "--n-layer", 2, "--n-head", 2, "--n-embd", 32] \
        if kind == "one process" else ["--init", base]
    if kind == "adapters":
        init += ["--lora-rank", 2]
    if kind == "three sharded ranks":
        init += ["--shard", "all"]
    return [*init, "--data", directory / "data.jsonl", "--val-data", directory / "data.jsonl", "--dtype", "float32", "--lr", 1e-3,
            "--group-size", 16, "--batch-size", 8, "--micro-tokens", 300, "--steps", STEPS, "--save-every", 3, "--eval-every", 3]


def assert_same(a, b):
    """Two finished runs have the same log, weights and optimizer, to the bit."""
    assert metrics(a) == metrics(b)
    assert contents(a / "model") == contents(b / "model")
    assert (a / "adapter").exists() == (b / "adapter").exists()
    if (a / "adapter").exists():
        assert contents(a / "adapter") == contents(b / "adapter")
    (ours, our_state), (theirs, their_state) = (checkpoint_of(out / "checkpoint" / f"step-{STEPS}") for out in (a, b))
    assert ours == theirs and our_state == their_state


def contents(directory):
    """{name: bytes} of the files in it and below."""
    assert directory.is_dir()
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def checkpoint_of(path):
    """({name: bytes}, what state.json says but for whose run it is)."""
    files = contents(path)
    state = json.loads(files.pop("state.json"))
    return files, {key: value for key, value in state.items() if key not in ("run_id", "sha256")}


def ranks_of(kind):
    return 3 if kind.startswith("three") else 1


def unbroken(kind, directory):
    """(arguments of train.py but for --out, the run directory of a run with them that nothing happened to)."""
    argv, whole = command(kind, directory), directory / f"whole {kind}"
    if not (whole / "model" / "config.json").exists():
        code, output = finish(ranks_of(kind), "draws", *argv, "--out", whole)
        assert code == 0, output
    return argv, whole


def kill_once(kind, directory, rng):
    """Trains, kills, resumes and compares; returns what was done, in words. directory keeps the unbroken run."""
    (argv, whole), out = unbroken(kind, directory), directory / f"cut {rng.random()}"
    ranks = ranks_of(kind)
    step, saving, one_rank = rng.randint(4, 10), rng.random() < 0.4, ranks > 1 and rng.random() < 0.5

    def kill(processes):
        deadline = time.time() + 120
        while max((line["step"] for line in metrics(out)), default=0) < step or saving and not list(out.glob("checkpoint/*.tmp")):
            assert time.time() < deadline and all(os.path.exists(f"/proc/{process.pid}") for process in processes)
            time.sleep(0.001)
        time.sleep(rng.random() * 0.4 if saving else rng.random() * 0.2)
        pids = [process.pid for process in processes]
        if kind == "three ranks":
            pids = children(*pids) if one_rank else pids + workers(*pids)
        for pid in [rng.choice(pids)] if one_rank else pids:
            os.kill(pid, signal.SIGKILL)

    if kind == "three ranks":
        process = launch(ranks, "slow", *argv, "--out", out)
        kill([process])
        process.communicate(timeout=60)
        assert process.returncode != 0
    else:
        done = forked(ranks, *script("slow"), *argv, "--out", out, meanwhile=kill)
        assert done.returncode == -signal.SIGKILL
    had = metrics(out)[-1]["step"]
    code, output = finish(ranks, "draws", *argv, "--out", out)
    assert code == 0, output
    start = int(output.split("bft from step ")[1].split()[0])
    assert start >= 3, output                                             # it went on, and did not start again
    assert_same(whole, out)
    assert not list(out.rglob("*.tmp"))                                   # what was half written is gone
    return f"{kind}: {'one rank ' if one_rank else ''}killed {'while saving ' if saving else ''}after step {had} was logged, " \
        f"went on from {start}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as directory:
        for i in range(args.kills):
            print(f"{i + 1}. {kill_once(KINDS[i % len(KINDS)], Path(directory), rng)}: the same to the bit", flush=True)
