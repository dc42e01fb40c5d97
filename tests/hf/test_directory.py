"""What is said of directories that no model can be opened from."""

import json

import pytest
import torch
from support import ASSETS, save_with_tokenizer, tiny

import hf
from runtime.files import load_safetensors, save_safetensors
from runtime.process import UserError


TOKENS = hf.load_tokenizer(ASSETS).n_vocab


@pytest.fixture
def directory(tmp_path):
    save_with_tokenizer(tiny(vocab_size=TOKENS), tmp_path)
    return tmp_path


NO_MODEL = {
    "nothing": ([], "no model there; expected config.json and model.safetensors"),
    "a pickle": (["config.json", "pytorch_model.bin"], "no model there, but pytorch_model.bin, a pickle, .*expected safetensors files, which transformers'"),
    "shards of it": (["config.json", "pytorch_model-00001-of-00002.bin"], "no model there, but pytorch_model-00001-of-00002.bin, a pickle"),
    "GGUF": (["model-q4.gguf"], "no model there, but model-q4.gguf, which is not read; expected safetensors files"),
    "an adapter": (["adapter_config.json", "adapter_model.safetensors"], "no model there, but adapter_config.json, an adapter of PEFT's; .*merge_and_unload"),
    "a stopped run": (["config.json", "checkpoint"], "no model there, but checkpoint, of a run that has not finished; .*goes on with it"),
    "weights alone": (["model.safetensors"], "no model there; expected config.json"),
}


@pytest.mark.parametrize("case", NO_MODEL)
def test_what_is_there_instead_of_a_model_is_named(tmp_path, case):
    names, words = NO_MODEL[case]
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=words):
        hf.open_model(tmp_path)


def test_a_file_is_no_directory(directory):
    with pytest.raises(UserError, match="model.safetensors is a file; expected the directory of a model"):
        hf.open_model(directory / "model.safetensors")


def test_a_model_of_another_family_is_named(directory):
    path = directory / "config.json"
    spec = json.loads(path.read_text())
    for architecture in ("Gemma2ForCausalLM", "Phi3ForCausalLM", "MixtralForCausalLM"):
        path.write_text(json.dumps({**spec, "architectures": [architecture]}))
        with pytest.raises(UserError, match=f"config.json: architecture {architecture} is not supported; supported: GPT2LMHeadModel, Llama"):
            hf.open_model(directory)


def test_a_directory_without_tokenizer_json_is_told_how_to_get_one(directory):
    (directory / "tokenizer.json").rename(directory / "tokenizer.model")
    with pytest.raises(UserError, match="tokenizer.json: no such file; expected one, which transformers' AutoTokenizer"):
        hf.open_model(directory)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int32, torch.uint8])
def test_quantised_weights_are_named_before_they_are_read(directory, dtype):
    path = directory / "model.safetensors"
    tensors = load_safetensors(path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_safetensors({**tensors, name: tensors[name].to(dtype)}, path)
    for load in (hf.open_model, hf.load_weights):
        with pytest.raises(UserError, match=f"model.safetensors: {name} is {dtype}; supported: float32, float16, bfloat16"):
            load(directory)
    spec = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**spec, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UserError, match="config.json: quantization_config .*fp8.* is not supported; expected weights in float32"):
        hf.open_model(directory)


def test_tokens_that_the_model_has_no_row_for_are_named(directory):
    path = directory / "tokenizer.json"
    spec = json.loads(path.read_text())
    pad = {**spec["added_tokens"][0], "id": TOKENS, "content": "[PAD]"}

    def write(*added):
        path.write_text(json.dumps({**spec, "added_tokens": [*spec["added_tokens"], *added]}))

    write(pad)
    with pytest.raises(UserError, match=r"tokens beyond the model's \d+: \[PAD\] \(\d+\); no text needs that: .*remove it from added_tokens in .*tokenizer.json"):
        hf.open_model(directory)
    # Text that spells the first becomes it, and the second ends every text.
    write({**pad, "special": False})
    with pytest.raises(UserError, match=r"\[PAD\] \(\d+\); expected the tokenizer that the model was trained with"):
        hf.open_model(directory)
    write(pad)
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[PAD]"}))
    with pytest.raises(UserError, match=r"\[PAD\] \(\d+\); expected the tokenizer that"):
        hf.open_model(directory)
    write(*({**pad, "id": TOKENS + i, "content": f"<{i}>"} for i in range(7)))
    with pytest.raises(UserError, match=r"<0> \(\d+\), .*<4> \(\d+\) and 2 more; no text needs"):
        hf.open_model(directory)
    write()                                                               # removed, as the message says
    assert hf.open_model(directory)[2].n_vocab == TOKENS
