"""Weights against transformers: logits and greedy ids, files in and out, adapters, damaged directories, the hub."""

import json
import subprocess
import sys
import types

import pytest
import torch
from families import FAMILIES, equal_tensors, opened_by_transformers, theirs_of
from support import LLAMA, ROOT, tiny

import hf
import runtime.files
from model import GPT
from runtime.files import load_safetensors, save_safetensors
from runtime.process import UserError


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_ids_equal_transformers(tmp_path, family):
    theirs = theirs_of(family)
    theirs.save_pretrained(tmp_path)
    ours = hf.load_model(tmp_path).eval()
    ids = torch.randint(97, (3, 200))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    prompts = [torch.randint(97, (n,)) for n in (3, 40, 1, 17)]
    new = ours.generate(prompts, 32)
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    expected = theirs.generate(padded, attention_mask=mask, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 40:]
    assert all(map(torch.equal, new, expected))
    assert len(set(torch.cat(new).tolist())) > 8                          # varied, so that a mistake would show


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_round_trip_is_exact_and_sharded(tmp_path, family, dtype, monkeypatch):
    theirs = theirs_of(family).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")    # several files and an index
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    ours = hf.load_model(tmp_path / "theirs")
    assert all(p.dtype == dtype for p in ours.parameters())
    ours.float()                                                          # as training does; saved as it was
    for shard_bytes, files in ((20_000, "model-00001-of-*"), (10 ** 9, "model.safetensors")):   # the second over the first
        monkeypatch.setattr(hf.weights, "FILE_BYTES", shard_bytes)
        hf.save_model(ours, tmp_path / "ours")
        assert list((tmp_path / "ours").glob(files)) and not list((tmp_path / "ours").glob("*.tmp"))
        again = opened_by_transformers(tmp_path / "ours")
        assert again.dtype == dtype and equal_tensors(again.state_dict(), theirs.state_dict())
        assert equal_tensors(hf.load_model(tmp_path / "ours").state_dict(), ours.to(dtype).state_dict())
    assert not (tmp_path / "ours" / "model.safetensors.index.json").exists()
    tensors = {k: v for file in (tmp_path / "theirs").glob("*.safetensors") for k, v in load_safetensors(file).items()}
    assert equal_tensors(load_safetensors(tmp_path / "ours" / "model.safetensors"), tensors)   # names and layout too
    spec = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert spec == json.loads((tmp_path / "theirs" / "config.json").read_text())


@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": False}, {"architectures": ["GPT2LMHeadModel"], "hidden_act": "gelu_new"}],
                         ids=["llama", "untied", "gpt2"])
def test_what_is_saved_is_loaded(tmp_path, change, monkeypatch):
    model = tiny(**change)
    for shard_bytes, count in ((20_000, 4), (10 ** 9, 1)):
        monkeypatch.setattr(hf.weights, "FILE_BYTES", shard_bytes)
        hf.save_model(model, tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) == len(hf.weight_files(tmp_path)) >= count
        loaded = hf.load_model(tmp_path)
        assert loaded.config == model.config and equal_tensors(loaded.state_dict(), model.state_dict())


def test_each_tensor_keeps_the_dtype_of_its_file(tmp_path):
    hf.save_model(tiny(), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {k: v.bfloat16() if v.dim() == 2 else v for k, v in load_safetensors(path).items()}
    save_safetensors(tensors, path)
    hf.save_model(hf.load_model(tmp_path).float(), tmp_path)
    assert equal_tensors(load_safetensors(path), tensors)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.slow
def test_old_gpt2_files_are_read(tmp_path):
    theirs = theirs_of("gpt2")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_safetensors(path).items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 256, 256, dtype=torch.uint8) for i in range(3)}   # the published file has them
    save_safetensors({**tensors, **masks}, path)
    ids = torch.randint(97, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(hf.load_model(tmp_path)(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": False}, {"architectures": ["GPT2LMHeadModel"], "hidden_act": "gelu_new"}],
                         ids=["llama", "untied", "gpt2"])
@pytest.mark.parametrize("shard_bytes", [10_000, 10 ** 9])
def test_rows_that_were_never_trained_are_found(tmp_path, change, shard_bytes, monkeypatch):
    model = tiny(**change)
    expected = [90, 5]
    with torch.no_grad():
        model.embed_tokens.weight[5] = 0
        model.embed_tokens.weight[90] *= 1e-4
        model.embed_tokens.weight[7] *= 0.01                              # small, but not that small
        if "tie_word_embeddings" in change:
            model.lm_head.weight[6] = 0
            expected.append(6)
    monkeypatch.setattr(hf.weights, "FILE_BYTES", shard_bytes)
    hf.save_model(model.bfloat16(), tmp_path)
    sizes, own_pages = [], runtime.files.own_pages
    monkeypatch.setattr(runtime.files, "own_pages", lambda size: sizes.append(size) or own_pages(size))
    assert hf.untrained_rows(tmp_path, [1, 90, 7, 5, 6]) == expected
    assert sizes == [97 * 32 * 2] * (2 if "tie_word_embeddings" in change else 1)          # no other tensor was read
    if change.get("architectures"):
        path, = tmp_path.glob("*00001-of*") if shard_bytes == 10_000 else tmp_path.glob("*.safetensors")
        tensors = {name.removeprefix("transformer."): t for name, t in load_safetensors(path).items()}
        save_safetensors(tensors, path)                                   # as the published files of GPT-2 have them
        assert hf.untrained_rows(tmp_path, [1, 90, 7, 5, 6]) == expected
    assert hf.untrained_rows(tmp_path, []) == []


def test_a_tied_head_may_be_in_the_file_but_not_differ(tmp_path):
    hf.save_model(tiny(), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_safetensors(path)
    for order in (lambda a, b: {**a, **b}, lambda a, b: {**b, **a}):      # transformers' files begin with the head
        save_safetensors(order(tensors, {"lm_head.weight": tensors["model.embed_tokens.weight"]}), path)
        assert equal_tensors(hf.load_model(tmp_path).state_dict(), tiny().state_dict())
        save_safetensors(order(tensors, {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}), path)
        with pytest.raises(ValueError, match="lm_head.weight .differs"):
            hf.load_model(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loading_holds_the_model_once(tmp_path, family):
    big = {"vocab_size": 20000, "num_hidden_layers": 6} | ({"hidden_size": 1024, "intermediate_size": 4096} if family == "llama" else {})
    if family == "gpt2":
        big |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 1024, "n_layer": 6, "n_head": 4, "n_positions": 256}
        big |= dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
                              "max_position_embeddings"))
    with torch.device("meta"):
        model = GPT(hf.config_from_dict({**LLAMA, **big})).bfloat16().to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.zeros_(p)                                           # faster than normal ones
    hf.save_model(model, tmp_path)
    measure = """
import sys, torch
import hf
def peak(): return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
model = hf.load_model(sys.argv[1])
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""
    out = subprocess.run([sys.executable, "-c", measure, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 0.8 < float(out) < 1.3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama-biases", "mistral", "qwen2", "qwen3"])
def test_merged_adapters_are_what_transformers_reads(tmp_path, family):
    theirs_of(family).save_pretrained(tmp_path)
    model = hf.load_model(tmp_path)
    model.add_lora(3, 12.0)
    base_ids = torch.randint(97, (2, 30))
    for name, p in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    hf.save_model(model, tmp_path / "merged")
    with torch.no_grad():
        logits = model(base_ids)
        torch.testing.assert_close(opened_by_transformers(tmp_path / "merged")(base_ids).logits, logits, rtol=1e-4, atol=1e-4)
        assert (logits - hf.load_model(tmp_path)(base_ids)).abs().max() > 0.1
    assert load_safetensors(tmp_path / "merged" / "model.safetensors").keys() == load_safetensors(tmp_path / "model.safetensors").keys()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

def test_damaged_directories_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(hf.weights, "FILE_BYTES", 20_000)
    directory = tmp_path / "model"
    hf.save_model(tiny(), directory)
    index, shard = directory / "model.safetensors.index.json", next(directory.glob("model-00002*"))
    whole, spec = shard.read_bytes(), json.loads(index.read_text())
    (tmp_path / shard.name).write_bytes(whole)                            # a good one, where none is looked for
    for broken in (b"", b"\x08", whole[:50], whole[:-10], b"\xff" * 16, whole + b"\0"):
        shard.write_bytes(broken)
        with pytest.raises(ValueError, match="safetensors file that we can read"):
            hf.load_model(directory)
    shard.write_bytes(whole)
    tensors = load_safetensors(shard)
    name = next(iter(tensors))
    for changed, words in (({k: v for k, v in tensors.items() if k != name}, name.removeprefix("model.")),
                           ({**tensors, "model.extra": torch.zeros(1)}, "model.extra"),
                           ({**tensors, "model.embed_tokens.weight": torch.zeros(97, 32)}, "model.embed_tokens.weight"),   # twice
                           ({**tensors, name: tensors[name].bool()}, "torch.bool")):
        save_safetensors(changed, shard)
        with pytest.raises(ValueError, match=words):
            hf.load_model(directory)
    for text in ("{", "[]", json.dumps({"weight_map": {}}), json.dumps({"weight_map": {name: "../" + shard.name}}),
                 json.dumps({"weight_map": {name: "model-00009-of-00009.safetensors"}})):
        index.write_text(text)
        with pytest.raises(ValueError, match="index"):
            hf.load_model(directory)
    index.write_text(json.dumps(spec))
    for text in ("{", "[]", "\udcff"):
        (directory / "config.json").write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError, match="config.json"):
            hf.load_model(directory)
        with pytest.raises(UserError, match="config.json"):               # for the commands: a user's mistake
            hf.load_weights(directory)
    index.unlink()
    with pytest.raises(FileNotFoundError, match="no model there.*not read"):
        hf.load_model(directory)
    for opening in (hf.load_weights, hf.open_model):
        with pytest.raises(UserError, match="no model there.*not read"):
            opening(directory)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_no_numbers_are_not_read(number, dtype, tmp_path):
    hf.save_model(tiny().to(dtype), tmp_path)
    tensors = load_safetensors(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = number
    save_safetensors(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors: model.layers.1.mlp.up_proj.weight has values that are infinite or no numbers"):
        hf.load_model(tmp_path)


def test_constants_that_nobody_reads_may_be_anything(tmp_path):
    hf.save_model(tiny(), tmp_path)
    tensors = load_safetensors(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.tensor([1.0, torch.inf])
    save_safetensors(tensors, tmp_path / "model.safetensors")
    assert torch.equal(hf.load_model(tmp_path).head, tiny().head)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, 7e4])
@pytest.mark.parametrize("where", ["weight", "adapter"])
def test_weights_that_are_none_in_their_file_are_not_written(number, where, tmp_path):
    """7e4 is beyond float16."""
    hf.save_model(tiny().half(), tmp_path / "base")
    model = hf.load_model(tmp_path / "base").float()
    model.add_lora(2, 2.0)
    projection = model.layers[1].self_attn.q_proj
    if where == "adapter":
        projection.lora_a.data[0, 0], projection.lora_b.data[3, 0] = 1.0, number
    else:
        projection.weight.data[3, 0] = number
    with pytest.raises(ValueError, match="layers.1.self_attn.q_proj.weight has values that are infinite, no numbers .NaN., or beyond torch.float16"):
        hf.save_model(model, tmp_path / "saved", tmp_path / "base" if where == "adapter" else None)
    assert not (tmp_path / "saved" / "config.json").exists()


def test_hub_ids_are_downloaded_or_explained(tmp_path, monkeypatch):
    hf.save_model(tiny(), tmp_path)
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked[name] = allow_patterns
        if name == "some/offline":
            raise ConnectionError("no route\nto host")
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert equal_tensors(hf.load_model("some/model-1.5").state_dict(), tiny().state_dict())
    assert "config.json" in asked["some/model-1.5"] and not any(p.endswith((".bin", ".py", ".pt", "*")) for p in asked["some/model-1.5"])
    with pytest.raises(FileNotFoundError, match="some/offline: no such directory.*no route to host.*name its directory"):
        hf.load_model("some/offline")
    for name in ("nowhere", "/no/such/place", "../a/b"):                  # no repository has such an id
        with pytest.raises(FileNotFoundError, match="no such directory"):
            hf.load_model(name)
        assert name not in asked
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)             # not installed
    with pytest.raises(FileNotFoundError, match="pip install"):
        hf.load_model("some/model")
