"""What a GPU would run, on a device that is not there: `fake_cuda` counts, `cuda_worker` trains and evaluates, here is
what is expected. One process does it all; each test looks at one thing."""

import itertools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from support import ROOT, TIMINGS


pytestmark = pytest.mark.slow

FAMILIES = ("gpt2", "llama", "qwen3")                                     # of two layers; the last two with grouped heads
CASES = [" ".join(words) for words in itertools.product(FAMILIES, ("all", "lora"), ("keep", "recompute"), ("bfloat16", "float32"))]
# What a planted fault turns red.
FAULTS = {"tensor_left_on_the_cpu": "runs", "item_in_the_step": "waits", "int64_offsets": "runs", "unpinned_copy": "copies"}

# Of the worker: two steps, each of two micro-batches with at most four samples.
STEPS = 2
MICRO_BATCHES = 2
STEP = ("loop", "forward_backward", "weigh", "weighted_loss", "sample_statistics", "clip_gradient")

# What follows is what there is. Whoever makes it less writes the new number here.
# (One for each matrix is the norm of its gradient's rows.)
KERNELS_OF_A_STEP = {"gpt2 all keep": 740, "gpt2 all recompute": 920, "gpt2 lora keep": 870, "gpt2 lora recompute": 1140,
                     "llama all keep": 1050, "llama all recompute": 1340, "llama lora keep": 1280, "llama lora recompute": 1640,
                     "qwen3 all keep": 1220, "qwen3 all recompute": 1550, "qwen3 lora keep": 1460, "qwen3 lora recompute": 1870}
KERNELS_OF_A_MICRO_BATCH = {"weigh": 25, "weighted_loss": 11, "sample_statistics": 26}
# Two of score's are a micro-batch's, and one of generate's is a token's.
WAITS_OF_EVALUATION = {"score": 6, "loglikelihood": 6, "generate": 21}


@pytest.fixture(scope="module")
def seen():
    """{case or fault: what the worker saw}."""
    worker = [sys.executable, ROOT / "tests" / "cuda_worker.py", *CASES, "needs", *FAULTS]
    # No GPU that is there may answer in its place.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(worker, env=environment, text=True, capture_output=True, timeout=600)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(params=CASES)
def run(seen, request):
    return {"name": request.param, **seen[request.param]}


def in_the_step(run, kind):
    """[what, times] that were counted while a step ran: not where it is logged, saved or validated."""
    return [[what, times] for phase, what, times in run[kind] if phase in STEP]


def check_runs(run):
    assert run["error"] is None, run["error"]


def check_waits(run):
    assert in_the_step(run, "wait") == []


def check_copies(run):
    """Copies that do not block are from pinned memory, but for one of the offsets of a micro-batch's samples."""
    not_offsets = [what for what, _ in in_the_step(run, "unpinned") if int(re.search("of ([0-9]+) numbers", what)[1]) > 5]
    assert not_offsets == []


CHECKS = {"runs": check_runs, "waits": check_waits, "copies": check_copies}


def test_it_trains_validates_saves_resumes_and_evaluates(run):
    check_runs(run)


def test_no_step_waits_for_the_device(run):
    check_waits(run)


def test_copies_to_the_device_are_from_pinned_memory(run):
    check_copies(run)
    unpinned = sum(times for _, times in in_the_step(run, "unpinned"))
    steps = STEPS + 1                                                     # one of them after the resume
    assert unpinned <= MICRO_BATCHES * steps


def test_a_step_has_no_more_kernels_than_it_had(run):
    family, adapters, recompute, _ = run["name"].split()
    step = sum(run["kernels"][phase] for phase in STEP)
    assert step <= KERNELS_OF_A_STEP[f"{family} {adapters} {recompute}"]
    for phase, kernels in KERNELS_OF_A_MICRO_BATCH.items():
        assert run["kernels"][phase] <= kernels * MICRO_BATCHES


def test_gradients_are_those_of_the_cpu(run):
    assert run["gradient_difference"] < (1e-5 if "float32" in run["name"] else 3e-2)


def test_the_log_is_that_of_the_cpu(run):
    lines, expected = run["lines"], run["expected_lines"]
    assert [(line["step"], "val_nll" in line) for line in lines] == [(0, True), (1, False), (2, False), (2, True)]
    tolerance = 1e-5 if "float32" in run["name"] else 1e-2
    assert lines[0]["val_nll"] == pytest.approx(expected[0]["val_nll"], rel=tolerance)
    for key in ("loss", "nll", "grad_norm", "token_weight", "sample_weight"):
        assert lines[1][key] == pytest.approx(expected[1][key], rel=tolerance)


def test_a_resumed_run_ends_where_it_would_have(run):
    assert run["resumed_is_equal"]


def test_evaluation_is_that_of_the_cpu(run):
    answers, expected = run["answers"], run["expected_answers"]
    is_exact = "float32" in run["name"]
    for what in ("scores", "loglikelihoods"):
        np.testing.assert_allclose(answers[what], expected[what], rtol=1e-4 if is_exact else 3e-2)
    if is_exact:
        assert answers["answers"] == expected["answers"]


def test_what_else_an_objective_needs_is_there_without_waiting(seen):
    run = seen["needs"]
    check_runs(run)
    check_waits(run)
    check_copies(run)
    assert run["gradient_difference"] < 1e-5 and run["reference_difference"] < 1e-5
    for line, expected in zip(run["lines"], run["expected_lines"], strict=True):
        assert line.keys() == expected.keys()
        for key in line.keys() - TIMINGS:
            assert line[key] == pytest.approx(expected[key], rel=1e-4), key


@pytest.mark.parametrize("phase", WAITS_OF_EVALUATION)
def test_evaluation_waits_no_more_than_it_did(run, phase):
    waits = sum(times for where, _, times in run["wait"] if where == phase)
    assert 0 < waits <= WAITS_OF_EVALUATION[phase]


@pytest.mark.parametrize("fault, check", FAULTS.items())
def test_a_planted_fault_is_found(seen, fault, check):
    run = seen[fault]
    with pytest.raises(AssertionError):
        CHECKS[check](run)
    # Where the program ends in an error, that is the one which was planted, and in the step.
    expected = {"tensor_left_on_the_cpu": "found cuda:0 and a tensor on the CPU", "int64_offsets": "offsets of dtype torch.int64"}
    if check == "runs":
        assert expected[fault] in run["error"] and "in forward_backward" in run["error"]
    else:
        assert run["error"] is None
