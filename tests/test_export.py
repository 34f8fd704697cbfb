"""A checkpoint as a folder for other programs: what it computes, what it holds, what is refused."""

import json
import resource
import shutil
import signal
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rlaif_fast import doctor
from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.evals.options import EvaluateConfig, configuration
from rlaif_fast.export import (
    BOTH,
    IMAGE,
    PARTIAL,
    VIDEO,
    checkpoint_of,
    export,
    main,
    probe,
    settings_of,
    write_settings,
)
from rlaif_fast.plan.model import shape_of
from rlaif_fast.policy.loading import ModelOptions, load_model
from rlaif_fast.policy.tiny import make_tiny
from rlaif_fast.runs.checkpoint import CheckpointStore, read_processor_files, save_model
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.runs.integrity import MANIFEST, Manifest, check_weights, digests, write_manifest
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.preflight import preflight

KILLED = """
import os, signal, sys
from pathlib import Path
from rlaif_fast import export as module

module.write_settings = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
module.export(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("base") / "tiny", ["What", "is", "shown"])


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    """A checkpoint of adapters that have learned something, and the log-probabilities with them in place."""
    folder = tmp_path_factory.mktemp("adapted") / "checkpoint"
    loaded = load_model(ModelOptions(model=str(base), lora_r=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    save_model(folder, loaded.model, loaded.tokenizer, read_processor_files(str(base)))
    return folder, probe(loaded)


def test_weights_are_exported_as_they_are(base, tmp_path, capsys):
    out = export(base, tmp_path / "out")
    ours, theirs = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "differ by at most 0.0e+00" in capsys.readouterr().out


@pytest.mark.parametrize("merge", [False, True])
def test_adapters(adapted, base, tmp_path, merge):
    from transformers import AutoModelForImageTextToText

    folder, expected = adapted
    out = export(folder, tmp_path / "out", merge=merge)
    assert (out / "adapter_config.json").is_file() != merge
    assert (out / "model.safetensors").is_file() == merge
    torch.testing.assert_close(probe(load_model(ModelOptions(model=str(out)))), expected, atol=1e-4, rtol=0)
    assert (probe(load_model(ModelOptions(model=str(base)))) - expected).abs().max() > 1e-2
    if merge:
        _, told = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"]


@pytest.fixture(scope="module")
def half(base, tmp_path_factory):
    """The base in bfloat16, which the decoder's part of the configuration says alone, and adapters of it."""
    folder, adapters = tmp_path_factory.mktemp("half") / "base", tmp_path_factory.mktemp("half") / "adapters"
    loaded = load_model(ModelOptions(model=str(base), dtype="bfloat16"))
    save_model(folder, loaded.model, loaded.tokenizer, read_processor_files(str(base)))
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("dtype") == config["text_config"]["dtype"] == "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_model(ModelOptions(model=str(folder), lora_r=4))
    save_model(adapters, loaded.model, loaded.tokenizer, read_processor_files(str(folder)))
    return folder, adapters


@pytest.mark.parametrize(
    ("dtype", "written"), [("auto", "bfloat16"), ("float32", "float32"), ("float16", "float16")]
)
@pytest.mark.parametrize("merge", [False, True])
def test_weights_are_written_in_the_dtype_asked_for(half, tmp_path, dtype, written, merge):
    words = [
        str(half[merge]),
        "--out",
        str(tmp_path / "out"),
        "--dtype",
        dtype,
        *(["--merge"] if merge else []),
    ]
    assert main(words) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, written)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == written


def test_merged_weights_are_rounded_once(adapted, tmp_path):
    folder, _ = adapted
    whole = load_file(export(folder, tmp_path / "whole", merge=True) / "model.safetensors")
    out = export(folder, tmp_path / "rounded", merge=True, dtype="bfloat16")
    rounded = load_file(out / "model.safetensors")
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in whole.items())


def test_the_doctor_and_a_plan_look_at_the_base_of_adapters(adapted, base, capsys):
    folder, _ = adapted
    assert doctor.main(["--model", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["adapters", "LoRA,", "of", str(base)]
    assert shape_of(str(folder)).to_dict() == shape_of(str(base)).to_dict()


def test_both_layouts(base, tmp_path):
    out = export(base, tmp_path / "out")
    template = (out / "chat_template.jinja").read_text()
    assert json.loads((out / "chat_template.json").read_text()) == {"chat_template": template}
    both = json.loads((out / BOTH).read_text())
    assert both["image_processor"] == json.loads((out / IMAGE).read_text())
    assert both["video_processor"] == json.loads((out / VIDEO).read_text())


def test_templates_with_names(base, tmp_path):
    """They ended the export behind the weights; the older layout has the one that is used unless asked."""
    source = shutil.copytree(base, tmp_path / "named")
    tokenizer = AutoTokenizer.from_pretrained(source)
    usual = tokenizer.chat_template
    tokenizer.chat_template = {"default": usual, "tool_use": f"{usual} "}
    (source / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(source)
    out = export(source, tmp_path / "out")
    assert json.loads((out / "chat_template.json").read_text()) == {"chat_template": usual}
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template


def test_the_older_layout_is_made_from_the_current_one(tmp_path):
    both = {
        "image_processor": {"patch_size": 4},
        "video_processor": {"patch_size": 8},
        "processor_class": "P",
    }
    write_settings(tmp_path, {BOTH: both}, None)
    expected = {IMAGE: both["image_processor"], VIDEO: both["video_processor"], BOTH: both}
    assert settings_of(tmp_path) == expected


def test_the_best_checkpoint_of_a_run_is_taken_and_has_to_be_whole(base, tmp_path):
    run = RunDir.create(tmp_path / "run")
    loaded = load_model(ModelOptions(model=str(base)))
    store = CheckpointStore(run.checkpoints, read_processor_files(str(base)))
    store.save("sft", loaded.model, loaded.tokenizer, {"step": 0}, sft=True, best=True)
    with torch.no_grad():
        next(loaded.model.parameters()).add_(1.0)
    store.save("rl-000001", loaded.model, loaded.tokenizer, {"step": 1}, last=True)
    ours = load_file(export(run.path, tmp_path / "out") / "model.safetensors")
    theirs = load_file(base / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    weights = run.checkpoints / "sft" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(RlaifFastError, match=r"model\.safetensors"):
        export(run.path, tmp_path / "again")
    shutil.rmtree(weights.parent)
    with pytest.raises(UsageError, match="no 'best' checkpoint; it was removed, or the run stopped before"):
        export(run.path, tmp_path / "again")


def test_what_is_refused(base, adapted, tmp_path):
    with pytest.raises(UsageError, match=r"merge: .* holds no LoRA adapters"):
        export(base, tmp_path / "out", merge=True)
    with pytest.raises(UsageError, match=r"dtype: LoRA adapters are written as they are, got 'bfloat16'"):
        export(adapted[0], tmp_path / "out", dtype="bfloat16")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(UsageError, match=r"out: .* is not empty"):
        export(base, tmp_path / "full")
    with pytest.raises(UsageError):
        export(tmp_path / "nothing", tmp_path / "out")
    run = RunDir.create(tmp_path / "run")
    with pytest.raises(UsageError, match=r"out: .* belongs to the run"):
        export(base, run.checkpoints / "mine")


def test_a_folder_that_computes_something_else_is_told(base, tmp_path, monkeypatch):
    from rlaif_fast import export as module

    def spoil(out, settings, template):
        weights = load_file(out / "model.safetensors")
        save_file({k: v * 1.01 for k, v in weights.items()}, out / "model.safetensors", {"format": "pt"})
        write_settings(out, settings, template)

    monkeypatch.setattr(module, "write_settings", spoil)
    with pytest.raises(RlaifFastError, match="log-probabilities differ from the checkpoint's by"):
        export(base, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []  # nothing that a server would load
    monkeypatch.undo()
    export(base, tmp_path / "out")


def test_an_export_that_was_killed_leaves_no_model_and_can_be_made_again(base, tmp_path):
    """At any moment: under its own name is only what is known to be right."""
    out = tmp_path / "out"
    words = [sys.executable, "-c", KILLED, str(base), str(out)]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    assert [path.name for path in out.iterdir()] == [PARTIAL]
    export(base, out)
    assert not (out / PARTIAL).exists() and (out / "config.json").is_file()


def test_what_the_system_refuses_to_write_is_named(base, tmp_path):
    out = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, before[1]))  # less than the weights, as on a full disk
    try:
        with pytest.raises(RlaifFastError, match=f"cannot write {out}: .*; raise the limit of file sizes"):
            export(base, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(out.iterdir()) == []


def test_the_name_reaches_the_hub(base, tmp_path, monkeypatch):
    calls = []
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(
            huggingface_hub.HfApi, name, lambda _, *a, _name=name, **k: calls.append((_name, a, k))
        )
    assert main([str(base), "--out", str(tmp_path / "out"), "--push", "me/mine"]) == 0
    assert calls == [
        ("create_repo", ("me/mine",), {"private": True, "exist_ok": True}),
        ("upload_folder", (), {"repo_id": "me/mine", "folder_path": str(tmp_path / "out")}),
    ]


def test_a_push_that_fails_leaves_the_folder_and_says_how_to_go_on(base, tmp_path, monkeypatch, capsys):
    """Exporting again into the folder is refused, and may take long; a name that cannot be is refused before it."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    out = tmp_path / "out"
    assert main([str(base), "--out", str(out), "--push", "me/mine/x y"]) == 2
    assert "error: push: Repo id must be" in capsys.readouterr().err and not out.exists()
    assert main([str(base), "--out", str(out), "--push", "me/mine"]) == 1
    said = capsys.readouterr().err
    assert f"{out} is whole, and was not uploaded (" in said
    assert said.endswith(f"upload it with: hf upload me/mine {out}\n")
    load_model(ModelOptions(model=str(out)))


def test_adapters_whose_base_has_moved_say_what_to_do(base, tmp_path):
    own, moved = shutil.copytree(base, tmp_path / "own"), tmp_path / "moved"
    loaded = load_model(ModelOptions(model=str(own), lora_r=4))
    checkpoint = tmp_path / "checkpoint"
    save_model(checkpoint, loaded.model, loaded.tokenizer, read_processor_files(str(own)))
    run = RunDir.create(tmp_path / "run")
    store = CheckpointStore(run.checkpoints, read_processor_files(str(own)))
    store.save("sft", loaded.model, loaded.tokenizer, {"step": 0}, best=True)
    own.rename(moved)
    for source in (checkpoint, run.path):
        with pytest.raises(UsageError, match="no such folder; bring it back, or put a link to its new place"):
            export(source, tmp_path / "out", merge=True)
    own.symlink_to(moved)
    for source in (checkpoint, run.path):
        export(source, tmp_path / f"out of {source.name}", merge=True)


def test_weights_that_are_not_as_they_were_written_are_refused(base, tmp_path):
    """Of a checkpoint that is named itself; what one may edit, or another program's manifest, is no damage."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(base, checkpoint)
    write_manifest(checkpoint, Manifest(order=1, files=digests(checkpoint)))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config, indent=1))
    assert checkpoint_of(checkpoint) == checkpoint
    weights = bytearray((checkpoint / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(weights)
    commands = [
        lambda: export(checkpoint, tmp_path / "out"),
        lambda: configuration(EvaluateConfig(model=str(checkpoint), data="test.jsonl")),
        lambda: preflight(TrainConfig(model=str(checkpoint), data="synthetic")),
        lambda: preflight(TrainConfig(sft=str(checkpoint), data="synthetic")),
    ]
    for command in commands:
        with pytest.raises(RlaifFastError, match=r"damaged: .*model.safetensors is not as it was written"):
            command()
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(RlaifFastError, match=r"model.safetensors is missing"):
        checkpoint_of(checkpoint)
    check_weights(checkpoint / "config.json")  # what is no folder is for others to refuse
    (checkpoint / MANIFEST).write_text('{"files": "of someone else"}')
    assert checkpoint_of(checkpoint) == checkpoint


def test_the_home_folder_is_known_by_its_sign(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main([str(base), "--out=~/out"]) == 0
    assert (tmp_path / "out" / "config.json").is_file() and not (tmp_path / "~").exists()
