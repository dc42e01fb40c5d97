"""One writer: while a command writes into a run directory, no other does.

The command holds a lock on OUT/writer.lock, which ends with its process, however that dies. (Only after a kill does the
file stay.) Some disks cannot lock. A run therefore has an id as well, in config.json and in every checkpoint, and stops
where it finds another run's.
"""

import contextlib
import json
import os
import socket
import time

from runtime.process import UserError


PATIENCE = 10                        # seconds: what was killed may take a moment to end


@contextlib.contextmanager
def only_writer(out, ranks, patience=None):
    """While it is entered, no other command enters it for the directory `out`, which is made. Every rank calls it; rank
    0 holds the lock. Raises UserError, on every rank, if another command holds it for longer than `patience` seconds
    (None: PATIENCE).

    Whoever looked into the directory before must look again: another command may have written there meanwhile.
    """
    with contextlib.ExitStack() as stack:
        refusal = ""
        if ranks.rank == 0:
            refusal = stack.enter_context(locked(out, ranks, patience))
        refusal, *_ = ranks.texts(refusal)
        if refusal:
            raise UserError(refusal)
        yield


@contextlib.contextmanager
def locked(out, ranks, patience):
    """Holds the lock while it is entered, and yields ""; or why it cannot."""
    if patience is None:
        patience = PATIENCE
    made = [directory for directory in (out, *out.parents) if not directory.exists()]
    path = out / "writer.lock"
    file, refusal = lock(path, ranks, patience)
    try:
        yield refusal
    finally:
        if not refusal and is_at(path, file):
            path.unlink()
        file.close()
        # A run that was refused before it wrote anything leaves no empty directories behind.
        for directory in made:
            with contextlib.suppress(OSError):
                directory.rmdir()


def lock(path, ranks, patience):
    """(The open file, "") when it is ours until it is closed; or, when patience has ended, (the file, why not)."""
    give_up = time.monotonic() + patience
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab+", buffering=0)
        try:
            lock_now(file)
        except BlockingIOError:
            file.seek(0)
            writer = file.read(200).decode(errors="replace").strip() or "another command"
            held = f"{path.parent} is being written by {writer}"
            if time.monotonic() > give_up:
                return file, f"{held}; expected to be its only writer: wait for it, stop it, or name another --out"
            ranks.once(f"{held}; waiting for it")
            file.close()
            time.sleep(0.2)
            continue
        except (OSError, ImportError) as e:
            ranks.once(f"warning: {path.parent} cannot be locked ({e}); do not run two commands with this --out at a "
                       "time")
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


def lock_now(file):
    # Windows has no such module.
    import fcntl
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_at(path, file):
    """Whether this is the file that has the name still."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def run_id_of(file):
    """The id of the run whose config.json, or state.json of a checkpoint, this is; "" if it is missing or damaged.
    Raises OSError where it cannot be read: then it may well be ours."""
    try:
        return str(json.loads(file.read_bytes())["run_id"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def check_still_ours(out, run_id, ranks):
    """Raises UserError, on every rank, if another run than ours has begun in `out`."""
    found = ""
    if ranks.rank == 0:
        found = run_id_of(out / "config.json")
    found, *_ = ranks.texts(found)
    if found != run_id:
        raise UserError(f"--out {out}: another run has begun there since; this one stops, and has written nothing more")
