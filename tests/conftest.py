"""One thread a process: the models of the tests are so small that threads only wait for each other. (Before torch is
imported; what a test starts inherits it.)"""

import gc
import os

import pytest


os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish():
    """What has been imported stays: gc.collect(), which eval.py calls for each model, need not look through it."""
    gc.freeze()


@pytest.fixture(autouse=True)
def no_trace_of_a_command():
    """A command that a test calls in this process sets a variable for what it starts itself, and --variant adds rows to the
    table."""
    from support import forget_variants

    import bft
    # Those of a fixture that came before this one.
    forget_variants()
    rows, quantities = dict(bft.OBJECTIVES), dict(bft.DISTRIBUTION)
    yield
    os.environ.pop("PYTHONSAFEPATH", None)
    forget_variants()
    bft.OBJECTIVES.clear()
    bft.OBJECTIVES.update(rows)
    bft.DISTRIBUTION.clear()
    bft.DISTRIBUTION.update(quantities)
