"""A loss with the signature of `liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss` and ms-swift's `liger_grpo_loss`.

Tested with liger-kernel 0.8.5, which it neither needs nor imports.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlaif_fast.adapters.grpo_options import grpo_options
from rlaif_fast.loss.api import fused_linear_grpo_rank_loss, token_logps

LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo")
OF_TOKENS = ("dapo", "cispo")  # Liger divides these by the tokens of all processes


class FusedLinearGRPOLoss(nn.Module):
    """Liger's GRPO loss, computed by ours.

    Args:
        beta: As in `grpo_rank_loss`, like everything not listed here.
        compiled: Passed by Liger's callers; nothing here needs compiling, and no number depends on it.
        use_ref_model: Whether there is a reference policy; a KL needs one.
        chunk_size: Sequences whose logits are in memory at once.
        epsilon_low: `epsilon`.
        loss_type: "grpo", "bnpo", "dapo", "dr_grpo", "cispo" or "sapo".
        use_bias_correction_kl: `unbiased_kl`.

    Raises:
        ValueError: A loss type that differs here ("luspo": Liger's sums masked tokens too) or does not exist here
            ("vespo"); a beta without `use_ref_model`, for which Liger's KL is always 0; or options that do not go
            together: `delta` or sequence level with "cispo" or "sapo", which Liger's loss ignores or refuses, and
            `use_bias_correction_kl` at sequence level.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
    ) -> None:
        super().__init__()
        if loss_type not in LOSS_TYPES:
            raise ValueError(
                f"loss_type must be one of {', '.join(map(repr, LOSS_TYPES))}; got {loss_type!r}"
            )
        if beta != 0.0 and not use_ref_model:
            raise ValueError(f"use_ref_model must be True when beta is not 0; got False with {beta}")
        self.beta, self.loss_type = beta, loss_type
        self.temperature, self.chunk_size = temperature, chunk_size
        self.options = grpo_options(
            beta=beta,
            loss_type=loss_type,
            epsilon=epsilon_low,
            epsilon_high=epsilon_high,
            delta=delta,
            use_bias_correction_kl=use_bias_correction_kl,
            importance_sampling_level=importance_sampling_level,
            max_completion_length=max_completion_length,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
        )

    def forward(
        self,
        _input: Tensor,  # (B, T, H)
        lin_weight: Tensor,  # (V, H)
        selected_token_ids: Tensor,  # (B, T)
        attention_mask: Tensor,  # (B, T)
        advantages: Tensor,  # (B,)
        bias: Tensor | None = None,  # (V,)
        ref_per_token_logps: Tensor | None = None,  # (B, T)
        old_per_token_logps: Tensor | None = None,  # (B, T)
        ref_input: Tensor | None = None,  # (B, T, H)
        ref_weight: Tensor | None = None,  # (V, H)
        ref_bias: Tensor | None = None,  # (V,)
        vllm_is_ratio: Tensor | None = None,  # (B, T) or (B, 1)
        num_items_in_batch: int | float | Tensor | None = None,  # tokens of all processes
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss and Liger's metrics: the KL if beta is not 0, and the share of clipped tokens.

        Raises:
            ValueError: beta is not 0 and the reference policy is given not at all or twice; or a shape or value does
                not fit.
        """
        if ref_per_token_logps is not None and ref_input is not None:
            raise ValueError("ref_input must be None where ref_per_token_logps are given; got both")
        if self.beta != 0.0 and ref_per_token_logps is None:
            if ref_input is None or ref_weight is None:
                raise ValueError(
                    "ref_per_token_logps, or ref_input and ref_weight, must be given when beta is not 0; "
                    f"got neither with {self.beta}"
                )
            with torch.no_grad():
                found = token_logps(
                    ref_input, ref_weight, selected_token_ids, bias=ref_bias, temperature=self.temperature
                )
            assert isinstance(found, Tensor)  # a pair only with return_entropy
            ref_per_token_logps = found
        items = self._items(attention_mask, num_items_in_batch) if self.loss_type in OF_TOKENS else None
        out = fused_linear_grpo_rank_loss(
            _input,
            lin_weight,
            selected_token_ids,
            bias=bias,
            temperature=self.temperature,
            chunk_size=self.chunk_size * selected_token_ids.shape[1],
            advantages=advantages,
            mask=attention_mask,
            old_logps=old_per_token_logps,
            ref_logps=ref_per_token_logps if self.beta != 0.0 else None,
            sampling_ratio=vllm_is_ratio,
            num_items_in_batch=items,
            **self.options,
        )
        metrics = [out.stats["kl"]] if self.beta != 0.0 else []
        return out.loss, (*metrics, out.stats["clip_ratio/region_mean"])

    @staticmethod
    def _items(mask: Tensor, given: int | float | Tensor | None) -> Tensor:
        """Return one process's divisor: the tokens of all processes over their number, at least 1."""
        shared = dist.is_available() and dist.is_initialized()
        items = mask.sum(dtype=torch.float32) if given is None else torch.as_tensor(given, device=mask.device)
        if shared and given is None:
            dist.all_reduce(items)
        return (items.float() / (dist.get_world_size() if shared else 1)).clamp(min=1.0)
