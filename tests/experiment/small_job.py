"""The default job with a base that learns next to nothing and without pictures, as a command: for tests that stop it.

The environment's SECONDS_OF_A_STEP: how much longer each step takes, in the worker processes too."""

import os
import sys
import time

import train
from experiment import job
from runtime.process import run


job.BASE.update(epochs=0, steps=2)
sys.modules["matplotlib"] = None
forward_backward, seconds = train.forward_backward, float(os.environ.get("SECONDS_OF_A_STEP", 0))


def take_longer(*arguments):
    time.sleep(seconds)
    return forward_backward(*arguments)


train.forward_backward = take_longer

if __name__ == "__main__":
    run(train.main)
