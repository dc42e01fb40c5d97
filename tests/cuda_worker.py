"""Run by test_cuda.py: trains, validates, saves, resumes, evaluates and generates on the device of fake_cuda.py and prints
{name: what was seen}. Arguments are the names: cases ("gpt2 lora recompute bfloat16"), "needs", and faults that are planted."""

# ruff: noqa: I001
import fake_cuda                                                          # before torch
import contextlib
import functools
import json
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import split_worker
import torch
from families import GPT2, SIZES

import bft
import data
import hf
import model as model_module
import train
from runtime.device import autocast
from runtime.files import load_safetensors
from runtime.ranks import Ranks
from tasks.scoring import Request, loglikelihood, score


LLAMA = {**SIZES, "num_hidden_layers": 2, "tie_word_embeddings": False}
CONFIGS = {"gpt2": {**GPT2, "n_layer": 2, "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
           "llama": {**LLAMA, "architectures": ["LlamaForCausalLM"], "model_type": "llama"},
           "qwen3": {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True}}
STEPS = 2
SAMPLES = ((40, 20), (7, 3), (61, 33), (25, 24), (12, 1), (50, 8))        # tokens, response tokens
MICRO_TOKENS = 130
# What is counted apart. Phases within others are counted there alone.
PHASES = [(train, "prepare_model"), (train, "resume_from_checkpoint"), (train, "with_reference"), (train, "forward_backward"), (bft, "weigh"),
          (bft, "weighted_loss"), (train, "sample_statistics"), (train, "clip_gradient"), (train.StepLog, "write"), (train, "validate"),
          (train, "check_numbers"), (train, "save_checkpoint"), (train, "save_result")]


class LivelyGPT(model_module.GPT):
    """Its adapters learn from the first step: with B = 0 the gradient of A is 0."""

    def initialise(self, name, p):
        super().initialise(name, p)
        if name.endswith("lora_b"):
            torch.nn.init.normal_(p, std=0.1)


class Case:
    """A model, and how it is trained."""

    def __init__(self, name, objective="bft"):
        self.objective = objective
        family, adapters, recompute, self.dtype = name.split()
        self.config = hf.config_from_dict(CONFIGS[family])
        self.lora_rank = 4 if adapters == "lora" else 0
        self.recompute = recompute == "recompute"
        rng = np.random.RandomState(0)
        self.samples = data.Samples()
        for tokens, response in SAMPLES:
            ids = rng.randint(0, self.config.vocab_size, tokens).tolist()
            self.samples.append(ids, [False] * (tokens - response) + [True] * response, "here", 0)
        self.validation = self.samples[:3]

    def train(self, out, device, steps):
        """Trains into `out`. Returns the first step's gradients, {name: numbers}, and the lines of the log."""
        ranks = Ranks(device)
        ranks.start()
        ranks.quiet = True
        settings = train.Settings(
            out=str(out), steps=steps, batch_size=len(SAMPLES), micro_tokens=MICRO_TOKENS, group_size=8, lr=1e-3, log_every=STEPS,
            save_every=1, dtype=self.dtype, compile=False, recompute=self.recompute, lora_rank=self.lora_rank)
        record = train.describe_run(settings, self.objective, {}, [self.samples], ranks)
        gradients = {}
        clip_gradient = train.clip_gradient

        def clip_and_keep(trained, largest):
            for name, p in trained.items():
                gradients.setdefault(name, fake_cuda.numbers_of(p.grad).clone())
            return clip_gradient(trained, largest)

        with patch.object(train, "clip_gradient", clip_and_keep), patch.object(train, "GPT", LivelyGPT):
            train.train(settings, self.objective, out, record, self.config, None, self.samples, self.validation, {}, ranks)
        return gradients, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    def evaluate(self, out, device, phase):
        """{what: numbers} that the trained model gives."""
        dtype = getattr(torch, self.dtype)
        with phase("load_model"):
            model = hf.load_model(out / "model").cast(dtype).to(device)
        context = self.samples[0].ids.tolist()
        requests = [Request(context[:9], context[9:12]), Request(context[:9], context[20:23]), Request(context, [1])]
        with phase("score"):
            scores = score(model, self.samples, dtype, MICRO_TOKENS, 8)
        with phase("loglikelihood"):
            likelihoods = loglikelihood(model, requests, dtype, MICRO_TOKENS)
        with phase("generate"), autocast(device, dtype):
            new = model.generate([context, context[:5]], 4, 0.0, (3,)) + model.generate([context], 3, 1.0)
        with phase("answers"):
            answers = [ids.tolist() for ids in new]
        return {"scores": scores, "loglikelihoods": likelihoods, "answers": answers}


def in_phase(device, name, function):
    def call(*args, **kwargs):
        with device.phase(name):
            return function(*args, **kwargs)

    return call


def largest_difference(gradients, expected):
    """Of any parameter's gradient, relative to its norm. The gradient of a key's bias is 0 but for rounding, which is
    compared with the whole gradient."""
    norms = {name: float(gradient.norm()) for name, gradient in expected.items()}
    floor = 1e-2 * max(norms.values())
    return max(float((gradients[name] - expected[name]).norm()) / max(norms[name], floor) for name in expected)


@functools.cache
def first_step_on_the_cpu(name):
    with tempfile.TemporaryDirectory() as folder:
        return Case(name).train(Path(folder), "cpu", 1)


def run_case(device, name, folder):
    """Everything, on the device and on the CPU."""
    case = Case(name)
    gradients, lines = case.train(folder / "device", "cuda", STEPS)
    counts = device.counts.copy()
    # As if it was killed before its last checkpoint.
    result = (folder / "device" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "device" / "model")
    shutil.rmtree(folder / "device" / "checkpoint" / f"step-{STEPS}")
    case.train(folder / "device", "cuda", STEPS)
    resumed = (folder / "device" / "model" / "model.safetensors").read_bytes()

    answers = case.evaluate(folder / "device", "cuda", device.phase)
    expected_answers = case.evaluate(folder / "device", "cpu", device.phase)
    expected, expected_lines = first_step_on_the_cpu(name.replace("recompute", "keep"))
    return {"kernels": kernels_of_a_step(counts), "gradient_difference": largest_difference(gradients, expected),
            "lines": lines, "expected_lines": expected_lines, "resumed_is_equal": resumed == result, "answers": answers,
            "expected_answers": expected_answers}


def kernels_of_a_step(counts):
    """{phase: kernels}."""
    kernels = Counter()
    for (phase, kind, _), times in counts.items():
        if kind == "kernel":
            kernels[phase] += times / STEPS
    return kernels


def run_needs(device, name, folder):
    """A step of an objective that needs all that there is, on the device and on the CPU."""
    split_worker.add_rows()
    case = Case("llama all keep float32", "everything")
    gradients, lines = case.train(folder / "device", "cuda", 1)
    expected, expected_lines = case.train(folder / "cpu", "cpu", 1)
    references = [load_safetensors(folder / where / "ref_logp.safetensors")["ref_logp"] for where in ("device", "cpu")]
    return {"gradient_difference": largest_difference(gradients, expected), "lines": lines, "expected_lines": expected_lines,
            "reference_difference": float((references[0] - references[1]).abs().max())}


def run_fault(device, name, folder):
    """One step with a fault in the program."""
    case = Case("llama all keep bfloat16")
    case.validation = []
    with FAULTS[name]():
        case.train(folder, "cuda", 1)
    return {}


def tensor_left_on_the_cpu():
    to = data.Batch.to
    return patch.object(data.Batch, "to", lambda batch, device: to(batch, device)._replace(targets=batch.targets))


def item_in_the_step():
    weighted_loss = bft.weighted_loss

    def look_at_loss(*args, **options):
        loss = weighted_loss(*args, **options)
        assert loss.item() >= 0
        return loss

    return patch.object(bft, "weighted_loss", look_at_loss)


def int64_offsets():
    init = model_module.Packing.__init__

    def longer(packing, *args, **options):
        init(packing, *args, **options)
        packing.offsets = packing.offsets.long()

    return patch.object(model_module.Packing, "__init__", longer)


def unpinned_copy():
    return patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor)


FAULTS = {fault.__name__: fault for fault in (tensor_left_on_the_cpu, item_in_the_step, int64_offsets, unpinned_copy)}


def main(names):
    device = fake_cuda.install()
    results = {}
    with contextlib.ExitStack() as patches:
        # Nothing here is worth compiling.
        patches.enter_context(torch.compiler.set_stance("force_eager"))
        for owner, name in PHASES:
            patches.enter_context(patch.object(owner, name, in_phase(device, name, getattr(owner, name))))
        for name in names:
            device.counts.clear()
            run = run_needs if name == "needs" else run_fault if name in FAULTS else run_case
            with tempfile.TemporaryDirectory() as folder:
                try:
                    results[name] = {"error": None, **run(device, name, Path(folder))}
                except Exception:
                    results[name] = {"error": traceback.format_exc()}
            for kind in ("wait", "unpinned"):
                results[name][kind] = [[phase, what, n] for (phase, k, what), n in device.counts.items() if k == kind]
    print(json.dumps(results, default=lambda values: values.tolist()))


if __name__ == "__main__":
    main(sys.argv[1:])
