"""Checkpoints: what a run needs to go on after a step. checkpoint/step-N.pt has the weights that are trained and the
optimizer's state; read with weights_only=True."""

import os
import re
import zipfile

import torch

from runtime.files import replacing
from runtime.process import UserError


def checkpoints(out):
    """[(step, path)], the newest last. Raises OSError where the directory cannot be read: that is not having none."""
    names = os.listdir(out / "checkpoint") if (out / "checkpoint").exists() else []
    matches = (re.fullmatch(r"step-([0-9]+)\.pt", name) for name in names)
    return sorted((int(match[1]), out / "checkpoint" / match[0]) for match in matches if match)


def save_checkpoint(out, step, trained, optimizer, keep, ranks):
    """Whole or not at all, then the ones before the last `keep` go. trained: {name: parameter}."""
    if ranks.rank > 0:
        return
    with replacing(out / "checkpoint" / f"step-{step}.pt") as f:
        torch.save({"step": step, "model": {name: p.detach() for name, p in trained.items()},
                    "optimizer": optimizer.state_dict()}, f)
    for _, old in checkpoints(out)[:-keep]:
        old.unlink()


def resume_from_checkpoint(out, trained, optimizer, resume, ranks):
    """Gives the parameters {name: parameter} and the optimizer what they had at the newest checkpoint that can be read.
    Returns its step, the same on every rank; 0 if there is none, or without resume.

    When it returns, every rank has looked: from then on rank 0 may write.
    """
    start = ranks.largest(load_newest(out, trained, optimizer) if resume and ranks.rank == 0 else 0)
    if start and ranks.rank > 0:
        load_checkpoint(start, out / "checkpoint" / f"step-{start}.pt", trained, optimizer)
    ranks.barrier()
    return start


def load_newest(out, trained, optimizer):
    """Loads the newest checkpoint that can be; those that cannot be are renamed. Returns its step, 0 if there are none.
    Raises UserError if none of them can be loaded. Called by rank 0."""
    damaged = []
    for step, path in reversed(checkpoints(out)):
        try:
            load_checkpoint(step, path, trained, optimizer)
        except Exception as e:                                            # whatever a damaged file leads to
            damaged.append((path, " ".join(f"{type(e).__name__}: {e}".split())[:200]))
            continue
        for other, why in damaged:
            print(f"warning: {other} cannot be loaded ({why}), so this goes on from step {step}; it is now called "
                  f"{other.name}.damaged", flush=True)
            os.replace(other, f"{other}.damaged")
        return step
    if damaged:
        reasons = "; ".join(f"{path.name}: {why}" for path, why in damaged)
        raise UserError(f"no checkpoint of {out} can be loaded ({reasons}); --no-resume starts again over it")
    return 0


def load_checkpoint(step, path, trained, optimizer):
    """Gives the parameters and the optimizer what they had at that step. Raises an exception of any kind if the file is
    damaged, or another model's."""
    with zipfile.ZipFile(path) as archive:                                # torch reads what a disk garbled as it is
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged")
    # A GPU may have no room for it twice; and ranks that only copy from it can share the file's pages.
    on_gpu = any(p.is_cuda for p in trained.values())
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=on_gpu)
    shapes = {name: (p.shape, p.dtype) for name, p in trained.items()}
    if state["step"] != step or {name: (p.shape, p.dtype) for name, p in state["model"].items()} != shapes:
        raise ValueError("it is of another step or another model")
    optimizer.load_state_dict(state["optimizer"])
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(state["model"][name])
