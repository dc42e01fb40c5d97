"""BPE with byte fallback, as Llama 2 and Mistral have it (SentencePiece's, in a tokenizer.json): computed by Hugging
Face's `tokenizers`."""

import json
import re

from runtime.process import UserError


SPACE = "\u2581"                                  # how a space is spelled in a token
BYTE = re.compile("<0x([0-9A-F]{2})>")            # and a byte


class ByteFallbackBPE:
    """encode(text, follows) -> ids; bytes: {id: what it stands for}; adds_space: whether a text gets one in front.

    Such a tokenizer puts a space before a text: before every text between two added tokens, or only before the first,
    and never in the middle of one. So a text that is encoded in parts needs to be told what each part follows. Which it
    does is read from tokenizer.json. (transformers 5 goes by `legacy` in tokenizer_config.json where that names the
    class LlamaTokenizer, and may differ from the file at the beginning of a text.)

    model, normalizers, pre_tokenizers: these parts of a tokenizer.json, the latter two as lists of steps. never_text:
    the special tokens, which no text may become. Raises UserError where `tokenizers` is not installed.
    """

    def __init__(self, model, normalizers, pre_tokenizers, never_text, path):
        try:
            import tokenizers
        except ImportError:
            raise UserError(f'{path} is a tokenizer like that of Llama 2 or Mistral: pip install -e ".[tokenizers]"') \
                from None
        merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
        # Some files have merges that make "</s>" of letters.
        model = {**model, "merges": [merge for merge in merges if "".join(merge) not in never_text]}
        self.library = {}                         # {what a text follows: the tokenizer for it}
        for follows in ("nothing", "token", "text"):
            # Without added tokens: text between them comes here.
            spec = {"version": "1.0", "model": model, "added_tokens": [],
                    "normalizer": {"type": "Sequence", "normalizers": normalizers_after(follows, normalizers)},
                    "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts_after(follows, pre_tokenizers)}}
            try:
                self.library[follows] = tokenizers.Tokenizer.from_str(json.dumps(spec))
            except Exception as e:
                # The library raises no other kind.
                raise ValueError(str(e)) from None
        self.adds_space = (normalizers_after("text", normalizers) != normalizers
                           or cuts_after("text", pre_tokenizers) != pre_tokenizers)
        self.bytes = {i: bytes_of(token) for token, i in model["vocab"].items()}

    def encode(self, text, follows):
        # Half a surrogate pair is no character: U+FFFD, as tiktoken has it.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.library[follows].encode(text, add_special_tokens=False).ids


def normalizers_after(follows, normalizers):
    if follows != "text":
        return normalizers
    return [step for step in normalizers if step["type"] != "Prepend"]


def cuts_after(follows, pre_tokenizers):
    cuts = []
    for step in pre_tokenizers:
        if step["type"] == "Metaspace":
            first_only = step.get("prepend_scheme") == "first"
            if follows == "text" or (follows == "token" and first_only):
                step = {**step, "prepend_scheme": "never"}
        cuts.append(step)
    return cuts


def bytes_of(token):
    if byte := BYTE.fullmatch(token):
        return bytes.fromhex(byte[1])
    return token.replace(SPACE, " ").encode()
