"""Video files to the model's patches: probe, sample, decode, cache, preprocess."""

from rlaif_fast.video.base import Clip, VideoDecoder, VideoInfo
from rlaif_fast.video.cache import ClipCache
from rlaif_fast.video.clips import load_clip
from rlaif_fast.video.decoders import DECODERS, decode
from rlaif_fast.video.errors import TooManyBadFiles, VideoError
from rlaif_fast.video.image import load_frames, load_image
from rlaif_fast.video.loader import ClipStore, LoadStats, load_medium
from rlaif_fast.video.preprocess import (
    PatchSpec,
    PixelBudget,
    grid_timestamps,
    patchify,
    preprocess,
    smart_resize,
)
from rlaif_fast.video.probe import probe
from rlaif_fast.video.sampling import FrameSampling, sample_indices

__all__ = [
    "DECODERS",
    "Clip",
    "ClipCache",
    "ClipStore",
    "FrameSampling",
    "LoadStats",
    "PatchSpec",
    "PixelBudget",
    "TooManyBadFiles",
    "VideoDecoder",
    "VideoError",
    "VideoInfo",
    "decode",
    "grid_timestamps",
    "load_clip",
    "load_frames",
    "load_image",
    "load_medium",
    "patchify",
    "preprocess",
    "probe",
    "sample_indices",
    "smart_resize",
]
