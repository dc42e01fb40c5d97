"""What the benchmarks share: medians of interleaved runs, peak memory, samples as long as real ones, where it ran."""

import ctypes
import gc
import math
import platform
import re
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import Sample  # noqa: E402


# Every twentieth of the lengths of MedQuAD's 14,677 training samples in tokens (chatml), and of their prompts.
LENGTHS = (21, 58, 75, 88, 103, 117, 133, 149, 164, 181, 201, 221, 246, 278, 314, 349, 390, 446, 543, 740, 5387)
PROMPTS = (14, 17, 18, 18, 19, 19, 20, 20, 20, 21, 21, 22, 22, 23, 23, 24, 25, 26, 27, 29, 51)

# Published sizes (and small ones), as in their config.json.
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
         "tie_word_embeddings": True, "max_position_embeddings": 8192, "rope_theta": 100000.0}
GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SHAPES = {
    "smollm2": {**LLAMA, "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                "num_attention_heads": 9, "num_key_value_heads": 3},
    "gpt2": {**GPT2, "n_embd": 768, "n_layer": 12, "n_head": 12},                               # 124M
    "gpt2-xl": {**GPT2, "n_embd": 1600, "n_layer": 48, "n_head": 25},                           # 1.5B
    "small": {**LLAMA, "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
              "num_attention_heads": 8, "num_key_value_heads": 4},                              # 27M
    "dry": {**LLAMA, "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2}}


def interleave(alternatives, repeats, device):
    """Runs each of {name: function} in turn, after once to warm up: `repeats` rounds, up to five times as many if they
    take less than 20 s; each round begins with another of them. Returns {name: (time ratio, memory ratio, seconds,
    bytes)}: medians over the rounds, ratios to the first; bytes in use at the peak above those before, nan where they
    cannot be measured."""
    seconds, peaks = ({name: [] for name in alternatives} for _ in range(2))
    order, began = list(alternatives), math.inf
    while (rounds := len(seconds[order[0]]) - 1) < repeats or rounds < 5 * repeats and time.perf_counter() < began + 20:
        for name in order[rounds % len(order):] + order[:rounds % len(order)]:
            before = start_of_peak(device)
            tick = time.perf_counter()
            alternatives[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - tick)
            peaks[name].append(math.nan if before is None else end_of_peak(device) - before)
        began = min(began, time.perf_counter())
    median = lambda of: statistics.median(of[1:])                         # noqa: E731   the first round warmed up
    ratio = lambda of, name: median([a / b if b else math.nan for a, b in zip(of[name], of[order[0]])])   # noqa: E731
    return {name: (ratio(seconds, name), ratio(peaks, name), median(seconds[name]), median(peaks[name]))
            for name in order}


def start_of_peak(device):
    """Forgets the peak so far; returns the bytes in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)                                  # what was freed goes back to the system
        with open("/proc/self/clear_refs", "w") as f:                     # Linux: the peak is now what is in use
            f.write("5")
        return resident("VmRSS")
    except (OSError, AttributeError):                                     # another system
        return None


def end_of_peak(device):
    """The most bytes in use since then."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")


def resident(key):
    with open("/proc/self/status") as f:
        return int(re.search(rf"{key}:\s+(\d+)", f.read())[1]) * 1024


def heading(device, *packages):
    """Where, with what and by which command: the lines that a table begins with."""
    threads = f"{cpu_name()}, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{p.__name__} {p.__version__}" for p in (torch, *packages))
    return f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else threads}; {versions}; " \
        f"Python {platform.python_version()}; {time.strftime('%Y-%m-%d')}\n$ python {' '.join(sys.argv)}"


def cpu_name():
    try:
        with open("/proc/cpuinfo") as f:
            return re.search(r"model name\s*:\s*(.+)", f.read())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def gigabytes(peak):
    return "not measured" if math.isnan(peak) else f"{peak / 1e9:.2f} GB"


def print_rows(title, result):
    """The table of what `interleave` returned."""
    print(f"\n{title:26}  time ratio  memory ratio       time   peak memory")
    for name, (time_ratio, memory_ratio, seconds, peak) in result.items():
        print(f"{name:26}  {time_ratio:10.2f}  {memory_ratio:12.2f}  {seconds * 1e3:6.0f} ms  {gigabytes(peak):>12}",
              flush=True)


def medquad_batch(vocab, batch_size, max_length):
    """Samples of random tokens whose lengths are spread as MedQuAD's, in random order (those of prompts and samples are
    not correlated there: 0.02)."""
    rng, at = np.random.RandomState(0), (np.arange(batch_size) + 0.5) / batch_size
    lengths, prompts = (rng.permutation(np.interp(at, np.linspace(0, 1, 21), of).astype(int))
                        for of in (LENGTHS, PROMPTS))
    return [Sample(rng.randint(vocab, size=n), np.arange(n) >= min(prompt, n - 1), None, 0)
            for n, prompt in zip(lengths.clip(2, max_length), prompts)]
