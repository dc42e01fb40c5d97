"""Every row of every file of variants/ against plain loops in float64, written from what was published of it, and sharing no
code with variants/ or bft.py."""

import math
import random
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support import ROOT, tiny
from test_bft import random_case
from test_model import random_samples

import bft
import variants
from data import collate


class Token(NamedTuple):
    """What a row may need of a token."""
    logp: float
    entropy: float
    collision: float
    top20_entropy: float
    ref_logp: float

    @property
    def p(self):
        return math.exp(self.logp)


def informative(p):
    """p relu(1 - logit(p) / logit(0.93)); at p = 1 the logit is infinite."""
    if p == 1:
        return 0.0
    return p * max(0.0, 1 - math.log(p / (1 - p)) / math.log(0.93 / 0.07))


def anchored(token):
    """DFT's weight, and 0.1 times minus the derivative of e^r - r - 1 by log p, with r = log p_ref - log p clamped to 10."""
    r = token.ref_logp - token.logp
    return token.p + (0.1 * (math.exp(r) - 1) if -10 <= r <= 10 else 0)


def importance(sample, g):
    """Of a sample as a whole: the geometric mean of p / p_ref, 16 at most."""
    return min(16.0, math.exp(math.fsum(token.logp - token.ref_logp for token in sample) / len(sample)))


def confidence(sample, g):
    """C_b."""
    size = min(g, len(sample))
    means = [math.fsum(token.logp for token in sample[i:i + size]) / size for i in range(len(sample) - size + 1)]
    return math.exp(min(means))


class Row(NamedTuple):
    file: str
    token: object                    # Token -> w_t
    sample: object = lambda sample, g: 1.0   # list of Token, g -> s_b
    average: str = "tokens"
    needs: tuple = ()


TABLE = {
    "power-0.5": Row("power", lambda token: math.sqrt(token.p)),
    "power-2": Row("power", lambda token: token.p * token.p),
    "power-10": Row("power", lambda token: token.p ** 10),
    "only-top": Row("only_top", lambda token: 1.0 if token.p >= 0.1754 else 0.0),
    "only-top-p": Row("only_top", lambda token: token.p if token.p >= 0.1754 else 0.0),
    "profit": Row("profit", lambda token: 1.0 if token.p >= 0.1 else 0.0),
    "infosft": Row("infosft", lambda token: informative(token.p)),
    "deft": Row("deft", lambda token: token.p ** token.collision, needs=("collision",)),
    "eaft": Row("eaft", lambda token: token.top20_entropy / 3, needs=("top20_entropy",)),
    "iw-sft": Row("iw_sft", lambda token: 1.0, importance, needs=("ref_logp",)),
    "asft": Row("asft", anchored, needs=("ref_logp",)),
    "bft-gamma-0.5": Row("bft_gamma", lambda token: token.p, lambda sample, g: 1 - math.sqrt(confidence(sample, g)), "samples"),
    "bft-gamma-2": Row("bft_gamma", lambda token: token.p, lambda sample, g: 1 - confidence(sample, g) ** 2, "samples"),
}


@pytest.fixture(autouse=True)
def all_files():
    variants.load_variants(files())


def files():
    return [str(path) for path in sorted((ROOT / "variants").glob("*.py")) if path.stem != "__init__"]


def test_docs_name_every_row_and_its_file():
    text = (ROOT / "docs" / "variants.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (`.*?`) \| .*\| (\w+) \| \[(\w+)\.py\]", text, re.M)
    named = {name: (average, file) for names, average, file in lines for name in re.findall(r"`([\w.-]+)`", names)}
    rows = {name: bft.OBJECTIVES[name] for name in variants.FILES}
    assert named == {name: (row.average, Path(variants.FILES[name]).stem) for name, row in rows.items()}


def test_every_row_of_every_file_is_in_the_table():
    assert {name: file for name, file in variants.FILES.items()} == {
        name: str(ROOT / "variants" / f"{row.file}.py") for name, row in TABLE.items()}
    assert {row.file for row in TABLE.values()} == {path.stem for path in (ROOT / "variants").glob("*.py")} - {"__init__"}
    for name, row in TABLE.items():
        assert bft.OBJECTIVES[name][2:] == (row.average, row.needs), name


# ---------------------------------------------------------------------------------------------------------------------
# Fidelity

def reference(samples, name, g, denominator=None):
    """Loss, d loss / d logp and the weights s_b w_t of lists of Token, by loops."""
    row = TABLE[name]
    N, B = sum(map(len, samples)), sum(len(sample) > 0 for sample in samples)
    denominator = denominator or {"tokens": N, "samples": B}[row.average]
    loss, gradient, weights = 0.0, [], []
    for sample in samples:
        if not sample:
            continue
        s = row.sample(sample, g)
        for token in sample:
            weight = s * row.token(token)
            share = weight / denominator
            if row.average == "samples":
                share /= len(sample)
            loss += share * -token.logp
            gradient.append(-share)
            weights.append(weight)
    return loss, gradient, weights


# Where a formula has an edge: p = 1, and both sides of a threshold.
EDGES = [0.0, *(math.log(q + step) for q in (0.1, 0.1754, 0.5, 0.93) for step in (-1e-4, -1e-6, 1e-6, 1e-4))]


def float32(x):
    return float(torch.tensor(x))


def random_token(rng, logp, gain):
    """gain: about log p - log p_ref."""
    if rng.random() < 0.2:
        logp = float32(rng.choice(EDGES))
    return Token(logp, float32(rng.uniform(0, 11)), float32(rng.choice([1.0, rng.uniform(0.01, 1), 10 ** rng.uniform(-5, 0)])),
                 float32(rng.uniform(0, math.log(20))), float32(logp - gain + rng.uniform(-0.01, 0.01)))


def random_tokens(rng):
    """Samples as in test_bft: lists of Token, and g."""
    logps, g = random_case(rng)
    # Nothing gained; around the largest s_b of iw-sft, 16; around the largest r of asft, 10; and far beyond.
    gains = [0.0, math.log(16), -math.log(16), 10.0, -10.0, 40.0, -40.0, rng.uniform(-3, 3)]
    samples = []
    for sample in logps:
        gain = rng.choice(gains)
        samples.append([random_token(rng, logp, rng.choice([gain, gain, rng.choice(gains)])) for logp in sample])
    return samples, g


def tensors(samples, name, dtype=torch.float32):
    """(logp (N,), offsets (S+1,), what the row needs) of lists of Token."""
    tokens = [token for sample in samples for token in sample]
    extra = {need: torch.tensor([getattr(token, need) for token in tokens], dtype=dtype) for need in TABLE[name].needs}
    logp = torch.tensor([token.logp for token in tokens], dtype=dtype)
    return logp, torch.tensor([0, *map(len, samples)]).cumsum(0), extra


@pytest.mark.parametrize("name", TABLE)
def test_every_row_and_its_gradient_equals_the_loops(name):
    rng = random.Random(0)
    for case in range(200):
        samples, g = random_tokens(rng)
        denominator = rng.choice([None, None, 7, 1000.0])
        loss, gradient, weights = reference(samples, name, g, denominator) if any(samples) else (0.0, [], [])
        logp, offsets, extra = tensors(samples, name)
        for values in (logp, *extra.values()):
            values.requires_grad_()
        ours = bft.objective_loss(logp, offsets, name, g, denominator, extra)
        ours.backward()
        assert ours.dtype == torch.float32 and ours.shape == ()
        assert math.isclose(ours.item(), loss, rel_tol=1e-5, abs_tol=1e-12), case
        scale = max(map(abs, gradient), default=0)
        torch.testing.assert_close(logp.grad, torch.tensor(gradient), rtol=1e-5, atol=1e-7 * scale, msg=str(case))
        got = bft.token_weights(logp, offsets, name, g, extra)
        assert not got.requires_grad and all(values.grad is None for values in extra.values())
        torch.testing.assert_close(got, torch.tensor(weights), rtol=1e-5, atol=1e-7)


# The losses as they were published, of whose gradient the rows are made: functions of log p, with a gradient, of what else
# is known of a token, and of p without one.
PUBLISHED = {
    "power-0.5": lambda logp, extra, p: (1 - logp.exp() ** 0.5) / 0.5,
    "power-2": lambda logp, extra, p: (1 - logp.exp() ** 2) / 2,
    "power-10": lambda logp, extra, p: (1 - logp.exp() ** 10) / 10,
    "only-top": lambda logp, extra, p: -logp * (p >= 0.1754),
    "only-top-p": lambda logp, extra, p: (1 - logp.exp()) * (p >= 0.1754),
    "deft": lambda logp, extra, p: (1 - logp.exp() ** extra["collision"]) / (extra["collision"] + 1e-6),
    "asft": lambda logp, extra, p: -p * logp + 0.1 * k3((extra["ref_logp"] - logp).clamp(-10, 10)),
}


def k3(r):
    return r.exp() - r - 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_gradient_is_that_of_the_published_loss(name):
    rng = random.Random(1)
    for case in range(50):
        samples, g = random_tokens(rng)
        logp, offsets, extra = tensors(samples, name, torch.float64)
        gradients = []
        for loss in (lambda x: bft.objective_loss(x, offsets, name, g, 1, extra),                    # noqa: B023
                     lambda x: PUBLISHED[name](x, extra, x.detach().exp()).sum()):                   # noqa: B023
            x = logp.clone().requires_grad_()
            loss(x).backward()
            gradients.append(x.grad)
        ours, theirs = gradients
        if name == "deft":
            # Its 1e-6 is left out.
            ours = ours * extra["collision"] / (extra["collision"] + 1e-6)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=str(case))


# ---------------------------------------------------------------------------------------------------------------------
# Invariants

def plain_case():
    """Four samples, one of them empty: lists of Token."""
    rng = random.Random(2)
    return [[random_token(rng, float32(-rng.uniform(0, 5)), rng.uniform(-2, 2)) for _ in range(n)] for n in (20, 0, 7, 33)]


@pytest.mark.parametrize("name", TABLE)
def test_a_sample_does_not_see_its_neighbours(name):
    samples = plain_case()
    a, b, c = samples[0], samples[2], samples[3]

    def weights(samples):
        logp, offsets, extra = tensors(samples, name)
        return bft.token_weights(logp, offsets, name, 5, extra).split([len(sample) for sample in samples])

    certain = [Token(0.0, 0.0, 1.0, 0.0, -60.0)] * 20
    hopeless = [Token(-50.0, 11.0, 1e-4, 3.0, 0.0)] * 33
    alone, = weights([b])
    for before, after in ((a, c), (certain, hopeless), (hopeless, certain), ([], a)):
        torch.testing.assert_close(weights([before, b, after])[1], alone)


@pytest.mark.parametrize("name", TABLE)
def test_micro_batches_with_one_denominator_add_up(name):
    samples = plain_case()
    denominator = bft.global_denominator(name, [len(sample) for sample in samples])

    def loss(samples, denominator=None):
        logp, offsets, extra = tensors(samples, name)
        return bft.objective_loss(logp, offsets, name, 5, denominator, extra)

    torch.testing.assert_close(loss(samples), loss(samples[:2], denominator) + loss(samples[2:], torch.tensor(denominator)))


@pytest.mark.parametrize("name", TABLE)
def test_a_call_without_response_tokens_is_a_zero_with_a_gradient(name):
    for offsets in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        x = torch.ones(3, requires_grad=True)
        loss = bft.objective_loss(x[:0], offsets, name, extra={need: torch.zeros(0) for need in TABLE[name].needs})
        loss.backward()
        assert loss.item() == 0 and x.grad.tolist() == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["infosft", "deft", "iw-sft", "asft", "bft-gamma-0.5"])   # of each kind one
def test_compiles_into_one_graph_with_the_same_numbers(name):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, o, e: bft.objective_loss(x, o, name, 4, extra=e), fullgraph=True, backend="aot_eager")
    samples = plain_case()
    for part in (samples, samples[1:3]):
        logp, offsets, extra = tensors(part, name)
        again = logp.clone().requires_grad_()
        loss = bft.objective_loss(logp.requires_grad_(), offsets, name, 4, extra=extra)
        other = compiled(again, offsets, extra)
        loss.backward()
        other.backward()
        torch.testing.assert_close(other, loss)
        torch.testing.assert_close(again.grad, logp.grad)


# ---------------------------------------------------------------------------------------------------------------------
# Extras

@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.needs])
def test_what_a_row_needs_is_asked_for_by_name(name):
    logp, offsets, extra = tensors(plain_case(), name)
    need, = TABLE[name].needs
    others = {"something else": logp}
    calls = [lambda extra, call=call: call(logp, offsets, name, extra=extra) for call in (bft.weigh, bft.token_weights, bft.objective_loss)]
    for call in calls:
        for wrong in (None, {}, others):
            with pytest.raises(ValueError, match=rf"'{name}' needs extra\['{need}'\], 60 numbers; there are (none|something else)"):
                call(wrong)
        for values in (extra[need][:-1], extra[need][None], torch.tensor(1.0)):
            with pytest.raises(ValueError, match=rf"extra\['{need}'\] must be \(N,\) = \(60,\); it is \("):
                call({need: values})
        call({**extra, **others})                                         # of no account


def test_a_weighting_sees_no_more_than_it_needs_and_no_gradient(monkeypatch):
    seen = []

    def look(tokens):
        seen.append(tokens)
        return torch.ones_like(tokens.logp)

    for needs in ((), ("entropy", "ref_logp")):
        monkeypatch.setitem(bft.OBJECTIVES, "mine", bft.Objective(look, bft.every_sample_1, "tokens", needs))
        extra = {name: torch.rand(4, requires_grad=True) for name in (*bft.DISTRIBUTION, "ref_logp")}
        bft.token_weights(torch.zeros(4, requires_grad=True), torch.tensor([0, 4]), "mine", 3, extra)
        tokens = seen.pop()
        assert tokens.extra.keys() == set(needs) and tokens.group_size == 3 and tokens.offsets.tolist() == [0, 4]
        assert all(x.dtype == torch.float64 and not x.requires_grad for x in (tokens.logp, *tokens.extra.values()))


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.needs])
def test_loss_from_logits_equals_the_packed_model(name):
    """The extras of the head, and those of logits, in the loss that they are for; the reference beside labels."""
    model, samples = tiny(std=0.5), random_samples(6)
    samples = [sample._replace(ref_logp=torch.randn(int(sample.response.sum())).sub(4).numpy()) for sample in samples]
    batch = collate(samples)
    looks = bft.distribution_needs(name)
    logp, extra = model(batch.input_ids, batch.lengths, batch.at, batch.targets, looks=looks) if looks else (
        model(batch.input_ids, batch.lengths, batch.at, batch.targets), {})
    packed = bft.objective_loss(logp, batch.offsets, name, 5, extra={**extra, "ref_logp": batch.ref_logp})
    longest = max(batch.lengths)
    ids, labels = torch.zeros(6, longest, dtype=torch.int64), torch.full((6, longest), -100)
    ref_logp = torch.full((6, longest), math.nan)                         # which must not be looked at
    for row, sample in enumerate(samples):
        n, response = len(sample.ids), torch.from_numpy(sample.response)
        ids[row, :n] = torch.from_numpy(sample.ids)
        labels[row, :n][response] = ids[row, :n][response]
        ref_logp[row, :n][response] = torch.from_numpy(sample.ref_logp)
    logits = model(ids)
    loss = bft.loss_from_logits(logits, labels, name, 5, extra={"ref_logp": ref_logp})
    torch.testing.assert_close(loss, packed, rtol=1e-5, atol=1e-6)
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(x, list(model.parameters()))]) for x in (loss, packed)]
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()
    if "ref_logp" in TABLE[name].needs:
        with pytest.raises(ValueError, match="needs extra.'ref_logp'"):
            bft.loss_from_logits(logits, labels, name, 5)
        for wrong in (ref_logp[:, 1:], ref_logp[:1], ref_logp[0], ref_logp[..., None]):
            with pytest.raises(ValueError, match="ref_logp"):
                bft.loss_from_logits(logits, labels, name, 5, extra={"ref_logp": wrong})


# ---------------------------------------------------------------------------------------------------------------------
# Worked examples

P = [0.9, 0.8, 0.1, 0.5, 0.6, 0.9]
P_REF = [0.9, 0.6, 0.3, 0.5, 0.3, 0.8]


def numbers(line):
    return [float(x) for x in line.split()[-6:]]


@pytest.mark.parametrize("name, w, s", [
    ("power-2", [x * x for x in P], [1] * 6),
    # The three tokens of this vocabulary: p, and twice (1 - p) / 2.
    ("deft", [x ** (x ** 2 + (1 - x) ** 2 / 2) for x in P], [1] * 6),
    ("eaft", [-(x * math.log(x) + (1 - x) * math.log((1 - x) / 2)) / 3 for x in P], [1] * 6),
    ("iw-sft", [1] * 6, [(0.9 / 0.9 * 0.8 / 0.6 * 0.1 / 0.3 * 0.5 / 0.5) ** (1 / 4)] * 4 + [(0.6 / 0.3 * 0.9 / 0.8) ** (1 / 2)] * 2),
    ("asft", [x + 0.1 * (y / x - 1) for x, y in zip(P, P_REF)], [1] * 6)])
def test_worked_examples_agree_with_a_pocket_calculator(name, w, s):
    head, block, *_ = bft.worked_example([name]).split("\n\n")[1:]
    lines = {line[:24].strip(): numbers(line) for line in head.splitlines()[1:]}
    assert lines["p_t"] == P
    if "ref_logp" in TABLE[name].needs:
        assert lines["ref_logp"] == [pytest.approx(math.log(y), abs=6e-5) for y in P_REF]
    title, *rows = block.splitlines()
    loss = sum(a * b * -math.log(x) for a, b, x in zip(w, s, P)) / 6
    assert title.startswith(f"{name}: loss ") and float(title.split()[2]) == pytest.approx(loss, abs=6e-5)
    gradient = [-a * b * (1 - x) / 6 for a, b, x in zip(w, s, P)]
    assert [numbers(row) for row in rows] == [pytest.approx(x, abs=6e-5) for x in (w, s, gradient)]
