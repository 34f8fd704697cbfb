"""A family outside the table: prompts by its own processor, here one that is played by a known family's layout."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import family_checkpoints
import pytest
import torch
from test_families_packed import SETTINGS, make_clip, make_encoder, responses

from rlaif_fast.data.schema import Example
from rlaif_fast.errors import UsageError
from rlaif_fast.policy.families import FAMILIES
from rlaif_fast.policy.families.processor import check_head, load_processor, processor_inputs
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.prompts.processor import ProcessorEncoder
from rlaif_fast.rollout.base import SamplingParams
from rlaif_fast.rollout.plain import PlainSampler
from rlaif_fast.video import FrameSampling, load_clip
from rlaif_fast.video.base import Clip
from rlaif_fast.video.preprocess import preprocess
from rlaif_fast.video.testing import counter_frames, write_video


class PlayedProcessor:
    """What a Hugging Face processor does, by the table's layout of Qwen2-VL."""

    def __init__(self, tokenizer, config) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.family = FAMILIES["qwen2_vl"]
        self.spec = self.family.patch_spec(config, SETTINGS)

    def apply_chat_template(self, messages, **options) -> str:
        return self.tokenizer.apply_chat_template(messages, **options)

    def __call__(self, text, return_tensors, add_special_tokens, videos=(), video_metadata=(), **_) -> dict:
        made, pieces = {}, []
        for frames, about in zip(videos, video_metadata, strict=True):
            times = tuple(index / about.fps for index in about.frames_indices)
            clip = Clip(frames.permute(0, 2, 3, 1), times, key="", sample_fps=about.fps)
            media = preprocess(clip, self.spec, min_pixels=256, max_pixels=1024)
            pieces.append((media, self.family.video_text(clip, media, self.spec)))
        (whole,) = text
        for _media, piece in pieces:
            whole = whole.replace(self.family.video_mark, piece, 1)
        ids = self.tokenizer(whole, add_special_tokens=False)["input_ids"]
        made = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}
        if pieces:
            made["pixel_values_videos"] = torch.cat([media.patches for media, _ in pieces])
            made["video_grid_thw"] = torch.tensor([media.grid_thw for media, _ in pieces])
            types = self.family.token_types(self.config, made["input_ids"].numpy())
            made["mm_token_type_ids"] = torch.from_numpy(types).int()
        return made


def test_a_processors_prompts_train_as_the_tables_do() -> None:
    model, tokenizer = family_checkpoints.make_model("qwen2_vl")
    known = make_encoder("qwen2_vl", tokenizer, model.config)
    own = ProcessorEncoder(PlayedProcessor(tokenizer, model.config), "someones_vl", known.pixels)
    examples = [Example(id=q, question=q) for q in ("what color", "where is the red square")]
    clips = [make_clip("a", 4), make_clip("b", 2)]
    ids, lengths = responses(tokenizer)
    ids, lengths = ids[:4], lengths[:4]
    prompts = [known.encode(e, [c]) for e, c in zip(examples, clips, strict=True)]
    policy = Policy(model, tokenizer, shared_prefix=False)
    expected = policy.response_logps(prompts, ids, lengths)
    model.config.model_type = "someones_vl"
    made = [own.encode(e, [c]) for e, c in zip(examples, clips, strict=True)]
    assert [p.input_ids.tolist() for p in made] == [p.input_ids.tolist() for p in prompts]
    torch.testing.assert_close(policy.response_logps(made, ids, lengths), expected, rtol=0, atol=1e-6)
    rollout = PlainSampler(policy).sample(made, 2, SamplingParams(max_new_tokens=3, seed=0))
    again = policy.response_logps(made, rollout.token_ids, rollout.mask.sum(1))
    torch.testing.assert_close(again, rollout.logps[rollout.mask], rtol=1e-4, atol=1e-4)
    assert own.encode(examples[0], [clips[0]]).inputs is made[0].inputs  # remembered
    asked = dataclasses.replace(examples[0], asked="what color is it")  # the user's turn word for word
    assert len(own.encode(asked, [clips[0]]).input_ids) == len(made[0].input_ids) + 2


def test_a_processor_is_told_when_each_frame_was(tmp_path) -> None:
    """A minute in four frames: 0, 20, 39 and 59 s, where equal steps of the sampled rate would be 0, 15, 30 and 45."""
    path = write_video(tmp_path / "a.mp4", counter_frames(60), codec="libx264", fps=1)
    told = []

    class Listening(PlayedProcessor):
        def __call__(self, *args, video_metadata, **options) -> dict:
            told.extend(video_metadata)
            return super().__call__(*args, video_metadata=video_metadata, **options)

    model, tokenizer = family_checkpoints.make_model("qwen2_vl")
    pixels = make_encoder("qwen2_vl", tokenizer, model.config).pixels
    encoder = ProcessorEncoder(Listening(tokenizer, model.config), "someones_vl", pixels)
    for cut in ({}, {"video_start": 30.0}):
        clip = load_clip(path, sampling=FrameSampling(nframes=4, **cut))
        encoder.encode(Example(id="1", question="what"), [clip])
        assert told[-1].timestamps == pytest.approx(clip.timestamps)
        assert told[-1].sampled_fps == pytest.approx(clip.sample_fps)
    assert told[0].timestamps == pytest.approx([0, 20, 39, 59])
    assert [about.duration for about in told] == [60, 30]


def test_a_refusal_of_the_processor_is_one_line() -> None:
    model, tokenizer = family_checkpoints.make_model("qwen2_vl")
    processor = PlayedProcessor(tokenizer, model.config)
    processor.spec = None
    encoder = ProcessorEncoder(
        processor, "someones_vl", make_encoder("qwen2_vl", tokenizer, model.config).pixels
    )
    with pytest.raises(UsageError, match=r"row 3: the processor PlayedProcessor refuses the prompt: "):
        encoder.encode(Example(id="0", question="what", source="row 3"), [make_clip("a", 4)])


def test_values_of_tokens_are_padded_and_the_rest_is_joined() -> None:
    rows = [
        EncodedPrompt(
            torch.zeros(n, dtype=torch.int64), inputs={"types": torch.ones(1, n), "pixels": torch.ones(2, 5)}
        )
        for n in (3, 4)
    ]
    right, left = (processor_inputs(rows, 6, side) for side in ("right", "left"))
    assert right["types"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert left["types"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
    assert right["pixels"].shape == (4, 5)
    other = EncodedPrompt(torch.zeros(2, dtype=torch.int64), inputs={"pixels": torch.ones(2, 7)})
    with pytest.raises(UsageError, match=r"made pixels of the shapes \(2, 5\), \(2, 7\)"):
        processor_inputs([rows[0], other], 6, "right")


def test_what_is_missing_is_named(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"someones_vl.*pip install torchvision"):
        load_processor("folder", "someones_vl")
    text = SimpleNamespace(final_logit_softcapping=30.0)
    config = SimpleNamespace(model_type="someones_vl", get_text_config=lambda: text)
    with pytest.raises(UsageError, match="final_logit_softcapping changes its logits"):
        check_head(config)
    text.final_logit_softcapping = None
    check_head(config)


def test_a_scale_in_front_of_the_head_is_refused() -> None:
    from transformers import AutoConfig

    with pytest.raises(UsageError, match="inkling_mm_model: logits_mup_width_multiplier changes its logits"):
        check_head(AutoConfig.for_model("inkling_mm_model"))


def test_a_class_without_an_inner_model_is_refused() -> None:
    """Llama 4 keeps its decoder under another name, so what came out would be logits."""
    model, tokenizer = family_checkpoints.make_model("qwen2_vl")
    type(model).base_model_prefix, prefix = "nowhere", type(model).base_model_prefix
    try:
        with pytest.raises(UsageError, match="has no inner model that gives hidden states"):
            Policy(model, tokenizer, shared_prefix=False)
    finally:
        type(model).base_model_prefix = prefix


def test_masked_logits_are_refused() -> None:
    from transformers import AutoConfig

    with pytest.raises(UsageError, match="chameleon: it changes its logits"):
        check_head(AutoConfig.for_model("chameleon"))
