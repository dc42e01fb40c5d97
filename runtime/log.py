"""metrics.jsonl: a line for each step and each validation."""

import contextlib
import json
import math
import os


def read_metrics(path, last=math.inf):
    """The lines of a metrics.jsonl up to step `last`, without what a crash left of one."""
    lines = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            row = json.loads(line)
            if row["step"] <= last:
                lines.append(row)
    return lines


def append_metrics(path, lines):
    """Adds dicts as lines, which are on the disk when this returns: before a checkpoint says that they are there."""
    with open(path, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)
        f.flush()
        os.fsync(f.fileno())
