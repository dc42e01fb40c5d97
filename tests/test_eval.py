"""The command of evaluation: what it prints, writes and refuses, and what is left where it fails."""

import json
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from chat_templates import CHATML_TURNS, chat_directory
from evaluation_files import SETS, chat_model, evaluate, log_likelihood, make_work, small, write
from forked import forked
from support import ASSETS, ROOT, save_with_tokenizer

import eval as evaluation
import hf
from runtime.files import load_safetensors, save_safetensors
from runtime.process import UserError, run
from tasks import Answers, items_of, statistics
from tasks.choice import choice_items, load_choice
from tasks.statistics import bootstrap, interval, seed_interval


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Intervals have tests of their own, in tests/tasks."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)


@pytest.fixture(scope="module")
def tokenizer():
    return hf.load_tokenizer(ASSETS)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("work"))


def call(monkeypatch, *argv):
    """eval.py in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
    with pytest.raises(SystemExit) as exit:
        run(evaluation.main)
    return exit.value.code


def find_row(task, measure, group=None):
    return next(row for row in task["rows"] if (row["measure"], row["group"]) == (measure, group))


# ---------------------------------------------------------------------------------------------------------------------
# What it prints and writes

def test_every_task_is_a_file_with_the_same_verbs():
    for name, task in evaluation.TASKS.items():
        assert task.__name__ == f"tasks.{name}" and f"\n    {name} " in evaluation.__doc__
        assert all(callable(getattr(task, verb)) for verb in ("add_flags", "check_flags", "read", "ask", "finish", "rows"))


def test_a_new_task_is_a_file_and_an_entry(work, monkeypatch, capsys):
    """A task that counts letters: its flag, its file, its row, from the command to the table."""
    task = types.SimpleNamespace(
        add_flags=lambda parser: parser.add_argument("--letter", default="a"),
        check_flags=lambda args: None,
        read=lambda file, number, evaluation: [{"line": i, "group": None, "text": text} for i, text in enumerate(open(file))],
        ask=lambda questions, model, opened, evaluation: Answers([{**q, "letters": q["text"].count(evaluation.args.letter)} for q in questions]),
        finish=lambda questions, answers, evaluation: {"letter": evaluation.args.letter},
        rows=lambda questions, answers, details, evaluation: (f"letters: {details['letter']}", statistics.summarise(
            [statistics.Measure("letters", "letters", statistics.MEAN)], items_of(answers, evaluation.columns))))
    monkeypatch.setitem(evaluation.TASKS, "letters", task)
    (work / "poem.txt").write_text("tiger, tiger,\nburning bright\n")
    found, = evaluate(monkeypatch, work, "base", "bft-s0", "--tasks", "letters", "--data", "poem.txt", "--letter", "t")
    assert (found["task"], found["data"], found["letter"]) == ("letters", "poem.txt", "t")
    assert find_row(found, "letters")["models"]["base"]["value"] == 1.5 and len(find_row(found, "letters")["pairs"]) == 1
    assert re.search(r"letters: t\n.*\nall \(2\)  letters  1\.500 \[", capsys.readouterr().out)
    assert call(monkeypatch, "base", "--prompt", "x", "--letter", "t") == 2
    assert "--letter is of letters alone; expected that in --tasks" in capsys.readouterr().err


def test_the_command_prints_one_table_and_saves_every_item(tmp_path, monkeypatch, capsys, tokenizer):
    for seed in (0, 1):
        save_with_tokenizer(small(tokenizer, seed), tmp_path / f"run{seed}" / "model")
    write(tmp_path / "results.json", ["an earlier one"])
    code = call(monkeypatch, tmp_path / "run0", tmp_path / "run1" / "model", "--tasks", "nll", "choice", "--group-size", "16", "--out",
                tmp_path / "results.json", "--data", ASSETS / "finetune.jsonl", ASSETS / "choice.jsonl")
    out = capsys.readouterr().out
    assert code == 0 and "NLL per response token" in out and "known, held out (48)  acc %" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "run0", "run1"]
    saved = json.loads((tmp_path / "results.json").read_text())
    assert list(saved) == ["models", "tasks"]
    assert [len(v) for t in saved["tasks"] for v in t["items"].values()] == [672, 672, 432, 432]
    for model, cell in find_row(saved["tasks"][0], "nll")["models"].items():
        # Per token, not per sample.
        items = saved["tasks"][0]["items"][model]
        assert cell["value"] == pytest.approx(sum(i["nll"] for i in items) / sum(i["tokens"] for i in items))
        assert math.isfinite(cell["value_low"]) and cell["value_low"] < cell["value"] < cell["value_high"]


def test_the_command_answers_a_prompt(tmp_path, monkeypatch, capsys, tokenizer):
    model = save_with_tokenizer(small(tokenizer, 0), tmp_path)
    expected, = model.generate([tokenizer.encode("Why?") + tokenizer.encode("\n")], 7)   # the plain format's question
    argv = [tmp_path, "--prompt", "Why?", "--max-new-tokens", "7", "--device", "cpu"]
    call(monkeypatch, *argv)
    assert capsys.readouterr().out == f"--- {tmp_path} (plain)\n{tokenizer.decode(expected)}\n"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [90000, int(expected[3])]}))
    call(monkeypatch, *argv)
    # A stop ends it, unwritten.
    short = expected[:expected.tolist().index(expected[3])]
    assert capsys.readouterr().out == f"--- {tmp_path} (plain)\n{tokenizer.decode(short)}\n"
    call(monkeypatch, *argv, "--temperature", "1", "--seed", "3")
    assert capsys.readouterr().out != f"--- {tmp_path} (plain)\n{tokenizer.decode(short)}\n"


def test_the_command_uses_the_chat_format_of_the_model(tmp_path, monkeypatch, capsys):
    chat_model(tmp_path, 0)
    ours, model = hf.load_tokenizer(tmp_path), hf.load_model(tmp_path)
    write(tmp_path / "a.jsonl", [{"prompt": "Why?", "response": "Because."}])
    call(monkeypatch, tmp_path, "--tasks", "nll", "--data", tmp_path / "a.jsonl", "--prompt", "Why?", "--max-new-tokens", "5", "--out",
         tmp_path / "r.json", "--device", "cpu")
    prompt, answer = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "Because.<|im_end|>"
    ids = {text: [i for part in re.split(r"(<\|im_\w+\|>)", text) for i in ([ours.special[part]] if part in ours.special else ours.encode(part))]
           for text in (prompt, answer)}
    item, = json.loads((tmp_path / "r.json").read_text())["tasks"][0]["items"][str(tmp_path)]
    assert item["nll"] == pytest.approx(-log_likelihood(model, ids[prompt] + ids[answer], len(ids[prompt])), abs=1e-4)
    expected, = model.generate([ids[prompt]], 5, stop=[ours.eos_id, ours.special["<|im_end|>"]])
    assert f"(own)\n{ours.decode(expected)}\n" in capsys.readouterr().out


def test_another_format_than_the_model_s_own_is_said_once(work, monkeypatch, capsys):
    """Where the chat format is used: not by choice questions that are asked plain, which a broken template does not disturb."""
    file = work / "base" / "tokenizer_config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), "chat_template": "Q: {{ messages[0].content }}"}))
    evaluate(monkeypatch, work, "base", "--tasks", "choice", "--data", "choice.jsonl", "--limit", "2")
    assert call(monkeypatch, work / "base", "--tasks", "nll", "--data", work / "samples.jsonl", "--out", work / "r.json") == 2
    assert "the chat template of" in capsys.readouterr().err
    evaluate(monkeypatch, work, "base", "--tasks", "choice", "nll", "nll", "--data", "choice.jsonl", "samples.jsonl", "samples.jsonl", "--limit", "2", "--chat",
             "--chat-format", "plain")
    assert capsys.readouterr().out.count("base has a chat template of its own, and --chat-format plain is another format") == 1
    file.write_text(before)


@pytest.mark.slow
def test_models_that_keep_different_samples_are_not_compared(tmp_path, monkeypatch, capsys, tokenizer):
    # 20 tokens: some prompts alone are longer.
    for name, positions in (("a", 2048), ("b", 20)):
        save_with_tokenizer(small(tokenizer, 0, positions), tmp_path / name)
    argv = [tmp_path / "a", tmp_path / "b", "--tasks", "nll", "--out", tmp_path / "r.json", "--data"]
    call(monkeypatch, *argv, ASSETS / "finetune.jsonl")
    assert "--max-length" in capsys.readouterr().err and not (tmp_path / "r.json").exists()
    # Kept by both, cut by one.
    write(tmp_path / "long.jsonl", [{"prompt": "a", "response": "the gene " * 60}])
    call(monkeypatch, *argv, tmp_path / "long.jsonl")
    assert "parts of them" in capsys.readouterr().err and not (tmp_path / "r.json").exists()
    assert call(monkeypatch, *argv, ASSETS / "finetune.jsonl", "--max-length", "20") == 0
    assert (tmp_path / "r.json").exists()


def test_seeds_are_one_column_and_every_pair_is_compared(work, monkeypatch, capsys):
    argv = ["--tasks", "choice", "--data", "choice.jsonl"]
    task, = evaluate(monkeypatch, work, "base", "bft-s[01]", "bft-s2", *argv)
    assert set(task["items"]) == {"base", "bft-s0", "bft-s1", "bft-s2"}
    nll = {path: np.array([item["nll"] for item in items]) for path, items in task["items"].items()}
    row = find_row(task, "nll")
    assert list(row["models"]) == ["base", "bft-s[01]", "bft-s2"]
    cell, seeds = row["models"]["bft-s[01]"], [nll["bft-s0"].mean(), nll["bft-s1"].mean()]
    assert cell["seeds"] == pytest.approx(seeds)
    assert (cell["value"], cell["value_low"], cell["value_high"]) == pytest.approx(seed_interval(seeds))
    assert [(p["model"], p["minus"]) for p in row["pairs"]] == [("bft-s[01]", "base"), ("bft-s2", "base"), ("bft-s2", "bft-s[01]")]
    both = (nll["bft-s0"] + nll["bft-s1"]) / 2
    for pair, d in zip(row["pairs"], (both - nll["base"], nll["bft-s2"] - nll["base"], nll["bft-s2"] - both)):
        assert pair["difference"] == pytest.approx(d.mean())
        assert [pair["difference_low"], pair["difference_high"]] == pytest.approx(interval(bootstrap(d)))    # paired
    assert ["seeds_low" in p for p in row["pairs"]] == [False] * 3        # not against a single training
    out = capsys.readouterr().out
    assert re.search(rf"NLL of the right answer, per token +{nll['base'].mean():.3f} \[", out)
    percent = find_row(task, "acc")["models"]["base"]["value"]
    assert re.search(rf"all \(23\)  acc %.* +{100 * percent:.1f} \[", out)
    assert "bft-s[01] (2 seeds)" in out and "minus base" in out and "over seeds, minus" not in out
    # Two pairs of seeds; these two bases agree.
    (work / "base2").symlink_to("base")
    task, = evaluate(monkeypatch, work, "base*", "bft-s[01]", *argv)
    pair, = find_row(task, "nll")["pairs"]
    assert "seeds_low" not in pair
    task, = evaluate(monkeypatch, work, "b[af]*[e2]", "bft-s[01]", *argv)
    (work / "base2").unlink()
    pair, = find_row(task, "nll")["pairs"]
    others = [np.mean([item["nll"] for item in task["items"][path]]) for path in ("base", "base2", "bft-s2")]
    assert (pair["difference"], pair["seeds_low"], pair["seeds_high"]) == pytest.approx(seed_interval(seeds, others))
    assert "over seeds, minus b[af]*[e2]" in capsys.readouterr().out


def test_layouts_chat_and_limit_reach_the_scores(work, monkeypatch, capsys):
    tasks = evaluate(monkeypatch, work, "base", "--tasks", "choice", "nll", "choice", "--layout", "cloze", "mmlu", "--data", "choice.jsonl",
                     "samples.jsonl", "choice.jsonl", "--limit", "5", "--chat")
    model, tokenizer = hf.load_model(work / "base"), hf.load_tokenizer(work / "base")
    for task, layout in zip(tasks[::2], ("cloze", "mmlu")):
        expected = choice_items(model, tokenizer, load_choice(work / "choice.jsonl")[:5], layout=layout, chat_format=hf.load_chat_format(work / "base", tokenizer))
        assert (task["layout"], task["chat"], task["majority"]) == (layout, "own", 0.4)
        assert [x["loglik"] for x in task["items"]["base"]] == [pytest.approx(x["loglik"], abs=1e-5) for x in expected]
    assert len(tasks[1]["items"]["base"]) == 5
    assert "mmlu layout, own chat format (always the most frequent answer: 40.0%)" in capsys.readouterr().out
    one_layout = evaluate(monkeypatch, work, "base", "--tasks", "choice", "choice", "--layout", "mmlu", "--data", "choice.jsonl", "choice.jsonl", "--limit", "5")
    assert [(task["layout"], task["chat"]) for task in one_layout] == [("mmlu", False)] * 2


def on_ranks(ranks, node, how, asked, out):
    """eval.py on so many ranks, `node` of them on each node: (what it prints, its tasks in results.json, what each rank
    notes of each model)."""
    directory, argv = asked
    out.mkdir()
    done = forked(ranks, ROOT / "tests" / "eval_worker.py", node, out, *argv, "--shard", how, "--out", out / "r.json", cwd=directory)
    assert done.returncode == 0, done.stderr
    notes = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    return done.stdout, json.loads((out / "r.json").read_text())["tasks"], notes


@pytest.fixture(scope="module")
def asked(work, tmp_path_factory):
    """(directory, arguments of eval.py) that ask two models all there is. Files large enough for several micro-batches:
    all ranks have work in every task."""
    directory = tmp_path_factory.mktemp("asked")
    filler = " filler words" * 40
    changes = {"choice": (80, lambda i: {"context": f"{i}{filler}"}), "samples": (120, lambda i: {"prompt": f"{i}{filler}"}),
               "sets": (100, lambda i: {"process": f"p {i}"}), "genes": (100, lambda i: {"gene": f"GENE{i}"})}
    for name, (count, change) in changes.items():
        rows = [json.loads(line) for line in open(work / f"{name}.jsonl")]
        write(directory / f"{name}.jsonl", [{**rows[i % len(rows)], **change(i)} for i in range(count)])
    write(directory / "odd.jsonl", [{"gene": f"GENE{i}", "label": i % 2} for i in range(100)])
    tasks = ["--tasks", "choice", "choice", "answer", "nll", "process", "profile", "inspect", "--layout", "cloze", "mmlu", "mmlu", "--data", "choice.jsonl",
             "choice.jsonl", "choice.jsonl", "samples.jsonl", "sets.jsonl", "genes.jsonl", "samples.jsonl", "--labels", "odd.jsonl", "--max-new-tokens", "12",
             "--temperature", "1", "--samples", "2"]
    return directory, [work / "base", work / "bft-s0", *tasks, "--prompt", "Why?", "--device", "cpu"]


@pytest.fixture(scope="module")
def one_process(asked, tmp_path_factory):
    return on_ranks(1, 1, "all", asked, tmp_path_factory.mktemp("one") / "1")


@pytest.mark.slow
@pytest.mark.parametrize("how, ranks, node", [("no", 2, 2), ("all", 2, 2), ("all", 3, 3), ("node", 4, 2)])
def test_one_rank_and_several_give_the_same(how, ranks, node, work, asked, one_process, tmp_path):
    """Sharded or not. Ranks that share a model hold what they should, no model when the next is read, and call it as often;
    one of them has fewer micro-batches than the others."""
    output, one, _ = one_process
    output_of_several, several, notes = on_ranks(ranks, node, how, asked, tmp_path / "out")
    for text in (output, output_of_several):
        assert text.count(f"--- {work / 'base'} (own)") == text.count("per-item scores") == 1
        assert [part.split(": choice of")[0] for part in text.split("--- ")] == [part.split(": choice of")[0] for part in output.split("--- ")]
    compared = 0
    for x, y in zip(one, several, strict=True):
        compared += assert_equal_but_rounding(x["items"], y["items"])
        for row, other in zip(x["rows"], y["rows"], strict=True):
            assert (row["pairs"] == []) == (row["measure"] == "cosine self")  # each in a space of its own
            assert_equal_but_rounding([cell["value"] for cell in row["models"].values()], [cell["value"] for cell in other["models"].values()])
    assert compared > 1000
    share = {"no": 1, "all": ranks, "node": node}[how]
    whole = sum(p.nbytes for p in hf.load_model(work / "base").parameters())
    for of_ranks in zip(*notes, strict=True):
        assert all(note["held"] <= 1.01 * whole / share and note["before"] == 0 for note in of_ranks)
        assert how == "no" or len({note["passes"] for note in of_ranks}) == 1
        assert any(note["empty"] for note in of_ranks)


def assert_equal_but_rounding(a, b):
    """Of what JSON holds; returns how many values it has."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        return sum(assert_equal_but_rounding(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return sum(assert_equal_but_rounding(x, y) for x, y in zip(a, b, strict=True))
    assert b == (pytest.approx(a, rel=1e-6, abs=1e-9) if isinstance(a, float) else a)
    return 1


@pytest.mark.slow
def test_a_sharded_model_has_the_dtypes_of_a_whole_one(work, tmp_path, monkeypatch, capsys):
    """Matrices in bfloat16 beside norms in float32. In one process there is nothing to share."""
    argv = [work / "base", "--prompt", "Why?", "--dtype", "bfloat16", "--shard", "all", "--max-new-tokens", "30", "--device", "cpu"]
    done = forked(2, ROOT / "eval.py", *argv, cwd=tmp_path)
    assert call(monkeypatch, *argv) == 0
    assert done.returncode == 0 and done.stdout == capsys.readouterr().out != "", done.stderr


@pytest.mark.slow
def test_nodes_of_different_sizes_share_no_model(work, tmp_path):
    done = forked(3, ROOT / "tests" / "eval_worker.py", 2, tmp_path, work / "base", "--prompt", "Why?", "--shard", "node", "--device", "cpu")
    assert done.returncode == 2 and done.stderr == "error: --shard node: 3 ranks, 2 of them on this node; expected as many on each\n"


@pytest.mark.slow
def test_the_output_may_be_cut_short(work, tmp_path):
    """As by `| head`: nobody reads the table, and all is well."""
    command = [sys.executable, ROOT / "eval.py", "base", "bft-s0", "--tasks", "choice", "--data", "choice.jsonl", "--out", tmp_path / "r.json", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait(100) == 0 and process.stderr.read() == ""
    assert len(json.loads((tmp_path / "r.json").read_text())["tasks"]) == 1


# ---------------------------------------------------------------------------------------------------------------------
# What it refuses

GENES_FILE = [{"gene": "A", "label": 1, "embedding": [1, 2]}, {"gene": "B", "label": 0, "embedding": [1]}]
ITEM = {"question": "q", "choices": ["a \ufffd", "b"], "answer": 0, "group": 1}            # odd, but no mistake


def test_tasks_read_every_kind_of_file_and_rows_of_other_keys(work, monkeypatch, capsys):
    rows = [json.loads(line) for line in (work / "samples.jsonl").read_text().splitlines()]
    (work / "array.json").write_text(json.dumps(rows))
    (work / "other.json").write_text(json.dumps([{"Question (en)": row["prompt"], "a": {"b": row["response"]}, "group": row.get("group")} for row in rows]))
    expected, = evaluate(monkeypatch, work, "base", "--tasks", "nll", "--data", "samples.jsonl")
    array, = evaluate(monkeypatch, work, "base", "--tasks", "nll", "--data", "array.json")
    other, page = evaluate(monkeypatch, work, "base", "--tasks", "nll", "inspect", "--data", "other.json", "other.json",
                           "--prompt-template", "{Question (en)}", "--response-template", "{a.b}")
    assert array["items"] == other["items"] == expected["items"]
    assert [item["line"] for item in page["items"]["base"]] == [1, 2, 3, 4]
    items = [json.loads(line) for line in (work / "choice.jsonl").read_text().splitlines()]
    (work / "choice.json").write_text(json.dumps(items))
    lines, rows = evaluate(monkeypatch, work, "base", "--tasks", "choice", "choice", "--data", "choice.jsonl", "choice.json")
    assert lines["items"] == rows["items"]
    (work / "choice.json").write_text(json.dumps([*items, {"question": "q", "choices": ["a"], "answer": 0}]))
    with pytest.raises(UserError, match=rf"choice\.json: row {len(items) + 1}: 'choices' must be"):
        load_choice(work / "choice.json")
    (work / "text.jsonl").write_text(json.dumps({"text": "<human>: Why? <bot>: So."}) + "\n")
    capsys.readouterr()
    evaluate(monkeypatch, work, "base", "bft-s0", "--tasks", "nll", "--data", "text.jsonl")
    assert capsys.readouterr().out.count("warning: texts that look like a question with its answer: 1, the first at text.jsonl:1") == 1


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory, tokenizer):
    """A directory with a model, and files with mistakes in them."""
    path = tmp_path_factory.mktemp("mistakes")
    save_with_tokenizer(small(tokenizer, 0), path / "model")
    write(path / "long.jsonl", [ITEM, {**ITEM, "choices": ["a", "c " * 2500]}])
    write(path / "sets.jsonl", [{"genes": ["A", "B"], "process": "p"}])
    write(path / "genes.jsonl", GENES_FILE)
    write(path / "twice.jsonl", GENES_FILE[:1] * 2)
    return path


@pytest.mark.parametrize("argv, words", [
    (["--tasks", "nll", "choice"], "--data names 1 files for 2 tasks"), (["--tasks", "sing"], "'sing'"),
    (["--tasks", "nll", "--device", "abacus"], "--device abacus"), (["--tasks", "nll", "--out", "nowhere/r.json"], "--out nowhere"),
    (["--tasks", "nll", "--group-size", "0"], "--group-size is 0"), (["--tasks", "choice"], "'question'"),
    (["--tasks", "plot"], "no --data"), (["--tasks", "plot", "nll"], "no other task"),
    (["--tasks", "nll", "--max-length", "-5"], "--max-length is -5"), (["--tasks", "nll", "--", "model"], "named twice"),
    (["--tasks", "choice", "--data", "long.jsonl"], "the choice 'c c c c"), (["--tasks", "choice", "--limit", "0"], "--limit is 0"),
    (["--tasks", "choice", "--data", "long.jsonl", "--layout", "pubmedqa"], "long.jsonl:1: --layout pubmedqa shows 'context'"),
    (["--tasks", "choice", "--data", "long.jsonl", "--layout", "mmlu", "medqa"], "--layout names 2 for 1 choice and answer tasks"),
    (["--tasks", "profile"], "the profile task needs --labels"), (["--tasks", "nll", "--template", "{x}"], "--template is of process and profile alone"),
    (["--tasks", "nll", "--encoder", "x"], "--encoder is of process and profile alone"),
    (["--tasks", "nll", "--prompt-template", "{prompt}"], "go together"), (["--tasks", "inspect", "--response-template", "{x}"], "go together"),
    (["--tasks", "nll", "--prompt-template", "{prompt}", "--response-template", "{reply}"], "finetune.jsonl:1: no key 'reply'"),
    (["--tasks", "choice", "--prompt-template", "{prompt}"], "--prompt-template is of nll and inspect alone"),
    (["--tasks", "nll", "--chat"], "--chat is of choice alone"), (["--tasks", "choice", "--lines", "2"], "--lines is of inspect alone"),
    (["--tasks", "process"], "finetune.jsonl:1: 'genes' is missing; expected a list of texts"),
    (["--tasks", "process", "--data", "sets.jsonl", "--template", "{gene}"], "cannot be filled from sets.jsonl:1 (KeyError('gene'))"),
    (["--tasks", "process", "--data", "sets.jsonl", "--template", "{process[x]}"], "cannot be filled from sets.jsonl:1 (TypeError"),
    (["--tasks", "process", "--data", "sets.jsonl", "--encoder", "self", "self"], "--encoder names one twice"),
    (["--tasks", "process", "profile", "--data", "sets.jsonl", "genes.jsonl", "--labels", "genes.jsonl", "--template", "x"], "--template is what one task asks"),
    (["--tasks", "profile", "--data", "genes.jsonl", "--labels", "sets.jsonl"], "sets.jsonl:1: 'gene' is missing"),
    (["--tasks", "profile", "--data", "genes.jsonl", "--labels", "genes.jsonl", "genes.jsonl"], "--labels names one twice"),
    (["--tasks", "profile", "--data", "twice.jsonl", "--labels", "genes.jsonl"], "twice.jsonl:2: A is on line 1 too"),
    (["--tasks", "profile", "--data", "genes.jsonl", "--labels", "genes.jsonl", "--embeddings", "genes.jsonl"], "genes.jsonl:2: 'embedding' is [1]"),
    (["--tasks", "nll", "--", "model*", "model"], "named twice"), (["--tasks", "nll", "--", "run*"], "no directory fits the pattern 'run*'"), ([], "nothing to do"), (["--prompt", "a b " * 2000], "positions of the model"),
    (["--prompt", "a", "--temperature", "-1"], "--temperature is -1"), (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
    (["--prompt", "a", "--chat-format", "llama3"], "chat format llama3 needs the special token <|begin_of_text|>")])
def test_mistakes_are_one_sentence(argv, words, mistakes, monkeypatch, capsys):
    monkeypatch.chdir(mistakes)
    before = sorted(mistakes.iterdir())
    default = ["--data", ASSETS / "finetune.jsonl"] if "--tasks" in argv else []
    models = ["--", "model"]
    if "--" in argv:
        models = [] if "run*" in argv else ["model"]
    code = call(monkeypatch, *default, *argv, *models)
    error = capsys.readouterr().err
    assert code == 2 and words in error and error.count("\n") == 1
    assert sorted(mistakes.iterdir()) == before


@pytest.mark.parametrize("task, file, words", [
    (["process"], "sets.jsonl", "the prompt of sets.jsonl:2"), (["answer"], "items.jsonl", "the question of items.jsonl:2"),
    (["choice", "--chat"], "items.jsonl", "items.jsonl:2")])
def test_what_a_template_refuses_is_named(task, file, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    directory = chat_directory(Path("strict"), "SmolLM2")
    hf.save_model(small(hf.load_tokenizer(directory), 0), directory)
    refusal = "{% for m in messages %}{{ raise_exception('no such words') if 'BAD' in m['content'] }}{% endfor %}"
    (directory / "chat_template.jinja").write_text(refusal + CHATML_TURNS)
    write(Path("sets.jsonl"), [{"genes": ["A", "B"], "process": "p"}, {"genes": ["A", "BAD"], "process": "q"}])
    write(Path("items.jsonl"), [ITEM, {**ITEM, "question": "BAD"}])
    assert call(monkeypatch, "strict", "--data", file, "--out", "none.json", "--tasks", *task) == 2
    error = capsys.readouterr().err
    assert f"error: {words}: " in error and "no such words" in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("argv, words", [
    (["process", "--data", "sets.jsonl", "--max-new-tokens", "3000"], "the prompt of sets.jsonl:1 has"),
    (["process", "--data", "sets.jsonl", "--encoder", "sets.jsonl"], "--encoder sets.jsonl: "),
    (["process", "--data", "one.jsonl"], "one.jsonl: one name is compared with no other"),
    (["profile", "--data", "genes.jsonl", "--limit", "12", "--labels", "few.jsonl"], "few: of the 12 genes in --data 3 have label 1 there and 9 label 0")])
def test_mistakes_are_found_before_any_model_is_read(work, argv, words, monkeypatch, capsys):
    monkeypatch.chdir(work)
    write(work / "one.jsonl", SETS[:1])
    monkeypatch.setattr(hf, "fill_weights", None)
    assert call(monkeypatch, "base", "--out", "none.json", "--tasks", *argv) == 2
    assert words in capsys.readouterr().err and not (work / "none.json").exists()


@pytest.mark.parametrize("task, library, argv", [("process", "rouge_score", []), ("profile", "sklearn", ["--labels", "odd.jsonl"]),
                                                 ("process", "sentence_transformers", ["--encoder", "x"])])
def test_a_missing_library_is_named_with_its_command(work, task, library, argv, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(f"{library}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, library, None)
    if library == "sentence_transformers":
        monkeypatch.setattr("tasks.process.load_rouge", lambda: None)
    monkeypatch.chdir(work)
    code = call(monkeypatch, "base", "--tasks", task, "--data", {"process": "sets", "profile": "genes"}[task] + ".jsonl", *argv, "--out", "none.json")
    error = capsys.readouterr().err
    assert code == 2 and library.replace("_", "-").replace("sklearn", "scikit-learn") in error and error.endswith('pip install -e ".[eval]"\n')
    assert error.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# What is left where it fails

@pytest.mark.parametrize("ruin", ["weights", "what is computed with them"])
def test_a_ruined_model_has_no_scores(ruin, tmp_path, monkeypatch, capsys, tokenizer):
    model = small(tokenizer, 0)
    if ruin != "weights":
        # Finite, and too large: a sum of what is infinite on both sides.
        model.norm.weight.data.fill_(3e38)
        model.head.data.mul_(100)
    save_with_tokenizer(model, tmp_path / "model")
    if ruin == "weights":
        tensors = load_safetensors(tmp_path / "model" / "model.safetensors")
        tensors["model.norm.weight"][0] = math.nan
        save_safetensors(tensors, tmp_path / "model" / "model.safetensors")
    for temperature in "01":
        assert call(monkeypatch, tmp_path / "model", "--prompt", "Why?", "--temperature", temperature) == 2
        assert "no numbers (NaN)" in capsys.readouterr().err
    for task, file in (("nll", "finetune.jsonl"), ("choice", "choice.jsonl"), ("inspect", "finetune.jsonl")):
        assert call(monkeypatch, tmp_path / "model", "--tasks", task, "--data", ASSETS / file, "--limit", "9", "--out", tmp_path / "r.json") == 2
        assert "no numbers (NaN)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_scored_is_kept_when_a_later_model_fails(work, monkeypatch, capsys):
    """Beside --out, which keeps what it had; and it goes when a later run is whole."""
    argv = ["base", "bft-s0", "bft-s1", "--tasks", "choice", "nll", "--data", "choice.jsonl", "samples.jsonl", "--limit", "4"]
    whole = evaluate(monkeypatch, work, *argv)
    before = (work / "r.json").read_bytes()
    capsys.readouterr()
    real = hf.fill_weights

    def failing(model, directory, device):
        if directory.name == "bft-s1":
            raise UserError("this model is damaged")
        real(model, directory, device)

    monkeypatch.setattr(hf, "fill_weights", failing)
    assert call(monkeypatch, *argv, "--out", "r.json") == 2
    error = capsys.readouterr().err
    assert error == "what was scored before this is in r.unfinished.json\nerror: this model is damaged\n"
    assert (work / "r.json").read_bytes() == before
    saved = json.loads((work / "r.unfinished.json").read_text())
    assert saved["unfinished"] is True and list(saved["models"]) == ["base", "bft-s0", "bft-s1"]
    for one, two in zip(saved["tasks"], whole, strict=True):
        assert (one["task"], one["data"], one["rows"]) == (two["task"], two["data"], [])
        assert one["items"] == {path: two["items"][path] for path in ("base", "bft-s0")}
    # One that fails before anything is scored says nothing, and leaves what another left.
    monkeypatch.setattr(hf, "fill_weights", lambda model, directory, device: failing(model, directory.with_name("bft-s1"), device))
    assert call(monkeypatch, *argv, "--out", "r.json") == 2
    assert capsys.readouterr().err == "error: this model is damaged\n"
    assert json.loads((work / "r.unfinished.json").read_text()) == saved
    monkeypatch.setattr(hf, "fill_weights", real)
    assert evaluate(monkeypatch, work, *argv) == whole
    assert not (work / "r.unfinished.json").exists()


def test_scores_are_on_the_disk_before_the_next_model_is_loaded(work, monkeypatch):
    """And still there while the table is made."""
    real, seen = hf.fill_weights, []

    def looking(model, directory, device):
        path = work / "r.unfinished.json"
        seen.append([list(task["items"]) for task in json.loads(path.read_text())["tasks"]] if path.exists() else None)
        real(model, directory, device)

    monkeypatch.setattr(hf, "fill_weights", looking)
    monkeypatch.setattr(evaluation, "print_tables", lambda _: seen.append((work / "r.json").exists()))
    for name in ("r.json", "r.unfinished.json"):
        (work / name).unlink(missing_ok=True)
    evaluate(monkeypatch, work, "base", "bft-s0", "bft-s1", "--tasks", "choice", "--data", "choice.jsonl")
    assert seen == [None, [["base"]], [["base", "bft-s0"]], True]
