"""The inspect task: the page shows what each loss looks at."""

import html
import json
import math
import re
import sys

import pytest
import torch
from evaluation_files import small, write
from support import ASSETS, save_with_tokenizer

import bft
import eval as evaluation
import hf
from data import load_samples
from runtime.process import run


ROUNDING = {"rel": 1e-3, "abs": 1e-6}
HOSTILE = "</script><script>alert(1)</script> <b>\"x\" & 'y' @DATA@ @BLOCKS@ ünï\n😀"


@pytest.fixture(scope="module")
def tokenizer():
    return hf.load_tokenizer(ASSETS)


def test_the_page_shows_what_each_loss_looks_at(tmp_path, monkeypatch, capsys, tokenizer):
    """Numbers against bft's own functions and loops; every text escaped; nothing from elsewhere."""
    save_with_tokenizer(small(tokenizer, 0), tmp_path / "a&b")
    save_with_tokenizer(small(tokenizer, 1), tmp_path / "other")
    write(tmp_path / "data.jsonl", [{"prompt": "not shown", "response": "x"}, {"prompt": HOSTILE, "response": HOSTILE + " and a tail of words"}])
    monkeypatch.chdir(tmp_path)
    argv = ["eval.py", "a&b", "other", "--tasks", "inspect", "--data", "data.jsonl", "--group-size", "6", "--out", "r.json"]
    monkeypatch.setattr(sys, "argv", [*argv, "--lines", "2"])
    with pytest.raises(SystemExit) as exit:
        run(evaluation.main)
    assert exit.value.code == 0 and "page: r.html" in capsys.readouterr().out
    page, items = (tmp_path / "r.html").read_text(), json.loads((tmp_path / "r.json").read_text())["tasks"][0]["items"]
    (item,), (sample,) = items["a&b"], [s for s in load_samples("data.jsonl", tokenizer)[0] if s.line == 2]
    with torch.no_grad():
        logp = small(tokenizer, 0)(torch.from_numpy(sample.ids)[None])[0].log_softmax(-1)
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
        assert [w * weights["s"] for w in weights["w"]] == pytest.approx(expected, **ROUNDING)
        assert [w * data[0]["s"][objective] for w in data[0]["w"][objective]] == pytest.approx(expected, **ROUNDING)
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


def test_every_file_has_a_page_and_no_page_is_written_over(tmp_path, monkeypatch, capsys, tokenizer):
    save_with_tokenizer(small(tokenizer, 0), tmp_path / "a")
    for name in ("one", "two", "three"):
        write(tmp_path / f"{name}.jsonl", [{"prompt": "q", "response": f"words of {name}"}])
    monkeypatch.chdir(tmp_path)
    argv = ["eval.py", "a", "--tasks", "inspect", "nll", "inspect", "inspect", "--data", "one.jsonl", "one.jsonl", "two.jsonl", "three.jsonl", "--out"]
    monkeypatch.setattr(sys, "argv", [*argv, "r.json"])
    with pytest.raises(SystemExit) as exit:
        run(evaluation.main)
    assert exit.value.code == 0 and re.findall("page: (.*)", capsys.readouterr().out) == ["r.html", "r-2.html", "r-3.html"]
    for page, name in (("r.html", "one"), ("r-2.html", "two"), ("r-3.html", "three")):
        text = html.unescape(re.sub("</?b[^>]*>", "", (tmp_path / page).read_text()))
        assert [f"words of {other}" in text for other in ("one", "two", "three")] == [other == name for other in ("one", "two", "three")]
    assert len(json.loads((tmp_path / "r.json").read_text())["tasks"]) == 4
    before = sorted(tmp_path.iterdir())
    for out, words in (("page.html", "the page goes beside it"), ("r.HTML", "the page goes beside it"), ("./two.jsonl", "is a file of --data")):
        monkeypatch.setattr(sys, "argv", [*argv, out])
        with pytest.raises(SystemExit) as exit:
            run(evaluation.main)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and error.startswith(f"error: --out {out}") and words in error and sorted(tmp_path.iterdir()) == before
    assert "words of two" in (tmp_path / "two.jsonl").read_text()
