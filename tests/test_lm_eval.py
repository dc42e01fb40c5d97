"""The choice task against lm-evaluation-harness itself: its tasks, its prompts, its tokens, on the same small model."""

import json
from pathlib import Path

import pytest
from test_tokenizer import build
from tiny import tiny

import eval as evaluation
from data import load_tokenizer
from model import GPT


ROOT = Path(__file__).resolve().parents[1]
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = ("{{ '<|begin_of_text|>' }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
          "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
MODELS = {"gpt2": (["<|endoftext|>"], None), "smollm2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML),
          "llama3": (["<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], LLAMA3)}
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


def save_model(style, directory, positions=512, seed=3):
    """A model directory that our loader, transformers and so lm-eval all open."""
    special, template = MODELS[style]
    build(style, directory, special=special)
    tokenizer = load_tokenizer(directory)
    model = tiny(seed, vocab_size=tokenizer.n_vocab, max_position_embeddings=positions, eos_token_id=tokenizer.eos_id)
    model.save_pretrained(directory)
    config = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": positions}
    if style == "llama3":                                                 # whose published file puts it before every text
        begin = "<|begin_of_text|>"
        file = directory / "tokenizer.json"
        spec = json.loads(file.read_text())
        spec["post_processor"] = {"type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                                  "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                                  "special_tokens": {begin: {"id": begin, "ids": [tokenizer.special[begin]], "tokens": [begin]}}}
        file.write_text(json.dumps(spec))
        config["bos_token"] = begin
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, **({"chat_template": template} if template else {})}))
    return directory


@pytest.mark.parametrize("style, chat, positions", [("gpt2", False, 512), ("smollm2", False, 512), ("smollm2", True, 512), ("llama3", False, 512),
                                                    ("llama3", True, 512), ("gpt2", False, 40)])
def test_choice_equals_lm_eval(style, chat, positions, tmp_path):
    """Every log-likelihood and every pick, of its tasks as they are; at 40 positions most prompts are cut."""
    pytest.importorskip("lm_eval")
    import datasets
    import lm_eval.tasks
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml
    directory = save_model(style, tmp_path, positions)
    lm = HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=3)
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm", "acc_bytes")]
    folder = Path(lm_eval.tasks.__file__).parent
    own = {"task": "own_cloze", "output_type": "multiple_choice", "doc_to_text": lambda doc: doc["q"], "doc_to_choice": lambda doc: doc["c"],
           "doc_to_target": lambda doc: doc["a"]}
    tasks = [{**(load_yaml(folder / file) if file else own), "dataset_path": None, "test_split": "test", "validation_split": None, "training_split": None,
              "fewshot_split": None, "metric_list": metrics, "custom_dataset": lambda theirs=theirs, **_: {"test": datasets.Dataset.from_list(theirs)}}
             for file, _, theirs in SETS.values()]
    found = simple_evaluate(lm, tasks=tasks, apply_chat_template=chat, num_fewshot=0, bootstrap_iters=0, log_samples=True)
    tokenizer, model, cut, differ = load_tokenizer(directory), GPT.from_pretrained(directory), 0, 0
    for config, (layout, (_, items, _)) in zip(tasks, SETS.items()):
        task = config["task"]
        items = [{"line": i, "group": None, **item} for i, item in enumerate(items)]
        ours = evaluation.choice_items(model, tokenizer, items, layout=layout,
                                       chat_format={"smollm2": "chatml", "llama3": "llama3"}[style] if chat else None)
        theirs = sorted(found["samples"][task], key=lambda s: s["doc_id"])
        assert len(ours) == len(theirs) == len(items)
        for x, y in zip(ours, theirs):
            assert x["loglik"] == pytest.approx([response[0] for response in y["filtered_resps"]], abs=1e-4), (layout, x["line"])
            assert [x[m] for m in ("acc", "acc_norm", "acc_bytes")] == [y[m] for m in ("acc", "acc_norm", "acc_bytes")]
            if positions == 40:                                           # the last token is not read
                inputs = [lm.tok_encode("".join(pair)) for pair in y["arguments"]]
                assert x["cut"] == max(0, max(map(len, inputs)) - 1 - 40)
            cut += x["cut"] > 0
            differ += x["acc_norm"] != x["acc_bytes"]
        for m in ("acc", "acc_norm", "acc_bytes"):
            assert sum(x[m] for x in ours) / len(ours) == pytest.approx(found["results"][task][f"{m},none"])
    assert differ > 0 or positions == 40
    assert (cut > 10) == (positions == 40) and (cut == 0) == (positions == 512)
