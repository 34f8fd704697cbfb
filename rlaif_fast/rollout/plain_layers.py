"""Which decoders are made of the layer of Llama, Qwen2 and Qwen3, and its tensors.

RMSNorm, grouped-query attention with rotary positions, SwiGLU: what a decode step computes without the model's modules,
in C++ on a CPU and by fused kernels on a GPU. It is read from the modules; a layer that only looks like one is found by
comparing a step with the model's own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rlaif_fast.policy.linear_attention import state_size
from rlaif_fast.policy.policy import Policy

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
HEAD_NORMS = ("q_norm", "k_norm")
LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


def refuses_plain_layers(policy: Policy) -> str | None:
    """Return why the decoder of a policy is not made of plain layers alone, or None."""
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
    like = policy.head_weight
    reasons = (_refuses_layer(layer, like) for layer in policy.decoder.layers)
    return _refuses_call(policy.decoder) or next((reason for reason in reasons if reason), None)


def plain_layers(policy: Policy) -> list[PlainLayer]:
    """The layers of a decoder for which `refuses_plain_layers` returns None."""
    return [PlainLayer(layer) for layer in policy.decoder.layers]


class PlainLayer:
    """The tensors of a layer, kept because reading them from the modules at each step is slow.

    Attributes:
        modules: All modules of the layer, the bypassed ones too: a layer with another activation is another layer.
        weights: Of the projections of queries, keys, values and output, then of gate, up and down.
        biases: As `weights`; None for one that is absent.
        norms: Weights of the norms before attention and before the MLP, and of query and key heads, None where absent.
        scale: Of the attention's scores.
        eps: Of every norm.
    """

    def __init__(self, layer: Any) -> None:
        projections = _linear_layers(layer)
        self.modules = list(layer.modules())
        self.weights: list[Tensor] = [linear.weight for linear in projections]
        self.biases: list[Tensor | None] = [linear.bias for linear in projections]
        self.norms: list[Tensor | None] = [None if norm is None else norm.weight for norm in _norms(layer)]
        self.scale: float = layer.self_attn.scaling
        self.eps: float = _epsilon(layer.input_layernorm) or 0.0


def _refuses_layer(layer: Any, like: Tensor) -> str | None:
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
    return _refuses_tensors(layer, like) or next((reason for reason in reasons if reason), None)


def _refuses_call(module: nn.Module) -> str | None:
    """Why a module cannot be bypassed: calling it does more than its class says. None where it can."""
    name = type(module).__name__
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{name} has hooks"
    return f"{name} has another forward than its class" if "forward" in vars(module) else None


def _refuses_tensors(layer: Any, like: Tensor) -> str | None:
    """Why a layer has tensors that the operator would not read, or cannot; None where it has none.

    An unknown tensor may be all 0 at first and be trained, so comparing one step would not find it.
    """
    read = {id(x) for linear in _linear_layers(layer) for x in (linear.weight, linear.bias)}
    read |= {id(getattr(norm, "weight", None)) for norm in _norms(layer)}
    for name, x in (*layer.named_parameters(), *layer.named_buffers()):
        if id(x) not in read:
            return f"a layer has the weight {name}"
        if type(x) is not type(like) or (x.dtype, x.device) != (like.dtype, like.device):
            return f"{name} is not a parameter of {like.dtype} on {like.device}"
        if not x.is_contiguous():
            return f"{name} is not contiguous"
    return None


def _linear_layers(layer: Any) -> list[nn.Linear]:
    """The linear layers in the operator's order."""
    attention = [getattr(layer.self_attn, name) for name in ATTENTION]
    return attention + [getattr(layer.mlp, name) for name in MLP]


def _norms(layer: Any) -> list[Any]:
    """The norms in the operator's order; None for an absent one of the heads."""
    of_heads = [getattr(layer.self_attn, name, None) for name in HEAD_NORMS]
    return [layer.input_layernorm, layer.post_attention_layernorm, *of_heads]


def _epsilon(norm: Any) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
