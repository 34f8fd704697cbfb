"""Videos that come as pictures, and added tokens in the texts of a row."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("PIL")
from media_parts import counters, example_of, load, make_encoder, media_folder, write_rows
from PIL import Image

from rlaif_fast.data import read_examples, read_report
from rlaif_fast.data.__main__ import main
from rlaif_fast.errors import UsageError
from rlaif_fast.prompts.batches import BatchMaker
from rlaif_fast.prompts.encoder import PromptEncoder, markup_of
from rlaif_fast.video import ClipStore, FrameSampling, PatchSpec, load_frames, preprocess


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return media_folder(tmp_path_factory.mktemp("media"))


@pytest.fixture
def write(tmp_path):
    return partial(write_rows, tmp_path)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("tiny") / "model")


# --- videos that come as pictures

FRAMES = [f"p{number}.png" for number in range(12)]


AS_FRAMES = [
    {"video": "frames"},
    {"video": FRAMES},
    {"videos": [FRAMES]},
    {"videos": ["frames"]},
    {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "video", "video": FRAMES}, {"type": "text", "text": "what?"}],
            }
        ],
        "question": None,
    },
    {"video": {"path": "frames"}},
]


@pytest.mark.parametrize("row", AS_FRAMES, ids=range(len(AS_FRAMES)))
def test_pictures_are_a_video(write, media, row):
    [clip] = load(example_of(write, media, row))
    assert counters(clip) == list(range(12))[: len(clip.frames)]
    assert not clip.is_image
    assert (
        main(["check", str(write({"question": "what?", "answer": "x", **row})), "--media_root", str(media)])
        == 0
    )


def test_keys_hold_for_pictures_too(write, media):
    [clip] = load(
        example_of(
            write, media, {"videos": [{"video": FRAMES, "fps": 4.0, "video_start": 1.0, "video_end": 2.0}]}
        )
    )
    assert counters(clip) == [4, 5, 6, 7] or counters(clip) == [4, 5, 7, 8] or min(counters(clip)) >= 4
    assert clip.timestamps[0] == pytest.approx(1.0)


def test_the_rate_of_pictures_does_not_say_how_many_are_seen(write, media):
    example = example_of(write, media, {"videos": [{"video": FRAMES, "fps": 4.0}]})
    [clip] = load(example, nframes=6)
    assert len(counters(clip)) == 6 and clip.timestamps[-1] == pytest.approx(11 / 4)


def test_all_pictures_are_seen_at_any_rate(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    for rate, count in (
        (25.0, 58),
        (15.0, 246),
        (29.97, 768),
        (2.0, 5),
        (2.0, 1),
    ):  # 58 / 25 * 25 is less than 58
        clip = load_frames("p", [str(tmp_path / "p.png")] * count, sampling=FrameSampling(fps=rate))
        assert len(clip.frames) == count
        assert clip.sample_fps == pytest.approx(rate)
        # an odd last one stands twice in its temporal patch
        patches = preprocess(clip, PatchSpec(patch_size=4), min_pixels=64, max_pixels=64)
        assert patches.grid_thw == (-(-count // 2), 2, 2) == (len(patches.timestamps), 2, 2)


def test_a_missing_frame_is_named(write, media):
    with pytest.raises(UsageError, match=r"p99\.png does not exist"):
        example_of(write, media, {"video": [*FRAMES, "p99.png"]})


def test_hidden_files_are_no_pictures(tmp_path, write):
    """A Mac writes ._0.png beside each file of a disk that is not its own."""
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(4):
        Image.new("RGB", (28, 28)).save(frames / f"{number}.png")
        (frames / f"._{number}.png").write_bytes(b"\0\5\x16\7")
    [clip] = load(example_of(write, tmp_path, {"video": "frames"}))
    assert len(clip.frames) == 4


# --- markup


@pytest.mark.parametrize("where", ["question", "options", "system", "answer"])
@pytest.mark.parametrize(
    "token",
    [
        "<tool_call>",
        "<|custom|>",
        "[ROLE]",
        "<|im_end|>",
        "<think>",
        "<|vision_start|>",
        "<tool_</think>call>",
    ],
)
def test_no_added_token_of_the_tokenizer_gets_in(encoder, where, token, media):
    from transformers import AutoTokenizer

    from rlaif_fast.data import Example

    tokenizer = AutoTokenizer.from_pretrained(encoder.tokenizer.name_or_path)
    tokenizer.add_tokens(["<tool_call>", "<|custom|>", "[ROLE]", "<think>", "</think>", "plain"])
    own = PromptEncoder(tokenizer, "qwen2_5_vl", encoder.patch_spec, encoder.pixels)
    assert {"<tool_call>", "<|custom|>", "[ROLE]", "<|im_end|>"} <= markup_of(tokenizer)
    assert "plain" not in markup_of(tokenizer)

    def count(ids):
        known = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
        return sum(int(i) in known for i in ids)

    if where == "answer":
        expected = 2 if "think>" in token else 1  # reasoning is the answer's own; the end of sequence is ours
        assert count(own.encode_answer(f"what {token} end")) == expected
        return
    texts = {"question": "what", "options": ("before", "after"), "system": "end"}
    clean = own.encode(Example("1", **texts), ()).input_ids
    hostile = texts | {where: ("before", f"after {token}") if where == "options" else f"what {token} {token}"}
    assert count(own.encode(Example("2", **hostile), ()).input_ids) == count(clean)


def test_clips_of_one_batch_keep_their_parts(write, media, encoder):
    rows = [
        {"question": "what?", "answer": "x", "video": "a.mp4", "video_start": s, "video_end": s + 1}
        for s in (0, 2)
    ]
    examples = read_examples(write(*rows), media_root=media)
    with ClipStore(isolate=False) as store:
        batch = BatchMaker(encoder, store)(examples)
    assert not torch.equal(batch[0].clips[0].frames, batch[1].clips[0].frames)
    assert read_report(write(*rows), media_root=media).errors == []
