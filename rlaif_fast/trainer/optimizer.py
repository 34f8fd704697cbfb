"""What follows a backward pass, in both stages: averaging over the processes, clipping, AdamW and its schedule."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlaif_fast.distributed.world import SharedOutage, World
from rlaif_fast.errors import UsageError
from rlaif_fast.policy.shard import whole
from rlaif_fast.policy.weights import set_float32_copy
from rlaif_fast.runs.sharded import read_shards

COUNTS = ("tokens", "pairs")  # statistics that are counts


class Updater:
    """AdamW with linear warm-up and a cosine, linear or constant schedule.

    A bfloat16 weight has 8 significant bits, so rounding swallows an update at a usual learning rate. Each such weight
    gets a float32 copy, which collects its gradient and is what the optimizer updates; the weight is the rounded copy.
    That takes 16 bytes per weight (copy, gradient, two moments) on top of its own 2. The fused losses pass the head's
    gradient to its copy as summed, in float32. Sharded weights are themselves float32, and their gradients arrive
    averaged.

    With `offload`, the float32 copy, gradient and moments of every trained weight are in main memory; only its 2 or 4
    bytes stay on the GPU. Each gradient moves there as soon as it is complete, and the update is computed there.

    Args:
        model: Its parameters that require a gradient are trained.
        world: The processes whose gradients are averaged.
        learning_rate: Peak learning rate.
        weight_decay: Of AdamW, on every parameter.
        betas: Of AdamW.
        max_grad_norm: Gradients of a larger norm are scaled down to it.
        schedule: "cosine", "linear" or "constant".
        warmup_steps: Updates until the peak.
        total_steps: Updates in all.
        min_lr_ratio: Final rate of the cosine, as a share of the peak.
        offload: Keep float32 weights, gradients and moments in main memory. Sharded weights stay where they are, with
            their gradients and moments beside them.

    Attributes:
        changes: Updates begun so far, including skipped ones.

    Raises:
        UsageError: A weight is float16, whose gradients underflow without loss scaling.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        *,
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        max_grad_norm: float,
        schedule: str,
        warmup_steps: int,
        total_steps: int,
        min_lr_ratio: float,
        offload: bool = False,
    ) -> None:
        from transformers import get_scheduler

        self.changes = 0
        self._world = world
        self._max_grad_norm = max_grad_norm
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        parameters, self._names = list(trained.values()), list(trained)
        if any(p.dtype == torch.float16 for p in parameters):
            raise UsageError("dtype: float16 weights cannot be trained; use bfloat16 or float32")
        self._sharded = any(isinstance(p, DTensor) for p in parameters)
        offload = offload and not self._sharded
        self._copies = [
            (p, _float32_copy(p, torch.device("cpu") if offload else p.device))
            for p in parameters
            if offload or p.dtype == torch.bfloat16
        ]
        self._hooks = [p.register_post_accumulate_grad_hook(_collect(copy)) for p, copy in self._copies]
        for parameter, copy in self._copies:
            if not offload:  # a loss computes on the GPU
                set_float32_copy(parameter, copy)
        copy_of = dict(self._copies)
        self._updated = [copy_of.get(p, p) for p in parameters]
        self._optimizer = torch.optim.AdamW(
            self._updated, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True
        )
        name, extra = schedule, None
        if schedule == "cosine":
            name, extra = "cosine_with_min_lr", {"min_lr_rate": min_lr_ratio}
        elif schedule == "constant":
            name = "constant_with_warmup"
        self._scheduler = get_scheduler(
            name,
            self._optimizer,
            num_warmup_steps=warmup_steps,
            num_training_steps=max(total_steps, 1),
            scheduler_specific_kwargs=extra,
        )

    def __enter__(self) -> Updater:
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter, _ in self._copies:
            set_float32_copy(parameter, None)

    @property
    def learning_rate(self) -> float:
        """The rate of the next update."""
        return self._scheduler.get_last_lr()[0]

    def step(self) -> Tensor:
        """Update the weights by the gradients of all processes and clear these; returns their norm before clipping.

        Raises:
            SharedOutage: The gradient is not finite, in all processes; the weights are unchanged.
        """
        if not self._sharded:
            self._world.average_gradients(self._updated)
        norm = whole(torch.nn.utils.clip_grad_norm_(self._updated, self._max_grad_norm))
        if not torch.isfinite(norm):
            raise SharedOutage(
                "the gradient is not finite; lower the learning rate, or set dtype float32, and start from the last "
                "checkpoint"
            )
        self.changes += 1
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._round()
        return norm

    def skip(self) -> None:
        """Advance the schedule when there was nothing to learn: it counts steps, with or without an update."""
        self.changes += 1
        with warnings.catch_warnings():
            # torch warns if a schedule advances before the first update.
            warnings.simplefilter("ignore", UserWarning)
            self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue, including the float32 copies of the weights."""
        scheduler = self._scheduler.state_dict()
        if self._sharded:
            return {"scheduler": scheduler, "shards": self._tensors()}
        return {
            "optimizer": self._optimizer.state_dict(),
            "scheduler": scheduler,
            "float32_weights": [copy.detach() for _, copy in self._copies],
        }

    def load_state_dict(self, state: dict[str, Any], folder: Path | None = None) -> None:
        """Continue from a checkpoint at the same update, with this updater's schedule and rate.

        Args:
            state: The result of `state_dict`, as read from the checkpoint.
            folder: The checkpoint, which holds the rest of the state of sharded weights.
        """
        rates = [group["initial_lr"] for group in self._optimizer.param_groups]
        in_shards = "optimizer" not in state
        if in_shards or self._sharded:
            assert folder is not None
            read_shards(folder, self._tensors())
        else:
            self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        share = [at(self._scheduler.last_epoch) for at in self._scheduler.lr_lambdas]
        for group, rate, part in zip(self._optimizer.param_groups, rates, share):
            group["initial_lr"] = rate
            group["lr"] = rate * part  # by this schedule, which may be longer than the previous one
        self._scheduler.base_lrs = rates
        self._scheduler._last_lr = [group["lr"] for group in self._optimizer.param_groups]
        if in_shards:
            self._round()
            return
        # Copies of bfloat16 weights, or the weights themselves if the run continues in float32.
        weights = [copy for _, copy in self._copies] or self._updated
        saved = state["float32_weights"]
        if len(saved) == len(weights):
            with torch.no_grad():
                for weight, value in zip(weights, saved):
                    weight.copy_(value)
        self._round()

    def _tensors(self) -> dict[str, Tensor]:
        """What the optimizer updates, and its moments, by name; missing moments are created as zeros."""
        tensors = {}
        for name, parameter in zip(self._names, self._updated):
            moments = self._optimizer.state[parameter]
            if not moments:
                moments["step"] = torch.zeros((), device=parameter.device)
                moments |= {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
            tensors[f"weight.{name}"] = parameter.detach()
            tensors |= {f"{kind}.{name}": value for kind, value in moments.items()}
        return tensors

    @torch.no_grad()
    def _round(self) -> None:
        for parameter, copy in self._copies:
            parameter.copy_(copy)


def _float32_copy(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to(device, torch.float32, copy=True))


def _collect(copy: nn.Parameter):
    """A hook that adds a parameter's gradient to its copy's, in float32, and frees it."""

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.to(copy.device, torch.float32)
        copy.grad = gradient if copy.grad is None else copy.grad.add_(gradient)
        parameter.grad = None

    return hook


def combine_stats(shards: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """The loss's statistics of a whole update, from those of its parts, each with its number of tokens.

    Losses and counts are summed, and `ratio_max` is a maximum. Rewards are means over the pairs, the others over the
    tokens that the loss counts, which are fewer than all if some are masked.
    """
    combined = {}
    for name in shards[0][1] if shards else ():
        values = [stats[name] for _, stats in shards]
        if name in COUNTS or name.startswith("loss"):
            combined[name] = sum(values)
        elif name == "ratio_max":
            combined[name] = max(values)
        else:
            counted = "pairs" if name.startswith("rewards/") else "tokens"
            weights = [stats.get(counted, tokens) for tokens, stats in shards]
            combined[name] = sum(map(operator.mul, weights, values)) / (sum(weights) or 1)
    return combined


def mean_of_updates(updates: Sequence[dict]) -> dict:
    """What is logged of the updates of one step: the mean of each statistic, the sum of `COUNTS`, and the largest
    `ratio_max`. The statistics of a single update stay on their device.
    """
    if len(updates) == 1:
        return updates[0]
    merged = {}
    for name in updates[0] if updates else ():
        values = [float(stats[name]) for stats in updates]
        merged[name] = max(values) if name == "ratio_max" else sum(values)
        if name not in (*COUNTS, "ratio_max"):
            merged[name] /= len(values)
    return merged
