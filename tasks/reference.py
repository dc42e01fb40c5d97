"""log p_t under the weights that a run starts from, for objectives that need it (`ref_logp`)."""

import hashlib
import itertools

import torch

from data import collate
from runtime.device import autocast
from runtime.files import load_safetensors, save_safetensors
from runtime.process import UserError
from runtime.progress import with_progress
from tasks.scoring import MICRO_TOKENS, as_device_likes, micro_batches_of_rank, sum_over_ranks


def with_reference(out, run_id, model, samples, first_step, dtype, micro_tokens, ranks):
    """The samples with log p_t under the weights that the run starts from. These numbers are computed when it begins,
    by a forward pass over all samples, and kept in `out`. Raises UserError."""
    path = out / "ref_logp.safetensors"
    if first_step == 0:
        logp = token_logprobs(model, samples, dtype, micro_tokens, f"{out}: log p_t before training")   # (N,)
        if ranks.rank == 0:
            save_safetensors({"ref_logp": logp, "seal": seal(logp, run_id)}, path)
        ranks.barrier()
        return samples.with_reference(logp.numpy())
    try:
        kept = load_safetensors(path)
        is_whole = torch.equal(kept["seal"], seal(kept["ref_logp"], run_id))
    except (OSError, ValueError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise UserError(f"{path} is not what this run began with; expected that, or --no-resume")
    return samples.with_reference(kept["ref_logp"].numpy())


def seal(t, run_id):
    """The digest of a tensor of a run, (32,) uint8."""
    digest = hashlib.sha256(run_id.encode() + t.numpy().tobytes()).digest()
    return torch.tensor(list(digest), dtype=torch.uint8)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def token_logprobs(model, samples, dtype=torch.float32, micro_tokens=MICRO_TOKENS, label=None):
    """log p of every response token, sample after sample: (N,) float32 on the CPU. samples: data.Samples. label: see
    `with_progress`. Raises UserError for a model that gives NaN."""
    device = next(model.parameters()).device
    counts = samples.response_lengths.tolist()
    ends = list(itertools.accumulate(counts))
    table = torch.zeros(sum(counts), device=device)                                             # (N,)
    my_micro_batches = micro_batches_of_rank(samples.lengths.tolist(), as_device_likes(micro_tokens, device))
    for micro_batch in with_progress(my_micro_batches, label):
        batch = collate([samples[i] for i in micro_batch]).to(device)
        with autocast(device, dtype):
            logp = model(batch.input_ids, batch.lengths, batch.at, batch.targets)
        for i, own in zip(micro_batch, logp.split([counts[i] for i in micro_batch])):
            table[ends[i] - counts[i]:ends[i]] = own
    return torch.from_numpy(sum_over_ranks(table))
