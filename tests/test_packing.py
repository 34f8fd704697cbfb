"""Row layouts against a token-by-token reconstruction."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_fast.policy.cut import cut
from rlaif_fast.policy.packing import bucket_mask, make_buckets, pack, ranges, starts

MERGES = ("prefixes", "duplicates", "none")


@st.composite
def groups(draw):
    """Prompt lengths, group sizes, and responses over a small vocabulary, so that many begin alike."""
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    prompts = draw(st.lists(st.integers(1, 5), min_size=len(sizes), max_size=len(sizes)))
    responses = draw(
        st.lists(
            st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=sum(sizes), max_size=sum(sizes)
        )
    )
    return prompts, sizes, responses


def as_arrays(responses: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    width = max((len(r) for r in responses), default=1)
    ids = np.full((len(responses), width), 99)
    for row, response in enumerate(responses):
        ids[row, : len(response)] = response
    return ids, np.asarray([len(r) for r in responses], dtype=np.int64)


def contents(prompts, sizes, responses, row, ids):
    """What stands at each place of the row: ("p", group, i) or the response tokens up to this one."""
    place: dict[int, tuple] = {}
    prompt_tokens = [("p", g, i) for g, p in enumerate(prompts) for i in range(p)]
    place |= zip(row.prompt_index.tolist(), prompt_tokens)
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    for index, response, depth in zip(row.node_index, row.node_response, row.node_depth):
        place[int(index)] = ("r", int(group_of[response]), tuple(responses[response][: depth + 1]))
    assert sorted(place) == list(range(row.tokens))  # every place once
    assert [ids.reshape(-1)[s] for s in row.node_source] == [place[int(i)][2][-1] for i in row.node_index]
    return place


@settings(max_examples=80, deadline=None)
@given(groups(), st.sampled_from(MERGES))
def test_row_is_what_each_response_would_see_alone(case, merge) -> None:
    prompts, sizes, responses = case
    ids, lengths = as_arrays(responses)
    row = pack(ids, lengths, np.asarray(prompts), np.asarray(sizes), merge)
    place = contents(prompts, sizes, responses, row, ids)
    group_of = np.repeat(np.arange(len(sizes)), sizes)

    expected = []
    for response, group in zip(responses, group_of):
        for depth in range(len(response)):
            last = ("p", int(group), prompts[group] - 1)
            expected.append(last if depth == 0 else ("r", int(group), tuple(response[:depth])))
    assert [place[i] for i in row.predictor_index.tolist()] == expected

    allowed = row.allowed()
    for query, what in place.items():
        seen = [place[k] for k in np.flatnonzero(allowed[query])]
        if what[0] == "p":
            assert seen == [("p", what[1], i) for i in range(what[2] + 1)]
        else:
            prompt = [("p", what[1], i) for i in range(prompts[what[1]])]
            ancestors = [("r", what[1], what[2][: d + 1]) for d in range(len(what[2]))]
            assert sorted(seen) == sorted(prompt + ancestors)

    if merge == "prefixes":
        assert len(set(place.values())) == row.tokens  # nothing is held twice
    if merge == "none":
        assert row.tokens == sum(prompts) + sum(len(r) - 1 for r in responses)


@settings(max_examples=80, deadline=None)
@given(groups(), st.sampled_from(MERGES))
def test_buckets_hold_every_token_once_with_the_same_mask(case, merge) -> None:
    prompts, sizes, responses = case
    ids, lengths = as_arrays(responses)
    row = pack(ids, lengths, np.asarray(prompts), np.asarray(sizes), merge)
    allowed = row.allowed()
    seen = []
    for bucket in make_buckets(row):
        n, width = len(bucket.groups), bucket.prompt + bucket.response
        count = int(row.group_lengths[bucket.groups].sum())
        rows = np.arange(bucket.begin, bucket.begin + count) if bucket.rows is None else bucket.rows
        slots = np.arange(count) if bucket.slots is None else bucket.slots
        if bucket.slots is None:
            assert count == n * width
        seen += rows.tolist()
        mask = bucket_mask(row, bucket).numpy()
        assert mask.any(2).all()  # no query is left without a key, padding included
        at = dict(zip(slots.tolist(), rows.tolist()))
        for (group, node, key), value in np.ndenumerate(mask):
            query = at.get(group * width + bucket.prompt + node)
            other = at.get(group * width + key)
            if query is not None:
                assert value == (other is not None and allowed[query, other])
    assert sorted(seen) == list(range(row.tokens))


def test_position_ids_continue_behind_each_prompt() -> None:
    ids = np.asarray([[1, 2, 3], [1, 2, 4], [5, 5, 5]])
    row = pack(ids, np.asarray([3, 3, 2]), np.asarray([2, 1]), np.asarray([2, 1]))
    prompts = [np.asarray([[0, 1], [0, 2], [0, 3]]), np.zeros((3, 1), dtype=np.int64)]
    positions = row.position_ids(prompts, np.asarray([7, 1]))
    assert positions.tolist() == [[0, 1, 7, 8, 0, 1], [0, 2, 7, 8, 0, 1], [0, 3, 7, 8, 0, 1]]


def test_parts_keep_items_whole_and_in_order() -> None:
    sizes = [15, 15, 55, 6]
    assert cut(sizes, 30) == [slice(0, 2), slice(2, 3), slice(3, 4)]
    assert cut(sizes, 29) == [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4)]
    assert cut(sizes, 1000) == [slice(0, 4)]
    assert cut([], 30) == []
    # A second item is smaller than it is at the beginning of a part.
    assert cut(sizes, 20, [0, 5, 5, 5]) == [slice(0, 2), slice(2, 3), slice(3, 4)]


@pytest.mark.parametrize("lengths", [[], [0], [3], [2, 0, 3]])
def test_ranges_and_starts(lengths) -> None:
    array = np.asarray(lengths, dtype=np.int64)
    assert ranges(array).tolist() == [i for length in lengths for i in range(length)]
    assert starts(array).tolist() == [sum(lengths[:i]) for i in range(len(lengths))]


def test_equal_groups_stay_where_they_are() -> None:
    ids = np.arange(24).reshape(4, 6)
    row = pack(ids, np.full(4, 6), np.asarray([8, 8]), np.asarray([2, 2]))
    (bucket,) = make_buckets(row)
    assert bucket.rows is None
    assert bucket.slots is None
