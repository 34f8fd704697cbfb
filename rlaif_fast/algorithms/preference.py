"""The common part of algorithms that learn from preferences, without advantages."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlaif_fast import LossOutput, PreferenceOutput
from rlaif_fast.algorithms.base import Feedback, GroupAlgorithm
from rlaif_fast.algorithms.options import AlgorithmOptions
from rlaif_fast.errors import require_positive

UNREAD = ("old_logps", "sampling_ratio")  # a preference holds whoever drew the responses


class PreferenceAlgorithm(GroupAlgorithm):
    """Losses of implicit rewards: beta times the log-probability of a response, relative to the reference's."""

    feedback: Feedback = "ranks"
    default_beta: ClassVar[float] = 0.1

    def __init__(self, options: AlgorithmOptions) -> None:
        super().__init__(options)
        require_positive("beta", self.beta)

    @classmethod
    def ignores(cls, options: AlgorithmOptions) -> Collection[str]:
        """There is no advantage, no ratio to clip or cap and no mean over tokens; only beta ties the policy to the
        reference.

        Tokens that were not drawn cannot be left out of the reference's sums.
        """
        return (
            "advantage",
            "penalty_weight",
            "scale",
            "kl",
            "epsilon",
            "epsilon_high",
            "delta",
            "entropy_coef",
            "loss_type",
            "importance_sampling_level",
            "sampling_ratio_cap",
            "mask_truncated_completions",
            "max_reasoning_tokens",
        )

    def arguments(self, inputs: dict[str, Any], group_size: int) -> dict[str, Any]:
        """The arguments of a preference loss, from those of `Algorithm.loss`.

        Args:
            inputs: As the loop gives them; responses are counted.
            group_size: Number of responses in a pair or group.
        """
        given = {name: value for name, value in inputs.items() if name not in (*UNREAD, "ref_logps")}
        if given.get("num_items_in_batch") is not None:
            given["num_items_in_batch"] = given["num_items_in_batch"] / group_size
        options = self.options
        return given | {
            "ref_logps_sum": sum_by_response(inputs["ref_logps"], inputs["lengths"]),
            "beta": self.beta,
            "temperature": options.temperature,
            "backend": options.backend,
        }


def sum_by_response(values: Tensor, lengths: Tensor) -> Tensor:  # (M,), (B,) -> (B,)
    """Sum packed tokens by response, in a fixed order: `index_add_` has none on a GPU."""
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)  # a check would sync


def as_output(found: PreferenceOutput, pairs: int | Tensor) -> LossOutput:
    """The output that the loop reads, under TRL's names; `advantages` are the implicit rewards.

    Args:
        found: The output of a preference loss.
        pairs: Number of pairs that its statistics are means over.
    """
    stats = {
        "loss/policy": found.loss.detach(),
        "pairs": torch.as_tensor(pairs, device=found.loss.device).float(),
        "rewards/margins": found.stats["margin"],
        "rewards/accuracies": found.stats["accuracy"],
        "rewards/chosen": found.stats["reward_chosen"],
        "rewards/rejected": found.stats["reward_rejected"],
    }
    return LossOutput(found.loss, found.rewards, stats)
