"""Files to rows: JSONL or a JSON array (.gz too), or parquet. What is wrong is a UserError that names the place."""

import codecs
import gzip
import json
import re
import zlib
from pathlib import Path
from typing import NamedTuple

from runtime.process import UserError


LINE_BYTES = 2 ** 24                                                      # of a line, at most: some four million tokens
BLANK_LINES = 100_000                                                     # one after another, at most
ARRAY_BYTES = 2 ** 31                                                     # of a JSON array, which is read in one piece
EXPECTED_FILE = "JSONL, a JSON array or parquet"

# How files begin that hold no JSON as we read it: what they are, and what to do.
OTHER_FILES = {
    b"\xff\xfe": "UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    b"{\0": "UTF-16; convert it: iconv -f UTF-16LE -t UTF-8",
    b"[\0": "UTF-16; convert it: iconv -f UTF-16LE -t UTF-8",
    b"\0{": "UTF-16; convert it: iconv -f UTF-16BE -t UTF-8",
    b"\0[": "UTF-16; convert it: iconv -f UTF-16BE -t UTF-8",
    b"PAR1": "parquet; give it a name that ends in .parquet",
    b"ARROW1": "an Arrow file; save it as parquet",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x1f\x8b": "gzip; give it a name that ends in .gz",
    b"\x28\xb5\x2f\xfd": "zstd; unpack it",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; git lfs pull brings that",
    b"<!doctype html": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
}


class Row(NamedTuple):
    number: int                      # of its line in JSONL; of the row, from 1, in an array or parquet
    where: str                       # "FILE:LINE" or "FILE: row NUMBER", for errors
    content: dict


def read_rows(path):
    """Yields each Row of a file: JSONL, a JSON array (either of them .gz too), or parquet. Raises UserError."""
    path = Path(path)
    check_is_file(path)
    head = read_head(path)
    if path.suffix == ".parquet":
        objects = read_parquet(path)
    elif head.startswith(b"["):
        objects = read_array(path)
    else:
        refuse_other_files(path, head)
        for line, content in read_jsonl(path):
            yield Row(line, f"{path}:{line}", content)
        return
    number = 0
    for number, content in enumerate(objects, 1):
        yield Row(number, f"{path}: row {number}", content)
    if number == 0:
        raise UserError(f"{path}: the file has no rows; expected one or more")


def check_is_file(path):
    if not path.is_file():
        raise UserError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")


def open_bytes(path):
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def read_head(path):
    """The first bytes of a file, without a byte order mark of UTF-8 and white space."""
    try:
        with open_bytes(path) as f:
            return f.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    except (OSError, EOFError, zlib.error):
        # read_jsonl or read_array will say what is wrong.
        return b""


def refuse_other_files(path, head):
    """Raises UserError, with what to do, for a file that does not begin as JSONL does."""
    for beginning, words in OTHER_FILES.items():
        if head[:len(beginning)].lower() == beginning.lower():
            raise UserError(f"{path}: this is {words} (expected {EXPECTED_FILE})")
    first_line = head.split(b"\n")[0]
    separates = re.search(rb"""\w["']?[,;\t] ?["'\w]""", first_line)
    if path.suffix in (".csv", ".tsv") or (separates and not head.startswith(b"{")):
        raise UserError(f"{path}: this is CSV, by its first line; docs/data.md has a command that converts it "
                        f"(expected {EXPECTED_FILE})")


def read_jsonl(path):
    """Yields (line number, object) of a JSONL or .jsonl.gz file; blank lines hold nothing, nor does a byte order mark.
    Raises UserError."""
    path = Path(path)
    check_is_file(path)
    number, blank, empty = 0, 0, True
    try:
        with open_bytes(path) as f:
            while line := f.readline(LINE_BYTES + 1):
                number += 1
                if len(line) > LINE_BYTES:
                    raise UserError(f"{path}:{number}: a line of more than {LINE_BYTES >> 20} MiB; expected one JSON "
                                    "object a line")
                line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    blank, empty = 0, False
                    yield number, parse_line(line, f"{path}:{number}")
                    continue
                blank += 1
                if blank > BLANK_LINES:
                    raise UserError(f"{path}:{number}: more than {BLANK_LINES} blank lines in a row; expected one JSON "
                                    "object a line")
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read after line {number}: {e}") from None
    if empty:
        raise UserError(f"{path}: the file is empty; expected one JSON object a line")


def parse_line(line, where):
    """The object of a line, bytes. Raises UserError."""
    row = parse_json(line.rstrip(), where, "one JSON object a line")
    check_object(row, where)
    return row


def read_array(path):
    """Yields the objects of a JSON array. Raises UserError."""
    try:
        with open_bytes(path) as f:
            content = f.read(ARRAY_BYTES + 1)
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read: {e}") from None
    if len(content) > ARRAY_BYTES:
        raise UserError(f"{path}: an array of more than {ARRAY_BYTES >> 20} MiB, which would be read in one piece; "
                        "expected JSONL or parquet")
    rows = parse_json(content.removeprefix(codecs.BOM_UTF8), path, "an array of JSON objects")
    for number, row in enumerate(rows, 1):
        check_object(row, f"{path}: row {number}")
        yield row


def parse_json(content, where, expected):
    """What bytes say in JSON. Raises UserError."""
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: not UTF-8 at byte {e.start}; expected {expected}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not JSON: {e}; expected {expected}") from None


def check_object(row, where):
    """Raises UserError for what is no object, or not of whole characters: JSON can spell half of one ("\\ud83d")."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}; expected an object")
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as e:
        raise UserError(f"{where}: {ascii(e.object[e.start])} is half a character (a lone surrogate); expected Unicode "
                        "text") from None


def read_parquet(path):
    """Yields the rows of a parquet file as dicts, a batch in memory at a time. Raises UserError."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f'{path}: parquet is read with pyarrow: pip install -e ".[parquet]"') from None
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield row
    except (ArrowException, OSError, ValueError) as e:
        words = "not parquet" if number == 0 else f"cannot be read after row {number}"
        raise UserError(f"{path}: {words}: {e}") from None
