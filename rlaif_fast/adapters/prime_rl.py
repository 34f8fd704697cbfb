"""prime-rl: a custom loss of the documented signature (0.8).

`trainer.loss.type = "custom"`, `import_path = "rlaif_fast.adapters.prime_rl.loss"`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlaif_fast.loss.api import grpo_rank_loss


def loss(inputs: Any, **options: Any) -> Any:
    """Return prime-rl's `LossOutputs` of one response: see `summed`."""
    from prime_rl.trainer.rl.loss import LossOutputs

    total, metrics = summed(inputs, **options)
    return LossOutputs(loss=total, metrics=metrics)


def summed(inputs: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of the loss over the tokens of one response, and statistics.

    Args:
        inputs: `trainer_logprobs`, `inference_logprobs`, `ref_logprobs` or None, `advantages`, `loss_mask`, all (seq,);
            `loss_weights` must be None.
        options: Of `grpo_rank_loss`.

    Raises:
        ValueError: There are loss weights, or an option is not one of the loss.
    """
    if getattr(inputs, "loss_weights", None) is not None:
        raise ValueError("loss_weights must be None: this loss has no weight a token")
    reference = inputs.ref_logprobs
    out = grpo_rank_loss(
        inputs.trainer_logprobs[None],
        old_logps=inputs.inference_logprobs[None],
        ref_logps=None if reference is None else reference[None],
        advantages=inputs.advantages[None],
        mask=inputs.loss_mask[None],
        loss_type="luspo",  # the sum over the tokens of a response
        **options,
    )
    return out.loss, out.stats
