"""Files that are whole or not there, and safetensors."""

import contextlib
import hashlib
import json
import math
import mmap
import os
from pathlib import Path

import torch


@contextlib.contextmanager
def naming(path):
    """Has an OSError from within name this file, if it names no other. By itself it does where a file is opened, and
    not where it is read or written."""
    try:
        yield
    except OSError as e:
        if e.errno is None or str(e.filename) not in ("None", f"{path}.tmp"):
            raise
        raise OSError(e.errno, e.strerror, str(path)) from None


@contextlib.contextmanager
def replacing(path):
    """A binary file to write, under a temporary name that becomes `path` when all is written and on the disk: path
    holds what it is given or what it held before, even if the power fails. Raises OSError naming path."""
    temporary = Path(f"{path}.tmp")
    try:
        with naming(path):
            with open(temporary, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
            sync_directory(temporary.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)                                 # a full disk has room again
        raise


def sync_directory(directory):
    """The names in it, too, must be on the disk. Windows cannot open a directory, and writes names by itself."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with naming(directory):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path, chunks):
    """Writes an iterable of bytes to path, whole or not at all: see `replacing`."""
    with replacing(path) as f:
        f.writelines(chunks)


def file_sha256(path):
    with naming(path), open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def all_finite(t, dtype=None):
    """Whether every number of a tensor is finite, and would be in this dtype: 0-d bool. No copy of it is made."""
    if t.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=t.device)
    # NaN, if there is one.
    extremes = torch.stack(torch.aminmax(t))
    return extremes.to(dtype or t.dtype).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# safetensors: 8 bytes of length (little-endian), a JSON header {name: {dtype, shape, data_offsets}}, the raw tensors.

SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
                      "BOOL": torch.bool,
                      # Quantised models have these.
                      "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8,
                      "I32": torch.int32, "I64": torch.int64}
LARGEST_HEADER = 100_000_000                                              # bytes; the safetensors library's limit
LARGEST_TENSOR = 2 ** 48                                                  # numbers; more would overflow later


def save_safetensors(tensors, path, data=None):
    """Writes {name: tensor} to path, whole or not at all.

    data: an iterable of the tensors themselves, in the same order, where those of `tensors` only have their shapes and
    dtypes (on device "meta"): it is read one tensor at a time. Returns the file's sha256.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        start, end = end, end + t.nbytes
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)                                       # data starts aligned
    head = len(head).to_bytes(8, "little") + head
    digest = hashlib.sha256(head)
    with replacing(path) as f:
        f.write(head)
        for t in data or tensors.values():
            content = t.cpu().contiguous().flatten().view(torch.uint8).numpy().data
            f.write(content)
            digest.update(content)
            # Let go before the next one is made.
            del t, content
    return digest.hexdigest()


def load_safetensors(path):
    """{name: CPU tensor} of path. Raises FileNotFoundError, or ValueError for a file that is not safetensors."""
    return dict(iterate_safetensors(path))


def iterate_safetensors(path, names=None, rows=None):
    """Yields (name, CPU tensor) in the file's order, holding one at a time. names: only these, those that it has.
    rows: {name: (first, one past the last)}, of these no more than these rows. Raises as `load_safetensors`."""
    with naming(path), open(path, "rb") as f:
        for name, dtype, shape in safetensors_layout(f):
            size = math.prod(shape) * dtype.itemsize
            end = f.tell() + size
            if names is not None and name not in names:
                f.seek(end)
                continue
            if rows and name in rows:
                first, stop = rows[name]
                row_size = math.prod(shape[1:]) * dtype.itemsize
                f.seek(first * row_size, os.SEEK_CUR)
                size = (stop - first) * row_size
                shape = [stop - first, *shape[1:]]
            pages = own_pages(size)
            f.readinto(memoryview(pages)[:size])
            yield name, torch.frombuffer(pages, dtype=torch.uint8)[:size].view(dtype).view(shape)
            del pages                                                     # before the next ones
            f.seek(end)


def safetensors_layout(f):
    """[(name, dtype, shape)] of an open file, as `read_header`. Raises ValueError for one that is not safetensors."""
    try:
        return read_header(f)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{f.name} is not a safetensors file that we can read: {e}") from None


def read_header(f):
    """[(name, dtype, shape)] in the order of the tensors in the file, which is then read up to the first of them.

    Every byte of the file must belong to the header or to one tensor: a file that is cut, padded or spliced is refused.
    Raises exceptions of several kinds for a file that is not safetensors.
    """
    size = os.fstat(f.fileno()).st_size
    length = int.from_bytes(f.read(8), "little")
    if length > min(size - 8, LARGEST_HEADER):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    layout, end = [], 0
    for name, t in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, start = SAFETENSORS_DTYPES[t["dtype"]], t["shape"], end
        sizes_make_sense = len(shape) <= 64 and all(type(n) is int and 0 <= n < LARGEST_TENSOR for n in shape) \
            and math.prod(n or 1 for n in shape) < LARGEST_TENSOR
        end = t["data_offsets"][1]
        if not sizes_make_sense or t["data_offsets"] != [start, start + math.prod(shape) * dtype.itemsize]:
            raise ValueError(f"{name}: {t} does not follow the {start} bytes before it")
        layout.append((name, dtype, shape))
    if f.tell() + end != size:
        raise ValueError(f"{f.tell()} bytes of header and {end} of tensors in a file of {size}")
    return layout


def own_pages(size):
    """Memory of this many bytes that goes back to the system at once when the tensor in it goes.

    The holes that malloc keeps cost GPT-2, whose matrices we transpose, a quarter of its size.
    """
    if hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, max(size, 1))                                    # Windows
