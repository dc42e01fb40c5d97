"""The default job with a base that learns next to nothing, as a command: for tests that stop it."""

import train
from experiment import job
from runtime.process import run


job.BASE.update(epochs=0, steps=2)

if __name__ == "__main__":
    run(train.main)
