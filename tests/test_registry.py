"""Every model type of transformers that takes video trains here, or is refused in one line before its weights load."""

from __future__ import annotations

import inspect
import json
from importlib.util import find_spec

import family_checkpoints
import pytest
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.families import FAMILIES
from rlaif_fast.trainer.preflight import check_model

REASONS = (
    "needs torchvision: pip install torchvision",
    "which cannot be built",
    "and the folder has none",
    "has no chat template",
    "does not load",
    "is an encoder-decoder",
    "changes its logits",
    "cannot load",
)


def takes_video(model_type: str, names: dict) -> bool:
    if model_type in VIDEO_PROCESSOR_MAPPING_NAMES or model_type in FAMILIES:
        return True
    name = names[model_type]
    model_class = getattr(transformers, name if isinstance(name, str) else name[0])
    return any("video" in argument for argument in inspect.signature(model_class.forward).parameters)


def video_types() -> list[str]:
    """Of both registries that a Video-LLM can be in."""
    pictures = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    several = getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})
    return sorted(name for name in {**several, **pictures} if takes_video(name, {**several, **pictures}))


OTHERS = [name for name in video_types() if name not in FAMILIES]


def test_the_walk_finds_the_families() -> None:
    assert set(family_checkpoints.RECIPES) == set(FAMILIES)  # each of the table has a checkpoint to train
    assert len(OTHERS) > 10
    assert {"llava_next_video", "gemma4", "qwen2_5_omni"} <= set(OTHERS)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_family_trains_evaluates_and_reloads(model_type, tmp_path, cache) -> None:
    folder = family_checkpoints.write_checkpoint(model_type, tmp_path / "model")
    shared = str(FAMILIES[model_type].unshared is None).lower()
    output = tmp_path / "run"
    assert family_checkpoints.train_a_little(folder, output, cache, shared_prefix=shared) == 0
    family_checkpoints.assert_trained(folder, output)


@pytest.mark.skipif(
    find_spec("torchvision") is not None,
    reason="with torchvision more types are read, and refused elsewhere: tests/test_families_torchvision.py",
)
@pytest.mark.parametrize("model_type", OTHERS)
def test_another_type_is_refused_in_one_line(model_type, tmp_path) -> None:
    """The folder holds no weights: what gets as far as loading them fails in another way."""
    tokenizer = family_checkpoints.make_tokenizer("qwen2_vl")
    tokenizer.save_pretrained(tmp_path)
    family_checkpoints.write_processor(tmp_path)
    try:
        transformers.AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    except Exception:  # a configuration that cannot do without values
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UsageError) as refusal:
        check_model(str(tmp_path))
    message = str(refusal.value)
    assert message.startswith("model: ")
    assert "\n" not in message
    assert any(reason in message for reason in REASONS), message
    assert "cannot load" in message or model_type in message


def test_shared_prefix_is_refused_before_weights_load(tmp_path) -> None:
    folder = family_checkpoints.write_checkpoint("internvl", tmp_path)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"shared_prefix: InternVL.*attention_dropout.*shared_prefix: false"):
        check_model(str(folder), shared_prefix=True)
    check_model(str(folder))


@pytest.mark.parametrize("damage", ["template", "tokenizer"])
def test_a_prompt_is_tried_before_weights_load(damage, tmp_path) -> None:
    folder = family_checkpoints.write_checkpoint("internvl", tmp_path)
    (folder / "model.safetensors").unlink()
    template = folder / "chat_template.jinja"
    if damage == "template":
        template.write_text(template.read_text().replace("<video>", ""))
        with pytest.raises(UsageError, match="leaves out or moves a video"):
            check_model(str(folder))
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"image_token_id": 0}))
        with pytest.raises(UsageError, match="of 16 features became 0 media tokens"):
            check_model(str(folder))
