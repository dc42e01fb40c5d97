"""Says something on stdout and stderr, as every command does, and leaves a file: `streams_worker.py FILE [mistake]`."""

import sys
from pathlib import Path

from runtime.process import UserError, run
from runtime.ranks import Ranks


def main():
    ranks = Ranks("cpu")
    ranks.start()
    if "mistake" in sys.argv:
        print("not flushed")
        raise UserError("a mistake")
    for number in range(2000):
        ranks.print("step", number)
        print("progress", number, file=sys.stderr, flush=True)
    with open(f"{sys.argv[1]}-{ranks.rank}", "w") as f:
        # No descriptor of a standard stream, into which others print.
        f.write(str(f.fileno() > 2))
    ranks.barrier()
    Path(f"{sys.argv[1]}-{ranks.rank}").rename(f"{sys.argv[1]}-{ranks.rank}-done")
    if "print" in sys.argv:
        print("done")


run(main)
