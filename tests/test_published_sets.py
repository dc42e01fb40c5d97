"""The commands of docs/data.md for published sets, on rows of our own that have the sets' keys."""

import json
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from support import ASSETS, ROOT

from hf.conversation import as_conversation
from runtime.process import UserError
from runtime.rows import read_jsonl


sys.path.insert(0, str(ROOT / "prepare"))
import huatuo  # noqa: E402


ALPACA = {"instruction": "Name the organ.", "input": "It pumps blood.", "output": "The heart."}
END = "<|endoftext|>"

# set: (a row with its keys, what data.py shows of it)
SETS = {
    "medical-o1-reasoning-SFT": (
        {"Question": "Why is the knee red?", "Complex_CoT": "Redness is heat.", "Response": "It is inflamed."},
        f"Why is the knee red?\n[[<think>\nRedness is heat.\n</think>\n\nIt is inflamed.{END}]]"),
    "Medical-R1-Distill-Data": (
        {"question": "Why is the knee red?", "reasoning (reasoning_content)": "Redness is heat.", "response (content)": "It is inflamed."},
        f"Why is the knee red?\n[[<think>\nRedness is heat.\n</think>\n\nIt is inflamed.{END}]]"),
    "MedReason": (
        {"dataset_name": "medmcqa", "id_in_dataset": 7, "question": "Which is red?", "answer": "The knee. Explanation: it is hot.",
         "reasoning": "Finding reasoning paths: ...", "options": "Answer Choices:\nA. Knee\nB. Ear"},
        f"Which is red?\nAnswer Choices:\nA. Knee\nB. Ear\n[[<think>\nFinding reasoning paths: ...\n</think>\n\nThe knee. Explanation: it is hot.{END}]]"),
    "m23k": (
        {"answer_idx": 0, "source": "x", "metadata": "{}", "prompt": "Which is red?\nA. Knee\nB. Ear", "answer_letter": "A", "answer_string": "Knee",
         "reasoning": "Redness is heat.", "distilled_answer_string": "It is A.",
         "text": "<|im_start|>user\nWhich is red?<|im_end|>\n<|im_start|>assistant\nIt is A.<|im_end|>"},
        f"Which is red?\nA. Knee\nB. Ear\n[[<think>\nRedness is heat.\n</think>\n\nIt is A.{END}]]"),
    "UltraMedical": (
        {"id": "x,1", "type": "Exam", "conversations": [{"from": "human", "value": "Which is red?"}, {"from": "gpt", "value": "The knee."}],
         "answer": "A", "score": 3.5},
        f"Which is red?\n[[The knee.{END}]]"),
    "HuatuoGPT-sft": (
        {"data": ["问：膝盖为什么红？", "答：发炎了。", "问:怎么办？", "答:休息。"]},
        f"膝盖为什么红？\n[[发炎了。{END}]]怎么办？\n[[休息。{END}]]"),
    "PubMedQA": (
        {"pubid": 1, "question": "Do knees redden?", "context": {"contexts": ["Knees were seen.", "Some were red."], "labels": ["BACKGROUND", "RESULTS"], "meshes": ["Knee"]},
         "long_answer": "Some do.", "final_decision": "yes"},
        f"Knees were seen.\nSome were red.\n\nDo knees redden?\n[[Some do.\n\nAnswer: yes{END}]]"),
    "ChatDoctor-HealthCareMagic": (ALPACA, f"Name the organ.\nIt pumps blood.\n[[The heart.{END}]]"),
    "MedInstruct-52k": ({**ALPACA, "input": "<noinput>"}, f"Name the organ.\n[[The heart.{END}]]"),
    "BioInstruct": (ALPACA, f"Name the organ.\nIt pumps blood.\n[[The heart.{END}]]"),
    "Mol-Instructions": (
        {"instruction": "Describe it.", "input": "[C][C][O]", "output": "An alcohol.", "metadata": {"task": "description", "split": "train"}},
        f"Describe it.\n[C][C][O]\n[[An alcohol.{END}]]"),
}


def command_of(name):
    """The words of the table's command for a set."""
    section = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").split("## Published sets")[1].split("\n## ")[0]
    row = next(line for line in section.splitlines() if line.startswith(f"| [{name}]("))
    return shlex.split(re.findall(r"`([^`]+)`", row)[-1])


def write(path, row):
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps([row] if path.suffix == ".json" else row), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_the_command_of_a_set_shows_its_first_sample(name, tmp_path, monkeypatch, capsys):
    row, shown = SETS[name]
    monkeypatch.chdir(tmp_path)
    python, script, file, *flags = command_of(name)
    assert (python, script) == ("python", "data.py")
    write(tmp_path / ("published.jsonl" if name == "HuatuoGPT-sft" else file), row)
    if name == "HuatuoGPT-sft":
        monkeypatch.setattr(sys, "argv", ["huatuo.py", "published.jsonl", "--out", file])
        huatuo.main()
    flags[flags.index("--tokenizer") + 1] = str(ASSETS)
    monkeypatch.setattr(sys, "argv", [script, file, *flags])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    out = capsys.readouterr().out
    assert not exit.value.code and f"\n{shown}\n--- 1 samples; 0 cut" in out and "warning" not in out


def test_every_set_of_the_page_is_tried():
    section = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").split("## Published sets")[1].split("\n## ")[0]
    assert re.findall(r"^\| \[([^\]]+)\]", section, re.M) == list(SETS)


def test_without_its_flags_a_set_is_refused_by_its_keys():
    for name in ("medical-o1-reasoning-SFT", "Medical-R1-Distill-Data", "MedReason", "HuatuoGPT-sft", "PubMedQA"):
        with pytest.raises(UserError) as error:
            as_conversation(SETS[name][0], "FILE:1")
        assert repr(next(iter(SETS[name][0]))) in str(error.value) and "--prompt-template" in str(error.value)
    with pytest.raises(UserError, match=r"'text' holds <\|im_start\|>"):
        as_conversation(SETS["m23k"][0], "FILE:1")


def test_huatuo_leaves_out_what_is_no_conversation_and_says_so(tmp_path, monkeypatch, capsys):
    rows = [["问：a", "答：b", "问：c"], ["问：a"], ["答：b", "问：a"], ["问：a", "答： "], ["问：a", "答：b"], []]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"data": row}, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["huatuo.py", str(path), "--out", str(tmp_path / "out.jsonl")])
    huatuo.main()
    assert "2 conversations; left out: 2 last questions without an answer, 4 conversations that are not" in capsys.readouterr().out
    expected = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert [row for _, row in read_jsonl(tmp_path / "out.jsonl")] == [{"messages": expected}] * 2
    for content, words in (('{"text": "a"}\n', ":1: no list of texts under 'data'"), ('{"data": ["x", "y"]}\n', "no conversation")):
        path.write_text(content)
        with pytest.raises(UserError, match=words):
            huatuo.main()


@pytest.mark.slow
def test_the_command_for_csv_makes_rows(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    command = re.search(r'^python -c ("import csv.*?") <', page, re.M)[1]
    done = subprocess.run([sys.executable, "-c", shlex.split(command)[0]], input='question,answer\n"Red, or not?",Red.\nWhy?,"So\nbe it."\n',
                          capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"question": "Red, or not?", "answer": "Red."}, {"question": "Why?", "answer": "So\nbe it."}]
