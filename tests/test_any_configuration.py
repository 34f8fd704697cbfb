"""Tiny runs of random configurations: one that was stopped goes on to the digit; how it is computed changes nothing.

A case is drawn from its number, so a failure names what repeats it.
"""

import math
import random
import re

import pytest
from family_checkpoints import RECIPES, write_checkpoint
from fuzzing import fuzz_seed
from tiny_runs import SMALL, in_a_file, metrics

from rlaif_fast import train as train_module
from rlaif_fast.trainer.run import Run

SEED = fuzz_seed()
FEW, MANY = range(SEED, SEED + 1), [pytest.param(SEED + n, marks=pytest.mark.slow) for n in range(1, 25)]
TINY = SMALL | {
    "nframes": 4,
    "sft_steps": 2,
    "sft_videos_per_step": 2,
    "sft_learning_rate": 1e-3,
    "max_steps": 3,
    "videos_per_step": 2,
    "num_generations": 2,
    "max_completion_length": 16,
    "learning_rate": 1e-3,
    "blind_control": 0,
    "gallery_clips": 0,
    "min_pixels": 256,
    "max_pixels": 1024,
    "dtype": "float32",
    "reward_model_steps": 1,
}
# What is learned; None leaves a key out.
KEYS = {
    "algorithm": [
        "grpo_rank",
        "grpo",
        "rloo",
        "gopo",
        "rlrr",
        "odrpo",
        "online_dpo",
        "dpo",
        "lipo",
        "ppo_rm",
    ],
    "advantage": (None, None, None, "oracle"),
    "scale": (None, "none"),
    "score": (None, "sum"),
    "beta": (None, 0.0, 0.05),
    "kl": (None, "k1", "k2"),
    "epsilon_high": (None, 0.3),
    "delta": (None, None, 1.5),
    "entropy_coef": (None, 0.01),
    "loss_type": (None, "dapo", "dr_grpo"),
    "importance_sampling_level": (None, "sequence"),
    "temperature": (None, 0.7),
    "max_completion_length": (16, 12),
    "reward_model_refresh": (None, True),
    "reward_model_updates": (None, 2),
    "gamma": (None, 0.9),
    "questions_per_video": (None, 2),
    "num_generations": (2, 3),
    "top_p": (None, 0.9),
    "top_k": (None, 5),
    "num_iterations": (None, 2),
    "steps_per_generation": (None, 2),
    "lr_scheduler_type": (None, "linear"),
    "weight_decay": (None, 0.1),
    "mask_truncated_completions": (None, True),
    "dynamic_sampling": (None, None, True),
    "metric_for_best_model": (None, "oracle", "none"),
    "early_stopping_patience": (None, None, 1),
    "freeze_vision_tower": (None, True, False),
    "freeze_projector": (None, True),
    "lora_r": (None, None, 4),
    "feedback": (None, "heavy_tails", "flips"),
    "oracle_noise": (None, None, 0.3),
    "multiple_choice_fraction": (None, 1.0),
    "scored_answer": (None, "whole"),
    "sft": (None, None, None, "none"),
    "system_prompt": (None, "Be short."),
    "eval_steps": (1, 2),
}
# How it is computed.
EXECUTION = {
    "sampler": ("plain", "shared_prefix"),
    "shared_prefix": (False,),
    "gradient_checkpointing": (True,),
    "max_packed_tokens": (200, 300, 500),
    "max_cached_tokens": (150, 300),
    "feature_cache_bytes": (0,),
    "attention_backend": ("reference",),
    "backend": ("reference",),
    "async_checkpoints": (True,),
}
# Drawn otherwise than the update computes, or not to the digit: beside the keys above, for a run that is stopped.
STOPPED_TOO = {"dtype": ("float32", "bfloat16"), "lora_dropout": (None, 0.1), "keep_checkpoints": (None, 1)}
ROUNDING = 1e-6  # a gradient of that norm may be rounding, and Adam makes a whole step of it
SIGNS = "rewards/accuracies"  # of margins that are 0 but for rounding where the policy is still its reference


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny checkpoint of each family, written when it is first asked for."""
    folder = tmp_path_factory.mktemp("models")

    def of(family: str) -> str:
        path = folder / family
        return str(path if path.exists() else write_checkpoint(family, path))

    return of


@pytest.fixture
def run(tmp_path, cache, capsys):
    """Trains, and gives the run's folder; a key that the others do not go with is left out, until none is refused."""

    def start(name: str, values: dict, *, code: int = 0):
        values = values | {"output_dir": tmp_path / name, "cache_dir": cache}
        for _ in KEYS:
            found = train_module.main(in_a_file(values, tmp_path / f"{name}.yaml"))
            said = capsys.readouterr().err
            refused = re.search(r"^error: (\w+): ", said, re.MULTILINE)
            if found != 2 or refused is None or values.pop(refused[1], None) is None:
                break
        assert found == code, f"{values}\n{said}"
        return tmp_path / name, values

    return start


def draw(rng: random.Random, keys: dict) -> dict:
    """A value for every key, but for those that are left out."""
    drawn = {name: rng.choice(choices) for name, choices in keys.items()}
    return {name: value for name, value in drawn.items() if value is not None}


def numbers(row: dict, path: str = "") -> dict[str, float]:
    """The numbers of a record by their paths, without what was measured by the clock."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{path}{name}/")
        elif isinstance(value, int | float) and not re.search("second|time|memory", name):
            found[path + name] = value
    return found


@pytest.mark.parametrize("case", [*FEW, *MANY])
def test_a_stopped_run_goes_on_to_the_digit(run, models, monkeypatch, case):
    rng = random.Random(case)
    wanted = {"model": models(rng.choice(sorted(RECIPES)))} | draw(rng, KEYS | STOPPED_TOO)
    wanted |= {name: rng.choice(choices) for name, choices in EXECUTION.items() if rng.random() < 0.3}
    asked = []
    monkeypatch.setattr(Run, "asked_to_end", lambda self: asked.append(1) and False)
    whole, values = run("whole", TINY | wanted)
    stop = rng.randint(1, len(asked))
    asked.clear()
    monkeypatch.setattr(Run, "asked_to_end", lambda self: asked.append(1) or len(asked) == stop)
    stopped, _ = run("stopped", values, code=143)
    assert train_module.main(["--resume", str(stopped)]) == 0
    assert [numbers(row) for row in metrics(stopped)] == [numbers(row) for row in metrics(whole)]


@pytest.mark.parametrize("case", [*FEW, *MANY])
def test_how_it_is_computed_changes_nothing(run, models, case):
    rng = random.Random(-1 - case)
    model = models(rng.choice(sorted(RECIPES)))
    one, values = run("one", TINY | {"model": model} | draw(rng, KEYS))
    chosen = rng.sample(sorted(EXECUTION), 3)
    other, changed = run("other", values | {name: rng.choice(EXECUTION[name]) for name in chosen})
    rows = [[numbers(row) for row in metrics(folder)] for folder in (one, other)]
    assert [list(row) for row in rows[0]] == [list(row) for row in rows[1]]
    for left, right in zip(*rows):
        for name in left.keys() - {SIGNS}:
            close = math.isclose(left[name], right[name], rel_tol=1e-3, abs_tol=1e-5)
            both_nan = math.isnan(left[name]) and math.isnan(right[name])
            assert close or both_nan, f"{name}: {left[name]} and {right[name]}, with {changed}"
        if max(row.get("grad_norm", 1.0) for row in (left, right)) < ROUNDING:
            return
