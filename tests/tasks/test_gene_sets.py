"""The process task against the libraries that GeneAgent's evaluation uses, and loops."""

import numpy as np
import pytest
import torch
from evaluation_files import evaluate, library_model, make_encoder, make_work, write

import hf
from runtime.process import UserError
from tasks import writing
from tasks.items import load_genes, load_items
from tasks.process import process_name, similarities
from tasks.scoring import micro_batches_of_rank


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("work"))


@pytest.mark.parametrize("text, name", [
    ("Process: MAPK signaling\nbecause", "MAPK signaling"), ("\n\n  **Process:** \"DNA repair (NER), by-pass\".", "DNA repair by pass"),
    ("process name: x/y", "x y"), ("Processing of RNA: a start", "Processing of RNA: a start"), ("", ""), (" \n", ""), ("(none)", ""),
    ("Process:\nDNA repair\nmore", "DNA repair"), ("Process: <DNA repair>", "DNA repair"), ("The biological process is: x: y", "x: y"),
    ("Answer: cell (a\nb) cycle", "cell cycle"), ("The process of sleep", "The process of sleep")])
def test_what_a_model_named(text, name):
    assert process_name(text) == name


def test_a_percentile_counts_equal_names_by_half():
    vectors = np.array([[1.0, 0], [1, 1], [0, 1], [1, 1]])
    cosine, percentile = similarities(np.array([[2.0, 0], [0, 3], [1, 1], [0, 0]]), vectors, [0, 0, 1, 2])
    assert cosine == pytest.approx([1, 0, 1, 0])
    assert percentile == pytest.approx([1, 0, 2.5 / 3, 0.5])              # the third is equal to one other, the last to all


@pytest.mark.slow
def test_process_equals_the_libraries(work, monkeypatch, capsys):
    """ROUGE by rouge-score, cosines by the encoder itself, percentiles by loops; self by transformers' hidden states."""
    import sentence_transformers
    import transformers
    from rouge_score import rouge_scorer
    encoder = make_encoder(work)
    names = ["MAPK signaling", "insulin signaling", "cell-cycle arrest"]
    write(work / "names.jsonl", [{"process": name} for name in names])
    # Thoughts name nothing; those that do not end are no answer.
    texts = ["Process: insulin and damages to DNA\nI think", "Process: sleep?\n</think>\n\nsignals like insulin", "<think>Process: sleep",
             "the cell cycle, G1 (a guess)"]
    real = writing.write_texts
    monkeypatch.setattr(writing, "write_texts", lambda *rest: [w._replace(text=t) for w, t in zip(real(*rest), texts, strict=True)])
    task, = evaluate(monkeypatch, work, "base", "--tasks", "process", "--data", "sets.jsonl", "--candidates", "names.jsonl", "--encoder", "self", encoder)
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
    ours = writing.embed_self(hf.load_model(work / "base"), hf.load_tokenizer(work / "base"), [*named, long])
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


@pytest.mark.slow
def test_begin_of_text_is_read_but_not_averaged(tmp_path):
    import transformers
    library_model("llama3", tmp_path)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("the gene", return_tensors="pt")["input_ids"]
    tokenizer = hf.load_tokenizer(tmp_path)
    assert ids[0, 0] == tokenizer.special["<|begin_of_text|>"]
    with torch.no_grad():
        states = transformers.AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state[0]
    ours = writing.embed_self(hf.load_model(tmp_path), tokenizer, ["the gene", ""])
    assert ours[0] == pytest.approx(states[1:].double().mean(0).numpy(), abs=1e-4) and not ours[1].any()


def test_equal_prompts_are_continued_by_different_random_numbers(work, monkeypatch):
    """Micro-batches have random numbers of their own; here they are small, so that there are several."""
    model, tokenizer = hf.load_model(work / "base"), hf.load_tokenizer(work / "base")
    ids = [tokenizer.encode("Why?")] * 20
    made = []
    monkeypatch.setattr(writing, "micro_batches_of_rank", lambda lengths, _, dealt: made.append(micro_batches_of_rank(lengths, 150, dealt)) or made[-1])
    written = writing.write_texts(model, tokenizer, ids, (), 30, temperature=1.0)
    assert len({answer.text for answer in written}) == 20
    assert len(made[0]) > 3 and min(map(len, made[0])) > 1


@pytest.mark.parametrize("kinds, row, words", [
    ({"a": "text"}, {"a": " "}, "'a' is  ; expected some text"), ({"a": "text"}, {}, "'a' is missing; expected some text"),
    ({"a": "texts"}, {"a": ["x", 1]}, "expected a list of texts"), ({"a": "texts"}, {"a": []}, "expected a list of texts"),
    ({"a": "label"}, {"a": 2}, "'a' is 2; expected 0 or 1"), ({"a": "numbers"}, {"a": [1, True]}, "expected a list of numbers"),
    ({"a": "numbers"}, {"a": [1e31, 2]}, "expected a list of numbers"), ({"a": "numbers"}, {"a": [1]}, "as many on each line")])
def test_lines_that_lack_what_a_task_needs(tmp_path, kinds, row, words):
    good = {"a": {"text": "x", "texts": ["x"], "label": 1, "numbers": [1, 2.5]}[kinds["a"]], "group": 3, "more": None}
    assert load_items(write(tmp_path / "good.jsonl", [good]), **kinds) == [{**good, "line": 1, "where": f"{tmp_path}/good.jsonl:1", "group": "3"}]
    with pytest.raises(UserError) as error:
        load_items(write(tmp_path / "bad.jsonl", [good, row]), **kinds)
    assert str(error.value).startswith(f"{tmp_path / 'bad.jsonl'}:2: ") and words in str(error.value)


def test_a_gene_that_is_there_twice(tmp_path):
    write(tmp_path / "genes.jsonl", [{"gene": "A"}, {"gene": "B"}, {"gene": "A"}])
    with pytest.raises(UserError, match=r"genes\.jsonl:3: A is on line 1 too; expected each gene once"):
        load_genes(tmp_path / "genes.jsonl")


def test_a_template_is_filled_with_texts_numbers_and_lists():
    item = {"line": 4, "where": "sets.jsonl:4", "gene": "A", "genes": ["B", "C"], "n": 3, "nothing": None, "numbers": [1, 2]}
    assert writing.fill("{gene} of {genes}, {n} {{x}}", item) == "A of B, C, 3 {x}"
    for template in ("{lacking}", "{gene[x]}", "{", "{nothing}", "{numbers}", "{}", "{gene.x.y}"):
        with pytest.raises(UserError, match="cannot be filled from sets.jsonl:4 "):
            writing.fill(template, item)
