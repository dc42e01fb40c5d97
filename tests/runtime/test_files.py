"""Files that are whole or not there, and safetensors against the library."""

import io
import json
import os
import signal
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch

from runtime.files import file_sha256, load_safetensors, replacing, save_safetensors
from runtime.log import append_metrics
from runtime.process import run


def test_an_error_names_the_file_and_leaves_nothing(tmp_path):
    for error, caught in ((RuntimeError("a bug"), RuntimeError), (OSError(28, "No space left on device"), OSError)):
        with pytest.raises(caught) as e, replacing(tmp_path / "file") as f:
            f.write(b"half")
            raise error
        assert os.listdir(tmp_path) == [] and getattr(e.value, "filename", "") in ("", str(tmp_path / "file"))


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    """Of one that is read while this one is written."""
    for error in (OSError(5, "Input/output error", "weights"), OSError("no number")):
        with pytest.raises(OSError) as e, replacing(tmp_path / "file"):
            raise error
        assert e.value is error and os.listdir(tmp_path) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full")
def test_a_log_without_room_is_named():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        append_metrics(Path("/dev/full"), [{"step": 1}])


@pytest.mark.parametrize("read", [file_sha256, load_safetensors])
def test_a_file_that_cannot_be_read_is_named(read, tmp_path, monkeypatch):
    save_safetensors({"a": torch.zeros(2)}, tmp_path / "a")

    class Broken(io.FileIO):
        def readinto(self, buffer):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.open", lambda path, mode: Broken(path, mode))
    with pytest.raises(OSError) as e:
        read(tmp_path / "a")
    assert e.value.filename == str(tmp_path / "a")


@pytest.mark.slow
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path, done, fsync, replace = tmp_path / "a", [], os.fsync, os.replace
    with monkeypatch.context() as m:                                      # on the disk, then the name, then the name on the disk
        m.setattr(os, "fsync", lambda f: done.append(f"fsync {os.readlink(f'/proc/self/fd/{f}')}") or fsync(f))
        m.setattr(os, "replace", lambda a, b: done.append(f"rename {a}") or replace(a, b))
        with replacing(path) as f:
            f.write(b"content")
    assert done == [f"fsync {path}.tmp", f"rename {path}.tmp", f"fsync {tmp_path}"]
    for content in (b"old", b"new"):
        with replacing(path) as f:
            f.write(content)
        assert path.read_bytes() == content
    with pytest.raises(SystemExit) as e:
        def main():
            with replacing(path) as f:
                f.write(b"half")
                os.kill(os.getpid(), signal.SIGTERM)
                f.write(b" and half")
        run(main)
    assert e.value.code == 143 and path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_equals_the_library(tmp_path, dtype):
    import safetensors.torch as library
    tensors = {"a": torch.randn(3, 5).to(dtype), "b.c": torch.randn(7).to(dtype), "empty": torch.zeros(0, 2, dtype=dtype),
               "strided": torch.randn(4, 6).to(dtype).T, "scalar": torch.tensor(3.5, dtype=dtype), "mask": torch.tensor([True, False])}
    save_safetensors(tensors, tmp_path / "ours")
    library.save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    for loaded in (library.load_file(tmp_path / "ours"), load_safetensors(tmp_path / "theirs"),
                   load_safetensors(tmp_path / "ours")):
        assert loaded.keys() == tensors.keys()
        assert all(loaded[k].dtype == t.dtype and torch.equal(loaded[k], t) for k, t in tensors.items())


def with_header(header, data=b"\0" * 16):
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data


F = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def test_a_header_longer_than_any_is_not_read(tmp_path):
    with open(tmp_path / "a.safetensors", "wb") as f:
        f.write((200_000_000).to_bytes(8, "little"))
        f.truncate(300_000_000)                                           # of zeros, which take no disk
    tracemalloc.start()
    with pytest.raises(ValueError, match="a header of 200000000 bytes in a file of 300000000"):
        load_safetensors(tmp_path / "a.safetensors")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("content", [
    with_header({"a": F, "b": F}), with_header({"a": F, "b": {**F, "data_offsets": [4, 12]}}), with_header({"a": {**F, "dtype": "F8_E4M3"}}),
    with_header({"a": {**F, "data_offsets": [8, 16]}}), with_header({"a": {**F, "shape": [2 ** 40], "data_offsets": [0, 2 ** 42]}}),
    with_header({"a": {**F, "shape": [-2]}}), with_header({"a": {**F, "shape": [-2, -1]}}, b"\0" * 8), with_header({"a": {**F, "shape": [2.0]}}, b"\0" * 8),
    with_header({"a": {**F, "shape": [2 ** 40, 2 ** 40, 0], "data_offsets": [0, 0]}}, b""),
    with_header({"a": {**F, "shape": 2}}), with_header({"a": 3}), with_header([]), with_header({"a": F}), (2 ** 63).to_bytes(8, "little") + b"{}"],
    ids=["twice", "overlap", "dtype", "hole", "beyond", "negative", "negative pair", "float", "empty but absurd", "no list", "no object", "list", "rest", "length"])
def test_a_header_that_lies_is_refused_before_anything_is_allocated(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.safetensors is not a safetensors file that we can read"):
        load_safetensors(path)
