"""What the ranks of a node have in common: one of them makes it, and memory holds it once."""

import contextlib
import tempfile
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from runtime.files import naming
from runtime.process import UserError, read_launch


def once_a_node(ranks, load, make, *arguments):
    """What make(*arguments) returns, which the first rank of each node alone calls; its `save(directory)` writes it.

    With several ranks each of them gets load(directory) of a temporary directory that is gone then: load must have
    opened, or mapped, all that it needs. Raises UserError on every rank where one of them does.
    """
    if ranks.world == 1:
        return make(*arguments)
    local_rank = read_launch().local_rank
    # Whoever waits for 30 minutes fails, in any other group; some files take longer.
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    directory = error = ""
    with contextlib.ExitStack() as stack:
        if local_rank == 0:
            try:
                made = make(*arguments)
                directory = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
                write(made, Path(directory))
            except UserError as e:
                error = str(e)
        dist.barrier(patient)
        errors = [text for text in ranks.texts(error) if text]
        if errors:
            raise UserError(errors[0])
        there = Path(ranks.texts(directory)[ranks.rank - local_rank])
        with naming(there):
            made = load(there)
        # Nothing is removed before all have it.
        ranks.barrier()
    dist.destroy_process_group(patient)
    return made


def write(made, directory):
    try:
        made.save(directory)
    except OSError as e:
        raise UserError(f"{directory}: what the ranks of a node share cannot be written: {e}; expected room for it "
                        "there, or elsewhere: see TMPDIR") from None
