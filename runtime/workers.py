"""Worker processes of one thread each, for trainings so small that one by itself leaves most of a CPU idle."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

from runtime.process import Stop
from runtime.terminal import guard_terminal


# In a worker: what it does with a task, and an event that says that the command is leaving.
task_function = None
leaving = None


def map_in_workers(function, tasks, count):
    """Yields function(task) for each task, in order, from `count` worker processes.

    With one worker or one task it is a loop in this process. What a task raises is raised here. That, or a signal,
    ends the workers as SIGTERM does: a training saves a checkpoint first. Raises SystemExit after a signal, and
    ChildProcessError where a worker was killed.
    """
    count = min(count, len(tasks))
    if count <= 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")
    event = context.Event()
    with ProcessPoolExecutor(count, context, begin_worker, (function, event)) as pool, Stop() as stop:
        try:
            futures = [pool.submit(do_task, task) for task in tasks]
            for future in futures:
                while not wait([future], timeout=0.2).done and not stop.signal:
                    pass
                if stop.signal:
                    raise SystemExit(128 + stop.signal)
                yield future.result()
        except BrokenProcessPool:
            raise ChildProcessError("a worker process was killed (is memory short?); the same command goes "
                                    "on") from None
        finally:
            event.set()
            pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# In a worker

def begin_worker(function, event):
    global task_function, leaving
    task_function, leaving = function, event
    guard_terminal()
    torch.set_num_threads(1)
    # Signals are for trainings to look at. One that comes between two of them ends nothing here.
    Stop().__enter__()
    threading.Thread(target=follow_parent, daemon=True).start()


def follow_parent():
    """Tells the training of this worker to stop when the command is leaving, and ends with the parent."""
    parent = multiprocessing.parent_process()
    while parent.is_alive():
        parent.join(0.3)
        if leaving.is_set():
            # Again and again: a training may not have begun to listen.
            signal.raise_signal(signal.SIGTERM)
    os._exit(1)


def do_task(task):
    if leaving.is_set():
        raise SystemExit(128 + signal.SIGTERM)
    return task_function(task)
