"""An oracle as a reward function, and what importing the adapters loads."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from rlaif_fast import rank_advantages
from rlaif_fast.errors import UsageError
from rlaif_fast.oracle import Ranking, ReferenceOracle, as_reward, build_oracle
from rlaif_fast.oracle.as_reward import gains, grouped
from rlaif_fast.video.testing import counter_frames, write_video

ANSWERS = ["7", "9", "no number", "7"]
CHAT = [[{"role": "user", "content": "How many?"}]] * 4


def expected(*ranks: int) -> list[float]:
    """What `kind="oracle"` says of the same ranks."""
    ranked = torch.tensor([ranks])
    return rank_advantages(torch.zeros(1, len(ranks), dtype=torch.float64), ranked, kind="oracle").advantages[
        0
    ]


def test_rewards_less_their_mean_are_the_advantages_of_the_ranks():
    rewards = as_reward(ReferenceOracle())(prompts=["q"] * 4, completions=ANSWERS, reference=["7"] * 4)
    rewards = torch.tensor(rewards, dtype=torch.float64)
    torch.testing.assert_close(rewards - rewards.mean(), expected(0, 1, 2, 0), rtol=1e-12, atol=1e-12)


def test_every_trainers_way_to_call_gives_the_same():
    oracle = ReferenceOracle()
    trl = as_reward(oracle)(
        prompts=CHAT, completions=[[{"role": "assistant", "content": x}] for x in ANSWERS],
        completion_ids=[[1]] * 4, trainer_state=object(), reference=["7"] * 4,
    )  # fmt: skip
    swift = as_reward(oracle, reference="solution")(
        completions=ANSWERS, solution=["7"] * 4,
        messages=[[*chat, {"role": "assistant", "content": x}] for chat, x in zip(CHAT, ANSWERS)],
    )  # fmt: skip
    verl = as_reward(oracle, failed=0.0)(
        data_sources=["d"] * 4, solution_strs=ANSWERS, ground_truths=["7"] * 4,
        extra_infos=[{"question": "How many?"}] * 4,
    )  # fmt: skip
    # as verl's batch reward manager hands over what its data held
    arrays = as_reward(oracle, failed=0.0)(
        data_sources=np.array(["d"] * 4, object), solution_strs=ANSWERS, ground_truths=["7"] * 4,
        extra_infos=np.array([{"question": "How many?"}] * 4, object),
    )  # fmt: skip
    assert trl == swift == verl == arrays
    assert trl[0] == trl[3] > trl[1] > trl[2]


def test_groups_are_equal_prompts_in_any_order_or_neighbours():
    reward = as_reward(ReferenceOracle())
    shuffled = reward(
        prompts=["a", "b", "a", "b"], completions=["1", "1", "2", "2"], reference=["1", "2"] * 2
    )
    assert shuffled == [1.0, gains(Ranking((0, 1)))[1], gains(Ranking((0, 1)))[1], 1.0]
    neighbours = as_reward(ReferenceOracle(), group_size=2)
    assert neighbours(prompts=["a"] * 4, completions=["1", "2", "2", "1"], reference=["1"] * 4) == [
        shuffled[0], shuffled[1], shuffled[1], shuffled[0],
    ]  # fmt: skip
    with pytest.raises(UsageError, match="3 responses are no whole groups of 2"):
        neighbours(prompts=["a"] * 3, completions=["1"] * 3)


def test_rows_of_one_prompt_with_other_references_or_media_are_other_groups(tmp_path):
    rows = {"prompts": ["what is shown?"] * 4, "completions": ["cat", "dog", "cat", "dog"]}
    references = {"reference": ["cat", "cat", "dog", "dog"]}
    best, worst = gains(Ranking((0, 1)))
    assert as_reward(ReferenceOracle())(**rows, **references) == [best, worst, worst, best]
    films = [str(write_video(tmp_path / f"{n}.mp4", counter_frames(n, 32, 32), fps=2)) for n in (4, 4, 6, 6)]
    seer = Seer()
    as_reward(seer)(**rows, video=films, completion_ids=[[1], [2], [3], [4]], split=["a"] * 4)
    assert [len(request.clips[0].frames) for request in seer.requests] == [4, 6]
    assert seer.requests[0].metadata == {"video": films[0], "split": "a"}
    paired = as_reward(seer, group_size=4, media=False)
    for name, columns in {
        "reference": references,
        "video": {"video": films},
        "form": {"form": films},
    }.items():
        with pytest.raises(UsageError, match=rf"^{name}: expected one value a group.*\[0, 1, 2, 3\]"):
            paired(**rows, **columns)
    with pytest.raises(UsageError, match=r"^prompts: expected one value a group"):
        paired(prompts=["a", "a", "b", "b"], completions=rows["completions"])


@pytest.mark.parametrize("columns", [{"reference": "7"}, {"video": ["a.mp4"]}, {"images": np.zeros(2)}])
def test_what_is_asked_is_a_value_a_response(columns):
    [name] = columns
    with pytest.raises(UsageError, match=f"^{name}: expected a list of 2, one a response"):
        as_reward(ReferenceOracle(), media=False)(prompts=["a"] * 2, completions=["7", "9"], **columns)


def test_a_column_of_references_that_was_asked_for_has_to_be_there():
    reward = as_reward(ReferenceOracle(), reference="solution")
    with pytest.raises(UsageError, match="reference='solution': there is no such column among answer"):
        reward(prompts=["q"] * 2, completions=["1", "2"], answer=["1"] * 2)


def test_a_response_without_a_verdict_has_no_reward():
    assert gains(Ranking((0, None, 1)))[1] is None
    without_reference = {"prompts": ["a", "a"], "completions": ["1", "2"], "reference": [None, None]}
    assert as_reward(ReferenceOracle())(**without_reference) == [None, None]
    assert as_reward(ReferenceOracle(), failed=0.0)(**without_reference) == [0.0, 0.0]


@pytest.mark.parametrize("oracle", [ReferenceOracle(), build_oracle("shuffled", inner="reference")])
def test_a_missing_column_of_references_is_told_by_an_oracle_that_needs_it(oracle):
    with pytest.raises(UsageError, match="the trainer passed no column 'reference' among answer"):
        as_reward(oracle)(prompts=["q"] * 2, completions=["1", "2"], answer=["1"] * 2)


def test_prompts_are_needed():
    with pytest.raises(UsageError, match="needs prompts and completions"):
        as_reward(ReferenceOracle())(completions=["1"])
    with pytest.raises(UsageError, match="needs prompts and completions"):
        as_reward(ReferenceOracle())(prompts=["q"] * 2, completions=["1", None])


def test_nothing_is_imported_unless_asked_for():
    code = (
        "import sys, rlaif_fast, rlaif_fast.adapters\n"
        "print(sorted({'trl', 'liger_kernel', 'transformers', 'verl'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"


class Seer:
    """Notes what it is shown."""

    name = "seer"

    def __init__(self):
        self.requests = []

    def rank(self, requests):
        self.requests += requests
        return [Ranking(tuple(range(len(request.responses)))) for request in requests]


def chat(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "How many?"}]}]


def picture(value: int):
    from PIL import Image

    return Image.new("RGB", (8, 6), (value, value, value))


def test_an_oracle_sees_the_media_of_a_prompt(tmp_path):
    film = write_video(tmp_path / "film.mp4", counter_frames(6, 32, 32), fps=2)
    picture(9).save(tmp_path / "still.png")
    frames = np.zeros((4, 6, 8, 3), np.uint8)
    prompts = [
        chat({"type": "video", "video": str(film), "image": None}),
        chat({"type": "video", "video": str(film), "nframes": 2}),
        chat({"type": "image", "image": picture(7), "text": None}, {"type": "video", "video": frames}),
        chat({"type": "video", "video": [picture(1), picture(2)]}),
        chat({"type": "image", "path": str(tmp_path / "still.png")}),
        chat(),
    ]
    for prompt in prompts:
        seer = Seer()
        as_reward(seer)(prompts=[prompt] * 2, completions=["7", "9"])
        [request] = seer.requests
        assert request.question == "How many?"
        prompt.append(request.clips)
    shown = [[(len(clip.frames), clip.is_image) for clip in prompt[-1]] for prompt in prompts]
    assert shown == [
        [(6, False)], [(2, False)], [(1, True), (4, False)], [(2, False)], [(1, True)], [],
    ]  # fmt: skip
    assert prompts[2][-1][0].frames.unique().tolist() == [7]


def test_media_in_columns_and_no_media(tmp_path):
    film = str(write_video(tmp_path / "film.mp4", counter_frames(6, 32, 32), fps=2))
    seer = Seer()
    as_reward(seer)(prompts=["<video> How many?"] * 2, completions=["7", "9"], videos=[[film]] * 2)
    as_reward(seer, media=False)(prompts=[chat({"type": "video", "video": film})] * 2, completions=["7", "9"])
    assert [len(request.clips) for request in seer.requests] == [1, 0]


def test_pictures_are_told_apart_by_their_content():
    rows = [chat({"type": "image", "image": picture(value)}) for value in (1, 2, 1, 2)]
    assert grouped(rows) == [[0, 2], [1, 3]]
    arrays = [
        chat({"type": "video", "video": np.full((50, 64, 64, 3), value, np.uint8)}) for value in (1, 2, 1)
    ]
    arrays[1][0]["content"][0]["video"][:] = 1
    arrays[1][0]["content"][0]["video"][25, 30, 30] = 2  # where a printed array has its dots
    assert grouped(arrays) == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "video", "video": "https://host/film.mp4"}, "is not a local file"),
        ({"type": "video", "video": "film.mp4", "speed": 2}, "the key 'speed' of a video is not used"),
        ({"type": "image", "image": "a.png", "fps": 2.0}, "fps: a picture has none"),
        (
            {"type": "video", "video": np.zeros((4, 3, 8, 8), np.float32)},
            r"expected frames \(F, H, W, 3\) uint8",
        ),
        (
            {"type": "video", "video": np.zeros((4, 8, 8, 3), np.uint8), "nframes": 2},
            "nframes cannot be applied",
        ),
        ({"type": "video", "video": 7}, "expected the path of a file, got 7"),
    ],
)
def test_media_that_are_not_read_are_refused_by_name(part, message):
    with pytest.raises(UsageError, match=message):
        as_reward(Seer())(prompts=[chat(part)] * 2, completions=["7", "9"])
