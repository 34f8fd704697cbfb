"""TRL's GRPO trainer with videos in its prompts, taught by an oracle that sees them. Needs torchvision and TRL.

python examples/trl_video.py
accelerate launch --num_processes 2 --cpu examples/trl_video.py
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
from trl import GRPOConfig

from rlaif_fast.adapters.trl import OracleGRPOTrainer
from rlaif_fast.oracle import RankRequest
from rlaif_fast.oracle.callable import CallableOracle
from rlaif_fast.policy.tiny import TinySize, make_tiny, words_of
from rlaif_fast.video import load_clip
from rlaif_fast.video.testing import counter_frames, write_video

COUNTS = (4, 6, 8, 10)
QUESTION = "How many frames?"


def save(folder: Path) -> Path:
    """Write a tiny Qwen2.5-VL with its processor, and a few videos; return the model's folder."""
    model = folder / "start"
    if not (model / "config.json").exists():
        size = TinySize(hidden_size=64, heads=2, layers=2, intermediate_size=64, vision_hidden_size=32)
        make_tiny(model, words_of([QUESTION, *map(str, range(12))]), family="qwen2_5_vl", size=size)
        settings = {"patch_size": 8, "min_pixels": 32 * 32, "max_pixels": 32 * 32}
        tokenizer = AutoTokenizer.from_pretrained(model)
        Qwen2_5_VLProcessor(
            Qwen2VLImageProcessor(**settings),
            tokenizer,
            Qwen2VLVideoProcessor(**settings, do_sample_frames=False),
            chat_template=tokenizer.chat_template,
        ).save_pretrained(model)
        for count in COUNTS:
            write_video(folder / f"{count}.mp4", counter_frames(count, 32, 32), fps=2)
    return model


def closeness(request: RankRequest) -> list[float]:
    """Score responses by what is seen: how close their number is to the clip's number of frames."""
    frames = len(request.clips[0].frames)
    numbers = [next((int(word) for word in text.split() if word.isdigit()), 99) for text in request.responses]
    return [-float(abs(number - frames)) for number in numbers]


@functools.lru_cache(maxsize=8)
def frames(path: str) -> np.ndarray:
    """The frames (F, H, W, 3) of a video, by our decoder: the one in Transformers needs torchcodec."""
    return load_clip(path).frames.numpy()


def with_prompts(rows: dict[str, list]) -> dict[str, list]:
    """A question about each video; a video is decoded when its row is read."""
    contents = [
        [{"type": "video", "video": frames(path)}, {"type": "text", "text": QUESTION}]
        for path in rows["video"]
    ]
    return {"prompt": [[{"role": "user", "content": content}] for content in contents]}


def main(output_dir: str = "trl_video_run", steps: int = 6, **options) -> OracleGRPOTrainer:
    """Train a few steps and return the trainer; `options` go to `GRPOConfig`."""
    folder = Path(output_dir)
    rows = Dataset.from_dict({"video": [str(folder / f"{count}.mp4") for count in COUNTS]})
    tiny = {
        "per_device_train_batch_size": 4, "num_generations": 4, "gradient_accumulation_steps": 2,
        "max_completion_length": 4, "learning_rate": 1e-3, "beta": 0.04, "logging_steps": 1, "report_to": "none",
        "save_strategy": "no", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip
    args = GRPOConfig(output_dir=str(folder), max_steps=steps, **{**tiny, **options})
    with args.main_process_first():
        model = save(folder)
    trainer = OracleGRPOTrainer(
        str(model),
        CallableOracle(function=closeness, returns="scores"),
        args=args,
        train_dataset=rows.with_transform(with_prompts),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
