"""Published relatives of BFT, a file of a page each, and how such a file is read.

    python train.py --variant variants/power.py --objective power-2 ...
    python -m variants.power                               # its worked example

A file adds rows to `bft.OBJECTIVES`; docs/forking.md shows how one is written, docs/variants.md what there is.
"""

import os
import re
import sys
import traceback
import types
from pathlib import Path

import bft
from runtime.process import Parser, UserError


FILES = {}                           # {objective: path of the file that added it}


def add_variant_flag(parser):
    parser.add_argument("--variant", nargs="+", default=[], metavar="FILE", help="Python files that add rows to "
                        "bft.OBJECTIVES, such as those in variants/")


def variants_in(argv):
    """What follows --variant on a command line, whose other flags may depend on it. Raises UserError."""
    parser = Parser(add_help=False)
    add_variant_flag(parser)
    return parser.parse_known_args(argv)[0].variant


def variant_of(objective):
    """(path of the file that added this objective,), or ()."""
    return (FILES[objective],) if objective in FILES else ()


def load_variants(paths):
    """Reads files that add rows to `bft.OBJECTIVES`, each once. Raises UserError."""
    for path in paths:
        is_known = os.path.realpath(path) in map(os.path.realpath, FILES.values())
        # variants/*.py names this file, too.
        if not is_known and Path(path).name != "__init__.py":
            load_variant(path)


def load_variant(path):
    if Path(path).suffix != ".py" or not Path(path).is_file():
        raise UserError(f"--variant {path}: expected a Python file, NAME.py")
    before = {**bft.OBJECTIVES, **bft.DISTRIBUTION}
    module = types.ModuleType(f"variant {Path(path).stem}")
    module.__file__ = path
    sys.modules[module.__name__] = module
    try:
        # Not by an import, which might take the bytecode of an earlier content.
        exec(compile(Path(path).read_bytes(), path, "exec"), vars(module))
    except (Exception, SystemExit) as e:
        raise UserError(f"--variant {path}{line_of(e, path)}: {type(e).__name__}: {e}") from None
    now = {**bft.OBJECTIVES, **bft.DISTRIBUTION}
    changed = [name for name in before if now.get(name) is not before[name]]
    if changed:
        raise UserError(f"--variant {path} changes {changed[0]!r}; expected other names, which it adds")
    added = [name for name in bft.OBJECTIVES if name not in before]
    if not added:
        raise UserError(f"--variant {path} adds no row to bft.OBJECTIVES; expected one or several")
    for name in added:
        check_row(path, name, bft.OBJECTIVES[name])
        FILES[name] = path


def line_of(e, path):
    """The last line of this file that was at work when it failed, as words; "" if none was."""
    lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
    if isinstance(e, SyntaxError) and e.filename == path:
        lines.append(e.lineno)
    return f", line {lines[-1]}" if lines and lines[-1] else ""


def check_row(path, name, row):
    known = (*bft.DISTRIBUTION, "ref_logp")
    # It names a directory, too.
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"--variant {path}: a row is called {name!r}; expected letters, digits, '-', '_' and '.'")
    is_objective = isinstance(row, bft.Objective) and callable(row.token_weight) and callable(row.sample_weight)
    if not is_objective or row.average not in ("tokens", "samples") or not isinstance(row.needs, (tuple, list)):
        raise UserError(f"--variant {path}: {name!r} is {row!r}; expected bft.Objective(token_weight, sample_weight, "
                        "'tokens' or 'samples', needs)")
    for need in row.needs:
        if need not in known:
            raise UserError(f"--variant {path}: {name!r} needs {need!r}; expected some of {', '.join(known)}")
    try:
        bft.worked_example([name])
    except Exception as e:
        raise UserError(f"--variant {path}{line_of(e, path)}: {name!r} of six tokens: {type(e).__name__}: {e}") \
            from None
