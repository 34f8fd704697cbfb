"""The decode step of a plain text decoder on a CPU: one C++ operator a layer in place of the model's modules.

A decode step feeds a few tokens through every layer, and on a CPU the sixty small operators of a layer cost as much as
its matmuls. `decode_layer_` (csrc/cpu/decode_layer.cpp) does what lies between the matmuls in a few loops. It knows the
layers of `plain_layers`; the first step is compared with the model's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from rlaif_fast.errors import first_line
from rlaif_fast.loss import extension
from rlaif_fast.loss.precision import dtype_of
from rlaif_fast.policy.policy import Policy
from rlaif_fast.rollout.plain_layers import PlainLayer, plain_layers, refuses_plain_layers

log = logging.getLogger(__name__)

STEPS_AHEAD = 256  # cosines and sines are made for this many steps at once
TOLERANCE = 1e-4  # relative l2 distance of two float32 results that add up in another order


class GroupStep(Protocol):
    """What a decode step writes to and attends to.

    Attributes:
        keys: (N, K, L, D) of each layer.
        values: As `keys`.
        slots: (A,) int64, n W + w of each node.
        columns: (A,) int64, where a node's own key and value go.
    """

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    slots: Tensor
    columns: Tensor

    @property
    def bias(self) -> Tensor:
        """(N, 1, W, C) additive mask; C columns in use."""
        ...


def refuses_cpu_decoder(policy: Policy) -> str | None:
    """Return why the decode step of a policy cannot run in C++, or None."""
    dtype = dtype_of(policy.device, policy.head_weight.dtype)
    if policy.device.type != "cpu" or dtype != torch.float32:
        return "it computes in float32 on a CPU"
    missing = extension.unavailable()
    if missing is not None:
        return missing
    return refuses_plain_layers(policy)


class CpuDecoder:
    """Runs the decode steps of a policy in C++ where `refuses_cpu_decoder` returns None.

    Args:
        policy: The policy. Its modules and their weights are read at the beginning of each rollout.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._layers: list[PlainLayer] = []
        self._agrees: bool | None = None  # with the model's own step; None before the first
        self._rotary_span = range(0)  # positions of the table
        self._rotary_table: tuple[Tensor, ...] = ()  # cosines and sines, each (positions, D)

    @property
    def in_use(self) -> bool:
        """Whether the present modules agreed with C++ at their first step, so that C++ is used."""
        return bool(self._layers and self._agrees)

    def begin(self) -> None:
        """Start a rollout: adapters or hooks may have come or gone since the last one."""
        before = [layer.modules for layer in self._layers]
        refused = refuses_cpu_decoder(self._policy)
        self._layers = [] if refused else plain_layers(self._policy)
        if [layer.modules for layer in self._layers] != before:
            self._agrees = None
        self._rotary_span = range(0)

    def __call__(
        self,
        ids: Tensor,  # (A,)
        positions: Tensor,  # (3, A)
        step: GroupStep,
        of_model: Callable[[], Tensor],
    ) -> Tensor:
        """Return the last hidden states (A, H) of one token for each node.

        Args:
            ids: Tokens.
            positions: Their position ids.
            step: The buffers; each layer writes the tokens' keys and values.
            of_model: The same by the model's own modules. The first step compares the two; if they differ, the modules
                are used from then on.
        """
        if not self._layers or self._agrees is False:
            return of_model()
        if self._agrees:
            return self._run(ids, positions, step)
        expected = of_model()
        try:
            found = self._run(ids, positions, step)
        except (TypeError, ValueError) as error:  # shapes of a layer that looks plain and is not
            reason, self._agrees = first_line(error), False
        else:
            distance = float((found - expected).norm() / expected.norm())
            reason, self._agrees = f"it is off by {distance:.1e} of the model's own", distance < TOLERANCE
        if self._agrees:  # NaN never agrees
            return found  # as in every later step, so that a rollout does not depend on when the check ran
        log.warning("rollout: the C++ decode step is not used: %s", reason)
        return of_model()  # once more, so that the keys and values are its own

    def _run(self, ids: Tensor, positions: Tensor, step: GroupStep) -> Tensor:
        hidden = self._policy.embedding(ids)
        # The axes of a position are equal after the prompt, so the first stands for all.
        cos, sin = self._rotary(positions[0], hidden)
        for index, layer in enumerate(self._layers):
            torch.ops.rlaif_fast.decode_layer_(
                hidden,
                cos,
                sin,
                step.keys[index],
                step.values[index],
                step.bias,
                step.slots,
                step.columns,
                layer.weights,
                layer.biases,
                layer.norms,
                layer.eps,
                layer.scale,
            )
        return self._policy.decoder.norm(hidden)

    def _rotary(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (A, D) of positions (A,), from a table for many steps where positions alone set them."""
        if _rotates_by_length(self._policy.decoder.rotary_emb):
            return self._make_rotary(positions, like)
        least, most = map(int, positions.aminmax())
        if least < self._rotary_span.start or most >= self._rotary_span.stop:
            self._rotary_span = range(least, most + STEPS_AHEAD)
            self._rotary_table = self._make_rotary(torch.arange(least, most + STEPS_AHEAD), like)
        rows = positions - self._rotary_span.start
        cos, sin = (table.index_select(0, rows) for table in self._rotary_table)
        return cos, sin

    def _make_rotary(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        lead = (3, 1) if self._policy.position_axes == 3 else (1,)
        cos, sin = self._policy.decoder.rotary_emb(like[None], positions.expand(*lead, -1))
        return cos[0].reshape(len(positions), -1), sin[0].reshape(len(positions), -1)


def _rotates_by_length(rotary: Any) -> bool:
    """Whether the angles of a position depend on the largest position in the call; True where that is unknown."""
    kind = getattr(rotary, "rope_type", None)
    return not isinstance(kind, str) or "dynamic" in kind or kind == "longrope"
