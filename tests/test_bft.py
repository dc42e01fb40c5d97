"""The objectives against plain loops in float64, written from the equations and sharing no code with bft.py."""

import math
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
from support import ROOT

import bft


# The table of README, by hand: token weight, sample weight, average. For a row of your own to be compared with loops: a line
# here and in README, its weights in `reference`, and their symbols in the test of README.
TABLE = {"sft": ("1", "1", "tokens"), "dft": ("p", "1", "tokens"), "bft": ("p", "1-C", "samples"),
         "bft-v3": ("p/c", "1-min c", "samples"), "sft-sample": ("1", "1", "samples"),
         "bft-token": ("p", "1", "samples"), "bft-sample": ("1", "1-C", "samples"), "bft-tokavg": ("p", "1-C", "tokens")}


def reference(samples, objective, g, denominator=None):
    """Loss, d loss / d logp and the weights of a list of samples (lists of log-probs), by loops over Python floats."""
    token, sample, average = TABLE[objective]
    N, B = sum(map(len, samples)), sum(len(x) > 0 for x in samples)
    denominator = denominator or (N if average == "tokens" else B)
    loss, gradient, weights = 0.0, [], []
    for x in samples:
        n, p = len(x), [math.exp(v) for v in x]
        if n == 0:
            continue
        if n < g:
            C = math.exp(math.fsum(x) / n)
        else:
            C = min(math.exp(math.fsum(x[i:i + g]) / g) for i in range(n - g + 1))
        c = []
        for t in range(n):
            window = [p[u] for u in range(t - g // 2, t - g // 2 + g) if 0 <= u < n]
            c.append(math.fsum(window) / len(window))
        s = {"1": 1.0, "1-C": 1 - C, "1-min c": 1 - min(c)}[sample]
        for t in range(n):
            w = {"1": 1.0, "p": p[t], "p/c": min(max(p[t] / (c[t] + 1e-8), 0.0), 1.0)}[token]
            share = s * w / (n if average == "samples" else 1) / denominator
            loss += share * -x[t]
            gradient.append(-share)
            weights.append(s * w)
    return loss, gradient, weights


def ragged(samples, **tensor):
    logp = torch.tensor([v for x in samples for v in x], **{"dtype": torch.float32, **tensor})
    return logp, torch.tensor([0, *map(len, samples)]).cumsum(0)


def random_case(rng):
    """Ragged samples of all critical lengths, with probabilities near 0, near 1, and between."""
    g = rng.choice([1, 2, 3, 4, 5, 8, 16])
    lengths = [rng.choice([0, 1, max(g - 1, 0), g, g + 1, 3 * g, rng.randint(0, 40)]) for _ in range(rng.randint(1, 7))]
    if rng.random() < 0.05:
        lengths = [0] * len(lengths)
    kind = rng.choice(["low", "high", "mixed", "mixed"])
    low, high = (lambda: -rng.uniform(10, 80)), (lambda: -10 ** rng.uniform(-7, -3))
    draw = {"low": low, "high": high,
            "mixed": lambda: rng.choice([low, high, lambda: math.log(rng.uniform(0.001, 1))])()}[kind]
    return [[float(torch.tensor(draw())) for _ in range(n)] for n in lengths], g       # float32 values, exactly


@pytest.mark.parametrize("objective", TABLE)
def test_every_row_and_its_gradient_equals_the_loops(objective):
    rng = random.Random(0)
    for case in range(300):
        samples, g = random_case(rng)
        denominator = rng.choice([None, None, 7, 1000.0])
        loss, gradient, weights = reference(samples, objective, g, denominator) if any(samples) else (0.0, [], [])
        logp, offsets = ragged(samples)
        logp.requires_grad_()
        ours = bft.objective_loss(logp, offsets, objective, g, denominator)
        ours.backward()
        assert ours.dtype == torch.float32 and ours.shape == ()
        assert math.isclose(ours.item(), loss, rel_tol=1e-5, abs_tol=1e-12), (case, samples, g)
        scale = max(map(abs, gradient), default=0)
        torch.testing.assert_close(logp.grad, torch.tensor(gradient), rtol=1e-5, atol=1e-7 * scale, msg=str(case))
        got = bft.token_weights(logp, offsets, objective, g)
        assert not got.requires_grad
        torch.testing.assert_close(got, torch.tensor(weights), rtol=1e-5, atol=1e-7)


def test_readme_shows_this_table_and_docs_these_functions():
    readme, method = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/method.md"))
    symbols = {"1": "1", "p": "sg($p_t$)", "p/c": r"sg(clip($p_t / (c_t + \epsilon)$, 0, 1))", "1-C": "sg($1 - C_b$)",
               "1-min c": r"sg($1 - \min_t c_t$)"}
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (.*?\|.*?\|.*?) \|", readme, re.M))
    assert rows == {name: " | ".join([symbols[w], symbols[s], average]) for name, (w, s, average) in TABLE.items()}
    assert [n for n in bft.OBJECTIVES if n in TABLE] == list(rows)        # (a fork may have rows of its own)
    assert all(bft.OBJECTIVES[n].average == TABLE[n][2] for n in rows)
    named = re.findall(r"^\| .* \| ((?:`\w+`(?:, )?)+).* \|$", method.split("| equation |")[1].split("\n\n")[0], re.M)
    functions = re.findall(r"`(\w+)`", " ".join(named))
    assert len(functions) == 6 and all(hasattr(bft, f) for f in functions)


def test_confidences_by_hand():
    p = torch.tensor([0.5, 0.25, 1.0, 0.125, 0.5])
    offsets = torch.tensor([0, 3, 3, 5])
    C = bft.group_confidence(p.log(), offsets, group_size=2)
    # sample 0: windows (.5 .25) (.25 1); sample 1: empty; sample 2: one window (.125 .5)
    torch.testing.assert_close(C, torch.tensor([math.sqrt(0.125), 1.0, 0.25], dtype=torch.float64))
    c = bft.local_confidence(p.log(), offsets, group_size=2)              # [t-1, t]
    torch.testing.assert_close(c, torch.tensor([0.5, 0.375, 0.625, 0.125, 0.3125], dtype=torch.float64))
    C = bft.group_confidence(p.log(), offsets, group_size=256)            # shorter than a group: one window, all of it
    torch.testing.assert_close(C, torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64))


def test_confidences_carry_no_gradient():
    logp, offsets = torch.tensor([0.5, 0.25]).log().requires_grad_(), torch.tensor([0, 2])
    assert not bft.group_confidence(logp, offsets, 1).requires_grad
    assert not bft.local_confidence(logp, offsets, 1).requires_grad


def test_the_global_denominator_counts_what_the_average_is_over():
    lengths = [3, 0, 5, 1]                                                # one sample has no response token
    for objective, row in bft.OBJECTIVES.items():
        expected = 9 if row.average == "tokens" else 3
        count = bft.global_denominator(objective, lengths)
        assert count == expected and type(count) is int
        assert torch.equal(bft.global_denominator(objective, torch.tensor(lengths)), torch.tensor(expected))
        assert bft.global_denominator(objective, []) == 0
    with pytest.raises(ValueError, match="bfd"):
        bft.global_denominator("bfd", lengths)


def test_sample_sums():
    sums = bft.sample_sums(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 3, 3, 4]))
    assert sums.dtype == torch.float64 and sums.tolist() == [6, 0, 4]


def test_a_sample_does_not_see_its_neighbours():
    torch.manual_seed(0)
    a, b, c = (-torch.rand(n) * 5 for n in (20, 7, 33))
    offsets = torch.tensor([0, 20, 27, 60])
    for objective in bft.OBJECTIVES:
        alone = bft.token_weights(b, torch.tensor([0, 7]), objective, 5)
        for before, after in ((a, c), (torch.zeros(20), torch.full((33,), -50.0)), (torch.full((20,), -math.inf), c)):
            torch.testing.assert_close(bft.token_weights(torch.cat((before, b, after)), offsets, objective, 5)[20:27], alone)


def test_micro_batches_with_one_denominator_add_up():
    torch.manual_seed(0)
    logp, offsets = -torch.rand(60) * 5, torch.tensor([0, 20, 20, 27, 60])
    for objective, row in bft.OBJECTIVES.items():
        whole = bft.objective_loss(logp, offsets, objective, 5)
        denominator = 60 if row.average == "tokens" else 3
        parts = (bft.objective_loss(logp[:20], offsets[:3], objective, 5, denominator)
                 + bft.objective_loss(logp[20:], offsets[2:] - 20, objective, 5, torch.tensor(denominator)))
        torch.testing.assert_close(whole, parts)


def test_a_call_without_response_tokens_is_a_zero_with_a_gradient():
    for offsets in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        for objective in bft.OBJECTIVES:
            x = torch.ones(3, requires_grad=True)
            loss = bft.objective_loss(x[:0], offsets, objective)
            loss.backward()
            assert loss.item() == 0 and x.grad.tolist() == [0, 0, 0]
    logits = torch.randn(2, 5, 11, requires_grad=True)
    loss = bft.loss_from_logits(logits, torch.full((2, 5), -100))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


@pytest.mark.parametrize("objective", TABLE)
def test_loss_from_logits_shifts_and_ignores(objective):
    rng = random.Random(1)
    for _ in range(30):
        B, T, V, g = rng.randint(1, 4), rng.randint(2, 12), 13, rng.choice([1, 3, 256])
        logits = torch.randn(B, T, V, dtype=torch.float32) * 3
        labels = torch.randint(V, (B, T))
        labels[torch.rand(B, T) < 0.4] = -100
        samples = [[torch.log_softmax(logits[b, t].double(), 0)[labels[b, t + 1]].item() for t in range(T - 1)
                    if labels[b, t + 1] != -100] for b in range(B)]
        expected = reference(samples, objective, g)[0] if any(samples) else 0.0
        assert math.isclose(bft.loss_from_logits(logits, labels, objective, g).item(), expected, rel_tol=1e-5, abs_tol=1e-9)
        for dtype, result in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
            assert bft.loss_from_logits(logits.to(dtype), labels, objective, g).dtype == result


def test_mistakes_are_value_errors_that_name_the_value():
    logp, offsets = torch.zeros(4), torch.tensor([0, 4])
    for call in (bft.group_confidence, bft.local_confidence, bft.token_weights, bft.objective_loss):
        for bad, words in (([1, 4], "from 1 to 4"), ([0, 3], "from 0 to 3"), ([0, 3, 2, 4], "falling from 3 to 2"),
                           ([0, 5], "from 0 to 5"), ([4], "from 4 to 4"), ([], r"\(0,\)")):
            with pytest.raises(ValueError, match=f"offsets.*{words}"):
                call(logp, torch.tensor(bad, dtype=torch.int64))
        for g in (0, -3):
            with pytest.raises(ValueError, match=str(g)):
                call(logp, offsets, group_size=g)
    for call in (bft.token_weights, bft.objective_loss):
        with pytest.raises(ValueError, match="bfd"):
            call(logp, offsets, objective="bfd")
    for denominator in (0, -1):
        for n in (4, 0):
            with pytest.raises(ValueError, match=str(denominator)):
                bft.objective_loss(logp[:n], offsets[:1 + n // 4], denominator=denominator)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        bft.loss_from_logits(torch.zeros(2, 4, 5), torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.slow
@pytest.mark.parametrize("objective", bft.OBJECTIVES)
def test_compiles_into_one_graph_with_the_same_numbers(objective):
    torch._dynamo.reset()                                     # the two use every function; generating code takes long
    backend = "inductor" if objective in ("bft", "bft-v3") and shutil.which("g++") else "aot_eager"
    compiled = torch.compile(lambda x, o: bft.objective_loss(x, o, objective, 4), fullgraph=True, backend=backend)
    for lengths in ([7, 0, 3], [12, 1]):
        samples = [[-random.Random(n + i).uniform(0, 5) for i in range(n)] for n in lengths]
        (logp, offsets), (again, _) = ragged(samples), ragged(samples)
        loss, other = bft.objective_loss(logp.requires_grad_(), offsets, objective, 4), compiled(again.requires_grad_(), offsets)
        loss.backward()
        other.backward()
        torch.testing.assert_close(other, loss)
        torch.testing.assert_close(again.grad, logp.grad)


@pytest.mark.slow
def test_imports_alone(tmp_path):
    """bft.py copied into an empty directory needs torch and nothing else, of ours or of others."""
    shutil.copy(ROOT / "bft.py", tmp_path)
    code = ("import sys, torch; before = set(sys.modules); import bft; "
            "print(sorted(m for m in set(sys.modules) - before if not m.startswith('torch')))")
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
                         env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}).stdout
    assert out.strip() == "['bft']"


def test_the_worked_example_agrees_with_a_pocket_calculator():
    p = [0.9, 0.8, 0.1, 0.5, 0.6, 0.9]
    C = [min((0.9 * 0.8 * 0.1) ** (1 / 3), (0.8 * 0.1 * 0.5) ** (1 / 3))] * 4 + [(0.6 * 0.9) ** (1 / 2)] * 2
    c = [(0.9 + 0.8) / 2, (0.9 + 0.8 + 0.1) / 3, (0.8 + 0.1 + 0.5) / 3, (0.1 + 0.5) / 2, (0.6 + 0.9) / 2, (0.6 + 0.9) / 2]
    one, difficulty, tokens, samples = [1] * 6, [1 - x for x in C], [1 / 6] * 6, [1 / 4 / 2] * 4 + [1 / 2 / 2] * 2
    rows = {"sft": (one, one, tokens), "dft": (p, one, tokens), "bft": (p, difficulty, samples), "sft-sample": (one, one, samples),
            "bft-token": (p, one, samples), "bft-sample": (one, difficulty, samples), "bft-tokavg": (p, difficulty, tokens),
            "bft-v3": ([1, 1, 0.1 / ((0.8 + 0.1 + 0.5) / 3), 1, 0.6 / 0.75, 1], [1 - 0.3] * 4 + [1 - 0.75] * 2, samples)}
    head, *blocks, _ = bft.worked_example().split("\n\n")[1:]
    numbers = lambda line: [float(x) for x in line.split()[-6:]]           # noqa: E731
    expected = [p, [-math.log(x) for x in p], C, c]
    assert [numbers(line) for line in head.splitlines()[1:]] == [pytest.approx(x, abs=6e-5) for x in expected]
    blocks = {block.split(":")[0]: block for block in blocks}
    assert list(blocks) == list(bft.OBJECTIVES)
    for name, (w, s, share) in rows.items():
        title, *lines = blocks[name].splitlines()
        loss = sum(a * b * d * -math.log(x) for a, b, d, x in zip(w, s, share, p))
        assert float(title.split("loss ")[1].split()[0]) == pytest.approx(loss, abs=6e-5)
        gradient = [-a * b * d * (1 - x) for a, b, d, x in zip(w, s, share, p)]
        assert [numbers(line) for line in lines] == [pytest.approx(x, abs=6e-5) for x in (w, s, gradient)]
