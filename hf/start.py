"""What a run of train.py starts from: --init, --adapter, --tokenizer and --chat-format."""

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from hf.adapter import Adapter, adapter_files, open_adapter
from hf.chat import ChatFormat, load_chat_format, read_template, untrained_tokens
from hf.config import llama_config
from hf.directory import files_beside_model, generation_config, open_model, stop_ids
from hf.tokenizer import Tokenizer, load_tokenizer
from hf.weights import weight_files
from model import GPTConfig
from runtime.process import UserError


class Start(NamedTuple):
    config: GPTConfig
    tokenizer: Tokenizer
    chat_format: ChatFormat
    directory: Path | None           # of the model; None: random weights
    adapter: Adapter | None
    files: dict                      # {name: [paths]} that were read, whose digests go into config.json


def open_start(settings):
    """The Start of --init, the weights unread. Raises UserError."""
    files = {"data": settings.data}
    if settings.val_data:
        files["val_data"] = settings.val_data
    adapter = None
    if settings.init == "scratch":
        if not settings.tokenizer:
            raise UserError("--init scratch needs --tokenizer: a directory with tokenizer.json, or a tiktoken name")
        directory, tokenizer = None, load_tokenizer(settings.tokenizer)
        config = scratch_config(settings, tokenizer)
    else:
        directory, config, tokenizer = open_model(settings.init, settings.tokenizer)
        check_apart(settings.out, directory, "the model of --init")
        files["init"] = [directory / "config.json", *weight_files(directory)]
        if settings.adapter:
            adapter = open_adapter(settings.adapter, config)
            check_apart(settings.out, adapter.directory, "the adapters of --adapter")
            files["adapter"] = adapter_files(adapter.directory)
    if tokenizer.path:
        files["tokenizer"] = [tokenizer.path]
        # They name the end of a text, and have the chat template.
        beside = [tokenizer.path.with_name(name) for name in ("tokenizer_config.json", "chat_template.jinja")]
        files["tokenizer"] += [path for path in beside if path.is_file()]
    chat_format = load_chat_format(None if settings.tokenizer else directory, tokenizer, settings.chat_format)
    return Start(config, tokenizer, chat_format, directory, adapter, files)


def check_apart(out, directory, what):
    """Raises UserError where a run into `out` would write over what it starts from."""
    out, directory = Path(out), directory.resolve()
    if out.resolve() in (directory, *directory.parents):
        raise UserError(f"--out {out} holds {what}; expected another directory")


def scratch_config(settings, tokenizer):
    """The configuration of a model with random weights. Raises UserError."""
    try:
        return llama_config(tokenizer.n_vocab, settings.n_layer, settings.n_head, settings.n_embd,
                            settings.max_length or 2048, tokenizer.eos_id)
    except ValueError as e:
        raise UserError(f"--init scratch: {e}") from None


def check_base(settings, start):
    """Raises UserError where --adapter is merged into --init already: a run has both, RUN/adapter and RUN/model."""
    adapter = start.adapter
    if adapter is None or is_base_of(settings, start):
        return
    if start.directory.resolve() == adapter.directory.resolve().parent / "model":
        trained_on = f", {adapter.base}" if adapter.base else ""
        raise UserError(f"--init {settings.init} has --adapter {settings.adapter} merged into it already; expected the "
                        f"model that the adapter was trained on{trained_on}, or no --adapter")


def is_base_of(settings, start):
    """Whether --init is what --adapter says that it was trained on."""
    base = start.adapter.base
    return bool(base) and os.path.abspath(base) == os.path.abspath(name_of_base(settings.init, start.directory))


def name_of_base(init, directory):
    """What an adapter calls the model that it was trained on: a repository id, or the directory."""
    return str(directory) if Path(init).is_dir() else init


def settings_of_adapter(settings, adapter):
    """The settings with the rank and alpha of --adapter, and its directory. Raises UserError where others were asked
    for."""
    if adapter is None:
        return settings
    flags = {"--lora-rank": (settings.lora_rank, adapter.rank), "--lora-alpha": (settings.lora_alpha, adapter.alpha)}
    for name, (asked, has) in flags.items():
        if asked not in (0, has):
            raise UserError(f"{name} is {asked}, in --adapter {settings.adapter} it is {has}; expected that, or no "
                            "flag")
    return replace(settings, adapter=str(adapter.directory), lora_rank=adapter.rank, lora_alpha=adapter.alpha)


def warnings_of(settings, start):
    """Sentences about what may not be meant."""
    warnings = []
    adapter, chat_format = start.adapter, start.chat_format
    if not start.tokenizer.path:
        warnings.append(f"{settings.tokenizer} is one of tiktoken's own: the model is saved without a tokenizer.json")
    if adapter and adapter.base and not is_base_of(settings, start):
        base = name_of_base(settings.init, start.directory)
        warnings.append(f"{settings.adapter} says that it was trained on {adapter.base}; --init is {base}")
    if chat_format.warning:
        warnings.append(chat_format.warning)
    if adapter:
        warnings += warnings_of_template(adapter.directory, chat_format)
    if settings.lora_rank:
        # Adapters leave the embedding as it is: tokens that were never trained are never learnt.
        untrained = untrained_tokens(start.directory, start.tokenizer, chat_format.tokens)
        if untrained:
            warnings.append(f"{start.directory}: the rows of {', '.join(untrained)} are near zero, as if never "
                            "trained, and stay frozen under --lora-rank: the model can neither read nor write them; "
                            "expected another --chat-format (plain), or full fine-tuning")
    return warnings


def warnings_of_template(directory, chat_format):
    """Of an adapter's directory: other programs save the chat template that it was trained in beside it."""
    try:
        template = read_template(directory)
    except UserError as e:
        # It is not the one that is used.
        return [str(e)]
    if template is None or template == chat_format.template:
        return []
    return [f"{directory} has a chat template of its own, and {chat_format.where} is used: the adapters may not know "
            f"it; --tokenizer {directory} takes theirs, --chat-format one of ours"]


def files_of_the_model(start):
    """{file name: bytes} that go with the trained model: the tokenizer's, and where an answer ends."""
    generation = generation_config(start.directory) if start.directory else {}
    stop = stop_ids(start.config, generation, start.tokenizer, start.chat_format)
    return files_beside_model(start.tokenizer, stop, generation, start.chat_format.template)
