"""metrics.jsonl: a line for each step and each validation."""

import json
import os
import re

from runtime.files import naming, replacing


LINE_BYTES = 2 ** 20                                                      # of a line, at most; ours have some 500
# A line as we write it, of keys with a number or a word each. To read it as JSON would take four times as long.
PLAIN_LINE = re.compile(rb'\{"step": (0|[1-9][0-9]*)(?:, "[a-z0-9_]++": [-+.0-9A-Za-z]++)*+\}\n')


def read_metrics(path):
    """The lines of a metrics.jsonl, without what a crash left of one."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        row = parse(line)
        if row is not None:
            rows.append(row)
    return rows


def parse(line):
    """What a line says; None where it is not an object with a step."""
    try:
        row = json.loads(line)
        return row if type(row["step"]) is int else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def cut_metrics(path, last):
    """Takes what follows step `last` out of a metrics.jsonl, and what a crash left of a line. Returns (number of steps
    that are left, whether the last was validated). One line is in memory at a time."""
    steps, validated = 0, False
    size, in_place = 0, True         # of what stays: its bytes, and whether they are the first of the file
    with naming(path), open(path, "a+b") as f:
        f.seek(0)
        for line, step in our_lines(f):
            if step > last:
                continue
            size += len(line)
            in_place = in_place and size == f.tell() and line.endswith(b"\n")
            steps += b'"loss"' in line
            if step == last and b'"val_nll"' in line:
                validated = True
        # Under another name the file may be somebody's copy.
        in_place = in_place and not path.is_symlink() and path.stat().st_nlink == 1
        if in_place:
            f.truncate(size)
    if not in_place:
        with open(path, "rb") as old, replacing(path) as new:
            new.writelines(line.removesuffix(b"\n") + b"\n" for line, step in our_lines(old) if step <= last)
    return steps, validated


def our_lines(f):
    """Yields (line, step) of those lines of a file that are an object with a step."""
    while line := f.readline(LINE_BYTES):
        if match := PLAIN_LINE.fullmatch(line):
            yield line, int(match[1])
        elif row := parse(line):
            yield line, row["step"]


def append_metrics(path, lines):
    """Adds dicts as lines, which are on the disk when this returns: before a checkpoint says that they are there."""
    with naming(path), open(path, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)
        f.flush()
        os.fsync(f.fileno())
