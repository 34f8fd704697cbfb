"""rlaif_fast: fused GRPO_rank losses and a shared-prefix trainer for reinforcement learning of Video-LLMs.

Names are imported when they are first used, so that `import rlaif_fast` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "GRPORankLoss": "rlaif_fast.loss.api",
    "LossOutput": "rlaif_fast.loss.api",
    "RankAdvantages": "rlaif_fast.loss.advantages",
    "fused_linear_grpo_rank_loss": "rlaif_fast.loss.api",
    "grpo_rank_loss": "rlaif_fast.loss.api",
    "grpo_rank_loss_from_logits": "rlaif_fast.loss.api",
    "rank_advantages": "rlaif_fast.loss.advantages",
    "selective_log_softmax": "rlaif_fast.loss.api",
    "token_logps": "rlaif_fast.loss.api",
}

if TYPE_CHECKING:
    from rlaif_fast.loss.advantages import RankAdvantages, rank_advantages
    from rlaif_fast.loss.api import (
        GRPORankLoss,
        LossOutput,
        fused_linear_grpo_rank_loss,
        grpo_rank_loss,
        grpo_rank_loss_from_logits,
        selective_log_softmax,
        token_logps,
    )

__all__ = [
    "GRPORankLoss",
    "LossOutput",
    "RankAdvantages",
    "__version__",
    "fused_linear_grpo_rank_loss",
    "grpo_rank_loss",
    "grpo_rank_loss_from_logits",
    "rank_advantages",
    "selective_log_softmax",
    "token_logps",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
