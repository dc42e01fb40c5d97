"""Which device --device is."""

import pytest
import torch

from runtime.device import find_device
from runtime.process import UserError


def machine(monkeypatch, usable, devices):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)


def test_gpus_that_torch_cannot_use_are_not_passed_over(monkeypatch):
    machine(monkeypatch, False, 8)                                        # as an old driver says
    with pytest.raises(UserError, match="has 8 CUDA devices that torch .* cannot use.*driver is too old.*--device cpu"):
        find_device("auto")
    assert find_device("cpu").type == "cpu"


def test_without_gpus_it_is_the_cpu(monkeypatch, capfd, recwarn):
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    machine(monkeypatch, False, 0)
    assert find_device("auto").type == "cpu"
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch):
    machine(monkeypatch, True, 1)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, device, **options: empty(size, **options))
    assert find_device("auto") == torch.device("cuda:0")
