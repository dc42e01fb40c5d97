"""What `test_samples` has ranks do.

    nodes ARGUMENT ...        train.py, with each rank in the directory of its number, as if it were a node of its own
    late                      the first rank alone makes the samples, for longer than gloo waits; others load them later
    refused                   a rank makes a mistake: those that know of it say so
    memory SAMPLES            prints how many bytes of its own each rank has more, once it has looked at all samples
"""

import os
import sys
import time
from datetime import timedelta

import numpy as np
import torch.distributed as dist

import train
from data import Samples
from runtime.node import once_a_node
from runtime.process import UserError, run
from runtime.ranks import Ranks


def nodes():
    os.environ["LOCAL_RANK"] = "0"
    os.chdir(os.environ["RANK"])
    sys.argv[1:] = sys.argv[2:]
    train.main()


def late():
    dist.distributed_c10d.default_pg_timeout = timedelta(seconds=2)
    ranks = started()
    makers = []

    def make():
        makers.append(ranks.rank)
        time.sleep(5)
        return make_samples(9)

    def load(directory):
        # The files must not be gone yet.
        time.sleep(ranks.rank)
        return Samples.load(directory)

    assert len(once_a_node(ranks, load, make)) == 9
    assert makers == [0] * (ranks.rank == 0)


def refused():
    """Ranks are nodes; the second cannot make what the first can."""
    os.environ["LOCAL_RANK"] = "0"
    ranks = started()

    def make():
        if ranks.rank == 1:
            raise UserError("no such row")
        return make_samples(9)

    try:
        once_a_node(ranks, Samples.load, make)
    except UserError as e:
        assert str(e) == "no such row"
        os.write(1, b"refused\n")


def memory():
    ranks = started()
    # What a first exchange needs by itself, is there before.
    once_a_node(ranks, Samples.load, make_samples, 9)
    before = own_bytes()
    samples = once_a_node(ranks, Samples.load, make_samples, int(sys.argv[2]))
    assert np.asarray(samples.ids).sum() + np.asarray(samples.response).sum() + samples.offsets[-1] > 0
    # In one piece, or two ranks' lines mix.
    os.write(1, f"{own_bytes() - before}\n".encode())


def started():
    ranks = Ranks("cpu")
    ranks.start()
    return ranks


def make_samples(count):
    """So many samples of 2000 tokens."""
    samples = Samples()
    for number in range(1, count + 1):
        samples.append(list(range(2000)), [False] * 1000 + [True] * 1000, None, number, f"here:{number}")
    return samples


def own_bytes():
    """Of this process's memory, what no file backs."""
    with open("/proc/self/status") as f:
        return 1024 * next(int(line.split()[1]) for line in f if line.startswith("RssAnon:"))


if __name__ == "__main__":
    run({"nodes": nodes, "late": late, "refused": refused, "memory": memory}[sys.argv[1]])
