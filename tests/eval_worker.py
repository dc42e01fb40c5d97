"""Run by test_eval.py on several ranks: eval.py, with so many of them on each node. Rank r leaves in rank-r.json of every
model how many bytes of its weights it held, how often its first block was called, and what was still there of the model before.

    eval_worker.py RANKS_OF_A_NODE OUT arguments of eval.py
"""

import json
import os
import sys
import weakref
from pathlib import Path

import eval as evaluation
from runtime.process import run
from runtime.sharding import local
from tasks import scoring, statistics


def main():
    os.environ["LOCAL_WORLD_SIZE"], out = sys.argv[1:3]
    sys.argv[1:] = sys.argv[3:]
    models, notes = [], []
    # Intervals have tests of their own.
    statistics.RESAMPLES = 500
    load_model, micro_batches_of_rank = evaluation.load_model, scoring.micro_batches_of_rank

    def load_and_watch(*args):
        notes.append({"passes": 0, "empty": 0})
        model = load_model(*args)
        notes[-1] |= {"held": sum(local(p).nbytes for p in model.parameters()), "before": sum(ref() is not None for ref in models)}
        models.append(weakref.ref(model))
        model.layers[0].register_forward_pre_hook(count_pass)
        return model

    def count_pass(*_):
        notes[-1]["passes"] += 1

    def count_empty(*args):
        micro_batches = micro_batches_of_rank(*args)
        notes[-1]["empty"] += micro_batches.count([])
        return micro_batches

    evaluation.load_model, scoring.micro_batches_of_rank = load_and_watch, count_empty
    try:
        evaluation.main()
    finally:
        Path(out, f"rank-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(notes))


if __name__ == "__main__":
    run(main)
