"""Control characters in what others wrote show as escapes wherever it is printed, and stay as they are in files."""

import io
import json
import os
import subprocess
import sys
import unicodedata

import pytest
import torch
from evaluation_files import small, write
from forked import forked
from support import ASSETS, ROOT, SMALL, metrics, save_with_tokenizer

import data
import eval as evaluation
import hf
import train
from model import GPT
from runtime.process import run
from runtime.terminal import Shown, escaped


# Clears the screen, goes back over the line, rings, colours, and turns around or hides what follows.
ODD = "a\x1b[2Jb\rc\x07\x7f\x9b31m\u202ed\u2066\u2028\u2029\ufeff\U000e0041"
SHOWN = r"a\x1b[2Jb\rc\x07\x7f\x9b31m\u202ed\u2066\u2028\u2029\ufeff\U000e0041"
# An emoji of three, Persian with a non-joiner, Hebrew with a mark, spaces that do not break, a backslash.
TEXTS = "\U0001f469\u200d\U0001f52c \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u05d0!\u200f 10\u00a0mg\u2009x \ufffd e\u0301 \\x1b"


def check_printed(text, *shown):
    """Nothing of it drives a terminal, and all that was odd shows."""
    assert {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} <= {"\n"}
    for words in shown:
        assert words in text


def call(main, monkeypatch, capsys, *argv):
    """A command in this process: (exit code, what it printed)."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
    with pytest.raises(SystemExit) as exit:
        run(main)
    captured = capsys.readouterr()
    return exit.value.code, captured.out + captured.err


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model, samples, and questions, in a group that would be a row of the table by itself."""
    path = tmp_path_factory.mktemp("terminal")
    save_with_tokenizer(small(hf.load_tokenizer(ASSETS), 0), path / "model")
    groups = [f"x\n{ODD}", f"x\n{ODD}", "y"]
    write(path / "samples.jsonl", [{"prompt": ODD, "response": ODD, "group": group} for group in groups])
    write(path / "choice.jsonl", [{"question": "q", "choices": ["a", "b"], "answer": 0, "group": group} for group in groups])
    return path


def test_what_is_not_text_is_escaped_and_writing_stays_whole():
    assert escaped(ODD) == SHOWN and escaped(SHOWN) == SHOWN
    assert escaped("a\n\tb\ud800") == r"a\n\tb\ud800"
    assert escaped(TEXTS) == TEXTS


@pytest.mark.parametrize("is_stderr, shown", [(False, r"\r 5%\x1b[A\x1b[Ab\rc\x1b[A"), (True, "\r 5%\x1b[A\x1b[Ab\\rc\\x1b[A")])
def test_a_progress_bar_goes_back_on_stderr_where_a_write_begins(is_stderr, shown):
    stream = io.StringIO()
    terminal = Shown(stream, is_stderr)
    assert terminal.write("\r 5%") == 4
    terminal.writelines(["\x1b[A\x1b[A", "b\rc\x1b[A"])
    terminal.write("\n\td")
    assert stream.getvalue() == f"{shown}\n\td" and terminal.tell() == len(shown) + 3


@pytest.mark.parametrize("main", [train.main, evaluation.main, data.main])
def test_a_mistake_is_shown(main, monkeypatch, capsys):
    code, printed = call(main, monkeypatch, capsys, "a", "--tokenizer", "b", f"--no-such-{ODD}")
    # Errors are one line: what separates lines has become a space.
    check_printed(printed, r"a\x1b[2Jb c\x07\x7f\x9b31m\u202ed\u2066 \ufeff\U000e0041")
    assert code == 2 and printed.count("\n") == 1


def test_samples_are_shown(work, monkeypatch, capsys):
    code, printed = call(data.main, monkeypatch, capsys, work / "samples.jsonl", "--tokenizer", ASSETS)
    check_printed(printed, f"{SHOWN}\n[[{SHOWN}<|endoftext|>]]\n")
    assert code == 0


def test_a_group_stays_in_its_cell_and_in_the_file_as_it_is(work, monkeypatch, capsys):
    argv = ("--tasks", "nll", "choice", "--data", work / "samples.jsonl", work / "choice.jsonl", "--out", work / "results.json")
    code, printed = call(evaluation.main, monkeypatch, capsys, work / "model", *argv, "--device", "cpu")
    check_printed(printed, f"\nx\\n{SHOWN} (2)  NLL per response token  ", f"\nx\\n{SHOWN} (2)  acc")
    assert code == 0
    for task in json.loads((work / "results.json").read_text())["tasks"]:
        assert f"x\n{ODD}" in {row["group"] for row in task["rows"]}
    # Columns are as wide as what is shown.
    table = [line for line in printed.split("\n") if ")  NLL per" in line]
    assert len(table) == 3 and len({len(line) for line in table}) == 1


def test_an_answer_is_shown(work, monkeypatch, capsys):
    monkeypatch.setattr(GPT, "generate", lambda self, prompts, *_: [torch.tensor(hf.load_tokenizer(ASSETS).encode(f"\r{ODD}"))])
    code, printed = call(evaluation.main, monkeypatch, capsys, work / "model", "--prompt", ODD, "--device", "cpu")
    check_printed(printed, f"\n\\r{SHOWN}\n")
    assert code == 0


# ---------------------------------------------------------------------------------------------------------------------
# In processes of their own

@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_names_of_files_are_shown(ranks, work, tmp_path):
    path, out = tmp_path / f"{ODD}.jsonl", tmp_path / f"out {ODD}"
    path.write_bytes((work / "samples.jsonl").read_bytes())
    argv = [ROOT / "train.py", *SMALL, "--device", "cpu", "--steps", "1", "--out", out, "--data"]
    done = forked(ranks, *argv, path)
    check_printed(done.stdout, f"{SHOWN}.jsonl: 3 samples", f"out {SHOWN}: bft from step 0", f"the model is in {tmp_path}/out {SHOWN}/model")
    assert done.returncode == 0 and len(metrics(out)) == 1
    done = forked(ranks, *argv, f"{path}x")
    check_printed(done.stderr, r"a\x1b[2Jb ")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_warnings_and_tracebacks_are_shown(tmp_path):
    """Also where what a message holds is not to be encoded, and the terminal can show ASCII alone."""
    program = ("import sys, warnings\nfrom runtime.process import run\nodd = sys.argv[1]\ndef main():\n    warnings.warn(odd)\n"
               "    print(odd + '\\u00e9\\ud800')\n    raise ValueError(odd)\nrun(main)")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program, ODD], env=env, capture_output=True)
    out, err = done.stdout.decode("ascii"), done.stderr.decode("ascii")
    check_printed(out, f"{SHOWN}\\xe9\\ud800\n")
    check_printed(err, f"UserWarning: {SHOWN}\n", f"ValueError: {SHOWN}\n", "Traceback")
    assert done.returncode == 1
