"""The profile task: every ROC-AUC and every interval against scikit-learn, closed forms and loops."""

import json
import math
import warnings

import numpy as np
import pytest
from evaluation_files import GENES, evaluate, make_encoder, make_work

import hf
from tasks import statistics, writing
from tasks.profile import fold_auc, load_labels, resampled_auc


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("work"))


@pytest.mark.slow
def test_profile_equals_scikit_learn(work, monkeypatch, capsys):
    """Every ROC-AUC by a pipeline made here from texts and vectors; labels, folds and genes that files lack as they are."""
    import sentence_transformers
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold
    from sklearn.preprocessing import StandardScaler
    # Enough for what is compared: both sides draw the same.
    monkeypatch.setattr(statistics, "RESAMPLES", 600)
    encoder = make_encoder(work)
    asked = []
    real = writing.write_texts
    monkeypatch.setattr(writing, "write_texts", lambda model, tokenizer, prompts, *rest: asked.append(
        [tokenizer.decode(ids) for ids in prompts]) or real(model, tokenizer, prompts, *rest))
    task, = evaluate(monkeypatch, work, "base", "bft-s*", "--tasks", "profile", "--data", "genes.jsonl", "--labels", "odd.jsonl", "few.jsonl", "--embeddings",
                     "vectors.jsonl", "--encoder", "self", encoder, "--template", "{gene} with {hint}?", "--max-new-tokens", "12")
    assert asked[0][1] == "<|im_start|>user\nGENE1 with hint 1?<|im_end|>\n<|im_start|>assistant\n" and len(asked) == 4
    out = capsys.readouterr().out
    assert "39 of 40 genes of genes.jsonl are in all of vectors.jsonl" in out and "\u00b1: sd over folds" in out
    genes, st = GENES[:39], sentence_transformers.SentenceTransformer(encoder)
    vectors = {row["gene"]: row["embedding"] for row in map(json.loads, open(work / "vectors.jsonl"))}
    texts = {path: [x["text"] for x in items] for path, items in task["items"].items()}
    assert [len(t) for t in texts.values()] == [39] * 4 and len(set(map(tuple, texts.values()))) == 4
    tokenizer = hf.load_tokenizer(work / "base")

    def own(path, some):
        return writing.embed_self(hf.load_model(work / path), tokenizer, some)

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
                return np.array([np.nanmean([fold_auc(np.array(s)[some], y[some], fold[some])]) for drawn in statistics.resamples(n) for some in drawn])

        def pair(row, model, minus):
            p, = (p for p in row["pairs"] if (p["model"], p["minus"]) == (model, minus))
            return p["difference_low"], p["difference_high"]

        if name == "few":
            drawn = {c: resampled(scores[f"profile, {encoder}"][c][0]) for c in ("base", "gene names")}
            assert pair(row, "base", "gene names") == pytest.approx(statistics.interval(drawn["base"] - drawn["gene names"]), abs=1e-9)
            own_names = resampled(scores["gene name, self"]["base"][0])
            described = resampled(scores["profile, self"]["base"][0])
            assert pair(rows[name, "profile, self"], "base", "gene names") == pytest.approx(statistics.interval(described - own_names), abs=1e-9)
        assert row["models"]["vectors.jsonl"]["value"] == pytest.approx(np.mean(aucs([vectors[gene] for gene in genes])), abs=1e-3)


@pytest.mark.slow
def test_resampled_auc_equals_one_of_repeated_items():
    from sklearn import metrics
    rng = np.random.RandomState(1)
    scores, labels, fold = rng.randint(0, 6, 60) / 2.0, rng.randint(0, 2, 60), np.arange(60) % 4      # with ties
    areas = fold_auc(scores, labels, fold)
    assert areas == pytest.approx([metrics.roc_auc_score(labels[fold == k], scores[fold == k]) for k in range(4)])
    drawn = rng.randint(60, size=(30, 60))
    found = fold_auc(scores, labels, fold, statistics.resample_counts(drawn, 60))
    for r, items in enumerate(drawn):
        for k in range(4):
            some = items[fold[items] == k]
            assert found[k, r] == pytest.approx(metrics.roc_auc_score(labels[some], scores[some]))


def test_an_area_is_how_often_a_positive_stands_above_a_negative():
    """Without any library: by loops, with ties, in folds, resampled, and where a class was not drawn."""
    rng = np.random.RandomState(5)
    scores, labels, fold = rng.randint(0, 6, 30) / 2.0, np.arange(30) % 2, np.arange(30) // 2 % 3

    def area(some, k):
        positive = [scores[i] for i in some if fold[i] == k and labels[i]]
        negative = [scores[i] for i in some if fold[i] == k and not labels[i]]
        wins = [(a > b) + (a == b) / 2 for a in positive for b in negative]
        return np.mean(wins) if wins else math.nan

    assert fold_auc(scores, labels, fold) == pytest.approx([area(range(30), k) for k in range(3)])
    drawn = [rng.randint(30, size=30) for _ in range(20)] + [np.zeros(30, dtype=int)]
    found = fold_auc(scores, labels, fold, statistics.resample_counts(np.array(drawn), 30))
    assert found == pytest.approx(np.array([[area(some, k) for some in drawn] for k in range(3)]), nan_ok=True)


def test_an_interval_of_an_auc_is_the_closed_form():
    """Hanley and McNeil's (1982) standard error, exact for scores that are independent; one fold."""
    rng = np.random.RandomState(2)
    labels = np.array([1] * 150 + [0] * 250)
    scores = rng.exponential(np.where(labels == 1, 2.0, 1.0))             # their model: A = 2/3
    area = fold_auc(scores, labels, np.zeros(400))[0]
    q1, q2, p, n = area / (2 - area), 2 * area ** 2 / (1 + area), 150, 250
    error = math.sqrt((area * (1 - area) + (p - 1) * (q1 - area ** 2) + (n - 1) * (q2 - area ** 2)) / (p * n))
    key = tuple(scores)
    low, high = statistics.interval(resampled_auc([key], labels, np.zeros(400))[key])
    assert low < area < high and (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_properties_are_called_as_their_files(work, monkeypatch):
    monkeypatch.chdir(work)
    (work / "other").mkdir()
    (work / "other" / "odd.jsonl").write_bytes((work / "few.jsonl").read_bytes())
    labels = load_labels(["odd.jsonl", "few.jsonl", "other/odd.jsonl"])
    assert list(labels) == ["odd.jsonl", "few", "other/odd.jsonl"]
    assert labels["few"] == labels["other/odd.jsonl"] and labels["odd.jsonl"]["GENE1"] == 1
