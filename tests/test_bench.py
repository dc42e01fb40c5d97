"""The benchmarks run and print what they promise; what they measure is no test."""

import subprocess
import sys
from pathlib import Path

import pytest


BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.mark.parametrize("script,rows", [
    ("attention.py", ["Packing.attend", "length buckets", "padded rows", "block mask"]),
    ("loss.py", 2 * ["bft", "sft", "dft", "bft-v3", "cross-entropy, all logits", "materialised BFT"]),
    ("train.py", ["ours", "transformers", "transformers, by length"])])
def test_each_prints_its_table(script, rows):
    if script == "train.py":
        pytest.importorskip("transformers")
    done = subprocess.run([sys.executable, BENCH / script, "--dry"], text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    heading, *lines = done.stdout.splitlines()
    assert "torch" in heading and lines[0].startswith("$ python") and script in lines[0]
    found = [line.split("  ")[0] for line in done.stdout.split("Growth")[0].splitlines()]
    assert [name for name in found if name in rows] == rows and "time ratio" in done.stdout
