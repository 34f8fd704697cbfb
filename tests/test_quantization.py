"""`load_in_4bit`: what is packed, that adapters learn over it, and what is refused."""

import importlib.util
import json

import pytest
import torch
from tiny_runs import SMALL, metrics

from rlaif_fast import train as train_module
from rlaif_fast.errors import UsageError
from rlaif_fast.policy import quantization, testing
from rlaif_fast.policy.loading import ModelOptions, load_model
from rlaif_fast.policy.policy import Policy
from rlaif_fast.rollout.vllm.folder import write_model_files
from rlaif_fast.trainer.options import TrainConfig

LORA = {"lora_r": 4, "load_in_4bit": True}
packs = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    policy = testing.make_policy("qwen3_vl")
    policy.model.save_pretrained(folder)
    write_model_files(policy, folder, 256)
    settings = folder / "preprocessor_config.json"
    values = json.loads(settings.read_text()) | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    settings.write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_r": 0}, "load_in_4bit: expected false where lora_r is 0"),
        ({"sampler": "vllm"}, "load_in_4bit: expected false where sampler is vllm"),
        ({"sharding": "fsdp2"}, "load_in_4bit: expected false where sharding is fsdp2"),
        ({"algorithm": "ppo_rm"}, "load_in_4bit: expected false where algorithm is ppo_rm"),
    ],
)
def test_where_nothing_can_be_packed_it_is_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        TrainConfig(**(LORA | changes))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"load_in_4bit: .*without bitsandbytes and accelerate; pip install"):
        quantization.check_available()


@packs
def test_the_decoder_s_layers_are_packed_and_no_others(folder):
    from bitsandbytes.nn import Linear4bit

    model = load_model(ModelOptions(model=str(folder), dtype="float32", device="cpu", **LORA)).model
    packed = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    whole = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in packed and ".lora_" not in name
    }
    assert packed and all(".language_model.layers." in name for name in packed)
    assert whole and not any(".language_model." in name for name in whole)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)


@packs
def test_the_policy_is_that_of_the_unpacked_weights(folder):
    """Log-probabilities and the adapters' gradients are those of a model with the rounded weights."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    packed = load_model(ModelOptions(model=str(folder), dtype="float32", device="cpu", **LORA)).model
    plain = load_model(ModelOptions(model=str(folder), dtype="float32", device="cpu", lora_r=4)).model
    own = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in packed.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
                own[name].copy_(parameter)
        for name, module in packed.named_modules():
            if isinstance(module, Linear4bit):
                own[f"{name}.weight"].copy_(dequantize_4bit(module.weight.data, module.weight.quant_state))
    prompts = testing.standard_prompts("qwen3_vl")
    ids, lengths = testing.make_responses([4] * 2 * len(prompts))
    found = []
    for model in (packed, plain):
        logps = Policy(model, testing.TOKENIZER).response_logps(prompts, ids, lengths)
        logps.sum().backward()
        found.append((logps.detach(), {n: p.grad for n, p in model.named_parameters() if ".lora_" in n}))
    (ours, gradients), (expected, expected_gradients) = found
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


@packs
def test_a_run_learns(tmp_path):
    values = SMALL | LORA | {"output_dir": tmp_path / "run", "cache_dir": tmp_path / "cache", "sft_steps": 2}
    assert train_module.main([f"--{key}={value}" for key, value in values.items()]) == 0
    rows = [row for row in metrics(tmp_path / "run") if "grad_norm" in row]
    assert rows and all(row["grad_norm"] > 0 for row in rows)
