"""Linear-attention layers (gated delta rule) in packed rows: each response starts from the state after its prompt.

Such a layer reads a sequence token by token. It leaves the last K - 1 inputs of a short convolution, the tail, and a
recurrent state. In a packed row both are computed once per prompt, and every response of the group starts from them,
so the gradient that reaches them is the sum over the responses. A prefix that responses share is one run of tokens in
the row, projected once; only the recurrence runs over it for each of them.

Sequences are padded to one length inside the recurrence. A padding token has beta = 0 and g = 0, so it changes no
state:

    S = exp(g) S + beta k (v - exp(g) S k)^T        out = S^T q

The convolution and the recurrence are the functions that the model's own forward calls: the kernels of causal-conv1d
and flash-linear-attention if transformers finds them, else its PyTorch path.

Letters: S tokens of the row, b sequences of L tokens, C channels, K width of the convolution, Hk and Hv heads of keys
and values, Dk and Dv their sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rlaif_fast.policy.packing import Bucket, PackedRow, make_buckets


class StateContext(Protocol):
    """What `shared_states=` carries to every linear-attention layer of one forward."""

    def mix(
        self,
        layer: Any,
        qkv: Tensor,  # (S, C) before the convolution
        decay: Tensor,  # (S, Hv) float32, g
        beta: Tensor,  # (S, Hv)
    ) -> Tensor:
        """Return (S, Hv, Dv)."""
        ...


def install(decoder: Any) -> None:
    """Route the linear-attention layers of a text decoder through `StateContext`s, when one is given."""
    for layer in _layers(decoder):
        if not isinstance(layer.forward, partial):
            layer.forward = partial(_forward, layer, layer.forward)


def state_size(decoder: Any) -> int:
    """Size of the state, in numbers, that one sequence leaves in all linear-attention layers."""
    return sum(
        layer.num_v_heads * layer.head_k_dim * layer.head_v_dim
        + layer.conv_dim * (layer.conv_kernel_size - 1)
        for layer in _layers(decoder)
    )


def _layers(decoder: Any) -> list[Any]:
    return [layer.linear_attn for layer in decoder.layers if hasattr(layer, "linear_attn")]


def _forward(
    layer: Any,
    own: Callable[..., Tensor],
    hidden_states: Tensor,  # (1, S, H)
    *args: Any,
    shared_states: StateContext | None = None,
    **kwargs: Any,
) -> Tensor:
    if shared_states is None:
        return own(hidden_states, *args, **kwargs)
    x = hidden_states[0]
    beta = layer.in_proj_b(x).sigmoid()
    # In float32, as the model does: in 16 bits the exponential may overflow.
    decay = -layer.A_log.float().exp() * functional.softplus(layer.in_proj_a(x).float() + layer.dt_bias)
    mixed = shared_states.mix(layer, layer.in_proj_qkv(x), decay, beta)
    gate = layer.in_proj_z(x).reshape(-1, layer.head_v_dim)
    normed = layer.norm(mixed.reshape(-1, layer.head_v_dim), gate)
    return layer.out_proj(normed.reshape(1, len(x), -1))


def _functions(layer: Any) -> Any:
    """The module of the model's own file, whose functions its forward calls."""
    return sys.modules[type(layer).__module__]


def _convolve(layer: Any, x: Tensor) -> Tensor:  # (b, L, C) -> (b, L, C)
    weight = layer.conv1d.weight.squeeze(1)
    convolved = _functions(layer).causal_conv1d_fn(
        x.transpose(1, 2), weight, layer.conv1d.bias, activation=layer.activation
    )
    return convolved.transpose(1, 2)


def _recur(
    layer: Any,
    rule: Callable[..., tuple[Tensor, Tensor]],
    qkv: Tensor,  # (b, L, C) after the convolution
    decay: Tensor,  # (b, L, Hv)
    beta: Tensor,  # (b, L, Hv)
    state: Tensor | None = None,  # (b, Hv, Dk, Dv)
) -> tuple[Tensor, Tensor]:
    """The output (b, L, Hv, Dv) and the final state."""
    query, key, value = (
        x.unflatten(-1, (heads, -1))
        for x, heads in zip(
            qkv.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1),
            (layer.num_k_heads, layer.num_k_heads, layer.num_v_heads),
        )
    )
    repeat = layer.num_v_heads // layer.num_k_heads
    if repeat > 1:
        query, key = (x.repeat_interleave(repeat, dim=2) for x in (query, key))
    return rule(
        query,
        key,
        value,
        g=decay,
        beta=beta,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )


class NodeStates:
    """Tails and states of the nodes of a rollout; used as a context, each node reads one more token."""

    def __init__(self) -> None:
        self._of_layer: dict[int, tuple[Tensor, Tensor]] = {}  # (A, C, K - 1) and (A, Hv, Dk, Dv)

    def put(self, layer: Any, nodes: Tensor, count: int, tails: Tensor, states: Tensor) -> None:
        """Write the tails (n, C, K - 1) and states (n, Hv, Dk, Dv) after some of `count` nodes."""
        if layer.layer_idx not in self._of_layer:
            made = tuple(x.new_zeros(count, *x.shape[1:]) for x in (tails, states))
            self._of_layer[layer.layer_idx] = (made[0], made[1])
        for kept, new in zip(self._of_layer[layer.layer_idx], (tails, states)):
            kept[nodes] = new

    def select(self, nodes: Tensor) -> None:
        """Continue with these nodes; some may occur several times."""
        for layer, (tails, states) in self._of_layer.items():
            self._of_layer[layer] = (tails.index_select(0, nodes), states.index_select(0, nodes))

    def mix(self, layer: Any, qkv: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        """One more token for each node."""
        functions = _functions(layer)
        tails, states = self._of_layer[layer.layer_idx]
        x = functions.causal_conv1d_update(  # updates the tails in place
            qkv[..., None], tails, layer.conv1d.weight.squeeze(1), layer.conv1d.bias, layer.activation
        )
        output, states = _recur(
            layer,
            functions.torch_recurrent_gated_delta_rule,
            x.transpose(1, 2),
            decay[:, None],
            beta[:, None],
            states,
        )
        self._of_layer[layer.layer_idx] = (tails, states)
        return output[:, 0]


@dataclass(frozen=True)
class Keep:
    """Where a row's pass stores the state after each of its responses.

    Attributes:
        states: The store.
        nodes: (B,) the node of each response.
        count: Number of nodes in the store.
    """

    states: NodeStates
    nodes: np.ndarray
    count: int


@dataclass(frozen=True)
class _Part:
    """Groups of similar size; indices are places in the row, S for none.

    Attributes:
        responses: (b,) their numbers in the row.
        prompts: (n, P).
        windows: (b, K - 1 + T) the prompt's tail and the tokens of each response.
        group: (b,) the prompt of each response.
        last: (b, K - 1) the tail that the response leaves.
    """

    responses: np.ndarray
    prompts: Tensor
    windows: Tensor
    group: Tensor
    last: Tensor


class RowStates:
    """The linear attention of one packed row.

    Args:
        row: Its layout.
        tail: K - 1.
        device: Device of the tensors.
        keep: Where to store the state after each response; None if nothing reads it.
    """

    def __init__(self, row: PackedRow, tail: int, device: torch.device, keep: Keep | None = None) -> None:
        self._tail, self._keep = tail, keep
        self._parts = []
        cells = np.empty(row.tokens, dtype=np.int64)  # each token's place among the parts' outputs
        begin = 0
        # A response without a node of its own has no output.
        holders = np.unique(row.node_response) if keep is None else np.arange(len(row.lengths))
        for bucket in make_buckets(row):
            prompts, windows, mine = _windows(row, bucket, holders, tail)
            fed = np.maximum(row.lengths[mine] - 1, 0)
            for places in (prompts, _owned(row, windows[:, tail:], mine)):
                real = np.flatnonzero(places < row.tokens)
                cells[places.reshape(-1)[real]] = begin + real
                begin += places.size
            last = np.take_along_axis(windows, fed[:, None] + np.arange(tail), axis=1)
            group = np.searchsorted(bucket.groups, row.group_of_response[mine])
            index = [torch.from_numpy(x).to(device) for x in (prompts, windows, group, last)]
            self._parts.append(_Part(mine, *index))
        self._cells = torch.from_numpy(cells).to(device)

    def mix(self, layer: Any, qkv: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        """Outputs of the row's tokens, each computed along its own path."""
        qkv, decay, beta = (functional.pad(x, (0, 0, 0, 1)) for x in (qkv, decay, beta))
        rule = _functions(layer).torch_chunk_gated_delta_rule
        outputs = []
        for part in self._parts:
            x, g, b = (_take(y, part.prompts) for y in (qkv, decay, beta))
            output, states = _recur(layer, rule, _convolve(layer, x), g, b)
            outputs.append(output.flatten(0, 1))
            behind = states.index_select(0, part.group)
            if part.windows.shape[1] > self._tail and len(part.responses):
                x, g, b = (_take(y, part.windows) for y in (qkv, decay, beta))
                x, g, b = (y[:, self._tail :] for y in (_convolve(layer, x), g, b))
                output, behind = _recur(layer, rule, x, g, b, behind)
                outputs.append(output.flatten(0, 1))
            if self._keep is not None:
                nodes = torch.from_numpy(self._keep.nodes[part.responses]).to(qkv.device)
                tails = _take(qkv, part.last).transpose(1, 2)
                self._keep.states.put(layer, nodes, self._keep.count, tails, behind)
        return torch.cat(outputs).index_select(0, self._cells)


def row_states(
    decoder: Any, row: PackedRow, device: torch.device, keep: Keep | None = None
) -> RowStates | None:
    """The context of one packed row; None for a decoder without linear-attention layers."""
    layers = _layers(decoder)
    return RowStates(row, layers[0].conv_kernel_size - 1, device, keep) if layers else None


def _take(x: Tensor, index: Tensor) -> Tensor:  # (S + 1, C), (b, L) -> (b, L, C)
    return x.index_select(0, index.reshape(-1)).view(*index.shape, -1)


def _windows(
    row: PackedRow, bucket: Bucket, holders: np.ndarray, tail: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places of the prompts (n, P), of the tail and tokens of each response (b, K - 1 + T), and the responses (b,)."""
    nowhere, group = row.tokens, row.group_of_response
    begins, lengths = row.group_starts, row.prompt_lengths
    column = np.arange(bucket.prompt)
    prompts = begins[bucket.groups, None] + column
    prompts = np.where(column < lengths[bucket.groups, None], prompts, nowhere)
    mine = holders[np.isin(group[holders], bucket.groups)]
    end = (begins + lengths)[group[mine], None]
    tails = end - tail + np.arange(tail)
    tails = np.where(tails >= begins[group[mine], None], tails, nowhere)
    path = row.path[mine, : int(np.maximum(row.lengths[mine] - 1, 0).max(initial=0))]
    places = np.append(row.node_index, nowhere)[path]  # -1 reads the last entry
    return prompts, np.concatenate((tails, places), axis=1), mine


def _owned(row: PackedRow, places: np.ndarray, responses: np.ndarray) -> np.ndarray:
    """(b, T) places of tokens, S for those that another response holds."""
    owner = np.full(row.tokens + 1, -1)
    owner[row.node_index] = row.node_response
    return np.where(owner[places] == responses[:, None], places, row.tokens)
