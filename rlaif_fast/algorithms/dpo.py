"""DPO on fixed pairs: like `online_dpo`, but drawn from the policy at the start of the stage (arXiv 2305.18290)."""

from __future__ import annotations

from typing import Literal

from rlaif_fast.algorithms.online_dpo import OnlineDpo


class Dpo(OnlineDpo):
    """Off-policy: as many samples and rankings as the other algorithms, but none reflect what was learned."""

    samples_from: Literal["policy", "start"] = "start"
