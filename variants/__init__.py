"""Published relatives of BFT, a file of a page each, and how such a file is read.

    python train.py --variant variants/power.py --objective power-2 ...
    python -m variants.power                               # its worked example

A file adds rows to `bft.OBJECTIVES`; docs/forking.md shows how one is written, docs/variants.md what there is.
"""

import importlib.util
import sys
import traceback
from pathlib import Path

import bft
from runtime.process import Parser, UserError


FILES = {}                           # {objective: path of the file that added it}


def add_variant_flag(parser):
    parser.add_argument("--variant", nargs="+", default=[], metavar="FILE", help="Python files that add rows to "
                        "bft.OBJECTIVES, such as those in variants/")


def variants_in(argv):
    """What follows --variant on a command line, whose other flags may depend on it. Raises UserError."""
    parser = Parser(add_help=False, allow_abbrev=False)
    add_variant_flag(parser)
    return parser.parse_known_args(argv)[0].variant


def variant_of(objective):
    """(path of the file that added this objective,), or ()."""
    return (FILES[objective],) if objective in FILES else ()


def load_variants(paths):
    """Reads files that add rows to `bft.OBJECTIVES`, each once. Raises UserError."""
    for path in paths:
        if path not in FILES.values():
            load_variant(path)


def load_variant(path):
    before = dict(bft.OBJECTIVES)
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(f"variant {name}", path)
    if spec is None or not Path(path).is_file():
        raise UserError(f"--variant {path}: expected a Python file, NAME.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        # The last line of this file that was at work; 0: it could not be read.
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        line = e.lineno if isinstance(e, SyntaxError) else (lines or [0])[-1]
        raise UserError(f"--variant {path}, line {line}: {type(e).__name__}: {e}") from None
    changed = [name for name, row in before.items() if bft.OBJECTIVES.get(name) is not row]
    if changed:
        raise UserError(f"--variant {path} changes the row {changed[0]!r}; expected other names, which it adds")
    added = [name for name in bft.OBJECTIVES if name not in before]
    if not added:
        raise UserError(f"--variant {path} adds no row to bft.OBJECTIVES; expected one or several")
    for name in added:
        check_row(path, name, bft.OBJECTIVES[name])
        FILES[name] = path


def check_row(path, name, row):
    known = (*bft.DISTRIBUTION, "ref_logp")
    if not isinstance(row, bft.Objective) or row.average not in ("tokens", "samples"):
        raise UserError(f"--variant {path}: {name!r} is {row!r}; expected bft.Objective(token_weight, sample_weight, "
                        "'tokens' or 'samples', needs)")
    for need in row.needs:
        if need not in known:
            raise UserError(f"--variant {path}: {name!r} needs {need!r}; expected some of {', '.join(known)}")
