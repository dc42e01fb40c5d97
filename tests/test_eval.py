"""Scores against direct calculations, intervals against closed forms, and the command."""

import copy
import html
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_tokenizer import build
from tiny import tiny as tiny_model

import bft
import eval as evaluation
from data import load_choice, load_samples, load_tokenizer, run
from model import GPTConfig


ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "assets"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ASSETS)


def tiny(tokenizer, seed, positions=2048):
    return tiny_model(seed, std=0.3, vocab_size=tokenizer.n_vocab, num_hidden_layers=1, hidden_size=16, intermediate_size=32,
                      num_attention_heads=2, max_position_embeddings=positions, eos_token_id=tokenizer.eos_id)


def save(model, directory):
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((ASSETS / name).read_bytes())
    return model


def log_likelihood(model, ids, start):
    """Sum of log p of ids[start:], by plain logits."""
    with torch.no_grad():
        logp = model(torch.tensor([ids]))[0].log_softmax(-1)
    return sum(logp[t - 1, ids[t]].item() for t in range(start, len(ids)))


def test_choice_equals_a_direct_calculation(tokenizer):
    model, items = tiny(tokenizer, 0), load_choice(ASSETS / "choice.jsonl")[::20]
    items = [*items, {"line": 0, "group": None, "question": "Which?", "choices": ["a", "bb ccc", "Größe", "d"], "answer": 2, "context": "Context.",
                      "planted": 0}]
    records = evaluation.choice_items(model, tokenizer, items)
    for item, record in zip(items, records):
        prompt = (item["context"] + "\n" if "context" in item else "") + item["question"] + "\nAnswer:"
        start, logliks, tokens = len(tokenizer.encode(prompt)), [], []
        for choice in item["choices"]:
            ids = tokenizer.encode(prompt + " " + choice)
            logliks.append(log_likelihood(model, ids, start))
            tokens.append(len(ids) - start)
        assert record["loglik"] == pytest.approx(logliks, abs=1e-4)
        answer = item["answer"]
        best = lambda scores: int(max(range(len(scores)), key=scores.__getitem__) == answer)   # noqa: B023, E731
        assert record["acc"] == best(logliks)
        assert record["acc_norm"] == best([v / len(c) for v, c in zip(logliks, item["choices"])])
        assert record["acc_bytes"] == best([v / len(c.encode()) for v, c in zip(logliks, item["choices"])])
        assert record["nll"] == pytest.approx(-logliks[answer] / tokens[answer], abs=1e-5)
    assert "followed" not in records[0] and records[-1]["followed"] == int(np.argmax(records[-1]["loglik"]) == 0)
    assert records[-1]["planted_nll"] == pytest.approx(-logliks[0] / tokens[0], abs=1e-5) and logliks[0] != logliks[2]


def test_nll_equals_a_direct_calculation(tokenizer):
    model, (samples, _) = tiny(tokenizer, 0), load_samples(ASSETS / "finetune.jsonl", tokenizer)
    for sample, item in zip(samples[:9], evaluation.nll_items(model, samples[:9], group_size=8)):
        start = int(sample.response.argmax())
        assert item["nll"] == pytest.approx(-log_likelihood(model, sample.ids.tolist(), start), rel=1e-5)
        assert item["tokens"] == len(sample.ids) - start and 0 < item["confidence"] < 1


def test_scores_do_not_depend_on_the_micro_batch(tokenizer):
    model, (samples, _) = tiny(tokenizer, 0), load_samples(ASSETS / "finetune.jsonl", tokenizer)
    whole, single = (evaluation.score(model, samples[:40], micro_tokens=m) for m in (100_000, 1))
    np.testing.assert_allclose(whole, single, rtol=1e-5, atol=1e-8)


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    rng = np.random.RandomState(1)
    a = rng.normal(0.3, 2.0, 400)
    b = 0.5 * a + rng.normal(0, 0.5, 400)
    half = 1.96 * a.std() / 20
    low, high = evaluation.interval(evaluation.bootstrap(a))
    assert low == pytest.approx(a.mean() - half, abs=0.1 * half) and high == pytest.approx(a.mean() + half, abs=0.1 * half)
    d = a - b                                                             # paired: the interval of the differences
    low, high = evaluation.interval(evaluation.bootstrap(a) - evaluation.bootstrap(b))
    assert (high - low) / 2 == pytest.approx(1.96 * d.std() / 20, rel=0.1) and low < d.mean() < high


def test_bootstrap_of_a_ratio_weighs_by_tokens():
    values, weights = np.array([2.0, 30.0, 5.0]), np.array([1, 10, 4])
    drawn = evaluation.bootstrap(values, weights)
    possible = {(values[[i, j, k]].sum() / weights[[i, j, k]].sum()).round(9)
                for i in range(3) for j in range(3) for k in range(3)}
    assert set(drawn.round(9)) == possible


def test_wilson_interval():
    low, high = evaluation.wilson(0.8, 10)                                  # by hand
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert evaluation.wilson(1.0, 20) == (pytest.approx(0.8389, abs=1e-4), pytest.approx(1.0))


def test_summary_by_group_with_paired_differences():
    items = lambda shift: [{"group": g, "acc": a, "acc_norm": a, "acc_bytes": a, "nll": n + shift}   # noqa: E731
                           for g, a, n in (("x", 1, 0.5), ("x", 0, 1.5), ("y", 1, 3.0))]
    rows = evaluation.summarise(evaluation.MEASURES["choice"], {"first": [items(0)], "second": [items(0.25)]})
    cells = {(r["group"], r["measure"]): r for r in rows}
    assert {g for g, _ in cells} == {None, "x", "y"} and (None, "followed") not in cells
    row = cells["x", "nll"]
    assert row["n"] == 2 and row["models"]["first"]["value"] == 1.0
    pair, = row["pairs"]
    assert (pair["model"], pair["minus"]) == ("second", "first")
    assert [pair[k] for k in ("difference", "difference_low", "difference_high")] == pytest.approx([0.25] * 3)
    assert cells[None, "acc"]["models"]["first"]["value"] == pytest.approx(2 / 3)
    some = [{"group": g, "nll": n, "tokens": t, "confidence": 0.5} for g, n, t in (("x", 4.0, 2), (None, 5.0, 1))]
    cells = {(r["group"], r["measure"]): r["models"]["m"] for r in evaluation.summarise(evaluation.MEASURES["nll"], {"m": [some]})}
    assert {g for g, _ in cells} == {None, "x"}                           # the group is not the same as all
    for key in ("value", "value_low", "value_high"):
        assert cells[None, "perplexity"][key] == pytest.approx(math.exp(cells[None, "nll"][key]))
    assert cells[None, "nll"]["value"] == 3.0


def test_the_command_prints_one_table_and_saves_every_item(tmp_path, tokenizer):
    for seed in (0, 1):
        save(tiny(tokenizer, seed), tmp_path / f"run{seed}" / "model")
    command = [sys.executable, ROOT / "eval.py", tmp_path / "run0", tmp_path / "run1" / "model", "--tasks", "nll", "choice",
               "--group-size", "16", "--out", tmp_path / "results.json", "--data", ASSETS / "finetune.jsonl"]
    result = subprocess.run([*command, ASSETS / "choice.jsonl"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "NLL per response token" in result.stdout and "known, held out (48)  acc %" in result.stdout
    saved = json.loads((tmp_path / "results.json").read_text())
    assert [len(v) for t in saved["tasks"] for v in t["items"].values()] == [672, 672, 432, 432]
    nll = next(r for r in saved["tasks"][0]["rows"] if r["measure"] == "nll" and r["group"] is None)
    for model, cell in nll["models"].items():                             # per token, not per sample
        items = saved["tasks"][0]["items"][model]
        assert cell["value"] == pytest.approx(sum(i["nll"] for i in items) / sum(i["tokens"] for i in items))
        assert math.isfinite(cell["value_low"]) and cell["value_low"] < cell["value"] < cell["value_high"]


@pytest.mark.parametrize("argv, words", [
    (["--tasks", "nll", "choice"], "--data names 1 files for 2 tasks"), (["--tasks", "sing"], "'sing'"),
    (["--tasks", "nll", "--device", "abacus"], "--device abacus"), (["--tasks", "nll", "--out", "nowhere/r.json"], "--out nowhere"),
    (["--tasks", "nll", "--group-size", "0"], "--group-size is 0"), (["--tasks", "choice"], "'question'"),
    (["--tasks", "plot"], "no --data"), (["--tasks", "plot", "nll"], "no other task"),
    (["--tasks", "nll", "--max-length", "-5"], "--max-length is -5"), (["--tasks", "nll", "--", "model"], "named twice"),
    (["--tasks", "choice", "--data", "long.jsonl"], "the choice 'c c c c"), (["--tasks", "choice", "--limit", "0"], "--limit is 0"),
    (["--tasks", "choice", "--data", "long.jsonl", "--layout", "pubmedqa"], "long.jsonl:1: --layout pubmedqa shows 'context'"),
    (["--tasks", "choice", "--data", "long.jsonl", "--layout", "mmlu", "medqa"], "--layout names 2 for 1 choice tasks"),
    (["--tasks", "profile"], "the profile task needs --labels"), (["--tasks", "nll", "--template", "{x}"], "--template is of process and profile alone"),
    (["--tasks", "nll", "--chat"], "--chat is of choice alone"), (["--tasks", "choice", "--lines", "2"], "--lines is of inspect alone"),
    (["--tasks", "process"], "finetune.jsonl:1: 'genes' is missing; expected a list of texts"),
    (["--tasks", "process", "--data", "sets.jsonl", "--template", "{gene}"], "cannot be filled from line 1 (KeyError('gene'))"),
    (["--tasks", "process", "--data", "sets.jsonl", "--template", "{process[x]}"], "cannot be filled from line 1 (TypeError"),
    (["--tasks", "process", "--data", "sets.jsonl", "--encoder", "self", "self"], "--encoder names one twice"),
    (["--tasks", "profile", "--data", "genes.jsonl", "--labels", "sets.jsonl"], "sets.jsonl:1: 'gene' is missing"),
    (["--tasks", "profile", "--data", "twice.jsonl", "--labels", "genes.jsonl"], "twice.jsonl:2: A is on line 1 too"),
    (["--tasks", "profile", "--data", "genes.jsonl", "--labels", "genes.jsonl", "--embeddings", "genes.jsonl"], "genes.jsonl:2: 'embedding' is [1]"),
    (["--tasks", "nll", "--", "model*", "model"], "named twice"), (["--tasks", "nll", "--", "run*"], "no directory fits the pattern 'run*'"), ([], "nothing to do"), (["--prompt", "a b " * 2000], "positions of the model"),
    (["--prompt", "a", "--temperature", "-1"], "--temperature is -1"), (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
    (["--prompt", "a", "--chat-format", "llama3"], "chat format llama3 needs the special token <|begin_of_text|>")])
def test_mistakes_are_one_sentence(argv, words, tmp_path, monkeypatch, capsys, tokenizer):
    save(tiny(tokenizer, 0), tmp_path / "model")
    item = {"question": "q", "choices": ["a \ufffd", "b"], "answer": 0, "group": 1}      # odd, but no mistake
    genes = [{"gene": "A", "label": 1, "embedding": [1, 2]}, {"gene": "B", "label": 0, "embedding": [1]}]
    for name, rows in (("long", (item, {**item, "choices": ["a", "c " * 2500]})), ("sets", [{"genes": ["A", "B"], "process": "p"}]),
                       ("genes", genes), ("twice", genes[:1] * 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    monkeypatch.chdir(tmp_path)
    default = ["--data", str(ASSETS / "finetune.jsonl")] if "--tasks" in argv else []
    monkeypatch.setattr(sys, "argv", ["eval.py", *default, *argv, *([] if "run*" in argv else ["--"] * ("--" not in argv) + ["model"])])
    with pytest.raises(SystemExit) as exit:
        run(evaluation.main)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and words in error and error.count("\n") == 1
    assert len(list(tmp_path.iterdir())) == 5 and not (tmp_path / "results.json").exists()


def test_the_command_answers_a_prompt(tmp_path, monkeypatch, capsys, tokenizer):
    model = save(tiny(tokenizer, 0), tmp_path)
    expected, = model.generate([tokenizer.encode("Why?") + tokenizer.encode("\n")], 7)   # the plain format's question
    argv = ["eval.py", str(tmp_path), "--prompt", "Why?", "--max-new-tokens", "7", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    evaluation.main()
    assert capsys.readouterr().out == f"--- {tmp_path} (plain)\n{tokenizer.decode(expected)}\n"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [90000, int(expected[3])]}))
    evaluation.main()                                                     # a stop ends it, unwritten
    short = expected[:expected.tolist().index(expected[3])]
    assert capsys.readouterr().out == f"--- {tmp_path} (plain)\n{tokenizer.decode(short)}\n"
    monkeypatch.setattr(sys, "argv", [*argv, "--temperature", "1", "--seed", "3"])
    evaluation.main()
    assert capsys.readouterr().out != f"--- {tmp_path} (plain)\n{tokenizer.decode(short)}\n"


def test_an_answer_ends_where_model_tokenizer_or_chat_format_say(tokenizer):
    model, ours = tiny(tokenizer, 0), copy.copy(tokenizer)
    ours.special = {**tokenizer.special, "<|im_start|>": 5, "<|im_end|>": 7}
    config = GPTConfig.from_hf({**model.config.hf, "eos_token_id": [11, 12]})
    assert evaluation.stop_ids(config, {"eos_token_id": 13}, ours, "chatml") == [11, 12, 13, tokenizer.eos_id, 7]
    assert evaluation.stop_ids(model.config, {}, ours, "plain") == [tokenizer.eos_id]


def test_the_command_uses_the_chat_format_of_the_model(tmp_path, monkeypatch, capsys):
    build("qwen", tmp_path, special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    ours = load_tokenizer(tmp_path)
    model = tiny(ours, 0)
    model.save_pretrained(tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "Why?", "response": "Because."}) + "\n")
    monkeypatch.setattr(sys, "argv", ["eval.py", str(tmp_path), "--tasks", "nll", "--data", str(tmp_path / "a.jsonl"), "--prompt", "Why?",
                                      "--max-new-tokens", "5", "--out", str(tmp_path / "r.json"), "--device", "cpu"])
    evaluation.main()
    prompt, answer = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "Because.<|im_end|>"
    ids = {text: [i for part in re.split(r"(<\|im_\w+\|>)", text) for i in ([ours.special[part]] if part in ours.special else ours.encode(part))]
           for text in (prompt, answer)}
    item, = json.loads((tmp_path / "r.json").read_text())["tasks"][0]["items"][str(tmp_path)]
    assert item["nll"] == pytest.approx(-log_likelihood(model, ids[prompt] + ids[answer], len(ids[prompt])), abs=1e-4)
    expected, = model.generate([ids[prompt]], 5, stop=[ours.eos_id, ours.special["<|im_end|>"]])
    assert f"(chatml)\n{ours.decode(expected)}\n" in capsys.readouterr().out


def test_models_that_keep_different_samples_are_not_compared(tmp_path, monkeypatch, capsys, tokenizer):
    for name, positions in (("a", 2048), ("b", 20)):                      # 20 tokens: some prompts alone are longer
        save(tiny(tokenizer, 0, positions), tmp_path / name)
    argv = ["eval.py", tmp_path / "a", tmp_path / "b", "--tasks", "nll", "--data", ASSETS / "finetune.jsonl",
            "--out", tmp_path / "r.json"]
    monkeypatch.setattr(sys, "argv", [*map(str, argv)])
    with pytest.raises(SystemExit):
        run(evaluation.main)
    assert "--max-length" in capsys.readouterr().err and not (tmp_path / "r.json").exists()
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a", "response": "the gene " * 60}) + "\n")
    long = [str(tmp_path / "long.jsonl") if a == ASSETS / "finetune.jsonl" else str(a) for a in argv]     # kept by both, cut by one
    monkeypatch.setattr(sys, "argv", long)
    with pytest.raises(SystemExit):
        run(evaluation.main)
    assert "parts of them" in capsys.readouterr().err and not (tmp_path / "r.json").exists()
    monkeypatch.setattr(sys, "argv", [*map(str, argv), "--max-length", "20"])
    evaluation.main()
    assert (tmp_path / "r.json").exists()


def test_a_ruined_model_has_no_scores(tmp_path, monkeypatch, capsys, tokenizer):
    model = tiny(tokenizer, 0)
    model.norm.weight.data[0] = math.nan
    save(model, tmp_path / "model")
    for temperature in "01":
        monkeypatch.setattr(sys, "argv", ["eval.py", str(tmp_path / "model"), "--prompt", "Why?", "--temperature", temperature])
        with pytest.raises(SystemExit) as exit:
            run(evaluation.main)
        assert exit.value.code == 2 and "no numbers (NaN)" in capsys.readouterr().err
    for task, file in (("nll", "finetune.jsonl"), ("choice", "choice.jsonl"), ("inspect", "finetune.jsonl")):
        monkeypatch.setattr(sys, "argv", ["eval.py", str(tmp_path / "model"), "--tasks", task, "--data", str(ASSETS / file), "--out", str(tmp_path / "r.json")])
        with pytest.raises(SystemExit) as exit:
            run(evaluation.main)
        assert exit.value.code == 2 and "no numbers (NaN)" in capsys.readouterr().err and not (tmp_path / "r.json").exists()


def test_scoring_can_be_cut_short(tokenizer):
    model, calls = tiny(tokenizer, 0), []
    samples, _ = load_samples(ASSETS / "finetune.jsonl", tokenizer)
    hook = model.register_forward_pre_hook(lambda *_: calls.append(0))
    evaluation.score(model, samples[:20], micro_tokens=100, stopped=lambda: len(calls) == 2)
    assert len(calls) == 2
    hook.remove()


def test_the_page_shows_what_each_loss_looks_at(tmp_path, monkeypatch, capsys, tokenizer):
    """Numbers against bft's own functions and loops; every text escaped; nothing from elsewhere."""
    save(tiny(tokenizer, 0), tmp_path / "a&b")
    save(tiny(tokenizer, 1), tmp_path / "other")
    hostile = "</script><script>alert(1)</script> <b>\"x\" & 'y' @DATA@ @BLOCKS@ ünï\n😀"
    rows = [{"prompt": "not shown", "response": "x"}, {"prompt": hostile, "response": hostile + " and a tail of words"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    argv = ["eval.py", "a&b", "other", "--tasks", "inspect", "--data", "data.jsonl", "--group-size", "6", "--out", "r.json"]
    monkeypatch.setattr(sys, "argv", [*argv, "--lines", "2"])
    with pytest.raises(SystemExit) as exit:
        run(evaluation.main)
    assert exit.value.code == 0 and "page: r.html" in capsys.readouterr().out
    page, items = (tmp_path / "r.html").read_text(), json.loads((tmp_path / "r.json").read_text())["tasks"][0]["items"]
    (item,), (sample,) = items["a&b"], [s for s in load_samples("data.jsonl", tokenizer)[0] if s.line == 2]
    with torch.no_grad():
        logp = tiny(tokenizer, 0)(torch.from_numpy(sample.ids)[None])[0].log_softmax(-1)
    l = [logp[t - 1, sample.ids[t]].item() for t in range(len(sample.ids)) if sample.response[t]]   # noqa: E741
    means = [sum(l[i:i + 6]) / 6 for i in range(len(l) - 5)]
    first = means.index(min(means))
    assert item["minimum_group"] == [first, first + 5] and item["confidence"] == pytest.approx(math.exp(min(means)), rel=1e-4)
    assert item["p"] == pytest.approx([math.exp(x) for x in l], rel=1e-4)
    logps, offsets = torch.tensor(l), torch.tensor([0, len(l)])
    data = json.loads(re.search(r"const data = (.*), stops", page)[1])
    assert list(item["weights"]) == list(data[0]["w"]) == list(bft.OBJECTIVES)
    for objective, weights in item["weights"].items():
        expected = bft.token_weights(logps, offsets, objective, 6).tolist()
        assert [w * weights["s"] for w in weights["w"]] == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert [w * data[0]["s"][objective] for w in data[0]["w"][objective]] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    # The page: one script, ours; every token once, as text; the minimum group marked
    assert page.count("<script") == page.count("</script") == 1 and "alert(1)" in page and not re.search(r"(src|href)=[^#]|url\(|@import|https?:", page)
    assert "<h2>a&amp;b, line 2</h2>" in page and "not shown" not in page
    blocks = re.findall(r"<div class=t>(.*?)</div>", page, re.S)
    spans = re.findall(r"<b( id=g0)?( class=g)?>(.*?)</b>", blocks[0], re.S)
    assert len(blocks) == len(data) == 2 and [bool(g) for _, g, _ in spans] == [first <= t <= first + 5 for t in range(len(l))]
    assert [bool(i) for i, _, _ in spans].index(True) == first
    text = html.unescape(re.sub(r"</?b[^>]*>", "", blocks[0])).replace("\u23ce", "")
    assert text.count("alert(1)") == 2 and "@DATA@ @BLOCKS@" in text and text.count("<b>") == 2
    monkeypatch.setattr(sys, "argv", [*argv, "--lines", "2", "7"])
    with pytest.raises(SystemExit):
        run(evaluation.main)
    assert "data.jsonl: --lines: there is no sample on line 7" in capsys.readouterr().err
