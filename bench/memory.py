"""What each rank holds of a model: while it loads, after two steps, and within the second, beside what it should.

    torchrun --nproc_per_node=4 bench/memory.py --shard all               # SmolLM2's shape
    torchrun --nproc_per_node=4 bench/memory.py --shard all --lora-rank 16
    python bench/memory.py --shape small

A directory of random weights is loaded as train.py loads it, and trained on in float32. Memory is what comes on top of
the process before: resident bytes on a CPU, torch's own count on a GPU. Computed is what `train.training_bytes` says
that a rank holds; for loading, the bytes of its weights. What is gathered in a step, and activations, come on top.
"""

import argparse
import contextlib
import ctypes
import json
import sys
import tempfile
from pathlib import Path

import torch
from measure import SHAPES, end_of_peak, heading, medquad_batch, start_of_peak


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hf  # noqa: E402
import train  # noqa: E402
from model import GPT  # noqa: E402
from runtime.process import run  # noqa: E402
from runtime.ranks import Ranks  # noqa: E402
from runtime.sharding import SHARDS, local, ranks_per_copy  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2")
    parser.add_argument("--shard", choices=SHARDS, default="no")
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    ranks = Ranks(args.device)
    ranks.start()
    settings = train.Settings(shard=args.shard, lora_rank=args.lora_rank, micro_tokens=256, compile=False)
    keep_no_holes()
    # What a first step of any model brings into a process is not its memory.
    measure(SHAPES["dry"], settings, ranks)
    row = measure(SHAPES[args.shape], settings, ranks)
    rows = [json.loads(text) for text in ranks.texts(json.dumps(row))]
    ranks.print(heading(ranks.device))
    ranks.print(f"{args.shape}, float32, {ranks.world} ranks, --shard {args.shard}, --lora-rank {args.lora_rank}; MB\n")
    ranks.print("rank  " + "  ".join(f"{name:>16}" for name in rows[0]))
    for rank, row in enumerate(rows):
        ranks.print(f"{rank:4}  " + "  ".join(f"{value / 1e6:16.1f}" for value in row.values()))


def keep_no_holes():
    """Has glibc give each tensor pages of its own, which go back when it does: we measure tensors, not its holes."""
    mmap_threshold = -3
    with contextlib.suppress(OSError, AttributeError):                    # another system's
        ctypes.CDLL(None).mallopt(mmap_threshold, 65536)


def measure(shape, settings, ranks):
    """{column: bytes} of this rank."""
    config, device = hf.config_from_dict(shape), ranks.device
    batch = medquad_batch(config.vocab_size, 2 * ranks.world, 100)
    with tempfile.TemporaryDirectory() as folder:
        directory = ranks.texts(folder)[0]
        if ranks.rank == 0:
            hf.save_model(GPT(config), directory)
        ranks.barrier()
        before = start_of_peak(device)
        model = train.prepare_model(config, directory, settings, torch.float32, ranks)
        loading = end_of_peak(device) - before
        ranks.barrier()
    weights = sum(local(p).nbytes for p in model.parameters())
    net = train.wrap(model, settings, torch.float32, ranks)
    trained = train.trained_parameters(model)
    optimizer = train.make_optimizer(trained, settings)
    for _ in range(2):
        start_of_peak(device)
        train.forward_backward(net, batch, "bft", settings, ranks, torch.float32)
        train.clip_gradient(trained, 1.0)
        optimizer.step()
        in_a_step = end_of_peak(device) - before
    held = start_of_peak(device) - before
    computed, gathered = train.training_bytes(config, settings, torch.float32, ranks_per_copy(settings.shard, ranks))
    return {"weights computed": weights, "while it loads": loading, "state computed": computed, "after two steps": held,
            "gathered": gathered, "within a step": in_a_step}


if __name__ == "__main__":
    run(main)
