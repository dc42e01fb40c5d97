"""What README and docs/ say is so: what they name exists, commands parse, examples run and print what they show.

A page may say something to this test in a comment on the line before a block of code:

    <!-- not run: why -->          its syntax and its names are checked, it is not run
    <!-- given: x = 1 -->          runs this first; several statements are set apart by semicolons
"""

import argparse
import ast
import builtins
import contextlib
import functools
import importlib
import io
import re
import runpy
import shlex
import signal
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest
from support import ROOT

import bft
from variants import load_variants


PAGES = ["README.md", "CONTRIBUTING.md", "bench/RESULTS.md",
         *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
MODULES = ("bft", "data", "eval", "model", "train", "hf", "runtime", "tasks", "experiment", "variants")

# Flags of other people's programs.
FOREIGN_FLAGS = {
    "torchrun": {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--max_restarts", "--standalone",
                 "--shutdown-timeout"},
    "pip": {"--user", "-r", "-e", "-q", "-U"},
    "pytest": {"--durations", "--dist", "-n", "-m", "-q", "-k", "-x", "-rs", "-p"},
    "git": {"--depth", "-C"},
    "ruff": {"--fix"},
    "sbatch": {"--signal"},
}
# Paths that are none of the repository's: what runs write, what models and users have, and placeholders.
OTHER_PATHS = re.compile(r"""
    runs/.* | .*\.unfinished\.json | (config|results|look|choice|state|generation_config)\.json | metrics\.jsonl
    | table\.txt | checkpoint/.* | model/.* | adapter/ | tensorboard/ | wandb/ | seed-S/.* | demo-\*\.png | look(-curves|-2)?\.(png|html)
    | .*\b[A-Z]{3,}\b.*                                    # FILE.jsonl, DIR/..., tasks/NAME.py
    | tokenizer(_config)?\.json | chat_template\.jinja | (model|pytorch_model)[\w*.-]*\.(safetensors|bin)
    | (HuggingFaceTB|openai-community|deepseek-ai)/[\w.-]+ | Datasets/.* | BP_terms_All\.csv | trainer_utils\.py
    """, re.X)
EXTENSIONS = (".py", ".md", ".json", ".jsonl", ".txt", ".png", ".html", ".cff", ".toml", ".yml", ".csv", ".pt", ".sh")
# Names of other people's code.
FOREIGN_NAMES = {"bft_loss_func", "dft_loss_func", "apply_chat_template", "num_items_in_batch", "compute_loss_func",
                 "average_tokens_across_devices", "padding_free", "eval_loss", "fully_shard", "state_dict", "GLOO_SOCKET_IFNAME"}


class Block(NamedTuple):
    language: str
    code: str
    comment: str                     # what stands before it for this test


class Page(NamedTuple):
    path: Path
    prose: str                       # without blocks of code
    blocks: list

    def spans(self):
        """What stands in backquotes."""
        for paragraph in re.split(r"\n\s*\n|\n(?=\|)", self.prose):
            for span in re.findall(r"`([^`]+)`", paragraph):
                yield " ".join(span.split()).replace("\\|", "|")


FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```$", re.M | re.S)
BEFORE_FENCE = re.compile(r"(?:<!--(.*?)-->\s*\n)?\Z", re.S)


def read_page(path):
    text = path.read_text(encoding="utf-8")
    blocks = []
    for match in FENCE.finditer(text):
        comment = BEFORE_FENCE.search(text[:match.start()])[1] or ""
        blocks.append(Block(match[1], match[2], comment.strip()))
    return Page(path, FENCE.sub("", text), blocks)


@pytest.fixture(params=PAGES)
def page(request):
    return read_page(ROOT / request.param)


# ---------------------------------------------------------------------------------------------------------------------
# Links

def broken_links(page):
    """The links of a page that lead nowhere."""
    without_code = re.sub(r"`[^`\n]*`", "code", page.prose)
    targets = re.findall(r"\]\(<?([^)\s>]+)>?\)", without_code)
    targets += re.findall(r"""(?:src|href)=["']([^"']+)""", without_code)
    return [target for target in targets if not leads_somewhere(target, page)]


def leads_somewhere(target, page):
    if re.match(r"https?://|mailto:", target):
        return True
    path, _, fragment = unquote(target).partition("#")
    file = (page.path.parent / path).resolve() if path else page.path
    if not file.exists():
        return False
    return not fragment or (file.suffix == ".md" and fragment in anchors(read_page(file)))


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    names = []
    for heading in re.findall(r"^#+ +(.*?) *#*$", page.prose, re.M):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")
        earlier = names.count(name)
        names.append(f"{name}-{earlier}" if earlier else name)
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Commands and flags

class Captured(Exception):
    """Carries a script's parser."""


@functools.cache
def parser_of(script):
    """The parser that a script is about to parse its arguments with; an empty one where it takes none."""
    def capture(parser, *_):
        raise Captured(parser)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(argparse.ArgumentParser, "parse_args", capture)
        patch.setattr(sys, "argv", [script])
        try:
            run_script(script, patch)
        except Captured as captured:
            return captured.args[0]
    return argparse.ArgumentParser()


def run_script(script, patch):
    """Runs a script of ours in this process, as `python script` would."""
    handler = signal.getsignal(signal.SIGTERM)
    patch.setattr(sys, "path", [str(ROOT / Path(script).parent), *sys.path])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, handler)


def flags_in_source(script):
    """The flags that a script's source spells (those of tests/ may need libraries that are not here)."""
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return {value for value in constants if isinstance(value, str) and re.fullmatch(r"--?[a-z][\w-]*", value)}


@functools.cache
def known_flags():
    """Every flag of every program that a page may speak of."""
    flags = set().union(*FOREIGN_FLAGS.values())
    for script in ("train.py", "eval.py", "data.py"):
        flags |= parser_of(script)._option_string_actions.keys()
    for path in python_files():
        script = path.relative_to(ROOT)
        if script.parts[0] in ("prepare", "bench", "tests") and "add_argument" in path.read_text(encoding="utf-8"):
            flags |= flags_in_source(script)
    return flags


def commands(page):
    """The simple commands of a page's blocks, as lists of words."""
    for block in page.blocks:
        if block.language in ("sh", "bash", "shell", "console"):
            for line in block.code.replace("\\\n", " ").splitlines():
                yield from simple_commands(line.removeprefix("$ "))
        if block.language == "text":
            for line in block.code.splitlines():
                if line.startswith("$ "):
                    yield from simple_commands(line.removeprefix("$ "))
    for span in page.spans():
        if re.match(r"(\w+=\S+ )*(python|torchrun|pip|pytest|git|ruff) ", span):
            yield from simple_commands(span)


def simple_commands(line):
    """The commands of a line of a shell, without the words of loops and the settings of variables."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    command = []
    for word in [*lexer, ";"]:
        if set(word) <= set("();<>|&"):
            if command and command[0] not in ("for", "done", "export", "cd"):
                yield command
            command = []
        elif command or not (word in ("do", "srun") or re.match(r"\w+=", word)):
            command.append(word)


def script_of(command):
    """(script, its arguments) where a command runs one of ours, else None."""
    if command[0] not in ("python", "python3", "torchrun"):
        return None
    for place, word in enumerate(command[1:], 1):
        if word in ("-m", "-c"):
            return None
        if word.endswith(".py"):
            return word, command[place + 1:]
    return None


def wrong_commands(page):
    """What is wrong with the commands of a page, one phrase each."""
    return [f"{' '.join(command)}: {words}" for command in commands(page) if (words := what_is_wrong(command))]


def what_is_wrong(command):
    """What is wrong with a command; None if nothing is."""
    if command[:2] == ["python", "-m"] and command[2].startswith("experiment."):
        command = ["python", command[2].replace(".", "/") + ".py", *command[3:]]
    program = "pytest" if command[:3] == ["python", "-m", "pytest"] else command[0]
    script, arguments = script_of(command) or (None, [])
    if script and not (ROOT / script).is_file():
        return f"there is no {script}"
    before = command[1:command.index(script)] if script else command[1:]
    for word in before:
        flag = word.split("=")[0]
        if flag.startswith("--") and flag not in FOREIGN_FLAGS.get(program, ()):
            return f"{program} has no {flag}"
    if command[:2] == ["python", "-m"] and command[2].startswith("variants."):
        return None if is_variant(command[2].replace(".", "/") + ".py") else f"there is no {command[2]}"
    if not script:
        return None
    if script.startswith("tests/"):
        unknown = [word for word in arguments if word.startswith("--") and word not in flags_in_source(script)]
        return f"no flag {unknown[0]}" if unknown else None
    return what_is_wrong_with_arguments(parser_of(script), arguments)


def what_is_wrong_with_arguments(parser, arguments):
    unknown = [word for word in arguments if re.match("--?[a-z]", word)
               and word.split("=")[0] not in parser._option_string_actions]
    if unknown:
        return f"no flag {unknown[0]}"
    # Where something is left out, or for the reader to choose, there is no more to say.
    if {"...", "--help"} & {*arguments} or placeholders() & {*arguments}:
        return None
    arguments = ["0" if word.startswith("$") else word for word in arguments]
    # Whose rows --objective may name.
    load_variants([str(path) for word in arguments if word.startswith("variants/") for path in ROOT.glob(word)])
    try:
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            parser.parse_args(arguments)
    except (Exception, SystemExit) as e:
        return f"{e} {errors.getvalue()}"
    return None


def is_variant(word):
    return word.startswith("variants/") and (ROOT / word).is_file()


@functools.cache
def placeholders():
    """What stands for an objective of the reader's, or is one that a page adds to the table."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in PAGES if (ROOT / name).is_file()]
    return {"YOURS", "NAME", *(name for text in texts for name in re.findall(r"""OBJECTIVES\[["'](.+?)["']\] = """, text))}


# ---------------------------------------------------------------------------------------------------------------------
# Names in backquotes

@functools.cache
def names_of_the_sources():
    """Every word of the project's Python files."""
    words = set(FOREIGN_NAMES)
    for path in python_files():
        words.update(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    return words


def python_files():
    """The project's Python files, but for this one, whose lists are no proof of anything."""
    folders = [ROOT / name for name in ("hf", "runtime", "tasks", "experiment", "variants", "prepare", "bench", "tests")]
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    return [path for path in files if path != Path(__file__)]


def wrong_names(page):
    """The flags, paths, functions and names in a page's backquotes that do not exist."""
    flags, words = known_flags(), names_of_the_sources()
    wrong = []
    for span in page.spans():
        for word in span.split():
            if re.match(r"--[a-z]", word) and re.split("[=,]", word)[0] not in flags:
                wrong.append(f"flag {word}")
        if " " not in span and not span.startswith("-"):
            wrong += [f"{kind} {span}" for kind in wrong_name(span, page, words)]
    return wrong


def wrong_name(span, page, words):
    """[which kind of name does not exist], for what stands in backquotes; [] if it does, or is no name."""
    if is_path(span):
        return [] if path_exists(span, page) else ["path"]
    name = re.fullmatch(r"([A-Za-z_][\w.]*)(\(.*\))?", span)
    if not name:
        return []
    first, *rest = name[1].split(".")
    if first in MODULES and rest:
        return [] if dotted_name_exists(name[1]) else ["function"]
    if re.fullmatch(r"test_\w+", span):
        return [] if any(f"def {span}(" in path.read_text(encoding="utf-8") for path in python_files()) else ["test"]
    is_identifier = "_" in first or name[2] or re.search("[a-z][A-Z]|[A-Z][A-Z]+[a-z]|^[A-Z][a-z]+[A-Z]", first)
    last = (rest or [first])[-1]
    return ["name"] if is_identifier and last not in words and not hasattr(builtins, last) else []


def is_path(span):
    return bool(re.fullmatch(r"[\w.*-]+(/[\w.*-]*)*(::\w+)?", span)) and (
        "/" in span and not re.fullmatch(r"\w+/\w", span) or span.split("::")[0].endswith(EXTENSIONS))


def path_exists(span, page):
    path, _, test = span.partition("::")
    for folder in (ROOT, page.path.parent):
        found = [file for file in folder.glob(path.rstrip("/")) if not path.endswith("/") or file.is_dir()]
        if found:
            return not test or f"def {test}(" in found[0].read_text(encoding="utf-8")
    if test:
        return False
    if "/" not in path and any(file.name == path for file in python_files()):
        return True
    return bool(OTHER_PATHS.fullmatch(path))


def dotted_name_exists(name):
    """Whether module.function, module.Class.field or package.module is one of ours."""
    parts = name.split(".")
    found = importlib.import_module(parts[0])
    for place, part in enumerate(parts[1:], 2):
        if part in getattr(found, "__annotations__", ()) or part in getattr(found, "__dataclass_fields__", ()):
            return place == len(parts)
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(parts[:place]))
            except ImportError:
                return False
        found = getattr(found, part)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Examples in Python

def wrong_examples(page):
    """What is wrong with a page's blocks of Python: they run from top to bottom, as if somebody typed them."""
    scope = {"__name__": "example"}
    wrong = []
    for block in page.blocks:
        if block.language != "python":
            continue
        tree = ast.parse(block.code)
        if block.comment.startswith("not run") or "class BFTTrainer" in block.code:   # which test_trainer.py runs
            continue
        if block.comment.startswith("given:"):
            exec(block.comment.removeprefix("given:").replace("; ", "\n").strip(), scope)
        wrong += wrong_lines(tree, block.code.splitlines(), scope)
    return wrong


def wrong_lines(tree, lines, scope):
    """Runs the statements of a block. What one prints must be what the comment behind it, or below it, begins with."""
    wrong = []
    for statement in tree.body:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(ast.Module([statement], []), "example", "exec"), scope)
        printed = output.getvalue().splitlines()
        shown = shown_output(statement, lines)
        if not printed or not shown:
            continue
        if len(printed) > len(shown):
            wrong.append(f"prints {len(printed)} lines, and not {len(shown)}")
        for is_printed, is_shown in zip(printed, shown):
            rest = is_shown.removeprefix(is_printed)
            if not is_shown.startswith(is_printed) or re.match(r"[\w.]", rest):
                wrong.append(f"prints {is_printed}, and not {is_shown}")
    return wrong


def shown_output(statement, lines):
    """The comment behind a statement, or the lines of comments below it."""
    last = lines[statement.end_lineno - 1][statement.end_col_offset:]
    if last.strip().startswith("#"):
        return [last.strip().removeprefix("#").strip()]
    shown = []
    for line in lines[statement.end_lineno:]:
        if not line.startswith("# "):
            break
        shown.append(line.removeprefix("# "))
    return shown


# ---------------------------------------------------------------------------------------------------------------------
# Examples in a shell

def commands_to_run(page):
    """Commands that need the repository alone, and a moment."""
    for command in commands(page):
        script, arguments = script_of(command) or (None, [])
        if script == "bft.py" or (script == "data.py" and (ROOT / arguments[0]).is_file()):
            yield script, arguments


# ---------------------------------------------------------------------------------------------------------------------

def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_commands_are_understood(page):
    assert wrong_commands(page) == []


def test_what_is_named_exists(page):
    assert wrong_names(page) == []


def test_examples_in_python_print_what_they_show(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bft, "OBJECTIVES", dict(bft.OBJECTIVES))          # to which examples may add
    assert wrong_examples(page) == []


def test_examples_in_a_shell_run(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for script, arguments in commands_to_run(page):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        try:
            run_script(script, monkeypatch)
            code = 0
        except SystemExit as e:
            code = e.code or 0
        assert code == 0 and capsys.readouterr().out


def test_every_page_of_docs_is_reached_from_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in PAGES:
        if name.startswith("docs/"):
            assert f"({name}" in readme, name


def test_the_sizes_of_the_file_map_are_about_right():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"\[([\w./]+)\]\([^)]*\) \| ([\d,]+) \|", readme)
    assert len(rows) >= 5
    for name, size in rows:
        files = [ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py")
        lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        assert lines == pytest.approx(int(size.replace(",", "")), rel=0.15), name


@pytest.mark.parametrize("text, check, words", [
    ("[a](nowhere.md)", broken_links, "nowhere.md"),
    ("[a](README.md#no-such-heading)", broken_links, "no-such-heading"),
    ("# A `b`: c\n\n[a](#a-b-d)", broken_links, "#a-b-d"),
    ("```sh\npython train.py --no-such-flag\n```", wrong_commands, "--no-such-flag"),
    ("```sh\npython train.py --seed x\n```", wrong_commands, "--seed"),
    ("```sh\nfor s in 0 1; do python eval.py runs/$s --tasks nlll --data F; done\n```", wrong_commands, "nlll"),
    ("```sh\npython train.py --objective power-2\n```", wrong_commands, "power-2"),
    ("```sh\npython train.py --variant variants/power.py --objective power-3\n```", wrong_commands, "power-3"),
    ("`python -m variants.no_such_file`", wrong_commands, "no_such_file"),
    ("```sh\ntorchrun --nproc=8 train.py ...\n```", wrong_commands, "--nproc"),
    ("`PYTHONPATH=. python tests/no_such.py 20`", wrong_commands, "no_such.py"),
    ("`--no-such-flag`", wrong_names, "--no-such-flag"),
    ("`train.no_such_function`", wrong_names, "no_such_function"),
    ("`hf.no_such_module.load`", wrong_names, "no_such_module"),
    ("`" + "segment_summ" + "`", wrong_names, "segment_summ"),
    ("`tasks/no_such_file.py`", wrong_names, "no_such_file"),
    ("`tests/test_bft.py::test_no_such`", wrong_names, "test_no_such"),
    ("```python\nprint(0.53651)\n# 0.5365 = 1 - 0.4635\n```", wrong_examples, "0.53651"),
    ("```python\nprint(0.5365)\n# 0.53651\n```", wrong_examples, "0.53651"),
    ("```python\nprint(1 + 1)  # 3\n```", wrong_examples, "prints 2"),
    ("```python\nprint(1, 2, sep='\\n')\n# 1\n```", wrong_examples, "2 lines"),
])
def test_what_is_wrong_is_found(text, check, words):
    path = ROOT / "page-of-test.md"
    blocks = [Block(match[1], match[2], "") for match in FENCE.finditer(text)]
    wrong = check(Page(path, FENCE.sub("", text), blocks))
    assert len(wrong) == 1 and words in wrong[0]


def test_the_rows_of_a_variant_may_be_named():
    text = "```sh\npython train.py --variant variants/power.py --objective sft power-2\n```\n\n`python -m variants.power`"
    blocks = [Block(match[1], match[2], "") for match in FENCE.finditer(text)]
    assert wrong_commands(Page(ROOT / "page-of-test.md", FENCE.sub("", text), blocks)) == []
