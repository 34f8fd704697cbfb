"""Counts, by part, what code allocates and computes on the meta device.

Tensors there have shapes but no content, so a model of 72 billion weights runs a step in seconds. Every operator passes
through a `TorchDispatchMode`, including backward passes and recomputed layers; a storage counts until it is freed.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from rlaif_fast.policy.flash import Call


class Ledger(TorchDispatchMode):
    """Bytes alive now, and at the peak.

    Args:
        there: Tensors that existed before; a view of one is not new.

    Attributes:
        alive: Bytes by part.
        at_peak: Bytes by part when their sum was largest, since the last `take_peak`.
        flops: Floating-point operations of matrix products so far.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self._there = [tensor.untyped_storage() for tensor in there]
        self.alive: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.flops = 0.0
        self._sum = self._most = 0
        self._part = "activations"
        # By id of the storage.
        self._known: dict[int, tuple[str, int]] = {id(storage): ("", 0) for storage in self._there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._add(tensor)
        return out

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is allocated inside as part `name`."""
        outer, self._part = self._part, name
        try:
            yield
        finally:
            self._part = outer

    def move(self, tensor: Tensor, part: str) -> None:
        """Move a tensor that is alive to another part."""
        key = id(tensor.untyped_storage())
        if key in self._known:
            old, size = self._known[key]
            self._known[key] = part, size
            self.alive[old] -= size
            self.alive[part] += size

    def take_peak(self) -> Counter[str]:
        """The bytes by part at the peak so far; then start looking for a new peak."""
        peak, self._most, self.at_peak = self.at_peak, self._sum, Counter(self.alive)
        return +peak

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = self._part, size
        weakref.finalize(storage, self._free, key).atexit = False
        self._grow(self._part, size)

    def _grow(self, part: str, size: int) -> None:
        self.alive[part] += size
        self._sum += size
        if self._sum > self._most:
            self._most, self.at_peak = self._sum, Counter(self.alive)

    def _free(self, key: int) -> None:
        part, size = self._known.pop(key)
        self.alive[part] -= size
        self._sum -= size


@contextlib.contextmanager
def fused_attention(ledger: Ledger) -> Iterator[None]:
    """Let PyTorch's attention cost what a fused kernel does; by default it writes out the scores on meta.

    The function itself is replaced: layers recomputed in a backward pass do not see the caller's modes.
    """

    def fused(
        query: Tensor, key: Tensor, value: Tensor, *_: Any, is_causal: bool = False, **__: Any
    ) -> Tensor:
        return _Fused.apply(query, key, value, is_causal, ledger)

    usual = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = usual


class IndicesToMeta(TorchFunctionMode):
    """Moves index tensors that a model made on the CPU to the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_meta = [x.is_meta for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(on_meta) and not all(on_meta):
            args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


class _Fused(torch.autograd.Function):
    """Attention that keeps its inputs, its output and the log-sum-exp of each row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool, ledger: Ledger) -> Tensor:
        n, heads, rows, size = query.shape
        output = query.new_empty(n, rows, heads, size).transpose(1, 2)
        lse = query.new_empty(n, heads, rows, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.ledger, ctx.flops = ledger, 4 * query.numel() * key.shape[2] * (0.5 if causal else 1.0)
        ledger.flops += ctx.flops
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        ctx.ledger.flops += 2.5 * ctx.flops  # two more products, and the scores again
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None, None


class FusedVarlen:
    """The kernels of `policy.flash.VarlenKernel` on the meta device."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        self._ledger.flops += self._flops(call)
        return torch.empty_like(call.q), call.q.new_empty(*call.q.shape[1::-1], dtype=torch.float32)

    def backward(self, call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._ledger.flops += 2.5 * self._flops(call)
        dq, dk, dv = (torch.empty_like(x) for x in call.tensors)
        return dq, dk, dv

    def _flops(self, call: Call) -> float:
        return 4.0 * call.q.numel() * call.keys.longest * (0.5 if call.causal else 1.0)
