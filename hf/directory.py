"""What the commands do with a model directory: open it, find what ends an answer, copy the files beside a model."""

import json
from pathlib import Path

from hf.config import load_config
from hf.hub import find_directory
from hf.reading import is_there, read_file, read_json
from hf.tokenizer import load_tokenizer
from hf.weights import check_dtypes, fill_model, load_model, weight_files
from runtime.process import UserError
from runtime.sharding import as_rows_of


def open_model(path, tokenizer=None):
    """(directory, GPTConfig, Tokenizer) of a run, a model directory or a Hugging Face repository id.

    The weights must be there, but of their files only the headers are read. tokenizer: another one than the
    directory's. Raises UserError.
    """
    is_run = Path(path, "model").is_dir()
    is_model = Path(path, "config.json").is_file()
    runs_inside = sorted(file.parents[1] for file in Path(path).glob("*/model/config.json"))
    if runs_inside and not is_run and not is_model:
        raise UserError(f"{path} holds several runs; expected some of {', '.join(map(str, runs_inside))}")
    try:
        if Path(path, "model", "config.json").is_file():
            directory = Path(path, "model")
        else:
            directory = find_directory(path)
        files = weight_files(directory)
        config = load_config(directory)
        check_dtypes(files)
    except (ValueError, OSError) as e:
        raise UserError(str(e)) from None
    tokenizer = load_tokenizer(tokenizer or directory)
    check_vocabulary(directory, config, tokenizer)
    return directory, config, tokenizer


def check_vocabulary(directory, config, tokenizer):
    """Raises UserError if the tokenizer has tokens that the model has no row for."""
    missing = {i: text for i, text in tokenizer.bytes.items() if i >= config.vocab_size}
    if not missing:
        return
    names = ", ".join(f"{missing[i].decode(errors='replace')} ({i})" for i in sorted(missing)[:5])
    if len(missing) > 5:
        names += f" and {len(missing) - 5} more"
    added = {token.id for token in tokenizer.added_tokens.values() if token.special}
    needed = {tokenizer.eos_id, *(tokenizer.special.get(text) for text in tokenizer.begin)}
    advice = "expected the tokenizer that the model was trained with (--tokenizer)"
    if tokenizer.path and missing.keys() <= added - needed:
        advice = (f"no text needs that: unless the chat template writes it, remove it from added_tokens in "
                  f"{tokenizer.path}")
    raise UserError(f"{directory}: the tokenizer has tokens beyond the model's {config.vocab_size}: {names}; {advice}")


def load_weights(directory):
    """The GPT of a directory, as `load_model`. Raises UserError."""
    try:
        return load_model(directory)
    except (ValueError, OSError) as e:
        raise UserError(str(e)) from None


def fill_weights(model, directory, device):
    """Gives a model on "meta", sharded or not, the weights of a directory: on each rank its rows, in the dtypes that
    its parameters have. Raises UserError."""
    try:
        fill_model(model, directory, lambda rows, p: as_rows_of(p, rows, device))
    except (ValueError, OSError) as e:
        raise UserError(str(e)) from None


def generation_config(directory):
    """The content of generation_config.json, {} if there is none. Raises UserError."""
    path = Path(directory, "generation_config.json")
    if not is_there(path):
        return {}
    check_content(path, is_generation_config, "an object with some of the keys "
                  f"{', '.join(GENERATION_KEYS)}, or of numbers alone")
    return read_json(path)


def stop_ids(config, generation, tokenizer, chat_format):
    """Every id that ends an answer: those of config.json, generation_config.json, the tokenizer and the chat format."""
    eos = generation.get("eos_token_id")
    ids = list(config.eos_token_ids)
    ids += eos if isinstance(eos, list) else [eos]
    ids.append(tokenizer.eos_id)
    ids.append(chat_format.end)
    # In order, each once.
    return list(dict.fromkeys(i for i in ids if type(i) is int))


# ---------------------------------------------------------------------------------------------------------------------
# What goes with a model as it is. In a directory that others made a link may lead to any file of the user's, a key or a
# password, and a trained model may be published: what is not what its name says does not go with it.

# Keys that no other kind of file has.
GENERATION_KEYS = ("eos_token_id", "bos_token_id", "pad_token_id", "_from_model_config", "transformers_version")
TOKENIZER_KEYS = ("tokenizer_class", "model_max_length", "bos_token", "eos_token", "pad_token", "unk_token",
                  "added_tokens_decoder", "chat_template", "add_prefix_space", "clean_up_tokenization_spaces")
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
                  "additional_special_tokens")


def is_generation_config(path):
    content = read_json(path)
    if has_some_of(GENERATION_KEYS, content):
        return True
    # A temperature alone keeps no secret. (It may stand beside the key of a paid service.)
    return isinstance(content, dict) and not any(isinstance(value, (str, list, dict)) for value in content.values())


def is_tokenizer_config(path):
    return has_some_of(TOKENIZER_KEYS, read_json(path))


def has_some_of(keys, content):
    # An empty object keeps no secret.
    return isinstance(content, dict) and (not content or not content.keys().isdisjoint(keys))


def is_special_tokens_map(path):
    content = read_json(path)
    return isinstance(content, dict) and all(key in SPECIAL_TOKENS or is_token(value) for key, value in content.items())


def is_token(value):
    """Whether this looks like a token, <image> or [IMG], and not like a secret. Models name some tokens themselves."""
    text = value.get("content") if isinstance(value, dict) else value
    return isinstance(text, str) and len(text) < 50 and text[:1] + text[-1:] in ("<>", "[]")


def is_vocabulary(path):
    content = read_json(path)
    return isinstance(content, dict) and all(type(i) is int for i in content.values())


def is_list_of_merges(path):
    lines = read_file(path).decode().removesuffix("\n").split("\n")
    if lines[0].startswith("#version"):
        del lines[0]
    return all(len(line.split(" ")) == 2 for line in lines if line)


# {name: (whether a file is one, what is expected)}
TOKENIZER_FILES = {
    "tokenizer_config.json": (is_tokenizer_config, f"an object with some of the keys {', '.join(TOKENIZER_KEYS)}"),
    "special_tokens_map.json": (is_special_tokens_map, "an object of tokens and their names"),
    "vocab.json": (is_vocabulary, "an object of tokens and their ids"),
    "added_tokens.json": (is_vocabulary, "an object of tokens and their ids"),
    "merges.txt": (is_list_of_merges, "two pieces of a token a line, after #version if that is there"),
}


def check_content(path, is_one, expected):
    """Raises UserError where is_one(path) does, or says no."""
    reason = ""
    try:
        if is_one(path):
            return
    except ValueError as e:
        reason = f" ({e})"
    raise UserError(f"{path} is not what its name says{reason}; expected {expected}")


def files_beside_model(tokenizer, stop, generation, template=None):
    """{file name: bytes} of what goes with a trained model: the tokenizer's files, a generation_config.json, and the
    chat template that it was trained in (None: none).

    generation: its content before; `stop` becomes its eos. What the chat format ends an answer with is in `stop`, so
    that other programs stop there too. Raises UserError for a file that is not what its name says.
    """
    generation = {**generation, "eos_token_id": stop[0] if len(stop) == 1 else stop}
    files = {"generation_config.json": json.dumps(generation, indent=2).encode()}
    if tokenizer.path is None:
        # One of tiktoken's own has no file.
        return files
    files["tokenizer.json"] = read_file(tokenizer.path)
    for name, (is_one, expected) in TOKENIZER_FILES.items():
        file = tokenizer.path.with_name(name)
        if is_there(file):
            check_content(file, is_one, expected)
            files[name] = read_file(file)
    if template is not None:
        files["chat_template.jinja"] = template.encode()
        # Older programs look for it here.
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
        files["tokenizer_config.json"] = json.dumps({**config, "chat_template": template}, indent=2).encode()
    return files
