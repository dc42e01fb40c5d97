"""The device: which one, in which precision, and how much memory it has."""

import os
import sys

import torch

from runtime.process import UserError, read_launch


def find_device(name):
    """The torch.device of --device: "auto", "cpu", "cuda" or "cuda:N". Raises UserError if it cannot be used here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        # The driver counts devices that torch cannot use. Without a driver, or without CUDA in torch, there are none.
        if name == "cpu" and torch.cuda.device_count() > 0:
            raise UserError(f"this machine has {torch.cuda.device_count()} CUDA devices that torch {torch.__version__} "
                            "cannot use, most often because their driver is too old for it; expected a newer driver, a "
                            "torch for an older CUDA, or --device cpu")
    if name == "cuda":
        # One for each of torchrun's processes.
        processes = read_launch().local_world
        if processes > torch.cuda.device_count():
            raise UserError(f"{processes} processes on this node, which has {torch.cuda.device_count()} CUDA devices; "
                            "expected one for each (--nproc_per_node), or --device cpu")
        name = f"cuda:{read_launch().local_rank}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise TypeError("expected cpu or cuda")
        # The objectives compute in float64.
        torch.empty(1, dtype=torch.float64, device=device)
    except (RuntimeError, AssertionError, TypeError) as e:
        raise UserError(f"--device {name} cannot be used here: {str(e).splitlines()[0]}") from None
    return device


def compute_dtype(name, device):
    """The autocast dtype of --dtype: "float32", "bfloat16", or "auto": bfloat16 where the device has it natively."""
    if name != "auto":
        return getattr(torch, name)
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def autocast(device, dtype):
    """Matrix products in dtype, everything that sums or exponentiates in float32; nothing at all for float32."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def memory_bytes(device):
    """Bytes of memory that the device has (for the CPU: this machine); None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):                                        # Windows
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_gb(device):
    """The most memory that this process has held on the device so far, in GB; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:                                                   # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
