"""rlaif_fast: fused GRPO_rank losses and a shared-prefix trainer for reinforcement learning of Video-LLMs.

Names are imported when they are first used, so that `import rlaif_fast` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "GRPORankLoss": "rlaif_fast.loss.module",
    "LossOutput": "rlaif_fast.loss.output",
    "PreferenceOutput": "rlaif_fast.loss.preference",
    "RankAdvantages": "rlaif_fast.loss.inputs",
    "fused_linear_dpo_loss": "rlaif_fast.loss.preference",
    "fused_linear_grpo_rank_loss": "rlaif_fast.loss.api",
    "fused_linear_lipo_loss": "rlaif_fast.loss.preference",
    "grpo_rank_loss": "rlaif_fast.loss.api",
    "grpo_rank_loss_from_logits": "rlaif_fast.loss.api",
    "rank_advantages": "rlaif_fast.loss.api",
    "selective_log_softmax": "rlaif_fast.loss.api",
    "token_logps": "rlaif_fast.loss.api",
}

if TYPE_CHECKING:
    from rlaif_fast.loss.api import (
        fused_linear_grpo_rank_loss,
        grpo_rank_loss,
        grpo_rank_loss_from_logits,
        rank_advantages,
        selective_log_softmax,
        token_logps,
    )
    from rlaif_fast.loss.inputs import RankAdvantages
    from rlaif_fast.loss.module import GRPORankLoss
    from rlaif_fast.loss.output import LossOutput
    from rlaif_fast.loss.preference import PreferenceOutput, fused_linear_dpo_loss, fused_linear_lipo_loss

__all__ = [
    "GRPORankLoss",
    "LossOutput",
    "PreferenceOutput",
    "RankAdvantages",
    "__version__",
    "fused_linear_dpo_loss",
    "fused_linear_grpo_rank_loss",
    "fused_linear_lipo_loss",
    "grpo_rank_loss",
    "grpo_rank_loss_from_logits",
    "rank_advantages",
    "selective_log_softmax",
    "token_logps",
]


def __getattr__(name: str) -> Any:
    if name == "backends":
        value = importlib.import_module("rlaif_fast.loss.backends")
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
