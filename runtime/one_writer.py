"""One writer: while a command writes into a run directory, no other does.

The command holds a lock on OUT/writer.lock, which ends with its process, however that dies. Some disks cannot lock: a
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
            out.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(out / "writer.lock", "ab+", buffering=0))
            refusal = lock(file, out, ranks)
        refusal, *_ = ranks.texts(refusal)
        if refusal:
            raise UserError(refusal)
        yield


def lock(file, out, ranks):
    """Locks an unbuffered file until it is closed, and writes into it whose it is. Returns why not, if another has it.
    """
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            # Windows has no such module.
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > give_up:
                file.seek(0)
                writer = file.read(200).decode(errors="replace").strip() or "another command"
                return (f"--out {out} is being written by {writer}; expected to be its only writer: wait for it, stop "
                        "it, or name another --out")
            time.sleep(0.2)
        except (OSError, ImportError) as e:
            ranks.once(f"warning: {out} cannot be locked ({e}); do not run two commands with this --out at a time")
            break
    # The lock is what counts: a full disk will be told by what is written next.
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return ""


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
