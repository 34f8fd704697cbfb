"""The plain path: every response follows its own copy of the prompt, padded, through the model's own forward.

It is what other trainers do. It knows nothing of the model family but the names of the model's inputs, and the
shared-prefix path is compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlaif_fast.policy.families import find_family, refuse_far_positions, unwrap
from rlaif_fast.policy.families.base import refuse
from rlaif_fast.policy.families.processor import processor_inputs
from rlaif_fast.policy.prompt import EncodedPrompt


def model_inputs(
    model: nn.Module,
    prompts: Sequence[EncodedPrompt],
    token_ids: Tensor | None = None,  # (B, T)
    lengths: Tensor | None = None,  # (B,)
    *,
    group_sizes: Sequence[int] | None = None,
    padding_side: str = "right",
) -> dict[str, Tensor]:
    """Keyword arguments of the model's forward (or `generate`): one row per response, or, without responses, one row
    per prompt.

    Args:
        model: The Hugging Face model.
        prompts: N prompts.
        token_ids: Response tokens after the prompts.
        lengths: Tokens of each response.
        group_sizes: Responses of each prompt; needed with `token_ids`.
        padding_side: "right" to train, "left" to generate.
    """
    device = next(model.parameters()).device
    if token_ids is None:
        repeated = list(prompts)
        sequences = [p.input_ids.to(device) for p in repeated]
    else:
        assert lengths is not None and group_sizes is not None
        repeated = [p for p, count in zip(prompts, group_sizes) for _ in range(count)]
        sequences = [
            torch.cat((p.input_ids.to(device), row[:length].to(device)))
            for p, row, length in zip(repeated, token_ids, lengths.tolist())
        ]
    pad = partial(pad_sequence, batch_first=True, padding_side=padding_side)
    input_ids, attention_mask = pad(sequences), pad([torch.ones_like(s) for s in sequences])
    inputs: dict[str, Tensor] = {"input_ids": input_ids, "attention_mask": attention_mask}
    family = find_family(unwrap(model).config.model_type)
    if family is not None:
        return inputs | family.plain_inputs(model, repeated, input_ids)
    dtype = next(model.parameters()).dtype
    for name, value in processor_inputs(repeated, input_ids.shape[1], padding_side).items():
        inputs[name] = value.to(device, dtype) if value.is_floating_point() else value.to(device)
    return inputs


def inner_model(model: nn.Module) -> nn.Module:
    """The model without its output embedding; its first output is the last hidden states.

    Raises:
        UsageError: Its class has none under the name that transformers looks for.
    """
    whole = unwrap(model)
    if whole.base_model is whole:
        raise refuse(
            f"{whole.config.model_type}: {type(whole).__name__} has no inner model that gives hidden states"
        )
    return whole.base_model


def plain_hidden(
    model: nn.Module,
    prompts: Sequence[EncodedPrompt],
    token_ids: Tensor,  # (B, T)
    lengths: Tensor,  # (B,)
    group_sizes: Sequence[int],
) -> Tensor:
    """Hidden states (M, H) that predict each response token, from a padded (B, P + T) forward."""
    inputs = model_inputs(model, prompts, token_ids, lengths, group_sizes=group_sizes)
    refuse_far_positions(unwrap(model).config, inputs["input_ids"].shape[1] - 1)
    base = inner_model(model)
    hidden = base(**inputs, use_cache=False)[0]  # (B, P + T, H)
    prompt_lengths = torch.tensor([len(p.input_ids) for p in prompts], device=hidden.device)
    first = prompt_lengths.repeat_interleave(torch.tensor(group_sizes, device=hidden.device)) - 1
    place = torch.arange(token_ids.shape[1], device=hidden.device)
    chosen = place < lengths.to(hidden.device)[:, None]  # (B, T)
    rows, columns = chosen.nonzero(as_tuple=True)
    return hidden[rows, first[rows] + columns]
