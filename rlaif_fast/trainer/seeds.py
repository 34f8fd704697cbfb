"""Seeds of the libraries. The training loop uses its own generators."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch

from rlaif_fast.distributed.world import World
from rlaif_fast.trainer.options import TrainConfig


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_step(config: TrainConfig, world: World, stage: str, step: int) -> None:
    """Seed the libraries for one step: dropout depends on process and step, not on where a run was resumed."""
    name = f"{config.seed}/{world.rank}/{stage}/{step}"
    seed_everything(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))
