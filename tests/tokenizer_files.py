"""tokenizer.json files of every style, the texts to try on them, and chat templates."""

import functools
import itertools
import json
import random
from pathlib import Path


ASSETS = Path(__file__).resolve().parents[1] / "assets"
STYLES = ("gpt2", "smollm2", "llama3", "qwen")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
with open(ASSETS / "pretrain.jsonl") as f:
    WORDS = [json.loads(line)["text"] for line in itertools.islice(f, 0, None, 9)]
PIECES = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "1", "23", "4567", "89012", " 7", "a", "the", " The", "'s", "'S", "'LL", "I'm", "!", "...", "!!!",
          "TP53", "β-catenin", "α", "N-(2-hydroxyethyl)", "2,4-D", "5'-GATTACA-3'", "😀", "👨‍👩‍👧", "日本語", "한국어", "العربية", "हिन्दी", "ไทย", "e\u0301",
          "o\u0308", "\u0301", "ö", "ﬁ", "\u1112\u1161\u11ab", "½", "²", "٣", "Ⅷ", "\u00a0", "\u3000", "\x85", "\u2028", "\x04", "\x00", "!\x04!", "a\x04b",
          "\U0001d7ce", "\U000f0000", "<think>", "</think>", "<|im_", "|>", *SPECIAL]
PLANES = [*range(32, 127), *range(0xA0, 0x250), *range(0x300, 0x360), *range(0x370, 0x500), *range(0x5D0, 0x700), *range(0x900, 0x980),
          *range(0x3040, 0x3100), *range(0x4E00, 0x4E60), *range(0xAC00, 0xAC40), *range(0x1F600, 0x1F640)]

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}" \
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
LLAMA3 = "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}" \
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"


def strings(count, seed=0):
    """Mixtures of PIECES, of runs, of characters from everywhere, and of sentences."""
    rng, texts = random.Random(seed), ["", " ", "\n"]
    while len(texts) < count:
        kind, word = rng.random(), rng.choice(WORDS)
        run = rng.choice(["x", "=", " ", "\n", "7", "\u0301", "ab"]) * rng.randint(1, 40)
        if kind < 0.6:
            texts.append("".join(rng.choice([*PIECES, run]) for _ in range(rng.randint(1, 15))))
        elif kind < 0.85:
            texts.append("".join(chr(rng.choice(PLANES)) for _ in range(rng.randint(1, 40))))
        else:
            texts.append(word[rng.randrange(len(word)):] + run)
    return texts


def build(style, directory, whole_alphabet=True, special=SPECIAL, vocab_size=2500):
    """A directory with a tokenizer.json of this style, trained on what `strings` are made of. Needs `tokenizers`."""
    (directory / "tokenizer.json").write_text(trained(style, whole_alphabet, tuple(special), vocab_size))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return directory


@functools.cache
def trained(style, whole_alphabet, special, vocab_size):
    import tokenizers
    pre = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=style == "llama3"))
    numbers = {"llama3": r"\p{N}{1,3}", "qwen": r"\p{N}"}.get(style)
    if numbers:
        pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        split = pre.Split(tokenizers.Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    elif style == "smollm2":
        tokenizer.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    else:
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    if style == "qwen":
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    # As in the published files: special tokens come before the others, or after them.
    first = list(special) if style in ("gpt2", "smollm2") else []
    corpus = [text for text in strings(1500, seed=1) if whole_alphabet or not set(text) & {"\x00", "\x04", "😀"}]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=first, show_progress=False,
                                             initial_alphabet=pre.ByteLevel.alphabet() if whole_alphabet else [])
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(list(special))
    if style == "qwen":
        tokenizer.add_tokens(["<think>", "</think>"])                     # added, but not special: text may contain them
    return tokenizer.to_str(pretty=True)


SPACE = "\u2581"
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]}
METASPACE = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
OLD_METASPACE = {"type": "Metaspace", "replacement": SPACE, "add_prefix_space": True}
NO_PREFIX = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
MERGED_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
FALLBACKS = {                                                             # its normalizer and pre_tokenizer
    "llama-2": (PREPEND, None),                                           # Mistral v0.1 and BioMistral, too
    "mistral-v0.3": (None, METASPACE),
    "metaspace": (None, OLD_METASPACE),
    "no prefix": (NO_PREFIX, MERGED_SPLIT),
}
INST = ["[INST]", "[/INST]"]


def build_fallback(kind, directory, vocab_size=1200):
    """A directory with the tokenizer.json of BPE with byte fallback of this kind. Needs `tokenizers`."""
    normalizer, cut = FALLBACKS[kind]
    spec = json.loads(trained_fallback(vocab_size))
    spec |= {"normalizer": normalizer, "pre_tokenizer": cut}
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return directory


@functools.cache
def trained_fallback(vocab_size):
    """<unk>, <s>, </s>, [INST], [/INST] and 256 bytes, then what merges make; <think> comes last and is not special."""
    import tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *INST]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, limit_alphabet=150,
                                             special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))])
    tokenizer.train_from_iterator([text.replace("<think>", "") for text in strings(1500, seed=1)], trainer)
    spec = json.loads(tokenizer.to_str())
    kinds = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"] = [{"id": i, "content": token, "special": True, **kinds} for i, token in enumerate(special)]
    spec["added_tokens"].append({"id": len(spec["model"]["vocab"]), "content": "<think>", "special": False, **kinds})
    decoders = tokenizers.decoders
    strip = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(strip)
    begin = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = begin
    return json.dumps(spec | {key: json.loads(tokenizer.to_str())[key] for key in ("decoder", "post_processor")})


def assets_with(directory, special=SPECIAL):
    """A directory with the tokenizer of assets/ and these special tokens, where it does not have them. Needs no extra."""
    spec = json.loads((ASSETS / "tokenizer.json").read_text())
    vocab, have = spec["model"]["vocab"], {token["content"] for token in spec["added_tokens"]}
    new = [token for token in special if token not in have]
    spec["added_tokens"] += [{"id": len(vocab) + i, "content": token, "special": True} for i, token in enumerate(new)]
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return directory


def library(directory):
    """The tokenizer.json of a directory as Hugging Face's `tokenizers` opens it; special tokens in text are text."""
    import tokenizers
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer
