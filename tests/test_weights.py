"""Weights are loaded whole or refused by name; files beside them are found in every layout; flags have effect."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.policy.loading import ModelOptions, check_lora, load_model
from rlaif_fast.runs.checkpoint import load_weights, read_processor_files, save_model
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.preflight import check_model

LORA = {"lora_r": 4, "lora_alpha": 8}


def load(model, **options):
    return load_model(ModelOptions(model=str(model), device="cpu", dtype="float32", **options))


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory) -> Path:
    """Adapters that have learned something."""
    loaded = load(tiny, **LORA)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in loaded.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    target = tmp_path_factory.mktemp("adapters") / "learned"
    save_model(target, loaded.model, loaded.tokenizer, {})
    return target


def rewrite(path: Path, change) -> None:
    weights = load_file(path)
    save_file(change(weights), path, metadata={"format": "pt"})


def without(part):
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


def renamed(old, new):
    return lambda weights: {name.replace(old, new): value for name, value in weights.items()}


def wider(part):
    return lambda weights: {
        name: torch.cat([value, value]) if part in name else value for name, value in weights.items()
    }


CHANGES = {
    "a layer is gone": (without("layers.1."), r"missing \(.*layers\.1"),
    "one tensor is gone": (without("layers.0.mlp.up_proj"), r"1 missing \(.*up_proj"),
    "another prefix": (renamed("language_model", "text_model"), r"missing \(.*; .*unexpected \(.*text_model"),
    "an extra tensor": (
        lambda w: w | {"model.language_model.layers.77.mlp.up_proj.weight": torch.ones(2)},
        r"1 unexpected \(.*layers\.77",
    ),
    "another shape": (wider("layers.0.mlp.down_proj"), "1 of another shape"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_fits_in_part_is_refused(folder, tiny, name):
    change, words = CHANGES[name]
    rewrite(folder / "model.safetensors", change)
    with pytest.raises(UsageError, match=words) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    loaded = load(tiny)
    before = {n: p.clone() for n, p in loaded.model.named_parameters()}
    with pytest.raises(UsageError, match="fits the model only in part"):
        load_weights(loaded.model, folder)
    assert all(p.equal(before[n]) for n, p in loaded.model.named_parameters())


ADAPTER_CHANGES = {
    "an old key prefix": (renamed("base_model.model.", "model."), r"28 missing|missing \("),
    "a layer is gone": (without("layers.1."), r"missing \(.*layers\.1"),
    "one of a pair is gone": (without("layers.0.mlp.up_proj.lora_B"), r"1 missing \(.*lora_B"),
    "an extra tensor": (
        lambda w: w | {"base_model.model.x.lora_A.weight": torch.ones(2)},
        r"1 unexpected \(",
    ),
    "another shape": (wider("layers.0.mlp.up_proj.lora_B"), "1 of another shape"),
}


@pytest.mark.parametrize("name", ADAPTER_CHANGES)
def test_adapters_that_fit_in_part_are_refused(tiny, adapters, tmp_path, name):
    change, words = ADAPTER_CHANGES[name]
    copy = Path(shutil.copytree(adapters, tmp_path / "adapters"))
    rewrite(copy / "adapter_model.safetensors", change)
    with pytest.raises(UsageError, match=words):
        load_weights(load(tiny, **LORA).model, copy)
    with pytest.raises(UsageError, match="fits the model only in part"):
        load(copy)


def test_adapters_of_another_scale_are_refused(tiny, adapters):
    with pytest.raises(
        UsageError, match=r"trained with lora_alpha 8, and the run has 16; set lora_alpha to 8"
    ):
        load_weights(load(tiny, lora_r=4, lora_alpha=16).model, adapters)
    with pytest.raises(UsageError, match=r"trained with lora_r 4, and the run has 2"):
        load_weights(load(tiny, lora_r=2, lora_alpha=8).model, adapters)
    with pytest.raises(UsageError, match=r"unexpected \("):
        load_weights(load(tiny, **LORA, lora_target_modules=["q_proj"]).model, adapters)
    with pytest.raises(UsageError, match="holds LoRA adapters, and the run has none"):
        load_weights(load(tiny).model, adapters)
    with pytest.raises(UsageError, match=r"holds no adapter_config\.json"):
        load_weights(load(tiny, **LORA).model, tiny)
    model = load(tiny, **LORA).model
    load_weights(model, adapters)
    loaded = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    assert loaded and all(weight.any() for weight in loaded)


def test_a_folder_of_adapters_loads_its_base(tiny, adapters):
    merged, base = load(adapters), load(tiny)
    assert any("merged into the weights" in note for note in merged.notes)
    assert all(p.requires_grad for p in merged.model.parameters())
    weights = dict(base.model.named_parameters())
    saved = load_file(adapters / "adapter_model.safetensors")
    for name, weight in merged.model.named_parameters():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in saved:
            delta = 2.0 * saved[f"{stem}.lora_B.weight"] @ saved[f"{stem}.lora_A.weight"]
            torch.testing.assert_close(weight, weights[name] + delta)
        else:
            assert weight.equal(weights[name])
    continued = load(adapters, **LORA).model
    assert {n for n, p in continued.named_parameters() if p.requires_grad} == {
        n for n, _ in continued.named_parameters() if "lora_" in n
    }
    with pytest.raises(UsageError, match="set lora_alpha to 8"):
        load(adapters, lora_r=4, lora_alpha=32)
    check_model(str(adapters))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", ["cut", "pointer", "junk"])
def test_damaged_weights_are_told_in_a_line(folder, tmp_path, name, damage):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if name.endswith("safetensors"):
        save_file(weights, folder / name, metadata={"format": "pt"})
    else:
        torch.save(weights, folder / name)
    load(folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(
        {"cut": whole[: len(whole) // 2], "pointer": LFS, "junk": b"junk" * 99}[damage]
    )
    with pytest.raises(UsageError) as refusal:
        load(folder)
    assert str(folder) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_damaged_adapters_are_told_in_a_line(adapters, tmp_path):
    copy = Path(shutil.copytree(adapters, tmp_path / "adapters"))
    (copy / "adapter_model.safetensors").write_bytes(LFS)
    with pytest.raises(UsageError, match="its weights cannot be read"):
        load(copy)


def test_adapters_whose_layers_are_a_regular_expression_are_merged(tiny, tmp_path):
    """As ms-swift and others write them."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, target_modules=r".*language_model.*\.(q_proj|up_proj)|.*visual.*\.qkv", init_lora_weights=False
    )
    whole = get_peft_model(load(tiny).model, config)
    whole.peft_config["default"].base_model_name_or_path = str(tiny)
    whole.save_pretrained(tmp_path)
    assert isinstance(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"], str)
    merged = load(tmp_path).model.eval()
    ids = torch.arange(20, 40)[None]
    torch.testing.assert_close(merged(input_ids=ids).logits, whole.eval()(input_ids=ids).logits)
    rewrite(tmp_path / "adapter_model.safetensors", without("layers.1."))
    with pytest.raises(UsageError, match="fits the model only in part"):
        load(tmp_path)


def test_rslora_adapters_compute_what_peft_computes(tiny, adapters, tmp_path):
    """Merged, and trained on: scaled by alpha / sqrt(r), which is twice alpha / r where r is 4."""
    from peft import PeftModel

    copy = Path(shutil.copytree(adapters, tmp_path / "adapters"))
    saved = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(saved | {"use_rslora": True}))
    ids = torch.arange(20, 40)[None]
    whole = PeftModel.from_pretrained(load(tiny).model, str(copy)).eval()(input_ids=ids).logits
    on = load(copy, use_rslora=True, **LORA)
    save_model(tmp_path / "on", on.model, on.tokenizer, {})
    assert json.loads((tmp_path / "on/adapter_config.json").read_text())["use_rslora"] is True
    for model in (load(copy).model, on.model, load(tmp_path / "on").model):
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, whole)
    assert not torch.allclose(load(adapters).model.eval()(input_ids=ids).logits, whole)
    with pytest.raises(UsageError, match="use_rslora True, and the run has False; set use_rslora to True"):
        load(copy, **LORA)
    with pytest.raises(UsageError, match="use_rslora False, and the run has True; set use_rslora to False"):
        load(adapters, use_rslora=True, **LORA)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, "holds adapters of the type IA3, and those of LoRA are taken alone"),
        ({"revision": "v2"}, "trained on the revision v2 of"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights 'pissa_niter_4', which changes the weights",
        ),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"alora_invocation_tokens": [3, 4]}, r"trained with alora_invocation_tokens \[3, 4\]"),
        ({"use_dora": True}, "trained with use_dora True"),
        ({"modules_to_save": ["lm_head"]}, "trained with modules_to_save"),
        ({"someones_new_setting": 2}, "trained with someones_new_setting 2"),
    ],
)
def test_adapters_that_compute_something_else_are_refused(adapters, tmp_path, settings, words):
    """Of all these the weights themselves look like those of plain LoRA."""
    copy = Path(shutil.copytree(adapters, tmp_path / "adapters"))
    saved = json.loads((copy / "adapter_config.json").read_text())
    harmless = {
        "lora_dropout": 0.3,
        "init_lora_weights": "gaussian",
        "peft_version": "99",
        "loftq_config": {},
    }
    (copy / "adapter_config.json").write_text(json.dumps(saved | harmless))
    load(copy)
    (copy / "adapter_config.json").write_text(json.dumps(saved | settings))
    for options in ({}, LORA):
        with pytest.raises(UsageError, match=words):
            load(copy, **options)


def test_a_run_in_place_of_a_model_is_told_with_the_command_that_writes_its_model(tmp_path):
    run = RunDir.create(tmp_path / "run")
    with pytest.raises(UsageError, match=f"it is a run: `python -m rlaif_fast.export {run.path} --out DIR`"):
        check_model(str(run.path))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "qwen3_vl"}'),
            "size of the model is not known",
        ),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "size of the model is not known"),
        (shutil.rmtree, "there is no such folder"),
    ],
)
def test_a_folder_that_does_not_say_what_it_is(folder, tiny, damage, words):
    damage(folder)
    for refused in (lambda: load(folder), lambda: check_model(str(folder))):
        with pytest.raises(UsageError, match=words):
            refused()
    with pytest.raises(UsageError, match=words):
        load_weights(load(tiny).model, folder)


@pytest.mark.parametrize("name", ["./qwen", "/models/qwen", "~/qwen", "../a", "a/b/c", "tests/qwen"])
def test_a_mistyped_folder_is_said_not_to_exist(name, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(UsageError, match="there is no such folder"):
        check_model(name)


def test_processor_files_of_every_layout(folder, tiny):
    usual = load(tiny)
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | {"image_mean": [0.1, 0.2, 0.3]}
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(RlaifFastError, match=r"no preprocessor_config\.json or processor_config\.json"):
        load(folder)
    for part in ("image_processor", "video_processor"):
        (folder / "processor_config.json").write_text(json.dumps({part: settings}))
        assert load(folder).patch_spec.mean == (0.1, 0.2, 0.3)
        assert "processor_config.json" in read_processor_files(str(folder))

    template = usual.tokenizer.chat_template
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    tokens.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UsageError, match="has no chat template"):
        load(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load(folder).tokenizer.chat_template == template
    (folder / "chat_template.json").unlink()
    (folder / "chat_template.jinja").write_text(template)
    assert load(folder).tokenizer.chat_template == template


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"lora_r": 4, "freeze_vision_tower": False},
            "freeze_vision_tower: false has no effect beside lora_r 4",
        ),
        ({"lora_r": 4, "freeze_projector": False}, "freeze_projector: false has no effect"),
        ({"lora_r": 4, "freeze_language_model": False}, "freeze_language_model: false has no effect"),
        ({"lora_r": 4, "lora_target_modules": []}, "lora_target_modules: expected at least one"),
        ({"lora_r": 4, "lora_alpha": 0}, "lora_alpha: expected 1 or more"),
    ],
)
def test_lora_flags_without_effect_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        TrainConfig(**options)


def test_lora_flags_with_effect_are_taken():
    check_lora(ModelOptions(lora_r=4, freeze_vision_tower=True))
    check_lora(ModelOptions(freeze_vision_tower=False))


@pytest.mark.parametrize("names", [["nothing"], ["q_proj", "nothing"], ["q_pro"], ["q.proj"], ["proj"]])
def test_target_modules_that_match_nothing_or_only_some_are_refused(tiny, names):
    with pytest.raises(
        UsageError, match=rf"no linear layer of the language model is named {names[-1]}; there are"
    ):
        load(tiny, lora_r=2, lora_target_modules=names)


def test_code_of_a_checkpoint_is_never_run(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"cannot load.*never run here"):
        load(folder)
    with pytest.raises(UsageError, match=r"cannot load.*never run here"):
        check_model(str(folder))
    assert not ran.exists()
