"""The choice task against direct calculations, and against lm-evaluation-harness itself: its tasks, prompts and tokens."""

from pathlib import Path

import numpy as np
import pytest
from evaluation_files import library_model, log_likelihood, small, write
from support import ASSETS

import hf
from runtime.process import UserError
from tasks.choice import choice_items, load_choice


QUESTIONS = [("Does 5'-GATTACA-3' bind\nTP53?  ", ["of course", "no", "it depends on α-helices", "(none of these)"], 2),
             (" Which of 2,4-D and β-catenin is a herbicide? ", ["2,4-D", "β-catenin", "both", "1.5 mg/dL\nneither"], 0),
             ("Select the false one:", ["Größe", "B. all", " leading", "x"], 3), ("日本語?", ["a", "b", "c", "d e f"], 1)] * 2
CONTEXTS = [["Abstract one. It has 37.5% of cases.", "A second part!"], ["Only one."], ["a\n", "b"], ["ünï 😀"]] * 2
DECISIONS = ["yes", "no", "maybe"]
# In many scripts, each with each of its choices as the right one: characters and bytes pick differently.
PIECES = [(c, i) for c in (["eins", "größer als zwei", "3"], ["не знаю", "nope"], ["GATTACA", "日本語"], ["한국어", "β-catenin"], ["ü", "w w w", "TP53!"])
          for i in range(len(c))]
# layout: (the file of lm-eval's task, our items, theirs of the same content)
SETS = {
    "pubmedqa": ("pubmedqa/pubmedqa.yaml", [{"context": "\n".join(c), "question": q, "choices": DECISIONS, "answer": a % 3} for c, (q, _, a) in zip(CONTEXTS, QUESTIONS)],
                 [{"CONTEXTS": c, "QUESTION": q, "final_decision": DECISIONS[a % 3]} for c, (q, _, a) in zip(CONTEXTS, QUESTIONS)]),
    "medqa": ("medqa/medqa.yaml", [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS],
              [{"sent1": q, **{f"ending{i}": x for i, x in enumerate(c)}, "label": a} for q, c, a in QUESTIONS]),
    "medmcqa": ("medmcqa/medmcqa.yaml", [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS],
                [{"question": q, **{f"op{'abcd'[i]}": x for i, x in enumerate(c)}, "cop": a} for q, c, a in QUESTIONS]),
    "cloze": (None, [{"question": "Größe?", "choices": c, "answer": a, "context": "As it is."} for c, a in PIECES],
              [{"q": "As it is.\nGröße?\nAnswer:", "c": c, "a": a} for c, a in PIECES]),
    "mmlu": ("mmlu/default/mmlu_college_medicine.yaml", [{"question": q, "choices": c, "answer": a, "subject": "college_medicine"} for q, c, a in QUESTIONS],
             [{"question": q, "choices": c, "answer": a, "subject": "college_medicine"} for q, c, a in QUESTIONS]),
}
METRICS = ("acc", "acc_norm", "acc_bytes")


@pytest.fixture(scope="module")
def tokenizer():
    return hf.load_tokenizer(ASSETS)


def picked(scores, answer):
    return int(int(np.argmax(scores)) == answer)


def test_choice_equals_a_direct_calculation(tokenizer):
    model, items = small(tokenizer, 0), load_choice(ASSETS / "choice.jsonl")[::20]
    for choices, answer in [*PIECES, (["ß", "a"], 0), (["é", "q"], 0), (["日", "#"], 0), (["β", "Q!"], 0)]:
        items.append({"line": 0, "group": None, "question": "Größe?", "choices": choices, "answer": answer})
    items = [*items, {"line": 0, "group": None, "question": "Which?", "choices": ["a", "bb ccc", "Größe", "d"], "answer": 2, "context": "Context.",
                      "planted": 0}]
    records = choice_items(model, tokenizer, items)
    for item, record in zip(items, records, strict=True):
        prompt = (item["context"] + "\n" if "context" in item else "") + item["question"] + "\nAnswer:"
        start, logliks, tokens = len(tokenizer.encode(prompt)), [], []
        for choice in item["choices"]:
            ids = tokenizer.encode(prompt + " " + choice)
            logliks.append(log_likelihood(model, ids, start))
            tokens.append(len(ids) - start)
        assert record["loglik"] == pytest.approx(logliks, abs=1e-4)
        answer = item["answer"]
        assert record["acc"] == picked(logliks, answer)
        assert record["acc_norm"] == picked([v / len(c) for v, c in zip(logliks, item["choices"])], answer)
        assert record["acc_bytes"] == picked([v / len(c.encode()) for v, c in zip(logliks, item["choices"])], answer)
        assert record["nll"] == pytest.approx(-logliks[answer] / tokens[answer], abs=1e-5)
    assert any(record["acc_norm"] != record["acc_bytes"] for record in records)
    assert any(record["acc"] != record["acc_norm"] for record in records)
    assert "followed" not in records[0] and records[-1]["followed"] == int(np.argmax(records[-1]["loglik"]) == 0)
    assert records[-1]["planted_nll"] == pytest.approx(-logliks[0] / tokens[0], abs=1e-5) and logliks[0] != logliks[2]


@pytest.mark.parametrize("change", [{"question": 1}, {"choices": ["a"]}, {"choices": ["a", ""]}, {"answer": 2}, {"answer": True},
                                    {"context": 3}, {"planted": 2}])
def test_bad_items(change, tmp_path):
    good = {"question": "q", "choices": ["a", "b"], "answer": 1}
    assert load_choice(write(tmp_path / "good.jsonl", [good])) == [{**good, "line": 1, "where": f"{tmp_path}/good.jsonl:1", "group": None}]
    with pytest.raises(UserError, match=rf"bad\.jsonl:2: .*'{next(iter(change))}"):
        load_choice(write(tmp_path / "bad.jsonl", [good, {**good, **change}]))


@pytest.mark.slow
@pytest.mark.parametrize("style, chat, positions", [("gpt2", False, 512), ("smollm2", False, 512), ("smollm2", True, 512), ("llama3", False, 512),
                                                    ("llama3", True, 512), ("gpt2", False, 40)])
def test_choice_equals_lm_eval(style, chat, positions, tmp_path, monkeypatch):
    """Every log-likelihood and every pick, of its tasks as they are; at 40 positions most prompts are cut."""
    import datasets
    import lm_eval.tasks
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml
    directory = library_model(style, tmp_path, positions)
    lm = HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=3)
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in METRICS]
    folder = Path(lm_eval.tasks.__file__).parent
    own = {"task": "own_cloze", "output_type": "multiple_choice", "doc_to_text": lambda doc: doc["q"], "doc_to_choice": lambda doc: doc["c"],
           "doc_to_target": lambda doc: doc["a"]}
    tasks = [{**(load_yaml(folder / file) if file else own), "dataset_path": None, "test_split": "test", "validation_split": None, "training_split": None,
              "fewshot_split": None, "metric_list": metrics, "custom_dataset": lambda theirs=theirs, **_: {"test": datasets.Dataset.from_list(theirs)}}
             for file, _, theirs in SETS.values()]
    # What takes its time: an index of all its tasks, and a list of all packages.
    manager = lm_eval.tasks.TaskManager(include_defaults=False)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    found = simple_evaluate(lm, tasks=tasks, task_manager=manager, apply_chat_template=chat, num_fewshot=0, bootstrap_iters=0, log_samples=True)
    tokenizer, model, cut, differ = hf.load_tokenizer(directory), hf.load_model(directory), 0, 0
    for config, (layout, (_, items, _)) in zip(tasks, SETS.items()):
        task = config["task"]
        items = [{"line": i, "group": None, **item} for i, item in enumerate(items)]
        ours = choice_items(model, tokenizer, items, layout=layout, chat_format=hf.load_chat_format(directory, tokenizer) if chat else None)
        theirs = sorted(found["samples"][task], key=lambda s: s["doc_id"])
        assert len(ours) == len(theirs) == len(items)
        for x, y in zip(ours, theirs):
            assert x["loglik"] == pytest.approx([response[0] for response in y["filtered_resps"]], abs=1e-4), (layout, x["line"])
            assert [x[m] for m in METRICS] == [y[m] for m in METRICS]
            if positions == 40:
                # The last token is not read.
                inputs = [lm.tok_encode("".join(pair)) for pair in y["arguments"]]
                assert x["cut"] == max(0, max(map(len, inputs)) - 1 - 40)
            cut += x["cut"] > 0
            differ += x["acc_norm"] != x["acc_bytes"]
        for m in METRICS:
            assert sum(x[m] for x in ours) / len(ours) == pytest.approx(found["results"][task][f"{m},none"])
    assert differ > 0 or positions == 40
    assert (cut > 10) == (positions == 40) and (cut == 0) == (positions == 512)


# What each layout shows of one item, to the character; [ marks where the choice begins.
SHOWN = {
    "cloze": "C\n Q?\nAnswer:[ yes", "pubmedqa": "Abstract: C\nQuestion:  Q?\nAnswer:[ yes",
    "medqa": "Question:  Q?\nA. yes\nB. no way\nAnswer:[ A", "medmcqa": "Question:  Q?\nChoices:\nA. yes\nB. no way\nAnswer:[ A",
    "mmlu": "The following are multiple choice questions (with answers) about some thing.\n\nQ?\nA. yes\nB. no way\nAnswer:[ A",
}


@pytest.mark.parametrize("layout", SHOWN)
def test_what_a_layout_shows(layout, tokenizer):
    """Without any library: the same prompts, in the tokens that the whole text has."""
    item = {"line": 1, "group": None, "context": "C", "question": " Q?", "choices": ["yes", "no way"], "answer": 0, "subject": "some_thing"}
    model = small(tokenizer, 0)
    record, = choice_items(model, tokenizer, [item], layout=layout)
    prompt, first = SHOWN[layout].split("[")
    second = " B" if first == " A" else " no way"
    start = len(tokenizer.encode(prompt))
    expected = [log_likelihood(model, tokenizer.encode(prompt + end), start) for end in (first, second)]
    assert record["loglik"] == pytest.approx(expected, abs=1e-4)
