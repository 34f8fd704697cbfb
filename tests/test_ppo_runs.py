"""Runs of `ppo_rm`: options, log, schedules and resume."""

import json

import pytest

from rlaif_fast import train as train_module
from rlaif_fast.algorithms.critic import RewardAndValue
from rlaif_fast.errors import UsageError
from rlaif_fast.runs.files import read_jsonl
from rlaif_fast.trainer import rl
from rlaif_fast.trainer.options import TrainConfig

# --- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "ppo_rm", "penalty_weight": 2.0}, "penalty_weight: ppo_rm does not read it"),
        ({"algorithm": "ppo_rm", "scale": "none"}, "scale: ppo_rm does not read it"),
        ({"algorithm": "grpo", "lam": 0.9}, "lam: grpo does not read it, got 0.9"),
        ({"reward_model_refresh": True}, "reward_model_refresh: grpo_rank with advantage directed"),
        ({"algorithm": "ppo_rm", "gamma": 1.5}, r"gamma: expected a share in \[0, 1\], got 1.5"),
        ({"algorithm": "ppo_rm", "max_steps": 50}, "reward_model_steps: expected less than 50, got 50"),
        ({"algorithm": "ppo_rm", "cliprange_value": 0}, "cliprange_value: expected a positive number"),
        ({"algorithm": "ppo_rm", "sharding": "fsdp2"}, "sharding: expected none where algorithm is ppo_rm"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**options)


# --- runs -------------------------------------------------------------------------------------------------------

SMALL = {
    "algorithm": "ppo_rm",
    "reward_model_steps": 2,
    "seed": 5,
    "synthetic_sft_clips": 4,
    "synthetic_rl_clips": 4,
    "synthetic_validation_clips": 1,
    "synthetic_test_clips": 1,
    "sft_steps": 1,
    "sft_videos_per_step": 2,
    "max_steps": 4,
    "videos_per_step": 1,
    "num_generations": 4,
    "learning_rate": 0.003,
    "warmup_steps": 0,
    "early_stopping_patience": 2,  # counted from the first PPO step
    "eval_steps": 1,
    "gallery_clips": 0,
    "report": "false",
    "tensorboard": "false",
    "num_processes": 1,
    "threads": 1,
}


def run(folder, cache, **changes) -> int:
    values = SMALL | {"output_dir": folder, "cache_dir": cache} | changes
    return train_module.main([f"--{key}={value}" for key, value in values.items()])


def test_the_log_has_the_mean_of_a_step_s_value_updates(tmp_path, cache, monkeypatch):
    losses = []
    original = RewardAndValue.update

    def told(self, groups):
        stats = original(self, groups)
        if stats:  # there are none while the reward model learns
            losses.append(stats["value/loss"])
        return stats

    monkeypatch.setattr(RewardAndValue, "update", told)
    assert run(tmp_path / "run", cache, num_iterations=2, max_steps=3) == 0
    logged = [row["value/loss"] for row in metrics(tmp_path / "run") if "value/loss" in row]
    assert len(losses) == 2 and losses[0] != losses[1]
    assert logged == pytest.approx([sum(losses) / 2])


def test_schedules_end_with_their_phase_where_a_rollout_has_fewer_groups_than_parts(
    tmp_path, cache, monkeypatch
):
    rates: dict[str, list[float]] = {"reward": [], "value": []}
    appraise, update = RewardAndValue.appraise, RewardAndValue.update

    def appraised(self, *given):
        found, updates = appraise(self, *given), self._reward_updates
        rates["reward"] += [] if updates is None else [updates.learning_rate]
        return found

    def updated(self, groups):
        stats, updates = update(self, groups), self._value_updates
        rates["value"] += [] if updates is None else [updates.learning_rate]
        return stats

    monkeypatch.setattr(RewardAndValue, "appraise", appraised)
    monkeypatch.setattr(RewardAndValue, "update", updated)
    changes = {"steps_per_generation": 8, "reward_model_updates": 8, "lr_scheduler_type": "linear"}
    assert run(tmp_path / "run", cache, **changes) == 0
    peak = SMALL["learning_rate"]
    assert rates["reward"] == pytest.approx([peak / 2, 0.0])
    assert rates["value"] == pytest.approx([peak * (15 - i) / 16 for i in range(16)])
    logged = [row["learning_rate"] for row in metrics(tmp_path / "run") if row["stage"] == "rl"]
    assert logged == pytest.approx([peak, peak, peak / 2, 0.0])


def metrics(folder) -> list[dict]:
    """Everything logged but how long it took."""
    return [{k: v for k, v in row.items() if k != "time"} for row in read_jsonl(folder / "metrics.jsonl")]


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        pytest.param(
            {"reward_model_refresh": "true", "num_iterations": 2, "lora_r": 4}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_goes_on_as_if_never_stopped(tmp_path, cache, monkeypatch, changes):
    assert run(tmp_path / "whole", cache, **changes) == 0
    original, stops = rl.sample_and_rank, [1, 3]  # while the reward model learns, and in PPO

    def killed(run, order, step):
        if stops[:1] == [step]:
            raise KeyboardInterrupt
        return original(run, order, step)

    monkeypatch.setattr(rl, "sample_and_rank", killed)
    assert run(tmp_path / "run", cache, **changes) == 130
    stops.pop(0)
    assert train_module.main(["--resume", str(tmp_path / "run")]) == 130
    stops.pop(0)
    assert train_module.main(["--resume", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    steps = [row for row in metrics(tmp_path / "whole") if row["stage"] == "rl"]
    refresh = "reward_model_refresh" in changes
    asked = [row["oracle/groups"] > 0 for row in steps]
    assert asked == [True, True, refresh, refresh]
    assert ["reward_model/accuracy" in row for row in steps] == asked
    learned = [False, False, True, True]
    assert ["value/loss" in row for row in steps] == ["grad_norm" in row for row in steps] == learned
    assert abs(steps[-1]["kl"]) > 0
    assert {row["step"] for row in read_jsonl(tmp_path / "run" / "rollouts.jsonl")} == {1, 2, 3, 4}


def test_an_error_in_the_first_ppo_step_costs_that_step_alone(tmp_path, cache, monkeypatch):
    """The value model is there by then, and has not learned."""
    changes = {"eval_steps": 9}
    assert run(tmp_path / "whole", cache, **changes) == 0
    update_loss = rl.update_loss

    def fail_at_groups(run, groups, features):
        return 1 / 0 if groups else update_loss(run, groups, features)

    with monkeypatch.context() as patched:
        patched.setattr(rl, "update_loss", fail_at_groups)
        assert run(tmp_path / "run", cache, **changes) == 1
    index = json.loads((tmp_path / "run" / "checkpoints" / "index.json").read_text())
    assert index["last"] == "rl-000002"
    assert train_module.main(["--resume", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
