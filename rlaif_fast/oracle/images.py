"""Frames of a clip as parts of a chat message."""

from __future__ import annotations

import base64
import io
from typing import Any

from rlaif_fast.errors import needed_by
from rlaif_fast.video.base import Clip


def encode_frames(clip: Clip, max_frames: int, size: int) -> list[dict[str, Any]]:
    """At most `max_frames` evenly spaced frames of a clip as message parts, each a time and a JPEG."""
    with needed_by("sending frames", "judge"):
        from PIL import Image
    total = clip.frames.shape[0]
    count = min(total, max_frames)
    parts: list[dict[str, Any]] = []
    for index in [(2 * i + 1) * total // (2 * count) for i in range(count)]:
        image = Image.fromarray(clip.frames[index].cpu().numpy())
        image.thumbnail((size, size))
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=85)
        url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        if not clip.is_image:
            parts.append({"type": "text", "text": f"{clip.timestamps[index]:.1f} s"})
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts
