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
from rlaif_fast.policy.attention import dtype_of
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
    dtype = dtype_of(policy.device, policy.head_weight.dtype)
    if policy.device.type != "cpu" or dtype != torch.float32:
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
    absent = [name for name in ("rotary_emb", "norm") if not hasattr(policy.decoder, name)]
    if absent:
        return f"{type(policy.decoder).__name__} has no {absent[0]}"
    reasons = (_refuses_layer(layer) for layer in policy.decoder.layers)
    return _refuses_call(policy.decoder) or next((reason for reason in reasons if reason), None)


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
    if not hasattr(layer.self_attn, "scaling"):
        return f"{type(layer.self_attn).__name__} has no scaling"
    epsilons = {_epsilon(norm) for norm in _norms(layer) if norm is not None}
    if None in epsilons or len(epsilons) > 1:
        return f"the norms of a layer have the epsilons {', '.join(sorted(map(str, epsilons)))}"
    reasons = (_refuses_call(module) for module in layer.modules())
    return _refuses_tensors(layer) or next((reason for reason in reasons if reason), None)


def _refuses_call(module: nn.Module) -> str | None:
    """Why a module may not be passed by: something else happens when it is called."""
    name = type(module).__name__
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{name} has hooks"
    return f"{name} has another forward than its class" if "forward" in vars(module) else None


def _refuses_tensors(layer: Any) -> str | None:
    """Why a layer's tensors are not just those that the operator reads; others may start at 0 and train."""
    read = {id(x) for linear in _linear_layers(layer) for x in (linear.weight, linear.bias)}
    read |= {id(getattr(norm, "weight", None)) for norm in _norms(layer)}
    for name, x in (*layer.named_parameters(), *layer.named_buffers()):
        if id(x) not in read:
            return f"a layer has the weight {name}"
        if type(x) is not nn.Parameter or x.dtype != torch.float32 or x.device.type != "cpu":
            return f"{name} is no float32 parameter on the CPU"
        if not x.is_contiguous():
            return f"{name} is not contiguous"
    return None


def _linear_layers(layer: Any) -> list[nn.Linear]:
    """The linear layers in the operator's order."""
    attention = [getattr(layer.self_attn, name) for name in ATTENTION]
    return attention + [getattr(layer.mlp, name) for name in MLP]


def _norms(layer: Any) -> list[Any]:
    """The norms in the operator's order; None for one of the heads that is absent."""
    of_heads = [getattr(layer.self_attn, name, None) for name in HEAD_NORMS]
    return [layer.input_layernorm, layer.post_attention_layernorm, *of_heads]


def _epsilon(norm: Any) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


class CpuDecoder:
    """Runs the decode steps of a policy in C++ where `refuses_cpu_decoder` has nothing against it.

    Args:
        policy: The policy. Its modules and their weights are read at the beginning of each rollout.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._layers: list[_Layer] = []
        self._agrees: bool | None = None  # with the model's own step; None before the first

    @property
    def in_use(self) -> bool:
        """Whether the present modules agreed with C++ at their first step, so that C++ is used."""
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
        expected = of_model()
        try:
            found = self._run(ids, positions, step)
        except (TypeError, ValueError) as error:  # shapes of a layer that looks plain and is not
            reason, self._agrees = str(error).splitlines()[0], False
        else:
            distance = float((found - expected).norm() / expected.norm())
            reason, self._agrees = f"it is off by {distance:.1e} of the model's own", distance < TOLERANCE
        if self._agrees:  # NaN never agrees
            return found  # as every later step, so that a rollout does not depend on when this was asked
        log.warning("rollout: the C++ decode step is not used: %s", reason)
        return of_model()  # once more, so that the keys and values are its own

    def _run(self, ids: Tensor, positions: Tensor, step: GroupStep) -> Tensor:
        decoder = self._policy.decoder
        hidden = self._policy.embedding(ids)
        given = positions[:, None] if self._policy.position_axes == 3 else positions[:1]
        cos, sin = (x[0].contiguous() for x in decoder.rotary_emb(hidden[None], given))
        for index, layer in enumerate(self._layers):
            layer(hidden, cos, sin, step.keys[index], step.values[index], step)
        return decoder.norm(hidden)


class _Layer:
    """The tensors of one layer, in the operator's order, for one rollout; reading them off the modules takes longer.

    Attributes:
        modules: All of them, the ones that are passed by too: a layer with another activation is another layer.
    """

    def __init__(self, layer: Any) -> None:
        projections = _linear_layers(layer)
        self.modules = list(layer.modules())
        self._weights = [linear.weight for linear in projections]
        self._biases = [linear.bias for linear in projections]
        self._norms = [None if norm is None else norm.weight for norm in _norms(layer)]
        self._scale = layer.self_attn.scaling
        self._eps = _epsilon(layer.input_layernorm)

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
            self._weights,
            self._biases,
            self._norms,
            self._eps,
            self._scale,
        )
