"""config.json: what its keys mean, and what is refused."""

import json

import pytest
import torch
from families import FAMILIES, SIZES, opened_by_transformers, theirs_of
from support import ASSETS, LLAMA, call, save_with_tokenizer, tiny

import hf


@pytest.mark.slow
def test_both_spellings_of_config_json_mean_the_same(tmp_path):
    theirs = theirs_of("llama-3.2")
    theirs.save_pretrained(tmp_path)                                      # transformers 5: rope_parameters, dtype
    path = tmp_path / "config.json"
    spec = json.loads(path.read_text())
    assert "rope_parameters" in spec and "dtype" in spec and "rope_theta" not in spec
    new = hf.load_model(tmp_path)
    rope = spec.pop("rope_parameters")
    path.write_text(json.dumps({**spec, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": spec.pop("dtype")}))
    old = hf.load_model(tmp_path)                                         # transformers 4
    assert old.config == new.config and new.config.rope_scaling and new.config.eos_token_ids == (3, 4)
    hf.save_model(old, tmp_path)
    ids = torch.randint(97, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(opened_by_transformers(tmp_path)(ids).logits, theirs(ids).logits)


def test_absent_keys_mean_what_the_family_s_own_programs_take_them_for():
    assert hf.config_from_dict({**LLAMA, "eos_token_id": None}).eos_token_ids == () and hf.config_from_dict(LLAMA).eos_token_ids == (3,)
    plain = {k: v for k, v in LLAMA.items() if k not in ("rope_theta", "num_key_value_heads", "tie_word_embeddings")}
    config = hf.config_from_dict(plain)                                   # as in the oldest files
    assert (config.rope_theta, config.n_kv_head, config.tie_embeddings, config.rope_scaling) == (10000.0, 4, False, None)
    config = hf.config_from_dict({**plain, "architectures": ["Qwen3ForCausalLM"]})
    assert config.head_dim == 128 and config.qk_norm and not config.tie_embeddings
    config = hf.config_from_dict({"architectures": ["GPT2LMHeadModel"], "vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 8})
    assert config.tie_embeddings and config.n_ff == 128 and config.norm_eps == 1e-5 and config.rope_theta is None


def test_a_new_model_is_a_llama():
    config = hf.llama_config(97, 2, 4, 64, 100, 3)
    assert (config.n_ff, config.max_positions, config.eos_token_ids, config.tie_embeddings, config.norm) == (192, 100, (3,), True, "rms")
    assert config == hf.config_from_dict(config.hf)
    with pytest.raises(ValueError, match="do not fit"):
        hf.llama_config(97, 2, 4, 12, 100, 3)


@pytest.mark.slow
@pytest.mark.parametrize("gated, change", [(True, {}), (False, {"architectures": ["GPT2LMHeadModel"], "hidden_act": "gelu_new"})])
def test_every_activation_that_is_accepted_is_what_the_mlp_computes(gated, change):
    from transformers.activations import ACT2FN
    mlp, x = tiny(**change).layers[0].mlp, torch.randn(5, 32)
    assert mlp.gated == gated
    for name in hf.config.ACTIVATIONS[gated]:
        inner = ACT2FN[name](mlp.gate_proj(x)) * mlp.up_proj(x) if gated else ACT2FN[name](mlp.up_proj(x))
        torch.testing.assert_close(mlp(x), mlp.down_proj(inner))


# ---------------------------------------------------------------------------------------------------------------------
# Sliding windows

def with_window(architecture, **window):
    return hf.config_from_dict({**LLAMA, "architectures": [architecture], **window})


def test_mistral_s_window_ends_its_positions():
    for window, expected in ((32, 32), (256, 256), (4096, 256), (None, 256)):
        assert with_window("MistralForCausalLM", sliding_window=window).max_positions == expected
    for positions, expected in ((256, 256), (32768, 4096)):               # the key is absent: transformers takes 4096
        assert with_window("MistralForCausalLM", max_position_embeddings=positions).max_positions == expected


def test_qwen_s_window_does_not_slide_unless_asked():
    for architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        assert with_window(architecture, sliding_window=32).max_positions == 256
        assert with_window(architecture, sliding_window=32, use_sliding_window=False).max_positions == 256
        with pytest.raises(ValueError, match="use_sliding_window True is not supported"):
            with_window(architecture, sliding_window=32, use_sliding_window=True)


def test_a_window_where_the_family_has_none_is_refused_if_it_would_slide():
    for architecture in ("LlamaForCausalLM", "GPT2LMHeadModel"):
        change = {"hidden_act": "gelu_new"} if architecture.startswith("GPT2") else {}
        for window in (None, 256, 4096):
            assert with_window(architecture, sliding_window=window, **change).max_positions == 256
        with pytest.raises(ValueError, match="sliding_window 255 is not supported; supported: null, or at least the 256"):
            with_window(architecture, sliding_window=255, **change)


def test_why_samples_end_at_the_window_is_said(tmp_path, monkeypatch, capsys):
    tokens = hf.load_tokenizer(ASSETS).n_vocab
    save_with_tokenizer(tiny(architectures=["MistralForCausalLM"], sliding_window=32, vocab_size=tokens), tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    command = ["--init", tmp_path / "model", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out", "--steps", 1]
    assert call(monkeypatch, *command, "--max-length", 33) == 2
    assert "expected at most 32, where the model's positions end (max_position_embeddings in its config.json, or sliding_window" in capsys.readouterr().err
    assert call(monkeypatch, *command, "--max-length", 32) == 0


@pytest.mark.slow
def test_mistral_is_transformers_as_far_as_its_window_and_no_further(tmp_path):
    theirs = theirs_of("mistral", sliding_window=32)
    theirs.save_pretrained(tmp_path)
    ours = hf.load_model(tmp_path)
    assert ours.config.max_positions == 32
    ids = torch.randint(97, (2, 33))
    with torch.no_grad():
        a, b = ours(ids), theirs(ids).logits
    torch.testing.assert_close(a[:, :32], b[:, :32], rtol=1e-4, atol=1e-4)
    assert (a[:, 32] - b[:, 32]).abs().max() > 0.1                        # the first token has left the window
    hf.save_model(ours, tmp_path / "saved")
    saved, spec = (json.loads((directory / "config.json").read_text()) for directory in (tmp_path / "saved", tmp_path))
    assert saved == spec and saved["sliding_window"] == 32 and saved["max_position_embeddings"] == 256


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

REFUSED = [({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*LlamaForCausalLM"), ({"architectures": None}, "None is not supported"),
           ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn.*llama3"), ({"rope_parameters": {"rope_type": "linear"}}, "linear"),
           ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}, "use_sliding_window"),
           ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"), ({"hidden_act": "relu"}, "relu.*silu"),
           ({"architectures": ["GPT2LMHeadModel"], "hidden_act": "relu2"}, "relu2.*gelu_new"),
           ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*gptq.*the model that this one was made from"), ({"partial_rotary_factor": 0.5}, "partial_rotary"),
           ({"vocab_size": None}, "vocab_size"), ({"num_hidden_layers": "a"}, "num_hidden_layers is 'a'"), ({"hidden_size": -1}, "hidden_size"),
           ({"num_key_value_heads": 3}, "do not fit"), ({"head_dim": 7}, "do not fit"), ({"rope_theta": 0}, "rope_theta"),
           ({"eos_token_id": "x"}, "eos_token_id"), ({"rope_scaling": {"rope_type": "llama3"}}, "factor is None"),
           ({"hidden_size": 64}, "does not fit its config.json"), ({"tie_word_embeddings": False}, "lm_head"),
           ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"), ({"attention_bias": 1}, "attention_bias is 1"),
           ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4, "original_max_position_embeddings": 64}},
            "low_freq_factor 4.0 is not below"), ({"max_position_embeddings": 2 ** 40}, "max_position_embeddings is 1099511627776"),
           ({"eos_token_id": 2 ** 40}, "eos_token_id is 1099511627776"), ({"sliding_window": 32}, "sliding_window 32"), ({"sliding_window": "a"}, "sliding_window is 'a'"),
           ({"architectures": ["GPT2LMHeadModel"], "hidden_act": "gelu_new", "num_attention_heads": 5}, "do not fit"),
           ({"scale_attn_weights": False}, "scale_attn_weights False"), ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
           ({"add_cross_attention": True}, "add_cross_attention True"), ({"rope_scaling": 3}, "rope_scaling .or rope_parameters. is 3"), ({"layer_types": 3}, "config.json: .*not iterable")]
# Sizes that would take this machine's memory, or its time, if a module were made of them.
REFUSED += [({key: value}, f"{key} is {value}") for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
                                                           "num_attention_heads") for value in (2 ** 31, 10 ** 18)]
REFUSED += [({"num_attention_heads": 2 ** 20, "num_key_value_heads": 1, "head_dim": 2 ** 20}, "do not fit")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    hf.save_model(tiny(), directory)
    return directory


@pytest.mark.parametrize("change,words", REFUSED, ids=[words for _, words in REFUSED])
def test_what_is_not_supported_is_refused_by_name(saved, tmp_path, change, words):
    spec = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**spec, **change}))
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=words):
        hf.load_model(tmp_path)


def test_every_family_has_a_test():
    assert {name for name, _ in FAMILIES.values()} == {name.removesuffix("ForCausalLM").removesuffix("LMHeadModel") for name in hf.config.FAMILIES}
    assert SIZES["max_position_embeddings"] == LLAMA["max_position_embeddings"]
