"""The loop: the same step in every layout, the same run every time, checkpoints, logs, and users' mistakes."""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import split_worker
import torch
from forked import forked
from support import ASSETS, ROOT, SMALL, call, count_compiled_rows, metrics, save_with_tokenizer, tiny, torchrun
from test_bft import reference
from test_data import BAD_LINES
from test_model import by_definition
from tokenizer_files import CHATML, assets_with, build
from torch.utils._python_dispatch import TorchDispatchMode

import bft
import hf
import train
from data import deal, load_samples
from hf.start import scratch_config
from model import GPT
from runtime.checkpoint import checkpoints
from runtime.files import load_safetensors, save_safetensors
from runtime.process import UserError
from runtime.ranks import Ranks
from runtime.rows import read_jsonl
from variants import load_variants


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join((ASSETS / "finetune.jsonl").read_text().splitlines(keepends=True)[::16]))   # 42 samples
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Invariant 1

@functools.cache
def one_sample_at_a_time(objective, adapters):
    """Loss, gradient and each sample's NLL of the worker's batch, from plain logits of one sample at a time."""
    model, batch = split_worker.setup(adapters)
    logps, extras = [], []
    for s in batch:
        ids = torch.from_numpy(s.ids)
        at = torch.from_numpy(s.response).nonzero()[:, 0] - 1
        logits = model(ids[None])[0, at]
        logps.append(logits.log_softmax(-1)[torch.arange(len(at)), ids[at + 1]])
        needs = bft.OBJECTIVES[objective].needs
        extras.append({**(by_definition(logits) if needs else {}), "ref_logp": torch.from_numpy(s.ref_logp)})
    offsets = torch.tensor([0, *map(len, logps)]).cumsum(0)
    extra = {name: torch.cat([extra[name] for extra in extras]) for name in extras[0]}
    loss = bft.objective_loss(torch.cat(logps), offsets, objective, split_worker.GROUP_SIZE, extra=extra)
    loss.backward()
    nll = torch.stack([-x.detach().double().sum() for x in logps])
    return loss.item(), split_worker.gradient(model), nll


@pytest.mark.parametrize("objective", ["sft", "bft", "everything"])       # averages over tokens, over samples; all needs
@pytest.mark.parametrize("world, micro_tokens", [(2, 10000), (2, 60), (3, 1)])
def test_the_mean_over_ranks_is_the_gradient_of_one(world, micro_tokens, objective, monkeypatch):
    """The ranks one after the other, without DDP, whose mean of their gradients is taken here."""
    split_worker.add_rows()
    exchanges = []
    monkeypatch.setattr(train, "gradient_exchange", lambda net, is_last: exchanges.append(is_last) or contextlib.nullcontext())
    loss, gradient, _ = one_sample_at_a_time(objective, False)
    gradients, losses = [], []
    for rank in range(world):
        model, batch = split_worker.setup(False)
        ranks = Ranks("cpu")
        ranks.rank, ranks.world = rank, world
        settings = train.Settings(micro_tokens=micro_tokens, compile=False, group_size=split_worker.GROUP_SIZE)
        exchanges.clear()
        outcome = train.forward_backward(model, batch, objective, settings, ranks, torch.float32)
        micro_batches = len(deal([len(sample.ids) for sample in batch], world, micro_tokens)[rank])
        assert exchanges == [False] * (micro_batches - 1) + [True]        # the last pass exchanges what all have added up
        gradients.append(split_worker.gradient(model))
        losses.append(outcome.loss.item())
    mean = torch.stack(gradients).mean(0)
    assert (mean - gradient).norm() <= 1e-5 * gradient.norm()
    assert math.isclose(sum(losses), loss, rel_tol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("how, ranks, layouts", [
    ("no", 1, ("10000", "90", "50", "1", "90+")), ("no", 2, ("10000", "60", "1", "60+")), ("no", 3, ("10000", "50", "1", "1+")),
    ("all", 1, ("50",)), ("all", 2, ("10000", "1", "60r", "60+c")), ("all", 3, ("10000", "50", "50r")), ("all", 4, ("10000", "1"))])
def test_a_step_is_the_same_in_every_layout(how, ranks, layouts, tmp_path):
    """micro_tokens 10000: all packed into one micro-batch a rank; 1: one sample a micro-batch; see the worker. On all ranks or
    sharded over them."""
    result = forked(ranks, ROOT / "tests" / "split_worker.py", how, tmp_path / "out.pt", *layouts)
    assert result.returncode == 0, result.stderr
    results = torch.load(tmp_path / "out.pt", weights_only=True)
    split_worker.add_rows()
    cases = [(objective, adapters) for adapters in (False, True) for objective in split_worker.objectives(adapters)]
    assert len(results) == len(layouts) * len(cases)
    for objective, adapters in cases:
        loss, gradient, nll = one_sample_at_a_time(objective, adapters)
        for layout in layouts:
            other_loss, other, statistics = results[f"{objective} {layout} {adapters}"]
            assert math.isclose(other_loss, loss, rel_tol=1e-5), (objective, layout)
            assert (other - gradient).norm() <= 1e-5 * gradient.norm(), (objective, layout)
            torch.testing.assert_close(statistics[:, 0], nll, rtol=1e-5, atol=1e-5)   # in the batch's order


@pytest.mark.slow
def test_two_ranks_train_like_one(tmp_path, data_file):
    for ranks, start in ((1, forked), (2, torchrun)):
        result = start(ranks, ROOT / "train.py", *SMALL, "--data", data_file, "--val-data", data_file, "--steps", 20,
                       "--batch-size", 7, "--micro-tokens", 200, "--objective", "bft", "--out", tmp_path / str(ranks))
        assert result.returncode == 0, result.stderr
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    assert len(one) == len(two) == 22                                     # 20 steps, validation before and after
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert math.isclose(value, b[key], rel_tol=1e-4, abs_tol=1e-9), (key, value, b[key])


@pytest.mark.slow
@pytest.mark.parametrize("lora", [(), ("--lora-rank", 2)], ids=["full", "lora"])
def test_gradients_stay_in_the_buckets_of_ddp(tmp_path, data_file, lora):
    """In a pass without exchange, too: or there is a second gradient beside each bucket."""
    argv = [*SMALL, "--data", data_file, "--steps", 3, "--batch-size", 12, "--micro-tokens", 100]
    if lora:
        assert forked(1, ROOT / "train.py", *argv, "--out", tmp_path / "base").returncode == 0
        argv[argv.index("scratch")] = tmp_path / "base"
    result = forked(2, ROOT / "tests" / "bucket_worker.py", *argv, *lora, "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    looks = int(re.search(r"looked (\d+) times", result.stdout)[1])
    assert looks > 1 + 3 + 2 * 3                                          # once, before each step, after several micro-batches


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Somebody else's model: Qwen2 in bfloat16 with ChatML, as transformers saves it."""
    import transformers
    directory = build("qwen", tmp_path_factory.mktemp("checkpoint"), special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = hf.load_tokenizer(directory)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(vocab_size=tokenizer.n_vocab + 7, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
                                      eos_token_id=tokenizer.eos_id)      # (embeddings padded, as Qwen's are)
    model = transformers.Qwen2ForCausalLM(config).bfloat16()
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
    model.generation_config.eos_token_id = [77, tokenizer.eos_id]         # more than config.json says, as Qwen's
    model.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text("{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}" + CHATML)
    return directory


REAL = ["--lr", "1e-2", "--dtype", "float32", "--batch-size", "8", "--group-size", "16"]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [(), ("--lora-rank", 2)], ids=["full", "lora"])
def test_a_real_checkpoint_goes_in_and_comes_out(tmp_path, monkeypatch, data_file, checkpoint, capsys, lora):
    import transformers
    assert call(monkeypatch, "--init", checkpoint, "--data", data_file, "--steps", 3, *REAL, *lora, "--out", tmp_path) == 0
    out, model, tokenizer = capsys.readouterr().out, tmp_path / "model", hf.load_tokenizer(checkpoint)
    assert "chat format own" in out
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert (model / file).read_bytes() == (checkpoint / file).read_bytes()
    config = json.loads((model / "tokenizer_config.json").read_text())
    template = config.pop("chat_template")
    assert template == (checkpoint / "chat_template.jinja").read_text() and config == json.loads((checkpoint / "tokenizer_config.json").read_text())
    generation = json.loads((model / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.eos_id, 77, tokenizer.special["<|im_end|>"]] and generation["temperature"] == 0.5
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model)
    before, after = (load_safetensors(x / "model.safetensors") for x in (checkpoint, model))
    assert theirs.dtype == torch.bfloat16 and {t.dtype for t in after.values()} == {torch.bfloat16} and before.keys() == after.keys()
    ids = torch.randint(tokenizer.n_vocab, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(theirs.float()(ids).logits, hf.load_model(model).float()(ids), rtol=1e-4, atol=1e-4)
    saved = load_safetensors(checkpoints(tmp_path)[-1][1] / "shard-00001-of-00001.safetensors")
    assert all((".lora_" in name) == bool(lora) for name in saved)
    for name, t in after.items():
        change = (t.float() - before[name].float())
        if lora and "_proj.weight" not in name:
            assert change.abs().max() == 0                                # frozen
        else:
            assert change.abs().max() > 0 or "bias" in name or "norm" in name
        if lora and t.dim() == 2:
            singular = torch.linalg.svdvals(change)
            assert singular[2:].max() < 0.05 * singular[0].clamp(min=1e-9)   # of rank 2, but for rounding to bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("lora", [(), ("--lora-rank", 4)], ids=["full", "lora"])
def test_the_loop_trains_on_the_chat_format_from_the_weights_given(tmp_path, monkeypatch, data_file, checkpoint, lora):
    """float32 weights under bfloat16 autocast: the first step sees what it should, and at no learning rate nothing changes."""
    import transformers
    base = tmp_path / "base"
    transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).save_pretrained(base)
    noise = {name: t + 1e-4 * torch.randn_like(t) for name, t in load_safetensors(base / "model.safetensors").items()}   # not a bfloat16
    save_safetensors(noise, base / "model.safetensors")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (base / file).write_bytes((checkpoint / file).read_bytes())
    loaded, prepare_model = [], train.prepare_model
    monkeypatch.setattr(train, "prepare_model", lambda *given: loaded.append(prepare_model(*given)) or loaded[-1])
    assert call(monkeypatch, "--init", base, "--data", data_file, "--steps", 1, "--batch-size", 100, "--lr", 1e-12, "--dtype", "bfloat16",
                *lora, "--out", tmp_path / "run") == 0
    assert loaded[0].layers[0].mlp.up_proj.weight.dtype == (torch.bfloat16 if lora else torch.float32)   # frozen in it, or trained
    chat_format, model, nll = hf.load_chat_format(base, hf.load_tokenizer(base)), hf.load_model(base), []
    for _, row in read_jsonl(data_file):
        ids, response = chat_format.encode([hf.Turn("user", row["prompt"]), hf.Turn("assistant", row["response"])])
        with torch.no_grad():
            logp = model(torch.tensor([ids]))[0].log_softmax(-1)
        nll += [-logp[t - 1, ids[t]].item() for t in range(len(ids)) if response[t]]
    line, = metrics(tmp_path / "run")
    assert line["response_tokens"] == len(nll) and line["nll"] == pytest.approx(sum(nll) / len(nll), rel=0.005)
    after = load_safetensors(tmp_path / "run" / "model" / "model.safetensors")
    assert all(after[name].dtype == torch.float32 and torch.allclose(after[name], t, rtol=0, atol=1e-9) for name, t in noise.items())


def test_adapters_on_a_format_whose_tokens_were_never_trained(tmp_path, monkeypatch, data_file, capsys):
    tokenizer = hf.load_tokenizer(assets_with(tmp_path))
    model = tiny(vocab_size=tokenizer.n_vocab, eos_token_id=tokenizer.eos_id)
    model.embed_tokens.weight.data[tokenizer.special["<|eot_id|>"]] = 0
    hf.save_model(model, tmp_path)
    argv = ["--init", tmp_path, "--data", data_file, "--steps", 1, "--dtype", "float32", "--out", tmp_path / "run", "--no-resume", "--lora-rank", 2]
    for name, expected in (("llama3", 1), ("chatml", 0)):
        assert call(monkeypatch, *argv, "--chat-format", name) == 0
        out = capsys.readouterr().out
        assert out.count("the rows of <|eot_id|> are near zero, as if never trained, and stay frozen under --lora-rank") == expected


@pytest.mark.slow
def test_adapters_resume_and_other_adapters_are_another_run(tmp_path, monkeypatch, data_file, checkpoint, capsys):
    argv = ["--init", checkpoint, "--data", data_file, "--steps", 4, *REAL, "--lora-rank", 2, "--save-every", 2, "--keep", 9]
    for name, alpha in (("whole", ()), ("cut", ()), ("twice the rank", ("--lora-alpha", 4)), ("more", ("--lora-alpha", 5))):
        assert call(monkeypatch, *argv, *alpha, "--out", tmp_path / name) == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "twice the rank") != metrics(tmp_path / "more")
    shutil.rmtree(tmp_path / "cut" / "checkpoint" / "step-4")
    assert call(monkeypatch, *argv, "--out", tmp_path / "cut") == 0
    assert "from step 2 to 4" in capsys.readouterr().out and metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    a, b = (load_safetensors(tmp_path / x / "model" / "model.safetensors") for x in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert call(monkeypatch, *argv, "--lora-alpha", 8, "--out", tmp_path / "cut") == 2
    assert "lora_alpha 0.0, now 8.0" in capsys.readouterr().err


@pytest.mark.slow
def test_adapters_are_the_same_on_every_rank_and_train_like_one(tmp_path, data_file, checkpoint):
    for ranks in (1, 2):
        script = ROOT / "train.py" if ranks == 1 else ROOT / "tests" / "lora_worker.py"
        result = forked(ranks, script, "--init", checkpoint, "--data", data_file, "--val-data", data_file, "--steps", 10, *REAL,
                          "--objective", "bft", "--lora-rank", 4, "--lora-alpha", 4, "--out", tmp_path / str(ranks))
        assert result.returncode == 0, result.stderr
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    assert len(one) == len(two) == 12
    for a, b in zip(one, two):
        for key, value in a.items():
            assert math.isclose(value, b[key], rel_tol=1e-4, abs_tol=1e-9), (key, value, b[key])
    first, second = (torch.load(tmp_path / "2" / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys() and all(".lora_" in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(t.abs().max() > 0 for name, t in first.items() if name.endswith("lora_b"))


@pytest.mark.slow
def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(tmp_path, monkeypatch, data_file, checkpoint, capsys):
    big = {**json.loads((checkpoint / "config.json").read_text()), "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 150000}
    for file in checkpoint.iterdir():
        # Without a tensor in it.
        (tmp_path / file.name).write_bytes(file.read_bytes() if file.suffix != ".safetensors" else b"\x02" + b"\0" * 7 + b"{}")
    (tmp_path / "config.json").write_text(json.dumps(big))
    weights = 150000 * 4096 + 36 * (4096 * 12288 * 3 + 4096 * 4096 * 2 + 4096 * 1024 * 2)   # but for norms and biases
    adapters = 36 * 16 * (3 * (4096 + 12288) + 2 * (4096 + 4096) + 2 * (4096 + 1024))
    argv = ["--init", tmp_path, "--data", data_file, "--dtype", "bfloat16", "--device", "cpu", "--out", tmp_path / "out"]
    full, lora = 16 * weights / 1e9, (2 * weights + 16 * adapters) / 1e9
    assert 110 < full < 130 and 14 < lora < 17
    for room, expected in ((100e9, f"need {full:.0f} GB, cpu has 100 GB; this needs {lora:.0f} GB: "), (10e9, "has 10 GB; expected a smaller model")):
        monkeypatch.setattr(os, "sysconf", lambda name, room=room: 1 if name == "SC_PAGE_SIZE" else int(room))
        assert call(monkeypatch, *argv) == 2
        assert expected in capsys.readouterr().err
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else int(100e9))
    assert call(monkeypatch, *argv) == 2
    assert capsys.readouterr().err.endswith(" --lora-rank 16\n")          # the same command, as it would work
    assert call(monkeypatch, *argv, "--lora-rank", 16) == 2 and "does not fit its config.json" in capsys.readouterr().err   # now it is read
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gigabytes, expected", [
    (300, None), (100, "--shard all"), (20, "--lora-rank 16"), (10, "--shard all --lora-rank 16"), (3, "or more GPUs and --shard all")])
def test_what_would_fit_is_proposed(gigabytes, expected, monkeypatch):
    """Four GPUs' ranks and Qwen2.5-7B."""
    ranks = Ranks("cpu")
    ranks.world, ranks.device = 4, torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(train, "memory_bytes", lambda device: int(gigabytes * 1e9))
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", "here"])
    settings = train.Settings(dtype="bfloat16", init="a model")
    if expected is None:
        train.check_memory(published_config("Qwen2.5-7B"), settings, ranks)
        return
    with pytest.raises(UserError) as error:
        train.check_memory(published_config("Qwen2.5-7B"), settings, ranks)
    assert str(error.value).endswith(expected)
    if "GPUs" not in expected:
        assert f": torchrun --nproc_per_node=4 train.py --out here {expected}" in str(error.value)
        # The command that is proposed is one that fits.
        proposed = iter(expected.split())
        change = {flag[2:].replace("-", "_"): value for flag, value in zip(proposed, proposed)}
        settings.shard, settings.lora_rank = change.get("shard", "no"), int(change.get("lora_rank", 0))
        train.check_memory(published_config("Qwen2.5-7B"), settings, ranks)


def test_the_tokenizer_that_was_used_is_saved(tmp_path, monkeypatch, data_file):
    spec = json.loads((ASSETS / "tokenizer.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer.json").write_text("another's")
    (tmp_path / "tokenizer_config.json").write_bytes((ASSETS / "tokenizer_config.json").read_bytes())
    assert call(monkeypatch, *SMALL, "--tokenizer", tmp_path / "mine.json", "--data", data_file, "--steps", 1, "--out", tmp_path / "run") == 0
    assert (tmp_path / "run" / "model" / "tokenizer.json").read_bytes() == (tmp_path / "mine.json").read_bytes()


# Published sizes: architecture, width, layers, heads, key/value heads, MLP, vocabulary, tied.
PUBLISHED = {"SmolLM2-135M": ("Llama", 576, 30, 9, 3, 1536, 49152, True), "Qwen2.5-0.5B": ("Qwen2", 896, 24, 14, 2, 4864, 151936, True),
             "Qwen3-0.6B": ("Qwen3", 1024, 28, 16, 8, 3072, 151936, True), "Llama-3.2-1B": ("Llama", 2048, 16, 32, 8, 8192, 128256, True),
             "Qwen2.5-1.5B": ("Qwen2", 1536, 28, 12, 2, 8960, 151936, True), "Llama-3.2-3B": ("Llama", 3072, 28, 24, 8, 8192, 128256, True),
             "Qwen3-4B": ("Qwen3", 2560, 36, 32, 8, 9728, 151936, True), "Qwen2.5-7B": ("Qwen2", 3584, 28, 28, 4, 18944, 152064, False),
             "Llama-3.1-8B": ("Llama", 4096, 32, 32, 8, 14336, 128256, False), "Qwen2.5-14B": ("Qwen2", 5120, 48, 40, 8, 13824, 152064, False),
             "Qwen2.5-32B": ("Qwen2", 5120, 64, 40, 8, 27648, 152064, False),
             "Llama-3.1-70B": ("Llama", 8192, 80, 64, 8, 28672, 128256, False)}
SMALL_ENOUGH = list(PUBLISHED)[:-2]                                       # to be in the table of unsharded ones


def published_config(name):
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
            "tie_word_embeddings")
    family, *sizes = PUBLISHED[name]
    return hf.config_from_dict({"architectures": [family + "ForCausalLM"], "max_position_embeddings": 32768, **dict(zip(keys, sizes))})


def table_of(page, section):
    """The first table of a section of a page of docs/: {first cell of a row: the others}."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").split(f"\n## {section}\n")[1]
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), text.splitlines())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]
    return {cells[0]: cells[1:] for cells in rows}


@pytest.mark.slow
def test_the_memory_table_of_the_docs_is_what_the_program_computes():
    rows = table_of("performance.md", "Memory")
    gpus = [int(cell.split()[0]) for cell in rows.pop("model")[3:]]
    assert rows.keys() - {"---"} == set(SMALL_ENOUGH)
    for name in SMALL_ENOUGH:
        c = published_config(name)
        full, lora = (sum(train.training_bytes(c, train.Settings(lora_rank=rank), torch.bfloat16)) / 1e9 for rank in (0, 16))
        fits = ["F L" if full < 0.75 * gpu else "L" if lora < 0.75 * gpu else "" for gpu in gpus]
        assert rows[name] == [f"{full / 16:.3f} B", f"{full:.1f}", f"{lora:.1f}", *fits]


@pytest.mark.slow
def test_the_table_of_shards_is_what_the_program_computes():
    rows = table_of("performance.md", "A model over many GPUs")
    assert rows.pop("model")[1:] == [f"{what}, {ranks}" for what in ("full", "LoRA") for ranks in (8, 16, 64)]
    assert rows.keys() - {"---"} == {"Qwen2.5-7B", "Qwen2.5-14B", "Qwen2.5-32B", "Llama-3.1-70B"}
    for name in rows.keys() - {"---"}:
        expected = []
        for rank, ranks in itertools.product((0, 16), (8, 16, 64)):
            settings = train.Settings(lora_rank=rank, shard="all")
            held, gathered = (n / 1e9 for n in train.training_bytes(published_config(name), settings, torch.bfloat16, ranks))
            bold = "**" if held + gathered < 0.75 * 80 else ""
            expected.append(f"{bold}{held:.1f} + {gathered:.1f}{bold}")
        assert rows[name][1:] == expected


@pytest.mark.slow
def test_the_table_of_the_recipe_is_what_the_program_computes():
    rows = table_of("recipe.md", "Train")
    for base, name in (("14B", "Qwen2.5-14B"), ("32B", "Qwen2.5-32B"), ("70B", "Llama-3.1-70B")):
        c = published_config(name)
        held, gathered = (n / 1e9 for n in train.training_bytes(c, train.Settings(lora_rank=16, shard="all"), torch.bfloat16, 8))
        inputs = 4 * c.n_layer * 8192 * c.n_embd / 1e9
        assert rows[base] == [f"{held:.1f} + {gathered:.1f}", f"{inputs:.1f}", f"{held + gathered + inputs:.0f}"]


# ---------------------------------------------------------------------------------------------------------------------
# Runs

def test_a_run_is_reproducible_and_describes_itself(tmp_path, monkeypatch, data_file, capsys):
    argv = [*SMALL, "--data", data_file, "--val-data", data_file, "--epochs", 1, "--batch-size", 16, "--eval-every", 2,
            "--objective", "sft", "bft"]
    for name in ("a", "b"):
        assert call(monkeypatch, *argv, "--out", tmp_path / name) == 0
    for objective in ("sft", "bft"):
        a, b = tmp_path / "a" / objective, tmp_path / "b" / objective
        assert metrics(a) == metrics(b)
        assert (a / "model" / "model.safetensors").read_bytes() == (b / "model" / "model.safetensors").read_bytes()
        config = json.loads((a / "config.json").read_text())
        assert config["objective"] == objective and config["settings"]["group_size"] == 16
        assert config["versions"]["torch"] == torch.__version__ and len(config["sha256"]["data"]) == 64
    # the same weights, samples and order for both objectives
    steps = {o: [x for x in metrics(tmp_path / "a" / o, timings=True) if "loss" in x] for o in ("sft", "bft")}
    assert math.isclose(steps["sft"][0]["nll"], steps["bft"][0]["nll"], rel_tol=1e-9)
    assert [x["tokens"] for x in steps["sft"]] == [x["tokens"] for x in steps["bft"]]
    assert list(steps["bft"][0]) == [
        "step", "epoch", "loss", "nll", "grad_norm", "clipped", "lr", "samples", "tokens", "response_tokens", "confidence",
        "token_weight", "sample_weight", "sample_weight_sd", "min_group_confidence", "min_group_confidence_p05", "multi_window",
        "tokens_per_s", "mfu", "memory_gb"]
    assert [x["samples"] for x in steps["bft"]] == [16, 16, 10]           # the last partial batch is kept
    assert [x["step"] for x in metrics(a) if "val_nll" in x] == [0, 2, 3]
    capsys.readouterr()
    assert call(monkeypatch, *argv, "--out", tmp_path / "a") == 0
    assert capsys.readouterr().out.count("finished, 3 steps") == 2


def test_several_files_are_one_data_set_whose_order_is_part_of_the_run(tmp_path, monkeypatch, data_file, capsys):
    lines = data_file.read_text().splitlines(keepends=True)
    a, b = tmp_path / "a.jsonl", tmp_path / "b.json"
    a.write_text("".join(lines[:30]))
    b.write_text("[" + ",".join(lines[30:]) + "]")
    argv = [*SMALL, "--steps", 2, "--batch-size", 16]
    assert call(monkeypatch, *argv, "--data", data_file, "--val-data", data_file, "--out", tmp_path / "one") == 0
    several = [*argv, "--val-data", a, b, "--out", tmp_path / "two"]
    assert call(monkeypatch, *several, "--data", a, b) == 0
    assert f"{a} {b}: 42 samples" in capsys.readouterr().out
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["settings"]["data"] == config["settings"]["val_data"] == [str(a), str(b)]
    assert config["sha256"]["data"] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in (a, b)]
    assert call(monkeypatch, *several, "--data", a, b) == 0
    assert "finished, 2 steps" in capsys.readouterr().out
    for files in ((b, a), (a,), (a, b, b)):
        assert call(monkeypatch, *several, "--data", *files) == 2
        assert "holds another run (another content of data" in capsys.readouterr().err


def test_templates_make_samples_of_other_keys(tmp_path, monkeypatch, data_file, capsys):
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"q (en)": row["prompt"], "answers": [row["response"]]} for row in rows]))
    argv = [*SMALL, "--steps", 2, "--batch-size", 16]
    templates = ["--prompt-template", "{q (en)}", "--response-template", "{answers}"]
    assert call(monkeypatch, *argv, "--data", data_file, "--out", tmp_path / "one") == 0
    assert call(monkeypatch, *argv, "--data", other, "--val-data", other, *templates, "--out", tmp_path / "two") == 0
    assert metrics(tmp_path / "one") == [line for line in metrics(tmp_path / "two") if "loss" in line]
    capsys.readouterr()
    for flags, words in ((templates[:2], "go together"), ((), f"{other}: row 1: the keys are 'q (en)', 'answers'; expected"),
                         ((*templates[:3], "{reply}"), f"{other}: row 1: no key 'reply'")):
        assert call(monkeypatch, *argv, "--data", other, *flags, "--out", tmp_path / "three") == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and not (tmp_path / "three").exists()
    assert call(monkeypatch, *templates) == 2 and "--prompt-template" in capsys.readouterr().err   # the default job's data are its own


def test_texts_that_hold_questions_are_not_trained_without_a_word(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "<human>: What causes gout? <bot>: Uric acid."}) + "\n")
    assert call(monkeypatch, *SMALL, "--data", path, "--steps", 1, "--out", tmp_path / "run") == 0
    assert f"warning: texts that look like a question with its answer: 1, the first at {path}:1; both are trained" in capsys.readouterr().out


def test_a_number_that_is_none_names_the_files_of_its_samples(tmp_path, monkeypatch, data_file, capsys):
    lines = data_file.read_text().splitlines(keepends=True)
    a, b = tmp_path / "a.jsonl", tmp_path / "b.json"
    a.write_text(lines[0])
    b.write_text("[" + ",".join(lines[1:3]) + "]")
    original = bft.weighted_loss
    monkeypatch.setattr(bft, "weighted_loss", lambda *args, **options: original(*args, **options) * math.nan)
    assert call(monkeypatch, *SMALL, "--data", a, b, "--steps", 1, "--out", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert "error: step 1: loss nan" in error and all(place in error for place in (f"{a}:1", f"{b}: row 1", f"{b}: row 2"))


@pytest.mark.parametrize("clip", [0, 1e-5])
def test_a_step_and_its_log_equal_a_calculation_by_loops(clip, tmp_path, monkeypatch, data_file):
    """One step of a bft run, and its line in the log, against log-probs of one sample at a time, the loops of test_bft,
    and AdamW by its formula: decay on matrices only."""
    assert call(monkeypatch, *SMALL, "--data", data_file, "--steps", 1, "--batch-size", 42, "--micro-tokens", 500,
                "--objective", "bft", "--grad-clip", clip, "--weight-decay", 10, "--out", tmp_path / "run") == 0
    tokenizer = hf.load_tokenizer(ASSETS)
    samples, _ = load_samples(data_file, tokenizer)
    s, _ = train.parse_settings([*SMALL])
    torch.manual_seed(0)
    model = GPT(scratch_config(s, tokenizer))
    tensors = []
    for x in samples:
        ids, at = torch.from_numpy(x.ids), torch.from_numpy(x.response).nonzero()[:, 0] - 1
        tensors.append(model(ids[None])[0].log_softmax(-1)[at, ids[at + 1]])
    logps = [x.tolist() for x in tensors]
    loss, gradient, _ = reference(logps, "bft", 16)
    C = torch.tensor([math.exp(min(sum(x[i:i + 16]) / 16 for i in range(len(x) - 15))) for x in logps])
    flat = torch.tensor([v for x in logps for v in x])
    line, = metrics(tmp_path / "run")
    expected = {"loss": loss, "nll": -flat.mean(), "confidence": flat.exp().mean(), "token_weight": flat.exp().mean(), "sample_weight": (1 - C).mean(),
                "sample_weight_sd": C.std(correction=0), "min_group_confidence": C.mean(), "multi_window": 1.0,
                "min_group_confidence_p05": C.quantile(0.05), "response_tokens": len(flat), "samples": 42, "lr": 1e-3}
    torch.cat(tensors).backward(torch.tensor(gradient))
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    expected |= {"grad_norm": norm, "clipped": bool(clip)}
    for key, value in expected.items():
        assert math.isclose(line[key], float(value), rel_tol=1e-3, abs_tol=1e-7), (key, line[key], value)
    # Adam's first step: m and v are unbiased to g and g^2, so that it is lr g / (|g| + eps); g is near eps = 1e-8 here.
    after = load_safetensors(tmp_path / "run" / "model" / "model.safetensors")
    scale = clip / norm if clip else 1.0
    with torch.no_grad():
        for name, p in model.named_parameters():
            g = p.grad * scale
            decayed = p * (1 - 1e-3 * 10) if p.dim() == 2 else p
            torch.testing.assert_close(after["model." + name], decayed - 1e-3 * g / (g.abs() + 1e-8), rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("init", ["scratch", "weights"])
def test_a_run_goes_on_from_its_checkpoint(init, tmp_path, monkeypatch, data_file, capsys):
    argv = [*SMALL, "--data", data_file, "--steps", 8, "--batch-size", 16, "--save-every", 3, "--keep", 3]
    if init == "weights":                                                 # float32: trained where they were read to
        assert call(monkeypatch, *SMALL, "--data", data_file, "--steps", 1, "--out", tmp_path / "base") == 0
        argv[argv.index("scratch")] = tmp_path / "base"
    for name in ("whole", "cut"):
        assert call(monkeypatch, *argv, "--out", tmp_path / name) == 0
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert [n for n, _ in checkpoints(cut)] == [3, 6, 8]
    shutil.rmtree(cut / "checkpoint" / "step-8")
    with open(cut / "metrics.jsonl", "a") as f:
        f.write('{"step": 9, "epo')                                       # a line that a crash cut short
    assert call(monkeypatch, *argv, "--out", cut) == 0
    assert "from step 6 to 8" in capsys.readouterr().out
    assert metrics(cut) == metrics(whole)
    a, b = (load_safetensors(x / "model" / "model.safetensors") for x in (whole, cut))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert call(monkeypatch, *argv, "--out", cut, "--lr", 2e-3) == 2      # another run is not silently mixed with it
    assert "lr 0.001, now 0.002" in capsys.readouterr().err
    assert call(monkeypatch, *argv, "--out", cut, "--objective", "sft", "bft") == 2
    assert "holds a run of one objective" in capsys.readouterr().err
    assert call(monkeypatch, *argv, "--out", cut, "--keep", 1, "--no-resume") == 0
    assert [n for n, _ in checkpoints(cut)] == [8] and metrics(cut) == metrics(whole)


def test_fine_tuning_starts_from_the_model_given(tmp_path, monkeypatch, data_file):
    assert call(monkeypatch, *SMALL, "--data", data_file, "--steps", 2, "--out", tmp_path / "base") == 0
    assert call(monkeypatch, "--init", tmp_path / "base", "--data", data_file, "--steps", 1, "--lr", 1e-12, "--dtype", "float32",
                "--out", tmp_path / "tuned") == 0
    a, b = (load_safetensors(tmp_path / x / "model" / "model.safetensors") for x in ("base", "tuned"))
    assert all(torch.allclose(a[k], b[k], atol=1e-9) for k in a)
    assert {p.name for p in (tmp_path / "tuned" / "model").iterdir()} == {
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.slow
def test_what_we_save_opens_in_transformers(tmp_path, monkeypatch, data_file):
    import transformers
    assert call(monkeypatch, *SMALL, "--data", data_file, "--steps", 1, "--out", tmp_path / "run") == 0
    directory = tmp_path / "run" / "model"
    tokenizer, model = (c.from_pretrained(directory) for c in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM))
    ids = tokenizer("TP53 promotes", return_tensors="pt", add_special_tokens=False).input_ids
    assert ids[0].tolist() == hf.load_tokenizer(directory).encode("TP53 promotes")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, hf.load_model(directory)(ids), rtol=1e-4, atol=1e-4)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch, data_file, capsys):
    broken = bft.Objective(lambda tokens: tokens.logp * math.nan, bft.every_sample_1, "tokens")
    monkeypatch.setitem(bft.OBJECTIVES, "sft", broken)
    assert call(monkeypatch, *SMALL, "--data", data_file, "--steps", 2, "--objective", "sft", "--out", tmp_path / "run") == 1
    assert "error: step 1: loss nan" in capsys.readouterr().err
    assert metrics(tmp_path / "run") == [] and not (tmp_path / "run" / "model").exists()


def test_when_steps_are_looked_at_changes_nothing(tmp_path, monkeypatch, data_file, capsys):
    for every in (1, 3, 100):
        assert call(monkeypatch, *SMALL, "--data", data_file, "--steps", 8, "--batch-size", 16, "--micro-tokens", 300, "--log-every",
                    every, "--out", tmp_path / str(every)) == 0
        shown = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("bft step")]
        steps = [step for step in range(1, 9) if step in (1, 8) or step % every == 0]
        assert [words[2] for words in shown] == [f"{step}/8" for step in steps]
        lines = metrics(tmp_path / str(every))
        for step, words in zip(steps, shown):                             # small as it is under a loss that weighs by p
            assert float(words[words.index("|g|") + 1]) == pytest.approx(lines[step - 1]["grad_norm"], rel=0.01)
        assert metrics(tmp_path / str(every)) == metrics(tmp_path / "1")
    rates = [x["tokens_per_s"] for x in metrics(tmp_path / "3", timings=True)]
    assert rates[1] == rates[2] != rates[3] == rates[5] != rates[6]       # of the steps between two lines together


def test_the_speed_of_steps_is_theirs_alone(tmp_path, monkeypatch, data_file):
    """Validation takes an hour, by a clock that we move."""
    hours, clock, score = [], train.time.perf_counter, train.score
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock() + 3600 * len(hours))
    monkeypatch.setattr(train, "score", lambda *args: hours.append(1) or score(*args))
    assert call(monkeypatch, *SMALL, "--data", data_file, "--val-data", data_file, "--steps", 4, "--batch-size", 4, "--eval-every", 2,
                "--out", tmp_path / "run") == 0
    lines = [line for line in metrics(tmp_path / "run", timings=True) if "loss" in line]
    assert len(hours) == 3 and len(lines) == 4 and all(line["tokens_per_s"] > line["tokens"] / 600 for line in lines)


def test_a_number_that_is_none_is_found_at_its_step_though_looked_at_later(tmp_path, monkeypatch, data_file, capsys):
    calls = []

    def broken(tokens):
        # A call a step, but for those that look at two tokens.
        if len(tokens.logp) > 2:
            calls.append(0)
        return tokens.logp * (math.nan if len(calls) > 4 else 0) + 1

    monkeypatch.setitem(bft.OBJECTIVES, "sft", bft.Objective(broken, bft.every_sample_1, "tokens"))
    assert call(monkeypatch, *SMALL, "--data", data_file, "--steps", 20, "--objective", "sft", "--save-every", 3, "--out",
                tmp_path / "run") == 1
    assert "error: step 5: loss nan" in capsys.readouterr().err
    assert [x["step"] for x in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert [n for n, _ in checkpoints(tmp_path / "run")] == [3]     # step 6 came first, and was not saved


class NoWaiting(TorchDispatchMode):
    """Refuses what needs a value from the device before the program can go on."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "repeat_interleave") \
            or isinstance(args[1] if len(args) > 1 else None, int)        # (so many times each: its size is known)
        assert "index" not in function.overloadpacket.__name__ or not any(
            getattr(i, "dtype", None) == torch.bool for i in (args[1] if isinstance(args[1], (list, tuple)) else ()))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", [*bft.OBJECTIVES, "iw-sft", "everything"])
def test_a_step_does_not_wait_for_the_device(objective, monkeypatch):
    split_worker.add_rows()
    monkeypatch.setattr(bft, "_check", lambda *_: None)                   # looks at offsets where they lie on the CPU
    model, batch = split_worker.setup(False)
    optimizer, s = torch.optim.AdamW(model.parameters(), fused=True), train.Settings(micro_tokens=60)
    with NoWaiting():
        train.forward_backward(model, batch, objective, s, Ranks("cpu"), torch.bfloat16)
        train.clip_gradient(train.trained_parameters(model), 1.0)
        optimizer.step()
    x = torch.ones(2)
    for waits in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.repeat_interleave(torch.tensor([1, 2])),
                  lambda: x.index_put_((x > 0,), x.sum())):
        with pytest.raises(AssertionError), NoWaiting():
            waits()


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA H200", 989e12),
    ("NVIDIA H200 NVL", 835e12), ("NVIDIA GH200 480GB", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA B200", 2250e12),
    ("NVIDIA GB200", 2500e12), ("NVIDIA L40S", 362e12), ("NVIDIA L40", None), ("Tesla T4", None)])
def test_the_peak_is_that_of_the_device(name, peak):
    assert train.peak_flops(name) == peak


def test_nothing_is_compiled_that_was_not_asked_for(tmp_path, monkeypatch, data_file):
    argv, counter = [*SMALL, "--data", data_file, "--val-data", data_file, "--steps", 1], count_compiled_rows(monkeypatch)
    assert call(monkeypatch, *argv, "--out", tmp_path / "run") == 0 and counter.frame_count == 0


def test_a_run_warns_where_groups_are_whole_samples(tmp_path, monkeypatch, data_file, capsys):
    """Of objectives that have groups alone; a sample weight may be of something else."""
    load_variants([str(path) for path in (ROOT / "variants").glob("*.py")])
    with_groups = {name for name in bft.OBJECTIVES if train.has_groups(name)}
    assert with_groups == {"bft", "bft-v3", "bft-sample", "bft-tokavg", "bft-gamma-0.5", "bft-gamma-2"}
    argv = [*SMALL, "--data", data_file, "--steps", 1, "--objective", "sft", "bft", "--out"]
    for group_size, warnings in ((256, 1), (2, 0)):
        assert call(monkeypatch, *argv, tmp_path / str(group_size), "--group-size", group_size) == 0
        assert capsys.readouterr().out.count("warning: only 0% of the samples have more than --group-size") == warnings


class Kernels(TorchDispatchMode):
    """Counts what a GPU would launch a kernel for."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        only_shapes = function.is_view or function.overloadpacket.__name__ in ("detach", "promote_types")
        self.count += not only_shapes
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective, most", [("sft", 50), ("bft", 70), ("bft-v3", 90)])
def test_an_objective_with_its_log_is_few_kernels(objective, most, monkeypatch):
    """They are tiny: on a GPU each costs the time that it takes to be launched, in every micro-batch."""
    monkeypatch.setattr(bft, "_check", lambda *_: None)                   # looks at offsets where they lie on the CPU
    logp, offsets = (-torch.rand(60)).requires_grad_(), torch.tensor([0, 20, 20, 27, 60])
    with Kernels() as kernels:
        weights = bft.weigh(logp, offsets, objective, 5)
        bft.weighted_loss(logp, weights, 4).backward()
        train.sample_statistics(logp, weights, 5)
    assert 0 < kernels.count <= most


@pytest.mark.parametrize("draw", [torch.rand_like, lambda logp: torch.rand(len(logp)) < 0.5], ids=["numbers", "yes or no"])
def test_the_log_shows_the_weights_that_the_loss_had(draw, monkeypatch):
    monkeypatch.setitem(bft.OBJECTIVES, "drawn", bft.Objective(lambda tokens: draw(tokens.logp), bft.every_sample_1, "tokens"))
    logp, offsets = torch.full((6,), -1.0, requires_grad=True), torch.tensor([0, 4, 6])
    weights = bft.weigh(logp, offsets, "drawn", 5)
    bft.weighted_loss(logp, weights, 1).backward()
    logged = train.sample_statistics(logp, weights, 5)[:, 2]
    torch.testing.assert_close(torch.stack([-logp.grad[:4].sum(), -logp.grad[4:].sum()]).double(), logged)


@pytest.mark.slow
def test_compiled_and_recomputed_steps_equal_eager_ones(tmp_path, monkeypatch, data_file):
    argv = [*SMALL, "--data", data_file, "--steps", 3, "--micro-tokens", 400]
    for name, flags in (("eager", ["--no-compile"]), ("compiled", ["--compile"]), ("recomputed", ["--recompute"])):
        assert call(monkeypatch, *argv, *flags, "--out", tmp_path / name) == 0
    assert metrics(tmp_path / "recomputed") == metrics(tmp_path / "eager")
    for a, b in zip(metrics(tmp_path / "compiled"), metrics(tmp_path / "eager")):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.slow
def test_compiled_and_recomputed_blocks_work_on_several_ranks(tmp_path, data_file):
    # Blocks of 12 MB: DDP's first bucket is 1 MB. Two full micro-batches a rank and step: of one size, and the empty one
    # before the first step, are compiled.
    argv = [ROOT / "train.py", *SMALL, "--n-embd", 512, "--n-head", 4, "--data", data_file, "--steps", 2, "--batch-size", 16,
            "--micro-tokens", 280, "--lr", "1e-5", "--device", "cpu"]
    kinds = {"eager": ["--no-compile"], "compiled": ["--compile", "--recompute"], "sharded": ["--compile", "--recompute", "--shard", "all"]}
    for name, flags in kinds.items():
        done = forked(2, *argv, *flags, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    for name in ("compiled", "sharded"):
        for a, b in zip(metrics(tmp_path / name), metrics(tmp_path / "eager"), strict=True):
            assert a == pytest.approx(b, rel=1e-3)


def test_learning_rate_rises_and_falls():
    s = train.Settings(lr=1.0, min_lr=0.1, warmup=0.1)
    rates = [train.learning_rate(step, 100, s) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1 and rates[55] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert train.learning_rate(0, 1, train.Settings(lr=1.0, warmup=0.0)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Users' mistakes

MISTAKES = {
    **{case: (["--data", "case.jsonl"], words) for case, (_, words) in BAD_LINES.items()},
    "no such file": (["--data", "missing.jsonl"], "missing.jsonl: no such file"),
    "empty file": (["--data", "empty.jsonl"], "empty.jsonl: the file is empty"),
    "not JSON": (["--data", "bad.jsonl"], "bad.jsonl:2: not JSON"),
    "bad validation data": (["--data", "good.jsonl", "--val-data", "bad.jsonl"], "bad.jsonl:2: not JSON"),
    "unknown objective": (["--data", "good.jsonl", "--objective", "bfd"], "'bfd'"),
    "group size 0": (["--data", "good.jsonl", "--group-size", "0"], "--group-size is 0; expected a number at least 1"),
    "batch size 0": (["--data", "good.jsonl", "--batch-size", "0"], "--batch-size is 0"),
    "not a number": (["--data", "good.jsonl", "--lr", "fast"], "'fast'"),
    "lr not finite": (["--data", "good.jsonl", "--lr", "nan"], "--lr is nan; expected a number above 0"),
    "unknown flag": (["--data", "good.jsonl", "--learning-rate", "1"], "--learning-rate"),
    "no data": ([], "--data is missing"),
    "no such model": (["--data", "good.jsonl", "--init", "nowhere"], "nowhere: no such directory"),
    "no such tokenizer": (["--data", "good.jsonl", "--tokenizer", "nowhere"], "tokenizer nowhere"),
    "flags of another job": (["--val-data", "good.jsonl"], "--val-data: not for the default job"),
    "no such device": (["--data", "good.jsonl", "--device", "abacus"], "--device abacus"),
    "too long": (["--data", "good.jsonl", "--max-length", "1"], "within 1 tokens"),
    "out is a file": (["--data", "good.jsonl", "--out", "good.jsonl"], "--out good.jsonl"),
    "out is in a file": (["--data", "good.jsonl", "--out", "good.jsonl", "--objective", "sft", "bft"], "--out good.jsonl"),
    "out is something else": (["--data", "good.jsonl", "--out", "other"], "--out other"),
    "one of the outs is": (["--data", "good.jsonl", "--out", "outs", "--objective", "sft", "bft"], f"--out {Path('outs/bft')}"),
    "a damaged checkpoint": (["--data", "good.jsonl", "--init", "damaged"], f"{Path('damaged/model.safetensors')} is not a safetensors file"),
    "another's model": (["--data", "good.jsonl", "--init", "mamba"], f"{Path('mamba/config.json')}: architecture MambaForCausalLM"),
    "its chat tokens lack": (["--data", "good.jsonl", "--chat-format", "chatml"], "chat format chatml needs the special token <|im_start|>"),
    "adapters on random weights": (["--data", "good.jsonl", "--lora-rank", "4"], "--init scratch has random weights"),
    "--adapter on random weights": (["--data", "good.jsonl", "--adapter", "nowhere"], "--init scratch has random weights"),
    "--adapter without a model": (["--adapter", "nowhere"], "--adapter: not for the default job; expected --init and --data with it"),
    "no such adapter": (["--data", "good.jsonl", "--init", "base", "--adapter", "nowhere"], "nowhere: no such directory"),
    "no adapter": (["--data", "good.jsonl", "--init", "base", "--adapter", "base"], "base: no adapter there; expected adapter_config.json"),
    "adapters of some layers": (["--data", "good.jsonl", "--init", "base", "--adapter", "some"], "has no adapter of model.layers.1.mlp.up_proj;"),
    "alpha alone": (["--data", "good.jsonl", "--lora-alpha", "4"], "--lora-alpha needs --lora-rank"),
    "alpha not finite": (["--data", "good.jsonl", "--lora-rank", "4", "--lora-alpha", "inf"], "--lora-alpha is inf"),
    "seed too large": (["--data", "good.jsonl", "--seed", "5000000000"], "--seed is 5000000000"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_writes_nothing(mistake, tmp_path, monkeypatch, capsys):
    argv, words = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    good = '{"prompt": "a", "response": "b"}\n'
    (tmp_path / "good.jsonl").write_text(good * 3)
    (tmp_path / "bad.jsonl").write_text(good + "oops\n")
    (tmp_path / "empty.jsonl").write_text("")
    for other in ("other", "outs/bft"):
        (tmp_path / other).mkdir(parents=True)
        (tmp_path / other / "thesis.txt").write_text("")
    model = tiny(vocab_size=hf.load_tokenizer(ASSETS).n_vocab)
    for name in ("damaged", "mamba", "base"):
        save_with_tokenizer(model, tmp_path / name)
    model.add_lora(2, 4)
    hf.save_adapter(model, tmp_path / "some", "base")
    adapters = tmp_path / "some" / "adapter_model.safetensors"
    save_safetensors({name: t for name, t in load_safetensors(adapters).items() if "1.mlp.up_proj" not in name}, adapters)
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"cut short")
    config = (tmp_path / "mamba" / "config.json").read_text()
    (tmp_path / "mamba" / "config.json").write_text(config.replace("LlamaFor", "MambaFor"))
    if mistake in BAD_LINES:
        line, _ = BAD_LINES[mistake]
        (tmp_path / "case.jsonl").write_bytes(good.encode() + (line if isinstance(line, bytes) else line.encode()))
    before = sorted(p.name for p in tmp_path.rglob("*"))
    flags = [*(SMALL if mistake not in ("flags of another job", "--adapter without a model") else []), "--out", "run", *argv]
    assert call(monkeypatch, *flags) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("error: ")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_more_ranks_than_samples(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    result = torchrun(2, ROOT / "train.py", *SMALL, "--data", "one.jsonl", "--out", "run", cwd=tmp_path)
    assert result.returncode != 0 and not (tmp_path / "run").exists()
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: one.jsonl: 1 samples for 2 ranks; expected one for each or more"]
    assert "exitcode  : 2" in result.stderr and 'train.py", line' not in result.stderr       # no traceback of ours


def test_the_init_of_a_run_is_not_overwritten(tmp_path, monkeypatch, data_file):
    assert call(monkeypatch, *SMALL, "--data", data_file, "--steps", 1, "--out", tmp_path / "run") == 0
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    for out in (tmp_path / "run", tmp_path / "run" / "model"):
        assert call(monkeypatch, "--init", tmp_path / "run", "--data", data_file, "--steps", 1, "--out", out, "--no-resume") == 2
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before


def test_flags_become_settings():
    s, grid = train.parse_settings(["--data", "x", "--objective", "sft", "bft", "sft", "--no-compile", "--lr", "3e-4"])
    assert s.objective == ("sft", "bft") and s.compile is False and s.lr == 3e-4 and s.resume is True
    assert grid is None and s.group_size == 256 and train.parse_settings(["--data", "x"])[0].objective == ("bft",)
    with pytest.raises(UserError, match="n-embd"):
        train.parse_settings(["--n-embd", "30", "--n-head", "4"])
