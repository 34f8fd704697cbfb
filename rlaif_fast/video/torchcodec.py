"""Decoding through torchcodec, on the CPU or through NVDEC; optional."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlaif_fast.errors import UsageError, first_line
from rlaif_fast.video import ffmpeg
from rlaif_fast.video.errors import VideoError
from rlaif_fast.video.probe import scan_for
from rlaif_fast.video.scan import NOT_PLAIN


class TorchCodecDecoder:
    """torchcodec's exact mode: one decoder a file, one thread inside FFmpeg.

    Args:
        device: "cpu", or a CUDA device for NVDEC.
    """

    name = "torchcodec"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        reason = self.unavailable()
        if reason is not None:
            raise UsageError(f"decoder 'torchcodec' cannot run here: {reason}")
        self.device = torch.device(device)

    @staticmethod
    def unavailable() -> str | None:
        """Return why torchcodec cannot run here, or None."""
        try:
            import torchcodec.decoders  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:  # it loads FFmpeg's libraries when imported
            return f"torchcodec does not import ({first_line(error)[:200]})"
        return None

    @staticmethod
    def refuses(scan: ffmpeg.Scan, device: torch.device) -> str | None:
        """Return why torchcodec cannot read such a file on `device`, or None."""
        if not scan.plain:
            return NOT_PLAIN
        if scan.rotation or scan.mirrored:
            return "its versions differ in whether they turn rotated videos"
        return None

    def decode(self, path: str, indices: Sequence[int]) -> Tensor:
        """Return frames (F, H, W, 3) uint8 RGB on the device, upright, in the order of `indices`."""
        from torchcodec.decoders import VideoDecoder

        scan = scan_for(self, path, indices)
        if not len(indices):
            return torch.empty(0, *scan.shape, 3, dtype=torch.uint8, device=self.device)
        try:
            reader = VideoDecoder(path, device=str(self.device), dimension_order="NHWC", num_ffmpeg_threads=1)
            return reader.get_frames_at(list(indices)).data
        except torch.OutOfMemoryError:  # no fault of the file
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise VideoError(path, f"torchcodec cannot decode it: {first_line(error)[:200]}") from None
