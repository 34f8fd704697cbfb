"""Tiny checkpoints of every family, laid out as on the hub: config, random weights, tokenizer, processor, template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rlaif_fast.data import VOCABULARY
from rlaif_fast.policy.loading import ModelOptions, load_model
from rlaif_fast.policy.tiny import END_OF_TEXT, build_tokenizer
from rlaif_fast.runs.checkpoint import CheckpointStore
from rlaif_fast.runs.files import read_jsonl
from rlaif_fast.runs.folder import RunDir

ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = ROPE | {"mrope_section": [2, 1, 1]}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 32,
}
VISION_3 = VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
SIGLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 16,
}
QWEN_MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
GLM_IDS = {
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}
QWEN2 = {"model_type": "qwen2"} | {k: v for k, v in TEXT.items() if k != "head_dim"}

# model type -> config, ids of its marks, what its template writes for a picture and a video, further tokens.
RECIPES: dict[str, tuple[dict[str, Any], dict[str, str], tuple[str, str], tuple[str, ...]]] = {
    "qwen2_vl": (
        {
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": VISION | {"embed_dim": 32, "mlp_ratio": 2},
        },
        QWEN_IDS,
        ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"),
        (),
    ),
    "glm4v": (
        {
            "text_config": TEXT | {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
            "vision_config": VISION | {"image_size": 16},
        },
        GLM_IDS,
        (
            "<|begin_of_image|><|image|><|end_of_image|>",
            "<|begin_of_video|><|video|><|end_of_video|>",
        ),
        (),
    ),
    "internvl": (
        {
            "text_config": QWEN2,
            "vision_config": SIGLIP | {"image_size": [16, 16], "patch_size": [4, 4]},
            "image_seq_length": 4,
        },
        {"image_token_id": "<IMG_CONTEXT>"},
        ("<IMG_CONTEXT>\n", "<video>\n"),
        ("<img>", "</img>", "<video>"),
    ),
    "llava_onevision": (
        {
            "text_config": QWEN2,
            "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False} | SIGLIP,
            "image_grid_pinpoints": [[16, 16]],
        },
        {"image_token_index": "<image>", "video_token_index": "<video>"},
        ("<image>\n", "<video>\n"),
        (),
    ),
    "smolvlm": (
        {
            "text_config": {"model_type": "llama"} | TEXT,
            "vision_config": SIGLIP,
            "scale_factor": 2,
        },
        {"image_token_id": "<image>"},
        ("<image>", "<video>"),
        ("<video>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    ),
    "video_llama_3": (
        {"text_config": QWEN2, "vision_config": SIGLIP},
        {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
        ("<|image_pad|>", "<|video_pad|>"),
        (),
    ),
    "gemma3": (
        {
            "text_config": TEXT
            | {
                "sliding_window": 16,
                "query_pre_attn_scalar": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
        },
        {
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        ("<start_of_image>", "<no_video>"),
        ("<end_of_turn>",),
    ),
}
_QWEN3 = RECIPES["qwen2_vl"][1:]
_MROPE3 = {"rope_parameters": MROPE | {"mrope_interleaved": True}}
RECIPES |= {
    "qwen2_5_vl": (
        {
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": VISION | {"window_size": 16, "fullatt_block_indexes": [0]},
        },
        *_QWEN3,
    ),
    "qwen3_vl": ({"text_config": TEXT | _MROPE3, "vision_config": VISION_3}, *_QWEN3),
    "qwen3_vl_moe": ({"text_config": TEXT | MOE | _MROPE3, "vision_config": VISION_3}, *_QWEN3),
    "glm46v": (
        RECIPES["glm4v"][0]
        | {"text_config": {"model_type": "glm4v_text"} | RECIPES["glm4v"][0]["text_config"]},
        *RECIPES["glm4v"][1:],
    ),
    "glm4v_moe": (
        {
            "text_config": RECIPES["glm4v"][0]["text_config"]
            | {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2},
            "vision_config": VISION | {"image_size": 16},
        },
        *RECIPES["glm4v"][1:],
    ),
}
_LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_VISION35 = VISION | {"num_position_embeddings": 16}
_ROPE35 = {"rope_parameters": MROPE | {"mrope_interleaved": True, "partial_rotary_factor": 1.0}}
RECIPES |= {
    "qwen3_5": ({"text_config": TEXT | _LINEAR | _ROPE35, "vision_config": _VISION35}, *_QWEN3),
    "qwen3_5_moe": (
        {
            "text_config": TEXT | MOE | _LINEAR | _ROPE35 | {"shared_expert_intermediate_size": 16},
            "vision_config": _VISION35,
        },
        *_QWEN3,
    ),
}

# Of families outside the table, for which their own processors make the prompts.
_LLAMA = {"model_type": "llama"} | TEXT
_CLIP = SIGLIP | {"model_type": "clip_vision_model", "projection_dim": 32}
_LLAVA_MARKS = (
    {"image_token_index": "<image>", "video_token_index": "<video>"},
    ("<image>\n", "<video>\n"),
    (),
)
OTHER_RECIPES = {
    "llava_next_video": (
        {
            "text_config": _LLAMA,
            "vision_config": _CLIP,
            "image_grid_pinpoints": [[16, 16]],
            "vision_feature_layer": -1,
        },
        *_LLAVA_MARKS,
    ),
    "video_llava": ({"text_config": _LLAMA, "vision_config": _CLIP}, *_LLAVA_MARKS),
}


def recipe(model_type: str):
    """Of a family in the table or outside it."""
    return (RECIPES | OTHER_RECIPES)[model_type]


def chat_template(picture: str, video: str, generation: str = "<|im_start|>assistant\n") -> str:
    """A template of the usual form that writes these marks."""
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}"
        + picture
        + "{% elif part['type'] == 'video' %}"
        + video
        + "{% else %}"
        "{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}" + generation + "{% endif %}"
    )


def make_tokenizer(model_type: str):
    """The tokenizer of a recipe, with the marks of its family."""
    _, marks, (picture, video), more = recipe(model_type)
    tokenizer = build_tokenizer(VOCABULARY)
    known = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys((*marks.values(), *more)) if token not in known]
    tokenizer.add_tokens(new, special_tokens=True)
    tokenizer.chat_template = chat_template(picture, video)
    return tokenizer


def make_config(model_type: str, tokenizer, values: dict[str, Any] | None = None):
    """The config of a recipe, or of other `values` than its own."""
    from transformers import AutoConfig

    own, marks, *_ = recipe(model_type)
    values = own if values is None else values
    ids = tokenizer.get_vocab()
    ends = {"eos_token_id": ids["<|im_end|>"], "bos_token_id": None, "pad_token_id": ids[END_OF_TEXT]}
    text = values["text_config"] | {"vocab_size": len(tokenizer), "tie_word_embeddings": True} | ends
    return AutoConfig.for_model(
        model_type,
        **values | {"text_config": text, "tie_word_embeddings": True},
        **{name: ids[token] for name, token in marks.items()},
    )


def make_model(
    model_type: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    values: dict[str, Any] | None = None,
):
    """A random model of a recipe, or of other `values` than its own, and its tokenizer."""
    from transformers import AutoModelForImageTextToText

    tokenizer = make_tokenizer(model_type)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(make_config(model_type, tokenizer, values), dtype=dtype)
    if dtype == torch.float64:  # the fused experts have no float64
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not parameter.any():  # Gemma 3's projector, which would show nothing
                parameter.normal_(std=0.1)
            elif parameter.ndim > 1:  # at the usual 0.02 two layers hardly differ from none
                parameter.mul_(5)
            elif name.endswith("A_log"):  # a recurrent state that lasts for some tokens
                parameter.fill_(-1.0)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def write_checkpoint(model_type: str, folder: Path) -> Path:
    """A folder as on the hub."""
    model, tokenizer = make_model(model_type)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_processor(folder)
    return folder


def write_processor(folder: Path) -> None:
    """The processor's settings."""
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "merge_size": 2}
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text(json.dumps(settings))


def train_a_little(model: Path, output: Path, cache: Path, **more: Any) -> int:
    """Two supervised and two RL steps with evaluations; returns the command's exit status."""
    from rlaif_fast import train

    values: dict[str, Any] = {
        "model": model,
        "output_dir": output,
        "cache_dir": cache,
        "synthetic_sft_clips": 4,
        "synthetic_rl_clips": 4,
        "synthetic_validation_clips": 2,
        "synthetic_test_clips": 2,
        "nframes": 4,
        "sft_steps": 2,
        "sft_videos_per_step": 2,
        "max_steps": 2,
        "videos_per_step": 2,
        "num_generations": 2,
        "max_completion_length": 24,
        "eval_steps": 1,
        "gallery_clips": 0,
        "min_pixels": 256,
        "max_pixels": 1024,
        "blind_control": 0,
        "sft_learning_rate": 1e-3,
        "learning_rate": 1e-3,
        "report": "false",
        "tensorboard": "false",
        "num_processes": 1,
        "threads": 1,
    }
    return train.main([f"--{key}={value}" for key, value in (values | more).items()])


def assert_trained(model: Path, output: Path) -> None:
    """Both stages took their steps, the run was evaluated, and its checkpoint reloads with other weights."""
    run = RunDir.open(output)
    steps = [(row["stage"], row["step"]) for row in read_jsonl(run.path / "metrics.jsonl")]
    assert {("sft", 1), ("sft", 2), ("rl", 1), ("rl", 2)} <= set(steps)
    assert 0 <= json.loads((run.path / "summary.json").read_text())["final_accuracy"] <= 1
    trained = CheckpointStore(run.checkpoints, {}, read_only=True).checked("sft")
    before, after = (load_model(ModelOptions(model=str(f))).model.state_dict() for f in (model, trained))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
