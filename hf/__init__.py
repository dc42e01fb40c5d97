"""Hugging Face's formats, in and out: config.json, safetensors, tokenizer.json, chat formats, the hub.

    import hf
    model = hf.load_model("HuggingFaceTB/SmolLM2-135M")
    hf.save_model(model, "copy")
"""
# ruff: noqa: F401

from hf.adapter import adapter_files, fill_adapter, open_adapter, save_adapter
from hf.chat import CHAT_FORMATS, ChatFormat, Turn, begin_ids, load_chat_format, read_template, untrained_tokens
from hf.config import config_from_dict, llama_config, load_config
from hf.directory import files_beside_model, fill_weights, generation_config, load_weights, open_model, stop_ids
from hf.hub import find_directory
from hf.tokenizer import Tokenizer, bytes_to_unicode, find_eos, load_tokenizer
from hf.weights import load_model, save_model, untrained_rows, weight_files
