"""TRL's loss, computed by ours inside the model's forward, where DDP, FSDP, ZeRO-3 and PEFT expect parameter use."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from trl.trainer.utils import maybe_gather_lm_head_ctx

from rlaif_fast.adapters.grpo_options import grpo_options
from rlaif_fast.adapters.ranking import check_scale_rewards
from rlaif_fast.adapters.trl_media import MEDIA, joined, mask_of, whole
from rlaif_fast.loss.api import fused_linear_grpo_rank_loss
from rlaif_fast.loss.output import LossOutput

# of RecurrentGemma, xLSTM and Inkling; TRL's own passes leave these out
UNKNOWN_SCALES = ("logits_soft_cap", "output_logit_soft_cap", "logits_mup_width_multiplier")
REWARDS = ("reward", "reward_std", "rewards")  # TRL's figures of them; ranks have others
OF_TOKENS = ("dapo", "cispo")  # TRL divides these by the tokens of the accumulation window


class SealedArguments:
    """Arguments of the loss on their way into the model's forward.

    FSDP2 and DeepSpeed cast every float among a forward's arguments to the parameters' dtype, also inside mappings and
    dataclasses, but old and reference log-probabilities must stay float32. They do not look into other classes.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values


def forward_loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> LossOutput:
    """Return the loss of a TRL micro-batch, scaled as TRL scales it for gradient accumulation."""
    steps = trainer.current_gradient_accumulation_steps if trainer.model.training else 1
    of_tokens = trainer.loss_type in OF_TOKENS
    ids, attention = whole(inputs)
    media = {name: inputs[name] for name in MEDIA if name in inputs}
    if "videos" in inputs:
        media |= joined(inputs["videos"], ids, trainer._video_pad_token_id)
    arguments = loss_arguments(trainer, inputs)
    if of_tokens:
        arguments["num_items_in_batch"] = _items(trainer, inputs)
        arguments["entropy_coef"] /= steps
    with trainer.accelerator.autocast():
        out = model(input_ids=ids, attention_mask=attention, rank_loss=SealedArguments(arguments), **media)
    out = LossOutput(*out)
    return out if of_tokens else out._replace(loss=out.loss / steps)


def refuse(args: Any, scale: str) -> None:
    """Refuse options of a `GRPOConfig` that this trainer would drop or does not support.

    Args:
        args: The options.
        scale: How the advantages of ranks are scaled.

    Raises:
        ValueError: There is such an option.
    """
    metric = str(args.metric_for_best_model).removeprefix("eval_")
    refused = {
        "metric_for_best_model": metric.split("/")[0] in REWARDS,  # which the log has not
        "top_entropy_quantile": args.top_entropy_quantile < 1.0,
        "off_policy_mask_threshold": args.off_policy_mask_threshold is not None,
        "use_adaptive_entropy": args.use_adaptive_entropy,
        "multi_objective_aggregation": args.multi_objective_aggregation != "sum_then_normalize",
    }
    if any(refused.values()):
        names = ", ".join(f"{name}={getattr(args, name)}" for name, held in refused.items() if held)
        raise ValueError(f"OracleGRPOTrainer has no {names}")
    check_scale_rewards(args.scale_rewards, scale)
    epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    _loss_options(args, args, args.epsilon, epsilon_high)


def loss_arguments(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the trainer's options and a micro-batch under the names of `fused_linear_grpo_rank_loss`."""
    return {
        **_loss_options(trainer, trainer.args, trainer.epsilon_low, trainer.epsilon_high),
        "token_ids": inputs["completion_ids"],
        "mask": mask_of(inputs),
        "advantages": inputs["advantages"],
        "old_logps": inputs.get("old_per_token_logps"),
        "ref_logps": inputs.get("ref_per_token_logps"),
        "sampling_ratio": inputs.get("importance_sampling_ratio"),
        "temperature": trainer.temperature,
        "entropy_coef": trainer.entropy_coef,
        "entropy_aggregate": "tokens",
        "validate": False,
    }


def _loss_options(holder: Any, args: Any, epsilon: float, epsilon_high: float) -> dict[str, Any]:
    """Return the options of the loss, read from where TRL's loss reads them."""
    held = ("beta", "loss_type", "importance_sampling_level", "max_completion_length")
    of_args = ("delta", "use_bias_correction_kl", "sapo_temperature_pos", "sapo_temperature_neg")
    options = {name: getattr(holder, name) for name in held} | {name: getattr(args, name) for name in of_args}
    return grpo_options(epsilon=epsilon, epsilon_high=epsilon_high, **options)


def _items(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    items = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    if not trainer.model.training:
        return items
    return items * trainer.current_gradient_accumulation_steps / trainer.args.steps_per_generation


def add_rank_loss(model: Any, float32_head: bool = False) -> None:
    """Let `model(input_ids=, attention_mask=, rank_loss=SealedArguments(arguments))` return a `LossOutput`.

    Args:
        model: A causal language model of Transformers, plain or under PEFT.
        float32_head: Whether the head is computed in float32, outside autocast.

    `arguments` are those of `fused_linear_grpo_rank_loss` except `hidden` and `weight`; `token_ids` (B, T) are the last
    T of `input_ids`. The configuration gives the soft-cap and scale of the logits.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain_forward, scaling = model.forward, logit_options(model.config.get_text_config())

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(self: Any, *args: Any, rank_loss: SealedArguments | None = None, **kwargs: Any) -> Any:
        if rank_loss is None:
            return plain_forward(*args, **kwargs)
        arguments = rank_loss.values
        kwargs = {name: value for name, value in kwargs.items() if name not in ("labels", "use_cache")}
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        hidden = hidden[:, -arguments["token_ids"].shape[1] - 1 : -1]
        head = self.get_output_embeddings()
        weight, bias = _gathered(head.weight), _gathered(head.bias)
        hidden = hidden.to(weight.device, torch.float32 if float32_head else hidden.dtype)
        gather: AbstractContextManager = maybe_gather_lm_head_ctx(weight, bias)
        precision = torch.autocast(hidden.device.type, enabled=False) if float32_head else nullcontext()
        with gather, precision:
            return fused_linear_grpo_rank_loss(
                hidden, weight.to(hidden.dtype), bias=bias, **scaling, **arguments
            )

    model.forward = MethodType(forward, model)


def logit_options(config: Any) -> dict[str, Any]:
    """Read the soft-cap and scale of the logits from a text model's configuration.

    Cohere has `logit_scale`, Falcon-H1 `lm_head_multiplier`; Granite divides by `logits_scaling`, HyperCLOVA X
    multiplies by it.

    Raises:
        ValueError: The model scales its logits in another way, which TRL's old and reference passes ignore.
    """
    for name in UNKNOWN_SCALES:
        if getattr(config, name, None) is not None:
            raise ValueError(
                f"OracleGRPOTrainer has no {name}={getattr(config, name)} of {config.model_type}"
            )
    scale = next(
        (
            value
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (value := getattr(config, name, None)) is not None
        ),
        None,
    )
    divisor = getattr(config, "logits_scaling", None)
    if scale is None and divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1.0 / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    return {"logit_softcap": cap, "logit_scale": 1.0 if scale is None else scale}


def _gathered(parameter: nn.Parameter | None) -> Any:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
