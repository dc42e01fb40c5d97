"""The model against transformers, packing against one sample at a time, adapters, generation, files against the library."""

import json
import math
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import LLAMA, tiny
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
from data import Sample, bucket, collate, deal
from model import GPT, GPTConfig, Packing, linear_logprobs, load_safetensors, rope_frequencies, save_safetensors


ROOT = Path(__file__).resolve().parents[1]


def random_samples(count, longest=25, vocab=97, seed=0):
    rng = np.random.RandomState(seed)
    samples = []
    for _ in range(count):
        n = rng.randint(2, longest)
        response = rng.rand(n) < 0.6
        response[0] = False
        samples.append(Sample(rng.randint(0, vocab, n), response, None, 0))
    return samples


def packed_logp(model, samples):
    b = collate(samples)
    return model(b.input_ids, b.lengths, b.at, b.targets).split(b.offsets.diff().tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Every family against transformers

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 3}
ROPE_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 3}
FAMILIES = {                                                              # transformers' class, its configuration
    "gpt2": ("GPT2", GPT2), "gpt2-untied": ("GPT2", {**GPT2, "tie_word_embeddings": False, "n_inner": 40}),
    "llama": ("Llama", {**SIZES, "tie_word_embeddings": False, "num_key_value_heads": 4}),
    "llama-biases": ("Llama", {**SIZES, "attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama-3.2": ("Llama", {**SIZES, "tie_word_embeddings": True, "rope_parameters": ROPE_LLAMA3, "eos_token_id": [3, 4]}),
    "smollm2": ("Llama", {**SIZES, "tie_word_embeddings": True, "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3,
                          "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}),
    "qwen2": ("Qwen2", {**SIZES, "tie_word_embeddings": False}),
    "qwen2.5-tied": ("Qwen2", {**SIZES, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {**SIZES, "tie_word_embeddings": True, "head_dim": 16}),
    "qwen3-untied": ("Qwen3", {**SIZES, "tie_word_embeddings": False, "head_dim": 6}),
}


def theirs_of(family, **change):
    """A random model of transformers', far from any symmetry."""
    transformers = pytest.importorskip("transformers")
    name, config = FAMILIES[family]
    torch.manual_seed(1)
    head = "GPT2LMHeadModel" if name == "GPT2" else name + "ForCausalLM"
    theirs = getattr(transformers, head)(getattr(transformers, name + "Config")(**{**config, **change})).eval()
    for key, p in theirs.named_parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 and key.endswith("weight") else 0.0, 0.4)
    return theirs


def opened_by_transformers(directory):
    return pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(directory).eval()


def equal_tensors(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_ids_equal_transformers(tmp_path, family):
    theirs = theirs_of(family)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path).eval()
    ids = torch.randint(97, (3, 200))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    prompts = [torch.randint(97, (n,)) for n in (3, 40, 1, 17)]
    new = ours.generate(prompts, 32)
    for prompt, ids in zip(prompts, new):
        expected = theirs.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=32, do_sample=False,
                                   eos_token_id=None, pad_token_id=0)[0, len(prompt):]
        assert torch.equal(ids, expected)
    assert len(set(torch.cat(new).tolist())) > 8                          # varied, so that a mistake would show


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_round_trip_is_exact_and_sharded(tmp_path, family, dtype, monkeypatch):
    theirs = theirs_of(family).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")    # several files and an index
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    ours = GPT.from_pretrained(tmp_path / "theirs")
    assert all(p.dtype == dtype for p in ours.parameters())
    ours.float()                                                          # as training does; saved as it was
    for shard_bytes, files in ((20_000, "model-00001-of-*"), (10 ** 9, "model.safetensors")):   # the second over the first
        monkeypatch.setattr(model_module, "SHARD_BYTES", shard_bytes)
        ours.save_pretrained(tmp_path / "ours")
        assert list((tmp_path / "ours").glob(files)) and not list((tmp_path / "ours").glob("*.tmp"))
        again = opened_by_transformers(tmp_path / "ours")
        assert again.dtype == dtype and equal_tensors(again.state_dict(), theirs.state_dict())
        assert equal_tensors(GPT.from_pretrained(tmp_path / "ours").state_dict(), ours.to(dtype).state_dict())
    assert not (tmp_path / "ours" / "model.safetensors.index.json").exists()
    tensors = {k: v for file in (tmp_path / "theirs").glob("*.safetensors") for k, v in load_safetensors(file).items()}
    assert equal_tensors(load_safetensors(tmp_path / "ours" / "model.safetensors"), tensors)   # names and layout too
    spec = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert spec == json.loads((tmp_path / "theirs" / "config.json").read_text())


def test_each_tensor_keeps_the_dtype_of_its_file(tmp_path):
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {k: v.bfloat16() if v.dim() == 2 else v for k, v in load_safetensors(path).items()}
    save_safetensors(tensors, path)
    GPT.from_pretrained(tmp_path).float().save_pretrained(tmp_path)
    assert equal_tensors(load_safetensors(path), tensors)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_both_spellings_of_config_json_mean_the_same(tmp_path):
    theirs = theirs_of("llama-3.2")
    theirs.save_pretrained(tmp_path)                                      # transformers 5: rope_parameters, dtype
    path = tmp_path / "config.json"
    spec = json.loads(path.read_text())
    assert "rope_parameters" in spec and "dtype" in spec and "rope_theta" not in spec
    new = GPT.from_pretrained(tmp_path)
    rope = spec.pop("rope_parameters")
    path.write_text(json.dumps({**spec, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": spec.pop("dtype")}))
    old = GPT.from_pretrained(tmp_path)                                   # transformers 4
    assert old.config == new.config and new.config.rope_scaling and new.config.eos_token_ids == (3, 4)
    old.save_pretrained(tmp_path)
    ids = torch.randint(97, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(opened_by_transformers(tmp_path)(ids).logits, theirs(ids).logits)
    del spec["eos_token_id"]
    assert GPTConfig.from_hf(spec).eos_token_ids == () and GPTConfig.from_hf({**spec, "eos_token_id": 3}).eos_token_ids == (3,)
    plain = {k: v for k, v in LLAMA.items() if k not in ("rope_theta", "num_key_value_heads", "tie_word_embeddings")}
    config = GPTConfig.from_hf(plain)                                     # Llama's own defaults, as in the oldest files
    assert (config.rope_theta, config.n_kv_head, config.tie_embeddings, config.rope_scaling) == (10000.0, 4, False, None)


def test_stretched_frequencies_at_their_three_regimes():
    c = GPTConfig.from_hf({**LLAMA, "head_dim": 128, "rope_scaling": {**ROPE_LLAMA3, "rope_theta": 10000.0, "original_max_position_embeddings": 512}})
    plain = 10000.0 ** -(torch.arange(64) / 64)
    ratio = plain / rope_frequencies(c, "cpu")
    turns = 512 * plain / (2 * torch.pi)
    torch.testing.assert_close(ratio[turns > 4], torch.ones(int((turns > 4).sum())))
    torch.testing.assert_close(ratio[turns < 1], torch.full((int((turns < 1).sum()),), 8.0))
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between) > 3 and (between.diff() > 0).all() and 1 < between[0] and between[-1] < 8


def test_old_gpt2_files_are_read(tmp_path):
    theirs = theirs_of("gpt2")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_safetensors(path).items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 256, 256, dtype=torch.uint8) for i in range(3)}   # the published file has them
    save_safetensors({**tensors, **masks}, path)
    ids = torch.randint(97, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(GPT.from_pretrained(tmp_path)(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_tied_head_may_be_in_the_file_but_not_differ(tmp_path):
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_safetensors(path)
    for order in (lambda a, b: {**a, **b}, lambda a, b: {**b, **a}):      # transformers' files begin with the head
        save_safetensors(order(tensors, {"lm_head.weight": tensors["model.embed_tokens.weight"]}), path)
        assert equal_tensors(GPT.from_pretrained(tmp_path).state_dict(), tiny().state_dict())
        save_safetensors(order(tensors, {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}), path)
        with pytest.raises(ValueError, match="lm_head.weight .differs"):
            GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loading_holds_the_model_once(tmp_path, family):
    big = {"vocab_size": 20000, "num_hidden_layers": 6} | ({"hidden_size": 1024, "intermediate_size": 4096} if family == "llama" else {})
    if family == "gpt2":
        big |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 1024, "n_layer": 6, "n_head": 4, "n_positions": 256}
        big |= dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
                              "max_position_embeddings"))
    GPT(GPTConfig.from_hf({**LLAMA, **big})).bfloat16().save_pretrained(tmp_path)
    measure = """
import sys, torch
from model import GPT
def peak(): return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
model = GPT.from_pretrained(sys.argv[1])
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""
    out = subprocess.run([sys.executable, "-c", measure, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 0.8 < float(out) < 1.3


REFUSED = [({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*LlamaForCausalLM"), ({"architectures": None}, "None is not supported"),
           ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn.*llama3"), ({"rope_parameters": {"rope_type": "linear"}}, "linear"),
           ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}, "use_sliding_window"),
           ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"), ({"hidden_act": "relu"}, "relu.*silu"),
           ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*gptq"), ({"partial_rotary_factor": 0.5}, "partial_rotary"),
           ({"vocab_size": None}, "vocab_size"), ({"num_hidden_layers": "a"}, "num_hidden_layers is 'a'"), ({"hidden_size": -1}, "hidden_size"),
           ({"num_key_value_heads": 3}, "do not fit"), ({"head_dim": 7}, "do not fit"), ({"rope_theta": 0}, "rope_theta"),
           ({"eos_token_id": "x"}, "eos_token_id"), ({"rope_scaling": {"rope_type": "llama3"}}, "factor is None"),
           ({"hidden_size": 64}, "does not fit its config.json"), ({"tie_word_embeddings": False}, "lm_head"),
           ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"), ({"attention_bias": 1}, "attention_bias is 1"),
           ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4, "original_max_position_embeddings": 64}},
            "low_freq_factor 4.0 is not below"), ({"max_position_embeddings": 2 ** 40}, "max_position_embeddings is 1099511627776"), ({"eos_token_id": 2 ** 40}, "eos_token_id is 1099511627776")]
# Sizes that would take this machine's memory, or its time, if a module were made of them.
REFUSED += [({key: value}, f"{key} is {value}") for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
                                                           "num_attention_heads") for value in (2 ** 31, 10 ** 18)]
REFUSED += [({"num_attention_heads": 2 ** 20, "num_key_value_heads": 1, "head_dim": 2 ** 20}, "do not fit")]


@pytest.mark.parametrize("change,words", REFUSED, ids=[words for _, words in REFUSED])
def test_what_is_not_supported_is_refused_by_name(tmp_path, change, words):
    tiny().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ValueError, match=words):
        GPT.from_pretrained(tmp_path)


def test_damaged_directories_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(model_module, "SHARD_BYTES", 20_000)
    tiny().save_pretrained(tmp_path)
    index, shard = tmp_path / "model.safetensors.index.json", next(tmp_path.glob("model-00002*"))
    whole, spec = shard.read_bytes(), json.loads(index.read_text())
    for broken in (b"", b"\x08", whole[:50], whole[:-10], b"\xff" * 16, whole + b"\0"):
        shard.write_bytes(broken)
        with pytest.raises(ValueError, match="safetensors file that we can read"):
            GPT.from_pretrained(tmp_path)
    shard.write_bytes(whole)
    tensors = load_safetensors(shard)
    name = next(iter(tensors))
    for changed, words in (({k: v for k, v in tensors.items() if k != name}, name.removeprefix("model.")),
                           ({**tensors, "model.extra": torch.zeros(1)}, "model.extra"),
                           ({**tensors, "model.embed_tokens.weight": torch.zeros(97, 32)}, "model.embed_tokens.weight"),   # twice
                           ({**tensors, name: tensors[name].bool()}, "torch.bool")):
        save_safetensors(changed, shard)
        with pytest.raises(ValueError, match=words):
            GPT.from_pretrained(tmp_path)
    for text in ("{", "[]", json.dumps({"weight_map": {}}), json.dumps({"weight_map": {name: "../" + shard.name}}),
                 json.dumps({"weight_map": {name: "model-00009-of-00009.safetensors"}})):
        index.write_text(text)
        with pytest.raises(ValueError, match="index"):
            GPT.from_pretrained(tmp_path)
    index.write_text(json.dumps(spec))
    for text in ("{", "[]", "\udcff"):
        (tmp_path / "config.json").write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError, match="config.json"):
            GPT.from_pretrained(tmp_path)
    index.unlink()
    with pytest.raises(FileNotFoundError, match="no model there.*not read"):
        GPT.from_pretrained(tmp_path)


def test_hub_ids_are_downloaded_or_explained(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path)
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked[name] = allow_patterns
        if name == "some/offline":
            raise ConnectionError("no route\nto host")
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert equal_tensors(GPT.from_pretrained("some/model-1.5").state_dict(), tiny().state_dict())
    assert "config.json" in asked["some/model-1.5"] and not any(p.endswith((".bin", ".py", ".pt", "*")) for p in asked["some/model-1.5"])
    with pytest.raises(FileNotFoundError, match="some/offline: no such directory.*no route to host.*name its directory"):
        GPT.from_pretrained("some/offline")
    for name in ("nowhere", "/no/such/place", "../a/b"):                  # no repository has such an id
        with pytest.raises(FileNotFoundError, match="no such directory"):
            GPT.from_pretrained(name)
        assert name not in asked
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)             # not installed
    with pytest.raises(FileNotFoundError, match="pip install"):
        GPT.from_pretrained("some/model")


# ---------------------------------------------------------------------------------------------------------------------
# Packing and the head

@pytest.mark.parametrize("family", [{}, {"architectures": ["Qwen3ForCausalLM"]}, {"architectures": ["GPT2LMHeadModel"], "hidden_act": "gelu_new"}],
                         ids=["llama", "qwen3", "gpt2"])
def test_packed_log_probs_equal_those_of_each_sample_alone(family):
    model, samples = tiny(**family), random_samples(9)
    with torch.no_grad():
        for s, logp in zip(samples, packed_logp(model, samples)):
            ids = torch.from_numpy(s.ids)
            alone = model(ids[None])[0].log_softmax(-1)                   # (T, V)
            at = np.flatnonzero(s.response) - 1
            torch.testing.assert_close(logp, alone[at, ids[at + 1]], rtol=1e-5, atol=1e-5)


def test_a_sample_does_not_see_its_neighbours():
    model, samples = tiny(), random_samples(3, seed=1)
    others = random_samples(3, seed=2)
    with torch.no_grad():
        before = packed_logp(model, samples)[1]
        after = packed_logp(model, [others[0], samples[1], others[2]])[1]
    torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-6)


def test_an_empty_micro_batch_reaches_every_trainable_parameter_with_zero():
    model, b = tiny(tie_word_embeddings=False), collate([])
    for adapters in (False, True):
        if adapters:
            model.zero_grad()
            model.add_lora(2, 4)
        logp = model(b.input_ids, b.lengths, b.at, b.targets)
        assert logp.shape == (0,)
        logp.sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) > 10 and all(p.grad is not None and p.grad.abs().sum() == 0 for p in trained)


def materialised(hidden, weight, targets):
    return (hidden @ weight.T).log_softmax(-1)[torch.arange(len(targets)), targets]


def head_gradients(logprobs, hidden, weight, targets, of_logp):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp = logprobs(hidden, weight, targets)
    logp.backward(of_logp)
    return logp.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("N", [0, 1, 63, 64, 65, 300])
@pytest.mark.parametrize("scale", [0.1, 3.0])                             # flat distributions, and ones with p near 0 and 1
def test_chunks_have_the_log_probs_and_gradients_of_the_whole(monkeypatch, N, scale):
    monkeypatch.setitem(model_module.CHUNK_BYTES, "cpu", 1)               # the least there is: 64 rows
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(N, 16), scale * torch.randn(211, 16), torch.randint(211, (N,))
    if scale > 1 and N:
        targets[::2] = (hidden @ weight.T).argmax(1)[::2]
    of_logp = torch.randn(N) * (torch.rand(N) < 0.8)                      # some tokens have no weight
    ours, exact = (head_gradients(f, hidden.to(dtype), weight.to(dtype), targets, of_logp.to(dtype))
                   for f, dtype in ((linear_logprobs, torch.float32), (materialised, torch.float64)))
    for a, b in zip(ours, exact):
        assert a.dtype == torch.float32 and (a - b).norm() <= 1e-5 * b.norm()


def test_the_heads_gradient_by_finite_differences():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(5, 4).double(), torch.randn(7, 4).double(), torch.randint(7, (5,))
    assert torch.autograd.gradcheck(lambda h, w: linear_logprobs(h, w, targets), (hidden.requires_grad_(), weight.requires_grad_()))
    assert torch.autograd.gradcheck(lambda h: linear_logprobs(h, weight.detach(), targets), (hidden,))       # frozen


def test_under_autocast_log_probs_are_float32_and_only_products_are_rounded(monkeypatch):
    monkeypatch.setitem(model_module.CHUNK_BYTES, "cpu", 1)
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(700, 64), torch.randn(300, 64) / 8, torch.randint(300, (700,))
    of_logp = torch.rand(700)
    exact = head_gradients(materialised, hidden, weight, targets, of_logp)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = head_gradients(linear_logprobs, hidden, weight, targets, of_logp)
    assert [x.dtype for x in rounded] == [torch.float32] * 3
    assert (rounded[0] - exact[0]).abs().max() < 0.03                     # logits of up to 5 have bfloat16 steps of 1/32
    for a, b in zip(rounded[1:], exact[1:]):
        assert (a - b).norm() < 0.004 * b.norm()                          # the half of bfloat16's 1/128, though chunks add up


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation makes."""
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_never_holds_more_logits_than_a_chunk(monkeypatch, dtype):
    N, V, d, rows = 1000, 512, 8, 100
    monkeypatch.setitem(model_module.CHUNK_BYTES, "cpu", rows * V * dtype.itemsize)
    hidden, weight, targets = torch.randn(N, d), torch.randn(V, d), torch.randint(V, (N,))
    with LargestTensor() as largest, torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        head_gradients(linear_logprobs, hidden, weight, targets, torch.rand(N))
    assert largest.numel == rows * V
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            logp = linear_logprobs(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert sorted(t.numel() for t in saved) == sorted([N * d, V * d, N, N, N])   # its inputs, log-probs, log-sum-exps
    assert logp.grad_fn.kept[2][1].shape == (rows, V)                       # and a chunk, only until it has been used
    first, second = (torch.autograd.grad(logp.sum(), (hidden, weight), retain_graph=True) for _ in range(2))
    assert logp.grad_fn.kept is None
    torch.testing.assert_close(first, second)                             # (the order of chunks is another)


@pytest.mark.parametrize("lora", [False, True])
def test_blocks_compile_once_for_each_size_and_equal_eager(lora):
    model, samples = tiny(), random_samples(40)
    if lora:
        model.add_lora(2, 4)
    batches = [[samples[i] for i in micro] for micro in deal([len(s.ids) for s in samples], 1, 128)[0]]
    sizes = [bucket(sum(len(s.ids) for s in batch), 128) for batch in batches]
    assert len(batches) > 3 and len(set(sizes)) == 2

    def run(batch, size):
        b = collate(batch, size)
        model.zero_grad()
        logp = model(b.input_ids, b.lengths, b.at, b.targets)
        logp.sum().backward()
        return [logp, *(p.grad for p in model.parameters() if p.requires_grad)]

    eager = [run(batch, 1) for batch in batches]
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter)
    counts = []
    for batch, size, expected in zip(batches, sizes, eager):
        torch.testing.assert_close(run(batch, size), expected, rtol=1e-4, atol=1e-5)
        counts.append(counter.frame_count)
    new = [size not in sizes[:i] for i, size in enumerate(sizes)]
    assert counts[0] > 0 and [n > 0 for n in np.diff([0, *counts])] == new   # another size compiles, nothing else does
    for times in range(2, 8):                                             # more sizes than torch would compile by itself
        run(batches[0], sizes[0] * times)
        before = counter.frame_count
        run(batches[1], sizes[0] * times)
        assert counter.frame_count == before > counts[-1]
        counts.append(before)


def test_what_a_gpu_compiles_of_the_head_is_compiled_at_most_twice(monkeypatch):
    monkeypatch.setitem(model_module.CHUNK_BYTES, "cpu", 1)
    counters = {}
    for name in ("row_logsumexp", "row_softmax_"):
        counters[name] = CompileCounterWithBackend("aot_eager")
        monkeypatch.setattr(model_module, name, torch.compile(getattr(model_module, name), backend=counters[name]))
    torch.manual_seed(0)
    for N in (64, 40, 63, 128, 101, 7):                                   # chunks of 64, 40, 63, 51, 50, 7 rows: one static, any
        hidden, weight, targets = torch.randn(N, 8), torch.randn(50, 8), torch.randint(50, (N,))
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            for a, b in zip(head_gradients(linear_logprobs, hidden, weight, targets, torch.ones(N)),
                            head_gradients(materialised, hidden, weight, targets, torch.ones(N))):
                torch.testing.assert_close(a, b)
    assert all(c.frame_count == 2 for c in counters.values())


def test_recomputed_blocks_give_the_same_gradient_and_keep_less():
    model, b = tiny(num_hidden_layers=4), collate(random_samples(6))
    gradients, kept = [], []
    for model.recompute in (False, True):
        model.zero_grad()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):
            logp = model(b.input_ids, b.lengths, b.at, b.targets)
        kept.append(sum(sizes))
        logp.sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(x, y) for x, y in zip(*gradients)) and kept[1] < kept[0] / 4


def test_on_a_gpu_all_samples_go_to_one_varlen_kernel(monkeypatch):
    """What the kernel is given, as far as a CPU can tell: a stand-in that does what torch's documentation says of it."""
    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
        calls.append(window_size)
        assert q.dtype == torch.bfloat16 and q.shape == k.shape == v.shape   # torch 2.11's has no grouped heads
        assert cu_seq_q.dtype == torch.int32 and cu_seq_q[0] == 0 and cu_seq_q[-1] == len(q) and cu_seq_q is cu_seq_k
        assert max_q == max_k == cu_seq_q.diff().max()
        out = torch.empty_like(q)
        for i, j in zip(cu_seq_q.tolist(), cu_seq_q[1:].tolist()):
            score = torch.einsum("qnd,knd->nqk", q[i:j].float(), k[i:j].float()) / math.sqrt(q.shape[2])
            score = score.masked_fill(torch.ones(j - i, j - i).triu(1) > 0, -math.inf)
            out[i:j] = torch.einsum("nqk,knd->qnd", score.softmax(-1), v[i:j].float())
        return out

    calls, lengths = [], [5, 1, 9]
    monkeypatch.setattr(model_module, "varlen_attn", varlen_attn)
    q, k, v = (torch.randn(15, n, 8, dtype=torch.bfloat16) for n in (4, 2, 2))
    packing = Packing(lengths, "cpu")
    one_by_one = packing.attend(None, q, k, v)
    packing.on_gpu = packing.flash = True
    torch.testing.assert_close(packing.attend(None, q, k, v), one_by_one, rtol=0.02, atol=0.02)
    assert calls == [(-1, 0)]                                             # causal: nothing to the right
    packing.attend(None, q.float(), k.float(), v.float())                 # flash attention has no float32
    assert len(calls) == 1


# ---------------------------------------------------------------------------------------------------------------------
# LoRA

def with_adapters(family="qwen2", tmp_path=None, rank=3, alpha=12.0):
    theirs_of(family).save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    model.add_lora(rank, alpha)
    return model


@pytest.mark.parametrize("family", ["gpt2", "llama-biases", "qwen2", "qwen3"])
def test_adapters_begin_at_nothing_and_merge_exactly(tmp_path, family):
    base_ids = torch.randint(97, (2, 30))
    model = with_adapters(family, tmp_path)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    linear = 6 if family == "gpt2" else 7                                 # in each of 3 blocks, every one of them
    assert len(names) == 2 * 3 * linear and all(".lora_" in name for name in names)
    with torch.no_grad():
        torch.testing.assert_close(model(base_ids), GPT.from_pretrained(tmp_path)(base_ids))
        for name in names:
            torch.nn.init.normal_(model.get_parameter(name), std=0.1)
        q = model.layers[1].self_attn.q_proj                              # the definition, by hand
        x = torch.randn(5, q.in_features)
        delta = 12.0 / 3 * q.lora_b @ q.lora_a
        torch.testing.assert_close(q(x), torch.nn.functional.linear(x, q.weight + delta, q.bias))
    model.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        logits = model(base_ids)
        torch.testing.assert_close(opened_by_transformers(tmp_path / "merged")(base_ids).logits, logits, rtol=1e-4, atol=1e-4)
        assert (logits - GPT.from_pretrained(tmp_path)(base_ids)).abs().max() > 0.1
    assert load_safetensors(tmp_path / "merged" / "model.safetensors").keys() == load_safetensors(tmp_path / "model.safetensors").keys()


def test_a_frozen_base_takes_the_compute_dtype_and_gets_no_gradient(tmp_path):
    model = with_adapters("qwen3", tmp_path).cast(torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if p.dim() == 2 and ".lora_" not in name} == {torch.bfloat16}
    del model
    theirs_of("qwen3").save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path).cast(torch.bfloat16)
    model.add_lora(4, 8)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.bfloat16 if p.dim() == 2 and ".lora_" not in name else torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        sum(logp.sum() for logp in packed_logp(model, random_samples(4))).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (".lora_" in name)
    assert all(m.lora_b.grad.abs().sum() > 0 for m in model.layers.modules() if hasattr(m, "lora_b"))


def test_a_bfloat16_base_computes_as_float32_weights_do_under_autocast():
    """The same sums: what is added up along the layers stays float32."""
    for family in ({}, {"architectures": ["GPT2LMHeadModel"], "hidden_act": "gelu_new"}, {"architectures": ["Qwen3ForCausalLM"]}):
        a, b = (tiny(**family).bfloat16().cast(dtype) for dtype in (torch.float32, torch.bfloat16))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for x, y in zip(packed_logp(a, random_samples(4)), packed_logp(b, random_samples(4))):
                torch.testing.assert_close(x, y, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Generation

def test_generation_stops_and_leaves_its_neighbours_alone():
    model, prompts = tiny(std=0.5), [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14]]
    free = model.generate(prompts, 20)
    for prompt, ids in zip(prompts, free):
        assert torch.equal(model.generate([prompt], 20)[0], ids)          # the batch changes nothing
        greedy = list(prompt)                                             # and the cache neither
        for _ in range(20):
            with torch.no_grad():
                greedy.append(model(torch.tensor([greedy]))[0, -1].argmax().item())
        assert ids.tolist() == greedy[len(prompt):]
    stop = {free[0][3].item(), free[1][7].item()}
    assert not stop >= set(free[0][4:].tolist())                          # it would have gone on
    for ids, unstopped in zip(model.generate(prompts, 20, stop=stop), free):
        end = next((i for i, token in enumerate(unstopped.tolist()) if token in stop), 20)
        assert ids.tolist() == unstopped.tolist()[:end]
    assert [len(ids) for ids in model.generate(torch.tensor([[5, 6], [7, 8]]), 0)] == [0, 0]


def test_drawn_tokens_follow_their_probabilities_and_their_seed():
    model, n = tiny(std=0.3), 4000
    with torch.no_grad():
        assert torch.equal(model.generate([[5, 6]], 5, temperature=1e-300)[0], model.generate([[5, 6]], 5)[0])   # greedy is the limit
        for temperature in (0.7, 1.5):
            p = (model(torch.tensor([[5, 6]]))[0, -1] / temperature).softmax(-1)
            drawn = torch.cat(model.generate([[5, 6]] * n, 1, temperature=temperature, seed=1))
            assert torch.equal(drawn, torch.cat(model.generate([[5, 6]] * n, 1, temperature=temperature, seed=1)))
            assert not torch.equal(drawn, torch.cat(model.generate([[5, 6]] * n, 1, temperature=temperature, seed=2)))
            frequency = torch.bincount(drawn, minlength=97) / n
            assert ((frequency - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-3).all()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_prompts_of_similar_length_run_together_and_change_nothing(monkeypatch, temperature):
    model, rng, groups = tiny(), np.random.RandomState(0), []
    prompts = [rng.randint(0, 97, n).tolist() for n in rng.randint(1, 40, size=12)]
    together = model.generate(prompts, 8, temperature, stop=(3, 4), seed=5)
    continuations = GPT.continuations
    monkeypatch.setattr(GPT, "continuations", lambda self, some, *rest: groups.append([len(p) for p in some]) or continuations(
        self, some, *rest))
    monkeypatch.setattr(model_module, "CACHE_TOKENS", 100)
    assert all(torch.equal(a, b) for a, b in zip(model.generate(prompts, 8, temperature, stop=(3, 4), seed=5), together))
    assert sorted(sum(groups, [])) == sum(groups[::-1], []) == sorted(map(len, prompts)) and len(groups) > 3
    assert all(len(g) == 1 or len(g) * (max(g) + 8) <= 100 for g in groups)


@pytest.mark.parametrize("prompts,new,words", [([[]], 1, r"\[0\]"), ([[1] * 250], 7, "256 positions"), ([[1], []], 1, r"\[1, 0\]")])
def test_generation_that_cannot_be_is_refused(prompts, new, words):
    with pytest.raises(ValueError, match=words):
        tiny().generate(prompts, new)


# ---------------------------------------------------------------------------------------------------------------------
# safetensors

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_equals_the_library(tmp_path, dtype):
    library = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.randn(3, 5).to(dtype), "b.c": torch.randn(7).to(dtype), "empty": torch.zeros(0, 2, dtype=dtype),
               "strided": torch.randn(4, 6).to(dtype).T, "scalar": torch.tensor(3.5, dtype=dtype), "mask": torch.tensor([True, False])}
    save_safetensors(tensors, tmp_path / "ours")
    library.save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    for loaded in (library.load_file(tmp_path / "ours"), load_safetensors(tmp_path / "theirs"),
                   load_safetensors(tmp_path / "ours")):
        assert equal_tensors(dict(sorted(loaded.items())), dict(sorted(tensors.items())))


def with_header(header, data=b"\0" * 16):
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data


F = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def test_a_header_longer_than_any_is_not_read(tmp_path):
    with open(tmp_path / "a.safetensors", "wb") as f:
        f.write((200_000_000).to_bytes(8, "little"))
        f.truncate(300_000_000)                                           # of zeros, which take no disk
    tracemalloc.start()
    with pytest.raises(ValueError, match="a header of 200000000 bytes in a file of 300000000"):
        load_safetensors(tmp_path / "a.safetensors")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("content", [
    with_header({"a": F, "b": F}), with_header({"a": F, "b": {**F, "data_offsets": [4, 12]}}), with_header({"a": {**F, "dtype": "F8_E4M3"}}),
    with_header({"a": {**F, "data_offsets": [8, 16]}}), with_header({"a": {**F, "shape": [2 ** 40], "data_offsets": [0, 2 ** 42]}}),
    with_header({"a": {**F, "shape": [-2]}}), with_header({"a": {**F, "shape": [-2, -1]}}, b"\0" * 8), with_header({"a": {**F, "shape": [2.0]}}, b"\0" * 8),
    with_header({"a": {**F, "shape": [2 ** 40, 2 ** 40, 0], "data_offsets": [0, 0]}}, b""),
    with_header({"a": {**F, "shape": 2}}), with_header({"a": 3}), with_header([]), with_header({"a": F}), (2 ** 63).to_bytes(8, "little") + b"{}"],
    ids=["twice", "overlap", "dtype", "hole", "beyond", "negative", "negative pair", "float", "empty but absurd", "no list", "no object", "list", "rest", "length"])
def test_a_header_that_lies_is_refused_before_anything_is_allocated(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.safetensors is not a safetensors file that we can read"):
        load_safetensors(path)
