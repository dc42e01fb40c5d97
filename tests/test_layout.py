"""The layout of the project, read from the source: imports point one way, and need no more than four packages."""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from support import ROOT


REFERENCE = {"bft", "model", "data", "train", "eval"}
WORKSHOP = {"hf", "runtime", "tasks", "experiment", "variants"}

# What each of them may import of ours. Within a folder imports are free.
ARROWS = {
    "train": {"data", "model", "bft", "runtime", "hf", "experiment", "tasks", "variants"},
    "eval": {"tasks", "hf", "data", "model", "runtime", "experiment"},
    "tasks": {"data", "model", "bft", "hf", "runtime", "variants"},
    "experiment": {"runtime", "tasks", "data", "model", "bft", "hf", "variants"},
    "variants": {"bft", "runtime"},
    "data": {"hf", "runtime"},
    "hf": {"model", "runtime"},
    "runtime": set(),
    "model": set(),
    "bft": set(),
}

# tiktoken brings regex, torch brings jinja2.
REQUIRED = {"torch", "numpy", "tiktoken", "regex", "jinja2"}
# Packages of pyproject.toml's extras, and what these bring: imported in the function that uses them.
EXTRAS = {"huggingface_hub", "matplotlib", "rouge_score", "sklearn", "sentence_transformers", "transformers",
          "tokenizers", "pyarrow", "tensorboard", "wandb"}


class Import(NamedTuple):
    package: str                     # the first part of its name
    lazy: bool                       # in a function
    line: int


def source_files(*folders):
    """The Python files of the top level and of these folders."""
    return sorted([*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))])


def unit_of(path):
    """The module or folder that a file belongs to."""
    return Path(path.relative_to(ROOT).parts[0]).stem


def imports(source):
    """Every Import of a source, in functions too."""
    found = []

    def walk(node, lazy):
        lazy = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "." * node.level]
        found.extend(Import(name.split(".")[0], lazy, node.lineno) for name in names)
        for child in ast.iter_child_nodes(node):
            walk(child, lazy)

    walk(ast.parse(source), False)
    return found


def wrong_arrows(unit, source):
    """The imports of a unit's source that point where they must not."""
    allowed = ARROWS[unit] | {unit}
    return [found for found in imports(source) if found.package in REFERENCE | WORKSHOP and found.package not in allowed]


def unexpected_packages(source, local=()):
    """The imports of a source that four packages do not bring. local: modules beside it."""
    expected = REQUIRED | REFERENCE | WORKSHOP | sys.stdlib_module_names | set(local)
    return [found for found in imports(source)
            if found.package not in expected and not (found.lazy and found.package in EXTRAS)]


def risky_lines(source):
    """What must not be in a source: pickles, torch's among them, and shells."""
    lines = [found.line for found in imports(source) if found.package in ("pickle", "dill", "cloudpickle", "shelve")]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if keywords.get("shell", "False") != "False":
            lines.append(node.lineno)
        if ast.unparse(node.func) in ("torch.load", "torch.save", "eval", "exec", "os.system", "os.popen"):
            lines.append(node.lineno)
    return lines


def lines_in_an_encoding_of_the_locale(source):
    """Where text is read or written, and nothing says as what."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if "encoding" in keywords:
            continue
        function = ast.unparse(node.func).split(".")[-1]
        mode = keywords.get("mode", "")
        if len(node.args) > 1:
            mode = ast.unparse(node.args[1])
        opens_text = ast.unparse(node.func) == "open" and "b" not in mode
        if function in ("read_text", "write_text", "TextIOWrapper") or opens_text or keywords.get("text") == "True":
            lines.append(node.lineno)
    return lines


# ---------------------------------------------------------------------------------------------------------------------

def test_the_top_level_is_the_reference():
    assert {path.stem for path in ROOT.glob("*.py")} == REFERENCE
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert folders == WORKSHOP | {"prepare", "bench", "tests"}


@pytest.mark.parametrize("unit", ARROWS)
def test_imports_point_one_way(unit):
    files = [path for path in source_files(*WORKSHOP) if unit_of(path) == unit]
    assert files
    for path in files:
        assert wrong_arrows(unit, path.read_text(encoding="utf-8")) == [], path


def test_the_arrows_have_no_circle():
    placed = set()
    while placed < ARROWS.keys():
        next_ones = {unit for unit, below in ARROWS.items() if unit not in placed and below <= placed}
        assert next_ones, ARROWS.keys() - placed
        placed |= next_ones


def test_four_packages_are_enough():
    for path in source_files(*WORKSHOP, "prepare"):
        beside = [other.stem for other in path.parent.glob("*.py")] if unit_of(path) == "prepare" else []
        assert unexpected_packages(path.read_text(encoding="utf-8"), beside) == [], path


def test_the_objectives_and_the_model_need_torch_alone():
    for name in ("bft", "model"):
        packages = {found.package for found in imports((ROOT / f"{name}.py").read_text(encoding="utf-8"))}
        assert packages - sys.stdlib_module_names == {"torch"}


def test_tests_need_four_packages_until_they_run():
    files = [path for path in (ROOT / "tests").rglob("*.py") if path.name != "fuzz.py"]   # a process of its own
    beside = {path.stem for path in [*files, *(ROOT / "prepare").glob("*.py")]}
    expected = REQUIRED | REFERENCE | WORKSHOP | sys.stdlib_module_names | beside | {"pytest"}
    for path in files:
        at_once = [found for found in imports(path.read_text(encoding="utf-8")) if not found.lazy]
        assert [found for found in at_once if found.package not in expected] == [], path


def test_nothing_that_windows_lacks_is_imported_at_once():
    for path in source_files(*WORKSHOP, "prepare"):
        at_once = {found.package for found in imports(path.read_text(encoding="utf-8")) if not found.lazy}
        assert not at_once & {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog"}, path


def test_nothing_runs_what_others_wrote():
    for path in source_files(*WORKSHOP, "prepare"):
        text = path.read_text(encoding="utf-8")
        if path == ROOT / "variants" / "__init__.py":
            # A file of --variant, which is the user's own.
            text = text.replace('exec(compile(Path(path).read_bytes(), path, "exec"), vars(module))', "pass")
        assert risky_lines(text) == [], path


def test_no_text_is_read_or_written_in_the_encoding_of_the_locale():
    for path in source_files(*WORKSHOP, "prepare"):
        assert lines_in_an_encoding_of_the_locale(path.read_text(encoding="utf-8")) == [], path


@pytest.mark.parametrize("check, source", [
    (lambda source: wrong_arrows("data", source), "from train import Settings"),
    (lambda source: wrong_arrows("experiment", source), "def f():\n    import train"),
    (lambda source: wrong_arrows("runtime", source), "import hf.config"),
    (unexpected_packages, "import transformers"),
    (unexpected_packages, "def f():\n    import pandas"),
    (unexpected_packages, "class A:\n    import sklearn"),
    (risky_lines, "import pickle"),
    (risky_lines, "torch.load(path)"),
    (risky_lines, "torch.load(path, weights_only=True)"),
    (risky_lines, "torch.save(model.state_dict(), path)"),
    (risky_lines, "subprocess.run(words, shell=True)"),
    (risky_lines, "eval(text)"),
    (lines_in_an_encoding_of_the_locale, "path.read_text()"),
    (lines_in_an_encoding_of_the_locale, "(out / name).write_text(text)"),
    (lines_in_an_encoding_of_the_locale, "open(path)"),
    (lines_in_an_encoding_of_the_locale, "open(path, 'a')"),
    (lines_in_an_encoding_of_the_locale, "subprocess.run(words, text=True)"),
])
def test_what_is_wrong_is_found(check, source):
    assert len(check(source)) == 1


@pytest.mark.parametrize("check, source", [
    (lambda source: wrong_arrows("tasks", source), "from tasks.items import load_items\nimport bft"),
    (unexpected_packages, "def f():\n    from sklearn.linear_model import LogisticRegression"),
    (risky_lines, "load_safetensors(path)\nmodel.eval()"),
    (lines_in_an_encoding_of_the_locale, "open(path, 'rb')\nopen(path, 'w', encoding='utf-8')\npath.read_text(encoding='utf-8')"),
])
def test_what_is_right_is_not(check, source):
    assert check(source) == []
