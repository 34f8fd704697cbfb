"""The decode step of a plain text decoder on a GPU: matmuls, attention, and one kernel between two of them.

The model's own modules run some fifty small kernels a layer beside its seven matmuls. A captured graph launches them
for free, but each still takes two or three microseconds, half of a step of a 7B model on an H100. Here they are four
(`kernels/decode_step.py`). The layers are those of `plain_layers`; `graphs.check_fused` compares a step with the
model's own, in values and in time.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.nn.functional import linear

from rlaif_fast.loss.precision import dtype_of
from rlaif_fast.policy.decode_step import refuses_decode_step
from rlaif_fast.policy.policy import Policy
from rlaif_fast.rollout.plain_layers import PlainLayer, plain_layers, refuses_plain_layers


class Buffers(Protocol):
    """Where a decode step puts keys and values and reads them.

    Attributes:
        keys: (N, K, L, D) of each layer.
        values: As `keys`.
        groups: (S,) int64, the group of each token.
        columns: (S,) int64, its column there.
    """

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    groups: Tensor
    columns: Tensor

    def read(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attend from (S, H, D) queries to what a layer's buffers hold, (S, H, D)."""
        ...


def refuses_fused_layers(policy: Policy) -> str | None:
    """Return why the decode step of a policy cannot run by fused kernels, or None."""
    weight = policy.head_weight
    if dtype_of(policy.device, weight.dtype) != weight.dtype:
        return "autocast casts the weights"
    reason = refuses_plain_layers(policy)
    if reason is not None:
        return reason
    if any((layer.norms[2] is None) != (layer.norms[3] is None) for layer in plain_layers(policy)):
        return "a layer norms only queries or only keys"
    return refuses_decode_step(policy.device.type, weight.dtype, weight.shape[1], policy.head_size)


class FusedLayers:
    """Runs a decode step by the fused kernels.

    Args:
        policy: One for which `refuses_fused_layers` returns None.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._layers = plain_layers(policy)

    def __call__(
        self,
        ids: Tensor,  # (S,)
        positions: Tensor,  # (3, S), equal for text
        buffers: Buffers,
    ) -> Tensor:
        """Return the last hidden states (S, C) of one token for each response.

        Raises:
            ValueError: The rotary positions cover only part of a head.
        """
        from rlaif_fast_kernels.decode_step import add_rms_norm, rotate_store, silu_mul

        policy, decoder = self._policy, self._policy.decoder
        residual = policy.embedding(ids)
        given = positions[:, None] if policy.position_axes == 3 else positions[:1]
        # The axes of a position are equal after the prompt, so the first stands for all.
        cos, sin = (x[0].reshape(len(ids), -1) for x in decoder.rotary_emb(residual[None], given))
        if cos.shape[1] != self._policy.head_size:
            raise ValueError(
                f"rotary positions must be of {self._policy.head_size} numbers; got {cos.shape[1]}"
            )
        delta: Tensor | None = None
        for index, layer in enumerate(self._layers):
            input_norm, post_attention_norm, query_norm, key_norm = layer.norms
            assert input_norm is not None and post_attention_norm is not None
            norms = None if query_norm is None or key_norm is None else (query_norm, key_norm)
            x = add_rms_norm(residual, delta, input_norm, layer.eps)
            query, key, value = (self._heads(layer, place, x) for place in range(3))
            keys, values = buffers.keys[index], buffers.values[index]
            cells = keys, values, buffers.groups, buffers.columns
            rotate_store(query, key, value, cos, sin, norms, layer.eps, *cells)
            attended = buffers.read(index, query, layer.scale).flatten(1)
            delta = linear(attended, layer.weights[3], layer.biases[3])
            x = add_rms_norm(residual, delta, post_attention_norm, layer.eps)
            gate, up = (linear(x, layer.weights[place], layer.biases[place]) for place in (4, 5))
            delta = linear(silu_mul(gate, up), layer.weights[6], layer.biases[6])
        assert delta is not None
        return decoder.norm(residual + delta)

    def _heads(self, layer: PlainLayer, place: int, x: Tensor) -> Tensor:
        """Queries, keys or values (S, heads, D)."""
        return linear(x, layer.weights[place], layer.biases[place]).unflatten(1, (-1, self._policy.head_size))
