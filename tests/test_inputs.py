"""A run goes on with what it began with: rows, media and model files that were replaced are named, and not used."""

import json
import random
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import SMALL, metrics

from rlaif_fast import evaluate as evaluate_module
from rlaif_fast import train as train_module
from rlaif_fast.cli import packaged_config
from rlaif_fast.data import Example, SyntheticConfig, make_dataset
from rlaif_fast.distributed.world import World
from rlaif_fast.errors import UsageError
from rlaif_fast.export import export
from rlaif_fast.policy.model_files import ADAPTER_BASE, BASE, file_prints
from rlaif_fast.policy.tiny import build_tokenizer, make_tiny, words_of
from rlaif_fast.runs.checkpoint import CheckpointStore
from rlaif_fast.runs.files import read_jsonl
from rlaif_fast.runs.folder import MARKER, RunDir
from rlaif_fast.trainer import rl, sft
from rlaif_fast.trainer.inputs import refuse_other_data, refuse_other_model, tokenizer_difference
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.run import Datasets
from rlaif_fast.trainer.seeds import seed_step

WORDS = ("What", "is", "shown", "red", "blue")
CLIPS = SyntheticConfig(
    seed=2, sft_clips=6, rl_clips=6, validation_clips=3, test_clips=3, questions_per_clip=2
)


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dataset and a model in folders of their own."""
    root = tmp_path_factory.mktemp("made")
    data = make_dataset(root / "data", CLIPS)
    rows = [row for path in root.glob("data/*.jsonl") for row in read_jsonl(path)]
    words = words_of([*(row["question"] for row in rows), *(row["answer"] for row in rows)])
    make_tiny(root / "model", words, seed=1)
    make_tiny(root / "other", words, seed=2)
    return data.root.parent


def command(root, folder, **changes) -> list[str]:
    values = SMALL | {"max_steps": 3, "eval_steps": 1, "videos_per_step": 2, "gallery_clips": 0}
    values |= {
        "data": root / "data",
        "model": root / "model",
        "output_dir": folder,
        "max_completion_length": 12,
    }
    values |= {
        "sft": "none",
        "lora_r": 4,
        "lora_dropout": 0.1,
        "sft_steps": None,
        "sft_videos_per_step": None,
    } | changes
    values = {
        key: value for key, value in values.items() if not key.startswith("synthetic") and value is not None
    }
    return [
        "--config",
        str(packaged_config("tiny.yaml")),
        *(f"--{key}={value}" for key, value in values.items()),
    ]


def stop_in(patched, module, name, calls) -> None:
    """Let a function of a stage fail as a killed process does, behind so many calls."""
    original, seen = getattr(module, name), []

    def dying(*args):
        seen.append(1)
        if len(seen) > calls:
            raise Killed
        return original(*args)

    patched.setattr(module, name, dying)


@pytest.fixture(scope="module")
def whole(made):
    assert train_module.main(command(made, made / "whole")) == 0
    return RunDir(made / "whole")


@pytest.fixture(scope="module")
def stopped(made):
    """A run that drops out, killed behind two of its three steps; no test writes into it."""
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        stop_in(patched, rl, "sample_and_rank", 2)
        train_module.main(command(made, made / "stopped"))
    return RunDir(made / "stopped")


def test_a_run_goes_on_where_its_data_were_moved(whole, stopped, made, tmp_path, capsys):
    run = RunDir(shutil.copytree(stopped.path, tmp_path / "run"))
    moved = shutil.copytree(made / "data", tmp_path / "moved")
    rows = (moved / "test.jsonl").read_text()
    (moved / "test.jsonl").write_text(rows.replace("What", "Who").replace("what", "who"))
    words, before = ["--resume", str(run.path), f"--data={moved}"], run.config.read_text()
    assert train_module.main(words) == 2
    assert "data: not the rows" in capsys.readouterr().err and run.config.read_text() == before
    (moved / "test.jsonl").write_text(rows)
    assert train_module.main(words) == 0
    assert metrics(run.path) == metrics(whole.path)
    assert f"data: {moved}\n" in run.config.read_text()


@pytest.mark.parametrize("version", ["this", "an earlier"])
def test_a_run_with_dropout_that_was_killed_ends_alike(whole, stopped, version, tmp_path):
    run = RunDir(shutil.copytree(stopped.path, tmp_path / "run"))
    marker = json.loads((run.path / MARKER).read_text())
    if version == "an earlier":
        known = {name: marker[name] for name in ("format", "created", "data")}
        (run.path / MARKER).write_text(json.dumps(known))
    assert train_module.main(["--resume", str(run.path)]) == 0
    assert metrics(run.path) == metrics(whole.path)
    assert json.loads((run.path / MARKER).read_text()) == marker


def test_supervised_steps_with_dropout_that_were_killed_end_alike(made, tmp_path):
    changes = {"sft": "auto", "sft_steps": 6, "sft_videos_per_step": 2, "max_steps": 1}
    assert train_module.main(command(made, tmp_path / "whole", **changes)) == 0
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        stop_in(patched, sft, "accumulate", 5)
        train_module.main(command(made, tmp_path / "run", **changes))
    assert train_module.main(["--resume", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_dropout_differs_by_process_stage_and_step():
    drawn = set()
    for seed, rank, stage, step in [
        (0, 0, "sft", 0),
        (1, 0, "sft", 0),
        (0, 1, "sft", 0),
        (0, 0, "rl", 0),
        (0, 0, "rl", 1),
    ]:
        for _ in range(2):
            seed_step(TrainConfig(seed=seed), World(rank, 2), stage, step)
            drawn.add((torch.rand(()).item(), random.random(), np.random.rand()))
    assert len(drawn) == 5


def other_weights(root):
    shutil.copy(root / "other/model.safetensors", root / "model")
    return "model: not the files that .* began with: model.safetensors; bring them back"


def other_ids(root):
    path = root / "model/tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    path.write_text(json.dumps(values))
    return "model: not the files that .* began with: tokenizer.json; "


def other_pictures(root):
    path = root / "model/preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.0] * 3}))
    return "model: not the files that .* began with: preprocessor_config.json; "


def one_more_one_less(root):
    (root / "model/generation_config.json").rename(root / "model/old.json")
    return r"began with: generation_config.json \(gone\), old.json \(not there before\); "


def other_clips(root):
    clips = [root / f"data/videos/rl/{number:05d}.mp4" for number in range(6)]
    contents = [clip.read_bytes() for clip in clips]
    for clip, content in zip(clips, contents[1:] + contents[:1]):
        clip.write_bytes(content)
    return "data: not the media files that .* began with: rl; bring them back"


def other_forms(root):
    rows = list(read_jsonl(root / "data/rl.jsonl"))
    rows = [row | {"metadata": row["metadata"] | {"form": ".*"}} for row in rows]
    (root / "data/rl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "data: not the metadata of the rows that .* began with: rl; bring them back"


CHANGES = [other_weights, other_ids, other_pictures, one_more_one_less, other_clips, other_forms]


@pytest.fixture
def kept(made, tmp_path):
    """The dataset and the models, put back behind a test that changes them."""
    for name in ("data", "model"):
        shutil.copytree(made / name, tmp_path / "kept" / name)
    yield made
    for name in ("data", "model"):
        shutil.rmtree(made / name)
        shutil.copytree(tmp_path / "kept" / name, made / name)


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_go_on_with_an_input_that_was_replaced(stopped, kept, change, capsys):
    words, before = change(kept), files_of(stopped.checkpoints)
    assert train_module.main(["--resume", str(stopped.path)]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert files_of(stopped.checkpoints) == before


def other_answers(root):
    rows = list(read_jsonl(root / "data/test.jsonl"))
    rows[0]["answer"] = rows[1]["answer"] = "a bird."
    (root / "data/test.jsonl").write_text("".join(json.dumps(row | {"metadata": {}}) + "\n" for row in rows))
    return r"not the rows that .* began with: test \(6 rows, 6 rows before\); bring them back, or give what is there"


def other_test_clips(root):
    clips = [root / f"data/videos/test/{number:05d}.mp4" for number in range(2)]
    first, second = (clip.read_bytes() for clip in clips)
    clips[0].write_bytes(second)
    clips[1].write_bytes(first)
    return (
        "not the media files that .* began with: test; bring them back, or give what is there now as --data"
    )


@pytest.mark.parametrize("change", [other_answers, other_test_clips])
def test_a_run_is_not_evaluated_on_other_rows_under_its_name(whole, kept, change, tmp_path, capsys):
    run = RunDir(shutil.copytree(whole.path, tmp_path / "run"))
    marker = (run.path / MARKER).read_bytes()
    words = change(kept)
    assert evaluate_module.main(["--run", str(run.path)]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert evaluate_module.main(["--run", str(run.path), "--data", str(kept / "data/test.jsonl")]) == 0
    assert (run.path / MARKER).read_bytes() == marker
    # A run of an earlier version does not know what its rows were, and an evaluation does not make it known.
    known = {name: json.loads(marker)[name] for name in ("format", "created")}
    (run.path / MARKER).write_text(json.dumps(known))
    assert evaluate_module.main(["--run", str(run.path)]) == 0
    assert json.loads((run.path / MARKER).read_text()) == known
    (run.path / MARKER).write_bytes(marker[:30])
    capsys.readouterr()
    assert evaluate_module.main(["--run", str(run.path)]) == 2
    assert f"{run.path / MARKER} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("change", [other_weights, other_ids])
def test_adapters_are_not_put_on_another_base(whole, kept, change, tmp_path, capsys):
    best = CheckpointStore(whole.checkpoints, {}, read_only=True).path("best")
    plain = export(whole.path, tmp_path / "plain")
    name = change(kept) and {other_weights: "model.safetensors", other_ids: "tokenizer.json"}[change]
    words = f"LoRA adapters that were trained on other files than {kept / 'model'} has now: {name}; bring them back"
    for folder in (whole.path, best, plain):
        with pytest.raises(UsageError, match=re.escape(words)):
            export(folder, tmp_path / "out", merge=True)
    evaluate = ["--data", str(kept / "data/test.jsonl"), "--max_pixels=1024", "--min_pixels=1024"]
    for words_of_command in (["--run", str(whole.path)], ["--model", str(best), *evaluate]):
        assert evaluate_module.main(words_of_command) == 2
        assert words in capsys.readouterr().err
    for start in ({"model": best}, {"sft": best}):
        assert train_module.main(command(kept, tmp_path / "run", **start)) == 2
        assert words in capsys.readouterr().err
    (plain / ADAPTER_BASE).unlink()  # from elsewhere, or of an earlier version
    assert export(plain, tmp_path / "out", merge=True)
    (plain / ADAPTER_BASE).write_text("[")
    with pytest.raises(UsageError, match=f"{ADAPTER_BASE} is damaged"):
        export(plain, tmp_path / "again", merge=True)


def test_adapters_that_are_trained_on_name_the_base_of_the_first(whole, made, tmp_path):
    first = CheckpointStore(whole.checkpoints, {}, read_only=True).path("best")
    assert train_module.main(command(made, tmp_path / "run", model=first, max_steps=1)) == 0
    record = json.loads((tmp_path / "run/checkpoints/sft" / ADAPTER_BASE).read_text())
    assert record == file_prints(str(made / "model"))
    kept = json.loads((tmp_path / "run" / MARKER).read_text())["model"]
    assert {name.removeprefix(BASE) for name in kept if name.startswith(BASE)} == record.keys()


def test_a_start_with_other_tokens_is_refused(made, tmp_path, capsys):
    start = shutil.copytree(made / "model", tmp_path / "model")
    other_ids(tmp_path)
    changes = {"sft": start, "lora_r": None, "lora_dropout": None, "max_steps": 1}
    assert train_module.main(command(made, tmp_path / "run", **changes)) == 2
    err = capsys.readouterr().err
    assert (
        f"sft: {start} does not fit the model: its tokenizer differs: of 2 tokens the id ('blue' is " in err
    )
    (start / "tokenizer.json").write_text("{}")
    assert train_module.main(command(made, tmp_path / "run", **changes)) == 2
    assert f"sft: {start}: its tokenizer cannot be read: " in capsys.readouterr().err
    for path in start.glob("*token*"):  # weights alone say nothing of tokens
        path.unlink()
    assert train_module.main(command(made, tmp_path / "run", **changes)) == 0


def test_how_tokenizers_differ():
    ours = build_tokenizer(WORDS)
    assert tokenizer_difference(ours, build_tokenizer(WORDS)) is None
    assert "of 1 tokens the id ('zebra' is " in tokenizer_difference(ours, build_tokenizer([*WORDS, "zebra"]))
    for name, value, words in [
        ("eos_token", "<|endoftext|>", "eos_token is '<|endoftext|>', not '<|im_end|>'"),
        ("bos_token", "<|im_start|>", "bos_token is '<|im_start|>', not None"),
        ("pad_token", "<|im_end|>", None),
        ("unk_token", "red", "special in one of them alone is <|unknown|>, red"),
    ]:
        other = build_tokenizer(WORDS)
        other.add_special_tokens({name: value})
        assert tokenizer_difference(ours, other) == words


def test_an_input_is_kept_at_first_and_compared_afterwards(tmp_path):
    run = RunDir.create(tmp_path / "run")
    row = Example("1", "What?", "red", metadata={"form": "(.*)"})
    data = Datasets(sft=[row], rl=[row], validation=[row], test=[row], metric="accuracy")
    for _ in range(2):
        refuse_other_data(run, data)
        refuse_other_model(run, {"config.json": "aa"})
    with pytest.raises(UsageError, match=r"not the rows that .*run began with: rl \(2 rows, 1 rows before\)"):
        refuse_other_data(run, replace(data, rl=[row, row]))
    with pytest.raises(UsageError, match=r"not the metadata of the rows that .*run began with: test;"):
        refuse_other_data(run, replace(data, test=[replace(row, metadata={})]))
    with pytest.raises(UsageError, match=r"model: not the files that .*run began with: config.json; "):
        refuse_other_model(run, {"config.json": "bb"})
    refuse_other_model(run, {})  # one that cannot be found is for loading to refuse
