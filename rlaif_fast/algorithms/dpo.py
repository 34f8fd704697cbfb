"""DPO on fixed pairs: those of `online_dpo`, drawn from the policy as the stage began (arXiv 2305.18290)."""

from __future__ import annotations

from typing import Literal

from rlaif_fast.algorithms.online_dpo import OnlineDpo


class Dpo(OnlineDpo):
    """Off-policy: as many samples and rankings as the other algorithms, and none of them knows what was learned."""

    samples_from: Literal["policy", "start"] = "start"
