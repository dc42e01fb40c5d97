"""Checkpoints: what a run needs to go on after a step, on any number of ranks.

    checkpoint/step-N/
        shard-00001-of-00003.safetensors    rows of every trained parameter ("model.NAME") and of its optimizer state
                                            ("exp_avg.NAME", ...): a file of each rank that holds some, in their order
        state.json                          written last: the run's id, the step, the files' checksums, the optimizer's
                                            options and its numbers (AdamW's `step`)

A checkpoint is written as step-N.tmp, which becomes step-N when all of it is on the disk.
"""

import collections
import hashlib
import json
import os
import re
import shutil

import torch
from torch.distributed.tensor import DTensor

from runtime.files import (
    all_finite,
    file_sha256,
    iterate_safetensors,
    safetensors_layout,
    save_safetensors,
    sync_directory,
    write_whole,
)
from runtime.one_writer import check_still_ours, run_id_of
from runtime.process import UserError
from runtime.sharding import as_rows_of, local, rows_of


def checkpoints(out):
    """[(step, path)], the newest last. Raises OSError where the directory cannot be read: that is not having none."""
    names = os.listdir(out / "checkpoint") if (out / "checkpoint").exists() else []
    matches = (re.fullmatch(r"step-([1-9][0-9]*)", name) for name in names)
    return sorted((int(match[1]), out / "checkpoint" / match[0]) for match in matches if match)


# ---------------------------------------------------------------------------------------------------------------------
# Out

def save_checkpoint(out, step, trained, optimizer, keep, ranks, run_id):
    """Whole or not at all, then the ones before the last `keep` go. trained: {name: parameter}. run_id: of the run in
    `out`, as `runtime.run_directory.begin_run` gave it. Raises UserError if it is another run's now.

    Every rank calls this, and writes what it holds. Raises OSError, naming the file, on the first of those that could
    not; the others wait for it to end the run.
    """
    check_still_ours(out, run_id, ranks)
    path = out / "checkpoint" / f"step-{step}"
    unfinished = beside(path, "tmp")
    failure, written = None, {}
    try:
        written = write_my_rows(unfinished, trained, optimizer, ranks)
    except OSError as e:
        failure = e
    written_by_rank = [json.loads(text) for text in ranks.texts(json.dumps(None if failure else written))]
    if None in written_by_rank:
        give_up(unfinished, failure, written_by_rank.index(None), ranks)
    if ranks.rank > 0:
        return
    files = {name: digest for written in written_by_rank for name, digest in written.items()}
    try:
        write_state(unfinished, run_id, step, files, trained, optimizer)
        unfinished.replace(path)
        sync_directory(path.parent)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    for _, old in checkpoints(out)[:-keep]:
        # A kill in the middle leaves nothing that looks whole. What cannot be deleted now is when the run begins again.
        shutil.rmtree(old.replace(beside(old, "tmp")), ignore_errors=True)


def beside(path, suffix):
    return path.with_name(f"{path.name}.{suffix}")


def write_my_rows(directory, trained, optimizer, ranks):
    """Writes the rows that this rank holds. Returns {file name: sha256}; nothing where another rank has them too, and
    writes them."""
    # Not sharded, every rank has a copy, in one part.
    copy, index, count = ranks.rank, 0, 1
    any_parameter = next(iter(trained.values()))
    if isinstance(any_parameter, DTensor):
        mesh = any_parameter.device_mesh
        *copies, index = mesh.get_coordinate()
        copy, count = sum(copies), mesh.size(-1)
    if copy > 0:
        return {}
    tensors = {f"model.{name}": local(p.detach()) for name, p in trained.items()}
    for key, value in optimizer_state(trained, optimizer):
        if value.dim() > 0:
            tensors[key] = local(value)
    directory.mkdir(parents=True, exist_ok=True)                          # the first who comes
    path = directory / f"shard-{index + 1:05d}-of-{count:05d}.safetensors"
    return {path.name: save_safetensors(tensors, path)}


def give_up(unfinished, failure, rank, ranks):
    """Ends the run with what `rank` failed with."""
    if ranks.rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)                     # a full disk has room again
    ranks.barrier()
    if ranks.rank == rank:
        raise failure
    # Nobody else comes: that rank leaves, and this one ends as any does that lost its peer.
    ranks.barrier()


def optimizer_state(trained, optimizer):
    """Yields ("exp_avg.NAME", tensor), ..., of all parameters."""
    for name, p in trained.items():
        for kind, value in optimizer.state.get(p, {}).items():
            yield f"{kind}.{name}", value


def not_finite(trained, optimizer, dtypes):
    """The names of what a checkpoint must not hold, of the rows of this rank: parameters and moments in which something
    is infinite or NaN, or will be in the dtype of its file ({name: dtype}, for those that have one)."""
    finite = {name: all_finite(local(p.detach()), dtypes.get(name)) for name, p in trained.items()}
    finite.update((key, all_finite(local(value))) for key, value in optimizer_state(trained, optimizer))
    # The device is waited for once, for all verdicts together. (An optimizer may keep numbers on the CPU.)
    device = next(iter(finite.values())).device
    verdicts = torch.stack([verdict.to(device) for verdict in finite.values()]).tolist()
    return [name for name, is_finite in zip(finite, verdicts) if not is_finite]


def write_state(directory, run_id, step, files, trained, optimizer):
    """Writes state.json, by which a checkpoint is whole. files: {file name: sha256}."""
    numbers = {key: value.item() for key, value in optimizer_state(trained, optimizer) if value.dim() == 0}
    state = {"run_id": run_id, "step": step, "files": files, "groups": options_of(optimizer), "numbers": numbers}
    write_whole(directory / "state.json", [sealed(state)])


def options_of(optimizer):
    """[{option: value}] of its groups of parameters: the learning rate, and all that is not 0 or off. (A newer torch
    may know more options.)"""
    groups = [{key: value for key, value in group.items() if key == "lr" or value and key != "params"}
              for group in optimizer.param_groups]
    return json.loads(json.dumps(groups))                                 # a tuple becomes a list, as in the file


def sealed(state):
    """The bytes of state.json: with a checksum of the rest."""
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    return json.dumps({**state, "sha256": digest}, sort_keys=True).encode()


# ---------------------------------------------------------------------------------------------------------------------
# In

def resume_from_checkpoint(out, trained, optimizer, resume, ranks):
    """Gives the parameters {name: parameter} and the optimizer what they had at the newest checkpoint that is whole.
    Returns its step, the same on every rank; 0 if there is none, or without resume. Damaged ones are renamed. Raises
    UserError if all are.

    When it returns, every rank has looked: from then on rank 0 may write.
    """
    # Disks may be slow to agree: rank 0 sees for all.
    seen = []
    if ranks.rank == 0:
        seen = [run_id_of(out / "config.json"), [step for step, _ in checkpoints(out)] if resume else []]
    run_id, steps = json.loads(ranks.texts(json.dumps(seen))[0])
    start, damaged = 0, {}
    for step in reversed(steps):
        path = out / "checkpoint" / f"step-{step}"
        reason = load_or_say_why_not(path, run_id, step, trained, optimizer, ranks)
        if not reason:
            start = step
            break
        damaged[path] = reason
    if damaged and not start:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise UserError(f"no checkpoint of {out} can be loaded ({reasons}); --no-resume starts again over it")
    for path, reason in damaged.items():
        aside = beside(path, "damaged")
        ranks.print(f"warning: {path} cannot be loaded ({reason}), so this goes on from step {start}; it is now called "
                    f"{aside.name}")
        if ranks.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)                      # an earlier one
            path.replace(aside)
    ranks.barrier()
    return start


def load_or_say_why_not(path, run_id, step, trained, optimizer, ranks):
    """Returns "" if the checkpoint was loaded, else why it cannot be; the same on every rank."""
    reasons = ranks.texts(why_damaged(path, run_id, step, trained, optimizer, ranks))
    if not any(reasons):
        load_checkpoint(path, trained, optimizer)
        names = " ".join(not_finite(trained, optimizer, {}))
        reasons = [f"infinite or no number: {names[:200]}" for names in ranks.texts(names) if names]
    return next(filter(None, reasons), "")


def why_damaged(path, run_id, step, trained, optimizer, ranks):
    """Why this checkpoint cannot be loaded, "" if nothing is seen. Each rank looks at state.json, and at its part of
    the other files. Raises OSError for a disk that cannot be read, on which it may be whole, and UserError if this rank
    does not see it at all."""
    if not path.is_dir():
        raise UserError(f"{path} is not there on rank {ranks.rank}; expected --out on a file system that all nodes "
                        "share")
    try:
        state = read_state(path)
        if state.get("run_id") != run_id:
            raise ValueError("it is of another run than config.json")
        if state["step"] != step:
            raise ValueError(f"it is of step {state['step']}")
        # Hidden files are the file system's.
        present = {name for name in os.listdir(path) if not name.startswith(".")}
        misfits = present ^ {*state["files"], "state.json"}
        if misfits:
            raise ValueError(f"missing or unexpected: {', '.join(sorted(misfits))}")
        for name in sorted(state["files"])[ranks.rank::ranks.world]:
            if file_sha256(path / name) != state["files"][name]:
                raise ValueError(f"{name} is damaged")
        check_contents(path, state, trained, optimizer)
    except Exception as e:                                                # whatever a damaged file leads to
        if isinstance(e, OSError) and not isinstance(e, FileNotFoundError):
            raise
        return " ".join(f"{type(e).__name__}: {e}".split())[:200]
    return ""


def read_state(path):
    """What `write_state` wrote. Raises an exception of any kind if it is not that, to the byte."""
    text = (path / "state.json").read_bytes()
    state = json.loads(text)
    state.pop("sha256")
    if sealed(state) != text:
        raise ValueError("state.json is damaged")
    return state


def check_contents(path, state, trained, optimizer):
    """Raises ValueError if a checkpoint has other options, or other numbers, than these parameters and their optimizer
    have. Of the files only the headers are read."""
    saved, options = state["groups"], options_of(optimizer)
    for group in (*saved, *options):
        # It changes with the steps.
        del group["lr"]
    if saved != options:
        raise ValueError("its optimizer has other options")
    # {(key, all dimensions but the first, dtype): rows}; of a number, {(key,): 1}.
    found, expected = collections.Counter(), collections.Counter()
    for name in state["files"]:
        with open(path / name, "rb") as f:
            for key, dtype, (count, *others) in safetensors_layout(f):
                found[key, *others, str(dtype)] += count
    for key in state["numbers"]:
        found[key,] = 1
    names = {p: name for name, p in trained.items()}
    for group in optimizer.param_groups:
        # A model may have no vectors that are trained.
        kinds = state_of_a_parameter(optimizer, group) if group["params"] else {}
        for p in group["params"]:
            expected[f"model.{names[p]}", *p.shape[1:], str(p.dtype)] = len(p)
            for kind, value in kinds.items():
                if value.dim() > 0:
                    expected[f"{kind}.{names[p]}", *p.shape[1:], str(p.dtype)] = len(p)
                else:
                    expected[f"{kind}.{names[p]}",] = 1
    if found != expected:
        different = {key for key, *_ in found - expected | expected - found}
        raise ValueError(f"missing, unexpected or of another shape: {', '.join(sorted(different)[:5])}")


def state_of_a_parameter(optimizer, group):
    """{kind: tensor} that an optimizer keeps of a parameter of this group: it shows after a step."""
    p = torch.zeros(1, 1, device=group["params"][0].device, requires_grad=True)
    p.grad = torch.zeros_like(p)
    like = object.__new__(type(optimizer))
    like.__dict__.update(optimizer.__dict__)
    like.param_groups, like.state = [{**group, "params": [p]}], collections.defaultdict(dict)
    like.step()
    return like.state[p]


def load_checkpoint(path, trained, optimizer):
    """Gives the parameters and the optimizer what a whole checkpoint has: the rows that this rank holds."""
    saved = read_state(path)
    state = {name: {} for name in trained}
    for key, number in saved["numbers"].items():
        kind, name = key.split(".", 1)
        state[name][kind] = torch.tensor(number)
    for key, rows in read_my_rows([path / file for file in sorted(saved["files"])], trained).items():
        kind, name = key.split(".", 1)
        if kind != "model":
            state[name][kind] = as_rows_of(trained[name], rows, rows.device)
    names = {p: name for name, p in trained.items()}
    groups = []
    for group, options in zip(optimizer.param_groups, saved["groups"], strict=True):
        groups.append({**group, "lr": options["lr"], "params": [names[p] for p in group["params"]]})
    # torch's own state dicts number the parameters; any key will do, and ours are names.
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def read_my_rows(files, trained):
    """{key: the rows that this rank holds}, of files that one after another hold all rows. The parameters' are their
    own memory. No more is held than these and what one file has of one of them."""
    mine = {f"model.{name}": local(p.detach()) for name, p in trained.items()}
    seen, filled = collections.Counter(), collections.Counter()           # rows: of all, of mine
    for file in files:
        with open(file, "rb") as f:
            layout = safetensors_layout(f)
        wanted = {}
        for key, dtype, (count, *_) in layout:
            p = trained[key.split(".", 1)[1]]
            if key not in mine:
                mine[key] = torch.empty_like(local(p.detach()), dtype=dtype)
            wanted[key] = [min(max(row - seen[key], 0), count) for row in rows_of(p)]
            seen[key] += count
        for key, rows in iterate_safetensors(file, rows=wanted):
            begin, end = filled[key], filled[key] + len(rows)
            mine[key][begin:end] = rows
            filled[key] = end
    return mine
