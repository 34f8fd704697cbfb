"""What the engine requires of a family of Video-LLMs: one class per family, one family per file.

No model code is forked. A family names the submodules of its Hugging Face class, lays out a prompt's media like its
Hugging Face processor, and says how features and position ids are computed, by the model's own methods.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlaif_fast.errors import UsageError
from rlaif_fast.policy import vision_attention
from rlaif_fast.policy.pattern import Pattern
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.video.base import Clip
from rlaif_fast.video.media import Media
from rlaif_fast.video.preprocess import PatchSpec

TEXT, IMAGE, VIDEO = 0, 1, 2  # token types, as `mm_token_type_ids` numbers them
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LORA_TARGETS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
MLP_LAYERS = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
PARTS = ("decoder", "tower", "projector")
# in the names of a mixture's routers
ROUTER = re.compile(r"\.router\.|\.(mlp|mixer|text_moe|vision_moe)\.gate\.")
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
KNOWN_LAYERS = {"full_attention", "sliding_attention", "linear_attention"}
# Decoders whose packed rows are compared with their own forward (tests/test_pattern.py), for families that may have any
# decoder. Others have sinks, soft caps or their own attention layers, or do not pass the layout down to attention.
# fmt: off
DECODERS = frozenset((
    "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma3_text", "glm", "glm4", "glm4_moe", "granite",
    "granitemoe", "helium", "hunyuan_v1_dense", "llama", "ministral", "mistral", "mixtral", "olmo", "olmo2", "olmo3",
    "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
))
# fmt: on
WINDOWED = {"mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2"}  # `sliding_window` is for every layer
# Decoders that read `layer_types`; others ignore what it says of windows.
# fmt: off
BY_LAYER = {
    "cohere2", "exaone4", "gemma3_text", "ministral", "olmo3", "qwen2", "qwen2_5_vl_text", "qwen2_moe", "qwen2_vl_text",
    "qwen3", "smollm3",
}
# fmt: on
Features = tuple[Tensor, ...]  # of one medium: the projector's output, then each deepstack level, each (F, H)


def unwrap(model: Any) -> Any:
    """The Hugging Face model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def patches_for(module: nn.Module, media: Sequence[Media]) -> Tensor:
    """The patches of some media, one medium after the other, on the device and in the dtype of a module."""
    parameter = next(module.parameters())
    return torch.cat([m.patches for m in media]).to(parameter.device, parameter.dtype)


def is_mixture(config: Any) -> bool:
    """Whether the decoder is a mixture of experts."""
    text = config.get_text_config()
    return any(getattr(text, name, None) for name in EXPERTS)


class Family:
    """A family whose tower reads patches and their grids, as in the Qwen-VL models; others override what differs.

    Attributes:
        name: Its usual name.
        model_types: `config.model_type` of its Hugging Face classes.
        tower: Where the vision tower is in the model.
        projector: Where the modules between tower and decoder are.
        decoder: Where the text decoder is: embeddings to normalised last hidden states.
        decoders: Types of decoder that its prompts can be shared with; None if its decoder is of one type.
        lora_targets: Names of the linear layers that get an adapter by default.
        unshared: Why its prompts cannot be computed once per group; None if they can.
        two_way_pictures: Whether the tokens of a picture attend to each other in both directions.
        axes: Axes of its position ids: 3 (time, height, width) or 1.
        pictures: Whether it accepts still pictures.
        batched_vision: Whether its tower attends within pieces of one packed row (see `vision_attention`).
        expands: Whether `generate` repeats media correctly for several responses to a prompt.
        video_mark: What the chat template writes for a video.
        image_mark: What the chat template writes for a picture.
        turn_end: The token that ends an answer; None is the tokenizer's end of sequence.
    """

    name = ""
    model_types: tuple[str, ...] = ()
    tower = "model.visual"
    projector: tuple[str, ...] = ("model.visual.merger", "model.visual.deepstack_merger_list")
    decoder = "model.language_model"
    decoders: frozenset[str] | None = None
    lora_targets: tuple[str, ...] = LORA_TARGETS
    unshared: str | None = None
    two_way_pictures = False
    axes = 3
    pictures = True
    batched_vision = True
    expands = False
    video_mark = "<|vision_start|><|video_pad|><|vision_end|>"
    image_mark = "<|vision_start|><|image_pad|><|vision_end|>"
    turn_end: str | None = None

    def patch_spec(self, config: Any, settings: Mapping[str, Any]) -> PatchSpec:
        """Patch sizes of the tower.

        Args:
            config: The model's configuration.
            settings: Its processor's settings for video, with `image_mean` and `image_std`.
        """
        vision = config.vision_config
        return PatchSpec(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            mean=tuple(settings["image_mean"]),
            std=tuple(settings["image_std"]),
        )

    def content(self, clip: Clip) -> dict[str, str]:
        """The part of the user's message that represents a clip."""
        return {"type": "image" if clip.is_image else "video"}

    def chat_template(self, tokenizer: Any, clips: Sequence[Clip]) -> str | None:
        """The template that lays out `clips`; None for the tokenizer's own."""
        return None

    def mark(self, clip: Clip) -> str:
        """What the chat template writes for a clip."""
        return self.image_mark if clip.is_image else self.video_mark

    def image_text(self, media: Media, spec: PatchSpec) -> str:
        """The replacement of a picture's mark: as many media tokens as it has features."""
        return self.image_mark.replace("<|image_pad|>", "<|image_pad|>" * spec.tokens(media))

    def video_text(self, clip: Clip, media: Media, spec: PatchSpec) -> str:
        """The replacement of a video's mark, including timestamps."""
        return self.video_mark.replace("<|video_pad|>", "<|video_pad|>" * spec.tokens(media))

    def token_types(self, config: Any, input_ids: np.ndarray) -> np.ndarray:
        """`mm_token_type_ids` (P,) of one prompt: 0 text, 1 image, 2 video."""
        image, video = config.image_token_id, getattr(config, "video_token_id", None)
        return np.where(input_ids == image, IMAGE, np.where(input_ids == video, VIDEO, TEXT))

    def count(self, config: Any, media: Media) -> int:
        """Number of features of a medium, and so of its media tokens."""
        return int(np.prod(media.grid_thw)) // config.vision_config.spatial_merge_size**2

    def part_of(self, parameter: str) -> str:
        """Which of `PARTS` a parameter or module belongs to, by its name in the model without adapters."""
        if _under(parameter, self.projector):
            return "projector"
        return "tower" if _under(parameter, (self.tower,)) else "decoder"

    def vision(self, model: nn.Module) -> Any:
        """The modules that compute features: tower and projector."""
        return unwrap(model).get_submodule(self.tower)

    def tower_layers(self, model: nn.Module) -> list[nn.Module]:
        """The layers of the vision tower: its longest list of modules."""
        parts = unwrap(model).get_submodule(self.tower).modules()
        return max((list(part) for part in parts if isinstance(part, nn.ModuleList)), key=len)

    def features(self, vision: Any, media: Sequence[Media]) -> list[Features]:
        """Features of each medium, with the graph of `vision`."""
        patches = patches_for(vision, media)
        device = patches.device
        grids = torch.tensor([m.grid_thw for m in media])
        made = {
            # Attention that cuts at the ends of pieces reads them on the host.
            name: x if name.startswith("cu_") and vision_attention.is_installed(vision) else x.to(device)
            for name, x in self.of_grids(vision, grids).items()
        }
        output = vision(patches, grid_thw=grids.to(device), return_dict=True, **made)
        merge = len(patches) // len(output.pooler_output)
        lengths = [t * h * w // merge for t, h, w in (m.grid_thw for m in media)]
        levels = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
        return list(zip(*(level.split(lengths) for level in levels)))

    def of_grids(self, vision: Any, grids: Tensor) -> dict[str, Tensor]:
        """What the tower computes from grids (n, 3) alone, by argument name; computed on the host, to avoid waiting
        for the device."""
        return {}

    def positions(self, model: Any, prompt: EncodedPrompt, types: np.ndarray) -> np.ndarray:
        """(3, P + 1) position ids of a prompt and one text token after it; equal rows if `axes` is 1."""
        length = types.size + 1
        if self.axes == 1 or not prompt.media:
            return np.broadcast_to(np.arange(length), (3, length))
        grids = {
            kind: torch.tensor([m.grid_thw for m in prompt.media if m.is_video == (kind == VIDEO)])
            for kind in (IMAGE, VIDEO)
        }
        found, _ = unwrap(model).model.get_rope_index(
            torch.zeros(1, length, dtype=torch.int64),
            mm_token_type_ids=torch.from_numpy(np.append(types, TEXT)).int()[None],
            image_grid_thw=grids[IMAGE] if len(grids[IMAGE]) else None,
            video_grid_thw=grids[VIDEO] if len(grids[VIDEO]) else None,
            **self.position_options(prompt),
        )
        return found[:, 0].numpy()

    def position_options(self, prompt: EncodedPrompt) -> dict[str, Tensor]:
        """What else the positions of a prompt depend on."""
        return {}

    def plain_inputs(self, model: Any, rows: Sequence[EncodedPrompt], input_ids: Tensor) -> dict[str, Tensor]:
        """Inputs of the model's own forward besides tokens and mask.

        Args:
            model: The Hugging Face model.
            rows: The prompt of each row.
            input_ids: (B, L) tokens of the padded rows.
        """
        media = [m for row in rows for m in row.media]
        inputs: dict[str, Tensor] = {}
        if not media:
            return inputs
        for is_video, pixels, grid in (
            (False, "pixel_values", "image_grid_thw"),
            (True, "pixel_values_videos", "video_grid_thw"),
        ):
            chosen = [m for m in media if m.is_video == is_video]
            if chosen:
                inputs[pixels] = patches_for(model, chosen)
                inputs[grid] = torch.tensor([m.grid_thw for m in chosen], device=input_ids.device)
        config = unwrap(model).config
        types = [self.token_types(config, row) for row in input_ids.numpy(force=True)]
        inputs["mm_token_type_ids"] = torch.from_numpy(np.stack(types)).int().to(input_ids.device)
        return inputs

    def notes(self, config: Any, lora: bool) -> list[str]:
        """What a user of such a model should know."""
        if not is_mixture(config):
            return []
        adapters = "; its experts get no adapters" if lora else ""
        return [
            "mixture of experts: the router is frozen unless train_router is set, and no auxiliary loss is added"
            + adapters
        ]

    def lora_names(self, config: Any) -> tuple[str, ...]:
        """Names of the decoder's linear layers that get an adapter by default.

        The experts of a mixture are one fused weight, not linear layers, so only its attention gets adapters.
        """
        return tuple(n for n in self.lora_targets if n not in MLP_LAYERS or not is_mixture(config))

    def pattern(self, config: Any) -> Pattern | None:
        """How its decoder attends; None if every token sees exactly itself and all earlier ones."""
        text = config.get_text_config()
        windows = _windows(text, getattr(text, "layer_types", None))
        if set(windows) == {None} and not self.two_way_pictures:
            return None
        return Pattern(windows, self.two_way_pictures)

    def misleads_caches(self, config: Any) -> bool:
        """Whether Transformers would make a cache of windows that this decoder may not have."""
        text = config.get_text_config()
        if getattr(text, "sliding_window", None) is None or text.model_type in BY_LAYER:
            return False
        return set(getattr(text, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}

    def refuses_shared_prefix(self, config: Any) -> str | None:
        """Why a model of this family cannot compute each prompt once per group; None if it can."""
        text = config.get_text_config()
        if self.unshared is not None:
            return self.unshared
        if self.decoders is not None and text.model_type not in self.decoders:
            return f"packed rows are not known to be right with its decoder {text.model_type!r}"
        types = getattr(text, "layer_types", None)
        unknown = set(types or ()) - KNOWN_LAYERS
        if unknown:
            return f"it has layers of the type {', '.join(sorted(unknown))}"
        if text.model_type not in BY_LAYER and _windows(text, types) != _windows(text, None):
            return (
                f"its decoder {text.model_type!r} does not read the windows that layer_types gives its layers; "
                "take layer_types out of the model's config.json"
            )
        if getattr(text, "attention_dropout", 0.0):
            return "it has attention_dropout; set that to 0 in the model's config.json"
        return None


def _windows(text: Any, types: Sequence[str] | None) -> tuple[int | None, ...]:
    """The window of each layer by its type, or, without types, as the decoder has them; None if it sees all."""
    usual = "sliding_attention" if text.model_type in WINDOWED else "full_attention"
    types = types or [usual] * text.num_hidden_layers
    return tuple(getattr(text, "sliding_window", None) if t == "sliding_attention" else None for t in types)


def _under(name: str, places: Sequence[str]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


class FrameFamily(Family, ABC):
    """A family whose tower reads whole frames of one size and gives the same number of features for each.

    The tower, the projector and other parts that compute features are separate members of the model.

    Attributes:
        feature_parts: The members of the model that compute features.
        image_token: The token that represents a feature of a frame.
    """

    tower = "model.vision_tower"
    projector: tuple[str, ...] = ("model.multi_modal_projector",)
    decoders: frozenset[str] | None = DECODERS
    axes = 1
    batched_vision = False
    feature_parts: tuple[str, ...] = ("model.vision_tower", "model.multi_modal_projector")
    image_token = "<image>"

    @abstractmethod
    def tokens_a_frame(self, config: Any) -> int:
        """Features of one frame."""

    def count(self, config: Any, media: Media) -> int:
        """Features of all its frames."""
        return media.grid_thw[0] * self.tokens_a_frame(config)

    def patch_spec(self, config: Any, settings: Mapping[str, Any]) -> PatchSpec:
        """One patch is one frame."""
        size = config.vision_config.image_size
        return PatchSpec(
            patch_size=size if isinstance(size, int) else size[0],
            temporal_patch_size=1,
            merge_size=1,
            mean=tuple(settings["image_mean"]),
            std=tuple(settings["image_std"]),
            tokens_a_frame=self.tokens_a_frame(config),
        )

    def vision(self, model: nn.Module) -> Any:
        """The members in `feature_parts`; the model itself stays hidden from `parameters()`."""
        whole = unwrap(model)
        return VisionParts(whole, [whole.get_submodule(part) for part in self.feature_parts])

    def frames(self, module: nn.Module, media: Sequence[Media]) -> Tensor:
        """(F, 3, S, S) frames of some media, on the device and in the dtype of a module."""
        patches = patches_for(module, media)
        side = round((patches.shape[1] // 3) ** 0.5)
        return patches.view(-1, 3, side, side)

    def features(self, vision: Any, media: Sequence[Media]) -> list[Features]:
        """Features of each medium by the model's own `get_image_features`."""
        frames = self.frames(vision, media)
        output = vision.model.get_image_features(frames, return_dict=True).pooler_output  # (F, n, H)
        return [(part.flatten(0, 1),) for part in output.split([m.grid_thw[0] for m in media])]

    def plain_inputs(self, model: Any, rows: Sequence[EncodedPrompt], input_ids: Tensor) -> dict[str, Tensor]:
        """All frames of all rows, one after the other."""
        media = [m for row in rows for m in row.media]
        return {"pixel_values": self.frames(model, media)} if media else {}


class VisionParts(nn.Module):
    """The members of a model that compute features, as one module.

    Args:
        model: The model whose `get_..._features` are called.
        parts: Its members that take part; `parameters()` gives theirs.
        extra: Parameters of the model itself that take part.
    """

    def __init__(self, model: Any, parts: Sequence[nn.Module], extra: Sequence[nn.Parameter] = ()) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.extra = nn.ParameterList(extra)
        self._whole = (model,)  # in a tuple it is no submodule, so `parameters()` leaves out the decoder's

    @property
    def model(self) -> Any:
        """The model inside `...ForConditionalGeneration`."""
        return self._whole[0].model


def guess_part(parameter: str) -> str:
    """Which of `PARTS` a parameter belongs to in a model that is not in the table, by the usual names."""
    if re.search(
        r"projector|connector|merger|multi_modal|perceiver|resampler|image_newline|embed_vision", parameter
    ):
        return "projector"
    return "tower" if re.search(r"visual|vision|image_encoder|vit\.", parameter) else "decoder"


def refuse(message: str) -> UsageError:
    """A refusal of a model, in the form that all checks use."""
    return UsageError(f"model: {message}")
