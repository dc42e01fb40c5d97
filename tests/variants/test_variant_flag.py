"""--variant: the rows of a file reach the commands, are part of a run, and a mistake in the file is one sentence."""

import hashlib
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from support import ASSETS, ROOT, SMALL, call, forget_variants, metrics, save_with_tokenizer, tiny

import bft
import hf
import train
import variants
from runtime.process import UserError


MINE = """\"\"\"A row, and another one.\"\"\"

import bft


def surprise(tokens):
    return 1 - tokens.logp.exp()


def hesitation(tokens):
    return tokens.extra["entropy"] / 4


bft.OBJECTIVES["surprise"] = bft.Objective(surprise, bft.every_sample_1, "tokens")
bft.OBJECTIVES["by-entropy"] = bft.Objective(hesitation, bft.every_sample_1, "tokens", needs=("entropy",))
"""
POWER = ROOT / "variants" / "power.py"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where we are, with 14 samples and a variant of our own in it."""
    (tmp_path / "data.jsonl").write_text("".join((ASSETS / "finetune.jsonl").read_text().splitlines(keepends=True)[::48]))
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    return tmp_path


ARGV = [*SMALL, "--data", "data.jsonl", "--steps", 2, "--batch-size", 7]


def test_rows_of_files_are_objectives(folder, monkeypatch, capsys):
    assert call(monkeypatch, *ARGV, "--out", "runs", "--variant", "mine.py", POWER, "--objective", "by-entropy", "power-2", "surprise", "sft") == 0
    assert all(len(metrics(folder / "runs" / name)) == 2 for name in ("by-entropy", "power-2", "surprise", "sft"))
    first = {name: metrics(folder / "runs" / name)[0] for name in ("by-entropy", "surprise", "sft")}
    assert first["sft"]["token_weight"] == 1
    assert first["surprise"]["token_weight"] == pytest.approx(1 - first["surprise"]["confidence"])
    # As good as even over the vocabulary: random weights.
    vocabulary = hf.load_tokenizer(ASSETS).n_vocab
    assert first["by-entropy"]["token_weight"] == pytest.approx(torch.tensor(vocabulary).log().item() / 4, rel=0.02)
    assert not list(folder.rglob("__pycache__"))


def test_without_the_flag_they_are_unknown(folder, monkeypatch, capsys):
    for flags in ([], ["--variant", "mine.py"]):
        assert call(monkeypatch, *ARGV, "--out", "run", "--objective", "power-2", *flags) == 2
        error = capsys.readouterr().err
        assert "'power-2'" in error and error.count("\n") == 1 and ("'surprise'" in error) == bool(flags)


def test_help_names_the_rows_of_the_files(folder, monkeypatch, capsys):
    assert call(monkeypatch, "--variant", "mine.py", "--help") == 0
    assert "surprise" in capsys.readouterr().out


def test_a_run_has_the_digest_of_its_own_file_and_no_other(folder, monkeypatch, capsys):
    argv = [*ARGV, "--objective", "surprise", "sft", "power-2", "--variant"]
    assert call(monkeypatch, *argv, "mine.py", POWER, "--out", "a") == 0
    configs = {name: json.loads((folder / "a" / name / "config.json").read_text()) for name in ("surprise", "sft", "power-2")}
    for name, path in (("surprise", folder / "mine.py"), ("power-2", POWER)):
        assert configs[name]["sha256"]["variant"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert configs["surprise"]["settings"]["variant"] == ["mine.py"] and configs["power-2"]["settings"]["variant"] == [str(POWER)]
    assert "variant" not in configs["sft"]["sha256"] and configs["sft"]["settings"]["variant"] == []
    capsys.readouterr()

    # The same files under other names, in another order, and one more: the same runs.
    (folder / "elsewhere").mkdir()
    (folder / "mine.py").rename(folder / "elsewhere" / "ours.py")
    (folder / "p.py").write_bytes(POWER.read_bytes())
    (folder / "more.py").write_text(MINE.replace('"surprise"', '"more"').replace("by-entropy", "still-more"))
    forget_variants()
    assert call(monkeypatch, *argv, "p.py", "more.py", "elsewhere/ours.py", "--out", "a") == 0
    assert capsys.readouterr().out.count("finished, 2 steps; nothing to do") == 3

    # A changed one is another run, for its own row alone.
    (folder / "elsewhere" / "ours.py").write_text(MINE.replace("1 - tokens", "2 - tokens"))
    forget_variants()
    assert call(monkeypatch, *argv, "p.py", "elsewhere/ours.py", "--out", "a") == 2
    error = capsys.readouterr().err
    assert "surprise holds another run (another content of variant)" in error and error.count("\n") == 1
    forget_variants()
    assert call(monkeypatch, *argv[:-5], "--objective", "sft", "power-2", "--variant", "p.py", "elsewhere/ours.py", "--out", "a") == 0
    assert capsys.readouterr().out.count("nothing to do") == 2
    forget_variants()
    assert call(monkeypatch, *argv, "p.py", "elsewhere/ours.py", "--out", "a", "--no-resume") == 0
    assert metrics(folder / "a" / "surprise")[0]["token_weight"] > 1      # what runs is what was written last


def test_a_file_is_read_once_however_it_is_spelt(folder):
    (folder / "link.py").symlink_to("mine.py")
    variants.load_variants(["mine.py", "./mine.py", str(folder / "mine.py"), "link.py"])
    variants.load_variants(["mine.py"])
    assert set(variants.FILES) == {"surprise", "by-entropy"} and set(variants.FILES.values()) == {"mine.py"}
    assert variants.variant_of("surprise") == ("mine.py",) and variants.variant_of("sft") == ()


ADDS = 'import bft\nbft.OBJECTIVES["a"] = '
ONES = "bft.every_token_1, bft.every_sample_1"
MISTAKES = {
    "no file": (None, "--variant case.py: expected a Python file, NAME.py"),
    "syntax": ("import bft\n\nif bft\n", "--variant case.py, line 3: SyntaxError: expected ':'"),
    "not text": (b"import bft\n\xff\xfe\n", "--variant case.py"),
    "zeros": (b"\0\0\0\0", "source code string cannot contain null bytes"),
    "exception": ("import bft\n\n\ndef f():\n    return 1 / 0\n\n\nf()\n", "--variant case.py, line 5: ZeroDivisionError: division by zero"),
    "exception elsewhere": ("import json\n\njson.loads('x')\n", "--variant case.py, line 3: JSONDecodeError: "),
    "syntax elsewhere": ("import ast\n\nast.parse('(')\n", "--variant case.py, line 3: SyntaxError: "),
    "no such module": ("import no_such_module\n", "--variant case.py, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    "it leaves": ("import sys\nsys.exit(0)\n", "--variant case.py, line 2: SystemExit: 0"),
    "no rows": ("import bft\n", "--variant case.py adds no row to bft.OBJECTIVES; expected one or several"),
    "empty": ("", "adds no row"),
    "changed": (f'{ADDS}bft.Objective({ONES}, "tokens")\nbft.OBJECTIVES["bft"] = bft.OBJECTIVES["sft"]\n',
                "--variant case.py changes 'bft'; expected other names"),
    "deleted": ('import bft\ndel bft.OBJECTIVES["dft"]\n', "--variant case.py changes 'dft'; expected other names"),
    "another meaning": (f'{ADDS}bft.Objective({ONES}, "tokens")\nbft.DISTRIBUTION["entropy"] = bft.collision\n', "changes 'entropy'; expected other names"),
    "a need that is not named": ('import bft\n\n\ndef f(tokens):\n    return tokens.extra["entropy"]\n\n\n'
                                 'bft.OBJECTIVES["a"] = bft.Objective(f, bft.every_sample_1, "tokens")\n',
                                 "--variant case.py, line 5: 'a' of six tokens: KeyError: 'entropy'"),
    "a column": ('import bft\nbft.OBJECTIVES["a"] = bft.Objective(lambda tokens: tokens.logp[:, None], bft.every_sample_1, "tokens")\n',
                 "'a' of six tokens: ValueError: the weights of 'a' must be (N,) and (S,), ((6,), (2,)); they are ((6, 1), (2,))"),
    "a weight for each token": ('import bft\nbft.OBJECTIVES["a"] = bft.Objective(bft.every_token_1, bft.every_token_1, "tokens")\n', "they are ((6,), (6,))"),
    "no Objective": (f"{ADDS}lambda tokens: tokens.logp\n", "--variant case.py: 'a' is <function <lambda> at "),
    "a tuple": (f'{ADDS}({ONES}, "tokens", ())\n', "expected bft.Objective(token_weight, sample_weight, 'tokens' or 'samples', needs)"),
    "no average": (f'{ADDS}bft.Objective({ONES}, "token")\n', "average='token', needs=()); expected bft.Objective("),
    "no function": (f'{ADDS}bft.Objective(1, bft.every_sample_1, "tokens")\n', "--variant case.py: 'a' is Objective(token_weight=1, "),
    "needs": (f'{ADDS}bft.Objective({ONES}, "tokens", ("entropie",))\n',
              "--variant case.py: 'a' needs 'entropie'; expected some of entropy, collision, top20_entropy, ref_logp"),
    "needs None": (f'{ADDS}bft.Objective({ONES}, "tokens", None)\n', "needs=None); expected bft.Objective("),
    "needs no tuple": (f'{ADDS}bft.Objective({ONES}, "tokens", ("entropy"))\n', "needs='entropy'); expected bft.Objective("),
    "a name that is a path": (f'import bft\nbft.OBJECTIVES["../a"] = bft.Objective({ONES}, "tokens")\n',
                              "--variant case.py: a row is called '../a'; expected letters, digits, '-', '_' and '.'"),
    "a name that is none": (f'import bft\nbft.OBJECTIVES[3] = bft.Objective({ONES}, "tokens")\n', "a row is called 3; expected letters"),
}


def test_a_file_may_add_a_quantity_of_the_distribution(folder, monkeypatch, capsys):
    """Of every path that has logits."""
    (folder / "relative.py").write_text("""import math

import bft


def relative_entropy(log_p):
    return bft.entropy(log_p) / math.log(log_p.shape[-1])


bft.DISTRIBUTION["relative_entropy"] = relative_entropy
bft.OBJECTIVES["relative"] = bft.Objective(lambda tokens: tokens.extra["relative_entropy"], bft.every_sample_1, "tokens",
                                           needs=("relative_entropy",))
""")
    assert call(monkeypatch, *ARGV, "--out", "run", "--variant", "relative.py", "--objective", "relative") == 0
    assert metrics(folder / "run")[0]["token_weight"] == pytest.approx(1, rel=0.02)   # random weights
    variants.load_variants(["relative.py"])
    logits, labels = torch.zeros(1, 5, 7), torch.tensor([[-100, 1, 2, 3, 4]])
    assert bft.loss_from_logits(logits, labels, "relative").item() == pytest.approx(math.log(7))
    assert "relative_entropy" in bft.worked_example(["relative"])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_file_is_one_sentence(mistake, folder, monkeypatch, capsys):
    content, words = MISTAKES[mistake]
    if content is not None:
        (folder / "case.py").write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(folder.rglob("*"))
    assert call(monkeypatch, *ARGV, "--out", "run", "--variant", "mine.py", "case.py") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("error: --variant case.py"), error
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("flags, words", [
    (["--variant"], "argument --variant: expected at least one argument"),
    (["--variant", "--objective", "sft"], "argument --variant: expected at least one argument"),
    (["--variant", "data.jsonl"], "--variant data.jsonl: expected a Python file, NAME.py"),
    (["--variant", "."], "--variant .: expected a Python file, NAME.py"),
    (["--variant", "folder.py"], "--variant folder.py: expected a Python file, NAME.py"),
    (["--variant", "mine.py", "twice.py"], "--variant twice.py changes 'surprise'; expected other names")])
def test_a_mistake_in_the_flag_is_one_sentence(flags, words, folder, monkeypatch, capsys):
    (folder / "folder.py").mkdir()
    (folder / "twice.py").write_text(MINE)
    before = sorted(folder.rglob("*"))
    assert call(monkeypatch, *ARGV, "--out", "run", *flags) == 2
    error = capsys.readouterr().err
    assert error == f"error: {words}\n" or error.startswith(f"error: {words}, which")
    assert sorted(folder.rglob("*")) == before


def test_the_settings_have_them(folder):
    settings, grid = train.parse_settings(["--variant", "mine.py", str(POWER), "--data", "x", "--objective", "surprise"])
    assert settings.variant == ("mine.py", str(POWER)) and settings.objective == ("surprise",) and grid is None
    assert train.parse_settings(["--data", "x"])[0].variant == ()
    with pytest.raises(UserError, match="power-3"):
        train.parse_settings(["--variant", str(POWER), "--objective", "power-3"])


def test_the_pages_of_inspect_show_them(folder, monkeypatch, capsys):
    """Those of the evaluation's files, with what they need; of the starting model, since there is no other."""
    import eval as evaluation
    from runtime.process import run
    save_with_tokenizer(tiny(std=0.5, vocab_size=hf.load_tokenizer(ASSETS).n_vocab, max_position_embeddings=512), folder / "model")

    def look(*flags):
        monkeypatch.setattr(sys, "argv", ["eval.py", "model", "--data", "data.jsonl", "--out", "r.json", *map(str, flags)])
        with pytest.raises(SystemExit) as exit:
            run(evaluation.main)
        return exit.value.code, capsys.readouterr().err

    files = [ROOT / "variants" / name for name in ("eaft.py", "iw_sft.py", "asft.py", "deft.py")]
    assert look("--tasks", "inspect", "--lines", 3, "--variant", "mine.py", *files) == (0, "")
    item, = json.loads((folder / "r.json").read_text())["tasks"][0]["items"]["model"]
    assert list(item["weights"]) == list(bft.OBJECTIVES) and {"surprise", "by-entropy", "eaft", "iw-sft", "asft", "deft"} < set(bft.OBJECTIVES)
    sample = hf.load_model(folder / "model"), [s for s in samples_of(folder) if s.line == 3][0]
    with torch.no_grad():
        full = sample[0](torch.from_numpy(sample[1].ids)[None])[0].double().log_softmax(-1)   # (T, V)
    at = torch.from_numpy(sample[1].response).nonzero()[:, 0] - 1
    full, p = full[at].exp(), torch.tensor(item["p"])
    top = full.topk(20).values
    top = top / top.sum(-1, keepdim=True)
    expected = {"surprise": 1 - p, "by-entropy": -(full * full.log()).sum(-1) / 4, "eaft": -(top * top.log()).sum(-1) / 3, "iw-sft": p ** 0,
                "asft": p, "deft": p ** full.square().sum(-1)}
    for name, weights in expected.items():
        assert item["weights"][name]["w"] == pytest.approx(weights.tolist(), rel=1e-4, abs=1e-6), name
        assert item["weights"][name]["s"] == pytest.approx(1)
    numbers = json.loads(re.search(r"const data = (.*), stops", (folder / "r.html").read_text())[1])
    assert list(numbers[0]["w"]) == list(bft.OBJECTIVES)
    assert look("--tasks", "nll", "--variant", "mine.py") == (2, "error: --variant is of inspect alone; expected that in --tasks\n")
    code, error = look("--tasks", "inspect", "--variant", "nowhere.py")
    assert code == 2 and error == "error: --variant nowhere.py: expected a Python file, NAME.py\n"


def samples_of(folder):
    from data import load_samples
    return load_samples(folder / "data.jsonl", hf.load_tokenizer(ASSETS))[0]


@pytest.mark.slow
def test_each_file_prints_its_worked_example(folder):
    """Together in a process, as `python -m variants.NAME` would each."""
    names = sorted(path.stem for path in (ROOT / "variants").glob("*.py") if path.stem != "__init__")
    code = "import runpy\n" + "".join(f"print('=== {name}')\nrunpy.run_module('variants.{name}', run_name='__main__')\n" for name in names)
    options = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    printed = subprocess.run([sys.executable, "-c", code], **options).stdout
    variants.load_variants([str(ROOT / "variants" / f"{name}.py") for name in names])
    for name, output in zip(names, re.split("^=== .*\n", printed, flags=re.M)[1:], strict=True):
        rows = [row for row, file in variants.FILES.items() if file.endswith(f"/{name}.py")]
        assert re.findall(r"^(\S+): loss -?\d+\.\d{4} = ", output, re.M) == rows
        assert output == bft.worked_example(rows) + "\n"
    one = subprocess.run([sys.executable, "-m", "variants.iw_sft"], **options).stdout
    assert one == bft.worked_example(["iw-sft"]) + "\n"
