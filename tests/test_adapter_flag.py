"""--adapter: a run with adapters saves them, and another one goes on from them."""

import json
import shutil

import pytest
import torch
from forked import forked
from support import ASSETS, ROOT, call, metrics, save_with_tokenizer, tiny
from test_train import published_config

import hf
import train
from runtime.checkpoint import checkpoints
from runtime.files import load_safetensors, save_safetensors
from runtime.process import UserError
from runtime.ranks import Ranks


GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48,
        "n_positions": 512, "layer_norm_epsilon": 1e-6}
FAMILIES = {"llama": {}, "gpt2": GPT2}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A base, 14 samples of some 50 tokens, and a run with adapters of rank 3 in `first`."""
    path = tmp_path_factory.mktemp(request.param)
    (path / "data.jsonl").write_text("".join((ASSETS / "finetune.jsonl").read_text().splitlines(keepends=True)[::48]))
    sizes = {"vocab_size": hf.load_tokenizer(ASSETS).n_vocab, "max_position_embeddings": 512}
    save_with_tokenizer(tiny(std=0.1, **sizes, **FAMILIES[request.param]), path / "base")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert call(monkeypatch, *argv_of(path), "--lora-rank", 3, "--lora-alpha", 5, "--out", path / "first") == 0
    return path


# Where it makes no difference.
on_one_family = pytest.mark.parametrize("folder", ["llama"], indirect=True)


def argv_of(folder, *more):
    """Four steps, with a checkpoint after each second one."""
    return ["--init", folder / "base", "--data", folder / "data.jsonl", "--val-data", folder / "data.jsonl", "--dtype", "float32", "--lr", 1e-2,
            "--steps", 4, "--batch-size", 6, "--micro-tokens", 200, "--group-size", 16, "--save-every", 2, "--keep", 9, *more]


def goes_on(folder, *more):
    return argv_of(folder, "--adapter", folder / "first" / "adapter", *more)


def adapter_of(out):
    return load_safetensors(out / "adapter" / "adapter_model.safetensors")


def assert_same(a, b):
    assert metrics(a) == metrics(b)
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "model/model.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


# ---------------------------------------------------------------------------------------------------------------------

def test_a_run_saves_the_adapters_that_it_trained(folder):
    model = hf.load_model(folder / "base")
    model.add_lora(3, 5.0)
    hf.fill_adapter(model, folder / "first" / "adapter")
    trained = load_safetensors(checkpoints(folder / "first")[-1][1] / "shard-00001-of-00001.safetensors")
    adapters = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    assert {f"model.{name}" for name in adapters} == {name for name in trained if name.startswith("model.")}
    assert all(torch.equal(p, trained[f"model.{name}"]) and p.abs().max() > 0 for name, p in adapters.items())
    config = json.loads((folder / "first" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "base") and (config["r"], config["lora_alpha"]) == (3, 5)


def test_a_run_begins_with_the_adapters_as_they_were(folder, tmp_path, monkeypatch, capsys):
    """Whatever the objective; under the optimizer's first step, and not the fifth."""
    assert call(monkeypatch, *goes_on(folder), "--objective", "sft", "bft", "--out", tmp_path) == 0
    assert "warning" not in capsys.readouterr().out.replace("warning: only", "")
    last = metrics(folder / "first")[-1]["val_nll"]
    for name in ("sft", "bft"):
        first, *_, end = metrics(tmp_path / name)
        assert first == {"step": 0, "val_nll": last} and end["val_nll"] < last
        settings = json.loads((tmp_path / name / "config.json").read_text())["settings"]
        assert (settings["lora_rank"], settings["lora_alpha"]) == (3, 5.0)
    assert last < metrics(folder / "first")[0]["val_nll"]


def test_the_reference_is_base_and_adapter(folder, tmp_path, monkeypatch):
    variant = ["--variant", ROOT / "variants" / "iw_sft.py", "--objective", "iw-sft"]
    # What the same weights give that were merged.
    merged = argv_of(folder, *variant, "--init", folder / "first", "--steps", 1)
    assert call(monkeypatch, *merged, "--out", tmp_path / "merged") == 0
    assert call(monkeypatch, *goes_on(folder, *variant, "--steps", 1), "--out", tmp_path / "adapter") == 0
    references = [load_safetensors(tmp_path / name / "ref_logp.safetensors")["ref_logp"] for name in ("adapter", "merged")]
    torch.testing.assert_close(*references, rtol=1e-4, atol=1e-4)
    line = metrics(tmp_path / "adapter")[1]
    assert line["sample_weight"] == pytest.approx(1, abs=1e-5) and line["loss"] == pytest.approx(line["nll"], rel=1e-5)


def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(folder, tmp_path, monkeypatch, capsys):
    for name in ("whole", "cut"):
        assert call(monkeypatch, *goes_on(folder), "--out", tmp_path / name) == 0
    for part in ("checkpoint/step-4", "model", "adapter"):
        shutil.rmtree(tmp_path / "cut" / part)
    assert call(monkeypatch, *goes_on(folder), "--out", tmp_path / "cut") == 0
    assert "from step 2 to 4" in capsys.readouterr().out
    assert_same(tmp_path / "cut", tmp_path / "whole")
    # The rank and alpha that it has anyway may be said, and it may lie elsewhere.
    shutil.copytree(folder / "first" / "adapter", tmp_path / "elsewhere")
    said = ["--adapter", tmp_path / "elsewhere", "--lora-rank", 3, "--lora-alpha", 5]
    assert call(monkeypatch, *argv_of(folder, *said), "--out", tmp_path / "whole") == 0
    assert "finished, 4 steps" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("ranks, flags", [(2, []), (4, ["--shard", "all"])])
def test_several_ranks_go_on_like_one(ranks, flags, folder, tmp_path, monkeypatch):
    """Of three rows of A, the last of four ranks has none."""
    assert call(monkeypatch, *goes_on(folder), "--lr", 1e-3, "--out", tmp_path / "one") == 0
    done = forked(ranks, ROOT / "train.py", *goes_on(folder), "--lr", 1e-3, *flags, "--out", tmp_path / "several")
    assert done.returncode == 0, done.stderr
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "several"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    one, several = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "several")
    assert one.keys() == several.keys()
    for name, t in one.items():
        torch.testing.assert_close(several[name], t, rtol=1e-3, atol=1e-5)
        assert not torch.equal(t, adapter_of(folder / "first")[name])


@pytest.mark.slow
def test_an_adapter_of_peft_is_trained_further(folder, tmp_path, monkeypatch, capsys):
    """From a run's model, under the name by which PEFT finds it; its dropout was for its training."""
    import peft
    import transformers
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "first" / "model")
    options = peft.LoraConfig(r=2, lora_alpha=2, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    theirs = peft.get_peft_model(base, options).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    argv = argv_of(folder, "--init", folder / "first", "--adapter", tmp_path / "theirs")
    assert call(monkeypatch, *argv, "--out", tmp_path / "run") == 0
    ids = torch.randint(97, (2, 40))
    ours = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter").eval()
    with torch.no_grad():
        logits = ours(ids).logits
        torch.testing.assert_close(logits, hf.load_model(tmp_path / "run" / "model")(ids), rtol=1e-4, atol=1e-4)
        assert (logits - theirs(ids).logits).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Which run it is, and what is refused

@pytest.fixture
def copy(folder, tmp_path):
    """Of the adapter, to be changed."""
    shutil.copytree(folder / "first" / "adapter", tmp_path / "copy")
    return tmp_path / "copy"


def double(directory):
    file = directory / "adapter_model.safetensors"
    save_safetensors({name: 2 * t for name, t in load_safetensors(file).items()}, file)


@on_one_family
def test_another_adapter_is_another_run(folder, copy, tmp_path, monkeypatch, capsys):
    argv = argv_of(folder, "--adapter", copy, "--out", tmp_path / "run")
    assert call(monkeypatch, *argv) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    double(copy)
    assert call(monkeypatch, *argv) == 2
    assert "holds another run (another content of adapter); name another --out" in capsys.readouterr().err
    assert call(monkeypatch, *argv_of(folder, "--lora-rank", 3, "--lora-alpha", 5, "--out", tmp_path / "run")) == 2
    assert "holds another run (adapter [" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@on_one_family
def test_an_adapter_that_changes_between_two_objectives_ends_the_run(folder, copy, tmp_path, monkeypatch, capsys):
    save_adapter = train.hf.save_adapter

    def meanwhile(*arguments, **options):
        save_adapter(*arguments, **options)
        double(copy)
    monkeypatch.setattr(train.hf, "save_adapter", meanwhile)
    assert call(monkeypatch, *argv_of(folder, "--adapter", copy, "--objective", "bft", "sft", "--out", tmp_path / "run")) == 2
    assert capsys.readouterr().err == (f"error: {copy}: its files have changed since the command began; expected the weights that this run "
                                       "started from\n")
    # The first needed it no more.
    assert (tmp_path / "run" / "bft" / "model" / "config.json").is_file() and not (tmp_path / "run" / "sft" / "checkpoint").exists()


@on_one_family
def test_a_run_without_adapters_leaves_none(folder, tmp_path, monkeypatch):
    assert call(monkeypatch, *goes_on(folder), "--steps", 1, "--out", tmp_path / "run") == 0
    assert call(monkeypatch, *argv_of(folder, "--steps", 1), "--out", tmp_path / "run", "--no-resume") == 0
    assert (tmp_path / "run" / "model").is_dir() and not (tmp_path / "run" / "adapter").exists()


@on_one_family
def test_what_a_run_starts_from_is_not_overwritten(folder, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in (folder / "first").rglob("*") if path.is_file()}
    for out in (folder / "first", folder / "first" / "adapter"):
        assert call(monkeypatch, *goes_on(folder), "--out", out, "--no-resume") == 2
        assert f"--out {out} holds the adapters of --adapter; expected another directory" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (folder / "first").rglob("*") if path.is_file()}


@on_one_family
@pytest.mark.parametrize("flags, name, asked, has", [
    (["--lora-rank", 4], "--lora-rank", 4, 3), (["--lora-alpha", 6], "--lora-alpha", 6.0, 5.0), (["--lora-rank", 3, "--lora-alpha", 6], "--lora-alpha", 6.0, 5.0)])
def test_another_rank_or_alpha_is_refused(flags, name, asked, has, folder, tmp_path, monkeypatch, capsys):
    """By the flag that was given."""
    assert call(monkeypatch, *goes_on(folder, *flags), "--out", tmp_path / "run") == 2
    assert capsys.readouterr().err == (f"error: {name} is {asked}, in --adapter {folder / 'first' / 'adapter'} it is {has}; expected that, or no flag\n")
    assert not (tmp_path / "run").exists()


@on_one_family
def test_an_adapter_of_another_base_is_remarked_upon(folder, copy, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder / "base", tmp_path / "elsewhere")
    argv = argv_of(folder, "--init", tmp_path / "elsewhere", "--adapter", copy, "--steps", 1, "--out", tmp_path / "run", "--no-resume")
    config = json.loads((copy / "adapter_config.json").read_text())
    for base, expected in ((str(folder / "base"), 1), (f"{tmp_path}/./elsewhere/", 0), (None, 0), ("some/model", 1), ("\0", 1)):
        (copy / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        assert call(monkeypatch, *argv) == 0
        shown = str(base).replace("\0", r"\x00")
        words = f"warning: {copy} says that it was trained on {shown}; --init is {tmp_path / 'elsewhere'}"
        assert capsys.readouterr().out.count(words) == expected


@on_one_family
def test_an_adapter_that_is_merged_into_the_model_is_refused(folder, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(folder / "first", tmp_path / "run")
    (tmp_path / "link").symlink_to(run)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    for base, words in ((str(folder / "base"), f" was trained on, {folder / 'base'}, or no --adapter\n"), (None, " was trained on, or no --adapter\n")):
        (run / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        for init, adapter in ((run, run / "adapter"), (run / "model", tmp_path / "link" / "adapter")):
            argv = argv_of(folder, "--init", init, "--adapter", adapter, "--out", tmp_path / "next")
            assert call(monkeypatch, *argv) == 2
            assert capsys.readouterr().err == f"error: --init {init} has --adapter {adapter} merged into it already; expected the model that the adapter{words}"
    assert not (tmp_path / "next").exists()
    # One that was trained on the model beside it is not in it.
    (run / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(run / "model")}))
    assert call(monkeypatch, *argv_of(folder, "--init", run, "--adapter", run / "adapter", "--steps", 1, "--out", tmp_path / "next")) == 0


@on_one_family
def test_a_chat_template_beside_an_adapter_is_remarked_upon(folder, copy, tmp_path, monkeypatch, capsys):
    """Where it is not the one that is used. --tokenizer takes it, from the directory that has the tokenizer, too."""
    argv = argv_of(folder, "--adapter", copy, "--steps", 1, "--no-resume", "--out", tmp_path / "run")
    words = f"warning: {copy} has a chat template of its own, and chat format plain is used: the adapters may not know it; --tokenizer {copy} takes theirs"
    used = hf.load_chat_format(folder / "base", hf.load_tokenizer(folder / "base")).template
    theirs = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|endoftext|>' }}{% endfor %}"
    files = ["tokenizer.json", "tokenizer_config.json"]
    for name in files:
        shutil.copy(folder / "base" / name, copy)
    for template, more, expected in ((used, [], 0), (theirs, [], 1), (theirs, ["--objective", "sft", "bft"], 1), (theirs, ["--chat-format", "plain"], 1),
                                     (theirs, ["--tokenizer", copy], 0)):
        (copy / "chat_template.jinja").write_text(template)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        assert call(monkeypatch, *argv, *more) == 0
        assert capsys.readouterr().out.count(words) == expected
    assert (tmp_path / "run" / "model" / "chat_template.jinja").read_text() == theirs
    # Older programs have it elsewhere.
    (copy / "chat_template.jinja").unlink()
    (copy / "tokenizer_config.json").write_text(json.dumps({"chat_template": theirs}))
    assert call(monkeypatch, *argv) == 0 and words in capsys.readouterr().out
    # None that can be read, and none that is needed.
    (copy / "tokenizer_config.json").write_text('{"chat_template": 7}')
    assert call(monkeypatch, *argv) == 0 and f"warning: {copy}: its chat template cannot be read" in capsys.readouterr().out


def test_another_rank_is_not_proposed_for_an_adapter(monkeypatch):
    """Where memory is short: one GPU, and Qwen2.5-7B with adapters of rank 64, which do not fit; those of rank 16 would."""
    ranks = Ranks("cpu")
    ranks.device = torch.device("cuda:0")
    monkeypatch.setattr(train, "memory_bytes", lambda device: int(17e9))
    for adapter, expected in (("", "--lora-rank 16"), ("one", "or more GPUs and --shard all")):
        settings = train.Settings(dtype="bfloat16", init="a model", adapter=adapter, lora_rank=64)
        with pytest.raises(UserError, match=f"{expected}$"):
            train.check_memory(published_config("Qwen2.5-7B"), settings, ranks)


@on_one_family
def test_an_adapter_is_no_model(folder):
    with pytest.raises(UserError, match="no model there, but adapter_config.json, an adapter of PEFT's; .* --init BASE --adapter DIR"):
        hf.open_model(folder / "first" / "adapter")
