"""What a run settles before it begins: its values, its data, its oracle, and what a resumed one may change."""

import dataclasses
import json
import math
import re

import pytest
import yaml

from rlaif_fast.cli import given_values, packaged_config
from rlaif_fast.data.identity import contents
from rlaif_fast.data.schema import Example
from rlaif_fast.digests import text_digest
from rlaif_fast.errors import UsageError
from rlaif_fast.oracle import RankRequest
from rlaif_fast.oracle.wrappers import OracleFailedError
from rlaif_fast.runs.checkpoint import CheckpointIndex
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.runs.integrity import Manifest, sealed, write_manifest
from rlaif_fast.trainer import datasets, setup
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.preflight import check_oracle, preflight
from rlaif_fast.trainer.resolved import resolved
from rlaif_fast.trainer.resume import resumed_config, saved_config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epsilon": -1.0}, "epsilon must be finite and at least 0.0; got -1.0"),
        ({"delta": -1.0}, "delta must be finite and above 0.0"),
        ({"backend": "tritn"}, "backend: expected auto, triton, cuda, cpu, reference, got 'tritn'"),
        ({"max_grad_norm": 0.0}, "max_grad_norm: expected a positive number"),
        ({"eval_videos_per_step": 0}, "eval_videos_per_step: expected 1 or more"),
        (
            {"min_pixels": 4096, "max_pixels": 1024},
            r"min_pixels: expected 1 to max_pixels \(1024\), got 4096",
        ),
        ({"min_frames": 9, "max_frames": 8}, r"min_frames: expected 1 to max_frames \(8\), got 9"),
        (
            {"steps_per_generation": 5, "videos_per_step": 2, "questions_per_video": 2},
            r"steps_per_generation: expected 1 to videos_per_step \* questions_per_video \(4\)",
        ),
        ({"min_pixels": 2048, "total_pixels": 2047}, r"at least min_pixels \(2048\).*got 2047"),
        ({"lora_r": -1}, "lora_r: expected 0 or more"),
        ({"entropy_coef": math.nan}, "entropy_coef must be finite"),
        ({"learning_rate": math.inf}, "learning_rate: expected a positive number"),
    ],
)
def test_bad_values_are_met_at_the_start(values, words):
    with pytest.raises(UsageError, match=words):
        TrainConfig(**values)


def test_defaults_are_for_a_real_model_and_tiny_yaml_has_the_toys():
    real = dataclasses.asdict(TrainConfig())
    toy = real | yaml.safe_load(packaged_config("tiny.yaml").read_text())
    assert (real["max_completion_length"], toy["max_completion_length"]) == (256, 12)
    assert (real["learning_rate"], toy["learning_rate"]) == (1e-6, 4e-4)
    assert (real["sft_learning_rate"], toy["sft_learning_rate"]) == (1e-5, 1e-3)
    for name in ("min_pixels", "max_pixels", "total_pixels", "max_frames"):
        assert real[name] == yaml.safe_load(packaged_config("qwen3_vl_4b.yaml").read_text()).get(
            name, real[name]
        )
    assert toy["min_pixels"] == toy["max_pixels"] == 1024
    assert (toy["max_frames"], toy["total_pixels"], toy["eval_videos_per_step"]) == (768, None, 64)


def write_rows(path, videos, answer="red"):
    """A file with one question about each of the videos, which nobody decodes."""
    lines = []
    for video in videos:
        (path.parent / video).write_bytes(f"video {video}".encode())
        lines.append(json.dumps({"video": video, "question": "Which colour?", "answer": answer}))
    path.write_text("\n".join(lines) + "\n")
    return path


def names(rows):
    return [row.videos[0].rpartition("/")[2] for row in rows]


def test_rows_about_evaluated_media_are_not_learned_from(tmp_path):
    write_rows(tmp_path / "sft.jsonl", ["a.mp4", "b.mp4", "c.mp4"])
    write_rows(tmp_path / "rl.jsonl", ["a.mp4", "c.mp4", "d.mp4"])
    write_rows(tmp_path / "validation.jsonl", ["b.mp4"])
    write_rows(tmp_path / "test.jsonl", ["c.mp4"])
    notes = []
    data = datasets.load_data(TrainConfig(data=str(tmp_path)), note=notes.append)
    assert names(data.sft) == ["a.mp4"] and names(data.rl) == ["a.mp4", "d.mp4"]
    assert notes == [
        "Left out: 2 sft rows about media of validation or test.",
        "Left out: 1 rl rows about media of validation or test.",
    ]


def test_one_shared_picture_is_enough_to_leave_a_row_out():
    def row(name, images):
        return Example(id=name, question=f"Which {name}?", videos=(), images=images, answer="red")

    rows = {
        "sft": [row("1", ("a.png", "b.png")), row("2", ("c.png",))],
        "rl": [row("3", ())],
        "validation": [row("4", ("b.png", "d.png"))],
        "test": [row("5", ())],
    }
    datasets.drop_evaluated_media(rows, contents(row for split in rows.values() for row in split))
    assert [row.id for row in rows["sft"]] == ["2"]
    assert [row.id for row in rows["rl"]] == ["3"]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("test.json", "test_data"),
        ("test.parquet", "test_data"),
        ("val.jsonl", "validation_data"),
        ("sft.csv", "sft_data"),
    ],
)
def test_a_file_of_a_split_that_a_folder_would_not_read_is_told(tmp_path, name, key):
    write_rows(tmp_path / "rl.jsonl", [f"{i}.mp4" for i in range(9)])
    write_rows(tmp_path / name, ["a.mp4"])
    with pytest.raises(UsageError, match=f"{name} would not be read.* give it as {key}"):
        datasets.load_data(TrainConfig(data=str(tmp_path)))
    own = write_rows(tmp_path / "own.jsonl", ["a.mp4"])
    assert datasets.load_data(TrainConfig(data=str(tmp_path), **{key: str(own)})).rl


@pytest.mark.parametrize("kind", ["saved", "parquet", "shards", "several", "dict"])
def test_a_folder_of_tables_is_a_dataset(tmp_path, kind):
    library = pytest.importorskip("datasets")
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "rows.jsonl", [f"{i}.mp4" for i in range(10)])
    lines = (tmp_path / "rows" / "rows.jsonl").read_text().splitlines()
    table, folder = library.Dataset.from_list(list(map(json.loads, lines))), tmp_path / "folder"
    (folder / "data").mkdir(parents=True)
    if kind == "saved":
        table.save_to_disk(str(folder))
    elif kind == "dict":
        library.DatasetDict({"train": table, "test": table}).save_to_disk(str(folder))
    else:
        table.to_parquet(
            str(folder / ("rows.parquet" if kind == "parquet" else "data/train-00000-of-00002.parquet"))
        )
        if kind == "several":
            table.to_parquet(str(folder / "data/test-00000-of-00001.parquet"))
    config = TrainConfig(data=str(folder), media_root=str(tmp_path / "rows"))
    if kind in ("several", "dict"):
        with pytest.raises(UsageError, match="holds several splits"):
            datasets.load_data(config)
    else:
        loaded = datasets.load_data(config)
        assert len(loaded.rl) + len(loaded.validation) + len(loaded.test) == 10


def test_supervised_rows_of_another_file_do_not_leak_into_what_is_held_out(tmp_path):
    videos = [f"{i}.mp4" for i in range(20)]
    data = write_rows(tmp_path / "data.jsonl", videos)
    own = write_rows(tmp_path / "own.jsonl", videos)
    notes = []
    config = TrainConfig(data=str(data), sft_data=str(own))
    loaded = datasets.load_data(config, note=notes.append)
    held = {*names(loaded.validation), *names(loaded.test)}
    assert len(held) == 4
    assert set(names(loaded.sft)) == set(names(loaded.rl)) == set(videos) - held
    assert notes == ["Left out: 4 sft rows about media of validation or test."]
    notes.clear()
    datasets.load_data(TrainConfig(data=str(data)), note=notes.append)
    assert notes == []


def test_everything_leaking_is_refused(tmp_path):
    data = write_rows(tmp_path / "data.jsonl", ["a.mp4", "b.mp4"])
    with pytest.raises(UsageError, match="every row of the rl split is about media of validation or test"):
        datasets.load_data(TrainConfig(data=str(data), validation_data=str(data), test_data=str(data)))


def test_preflight_needs_scores_for_zscore(tmp_path):
    (tmp_path / "verdicts.jsonl").write_text('{"question": "?", "responses": ["a", "b"], "ranks": [0, 1]}\n')
    scores = TrainConfig(advantage="zscore", oracle="reference")
    preflight(scores)
    only_orders = {"oracle": "replay", "oracle_options": {"path": str(tmp_path / "verdicts.jsonl")}}
    with pytest.raises(UsageError, match="grpo_rank with advantage zscore needs scores"):
        check_oracle(TrainConfig(advantage="zscore", **only_orders))
    with pytest.raises(UsageError, match="needs option 'model'"):
        preflight(TrainConfig(oracle="local"))


def test_the_window_of_the_circuit_breaker_is_an_oracle_option():
    config = TrainConfig(oracle="callable", oracle_options={"function": f"{__name__}:cannot", "window": 4})
    oracle = setup.make_oracle(config)
    with pytest.raises(OracleFailedError, match="2 of the last 2 groups"):
        oracle.rank([RankRequest(str(n), "?", ("a", "b")) for n in range(2)])


def cannot(request):
    raise ValueError


@pytest.mark.parametrize(
    ("oracle", "options", "words"),
    [
        ("reference", {"window": "abc"}, "window: expected a whole number of at least 1, got 'abc'"),
        ("local", {"model": "x", "window": 0}, "window: expected a whole number of at least 1, got 0"),
        ("reference", {"max_invalid_fraction": 0.1}, "set the run's own key max_invalid_fraction"),
        ("reference", {"name": "api"}, "set the run's own key oracle"),
        ("reference", {"cache": 5}, "cache: expected the path of a file, got 5"),
        ("reference", {"tolerance": "abc"}, "option 'tolerance': expected a number, got 'abc'"),
        ("replay", {"path": 5}, "option 'path': expected a text or a path, got 5"),
        ("local", {"model": "x", "batch_size": "8"}, "option 'batch_size': expected a whole number, got '8'"),
        (
            "local",
            {"model": "x", "orders": True},
            "option 'orders': expected a whole number or null, got True",
        ),
        (
            "api",
            {"model": "x", "extra_body": "a"},
            "option 'extra_body': expected an object or null, got 'a'",
        ),
        ("api", {"model": "x", "timeout": math.nan}, "option 'timeout': expected a number, got nan"),
        (
            "shuffled",
            {"inner": {"name": "reference", "window": 8}},
            "window: expected no value where max_invalid_fraction is null, got 8",
        ),
        (
            "shuffled",
            {"inner": {"name": "reference", "tolerance": "x"}},
            "option 'tolerance': expected a number",
        ),
    ],
)
def test_an_oracle_option_that_does_not_fit_is_named(oracle, options, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        check_oracle(TrainConfig(oracle=oracle, oracle_options=options))


def test_preflight_keeps_the_checkpoint_that_the_run_starts_from(tmp_path):
    run = RunDir.create(tmp_path / "run")
    (run.checkpoints / "sft").mkdir()
    config = TrainConfig(
        sft=str(run.checkpoints / "sft"), output_dir=str(run.path), overwrite_output_dir=True
    )
    with pytest.raises(UsageError, match=r"sft: .* is a checkpoint of the run that overwrite_output_dir"):
        preflight(config)


def test_a_folder_whose_name_begins_with_tiny_is_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_run").mkdir()
    assert setup.is_tiny("tiny") and not setup.is_tiny("tiny_run")
    with pytest.raises(UsageError, match="unknown tiny model 'tiny_walk'"):
        setup.is_tiny("tiny_walk")


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """The folder of a run that was started where its data lies."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "data.jsonl", ["a.mp4"])
    run = RunDir.create(tmp_path / "run")
    config = resolved(TrainConfig(data="data.jsonl", device="cpu", num_processes=2))
    run.config.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    return run


def test_a_run_is_resumed_from_another_folder(begun, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = resumed_config(begun, {"resume": "../run", "output_dir": "../run", "num_processes": 2})
    assert config.data == str(tmp_path / "data.jsonl")
    assert (config.model, config.num_processes, config.resume) == ("tiny", 2, str(begun.path))


def test_words_that_name_no_path_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "synthetic", "auto", "mine"):
        (tmp_path / name).mkdir()
    config = resolved(TrainConfig(media_root="mine"))
    assert (config.model, config.data, config.sft) == ("tiny", "synthetic", "auto")
    assert config.media_root == str(tmp_path / "mine")


def test_resume_changes_what_it_may_and_refuses_the_rest(begun):
    config = resumed_config(
        begun, {"learning_rate": 1e-9, "data": "data.jsonl", "oracle_options": {"tie": 0.1}}
    )
    assert (config.learning_rate, config.oracle_options) == (1e-9, {"tie": 0.1})
    with pytest.raises(UsageError, match=r"resume: beta, seed cannot change.* learning_rate"):
        resumed_config(begun, {"beta": 0.5, "seed": 3, "learning_rate": 1e-9})
    with pytest.raises(UsageError, match="resume: output_dir cannot change"):
        resumed_config(begun, {"output_dir": "another"})
    with pytest.raises(UsageError, match="keys do not belong"):
        resumed_config(begun, {"oracle_options": {"api_key": "x"}})


DAMAGES = {
    "cut": lambda text: text[: len(text) // 2],
    "cut in a number": lambda text: text[: text.index(b"max_pixels: ") + len(b"max_pixels: 26")],
    "edited": lambda text: text.replace(b"nframes: null", b"nframes: 9"),
    "of another type": lambda text: text.replace(b"seed: 0", b"seed: abc"),
    "no YAML": lambda text: b"seed: [",
    "no keys": lambda text: b"",
    "no text": lambda text: b"\xff\xfe\x00",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_configuration_is_noticed(begun, damage):
    whole = begun.config.read_bytes()
    saved = saved_config(begun)
    begun.config.write_bytes(DAMAGES[damage](whole))
    assert begun.config.read_bytes() != whole
    if damage != "edited":  # nothing vouches for it before the first checkpoint
        with pytest.raises(UsageError, match=r"config\.yaml is damaged"):
            saved_config(begun)
    begun.config.write_bytes(whole)
    checkpoint = begun.checkpoints / "rl-000001"
    checkpoint.mkdir()
    write_manifest(checkpoint, Manifest(1, {}, config=whole.decode()))
    index = CheckpointIndex(last=checkpoint.name, config_sha256=text_digest(whole.decode()))
    (begun.checkpoints / "index.json").write_text(sealed(dataclasses.asdict(index)))
    told: list[str] = []
    assert saved_config(begun, told.append) == saved and not told
    begun.config.write_bytes(DAMAGES[damage](whole))
    assert saved_config(begun, told.append) == saved
    assert told == [f"damaged: {begun.config} is not as it was written; the checkpoint's copy is used"]


def test_resume_with_other_processes_has_to_be_asked_for(begun, monkeypatch):
    assert resumed_config(begun, {"num_processes": 3}).num_processes == 3
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="expected the 2 that the run began with, got 4"):
        resumed_config(begun, {})
    assert resumed_config(begun, {"num_processes": 4}).num_processes == 4


def test_given_values_are_those_of_the_command_alone(tmp_path):
    (tmp_path / "mine.yaml").write_text("beta: 0.5\n")
    words = ["--config", str(tmp_path / "mine.yaml"), "--report=true", "--oracle_options", '{"tie": 0.1}']
    assert given_values(TrainConfig, words, prog="p", description="d") == {
        "beta": 0.5,
        "report": True,
        "oracle_options": {"tie": 0.1},
    }
