"""What stands beside the weights of a checkpoint is read as transformers reads it, or refused by name."""

import json

import pytest

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.loading import LoadedModel, ModelOptions, load_model
from rlaif_fast.trainer.preflight import check_model


def load(model) -> LoadedModel:
    return load_model(ModelOptions(model=str(model), device="cpu", dtype="float32"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"do_normalize": False}, "do_normalize: false"),
        ({"do_rescale": False}, "do_rescale: false"),
        ({"rescale_factor": 1 / 127.5}, r"rescale_factor 0\.0078"),
        ({"image_std": None}, "image_std None"),
        ({"image_mean": 0.5}, r"image_mean 0\.5"),
    ],
)
def test_a_processor_that_scales_pixels_otherwise_is_refused(folder, changes, words):
    file = folder / "video_preprocessor_config.json"
    usual = json.loads(file.read_text()) | {"rescale_factor": 0.00392156862745098, "do_normalize": True}
    file.write_text(json.dumps(usual))
    check_model(str(folder))
    file.write_text(json.dumps(usual | changes))
    with pytest.raises(UsageError, match=words):
        check_model(str(folder))


@pytest.mark.parametrize("name", ["processor_config.json", "chat_template.json"])
def test_the_template_of_the_processor_goes_before_that_of_the_tokenizer(folder, tiny, name):
    """As LLaVA-OneVision and others lie on the hub: their tokenizer's is that of the text model, without media."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    tokens["chat_template"] = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    with pytest.raises(UsageError, match="chat template of this model"):
        check_model(str(folder))
    template = load(tiny).tokenizer.chat_template
    (folder / name).write_text(json.dumps({"chat_template": template}))
    check_model(str(folder))
    assert load(folder).tokenizer.chat_template == template
    (folder / name).write_text(json.dumps({"chat_template": {"default": template}}))
    with pytest.raises(UsageError, match=f"{name} has a chat_template that is no text; got dict"):
        check_model(str(folder))


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_damaged_generation_settings_are_refused(folder, text):
    """transformers would go on without them, and responses without the tokens that end them."""
    (folder / "generation_config.json").write_text(text)
    for read in (check_model, load):
        with pytest.raises(UsageError, match=r"generation_config\.json"):
            read(str(folder))


@pytest.mark.parametrize("method", ["fp8", "awq", "gptq", "bitsandbytes", "compressed-tensors"])
def test_quantized_weights_are_refused(folder, method):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": method}})
    )
    (folder / "model.safetensors").unlink()
    for read in (check_model, load):
        with pytest.raises(UsageError, match=rf"quantized weights \({method}\), which cannot be trained"):
            read(str(folder))
