"""A command from its arguments to its exit code: users' mistakes, signals, and who speaks when a rank fails."""

import argparse
import contextlib
import os
import re
import signal
import sys
import time
import traceback
from typing import NamedTuple

import torch

from runtime.terminal import NobodyReads, guard_terminal


class UserError(Exception):
    """A mistake in what the user gave us. Its message is one sentence: what is wrong, where, what was expected."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a UserError, so that only rank 0 prints them."""

    def error(self, message):
        raise UserError(message)


class Launch(NamedTuple):
    """Who we are among the processes of torchrun; one process by itself is rank 0 of 1."""
    rank: int
    world: int                       # how many there are
    local_rank: int                  # on this node
    local_world: int
    nodes: int
    restarts: int


def read_launch():
    """The Launch that torchrun describes in environment variables. Raises UserError."""
    world = number_of("WORLD_SIZE", 1, least=1)
    local_world = number_of("LOCAL_WORLD_SIZE", 1, least=1)
    nodes = number_of("GROUP_WORLD_SIZE", max(1, world // local_world), least=1)
    launch = Launch(number_of("RANK", 0), world, number_of("LOCAL_RANK", 0), local_world, nodes,
                    number_of("TORCHELASTIC_RESTART_COUNT", 0))
    if launch.rank >= world:
        raise UserError(f"RANK is {launch.rank} and WORLD_SIZE {world} in the environment; expected a smaller RANK, as "
                        "torchrun sets it, or neither")
    return launch


def number_of(name, default, least=0):
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise UserError(f"{name} is {text!r} in the environment; expected a number from {least} on, as torchrun sets "
                        "it, or none")
    return int(text)


class Ending(NamedTuple):
    code: int | str | None           # as sys.exit takes it
    message: str | None = None       # one sentence for stderr
    lets_others_speak: bool = False  # another rank knows the cause, or says the same


def run(main):
    """Calls main(), then exits.

    Exit codes: 0; 2 after a user's mistake; 1 where a file cannot be read or written, or memory runs out (each said in
    one line on stderr, without a traceback); 130 after SIGINT and 143 after SIGTERM, as a shell has it.

    torchrun names the first rank that exits as the cause and kills the others. A rank that only lost its peer is not
    the cause, and a user's mistake, which every rank makes, is for rank 0 to say: these ranks wait some seconds.
    """
    rank, world = 0, 1
    # Python processes that we start, workers and a compiler's, import nothing that lies in the current directory.
    os.environ["PYTHONSAFEPATH"] = "1"
    # As an exception, so that whatever is being written is cleaned up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    guard_terminal()
    try:
        rank, world, *_ = read_launch()
        main()
        sys.stdout.flush()
        ending = Ending(0)
    except BaseException as error:
        ending = ending_of(error, rank, world)
        if ending is None:
            raise
    if ending.lets_others_speak:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    if ending.message:
        print("error: " + " ".join(ending.message.split())[:1000], file=sys.stderr, flush=True)
    # Whether that fails makes no difference to the exit code.
    with contextlib.suppress(NobodyReads, OSError):
        sys.stdout.flush()
    if world > 1:
        # Everything is written. With gloo the interpreter's own teardown now and then aborts ("terminate called without
        # an active exception": seen in 1 of some 20 runs on three ranks), and torchrun would call the run a failure.
        os._exit(ending.code or 0)
    sys.exit(ending.code)


def ending_of(error, rank, world):
    """How the command ends after this exception; None for a bug, which deserves its traceback."""
    if isinstance(error, SystemExit):
        return Ending(error.code)
    if isinstance(error, KeyboardInterrupt):
        return Ending(130)
    if isinstance(error, UserError):
        return Ending(2, str(error), lets_others_speak=rank > 0)
    if isinstance(error, torch.OutOfMemoryError):
        return Ending(1, f"out of GPU memory ({error}); a smaller --micro-tokens, --recompute, --shard all or "
                         "--lora-rank needs less")
    # torch has no class of its own for memory that a CPU has not.
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return Ending(1, "out of memory; training needs less of it with a smaller --micro-tokens, --recompute, "
                         "--shard all or --lora-rank")
    if isinstance(error, NobodyReads):
        return Ending(0)
    if isinstance(error, OSError):
        return Ending(1, f"{error.filename}: {error.strerror}" if error.filename else str(error))
    if world == 1 or not isinstance(error, Exception):
        return None
    # gloo and NCCL name themselves when a connection breaks.
    if re.search("gloo|NCCL", str(error)):
        return Ending(1, f"rank {rank} cannot reach another rank: {error}", lets_others_speak=True)
    traceback.print_exc()
    return Ending(1)


class Stop:
    """While it is entered, keeps SIGTERM, SIGINT or SIGHUP in `signal` until someone looks (0: none came).

    A second SIGINT quits at once.
    """

    def __enter__(self):
        self.signal = 0
        self.handlers_before = {}
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            number = getattr(signal, name, None)                          # Windows has no SIGHUP
            # nohup ignores SIGHUP, and so do we then.
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self.handlers_before[number] = signal.signal(number, self.keep)
        return self

    def keep(self, number, frame):
        if number == self.signal == signal.SIGINT:
            os._exit(130)
        self.signal = int(number)

    def __exit__(self, error, *_):
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
        # A peer obeyed the same signal first and is gone, so that an exchange with it failed.
        if self.signal and error and issubclass(error, RuntimeError):
            signal.raise_signal(self.signal)


def leave_after_a_signal(received, out, step, ranks):
    if received:
        ranks.barrier()                                                   # whoever left now would have rank 0 killed
        ranks.print(f"{out}: {signal.Signals(received).name}; the same command goes on from step {step}")
        raise SystemExit(128 + received)
