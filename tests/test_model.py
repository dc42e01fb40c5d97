"""Packing against one sample at a time, the head against all logits at once, adapters, generation."""

import math
import types

import numpy as np
import pytest
import torch
from families import ROPE_LLAMA3
from support import LLAMA, tiny
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import bft
import hf
import model as model_module
from data import Sample, bucket, collate, deal
from model import LinearLogprobs, Packing, linear_logprobs, rope_frequencies


GPT2 = {"architectures": ["GPT2LMHeadModel"], "hidden_act": "gelu_new"}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"]}


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


def test_stretched_frequencies_at_their_three_regimes():
    c = hf.config_from_dict({**LLAMA, "head_dim": 128, "rope_scaling": {**ROPE_LLAMA3, "rope_theta": 10000.0, "original_max_position_embeddings": 512}})
    plain = 10000.0 ** -(torch.arange(64) / 64)
    ratio = plain / rope_frequencies(c, "cpu")
    turns = 512 * plain / (2 * torch.pi)
    torch.testing.assert_close(ratio[turns > 4], torch.ones(int((turns > 4).sum())))
    torch.testing.assert_close(ratio[turns < 1], torch.full((int((turns < 1).sum()),), 8.0))
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between) > 3 and (between.diff() > 0).all() and 1 < between[0] and between[-1] < 8


# ---------------------------------------------------------------------------------------------------------------------
# Packing and the head

@pytest.mark.parametrize("family", [{}, QWEN3, GPT2], ids=["llama", "qwen3", "gpt2"])
def test_packed_log_probs_equal_those_of_each_sample_alone(family):
    model, samples = tiny(**family), random_samples(9)
    with torch.no_grad():
        for s, logp in zip(samples, packed_logp(model, samples)):
            ids = torch.from_numpy(s.ids)
            alone = model(ids[None])[0].log_softmax(-1)                   # (T, V)
            at = np.flatnonzero(s.response) - 1
            torch.testing.assert_close(logp, alone[at, ids[at + 1]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [{}, QWEN3, GPT2], ids=["llama", "qwen3", "gpt2"])
def test_samples_that_go_on_from_another_equal_the_two_in_one(family):
    """Questions and their choices, in any order."""
    model = tiny(**family)
    samples = [torch.randint(97, (n,)) for n in (3, 7, 1, 4, 9, 2, 5)]
    after = {0: 1, 2: 1, 3: 4, 5: 4}
    packed, lengths = torch.cat(samples), [len(sample) for sample in samples]
    targets = torch.randint(97, (len(packed),))
    with torch.no_grad():
        logp = model(packed, lengths, torch.arange(len(packed)), targets, after).split(lengths)
        for number, (own, target) in enumerate(zip(samples, targets.split(lengths))):
            before = samples[after[number]] if number in after else own[:0]
            alone = model(torch.cat((before, own))[None])[0, len(before):].log_softmax(-1)   # (L, V)
            torch.testing.assert_close(logp[number], alone.gather(1, target[:, None])[:, 0], rtol=1e-5, atol=1e-5)


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
    monkeypatch.setattr(model_module, "CHUNK_BYTES", 1)               # the least there is: 64 rows
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
    monkeypatch.setattr(model_module, "CHUNK_BYTES", 1)
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


@pytest.mark.parametrize("shift", [0.0, -35.0, -100.0])                   # GPT-2's logits lie about such a number
def test_under_autocast_the_targets_logit_is_not_rounded(shift):
    torch.manual_seed(0)
    N, V, d = 400, 3000, 64
    weight, targets, common = 0.3 * torch.randn(V, d), torch.randint(V, (N,)), torch.eye(d)[0]
    weight[:, 0] = shift / 10
    hidden = torch.randn(N, d) + torch.linspace(0, 25, N)[:, None] * torch.nn.functional.normalize(weight[targets] - shift / 10 * common)
    hidden[:, 0] = 10
    exact = head_gradients(materialised, hidden.double(), weight.double(), targets, torch.ones(N).double())
    with torch.autocast("cpu", torch.bfloat16):
        ours = head_gradients(linear_logprobs, hidden, weight, targets, torch.ones(N))
        rounded = (hidden @ weight.T).float().log_softmax(-1)[torch.arange(N), targets]
    off, rounded_off = (((logp.double() - exact[0]).expm1()).square().mean().sqrt() for logp in (ours[0], rounded))
    assert off < 0.5 * rounded_off                                        # p_t, relative
    assert (ours[0] <= 0).all() and exact[0].max() > -1e-3                # certain, and not more than that
    for a, b in zip(ours[1:], exact[1:]):
        assert (a - b).norm() < (0.01 if shift > -100 else 0.06) * b.norm()   # those of rounded logits


class Misaligned(TorchDispatchMode):
    """Finds matrices of products that a GPU cannot read 16 bytes at a time: by where they begin, and how long rows are."""
    def __init__(self):
        super().__init__()
        self.products, self.found = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.name().startswith("aten::mm"):
            self.products += 1
            for t in (*args, out):
                size, stride = zip(*sorted(zip(t.shape, t.stride()), key=lambda pair: pair[1]))
                if t.storage_offset() % 8 or size[0] % 8 or stride[0] != 1 or stride[1] % 8:
                    self.found.append((tuple(t.shape), t.stride(), t.storage_offset()))
        return out


@pytest.mark.parametrize("V, d", [(50257, 768), (50257, 1600), (49152, 576), (151936, 896), (128256, 4096)])
def test_on_a_gpu_the_heads_products_are_aligned_and_its_row_functions_run_once_a_chunk(monkeypatch, V, d):
    """With tensors of real sizes that hold nothing."""
    calls = {}

    def counted(function):
        def call(z, *rest):
            calls.setdefault(function.__name__, []).append(tuple(z.shape))
            return function(z, *rest)
        return call

    monkeypatch.setattr(model_module, "compiled", counted)
    monkeypatch.setattr(model_module, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)   # it does not know these
    N = 3 * model_module.CHUNK_ROWS + 5
    rows = math.ceil(N / 4)
    with Misaligned() as misaligned, torch.no_grad(), torch.device("meta"):
        hidden, weight = torch.empty(N, d, dtype=torch.bfloat16), torch.empty(V, d, dtype=torch.bfloat16)
        context = types.SimpleNamespace(needs_input_grad=(True, True, False))
        context.mark_non_differentiable = lambda *tensors: None
        context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
        logp, *_ = LinearLogprobs.forward(context, hidden, weight, torch.empty(N, dtype=torch.int64), bft.DISTRIBUTION)
        grad_hidden, grad_weight, *_ = LinearLogprobs.backward(context, torch.empty_like(logp))
    assert misaligned.products == 4 + 3 + 2 * 4 and not misaligned.found
    assert grad_hidden.shape == hidden.shape and grad_weight.shape == weight.shape
    first, other = (rows - 3, V), (rows, V)
    assert calls == {"row_logsumexp": [first, other, other, other], "row_softmax_": [other, first, other, other],
                     "row_look": [shape for shape in (first, other, other, other) for _ in bft.DISTRIBUTION]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpus_padding_and_chunks_change_nothing(monkeypatch, dtype):
    torch.manual_seed(0)
    inputs = torch.randn(150, 16), torch.randn(211, 16) / 4, torch.randint(211, (150,)), torch.rand(150)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        plain = head_gradients(linear_logprobs, *inputs)
        monkeypatch.setattr(model_module, "on_gpu", lambda tensor: True)
        monkeypatch.setattr(model_module, "compiled", lambda function: function)
        monkeypatch.setattr(model_module, "CHUNK_ROWS", 64)
        gpu = head_gradients(linear_logprobs, *inputs)
    assert gpu[2].shape == (211, 16)
    for a, b in zip(gpu, plain):
        tolerance = 1e-5 if dtype == torch.float32 else 4e-3              # bfloat16: chunks are rounded apart
        assert (a - b).norm() <= tolerance * b.norm()


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
    monkeypatch.setattr(model_module, "CHUNK_BYTES", rows * V * dtype.itemsize)
    hidden, weight, targets = torch.randn(N, d), torch.randn(V, d), torch.randint(V, (N,))
    with LargestTensor() as largest, torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        head_gradients(linear_logprobs, hidden, weight, targets, torch.rand(N))
    assert largest.numel == rows * V
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            logp = linear_logprobs(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert sorted(t.numel() for t in saved) == sorted([N * d, V * d, N, N, N])   # its inputs, log-probs, log-sum-exps
    assert logp.grad_fn.kept[-1].shape == (rows, V)                       # and a chunk, only until it has been used
    first, second = (torch.autograd.grad(logp.sum(), (hidden, weight), retain_graph=True) for _ in range(2))
    assert logp.grad_fn.kept is None
    assert all(torch.equal(a, b) for a, b in zip(first, second))


# ---------------------------------------------------------------------------------------------------------------------
# What the head may be asked besides

def by_definition(logits):
    """{name: (N,)} of bft.DISTRIBUTION, of all logits (N, V) in float64, by loops."""
    found = {"entropy": [], "collision": [], "top20_entropy": []}
    for p in logits.double().softmax(-1).tolist():
        top = sorted(p)[-20:]
        found["entropy"].append(-math.fsum(x * math.log(x) for x in p if x > 0))
        found["collision"].append(math.fsum(x * x for x in p))
        found["top20_entropy"].append(-math.fsum(x / sum(top) * math.log(x / sum(top)) for x in top if x > 0))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(model_module, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(model_module, "compiled", lambda function: function)
    monkeypatch.setattr(model_module, "CHUNK_ROWS", 64)


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("N, V", [(0, 211), (1, 211), (64, 211), (65, 211), (150, 211), (70, 7), (70, 20)])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])                       # flat distributions, and ones with p near 0 and 1
def test_looks_are_what_they_are_called_and_change_nothing(monkeypatch, gpu, N, V, scale):
    """In chunks of 64 rows at most, the first of which may be smaller; the log-probs and their gradients stay to the bit."""
    monkeypatch.setattr(model_module, "CHUNK_BYTES", 1)
    if gpu:
        as_on_a_gpu(monkeypatch)
    torch.manual_seed(0)
    hidden, weight, targets, of_logp = torch.randn(N, 16), scale * torch.randn(V, 16), torch.randint(V, (N,)), torch.randn(N)
    found = {}

    def with_looks(*inputs):
        logp, values = linear_logprobs(*inputs, bft.DISTRIBUTION)
        found.update(values)
        return logp

    plain = head_gradients(linear_logprobs, hidden, weight, targets, of_logp)
    looked = head_gradients(with_looks, hidden, weight, targets, of_logp)
    assert all(torch.equal(a, b) for a, b in zip(plain, looked, strict=True))
    expected = by_definition(hidden.double() @ weight.double().T)
    assert list(found) == list(expected)
    for name, values in found.items():
        assert values.dtype == torch.float32 and values.shape == (N,) and not values.requires_grad
        # Logits of 40 have steps of 4e-6 in float32, and products' errors on top.
        tolerance = 1e-5 if scale < 40 else 1e-3
        torch.testing.assert_close(values.double(), expected[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_under_autocast_looks_are_those_of_rounded_logits(monkeypatch, gpu):
    monkeypatch.setattr(model_module, "CHUNK_BYTES", 1)
    if gpu:
        as_on_a_gpu(monkeypatch)
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(150, 64), torch.randn(300, 64) / 4, torch.randint(300, (150,))
    with torch.autocast("cpu", torch.bfloat16):
        plain = linear_logprobs(hidden, weight, targets)
        logp, found = linear_logprobs(hidden, weight, targets, bft.DISTRIBUTION)
    assert torch.equal(logp, plain)
    expected = by_definition(hidden @ weight.T)
    for name, values in found.items():
        assert values.dtype == torch.float32
        off = (values.double() - expected[name]).abs()
        assert 0 < off.max() < 0.03, name                                 # logits of up to 8 have bfloat16 steps of 1/32


def test_one_look_and_float64(monkeypatch):
    monkeypatch.setattr(model_module, "CHUNK_BYTES", 1)
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(100, 8).double(), torch.randn(30, 8).double(), torch.randint(30, (100,))
    expected = by_definition(hidden @ weight.T)
    for name, look in bft.DISTRIBUTION.items():
        logp, found = linear_logprobs(hidden, weight, targets, {"called": look})
        assert list(found) == ["called"] and found["called"].dtype == torch.float64
        torch.testing.assert_close(found["called"], expected[name], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(logp, materialised(hidden, weight, targets))


def test_the_model_gives_looks_beside_log_probs():
    model, samples = tiny(), random_samples(7)
    b = collate(samples, 200)
    logp, found = model(b.input_ids, b.lengths, b.at, b.targets, looks=bft.DISTRIBUTION)
    assert torch.equal(logp, model(b.input_ids, b.lengths, b.at, b.targets)) and logp.requires_grad
    for number, sample in enumerate(samples):
        logits = model(torch.from_numpy(sample.ids)[None])[0][np.flatnonzero(sample.response) - 1]
        for name, values in by_definition(logits).items():
            own = found[name][b.offsets[number]:b.offsets[number + 1]]
            torch.testing.assert_close(own.double(), values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("looks", [{}, bft.DISTRIBUTION], ids=["none", "all"])
def test_looks_hold_no_more_logits_than_a_chunk_and_nothing_for_the_backward_pass(monkeypatch, looks):
    N, V, d, rows = 1000, 512, 8, 100
    monkeypatch.setattr(model_module, "CHUNK_BYTES", rows * V * 4)
    hidden, weight, targets = torch.randn(N, d, requires_grad=True), torch.randn(V, d, requires_grad=True), torch.randint(V, (N,))
    saved = []
    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        linear_logprobs(hidden, weight, targets, looks)
    assert largest.numel == rows * V and sorted(saved) == sorted([N * d, V * d, N, N, N])


@pytest.mark.parametrize("needs, kernels", [((), 0), (("entropy",), 1), (("collision", "top20_entropy"), 2)])
def test_what_no_row_needs_costs_nothing(monkeypatch, needs, kernels):
    """A step looks at each chunk once for each of what its objective needs."""
    monkeypatch.setitem(bft.OBJECTIVES, "mine", bft.Objective(bft.every_token_1, bft.every_sample_1, "tokens", (*needs, "ref_logp")))
    monkeypatch.setattr(model_module, "CHUNK_BYTES", 1)
    looked, row_look = [], model_module.row_look
    monkeypatch.setattr(model_module, "row_look", lambda z, lse, look: looked.append(len(z)) or row_look(z, lse, look))
    model, b = tiny(), collate(random_samples(20))
    model(b.input_ids, b.lengths, b.at, b.targets, looks=bft.distribution_needs("mine"))
    assert sum(looked) == kernels * len(b.at) and len(b.at) > 64


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@torch._dynamo.config.patch(recompile_limit=3)                            # torch's own is 8: it would take long to pass it
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
    assert counts[0] == (4 if lora else 2)                                # one before attention, one after it
    assert [n > 0 for n in np.diff([0, *counts])] == new   # another size compiles, nothing else does
    assert torch._dynamo.config.recompile_limit > 8
    for times in range(2, 5):                                             # more sizes than torch would compile by itself
        run(batches[0], sizes[0] * times)
        before = counter.frame_count
        run(batches[1], sizes[0] * times)
        assert counter.frame_count == before > counts[-1]
        counts.append(before)


@pytest.mark.slow
def test_what_a_gpu_compiles_of_the_head_is_compiled_at_most_twice(monkeypatch):
    monkeypatch.setattr(model_module, "CHUNK_BYTES", 1)
    counters = {}
    for name in ("row_logsumexp", "row_softmax_", "row_look"):
        counters[name] = CompileCounterWithBackend("aot_eager")
        monkeypatch.setattr(model_module, name, torch.compile(getattr(model_module, name), backend=counters[name]))
    torch.manual_seed(0)
    for N in (64, 40, 63, 128, 101, 7):                                   # chunks of 64, 40, 63, 51, 50, 7 rows: one static, any
        hidden, weight, targets = torch.randn(N, 8), torch.randn(50, 8), torch.randint(50, (N,))
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            for a, b in zip(head_gradients(linear_logprobs, hidden, weight, targets, torch.ones(N)),
                            head_gradients(materialised, hidden, weight, targets, torch.ones(N))):
                torch.testing.assert_close(a, b)
            _, looked = linear_logprobs(hidden, weight, targets, bft.DISTRIBUTION)
            for name, look in bft.DISTRIBUTION.items():
                torch.testing.assert_close(looked[name], look((hidden @ weight.T).log_softmax(-1)))
    assert [c.frame_count for c in counters.values()] == [2, 2, 2 * len(bft.DISTRIBUTION)]


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


@pytest.mark.parametrize("after", [None, {0: 1, 2: 1}])
@pytest.mark.parametrize("knows_groups", [False, True])                   # torch 2.11's does not, 2.13's does
def test_on_a_gpu_all_samples_go_to_one_varlen_kernel(monkeypatch, knows_groups, after):
    """What the kernel is given, as far as a CPU can tell: a stand-in that does what torch's documentation says of it."""
    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa=False):
        calls.append(window_size)
        assert q.dtype == torch.bfloat16 and k.shape == v.shape
        assert enable_gqa == knows_groups and k.shape[1] == (2 if knows_groups else 4)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        assert (cu_seq_q is cu_seq_k) == (after is None)
        for offsets, longest, rows in ((cu_seq_q, max_q, q), (cu_seq_k, max_k, k)):
            assert offsets.dtype == torch.int32 and offsets[0] == 0 and offsets[-1] == len(rows) and longest == offsets.diff().max()
        parts = []
        for queries, keys, values in zip(*(x.float().split(offsets.diff().tolist()) for x, offsets in ((q, cu_seq_q), (k, cu_seq_k), (v, cu_seq_k)))):
            score = torch.einsum("qnd,knd->nqk", queries, keys) / math.sqrt(q.shape[2])
            # FlashAttention aligns the last query with the last key.
            hidden = torch.ones(len(queries), len(keys)).triu(1 + len(keys) - len(queries)) > 0
            parts.append(torch.einsum("nqk,knd->qnd", score.masked_fill(hidden, -math.inf).softmax(-1), values))
        return torch.cat(parts).to(q.dtype)

    calls, lengths = [], [5, 1, 9]
    monkeypatch.setattr(model_module, "varlen_attn", varlen_attn)
    monkeypatch.setattr(model_module, "FLASH_KNOWS_GROUPS", knows_groups)
    q, k, v = (torch.randn(15, n, 8, dtype=torch.bfloat16) for n in (4, 2, 2))
    packing = Packing(lengths, "cpu", after=after)
    one_by_one = packing.attend(None, q, k, v)
    packing.on_gpu = packing.has_flash = True
    torch.testing.assert_close(packing.attend(None, q, k, v), one_by_one, rtol=0.02, atol=0.02)
    assert calls == [(-1, 0)]                                             # causal: nothing to the right
    packing.attend(None, q.float(), k.float(), v.float())                 # flash attention has no float32
    assert len(calls) == 1


# ---------------------------------------------------------------------------------------------------------------------
# LoRA

def with_adapters(rank=3, alpha=12.0, **family):
    """A model whose adapters are not at their beginning, where B is 0."""
    model = tiny(**family)
    model.add_lora(rank, alpha)
    return model


@pytest.mark.parametrize("family", [{}, {"attention_bias": True, "mlp_bias": True}, {"architectures": ["Qwen2ForCausalLM"]}, QWEN3, GPT2],
                         ids=["llama", "llama-biases", "qwen2", "qwen3", "gpt2"])
def test_adapters_begin_at_nothing_and_merge_exactly(tmp_path, family):
    ids, base, model = torch.randint(97, (2, 30)), tiny(**family), with_adapters(**family)
    hf.save_model(base, tmp_path / "base")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    linear = 6 if family is GPT2 else 7                                   # in each of 2 blocks, every one of them
    assert len(names) == 2 * 2 * linear and all(".lora_" in name for name in names)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), base(ids))
        for name in names:
            torch.nn.init.normal_(model.get_parameter(name), std=0.1)
        q = model.layers[1].self_attn.q_proj                              # the definition, by hand
        x = torch.randn(5, q.in_features)
        delta = 12.0 / 3 * q.lora_b @ q.lora_a
        torch.testing.assert_close(q(x), torch.nn.functional.linear(x, q.weight + delta, q.bias))
    hf.save_model(model, tmp_path / "merged")
    merged = hf.load_model(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids), model(ids), rtol=1e-4, atol=1e-4)
        assert (model(ids) - base(ids)).abs().max() > 0.1
    assert dict(merged.named_parameters()).keys() == dict(base.named_parameters()).keys()


def test_a_frozen_base_takes_the_compute_dtype_and_gets_no_gradient():
    model = with_adapters(**QWEN3).cast(torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if p.dim() == 2 and ".lora_" not in name} == {torch.bfloat16}
    model = tiny(**QWEN3).cast(torch.bfloat16)
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
    for family in ({}, GPT2, QWEN3):
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
    model, n = tiny(std=0.3), 2000
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
    continue_prompts = model_module.continue_prompts
    monkeypatch.setattr(model_module, "continue_prompts", lambda model, some, *rest: groups.append([len(p) for p in some]) or continue_prompts(
        model, some, *rest))
    monkeypatch.setattr(model_module, "CACHE_TOKENS", 100)
    assert all(torch.equal(a, b) for a, b in zip(model.generate(prompts, 8, temperature, stop=(3, 4), seed=5), together))
    assert sorted(sum(groups, [])) == sum(groups[::-1], []) == sorted(map(len, prompts)) and len(groups) > 3
    assert all(len(g) == 1 or len(g) * (max(g) + 8) <= 100 for g in groups)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rows_that_have_ended_make_room_and_change_nothing(temperature, monkeypatch):
    model, kept, select = tiny(), [], model_module.Cache.select
    prompts = [[i, i + 1][:1 + i % 2] for i in range(1, 17)]
    free = model.generate(prompts, 20, temperature, seed=5)
    stop = {ids[place].item() for place in (1, 4, 9) for ids in free[::2]}
    monkeypatch.setattr(model_module.Cache, "select", lambda cache, samples: kept.append(len(samples)) or select(cache, samples))
    stopped = model.generate(prompts, 20, temperature, stop, seed=5)
    for ids, unstopped in zip(stopped, free):
        end = next((i for i, token in enumerate(unstopped.tolist()) if token in stop), 20)
        assert ids.tolist() == unstopped.tolist()[:end]
    assert kept and kept[0] <= 8 and max(map(len, stopped)) > 1           # some went on after the others had gone


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_no_numbers_write_nothing(temperature):
    model = tiny()
    model.norm.weight.data[3] = math.nan
    with pytest.raises(ValueError, match=r"logits that are no numbers \(NaN\)"):
        model.generate([[1, 2], [3]], 4, temperature)


@pytest.mark.parametrize("prompts,new,words", [([[]], 1, r"\[0\]"), ([[1] * 250], 7, "256 positions"), ([[1], []], 1, r"\[1, 0\]")])
def test_generation_that_cannot_be_is_refused(prompts, new, words):
    with pytest.raises(ValueError, match=words):
        tiny().generate(prompts, new)
