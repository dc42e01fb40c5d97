"""Spoilt inputs, a fixed few; `tests/fuzz.py` says what they are and how to try more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


def test_spoilt_inputs_are_refused_or_loaded_right():
    for library in ("tokenizers", "safetensors"):
        pytest.importorskip(library)
    result = subprocess.run([sys.executable, ROOT / "tests" / "fuzz.py", "200"], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, capture_output=True,
                            timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    for target in ("jsonl", "tokenizer", "model"):                        # of each some were refused, and some not
        assert f"{target} loaded" in result.stdout and f"{target} refused" in result.stdout
    assert "findings 0" in result.stdout
