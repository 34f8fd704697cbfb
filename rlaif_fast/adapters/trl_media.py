"""Media of prompts in TRL's forward passes. TRL 1.16 shows videos only to the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

MEDIA = (
    *("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes"),
    *("token_type_ids", "mm_token_type_ids", "image_position_ids"),
)
VIDEO = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
TYPES = "mm_token_type_ids"

Fields = dict[str, Tensor]


class VideoPrompts(GRPOTrainer):
    """A `GRPOTrainer` whose old, reference and training passes see the videos that the sampler saw.

    `output["videos"]` holds each row's fields, which TRL shuffles and splits with the rest.
    """

    _videos: list[Fields] | None = None  # of the batch being scored

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        media = {self._image_pad_token_id, self._video_pad_token_id} - {None}
        if media and not self.use_vllm:  # a media token in a response has no media to show
            self.generation_config.suppress_tokens = sorted(
                media | set(self.generation_config.suppress_tokens or ())
            )

    def _tokenize_prompts(self, prompts: list) -> tuple:
        tokenized = super()._tokenize_prompts(prompts)
        _, images, fields = tokenized
        self._videos = None
        if VIDEO[0] in fields:
            if images is not None or self.use_vllm or self.tools:
                raise ValueError("videos in prompts go with no pictures beside them, no vLLM and no tools")
            self._videos = per_prompt(prompts, fields)
        return tokenized

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self._videos is not None:
            output["videos"] = self._videos
        return output

    def policy_logps(self, output: dict[str, Any]) -> Tensor:
        """Return the log-probability of every completion token (B, T), without a gradient."""
        ids, attention = whole(output)
        media = {name: output[name] for name in (*MEDIA, "num_images", "num_tiles") if name in output}
        with torch.no_grad():
            logps, _, _ = self._get_per_token_logps_and_entropies(
                self.model, ids, attention, output["completion_ids"].shape[1],
                self.args.per_device_train_batch_size, **media,
            )  # fmt: skip
        return logps

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, batch_size: int | None = None,
        compute_entropy: bool = False, **media: Any,
    ) -> tuple:  # fmt: skip
        if self._videos is None:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **media
            )
        logps, entropies = [], []
        for start in range(0, len(input_ids), batch_size or len(input_ids)):
            rows = slice(start, start + (batch_size or len(input_ids)))
            ids, mask = input_ids[rows], attention_mask[rows]
            labels = ids.masked_fill(mask == 0, -100)
            labels[:, :-logits_to_keep] = -100
            fields = joined(self._videos[rows], ids, self._video_pad_token_id)
            with self.accelerator.autocast():
                out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, **fields)
            logps.append(out.log_probs[:, -logits_to_keep:])
            entropies += [out.entropy[:, -logits_to_keep:]] if compute_entropy else []
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None


def per_prompt(prompts: Sequence[Any], fields: dict[str, Any]) -> list[Fields]:
    """Return the processor's output for the videos, one mapping per prompt.

    Args:
        prompts: B chats whose messages have parts.
        fields: What the processor returned for all of them: patches (L, D), grids (videos, 3), and for Qwen2.5-VL
            the seconds of a temporal patch (videos).
    """
    parts_of = [
        [part for message in prompt if isinstance(message["content"], list) for part in message["content"]]
        for prompt in prompts
    ]
    counts = [sum(part["type"] == "video" for part in parts) for parts in parts_of]
    grids = torch.as_tensor(fields["video_grid_thw"])
    patches = torch.as_tensor(fields["pixel_values_videos"])
    rows = [int(part.prod(-1).sum()) for part in grids.split(counts)]
    parts = {"video_grid_thw": grids.split(counts), "pixel_values_videos": patches.split(rows)}
    if "second_per_grid_ts" in fields:
        parts["second_per_grid_ts"] = torch.as_tensor(fields["second_per_grid_ts"]).split(counts)
    typed = {TYPES: torch.empty(0)} if TYPES in fields else {}  # rebuilt for prompt and completion together
    return [{name: values[i] for name, values in parts.items()} | typed for i in range(len(prompts))]


def joined(videos: Sequence[Fields], ids: Tensor, video_token: int) -> Fields:
    """Return the model's arguments for some rows of ids (B, P + T)."""
    found = {
        name: torch.cat([row[name] for row in videos]).to(ids.device) for name in VIDEO if name in videos[0]
    }
    if TYPES in videos[0]:
        found[TYPES] = torch.where(ids == video_token, 2, 0)
    return found


def mask_of(batch: dict[str, Any]) -> Tensor:
    """Return which tokens the policy wrote itself (B, T), excluding tools' answers."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def whole(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask of prompt and completion together, each (B, P + T)."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
