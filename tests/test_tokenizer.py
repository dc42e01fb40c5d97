"""Token ids against the `tokenizers` library, chat formats against rendered templates."""

import json
import random
from pathlib import Path

import pytest

import data


ROOT = Path(__file__).resolve().parents[1]
STYLES = ("gpt2", "smollm2", "llama3", "qwen")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
WORDS = [json.loads(line)["text"] for line in open(ROOT / "assets" / "pretrain.jsonl")][::9]
PIECES = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "1", "23", "4567", "89012", " 7", "a", "the", " The", "'s", "'S", "'LL", "I'm", "!", "...", "!!!",
          "TP53", "β-catenin", "α", "N-(2-hydroxyethyl)", "2,4-D", "5'-GATTACA-3'", "😀", "👨‍👩‍👧", "日本語", "한국어", "العربية", "हिन्दी", "ไทย", "e\u0301",
          "o\u0308", "\u0301", "ö", "ﬁ", "\u1112\u1161\u11ab", "½", "²", "٣", "Ⅷ", "\u00a0", "\u3000", "\x85", "\u2028", "\x04", "\x00", "!\x04!", "a\x04b",
          "\U0001d7ce", "\U000f0000", "<think>", "</think>", "<|im_", "|>", *SPECIAL]


def strings(count, seed=0):
    """Mixtures of the above, of runs, of characters from everywhere, and of sentences."""
    rng, out = random.Random(seed), ["", " ", "\n"]
    planes = [*range(32, 127), *range(0xA0, 0x250), *range(0x300, 0x360), *range(0x370, 0x500), *range(0x5D0, 0x700), *range(0x900, 0x980),
              *range(0x3040, 0x3100), *range(0x4E00, 0x4E60), *range(0xAC00, 0xAC40), *range(0x1F600, 0x1F640)]
    while len(out) < count:
        kind, word = rng.random(), rng.choice(WORDS)
        run = rng.choice(["x", "=", " ", "\n", "7", "\u0301", "ab"]) * rng.randint(1, 40)
        out.append("".join(rng.choice([*PIECES, run]) for _ in range(rng.randint(1, 15))) if kind < 0.6 else
                   "".join(chr(rng.choice(planes)) for _ in range(rng.randint(1, 40))) if kind < 0.85 else
                   word[rng.randrange(len(word)):] + run)
    return out


def build(style, path, whole_alphabet=True, special=SPECIAL, vocab_size=2500):
    """A tokenizer.json of this style, trained on what `strings` are made of."""
    tokenizers = pytest.importorskip("tokenizers")
    pre, bpe = tokenizers.pre_tokenizers, tokenizers.models.BPE(ignore_merges=style == "llama3")
    t = tokenizers.Tokenizer(bpe)
    numbers = {"llama3": r"\p{N}{1,3}", "qwen": r"\p{N}"}.get(style)
    if numbers:
        pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        t.pre_tokenizer = pre.Sequence([pre.Split(tokenizers.Regex(pattern), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    elif style == "smollm2":
        t.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    else:
        t.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    if style == "qwen":
        t.normalizer = tokenizers.normalizers.NFC()
    first = special if style in ("gpt2", "smollm2") else []              # as in the published files: before, or after the others
    corpus = [s for s in strings(1500, seed=1) if whole_alphabet or not set(s) & {"\x00", "\x04", "😀"}]
    t.train_from_iterator(corpus, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=first, initial_alphabet=pre.ByteLevel.alphabet() if whole_alphabet else [], show_progress=False))
    t.add_special_tokens(special)
    if style == "qwen":
        t.add_tokens(["<think>", "</think>"])                            # added, but not special: text may contain them
    t.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return path


def library(path):
    t = pytest.importorskip("tokenizers").Tokenizer.from_file(str(path / "tokenizer.json"))
    t.encode_special_tokens = True                                        # special tokens in text are text
    return t


@pytest.mark.parametrize("whole_alphabet", [True, False], ids=["256 bytes", "bytes missing"])
@pytest.mark.parametrize("style", STYLES)
def test_ids_equal_the_library_s(tmp_path, style, whole_alphabet):
    ours, theirs = data.load_tokenizer(build(style, tmp_path, whole_alphabet)), library(tmp_path)
    texts = strings(2000)
    assert bool(ours.missing) != whole_alphabet
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        if whole_alphabet and style != "qwen":                            # (Qwen's NFC changes the text)
            assert ours.decode(ids) == text
    assert ours.n_vocab == theirs.get_vocab_size() and ours.eos_id == theirs.token_to_id("<|endoftext|>")
    assert ours.special.items() >= {t: theirs.token_to_id(t) for t in SPECIAL}.items()
    assert ours.decode([ours.eos_id, *ours.encode("a"), 10 ** 6]) == "<|endoftext|>a\ufffd"


def test_user_text_never_becomes_a_special_token(tmp_path):
    ours = data.load_tokenizer(build("qwen", tmp_path))
    special = {ours.special[t] for t in SPECIAL}
    for text in strings(500, seed=2) + SPECIAL:
        assert not special & set(ours.encode(text))
    assert ours.encode("<think>") == [ours.special["<think>"]]            # which tokenizers takes from text, too


def test_merges_that_tiktoken_could_not_follow_are_refused(tmp_path):
    """Random merges: whatever is accepted has the library's ids, and whatever differs is refused."""
    tokenizers, rng, path = pytest.importorskip("tokenizers"), random.Random(0), tmp_path / "tokenizer.json"
    alphabet, counts = sorted(data.bytes_to_unicode().values()), {True: 0, False: 0}
    for _ in range(400):
        tokens, merges = list("abc"), []
        for _ in range(rng.randint(1, 8)):
            left, right = rng.choice(tokens), rng.choice(tokens)
            merges.append((left, right))
            tokens.append(left + right)
        vocab = {t: i for i, t in enumerate(dict.fromkeys(alphabet + tokens))}
        t = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(dict.fromkeys(merges))))
        t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        t.save(str(path))
        texts = ["".join(rng.choice("abc") for _ in range(rng.randint(1, 14))) for _ in range(60)]
        try:
            ours = data.load_tokenizer(path)
        except data.UserError as e:
            assert "forestall" in str(e)
            counts[False] += 1
            continue
        counts[True] += 1
        assert all(ours.encode(text) == t.encode(text).ids for text in texts)
    assert min(counts.values()) > 40


def test_ids_need_not_rise_with_merges(tmp_path):
    spec = json.loads((build("gpt2", tmp_path) / "tokenizer.json").read_text())
    renumber = list(range(len(spec["model"]["vocab"])))
    random.Random(0).shuffle(renumber)
    spec["model"]["vocab"] = {t: renumber[i] for t, i in spec["model"]["vocab"].items()}
    for t in spec["added_tokens"]:
        t["id"] = renumber[t["id"]]
    spec["model"]["vocab"]["made up"] = 5000                              # no merge leads to it, but a model may
    del spec["model"]["type"]                                             # as in GPT-2's own file
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    ours, theirs = data.load_tokenizer(tmp_path), library(tmp_path)
    assert ours.n_vocab == 5001 and ours.decode([5000]) == "made up"
    for text in strings(300):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids and ours.decode(ours.encode(text)) == text


def changed(spec, **model):
    return {**spec, "model": {**spec["model"], **model}}


def test_ids_may_have_gaps_but_must_be_ids(tmp_path):
    path = build("smollm2", tmp_path) / "tokenizer.json"
    spec = json.loads(path.read_text())
    ids = {**spec["model"]["vocab"], **{t["content"]: t["id"] for t in spec["added_tokens"]}}
    rename = {i: 3 * i + 1 for i in ids.values()}                         # two thirds of the numbers are no token
    spec["model"]["vocab"] = {t: rename[i] for t, i in spec["model"]["vocab"].items()}
    spec["added_tokens"] = [{**t, "id": rename[t["id"]]} for t in spec["added_tokens"]]
    path.write_text(json.dumps(spec))
    ours, theirs = data.load_tokenizer(path), library(tmp_path)
    for text in strings(200, seed=3):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.n_vocab == max(rename.values()) + 1 and ours.decode([0, *ours.encode("ab"), 2]) == "\ufffdab\ufffd"
    assert ours.special.items() >= {t: theirs.token_to_id(t) for t in SPECIAL}.items()
    new = {**spec["added_tokens"][0], "content": "<new>"}
    for i in (len(rename), ours.n_vocab):                                 # the library gives it the first of these, whatever the file says
        path.write_text(json.dumps({**spec, "added_tokens": [*spec["added_tokens"], {**new, "id": i}]}))
        if i == library(tmp_path).token_to_id("<new>"):
            assert data.load_tokenizer(path).special["<new>"] == i == len(rename)
        else:
            with pytest.raises(data.UserError, match=f"added token <new> has id {i}; `tokenizers` would give it {len(rename)}"):
                data.load_tokenizer(path)
    for odd in (-1, 1.5, True, "7", None, 2 ** 40):
        token = next(iter(spec["model"]["vocab"]))
        path.write_text(json.dumps({**spec, "model": {**spec["model"], "vocab": {**spec["model"]["vocab"], token: odd}}}))
        with pytest.raises(data.UserError, match=f"an id is {odd!r}; expected whole numbers"):
            data.load_tokenizer(path)


def test_marks_that_no_text_has_are_refused_where_they_would_take_forever(tmp_path):
    ours = data.load_tokenizer(build("qwen", tmp_path))
    assert ours.encode("a" + "\u0301" * 1000) and ours.encode("e\u0301 " * 100_000)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a" + "\u0301\u0323" * 500_000}))
    with pytest.raises(data.UserError, match="a.jsonl:1: more than 1,000 combining marks"):
        data.load_samples(tmp_path / "a.jsonl", ours)


def test_unsupported_tokenizers_are_refused_by_name(tmp_path):
    spec = json.loads((ROOT / "assets" / "tokenizer.json").read_text())
    path = tmp_path / "tokenizer.json"
    no_null = {k: i for k, i in spec["model"]["vocab"].items() if k != "Ā"}
    split = {"type": "Split", "pattern": {"Regex": r"\p{Han}+"}, "behavior": "Isolated", "invert": False}
    prefix = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
    strip = {"id": 0, "content": "<x>", "special": False, "lstrip": True}
    for change, word in (({"pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"), ({"normalizer": {"type": "NFKC"}}, "normalizer NFKC"),
                         (changed(spec, type="Unigram"), "model Unigram"), ({"model": 3}, "tokenizer.json"), ({"pre_tokenizer": split}, "Han"),
                         ({"pre_tokenizer": None}, "pre-tokenizer"), ({"pre_tokenizer": prefix}, "add_prefix_space"), (changed(spec, dropout=0.1), "dropout 0.1"),
                         (changed(spec, vocab=no_null, unk_token="x"), "unk_token"), (changed(spec, merges=[["a", "Ж"]]), "Ж"),
                         ({"added_tokens": [strip]}, "<x> with lstrip"), (changed(spec, continuing_subword_prefix="##"), "##")):
        path.write_text(json.dumps({**spec, **change}))
        with pytest.raises(data.UserError, match=word):
            data.load_tokenizer(path)
    path.write_text(json.dumps(changed(spec, unk_token="x")))
    assert data.load_tokenizer(path).encode("a")                          # no byte is missing: never used
    with pytest.raises(data.UserError, match="no-such-thing"):
        data.load_tokenizer("no-such-thing")


def test_the_end_of_text_is_found_where_directories_have_it(tmp_path):
    build("gpt2", tmp_path)
    config, model = tmp_path / "tokenizer_config.json", tmp_path / "config.json"
    special = data.load_tokenizer(tmp_path).special
    for written, expected in (({"eos_token": {"content": "<|im_end|>"}}, special["<|im_end|>"]), ({"eos_token": None}, 7), ({}, 7)):
        config.write_text(json.dumps(written))
        model.write_text(json.dumps({"eos_token_id": [7, 8]}))
        assert data.load_tokenizer(tmp_path).eos_id == expected
    model.write_text(json.dumps({"eos_token_id": 0}))
    assert data.load_tokenizer(tmp_path).eos_id == 0                      # which is a token, not the lack of one
    config.write_text(json.dumps({"eos_token": "</s>"}))                  # not in its vocabulary: the model's is
    assert data.load_tokenizer(tmp_path).eos_id == 0
    for nothing in ([], 10 ** 9, -1, True, {"content": None}, ["<|im_end|>"], None):
        model.write_text(json.dumps({"eos_token_id": nothing}))
        assert data.load_tokenizer(tmp_path).eos_id is None
    model.unlink()
    assert data.load_tokenizer(tmp_path).eos_id is None
    for broken in ("{", "[]"):
        config.write_text(broken)
        with pytest.raises(data.UserError, match="tokenizer_config.json is not"):
            data.load_tokenizer(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Chat formats

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}" \
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
LLAMA3 = "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}" \
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
TURNS = [("system", "Be brief."), ("user", "\nWhy? \n"), ("assistant", "So. "), ("user", "And 'p53'?"), ("assistant", "It  depends.")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return build("llama3", tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("name,template", [("chatml", CHATML), ("llama3", LLAMA3)])
def test_a_conversation_is_what_the_template_makes_of_it(directory, name, template):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), bos_token="<|begin_of_text|>")
    theirs.chat_template = template
    ours = data.load_tokenizer(directory)
    messages = [{"role": role, "content": text} for role, text in TURNS]
    ids, response = data.encode_turns(TURNS, ours, name)
    assert ids == theirs.apply_chat_template(messages, return_dict=False)
    asked, _ = data.encode_turns([*TURNS[:4], ("assistant", None)], ours, name)
    assert asked == theirs.apply_chat_template(messages[:4], add_generation_prompt=True, return_dict=False)
    answers = "So. <|im_end|>It  depends.<|im_end|>" if name == "chatml" else "So.<|eot_id|>It  depends.<|eot_id|>"
    assert ours.decode([i for i, r in zip(ids, response) if r]) == answers
    assert data.compare_template(directory, ours, name) is None           # it has no template


def test_a_text_is_all_response(directory):
    ours = data.load_tokenizer(directory)
    for name, begin in (("plain", ""), ("chatml", ""), ("llama3", "<|begin_of_text|>")):
        sample = data.encode_sample([(None, "Some text.")], ours, name)
        assert ours.decode(sample.ids) == begin + "Some text.<|endoftext|>"
        assert sample.response.tolist() == [False] + [True] * (len(sample.ids) - 1)


def test_special_tokens_choose_the_format_and_a_flag_overrides(directory):
    ours = data.load_tokenizer(directory)
    assert data.find_format("auto", ours) == "llama3" and data.find_format("plain", ours) == "plain"
    for lost, expected in (("<|eot_id|>", "chatml"), ("<|im_end|>", "plain")):
        del ours.special[lost]
        assert data.find_format("auto", ours) == expected
    with pytest.raises(data.UserError, match="chatml needs the special token <|im_end|>"):
        data.find_format("chatml", ours)


def test_a_template_that_does_more_is_quoted(directory, tmp_path):
    ours, config = data.load_tokenizer(directory), tmp_path / "tokenizer_config.json"
    for written in ({"chat_template": CHATML}, {"chat_template": [{"name": "tools", "template": ""}, {"name": "default", "template": CHATML}]}):
        config.write_text(json.dumps(written))
        assert data.compare_template(tmp_path, ours, "chatml") is None
        assert "<|start_header_id|>" in data.compare_template(tmp_path, ours, "llama3")   # another format than the directory's
    system = "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}"
    (tmp_path / "chat_template.jinja").write_text(system + CHATML)        # transformers 5's place for it, which wins
    words = data.compare_template(tmp_path, ours, "chatml")
    assert "would write '<|im_start|>system\\nYou are kind.<|im_end|>" in words and words.count("QUESTION") == 2
    (tmp_path / "chat_template.jinja").write_text(
        "{% if tools is not none or documents is not none or strftime_now('%Y') < '2025' %}{{ raise_exception() }}{% endif %}" + CHATML)
    assert data.compare_template(tmp_path, ours, "chatml") is None        # what transformers gives to every template
    for broken in ("{% if %}", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}", "{{ 'a' * 6000000000 }}"):
        (tmp_path / "chat_template.jinja").write_text(broken)
        assert "could not be rendered" in data.compare_template(tmp_path, ours, "chatml")
