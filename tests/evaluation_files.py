"""Small models and files for evaluations, and eval.py in this process."""

import json
import sys

import numpy as np
import torch
from support import tiny
from tokenizer_files import assets_with, build

import eval as evaluation
import hf


CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = ("{{ '<|begin_of_text|>' }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
          "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
STYLES = {"gpt2": (["<|endoftext|>"], None), "smollm2": (["<|endoftext|>", *CHATML_TOKENS], CHATML),
          "llama3": (["<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], LLAMA3)}
SETS = [{"genes": ["TP53", "MDM2"], "process": "DNA damage response (p53/p21)"}, {"genes": ["INS"], "process": "Insulin-like signaling."},
        {"genes": ["A1", "B2", "C3"], "process": "signaling by insulin", "group": "odd"}, {"genes": ["X"], "process": "Cell cycle, G1"}]
GENES = [f"GENE{i}" for i in range(40)]


def small(tokenizer, seed, positions=2048):
    """The smallest model for a tokenizer."""
    return tiny(seed, std=0.3, vocab_size=tokenizer.n_vocab, num_hidden_layers=1, hidden_size=16, intermediate_size=32,
                num_attention_heads=2, max_position_embeddings=positions, eos_token_id=tokenizer.eos_id)


def log_likelihood(model, ids, start):
    """Sum of log p of ids[start:], by plain logits."""
    with torch.no_grad():
        logp = model(torch.tensor([ids]))[0].log_softmax(-1)
    return sum(logp[t - 1, ids[t]].item() for t in range(start, len(ids)))


def chat_model(directory, seed, positions=512):
    """A model directory with the tokenizer of assets/ and the chat format chatml, which transformers opens too."""
    directory.mkdir(exist_ok=True)
    assets_with(directory, CHATML_TOKENS)
    file = directory / "tokenizer.json"
    spec = json.loads(file.read_text())
    for token in spec["added_tokens"]:
        # `tokenizers` wants to be told.
        token |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    file.write_text(json.dumps(spec))
    return save_for_libraries(directory, seed, positions, {"chat_template": CHATML})


def library_model(style, directory, positions=512, seed=3):
    """A model directory that our loader, transformers and so lm-eval all open. Needs `tokenizers`."""
    special, template = STYLES[style]
    build(style, directory, special=special)
    config = {"chat_template": template} if template else {}
    if style == "llama3":
        # Whose published file puts it before every text.
        begin = "<|begin_of_text|>"
        file = directory / "tokenizer.json"
        spec = json.loads(file.read_text())
        number = hf.load_tokenizer(directory).special[begin]
        spec["post_processor"] = {"type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                                  "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                                  "special_tokens": {begin: {"id": begin, "ids": [number], "tokens": [begin]}}}
        file.write_text(json.dumps(spec))
        config["bos_token"] = begin
    return save_for_libraries(directory, seed, positions, config)


def save_for_libraries(directory, seed, positions, config):
    """Adds a random model and a tokenizer_config.json with these keys to a directory that has a tokenizer.json."""
    tokenizer = hf.load_tokenizer(directory)
    hf.save_model(tiny(seed, vocab_size=tokenizer.n_vocab, max_position_embeddings=positions, eos_token_id=tokenizer.eos_id), directory)
    config = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": positions, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def make_encoder(directory):
    """A sentence-transformers directory with random weights; returns its name."""
    import sentence_transformers
    import transformers
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(33, 127)), *(f"##{chr(i)}" for i in range(33, 127))]
    bert = directory / "bert"
    bert.mkdir()
    (bert / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab=str(bert / "vocab.txt")).save_pretrained(bert)
    config = transformers.BertConfig(vocab_size=len(words), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                     max_position_embeddings=512, initializer_range=0.5)
    transformers.BertModel(config).save_pretrained(bert)
    sentence_transformers.SentenceTransformer(str(bert)).save(str(directory / "encoder"))
    return str(directory / "encoder")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_work(path):
    """Two models, the second with three seeds, and a file for every task."""
    for name, seed in (("base", 3), ("bft-s0", 4), ("bft-s1", 5), ("bft-s2", 6)):
        chat_model(path / name, seed)
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


def evaluate(monkeypatch, directory, *argv):
    """eval.py in this process and directory: the tasks of the results.json that it leaves."""
    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv), "--out", "r.json", "--device", "cpu"])
    evaluation.main()
    return json.loads((directory / "r.json").read_text())["tasks"]
