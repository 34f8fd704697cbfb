"""Sharing rows and prompts changes what is computed, never what comes out."""

from dataclasses import replace

import pytest
import torch

from rlaif_fast.policy.forward_rows import (
    answer_rows,
    for_policy,
    response_hidden,
    response_rows,
    share_media,
)
from rlaif_fast.policy.testing import make_media, make_policy, make_prompt, words

FAMILIES = ("qwen3_vl", "qwen2_5_vl")


def prompts_about_media(family: str) -> list:
    """Three about one clip, two about another, in mixed order, and one about nothing."""
    cat, dog = make_media("cat", (2, 4, 4)), make_media("dog", (1, 4, 8))
    kinds = [(cat, 3), (dog, 2), (cat, 5), ((), 4), (dog, 6), (cat, 3)]
    return [
        make_prompt(family, (media,) if media else (), after=after, seed=0)
        if k != 5
        else replace_tail(make_prompt(family, (media,), after=after, seed=0), words(3, 9))
        for k, (media, after) in enumerate(kinds)
    ]


def replace_tail(prompt, tail: list[int]):
    ids = prompt.input_ids.clone()
    ids[-len(tail) :] = torch.tensor(tail)
    return replace(prompt, input_ids=ids)


def make_responses(prompts, g: int = 4) -> list[list[list[int]]]:
    """Responses of 1 to 4 tokens with repeats, G to a prompt."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor(
        [words(4, int(k)) for k in torch.randint(0, 3, (len(prompts) * g,), generator=generator)]
    )
    lengths = torch.randint(1, 5, (len(prompts) * g,), generator=generator)
    rows = [row[:length].tolist() for row, length in zip(ids, lengths)]
    return [rows[start : start + g] for start in range(0, len(rows), g)]


def hidden_and_gradient(policy, rows):
    policy.model.zero_grad()
    hidden = response_hidden(policy, rows)
    (hidden * torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)).sum().backward()
    return hidden.detach(), [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("merge", ["prefixes", "duplicates", "none"])
def test_shared_media_give_the_same_hidden_states_and_gradients(family, merge):
    policy = make_policy(family, dtype=torch.float64)
    prompts = prompts_about_media(family)
    responses = make_responses(prompts)
    alone = response_rows(prompts, responses)
    shared = share_media(alone, policy.media_token_ids, merge)
    assert shared.target_ids.tolist() == [token for group in responses for row in group for token in row]
    want, want_grads = hidden_and_gradient(policy, alone)
    got, got_grads = hidden_and_gradient(policy, shared)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    # The models' norms compute in float32 whatever the dtype, so the order of the sum over rows shows.
    for a, b in zip(got_grads, want_grads):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_every_response_alone_is_the_reference():
    policy = make_policy("qwen3_vl", dtype=torch.float64)
    prompts = prompts_about_media("qwen3_vl")
    responses = make_responses(prompts, g=3)
    got = response_hidden(policy, for_policy(response_rows(prompts, responses), policy))
    want = torch.cat(
        [
            policy.response_hidden([prompt], torch.tensor([row]), torch.tensor([len(row)]))
            for prompt, group in zip(prompts, responses)
            for row in group
        ]
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def tokens(rows) -> int:
    return sum(len(p.input_ids) for p in rows.prompts) + int(rows.lengths.sum())


def test_one_clip_is_read_once():
    policy = make_policy("qwen3_vl")
    prompts = prompts_about_media("qwen3_vl")
    alone = answer_rows(prompts, [words(2, k) for k in range(6)])
    shared = share_media(alone, policy.media_token_ids)
    assert len(shared.prompts) == 3
    assert shared.group_sizes.tolist() == [3, 2, 1]
    assert tokens(shared) < tokens(alone)
    assert shared.token_index.numel() == alone.token_index.numel() == 12


def test_sharing_that_would_cost_tokens_is_left():
    policy = make_policy("qwen3_vl")
    cat = make_media("cat", (1, 4, 4))
    prompts = [make_prompt("qwen3_vl", (cat,), after=60, seed=k) for k in (1, 2)]
    prompts = [replace_tail(prompts[0], words(60, 7 + k)) for k in range(2)]
    rows = response_rows(prompts, make_responses(prompts, g=8))
    assert len(share_media(rows, policy.media_token_ids, "none").prompts) == 2
    assert len(share_media(rows, policy.media_token_ids, "prefixes").prompts) == 1


def test_media_behind_the_shared_part_stand_alone():
    policy = make_policy("qwen3_vl")
    cat = make_media("cat", (1, 4, 4))
    prompts = [make_prompt("qwen3_vl", (cat,), before=4, seed=k) for k in (1, 2)]
    assert (
        prompts[0].input_ids[0] != prompts[1].input_ids[0]
        or prompts[0].input_ids[1] != prompts[1].input_ids[1]
    )
    rows = answer_rows(prompts, [words(2, 1), words(2, 2)])
    assert len(share_media(rows, policy.media_token_ids).prompts) == 2


def test_the_plain_path_shares_nothing():
    policy = make_policy("qwen3_vl", shared_prefix=False)
    rows = answer_rows(prompts_about_media("qwen3_vl"), [words(2, k) for k in range(6)])
    assert for_policy(rows, policy) is rows
