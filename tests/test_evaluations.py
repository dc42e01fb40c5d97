"""The process and profile tasks, seeds, pairs of models and ranks, against other libraries and loops."""

import json
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from test_lm_eval import save_model
from test_train import torchrun

import eval as evaluation
from data import load_choice, load_tokenizer, run
from model import GPT


ROOT = Path(__file__).resolve().parents[1]
SETS = [{"genes": ["TP53", "MDM2"], "process": "DNA damage response (p53/p21)"}, {"genes": ["INS"], "process": "Insulin-like signaling."},
        {"genes": ["A1", "B2", "C3"], "process": "signaling by insulin", "group": "odd"}, {"genes": ["X"], "process": "Cell cycle, G1"}]
GENES = [f"GENE{i}" for i in range(40)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two models, the second with three seeds; files for every task; a small sentence-transformers directory."""
    path = tmp_path_factory.mktemp("work")
    for name, seed in (("base", 3), ("bft-s0", 4), ("bft-s1", 5), ("bft-s2", 6)):
        (path / name).mkdir()
        save_model("smollm2", path / name, seed=seed)
    rng = np.random.RandomState(0)
    write(path / "sets.jsonl", SETS)
    write(path / "genes.jsonl", [{"gene": gene, "hint": f"hint {i % 7}"} for i, gene in enumerate(GENES)])
    write(path / "odd.jsonl", [{"gene": gene, "label": i % 2} for i, gene in enumerate(GENES[:37])])
    write(path / "few.jsonl", [{"gene": gene, "label": i % 5 == 0} for i, gene in enumerate([*GENES, "UNKNOWN"])])
    write(path / "vectors.jsonl", [{"gene": gene, "embedding": [i % 2 + rng.normal(), rng.normal(), 1]} for i, gene in enumerate(GENES[:-1])])
    write(path / "choice.jsonl", [{"question": f"Is it {i}?", "choices": ["yes", f"no, {i + 1}", "maybe so"], "answer": i % 3, "context": f"Text {i}. " * i,
                                   "subject": "some_thing", "group": "ab"[i % 2]} for i in range(23)])
    write(path / "samples.jsonl", [{"prompt": f"What is {i}?", "response": "A number. " * (i % 9 + 1)} for i in range(30)])
    return path


@pytest.fixture(scope="module")
def encoder(work):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    import transformers
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(33, 127)), *(f"##{chr(i)}" for i in range(33, 127))]
    (work / "bert").mkdir()
    (work / "bert" / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab=str(work / "bert" / "vocab.txt")).save_pretrained(work / "bert")
    config = transformers.BertConfig(vocab_size=len(words), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                     max_position_embeddings=512, initializer_range=0.5)
    transformers.BertModel(config).save_pretrained(work / "bert")
    sentence_transformers.SentenceTransformer(str(work / "bert")).save(str(work / "encoder"))
    return str(work / "encoder")


def call(monkeypatch, work, *argv):
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv), "--out", "r.json", "--device", "cpu"])
    evaluation.main()
    return json.loads((work / "r.json").read_text())["tasks"]


@pytest.mark.parametrize("text, name", [
    ("Process: MAPK signaling\nbecause", "MAPK signaling"), ("\n\n  **Process:** \"DNA repair (NER), by-pass\".", "DNA repair by pass"),
    ("process name: x/y", "x y"), ("Processing of RNA: a start", "Processing of RNA: a start"), ("", ""), (" \n", ""), ("(none)", ""),
    ("Process:\nDNA repair\nmore", "DNA repair"), ("Process: <DNA repair>", "DNA repair"), ("The biological process is: x: y", "x: y"),
    ("Answer: cell (a\nb) cycle", "cell cycle"), ("The process of sleep", "The process of sleep")])
def test_what_a_model_named(text, name):
    assert evaluation.process_name(text) == name


def test_process_equals_the_libraries(work, encoder, monkeypatch, capsys):
    """ROUGE by rouge-score, cosines by the encoder itself, percentiles by loops; self by transformers' hidden states."""
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    import sentence_transformers
    import transformers
    names = ["MAPK signaling", "insulin signaling", "cell-cycle arrest"]
    write(work / "names.jsonl", [{"process": name} for name in names])
    texts = ["Process: insulin and damages to DNA\nI think", "signals like insulin", "", "the cell cycle, G1 (a guess)"]
    real = evaluation.write_texts
    monkeypatch.setattr(evaluation, "write_texts", lambda *rest: texts if len(real(*rest)) == len(texts) else None)
    task, = call(monkeypatch, work, "base", "--tasks", "process", "--data", "sets.jsonl", "--candidates", "names.jsonl", "--encoder", "self", encoder)
    truth = ["DNA damage response (p53 p21)", "Insulin like signaling", "signaling by insulin", "Cell cycle G1"]
    named = ["insulin and damages to DNA", "signals like insulin", "", "the cell cycle G1"]
    candidates = sorted([*truth, "MAPK signaling", "insulin signaling", "cell cycle arrest"])
    model = transformers.AutoModelForCausalLM.from_pretrained(work / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(work / "base")

    def hidden(text):
        if not text:
            return np.zeros(model.config.hidden_size)
        with torch.no_grad():
            ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :512]
            return model(ids, output_hidden_states=True).hidden_states[-1][0].double().mean(0).numpy()

    st = sentence_transformers.SentenceTransformer(encoder)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    assert [x["name"] for x in task["items"]["base"]] == named
    assert [x["rouge1"] > 0 for x in task["items"]["base"]] == [True, True, False, True]
    long = "the gene " * 1000                                             # beyond the positions
    ours = evaluation.embed_self(GPT.from_pretrained(work / "base"), load_tokenizer(work / "base"), [*named, long])
    assert ours[2].tolist() == [0] * 32 and ours[[0, 1, 3]] == pytest.approx(np.array([hidden(named[i]) for i in (0, 1, 3)]), abs=1e-4)
    assert ours[4] == pytest.approx(hidden(long), abs=1e-4)
    for x, true, name, text in zip(task["items"]["base"], truth, named, texts):
        assert x["text"] == text
        for kind, value in scorer.score(true, name).items():
            assert x[kind] == pytest.approx(value.fmeasure) and type(x[kind]) is float
        for key, embed in (("self", hidden), (encoder, lambda text: st.encode([text])[0].astype(float))):
            cosine = {c: (embed(name) if name else 0 * embed("x")) @ embed(c) / max(1e-12, np.linalg.norm(embed(name)) * np.linalg.norm(embed(c))) for c in candidates}
            assert x[f"cosine {key}"] == pytest.approx(cosine[true], abs=1e-4)
            less = sum(cosine[c] < cosine[true] for c in candidates) if name else 3          # (equal ones by half)
            assert x[f"percentile {key}"] == pytest.approx(less / 6, abs=1e-6)
    assert [row["measure"] for row in task["rows"] if row["group"] is None] == [
        "rouge1", "rouge2", "rougeL", "cosine self", "percentile self", f"cosine {encoder}", f"percentile {encoder}"]
    out = capsys.readouterr().out
    assert "1 of 4 answers to sets.jsonl are empty" in out and "odd (1)  ROUGE-L %" in out


def test_begin_of_text_is_read_but_not_averaged(tmp_path):
    transformers = pytest.importorskip("transformers")
    save_model("llama3", tmp_path)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("the gene", return_tensors="pt")["input_ids"]
    tokenizer = load_tokenizer(tmp_path)
    assert ids[0, 0] == tokenizer.special["<|begin_of_text|>"]
    with torch.no_grad():
        states = transformers.AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state[0]
    ours = evaluation.embed_self(GPT.from_pretrained(tmp_path), tokenizer, ["the gene", ""])
    assert ours[0] == pytest.approx(states[1:].double().mean(0).numpy(), abs=1e-4) and not ours[1].any()


def test_profile_equals_scikit_learn(work, encoder, monkeypatch, capsys):
    """Every ROC-AUC by a pipeline made here from texts and vectors; labels, folds and genes that files lack as they are."""
    pytest.importorskip("sklearn")
    import sentence_transformers
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold
    from sklearn.preprocessing import StandardScaler
    asked = []
    real = evaluation.write_texts
    monkeypatch.setattr(evaluation, "write_texts", lambda model, tokenizer, prompts, *rest: asked.append(
        [tokenizer.decode(ids) for ids in prompts]) or real(model, tokenizer, prompts, *rest))
    task, = call(monkeypatch, work, "base", "bft-s*", "--tasks", "profile", "--data", "genes.jsonl", "--labels", "odd.jsonl", "few.jsonl", "--embeddings",
                 "vectors.jsonl", "--encoder", "self", encoder, "--template", "{gene} with {hint}?", "--max-new-tokens", "12")
    assert asked[0][1] == "<|im_start|>user\nGENE1 with hint 1?<|im_end|>\n<|im_start|>assistant\n" and len(asked) == 4
    assert "39 of 40 genes of genes.jsonl are in all of vectors.jsonl" in capsys.readouterr().out
    genes, st = GENES[:39], sentence_transformers.SentenceTransformer(encoder)
    vectors = {row["gene"]: row["embedding"] for row in map(json.loads, open(work / "vectors.jsonl"))}
    texts = {path: [x["text"] for x in items] for path, items in task["items"].items()}
    assert [len(t) for t in texts.values()] == [39] * 4 and len(set(map(tuple, texts.values()))) == 4
    tokenizer = load_tokenizer(work / "base")

    def own(path, some):
        return evaluation.embed_self(GPT.from_pretrained(work / path), tokenizer, some)

    paths = {"base": ["base"], "bft-s*": ["bft-s0", "bft-s1", "bft-s2"]}
    rows = {(row["group"], row["heading"]): row for row in task["rows"]}
    assert list(rows) == [(p, h) for p in ("odd", "few") for h in ("gene name, self", "profile, self", f"profile, {encoder}")]
    for name, labels in (("odd", [i % 2 for i in range(37)]), ("few", [int(i % 5 == 0) for i in range(39)])):
        y, n = np.array(labels), len(labels)
        folds = list(StratifiedKFold(5, shuffle=True, random_state=0).split(y, y))
        saved = next(p for p in task["properties"] if p["property"] == name)
        assert saved["genes"] == genes[:n] and saved["labels"] == labels and all(saved["fold"][i] == k for k, (_, test) in enumerate(folds) for i in test)

        def aucs(x, y=y, folds=folds, n=n):
            x, found = np.asarray(x, dtype=float)[:n], []
            for train, test in folds:
                scaler = StandardScaler().fit(x[train])
                model = LogisticRegression(max_iter=2000).fit(scaler.transform(x[train]), y[train])
                found.append(roc_auc_score(y[test], model.decision_function(scaler.transform(x[test]))))
            return found

        for heading, embed in (("profile, self", lambda path: own(path, texts[path])), ("gene name, self", lambda path: own(path, genes)),
                               (f"profile, {encoder}", lambda path: st.encode(texts[path]))):
            row = rows[name, heading]
            assert row["n"] == n and row["positive"] == sum(labels)
            for column, of in paths.items():
                expected = [aucs(embed(path)) for path in of]
                assert row["models"][column]["seeds"] == pytest.approx([np.mean(a) for a in expected], abs=1e-3)
                assert row["models"][column]["sd"] == pytest.approx(np.mean([np.std(a, ddof=1) for a in expected]), abs=1e-2)
        row = rows[name, f"profile, {encoder}"]
        assert list(row["models"]) == ["random vectors", "gene names", "vectors.jsonl", "base", "bft-s*"] and len(row["pairs"]) == 10
        assert row["models"]["gene names"]["value"] == pytest.approx(np.mean(aucs(st.encode(genes))), abs=1e-3)
        noise = [aucs(np.random.RandomState(seed).normal(size=(39, 24))) for seed in range(5)]
        assert row["models"]["random vectors"]["seeds"] == pytest.approx([np.mean(a) for a in noise], abs=1e-3)
        # The interval of a difference: the same genes drawn for both, each fold's area of what was drawn of it
        y, fold, scores = np.array(saved["labels"]), np.array(saved["fold"]), saved["scores"]

        def resampled(s, y=y, fold=fold, n=n):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return np.array([np.nanmean([evaluation.fold_auc(np.array(s)[some], y[some], fold[some])]) for drawn in evaluation.resamples(n) for some in drawn])

        def pair(row, model, minus):
            p, = (p for p in row["pairs"] if (p["model"], p["minus"]) == (model, minus))
            return p["difference_low"], p["difference_high"]

        if name == "few":
            drawn = {c: resampled(scores[f"profile, {encoder}"][c][0]) for c in ("base", "gene names")}
            assert pair(row, "base", "gene names") == pytest.approx(evaluation.interval(drawn["base"] - drawn["gene names"]), abs=1e-9)
            own_names = resampled(scores["gene name, self"]["base"][0])
            described = resampled(scores["profile, self"]["base"][0])
            assert pair(rows[name, "profile, self"], "base", "gene names") == pytest.approx(evaluation.interval(described - own_names), abs=1e-9)
        assert row["models"]["vectors.jsonl"]["value"] == pytest.approx(np.mean(aucs([vectors[gene] for gene in genes])), abs=1e-3)


def test_resampled_auc_equals_one_of_repeated_items():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.RandomState(1)
    scores, labels, fold = rng.randint(0, 6, 60) / 2.0, rng.randint(0, 2, 60), np.arange(60) % 4      # with ties
    areas = evaluation.fold_auc(scores, labels, fold)
    assert areas == pytest.approx([sklearn_metrics.roc_auc_score(labels[fold == k], scores[fold == k]) for k in range(4)])
    drawn = rng.randint(60, size=(30, 60))
    found = evaluation.fold_auc(scores, labels, fold, evaluation.resample_counts(drawn, 60))
    for r, items in enumerate(drawn):
        for k in range(4):
            some = items[fold[items] == k]
            assert found[k, r] == pytest.approx(sklearn_metrics.roc_auc_score(labels[some], scores[some]))


def test_an_interval_of_an_auc_is_the_closed_form():
    """Hanley and McNeil's (1982) standard error, exact for scores that are independent; one fold."""
    rng = np.random.RandomState(2)
    labels = np.array([1] * 150 + [0] * 250)
    scores = rng.exponential(np.where(labels == 1, 2.0, 1.0))             # their model: A = 2/3
    area = evaluation.fold_auc(scores, labels, np.zeros(400))[0]
    q1, q2, p, n = area / (2 - area), 2 * area ** 2 / (1 + area), 150, 250
    error = math.sqrt((area * (1 - area) + (p - 1) * (q1 - area ** 2) + (n - 1) * (q2 - area ** 2)) / (p * n))
    drawn = np.concatenate([evaluation.fold_auc(scores, labels, np.zeros(400), evaluation.resample_counts(d, 400))[0] for d in evaluation.resamples(400)])
    low, high = evaluation.interval(drawn)
    assert low < area < high and (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_intervals_over_seeds_are_students_and_welchs():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.RandomState(3)
    for n, m in ((2, 2), (3, 3), (5, 2), (12, 30)):
        a, b = rng.normal(1.0, 2.0, n), rng.normal(0.0, 0.5, m)
        theirs = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
        mean, low, high = evaluation.seed_interval(a, b)
        assert mean == pytest.approx(a.mean() - b.mean()) and low <= theirs[0] + 1e-3 and high >= theirs[1] - 1e-3
        assert high - low < 1.03 * (theirs[1] - theirs[0])                # (quantiles between whole degrees of freedom are a little large)
        alone = stats.ttest_1samp(a, 0).confidence_interval()
        assert evaluation.seed_interval(a)[1:] == pytest.approx(alone, rel=3e-3)
    assert evaluation.seed_interval([0.1], [0.2, 0.3])[1:] == (-math.inf, math.inf)      # who knows what another seed would do


def test_seeds_are_one_column_and_every_pair_is_compared(work, monkeypatch, capsys):
    task, = call(monkeypatch, work, "base", "bft-s[01]", "bft-s2", "--tasks", "choice", "--data", "choice.jsonl")
    assert set(task["items"]) == {"base", "bft-s0", "bft-s1", "bft-s2"}
    acc = {path: np.array([x["acc"] for x in items]) for path, items in task["items"].items()}
    row = next(r for r in task["rows"] if r["measure"] == "acc" and r["group"] is None)
    ties = acc["bft-s0"].mean() == acc["bft-s1"].mean()
    assert ties and row["models"]["bft-s[01]"]["value_low"] == pytest.approx(evaluation.interval(evaluation.bootstrap(acc["bft-s0"]))[0], abs=0.05)
    assert "seeds_low" not in row["pairs"][0]                             # equal accuracies say nothing of other seeds
    acc = {path: np.array([x["nll"] for x in items]) for path, items in task["items"].items()}
    row = next(r for r in task["rows"] if r["measure"] == "nll" and r["group"] is None)
    assert list(row["models"]) == ["base", "bft-s[01]", "bft-s2"]
    cell, seeds = row["models"]["bft-s[01]"], [acc["bft-s0"].mean(), acc["bft-s1"].mean()]
    assert cell["seeds"] == pytest.approx(seeds)
    assert (cell["value"], cell["value_low"], cell["value_high"]) == pytest.approx(evaluation.seed_interval(seeds))
    assert [(p["model"], p["minus"]) for p in row["pairs"]] == [("bft-s[01]", "base"), ("bft-s2", "base"), ("bft-s2", "bft-s[01]")]
    both = (acc["bft-s0"] + acc["bft-s1"]) / 2
    for pair, d in zip(row["pairs"], (both - acc["base"], acc["bft-s2"] - acc["base"], acc["bft-s2"] - both)):
        assert pair["difference"] == pytest.approx(d.mean())
        assert [pair["difference_low"], pair["difference_high"]] == pytest.approx(evaluation.interval(evaluation.bootstrap(d)))    # paired
    assert ["seeds_low" in p for p in row["pairs"]] == [False] * 3        # not against a single training
    out = capsys.readouterr().out
    assert re.search(rf"NLL of the right answer, per token +{acc['base'].mean():.3f} \[", out)
    percent = next(r for r in task["rows"] if r["measure"] == "acc")["models"]["base"]["value"]
    assert re.search(rf"all \(23\)  acc % +{100 * percent:.1f} \[", out)
    assert "bft-s[01] (2 seeds)" in out and "minus base" in out and "over seeds, minus" not in out and "acc_norm %, acc_bytes %" in out
    (work / "base2").symlink_to("base")                                   # two pairs of seeds
    task, = call(monkeypatch, work, "base*", "bft-s[01]", "--tasks", "choice", "--data", "choice.jsonl")
    pair, = next(r for r in task["rows"] if r["measure"] == "nll" and r["group"] is None)["pairs"]
    assert "seeds_low" not in pair                                        # the two bases agree
    task, = call(monkeypatch, work, "b[af]*[e2]", "bft-s[01]", "--tasks", "choice", "--data", "choice.jsonl")
    (work / "base2").unlink()
    pair, = next(r for r in task["rows"] if r["measure"] == "nll" and r["group"] is None)["pairs"]
    others = [np.mean([x["nll"] for x in task["items"][path]]) for path in ("base", "base2", "bft-s2")]
    assert (pair["difference"], pair["seeds_low"], pair["seeds_high"]) == pytest.approx(evaluation.seed_interval(seeds, others))
    assert "over seeds, minus b[af]*[e2]" in capsys.readouterr().out


def test_layouts_chat_and_limit_reach_the_scores(work, monkeypatch, capsys):
    tasks = call(monkeypatch, work, "base", "--tasks", "choice", "choice", "nll", "--layout", "cloze", "mmlu", "--data", "choice.jsonl", "choice.jsonl",
                 "samples.jsonl", "--limit", "5", "--chat")
    model, tokenizer = GPT.from_pretrained(work / "base"), load_tokenizer(work / "base")
    for task, layout in zip(tasks, ("cloze", "mmlu")):
        expected = evaluation.choice_items(model, tokenizer, load_choice(work / "choice.jsonl")[:5], layout=layout, chat_format="chatml")
        assert (task["layout"], task["chat"]) == (layout, "chatml")
        assert [x["loglik"] for x in task["items"]["base"]] == [pytest.approx(x["loglik"], abs=1e-5) for x in expected]
    assert len(tasks[2]["items"]["base"]) == 5
    assert "mmlu layout, chatml chat format (always the most frequent answer: 40.0%)" in capsys.readouterr().out


def test_equal_prompts_are_continued_by_different_random_numbers(work):
    model, tokenizer = GPT.from_pretrained(work / "base"), load_tokenizer(work / "base")
    ids = [tokenizer.encode("Why?")] * 60
    assert len(evaluation.share([len(row) + 300 for row in ids])) > 1     # micro-batches, each with numbers of its own
    assert len(set(evaluation.write_texts(model, tokenizer, ids, (), 300, temperature=1.0))) == 60


def test_one_rank_and_two_give_the_same(work, tmp_path):
    """Files large enough for several micro-batches: both ranks have work in every task."""
    many = {"choice": 80, "samples": 120, "sets": 100, "genes": 100}
    filler = " filler words" * 40
    for name, count in many.items():
        rows = [json.loads(line) for line in open(work / f"{name}.jsonl")]
        change = {"choice": lambda i: {"context": f"{i}{filler}"}, "samples": lambda i: {"prompt": f"{i}{filler}"}, "sets": lambda i: {"process": f"p {i}"},
                  "genes": lambda i: {"gene": f"GENE{i}"}}[name]
        write(tmp_path / f"{name}.jsonl", [{**rows[i % len(rows)], **change(i)} for i in range(count)])
    write(tmp_path / "odd.jsonl", [{"gene": f"GENE{i}", "label": i % 2} for i in range(100)])
    tasks = ["--tasks", "choice", "choice", "nll", "process", "profile", "--layout", "cloze", "mmlu", "--data", "choice.jsonl", "choice.jsonl",
             "samples.jsonl", "sets.jsonl", "genes.jsonl", "--labels", "odd.jsonl", "--max-new-tokens", "60", "--temperature", "1"]
    pytest.importorskip("rouge_score")
    saved = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.json"
        done = torchrun(ranks, ROOT / "eval.py", work / "base", work / "bft-s0", *tasks, "--prompt", "Why?", "--out", out, "--device", "cpu", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"--- {work / 'base'} (chatml)") == done.stdout.count("per-item scores") == 1
        saved.append(json.loads(out.read_text())["tasks"])
    compared = 0
    for one, two in zip(*saved):
        for path, items in one["items"].items():
            for x, y in zip(items, two["items"][path], strict=True):
                assert list(x) == list(y)
                for key in x:
                    same = x[key] == y[key] if isinstance(x[key], (str, int)) or x[key] is None else y[key] == pytest.approx(x[key], abs=1e-5)
                    assert same, (one["task"], key)
                    compared += 1
        for x, y in zip(one["rows"], two["rows"], strict=True):
            assert (x["pairs"] == []) == (x["measure"] == "cosine self")  # each in a space of its own
            assert [c["value"] for c in y["models"].values()] == pytest.approx([c["value"] for c in x["models"].values()], abs=1e-5)
    assert compared > 1000


@pytest.mark.parametrize("argv, words", [
    (["process", "--data", "sets.jsonl", "--max-new-tokens", "3000"], "the prompt of sets.jsonl:1 has"),
    (["process", "--data", "sets.jsonl", "--encoder", "sets.jsonl"], "--encoder sets.jsonl: "),
    (["profile", "--data", "genes.jsonl", "--limit", "12", "--labels", "few.jsonl"], "few: of the 12 genes in --data 3 have label 1 there and 9 label 0")])
def test_mistakes_are_found_before_any_model_is_read(work, argv, words, monkeypatch, capsys):
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("rouge_score")
    monkeypatch.chdir(work)
    monkeypatch.setattr(evaluation, "load_weights", None)
    monkeypatch.setattr(sys, "argv", ["eval.py", "base", "--out", "none.json", "--tasks", *argv])
    with pytest.raises(SystemExit) as exit:
        run(evaluation.main)
    assert exit.value.code == 2 and words in capsys.readouterr().err and not (work / "none.json").exists()


@pytest.mark.parametrize("task, module, argv", [("process", "rouge_score", []), ("profile", "sklearn", ["--labels", "odd.jsonl"]),
                                                ("process", "sentence_transformers", ["--encoder", "x"])])
def test_a_missing_library_is_named_with_its_command(work, task, module, argv, tmp_path):
    """In a process of its own, in which the import fails."""
    code = f"import sys; sys.modules[{module!r}] = None; import eval, data; sys.argv = ['eval.py', *sys.argv[1:]]; data.run(eval.main)"
    done = subprocess.run([sys.executable, "-c", code, "base", "--tasks", task, "--data", {"process": "sets", "profile": "genes"}[task] + ".jsonl", *argv,
                           "--out", str(tmp_path / "r.json")], cwd=work, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert done.returncode == 2 and 'pip install -e ".[eval]"' in done.stderr and "Traceback" not in done.stderr
