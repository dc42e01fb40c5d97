"""What several tests share: small models of any family, and train.py in this process, alone or under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch._dynamo.testing import CompileCounterWithBackend

import bft
import hf
import model
import variants
from model import GPT
from runtime.process import run


ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "assets"
# Keys of a line of metrics.jsonl that differ between two equal runs.
TIMINGS = {"tokens_per_s", "mfu", "memory_gb"}
# A run that takes a second.
SMALL = ["--init", "scratch", "--tokenizer", str(ASSETS), "--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--dtype",
         "float32", "--lr", "1e-3", "--group-size", "16"]
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
         "rms_norm_eps": 1e-6, "rope_theta": 5000.0, "tie_word_embeddings": True, "eos_token_id": 3}


def tiny(seed=0, std=0.2, **change):
    """A model of LLAMA's config.json with these keys changed. Livelier than an initialisation: larger weights, norms
    that are not 1."""
    torch.manual_seed(seed)
    model = GPT(hf.config_from_dict({**LLAMA, **change}))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0, std)
    return model.eval()


def save_with_tokenizer(model, directory):
    """A directory that --init takes: the model, and the tokenizer of assets/. Returns the model."""
    hf.save_model(model, directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((ASSETS / name).read_bytes())
    return model


def torchrun(ranks, *command, **options):
    """A Python script on so many ranks (1: without torchrun), a thread each; returns the CompletedProcess."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **options.pop("env", {})}
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return subprocess.run([sys.executable, *launch, *map(str, command)], env=env, text=True, capture_output=True, timeout=300,
                          **options)


def count_compiled_rows(monkeypatch):
    """Has the head's row functions compiled on the CPU, as they are on a GPU, by a backend that only counts what it is
    given: `frame_count`."""
    counter = CompileCounterWithBackend("eager")
    for name in ("row_logsumexp", "row_softmax_"):
        monkeypatch.setattr(model, name, torch.compile(getattr(model, name), backend=counter))
    return counter


def call(monkeypatch, *argv):
    """train.py in this process; returns its exit code."""
    import train
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    try:
        run(train.main)
    except SystemExit as e:
        return e.code
    return 0


def forget_variants():
    """As in a command that begins: what --variant added to the table is gone."""
    for name in variants.FILES:
        bft.OBJECTIVES.pop(name, None)
    variants.FILES.clear()


def metrics(out, timings=False):
    """The lines of a run's metrics.jsonl; a line that a crash cut short is left out."""
    path = out / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return lines if timings else [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]
