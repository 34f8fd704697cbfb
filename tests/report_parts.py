"""A finished run as the report reads one: videos, records, predictions."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np

from rlaif_fast.runs.files import write_jsonl
from rlaif_fast.runs.folder import RunDir

CATEGORIES = {  # accuracy before, after, and of guessing
    "action recognition": (0.41, 0.72, 0.21),
    "attribute perception": (0.47, 0.70, 0.25),
    "counting": (0.55, 0.74, 0.33),
    "object reasoning": (0.38, 0.52, 0.25),
    "object recognition": (0.51, 0.75, 0.28),
    "spatial perception": (0.33, 0.60, 0.24),
    "temporal perception": (0.44, 0.47, 0.31),
    "temporal reasoning": (0.36, 0.55, 0.29),
}


COLORS = {"red": (222, 48, 48), "blue": (62, 92, 238), "green": (52, 190, 74), "yellow": (240, 216, 60)}


def make_video(path: Path, color: tuple[int, int, int], seed: int, size: int = 64) -> None:
    """Encode a disc that crosses a textured background in 12 frames."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    background = 95 + 14 * np.sin(x / 6 + seed)[..., None] * np.cos(y / 9)[..., None] + np.zeros(3)
    start, end = generator.uniform(0.25, 0.75, (2, 2)) * size
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=6, options={"deadline": "realtime", "cpu-used": "8"})
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for index in range(12):
            cx, cy = start + (end - start) * index / 11
            cover = np.clip(size / 6 - np.hypot(x - cx, y - cy), 0, 1)[..., None]
            frame = (
                background * (1 - cover) + np.array(color) * cover + generator.normal(0, 4, (size, size, 3))
            )
            image = av.VideoFrame.from_ndarray(np.clip(frame, 0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())


def make_run(
    path: Path, *, seed: int = 0, clips: int = 6, sft_steps: int = 600, rl_steps: int = 150
) -> RunDir:
    """Write everything that a finished run leaves behind."""
    run = RunDir.create(path)
    generator = np.random.default_rng(seed)
    metrics, time = [], 0.0
    for step in range(1, sft_steps + 1, max(1, sft_steps // 300)):
        time += 0.3
        loss = 0.5 + 3 * math.exp(-step / (sft_steps / 7)) + generator.normal(0, 0.04)
        metrics.append({"time": time, "stage": "sft", "step": step, "loss": loss})
    rollouts = []
    for step in range(rl_steps + 1):
        time += 1.1
        done = 1 - math.exp(-3 * step / rl_steps)

        def noisy(low, high, spread, done=done):
            return low + (high - low) * done + generator.normal(0, spread)

        if step:
            metrics.append(
                {
                    "time": time,
                    "stage": "rl",
                    "step": step,
                    "loss": noisy(0.0, -0.01, 0.012),
                    "kl": max(0.0, noisy(0.0, 0.11, 0.006)),
                    "entropy": noisy(0.72, 0.35, 0.02),
                    "kendall_tau": noisy(0.22, 0.55, 0.04),
                    "ndcg": min(1.0, noisy(0.68, 0.86, 0.015)),
                    "top1_agreement": noisy(0.35, 0.62, 0.04),
                    "accuracy": noisy(0.3, 0.58, 0.02),
                    "no_signal": max(0.0, noisy(0.06, 0.24, 0.03)),
                }
            )
            rollouts.append({"step": step, "responses": ["a"] * 8})
        if step % 25 == 0:
            rows = {
                name: {"n": 24, "correct": (correct := int(np.clip(round(24 * noisy(b, a, 0.03)), 0, 24)))}
                | {"accuracy": correct / 24}
                for name, (b, a, _) in CATEGORIES.items()
            }
            accuracy = sum(row["correct"] for row in rows.values()) / (24 * len(rows))
            metrics.append(
                {"time": time, "stage": "eval", "step": step, "phase": "rl", "split": "validation"}
                | {"accuracy": accuracy, "by_category": rows}
            )
    write_jsonl(run.metrics, metrics)
    write_jsonl(run.rollouts, rollouts)

    predictions = {"sft": [], "final": []}
    for category, (before, after, chance) in CATEGORIES.items():
        for index in range(54):
            luck = generator.random()
            for phase, accuracy in (("sft", before), ("final", after)):
                luck = luck if generator.random() < 0.7 else generator.random()
                predictions[phase].append(
                    {
                        "example_id": f"clip{index}-{category}",
                        "category": category,
                        "video": f"clip{index}.mp4",
                    }
                    | {"prediction": "x", "answer": "y", "correct": bool(luck < accuracy), "chance": chance}
                )
    media = path / "media"
    media.mkdir()
    samples = []
    names = list(COLORS)
    for index in range(clips):
        color = names[index % len(names)]
        file = media / f"clip{index}.mp4"
        make_video(file, COLORS[color], seed + index)
        category = list(CATEGORIES)[index % len(CATEGORIES)]
        chosen = index % 3 == 2
        good = "B" if chosen else f"the {color} disc moves to the left"
        near, off, bad = (
            ("A", "C", "the the red")
            if chosen
            else (f"the {color} disc grows", "the purple star moves up", f"{color} disc the to")
        )
        for phase, responses, oracle_ranks, policy_ranks, advantages in (
            (
                "sft",
                [near, good, near, off, bad, near, off, good],
                [2, 0, 2, 5, 7, 2, 5, 0],
                [0, 3, 0, 5, 7, 0, 5, 3],
                [-0.31, 1.52, -0.31, -0.62, -0.9, -0.31, -0.59, 1.52],
            ),
            (
                "final",
                [good, good, good, near, good, good, off, good],
                [0, 0, 0, 6, 0, 0, 7, 0],
                [0, 0, 0, 6, 0, 0, 7, 0],
                [0.12, 0.12, 0.12, -0.3, 0.12, 0.12, -0.42, 0.12],
            ),
        ):
            samples.append(
                {
                    "phase": phase,
                    "step": 0,
                    "example_id": f"clip{index}-{category}",
                    "category": category,
                    "video": str(file),
                    "question": f"What does the {color} disc do?",
                    "options": ["It grows.", "It moves to the left.", "It vanishes."] if chosen else [],
                    "answer": good,
                    "responses": responses,
                    "oracle_ranks": oracle_ranks,
                    "policy_ranks": policy_ranks,
                    "advantages": advantages,
                    "valid": True,
                    "confidence": 1.0,
                    "greedy": near if phase == "sft" else good,
                }
            )
    samples.sort(key=lambda record: record["phase"], reverse=True)
    for record in samples:  # the greedy answers of the gallery are those of the predictions
        for row in predictions[record["phase"]]:
            if row["example_id"] == record["example_id"]:
                row["correct"] = record["greedy"] == record["answer"]
    write_jsonl(run.samples, samples)
    for phase, records in predictions.items():
        write_jsonl(run.predictions(phase), records)

    def share(phase, category=None):
        rows = [row["correct"] for row in predictions[phase] if category in (None, row["category"])]
        return sum(rows) / len(rows)

    run.write_summary(
        {
            "sft_accuracy": share("sft"),
            "final_accuracy": share("final"),
            "by_category": {
                name: {"sft": share("sft", name), "final": share("final", name), "n": 54}
                for name in CATEGORIES
            },
            "seconds": 312.4,
            "peak_rss_bytes": 1_420_000_000,
            "seed": seed,
            "config": {
                "model": "tiny",
                "algorithm": "grpo_rank",
                "advantage": "directed",
                "num_generations": 8,
                "oracle": "reference",
                "learning_rate": 3e-4,
                "beta": 0.04,
                "sft_steps": sft_steps,
                "max_steps": rl_steps,
                "data": "synthetic",
                "label_noise": 0.5,
                "seed": seed,
            },
            "git_commit": "1f2e3d4c5b6a79880123456789abcdef01234567",
            "seconds_by_stage": {
                "rollout": 78.0,
                "update": 61.0,
                "sft": 96.0,
                "data": 31.0,
                "evaluation": 21.0,
                "decode": 9.0,
                "oracle": 2.4,
                "checkpoint": 3.0,
                "report": 4.2,
            },
            "versions": {"python": "3.11.2", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
            "machine": "x86_64, 2 cores, no GPU",
            "notes": [
                "1,204 of 2,410 supervised answers have one fact wrong on purpose, like a weak annotator's."
            ],
        }
    )
    return run


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())
