"""A prompt as the policy reads it: token ids and media."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from rlaif_fast.video.media import Media


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt, ready for the policy.

    Attributes:
        input_ids: (P,) int64, with media tokens expanded, including the generation prompt.
        media: The media in order of appearance.
        inputs: Further outputs of the model's own processor, each (n, ...) or (1, P); None if `media` is all.
    """

    input_ids: Tensor  # (P,) int64
    media: tuple[Media, ...] = ()
    inputs: Mapping[str, Tensor] | None = None
