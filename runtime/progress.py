"""How far long work has come, on stderr."""

import sys
import time

import torch.distributed as dist


SECONDS = 5                          # between two lines, and before the first


def with_progress(work, label):
    """Yields the elements of some work; rank 0 says now and then how many are done, and of a list how long the rest
    will take.

    label: what the work is called; None: nothing is said.
    """
    total = len(work) if isinstance(work, list) else None
    start = said = time.monotonic()
    silent = label is None or (dist.is_initialized() and dist.get_rank() > 0)
    for done, element in enumerate(work, 1):
        yield element
        now = time.monotonic()
        if silent or now - said < SECONDS or done == total:
            continue
        said = now
        come_so_far = f"{done} done"
        if total is not None:
            left = (now - start) / done * (total - done)
            come_so_far = f"{done} of {total} parts, {duration(left)} left"
        print(f"{label}: {come_so_far}", file=sys.stderr, flush=True)


def duration(seconds):
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
