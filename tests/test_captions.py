"""The captions of `bench/captions.py`: what they say, what a wrong one is worth, and the data made of worlds."""

import json

import captions
import pytest
import teacher

from rlaif_fast.comparison import read_plan
from rlaif_fast.oracle import RankRequest, build_oracle

TRUTH = "a red circle in the top left and a blue star in the bottom right"


@pytest.mark.parametrize(
    ("said", "worth"),
    [
        (TRUTH, 1.0),
        ("a blue star in the bottom right and a red circle in the top left", 1.0),  # the order does not count
        ("a red square in the top left and a blue star in the bottom right", 0.75),
        ("a red circle in the top left", 0.5),
        ("a red circle in the top right and a blue star in the bottom right", 1 / 3),  # 2 of 6
        (f"{TRUTH} and a green star in the top right", 2 / 3),
        (
            "a red circle in the top left and a green square in the top left and a blue star in the bottom right",
            1.0,
        ),
        ("red circle top left", 0.0),
        ("", 0.0),
    ],
)
def test_a_caption_is_worth_the_share_that_is_right(said, worth):
    assert captions.score(said, TRUTH) == pytest.approx(worth)


def test_the_oracle_ranks_by_that_share():
    oracle = build_oracle("callable", function="captions:scores")
    request = RankRequest(
        "1", captions.QUESTION, ("a red circle in the top left", TRUTH, ""), reference=TRUTH
    )
    [ranking] = oracle.rank([request])
    assert ranking.ranks == (1, 0, 2) and ranking.scores == (0.5, 1.0, 0.0)


def test_every_clip_gets_the_caption_of_its_world(tmp_path, monkeypatch):
    config = captions.SyntheticConfig
    small = {"sft_clips": 3, "rl_clips": 4, "validation_clips": 2, "test_clips": 3}
    monkeypatch.setattr(captions, "SyntheticConfig", lambda **given: config(**given | small))
    captions.make_data(tmp_path / "data", seed=5)
    for split, count in (("sft", 3), ("rl", 4), ("validation", 2), ("test", 3)):
        rows = [
            json.loads(line) for line in (tmp_path / f"data/captions-{split}.jsonl").read_text().splitlines()
        ]
        assert len(rows) == len({row["video"] for row in rows}) == count
        for row in rows:
            assert len(captions.facts(row["answer"])) == int(row["category"].split()[0])
            assert captions.score(row["answer"], row["answer"]) == 1.0
            assert (tmp_path / "data" / row["video"]).is_file()


def test_the_comparison_is_planned():
    plan = read_plan(captions.Path(captions.__file__).with_name("captions.yaml"))
    assert not plan.unused()
    assert {job.values["algorithm"] for job in plan.jobs() if job.after} == {"grpo", "grpo_rank", "gopo"}


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (teacher.main, ["--only", "nope"], "argument --only: invalid choice: 'nope'"),
        (captions.main, ["report", ""], "argument output_dir: expected a path, got ''"),
    ],
)
def test_a_name_that_is_none_is_refused_before_any_work(main, words, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["command", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert said in capsys.readouterr().err
