"""What test_workers.py has workers do. They import this module, and so no more than they need."""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from runtime.process import UserError


def square(number):
    if number == 0:
        raise UserError("0 is not to be squared")
    return number ** 2, torch.get_num_threads(), os.getpid()


def die(number):
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def say(words):
    print(words)
    print(words, file=sys.stderr, flush=True)


def take_long(trace):
    Path(trace).touch()
    time.sleep(600)
