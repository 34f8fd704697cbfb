"""The one table that says which implementation runs an operation.

An operation ("op") has up to four implementations ("backends"): `triton`, `cuda`, `cpu`, `reference`. A row
of `TABLE` names the module that implements it, which is imported when it is first needed. What a module
provides, per op (letters: N groups, G responses, B = N * G, T tokens, M rows, H hidden, V vocabulary):

    unavailable() -> str | None
        Why the backend cannot run on this machine at all, or None. Asked once.
    supports(op, device_type, dtype, group_size) -> str | None
        Why this call cannot run, or None; device and dtype are those of the op's first tensor (scores, logps,
        logits or hidden), group_size is G where the op ranks and None elsewhere.

    rank_penalty(inputs: RankInputs, options: RankOptions) -> RankAdvantages

    rank_loss(logps (B, T), entropy (B, T) | None, inputs: TokenInputs, options: LossOptions) -> TokenGradients
        Float inputs may be of any float dtype.

    row_stats(logits, token_ids (M,), scaling: Scaling) -> RowStats
    row_grad(logits, token_ids (M,), scaling, stats: RowStats, grad_logps (M,), grad_entropy (M,) | None, out)
        Write d/dlogits = grad_logps * dlogp/dlogits + grad_entropy * dentropy/dlogits; `out` may be `logits`.
    row_loss(logits, token_ids (M,), scaling, rows: RowInputs, options: LossOptions)
             -> (RowStats, grad_logps (M,), grad_entropy (M,))
        Both at once where the advantages are known: logits are overwritten by their gradient of the loss.
        Logits are (M, V), or (..., V) with M rows, the last stride 1. An id outside [0, V) yields a NaN logp,
        never a read; `row_grad` then has no one-hot term.

    linear_loss(hidden (M, H), head: Head, token_ids (M,), padding: Padding | None, close: Close,
                chunk_size: int | None, needs: Needs, shard: VocabularyShard | None)
                -> (TokenGradients, grad_hidden | None, grad_weight | None, grad_bias | None)
    linear_stats(hidden (M, H), head: Head, token_ids (M,), chunk_size) -> RowStats
    linear_grad(hidden (M, H), head: Head, token_ids (M,), stats: RowStats, grad_logps (M,), grad_entropy (M,),
                chunk_size, needs: Needs) -> (grad_hidden | None, grad_weight | None, grad_bias | None)
        `rlaif_fast.loss.linear` makes all three from a module that also has the row functions, `rank_loss` and
        chunk_rows(head: Head, chunk_size, rows) -> rows of logits in memory at once (`loss.chunks`)
        compact_rows(rows (M, V), keep (M,) bool) -> order (kept,)
            Brings the kept rows to the front and returns which row is now at each place.
        add_product(total (V, H), grad_logits (m, V), hidden (m, H), first)
            Adds grad_logits.T @ hidden to total, or with `first` writes it there.

The holders are those of `rlaif_fast.loss.inputs` and `rlaif_fast.loss.options`, handed on whole.
All results are detached and on the device of the inputs; those of `rank_penalty` have the dtype of the scores, the
others are float32 or wider.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OPS = ("rank_penalty", "rank_loss", "logits_loss", "linear_loss")
NAMES = ("triton", "cuda", "cpu", "reference")


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    Attributes:
        name: "triton", "cuda", "cpu" or "reference".
        op: The operation it implements.
        module: Where it is implemented (see the module's docstring).
        priority: `backend="auto"` takes the highest that supports the call.
    """

    name: str
    op: str
    module: str
    priority: int

    def load(self) -> Any:
        """Import and return the module."""
        return importlib.import_module(self.module)

    @functools.cache  # noqa: B019  the rows live as long as the process
    def unavailable(self) -> str | None:
        """Return why the backend cannot run on this machine, or None."""
        try:
            module = self.load()
        except ImportError as error:
            return f"{self.module} cannot be imported: {error}"
        return module.unavailable()

    def refuses(self, device_type: str, dtype: torch.dtype, group_size: int | None) -> str | None:
        """Return why this call cannot run here, or None."""
        return self.unavailable() or self.load().supports(self.op, device_type, dtype, group_size)


TABLE = (
    Backend("triton", "rank_loss", "rlaif_fast_kernels.rank_loss", 30),
    Backend("triton", "logits_loss", "rlaif_fast_kernels.logits_loss", 30),
    Backend("triton", "linear_loss", "rlaif_fast_kernels.linear_loss", 30),
    Backend("cuda", "rank_penalty", "rlaif_fast.loss.cuda", 20),
    Backend("triton", "rank_penalty", "rlaif_fast_kernels.rank_penalty", 15),
    Backend("cpu", "rank_penalty", "rlaif_fast.loss.cpu", 10),
    Backend("cpu", "rank_loss", "rlaif_fast.loss.cpu", 10),
    Backend("cpu", "logits_loss", "rlaif_fast.loss.cpu", 10),
    Backend("cpu", "linear_loss", "rlaif_fast.loss.cpu", 10),
    Backend("cuda", "linear_loss", "rlaif_fast.loss.cuda_rows", -1),  # only where it is asked for
    *(Backend("reference", op, "rlaif_fast.loss.reference.backend", 0) for op in OPS),
)


@dataclass(frozen=True)
class BackendStatus:
    """Whether one implementation can run on this machine, and if not, why."""

    name: str
    op: str
    available: bool
    reason: str


def rows(op: str) -> Iterable[Backend]:
    """Return the implementations of an operation, best first."""
    return sorted((row for row in TABLE if row.op == op), key=lambda row: -row.priority)


def select(op: str, name: str, x: Tensor, group_size: int | None = None) -> str:
    """Return the name of the backend that runs `op` on `x`.

    Args:
        op: One of `OPS`.
        name: "auto", or a backend by name, which then runs or raises: it never falls back.
        x: The first tensor of the call.
        group_size: G where the op ranks.

    Raises:
        ValueError: The name is unknown, or the named backend cannot run the call (the message says why).
    """
    # torch.compile may not know the size as a constant; the backends take every size that the checks allow.
    size = None if torch.compiler.is_compiling() else group_size
    return _select(op, name, x.device.type, x.dtype, size)


def _select(op: str, name: str, device_type: str, dtype: torch.dtype, group_size: int | None) -> str:
    call = (device_type, dtype, group_size)
    if name == "auto":
        # Triton's interpreter runs on the CPU when it is asked for by name only.
        candidates = (row for row in rows(op) if row.name != "triton" or device_type != "cpu")
        chosen = next(row for row in candidates if row.refuses(*call) is None)
        native = {"cuda": "triton", "cpu": "cpu"}.get(device_type)
        if chosen.name == "reference":
            _warn_once(next((row.unavailable() for row in rows(op) if row.name == native), None))
        return chosen.name
    if name not in NAMES:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, NAMES))}; got {name!r}")
    for row in rows(op):
        if row.name == name:
            reason = row.refuses(*call)
            if reason is None:
                return name
            raise ValueError(f"backend={name!r} cannot run {op}: {reason}")
    raise ValueError(f"backend={name!r} does not implement {op}; {[row.name for row in rows(op)]} do")


# The same as torch.compiler.assume_constant_result, without importing torch._dynamo, which takes seconds.
_select._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _warn_once(reason: str | None) -> None:
    if reason is not None:
        warnings.warn(
            f"rlaif_fast runs on its plain PyTorch reference: {reason}", RuntimeWarning, stacklevel=4
        )


def get(op: str, name: str) -> Any:
    """Return the module that implements `op` for a backend chosen earlier by `select`."""
    return next(row for row in TABLE if row.op == op and row.name == name).load()


def report() -> list[BackendStatus]:
    """Return every implementation, best first per op, and whether it can run on this machine."""
    statuses = []
    for op in OPS:
        for row in rows(op):
            reason = row.unavailable()
            statuses.append(BackendStatus(row.name, op, reason is None, reason or ""))
    return statuses
