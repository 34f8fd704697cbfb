"""TRL: a `GRPOTrainer` that an oracle teaches, with the loss from hidden states. Tested with TRL 1.16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from rlaif_fast.adapters.ranking import mean_logps
from rlaif_fast.adapters.trl_loss import add_rank_loss, forward_loss
from rlaif_fast.adapters.trl_media import VideoPrompts, mask_of
from rlaif_fast.adapters.trl_metrics import logged
from rlaif_fast.loss.api import rank_advantages
from rlaif_fast.oracle.as_reward import as_reward, gains, grouped, prompt_media, requests_of
from rlaif_fast.oracle.base import Oracle
from rlaif_fast.video import ClipStore

KINDS = ("directed", "oracle", "paper", "paper_swapped")


class OracleGRPOTrainer(VideoPrompts):
    """GRPO_rank in TRL: oracles stand where reward functions stand.

    Whole groups are ranked on the main process, also where processes share a group, and advantages are made
    before TRL shuffles and splits the rows. Every kind but "oracle" compares the oracle's order with the policy's,
    by the mean log-probability of a response: TRL's `old_per_token_logps` where it makes them, else one extra
    forward pass a generation.

    Args:
        model: As for `GRPOTrainer`, like everything in `options`, which must hold no `reward_funcs`.
        oracles: One, or several whose advantages are summed by `args.reward_weights`.
        kind: "directed", "oracle", "paper" or "paper_swapped"; see `rank_advantages`.
        penalty_weight: w of the directed advantage.
        scale: "none" or "group"; stands in place of `args.scale_rewards`.
        reference: The column of the data set that holds the reference answer, where there is one.
        media: Show the oracles the pictures and videos of the prompts, decoded by a store of one's own where given.
        options: Of `GRPOTrainer`.

    Raises:
        ValueError: An option of `args` that this loss does not have.
    """

    def __init__(
        self,
        model: Any,
        oracles: Oracle | Sequence[Oracle],
        *,
        kind: str = "directed",
        penalty_weight: float = 1.0,
        scale: str = "none",
        reference: str = "reference",
        media: bool | ClipStore = True,
        **options: Any,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}; got {kind!r}")
        self.oracles = list(oracles) if isinstance(oracles, Sequence) else [oracles]
        self.ranking: dict[str, Any] = {"kind": kind, "penalty_weight": penalty_weight, "scale": scale}
        self.reference, self.prompt_media = reference, prompt_media(media)
        self._ranks: list[Tensor] = []
        super().__init__(model, reward_funcs=[as_reward(oracle) for oracle in self.oracles], **options)
        self._refuse()
        add_rank_loss(self.accelerator.unwrap_model(self.model), self.args.cast_lm_head_to_fp32)

    def _refuse(self) -> None:
        refused = {
            "loss_type": self.loss_type == "vespo",
            "top_entropy_quantile": self.top_entropy_quantile < 1.0,
            "off_policy_mask_threshold": self.off_policy_mask_threshold is not None,
            "router_aux_loss_coef": self.aux_loss_enabled,
            "use_adaptive_entropy": self.use_adaptive_entropy,
        }
        if any(refused.values()):
            names = ", ".join(f"{name}={getattr(self.args, name)}" for name, held in refused.items() if held)
            raise ValueError(f"OracleGRPOTrainer has no {names}")

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """Rank the groups of all processes; return the gains (B of all processes, number of oracles)."""
        rows = [{name: x for name, x in row.items() if name != "prompt"} for row in inputs]
        prompts, completions, rows = map(gather_object, (prompts, completions, rows))
        columns = {name: [row.get(name) for row in rows] for name in rows[0]}
        size = self.num_generations if self.model.training else self.num_generations_eval
        rankings: list[Any] = [None] * len(self.oracles)
        if self.accelerator.is_main_process:
            asked = grouped(prompts, size), prompts, completions, columns, self.reference, self.prompt_media
            requests = requests_of(*asked)
            rankings = [oracle.rank(requests) for oracle in self.oracles]
        broadcast_object_list(rankings)
        first, device = self.accelerator.process_index * len(inputs), self.accelerator.device
        self._ranks, rewards = [], []
        for oracle, groups in zip(self.oracles, rankings):
            ranks = [rank if group.valid else None for group in groups for rank in group.ranks]
            self._log_completion_extra(f"rank/{oracle.name}", ranks[first:][: len(inputs)])
            self._ranks.append(_tensor(ranks, device).view(-1, size))
            rewards.append(_tensor([gain for group in groups for gain in gains(group)], device))
        return torch.stack(rewards, dim=1)

    def _generate_and_score_completions(self, inputs):
        """Put our advantages in place of TRL's and what is known of the ranks in place of a reward curve."""
        output = super()._generate_and_score_completions(inputs)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in [name for name in metrics if name.split("/")[0] in ("reward", "reward_std", "rewards")]:
            del metrics[name]
        local = self._scores(output)
        scores = torch.zeros_like(output["advantages"]) if local is None else local
        scores = self.accelerator.gather(scores).view_as(self._ranks[0])
        advantages = torch.zeros_like(scores)
        for oracle, weight, ranks in zip(self.oracles, self.reward_weights.tolist(), self._ranks):
            judged = ~ranks.isnan()
            ranked = rank_advantages(scores, ranks.nan_to_num(), judged=judged, **self.ranking)
            advantages += weight * ranked.advantages
            metrics[f"rank/{oracle.name}/judged"].append(judged.float().mean().item())
            metrics[f"rank/{oracle.name}/no_signal"].append(1.0 - ranked.has_signal.float().mean().item())
            if local is not None and ranked.has_signal.any():
                for name in ("ndcg", "kendall_tau", "top1_agreement"):
                    value = getattr(ranked, name)[ranked.has_signal].mean().item()
                    metrics[f"rank/{oracle.name}/{name}"].append(value)
        advantages, count = advantages.flatten(), len(inputs)
        logged = self._logs["advantages"]  # in place of TRL's, the newest
        for _ in range(min(len(logged), len(advantages))):
            logged.pop()
        logged.extend(advantages.tolist())
        output["advantages"] = advantages[self.accelerator.process_index * count :][:count]
        return output

    def _scores(self, output: dict[str, Any]) -> Tensor | None:
        """Mean log-probability of each response of this process (B,); None where the kind needs no order."""
        logps, mask = output.get("old_per_token_logps"), mask_of(output)
        if logps is None and self.ranking["kind"] == "oracle":
            return None
        logps = self.policy_logps(output) if logps is None else logps
        return mean_logps(logps, mask)

    def _compute_loss(self, model, inputs):
        """Return the loss from the hidden states, all inside the model's forward."""
        out = forward_loss(self, model, inputs)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in logged(out.stats, self.loss_type, self.accelerator.gather).items():
            metrics[name].append(value)
        return out.loss


def _tensor(values: list[float | None], device: torch.device) -> Tensor:
    values = [float("nan") if value is None else float(value) for value in values]
    return torch.tensor(values, dtype=torch.float32, device=device)
