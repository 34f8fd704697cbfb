"""A plan's own options, besides the run's configuration, and the known GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rlaif_fast.errors import require, require_least, require_positive
from rlaif_fast.trainer.options import TrainConfig


class Gpu(NamedTuple):
    """Figures of a data sheet.

    Attributes:
        memory: GiB.
        tflops: Dense bfloat16.
        bandwidth: GB/s of its memory.
        link: GB/s in one direction to the other GPUs of a machine.
    """

    memory: float
    tflops: float
    bandwidth: float
    link: float


GPUS = {
    "A100-40": Gpu(39.4, 312, 1555, 300),
    "A100-80": Gpu(79.2, 312, 2039, 300),
    "H100": Gpu(79.2, 989, 3350, 450),
    "H200": Gpu(139.8, 989, 4800, 450),
    "B200": Gpu(178.0, 2250, 8000, 900),
    "L40S": Gpu(44.5, 362, 864, 32),
    "RTX-4090": Gpu(23.5, 165, 1008, 32),
}
VARLEN = ("auto", "flash", "torch_flash")
NETWORK = 50.0  # GB/s per GPU between machines: 400 Gb/s each


@dataclass
class PlanConfig(TrainConfig):
    """A run's configuration, and the hardware it would run on.

    Attributes:
        gpus: GPUs of the run.
        gpus_a_machine: GPUs of the run on one machine.
        gpu: Kind of GPU: A100-40, A100-80, H100, H200, B200, L40S, RTX-4090.
        video_seconds: Length of a video.
        video_height: Pixels.
        video_width: Pixels.
        questions: Questions about each video, at most `questions_per_video`.
        question_tokens: Tokens of a question and the chat template around it.
    """

    gpus: int = 1
    gpus_a_machine: int = 8
    gpu: str = "H100"
    video_seconds: float = 60.0
    video_height: int = 720
    video_width: int = 1280
    questions: int = 1
    question_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require_least("gpus", self.gpus, 1)
        require_least("gpus_a_machine", self.gpus_a_machine, 1)
        require(self.gpu in GPUS, "gpu", ", ".join(GPUS), self.gpu)
        require_positive("video_seconds", self.video_seconds)
        require_least("video_height", self.video_height, 1)
        require_least("video_width", self.video_width, 1)
        require_least("questions", self.questions, 1)
        require_least("question_tokens", self.question_tokens, 1)
        require(self.shared_prefix, "shared_prefix", "true in a plan", self.shared_prefix)
        for name in ("optimizer_offload", "load_in_4bit"):
            require(not getattr(self, name), name, "false in a plan", getattr(self, name))
        require(not self.vllm_here, "sampler", "another than vllm without urls in a plan", self.sampler)
        require(self.sampler != "plain", "sampler", "another than plain in a plan", self.sampler)
        # The figures assume that no scores are written out.
        expected = f"{', '.join(VARLEN)} in a plan"
        require(self.attention_backend in VARLEN, "attention_backend", expected, self.attention_backend)
        eager = self.attn_implementation == "eager"
        require(not eager, "attn_implementation", "another than eager in a plan", self.attn_implementation)
        require(self.device != "cpu", "device", "a GPU in a plan", self.device)
        same = self.num_processes in (0, 1, self.gpus)
        require(same, "num_processes", f"the number of gpus ({self.gpus})", self.num_processes)
        sharded = self.sharding == "fsdp2"
        require(not (sharded and self.gpus == 1), "gpus", "2 or more where sharding is fsdp2", self.gpus)
        divides = self.together > 1 and self.gpus % self.together == 0
        expected = f"a divisor of the {self.gpus} GPUs larger than 1"
        require(divides or not sharded, "sharding_size", expected, self.together)

    @property
    def together(self) -> int:
        """GPUs that hold the weights together."""
        if self.sharding == "none":
            return 1
        return self.sharding_size or min(self.gpus, self.gpus_a_machine)
