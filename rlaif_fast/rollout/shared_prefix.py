"""The shared-prefix rollout: a prompt is prefilled once a group, its keys and values exist once a group.

Responses of a group that have drawn the same tokens so far are one node of the group's tree: computed once,
split when their draws part. A group has one buffer of keys and values a layer, allocated once: [prompt |
nodes in the order they came]. A step appends a column for each new node and attends, in one call a layer,
from the group's nodes to the group's buffer, under a mask that leaves each node its prompt and its ancestors.
Nothing is concatenated, copied on a split, or moved when a response ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rlaif_fast.loss.precision import dtype_of
from rlaif_fast.policy.attention import AttentionContext, SdpaContext, sdpa
from rlaif_fast.policy.cut import cut
from rlaif_fast.policy.features import MediaFeatures
from rlaif_fast.policy.forward_rows import answer_rows, share_media
from rlaif_fast.policy.linear_attention import Keep, NodeStates, state_size
from rlaif_fast.policy.packing import PackedRow, pack, ranges, starts
from rlaif_fast.policy.pattern import Pattern, row_context, window_of
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.rollout.base import ReadsPolicy, Rollout, SamplingParams, concat_rollouts
from rlaif_fast.rollout.cpu_decoder import CpuDecoder
from rlaif_fast.rollout.generate import Drawn, TokenSampler, check_params, uniforms
from rlaif_fast.rollout.labels import Label, LabelSampler, token_sampler


class GroupCache:
    """Keys and values of N groups, (N, K, L, D) per attention layer, and the states of linear-attention layers.

    Args:
        policy: The policy whose layers they belong to.
        prompt_lengths: (N,) columns that the prompts take.
        length: L, columns in all.
    """

    def __init__(self, policy: Policy, prompt_lengths: np.ndarray, length: int) -> None:
        config = policy.decoder.config
        attend = {i: m.self_attn for i, m in enumerate(policy.decoder.layers) if hasattr(m, "self_attn")}
        device, dtype = policy.device, dtype_of(policy.device, policy.head_weight.dtype)
        self.length, self.head_size = length, policy.head_size
        shape = (len(prompt_lengths), config.num_key_value_heads, length, self.head_size)
        self.keys, self.values = (
            {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in attend} for _ in range(2)
        )
        self.states = NodeStates() if state_size(policy.decoder) else None
        self.heads_per_key = config.num_attention_heads // config.num_key_value_heads
        self.used = prompt_lengths.copy()  # (N,) columns in use
        # (N, L) position of each column's token in its own sequence; meaningful for columns in use
        self.places = np.broadcast_to(np.arange(length), (len(prompt_lengths), length)).copy()

    def write(self, layer: int, groups: Tensor, columns: Tensor, key: Tensor, value: Tensor) -> None:
        """Put the keys and values (1, K, S, D) of S tokens in columns of their groups."""
        self.keys[layer][groups, :, columns] = key[0].transpose(0, 1)
        self.values[layer][groups, :, columns] = value[0].transpose(0, 1)

    def attend(
        self,
        layer: int,
        query: Tensor,  # (N * W, H, D), the queries of a group adjacent
        bias: Tensor,  # (N, 1, W * heads_per_key, length) additive
        scale: float,
    ) -> Tensor:  # (N * W, H, D)
        """Attend from W queries of each group to the first `length` columns of its buffer."""
        length = bias.shape[-1]
        keys, values = self.keys[layer][:, :, :length], self.values[layer][:, :, :length]
        groups, (heads, size) = len(keys), query.shape[1:]
        q = query.reshape(groups, -1, heads, size).transpose(1, 2)
        # The query heads that share a key head become more queries of that head: its keys are read once.
        q = q.reshape(groups, keys.shape[1], -1, size)
        output = sdpa(q, keys, values, scale=scale, mask=bias)
        return output.reshape(groups, heads, -1, size).transpose(1, 2).reshape(-1, heads, size)

    def keep(self, groups: np.ndarray) -> None:
        """Drop all other groups."""
        index = torch.from_numpy(groups).to(next(iter(self.keys.values())).device)
        for layer in self.keys:
            self.keys[layer] = self.keys[layer].index_select(0, index)
            self.values[layer] = self.values[layer].index_select(0, index)
        self.used, self.places = self.used[groups], self.places[groups]


def tokens_a_state(policy: Policy) -> int:
    """How many tokens' keys and values take as much memory as the linear-attention states of one response."""
    numbers = state_size(policy.decoder)
    if not numbers:
        return 0
    layers = sum(hasattr(layer, "self_attn") for layer in policy.decoder.layers)
    a_token = 2 * layers * policy.decoder.config.num_key_value_heads * policy.head_size
    return -(-numbers * torch.float32.itemsize // (a_token * policy.head_weight.itemsize))


class _Prefill:
    """The attention of a packed row to itself, storing the prompts' keys and values on the way.

    Args:
        cache: Where keys and values go.
        row: The common part of prompts about one clip is the row's prompt, the rest of each a response.
        prompts: For each of the row's responses the prompt that it completes, by its place in the cache.
        rests: Tokens of each prompt outside the common part.
        packed: The attention of the row.
        device: Of the cache.
    """

    def __init__(
        self,
        cache: GroupCache,
        row: PackedRow,
        prompts: np.ndarray,
        rests: np.ndarray,
        packed: AttentionContext,
        device: torch.device,
    ) -> None:
        group = row.group_of_response
        common = row.prompt_lengths[group]
        begins = starts(row.prompt_lengths)
        # Each response is the rest of its prompt and one more token; all but the last are fed.
        ends = np.cumsum(rests + 1)
        shared = row.prompt_index[np.repeat(begins[group], common) + ranges(common)]
        rest = row.predictor_index[np.repeat(ends - rests, rests) + ranges(rests)]
        columns = np.concatenate((ranges(common), np.repeat(common, rests) + ranges(rests)))
        self._cache = cache
        self._source = torch.from_numpy(np.concatenate((shared, rest))).to(device)
        self._groups = torch.from_numpy(
            np.concatenate((np.repeat(prompts, common), np.repeat(prompts, rests)))
        ).to(device)
        self._columns = torch.from_numpy(columns).to(device)
        self._packed = packed

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        kept = (x.index_select(2, self._source) for x in (key, value))
        self._cache.write(layer, self._groups, self._columns, *kept)
        return self._packed.attend(layer, query, key, value, scale)


class _Step:
    """One token for each node of each group, against the group's buffer.

    Args:
        groups: (A,) group of each node, ascending.
        columns: (A,) column of its own key and value.
        allowed: (A, L) what it may attend to, apart from a layer's window.
        pattern: Which layers have a window; None where no layer has.
        like: A tensor with the dtype and device of the masks.

    Attributes:
        keys: (N, K, L, D) of each layer.
        values: As `keys`.
        slots: (A,) int64, each node's place in a grid of as many nodes for every group.
        columns: (A,) int64.
    """

    def __init__(
        self,
        cache: GroupCache,
        groups: np.ndarray,
        columns: np.ndarray,
        allowed: np.ndarray,
        pattern: Pattern | None,
        like: Tensor,
    ) -> None:
        counts = np.bincount(groups, minlength=len(cache.used))
        width = int(counts.max())
        place = groups * width + ranges(counts)
        length = int(cache.used.max())
        device = like.device

        def bias_of(window: int | None) -> Tensor:
            mask = np.ones((len(counts) * width, length), dtype=bool)
            seen = allowed
            if window is not None:
                distance = cache.places[groups, columns][:, None] - cache.places[groups]  # (A, L) in tokens
                seen = allowed & (distance < window)
            mask[place] = seen[:, :length]
            bias = torch.where(torch.from_numpy(mask).to(device), 0.0, float("-inf")).to(like.dtype)
            return bias.view(len(counts), 1, width, length)

        windows = {window_of(pattern, layer) for layer in cache.keys}
        self._bias = {window: bias_of(window) for window in windows}
        self._of_heads: dict[int | None, Tensor] = {}
        self._pattern = pattern
        self._cache = cache
        self._groups = torch.from_numpy(groups).to(device)
        self._cells = len(counts) * width
        self.keys, self.values = cache.keys, cache.values
        self.columns = torch.from_numpy(columns).to(device)
        self.slots = torch.from_numpy(place).to(device)

    @property
    def bias(self) -> Tensor:
        """(N, 1, W, C) additive mask of the layers without a window."""
        return self._bias[None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self._cache.write(layer, self._groups, self.columns, key, value)
        q = query[0].transpose(0, 1)  # (A, H, D)
        padded = len(self.slots) < self._cells
        if padded:
            q = q.new_zeros(self._cells, *q.shape[1:]).index_copy_(0, self.slots, q)
        output = self._cache.attend(layer, q, self._bias_of_heads(layer), scale)
        return (output.index_select(0, self.slots) if padded else output)[None]

    def _bias_of_heads(self, layer: int) -> Tensor:
        """The mask of a layer, once for each of the query heads that share a key head."""
        window = window_of(self._pattern, layer)
        if window not in self._of_heads:
            self._of_heads[window] = self._bias[window].repeat(1, 1, self._cache.heads_per_key, 1)
        return self._of_heads[window]


class SharedPrefixSampler(ReadsPolicy):
    """Draws responses with one prefill per group and one computation per distinct prefix.

    Args:
        policy: The policy; its shared prefix must be on.
        cpu_decoder: Decode in C++ where that is possible (see `cpu_decoder`); False calls the model's modules.
    """

    def __init__(self, policy: Policy, *, cpu_decoder: bool = True) -> None:
        if not policy.shared_prefix:
            raise ValueError("policy: expected one with shared_prefix=True; use PlainSampler for this one")
        super().__init__(policy)
        self._cpu_decoder = CpuDecoder(policy) if cpu_decoder else None

    @property
    def decodes_in_cpp(self) -> bool:
        """Whether the steps of the last rollout went through the C++ operator."""
        return self._cpu_decoder is not None and self._cpu_decoder.in_use

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[EncodedPrompt],
        num_generations: int,
        params: SamplingParams,
        features: MediaFeatures | None = None,
        labels: Sequence[Sequence[Label]] | None = None,
    ) -> Rollout:
        """Return one rollout; see `Sampler`. With `features` the tower pass is shared with the update.

        With `labels`, those of each prompt, its one response names them from best to worst; see `LabelSampler`.
        """
        assert labels is None or num_generations == 1
        check_params(params, num_generations, prompts)
        policy = self.policy
        room = num_generations * (params.max_new_tokens - 1)
        lengths = np.asarray([len(p.input_ids) for p in prompts], dtype=np.int64)
        uniform = uniforms(len(prompts) * num_generations, params).to(policy.device)
        held = num_generations * tokens_a_state(policy)
        at_once = max(1, policy.max_cached_tokens // (int(lengths.max()) + room + held))
        parts = []
        with policy.evaluating():
            if features is None:
                features = policy.encode_media(prompts)
            # Parts of equal size where possible: a captured step has one size.
            for groups in np.array_split(np.arange(len(prompts)), -(-len(prompts) // at_once)):
                span = slice(groups[0], groups[-1] + 1)
                rows = uniform[span.start * num_generations : span.stop * num_generations]
                cache = self._make_cache(lengths[span], num_generations, int(lengths[span].max()) + room)
                hidden = self._prefill(prompts[span], cache, features)
                draw = token_sampler(policy, params, len(rows), None if labels is None else labels[span])
                parts.append(self._decode(prompts[span], num_generations, params, cache, hidden, draw, rows))
                del cache, hidden, draw  # before the next part's are made: they may be gigabytes
        return concat_rollouts(parts)

    def _make_cache(self, prompt_lengths: np.ndarray, num_generations: int, length: int) -> GroupCache:
        return GroupCache(self.policy, prompt_lengths, length)

    def _prefill(
        self,
        prompts: Sequence[EncodedPrompt],
        cache: GroupCache,
        features: MediaFeatures | None,
    ) -> Tensor:
        """Hidden states (N, H) of the last prompt tokens."""
        policy = self.policy
        # One token after each prompt, which asks for the hidden state that predicts it: the last one.
        rows = share_media(answer_rows(prompts, [[0]] * len(prompts)), policy.media_token_ids)
        token_ids, lengths = rows.token_ids.numpy(), rows.lengths.numpy()
        sizes, last = rows.group_sizes.numpy(), rows.token_index.numpy()
        ends = np.cumsum(lengths)
        of_row = np.empty(len(prompts), dtype=np.int64)  # the prompt that a row ends
        of_row[np.searchsorted(ends, last, side="right")] = np.arange(len(prompts))
        common = np.asarray([len(prompt.input_ids) for prompt in rows.prompts], dtype=np.int64)
        row_ends = np.concatenate(([0], np.cumsum(sizes)))
        fed = np.add.reduceat(lengths - 1, row_ends[:-1])
        hidden = []
        for groups in cut((common + fed).tolist(), policy.max_packed_tokens):
            mine = slice(row_ends[groups.start], row_ends[groups.stop])
            row = pack(token_ids[mine], lengths[mine], common[groups], sizes[groups])
            layouts = [policy.layouts(prompt) for prompt in rows.prompts[groups]]
            packed = row_context(row, policy.device, policy.pattern, layouts, SdpaContext)
            context = _Prefill(cache, row, of_row[mine], lengths[mine] - 1, packed, policy.device)
            keep = None if cache.states is None else Keep(cache.states, of_row[mine], len(prompts))
            hidden.append(
                policy.packed_forward(row, rows.prompts[groups], token_ids[mine], features, context, keep)
            )
        return torch.cat(hidden)[rows.token_index.to(policy.device)]

    def _decode(
        self,
        prompts: Sequence[EncodedPrompt],
        num_generations: int,
        params: SamplingParams,
        cache: GroupCache,
        hidden: Tensor,
        draw: TokenSampler | LabelSampler,
        uniform: Tensor,
    ) -> Rollout:
        policy, device = self.policy, self.policy.device
        groups, responses = len(prompts), len(prompts) * num_generations
        next_position = np.asarray([policy.layouts(p).next_position for p in prompts])
        prompt_lengths = cache.used  # so far
        vocabulary = policy.head_weight.shape[0]
        drawn = Drawn(policy, responses, params.max_new_tokens)
        if self._cpu_decoder is not None:
            self._cpu_decoder.begin()

        live = np.arange(responses)  # responses that still draw
        node = live // num_generations  # (live,) the node each of them draws from
        node_group = np.arange(groups)  # (A,) group of each node, in the cache
        allowed = np.arange(cache.length) < prompt_lengths[:, None]  # (A, L)
        for step in range(params.max_new_tokens):
            own_node = len(node) == len(node_group) and bool((node == np.arange(len(node))).all())
            rows = None if own_node else torch.from_numpy(node).to(device)
            who = torch.from_numpy(live).to(device)
            tokens, logp = draw(policy.logits(hidden), rows, uniform[who, step], step, who)
            new = tokens.numpy(force=True)
            ended = drawn.record(live, step, new, logp.numpy(force=True))
            live, node, new = live[~ended], node[~ended], new[~ended]
            if not len(live) or step + 1 == params.max_new_tokens:
                break
            # One node for each distinct (node, token); sorted, so that the nodes of a group stay adjacent.
            branch = node * vocabulary + new
            if own_node:
                node = np.arange(len(node))
            else:
                branch, node = np.unique(branch, return_inverse=True)
            parent, fed = branch // vocabulary, branch % vocabulary
            if cache.states is not None:
                cache.states.select(torch.from_numpy(parent).to(device))
            node_group, allowed = node_group[parent], allowed[parent]
            counts = np.bincount(node_group, minlength=len(cache.used))
            present = np.flatnonzero(counts)
            if 2 * len(present) <= len(cache.used):
                cache.keep(present)
                next_position, prompt_lengths = next_position[present], prompt_lengths[present]
                node_group, counts = np.searchsorted(present, node_group), counts[present]
            columns = cache.used[node_group] + ranges(counts)
            cache.used = cache.used + counts
            allowed[np.arange(len(fed)), columns] = True
            cache.places[node_group, columns] = prompt_lengths[node_group] + step
            positions = np.broadcast_to(next_position[node_group] + step, (3, len(fed)))
            hidden = self._feed(
                torch.from_numpy(fed).to(device),
                torch.from_numpy(np.ascontiguousarray(positions)).to(device),
                _Step(cache, node_group, columns, allowed, policy.pattern, hidden),
                cache.states,
            )
        return drawn.rollout(policy, prompts, num_generations, draw.forced)

    def _feed(self, ids: Tensor, positions: Tensor, step: _Step, states: NodeStates | None) -> Tensor:
        """Last hidden states (A, H) of one token for each node."""
        of_model = partial(self.policy.decode, ids, positions, step, states=states)
        return of_model() if self._cpu_decoder is None else self._cpu_decoder(ids, positions, step, of_model)
