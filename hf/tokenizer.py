"""tokenizer.json -> Tokenizer: byte-level BPE, computed by tiktoken, with the ids of Hugging Face's `tokenizers`; BPE
with byte fallback is in `hf.byte_fallback`."""

import itertools
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import regex  # tiktoken brings it
import tiktoken

from hf.byte_fallback import ByteFallbackBPE
from hf.reading import is_there, read_json
from runtime.process import UserError


# tiktoken's own cut fails on a piece of a million characters.
LONGEST_FOR_TIKTOKEN = 500_000
# Normalising takes time that grows with the square of the marks in a row.
MOST_MARKS = 1000


class AddedToken(NamedTuple):
    """A token beside the vocabulary of merges, as tokenizer.json has it."""
    id: int
    special: bool = True             # False: a text that spells it becomes it ("<think>")
    lstrip: bool = False             # takes the white space before it along
    rstrip: bool = False             # and after it


class Tokenizer:
    """encode(text) -> ids, decode(ids) -> text, n_vocab, special {text: id}, eos_id (None if there is none).

    path: its tokenizer.json, None for one of tiktoken's own.
    bpe: a ByteLevelBPE or ByteFallbackBPE, which has the ids of text between added tokens.
    added_tokens: {text: AddedToken}, all of them in `special` too. begin: texts of those that stand before any text.
    bytes: {id: what it stands for}.
    """

    def __init__(self, bpe, eos_id, special, added_tokens=None, begin=(), path=None):
        self.bpe = bpe
        self.eos_id = eos_id
        self.special = special
        self.added_tokens = added_tokens or {}
        self.begin = tuple(begin)
        self.path = path
        in_texts = [text for text, token in self.added_tokens.items() if not token.special]
        # The longest first: of two that begin alike, the longer one is meant.
        longest_first = sorted(map(re.escape, in_texts), key=len, reverse=True)
        self.added = re.compile("(" + "|".join(longest_first) + ")") if in_texts else None
        self.bytes = bpe.bytes | {i: text.encode() for text, i in special.items()}
        self.n_vocab = max(self.bytes) + 1

    def encode(self, text, follows="nothing"):
        """The ids of a text, or of a part of one: see `encode_part`. Special tokens in the text stay text.

        Raises UserError for marks that no text has, with NFC.
        """
        if self.added is None:
            return self.encode_part(text, follows)
        ids = []
        # re.split alternates: text, added token, text, ...
        for i, part in enumerate(self.added.split(text)):
            if i % 2 == 1:
                ids.append(self.special[part])
                follows = "token"
            elif part:
                ids += self.encode_part(part, follows)
        return ids

    def encode_part(self, text, follows="nothing"):
        """The ids of text without added tokens: what spells one stays text.

        follows: what stands before it in the whole text: "nothing", a "token" (any added token: "<s>", "<think>"), or
        "text", where a text is cut in two. Llama 2's and Mistral's tokenizers put a space before some of them.
        """
        return self.bpe.encode(text, follows)

    def decode(self, ids):
        """Ids that are no token, and bytes that are no text, become U+FFFD. The space that encode puts before a text
        leaves it again."""
        unknown = "\ufffd".encode()
        text = b"".join(self.bytes.get(int(i), unknown) for i in ids).decode(errors="replace")
        if self.bpe.adds_space:
            text = text.removeprefix(" ")
        return text


class ByteLevelBPE:
    """encode(text, follows) -> ids; bytes: {id: what it stands for}.

    encoding: a tiktoken.Encoding, whose ranks are the order of merges. ids: {rank: id} (None: the same numbers).
    nfc: normalise the text first. missing: the bytes that are no token; they leave the text, as in Hugging Face's
    `tokenizers`.
    """
    adds_space = False

    def __init__(self, encoding, ids=None, nfc=False, missing=b""):
        self.encoding = encoding
        self.ids = ids
        self.nfc = nfc
        self.missing = missing
        self.bytes = {}
        for token, rank in encoding._mergeable_ranks.items():
            self.bytes[ids[rank] if ids else rank] = token

    def encode(self, text, follows):
        """The same whatever the text follows. Raises UserError for marks that no text has, with NFC."""
        if self.nfc:
            if any(len(marks.group()) > MOST_MARKS for marks in regex.finditer(r"\p{M}+", text)):
                raise UserError("more than 1,000 combining marks in a row; expected text")
            text = unicodedata.normalize("NFC", text)
        if len(text) > LONGEST_FOR_TIKTOKEN or self.has_missing_bytes(text):
            ranks = self.encode_by_pieces(text)
        else:
            ranks = self.encoding.encode_ordinary(text)
        if self.ids is None:
            return ranks
        return [self.ids[rank] for rank in ranks]

    def has_missing_bytes(self, text):
        raw = text.encode(errors="replace")
        return len(raw.translate(None, self.missing)) < len(raw)

    def encode_by_pieces(self, text):
        """Ranks, with the cut done here: bytes that are no token leave after the cut and before the merges."""
        ranks = []
        for match in regex.finditer(self.encoding._pat_str, text):
            piece = match.group().encode(errors="replace").translate(None, self.missing)
            if piece:
                ranks += self.encoding._encode_single_piece(piece)
        return ranks


def load_tokenizer(name_or_path):
    """A Tokenizer from a directory with tokenizer.json, from such a file, or a tiktoken encoding by name ("gpt2").

    The ids are those of Hugging Face's `tokenizers` with add_special_tokens=False and special tokens as text:
    byte-level BPE as GPT-2, SmolLM2, Llama 3 and Qwen have it, and BPE with byte fallback as Llama 2 and Mistral have
    it. Raises UserError for others, by name.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "tokenizer.json"
        if not is_there(path):
            raise UserError(f"{path}: no such file; expected one, which transformers' AutoTokenizer and "
                            "save_pretrained make of others (tokenizer.model and vocab.json are not read)")
    if not path.is_file():
        return tiktoken_tokenizer(name_or_path)
    try:
        return read_tokenizer(path)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is not a tokenizer.json that we can read: {e!r}") from None


def tiktoken_tokenizer(name):
    try:
        encoding = tiktoken.get_encoding(str(name))
    except Exception:
        # An unknown name, or no network for its file.
        raise UserError(f"tokenizer {name}: no tokenizer.json there, and no encoding of that name that tiktoken can "
                        f"load (it knows {', '.join(tiktoken.list_encoding_names())})") from None
    special = dict(encoding._special_tokens)
    return Tokenizer(ByteLevelBPE(encoding), encoding.eot_token, special,
                     added_tokens={text: AddedToken(i) for text, i in special.items()})


def read_tokenizer(path):
    """A Tokenizer from a tokenizer.json. Raises UserError for what is not supported, and exceptions of several kinds
    for a file that is no tokenizer.json."""
    spec = read_json(path)
    vocab = spec["model"]["vocab"]                # {token: id}
    added = spec.get("added_tokens", [])
    if unsupported := unsupported_parts(spec):
        raise UserError(f"{path}: {', '.join(unsupported)[:400]} is not supported; supported: byte-level BPE as GPT-2, "
                        "SmolLM2, Llama 3 and Qwen have it, and BPE with byte fallback as Llama 2 and Mistral have it")
    special = {token["content"]: token["id"] for token in added}
    check_ids(vocab, special)
    if has_byte_fallback(spec):
        never_text = {token["content"] for token in added if token["special"]}
        bpe = ByteFallbackBPE(spec["model"], steps(spec, "normalizer", "normalizers"),
                              steps(spec, "pre_tokenizer", "pretokenizers"), never_text, path)
    else:
        bpe, unreachable = byte_level_bpe(spec, special, path)
        special = unreachable | special
    return Tokenizer(
        bpe, find_eos(path.parent, special | vocab), special,
        added_tokens={token["content"]: AddedToken(token["id"], token["special"], token.get("lstrip", False),
                                                   token.get("rstrip", False)) for token in added},
        begin=find_begin(spec, special), path=path)


def byte_level_bpe(spec, special, path):
    """(ByteLevelBPE, {token: id} of what no text leads to, since no merge makes it). Raises UserError."""
    vocab = spec["model"]["vocab"]                # its tokens are bytes spelled as in `bytes_to_unicode`
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    single_bytes = [character for character in byte_of if character in vocab]
    tokens = tokens_by_rank(spec["model"], single_bytes, special, path)
    ranks = {bytes(byte_of[character] for character in token): rank for token, rank in tokens.items()}
    encoding = tiktoken.Encoding(str(path), pat_str=find_pattern(spec), mergeable_ranks=ranks, special_tokens={})
    bpe = ByteLevelBPE(encoding, ids=[vocab[token] for token in tokens],
                       nfc=bool(steps(spec, "normalizer", "normalizers")), missing=missing_bytes(vocab))
    return bpe, {token: i for token, i in vocab.items() if token not in tokens}


def missing_bytes(vocab):
    """The bytes that are no token of a byte-level vocabulary."""
    return bytes(byte for byte, character in bytes_to_unicode().items() if character not in vocab)


def tokens_by_rank(model, single_bytes, special, path):
    """{token: rank}: single bytes, then tokens in the order in which their merges are listed. Raises UserError."""
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    tokens = single_bytes + ["".join(merge) for merge in merges]
    if model.get("ignore_merges"):
        # A piece of text that is a token becomes that token, whatever the merges say. tiktoken always does this.
        tokens += [token for token in model["vocab"] if token not in special]
    elif stray := stray_merge(merges):
        raise UserError(f"{path}: {stray} is a merge that its own parts forestall; tiktoken would give other ids")
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


def check_ids(vocab, special):
    """Raises ValueError for ids that are none, and for those of added tokens that `tokenizers` would not use."""
    for i in [*vocab.values(), *special.values()]:
        if type(i) is not int or not 0 <= i < 2 ** 31:
            raise ValueError(f"an id is {i!r}; expected whole numbers from 0 on")
    # The library numbers added tokens from the vocabulary's length on, whatever the file says.
    new_ids = itertools.count(len(vocab))
    for token, i in special.items():
        expected = vocab[token] if token in vocab else next(new_ids)
        if i != expected:
            raise ValueError(f"the added token {token} has id {i}; `tokenizers` would give it {expected}")


# ---------------------------------------------------------------------------------------------------------------------
# What is supported

# How text is cut into pieces before merges: the steps of a tokenizer.json's pre_tokenizer, and a pattern that does the
# same at once.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Each digit by itself first, and no piece across one: spaces before a digit are as spaces before the end.
DIGITS_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")

GPT2_CUT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS_CUT = {"type": "Digits", "individual_digits": True}
LLAMA3_CUT = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
QWEN_CUT = {**LLAMA3_CUT, "pattern": {"Regex": QWEN_PATTERN}}
BYTES_ONLY = {**GPT2_CUT, "use_regex": False}
PRE_TOKENIZERS = [
    (GPT2_PATTERN, [GPT2_CUT]),
    (DIGITS_PATTERN, [DIGITS_CUT, GPT2_CUT]),
    (LLAMA3_PATTERN, [LLAMA3_CUT, BYTES_ONLY]),
    (QWEN_PATTERN, [QWEN_CUT, BYTES_ONLY]),
]


# Steps that BPE with byte fallback may have.
NORMALIZERS = ("Prepend", "Replace")
CUTS = ("Metaspace", "Split")


def unsupported_parts(spec):
    """What of a tokenizer.json we do not have, as texts for the user."""
    model = spec["model"]
    # Old files leave the type out.
    kind = model.get("type", "BPE")
    if kind != "BPE":
        return [f"model {kind}"]
    unsupported = []
    keys = ["dropout", "continuing_subword_prefix", "end_of_word_suffix"]
    normalizers = steps(spec, "normalizer", "normalizers")
    if has_byte_fallback(spec):
        # It would make special tokens of text that spells them.
        keys.append("ignore_merges")
        known_normalizers = NORMALIZERS
        known_cut = all(step["type"] in CUTS for step in steps(spec, "pre_tokenizer", "pretokenizers"))
    else:
        if missing_bytes(model["vocab"]):
            # They say what becomes of a byte that is no token. Where none is missing they have nothing to do.
            keys += ["unk_token", "byte_fallback"]
        known_normalizers = ("NFC",)
        known_cut = find_pattern(spec) is not None
    if not known_cut:
        unsupported.append(f"pre-tokenizer {pre_tokenizer_steps(spec)}")
    unsupported += [f"normalizer {step['type']}" for step in normalizers if step["type"] not in known_normalizers]
    unsupported += [f"{key} {model[key]}" for key in keys if model.get(key)]
    prepends = any(step["type"] == "Prepend" for step in normalizers)
    for token in spec.get("added_tokens", []):
        if token["special"]:
            continue
        for key in ("lstrip", "rstrip", "single_word"):
            if token.get(key):
                unsupported.append(f"added token {token['content']} with {key}")
        if prepends and token.get("normalized"):
            # The library looks for it with a space in front.
            unsupported.append(f"added token {token['content']} with normalized")
    return unsupported


def has_byte_fallback(spec):
    """Whether characters that are no token become the bytes <0x00> to <0xFF>; a byte-level file may say so as well."""
    cut = [step["type"] for step in steps(spec, "pre_tokenizer", "pretokenizers")]
    return bool(spec["model"].get("byte_fallback")) and "ByteLevel" not in cut


def find_pattern(spec):
    """The pattern that cuts text as this tokenizer.json's pre_tokenizer does, None if we have none."""
    wanted = pre_tokenizer_steps(spec)
    for pattern, known_steps in PRE_TOKENIZERS:
        if known_steps == wanted:
            return pattern
    return None


def pre_tokenizer_steps(spec):
    """The steps of the pre_tokenizer, without what has no influence on ids and with what an absent key means."""
    result = []
    for step in steps(spec, "pre_tokenizer", "pretokenizers"):
        step = {key: value for key, value in step.items() if key != "trim_offsets"}
        if step["type"] == "ByteLevel":
            step.setdefault("use_regex", True)
        result.append(step)
    return result


def steps(spec, key, inner_key):
    """A part of a tokenizer.json as a list: it is a sequence of steps, a single one, or null."""
    part = spec.get(key)
    if not part:
        return []
    if part["type"] == "Sequence":
        return part[inner_key]
    return [part]


# ---------------------------------------------------------------------------------------------------------------------
# Do tiktoken and `tokenizers` merge alike?

def stray_merge(merges):
    """The first merge that tiktoken and `tokenizers` may understand differently, as text; None if there is none.

    merges: [(left, right), ...]. The rank of a token is the place of the first merge that makes it. Both libraries
    begin with single characters and join two neighbours again and again, those of the lowest rank first, of several the
    leftmost. But tiktoken joins any two that together are a token, `tokenizers` only those that are listed as a merge.

    They agree if the characters of each token, merged by all that ranks below it, become just the pair that is listed.
    For two neighbours have been merged as if they were alone in the world: nothing has crossed their outer borders. So
    if together they are a token, they are the pair that is listed for it.
    """
    rank = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    pair = {}                                     # {token: its listed pair, if it is merged up to that}
    for left, right in merges:
        if pair_is_reached(left, right, rank, pair):
            pair.setdefault(left + right, (left, right))
    for left, right in merges:
        if left + right not in pair:
            return f"{left} {right}"
    return None


def pair_is_reached(left, right, rank, pair):
    """Whether the characters of left + right are merged up to (left, right) before the rank of left + right.

    Each of the two must be reached by itself, and no merge may cross the border between them while they grow. So we
    follow the border back in time: of the two tokens beside it we take apart the one that was made last, and its half
    at the border takes its place, until only characters are left. If ever the two together are a token of a rank whose
    turn has come by then, they would have been joined across the border.
    """
    limit = rank[left + right]
    for half in (left, right):
        if len(half) > 1 and (half not in pair or rank[half] >= limit):
            return False
    while len(left) > 1 or len(right) > 1:
        if len(right) == 1 or (len(left) > 1 and rank[left] > rank[right]):
            # Before `left` was made. A merge of equal rank across the border is further right: `left` was first.
            limit = rank[left]
            left = pair[left][1]
        else:
            # Before `right` was made. Here a merge of equal rank across the border is further left: it would be first.
            limit = rank[right] + 1
            right = pair[right][0]
        if rank.get(left + right, limit) < limit:
            return False
    return True


# ---------------------------------------------------------------------------------------------------------------------

def find_eos(directory, ids):
    """The id that ends a text: the tokenizer's configuration names it, or the model's. None if neither does.

    ids: {token: id} of all tokens. Raises UserError.
    """
    known = set(ids.values())
    for file, key in (("tokenizer_config.json", "eos_token"), ("config.json", "eos_token_id")):
        path = directory / file
        if not is_there(path):
            continue
        try:
            eos = read_json(path).get(key)
        except (ValueError, AttributeError) as e:
            raise UserError(f"{path} is not a configuration that we can read: {e}") from None
        # A token is written as {"content": text} or as text, ids as a list or one.
        if isinstance(eos, dict):
            eos = eos.get("content")
        if isinstance(eos, str):
            eos = ids.get(eos)
        for i in eos if isinstance(eos, list) else [eos]:
            if type(i) is int and i in known:
                return i
    return None


def find_begin(spec, special):
    """The special tokens that stand before any text, as texts: its tokenizer.json says so, or its family does."""
    for step in steps(spec, "post_processor", "processors"):
        if step["type"] == "TemplateProcessing":
            before = itertools.takewhile(lambda piece: "SpecialToken" in piece, step["single"])
            return [piece["SpecialToken"]["id"] for piece in before]
    # Llama 3's.
    return [text for text in ("<|begin_of_text|>",) if text in special]


def bytes_to_unicode():
    """GPT-2's spelling of bytes: printable ones as themselves, the others from U+0100 on; {byte: character}."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable}
    for i, byte in enumerate(others):
        spelling[byte] = chr(256 + i)
    return spelling
