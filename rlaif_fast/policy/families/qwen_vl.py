"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL, and Qwen3.5: patches and their grids, multimodal rotary positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlaif_fast.policy.families.base import LORA_TARGETS, Family
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.video.base import Clip
from rlaif_fast.video.media import Media
from rlaif_fast.video.preprocess import PatchSpec, grid_timestamps


class Qwen2VL(Family):
    """One block of video tokens per video, without times."""

    name = "Qwen2-VL"
    model_types: tuple[str, ...] = ("qwen2_vl",)
    expands = True


class Qwen25VL(Family):
    """Like Qwen2-VL, but the temporal positions of a video follow its seconds."""

    name = "Qwen2.5-VL"
    model_types: tuple[str, ...] = ("qwen2_5_vl",)
    expands = True

    def of_grids(self, vision: Any, grids: Tensor) -> dict[str, Tensor]:
        """Positions, and where frames and windows end."""
        from transformers import vision_utils

        index, ends = vision_utils.get_vision_window_index(
            grids,
            spatial_merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
        )
        return _of_frames(vision, grids) | {"window_index": index, "cu_window_seqlens": ends}

    def position_options(self, prompt: EncodedPrompt) -> dict[str, Tensor]:
        """Seconds between two temporal patches of each video."""
        seconds = [m.seconds_per_grid for m in prompt.media if m.is_video]
        return {"second_per_grid_ts": torch.tensor(seconds, dtype=torch.float32)}

    def plain_inputs(self, model: Any, rows: Any, input_ids: Tensor) -> dict[str, Tensor]:
        """With the seconds of each video."""
        inputs = super().plain_inputs(model, rows, input_ids)
        if "video_grid_thw" in inputs:
            seconds = [m.seconds_per_grid for row in rows for m in row.media if m.is_video]
            inputs["second_per_grid_ts"] = torch.tensor(
                seconds, dtype=torch.float32, device=inputs["video_grid_thw"].device
            )
        return inputs


class Qwen3VL(Family):
    """One timestamp and one block of video tokens per temporal patch."""

    name = "Qwen3-VL"
    model_types: tuple[str, ...] = ("qwen3_vl",)
    expands = True

    def of_grids(self, vision: Any, grids: Tensor) -> dict[str, Tensor]:
        """Positions, where frames end, and how the learned positions are interpolated."""
        from transformers import vision_utils

        taps, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=vision.num_grid_per_side,
            mode=vision.interpolation_mode,
            align_corners=vision.interpolation_align_corners,
            spatial_merge_size=vision.config.spatial_merge_size,
        )
        return _of_frames(vision, grids) | {"interp_indices": taps, "interp_weights": weights}

    def video_text(self, clip: Clip, media: Media, spec: PatchSpec) -> str:
        """`<1.5 seconds>` before each temporal patch."""
        block = self.video_mark.replace(
            "<|video_pad|>", "<|video_pad|>" * (spec.tokens(media) // media.grid_thw[0])
        )
        return "".join(
            f"<{seconds:.1f} seconds>{block}"
            for seconds in grid_timestamps(clip.timestamps, spec.temporal_patch_size)
        )


class Qwen3VLMoe(Qwen3VL):
    """Qwen3-VL whose layers are mixtures of experts."""

    name = "Qwen3-VL-MoE"
    model_types: tuple[str, ...] = ("qwen3_vl_moe",)


class Qwen35(Qwen3VL):
    """Laid out like Qwen3-VL; most layers are linear attention."""

    name = "Qwen3.5"
    model_types: tuple[str, ...] = ("qwen3_5", "qwen3_5_moe")
    projector: tuple[str, ...] = ("model.visual.merger",)
    lora_targets: tuple[str, ...] = (*LORA_TARGETS, "in_proj_qkv", "in_proj_z", "out_proj")
    expands = False


FAMILIES = (Qwen2VL(), Qwen25VL(), Qwen3VL(), Qwen3VLMoe(), Qwen35())


def _of_frames(vision: Any, grids: Tensor) -> dict[str, Tensor]:
    from transformers import vision_utils

    return {
        "position_ids": vision_utils.get_vision_position_ids(grids, vision.spatial_merge_size),
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(grids),
    }
