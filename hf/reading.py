"""Files of a model directory, which others wrote: what is read of them, and how much."""

import json
import os
from pathlib import Path

from runtime.process import UserError


MIB = 2 ** 20
# A few times the largest that is published. A tokenizer.json may have any name.
MOST_BYTES = {
    "config.json": MIB,
    "generation_config.json": MIB,
    "adapter_config.json": MIB,
    "chat_template.jinja": MIB,
    "special_tokens_map.json": MIB,
    "added_tokens.json": MIB,
    "tokenizer_config.json": 16 * MIB,
    "vocab.json": 32 * MIB,
    "merges.txt": 32 * MIB,
    "model.safetensors.index.json": 32 * MIB,
    "tokenizer.json": 64 * MIB,
}
# What looks like a file there is a process, a device or a setting of the system.
OF_THE_SYSTEM = ("/proc/", "/sys/", "/dev/")
# Memory, with files in it like any others.
SHARED_MEMORY = "/dev/shm/"
# Of JSON. Python reads more of them than it can write.
MOST_LEVELS = 100


def is_there(path):
    """Whether a directory has this file. It may be a link, as in the hub's cache. Raises UserError if it is no regular
    file, or the system's."""
    if not os.path.lexists(path):
        return False
    real = os.path.realpath(path)
    is_of_the_system = real.startswith(OF_THE_SYSTEM) and not real.startswith(SHARED_MEMORY)
    if is_of_the_system or not os.path.isfile(real):
        raise UserError(f"{path} is, or leads to, {real}; expected a regular file, and none of the system's")
    return True


def read_file(path):
    """Its bytes. Raises FileNotFoundError, and UserError as `is_there` or where it is larger than any of its kind."""
    path = Path(path)
    is_there(path)
    size = path.stat().st_size
    most = MOST_BYTES.get(path.name, MOST_BYTES["tokenizer.json"])
    if size > most:
        raise UserError(f"{path} has {size} bytes; expected {most} at most")
    with open(path, "rb") as f:
        return f.read(size)


def read_json(path):
    """What it says in JSON. Raises ValueError where it is none, or too deep, and as `read_file`."""
    try:
        content = json.loads(read_file(path))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [content]
    for _ in range(MOST_LEVELS):
        # All that stands in lists and objects of this level is the next one.
        level = [inner for outer in level for inner in parts_of(outer)]
    if level:
        raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels")
    return content


def parts_of(value):
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list):
        return value
    return ()
