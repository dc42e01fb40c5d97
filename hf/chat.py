"""Conversations to token ids: ChatML (SmolLM2, Qwen), Llama 3's chat format, and a plain one for any tokenizer."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from runtime.process import UserError


class ChatFormat(NamedTuple):
    """What stands around the text of a turn: special tokens ("<|...|>") and texts, in which {role} is the role."""
    tokens: tuple = ()               # special tokens that it needs; the last one ends a response (without any: eos)
    begin: tuple = ()                # before the first turn
    header: tuple = ()               # before a turn
    opening: str = ""                # the last text before that of the turn
    end: tuple = ()                  # after a turn, but for the assistant's
    after_response: tuple = ()       # after an assistant's turn and the token that ends it
    strip: bool = False              # whether white space around the text goes


CHAT_FORMATS = {
    "plain": ChatFormat(end=("\n",)),
    "chatml": ChatFormat(
        tokens=("<|im_start|>", "<|im_end|>"),
        header=("<|im_start|>",), opening="{role}\n", end=("<|im_end|>", "\n"), after_response=("\n",)),
    "llama3": ChatFormat(
        tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        begin=("<|begin_of_text|>",), header=("<|start_header_id|>", "{role}", "<|end_header_id|>"), opening="\n\n",
        end=("<|eot_id|>",), strip=True),
}


def find_format(name, tokenizer):
    """The chat format of --chat-format. "auto": llama3, chatml or plain, the first of them whose special tokens the
    tokenizer has. Raises UserError."""
    if name == "auto":
        for name in reversed(CHAT_FORMATS):
            if set(CHAT_FORMATS[name].tokens) <= tokenizer.special.keys():
                return name
    for token in CHAT_FORMATS[name].tokens:
        if token not in tokenizer.special:
            raise UserError(f"chat format {name} needs the special token {token}, which the tokenizer lacks")
    return name


def begin_ids(tokenizer):
    """What stands before any text: Llama 3's <|begin_of_text|>, Mistral's <s>; nothing for models that have none."""
    return [tokenizer.special[token] for token in tokenizer.begin]


def encode_turns(messages, tokenizer, chat_format="plain"):
    """(ids, whether each is response) of a conversation, [(role, text), ...]; role None is bare text and an eos.

    A last turn of the assistant whose text is None is the one that a model is to write.
    """
    form = CHAT_FORMATS[chat_format]
    end_of_response = tokenizer.special[form.tokens[-1]] if form.tokens else tokenizer.eos_id
    pieces = [(encode_parts(form.begin, None, tokenizer), False)]         # (ids, whether they are response)
    for role, text in messages:
        if role is None:
            pieces.append((tokenizer.encode(text) + [tokenizer.eos_id], True))
            break
        if form.strip and text is not None:
            text = text.strip()
        header = encode_parts(form.header, role, tokenizer)
        opening = form.opening.format(role=role)
        if role != "assistant":
            end = encode_parts(form.end, role, tokenizer)
            pieces.append((header + tokenizer.encode(opening + text) + end, False))
            continue
        # A response begins at a token boundary, as it does when the model writes it: the opening is encoded apart.
        pieces.append((header + tokenizer.encode(opening), False))
        if text is not None:
            pieces.append((tokenizer.encode(text) + [end_of_response], True))
            pieces.append((encode_parts(form.after_response, role, tokenizer), False))
    ids, response = [], []
    for piece, is_response in pieces:
        ids += piece
        response += [is_response] * len(piece)
    return ids, response


def encode_parts(parts, role, tokenizer):
    """The ids of special tokens and texts of a ChatFormat, one after the other."""
    ids = []
    for part in parts:
        if part.startswith("<|"):
            ids.append(tokenizer.special[part])
        else:
            ids += tokenizer.encode(part.format(role=role))
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# The model's own template, for comparison

# A template is a program that we did not write: it runs in a sandbox, in a process of its own, in bounded time and
# memory. Windows has no module `resource`: there only the time is bounded.
RENDER = """
import json, sys, time
from jinja2 import sandbox  # which torch brings
try:
    import resource
except ImportError:
    resource = None
if resource:
    resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
    resource.setrlimit(resource.RLIMIT_AS, (2 ** 30, 2 ** 30))
template, names = json.load(sys.stdin)
environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])
print(json.dumps(environment.from_string(template).render(strftime_now=time.strftime, **names)))
"""
RENDER_SECONDS = 60


def compare_template(directory, tokenizer, chat_format):
    """What the chat template of a model directory makes of a question and its answer and we do not, in a sentence;
    None if they agree or it has no template."""
    turns = [("user", "QUESTION"), ("assistant", "ANSWER")]
    try:
        template = read_template(Path(directory))
        if template is None:
            return None
        ids, _ = encode_turns(turns, tokenizer, chat_format)
        ours = tokenizer.decode(ids)
        theirs = render(template, turns, tokenizer)
    except Exception as e:
        # Whatever a program of others may do: bugs and all.
        return (f"{directory}: its chat template could not be rendered ({str(e)[:200]}); chat format {chat_format} may "
                "differ")
    if ours == theirs:
        return None
    return f"{directory}: its chat template would write {theirs[:500]!r}, chat format {chat_format} writes {ours!r}"


def read_template(directory):
    """The chat template of a model directory, None if it has none. Raises exceptions of several kinds."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config = directory / "tokenizer_config.json"
    if not config.is_file():
        return None
    template = json.loads(config.read_bytes()).get("chat_template")
    if isinstance(template, list):
        # There are several, by name.
        return next(entry["template"] for entry in template if entry["name"] == "default")
    return template


def render(template, turns, tokenizer):
    """What the template writes. Raises exceptions of several kinds."""
    bos_token = "<|begin_of_text|>"
    names = {
        "messages": [{"role": role, "content": text} for role, text in turns],
        "tools": None,
        "documents": None,
        "bos_token": bos_token if bos_token in tokenizer.special else "",
    }
    done = subprocess.run([sys.executable, "-c", RENDER], input=json.dumps([template, names]), text=True,
                          capture_output=True, timeout=RENDER_SECONDS)
    if done.returncode != 0:
        words = done.stderr.strip() or f"exit code {done.returncode}"
        raise ValueError(words.splitlines()[-1])
    return json.loads(done.stdout)
