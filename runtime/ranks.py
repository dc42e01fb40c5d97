"""The processes of torchrun: who we are among them, and the little that they say to each other beside gradients."""

import contextlib
import os
import shlex
import signal
import sys
import threading
import time

import numpy as np
import torch
import torch.distributed as dist

from runtime.device import find_device
from runtime.process import UserError, read_launch
from runtime.terminal import NobodyReads


class Ranks:
    """Who we are among the processes of torchrun; one process by itself is rank 0 of 1.

    device_name: as --device has it. quiet: `progress` says nothing (the default job trains many models).
    """

    def __init__(self, device_name):
        self.rank, self.world, *_ = read_launch()
        self.device = find_device(device_name)
        self.quiet = False
        self.said = set()

    def start(self):
        """Joins the others. Raises UserError where there are some and torchrun did not start us."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
        if self.world == 1:
            return
        try:
            store, rank, world = next(dist.rendezvous("env://"))
        except ValueError as e:
            raise UserError(f"WORLD_SIZE is {self.world}, but {e}; expected to be started by torchrun") from None
        if read_launch().nodes == 1:
            # torchrun restarts us with the store as it was, in which dead processes' addresses are. (On several nodes
            # each counts its restarts for itself, so that a prefix could differ.)
            store = dist.PrefixStore(f"restart {read_launch().restarts}", store)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)

    def command(self):
        """What was typed to start us, as far as we know."""
        program = "python"
        if self.world > 1:
            here = read_launch().local_world
            nodes = f"--nnodes={self.world // here} ... " if self.world > here else ""
            program = f"torchrun {nodes}--nproc_per_node={here}"
        return f"{program} {shlex.join(sys.argv)}"

    def print(self, *words):
        if self.rank == 0:
            # The run goes on.
            with contextlib.suppress(NobodyReads):
                print(*words, flush=True)

    def progress(self, *words):
        if not self.quiet:
            self.print(*words)

    def once(self, words):
        """Prints these words the first time that they are said."""
        if words not in self.said:
            self.said.add(words)
            self.print(words)

    def largest(self, number):
        """The largest of the integers that the ranks bring, over gloo: no GPU is waited for."""
        number = torch.tensor(number, dtype=torch.int64)
        if self.world > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def texts(self, mine):
        """[text] that the ranks bring, in their order."""
        if self.world == 1:
            return [mine]
        mine = np.frombuffer(mine.encode(), dtype=np.uint8)
        table = torch.zeros(self.world, self.largest(len(mine)), dtype=torch.uint8)
        table[self.rank, :len(mine)] = torch.tensor(mine)
        dist.all_reduce(table)                                            # each rank filled its row
        return [bytes(row.tolist()).rstrip(b"\0").decode() for row in table]

    def barrier(self):
        self.largest(0)


def end_with(launcher):
    """Ends this process when that of torchrun has been killed, as torchrun itself ends a rank: with SIGTERM, at which a
    training saves a checkpoint, and 30 seconds later in any case."""
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
    os._exit(128 + signal.SIGTERM)
