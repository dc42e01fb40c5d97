"""A run directory: config.json, which says how a run is made, and whether a directory is ours to write to.

    config.json               every setting, the optimizer, git commit, package versions, device, data hashes
    metrics.jsonl             a line a step
    ref_logp.safetensors      log p_t under the weights that it started from, for an objective that needs it
    checkpoint/step-N/        weights that are trained, and the optimizer's state
    adapter/                  of a run with adapters: these, as PEFT has them
    model/                    the result as a Hugging Face directory, adapters merged
    writer.lock               while it is written: see runtime/one_writer.py
    tensorboard/, wandb/      what --report wrote
"""

import functools
import hashlib
import json
import os
import platform
import secrets
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import tiktoken
import torch

from runtime.checkpoint import checkpoints
from runtime.device import compute_dtype
from runtime.files import file_sha256, write_whole
from runtime.log import cut_metrics
from runtime.one_writer import run_id_of
from runtime.process import UserError


CHECKOUT = Path(__file__).resolve().parents[1]

# Settings that may change between runs without any effect on the result.
WITHOUT_EFFECT = {"out", "save_every", "eval_every", "log_every", "keep", "resume", "report"}
# What changes no more than the rounding of a run's numbers.
ROUNDING = {"micro_tokens", "compile", "recompute", "shard", "device", "world_size", "threads", "git_commit", "python",
            "torch", "numpy", "tiktoken"}
# What --no-resume deletes, and what it writes anew.
DIRECTORIES = ("checkpoint", "adapter", "model", "tensorboard", "wandb")
FILES = ("config.json", "metrics.jsonl", "ref_logp.safetensors")
# What cannot be config.json of a run.
NOT_A_CONFIG = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


# ---------------------------------------------------------------------------------------------------------------------
# What a run is made of

def describe(settings, objective, files, sets, optimizer, ranks):
    """What config.json holds: everything that made the run. Every rank calls it; rank 0 alone reads the files.

    settings: a dataclass. files: {name: [paths]} of what was read. sets: data.Samples, of validation too.
    optimizer: its name and options, as a dict.
    """
    digests = {}
    if ranks.rank == 0:
        digests = {name: sha256(*paths) for name, paths in files.items()}
    digests = json.loads(ranks.texts(json.dumps(digests))[0])
    device = ranks.device
    return {"objective": objective,
            "settings": {**asdict(settings), "objective": (objective,)},
            "optimizer": optimizer,
            "git_commit": git_commit(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                         "tiktoken": tiktoken.__version__},
            "device": f"{device.type}: {device_name(device)}",
            "dtype": str(compute_dtype(settings.dtype, device)),
            "world_size": ranks.world,
            "threads": torch.get_num_threads(),
            "sha256": {**digests, "tokens": tokens_sha256(*sets)}}


def git_commit():
    """The commit of this checkout, or None without one. Where files that git knows differ from it, `-dirty-` and a
    digest of the differences follow."""
    commit = git("rev-parse", "--verify", "HEAD").decode().strip()
    if not commit:
        return None
    changes = git("diff", "HEAD")
    if changes:
        commit += f"-dirty-{hashlib.sha256(changes).hexdigest()[:8]}"
    return commit


def git(*arguments):
    """What git prints of this checkout, bytes; nothing if it fails, or is not there."""
    try:
        # Nothing is written, not even a lock: other commands may run at the same time.
        return subprocess.run(["git", "--no-optional-locks", "-C", CHECKOUT, *arguments], capture_output=True).stdout
    except OSError:
        return b""


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def sha256(*paths):
    """The digest of a file as it is now, or a list of those of several."""
    digests = [digest_of_state(path, *state_of(path)) for path in paths]
    return digests[0] if len(paths) == 1 else digests


def state_of(path):
    """What changes whenever somebody writes to this file, or puts another in its place."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@functools.cache                                                          # weights are large, and looked at repeatedly
def digest_of_state(path, *state):
    return file_sha256(path)


def check_unchanged(record, name, paths, ranks):
    """Raises UserError, on every rank, if these files are no longer those of this name in a run's record."""
    failure = ""
    if ranks.rank == 0:
        try:
            if sha256(*paths) != record["sha256"][name]:
                failure = f"{paths[0].parent}: its files have changed since the command began"
        except OSError as e:
            failure = f"{e.filename}: {e.strerror}"
    failure, *_ = ranks.texts(failure)
    if failure:
        raise UserError(f"{failure}; expected the weights that this run started from")


@functools.lru_cache(maxsize=1)                                           # objectives share them
def tokens_sha256(*sets):
    """Of all that is learned from or validated on, whatever tokenizer, chat format, limit or code made it: of each set,
    where its samples begin, their ids, and what is response."""
    digest = hashlib.sha256()
    for samples in sets:
        for column in (samples.offsets, samples.ids, samples.response):
            digest.update(column)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The same run or another one

def differences(old, new):
    """Where two contents of config.json differ, as phrases: (what makes another run, what changes rounding alone)."""
    new = json.loads(json.dumps(new))                                     # a tuple becomes a list, as in the file
    a, b = flat(old), flat(new)
    another_run, rounding = [], []
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) == b.get(key) or key in WITHOUT_EFFECT:
            continue
        if key in new["sha256"] and key in old["sha256"]:
            phrase = f"another content of {key}"
        else:
            phrase = f"{key} {a.get(key)!r}, now {b.get(key)!r}"
        if key in ROUNDING:
            rounding.append(phrase)
        else:
            another_run.append(phrase)
    return another_run, rounding


def flat(record):
    """All that two runs can differ in, as one dict. Raises KeyError or TypeError for what is no config.json of ours."""
    top = ("objective", "dtype", "device", "world_size", "threads", "git_commit")
    optimizer = {f"optimizer's {key}": value for key, value in record["optimizer"].items()}
    return {**record["settings"], **record["versions"], **record["sha256"], **optimizer,
            **{key: record[key] for key in top}}


def check_out(out, record, resume):
    """Raises UserError if `out` is not ours to write to: something else than a run or, where it would be resumed, a
    run that differs from record in more than what changes its rounding."""
    parent = next(path for path in (out, *out.parents) if path.exists())
    if not parent.is_dir():
        raise UserError(f"--out {out}: {parent} is a file; expected a new path, or a run")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {parent} cannot be written to; expected a directory that can")
    check_parts(out, resume)
    try:
        another_run, _ = differences(json.loads((out / "config.json").read_bytes()), record)
    except NOT_A_CONFIG:
        if out.exists() and any(path.suffix not in (".tmp", ".lock") for path in out.iterdir()):
            raise UserError(f"--out {out} is there and is no run directory; expected a new path, or a run") from None
        return
    if resume and another_run:
        raise UserError(f"--out {out} holds another run ({'; '.join(another_run)}); name another --out, or --no-resume "
                        "to start again over it")


def check_parts(out, resume):
    """Raises UserError for what has the name of a part of a run and cannot be one: most are written after training."""
    for name in (*DIRECTORIES, *FILES):
        path = out / name
        if not os.path.lexists(path):
            continue
        if name in FILES and not path.is_file():
            raise UserError(f"--out {out}: {path} is no regular file; expected a new path, or a run")
        if name in DIRECTORIES and not (path.is_dir() and os.access(path, os.W_OK | os.X_OK)):
            raise UserError(f"--out {out}: {path} is no directory that can be written to; expected a new path, "
                            "or a run")
        if name in DIRECTORIES and path.is_symlink() and not resume:
            raise UserError(f"--out {out}: {path} is a link, through which --no-resume deletes nothing; remove it, or "
                            "name another --out")


def is_finished(out, total, resume, ranks):
    """Whether rank 0 sees that the run is; disks may be slow to agree."""
    finished = False
    if ranks.rank == 0 and resume:
        saved = checkpoints(out)
        # The default job deletes the checkpoints of what it has trained.
        finished = (out / "model" / "config.json").is_file()
        if saved:
            step, path = saved[-1]
            finished &= step == total and run_id_of(path / "state.json") in ("", run_id_of(out / "config.json"))
    return bool(ranks.largest(finished))


def begin_run(out, record, start, resume, ranks):
    """Rank 0 makes `out` ready for a run that goes on after step `start`. Returns (the run's id, whether that step has
    been validated already), the same on every rank.

    Of a run that goes on, config.json keeps under "earlier" how the steps so far were made, and the log is cut back to
    where the checkpoint is. Without resume, what an earlier run left goes.
    """
    run_id, validated = "", False
    if ranks.rank == 0:
        if not resume:
            remove_earlier_run(out)
        run_id = run_id_of(out / "config.json") if start else secrets.token_hex(8)
        if start:
            record = with_history(out, record, start, ranks)
        record = {"run_id": run_id, **record}
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "config.json", [json.dumps(record, indent=2).encode()])   # first: by it a run is known
        (out / "checkpoint").mkdir(exist_ok=True)
        for unfinished in (out / "checkpoint").glob("*.tmp"):             # of a run that was killed while it wrote
            shutil.rmtree(unfinished)
        if start:
            steps, validated = cut_metrics(out / "metrics.jsonl", start)
            if steps != start:
                ranks.print(f"warning: {out}/metrics.jsonl has not all of the {start} steps before; lines were lost")
        else:
            write_whole(out / "metrics.jsonl", [])
    run_id, *_ = ranks.texts(run_id)
    return run_id, bool(ranks.largest(validated))


def remove_earlier_run(out):
    for name in DIRECTORIES:
        if (out / name).exists():
            shutil.rmtree(out / name)
    for name in FILES[1:]:
        (out / name).unlink(missing_ok=True)


def with_history(out, record, start, ranks):
    """record, with what made the steps up to `start` where that differs."""
    old = json.loads((out / "config.json").read_bytes())
    _, rounding = differences(old, record)
    history = old.pop("earlier", [])
    if rounding:
        ranks.print(f"warning: {out} goes on with other rounding: {'; '.join(rounding)}")
        history = [*history, {"to_step": start, **old}]
    return {**record, "earlier": history}
