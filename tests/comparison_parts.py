"""Finished runs to compare."""

import yaml

COMMON = {
    "synthetic_sft_clips": 6,
    "synthetic_rl_clips": 6,
    "synthetic_validation_clips": 4,
    "synthetic_test_clips": 6,
    "num_generations": 4,
    "videos_per_step": 2,
    "sft_videos_per_step": 2,
    "max_completion_length": 12,
    "num_processes": 1,
    "tensorboard": False,
    "report": False,
}


def write_config(folder, **changes):
    values = {
        "output_dir": str(folder / "compare"),
        "common": COMMON
        | {"model": "tiny", "max_steps": 2, "eval_steps": 1, "cache_dir": str(folder / "cache")},
        "start": {"sft_steps": 3},
        "arms": {"grpo": {"advantage": "zscore"}, "oracle": {"advantage": "oracle"}},
        "feedback": {"exact": {}, "noise": {"oracle_noise": 0.3}},
        "tables": {
            "main": {
                "seeds": [1, 2],
                "arms": ["grpo", "oracle"],
                "feedback": ["exact", "noise"],
                "baseline": "grpo",
            }
        },
    } | changes
    file = folder / "compare.yaml"
    file.write_text(yaml.safe_dump(values))
    return file
