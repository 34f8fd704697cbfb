"""A model for lmms-eval, so that published figures can come from its own tasks.

    python -m lmms_eval --model rlaif_fast --model_args pretrained=CHECKPOINT,fps=1 --tasks videomme

It also runs under torchrun or `accelerate launch`: lmms-eval distributes its questions over the processes, one per GPU.
Tested with lmms-eval 0.7.3, which finds it by the entry-point group `lmms_eval.models`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from rlaif_fast.data.schema import Example
from rlaif_fast.errors import UsageError, require
from rlaif_fast.evals.grading import stated
from rlaif_fast.evals.options import EvaluateConfig, configuration, load_checkpoint
from rlaif_fast.rollout import make_sampler
from rlaif_fast.rollout.base import SamplingParams
from rlaif_fast.trainer import setup
from rlaif_fast.video.refs import MediaRef

BLANK_LINE = "\n\n"
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class RlaifFast(lmms):
    """The policy of a checkpoint, answering greedily.

    Args:
        pretrained: A checkpoint folder, a folder of LoRA adapters, or a hub name.
        batch_size: Prompts answered at once, 1 or more.
        device: "auto", "cpu", "cuda".
        frames: How videos are sampled and resized, as keys of `rlaif_fast.evaluate` (fps, nframes, max_pixels, ...).
    """

    is_simple = True

    def __init__(
        self, pretrained: str, batch_size: int | str = 8, device: str | None = None, **frames: Any
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator(cpu=device == "cpu")  # makes this process's own GPU the current one
        frames.pop("max_batch_size", None)  # lmms-eval passes it to every model
        options = EvaluateConfig(model=pretrained, data="lmms-eval", device=device or "auto", **frames)
        config = configuration(options)
        loaded = load_checkpoint(config)
        self.batch_size = _positive("batch_size", batch_size)
        self._policy = setup.make_policy(loaded, config)
        self._policy.model.eval()
        self._sampler = make_sampler(self._policy)
        self._make_batch = setup.make_batch_maker(loaded, config)

    @property
    def device(self) -> torch.device:
        """Where lmms-eval gathers the counts of its processes."""
        return self._policy.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request, greedily, as `said` reads it.

        Raises:
            UsageError: A request asks for sampling or shows anything but files, or a file cannot be read.
        """
        answers: list[str] = [""] * len(requests)
        by_length: dict[int, list[int]] = {}
        for place, request in enumerate(requests):
            given = request.args[1]
            if given.get("do_sample") or given.get("temperature") or (given.get("num_beams") or 1) > 1:
                raise UsageError(
                    "lmms-eval: this model answers greedily; leave do_sample, temperature and num_beams out"
                )
            by_length.setdefault(int(given.get("max_new_tokens", 128)), []).append(place)
        for max_new_tokens, places in by_length.items():
            params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
            for start in range(0, len(places), self.batch_size):
                part = places[start : start + self.batch_size]
                for place, text in zip(part, self._answer([requests[place] for place in part], params)):
                    until = requests[place].args[1].get("until")
                    answers[place] = said(text, until, reasons=self._make_batch.encoder.reasons)
        return answers

    @torch.no_grad()
    def _answer(self, requests: Sequence[Instance], params: SamplingParams) -> list[str]:
        examples = [self._example(place, *request.args) for place, request in enumerate(requests)]
        prompts = self._make_batch(examples)
        if len(prompts) < len(examples):
            bad = self._make_batch.store.stats.summary()
            raise UsageError(f"lmms-eval: a file cannot be read ({bad})")
        return list(self._sampler.sample(prompts, 1, params).texts)

    def _example(
        self, place: int, context: str, given: Any, visuals_of: Any, doc_id: Any, task: str, split: str
    ) -> Example:
        shown = visuals_of(self.task_dict[task][split][doc_id]) or []
        for medium in shown:
            if not isinstance(medium, str):
                raise UsageError(
                    f"lmms-eval: expected paths of videos and pictures, got {type(medium).__name__}"
                )
        media = tuple(MediaRef(path, path.lower().endswith(PICTURES)) for path in shown)
        return Example(id=f"{place}", question=context, asked=context, media=media)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered: no video task asks for it."""
        raise NotImplementedError("rlaif_fast gives lmms-eval answers, no log-likelihoods")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered: a prompt has one turn."""
        raise NotImplementedError("rlaif_fast answers one turn; tasks of several rounds are not offered")


def _positive(name: str, value: int | str) -> int:
    """A number that lmms-eval may pass as text.

    Raises:
        UsageError: It is not a number, or below 1.
    """
    try:
        number = int(value)
    except ValueError:
        number = 0
    require(number >= 1, name, "1 or more", value)
    return number


def said(text: str, until: Any, *, reasons: bool) -> str:
    """What a response says after its reasoning, cut at the first stopping text of the request.

    lmms-eval's tasks stop at a blank line by default. Like its own models of these families, this ignores that stop: an
    answer may follow a blank line.

    Args:
        text: The response.
        until: The stopping text or texts; None for none.
        reasons: See `stated`.
    """
    answer = stated(text, reasons=reasons).strip()
    for stop in [until] if isinstance(until, str) else until or ():
        answer = answer.split(stop)[0] if stop and stop != BLANK_LINE else answer
    return answer


def manifest() -> ModelManifest:
    """The entry point that lmms-eval finds."""
    return ModelManifest("rlaif_fast", simple_class_path=f"{__name__}.{RlaifFast.__name__}")
