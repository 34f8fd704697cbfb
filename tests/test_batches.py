"""From rows to encoded prompts: each file is loaded once for all rows that ask about it."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from rlaif_fast.data.benchmarks import Item
from rlaif_fast.data.schema import Example
from rlaif_fast.distributed.world import World
from rlaif_fast.errors import UsageError
from rlaif_fast.evals.runner import run_items
from rlaif_fast.policy.loading import load_model
from rlaif_fast.policy.tiny import make_tiny
from rlaif_fast.prompts.batches import EpochOrder, by_media
from rlaif_fast.trainer.evaluation import evaluate
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.setup import make_batch_maker
from rlaif_fast.video import VideoError
from rlaif_fast.video.testing import counter_frames, write_video


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    folder = make_tiny(tmp_path_factory.mktemp("model") / "tiny", ["what", "moves"])
    config = TrainConfig(model=str(folder), device="cpu", min_pixels=1024, max_pixels=1024)
    with make_batch_maker(load_model(config), config) as made:
        yield made


def rows_about(paths) -> list[Example]:
    return [
        Example(id=f"{i}-{k}", question=f"what moves {k}", videos=(str(path),), answer="what")
        for i, path in enumerate(paths)
        for k in range(4)
    ]


def test_a_file_is_loaded_once_for_its_rows_and_for_what_was_begun_ahead(maker, tmp_path):
    paths = [write_video(tmp_path / f"{i}.mp4", counter_frames(8 + i)) for i in range(3)]
    rows, before = rows_about(paths), maker.store.stats.clips
    maker.prefetch(rows)
    prompts = maker(rows)
    assert [prompt.example.id for prompt in prompts] == [row.id for row in rows]
    assert maker.store.stats.clips - before == len(paths)
    assert len({prompt.media[0].key for prompt in prompts}) == len(paths)
    again = maker(rows[:4])  # not begun ahead: from the cache
    assert again[0].clips[0].key == prompts[0].clips[0].key
    assert maker.store.stats.clips - before == len(paths) + 1


def test_rows_of_a_bad_file_are_left_out(maker, tmp_path):
    good, bad = write_video(tmp_path / "good.mp4", counter_frames(8)), tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    maker.store.max_bad_fraction = 1.0
    rows = rows_about([bad, good])
    maker.prefetch(rows)
    assert [prompt.example.id for prompt in maker(rows)] == [row.id for row in rows[4:]]
    assert maker.store.stats.bad_files.keys() == {str(bad)}


def test_grey_frames_have_the_times_of_what_they_hide(maker, tmp_path):
    paths = [write_video(tmp_path / f"{fps}.mp4", counter_frames(8), fps=fps) for fps in (4, 8)]
    Image.fromarray(next(counter_frames(1))).save(tmp_path / "p.png")
    rows = [*rows_about(paths), Example("p", "what moves 0", images=(str(tmp_path / "p.png"),))]
    maker.blank_frames = False
    seen = maker(rows)
    maker.blank_frames = True
    try:
        grey = maker(rows)
    finally:
        maker.blank_frames = False
    for prompt, blank in zip(seen, grey, strict=True):
        [clip], [media], [hidden] = prompt.clips, prompt.media, blank.media
        assert (blank.clips[0].frames == 128).all() and blank.clips[0].sample_fps == clip.sample_fps
        assert (hidden.seconds_per_grid, hidden.timestamps) == (media.seconds_per_grid, media.timestamps)
        assert hidden.grid_thw == media.grid_thw and hidden.is_video == media.is_video
        assert blank.input_ids.tolist() == prompt.input_ids.tolist()
        assert not hidden.patches.equal(media.patches)


def test_rows_about_the_same_media_stay_together():
    rows = rows_about(["a.mp4", "b.mp4"])
    mixed = [rows[0], rows[4], rows[1], Example(id="text", question="why")]
    assert [[row.id for row in group] for group in by_media(mixed)] == [["0-0", "0-1"], ["1-0"], ["text"]]


def test_order_fills_the_last_step_of_an_epoch_from_the_next():
    order = EpochOrder(range(5), per_step=2, seed=3)
    visited = [item for step in range(5) for item in order.step(step)]
    assert sorted(visited[:5]) == sorted(visited[5:]) == list(range(5))
    assert order.step(1) == EpochOrder(range(5), per_step=2, seed=3).step(1)


def test_a_count_below_what_the_model_sees_at_a_time_is_refused_before_any_file_is(tmp_path):
    loaded = load_model(TrainConfig(model=str(make_tiny(tmp_path / "tiny", ["what"])), device="cpu"))
    with pytest.raises(
        UsageError, match="nframes is 1, and the model sees 2 frames at a time; give that many"
    ):
        make_batch_maker(loaded, TrainConfig(device="cpu", nframes=1))


def test_a_video_has_the_time_and_the_workers_that_the_configuration_gives(tmp_path):
    """An hour of 720p takes minutes to decode on one core: whoever has such videos gives them the time."""
    path = write_video(tmp_path / "a.mp4", counter_frames(8))
    config = TrainConfig(model=str(make_tiny(tmp_path / "tiny", ["what"])), device="cpu", decode_timeout=1e-4)
    config.decode_workers = 3
    with (
        make_batch_maker(load_model(config), config) as made,
        pytest.raises(VideoError, match=r"took longer than 0.0001 s"),
    ):
        assert made.store.workers == len(made.store._pool._all) == 3
        made.store.load(str(path))


@pytest.mark.parametrize("changes", [{"decode_timeout": 0.0}, {"decode_workers": 0}])
def test_no_time_and_no_worker_are_refused(changes):
    with pytest.raises(UsageError, match=next(iter(changes))):
        TrainConfig(**changes).check_data()


@pytest.mark.parametrize("published", [False, True])
def test_an_evaluation_decodes_the_next_videos_while_it_answers(maker, tmp_path, monkeypatch, published):
    paths = [write_video(tmp_path / f"{i}.mp4", counter_frames(8 + i)) for i in range(5)]
    rows, asked, seen = rows_about(paths)[::4], [], []
    submit = maker.store.submit
    monkeypatch.setattr(maker.store, "submit", lambda medium: asked.append(medium.path) or submit(medium))

    def answers(prompts, *_):
        seen.append((len(prompts), len(asked)))
        return ["what"] * len(prompts)

    if published:
        items = [Item(row) for row in rows]
        rest = {"grader": None, "reasons": False, "world": World(), "advance": lambda count: None}
        run_items(
            items, None, maker, answers, category="kind", is_right=lambda *_: True, videos_per_step=2, **rest
        )
    else:

        def sample(*given):
            texts = answers(*given)
            return SimpleNamespace(texts=texts, finished=torch.ones(len(texts), dtype=torch.bool))

        sampler = SimpleNamespace(sample=sample)
        scorer = SimpleNamespace(is_correct=lambda *_: True)
        found = evaluate(rows, maker, sampler, scorer=scorer, max_new_tokens=1, videos_per_step=2)
        assert [one.example.id for one in found.predictions] == [row.id for row in rows]
    assert seen == [(2, 4), (2, 5), (1, 5)]
    assert asked == [str(path) for path in paths]
