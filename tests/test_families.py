"""Which models the shared-prefix path takes, and the position ids it gives them."""

from __future__ import annotations

import pytest
import torch

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.families import PromptLayouts, family_of
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.testing import (
    FAMILIES,
    IDS,
    TOKENIZER,
    make_media,
    make_model,
    make_policy,
    make_prompt,
    make_responses,
    standard_prompts,
)
from rlaif_fast.rollout.base import SamplingParams
from rlaif_fast.rollout.plain import PlainSampler
from rlaif_fast.rollout.shared_prefix import SharedPrefixSampler


def make_unknown_model():
    """A Video-LLM of a family outside the table."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(IDS),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
            "bos_token_id": None,
            "eos_token_id": IDS["<|im_end|>"],
        },
        vision_config={
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
            "temporal_patch_size": 2,
        },
        image_token_id=IDS["<|image_pad|>"],
        video_token_id=IDS["<|video_pad|>"],
        vision_start_token_id=IDS["<|vision_start|>"],
        vision_end_token_id=IDS["<|vision_end|>"],
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = IDS["<|im_end|>"]
    return model


def test_an_unknown_family_is_refused_and_trains_the_plain_way() -> None:
    model = make_unknown_model()
    with pytest.raises(UsageError) as refusal:
        Policy(model, TOKENIZER)
    message = str(refusal.value)
    for part in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "shared_prefix: false"):
        assert part in message
    policy = Policy(model, TOKENIZER, shared_prefix=False)
    with pytest.raises(ValueError, match="PlainSampler"):
        SharedPrefixSampler(policy)
    prompts = standard_prompts("qwen2_5_vl")
    rollout = PlainSampler(policy).sample(prompts, 2, SamplingParams(max_new_tokens=4, seed=0))
    logps = policy.response_logps(prompts, rollout.token_ids, rollout.mask.sum(1))
    torch.testing.assert_close(logps, rollout.logps[rollout.mask], rtol=1e-4, atol=1e-4)
    logps.sum().backward()
    assert all(p.grad is not None for p in model.model.language_model.parameters())
    assert model.model.visual.patch_embed.proj.weight.grad.abs().sum() > 0


def test_attention_dropout_is_refused() -> None:
    """It would act on the plain path alone."""
    model = make_model("qwen3_vl")
    model.config.text_config.attention_dropout = 0.1
    with pytest.raises(UsageError, match=r"attention_dropout.*shared_prefix: false"):
        Policy(model, TOKENIZER)


def test_sliding_window_layers_are_refused() -> None:
    model = make_model("qwen2_5_vl")
    model.config.text_config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(UsageError, match="sliding-window"):
        Policy(model, TOKENIZER)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_those_of_the_whole_sequence(family: str) -> None:
    """A prompt with a response behind it, laid out by the model itself, against the parts the packed row puts
    together.
    """
    from rlaif_fast.policy.plain import model_inputs

    model = make_model(family)
    layouts = PromptLayouts(model, family_of(model))
    for prompt in standard_prompts(family):
        ids, lengths = make_responses([6])
        inputs = model_inputs(model, [prompt], ids, lengths, group_sizes=[1])
        grids = {k: v for k, v in inputs.items() if k.endswith("grid_thw") or k == "second_per_grid_ts"}
        if prompt.media:
            types = inputs["mm_token_type_ids"]
            positions, _ = model.model.get_rope_index(inputs["input_ids"], mm_token_type_ids=types, **grids)
            positions = positions[:, 0]
        else:
            positions = torch.arange(inputs["input_ids"].shape[1]).expand(3, -1)
        layout = layouts(prompt)
        count = len(prompt.input_ids)
        assert layout.positions.tolist() == positions[:, :count].tolist()
        expected = torch.arange(layout.next_position, layout.next_position + 6).expand(3, -1)
        assert expected.tolist() == positions[:, count:].tolist()
        assert layouts(prompt) is layout  # remembered


def test_time_stretched_positions_do_not_move_the_response() -> None:
    """Qwen2.5-VL with several position steps a frame: the response follows the text, not the largest
    position.
    """
    policy = make_policy("qwen2_5_vl")
    prompt = make_prompt("qwen2_5_vl", (make_media("c", (3, 4, 4), seconds=2.0),))
    layout = policy.layouts(prompt)
    assert layout.positions.max() > layout.next_position - 1
    assert layout.next_position == layout.positions[0, -1] + 1
