"""Spoilt inputs, a fixed few; `tests/fuzz.py` says what they are and how to try more."""

import pytest
from forked import forked
from support import ROOT


@pytest.mark.slow
def test_spoilt_inputs_are_refused_or_loaded_right():
    result = forked(1, ROOT / "tests" / "fuzz.py", "200")
    assert result.returncode == 0, result.stdout + result.stderr
    for target in ("jsonl", "tokenizer", "model", "adapter"):                        # of each some were refused, and some not
        assert f"{target} loaded" in result.stdout and f"{target} refused" in result.stdout
    assert "findings 0" in result.stdout
