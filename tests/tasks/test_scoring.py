"""Log-likelihoods against direct calculations, and what the ranks do of them."""

import re
import types

import numpy as np
import pytest
import torch
from evaluation_files import log_likelihood, small
from forked import forked
from support import ASSETS, ROOT, SMALL, count_compiled_rows, metrics

import data
import hf
from data import load_samples
from runtime import progress
from runtime.process import UserError
from tasks import scoring, writing
from tasks.inspect import inspect_item
from tasks.nll import nll_items
from tasks.reference import token_logprobs
from tasks.scoring import Request, as_device_likes, loglikelihood, micro_batches_of_rank, score, sum_over_ranks


@pytest.fixture(scope="module")
def tokenizer():
    return hf.load_tokenizer(ASSETS)


@pytest.fixture(scope="module")
def samples(tokenizer):
    return load_samples(ASSETS / "finetune.jsonl", tokenizer)[0]


def test_nll_equals_a_direct_calculation(tokenizer, samples):
    model = small(tokenizer, 0)
    for sample, item in zip(samples[:9], nll_items(model, samples[:9], group_size=8)):
        start = int(sample.response.argmax())
        assert item["nll"] == pytest.approx(-log_likelihood(model, sample.ids.tolist(), start), rel=1e-5)
        assert item["tokens"] == len(sample.ids) - start and 0 < item["confidence"] < 1
        assert (item["line"], item["group"]) == (sample.line, sample.group)


def test_scores_do_not_depend_on_the_micro_batch(tokenizer, samples):
    model = small(tokenizer, 0)
    whole, single = (score(model, samples[:40], micro_tokens=m) for m in (100_000, 1))
    np.testing.assert_allclose(whole, single, rtol=1e-5, atol=1e-8)


def test_log_probs_of_tokens_are_in_the_order_of_the_samples(tokenizer, samples):
    """Whichever micro-batches they are read in."""
    model, some = small(tokenizer, 0), data.Samples()
    for sample in samples[:30]:
        some.append(sample.ids.tolist(), sample.response.tolist(), None, sample.line)
    found = [token_logprobs(model, some, micro_tokens=micro_tokens) for micro_tokens in (100_000, 100, 1)]
    for logp in found:
        assert logp.dtype == torch.float32 and logp.device.type == "cpu" and not logp.requires_grad
        for sample, own in zip(some, logp.split(some.response_lengths.tolist()), strict=True):
            start = int(sample.response.argmax())
            assert own.double().sum().item() == pytest.approx(log_likelihood(model, sample.ids.tolist(), start), rel=1e-5)
            with torch.no_grad():
                last = model(torch.from_numpy(sample.ids)[None])[0, -2].log_softmax(-1)[sample.ids[-1]]
            torch.testing.assert_close(own[-1], last, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logp, found[0], rtol=1e-5, atol=1e-5)
    model.norm.weight.data[0] = torch.nan
    with pytest.raises(UserError, match="no numbers"):
        token_logprobs(model, some)


def test_a_cpu_reads_few_tokens_at_a_time(tokenizer, samples):
    """Whatever was asked for, but for a sample that is longer."""
    model, read = small(tokenizer, 0), []
    model.register_forward_pre_hook(lambda _, inputs: read.append(inputs[1]))
    score(model, samples[:100])
    loglikelihood(model, [Request(list(range(n, 2 * n)), [n]) for n in range(250, 270)] + [Request([5] * 1500, [6])])
    assert max(map(sum, read)) == 1500 and sorted(map(sum, read))[-2] <= 1024 and sorted(map(sum, read))[-3] > 900
    assert as_device_likes(8192, torch.device("cuda")) == 8192 and as_device_likes(100, torch.device("cpu")) == 100


def test_scoring_can_be_cut_short(tokenizer, samples):
    model, calls = small(tokenizer, 0), []
    model.register_forward_pre_hook(lambda *_: calls.append(0))
    score(model, samples[:20], micro_tokens=100, stopped=lambda: len(calls) == 2)
    assert len(calls) == 2


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_a_validation_on_all(tmp_path):
    """Of a sharded model, at the same micro-batch: none waits for the rows of one that is gone."""
    lines = (ASSETS / "finetune.jsonl").read_text().splitlines(keepends=True)[::16]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    worker = ROOT / "tests" / "runtime" / "fault_worker.py"
    done = forked(3, worker, "validating", 1, 1, "--", *SMALL, "--shard", "all", "--data", tmp_path / "data.jsonl", "--val-data", tmp_path / "data.jsonl",
                  "--micro-tokens", 300, "--out", tmp_path / "out")
    assert done.returncode == 143, done.stderr
    assert "Traceback" not in done.stderr and metrics(tmp_path / "out") == []


def test_a_context_is_read_once_for_all_that_follows_it(tokenizer):
    """Whatever is in a micro-batch, and whatever is cut at the beginning."""
    model, read = small(tokenizer, 0, positions=12), []
    hook = model.register_forward_pre_hook(lambda _, inputs: read.append((inputs[1], inputs[4])))
    context = list(range(5, 14))
    requests = [Request(context, [20]), Request(context, [21]), Request(context, [22, 23, 24, 25, 26]), Request(context[:4], [5]),
                Request(context, [30, 31, 32]), Request(context, [20]), Request(context, [30, 31, 33]), Request(context[:4], [7, 8])]
    found = loglikelihood(model, requests)
    hook.remove()
    # The third loses the beginning of its context, so that it has one of its own.
    assert read == [([8, 4, 9, 2, 4, 1], {1: 0, 3: 2, 5: 4})]
    for (before, ids), value in zip(requests, found):
        whole = (before + ids[:-1])[-12:]
        assert value == pytest.approx(log_likelihood(model, whole + ids[-1:], len(whole) - len(ids) + 1), abs=1e-4)
    np.testing.assert_allclose(loglikelihood(model, requests, micro_tokens=1), found, rtol=1e-5)


def test_nothing_is_compiled_for_an_evaluation(tokenizer, samples, monkeypatch):
    model, counter = small(tokenizer, 0), count_compiled_rows(monkeypatch)
    score(model, samples[:2])
    loglikelihood(model, [Request([1, 2], [3, 4])])
    inspect_item(model, tokenizer, samples[0])
    assert counter.frame_count == 0
    model(torch.arange(9), [9], torch.arange(8), torch.arange(8))         # a caller who says nothing
    assert counter.frame_count == 1


def test_ranks_share_the_micro_batches_of_one(monkeypatch):
    lengths = [7, 3, 9, 1, 5, 5, 2, 8] * 3
    one = micro_batches_of_rank(lengths, 10)
    assert sorted(i for micro_batch in one for i in micro_batch) == list(range(24)) and len(one) > 9
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 5)
    shares = []
    for rank in range(5):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shares.append(micro_batches_of_rank(lengths, 10))
    empty = -len(one) % 5
    assert empty and sorted(micro_batch for share in shares for micro_batch in share) == [[]] * empty + sorted(one)
    assert len({len(share) for share in shares}) == 1                     # a sharded model needs as many passes from each
    assert micro_batches_of_rank(lengths, 10, dealt=False) == one


def test_numbers_that_are_none_are_refused():
    with pytest.raises(UserError, match=r"no numbers \(NaN\)"):
        sum_over_ranks(torch.tensor([1.0, float("nan")]))


class Clock:
    """A time that goes on by so many seconds whenever it is told to."""
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)

    def work(self, seconds, parts, label="m: nll"):
        for _ in progress.with_progress(list(range(parts)), label):
            self.now += seconds


def test_long_work_says_on_stderr_how_long_it_will_take(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    clock.work(2, 10)
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == ["m: nll: 3 of 10 parts, 14 s left", "m: nll: 6 of 10 parts, 8 s left", "m: nll: 9 of 10 parts, 2 s left"]
    clock.work(60, 11)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[0] == "m: nll: 1 of 11 parts, 10 min left"
    clock.work(4000, 3)
    assert capsys.readouterr().err.splitlines()[0] == "m: nll: 1 of 3 parts, 2.2 h left"


def test_embeddings_say_how_far_they_have_come(tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0)
    monkeypatch.setattr(scoring, "CPU_MICRO_TOKENS", 10)
    monkeypatch.setattr(writing, "ENCODED", 2)
    writing.embed_self(small(tokenizer, 0), tokenizer, ["one two three four"] * 9, label="m: profile")
    said = capsys.readouterr().err.splitlines()
    assert len(said) > 2 and all(re.match(r"m: profile: \d of \d parts", line) for line in said)
    encoder = types.SimpleNamespace(encode=lambda texts, **_: np.array([[len(text)] for text in texts]))
    assert writing.encode(encoder, 1, "e: embeddings", ["a", "", "bb", "ccc", " ", "dddd", "eeeee"]).T.tolist() == [[1, 0, 2, 3, 0, 4, 5]]
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == ["e: embeddings: 1 of 3 parts", "e: embeddings: 2 of 3 parts"]


def test_short_work_other_ranks_and_training_are_silent(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    clock.work(1, 5)
    clock.work(60, 5, label=None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    clock.work(60, 5)
    assert capsys.readouterr() == ("", "")
