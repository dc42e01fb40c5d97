"""How start, memory and steps grow with the number of samples, and a resume with the number of logged steps.

    python bench/growth.py                   # 1e3, 1e5 and 1e6 of each
    python bench/growth.py --sizes 10 100

Each size is measured in a process of its own. Samples are short questions and answers in a JSONL file, tokenised by
that of assets/. Memory is resident bytes: of what is held, and at the peak, on top of a process that has done the same
with ten. A step is a whole step of a tiny model on 32 samples; the first of an epoch orders all of them.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import SHAPES, end_of_peak, heading, start_of_peak


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hf  # noqa: E402
import train  # noqa: E402
from data import deal, global_batch, load_samples  # noqa: E402
from model import GPT  # noqa: E402
from runtime.log import append_metrics, cut_metrics  # noqa: E402
from runtime.ranks import Ranks  # noqa: E402
from runtime.run_directory import tokens_sha256  # noqa: E402


ASSETS = Path(__file__).resolve().parents[1] / "assets"
DEVICE = torch.device("cpu")
STEPS = 20


class Clock:
    """Seconds since it was last read."""

    def __init__(self):
        self.start = time.perf_counter()

    def read(self):
        now, start = time.perf_counter(), self.start
        self.start = now
        return now - start


def measure_samples(n):
    """{column: figure} of n samples."""
    with tempfile.TemporaryDirectory() as folder:
        # What the first samples of any number bring into a process is not theirs.
        go_through(Path(folder), 10)
        return go_through(Path(folder), n)


def go_through(folder, n):
    rng, file = random.Random(0), folder / f"{n}.jsonl"
    with open(file, "w") as f:
        for i in range(n):
            answer = " ".join(rng.choices(("heart", "liver", "kinase", "binds", "the", "cell"), k=rng.randint(5, 30)))
            f.write(json.dumps({"prompt": f"What is known of gene {i}?", "response": answer}) + "\n")
    tokenizer = hf.load_tokenizer(ASSETS)
    settings, ranks = train.Settings(compile=False), Ranks("cpu")
    model = GPT(hf.config_from_dict({**SHAPES["dry"], "vocab_size": tokenizer.n_vocab}))
    optimizer = train.make_optimizer(train.trained_parameters(model), settings)
    before, clock = start_of_peak(DEVICE), Clock()
    samples, _ = load_samples(file, tokenizer)
    read, peak = clock.read(), end_of_peak(DEVICE) - before
    tokens_sha256(samples)
    digest, held = clock.read(), start_of_peak(DEVICE) - before
    steps = []
    for step in range(STEPS):
        clock.read()
        _, numbers = global_batch(step, n, settings.batch_size, settings.seed)
        batch = [samples[i] for i in numbers]
        train.forward_backward(model, batch, "bft", settings, ranks, torch.float32)
        optimizer.step()
        steps.append(clock.read())
    clock.read()
    deal([len(sample.ids) for sample in samples], 8, settings.micro_tokens)
    return {"tokens": int(samples.offsets[-1]), "read s": read, "digest s": digest, "held MB": held / 1e6,
            "peak MB": peak / 1e6, "first step ms": steps[0] * 1e3, "step ms": statistics.median(steps[1:]) * 1e3,
            "dealt to 8 ranks s": clock.read()}


def measure_log(n):
    """{column: figure} of a log of n steps that a resume cuts back: in place, and where a line in it was lost."""
    line = {"step": 0, "epoch": 3, "loss": 1.2345678901234567, "nll": 2.3456789012345678, "grad_norm": 0.12345678901234,
            "clipped": False, "lr": 9.87654321e-06, "samples": 32, "tokens": 8192, "response_tokens": 4096,
            "confidence": 0.4321098765432109, "token_weight": 0.4321098765432109, "sample_weight": 0.8765432109876543,
            "sample_weight_sd": 0.0987654321098765, "min_group_confidence": 0.1234567890123456,
            "min_group_confidence_p05": 0.0234567890123456, "multi_window": 0.25, "tokens_per_s": 12345.678901234567,
            "mfu": 0.4123456789, "memory_gb": 71.5}
    row = {}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "metrics.jsonl"
        cut_metrics(log, 0)
        for damage in ("", '{"step": 1, "lo\n'):
            log.write_text(damage)
            append_metrics(log, ({**line, "step": step} for step in range(1, n + 11)))
            before, clock = start_of_peak(DEVICE), Clock()
            steps, _ = cut_metrics(log, n)
            assert steps == n
            name = "a line lost" if damage else "cut"
            row |= {"MB": log.stat().st_size / 1e6, f"{name} s": clock.read(),
                    f"{name}, peak MB": (end_of_peak(DEVICE) - before) / 1e6}
    return row


MEASURES = {"samples": measure_samples, "logged steps": measure_log}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--one", choices=MEASURES, help="this alone, of one size, as JSON")
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    if args.dry:
        args.sizes = [10, 40]
    if args.one:
        print(json.dumps(MEASURES[args.one](args.sizes[0])))
        return
    print(heading(DEVICE))
    for name in MEASURES:
        rows = {}
        for n in args.sizes:
            command = [sys.executable, __file__, "--one", name, "--sizes", str(n)]
            rows[n] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        print(f"\n{name:>12}  " + "  ".join(rows[args.sizes[0]]))
        for n, row in rows.items():
            print(f"{n:12,}  " + "  ".join(f"{value:{len(column)}.{0 if column == 'tokens' else 2}f}"
                                           for column, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
