"""Which parts of a model train, in families whose parts have different names."""

from __future__ import annotations

import dataclasses
import json

import family_checkpoints
import pytest
import torch
from safetensors import safe_open
from torch import nn

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.families import FAMILIES
from rlaif_fast.policy.families.base import PARTS
from rlaif_fast.policy.loading import ModelOptions
from rlaif_fast.policy.parts import FREEZING, add_lora, apply_freezing, lora_layers


@pytest.mark.parametrize("model_type", ["internvl", "smolvlm", "glm4v"])
def test_each_part_is_frozen_alone(model_type) -> None:
    model, _ = family_checkpoints.make_model(model_type)
    part_of = FAMILIES[model_type].part_of
    assert {part_of(name) for name, _ in model.named_parameters()} == set(PARTS)
    for part in PARTS:
        apply_freezing(model, dataclasses.replace(ModelOptions(), **{FREEZING[part]: True}))
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (part_of(name) != part), name


def test_adapters_go_where_they_are_asked_for_by_a_list_of_names() -> None:
    model, _ = family_checkpoints.make_model("internvl")
    part_of = FAMILIES["internvl"].part_of
    assert {part_of(name) for name in lora_layers(model, ["decoder"], None)} == {"decoder"}
    assert {part_of(name) for name in lora_layers(model, list(PARTS), None)} == set(PARTS)
    assert all(name.endswith("q_proj") for name in lora_layers(model, ["tower"], ["q_proj"]))
    with pytest.raises(UsageError, match="projector is named q_proj"):
        lora_layers(model, ["projector"], ["q_proj"])
    adapted = add_lora(model, ModelOptions(lora_r=2, lora_modules=["decoder"]))
    assert not isinstance(adapted.peft_config["default"].target_modules, str)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    assert all("language_model" in name and ".lora_" in name for name in trained)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.float16, torch.float32)],
)
def test_adapters_compute_in_bfloat16_where_the_model_does(dtype, expected) -> None:
    """Of float16, which cannot be trained, they are float32, as peft makes them."""
    model, _ = family_checkpoints.make_model("internvl")
    adapted = add_lora(model.to(dtype), ModelOptions(lora_r=2))
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {expected}


def test_a_layer_keeps_its_input_once_for_weight_and_adapter() -> None:
    model, _ = family_checkpoints.make_model("internvl")
    layer = next(
        module
        for name, module in add_lora(model.bfloat16(), ModelOptions(lora_r=2)).named_modules()
        if name.endswith("q_proj") and hasattr(module, "lora_A")
    )
    x, kept = torch.randn(6, layer.in_features, dtype=torch.bfloat16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    inputs = {t.untyped_storage().data_ptr() for t in kept if t.numel() == x.numel()}
    assert inputs == {x.untyped_storage().data_ptr()}


def test_the_router_is_frozen_unless_asked_for() -> None:
    model, _ = family_checkpoints.make_model("qwen3_vl_moe")
    routers = [p for name, p in model.named_parameters() if ".mlp.gate." in name]
    for asked in (False, True):
        apply_freezing(model, ModelOptions(train_router=asked))
        assert [p.requires_grad for p in routers] == [asked] * len(routers)
    assert len(routers) == 2
    layers = lora_layers(model, ["decoder"], None)
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    dense, _ = family_checkpoints.make_model("qwen3_vl")
    with pytest.raises(UsageError, match="train_router: true has no effect"):
        apply_freezing(dense, ModelOptions(train_router=True))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "granitemoe", "gpt_oss"])
def test_a_router_is_known_by_any_of_its_names(kind) -> None:
    text = {"model_type": kind, "num_local_experts": 4} | family_checkpoints.TEXT | family_checkpoints.MOE
    values = family_checkpoints.RECIPES["internvl"][0] | {"text_config": text}
    model, _ = family_checkpoints.make_model("internvl", values=values)
    apply_freezing(model, ModelOptions())
    frozen = [module for module in model.modules() if type(module).__name__.endswith(("Router", "Gating"))]
    assert len(frozen) == 2
    assert not any(p.requires_grad for module in frozen for p in module.parameters())
    assert sum(not p.requires_grad for p in model.parameters()) == sum(
        1 for m in frozen for _ in m.parameters()
    )


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@pytest.mark.parametrize("parts", [["decoder"], list(PARTS)], ids=["decoder", "every part"])
def test_an_adapter_is_saved_in_the_form_that_vllm_reads(model_type, parts, tmp_path) -> None:
    """Plain LoRA, layers by a list of names, and weights under the base model's own names of them."""
    model, _ = family_checkpoints.make_model(model_type)
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if model_type == "gemma3" and "projector" in parts:
        with pytest.raises(UsageError, match="lora_modules: no layer of the projector would get an adapter"):
            lora_layers(model, parts, None)  # its projector is no linear layer
        parts = [part for part in parts if part != "projector"]
    chosen = lora_layers(model, parts, None)
    add_lora(model, ModelOptions(lora_r=2, lora_modules=parts)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert isinstance(config["target_modules"], list)
    assert all(any(name.endswith(target) for target in config["target_modules"]) for name in chosen)
    for feature in ("modules_to_save", "use_dora", "lora_bias", "layer_replication", "rank_pattern"):
        assert not config.get(feature), feature
    assert config["bias"] == "none"
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
    expected = {f"base_model.model.{name}.lora_{x}.weight" for name in chosen for x in "AB"}
    assert names == expected
    assert set(chosen) <= layers


def test_a_part_that_would_get_no_adapter_is_refused() -> None:
    model, _ = family_checkpoints.make_model("qwen3_vl")
    with pytest.raises(
        UsageError, match="lora_modules: no layer of the vision tower and projector would get an adapter"
    ):
        lora_layers(model, ["decoder", "tower", "projector"], ["q_proj"])
    assert lora_layers(model, ["decoder"], ["q_proj"])


def test_layers_that_peft_takes_for_experts_are_left_out_or_refused() -> None:
    model, _ = family_checkpoints.make_model("glm4v_moe")
    layers = {name.rpartition(".")[2] for name in lora_layers(model, ["tower"], None)}
    assert layers == {"qkv", "proj"}  # its tower has gate_proj, up_proj and down_proj too
    asked = ModelOptions(lora_r=2, lora_modules=["tower"], lora_target_modules=["gate_proj", "up_proj"])
    with pytest.raises(UsageError, match="peft takes gate_proj, up_proj for the experts"):
        add_lora(model, asked)
    dense, _ = family_checkpoints.make_model("glm4v")
    asked = ModelOptions(lora_r=2, lora_modules=["tower"], lora_target_modules=["gate_proj", "up_proj"])
    adapted = add_lora(dense, asked)
    assert any("visual.blocks.0.mlp.gate_proj.lora_A" in name for name, _ in adapted.named_parameters())
