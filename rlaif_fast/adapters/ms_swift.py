"""ms-swift: an oracle as an `ORM` class (4.6), for a file given by `--external_plugins`:

    from rlaif_fast.adapters.ms_swift import register
    register("oracle", ReferenceOracle(), reference="solution")

and `--reward_funcs oracle`. Its Liger loss may be `rlaif_fast.adapters.liger.FusedLinearGRPOLoss`.
"""

from __future__ import annotations

from typing import Any

from rlaif_fast.oracle.as_reward import as_reward
from rlaif_fast.oracle.base import Oracle


def orm_class(oracle: Oracle, base: type = object, **options: Any) -> type:
    """Return a class whose instances are called as `orm(completions, **columns) -> list[float]`.

    Args:
        oracle: Ranks the groups of a process's slice; `num_generations` must divide the slice.
        base: ms-swift's `ORM`.
        options: Of `as_reward`.
    """
    reward = as_reward(oracle, **options)

    class OracleORM(base):  # type: ignore[misc, valid-type]
        def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
            return reward(completions=completions, **columns)

    return OracleORM


def register(name: str, oracle: Oracle, **options: Any) -> None:
    """Put an oracle among ms-swift's reward functions."""
    from swift.rewards import ORM, orms

    orms[name] = orm_class(oracle, ORM, **options)
