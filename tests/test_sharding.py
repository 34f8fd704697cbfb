"""Weights cut over the processes by FSDP2: the same training as one process, whoever has how much to learn."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from sharding_parts import SPLITS, Case, Outcome, go_on, hand_over, make_policy, train, work_of_two

from rlaif_fast.distributed.launch import launch
from rlaif_fast.distributed.world import World
from rlaif_fast.errors import UsageError
from rlaif_fast.policy.families import FAMILIES as FAMILIES_OF_MODELS
from rlaif_fast.policy.families.base import ROUTER
from rlaif_fast.policy.shard import shard_policy
from rlaif_fast.policy.testing import FAMILIES
from rlaif_fast.runs.integrity import read_manifest
from rlaif_fast.trainer import setup
from rlaif_fast.trainer.options import TrainConfig

TRAINED = {
    **{f"{family} {part}": Case(family, part) for family in FAMILIES for part in ("all", "lora", "decoder")},
    "many passes": Case("qwen2_5_vl", packed=60, splits=SPLITS[1:3]),
    "recomputed": Case("qwen3_vl", "decoder", recompute=True),
    "in main memory": Case("qwen3_vl", offload=True),
    # Counted for each response, the questions about one clip are more than a row holds.
    "one row a call": Case("qwen3_vl", packed=150, long_questions=True, splits=SPLITS[1:2]),
    "off policy": Case("qwen2_5_vl", "lora", num_iterations=2, beta=0.0),
    "supervised": Case("qwen2_5_vl", supervised=True, splits=SPLITS[:3]),
}
OTHERS = sorted(FAMILIES_OF_MODELS.keys() - set(FAMILIES))
TRAINED |= {family: Case(family, splits=(SPLITS[3], SPLITS[0])) for family in OTHERS}
TRAINED["internvl lora"] = Case("internvl", "lora", splits=(SPLITS[3], SPLITS[0]))
BFLOAT16 = Case("qwen3_vl", dtype=torch.bfloat16, splits=SPLITS[:3])
WIDE_ROUTER = Case("glm4v_moe", "decoder", dtype=torch.bfloat16, splits=SPLITS[:3])
RESUMED = {
    "all": Case(),
    "lora": Case("qwen2_5_vl", "lora"),
    "in main memory": Case("qwen2_5_vl", "decoder", offload=True),
    "written meanwhile": Case(asynchronous=True),
    "lora, written meanwhile": Case("qwen3_vl", "lora", asynchronous=True),
}


class Pair(NamedTuple):
    trained: dict[str, Outcome]
    resumed: dict[str, list[dict[str, torch.Tensor]]]
    folder: Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    """Every case in the same two processes, which take a few seconds to start."""
    folder = tmp_path_factory.mktemp("checkpoints")
    argument = (
        [*TRAINED.values(), BFLOAT16, WIDE_ROUTER],
        [(case, folder / name) for name, case in RESUMED.items()],
    )
    trained, resumed = launch(work_of_two, argument, 2)
    return Pair(
        dict(zip([*TRAINED, "bfloat16", "wide router"], trained)), dict(zip(RESUMED, resumed)), folder
    )


def assert_close(ours, expected, tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_equal_one(name, pair):
    # gradients that stay beside the weights
    one = train(World(), dataclasses.replace(TRAINED[name], offload=False))
    two = pair.trained[name]
    assert len(two.losses) == len(TRAINED[name].splits)
    assert two.losses == pytest.approx(one.losses, rel=1e-5, abs=1e-6)
    assert two.norms == pytest.approx(one.norms, rel=1e-5)
    for ours, expected, norm in zip(two.gradients, one.gradients, one.norms):
        assert ours.keys() == expected.keys()
        for key, gradient in expected.items():
            assert (ours[key] - gradient).norm() <= 1e-5 * norm, key
    assert_close(two.weights, one.weights, 1e-5)
    assert two.sampled == one.sampled
    assert two.drawn_plainly == one.drawn_plainly
    assert two.drawn_by_reference == two.drawn_at_start == one.drawn_at_start
    assert one.kept == 1.0
    assert two.kept < (0.51 if TRAINED[name].trains == "all" else 0.9)


def test_a_bfloat16_model_is_updated_in_float32(pair):
    one, two = train(World(), BFLOAT16), pair.trained["bfloat16"]
    assert two.dtypes == {torch.float32}
    assert two.losses == pytest.approx(one.losses, abs=2e-2)
    assert two.norms == pytest.approx(one.norms, rel=5e-2)


def test_a_router_in_float32_stays_whole(pair):
    one, two = train(World(), WIDE_ROUTER), pair.trained["wide router"]
    assert two.losses == pytest.approx(one.losses, abs=2e-2)
    assert two.norms == pytest.approx(one.norms, rel=5e-2)
    router = [name for name in one.weights if ROUTER.search(name)]
    assert router and all(two.weights[name].dtype == torch.float32 for name in router)
    assert all(torch.equal(two.weights[name], one.weights[name]) for name in router)


def test_a_weight_that_trains_in_more_bits_is_refused():
    policy = make_policy(WIDE_ROUTER)
    policy.model.requires_grad_(True)
    with pytest.raises(
        UsageError, match=r"sharding: expected none where .*gate\.weight trains, .* torch.float32"
    ):
        shard_policy(policy, None, None)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_goes_on_to_the_bit(name, pair):
    saved, uninterrupted, resumed = pair.resumed[name]
    assert_close(resumed, uninterrupted, 0.0)
    assert any(not torch.equal(saved[key], uninterrupted[key]) for key in saved)


@pytest.mark.parametrize("name", RESUMED)
def test_one_process_goes_on_from_two(name, pair):
    _, uninterrupted, _ = pair.resumed[name]
    assert_close(go_on(World(), RESUMED[name], pair.folder / name / "two"), uninterrupted, 1e-6)


def test_a_sharded_checkpoint_is_an_ordinary_folder(pair):
    folder, (saved, *_) = pair.folder / "all" / "two", pair.resumed["all"]
    assert {"model.safetensors", "shards/.metadata"} <= read_manifest(folder).files.keys()
    assert sum(name.endswith(".distcp") for name in read_manifest(folder).files) == 2
    for name, weight in load_file(folder / "model.safetensors").items():
        assert torch.equal(weight, saved[name])
    adapters = load_file(pair.folder / "lora" / "two" / "adapter_model.safetensors")
    assert adapters and all(".lora_" in name for name in adapters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_processes": 1}, "sharding: fsdp2 needs several processes, and this run has one"),
        ({"num_processes": 4, "sharding_size": 3}, "sharding_size: expected a divisor of the 4 processes"),
        ({"num_processes": 4, "sharding_size": 1}, "sharding_size: expected a divisor of the 4 processes"),
    ],
)
def test_processes_that_cannot_share_are_refused(options, message):
    config = TrainConfig(sharding="fsdp2", **options)
    with pytest.raises(UsageError, match=message):
        setup.shards_together(config, config.num_processes, config.num_processes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharding": "zero3"}, "sharding: expected none or fsdp2, got 'zero3'"),
        (
            {"sharding": "fsdp2", "shared_prefix": False},
            "sharding: expected none where shared_prefix is false",
        ),
        (
            {"sharding": "fsdp2", "sampler": "cuda_graphs"},
            "sharding: expected none where sampler is cuda_graphs",
        ),
        ({"sharding_size": 2}, "sharding_size: expected 0 where sharding is none, got 2"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize("trains", ["all", "lora"])
def test_servers_are_given_sharded_weights(trains):
    same, worst, versions = launch(hand_over, Case("qwen3_vl", trains), 2)
    assert same
    assert worst < 1e-4
    assert versions == 3  # the start and two updates


@pytest.mark.slow
def test_four_processes_in_two_rows_and_random_splits():
    """Fifty random shares of the groups among four processes end, at the weights of one process."""
    generator = torch.Generator().manual_seed(0)
    splits = []
    for _ in range(50):
        owner = torch.randint(0, 4, (6,), generator=generator).tolist()
        splits.append(tuple(tuple(k for k in range(6) if owner[k] == rank) for rank in range(4)))
    case = Case("qwen3_vl", packed=60, splits=tuple(splits))
    (four,), _ = launch(work_of_two, ([case], []), 4)
    one = train(World(), case)
    assert four.losses[:5] == pytest.approx(one.losses[:5], rel=1e-5, abs=1e-6)
    assert 0.49 < four.kept < 0.51  # two rows, each of which holds the weights once
