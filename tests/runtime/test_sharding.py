"""A model cut into rows over ranks: the same numbers, less memory. That a step's gradient is that of one process is
tests/test_train.py's layout test."""

import os
import re
import socket
import subprocess
import sys

import pytest
import torch
from forked import forked
from support import LLAMA, ROOT, SMALL, metrics, save_with_tokenizer

import hf
import train
from runtime import sharding
from runtime.files import load_safetensors
from runtime.process import UserError
from runtime.ranks import Ranks


pytestmark = pytest.mark.slow
WORKER = ROOT / "tests" / "runtime" / "sharding_worker.py"


def on_two_nodes(script, *arguments):
    """A script on two nodes of two ranks each, both on this machine: the agents' CompletedProcesses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    agents = []
    for node in range(2):
        launch = ["-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=2", "--master_addr=localhost",
                  f"--master_port={port}"]
        agents.append(subprocess.Popen([sys.executable, *launch, str(script), *map(str, arguments)], env=environment, text=True,
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    done = []
    try:
        for agent in agents:
            output, errors = agent.communicate(timeout=300)
            done.append(subprocess.CompletedProcess(agent.args, agent.returncode, output, errors))
    finally:
        for agent in agents:
            agent.terminate()                                             # and with it its ranks
    return done


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = (ROOT / "assets" / "finetune.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[::16]))                                 # 42 samples
    return path


def test_each_rank_holds_its_rows():
    """Of 5 rows over 4 ranks the last one holds none."""
    done = forked(4, WORKER, "rows")
    assert done.returncode == 0, done.stderr
    assert "rows (0, 2) (2, 4) (4, 5) (5, 5)\n" in done.stdout


def test_bfloat16_on_the_wire_rounds_the_weights_of_norms_and_nothing_else():
    done = forked(2, WORKER, "rounding")
    assert done.returncode == 0, done.stderr
    errors = {(exact == "True", kind): float(error) for exact, kind, error in re.findall(r"(True|False) (\w+) (\S+)", done.stdout)}
    assert len(errors) == 6
    # Where bfloat16 has the weights of norms it is DDP's gradient, but for these weights' own.
    assert errors[True, "proj"] < 1e-6 and errors[True, "embed"] < 1e-6 and 1e-5 < errors[True, "norm"] < 1e-2
    assert all(1e-4 < errors[False, kind] < 0.1 for kind in ("norm", "proj", "embed"))


def test_copies_of_the_rows_on_two_nodes(tmp_path):
    """The layout test's gradient, with rows shared within each node."""
    one = forked(1, ROOT / "tests" / "split_worker.py", "no", tmp_path / "one.pt", "50")
    assert one.returncode == 0, one.stderr
    four = forked(4, ROOT / "tests" / "split_worker.py", "node", tmp_path / "four.pt", "50", "1r", nodes=2)
    assert four.returncode == 0, four.stderr
    expected, results = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "four.pt"))
    assert len(results) == 2 * len(expected)
    for key, (loss, gradient, statistics) in results.items():
        objective, _, adapters = key.split()
        expected_loss, expected_gradient, expected_statistics = expected[f"{objective} 50 {adapters}"]
        assert loss == pytest.approx(expected_loss, rel=1e-5), key
        assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm(), key
        torch.testing.assert_close(statistics, expected_statistics, rtol=1e-5, atol=1e-5)


def test_a_run_on_two_nodes_has_the_numbers_of_one_process(tmp_path, data_file):
    argv = [*SMALL, "--data", data_file, "--val-data", data_file, "--steps", 4, "--batch-size", 8, "--micro-tokens", 200]
    one = forked(1, ROOT / "train.py", *argv, "--out", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    done = on_two_nodes(ROOT / "train.py", *argv, "--shard", "node", "--out", tmp_path / "four")
    assert [agent.returncode for agent in done] == [0, 0], done[0].stderr + done[1].stderr
    assert_same_run(tmp_path / "four", tmp_path / "one")


MODELS = {
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "qwen3": {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": False}}


def test_the_norm_of_gradients_is_exact_for_large_ones():
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((100_000, 64), (300,), (), (5, 3, 2))]
    for number, p in enumerate(parameters):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
    parameters.append(torch.nn.Parameter(torch.zeros(2)))                 # without a gradient
    expected = sum(p.grad.double().square().sum() for p in parameters[:-1]).sqrt()
    norm = sharding.gradient_norm(parameters)
    assert norm.dtype == torch.float64 and norm.shape == ()
    torch.testing.assert_close(norm, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("flags", [[], ["--lora-rank", 2]], ids=["full", "lora"])
@pytest.mark.parametrize("family", MODELS)
def test_a_sharded_run_has_the_numbers_of_ddp(family, flags, tmp_path, data_file):
    """From a directory, in float32: the log, and the model that is saved."""
    tokenizer = hf.load_tokenizer(ROOT / "assets")
    torch.manual_seed(0)
    sizes = {"vocab_size": tokenizer.n_vocab, "eos_token_id": tokenizer.eos_id}
    model = train.GPT(hf.config_from_dict({**MODELS[family], **sizes}))
    save_with_tokenizer(model.bfloat16() if flags else model, tmp_path / "base")
    argv = ["--init", tmp_path / "base", "--data", data_file, "--val-data", data_file, "--dtype", "float32", "--steps", 3, "--batch-size", 7,
            "--micro-tokens", 200, "--lr", "1e-3", "--group-size", "16", "--grad-clip", "1e-6", *flags]
    for how in ("no", "all"):
        done = forked(2, ROOT / "train.py", *argv, "--shard", how, "--out", tmp_path / how)
        assert done.returncode == 0, done.stderr
    assert all(line["clipped"] for line in metrics(tmp_path / "all") if "loss" in line)
    assert_same_run(tmp_path / "all", tmp_path / "no")


def assert_same_run(out, expected):
    lines, expected_lines = metrics(out), metrics(expected)
    assert [line["step"] for line in lines] == [line["step"] for line in expected_lines]
    for line, expected_line in zip(lines, expected_lines):
        assert line == pytest.approx(expected_line, rel=1e-5)
    tensors, expected_tensors = (load_safetensors(folder / "model" / "model.safetensors") for folder in (out, expected))
    assert tensors.keys() == expected_tensors.keys()
    for name, t in tensors.items():
        assert t.dtype == expected_tensors[name].dtype
        rounding = 1e-2 if t.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(t, expected_tensors[name], rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_holds_its_share_and_little_more(ranks):
    """While it loads its rows; after a step its rows of the whole state."""
    done = forked(ranks, ROOT / "bench" / "memory.py", "--shape", "small", "--shard", "all", path=())
    assert done.returncode == 0, done.stderr
    lines = [[float(cell) for cell in line.split()] for line in done.stdout.splitlines()[-ranks:]]
    for _, weights, loading, computed, held, gathered, in_a_step in lines:
        assert weights == pytest.approx(109.1 / ranks, rel=0.01)
        assert loading < weights + 15
        assert computed == pytest.approx(436.3 / ranks, rel=0.01)
        assert 0.95 * computed < held < 1.15 * computed
        # One process has 95 to 120 MB of activations and the like above its state.
        assert in_a_step < computed + gathered + 120


def test_ranks_that_round_differently_end_after_the_same_token():
    """A sharded model hangs where one of them asks for another token."""
    done = forked(2, WORKER, "ends")
    assert done.returncode == 0 and "ended" in done.stdout, done.stderr


def test_ranks_of_a_node_must_be_as_many_on_each(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    ranks = Ranks("cpu")
    assert [sharding.ranks_per_copy(how, ranks) for how in ("no", "all")] == [1, 6]
    with pytest.raises(UserError, match="--shard node: 6 ranks, 4 of them on this node; expected as many on each"):
        sharding.ranks_per_copy("node", ranks)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert sharding.ranks_per_copy("node", ranks) == 3
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")                           # of nodes: 3, 2 and 1 ranks
    with pytest.raises(UserError, match="3 of them on this node"):
        sharding.ranks_per_copy("node", ranks)
