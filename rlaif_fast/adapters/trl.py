"""TRL: a `GRPOTrainer` with an oracle's advantages and the loss from hidden states. Tested with TRL 1.16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from rlaif_fast.adapters.ranking import advantages, mean_logps, rank_options
from rlaif_fast.adapters.trl_loss import REWARDS, add_rank_loss, forward_loss, refuse
from rlaif_fast.adapters.trl_media import VideoPrompts, mask_of
from rlaif_fast.adapters.trl_metrics import logged
from rlaif_fast.oracle.as_reward import (
    REFERENCE,
    as_reward,
    check_reference,
    gains,
    grouped,
    prompt_media,
    rank_groups,
    requests_of,
)
from rlaif_fast.oracle.base import Oracle
from rlaif_fast.policy.vocabulary import texts_of
from rlaif_fast.video import ClipStore


class OracleGRPOTrainer(VideoPrompts):
    """GRPO_rank in TRL: oracles take the place of reward functions.

    Whole groups are ranked on the main process, even if processes share a group, and advantages are computed before TRL
    shuffles and splits the rows. Every kind but "oracle" compares the oracle's order with the policy's, by the mean
    log-probability of a response: TRL's `old_per_token_logps` if it computes them, else one extra forward pass per
    generation.

    Args:
        model: As for `GRPOTrainer`, like everything in `options`, which must hold no `reward_funcs`.
        oracles: One, or several whose advantages are summed by `args.reward_weights`.
        kind: "directed", "oracle", "paper" or "paper_swapped"; see `rank_advantages`.
        penalty_weight: w of the directed advantage.
        scale: "none" or "group"; replaces `args.scale_rewards`, which must be the default or say the same.
        reference: The column of the data sets with the reference answer; a column other than the default must exist.
        media: Show the oracles the prompts' pictures and videos, decoded by this store if one is given.
        options: Options of `GRPOTrainer`.

    Raises:
        ValueError: No oracle, or an option of `args` that this trainer would drop or does not support; raised before
            anything is loaded.
        UsageError: A data set has no column `reference`.
    """

    mask_truncated_completions: bool

    def __init__(
        self,
        model: Any,
        oracles: Oracle | Sequence[Oracle],
        *,
        kind: str = "directed",
        penalty_weight: float = 1.0,
        scale: str = "none",
        reference: str = REFERENCE,
        media: bool | ClipStore = True,
        **options: Any,
    ) -> None:
        self.ranking = rank_options(kind, penalty_weight, scale)
        self.oracles = list(oracles) if isinstance(oracles, Sequence) else [oracles]
        if not self.oracles:
            raise ValueError("oracles must be an oracle or several; got none")
        if options.get("args") is not None:
            refuse(options["args"], scale)
        for rows in (options.get("train_dataset"), options.get("eval_dataset")):
            for part in rows.values() if isinstance(rows, dict) else [rows]:
                columns = getattr(part, "column_names", None)
                if columns is not None:  # streams may not know them
                    check_reference(reference, columns)
        self.reference, self.prompt_media = reference, prompt_media(media)
        self._ranks: list[Tensor] = []
        rewards = [as_reward(oracle) for oracle in self.oracles]
        for reward, name in zip(rewards, self._names()):
            reward.__name__ = f"oracle_{name}"
        super().__init__(model, reward_funcs=rewards, **options)
        if len(self.reward_funcs) > len(self.oracles):
            owners = ", ".join(self.reward_func_names[len(self.oracles) :])
            raise ValueError(
                f"environment_factory must give no get_reward, oracles rank; got that of {owners}"
            )
        if self.aux_loss_enabled:
            raise ValueError(f"OracleGRPOTrainer has no router_aux_loss_coef={self.router_aux_loss_coef}")
        add_rank_loss(self.accelerator.unwrap_model(self.model), self.args.cast_lm_head_to_fp32)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """Rank the groups of all processes; return the gains (B of all processes, number of oracles)."""
        rows = [{name: x for name, x in row.items() if name != "prompt"} for row in inputs]
        completions = self._with_reasoning(completions, completion_ids_list)
        prompts, completions, rows = map(gather_object, (prompts, completions, rows))
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows] for name in names}
        size = self.num_generations if self.model.training else self.num_generations_eval
        rankings: list[Any] = [None] * len(self.oracles)
        if self.accelerator.is_main_process:
            asked = grouped(prompts, size), prompts, completions, columns, self.reference, self.prompt_media
            requests = requests_of(*asked)
            rankings = [rank_groups(oracle, requests, columns, self.reference) for oracle in self.oracles]
        broadcast_object_list(rankings)
        first, device = self.accelerator.process_index * len(inputs), self.accelerator.device
        self._ranks, rewards = [], []
        for name, groups in zip(self._names(), rankings):
            ranks = [rank if group.valid else None for group in groups for rank in group.ranks]
            self._log_completion_extra(f"rank/{name}", ranks[first:][: len(inputs)])
            self._ranks.append(_tensor(ranks, device).view(-1, size))
            rewards.append(_tensor([gain for group in groups for gain in gains(group)], device))
        return torch.stack(rewards, dim=1)

    def _with_reasoning(self, completions: list, ids: list[list[int]]) -> list:
        """Return completions with the special tokens that mark reasoning, which TRL's decoding drops.

        If TRL parses completions, their reasoning is already separate from their content.
        """
        parsed = any(
            getattr(self._tokenizer, name, None) is not None
            for name in ("response_template", "response_schema")
        )
        if parsed and not isinstance(completions[0], str):
            return completions
        texts = texts_of(self._tokenizer, ids)
        return [
            text if isinstance(completion, str) else [{**completion[0], "content": text}]
            for completion, text in zip(completions, texts)
        ]

    def _generate_and_score_completions(self, inputs):
        """Replace TRL's advantages by ours, and log statistics of the ranks in place of a reward curve."""
        output = self._whole_completions(inputs)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in [name for name in metrics if name.split("/")[0] in REWARDS]:
            del metrics[name]
        local = self._scores(output)
        scores = torch.zeros_like(output["advantages"]) if local is None else local
        scores = self.accelerator.gather(scores).view_as(self._ranks[0])
        total = torch.zeros_like(scores)
        for oracle, weight, ranks in zip(self._names(), self.reward_weights.tolist(), self._ranks):
            ranked, judged = advantages(scores, ranks, self.ranking)
            total += weight * ranked.advantages
            metrics[f"rank/{oracle}/judged"].append(judged.float().mean().item())
            metrics[f"rank/{oracle}/no_signal"].append(1.0 - ranked.has_signal.float().mean().item())
            if local is not None and ranked.has_signal.any():
                for name in ("ndcg", "kendall_tau", "top1_agreement"):
                    value = getattr(ranked, name)[ranked.has_signal].mean().item()
                    metrics[f"rank/{oracle}/{name}"].append(value)
        total, count = total.flatten(), len(inputs)
        logged = self._logs["advantages"]  # the newest, in place of TRL's
        for _ in range(min(len(logged), len(total))):
            logged.pop()
        logged.extend(total.tolist())
        output["advantages"] = total[self.accelerator.process_index * count :][:count]
        if self.mask_truncated_completions:
            self._mask_truncated(output)
        return output

    def _whole_completions(self, inputs: list) -> dict[str, Any]:
        """Return TRL's output with truncated completions unmasked, so that they count in the policy's order."""
        masked, self.mask_truncated_completions = self.mask_truncated_completions, False
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self.mask_truncated_completions = masked

    def _mask_truncated(self, output: dict[str, Any]) -> None:
        """Leave completions without an end out of the loss, as TRL does."""
        ids, lengths = output["completion_ids"], output["completion_mask"].sum(1, keepdim=True)
        ends = torch.tensor([*self.eos_token_ids, self._tokenizer.pad_token_id], device=ids.device)
        ended = torch.isin(ids.gather(1, (lengths - 1).clamp(min=0)), ends)  # (B, 1)
        for name in {"completion_mask", "tool_mask"} & output.keys():
            output[name] = output[name] * ended
        output["num_items_in_batch"] = self.accelerator.gather(mask_of(output).sum()).sum()

    def _scores(self, output: dict[str, Any]) -> Tensor | None:
        """Mean log-probability of each response of this process (B,); None if the kind needs no order.

        NaN if the policy wrote no token itself: such a response is not judged.
        """
        logps, mask = output.get("old_per_token_logps"), mask_of(output)
        if logps is None and not self.ranking.orders_policy:
            return None
        logps = self.policy_logps(output) if logps is None else logps
        return mean_logps(logps, mask)

    def _compute_loss(self, model, inputs):
        """Return the loss from the hidden states, computed entirely inside the model's forward."""
        out = forward_loss(self, model, inputs)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in logged(out.stats, self.loss_type, self.accelerator.gather).items():
            metrics[name].append(value)
        if self.entropy_coef != 0.0:
            policy = out.stats["loss/policy"] + out.stats.get("loss/kl", 0.0)
            metrics["policy_loss"].append(self.accelerator.gather(policy).nanmean().item())
            if self.model.training and self.accelerator.sync_gradients:
                metrics["entropy_coef"].append(self.entropy_coef)
        return out.loss

    def _names(self) -> list[str]:
        """Return a distinct name for each oracle: two judges are both "api"."""
        names = [oracle.name for oracle in self.oracles]
        return [
            name if name not in names[:place] else f"{name} {names[:place].count(name) + 1}"
            for place, name in enumerate(names)
        ]


def _tensor(values: list[float | None], device: torch.device) -> Tensor:
    values = [float("nan") if value is None else float(value) for value in values]
    return torch.tensor(values, dtype=torch.float32, device=device)
