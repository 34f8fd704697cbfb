"""A stand-in for a GPU: tensors that say they are on `cuda:0` and compute on the CPU.

What is wrong on a GPU is wrong here. An operation on tensors of the host and of the device raises, the host's scalars
aside; what asks where a tensor is (`device`, `is_cuda`) takes the path of a GPU; Triton's kernels run in its
interpreter. Values are real, so a whole training step runs, backward pass and optimizer included, and every read of a
device's value on the host is counted by call site: on a GPU each of them waits until the device has caught up.

FakeTensorMode would do for the first, without values and without a backward pass.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

DEVICE = torch.device("cuda:0")
ROOT = Path(__file__).parents[1]
aten = torch.ops.aten
# Operators whose result or its shape the host has to know before it goes on.
READS = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique_consecutive",
    aten.bincount.default: "bincount",
    aten.equal.default: "equal",
}
# Operators that take tensors of both sides: copies, and indices, which are copied.
MIXED = (aten.copy_.default, aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
# Operators that take no scalar of the host either.
STRICT = (aten.cat.default, aten.stack.default)


class DeviceMix(AssertionError):
    """An operation on tensors of the host and of the device."""


class DeviceTensor(Tensor):
    """A tensor of the device.

    Attributes:
        value: The CPU tensor that holds what it holds.
    """

    value: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, value: Tensor) -> DeviceTensor:
        assert type(value) in (Tensor, nn.Parameter), type(value)
        made = Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device="cpu",  # to PyTorch's C++ side, which has no other
        )
        made.value = value.detach()
        return made

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def record_stream(self, stream: Any) -> None:
        """Nothing is freed early here."""

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.value!r})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["value"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> DeviceTensor:
        return DeviceTensor(inner["value"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        custom = _custom_op(func)
        if custom is not None:  # its Python body, so that what happens inside is seen
            with SimulatedGpu():  # PyTorch takes a mode off while it handles a call
                return custom(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            parts = func.decompose(*args, **kwargs)  # below autograd nothing else takes it apart
            if parts is not NotImplemented:
                return parts
        if func not in MIXED:
            _refuse_mix(func, args, kwargs)
        if func in READS and kwargs.get("output_size") is None:
            count(READS[func])
        elif func in (aten.index.Tensor, aten.index_put_.default) and any(
            isinstance(index, DeviceTensor) and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
            if index is not None
        ):
            count("mask index")
        result = func(
            *tree_map_only(DeviceTensor, _value, args), **tree_map_only(DeviceTensor, _value, kwargs)
        )
        if func is aten._local_scalar_dense.default:
            return result
        if func is aten.copy_.default and not isinstance(args[0], DeviceTensor):
            count("copy_")
            return args[0]
        wrapped = tree_map_only(Tensor, DeviceTensor, result)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


assert is_traceable_wrapper_subclass(DeviceTensor(torch.zeros(1)))


def _value(x: DeviceTensor) -> Tensor:
    return x.value


def _refuse_mix(func: Any, args: Any, kwargs: Any) -> None:
    hosts: list[Tensor] = []

    def look(x: Tensor) -> None:
        if not isinstance(x, DeviceTensor) and x.numel() > 0 and (x.dim() > 0 or func in STRICT):
            hosts.append(x)

    tree_map_only(Tensor, look, (args, kwargs))
    if hosts:
        raise DeviceMix(
            f"{func}: expected all tensors on {DEVICE}, got one on the host of shape {tuple(hosts[0].shape)}"
        )


def _custom_op(func: Any) -> Callable | None:
    from torch._library.custom_ops import OPDEFS

    if func.namespace != "rlaif_fast":
        return None
    found = OPDEFS.get(f"{func.namespace}::{func._opname}")
    return None if found is None else found._init_fn


_COUNTED: Counter[str] | None = None


def count(what: str) -> None:
    """Note that the host reads a value of the device, and where."""
    if _COUNTED is not None:
        _COUNTED[f"{_call_site()}: {what}"] += 1


def _call_site() -> str:
    """File and function of the innermost frame of this repository; of a package where there is none."""
    frame: Any = sys._getframe(2)
    elsewhere = ""
    while frame is not None:
        path, name = Path(frame.f_code.co_filename).resolve(), frame.f_code.co_name
        if not name.startswith("<"):  # generators and lambdas belong to the function around them
            if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("rlaif_fast", "kernels"):
                return f"{path.relative_to(ROOT)} {name}"
            if not elsewhere and "torch" not in path.parts and path != Path(__file__):
                elsewhere = f"{path.name} {name}"
        frame = frame.f_back
    return elsewhere


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """Count reads of device values on the host, by call site."""
    global _COUNTED
    before, _COUNTED = _COUNTED, Counter()
    try:
        yield _COUNTED
    finally:
        _COUNTED = before


def to_gpu(x: Tensor) -> Tensor:
    """A copy of `x` on the device, with its graph."""
    return x if isinstance(x, DeviceTensor) else _Upload.apply(x)


def to_host(x: Tensor) -> Tensor:
    """A copy of `x` in main memory, with its graph; the host waits for it."""
    if not isinstance(x, DeviceTensor):
        return x
    count("copy to the host")
    return _Download.apply(x)


class _Upload(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return DeviceTensor(x.detach().clone())

    @staticmethod
    def backward(ctx, grad):
        return grad.value.clone()


class _Download(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.value.clone()

    @staticmethod
    def backward(ctx, grad):
        return DeviceTensor(grad.clone())


def put(module: nn.Module) -> nn.Module:
    """Move a module's weights to the device, in place; tied ones stay tied."""
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    value = DeviceTensor(parameter.detach().clone())
                    moved[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
                part._parameters[name] = moved[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = DeviceTensor(buffer.clone())
    return module


class SimulatedGpu(TorchFunctionMode):
    """While it is entered, `device="cuda"` makes a `DeviceTensor`, and what leaves the device is counted."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__set__" and args and isinstance(args[0], DeviceTensor) and _is_data(func):
            args[0].value = args[1].value
            return None
        if name in ("to", "cuda", "cpu") and args and isinstance(args[0], Tensor):
            return _to(name, *args, **kwargs)
        if name == "numpy" and isinstance(args[0], DeviceTensor):
            count("numpy")
            return args[0].value.numpy(**kwargs)
        if name == "tolist" and isinstance(args[0], DeviceTensor):
            count("tolist")
            return args[0].value.tolist()
        if name == "pin_memory":
            return args[0]
        device = kwargs.get("device")
        if device is not None and name not in ("__get__",):
            kwargs["device"] = "cpu"
            result = func(*args, **kwargs)
            if torch.device(device).type == "cuda":
                return tree_map_only(Tensor, _wrapped, result)
            return to_host(result)
        return func(*args, **kwargs)


def _wrapped(x: Tensor) -> Tensor:
    if isinstance(x, DeviceTensor):
        return x
    wrapped = DeviceTensor(x.detach())
    return wrapped.requires_grad_(x.requires_grad)


def _is_data(func: Any) -> bool:
    return getattr(func, "__self__", None) is Tensor.data


def _to(name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    device, rest = {"cuda": DEVICE, "cpu": torch.device("cpu")}.get(name), []
    for value in args if name == "to" else ():
        if isinstance(value, Tensor):
            device = value.device
            rest.append(value.dtype)
        elif isinstance(value, (str, torch.device)):
            device = torch.device(value)
        elif isinstance(value, torch.dtype):
            rest.append(value)
    given = kwargs.pop("device", None)
    device = device if given is None else torch.device(given)
    if device is not None:
        x = to_gpu(x) if device.type == "cuda" else to_host(x)
    kwargs.pop("non_blocking", None)
    return x.to(*rest, **kwargs) if rest or kwargs else x


class _Replayed:
    """What a captured graph does: the same step again, into the same memory."""

    def __init__(self, step: Any) -> None:
        self._step = step

    def replay(self) -> None:
        self._step._hidden.copy_(self._step._run())


def _capture(step: Any) -> None:
    with counting() as reads:
        step._hidden = step._run().clone()
    assert not reads, f"a capture fails where the host reads the device: {dict(reads)}"
    step._graph = _Replayed(step)


class Stream:
    """A stream with nothing in it."""

    def __init__(self, device: object = None) -> None:
        self.device = DEVICE
        self.waits = 0

    def synchronize(self) -> None:
        self.waits += 1

    def is_capturing(self) -> bool:
        return False

    def wait_stream(self, other: Stream) -> None:
        """Nothing is behind anything."""


@contextlib.contextmanager
def fresh_table() -> Iterator[None]:
    """Forget which backends this machine has, before and after."""
    from rlaif_fast.loss.backends import Backend

    Backend.unavailable.cache_clear()
    try:
        yield
    finally:
        Backend.unavailable.cache_clear()


@contextlib.contextmanager
def simulated_gpu() -> Iterator[None]:
    """A machine with a GPU, for code that asks; the kernels run in Triton's interpreter."""
    import triton.runtime.interpreter as interpreter

    from rlaif_fast.loss import cuda
    from rlaif_fast.rollout.graphs import FixedStep
    from rlaif_fast_kernels import launch

    executor, engine = interpreter.GridExecutor.__call__, torch.autograd._engine_run_backward
    group = clip_grad._group_tensors_by_device_and_dtype

    def by_device(*args, **kwargs):  # groups in C++, to which the device has another name
        groups = group(*args, **kwargs)
        on_gpu = {key: isinstance(tensors[0][0][0], DeviceTensor) for key, tensors in groups.items()}
        return {(DEVICE if on_gpu[key] else key[0], key[1]): value for key, value in groups.items()}

    def backward(*args, **kwargs):
        with SimulatedGpu():  # PyTorch takes a mode off while it handles a call
            return engine(*args, **kwargs)

    def run(self, *args, **kwargs):
        unwrap = (tree_map_only(DeviceTensor, _value, x) for x in (args, kwargs))
        args, kwargs = unwrap
        with torch._C.DisableTorchFunction():
            return executor(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, SimulatedGpu(), fresh_table():
        patch.setattr(interpreter.GridExecutor, "__call__", run)
        patch.setattr(clip_grad, "_group_tensors_by_device_and_dtype", by_device)
        patch.setattr(torch.autograd, "_engine_run_backward", backward)
        patch.setattr(launch, "INTERPRETED", False)  # tensors are to be on a GPU
        # the operator is the same, the CPU's kernel behind it
        patch.setattr(cuda, "unavailable", lambda: None)
        patch.setattr(FixedStep, "_capture", _capture)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "current_stream", Stream)
        patch.setattr(torch.accelerator, "current_stream", Stream)
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        patch.setattr(torch.cuda, "stream", lambda *_: contextlib.nullcontext())
        patch.setattr(torch.cuda, "device_of", lambda *_: contextlib.nullcontext())
        patch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
        patch.setattr(
            torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=132)
        )
        yield
