"""Run by kill.py and test_faults.py, alone or under torchrun: `train.py`, with something that happens to it.

    fault_worker.py FAULT [RANK STEP] -- arguments of train.py

The objective draws from every random generator there is, and needs what is known of a token besides. STEP counts the steps of this process from 1, and the fault
comes in the middle of it, after its backward pass:

    draws            nothing
    slow             nothing, but every step and every fsync takes a while, so that there is time to be killed in
    sigkill, sigterm, sigint, sighup        the rank gets this signal
    sigint2          it gets this one twice
    validating       it gets SIGTERM in a validation, before the second micro-batch; STEP counts validations
    raise            the rank has a bug
    full             the disk is full from then on (no file may grow beyond 64 kB, which the system calls by another name)
    sigterm-full     both
    infinite         a weight that the rank holds becomes so
    late             rank 0 takes its time to save the model, which must be whole when `train` returns, on every rank
    nan, zero        the loss and its gradient are multiplied by it from then on, on every rank
    ... once         as above, but not if RANK STEP were said before, by a process that this one restarts
"""

import os
import resource
import signal
import sys
import time

import torch

import bft
import train
from runtime.process import run
from runtime.sharding import local


def main():
    fault, *rest = sys.argv[1:sys.argv.index("--")]
    sys.argv[1:] = sys.argv[sys.argv.index("--") + 1:]
    rank, at = (int(x) for x in rest[:2] or (0, 0))
    forward_backward, score, fsync, steps, validations = train.forward_backward, train.score, os.fsync, [], []

    def faulty(*args):
        outcome = forward_backward(*args)
        steps.append(0)
        if fault == "slow":
            time.sleep(0.03)
        elif len(steps) == at and int(os.environ.get("RANK", 0)) == rank and (
                "once" not in rest or os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"):
            if fault == "raise":
                raise ZeroDivisionError("a bug of this rank alone")
            if fault == "infinite":
                local(list(args[0].parameters())[-1].detach())[-1] = torch.inf
            if fault.endswith("full"):
                resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 16, 2 ** 16))
            for _ in range(fault.startswith("sig") + fault.endswith("2")):
                os.kill(os.getpid(), getattr(signal, fault.upper().rstrip("2").removesuffix("-FULL")))
        return outcome

    def cut_short(*args):
        *others, stopped = args
        validations.append(0)
        micro_batches = []

        def interrupted():
            micro_batches.append(0)
            if fault == "validating" and len(validations) == at and len(micro_batches) == 2 and int(os.environ.get("RANK", 0)) == rank:
                os.kill(os.getpid(), signal.SIGTERM)
            return stopped()

        return score(*others, interrupted)

    def draws(tokens):
        drawn = tokens.logp.exp() * torch.rand(len(tokens.logp)) + train.np.random.rand() + train.random.random()
        return (drawn + tokens.extra["entropy"] / 9 + tokens.extra["ref_logp"].exp()) / 5

    def wrong(tokens):
        return torch.ones_like(tokens.logp) * ({"nan": torch.nan, "zero": 0}[fault] if len(steps) >= at - 1 else 1)

    def late(*args, save=train.hf.save_model, **options):
        if options["writes"]:
            time.sleep(2)
        save(*args, **options)

    def whole(*args, do=train.train):
        directory = do(*args)
        assert (directory / "config.json").exists()
        return directory

    train.forward_backward, train.score = faulty, cut_short
    if fault == "late":
        train.hf.save_model, train.train = late, whole
    if fault == "slow":
        os.fsync = lambda f: (time.sleep(0.08), fsync(f))
    row = bft.OBJECTIVES["bft"]
    if fault in ("nan", "zero"):
        bft.OBJECTIVES["bft"] = row._replace(token_weight=wrong)
    else:
        bft.OBJECTIVES["bft"] = row._replace(token_weight=draws, needs=("entropy", "ref_logp"))
    train.main()


if __name__ == "__main__":
    run(main)
