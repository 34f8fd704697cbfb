"""Asks a remote judge once before anything is trained: a wrong key, address or model shows within seconds."""

from __future__ import annotations

import copy

import torch

from rlaif_fast.errors import RlaifFastError
from rlaif_fast.oracle.api import ApiOracle
from rlaif_fast.oracle.base import RankRequest
from rlaif_fast.oracle.wrappers import oracles_in
from rlaif_fast.video.base import Clip

ATTEMPTS = 2
DEADLINE_SECONDS = 90.0


def ask_once(oracle: object) -> None:
    """Ask every remote judge inside `oracle` about one tiny group; other oracles are left alone.

    Args:
        oracle: Any oracle, or a wrapper around others.

    Raises:
        RlaifFastError: A judge cannot be asked, or its reply is not a verdict; the message says why.
    """
    for judge in oracles_in(oracle):
        if not isinstance(judge, ApiOracle):
            continue
        asked = copy.copy(judge)
        asked.max_attempts = min(judge.max_attempts, ATTEMPTS)
        asked.deadline = min(judge.deadline, DEADLINE_SECONDS)
        [ranking] = asked.rank([_tiny_group(asked.options.use_clips)])
        if not ranking.valid:
            raise RlaifFastError(
                f"the judge {judge.model!r} at {judge.base_url}/chat/completions gave no verdict on a group of "
                f"two answers ({ranking.error or 'it declined to judge'}). Check its address, its name and the key in "
                f"{judge.api_key_env}"
            )


def _tiny_group(use_clips: bool) -> RankRequest:
    """One grey picture and two answers, one of them right."""
    picture = Clip(torch.full((1, 32, 32, 3), 128, dtype=torch.uint8), (0.0,), "preflight", is_image=True)
    return RankRequest(
        id="preflight",
        question="What color is the picture?",
        responses=("gray", "an elephant on a red bicycle"),
        clips=(picture,) if use_clips else (),
        reference="gray",
    )
