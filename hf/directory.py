"""What the commands do with a model directory: open it, find what ends an answer, copy the files beside a model."""

import json
from pathlib import Path

from hf.chat import CHAT_FORMATS
from hf.config import load_config
from hf.hub import find_directory
from hf.tokenizer import load_tokenizer
from hf.weights import load_model, weight_files
from runtime.process import UserError


# They go with a model as they are.
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
                   "added_tokens.json", "chat_template.jinja")


def open_model(path, tokenizer=None):
    """(directory, GPTConfig, Tokenizer) of a run, a model directory or a Hugging Face repository id.

    The weights must be there, but are not read. tokenizer: another one than the directory's. Raises UserError.
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
        weight_files(directory)
        config = load_config(directory)
    except (ValueError, OSError) as e:
        raise UserError(str(e)) from None
    tokenizer = load_tokenizer(tokenizer or directory)
    if tokenizer.n_vocab > config.vocab_size:
        raise UserError(f"{directory}: the tokenizer has {tokenizer.n_vocab} tokens, the model only "
                        f"{config.vocab_size}")
    return directory, config, tokenizer


def load_weights(directory):
    """The GPT of a directory, as `load_model`. Raises UserError."""
    try:
        return load_model(directory)
    except (ValueError, OSError) as e:
        raise UserError(str(e)) from None


def generation_config(directory):
    """The content of generation_config.json, {} if there is none. Raises UserError."""
    path = Path(directory, "generation_config.json")
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not a generation configuration that we can read: {e}") from None
    return content


def stop_ids(config, generation, tokenizer, chat_format):
    """Every id that ends an answer: those of config.json, generation_config.json, the tokenizer and the chat format."""
    eos = generation.get("eos_token_id")
    ids = list(config.eos_token_ids)
    ids += eos if isinstance(eos, list) else [eos]
    ids.append(tokenizer.eos_id)
    ids += [tokenizer.special[token] for token in CHAT_FORMATS[chat_format].tokens[-1:]]
    # In order, each once.
    return list(dict.fromkeys(i for i in ids if type(i) is int))


def files_beside_model(tokenizer, stop, generation):
    """{file name: bytes} of what goes with a trained model: the tokenizer's files, and a generation_config.json.

    generation: its content before; `stop` becomes its eos. What the chat format ends an answer with is in `stop`, so
    that other programs stop there too.
    """
    generation = {**generation, "eos_token_id": stop[0] if len(stop) == 1 else stop}
    files = {"generation_config.json": json.dumps(generation, indent=2).encode()}
    if tokenizer.path is None:
        # One of tiktoken's own has no file.
        return files
    files["tokenizer.json"] = tokenizer.path.read_bytes()
    for name in TOKENIZER_FILES:
        file = tokenizer.path.with_name(name)
        if file.is_file():
            files[name] = file.read_bytes()
    return files
