"""The model against transformers, packing against one sample at a time, safetensors against the library."""

import json

import numpy as np
import pytest
import torch

from data import Sample, collate
from model import GPT, GPTConfig, linear_logprobs, load_safetensors, save_safetensors


def tiny(**change):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(vocab_size=97, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_ff=48, rope_theta=5000.0,
                                    norm_eps=1e-6, eos_token_id=3), **change}))
    for p in model.parameters():                                          # livelier than an initialisation: norms not 1
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.2)
    return model.eval()


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
    return model(b.input_ids, b.bounds, b.longest, b.at, b.targets).split(b.offsets.diff().tolist())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_logits_equal_transformers_and_survive_saving(tmp_path, tie, kv):
    transformers = pytest.importorskip("transformers")
    model = tiny(tie_embeddings=tie, n_kv_head=kv)
    model.save_pretrained(tmp_path / "a")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    ids = torch.randint(97, (3, 40))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
        again = GPT.from_pretrained(tmp_path / "a")
        assert torch.equal(again(ids), model(ids)) and again.config == model.config


def test_packed_log_probs_equal_those_of_each_sample_alone():
    model, samples = tiny(), random_samples(9)
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


def test_an_empty_micro_batch_reaches_every_parameter_with_zero():
    model, b = tiny(tie_embeddings=False), collate([])
    logp = model(b.input_ids, b.bounds, b.longest, b.at, b.targets)
    assert logp.shape == (0,)
    logp.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in model.parameters())


def test_log_probs_are_float32_under_autocast():
    hidden, weight, targets = torch.randn(5, 8), torch.randn(11, 8), torch.randint(11, (5,))
    exact = (hidden @ weight.T).log_softmax(-1)[torch.arange(5), targets]
    torch.testing.assert_close(linear_logprobs(hidden, weight, targets), exact)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = linear_logprobs(hidden, weight, targets)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.1)


def test_compiled_model_equals_eager():
    model, samples = tiny(), random_samples(5)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for some in (samples, samples[:2]):
        for a, b in zip(packed_logp(model, some), packed_logp(compiled, some)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_equals_the_library(tmp_path, dtype):
    library = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.randn(3, 5).to(dtype), "b.c": torch.randn(7).to(dtype), "empty": torch.zeros(0, 2, dtype=dtype),
               "strided": torch.randn(4, 6).to(dtype).T}
    save_safetensors(tensors, tmp_path / "ours")
    library.save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    for loaded in (library.load_file(tmp_path / "ours"), load_safetensors(tmp_path / "theirs"),
                   load_safetensors(tmp_path / "ours")):
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[k], v) and loaded[k].dtype == dtype for k, v in tensors.items())


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    tiny().save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    spec, tensors = json.loads(config.read_text()), load_safetensors(weights)
    for change, words in (({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"), ({"attention_bias": True}, "bias"),
                          ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"), ({"hidden_size": 64}, "does not fit")):
        config.write_text(json.dumps({**spec, **change}))
        with pytest.raises(ValueError, match=words):
            GPT.from_pretrained(tmp_path)
    for text, words in ((json.dumps({k: v for k, v in spec.items() if k != "vocab_size"}), "vocab_size"), ("[]", "config.json"),
                        (json.dumps({**spec, "num_hidden_layers": "a"}), "num_hidden_layers is 'a'"), ("{", "config.json"),
                        (json.dumps({k: v for k, v in spec.items() if k != "rope_theta"}), "rope_theta"), ("\udcff", "config.json")):
        config.write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError, match=words):
            GPT.from_pretrained(tmp_path)
    config.write_text(json.dumps(spec))
    for change in ({"model.norm.weight": None}, {"model.extra": torch.zeros(1)}):
        changed = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        save_safetensors(changed, weights)
        with pytest.raises(ValueError, match=next(iter(change)).removeprefix("model.")):
            GPT.from_pretrained(tmp_path)
    whole = weights.read_bytes()
    for broken in (b"", b"\x08", whole[:50], whole[:-10], b"\xff" * 16):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match="safetensors"):
            GPT.from_pretrained(tmp_path)
