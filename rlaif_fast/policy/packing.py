"""Packed groups: [prompt | response 1 | ... | response G], several groups per row, no padding.

Two facts keep a row short. The last token of a response predicts nothing, so it is not fed: a response of t
tokens has t - 1 of them in the row, and its first token is predicted by the last token of the prompt. And
responses of a group that begin alike have equal hidden states as far as they agree, so only the first of them
holds these tokens: the responses of a group form a tree, and a token attends to its prompt and to the tokens
on its path. Identical responses cost nothing.

All of this is index arithmetic on the host, with no loop over tokens or responses; the mask of a bucket is built on
the device.

Letters: N groups in a row, G the largest group, B responses, T width of the token matrix, S tokens of the
row, M predicted tokens, P prompt tokens and R response tokens of a group. A node is one response token of
the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rlaif_fast.policy.cut import cut

Merge = Literal["prefixes", "duplicates", "none"]


def ranges(lengths: np.ndarray) -> np.ndarray:
    """[0..l0-1, 0..l1-1, ...], one run for each of `lengths`."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def starts(lengths: np.ndarray) -> np.ndarray:
    """Exclusive cumulative sum."""
    return np.cumsum(lengths) - lengths


@dataclass(frozen=True)
class PackedRow:
    """The layout of one row: the tokens of group 1, then of group 2, ...; in a group the prompt, then its
    nodes.

    Attributes:
        prompt_lengths: (N,) P of each group.
        node_counts: (N,) R of each group.
        node_depth: (nodes,) place of each node in its response, 0 for the first token.
        node_response: (nodes,) the response that holds it, counted in the row.
        path: (B, T) node of each fed token of each response, numbered from the first node of the row; -1
            elsewhere.
        lengths: (B,) tokens of each response.
        group_sizes: (N,) responses of each group.
    """

    prompt_lengths: np.ndarray
    node_counts: np.ndarray
    node_depth: np.ndarray
    node_response: np.ndarray
    path: np.ndarray
    lengths: np.ndarray
    group_sizes: np.ndarray

    @cached_property
    def group_lengths(self) -> np.ndarray:
        """(N,) tokens of each group in the row."""
        return self.prompt_lengths + self.node_counts

    @cached_property
    def group_starts(self) -> np.ndarray:
        """(N,) where each group begins."""
        return starts(self.group_lengths)

    @cached_property
    def group_of_response(self) -> np.ndarray:
        """(B,) the group of each response."""
        return np.repeat(np.arange(len(self.group_sizes)), self.group_sizes)

    @property
    def tokens(self) -> int:
        """S."""
        return int(self.group_lengths.sum())

    @cached_property
    def prompt_index(self) -> np.ndarray:
        """(sum of P,) places of the prompts' tokens in the row."""
        return np.repeat(self.group_starts, self.prompt_lengths) + ranges(self.prompt_lengths)

    @cached_property
    def node_index(self) -> np.ndarray:
        """(nodes,) places of the nodes in the row."""
        return np.repeat(self.group_starts + self.prompt_lengths, self.node_counts) + ranges(self.node_counts)

    @cached_property
    def node_source(self) -> np.ndarray:
        """(nodes,) places of the nodes' tokens in the flattened (B, T) token matrix of the row."""
        return self.node_response * self.path.shape[1] + self.node_depth

    @cached_property
    def predictor_index(self) -> np.ndarray:
        """(M,) the place whose hidden state predicts each response token, response after response."""
        within = ranges(self.lengths)
        response = np.repeat(np.arange(len(self.lengths)), self.lengths)
        group = self.group_of_response[response]
        index = (self.group_starts + self.prompt_lengths - 1)[group]
        later = within > 0
        index[later] = self.node_index[self.path[response[later], within[later] - 1]]
        return index

    def position_ids(self, prompt_positions: Sequence[np.ndarray], next_positions: np.ndarray) -> np.ndarray:
        """Position ids of the row: those that each response would have if it alone followed its prompt.

        Args:
            prompt_positions: N arrays (3, P).
            next_positions: (N,) position of the first response token of each group.

        Returns:
            (3, S) int64.
        """
        positions = np.empty((3, self.tokens), dtype=np.int64)
        positions[:, self.prompt_index] = np.concatenate(list(prompt_positions), axis=1)
        positions[:, self.node_index] = np.repeat(next_positions, self.node_counts) + self.node_depth
        return positions

    def allowed(self) -> np.ndarray:
        """(S, S) bool, the whole attention pattern of the row; for references and tests."""
        group = np.repeat(np.arange(len(self.prompt_lengths)), self.group_lengths)
        place = np.arange(self.tokens)
        node = np.full(self.tokens, -1)
        node[self.node_index] = np.arange(len(self.node_index))
        allowed = (group[:, None] == group) & (place[:, None] >= place) & (node < 0)
        nodes = np.arange(len(self.node_index))
        ancestor = self.is_ancestor(nodes[:, None], nodes[None, :])
        allowed[np.ix_(self.node_index, self.node_index)] = ancestor
        return allowed

    def is_ancestor(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        """Whether node `key` is on the path to node `query`, itself included; broadcasts."""
        depth = self.node_depth[key]
        return (depth <= self.node_depth[query]) & (self.path[self.node_response[query], depth] == key)


def pack_rows(
    token_ids: np.ndarray,  # (B, T)
    lengths: np.ndarray,  # (B,)
    prompt_lengths: np.ndarray,  # (N,)
    group_sizes: np.ndarray,  # (N,)
    max_tokens: int | None,
    merge: Merge = "prefixes",
) -> list[tuple[slice, slice, PackedRow]]:
    """Lay out groups as rows of at most `max_tokens`; a longer group gets its own row. No bound gives one row.

    Args:
        token_ids: As for `pack`, like the remaining ones.
        max_tokens: Most tokens of a row; None for any number.

    Returns:
        For each row its groups, their responses, and the row.
    """
    ends = np.concatenate(([0], np.cumsum(group_sizes)))

    def row(groups: slice) -> tuple[slice, slice, PackedRow]:
        own = slice(int(ends[groups.start]), int(ends[groups.stop]))
        part = (token_ids[own], lengths[own], prompt_lengths[groups], group_sizes[groups])
        return groups, own, pack(*part, merge)

    if max_tokens is None:
        return [row(slice(0, len(group_sizes)))]
    fed = np.add.reduceat(np.append(np.maximum(lengths - 1, 0), 0), ends[:-1])
    fed[group_sizes == 0] = 0
    rows = [row(groups) for groups in cut((prompt_lengths + fed).tolist(), max_tokens)]
    # Tokens that responses of a group share are computed once, so several groups may fit into one row.
    fits = cut([packed.tokens for *_, packed in rows], max_tokens)
    return [
        rows[fit.start]
        if fit.stop == fit.start + 1
        else row(slice(rows[fit.start][0].start, rows[fit.stop - 1][0].stop))
        for fit in fits
    ]


def pack(
    token_ids: np.ndarray,  # (B, T)
    lengths: np.ndarray,  # (B,)
    prompt_lengths: np.ndarray,  # (N,)
    group_sizes: np.ndarray,  # (N,)
    merge: Merge = "prefixes",
) -> PackedRow:
    """Lay out groups as one row.

    Args:
        token_ids: Response tokens, the responses of a group adjacent.
        lengths: Tokens of each response.
        prompt_lengths: Tokens of each prompt.
        group_sizes: Responses of each group.
        merge: "prefixes" shares what responses of a group have in common, "duplicates" only whole responses
            (then every response in the row is one run after the prompt), "none" nothing.
    """
    groups, width = len(group_sizes), token_ids.shape[1]
    slots = int(group_sizes.max(initial=1))
    filled = np.arange(slots) < group_sizes[:, None]  # (N, G)
    fed = np.zeros((groups, slots), dtype=np.int64)
    fed[filled] = np.maximum(lengths - 1, 0)
    # leading tokens that an earlier response of the group holds
    common = np.zeros((groups, slots), dtype=np.int64)
    holder = np.zeros((groups, slots), dtype=np.int64)  # that response
    if merge != "none" and slots > 1:
        tokens = np.full((groups, slots, width), -1, dtype=token_ids.dtype)
        tokens[filled] = token_ids
        agree = _common_prefix(tokens, fed)  # (N, G, G)
        holder = agree.argmax(2)
        common = np.take_along_axis(agree, holder[:, :, None], 2)[:, :, 0]
        if merge == "duplicates":
            common = np.where(common == fed, common, 0)
    new = fed - common  # (N, G) nodes of each response
    node_counts = new.sum(1)
    base = (starts(node_counts)[:, None] + np.cumsum(new, 1) - new)[:, :, None]
    depth = np.arange(width)
    path = np.where(depth < fed[:, :, None], base + depth - common[:, :, None], -1)  # (N, G, T)
    if common.any():
        every = np.arange(groups)
        for slot in range(1, slots):
            inherited = path[every, holder[:, slot]]
            path[:, slot] = np.where(depth < common[:, slot, None], inherited, path[:, slot])
    counts = new[filled]
    return PackedRow(
        prompt_lengths=prompt_lengths,
        node_counts=node_counts,
        node_depth=np.repeat(common[filled], counts) + ranges(counts),
        node_response=np.repeat(np.arange(len(lengths)), counts),
        path=path[filled],
        lengths=lengths,
        group_sizes=group_sizes,
    )


def _common_prefix(tokens: np.ndarray, fed: np.ndarray) -> np.ndarray:
    """(N, G, G): leading fed tokens that response i shares with an earlier response j; 0 for j >= i."""
    groups, slots, width = tokens.shape
    agree = np.zeros((groups, slots, slots), dtype=np.int64)
    for slot in range(1, slots):
        equal = tokens[:, slot, None] == tokens[:, :slot]  # (N, slot, T)
        prefix = np.where(equal.all(2), width, equal.argmin(2))
        agree[:, slot, :slot] = np.minimum(prefix, np.minimum(fed[:, slot, None], fed[:, :slot]))
    return agree


def count_rows(
    prompts: int, token_ids: Tensor, lengths: Tensor, sizes: Sequence[int] | Tensor | None
) -> np.ndarray:
    """(N,) number of responses per prompt, as given, or all equal.

    Raises:
        ValueError: Lengths or sizes do not fit.
    """
    if token_ids.ndim != 2 or lengths.shape != token_ids.shape[:1]:
        raise ValueError(
            "token_ids, lengths: expected (B, T) and (B,), "
            f"got {tuple(token_ids.shape)} and {tuple(lengths.shape)}"
        )
    responses, width = token_ids.shape
    if ((lengths < 0) | (lengths > width)).any():
        raise ValueError(f"lengths: expected 0 to {width}, the width of token_ids, got {lengths.tolist()}")
    if sizes is None:
        if prompts == 0 or responses % prompts:
            raise ValueError(
                f"token_ids: {responses} rows do not divide among {prompts} prompts; pass group_sizes"
            )
        return np.full(prompts, responses // prompts, dtype=np.int64)
    array = np.asarray(sizes, dtype=np.int64)
    if array.shape != (prompts,) or array.sum() != responses or (array < 0).any():
        raise ValueError(
            f"group_sizes: expected {prompts} counts that sum to {responses}, got {array.tolist()}"
        )
    return array


@dataclass(frozen=True)
class Bucket:
    """Groups of similar size, padded to a common size only inside attention.

    Attributes:
        groups: (n,) the groups, ascending.
        prompt: P, the longest prompt of the bucket.
        response: R, the most nodes of a group of the bucket.
        begin: First token of the bucket in the row.
        rows: (tokens,) where the bucket's tokens are in the row; None if they are one run.
        slots: (tokens,) where they go in the flattened (n, P + R) grid; None if the run is that grid.
    """

    groups: np.ndarray
    prompt: int
    response: int
    begin: int
    rows: np.ndarray | None
    slots: np.ndarray | None


MAX_PADDING = 0.3  # share of a bucket's grid that may be padding before another bucket is opened
SMALL_GROUP = 256  # grid cells per group below which another call costs more than any padding


def make_buckets(row: PackedRow) -> list[Bucket]:
    """Sort the groups of a row into a few buckets with little padding."""
    prompts, nodes = row.prompt_lengths, row.node_counts
    members: list[list[int]] = []
    widest = [0, 0, 0]  # prompt, nodes and tokens of the open bucket
    for group in np.lexsort((nodes, prompts)).tolist():
        prompt, response = max(widest[0], int(prompts[group])), max(widest[1], int(nodes[group]))
        used = widest[2] + int(row.group_lengths[group])
        cells = prompt + response
        if members and (cells <= SMALL_GROUP or used >= (1 - MAX_PADDING) * cells * (len(members[-1]) + 1)):
            members[-1].append(group)
            widest = [prompt, response, used]
        else:
            members.append([group])
            widest = [int(prompts[group]), int(nodes[group]), int(row.group_lengths[group])]
    return [_bucket(row, np.sort(np.asarray(groups))) for groups in members]


def _bucket(row: PackedRow, groups: np.ndarray) -> Bucket:
    p, r = row.prompt_lengths[groups], row.node_counts[groups]
    prompt, response = int(p.max()), int(r.max())
    begin = int(row.group_starts[groups[0]])
    one_run = bool((np.diff(groups) == 1).all())
    within = ranges(p + r)
    rows = None if one_run else np.repeat(row.group_starts[groups], p + r) + within
    if one_run and (p == prompt).all() and (r == response).all():
        return Bucket(groups, prompt, response, begin, None, None)
    own_prompt = np.repeat(p, p + r)
    cell = np.where(within < own_prompt, within, prompt + within - own_prompt)
    slots = np.repeat(np.arange(len(groups)) * (prompt + response), p + r) + cell
    return Bucket(groups, prompt, response, begin, rows, slots)


def bucket_nodes(row: PackedRow, bucket: Bucket) -> tuple[np.ndarray, np.ndarray]:
    """(n, R) bool, whether a slot holds a node; and (n, R) which node of the row, 0 for none."""
    slots = np.arange(bucket.response)
    real = slots < row.node_counts[bucket.groups, None]
    return real, np.where(real, starts(row.node_counts)[bucket.groups, None] + slots, 0)


def bucket_mask(row: PackedRow, bucket: Bucket, device: torch.device | str = "cpu") -> Tensor:
    """(n, R, P + R) bool: what each node slot may attend to. A padding slot attends to everything; its output is
    dropped later.

    Only vectors and the paths are built on the host: the mask of a few thousand nodes has millions of entries.
    """
    real, node = bucket_nodes(row, bucket)

    def put(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(device)

    path, nodes = put(row.path), put(node)
    depth, response = put(row.node_depth[node]), put(row.node_response[node])
    is_real = torch.from_numpy(real).to(device)
    lengths = put(row.prompt_lengths[bucket.groups])
    of_prompt = torch.arange(bucket.prompt, device=device) < lengths[:, None]  # (n, P)
    of_nodes = path[response[:, :, None], depth[:, None, :]] == nodes[:, None, :]  # (n, R, R): on the path
    of_nodes &= (depth[:, None, :] <= depth[:, :, None]) & is_real[:, None, :]
    mask = torch.cat((of_prompt[:, None].expand(-1, bucket.response, -1), of_nodes), dim=2)
    return mask.masked_fill_(~is_real[:, :, None], True)
