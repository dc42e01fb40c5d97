"""Run by test_checkpoint.py, on one rank or several:

    checkpoint_worker.py DIRECTORY HOW READ WRITE     HOW: as --shard has it; READ: steps, joined by commas, or "-"; WRITE: a step, or "full"

Loads each of these checkpoints of DIRECTORY into a model that has other numbers, looks whether it has become the one that `filled` gives, and how
much was read for it; then saves that one. "full": no rank finds room on the disk."""

import os
import resource
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from support import tiny

import runtime.files
from runtime.checkpoint import checkpoints, resume_from_checkpoint, save_checkpoint
from runtime.process import run
from runtime.ranks import Ranks
from runtime.sharding import gather_whole, is_sharded, local, shard


# 61 rows are no multiple of 2, 3 or 4; of adapters, which have 2, a third and a fourth rank have none.
SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}


def model_of(how, ranks):
    """(trained parameters, optimizer that has made a step)."""
    model = tiny(seed=1, **SIZES)
    model.add_lora(2, 4)
    for p in model.parameters():
        p.requires_grad_(True)
    shard(model, how, torch.float32, ranks)
    assert is_sharded(model) == (how != "no")
    trained = dict(model.named_parameters())
    matrices = [p for p in trained.values() if p.dim() > 1]
    others = [p for p in trained.values() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95), fused=True)
    for p in trained.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return trained, optimizer


def filled(name, kind, shape):
    """What this tensor has in every checkpoint: no two numbers are equal."""
    generator = torch.Generator().manual_seed(sum(f"{kind} {name}".encode()))
    return torch.rand(shape, generator=generator)


def everything(trained, optimizer):
    """Yields (name, kind, tensor)."""
    for name, p in trained.items():
        yield name, "model", p.detach()
        for kind, value in optimizer.state[p].items():
            yield name, kind, value


def rows(whole, t):
    """Those of a whole tensor that this rank has of t."""
    if t.shape == local(t).shape:
        return whole
    size = -(-len(t) // t.device_mesh.size(-1))
    index = t.device_mesh.get_local_rank(-1)
    return whole[index * size:(index + 1) * size]


def check(trained, optimizer, sizes):
    """They are as `filled` has them, and no more was read than this rank's rows."""
    bytes_of_rows = []
    for name, kind, t in everything(trained, optimizer):
        if kind == "step":
            assert t.dtype == torch.float32 and float(t) == 7 + len(name)
            continue
        assert torch.equal(gather_whole(t), filled(name, kind, t.shape)), (name, kind)
        bytes_of_rows.append(local(t).nbytes)
    assert sum(sizes) == sum(bytes_of_rows) and max(sizes) <= max(bytes_of_rows), (sizes, bytes_of_rows)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    optimizer.step()                                                      # it can go on


def main():
    directory, how, read, write = Path(sys.argv[1]), *sys.argv[2:]
    if how == "node":
        os.environ["LOCAL_WORLD_SIZE"] = "2"
    ranks = Ranks("cpu")
    ranks.start()
    saved = dict(checkpoints(directory))
    for step in read.split(",") if read != "-" else []:
        trained, optimizer = model_of(how, ranks)
        alone = directory / f"{step} alone"
        if ranks.rank == 0:
            shutil.copytree(saved[int(step)], alone / "checkpoint" / f"step-{step}", dirs_exist_ok=True)
        ranks.barrier()
        with patch("runtime.files.own_pages", side_effect=runtime.files.own_pages) as own_pages:
            assert resume_from_checkpoint(alone, trained, optimizer, True, ranks) == int(step)
        check(trained, optimizer, [size for (size,), _ in own_pages.call_args_list])
    trained, optimizer = model_of(how, ranks)
    for name, kind, t in everything(trained, optimizer):
        if kind == "step":
            t.fill_(7 + len(name))
        else:
            local(t).copy_(rows(filled(name, kind, t.shape), t))
    for group in optimizer.param_groups:
        group["lr"] = 0.25
    if write == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 10, 2 ** 10))
        write = 99
    save_checkpoint(directory, int(write), trained, optimizer, 9, ranks, "")
    ranks.barrier()


if __name__ == "__main__":
    run(main)
