"""Oracles: anything that can order the responses of a group can teach."""

from rlaif_fast.oracle.as_reward import as_reward
from rlaif_fast.oracle.base import Oracle, Ranking, RankRequest
from rlaif_fast.oracle.reference import ReferenceOracle
from rlaif_fast.oracle.registry import build_oracle, oracle_names
from rlaif_fast.oracle.wrappers import CircuitBreaker, OracleFailedError, ShuffledOracle

__all__ = [
    "CircuitBreaker",
    "Oracle",
    "OracleFailedError",
    "RankRequest",
    "Ranking",
    "ReferenceOracle",
    "ShuffledOracle",
    "as_reward",
    "build_oracle",
    "oracle_names",
]
