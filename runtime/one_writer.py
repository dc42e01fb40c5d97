"""One writer: while a command writes into a run directory, no other does.

The command holds a lock on OUT/writer.lock, which ends with its process, however that dies; the file goes with it, but
after a kill. Some disks cannot lock: a
run therefore has an id as well, in config.json and in every checkpoint, and stops where it finds another run's.
"""

import contextlib
import json
import os
import socket
import time

from runtime.process import UserError


PATIENCE = 10                        # seconds: what was killed may take a moment to end


@contextlib.contextmanager
def only_writer(out, ranks):
    """While it is entered, no other command enters it for the directory `out`, which is made. Every rank calls it; rank
    0 holds the lock. Raises UserError, on every rank, if another command holds it."""
    with contextlib.ExitStack() as stack:
        refusal = ""
        if ranks.rank == 0:
            refusal = stack.enter_context(locked(out, ranks))
        refusal, *_ = ranks.texts(refusal)
        if refusal:
            raise UserError(refusal)
        yield


@contextlib.contextmanager
def locked(out, ranks):
    """Holds the lock while it is entered, and yields ""; or why it cannot. Nothing stays where nothing was written."""
    made = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    file, refusal = lock(out, ranks)
    try:
        yield refusal
    finally:
        if not refusal:
            (out / "writer.lock").unlink(missing_ok=True)
        file.close()
        for directory in made:
            with contextlib.suppress(OSError):
                directory.rmdir()


def lock(out, ranks):
    """(The open lock file, "") when it is ours until it is closed; or (the file, why not) after PATIENCE."""
    path, give_up = out / "writer.lock", time.monotonic() + PATIENCE
    while True:
        file = open(path, "ab+", buffering=0)
        try:
            # Windows has no such module.
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                file.seek(0)
                writer = file.read(200).decode(errors="replace").strip() or "another command"
                return file, (f"--out {out} is being written by {writer}; expected to be its only writer: wait for it, "
                              "stop it, or name another --out")
            file.close()
            time.sleep(0.2)
            continue
        except (OSError, ImportError) as e:
            ranks.once(f"warning: {out} cannot be locked ({e}); do not run two commands with this --out at a time")
            return file, ""
        if is_at(path, file):
            break
        # Its holder deleted it when it was done: others lock the next one.
        file.close()
    # The lock is what counts: a full disk will be told by what is written next.
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file, ""


def is_at(path, file):
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def run_id_of(file):
    """The id of the run whose config.json, or state.json of a checkpoint, this is; "" if it cannot be read."""
    try:
        return str(json.loads(file.read_bytes())["run_id"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def check_still_ours(out, run_id, ranks):
    """Raises UserError, on every rank, if another run than ours has begun in `out`."""
    found, *_ = ranks.texts(run_id_of(out / "config.json"))
    if found != run_id:
        raise UserError(f"--out {out}: another run has begun there since; this one stops, and has written nothing more")
