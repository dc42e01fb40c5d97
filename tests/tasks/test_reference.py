"""ref_logp: log p of every response token under the weights that a run starts from, computed once, kept, and part of the run."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from forked import forked
from support import ASSETS, ROOT, SMALL, call, metrics, save_with_tokenizer, tiny

import bft
import hf
import train
from data import load_samples
from hf.start import scratch_config
from model import GPT
from runtime.checkpoint import checkpoints
from runtime.files import load_safetensors, save_safetensors


VARIANTS = [ROOT / "variants" / f"{name}.py" for name in ("iw_sft", "asft")]
FILE = "ref_logp.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, and 14 samples of some 50 tokens."""
    path = tmp_path_factory.mktemp("reference")
    (path / "data.jsonl").write_text("".join((ASSETS / "finetune.jsonl").read_text().splitlines(keepends=True)[::48]))
    save_with_tokenizer(tiny(std=0.1, vocab_size=hf.load_tokenizer(ASSETS).n_vocab, max_position_embeddings=512), path / "base")
    return path


def argv_of(folder, *more, init=None):
    """Four steps of iw-sft, with a checkpoint after each second one."""
    start = ["--init", folder / "base", "--dtype", "float32", "--group-size", 16] if init is None else init
    return [*start, "--data", folder / "data.jsonl", "--lr", 1e-2, "--steps", 4, "--batch-size", 6, "--micro-tokens", 200, "--save-every", 2,
            "--keep", 9, "--variant", *VARIANTS, "--objective", "iw-sft", *more]


def log_probs(model, folder):
    """Of every response token, by plain logits of one sample after the other."""
    found = []
    for sample in load_samples(folder / "data.jsonl", hf.load_tokenizer(ASSETS))[0]:
        ids = torch.from_numpy(sample.ids)
        with torch.no_grad():
            logp = model(ids[None])[0].log_softmax(-1)                    # (T, V)
        found += [logp[t - 1, ids[t]].item() for t in range(len(ids)) if sample.response[t]]
    return torch.tensor(found)


def weights_of(out):
    return load_safetensors(out / "model" / "model.safetensors")


def assert_equal(a, b):
    assert metrics(a) == metrics(b)
    a, b = weights_of(a), weights_of(b)
    assert all(torch.equal(t, b[name]) for name, t in a.items())


def cut_back(out, step):
    """As if it was killed after this step's checkpoint."""
    for number, path in checkpoints(out):
        if number > step:
            shutil.rmtree(path)
    shutil.rmtree(out / "model")


# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("start", ["random weights", "weights", "adapters", "bfloat16"])
def test_it_is_log_p_under_the_starting_weights(start, folder, tmp_path, monkeypatch):
    scratch = SMALL if start == "random weights" else None
    more = {"adapters": ["--lora-rank", 2], "bfloat16": ["--dtype", "bfloat16"]}.get(start, [])
    assert call(monkeypatch, *argv_of(folder, *more, init=scratch), "--out", tmp_path / "run") == 0
    if start == "random weights":
        tokenizer = hf.load_tokenizer(ASSETS)
        torch.manual_seed(0)
        model = GPT(scratch_config(train.parse_settings(SMALL)[0], tokenizer))
    else:
        model = hf.load_model(folder / "base")
    expected, kept = log_probs(model, folder), load_safetensors(tmp_path / "run" / FILE)["ref_logp"]
    tolerance = 0.1 if start == "bfloat16" else 1e-5
    assert kept.dtype == torch.float32
    torch.testing.assert_close(kept, expected, rtol=tolerance, atol=tolerance)
    # At first nothing is gained, and it is sft; then samples differ.
    first, *_, last = metrics(tmp_path / "run")
    rounding = 2e-3 if start == "bfloat16" else 1e-5
    assert first["sample_weight"] == pytest.approx(1, abs=rounding) and first["sample_weight_sd"] < rounding
    assert first["loss"] == pytest.approx(first["nll"], rel=rounding)
    assert last["sample_weight_sd"] > 0.01 and last["loss"] != pytest.approx(last["nll"], rel=1e-2)


def test_the_weights_of_a_step_are_those_of_its_own_samples(folder, tmp_path, monkeypatch):
    """Whatever the order: each s_b of each step, from the file and the log-probs that the step had."""
    seen, weigh = [], bft.weigh

    def look(logp, offsets, objective, group_size, extra):
        weights = weigh(logp, offsets, objective, group_size, extra)
        seen.append((logp.detach(), offsets, extra["ref_logp"], weights.sample))
        return weights

    monkeypatch.setattr(bft, "weigh", look)
    argv = argv_of(folder, "--steps", 2, "--batch-size", 14, "--micro-tokens", 150)
    assert call(monkeypatch, *argv, "--out", tmp_path / "run") == 0
    # When the file is read its row is worked out.
    seen = [look for look in seen if len(look[0]) > 6]
    samples, _ = load_samples(folder / "data.jsonl", hf.load_tokenizer(ASSETS))
    kept = load_safetensors(tmp_path / "run" / FILE)["ref_logp"].split(samples.response_lengths.tolist())
    parts = [[part for logp, offsets, ref, s in micro_batches for part in zip(logp.split(offsets.diff().tolist()), ref.split(offsets.diff().tolist()), s)]
             for micro_batches in (seen[:len(seen) // 2], seen[len(seen) // 2:])]
    assert len(seen) > 4 and [len(step) for step in parts] == [14, 14]
    for number, step in enumerate(parts):
        references = {tuple(ref.tolist()) for _, ref, _ in step}
        assert references == {tuple(own.tolist()) for own in kept}        # each sample has been in it, with its own
        for logp, ref, s in step:
            assert s.item() == pytest.approx(min(16, math.exp((logp.double() - ref.double()).mean())), rel=1e-6)
            if number == 0:
                torch.testing.assert_close(logp, ref, rtol=1e-5, atol=1e-5)


def test_it_is_computed_when_a_run_begins_and_never_again(folder, tmp_path, monkeypatch):
    passes = []
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, *args, **options: passes.append(torch.is_grad_enabled()) or forward(self, *args, **options))

    def count(*more):
        passes.clear()
        assert call(monkeypatch, *argv_of(folder, *more)) == 0
        return passes.count(False), passes.count(True)

    looks, steps = count("--out", tmp_path / "whole")
    assert count("--out", tmp_path / "sft", "--objective", "sft") == (0, steps) and looks == 5   # of 14 samples, by --micro-tokens
    assert count("--out", tmp_path / "whole") == (0, 0)                   # it is finished
    content = (tmp_path / "whole" / FILE).read_bytes()
    for step in (2, 0):
        shutil.copytree(tmp_path / "whole", tmp_path / f"cut {step}")
        cut_back(tmp_path / f"cut {step}", step)
        again, rest = count("--out", tmp_path / f"cut {step}")
        assert (again == 0 and 0 < rest < steps) if step else (again, rest) == (looks, steps)
        assert_equal(tmp_path / f"cut {step}", tmp_path / "whole")
        assert ((tmp_path / f"cut {step}" / FILE).read_bytes() == content) == (step == 2)   # a run that begins is another
    assert count("--out", tmp_path / "whole", "--no-resume") == (looks, steps)
    assert (tmp_path / "whole" / FILE).read_bytes() != content
    assert_equal(tmp_path / "cut 2", tmp_path / "whole")


def flip(place):
    def damage(path, other):
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
    return damage


def rewrite(change):
    def damage(path, other):
        kept = load_safetensors(path)
        change(kept)
        save_safetensors(kept, path)
    return damage


DAMAGES = {
    "missing": lambda path, other: path.unlink(),
    "empty": lambda path, other: path.write_bytes(b""),
    "no safetensors": lambda path, other: path.write_bytes(b"log p"),
    "cut": lambda path, other: path.write_bytes(path.read_bytes()[:-40]),
    "a bit of a number": flip(-40), "a bit of the seal": flip(-1),
    "of another run": lambda path, other: path.write_bytes(other.read_bytes()),
    "no seal": rewrite(lambda kept: kept.pop("seal")), "no numbers": rewrite(lambda kept: kept.pop("ref_logp")),
    "a shorter seal": rewrite(lambda kept: kept.update(seal=kept["seal"][:-1])),
    "one number less": rewrite(lambda kept: kept.update(ref_logp=kept["ref_logp"][:-1])),
    "rounded": rewrite(lambda kept: kept.update(ref_logp=kept["ref_logp"].bfloat16())),
}


@pytest.fixture(scope="module")
def two_runs(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("one", "other"):
            assert call(monkeypatch, *argv_of(folder), "--out", path / name) == 0
    return path


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_that_is_damaged_is_refused(damage, folder, two_runs, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(two_runs / "one", run)
    cut_back(run, 2)
    DAMAGES[damage](run / FILE, two_runs / "other" / FILE)
    capsys.readouterr()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in ("config.json", "metrics.jsonl")}
    assert call(monkeypatch, *argv_of(folder), "--out", run) == 2
    error = capsys.readouterr().err
    assert error == f"error: {run / FILE} is not what this run began with; expected that, or --no-resume\n"
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in ("config.json", "metrics.jsonl")}
    assert call(monkeypatch, *argv_of(folder), "--out", run, "--no-resume") == 0
    assert_equal(run, two_runs / "one")
    assert torch.equal(*(load_safetensors(path / FILE)["ref_logp"] for path in (run, two_runs / "one")))


def test_what_has_its_name_and_is_no_file_is_seen_before_training(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "run" / FILE).mkdir(parents=True)
    assert call(monkeypatch, *argv_of(folder), "--out", tmp_path / "run") == 2
    assert f"{tmp_path / 'run' / FILE} is no regular file" in capsys.readouterr().err


def test_each_objective_that_needs_it_has_its_own(folder, tmp_path, monkeypatch):
    argv = argv_of(folder, "--steps", 1)
    assert call(monkeypatch, *argv, "--objective", "sft", "iw-sft", "bft", "asft", "dft", "--out", tmp_path / "several") == 0
    assert sorted(path.parent.name for path in tmp_path.rglob(FILE)) == ["asft", "iw-sft"]
    asft, iw_sft = (load_safetensors(tmp_path / "several" / name / FILE) for name in ("asft", "iw-sft"))
    assert torch.equal(asft["ref_logp"], iw_sft["ref_logp"]) and not torch.equal(asft["seal"], iw_sft["seal"])
    # At the first step the anchor of asft has no weight: it is dft.
    asft, dft = (metrics(tmp_path / "several" / name)[0] for name in ("asft", "dft"))
    assert asft["token_weight"] == pytest.approx(dft["token_weight"], rel=1e-4) and asft["loss"] == pytest.approx(dft["loss"], rel=1e-4)
    # Another objective over it leaves none.
    assert call(monkeypatch, *argv, "--objective", "sft", "--out", tmp_path / "several" / "iw-sft", "--no-resume") == 0
    assert not (tmp_path / "several" / "iw-sft" / FILE).exists()


def test_the_record_does_not_tell_how_it_was_computed(folder, two_runs):
    """It follows from what is on record: weights, data, and how they are rounded."""
    record = json.loads((two_runs / "one" / "config.json").read_text())
    assert not [key for key in (*record, *record["settings"], *record["sha256"]) if "ref" in key]


@pytest.mark.slow
@pytest.mark.parametrize("ranks, flags", [(2, []), (3, ["--shard", "all", "--lora-rank", 2])])
def test_several_ranks_train_like_one(ranks, flags, folder, tmp_path, monkeypatch):
    """With samples for few ranks: the others' micro-batches are empty, in training and before it. And they resume."""
    one, several, cut = (tmp_path / name for name in ("one", "several", "cut"))
    argv = [*argv_of(folder, *flags), "--val-data", folder / "data.jsonl", "--batch-size", ranks - 1, "--lr", 1e-3]
    assert call(monkeypatch, *argv, "--out", one) == 0
    done = forked(ranks, ROOT / "train.py", *argv, "--out", several)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(*(load_safetensors(out / FILE)["ref_logp"] for out in (several, one)), rtol=1e-5, atol=1e-5)
    lines = metrics(several)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4] and lines[1]["sample_weight"] == pytest.approx(1, abs=1e-5)
    for a, b in zip(metrics(one), lines, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    shutil.copytree(several, cut)
    cut_back(cut, 2)
    done = forked(ranks, ROOT / "train.py", *argv, "--out", cut)
    assert done.returncode == 0 and "from step 2 to 4" in done.stdout, done.stderr
    assert_equal(cut, several)
    # Every rank sees it, and none waits for the others.
    cut_back(cut, 2)
    (cut / FILE).unlink()
    done = forked(ranks, ROOT / "train.py", *argv, "--out", cut)
    assert done.returncode == 2 and f"error: {cut / FILE} is not what this run began with" in done.stderr


def test_samples_with_a_reference_leave_those_without(folder):
    samples, _ = load_samples(folder / "data.jsonl", hf.load_tokenizer(ASSETS))
    logp = np.arange(sum(samples.response_lengths), dtype=np.float32)
    with_reference = samples.with_reference(logp)
    assert samples[0].ref_logp is None and len(with_reference) == len(samples)
    own = [sample.ref_logp for sample in with_reference]
    assert [len(x) for x in own] == samples.response_lengths.tolist() and np.array_equal(np.concatenate(own), logp)
    assert all(np.array_equal(a.ids, b.ids) and a.where == b.where for a, b in zip(samples, with_reference, strict=True))
    assert np.array_equal(with_reference[-3:][0].ref_logp, own[-3])
