"""Samples as flat arrays, and that the ranks of a node share them."""

import json
import sys
import tracemalloc

import numpy as np
import pytest
from forked import forked
from support import ASSETS, ROOT, SMALL, metrics

import data
import hf
from runtime.node import write
from runtime.process import UserError
from runtime.run_directory import tokens_sha256


WORKER = ROOT / "tests" / "node_worker.py"
GOOD = '{"prompt": "What?", "response": "That, and nothing else."}\n'


def drawn(count, seed=0):
    """(Samples, the same as a list of Sample)."""
    rng = np.random.RandomState(seed)
    samples, expected = data.Samples(), []
    for number in range(1, count + 1):
        ids = rng.randint(0, 2 ** 31, size=rng.randint(2, 30), dtype=np.int64)
        response = rng.rand(len(ids)) < 0.5
        group = (None, "a", "α\0")[number % 3]
        where = f"7.jsonl:{number}" if number < count / 2 else f"b7 7: row {number}"
        samples.append(ids.tolist(), response.tolist(), group, number, where)
        expected.append(data.Sample(ids, response, group, number, where))
    return samples, expected


def assert_same(some, expected):
    assert len(some) == len(expected)
    for sample, other in zip(some, expected, strict=True):
        assert sample[2:] == other[2:] and type(sample.line) is int
        for a, b in zip(sample[:2], other[:2]):
            assert type(a) is np.ndarray and a.dtype == b.dtype and a.flags.writeable and a.tolist() == b.tolist()


def test_samples_are_read_as_a_list_of_them(tmp_path):
    samples, expected = drawn(50)
    samples.save(tmp_path)
    mapped = data.Samples.load(tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()
    for some in (samples, mapped):
        assert_same(some, expected)
        assert_same(some[::3], expected[::3])
        assert_same(some[-4:None], expected[-4:])
        assert_same([some[0], some[-1], some[np.int64(7)]], [expected[0], expected[-1], expected[7]])
        with pytest.raises(IndexError):
            some[50]
        assert some.lengths.tolist() == [len(sample.ids) for sample in expected]
        assert some.response_lengths.tolist() == [sample.response.sum() for sample in expected]
        assert tokens_sha256(some) == tokens_sha256(samples)


def test_no_samples_are_samples(tmp_path):
    none = data.Samples()
    none.save(tmp_path)
    for samples in (none, data.Samples.load(tmp_path)):
        assert not samples and list(samples) == samples[:3] == [] and tokens_sha256(samples) == tokens_sha256(none)
        assert samples.lengths.tolist() == samples.response_lengths.tolist() == []


def test_whatever_else_is_learned_has_another_digest():
    """Another id, another response, another end of a sample or of a set."""
    def samples_of(*lists):
        samples = data.Samples()
        for line, (ids, response) in enumerate(lists, 1):
            samples.append(ids, response, None, line)
        return samples
    sets = [[samples_of(([1, 2], [0, 1]), ([3], [1]))], [samples_of(([1, 2], [0, 1]), ([4], [1]))],
            [samples_of(([1, 2], [1, 1]), ([3], [1]))], [samples_of(([1], [0]), ([2, 3], [1, 1]))],
            [samples_of(([1, 2, 3], [0, 1, 1]))], [samples_of(([1, 2], [0, 1])), samples_of(([3], [1]))]]
    assert len({tokens_sha256(*some) for some in sets}) == len(sets)
    assert tokens_sha256(*sets[0]) == tokens_sha256(samples_of(([1, 2], [0, 1]), ([3], [1])))


def test_samples_take_little_more_than_their_tokens(tmp_path):
    """What is left of them after loading, and the most that there is meanwhile."""
    tokenizer = hf.load_tokenizer(ASSETS)
    file = tmp_path / "a.jsonl"
    file.write_text(GOOD)
    data.load_samples(file, tokenizer)                                    # whatever is kept for later, is kept now
    left, most, sizes = [], [], (200, 2200)
    for rows in sizes:
        file.write_text(GOOD * rows)
        tracemalloc.start()
        samples, _ = data.load_samples(file, tokenizer)
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        tokens = len(samples.ids)
        assert len(samples) == rows
        left.append(kept - 5 * tokens)
        most.append(peak - 5 * tokens)
    for numbers in (left, most):
        assert (numbers[1] - numbers[0]) / (sizes[1] - sizes[0]) < 60


def test_fifty_thousand_samples_take_little_more_than_their_tokens():
    tracemalloc.start()
    samples = data.Samples()
    for number in range(1, 50_001):
        samples.append([5, 6, 7, 8], [False, False, True, True], "a", number, f"here:{number}")
    kept, peak = tracemalloc.get_traced_memory()
    assert samples.response_lengths.sum() == 100_000 and samples.lengths.sum() == 200_000
    _, peak_later = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert max(kept, peak) < 50_000 * (4 * 5 + 60)
    assert peak_later < peak + 50_000 * 8 * 2                            # some numbers a sample, none a token


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_memory_holds_samples_once_a_node():
    """200 MB of tokens are nobody's own, not even rank 0's, which made them."""
    result = forked(3, WORKER, "memory", 20_000)
    assert result.returncode == 0, result.stderr
    own = sorted(int(line) for line in result.stdout.splitlines())
    assert len(own) == 3 and own[1] < 3_000_000 and own[2] < 20_000_000


@pytest.mark.slow
def test_ranks_that_share_their_samples_train_like_one(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    file = tmp_path / "data.jsonl"
    file.write_text("".join((ASSETS / "finetune.jsonl").read_text().splitlines(keepends=True)[::16]))
    argv = [ROOT / "train.py", *SMALL, "--data", file, "--steps", 8, "--batch-size", 7, "--micro-tokens", 200]
    said, records = [], []
    for ranks, more in ((1, []), (1, ["--val-data", file]), (3, []), (3, ["--val-data", file])):
        out = tmp_path / f"{ranks} {len(more)}"
        result = forked(ranks, *argv, *more, "--out", out, env={"TMPDIR": str(shared)})
        assert result.returncode == 0, result.stderr
        said.append([line for line in result.stdout.splitlines() if line.startswith(str(file))])
        records.append(json.loads((out / "config.json").read_text())["sha256"])
        # torch's compiler leaves something of its own.
        assert not list(shared.rglob("*.npy"))
    assert said[:2] == said[2:] and len(said[0]) == 1 and len(said[1]) == 2
    assert records[:2] == records[2:] and records[0]["tokens"] != records[1]["tokens"]
    one, three = metrics(tmp_path / "1 2"), metrics(tmp_path / "3 2")
    assert len(one) == len(three) == 10
    for a, b in zip(one, three):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--data", "--val-data"])
def test_a_bad_row_is_one_sentence_on_several_ranks(flag, tmp_path):
    (tmp_path / "good.jsonl").write_text(GOOD * 4)
    (tmp_path / "bad.jsonl").write_text(GOOD * 4 + "oops\n")
    files = {"--data": "good.jsonl", flag: "bad.jsonl"}
    argv = [word for pair in files.items() for word in pair]
    result = forked(3, ROOT / "train.py", *SMALL, *argv, "--out", "run", cwd=tmp_path, env={"TMPDIR": str(tmp_path)})
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: bad.jsonl:5: not JSON")
    assert not (tmp_path / "run").exists() and not list(tmp_path.rglob("*.npy"))


@pytest.mark.slow
@pytest.mark.parametrize("rows, words", [
    (GOOD * 4 + "oops\n", "data.jsonl:5: not JSON"),
    (GOOD * 5, "data.jsonl: nodes read different samples; expected the same files on each"),
    (GOOD.replace("That", "This") + GOOD * 3, "data.jsonl: nodes read different samples; expected the same files on each"),
    (GOOD * 4, None)])
def test_every_node_reads_the_files_and_they_must_be_the_same(rows, words, tmp_path):
    for node, content in enumerate((GOOD * 4, rows)):
        (tmp_path / str(node)).mkdir()
        (tmp_path / str(node) / "data.jsonl").write_text(content)
    result = forked(2, WORKER, "nodes", *SMALL, "--data", "data.jsonl", "--steps", 1, "--out", tmp_path / "run", cwd=tmp_path)
    if words is None:
        assert result.returncode == 0, result.stderr
        return
    assert result.returncode == 2 and result.stderr.startswith(f"error: {words}") and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ranks_wait_for_each_other_for_as_long_as_it_takes():
    result = forked(2, WORKER, "late")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_mistake_on_one_node_is_an_error_on_every_rank():
    result = forked(2, WORKER, "refused")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "refused\n" * 2


def test_what_cannot_be_written_is_one_sentence(tmp_path):
    samples, _ = drawn(3)
    with pytest.raises(UserError, match=r"missing: what the ranks of a node share cannot be written: .*TMPDIR"):
        write(samples, tmp_path / "missing")
