"""The pictures and videos of a chat prompt as clips, for an oracle inside another trainer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlaif_fast.data.errors import RowError
from rlaif_fast.data.media_keys import read_medium
from rlaif_fast.errors import UsageError
from rlaif_fast.video import ClipStore
from rlaif_fast.video.base import Clip
from rlaif_fast.video.refs import MediaRef

KINDS = ("video", "image")
PARTS = (*KINDS, "video_url", "image_url")


class PromptMedia:
    """Turns the media of prompts into clips; a file is decoded once.

    Args:
        store: Loads the files; None for one with its defaults (2 frames a second, at most 768).
    """

    def __init__(self, store: ClipStore | None = None) -> None:
        self._store = store

    def clips(self, prompt: Any, columns: Mapping[str, Any] | None = None) -> tuple[Clip, ...]:
        """The media of a prompt, in their order.

        Args:
            prompt: A text, or a chat whose messages have parts such as {"type": "video", "video": "clip.mp4"}. A
                picture may be a `PIL.Image`, a video frames (F, H, W, 3) uint8 or a list of pictures.
            columns: The other columns of the row; `videos`, `video`, `images` and `image` are used if no part
                of the prompt names a medium.

        Raises:
            UsageError: A medium is of an unsupported kind.
            VideoError: A file is bad.
        """
        media = list(_parts(prompt)) or list(_columns(columns or {}))
        return tuple(self._clip(kind, value) for kind, value in media)

    def _clip(self, kind: str, value: Any) -> Clip:
        held = value.get(kind) if isinstance(value, Mapping) else value
        frames = _frames(kind, held)
        if frames is not None:
            given = value if isinstance(value, Mapping) else {}
            # a dataset gives every part all keys, None if unused
            extra = sorted(name for name in given if name not in ("type", kind) and given[name] is not None)
            if extra:
                raise UsageError(f"{kind}: {', '.join(extra)} cannot be applied to frames that are decoded")
            key = hashlib.blake2b(frames.numpy().tobytes(), digest_size=20).hexdigest()
            times = tuple(float(i) for i in range(len(frames)))
            return Clip(frames, times, f"{key}:{tuple(frames.shape)}", is_image=kind == "image")
        try:
            medium = read_medium(value, kind, kind)
        except RowError as error:
            raise UsageError(f"a prompt's {error}") from None
        if self._store is None:
            self._store = ClipStore()
        return self._store.load(MediaRef(medium.path, medium.kind == "image", medium.cut, medium.frames))


def _parts(prompt: Any) -> Iterator[tuple[str, Any]]:
    """Each part of a chat that is a medium and names it, as (kind, part)."""
    messages = prompt if isinstance(prompt, Sequence) and not isinstance(prompt, str) else []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind in PARTS and any(part.get(key) is not None for key in (kind, "path", "url")):
                yield kind.removesuffix("_url"), part


def _columns(columns: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each medium that a row names in a column of its own."""
    for kind in KINDS:
        if columns.get(kind) is not None:
            yield kind, columns[kind]
        for value in columns.get(f"{kind}s") or ():
            yield kind, value


def _frames(kind: str, value: Any) -> Tensor | None:
    """Decoded frames (F, H, W, 3) uint8; None if they must be read from a file."""
    if _is_picture(value):
        value = [value]
    if isinstance(value, (list, tuple)) and value and all(map(_is_picture, value)):
        pictures = [_pixels(picture) for picture in value]
        if len({picture.shape for picture in pictures}) > 1:
            raise UsageError(f"{kind}: the frames of a video must be of one size")
        return torch.stack(pictures)
    if not isinstance(value, Tensor) and not hasattr(value, "__array__"):
        return None
    frames = torch.as_tensor(value)
    frames = frames[None] if kind == "image" and frames.dim() == 3 else frames
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[-1] != 3:
        raise UsageError(
            f"{kind}: expected frames (F, H, W, 3) uint8, got {tuple(frames.shape)} {str(frames.dtype)[6:]}"
        )
    return frames.contiguous().cpu()


def _is_picture(value: Any) -> bool:
    return hasattr(value, "convert") and hasattr(value, "tobytes")  # a PIL.Image


def _pixels(picture: Any) -> Tensor:
    picture = picture.convert("RGB")
    data = bytearray(picture.tobytes())
    return torch.frombuffer(data, dtype=torch.uint8).view(picture.height, picture.width, 3)
