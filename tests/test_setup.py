"""What a run settles before it begins: its values and where they come from."""

import dataclasses
import math

import pytest
import yaml

from rlaif_fast.cli import given_values, packaged_config
from rlaif_fast.errors import UsageError
from rlaif_fast.trainer.options import TrainConfig


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epsilon": -1.0}, "epsilon: expected 0 or more, got -1.0"),
        ({"delta": -1.0}, "delta: expected a positive number"),
        ({"backend": "tritn"}, "backend: expected auto, triton, cuda, cpu, reference, got 'tritn'"),
        ({"max_grad_norm": 0.0}, "max_grad_norm: expected a positive number"),
        ({"eval_videos_per_step": 0}, "eval_videos_per_step: expected 1 or more"),
        (
            {"min_pixels": 4096, "max_pixels": 1024},
            r"min_pixels: expected 1 to max_pixels \(1024\), got 4096",
        ),
        ({"min_frames": 9, "max_frames": 8}, r"min_frames: expected 1 to max_frames \(8\), got 9"),
        ({"lora_r": -1}, "lora_r: expected 0 or more"),
        ({"entropy_coef": math.nan}, "entropy_coef: expected a finite number"),
        ({"learning_rate": math.inf}, "learning_rate: expected a positive number"),
    ],
)
def test_bad_values_are_met_at_the_start(values, words):
    with pytest.raises(UsageError, match=words):
        TrainConfig(**values)


def test_defaults_are_for_a_real_model_and_tiny_yaml_has_the_toys():
    real = dataclasses.asdict(TrainConfig())
    toy = real | yaml.safe_load(packaged_config("tiny.yaml").read_text())
    assert (real["max_completion_length"], toy["max_completion_length"]) == (256, 12)
    assert (real["learning_rate"], toy["learning_rate"]) == (1e-6, 4e-4)
    assert (real["sft_learning_rate"], toy["sft_learning_rate"]) == (1e-5, 1e-3)
    for name in ("min_pixels", "max_pixels", "total_pixels", "max_frames"):
        assert real[name] == yaml.safe_load(packaged_config("qwen3_vl_4b.yaml").read_text()).get(
            name, real[name]
        )
    assert toy["min_pixels"] == toy["max_pixels"] == 1024
    assert (toy["max_frames"], toy["total_pixels"], toy["eval_videos_per_step"]) == (768, None, 64)


def test_given_values_are_those_of_the_command_alone(tmp_path):
    (tmp_path / "mine.yaml").write_text("beta: 0.5\n")
    words = ["--config", str(tmp_path / "mine.yaml"), "--report=true", "--oracle_options", '{"tie": 0.1}']
    assert given_values(TrainConfig, words, prog="p", description="d") == {
        "beta": 0.5,
        "report": True,
        "oracle_options": {"tie": 0.1},
    }
