"""One step on the meta device: the rollout and the update that the trainer makes, and what they hold.

The passes are the trainer's own (`packing`, `forward_rows`, the sampler's prefill, the model of transformers); what
reads numbers, the loss's kernels and the draw of a token, has a stand-in that allocates what they allocate.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlaif_fast.loss.chunks import gpu_chunk_rows
from rlaif_fast.loss.inputs import Head
from rlaif_fast.plan.ledger import FusedVarlen, IndicesToMeta, Ledger, fused_attention
from rlaif_fast.plan.workload import WORD
from rlaif_fast.policy.attention import AttentionBackend
from rlaif_fast.policy.cut import cut
from rlaif_fast.policy.families import unwrap
from rlaif_fast.policy.features import MAX_PATCHES_A_CALL, MediaFeatures
from rlaif_fast.policy.flash import FlashContext
from rlaif_fast.policy.forward_rows import for_policy, response_hidden, response_rows
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.prompts.batches import cut_by_tokens
from rlaif_fast.rollout import SamplingParams, SharedPrefixSampler
from rlaif_fast.rollout.generate import TokenSampler
from rlaif_fast.trainer.drawing import on_policy
from rlaif_fast.trainer.options import TrainConfig


@dataclass(frozen=True)
class Step:
    """What one process computes and holds in a step.

    Attributes:
        rollout: Bytes by part when the rollout holds most, without what is held all the time.
        update: Likewise of the update.
        flops: By part: "vision tower", "prefill", "update", and of the last the "forward" pass.
        passes: Forward and backward passes of an update.
        at_once: Prompts whose keys and values a rollout holds together.
    """

    rollout: Counter[str]
    update: Counter[str]
    flops: dict[str, float]
    passes: int
    at_once: int

    def drawn_on(self, deeper: Step, times: float) -> Step:
        """The step that lies `times` as far behind this one as a deeper model's does."""

        def drawn(mine: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
            names = dict.fromkeys((*mine, *theirs))
            return {n: mine.get(n, 0) + times * (theirs.get(n, 0) - mine.get(n, 0)) for n in names}

        return Step(
            Counter({name: int(size) for name, size in drawn(self.rollout, deeper.rollout).items()}),
            Counter({name: int(size) for name, size in drawn(self.update, deeper.update).items()}),
            drawn(self.flops, deeper.flops),
            self.passes,
            self.at_once,
        )


def run_on_meta(
    policy: Policy,
    config: TrainConfig,
    prompts: Sequence[EncodedPrompt],
    *,
    together: int = 1,
    on_gpu: bool = False,
) -> Step:
    """Run a step of one process.

    Args:
        policy: On the meta device (`policy_on_meta`); it is used up.
        config: Of the run.
        prompts: What the process rolls out in a step.
        together: Processes that hold the weights together; 1 without sharding.
        on_gpu: Attend as on a GPU, by varlen kernels.
    """
    ledger = Ledger([*policy.model.parameters(), *policy.model.buffers(), policy.forbidden_bias])
    if on_gpu:
        kernel = FusedVarlen(ledger)
        policy.backend = AttentionBackend(
            "flash", 0, lambda *_: None, "duplicates", lambda row, device: FlashContext(row, device, kernel)
        )
    # The method asks a mask how many entries it has; the copy it makes is what it costs.
    policy.decoder._deepstack_process = lambda hidden, mask, features: hidden.clone()
    simulation = _Simulation(policy, config, prompts, together, ledger)
    with fused_attention(ledger), IndicesToMeta(), ledger:
        return simulation.run()


class _Simulation:
    def __init__(
        self,
        policy: Policy,
        config: TrainConfig,
        prompts: Sequence[EncodedPrompt],
        together: int,
        ledger: Ledger,
    ) -> None:
        self.policy, self.config, self.prompts = policy, config, prompts
        self.together, self.ledger = together, ledger
        self.flops: dict[str, float] = {}
        self.held: dict[Tensor, Tensor] = {}  # gradients in float32, where they are not the weights' own

    def run(self) -> Step:
        kept = self.policy.vision.trains and on_policy(self.config) and self.together == 1
        features = self.encode(with_graph=kept)
        at_once = self.roll_out(None if features is None else features.detach())
        rollout = self.ledger.take_peak()
        if self.policy.vision.trains and not kept:
            del features
            features = self.encode(with_graph=True)
        passes = self.update(features)
        return Step(rollout, self.ledger.take_peak(), self.flops, passes, at_once)

    def count(self, part: str, before: float, times: float = 1.0) -> None:
        self.flops[part] = self.flops.get(part, 0.0) + (self.ledger.flops - before) * times

    def encode(self, *, with_graph: bool) -> MediaFeatures | None:
        """What `VisionEncoder` does, without what it remembers."""
        media = list({m.key: m for prompt in self.prompts for m in prompt.media}.values())
        if not media:
            return None
        tower, before = self.policy.vision.tower, self.ledger.flops
        parameter = next(tower.parameters())
        merge = unwrap(self.policy.model).config.vision_config.spatial_merge_size ** 2
        sizes = [math.prod(m.grid_thw) for m in media]
        pieces: list[tuple[Tensor, ...]] = []
        with self.ledger.part("vision tower"), torch.set_grad_enabled(with_graph):
            parts = [slice(0, len(media))] if with_graph else cut(sizes, MAX_PATCHES_A_CALL)
            for part in parts:
                width = media[0].patches.shape[1]
                patches = parameter.new_empty(sum(sizes[part]), width)
                output = tower(
                    patches, grid_thw=torch.tensor([m.grid_thw for m in media[part]]), return_dict=True
                )
                levels = (output.pooler_output, *(getattr(output, "deepstack_features", None) or ()))
                lengths = [size // merge for size in sizes[part]]
                pieces += zip(*(level.split(lengths) for level in levels))
                del output, levels, patches
            whole = tuple(torch.cat(level) for level in zip(*pieces))
        self.count("vision tower", before)
        ends = np.cumsum([0, *(size // merge for size in sizes)]).tolist()
        return MediaFeatures(whole, {m.key: (ends[i], ends[i + 1] - ends[i]) for i, m in enumerate(media)})

    @torch.no_grad()
    def roll_out(self, features: MediaFeatures | None) -> int:
        """The prefill of as many prompts as take their turn together, and one draw of all their responses."""
        policy, config, ledger = self.policy, self.config, self.ledger
        sampler = SharedPrefixSampler(policy)
        lengths = np.asarray([len(prompt.input_ids) for prompt in self.prompts])
        room = config.num_generations * (config.max_completion_length - 1)
        most = max(1, policy.max_cached_tokens // (int(lengths.max()) + room))
        turns = -(-len(lengths) // most)
        at_once = -(-len(lengths) // turns)
        responses = at_once * config.num_generations
        params = SamplingParams(1, config.temperature, config.top_p, config.top_k)
        before = ledger.flops
        with policy.evaluating():
            with ledger.part("keys and values"):
                cache = sampler._make_cache(
                    lengths[:at_once], config.num_generations, int(lengths[:at_once].max()) + room
                )
            hidden = sampler._prefill(self.prompts[:at_once], cache, features)
            self.count("prefill", before, len(lengths) / at_once)
            with ledger.part("logits"):
                uniform = hidden.new_empty(responses, dtype=torch.float64)
                rows = hidden.new_empty(responses, hidden.shape[1])
                TokenSampler(policy, params)(policy.logits(rows), None, uniform, 0)
        return at_once

    def update(self, features: MediaFeatures | None) -> int:
        """The largest pass of an update, behind the others where there are several."""
        policy, config, ledger = self.policy, self.config, self.ledger
        tokens = config.num_generations * config.max_completion_length
        counts = [tokens] * len(self.prompts)
        parts = cut_by_tokens(self.prompts, counts, config.max_packed_tokens)
        sizes = [part.stop - part.start for part in parts]
        largest = parts[sizes.index(max(sizes))]
        if len(parts) > 1:
            with ledger.part("gradients"):
                for parameter in policy.model.parameters():
                    if parameter.requires_grad and not _of_tower(policy, parameter):
                        self.hold_gradient(parameter)
        hooks = [
            p.register_post_accumulate_grad_hook(self.collect)
            for p in policy.model.parameters()
            if p.requires_grad
        ]
        leaves = features.leaves() if features is not None and features.requires_grad else None
        before = ledger.flops
        prompts = self.prompts[largest]
        rows = for_policy(response_rows(prompts, self.responses(len(prompts))), policy)
        hidden = response_hidden(policy, rows, features=leaves or features)
        with ledger.part("logits"):
            loss = _FusedLoss.apply(hidden, policy.head_weight)
        del hidden
        self.count("forward", before, len(self.prompts) / len(prompts))
        loss.backward()
        del loss
        self.count("update", before, len(self.prompts) / len(prompts))
        if leaves is not None:
            assert features is not None
            before = ledger.flops
            features.backward_from(leaves)
            self.count("vision tower", before)
        for hook in hooks:
            hook.remove()
        return len(parts)

    def responses(self, prompts: int) -> list[list[list[int]]]:
        """Responses that are as long as they may be and differ from their first token on."""
        length = self.config.max_completion_length
        group = [[WORD + place] * length for place in range(self.config.num_generations)]
        return [group] * prompts

    def hold_gradient(self, parameter: Tensor) -> None:
        if self.together == 1 and parameter.dtype == torch.float32:
            parameter.grad = torch.empty_like(parameter)
        else:
            share = -(-parameter.numel() // self.together)
            self.held[parameter] = torch.empty(share, dtype=torch.float32, device="meta")

    def collect(self, parameter: Tensor) -> None:
        """What becomes of a gradient that a backward pass has made (`Updater`, FSDP's reduction)."""
        assert parameter.grad is not None
        if self.together == 1 and parameter.dtype == torch.float32:
            self.ledger.move(parameter.grad, "gradients")
            return
        if parameter not in self.held:
            with self.ledger.part("gradients"):
                self.hold_gradient(parameter)
        parameter.grad = None


class _FusedLoss(torch.autograd.Function):
    """The buffers of `loss.linear`: logits of a chunk of rows, and the gradients, made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        wanted = len(hidden) if ctx.needs_input_grad[1] else 0
        rows = min(gpu_chunk_rows(Head(weight, None), None, wanted), len(hidden))
        logits = hidden.new_empty(rows, len(weight))
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = None
        for _ in range(0, len(hidden), rows):
            torch.mm(hidden[:rows], weight.t(), out=logits)
            torch.mm(logits, weight, out=grad_hidden[:rows])
        if ctx.needs_input_grad[1]:
            whole = rows == len(hidden)
            grad_weight = torch.empty_like(weight, dtype=weight.dtype if whole else torch.float32)
            for _ in range(0, len(hidden), rows):
                grad_weight.addmm_(logits.t().to(grad_weight.dtype), hidden[:rows].to(grad_weight.dtype))
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return ctx.saved_tensors


def _of_tower(policy: Policy, parameter: Tensor) -> bool:
    return any(parameter is own for own in policy.vision.tower.parameters())
