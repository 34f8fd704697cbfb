"""Drawing a token: the filtered distribution, cold and extreme draws."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlaif_fast.algorithms import make_algorithm
from rlaif_fast.distributed.world import World
from rlaif_fast.rollout.base import SamplingParams
from rlaif_fast.rollout.generate import TokenSampler, uniforms
from rlaif_fast.trainer.drawing import asked, draw_seed, on_policy
from rlaif_fast.trainer.options import TrainConfig


class _Head:
    """What `TokenSampler` needs of a policy."""

    eos_token_ids = (4,)
    device = torch.device("cpu")


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(min_new_tokens=0), {0, 1, 2, 3, 4}),
        (SamplingParams(min_new_tokens=1), {0, 1, 2, 3}),
        (SamplingParams(min_new_tokens=0, top_k=2), {0, 1}),
        (SamplingParams(min_new_tokens=0, top_p=0.75), {0, 1, 2}),
        (SamplingParams(min_new_tokens=0, top_p=0.2), {0}),
        (SamplingParams(min_new_tokens=0, temperature=0.5), {0, 1, 2, 3, 4}),
    ],
)
def test_draws_follow_the_filtered_distribution(params: SamplingParams, kept: set[int]) -> None:
    logits = torch.tensor([[0.35, 0.3, 0.2, 0.1, 0.05, 0.0]]).log()
    count = 40_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, logps = TokenSampler(_Head(), params)(
        logits, torch.zeros(count, dtype=torch.int64), uniform, step=0
    )
    unfiltered = (logits / params.temperature).softmax(-1)[0]
    expected = torch.zeros(6)
    expected[list(kept)] = unfiltered[list(kept)]
    frequencies = torch.bincount(tokens, minlength=6) / count
    torch.testing.assert_close(frequencies, expected / expected.sum(), rtol=0, atol=1e-4)
    torch.testing.assert_close(logps, unfiltered.log()[tokens])  # of the policy, not of what the filters left


def test_no_response_ends_early_however_cold_the_draw_and_sure_the_end() -> None:
    logits = torch.zeros(1, 5)
    logits[0, _Head.eos_token_ids[0]] = 40.0
    for temperature in (1.0, 1e-3, 1e-6):
        params = SamplingParams(min_new_tokens=1, temperature=temperature)
        tokens, _ = TokenSampler(_Head(), params)(
            logits, None, torch.tensor([0.5], dtype=torch.float64), step=0
        )
        assert tokens.item() not in _Head.eos_token_ids


def test_extreme_draws_stay_on_tokens_with_mass() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).expand(2, -1)
    draws = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    tokens, _ = TokenSampler(_Head(), SamplingParams(min_new_tokens=0))(logits, None, draws, step=0)
    assert tokens.tolist() == [1, 3]


def test_uniforms_belong_to_row_and_step() -> None:
    params = SamplingParams(max_new_tokens=5, seed=9)
    few, many = uniforms(3, params), uniforms(6, params)
    assert torch.equal(few, many[:3])
    assert few.min() >= 0
    assert few.max() < 1


@pytest.mark.parametrize("rounds", [2, 15, 16, 40])
def test_no_two_rounds_of_a_run_draw_with_one_seed(rounds: int) -> None:
    """Past 15 extra rounds, the last ones of a step drew with the seeds of the next step."""
    config = TrainConfig(dynamic_sampling=True, dynamic_sampling_rounds=rounds, seed=3)
    seeds = [
        draw_seed(config, World(rank, 2), step, attempt)
        for rank in range(2)
        for step in range(4)
        for attempt in range(rounds + 1)
    ]
    assert len(set(seeds)) == len(seeds)


def test_rounds_that_are_not_made_change_no_draw() -> None:
    few, many = (TrainConfig(dynamic_sampling_rounds=rounds) for rounds in (2, 40))
    assert draw_seed(few, World(), 3, 0) == draw_seed(many, World(), 3, 0)


def test_no_two_rounds_of_a_run_ask_at_one_place_of_the_order() -> None:
    config = TrainConfig(dynamic_sampling=True, dynamic_sampling_rounds=3, max_steps=4)
    places = []
    order = SimpleNamespace(visits=lambda place: places.append(place) or [], step=lambda place: [])
    run = SimpleNamespace(config=config, world=World())
    run.logger = SimpleNamespace(timer=lambda name: nullcontext())
    run.make_batch = type("Batches", (), {"__call__": lambda *_: [], "prefetch": lambda *_: None})()
    for step in range(4):
        for attempt in range(4):
            asked(run, order, step, attempt)
    assert places[::4] == [0, 1, 2, 3]  # whatever was asked in extra rounds
    assert sorted(places) == list(range(16))


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, True), ({"num_iterations": 2}, False), ({"steps_per_generation": 2}, False)],
)
def test_a_rollout_is_on_policy_where_it_is_learned_from_once_and_whole(options, expected) -> None:
    config = TrainConfig(**options)
    assert on_policy(config, make_algorithm(config)) is expected
    assert not on_policy(config, make_algorithm(TrainConfig(algorithm="dpo")))
