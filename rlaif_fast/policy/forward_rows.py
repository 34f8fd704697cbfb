"""What one forward pass has to compute for some responses, each token only once.

Equal responses to one prompt become one row, and prompts about the same media share their common tokens: the chat
templates of the Qwen-VL families put the clip first, so four questions about a video read it once. Hidden states,
and so the loss and every gradient, equal those of each response computed alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlaif_fast.loss.api import token_logps
from rlaif_fast.policy.cut import cut
from rlaif_fast.policy.features import MediaFeatures
from rlaif_fast.policy.packing import Merge
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prompt import EncodedPrompt

# Most tokens after a prefix that prompts share. Each may attend to any other, so the mask grows with their square.
MAX_BEHIND = 4096


@dataclass(frozen=True)
class ForwardRows:
    """Prompts, the rows that follow them, and where the M response tokens are among the rows' tokens.

    Attributes:
        prompts: N prompts.
        token_ids: (U, T) rows, those of a prompt adjacent, padded.
        lengths: (U,) tokens in each.
        group_sizes: (N,) rows of each prompt.
        token_index: (M,) for each response token its place among the rows' tokens, packed in order.
        target_ids: (M,) the response tokens, response after response.
    """

    prompts: tuple[EncodedPrompt, ...]
    token_ids: Tensor  # (U, T)
    lengths: Tensor  # (U,)
    group_sizes: Tensor  # (N,)
    token_index: Tensor  # (M,)
    target_ids: Tensor  # (M,)


def answer_rows(prompts: Sequence[EncodedPrompt], answers: Sequence[list[int]]) -> ForwardRows:
    """One given answer to each prompt."""
    return lay_out(prompts, answers, [1] * len(answers))


def response_rows(
    prompts: Sequence[EncodedPrompt], responses: Sequence[Sequence[Sequence[int]]]
) -> ForwardRows:
    """Some responses to each prompt, equal ones merged; late in training most of a group are repeats."""
    rows: list[list[int]] = []
    row_of: list[int] = []
    sizes: list[int] = []
    for group in responses:
        seen: dict[tuple[int, ...], int] = {}
        for tokens in map(tuple, group):
            if tokens not in seen:
                seen[tokens] = len(rows)
                rows.append(list(tokens))
            row_of.append(seen[tokens])
        sizes.append(len(seen))
    distinct = lay_out(prompts, rows, sizes)
    tokens_of = distinct.token_index.split(distinct.lengths.tolist())
    return replace(
        distinct,
        token_index=torch.cat([tokens_of[row] for row in row_of]),
        target_ids=torch.tensor([token for group in responses for tokens in group for token in tokens]),
    )


def share_media(
    rows: ForwardRows,
    media_token_ids: Collection[int],
    merge: Merge = "prefixes",
    max_tokens: int | None = None,
) -> ForwardRows:
    """Let prompts about the same media share the tokens they begin with, if that leaves fewer tokens to compute.

    Args:
        rows: Rows of prompts in any order.
        media_token_ids: Media tokens; a prompt with one of them after the shared part is not shared.
        merge: What the attention backend computes once among the rows of a prompt.
        max_tokens: Most tokens of prompts that share; None for any number. Those after the shared part are at most
            `MAX_BEHIND` in any case.
    """
    ends = torch.cumsum(rows.group_sizes, 0).tolist()
    rows_of = [range(end - size, end) for end, size in zip(ends, rows.group_sizes.tolist())]
    lengths = rows.lengths.tolist()
    responses = [ids[:length] for ids, length in zip(rows.token_ids.tolist(), lengths)]
    prompts: list[EncodedPrompt] = []
    new_rows: list[list[int]] = []
    sizes: list[int] = []
    skipped: list[int] = []  # tokens of each new row that belong to its prompt
    order: list[int] = []  # the old row of each new one
    for piece, shared in _pieces(rows, rows_of, media_token_ids, merge, max_tokens):
        first = rows.prompts[piece[0]]
        prompts.append(EncodedPrompt(first.input_ids[:shared], first.media))
        sizes.append(sum(len(rows_of[i]) for i in piece))
        for i in piece:
            rest = rows.prompts[i].input_ids[shared:].tolist()
            for row in rows_of[i]:
                new_rows.append(rest + responses[row])
                skipped.append(len(rest))
                order.append(row)
    laid_out = lay_out(prompts, new_rows, sizes, skipped)
    # Maps tokens of the old rows, packed in the old order, to their new places.
    pieces_of = laid_out.token_index.split([lengths[row] for row in order])
    moved = dict(zip(order, pieces_of))
    place = torch.cat([moved[row] for row in range(len(lengths))])
    return replace(laid_out, token_index=place[rows.token_index], target_ids=rows.target_ids)


def _pieces(
    rows: ForwardRows,
    rows_of: Sequence[range],
    media_token_ids: Collection[int],
    merge: Merge,
    max_tokens: int | None,
) -> Iterator[tuple[list[int], int]]:
    """Which prompts go together, by number, and how many tokens they share; a prompt alone shares all of its tokens.

    Args:
        rows: As for `share_media`, like the remaining ones.
        rows_of: The rows of each prompt.
    """
    lengths = rows.lengths.tolist()
    members: dict[tuple[str, ...], list[int]] = {}
    for index, prompt in enumerate(rows.prompts):
        keys = tuple(item.key for item in prompt.media)
        members.setdefault(keys or (f"prompt {index}",), []).append(index)
    for group in members.values():
        ids = [rows.prompts[i].input_ids.tolist() for i in group]
        shared = _common_length(ids)
        copies = [1 if merge == "prefixes" else len(rows_of[i]) for i in group]
        media_behind = any(token in media_token_ids for row in ids for token in row[shared:])
        behind = [
            (len(row) - shared) * n + sum(lengths[row] for row in rows_of[i])
            for i, row, n in zip(group, ids, copies)
        ]
        room = MAX_BEHIND if max_tokens is None else min(max_tokens - shared, MAX_BEHIND)
        for span in (range(len(group))[part] for part in cut(behind, room)):
            together = shared + sum((len(ids[k]) - shared) * copies[k] for k in span)
            if shared == 0 or media_behind or together >= sum(len(ids[k]) for k in span):
                yield from (([group[k]], len(ids[k])) for k in span)
            else:
                yield [group[k] for k in span], shared


def for_policy(rows: ForwardRows, policy: Policy) -> ForwardRows:
    """The rows as this policy computes them with the fewest tokens; its plain path shares nothing."""
    if not policy.shared_prefix:
        return rows
    return share_media(rows, policy.media_token_ids, policy.backend.merge, policy.max_packed_tokens)


def response_hidden(policy: Policy, rows: ForwardRows, **features) -> Tensor:
    """(M, H) hidden states that predict each response token, differentiable; `features` as for the policy."""
    hidden = policy.response_hidden(
        rows.prompts, rows.token_ids, rows.lengths, group_sizes=rows.group_sizes, **features
    )
    return hidden.index_select(0, rows.token_index.to(hidden.device))


def reply_logps(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    replies: Sequence[Sequence[Sequence[int]]],
    features: MediaFeatures | None = None,
) -> list[list[Tensor]]:
    """Log-probabilities of the tokens of given replies, in float64 on the host; prompts about one clip read it once.

    Args:
        policy: The policy.
        prompts: N prompts.
        replies: Tokens of some replies to each prompt.
        features: From `Policy.encode_media` of the prompts; None to encode here.

    Returns:
        For each reply to each prompt the log-probability of each of its tokens (T,).
    """
    rows = for_policy(response_rows(prompts, replies), policy)
    hidden = response_hidden(policy, rows, features=features)
    targets = rows.target_ids.to(hidden.device)
    logps = token_logps(hidden, policy.head_weight, targets, bias=policy.head_bias, validate=False)
    assert isinstance(logps, Tensor)  # a pair only with return_entropy
    parts = iter(logps.double().cpu().split([len(reply) for group in replies for reply in group]))
    return [[next(parts) for _ in group] for group in replies]


def lay_out(
    prompts: Sequence[EncodedPrompt],
    rows: Sequence[list[int]],
    sizes: Sequence[int],
    skipped: Sequence[int] | None = None,
) -> ForwardRows:
    """Rows as tensors.

    Args:
        prompts: N prompts.
        rows: U rows, those of a prompt adjacent.
        sizes: Rows of each prompt.
        skipped: Leading tokens of each row that belong to its prompt; None for none.
    """
    longest = max(map(len, rows))
    index, targets, begin = [], [], 0
    for row, skip in zip(rows, skipped or [0] * len(rows)):
        index.append(torch.arange(begin + skip, begin + len(row)))
        targets += row[skip:]
        begin += len(row)
    return ForwardRows(
        prompts=tuple(prompts),
        token_ids=torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        lengths=torch.tensor([len(row) for row in rows]),
        group_sizes=torch.tensor(sizes),
        token_index=torch.cat(index),
        target_ids=torch.tensor(targets),
    )


def _common_length(rows: Sequence[list[int]]) -> int:
    """Number of tokens that all rows begin with."""
    shortest = min(map(len, rows))
    return next((k for k, column in enumerate(zip(*rows)) if len(set(column)) > 1), shortest)
