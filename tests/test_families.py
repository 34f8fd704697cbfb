"""Which models the shared-prefix path takes, and the position ids it gives them."""

from __future__ import annotations

import pytest
import torch

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.families import PromptLayouts, family_of
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.testing import (
    FAMILIES,
    TOKENIZER,
    make_media,
    make_model,
    make_policy,
    make_prompt,
    make_responses,
    standard_prompts,
)
from rlaif_fast.rollout.shared_prefix import SharedPrefixSampler


def test_an_unknown_family_is_refused() -> None:
    model = make_model("qwen2_5_vl")
    model.config.model_type = "someones_vl"
    with pytest.raises(UsageError) as refusal:
        Policy(model, TOKENIZER)
    message = str(refusal.value)
    for part in ("someones_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "shared_prefix: false"):
        assert part in message
    with pytest.raises(ValueError, match="PlainSampler"):
        SharedPrefixSampler(Policy(model, TOKENIZER, shared_prefix=False))


def test_attention_dropout_is_refused() -> None:
    """It would act on the plain path alone."""
    model = make_model("qwen3_vl")
    model.config.text_config.attention_dropout = 0.1
    with pytest.raises(UsageError, match=r"attention_dropout.*shared_prefix: false"):
        Policy(model, TOKENIZER)


def test_layers_of_an_unknown_type_are_refused() -> None:
    model = make_model("qwen2_5_vl")
    model.config.text_config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(UsageError, match=r"layers of the type chunked_attention.*shared_prefix: false"):
        Policy(model, TOKENIZER)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_batch_are_refused(kind) -> None:
    """InternVL's checkpoints have dynamic ones; up to the length that they start from they are ordinary."""
    import family_checkpoints
    from test_families_packed import make_encoder, make_prompts, responses

    rope = family_checkpoints.ROPE | {"rope_type": kind, "factor": 4.0}
    if kind == "longrope":
        rope |= {
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 4096,
        }
    text = family_checkpoints.QWEN2 | {"rope_parameters": rope}
    values = family_checkpoints.RECIPES["internvl"][0] | {"text_config": text}
    model, tokenizer = family_checkpoints.make_model("internvl", dtype=torch.float64, values=values)
    prompts = make_prompts(make_encoder("internvl", tokenizer, model.config))
    ids, lengths = responses(tokenizer)
    policies = [Policy(model, tokenizer, shared_prefix=shared) for shared in (False, True)]
    plain, packed = (policy.response_logps(prompts, ids, lengths) for policy in policies)
    torch.testing.assert_close(packed, plain, rtol=0, atol=1e-5)
    longest = max(len(prompt.input_ids) for prompt in prompts)
    config = model.config.text_config
    config.max_position_embeddings = longest
    if kind == "longrope":
        config.rope_parameters["original_max_position_embeddings"] = longest
    for policy in policies:
        with pytest.raises(UsageError, match=rf"'{kind}', and behind {longest} tokens they depend on"):
            policy.response_logps(prompts, ids, lengths)


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
