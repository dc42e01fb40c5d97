"""A CUDA device that is not there, so that a machine without a GPU can say what a GPU would wait for or refuse.

    import fake_cuda                 # before torch is imported
    device = fake_cuda.install()     # from here on "cuda:0" is a device of this process

A tensor on it is a wrapper around a CPU tensor: every number is real. `Device` sees each operator, forward and backward,
and counts what `Device.counts` names. The backward pass runs in autograd's thread of the device, as on a GPU. For that
torch needs to be told of the device in C++: HOOKS, which is compiled here.
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
HOOKS = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

// What torch asks first: there is one device.
struct Hooks : at::CUDAHooksInterface {
  Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};
// Preferred to the hooks of a torch that was built with CUDA.
static at::RegistererCUDAHooksRegistry hooks(
    "CUDAHooks", c10::REGISTRY_PREFERRED, at::CUDAHooksRegistry(),
    at::RegistererCUDAHooksRegistry::DefaultCreator<Hooks>);

// What autograd's threads ask: the device and its stream have number 0. Work is done when it is asked for, so that events
// have nothing to wait for.
struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device device{c10::DeviceType::CUDA, 0};
  c10::Stream stream{c10::Stream::DEFAULT, device};
  c10::Device exchangeDevice(c10::Device) const override { return device; }
  c10::Device getDevice() const override { return device; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
static Guard guard;
extern "C" void install_guard() {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)].store(&guard);
}
"""


def load_hooks():
    """Compiles and loads HOOKS. torch looks for such hooks once, while it is imported."""
    assert "torch" not in sys.modules, "import fake_cuda before torch"
    torch_folder = importlib.util.find_spec("torch").submodule_search_locations[0]
    library = f"{torch_folder}/lib"
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        sys.exit(f"{compiler} is not here; expected a C++ compiler, g++ or that of the environment variable CXX")
    with tempfile.TemporaryDirectory() as folder:
        built = f"{folder}/hooks.so"
        command = [compiler, "-O0", "-shared", "-fPIC", "-std=c++20", "-x", "c++", "-",
                   f"-I{torch_folder}/include", f"-L{library}", "-lc10", "-ltorch_cpu", "-o", built]
        subprocess.run(command, input=HOOKS, text=True, check=True)
        for needed in (f"{library}/libtorch_global_deps.so", f"{library}/libtorch_cpu.so"):
            ctypes.CDLL(needed, ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(built, ctypes.RTLD_GLOBAL)


hooks = load_hooks()
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.optim import optimizer as optimizers  # noqa: E402
from torch.utils import _foreach_utils  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402


hooks.install_guard()

# Operators whose result depends on numbers that the host has to see.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "is_nonzero", "_unique2",
           "unique_dim", "unique_consecutive", "repeat_interleave.Tensor"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class CudaTensor(torch.Tensor):
    """Says that it is on cuda:0, and holds a CPU tensor, `numbers`."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, numbers.size(), strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype,
            device="cuda:0")
        tensor.numbers = numbers
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return Device.installed.run(operator, args, kwargs or {})

    # What follows goes past the operators.

    def set_data(self, other):
        torch.Tensor.data.__set__(self, other)
        self.numbers = other.numbers

    data = property(torch.Tensor.data.__get__, set_data)

    def tolist(self):
        Device.installed.count("wait", "tolist")
        return self.numbers.tolist()

    def __reduce_ex__(self, protocol):
        Device.installed.count("wait", "torch.save")
        return self.numbers.clone().__reduce_ex__(protocol)

    def __getitem__(self, index):
        return super().__getitem__(with_tensors(index))

    def __setitem__(self, index, value):
        super().__setitem__(with_tensors(index), value)


def numbers_of(tensor):
    return tensor.numbers if isinstance(tensor, CudaTensor) else tensor


def with_tensors(index):
    """An index in which lists are the tensors, on the host, that torch makes of them."""
    if isinstance(index, tuple):
        return tuple(with_tensors(part) for part in index)
    return torch.tensor(index) if isinstance(index, list) else index


def replaced(function, value):
    """The arguments or the result of an operator, with function(tensor) in place of each tensor."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(replaced(function, element) for element in value)
    if isinstance(value, dict):
        return {key: replaced(function, element) for key, element in value.items()}
    return value


class Device(TorchDispatchMode):
    """counts: {(phase, kind, what): times}, where kind is

    - "kernel": an operator that is no view, near enough a kernel that is launched;
    - "wait": the host waits for the device: a number is read, or a copy blocks;
    - "unpinned": a copy to the device that was not to block, from memory that is not pinned.
    """
    installed = None

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.phases = ["loop"]
        self.pinned = {}                                                  # {address: tensor}, so that none is used again

    @contextlib.contextmanager
    def phase(self, name):
        """What is counted within is counted under this name."""
        self.phases.append(name)
        try:
            yield
        finally:
            self.phases.pop()

    def count(self, kind, what):
        if kind != "kernel":
            what = f"{what} at {line_of_the_program()}"
        self.counts[self.phases[-1], kind, what] += 1

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return self.run(operator, args, kwargs or {})

    def run(self, operator, args, kwargs):
        name = operator._schema.name.split("::")[1]
        on_device, on_host = [], []

        def unwrapped(tensor):
            if isinstance(tensor, CudaTensor):
                on_device.append(tensor)
            else:
                on_host.append(tensor)
            return numbers_of(tensor)

        on_the_cpu = replaced(unwrapped, (args, kwargs))                  # the arguments, as a CPU takes them
        asked_for = kwargs.get("device")
        target = "cuda" if on_device else "cpu"
        if asked_for is not None:
            target = torch.device(asked_for).type
        if name == "copy_":
            target = args[0].device.type

        if name == "is_pinned":
            return args[0].untyped_storage().data_ptr() in self.pinned
        if name == "_pin_memory":
            copy = args[0].clone()
            self.pinned[copy.untyped_storage().data_ptr()] = copy
            return copy
        if target == "meta" or (target == "cpu" and not on_device):
            return operator(*on_the_cpu[0], **on_the_cpu[1])

        if not is_view(operator):
            self.count("kernel", name)
        if name == "_to_copy":
            self.look_at_copy(args[0], target, kwargs.get("non_blocking", False))
        elif name == "copy_":
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            self.look_at_copy(args[1], target, non_blocking)
        else:
            self.look_at_arguments(operator, name, args, on_host)

        args, kwargs = on_the_cpu
        if asked_for is not None:
            kwargs["device"] = "cpu"
        function = STAND_INS.get(name, operator)
        result = function(*args, **kwargs)
        if target == "cpu":
            return result
        # What works in place returns its argument.
        wrappers = {id(x.numbers): x for x in on_device}
        return replaced(lambda x: wrappers[id(x)] if id(x) in wrappers else CudaTensor(x), result)

    def look_at_copy(self, source, target, non_blocking):
        if isinstance(source, CudaTensor):
            if target == "cpu":
                self.count("wait", "copy back")
        elif not non_blocking:
            self.count("wait", "blocking copy to the device")
        elif source.untyped_storage().data_ptr() not in self.pinned:
            self.count("unpinned", f"unpinned copy of {source.numel()} numbers")

    def look_at_arguments(self, operator, name, args, on_host):
        if name in WAITING or f"{name}.{operator._overloadname}" in WAITING:
            self.count("wait", name)
        if name in INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
            self.count("wait", "boolean mask")
        for x in on_host:
            if name in INDEXING and isinstance(args[0], CudaTensor):
                self.count("wait", "index on the host")
            elif x.dim() or name in ("mm", "addmm", "bmm"):
                raise RuntimeError(f"{name}: found cuda:0 and a tensor on the CPU, {tuple(x.shape)}")


def line_of_the_program():
    """The innermost line that is running and is neither torch's nor a test's."""
    frame = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(f"{ROOT}{os.sep}") and not file.startswith(f"{ROOT}{os.sep}tests"):
            return f"{file.removeprefix(f'{ROOT}{os.sep}')}:{frame.f_lineno}"
        frame = frame.f_back
    return "a line that is not the program's"


@functools.cache
def is_view(operator):
    """Whether it launches nothing: its result is its argument's memory, or memory as it comes."""
    name = operator._schema.name.split("::")[1]
    aliases = [result.alias_info for result in operator._schema.returns]
    shares_memory = any(alias is not None and not alias.is_write for alias in aliases)
    return shares_memory or "empty" in name or name in ("_unsafe_view", "is_same_size")


# ---------------------------------------------------------------------------------------------------------------------
# FlashAttention for packed samples: what its CUDA kernel demands of its arguments, and what it computes

def flash_demands(q, k, v, offsets_q, offsets_k, max_q, max_k, is_causal, window_size):
    assert q.dtype in (torch.bfloat16, torch.float16), f"dtype {q.dtype}"
    assert q.dtype == k.dtype == v.dtype, f"dtypes {q.dtype}, {k.dtype}, {v.dtype}"
    assert all(x.dim() == 3 and x.stride(-1) == 1 for x in (q, k, v)), "heads that are not contiguous"
    assert q.shape[2] % 8 == 0 and q.shape[2] <= 256, f"head dimension {q.shape[2]}"
    assert q.shape[1] % k.shape[1] == 0 and k.shape == v.shape, f"heads {q.shape}, {k.shape}, {v.shape}"
    for offsets, tokens, longest in ((offsets_q, q, max_q), (offsets_k, k, max_k)):
        assert offsets.dtype == torch.int32 and offsets.is_contiguous(), f"offsets of dtype {offsets.dtype}"
        assert offsets[0] == 0 and offsets[-1] == len(tokens), f"offsets to {offsets[-1]} for {len(tokens)} tokens"
        assert offsets.diff().max() <= longest, "a sample longer than the longest"
    assert is_causal and tuple(window_size) == (-1, 0), "not causal"


def samples_of(offsets, *tensors):
    """For each sample its part of every (T, n, D) tensor, as (1, n, L, D), and where it lies."""
    for first, last in zip(offsets.tolist(), offsets[1:].tolist()):
        yield slice(first, last), *(x[first:last].transpose(0, 1)[None] for x in tensors)


def flash_forward(q, k, v, offsets_q, offsets_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *rest):
    flash_demands(q, k, v, offsets_q, offsets_k, max_q, max_k, is_causal, window_size)
    out = torch.empty_like(q)                                             # (T, n, D)
    for where, *sample in samples_of(offsets_q, q, k, v):
        y = F.scaled_dot_product_attention(*sample, is_causal=True, scale=scale, enable_gqa=True)
        out[where] = y[0].transpose(0, 1)
    # The backward pass below computes what it needs of the log-sum-exps again.
    return out, q.new_zeros(q.shape[1], len(q), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


def flash_backward(grad, q, k, v, out, lse, offsets_q, offsets_k, max_q, max_k, is_causal, random_state, scale=None,
                   window_size=None):
    flash_demands(q, k, v, offsets_q, offsets_k, max_q, max_k, is_causal, window_size)
    assert grad.dtype == q.dtype and grad.stride(-1) == 1, "a gradient of another dtype, or not contiguous"
    heads_of_a_group = q.shape[1] // k.shape[1]
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    keys, values = (x.repeat_interleave(heads_of_a_group, 1) for x in (k, v))
    for where, *sample, sample_grad in samples_of(offsets_q, q, keys, values, grad):
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        y, sample_lse = attend(*sample, 0.0, True, scale=scale)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        for total, part in zip(grads, backward(sample_grad, *sample, y, sample_lse, 0.0, True, scale=scale)):
            part = part[0].transpose(0, 1)                                # (L, n, D)
            total[where] = part.unflatten(1, (total.shape[1], -1)).sum(2)
    return tuple(grads)


STAND_INS = {"_varlen_attn": flash_forward, "_varlen_attn_backward": flash_backward}


# ---------------------------------------------------------------------------------------------------------------------

def install():
    """Makes "cuda:0" a device of this process, one with bfloat16 and FlashAttention. Returns the Device."""
    device = Device.installed = Device()
    properties = types.SimpleNamespace(name="NVIDIA H100", total_memory=80e9, major=9, minor=0)
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (9, 0),
               "get_device_properties": properties, "get_device_name": properties.name, "is_bf16_supported": True,
               "max_memory_allocated": 0, "set_device": None, "manual_seed_all": None, "_lazy_init": None}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.cuda.synchronize = lambda *args: device.count("wait", "synchronize")
    # These two go past the operators: on a GPU too the numbers are read on the host, and copied.
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, made_on_the_host(getattr(torch, name)))
    F.scaled_dot_product_attention = by_products(F.scaled_dot_product_attention)
    for module in (optimizers, _foreach_utils):
        module._foreach_supported_types.append(CudaTensor)
    # Module.to(device) makes new parameters: those on the CPU cannot become wrappers.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    device.__enter__()
    return device


def made_on_the_host(make):
    def made(numbers, *, device=None, **options):
        if device is None or torch.device(device).type == "cpu":
            return make(numbers, device=device, **options)
        return make(numbers, **options).to(device)

    return made


def by_products(attention):
    """Attention out of products and a softmax, for tensors on the device: torch would look for a kernel of CUDA's."""
    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if not isinstance(q, CudaTensor):
            return attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
        return torch._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal, scale=scale,
                                                        enable_gqa=enable_gqa)[0]

    return attend
