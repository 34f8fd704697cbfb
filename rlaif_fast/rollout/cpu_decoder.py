"""The decode step of a plain text decoder on a CPU: one C++ operator a layer in place of the model's modules.

A decode step feeds a few tokens through every layer, and on a CPU the sixty small operators of a layer cost as much as
its matmuls. `decode_layer_` (csrc/cpu/decode_layer.cpp) does what lies between the matmuls in a few loops. It knows the
layer of Llama, Qwen2 and Qwen3: RMSNorm, grouped-query attention with rotary positions, SwiGLU. Whether a model has
such layers is read from its modules, and the first step is compared with the model's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlaif_fast.loss import extension
from rlaif_fast.policy.linear_attention import state_size
from rlaif_fast.policy.policy import Policy

log = logging.getLogger(__name__)

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
HEAD_NORMS = ("q_norm", "k_norm")
LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
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
    if policy.device.type != "cpu" or policy.head_weight.dtype != torch.float32:
        return "it computes in float32 on a CPU"
    missing = extension.unavailable()
    if missing is not None:
        return missing
    if policy.shards is not None:
        return "the weights are sharded"
    if policy.pattern is not None or state_size(policy.decoder):
        return "not every layer attends causally to all that came before"
    activation = getattr(policy.decoder.config, "hidden_act", None)
    if activation != "silu":
        return f"the activation is {activation}"
    reasons = (_refuses_layer(layer) for layer in policy.decoder.layers)
    return next((reason for reason in reasons if reason), None)


def _refuses_layer(layer: Any) -> str | None:
    parts = {name for name, _ in layer.named_children()}
    if parts != LAYER_PARTS:
        return f"a layer has the parts {', '.join(sorted(parts))}"
    for owner, names, others in ((layer.self_attn, ATTENTION, HEAD_NORMS), (layer.mlp, MLP, ("act_fn",))):
        children = dict(owner.named_children())
        if set(names) - set(children) or set(children) - {*names, *others}:
            return f"{type(owner).__name__} has the parts {', '.join(children)}"
        for name in names:  # an adapter or a quantized layer has another type
            if type(children[name]) is not nn.Linear:
                return f"{name} is a {type(children[name]).__name__}"
    hooked = (module for module in layer.modules() if module._forward_hooks or module._forward_pre_hooks)
    return next((f"{type(module).__name__} has hooks" for module in hooked), None)


class CpuDecoder:
    """Runs the decode steps of a policy in C++ where `refuses_cpu_decoder` has nothing against it.

    Args:
        policy: The policy. Its weights are read at each step, its modules at the beginning of each rollout.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._layers: list[_Layer] = []
        self._agrees: bool | None = None  # with the model's own step; None before the first

    @property
    def in_use(self) -> bool:
        """Whether the first step of the latest rollout's modules agreed, so that the others are C++."""
        return bool(self._layers and self._agrees)

    def begin(self) -> None:
        """Start a rollout: adapters or hooks may have come or gone since the last one."""
        before = [layer.modules for layer in self._layers]
        refused = refuses_cpu_decoder(self._policy)
        self._layers = [] if refused else [_Layer(layer) for layer in self._policy.decoder.layers]
        if [layer.modules for layer in self._layers] != before:
            self._agrees = None

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
            of_model: The same by the model's own modules. The first step compares the two; if they differ, these are
                used from then on.
        """
        if not self._layers or self._agrees is False:
            return of_model()
        if self._agrees:
            return self._run(ids, positions, step)
        found = self._try(ids, positions, step)
        expected = of_model()  # behind the other, so that its keys and values are the ones that stay
        distance = float((found - expected).norm() / expected.norm())
        self._agrees = distance < TOLERANCE
        if not self._agrees:  # NaN never agrees
            log.warning(
                "rollout: the C++ decode step is not used: it is off by %.1e of the model's own", distance
            )
        return expected

    def _try(self, ids: Tensor, positions: Tensor, step: GroupStep) -> Tensor:
        try:
            return self._run(ids, positions, step)
        except (TypeError, ValueError) as error:  # shapes of a layer that looks plain and is not
            log.warning("rollout: the C++ decode step refuses this model: %s", str(error).splitlines()[0])
            return torch.tensor(float("nan"))

    def _run(self, ids: Tensor, positions: Tensor, step: GroupStep) -> Tensor:
        decoder = self._policy.decoder
        hidden = self._policy.embedding(ids)
        given = positions[:, None] if self._policy.position_axes == 3 else positions[:1]
        cos, sin = (x[0].contiguous() for x in decoder.rotary_emb(hidden[None], given))
        for index, layer in enumerate(self._layers):
            layer(hidden, cos, sin, step.keys[index], step.values[index], step)
        return decoder.norm(hidden)


class _Layer:
    """The modules of one layer, in the operator's order.

    Attributes:
        modules: All of them.
    """

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        owners = [(attention, name) for name in ATTENTION] + [(layer.mlp, name) for name in MLP]
        self._projections = [getattr(owner, name) for owner, name in owners]
        head_norms = [getattr(attention, name, None) for name in HEAD_NORMS]
        self._norms = [layer.input_layernorm, layer.post_attention_layernorm, *head_norms]
        self.modules = [*self._projections, *self._norms]
        self._scale = attention.scaling
        norm = layer.input_layernorm
        self._eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps

    def __call__(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, step: GroupStep
    ) -> None:
        torch.ops.rlaif_fast.decode_layer_(
            hidden,
            cos,
            sin,
            keys,
            values,
            step.bias,
            step.slots,
            step.columns,
            [linear.weight for linear in self._projections],
            [linear.bias for linear in self._projections],
            [None if norm is None else norm.weight for norm in self._norms],
            self._eps,
            self._scale,
        )
