"""One step on the meta device: the trainer's rollout and update, and the memory they hold.

The passes are the trainer's own (`packing`, `forward_rows`, the sampler's prefill, the model of transformers). Code
that reads numbers (the loss's kernels, the draw of a token) is replaced by stand-ins that allocate as much.
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

from rlaif_fast.algorithms.group import minibatches
from rlaif_fast.algorithms.registry import make_algorithm
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
from rlaif_fast.rollout.generate import SCORED_LOGITS, TokenSampler
from rlaif_fast.rollout.graphs import LENGTH_STEP
from rlaif_fast.rollout.shared_prefix import GroupCache
from rlaif_fast.trainer.drawing import keeps_tower_graph
from rlaif_fast.trainer.options import TrainConfig


@dataclass(frozen=True)
class Step:
    """What one process computes and holds in a step.

    Attributes:
        rollout: Bytes by part at the peak of the rollout, without what is held all the time.
        update: The same for the update.
        flops: By part: "vision tower", "prefill" or "scoring", "update", and the "forward" pass of the update.
        passes: Forward and backward passes of an optimizer step.
        at_once: Prompts whose keys and values a rollout holds together.
        cache: Bytes of these keys and values; 0 if servers hold them.
    """

    rollout: Counter[str]
    update: Counter[str]
    flops: dict[str, float]
    passes: int
    at_once: int
    cache: int

    def drawn_on(self, deeper: Step, times: float) -> Step:
        """Extrapolate: go `times` as far beyond this step as the step of the deeper model is."""

        def drawn(mine: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
            names = dict.fromkeys((*mine, *theirs))
            return {n: mine.get(n, 0) + times * (theirs.get(n, 0) - mine.get(n, 0)) for n in names}

        return Step(
            Counter({name: int(size) for name, size in drawn(self.rollout, deeper.rollout).items()}),
            Counter({name: int(size) for name, size in drawn(self.update, deeper.update).items()}),
            drawn(self.flops, deeper.flops),
            self.passes,
            self.at_once,
            int(self.cache + times * (deeper.cache - self.cache)),
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
        policy: On the meta device (`policy_on_meta`); it cannot be used again.
        config: The run's configuration.
        prompts: The prompts that the process rolls out in a step.
        together: Processes that hold the weights together; 1 without sharding.
        on_gpu: Attend as on a GPU, by varlen kernels, and always hold the buffers of captured decode steps.
    """
    ledger = Ledger([*policy.model.parameters(), *policy.model.buffers(), policy.forbidden_bias])
    if on_gpu:
        kernel = FusedVarlen(ledger)
        policy.backend = AttentionBackend(
            "flash", 0, lambda *_: None, "duplicates", lambda row, device: FlashContext(row, device, kernel)
        )
    # The method reads the number of true entries of a mask; what it costs is the copy.
    policy.decoder._deepstack_process = lambda hidden, mask, features: hidden.clone()
    captured = on_gpu and together == 1 and config.sampler in ("auto", "cuda_graphs")
    simulation = _Simulation(policy, config, prompts, together, ledger, captured)
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
        captured: bool,
    ) -> None:
        self.policy, self.config, self.prompts = policy, config, prompts
        self.learned = max(minibatches(prompts, config.steps_per_generation), key=len)
        # Optimizer steps as large as that one.
        self.updates = config.num_iterations * len(prompts) / len(self.learned)
        self.together, self.ledger, self.captured = together, ledger, captured
        self.flops: dict[str, float] = {}
        self.held: dict[Tensor, Tensor] = {}  # gradients in float32, unless they are the weights' own

    def run(self) -> Step:
        algorithm = make_algorithm(self.config)
        graph = keeps_tower_graph(self.config, algorithm, sharded=self.together > 1)
        kept = self.policy.vision.trains and graph
        at_once = self.turns()
        # Of each size once, from the step before.
        caches = [self.make_cache(size) for size in dict.fromkeys(at_once)] if self.captured else []
        features = self.encode(self.prompts, with_graph=kept)
        cache = self.roll_out(None if features is None else features.detach(), at_once[0], caches)
        rollout = self.ledger.take_peak()
        if self.policy.vision.trains and not kept:
            del features
            features = self.encode(self.learned, with_graph=True, times=self.updates)
        passes = self.update(features)
        del caches  # held until here
        return Step(rollout, self.ledger.take_peak(), self.flops, passes, at_once[0], cache)

    def count(self, part: str, before: float, times: float = 1.0) -> None:
        self.flops[part] = self.flops.get(part, 0.0) + (self.ledger.flops - before) * times

    def encode(
        self, prompts: Sequence[EncodedPrompt], *, with_graph: bool, times: float = 1.0
    ) -> MediaFeatures | None:
        """Does what `VisionEncoder` does, without a cache."""
        media = list({m.key: m for prompt in prompts for m in prompt.media}.values())
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
        self.count("vision tower", before, times)
        ends = np.cumsum([0, *(size // merge for size in sizes)]).tolist()
        return MediaFeatures(whole, {m.key: (ends[i], ends[i + 1] - ends[i]) for i, m in enumerate(media)})

    def turns(self) -> list[int]:
        """Numbers of prompts that a rollout processes together, turn by turn, the largest first."""
        most = max(1, self.policy.max_cached_tokens // self.columns)
        count = len(self.prompts)
        return [len(part) for part in np.array_split(np.arange(count), -(-count // most))]

    @property
    def columns(self) -> int:
        """Tokens whose keys and values a group has."""
        room = self.config.num_generations * (self.config.max_completion_length - 1)
        return max(len(prompt.input_ids) for prompt in self.prompts) + room

    def make_cache(self, prompts: int) -> GroupCache:
        """Keys and values of this many prompts and their responses."""
        lengths = np.asarray([len(prompt.input_ids) for prompt in self.prompts[:prompts]])
        columns = -(-self.columns // LENGTH_STEP) * LENGTH_STEP if self.captured else self.columns
        with self.ledger.part("keys and values"):
            return GroupCache(self.policy, lengths, columns)

    @torch.no_grad()
    def roll_out(self, features: MediaFeatures | None, at_once: int, caches: Sequence[GroupCache]) -> int:
        """Prefill the prompts of one turn, and draw one token for all their responses.

        Returns:
            Bytes of their keys and values.
        """
        policy, config, ledger = self.policy, self.config, self.ledger
        params = SamplingParams(1, config.temperature, config.top_p, config.top_k)
        draw, before = TokenSampler(policy, params), ledger.flops
        with policy.evaluating():
            if config.sampler == "vllm":
                self.score(features, draw)
                return 0
            cache = caches[0] if caches else self.make_cache(at_once)
            hidden = SharedPrefixSampler(policy)._prefill(self.prompts[:at_once], cache, features)
            self.count("prefill", before, len(self.prompts) / at_once)
            with ledger.part("logits"):
                responses = at_once * config.num_generations
                uniform = hidden.new_empty(responses, dtype=torch.float64)
                rows = hidden.new_empty(responses, hidden.shape[1])
                draw(policy.logits(rows), None, uniform, 0)
        layers = (*cache.keys.values(), *cache.values.values())
        return sum(layer.nbytes for layer in layers)

    def score(self, features: MediaFeatures | None, draw: TokenSampler) -> None:
        """Compute the policy's probabilities of what servers drew (`rollout.generate.score`)."""
        policy, before = self.policy, self.ledger.flops
        rows = for_policy(response_rows(self.prompts, self.responses(len(self.prompts))), policy)
        hidden = response_hidden(policy, rows, features=features)
        with self.ledger.part("logits"):
            at_once = max(1, SCORED_LOGITS // policy.head_weight.shape[0])
            draw.distributions(policy.logits(hidden[:at_once]), early=False)
        self.count("scoring", before)

    def update(self, features: MediaFeatures | None) -> int:
        """The largest pass of an optimizer step, run after the others if there are several."""
        policy, config, ledger = self.policy, self.config, self.ledger
        tokens = config.num_generations * config.max_completion_length
        counts = [tokens] * len(self.learned)
        parts = cut_by_tokens(self.learned, counts, config.max_packed_tokens)
        sizes = [part.stop - part.start for part in parts]
        largest = parts[sizes.index(max(sizes))]
        trained = [p for p in policy.model.parameters() if p.requires_grad]
        if len(parts) > 1:
            of_tower = set(policy.vision.tower.parameters())
            with ledger.part("gradients"):
                for parameter in trained:
                    if parameter not in of_tower:
                        self.hold_gradient(parameter)
        hooks = [p.register_post_accumulate_grad_hook(self.collect) for p in trained]
        leaves = features.leaves() if features is not None and features.requires_grad else None
        before = ledger.flops
        prompts = self.learned[largest]
        times = self.updates * len(self.learned) / len(prompts)
        rows = for_policy(response_rows(prompts, self.responses(len(prompts))), policy)
        hidden = response_hidden(policy, rows, features=leaves or features)
        with ledger.part("logits"):
            loss = _FusedLoss.apply(hidden, policy.head_weight)
        del hidden
        self.count("forward", before, times)
        loss.backward()
        del loss
        self.count("update", before, times)
        if leaves is not None:
            assert features is not None
            before = ledger.flops
            features.backward_from(leaves)
            self.count("vision tower", before, self.updates)
        for hook in hooks:
            hook.remove()
        return len(parts)

    def responses(self, prompts: int) -> list[list[list[int]]]:
        """Responses of the maximal length that differ from their first token on."""
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
        """What happens to a gradient from a backward pass (`Updater`, FSDP's reduction)."""
        assert parameter.grad is not None
        if self.together == 1 and parameter.dtype == torch.float32:
            self.ledger.move(parameter.grad, "gradients")
            return
        if parameter not in self.held:
            with self.ledger.part("gradients"):
                self.hold_gradient(parameter)
        parameter.grad = None


class _FusedLoss(torch.autograd.Function):
    """The buffers of `loss.linear`: logits of a chunk of rows, and the gradients, computed in the forward pass."""

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
