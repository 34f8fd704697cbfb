"""Our loss compared with those of TRL, Liger, verl and OpenRLHF on the same inputs, from the installed packages.

    python -m rlaif_fast.adapters.parity

Every loss gets the same advantages; TRL and Liger a temperature of 0.7, and TRL accumulates two micro-batches. verl
and OpenRLHF add the KL outside of their losses. The printed error is the larger of two: the relative error of the
loss, and that of the gradients in the l2 norm.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

B, T, P, H, V = 6, 7, 3, 16, 32
TEMPERATURE = 0.7
BASE: dict[str, Any] = {"beta": 0.04, "loss_type": "grpo"}
FEATURES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "bnpo": {"loss_type": "bnpo"},
    "dapo": {"loss_type": "dapo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "luspo": {"loss_type": "luspo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "sapo": {"loss_type": "sapo"},
    "sequence level": {"importance_sampling_level": "sequence", "use_bias_correction_kl": False},
    "sequence level, beta 0": {"importance_sampling_level": "sequence", "beta": 0.0},
    "beta 0": {"beta": 0.0},
    "epsilon_high": {"epsilon_high": 0.28},
    "delta": {"delta": 1.05},
    "unbiased KL": {"use_bias_correction_kl": True},
    "plain KL": {"use_bias_correction_kl": False},
    "entropy bonus": {"entropy_coef": 0.01, "loss_type": "dapo"},
}
NOT_IN_LIGER = {"luspo": "differs: counts masked tokens", "entropy bonus": "has none"}
CLIPPED: dict[str, dict[str, Any]] = {  # features that verl and OpenRLHF have; their losses hold no KL
    "grpo": {},
    "dapo": {"loss_type": "dapo"},
    "luspo": {"loss_type": "luspo"},
    "beta 0": {},
    "epsilon_high": {"epsilon_high": 0.28},
    "dual clip": {"dual_clip": 1.5},
}
Pair = tuple[Tensor, list[Tensor]]


class Errors(NamedTuple):
    """Relative errors: of the loss, and the largest of the gradients and metrics in the l2 norm."""

    loss: float
    gradients: float


def liger_errors(feature: str) -> Errors:
    """Return the errors of a feature against Liger's loss, in float32."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    from rlaif_fast.adapters.liger import FusedLinearGRPOLoss

    options = {**BASE, **FEATURES[feature], "max_completion_length": T, "temperature": TEMPERATURE}
    tokens = _tokens()
    results = []
    for make in (LigerFusedLinearGRPOLoss, FusedLinearGRPOLoss):
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(B, T, H, generator=generator).requires_grad_()
        weight = (0.3 * torch.randn(V, H, generator=generator)).requires_grad_()
        bias = torch.randn(V, generator=generator).requires_grad_()
        kinds = ("ref_per_token_logps", "old_per_token_logps")
        logps = torch.log_softmax((hidden @ weight.T + bias) / TEMPERATURE, -1).detach()
        logps = logps.gather(-1, tokens["ids"][..., None])[..., 0]
        others = {name: logps + 0.2 * torch.randn(B, T, generator=generator) for name in kinds}
        loss, metrics = make(compiled=False, **options)(
            hidden, weight, tokens["ids"], tokens["mask"], tokens["advantages"], bias=bias, **others
        )
        results.append((loss, [*torch.autograd.grad(loss, (hidden, weight, bias)), *metrics]))
    return errors(*results)


def trl_errors(feature: str, trainer: Any) -> Errors:
    """Return the errors of a feature against TRL's `_compute_loss`, in float32.

    Args:
        feature: A name of `FEATURES`.
        trainer: From `trl_trainer`; both losses take gradients of its model.
    """
    from trl import GRPOTrainer

    _set(trainer, {"epsilon_high": 0.2, "delta": None, **BASE, **FEATURES[feature]})
    tokens, model = _tokens(), trainer.model
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(0, V, (B, P), generator=generator)
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": tokens["ids"],
        "completion_mask": tokens["mask"],
        "advantages": tokens["advantages"],
        "num_items_in_batch": tokens["mask"].sum() * 2,
    }
    ids, attention = (
        torch.cat([inputs[f"{part}_{x}"] for part in ("prompt", "completion")], 1) for x in ("ids", "mask")
    )
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, attention, T)
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        inputs[name] = logps + 0.2 * torch.randn(B, T, generator=generator)
    results = []
    for compute in (GRPOTrainer._compute_loss, type(trainer)._compute_loss):
        loss = compute(trainer, model, dict(inputs))
        results.append(
            (loss, list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])))
        )
    return errors(*results)


def verl_errors(feature: str) -> Errors:
    """Return the errors of a feature against verl's loss, with both losses from its registry."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig

    from rlaif_fast.adapters import verl, verl_plugin  # noqa: F401  # registers ours

    options = CLIPPED[feature]
    modes = {loss_type: mode for mode, loss_type in verl.LOSS_TYPES.items()}
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_mini_batch_size=B, ppo_micro_batch_size_per_gpu=B,
        clip_ratio_high=options.get("epsilon_high", 0.2), clip_ratio_c=options.get("dual_clip", verl.DUAL_CLIP),
    )  # fmt: skip
    mode = modes[options.get("loss_type", "grpo")]

    def loss(name: str, new: Tensor, batch: dict[str, Tensor]) -> Tensor:
        function = get_policy_loss_fn(name)
        return function(batch["old"], new, batch["advantages"], batch["mask"], mode, config)[0]

    return errors(*(_clipped(partial(loss, name)) for name in ("vanilla", "rlaif_fast")))


def openrlhf_errors(feature: str) -> Errors:
    """Return the errors of a feature against OpenRLHF's loss."""
    from rlaif_fast.adapters import openrlhf

    options = CLIPPED[feature]
    if options.get("loss_type") == "luspo":
        raise KeyError(feature)
    arguments = {
        "clip_eps_high": options.get("epsilon_high", 0.2),
        "dual_clip": options.get("dual_clip"),
        "token_level_loss": options.get("loss_type") == "dapo",
    }

    def loss(kind: Any, new: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return kind(**arguments)(new, batch["old"], batch["advantages"], batch["mask"])[0]

    return errors(*(_clipped(partial(loss, kind)) for kind in (openrlhf_loss(), openrlhf.PolicyLoss)))


def openrlhf_loss() -> Any:
    """Return OpenRLHF's own `PolicyLoss`; its package imports flash-attn, which the file of losses does not need."""
    found = importlib.util.find_spec("openrlhf")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'openrlhf'", name="openrlhf")
    package = ModuleType("openrlhf.models")
    package.__path__ = [str(Path(found.origin).parent / "models")]
    known = sys.modules.get(package.__name__)
    sys.modules[package.__name__] = package
    try:
        return importlib.import_module("openrlhf.models.loss").PolicyLoss
    finally:
        del sys.modules[package.__name__]
        if known is not None:
            sys.modules[package.__name__] = known


def _clipped(loss: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> Pair:
    """A loss of log-probabilities (B, T), and its gradient."""
    tokens, generator = _tokens(), torch.Generator().manual_seed(3)
    old = -2.0 * torch.rand(B, T, generator=generator)
    new = (old + 0.4 * torch.randn(B, T, generator=generator)).requires_grad_()
    advantages = tokens["advantages"][:, None].expand(B, T)
    value = loss(new, {"old": old, "advantages": advantages, "mask": tokens["mask"].float()})
    return value, list(torch.autograd.grad(value, new))


def trl_trainer(folder: str, peft_config: Any = None, **options: Any) -> Any:
    """Return an `OracleGRPOTrainer` of a tiny Qwen3 with random weights and two accumulation steps of its batch; with
    a `peft_config` only adapters train. `options` are those of `GRPOConfig`."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from trl import GRPOConfig

    from rlaif_fast.adapters.trl import OracleGRPOTrainer
    from rlaif_fast.oracle.reference import ReferenceOracle

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=V, hidden_size=H, intermediate_size=32, num_hidden_layers=2, head_dim=8, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    words = Tokenizer(models.WordLevel({str(i): i for i in range(V)}, unk_token="0"))
    tiny = {
        "per_device_train_batch_size": B, "num_generations": B, "gradient_accumulation_steps": 2,
        "max_completion_length": T, "use_cpu": True, "bf16": False, "report_to": "none",
        "gradient_checkpointing": False, "entropy_coef": 0.0, "temperature": TEMPERATURE,
    }  # fmt: skip
    trainer = OracleGRPOTrainer(
        Qwen3ForCausalLM(config),
        ReferenceOracle(),
        args=GRPOConfig(output_dir=folder, **{**tiny, **options}),
        train_dataset=Dataset.from_list([{"prompt": "1", "reference": "1"}] * B),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1"),
        peft_config=peft_config,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    return trainer


def errors(first: Pair, second: Pair) -> Errors:
    """Return the relative distance of two losses and their tensors."""
    (loss, tensors), (other, others) = first, second
    distances = [
        ((x - y).norm() / x.norm().clamp(min=1e-12)).item() if x.any() or y.any() else 0.0
        for x, y in zip(tensors, others)
    ]
    return Errors(((loss - other).abs() / loss.abs()).item(), max(distances))


def _tokens() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 3, 5, 1, 6, 4])
    return {
        "ids": torch.randint(0, V, (B, T), generator=generator),
        "mask": (torch.arange(T) < lengths[:, None]).long(),
        "advantages": torch.randn(B, generator=generator),
    }


def _set(trainer: Any, options: dict[str, Any]) -> None:
    """Change options of a trainer's loss, where the trainer keeps them."""
    options = {
        "importance_sampling_level": "token",
        "use_bias_correction_kl": True,  # TRL's default
        "entropy_coef": 0.0,
        **options,
    }
    for name, value in options.items():
        for holder in (trainer, trainer.args):
            if hasattr(holder, name):
                setattr(holder, name, value)
    trainer._entropy_bonus_enabled = options["entropy_coef"] != 0.0


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(
        prog="rlaif_fast.adapters.parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    packages = {"TRL": "trl", "Liger": "liger-kernel", "verl": "verl", "OpenRLHF": "openrlhf"}
    titles = [f"{name} {_version(package)}" for name, package in packages.items()]
    print(f"| feature | {' | '.join(titles)} |\n|---|{'---|' * len(titles)}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = trl_trainer(folder)
        except ModuleNotFoundError:  # the column stays empty
            trainer = None
        for feature in dict.fromkeys((*FEATURES, *CLIPPED)):
            cells = [
                _cell(partial(trl_errors, trainer=trainer), feature) if trainer else "",
                NOT_IN_LIGER.get(feature) or _cell(liger_errors, feature),
                _cell(verl_errors, feature),
                _cell(openrlhf_errors, feature),
            ]
            print(f"| {feature} | {' | '.join(cells)} |")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _cell(errors_of: Callable[[str], Errors], feature: str) -> str:
    """The error; empty if the package is not installed or lacks the feature."""
    try:
        return f"{max(errors_of(feature)):.1e}"
    except (ModuleNotFoundError, KeyError):
        return ""


if __name__ == "__main__":
    main()
