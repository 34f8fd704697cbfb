"""An oracle as a reward function for other trainers: one number per response, the gain of its rank."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rlaif_fast.data.media_keys import MEDIA_KEYS
from rlaif_fast.errors import UsageError
from rlaif_fast.oracle.base import Oracle, Ranking, RankRequest, rank_all
from rlaif_fast.oracle.prompt_media import PARTS, PromptMedia
from rlaif_fast.oracle.records import content_text
from rlaif_fast.oracle.wrappers import oracles_in
from rlaif_fast.video import ClipStore

logger = logging.getLogger(__name__)

REFERENCE = "reference"  # default column of the reference answers
# columns besides the reference that a verdict depends on
ASKED = (*MEDIA_KEYS, "form")


def as_reward(
    oracle: Oracle,
    *,
    group_size: int | None = None,
    reference: str = REFERENCE,
    failed: float | None = None,
    media: bool | ClipStore = True,
) -> OracleReward:
    """Make a reward function of an oracle, for trainers that only take scalars.

    The reward of a response is the gain of its rank among the responses to the same prompt: 1 for the best of a
    group, less for each place below; tied responses share the mean over their places. The reward minus its group
    mean is the advantage of `kind="oracle"`. If a trainer passes only part of a group, that part is ranked on its own.

    Args:
        oracle: Ranks the groups.
        group_size: G, if the responses of a group are adjacent; None groups rows of equal prompt, reference,
            media and `form`.
        reference: Name of the column that holds the reference answer. In TRL, whose rows all have the same columns, a
            column other than the default must exist.
        failed: Reward of a response without a verdict. TRL and ms-swift take None; verl needs a number.
        media: Show the oracle the pictures and videos of the prompts. Pass your own store to choose frames
            differently; pass False for an oracle that reads only text, to skip the decoding.

    Returns:
        The function; see `OracleReward`.
    """
    return OracleReward(oracle, group_size, reference, failed, media)


class OracleReward:
    """Called as TRL, ms-swift and verl's batch reward manager call a reward function; see `as_reward`."""

    def __init__(
        self,
        oracle: Oracle,
        group_size: int | None,
        reference: str,
        failed: float | None,
        media: bool | ClipStore = True,
    ) -> None:
        if group_size is not None and group_size < 2:
            raise UsageError(f"group_size must be at least 2, got {group_size}")
        self.oracle, self.group_size, self.reference, self.failed = oracle, group_size, reference, failed
        self.media = prompt_media(media)
        self.__name__ = f"oracle_{oracle.name}"

    def __call__(
        self,
        prompts: Sequence[Any] | None = None,
        completions: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Return the rewards of B responses, in their order.

        Args:
            prompts: B prompts, texts or chats. ms-swift passes `messages` instead, verl nothing.
            completions: B responses, texts or chats; verl passes `solution_strs`.
            columns: Whatever else the trainer passes. Lists or object arrays of length B become the metadata of a
                group if all its rows agree, except that `ground_truths` (verl) is the reference answer and
                `extra_infos[i]["question"]` the prompt. Anything else, such as TRL's callbacks, is ignored.

        Raises:
            UsageError: Responses or prompts are missing or differ in number; the named column is missing, or the oracle
                needs references and there are none; references, media or forms are not one per response; the
                `group_size` rows of a group ask different things; or the oracle does not rank all groups.
        """
        # verl passes columns as object arrays
        names = {name: _listed(column) for name, column in columns.items()}
        reference = self.reference
        if completions is None:  # verl
            completions, reference = names.pop("solution_strs", None), "ground_truths"
            extras = names.get("extra_infos")
            prompts = extras and [(extra or {}).get("question") for extra in extras]
        elif prompts is None and "messages" in names:  # ms-swift; the last message is the response
            prompts = [
                chat[:-1] if chat[-1]["role"] == "assistant" else chat for chat in names.pop("messages")
            ]
        else:
            check_reference(reference, names)
        if completions is None or prompts is None or None in (*prompts, *completions):
            raise UsageError(
                "the reward of an oracle needs prompts and completions; the trainer passed "
                f"{', '.join(sorted(columns)) or 'neither'}"
            )
        if len(prompts) != len(completions):
            raise UsageError(f"expected a prompt a response, got {len(prompts)} for {len(completions)}")
        columns_of_rows = {name: x for name, x in names.items() if _is_column(x, len(completions))}
        for name in (reference, *ASKED):
            if names.get(name) is not None and name not in columns_of_rows:
                raise UsageError(
                    f"{name}: expected a list of {len(completions)}, one a response, got {names[name]!r:.60}"
                )
        rewards: list[float | None] = [self.failed] * len(completions)
        groups = grouped(prompts, self.group_size, _asked(columns_of_rows, reference))
        requests = requests_of(groups, prompts, completions, columns_of_rows, reference, self.media)
        rankings = rank_groups(self.oracle, requests, names, reference)
        for rows, ranking in zip(groups, rankings):
            for row, gain in zip(rows, gains(ranking)):
                rewards[row] = self.failed if gain is None else gain
        return rewards


def prompt_media(media: bool | ClipStore) -> PromptMedia | None:
    """Return what turns the media of prompts into clips; None for an oracle that is shown no media."""
    return None if media is False else PromptMedia(None if media is True else media)


def check_reference(reference: str, columns: Iterable[str]) -> None:
    """Refuse the name of a missing reference column; only the default column may be missing.

    Raises:
        UsageError: The named column is missing.
    """
    names = sorted(columns)
    if reference != REFERENCE and reference not in names:
        raise UsageError(
            f"reference={reference!r}: there is no such column among {', '.join(names) or 'none'}"
        )


def rank_groups(
    oracle: Oracle, requests: Sequence[RankRequest], columns: Mapping[str, Any], reference: str = REFERENCE
) -> list[Ranking]:
    """Rank the groups of a trainer's batch; log a batch in which no group could be ranked.

    Args:
        oracle: Ranks them.
        requests: The groups, from `requests_of`.
        columns: The row columns that the trainer passed, by name.
        reference: Name of the column of reference answers.

    Raises:
        UsageError: The column is missing and an oracle that needs it ranked nothing; or see `rank_all`.
    """
    rankings = rank_all(oracle, requests)
    if not rankings or any(ranking.valid for ranking in rankings):
        return rankings
    needed = any(getattr(part, "needs_reference", False) for part in oracles_in(oracle))
    if needed and columns.get(reference) is None:
        raise UsageError(
            f"the oracle {oracle.name} ranks by reference answers, and the trainer passed no column {reference!r} "
            f"among {', '.join(sorted(columns)) or 'none'}; add it to the dataset, or name another"
        )
    logger.warning(
        "the oracle %s ranked none of the %d groups of a batch; the last: %s",
        oracle.name, len(rankings), rankings[-1].failure,
    )  # fmt: skip
    return rankings


def gains(ranking: Ranking) -> list[float | None]:
    """Return the gain of each response: 1 / ((1 + k) log2(2 + k)) at position k, ties share; None if not judged."""
    if not ranking.valid:
        return [None] * len(ranking.ranks)
    judged = sorted(rank for rank in ranking.ranks if rank is not None)
    places = [1.0 / ((1 + k) * math.log2(2 + k)) for k in range(len(judged))]
    mean = {}
    for rank in set(judged):
        first, count = judged.index(rank), judged.count(rank)
        mean[rank] = sum(places[first : first + count]) / count
    return [None if rank is None else mean[rank] for rank in ranking.ranks]


def grouped(
    prompts: Sequence[Any],
    group_size: int | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> list[list[int]]:
    """Return the rows of each group: `group_size` neighbours, or if that is None the rows that ask the same.

    Args:
        prompts: B prompts.
        group_size: G; None groups by content.
        columns: What else has to be equal within a group, B values each.

    Raises:
        UsageError: B is not a multiple of `group_size`.
    """
    count = len(prompts)
    if group_size is not None:
        if count % group_size:
            raise UsageError(f"{count} responses are no whole groups of {group_size}")
        return [list(range(first, first + group_size)) for first in range(0, count, group_size)]
    rows: dict[tuple[str, ...], list[int]] = {}
    for row, asked in enumerate(zip(prompts, *(columns or {}).values())):
        rows.setdefault(tuple(map(content_text, asked)), []).append(row)
    return list(rows.values())


def _asked(columns: Mapping[str, Sequence[Any]], reference: str) -> dict[str, Sequence[Any]]:
    """The columns that say what is asked; the others may describe a single response."""
    return {name: columns[name] for name in (reference, *ASKED) if name in columns}


def _equal(values: Iterable[Any]) -> bool:
    first, *others = values
    unlike = [value for value in others if value is not first]
    return not unlike or {content_text(value) for value in unlike} == {content_text(first)}


def requests_of(
    groups: Sequence[Sequence[int]],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    reference: str = REFERENCE,
    media: PromptMedia | None = None,
) -> list[RankRequest]:
    """Return what an oracle is asked about each group of rows.

    Columns whose values agree across a group become its metadata; others are left out.

    Raises:
        UsageError: The prompts, references, media or forms of a group differ.
    """
    requests = []
    asked = {"prompts": prompts, **_asked(columns, reference)}
    for number, rows in enumerate(groups):
        for name, column in asked.items():
            if not _equal(column[row] for row in rows):
                raise UsageError(
                    f"{name}: expected one value a group, got different ones in rows {list(rows)}"
                )
        metadata = {
            name: column[rows[0]]
            for name, column in columns.items()
            if name in asked or _equal(column[row] for row in rows)
        }
        answer = metadata.pop(reference, None)
        clips = () if media is None else media.clips(prompts[rows[0]], metadata)
        requests.append(
            RankRequest(
                id=str(number),
                question=text_of(prompts[rows[0]]),
                responses=tuple(text_of(completions[row]) for row in rows),
                clips=clips,
                reference=None if answer is None else str(answer),
                metadata=metadata,
            )
        )
    return requests


def text_of(message: Any) -> str:
    """Return the text of a prompt or response that is a text, a message, parts of one, or a chat."""
    if isinstance(message, str):
        return message
    if isinstance(message, Mapping) and message.get("type") in PARTS:
        return ""
    if isinstance(message, Mapping):
        return text_of(message.get("content") or message.get("text") or "")
    return "\n".join(text for text in map(text_of, message) if text)


def _listed(column: Any) -> Any:
    return column.tolist() if isinstance(column, np.ndarray) and column.dtype == object else column


def _is_column(value: Any, rows: int) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == rows
