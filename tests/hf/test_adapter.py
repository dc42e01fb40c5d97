"""Adapters against PEFT: ours in PEFT's hands, PEFT's in ours, and those that we cannot go on from."""

import json

import pytest
import torch
from families import FAMILIES, equal_tensors, opened_by_transformers, theirs_of
from support import tiny

import hf
from runtime.files import load_safetensors, save_safetensors
from runtime.process import UserError


GPT2 = {"architectures": ["GPT2LMHeadModel"], "hidden_act": "gelu_new"}
A, B = "adapter_model.safetensors", "adapter_config.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def with_adapters(model, rank=3, alpha=5.0):
    """Alpha / rank is rounded, and is not 2."""
    model.add_lora(rank, alpha)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def filled(model, directory):
    """The model with the adapters of a directory."""
    adapter = hf.open_adapter(directory, model.config)
    model.add_lora(adapter.rank, adapter.alpha)
    hf.fill_adapter(model, directory)
    return model


def change(directory, options=None, tensors=lambda tensors: None):
    """Rewrites an adapter, with these options, and its tensors as the function changes them."""
    config = json.loads((directory / B).read_text())
    (directory / B).write_text(json.dumps({**config, **(options or {})}))
    found = load_safetensors(directory / A)
    tensors(found)
    save_safetensors(found, directory / A)


# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", [{}, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("rank, alpha", [(1, 2), (3, 5.0), (7, 0.1)])
def test_what_is_saved_is_loaded_to_the_bit(family, rank, alpha, tmp_path):
    model = with_adapters(tiny(**family), rank, alpha)
    hf.save_adapter(model, tmp_path, "the base")
    adapter = hf.open_adapter(tmp_path, model.config)
    assert (adapter.rank, adapter.alpha, adapter.base) == (rank, alpha, "the base")
    again = filled(tiny(**family), tmp_path)
    assert equal_tensors(again.state_dict(), model.state_dict())
    ids = torch.randint(97, (2, 20))
    assert torch.equal(again(ids), model(ids)) and not torch.allclose(again(ids), tiny(**family)(ids))
    assert {t.dtype for t in load_safetensors(tmp_path / A).values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_gives_our_adapters_the_logits_of_the_merged_model(family, tmp_path):
    import peft
    theirs_of(family).save_pretrained(tmp_path / "base")
    model = with_adapters(hf.load_model(tmp_path / "base"))
    hf.save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    hf.save_model(model, tmp_path / "merged")
    # It finds the base by its name, too, and has nothing to put right.
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert theirs.peft_config["default"].fan_in_fan_out == json.loads((tmp_path / "adapter" / B).read_text())["fan_in_fan_out"]
    ids = torch.randint(97, (2, 30))
    with torch.no_grad():
        logits = theirs(ids).logits
        torch.testing.assert_close(logits, opened_by_transformers(tmp_path / "merged")(ids).logits, rtol=1e-4, atol=1e-4)
        assert (logits - opened_by_transformers(tmp_path / "base")(ids).logits).abs().max() > 0.1
    # What PEFT makes of it is still one of ours.
    theirs.save_pretrained(tmp_path / "again")
    assert equal_tensors(filled(hf.load_model(tmp_path / "base"), tmp_path / "again").state_dict(), model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_our_model_with_an_adapter_of_peft_has_its_logits(family, tmp_path):
    import peft
    theirs_of(family).save_pretrained(tmp_path / "base")
    options = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", lora_dropout=0.1, init_lora_weights=False)
    theirs = peft.get_peft_model(opened_by_transformers(tmp_path / "base"), options).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model = filled(hf.load_model(tmp_path / "base"), tmp_path / "adapter")
    ids = torch.randint(97, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    # Queries, keys and values of GPT-2 had one A; from here on each has its own.
    attention = model.layers[0].self_attn
    attention.q_proj.lora_a.data += 1
    assert not torch.equal(attention.q_proj.lora_a, attention.k_proj.lora_a)
    assert torch.equal(attention.k_proj.lora_a, attention.v_proj.lora_a) == family.startswith("gpt2")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_of_half_precision_are_trained_in_float32(dtype, tmp_path):
    model = with_adapters(tiny())
    hf.save_adapter(model, tmp_path, None)
    change(tmp_path, tensors=lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    again = filled(tiny(), tmp_path)
    for name, p in model.named_parameters():
        expected = p.to(dtype).float() if ".lora_" in name else p
        assert torch.equal(again.get_parameter(name), expected)


SEVEN = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
OF_PEFT = {                                                               # options of PEFT's, whether we can go on from it
    "nothing": ({}, True), "gaussian": ({"init_lora_weights": "gaussian"}, True), "orthogonal": ({"init_lora_weights": "orthogonal", "r": 4}, True),
    "rsLoRA": ({"use_rslora": True, "lora_alpha": 5}, True), "DoRA": ({"use_dora": True}, False), "PiSSA": ({"init_lora_weights": "pissa"}, False),
    "OLoRA": ({"init_lora_weights": "olora"}, False), "a whole head": ({"modules_to_save": ["lm_head"]}, False),
    "biases": ({"bias": "all"}, False), "biases of B": ({"lora_bias": True}, False), "tokens": ({"trainable_token_indices": [1, 2]}, False),
    "the rank of all": ({"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.self_attn.k_proj": 8, "up_proj": 8}}, True),
    "a rank": ({"rank_pattern": {"q_proj": 2}}, False), "an alpha": ({"alpha_pattern": {"q_proj": 2}}, False),
    "two of seven": ({"target_modules": ["q_proj", "v_proj"]}, False), "a layer": ({"target_modules": SEVEN, "layers_to_transform": [0]}, False),
    "the head": ({"target_modules": "(.*_proj)|lm_head"}, False)}


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_PEFT)
def test_an_adapter_of_peft_has_its_logits_or_is_refused(case, tmp_path):
    """What PEFT's options change, by the files that it writes."""
    import peft
    options, is_supported = OF_PEFT[case]
    theirs_of("llama-biases").save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(opened_by_transformers(tmp_path / "base"), peft.LoraConfig(**{"r": 3, "target_modules": SEVEN, **options}))
    for p in theirs.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    model = hf.load_model(tmp_path / "base")
    if not is_supported:
        with pytest.raises(UserError, match="expected (LoRA on all linear layers|the same rank and alpha)"):
            hf.open_adapter(tmp_path / "adapter", model.config)
        return
    again = peft.PeftModel.from_pretrained(opened_by_transformers(tmp_path / "base"), tmp_path / "adapter").eval()
    ids = torch.randint(97, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(filled(model, tmp_path / "adapter")(ids), again(ids).logits, rtol=1e-4, atol=1e-4)
        # Nor does PEFT find anything else in what we save of it.
        hf.save_adapter(model, tmp_path / "ours", None)
        ours = peft.PeftModel.from_pretrained(opened_by_transformers(tmp_path / "base"), tmp_path / "ours").eval()
        torch.testing.assert_close(ours(ids).logits, again(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [{}, GPT2], ids=["llama", "gpt2"])
def test_the_scale_of_rslora_is_an_alpha_of_ours(family, tmp_path):
    """It is alpha / sqrt(rank)."""
    config = tiny(**family).config
    hf.save_adapter(with_adapters(tiny(**family), 4, 5.0), tmp_path, None)
    change(tmp_path, {"use_rslora": True})
    if family:
        # Three times rank and alpha have another scale than the other layers.
        with pytest.raises(UserError, match="rank_pattern is {'c_attn': 12} .*; expected the same rank and alpha for all layers"):
            hf.open_adapter(tmp_path, config)
        return
    model = filled(tiny(), tmp_path)
    assert model.layers[0].mlp.up_proj.scale == 5 / 4 ** 0.5
    hf.save_adapter(model, tmp_path / "again", None)
    saved = json.loads((tmp_path / "again" / B).read_text())
    assert saved["lora_alpha"] == 10 and not saved.get("use_rslora")


@pytest.mark.parametrize("family, patterns, is_stacked", [
    ({}, {"rank_pattern": {"q_proj": 3, ".*": 3}, "alpha_pattern": {"down_proj": 5}}, False), ({}, {"rank_pattern": None, "alpha_pattern": None}, False),
    (GPT2, {"alpha_pattern": {"c_attn": 15}}, True)])
def test_a_pattern_that_changes_nothing_is_none(family, patterns, is_stacked, tmp_path):
    hf.save_adapter(with_adapters(tiny(**family)), tmp_path, None)
    change(tmp_path, patterns)
    adapter = hf.open_adapter(tmp_path, tiny(**family).config)
    assert (adapter.rank, adapter.alpha, adapter.stacked) == (3, 5.0, is_stacked)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

def rename(tensors):
    tensors["base_model.model.lm_head.lora_A.weight"] = tensors.pop(f"{Q}.lora_A.weight")


def mix(tensors):
    tensors["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"][0, 3] = 1


REFUSED = {                                                               # options, tensors, what is said
    "another kind": ({"peft_type": "LOHA"}, None, "adapter_config.json: peft_type is 'LOHA', which is not supported; expected LoRA on all"),
    "no kind": ({"peft_type": None}, None, "peft_type is None, which is not supported; expected LoRA on all"),
    "DoRA": ({"use_dora": True}, None, "use_dora is True, which is not supported; .*merge_and_unload"),
    "biases": ({"bias": "lora_only"}, None, "bias is 'lora_only'"),
    "another base": ({"init_lora_weights": "pissa_niter_4"}, None, "init_lora_weights is 'pissa_niter_4'"),
    "whole modules": ({"modules_to_save": ["embed_tokens"]}, None, r"modules_to_save is \['embed_tokens'\]"),
    "what we never heard of": ({"use_tomorrow": {"a": 1}}, None, "use_tomorrow is {'a': 1}"),
    "ranks by layer": ({"rank_pattern": {"q_proj": 4}}, None, "rank_pattern is {'q_proj': 4} and alpha_pattern {}; expected the same"),
    "GPT-2's ranks": ({"rank_pattern": {"c_attn": 9}, "alpha_pattern": {"c_attn": 15}}, None, "rank_pattern is {'c_attn': 9}"),
    "some ranks of many": ({"rank_pattern": {"q_proj": 3, "k_proj": 4}}, None, "rank_pattern is {'q_proj': 3, 'k_proj': 4}"),
    "no pattern": ({"rank_pattern": ["q_proj"]}, None, r"rank_pattern is \['q_proj'\] and"),
    "alphas by layer": ({"alpha_pattern": {"q_proj": 4}}, None, "alpha_pattern {'q_proj': 4}"),
    "no rank": ({"r": None}, None, "r is None and lora_alpha 5.0; expected two numbers"),
    "rank 0": ({"r": 0}, None, "r is 0"),
    "half a rank": ({"r": 1.5}, None, "r is 1.5"),
    "alpha 0": ({"lora_alpha": 0}, None, "lora_alpha 0;"),
    "no alpha": ({"lora_alpha": float("nan")}, None, "lora_alpha nan"),
    "another rank": ({"r": 4}, None, rf"safetensors: {Q}.lora_A.weight is \(3, 32\); expected \(4, 32\), for r 4 and the layers of --init"),
    "not all layers": (None, lambda tensors: [tensors.pop(name) for name in list(tensors) if "v_proj" not in name and "1.mlp" not in name],
                       "adapter_model.safetensors has no adapter of model.layers.0.mlp.down_proj, .*model.layers.0.self_attn.k_proj, "
                       "model.layers.0.self_attn.o_proj and 4 more; expected LoRA on all linear layers of the blocks"),
    "half an adapter": (None, lambda tensors: tensors.pop(f"{Q}.lora_B.weight"), "no adapter of model.layers.0.self_attn.q_proj;"),
    "another layer": (None, rename, "has base_model.model.lm_head.lora_A.weight, of no linear layer in this model's blocks"),
    "an adapter's name": (None, lambda tensors: [tensors.update({name[:-7] + ".my-first" + name[-7:]: tensors.pop(name)}) for name in list(tensors)],
                          r"down_proj.lora_A.my-first.weight, .* and 23 more, in which the name of an adapter stands; expected names like .*"
                          r"\.0\.mlp\.down_proj\.lora_A\.weight, as PEFT's save_pretrained writes them"),
    "a bias": (None, lambda tensors: tensors.update({f"{Q}.lora_B.bias": torch.zeros(32)}), "has .*q_proj.lora_B.bias, of no linear layer"),
    "another shape": (None, lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.zeros(3, 31)}), r"is \(3, 31\); expected \(3, 32\)"),
    "a number more": (None, lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.zeros(3, 32, 1)}), r"is \(3, 32, 1\)"),
    "another dtype": (None, lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.zeros(3, 32, dtype=torch.int8)}), "torch.int8; supported"),
}
REFUSED_WHEN_READ = {
    "NaN": (None, {}, lambda tensors: tensors[f"{Q}.lora_B.weight"].fill_(torch.nan), f"safetensors: {Q}.lora_B.weight has values that are infinite"),
    "infinite": (None, {}, lambda tensors: tensors[f"{Q}.lora_A.weight"][0].fill_(torch.inf), "q_proj.lora_A.weight has values that are infinite"),
    "no blocks": (None, GPT2, mix, "h.1.attn.c_attn.lora_B.weight mixes queries, keys and values; expected zeros outside of 3 blocks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_we_cannot_go_on_from_is_refused_before_it_is_read(case, tmp_path):
    options, tensors, words = REFUSED[case]
    model = with_adapters(tiny())
    hf.save_adapter(model, tmp_path, None)
    change(tmp_path, options, tensors or (lambda tensors: None))
    with pytest.raises(UserError, match=words):
        hf.open_adapter(tmp_path, model.config)
    if tensors:
        # Nor later, should it have changed meanwhile.
        with pytest.raises(UserError, match=words):
            hf.fill_adapter(model, tmp_path)


@pytest.mark.parametrize("case", REFUSED_WHEN_READ)
def test_numbers_that_we_cannot_go_on_from_are_refused(case, tmp_path):
    options, family, tensors, words = REFUSED_WHEN_READ[case]
    hf.save_adapter(with_adapters(tiny(**family)), tmp_path, None)
    change(tmp_path, options, tensors)
    with pytest.raises(UserError, match=words):
        filled(tiny(**family), tmp_path)


def test_the_pattern_of_gpt2_is_another_models_mistake(tmp_path):
    hf.save_adapter(with_adapters(tiny(**GPT2)), tmp_path, None)
    with pytest.raises(UserError, match="rank_pattern is {'c_attn': 9}"):
        hf.open_adapter(tmp_path, tiny().config)
    change(tmp_path, {"rank_pattern": {}, "alpha_pattern": {}})
    with pytest.raises(UserError, match="of no linear layer in this model's blocks"):
        hf.open_adapter(tmp_path, tiny().config)
    with pytest.raises(UserError, match=r"c_attn.lora_A.weight is \(9, 32\); expected \(3, 32\)"):
        hf.open_adapter(tmp_path, tiny(**GPT2).config)


def test_a_directory_without_an_adapter_is_named(tmp_path):
    config = tiny().config
    with pytest.raises(UserError, match="nowhere: no such directory"):
        hf.open_adapter(tmp_path / "nowhere", config)
    hf.save_adapter(with_adapters(tiny()), tmp_path / "adapter", None)
    with pytest.raises(UserError, match="no adapter there; expected adapter_config.json and adapter_model.safetensors, as in RUN/adapter"):
        hf.open_adapter(tmp_path, config)
    config_file, weights = tmp_path / "adapter" / B, tmp_path / "adapter" / A
    for text in ("{", "[]", '"LORA"', "[" * 200):
        config_file.write_text(text)
        with pytest.raises(UserError, match="adapter_config.json is not"):
            hf.open_adapter(tmp_path / "adapter", config)
    weights.rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match="no adapter there; .*is a pickle and is not read"):
        hf.open_adapter(tmp_path / "adapter", config)
    config_file.write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 5}))
    weights.write_bytes(b"cut short")
    with pytest.raises(UserError, match="adapter_model.safetensors is not a safetensors file that we can read"):
        hf.open_adapter(tmp_path / "adapter", config)


@pytest.mark.parametrize("name", [A, B])
def test_of_an_adapter_regular_files_of_its_kind_are_read(name, tmp_path):
    hf.save_adapter(with_adapters(tiny()), tmp_path, None)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"{name} is, or leads to, /dev/zero; expected a regular file"):
        hf.open_adapter(tmp_path, tiny().config)
    (tmp_path / name).unlink()
    with open(tmp_path / name, "wb") as f:
        f.truncate(60 * 2 ** 30)                                          # which takes no room on the disk
    with pytest.raises(UserError, match=f"{name} (has {60 * 2 ** 30} bytes; expected {2 ** 20} at most|is not a safetensors file)"):
        hf.open_adapter(tmp_path, tiny().config)


def test_an_adapter_without_its_configuration_is_unfinished(tmp_path, monkeypatch):
    """It is written last."""
    monkeypatch.setattr(hf.adapter, "write_whole", lambda path, content: (_ for _ in ()).throw(OSError(28, "No space left", str(path))))
    with pytest.raises(OSError, match="adapter_config.json"):
        hf.save_adapter(with_adapters(tiny()), tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == [A]
