"""An oracle as what other trainers call a reward function: one number a response, the gain of its rank."""

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

REFERENCE = "reference"  # the column of the reference answers, where nobody names another
# columns beside the reference that a verdict depends on
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
    group, less for each place below, the mean over the places of a tie. Less its mean over the group it is the
    advantage of `kind="oracle"`. A trainer that hands over a slice that cuts a group has the slice ranked.

    Args:
        oracle: Ranks the groups.
        group_size: G, where the responses of a group follow one another; None groups rows of equal prompt, reference,
            media and `form`.
        reference: Name of the column that holds the reference answer. Another name than the default must be there in
            TRL, whose rows have all the same columns.
        failed: Reward of a response without a verdict. TRL and ms-swift take None; verl needs a number.
        media: Show the oracle the pictures and videos of the prompts, by a store of one's own where frames are chosen
            otherwise. False spares an oracle that only reads the decoding.

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
            prompts: B prompts, texts or chats. ms-swift has `messages` in their place, verl none.
            completions: B responses, texts or chats; verl has `solution_strs`.
            columns: Whatever else the trainer passes. Lists or object arrays of B become the metadata of a group where
                all its rows agree, but `ground_truths` (verl) is the reference answer and
                `extra_infos[i]["question"]` the prompt. Other things, as TRL's callbacks, say nothing about a response.

        Raises:
            UsageError: No responses or prompts, or not as many of them; no column of the name that was asked for, or no
                references for an oracle that ranks nothing without them;
                references, media or forms that are not one a response; `group_size` rows that ask different things;
                or an oracle that ranks not all of them.
        """
        # verl hands columns over as arrays of objects
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
    """Return what turns the media of prompts into clips; None for an oracle that is shown none."""
    return None if media is False else PromptMedia(None if media is True else media)


def check_reference(reference: str, columns: Iterable[str]) -> None:
    """Refuse the name of a column of references that is not there; only the default may be missing.

    Raises:
        UsageError: It is not.
    """
    names = sorted(columns)
    if reference != REFERENCE and reference not in names:
        raise UsageError(
            f"reference={reference!r}: there is no such column among {', '.join(names) or 'none'}"
        )


def rank_groups(
    oracle: Oracle, requests: Sequence[RankRequest], columns: Mapping[str, Any], reference: str = REFERENCE
) -> list[Ranking]:
    """Rank the groups of a trainer's batch; a batch of which none could be ranked is told in the log.

    Args:
        oracle: Ranks them.
        requests: What it is asked, from `requests_of`.
        columns: By name, what the trainer passed of its rows.
        reference: Name of the column of reference answers.

    Raises:
        UsageError: There is no such column, and an oracle that needs it ranked nothing; or see `rank_all`.
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
    """Return the rows of each group: `group_size` neighbours, or where it is None the rows that ask the same.

    Args:
        prompts: B prompts.
        group_size: G; None groups by content.
        columns: What else has to be equal in a group, B values each.

    Raises:
        UsageError: B is no multiple of `group_size`.
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
    """The columns that say what is asked; the others may say something of a single response."""
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

    Columns of which the rows of a group agree are its metadata; others are left out.

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
