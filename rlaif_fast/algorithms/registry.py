"""Names of algorithms: ours and those of other packages (entry-point group `rlaif_fast.algorithms`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlaif_fast.plugins import find

if TYPE_CHECKING:
    from rlaif_fast.algorithms.base import Algorithm
    from rlaif_fast.algorithms.options import AlgorithmOptions

ALGORITHMS = {
    "grpo_rank": "rlaif_fast.algorithms.grpo_rank:GrpoRank",
    "grpo": "rlaif_fast.algorithms.grpo:Grpo",
    "rloo": "rlaif_fast.algorithms.rloo:Rloo",
    "gopo": "rlaif_fast.algorithms.gopo:Gopo",
    "rlrr": "rlaif_fast.algorithms.rlrr:Rlrr",
    "odrpo": "rlaif_fast.algorithms.odrpo:Odrpo",
    "online_dpo": "rlaif_fast.algorithms.online_dpo:OnlineDpo",
    "dpo": "rlaif_fast.algorithms.dpo:Dpo",
    "lipo": "rlaif_fast.algorithms.lipo:Lipo",
    "ppo_rm": "rlaif_fast.algorithms.ppo_rm:PpoRm",
}


def find_algorithm(options: AlgorithmOptions) -> type[Algorithm]:
    """The class that the options name; `advantage: zscore` is the older name of `algorithm: grpo`.

    Raises:
        UsageError: There is none of that name.
    """
    zscore = options.algorithm == "grpo_rank" and options.advantage == "zscore"
    return find("algorithms", "grpo" if zscore else options.algorithm, ALGORITHMS)


def make_algorithm(options: AlgorithmOptions) -> Algorithm:
    """The algorithm that the options name.

    Raises:
        UsageError: There is none of that name.
    """
    return find_algorithm(options)(options)
