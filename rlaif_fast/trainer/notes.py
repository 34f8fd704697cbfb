"""What a user should know of a configuration that is not wrong: it is logged, and shown in the report."""

from __future__ import annotations

from rlaif_fast.trainer.options import TrainConfig


def uneven_steps(config: TrainConfig, processes: int) -> list[str]:
    """A note if the videos of a step cannot be divided evenly among the processes."""
    keys = ["videos_per_step"] if config.sft != "auto" else ["sft_videos_per_step", "videos_per_step"]
    notes = []
    for key in keys:
        videos = getattr(config, key)
        if videos < processes:
            notes.append(
                f"{key}: {videos} is fewer than the {processes} processes, so {processes - videos} of them have "
                f"nothing to do in a step; use a multiple of {processes}"
            )
        elif videos % processes:
            notes.append(
                f"{key}: {videos} is not a multiple of the {processes} processes, so some of them wait for the "
                "others in every step"
            )
    groups = -(-config.videos_per_step // processes) * config.questions_per_video
    if groups < config.steps_per_generation:
        notes.append(
            f"steps_per_generation: {config.steps_per_generation} is more than the {groups} groups that a process "
            "has at most, so some of these steps change nothing"
        )
    return notes


def older_names(config: TrainConfig) -> list[str]:
    """A note if the configuration uses an older name of a key."""
    if config.algorithm == "grpo_rank" and config.advantage == "zscore":
        return ["advantage: zscore is the same as algorithm: grpo"]
    return []
