"""Every family with the shared prefix: packed rows against its own padded forward, to 1e-5 in float64."""

from __future__ import annotations

import json
from dataclasses import replace

import family_checkpoints
import pytest
import torch

from rlaif_fast.data.schema import Example
from rlaif_fast.policy.families import FAMILIES, find_family, unwrap
from rlaif_fast.policy.loading import ModelOptions, load_model, without_noise
from rlaif_fast.policy.parts import add_lora
from rlaif_fast.policy.policy import Policy
from rlaif_fast.prompts.encoder import PromptEncoder
from rlaif_fast.rollout.base import SamplingParams
from rlaif_fast.rollout.plain import PlainSampler
from rlaif_fast.rollout.shared_prefix import SharedPrefixSampler
from rlaif_fast.video.base import Clip

SHARED = sorted(name for name, family in FAMILIES.items() if family.unshared is None)
SETTINGS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "merge_size": 2}
TOLERANCE = 1e-5  # float64 inside; log-probabilities and the bias of the head are float32


def make_clip(name: str, frames: int, *, side: int = 24, is_image: bool = False) -> Clip:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    pixels = torch.randint(0, 256, (frames, side, side, 3), generator=generator).to(torch.uint8)
    if frames > 2:
        pixels[2] = pixels[1]  # a frame that repeats the one before
    times = tuple(0.7 * index for index in range(frames))
    return Clip(pixels, times, key=name, is_image=is_image, sample_fps=0.0 if is_image else 1 / 0.7)


def make_encoder(model_type: str, tokenizer, config) -> PromptEncoder:
    spec = FAMILIES[model_type].patch_spec(config, SETTINGS)
    return PromptEncoder(tokenizer, model_type, spec, spec.budget(256, 1024))


def make_prompts(encoder: PromptEncoder, frames: tuple[int, int] = (4, 4)) -> list:
    """A clip, the same with another question, two clips, and no clip."""
    a, b = make_clip("a", frames[0]), make_clip("b", frames[1])
    ask = [
        Example(id=str(i), question=q)
        for i, q in enumerate(("what color", "where is the red", "how many", "is it"))
    ]
    return [encoder.encode(e, c) for e, c in zip(ask, ([a], [a], [b, a], []), strict=True)]


def responses(tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Two to a prompt, of unequal lengths, some beginning alike."""
    words = torch.tensor(tokenizer("red blue circle square left", add_special_tokens=False)["input_ids"])
    generator = torch.Generator().manual_seed(3)
    ids = words[torch.randint(0, len(words), (8, 4), generator=generator)]
    ids[1, :2] = ids[0, :2]
    return ids, torch.tensor([4, 3, 2, 4, 1, 4, 3, 2])


def gradients(policy: Policy, prompts, ids, lengths) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    policy.model.zero_grad()
    logps = policy.response_logps(prompts, ids, lengths)
    weights = torch.linspace(-1, 1, len(logps))
    (logps * weights).sum().backward()
    return logps.detach(), {
        n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("model_type", SHARED)
def test_packed_equals_plain(model_type: str) -> None:
    model, tokenizer = family_checkpoints.make_model(model_type, dtype=torch.float64)
    prompts = make_prompts(make_encoder(model_type, tokenizer, model.config))
    ids, lengths = responses(tokenizer)
    plain, plain_grads = gradients(Policy(model, tokenizer, shared_prefix=False), prompts, ids, lengths)
    packed, packed_grads = gradients(Policy(model, tokenizer), prompts, ids, lengths)
    torch.testing.assert_close(packed, plain, rtol=0, atol=TOLERANCE)
    assert packed_grads.keys() == plain_grads.keys()
    for name, grad in plain_grads.items():
        error = float((packed_grads[name] - grad).abs().max())
        assert error <= TOLERANCE * max(1.0, float(grad.abs().max())), f"{name}: {error:.1e}"
    for part in ("tower", "projector", "decoder"):  # each of them is reached
        reached = [g for n, g in plain_grads.items() if find_family(model_type).part_of(n) == part]
        assert any(float(g.abs().max()) > 1e-6 for g in reached), part


@pytest.mark.parametrize("model_type", SHARED)
def test_samplers_draw_the_same(model_type: str) -> None:
    model, tokenizer = family_checkpoints.make_model(model_type, dtype=torch.float64)
    prompts = make_prompts(make_encoder(model_type, tokenizer, model.config))
    params = SamplingParams(max_new_tokens=5, seed=1)
    plain = PlainSampler(Policy(model, tokenizer, shared_prefix=False)).sample(prompts, 3, params)
    shared = SharedPrefixSampler(Policy(model, tokenizer)).sample(prompts, 3, params)
    assert shared.token_ids.tolist() == plain.token_ids.tolist()
    torch.testing.assert_close(shared.logps, plain.logps, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_log_probabilities_are_those_of_the_draws(model_type: str) -> None:
    """On the plain path too: the draws go through `generate`, the log-probabilities through a training forward."""
    model, tokenizer = family_checkpoints.make_model(model_type)
    policy = Policy(model, tokenizer, shared_prefix=False)
    prompts = make_prompts(make_encoder(model_type, tokenizer, model.config))
    rollout = PlainSampler(policy).sample(prompts, 2, SamplingParams(max_new_tokens=4, seed=0))
    logps = policy.response_logps(prompts, rollout.token_ids, rollout.mask.sum(1))
    torch.testing.assert_close(logps, rollout.logps[rollout.mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@pytest.mark.parametrize("lora_r", [0, 2])
def test_nothing_is_dropped_at_random(model_type: str, lora_r: int, tmp_path) -> None:
    """Dropout of a checkpoint's configuration, of tower and decoder, as modules and as numbers."""
    folder = family_checkpoints.write_checkpoint(model_type, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for part in ("vision_config", "text_config"):
        config[part] |= dict.fromkeys(("attention_dropout", "hidden_dropout_prob", "projection_dropout"), 0.5)
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_model(ModelOptions(model=str(folder), lora_r=lora_r, device="cpu", dtype="float32"))
    assert loaded.model.training
    assert unwrap(loaded.model).config.vision_config.attention_dropout == 0.5  # as it was, for what is saved
    prompts = make_prompts(make_encoder(model_type, loaded.tokenizer, unwrap(loaded.model).config))
    ids, lengths = responses(loaded.tokenizer)
    policy = Policy(loaded.model, loaded.tokenizer, shared_prefix=False)
    first, second = (policy.response_logps(prompts, ids, lengths) for _ in range(2))
    assert torch.equal(first, second)


def test_a_router_does_not_jitter_and_adapters_drop_as_asked() -> None:
    text = {"model_type": "mixtral", "router_jitter_noise": 0.3} | family_checkpoints.TEXT
    values = family_checkpoints.RECIPES["internvl"][0] | {"text_config": text}
    model, _ = family_checkpoints.make_model("internvl", values=values)
    jitters = [module for module in model.modules() if getattr(module, "jitter_noise", 0.0)]
    assert jitters
    without_noise(model)
    assert not any(module.jitter_noise for module in jitters)
    adapted = add_lora(model, ModelOptions(lora_r=2, lora_dropout=0.4))
    assert {module.p for module in adapted.modules() if isinstance(module, torch.nn.Dropout)} >= {0.4}


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_pictures_are_shown_or_refused(model_type: str) -> None:
    model, tokenizer = family_checkpoints.make_model(model_type)
    encoder, family = make_encoder(model_type, tokenizer, model.config), FAMILIES[model_type]
    picture = replace(make_clip("p", 1, is_image=True), timestamps=(0.0,))
    if not family.pictures:
        with pytest.raises(Exception, match="shows a picture"):
            encoder.encode(Example(id="0", question="what color"), [picture])
        return
    prompt = encoder.encode(Example(id="0", question="what color"), [picture])
    ids, lengths = responses(tokenizer)
    shared = family.unshared is None
    one = Policy(model, tokenizer, shared_prefix=False).response_logps([prompt], ids[:2], lengths[:2])
    if shared:
        two = Policy(model, tokenizer).response_logps([prompt], ids[:2], lengths[:2])
        torch.testing.assert_close(two, one, rtol=0, atol=1e-4)
    assert torch.isfinite(one).all()


def test_frames_of_any_number_are_packed() -> None:
    """LLaVA-OneVision's own forward takes videos of one number of frames; the packed path any."""
    model, tokenizer = family_checkpoints.make_model("llava_onevision")
    prompts = make_prompts(make_encoder("llava_onevision", tokenizer, model.config), frames=(4, 3))
    ids, lengths = responses(tokenizer)
    assert torch.isfinite(Policy(model, tokenizer).response_logps(prompts, ids, lengths)).all()
    with pytest.raises(Exception, match="videos of one number of frames"):
        Policy(model, tokenizer, shared_prefix=False).response_logps(prompts, ids, lengths)
    assert unwrap(model) is model


@pytest.mark.parametrize("model_type", ["llava_onevision", "qwen3_vl"])
def test_positions_that_the_model_was_not_made_for_are_told_once(model_type, caplog) -> None:
    model, tokenizer = family_checkpoints.make_model(model_type)
    prompts = make_prompts(make_encoder(model_type, tokenizer, model.config))
    last = max(Policy(model, tokenizer).layouts(prompt).next_position for prompt in prompts)
    for most, times in ((last + 1, 0), (last, 1), (2, 1)):
        model.config.get_text_config().max_position_embeddings = most
        caplog.clear()
        policy = Policy(model, tokenizer)
        for prompt in prompts * 2:
            policy.layouts(prompt)
        assert caplog.text.count("(max_position_embeddings): responses may be senseless") == times
