"""Tokenizers like Llama 2's and Mistral's: token ids against `tokenizers` and transformers, whole and in parts."""

import json
import random
import re
import sys

import pytest
from support import LLAMA, call, tiny
from tokenizer_files import FALLBACKS, INST, build_fallback, library, strings

import data
import hf
from runtime.process import UserError


pytestmark = pytest.mark.slow
SPECIAL = ["<unk>", "<s>", "</s>", *INST]
TEXTS = [text.replace("<think>", "<think") for text in [*strings(600, seed=5), "</s>", "a<s> [INST]b", "<0x0A>", "\u2581x", "  a", "ß日"]]


@pytest.fixture(params=FALLBACKS)
def directory(request, tmp_path):
    return build_fallback(request.param, tmp_path)


def conversations(count):
    """[(text or added token, what it follows), ...]: several texts in a row make one, cut where no token is."""
    rng, words, plain = random.Random(7), ["the gene", "TP53 is", "ß 日本", "a\nb", "x"], [text for text in TEXTS if text]
    for _ in range(count):
        parts, follows = [], "nothing"
        for _ in range(rng.randint(1, 9)):
            if rng.random() < 0.5:
                parts.append((rng.choice([*SPECIAL, "<think>"]), None))
                follows = "token"
            elif follows == "text":
                parts.append((rng.choice(" \ua66e") + rng.choice(words), follows))     # (no merge reaches over either)
            else:
                parts.append((rng.choice([*plain, " a", *words]).replace("<s>", "").replace("</s>", "").replace("INST]", "").rstrip() or "x", follows))
                follows = "text"
        yield parts


def test_ids_and_texts_equal_the_library_s(directory):
    ours, theirs = hf.load_tokenizer(directory), library(directory)
    for text in [*TEXTS, *(text + "<think>b<think> b" for text in TEXTS[:200])]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        assert not {ours.special[token] for token in SPECIAL} & set(ids)
        if ours.bpe.adds_space:
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    assert ours.n_vocab == theirs.get_vocab_size() and ours.eos_id == 2 and ours.begin == ("<s>",)
    assert ours.special == {token: theirs.token_to_id(token) for token in [*SPECIAL, "<think>"]}
    assert ours.decode([2, *ours.encode_part("a", "token"), 10 ** 6]).replace(" ", "") == "</s>a\ufffd"
    assert ours.encode("a\ud800b") == ours.encode("a\ufffdb")             # half a character


def test_a_conversation_in_parts_has_the_ids_of_the_whole(directory):
    import transformers
    ours = hf.load_tokenizer(directory)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    raw = library(directory)
    raw.encode_special_tokens = False
    for parts in conversations(1500):
        ids = []
        for text, follows in parts:
            ids += [ours.special[text]] if follows is None else ours.encode_part(text, follows)
        whole = "".join(text for text, _ in parts)
        assert ids == raw.encode(whole, add_special_tokens=False).ids, parts
        assert ids == theirs(whole, add_special_tokens=False).input_ids
    assert ours.encode("a <think> b") == ours.encode("a ") + [ours.special["<think>"]] + ours.encode_part(" b", "token")


def test_merges_that_spell_a_special_token_are_not_followed(directory):
    path = directory / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["model"]["vocab"] |= {token: 5000 + i for i, token in enumerate(("<", "/s", "</s", "s>", "/", "s", ">"))}
    for token in spec["added_tokens"][5:]:
        token["id"] = len(spec["model"]["vocab"])
    for merges in ([["/", "s"], ["<", "/s"], ["</s", ">"]], ["/ s", "< /s", "</s >"]):
        spec["model"]["merges"] = merges
        path.write_text(json.dumps(spec))
        assert library(directory).encode("</s>").ids[-1] == 2             # the library makes it of letters
        ids = hf.load_tokenizer(directory).encode("</s>")
        assert 2 not in ids and ids[-2:] == [5002, 5006]


def test_what_could_be_read_otherwise_is_refused_by_name(directory):
    path = directory / "tokenizer.json"
    spec = json.loads(path.read_text())
    model = spec["model"]
    strip = {**spec["added_tokens"][-1], "lstrip": True}
    for change, words in (({"model": {**model, "dropout": 0.1}}, "dropout 0.1 is not"), ({"model": {**model, "ignore_merges": True}}, "ignore_merges True"),
                          ({"model": {**model, "byte_fallback": False}}, "Llama 2 and Mistral have it"), ({"model": {**model, "type": "Unigram"}}, "model Unigram"),
                          ({"model": {**model, "type": "WordPiece"}}, "model WordPiece"), ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
                          ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer .*Whitespace"), ({"added_tokens": [strip]}, "<think> with lstrip"),
                          ({"pre_tokenizer": {"type": "Metaspace"}}, "not a tokenizer.json that we can read"),
                          ({"model": {**model, "merges": [["a", "no such token"]]}}, "not a tokenizer.json that we can read")):
        path.write_text(json.dumps({**spec, **change}))
        with pytest.raises(UserError, match=words):
            hf.load_tokenizer(directory)


def test_an_added_token_that_a_prefix_would_hide_is_refused(tmp_path):
    path = build_fallback("llama-2", tmp_path) / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["added_tokens"][-1]["normalized"] = True
    path.write_text(json.dumps(spec))
    raw = library(tmp_path)
    assert raw.token_to_id("<think>") not in raw.encode("a<think>").ids
    with pytest.raises(UserError, match="<think> with normalized is not supported"):
        hf.load_tokenizer(tmp_path)


def test_the_package_that_is_missing_is_named(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=re.escape('tokenizer.json is a tokenizer like that of Llama 2 or Mistral: pip install -e ".[tokenizers]"')):
        hf.load_tokenizer(directory)


def test_a_long_text_is_encoded(directory):
    ours, theirs = hf.load_tokenizer(directory), library(directory)
    for text in (" " * 100_000, "a" * 100_000, "the gene \n " * 10_000):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_a_model_with_such_a_tokenizer_is_trained_and_opened_again(tmp_path, monkeypatch):
    build_fallback("llama-2", tmp_path)
    vocab_size = hf.load_tokenizer(tmp_path).n_vocab
    hf.save_model(tiny(vocab_size=vocab_size, tie_word_embeddings=False, num_key_value_heads=LLAMA["num_attention_heads"]), tmp_path)
    rows = [{"prompt": f"Gene {i}?", "response": "It is so."} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "run"
    assert call(monkeypatch, "--init", tmp_path, "--data", tmp_path / "data.jsonl", "--steps", 2, "--batch-size", 4, "--chat-format", "plain", "--out", out) == 0
    directory, config, tokenizer = hf.open_model(out)
    assert (directory / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert not config.tie_embeddings and hf.load_weights(directory) and tokenizer.encode("Gene") == hf.load_tokenizer(tmp_path).encode("Gene")
    samples, _ = data.load_samples(tmp_path / "data.jsonl", tokenizer)
    assert samples[0].ids[-1] == tokenizer.eos_id == 2
