"""A checkpoint: what is in it, who can read it, and that it is whole or none."""

import errno
import json
import math
import os
import random
import shutil

import checkpoint_worker
import pytest
import torch
from forked import forked
from support import ROOT, tiny

from runtime import checkpoint
from runtime.checkpoint import checkpoints, resume_from_checkpoint, save_checkpoint
from runtime.files import load_safetensors
from runtime.process import UserError
from runtime.ranks import Ranks


WORKER = ROOT / "tests" / "runtime" / "checkpoint_worker.py"
FILE = "shard-00001-of-00001.safetensors"


def state_of_a_run(seed=0, **change):
    """(trained parameters, optimizer that has made a step)."""
    net = tiny(seed=seed, vocab_size=11, **change)
    trained = dict(net.named_parameters())
    optimizer = torch.optim.AdamW(trained.values(), lr=0.125, betas=(0.9, 0.95), fused=True)
    for p in trained.values():
        p.grad = torch.full_like(p, 0.01 * seed + 0.01)
    optimizer.step()
    return trained, optimizer


def tensors(trained, optimizer):
    moments = [t for p in trained.values() for t in optimizer.state[p].values()]
    return [t.detach().clone() for t in (*trained.values(), *moments)]


def save(out, *steps, keep=9, **change):
    (out / "checkpoint").mkdir(exist_ok=True)
    state = state_of_a_run(**change)
    for step in steps:
        save_checkpoint(out, step, *state, keep, Ranks("cpu"), "")
    return out / "checkpoint" / f"step-{steps[-1]}"


def resume(out, trained, optimizer):
    return resume_from_checkpoint(out, trained, optimizer, True, Ranks("cpu"))


def test_what_it_holds(tmp_path):
    """Every file is safetensors or JSON, and says by itself what it is."""
    path, (trained, optimizer) = save(tmp_path, 7), state_of_a_run()
    assert sorted(os.listdir(path)) == [FILE, "state.json"]
    held = load_safetensors(path / FILE)
    assert held.keys() == {f"{kind}.{name}" for kind in ("model", "exp_avg", "exp_avg_sq") for name in trained}
    for name, p in trained.items():
        assert torch.equal(held[f"model.{name}"], p) and torch.equal(held[f"exp_avg.{name}"], optimizer.state[p]["exp_avg"])
    state = json.loads((path / "state.json").read_bytes())
    assert state["step"] == 7 and state["files"].keys() == {FILE} and state["run_id"] == ""
    assert state["numbers"] == {f"step.{name}": 1.0 for name in trained}
    group, = state["groups"]
    assert group["lr"] == 0.125 and group["betas"] == [0.9, 0.95] and "params" not in group


@pytest.mark.slow
def test_the_library_reads_it(tmp_path):
    from safetensors.torch import load_file
    path = save(tmp_path, 7)
    ours, theirs = load_safetensors(path / FILE), load_file(path / FILE)
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[key]) for key, t in ours.items())


def test_what_is_loaded_is_what_was_saved(tmp_path):
    save(tmp_path, 3, 12)
    trained, optimizer = state_of_a_run(seed=1)
    parameters = list(trained.values())
    assert resume_from_checkpoint(tmp_path, trained, optimizer, False, Ranks("cpu")) == 0
    assert all(torch.equal(a, b) for a, b in zip(tensors(trained, optimizer), tensors(*state_of_a_run(seed=1))))
    assert resume(tmp_path, trained, optimizer) == 12
    expected = tensors(*state_of_a_run())
    assert all(torch.equal(a, b) for a, b in zip(tensors(trained, optimizer), expected, strict=True))
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], parameters, strict=True))


def test_an_optimizer_without_state_too(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    trained = dict(tiny(vocab_size=11).named_parameters())
    save_checkpoint(tmp_path, 1, trained, torch.optim.SGD(trained.values(), lr=1.0), 1, Ranks("cpu"), "")
    other = dict(tiny(seed=1, vocab_size=11).named_parameters())
    optimizer = torch.optim.SGD(other.values(), lr=0.5)
    assert resume(tmp_path, other, optimizer) == 1 and optimizer.param_groups[0]["lr"] == 1.0
    assert all(torch.equal(p, other[name]) for name, p in trained.items())


@pytest.mark.slow
def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path):
    """Each reads all that those before it wrote, and of each tensor its own rows."""
    (tmp_path / "checkpoint").mkdir()
    runs = ((3, "all"), (1, "no"), (2, "all"), (4, "node"), (3, "no"), (3, "all"))
    for step, (ranks, how) in enumerate(runs, 1):
        read = ",".join(map(str, range(1, step))) or "-"
        done = forked(ranks, WORKER, tmp_path, how, read, step)
        assert done.returncode == 0, done.stderr
    files = {step: sorted(os.listdir(path)) for step, path in checkpoints(tmp_path)}
    for step, (ranks, how) in enumerate(runs, 1):
        count = {"no": 1, "all": ranks, "node": 2}[how]
        assert files[step] == [*(f"shard-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)), "state.json"]
    contents = [{name: (path / name).read_bytes() for name in files[1]} for step, path in checkpoints(tmp_path) if step in (1, 6)]
    del contents[0]["state.json"], contents[1]["state.json"]              # which names the step
    assert contents[0] == contents[1]


def test_only_whole_ones_count(tmp_path):
    save(tmp_path, 3, 20)
    for name in ("step-100", "step-05", "step-7.tmp", "step-8.damaged", "step-", "step--1", "step-9.pt", "a step-9"):
        (tmp_path / "checkpoint" / name).mkdir()
    folder = tmp_path / "checkpoint"
    assert checkpoints(tmp_path) == [(3, folder / "step-3"), (20, folder / "step-20"), (100, folder / "step-100")]
    assert checkpoints(tmp_path / "nothing") == []


def test_the_last_few_stay_and_a_kill_leaves_no_half(tmp_path, monkeypatch):
    save(tmp_path, 3, 4, 5, keep=2)
    assert sorted(os.listdir(tmp_path / "checkpoint")) == ["step-4", "step-5"]

    def killed(path, **_):
        (path / "state.json").unlink()
        raise SystemExit(-9)
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(SystemExit):
        save(tmp_path, 6, keep=1)
    assert [step for step, _ in checkpoints(tmp_path)] == [5, 6]


@pytest.mark.slow
def test_its_name_is_the_last_that_is_written(tmp_path, monkeypatch):
    """Each file is on the disk before it has its name, state.json comes after the others, and the directory's name after all."""
    done, fsync, replace = [], os.fsync, os.replace

    def name_of(path):
        return str(path).removeprefix(f"{tmp_path}/").replace(FILE, "FILE")
    monkeypatch.setattr(os, "fsync", lambda f: done.append(f"fsync {name_of(os.readlink(f'/proc/self/fd/{f}'))}") or fsync(f))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(f"name {name_of(b)}") or replace(a, b))
    monkeypatch.setattr("pathlib.Path.replace", os.replace)
    save(tmp_path, 3)
    unfinished = "checkpoint/step-3.tmp"
    assert done == [f"fsync {unfinished}/FILE.tmp", f"name {unfinished}/FILE", f"fsync {unfinished}",
                    f"fsync {unfinished}/state.json.tmp", f"name {unfinished}/state.json", f"fsync {unfinished}",
                    "name checkpoint/step-3", "fsync checkpoint"]


def flip(file, bit):
    raw = bytearray(file.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    file.write_bytes(raw)


def remove(path):
    (path / FILE).unlink()


def remove_state(path):
    (path / "state.json").unlink()


def add(path):
    (path / "extra").write_bytes(b"")


def cut(path):
    os.truncate(path / FILE, 10_000)


def empty_state(path):
    (path / "state.json").write_bytes(b"")


def nested_state(path):
    (path / "state.json").write_bytes(b"[" * 100_000)


def other_options(path):
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"lr": 0.125', '"lr": 0.250'))


def same_numbers_in_other_words(path):
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"lr": 0.125', '"lr": 0.1250'))


def of_another_step(path):
    save_checkpoint(path.parents[1], 9, *state_of_a_run(), 9, Ranks("cpu"), "")
    shutil.rmtree(path)
    path.with_name("step-9").rename(path)


def of_another_model(path):
    shutil.rmtree(path)
    save_checkpoint(path.parents[1], 6, *state_of_a_run(intermediate_size=64), 9, Ranks("cpu"), "")


@pytest.mark.parametrize("damage, words", [
    (remove, f"missing or unexpected: {FILE}"), (remove_state, "state.json"), (add, "missing or unexpected: extra"), (cut, f"{FILE} is damaged"),
    (empty_state, ""), (nested_state, ""), (other_options, "state.json is damaged"), (same_numbers_in_other_words, "state.json is damaged"),
    (of_another_step, "it is of step 9"), (of_another_model, "missing, unexpected or of another shape: exp_avg.layers.0.mlp.")])
def test_a_damaged_one_is_renamed_and_the_one_before_taken(damage, words, tmp_path, capsys):
    newest, earlier = save(tmp_path, 3, 6), tmp_path / "checkpoint" / "step-6.damaged"
    earlier.mkdir()
    (earlier / "of an earlier time").write_bytes(b"")
    damage(newest)
    damaged = {path.name: path.read_bytes() for path in newest.iterdir()}
    trained, optimizer = state_of_a_run(seed=1)
    assert resume(tmp_path, trained, optimizer) == 3
    output = capsys.readouterr().out
    assert output.count("\n") == 1 and f"warning: {newest} cannot be loaded (" in output and words in output
    assert "so this goes on from step 3; it is now called step-6.damaged" in output
    assert {path.name: path.read_bytes() for path in earlier.iterdir()} == damaged
    assert all(torch.equal(a, b) for a, b in zip(tensors(trained, optimizer), tensors(*state_of_a_run()), strict=True))
    # And where none is left.
    shutil.rmtree(tmp_path / "checkpoint" / "step-3")
    earlier.rename(newest)
    before = tensors(trained, optimizer)
    with pytest.raises(UserError, match=r"no checkpoint of .* can be loaded \(step-6: .*\); --no-resume starts again"):
        resume(tmp_path, trained, optimizer)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-6"]
    assert all(torch.equal(a, b) for a, b in zip(tensors(trained, optimizer), before, strict=True))


def another_optimizer(trained, make):
    """Of the same parameters, after a step."""
    optimizer = make(trained.values())
    for p in trained.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def other_shapes(trained, optimizer):
    name, p = next(iter(trained.items()))
    optimizer.state[p]["exp_avg"] = torch.zeros(3, 5)
    return optimizer


def other_dtypes(trained, optimizer):
    p = trained["norm.weight"]
    optimizer.state[p]["exp_avg_sq"] = optimizer.state[p]["exp_avg_sq"].half()
    return optimizer


def no_moments(trained, optimizer):
    optimizer.state.clear()
    return optimizer


def one_parameter_less(trained, optimizer):
    del optimizer.state[trained["norm.weight"]]
    return optimizer


def one_moment_less(trained, optimizer):
    del optimizer.state[trained["norm.weight"]]["exp_avg_sq"]
    return optimizer


def one_group_more(trained, optimizer):
    optimizer.add_param_group({"params": [torch.zeros(2)]})
    return optimizer


@pytest.mark.parametrize("change, words", [
    (other_shapes, "exp_avg.embed_tokens.weight"), (other_dtypes, "exp_avg_sq.norm.weight"), (no_moments, "missing, unexpected or of another shape"),
    (one_parameter_less, "exp_avg.norm.weight, exp_avg_sq.norm.weight, step.norm.weight"), (one_moment_less, "shape: exp_avg_sq.norm.weight)"),
    (one_group_more, "its optimizer has other options"),
    (lambda trained, _: another_optimizer(trained, lambda ps: torch.optim.SGD(ps, lr=0.125, momentum=0.9)), "its optimizer has other options"),
    (lambda trained, _: another_optimizer(trained, lambda ps: torch.optim.AdamW(ps, lr=0.125, betas=(0.9, 0.99), fused=True)), "other options"),
    (lambda trained, _: another_optimizer(trained, lambda ps: torch.optim.Adagrad(ps, lr=0.125)), "other options")])
def test_the_state_of_another_optimizer_is_not_taken(change, words, tmp_path, capsys):
    """Whatever its checksums say: not one number is lost, and none is given to what it is not of."""
    save(tmp_path, 3)
    trained, optimizer = state_of_a_run()
    save_checkpoint(tmp_path, 6, trained, change(trained, optimizer), 9, Ranks("cpu"), "")
    trained, optimizer = state_of_a_run(seed=1)
    assert resume(tmp_path, trained, optimizer) == 3
    output = capsys.readouterr().out
    assert output.count("\n") == 1 and words in output
    assert all(torch.equal(a, b) for a, b in zip(tensors(trained, optimizer), tensors(*state_of_a_run()), strict=True))
    optimizer.step()                                                      # which a moment of another shape would end


class OwnOptimizer(torch.optim.Optimizer):
    """Whose arguments are not what it calls its options."""

    def __init__(self, parameters, rate):
        super().__init__(parameters, {"lr": rate, "beta": 0.5})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("average", torch.zeros_like(p)).lerp_(p.grad, group["beta"])
                p.sub_(self.state[p]["average"], alpha=group["lr"])


@pytest.mark.parametrize("make", [
    lambda some, others: torch.optim.SGD([{"params": some, "momentum": 0.9}, {"params": others}], lr=0.1),
    lambda some, others: torch.optim.AdamW([{"params": some, "amsgrad": True}, {"params": others}], lr=0.1),
    lambda some, others: torch.optim.Muon(some, lr=0.1), lambda some, others: torch.optim.Adagrad([*some, *others], lr=0.1),
    lambda some, others: OwnOptimizer([*some, *others], 0.1)])
def test_other_optimizers_are_resumed_too(make, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    states = []
    for seed in (0, 1):
        trained, _ = state_of_a_run(seed=seed)
        if isinstance(make([torch.zeros(2, 2)], [torch.zeros(2)]), torch.optim.Muon):
            trained = {name: p for name, p in trained.items() if p.dim() == 2}
        some = [p for p in trained.values() if p.dim() == 2]
        optimizer = make(some, [p for p in trained.values() if p.dim() < 2])
        optimizer.step()
        states.append((trained, optimizer))
        if seed == 0:
            save_checkpoint(tmp_path, 3, trained, optimizer, 9, Ranks("cpu"), "")
    assert resume(tmp_path, *states[1]) == 3
    assert all(torch.equal(a, b) for a, b in zip(tensors(*states[0]), tensors(*states[1]), strict=True))


def test_options_that_are_off_may_differ():
    """A newer torch may have more of them."""
    trained, optimizer = state_of_a_run()
    options = checkpoint.options_of(optimizer)
    optimizer.param_groups[0] |= {"of_a_newer_torch": False, "another": None, "lr": 0.0}
    assert checkpoint.options_of(optimizer) == [{**options[0], "lr": 0.0}]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "moment", "step"])
def test_a_checkpoint_with_what_is_no_number_is_not_taken(number, where, tmp_path, capsys):
    save(tmp_path, 3)
    trained, optimizer = state_of_a_run()
    p = trained["layers.1.mlp.down_proj.weight"]
    if where == "step":
        optimizer.state[p]["step"].fill_(number)
    else:
        (p.data if where == "weight" else optimizer.state[p]["exp_avg"])[1, 2] = number
    save_checkpoint(tmp_path, 6, trained, optimizer, 9, Ranks("cpu"), "")
    trained, optimizer = state_of_a_run(seed=1)
    assert resume(tmp_path, trained, optimizer) == 3
    assert "layers.1.mlp.down_proj.weight" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(tensors(trained, optimizer), tensors(*state_of_a_run()), strict=True))


@pytest.mark.parametrize("name", [FILE, "state.json"])
def test_a_single_bit_anywhere_is_noticed(name, tmp_path):
    path, rng = save(tmp_path, 6), random.Random(0)
    state = state_of_a_run()
    size = 8 * (path / name).stat().st_size
    for bit in (0, 63, size - 1, *(rng.randrange(size) for _ in range(100))):
        flip(path / name, bit)
        assert checkpoint.why_damaged(path, "", 6, *state, Ranks("cpu")), bit
        flip(path / name, bit)
    assert checkpoint.why_damaged(path, "", 6, *state, Ranks("cpu")) == ""


def test_a_disk_that_cannot_be_read_is_no_damage(tmp_path, monkeypatch):
    """It may be whole: nothing is renamed, and what the file system hides in it is nothing."""
    trained, optimizer = state_of_a_run()
    save_checkpoint(tmp_path, 2, trained, optimizer, 2, Ranks("cpu"), "")
    (tmp_path / "checkpoint" / "step-2" / ".nfs0001").write_bytes(b"")

    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))
    with monkeypatch.context() as patches:
        patches.setattr(checkpoint, "file_sha256", stale)
        with pytest.raises(OSError, match="Stale file handle"):
            resume_from_checkpoint(tmp_path, trained, optimizer, True, Ranks("cpu"))
    assert resume_from_checkpoint(tmp_path, trained, optimizer, True, Ranks("cpu")) == 2


def test_a_node_that_does_not_see_it_is_told(tmp_path, monkeypatch):
    trained, optimizer = state_of_a_run()
    save_checkpoint(tmp_path, 2, trained, optimizer, 2, Ranks("cpu"), "")
    monkeypatch.setattr(checkpoint, "checkpoints", lambda out: [(2, None)])   # what rank 0 sees
    with pytest.raises(UserError, match="step-2 is not there on rank 0; expected --out on a file system that all nodes share"):
        resume_from_checkpoint(tmp_path / "elsewhere", trained, optimizer, True, Ranks("cpu"))


@pytest.mark.slow
def test_ranks_look_at_different_files_and_agree(tmp_path):
    """A bit of the third of three files, which two ranks read."""
    (tmp_path / "checkpoint").mkdir()
    assert forked(3, WORKER, tmp_path, "all", "-", 3).returncode == 0
    third = tmp_path / "checkpoint" / "step-3" / "shard-00003-of-00003.safetensors"
    flip(third, 8 * third.stat().st_size - 1)
    for file in ("shard-00003-of-00003.safetensors", "shard-00002-of-00003.safetensors"):
        done = forked(2, WORKER, tmp_path, "all", "3", 4)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"{file} is damaged" in done.stderr and f"no checkpoint of {tmp_path / '3 alone'}" in done.stderr
        # The other rank's.
        flip(third, 8 * third.stat().st_size - 1)
        third = third.with_name("shard-00002-of-00003.safetensors")
        flip(third, 8 * third.stat().st_size - 1)
        shutil.rmtree(tmp_path / "3 alone")


@pytest.mark.slow
@pytest.mark.parametrize("how, file", [("all", "shard-00001-of-00003"), ("no", "shard-00001-of-00001")])
def test_a_disk_that_is_full_for_all_ranks_is_one_sentence(how, file, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    assert forked(3, WORKER, tmp_path, how, "-", 3).returncode == 0
    done = forked(3, WORKER, tmp_path, how, "3", "full")
    assert done.returncode == 1 and done.stderr == f"error: {tmp_path}/checkpoint/step-99.tmp/{file}.safetensors: File too large\n"
    assert os.listdir(tmp_path / "checkpoint") == ["step-3"]


def test_a_state_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    save(tmp_path, 3)

    def full(path, chunks):
        raise OSError(28, "No space left on device", str(path))
    monkeypatch.setattr(checkpoint, "write_whole", full)
    with pytest.raises(OSError, match="No space left on device: .*step-6.tmp/state.json"):
        save(tmp_path, 6)
    assert os.listdir(tmp_path / "checkpoint") == ["step-3"]


def test_its_worker_knows_what_no_two_tensors_share():
    values = torch.cat([checkpoint_worker.filled(name, kind, (50,)) for name in ("a", "b.c") for kind in ("model", "exp_avg")])
    assert len(values.unique()) == len(values)
