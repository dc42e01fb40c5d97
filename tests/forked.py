"""Runs a script on one rank or several without the seconds that each process takes to import torch.

A server imports torch, once for each process of pytest, and computes nothing. Every rank is a fork of it: a process with
arguments, signals, files, output and an exit code of its own, that imports our modules anew and runs the script from its
first line, as `python SCRIPT ...` would. What torchrun makes of a rank that fails is seen where a test starts torchrun
itself: `support.torchrun`, `kill.launch`.
"""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist


ROOT = Path(__file__).resolve().parents[1]
# What the server imports: ours for the packages that they import, what torch imports at the first step, and, if they are
# installed, what every rank of an evaluation does.
MODULES = ["train", "eval", "torch._dynamo", "sklearn.linear_model", "sklearn.model_selection", "rouge_score.rouge_scorer"]
SECONDS = 300


def forked(ranks, script, *arguments, nodes=1, env=None, cwd=None, path=(ROOT, ROOT / "tests"), meanwhile=None):
    """A Python script on so many ranks, a thread each; returns the CompletedProcess. Its code is that of the rank that
    failed first; the others are killed then. nodes: how many the ranks believe to be on. path: where the script finds
    modules that are not beside it. meanwhile(processes) is called when they have begun."""
    environments = [{}]
    if ranks > 1:
        # Ranks find each other at the port of this store, as they do at torchrun's.
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        here = ranks // nodes
        together = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(here)}
        environments = [{**together, "RANK": str(rank), "LOCAL_RANK": str(rank % here)} for rank in range(ranks)]
    command = [str(script), *map(str, arguments)]
    context = context_of_the_server()
    with tempfile.TemporaryDirectory() as directory:
        output, errors = Path(directory, "output"), Path(directory, "errors")
        processes = []
        for environment in environments:
            arguments = ({**environment, **(env or {})}, command, cwd, [str(folder) for folder in path], output, errors)
            processes.append(context.Process(target=run_script, args=arguments))
        code = wait_for_all(processes, meanwhile)
        return subprocess.CompletedProcess(command, code, output.read_text(), errors.read_text())


def context_of_the_server():
    """What makes processes that are forks of the server, which runs from the first call on."""
    # Windows lacks it.
    from multiprocessing import forkserver
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    # Ranks leave by os._exit; that their semaphores are cleaned up after them is not worth a warning.
    quiet = "ignore:resource_tracker:UserWarning"
    with patch.dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", PYTHONWARNINGS=quiet):
        forkserver.ensure_running()
    return context


def wait_for_all(processes, meanwhile):
    """Starts them; returns the exit code of the first that fails, or 0. None is left."""
    running = []
    try:
        for process in processes:
            process.start()
            running.append(process)
        if meanwhile:
            meanwhile(processes)
        while running:
            ended = wait([process.sentinel for process in running], SECONDS)
            assert ended, f"not done after {SECONDS} seconds"
            for process in [process for process in running if process.sentinel in ended]:
                process.join()
                running.remove(process)
                if process.exitcode:
                    # torchrun takes a moment to see it as well: whatever the others say meanwhile is heard.
                    time.sleep(0.5 if running else 0)
                    return process.exitcode
        return 0
    finally:
        for process in running:
            process.kill()
            process.join()


def run_script(environment, command, cwd, path, output, errors):
    """What a fork does."""
    # Whatever the server has imported is not looked through for garbage.
    gc.freeze()
    os.environ.update(environment)
    # Where that is, may be told by the environment.
    tempfile.tempdir = None
    for number, file in ((1, output), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if cwd:
        os.chdir(cwd)
    forget_our_modules()
    sys.argv[:] = command
    # As Python does: where the script is, then PYTHONPATH, then what is installed.
    sys.path[:] = [str(Path(command[0]).parent), *path, *installed(sys.path)]
    runpy.run_path(command[0], run_name="__main__")


def forget_our_modules():
    """So that the script has to find them, and they run from their first line."""
    modules = {file.stem for file in ROOT.glob("*.py")}
    packages = {file.parent.name for file in ROOT.glob("*/__init__.py")}
    for name in list(sys.modules):
        if name.split(".")[0] in modules | packages:
            del sys.modules[name]


def installed(folders):
    """Those of sys.path that are not ours: pytest adds some."""
    tests = ROOT / "tests"
    return [folder for folder in folders if Path(folder) not in (ROOT, tests) and tests not in Path(folder).parents]
