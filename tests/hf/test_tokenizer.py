"""Token ids against the `tokenizers` library; what is refused; the end of a text."""

import json
import random

import pytest
from support import ASSETS
from tokenizer_files import SPECIAL, STYLES, assets_with, build, library, strings

import data
import hf
from runtime.process import UserError


@pytest.mark.slow
@pytest.mark.parametrize("whole_alphabet", [True, False], ids=["256 bytes", "bytes missing"])
@pytest.mark.parametrize("style", STYLES)
def test_ids_equal_the_library_s(tmp_path, style, whole_alphabet):
    ours, theirs = hf.load_tokenizer(build(style, tmp_path, whole_alphabet)), library(tmp_path)
    assert bool(ours.bpe.missing) != whole_alphabet
    for text in strings(2000):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        if whole_alphabet and style != "qwen":                            # (Qwen's NFC changes the text)
            assert ours.decode(ids) == text
    assert ours.n_vocab == theirs.get_vocab_size() and ours.eos_id == theirs.token_to_id("<|endoftext|>")
    assert ours.special.items() >= {token: theirs.token_to_id(token) for token in SPECIAL}.items()
    assert ours.decode([ours.eos_id, *ours.encode("a"), 10 ** 6]) == "<|endoftext|>a\ufffd"


@pytest.mark.slow
def test_ids_of_the_embedded_tokenizer_equal_the_library_s():
    ours, theirs = hf.load_tokenizer(ASSETS), library(ASSETS)
    for text in [json.loads(line)["text"] for line in open(ASSETS / "pretrain.jsonl")][::7]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids and ours.decode(ids) == text
    assert ours.n_vocab == theirs.get_vocab_size() and ours.eos_id == theirs.token_to_id("<|endoftext|>")


@pytest.mark.slow
@pytest.mark.parametrize("text", [" " * 1_200_000, "\n" * 1_200_000, "a" * 1_200_000, "the gene \n " * 100_000, "\u3000" * 600_000 + "x"],
                         ids=["spaces", "lines", "letters", "words", "wide spaces"])
def test_a_long_text_is_encoded_as_the_library_does(text):
    """tiktoken's own pattern matching ends the process's thread at a million spaces."""
    ours = hf.load_tokenizer(ASSETS)
    ids = ours.encode(text)
    assert ids == library(ASSETS).encode(text, add_special_tokens=False).ids and ours.decode(ids) == text


@pytest.mark.slow
def test_text_that_spells_a_special_token_stays_text(tmp_path):
    ours = hf.load_tokenizer(build("qwen", tmp_path))
    special = {ours.special[token] for token in SPECIAL}
    for text in strings(500, seed=2) + SPECIAL:
        assert not special & set(ours.encode(text))
    assert ours.encode("<think>") == [ours.special["<think>"]]            # which tokenizers takes from text, too


def test_text_that_spells_a_special_token_stays_text_without_extras(tmp_path):
    ours = hf.load_tokenizer(assets_with(tmp_path))
    for token in SPECIAL:
        assert not set(ours.special.values()) & set(ours.encode(token)) and ours.decode(ours.encode(token)) == token


@pytest.mark.slow
def test_of_two_added_tokens_that_begin_alike_the_longer_is_meant(tmp_path):
    spec = json.loads((ASSETS / "tokenizer.json").read_text())
    spec["added_tokens"] += [{**spec["added_tokens"][0], "id": 2000 + i, "content": token, "special": False} for i, token in enumerate(("<a>", "<a>b"))]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    ids = hf.load_tokenizer(tmp_path).encode("x<a>b<a><a")
    assert ids == library(tmp_path).encode("x<a>b<a><a", add_special_tokens=False).ids and ids[1:3] == [2001, 2000]


@pytest.mark.slow
def test_merges_that_tiktoken_could_not_follow_are_refused(tmp_path):
    """Random merges: whatever is accepted has the library's ids, and whatever differs is refused."""
    import tokenizers
    rng, path = random.Random(0), tmp_path / "tokenizer.json"
    alphabet, counts = sorted(hf.bytes_to_unicode().values()), {True: 0, False: 0}
    for _ in range(400):
        tokens, merges = list("abc"), []
        for _ in range(rng.randint(1, 8)):
            left, right = rng.choice(tokens), rng.choice(tokens)
            merges.append((left, right))
            tokens.append(left + right)
        vocab = {token: i for i, token in enumerate(dict.fromkeys(alphabet + tokens))}
        theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(dict.fromkeys(merges))))
        theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.save(str(path))
        texts = ["".join(rng.choice("abc") for _ in range(rng.randint(1, 14))) for _ in range(60)]
        try:
            ours = hf.load_tokenizer(path)
        except UserError as e:
            assert "forestall" in str(e)
            counts[False] += 1
            continue
        counts[True] += 1
        assert all(ours.encode(text) == theirs.encode(text).ids for text in texts)
    assert min(counts.values()) > 40


@pytest.mark.slow
def test_ids_need_not_rise_with_merges(tmp_path):
    spec = json.loads((build("gpt2", tmp_path) / "tokenizer.json").read_text())
    renumber = list(range(len(spec["model"]["vocab"])))
    random.Random(0).shuffle(renumber)
    spec["model"]["vocab"] = {token: renumber[i] for token, i in spec["model"]["vocab"].items()}
    for token in spec["added_tokens"]:
        token["id"] = renumber[token["id"]]
    spec["model"]["vocab"]["made up"] = 5000                              # no merge leads to it, but a model may
    del spec["model"]["type"]                                             # as in GPT-2's own file
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    ours, theirs = hf.load_tokenizer(tmp_path), library(tmp_path)
    assert ours.n_vocab == 5001 and ours.decode([5000]) == "made up"
    for text in strings(300):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids and ours.decode(ours.encode(text)) == text


def changed(spec, **model):
    return {**spec, "model": {**spec["model"], **model}}


@pytest.mark.slow
def test_ids_may_have_gaps(tmp_path):
    path = build("smollm2", tmp_path) / "tokenizer.json"
    spec = json.loads(path.read_text())
    ids = {**spec["model"]["vocab"], **{token["content"]: token["id"] for token in spec["added_tokens"]}}
    rename = {i: 3 * i + 1 for i in ids.values()}                         # two thirds of the numbers are no token
    spec["model"]["vocab"] = {token: rename[i] for token, i in spec["model"]["vocab"].items()}
    spec["added_tokens"] = [{**token, "id": rename[token["id"]]} for token in spec["added_tokens"]]
    path.write_text(json.dumps(spec))
    ours, theirs = hf.load_tokenizer(path), library(tmp_path)
    for text in strings(200, seed=3):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.n_vocab == max(rename.values()) + 1 and ours.decode([0, *ours.encode("ab"), 2]) == "\ufffdab\ufffd"
    assert ours.special.items() >= {token: theirs.token_to_id(token) for token in SPECIAL}.items()
    new = {**spec["added_tokens"][0], "content": "<new>"}
    # The library gives a new token the first of these, whatever the file says.
    for i in (len(rename), ours.n_vocab):
        path.write_text(json.dumps({**spec, "added_tokens": [*spec["added_tokens"], {**new, "id": i}]}))
        if i == library(tmp_path).token_to_id("<new>"):
            assert hf.load_tokenizer(path).special["<new>"] == i == len(rename)
        else:
            with pytest.raises(UserError, match=f"added token <new> has id {i}; `tokenizers` would give it {len(rename)}"):
                hf.load_tokenizer(path)


def test_ids_must_be_ids(tmp_path):
    path = assets_with(tmp_path) / "tokenizer.json"
    spec = json.loads(path.read_text())
    token = next(iter(spec["model"]["vocab"]))
    for wrong in (-1, 1.5, True, "7", None, 2 ** 40):
        path.write_text(json.dumps(changed(spec, vocab={**spec["model"]["vocab"], token: wrong})))
        with pytest.raises(UserError, match=f"an id is {wrong!r}; expected whole numbers"):
            hf.load_tokenizer(path)


@pytest.mark.slow
def test_marks_that_no_text_has_are_refused_where_they_would_take_forever(tmp_path):
    ours = hf.load_tokenizer(build("qwen", tmp_path))
    assert ours.encode("a" + "\u0301" * 1000) and ours.encode("e\u0301 " * 100_000)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a" + "\u0301\u0323" * 500_000}))
    with pytest.raises(UserError, match="a.jsonl:1: more than 1,000 combining marks"):
        data.load_samples(tmp_path / "a.jsonl", ours, "plain")


def test_unsupported_tokenizers_are_refused_by_name(tmp_path):
    spec = json.loads((ASSETS / "tokenizer.json").read_text())
    path = tmp_path / "tokenizer.json"
    no_null = {token: i for token, i in spec["model"]["vocab"].items() if token != "Ā"}
    split = {"type": "Split", "pattern": {"Regex": r"\p{Han}+"}, "behavior": "Isolated", "invert": False}
    prefix = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
    strip = {"id": 0, "content": "<x>", "special": False, "lstrip": True}
    for change, word in (({"pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"), ({"normalizer": {"type": "NFKC"}}, "normalizer NFKC"),
                         (changed(spec, type="Unigram"), "model Unigram"), ({"model": 3}, "tokenizer.json"), ({"pre_tokenizer": split}, "Han"),
                         ({"pre_tokenizer": None}, "pre-tokenizer"), ({"pre_tokenizer": prefix}, "add_prefix_space"), (changed(spec, dropout=0.1), "dropout 0.1"),
                         (changed(spec, vocab=no_null, unk_token="x"), "unk_token"), (changed(spec, merges=[["a", "Ж"]]), "Ж"),
                         ({"added_tokens": [strip]}, "<x> with lstrip"), (changed(spec, continuing_subword_prefix="##"), "##")):
        path.write_text(json.dumps({**spec, **change}))
        with pytest.raises(UserError, match=word):
            hf.load_tokenizer(path)
    path.write_text(json.dumps(changed(spec, unk_token="x")))
    assert hf.load_tokenizer(path).encode("a")                            # no byte is missing: never used
    with pytest.raises(UserError, match="no-such-thing"):
        hf.load_tokenizer("no-such-thing")


def test_the_end_of_text_is_found_where_directories_have_it(tmp_path):
    assets_with(tmp_path)
    config, model = tmp_path / "tokenizer_config.json", tmp_path / "config.json"
    special = hf.load_tokenizer(tmp_path).special
    for written, expected in (({"eos_token": {"content": "<|im_end|>"}}, special["<|im_end|>"]), ({"eos_token": None}, 7), ({}, 7)):
        config.write_text(json.dumps(written))
        model.write_text(json.dumps({"eos_token_id": [7, 8]}))
        assert hf.load_tokenizer(tmp_path).eos_id == expected
    model.write_text(json.dumps({"eos_token_id": 0}))
    assert hf.load_tokenizer(tmp_path).eos_id == 0                        # which is a token, not the lack of one
    config.write_text(json.dumps({"eos_token": "</s>"}))                  # not in its vocabulary: the model's is
    assert hf.load_tokenizer(tmp_path).eos_id == 0
    for nothing in ([], 10 ** 9, -1, True, {"content": None}, ["<|im_end|>"], None):
        model.write_text(json.dumps({"eos_token_id": nothing}))
        assert hf.load_tokenizer(tmp_path).eos_id is None
    model.unlink()
    assert hf.load_tokenizer(tmp_path).eos_id is None
    for broken in ("{", "[]"):
        config.write_text(broken)
        with pytest.raises(UserError, match="tokenizer_config.json is not"):
            hf.load_tokenizer(tmp_path)
