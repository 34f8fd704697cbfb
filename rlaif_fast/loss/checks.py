"""Checks of the arguments of the public functions: each failure names the argument, what was expected and what came."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlaif_fast.loss import values
from rlaif_fast.loss.advantages import without_offset
from rlaif_fast.loss.inputs import LossArguments, RankInputs, Scaling, TokenInputs, members_of
from rlaif_fast.loss.options import (
    MAX_GROUP_SIZE,
    LossOptions,
    RankOptions,
    check_count,
    check_flag,
    check_scaling,
)
from rlaif_fast.loss.precision import dtype_of

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # PyTorch compares no others
OF_RANKS = ("kind", "penalty_weight", "scale", "score")  # options of a loss that ranks


def describe(value: Any) -> str:
    """Say what `value` is, for an error message."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {reprlib.repr(value)}"


def tensor(name: str, value: Any, shape: tuple[int | str, ...], *, like: Tensor | None = None) -> None:
    """Raise unless `value` is a tensor of `shape` (a letter stands for any size) on the device of `like`."""
    if isinstance(value, Tensor) and (value.layout != torch.strided or hasattr(value, "full_tensor")):
        kind = f"{type(value).__name__} of layout {value.layout}"
        raise TypeError(f"{name} must be a plain tensor, as full_tensor() or to_dense() gives; got a {kind}")
    fits = (
        isinstance(value, Tensor)
        and value.dim() == len(shape)
        and all(isinstance(want, str) or want == have for want, have in zip(shape, value.shape))
    )
    if not fits:  # format the message only here: torch.compile cannot print a size that varies
        expected = f"a tensor of shape ({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
        error = ValueError if isinstance(value, Tensor) else TypeError
        raise error(f"{name} must be {expected}; got {describe(value)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the other tensors; got {describe(value)}")


def floating(name: str, value: Any, shape: tuple[int | str, ...], *, like: Tensor | None = None) -> None:
    """Raise unless `value` is a floating point tensor of at least 16 bits (see `tensor`)."""
    tensor(name, value, shape, like=like)
    if not value.is_floating_point() or value.itemsize < 2:
        raise TypeError(f"{name} must have a floating point dtype of at least 16 bits; got {describe(value)}")


def integers(name: str, value: Any, shape: tuple[int | str, ...], *, like: Tensor) -> None:
    """Raise unless `value` is an int64 or int32 tensor (see `tensor`)."""
    tensor(name, value, shape, like=like)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32; got {describe(value)}")


def boolean(name: str, value: Any, shape: tuple[int | str, ...], *, like: Tensor) -> None:
    """Raise unless `value` is a bool tensor (see `tensor`)."""
    tensor(name, value, shape, like=like)
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must be bool; got {describe(value)}")


def ranks(value: Any, shape: tuple[int | str, ...], *, like: Tensor) -> None:
    """Raise unless `value` is a tensor of ranks (see `tensor`)."""
    tensor("oracle_ranks", value, shape, like=like)
    if value.dtype not in INTEGERS and not (value.is_floating_point() and value.itemsize >= 2):
        raise TypeError(f"oracle_ranks must be int, uint8 or float of 16 bits or more; got {describe(value)}")


def unit_weights(name: str, value: Any, units: int, like: Tensor, validate: bool) -> None:
    """Raise unless `value` holds a finite weight of at least 0 for each pair or group."""
    floating(name, value, (units,), like=like)
    if values.can_read(value, validate) and not ((value >= 0) & value.isfinite()).all():
        raise ValueError(f"{name} must be finite and at least 0")


def ranking(
    oracle_ranks: Tensor,  # (N, G)
    scores: Tensor | None,  # (N, G)
    judged: Tensor | None,  # (N, G) bool
    weights: Tensor | None,  # (N,)
    valid: Tensor | None,  # (N,) bool
    options: RankOptions,
    *,
    like: Tensor,
    validate: bool,
) -> Tensor:  # (N, G)
    """Return the ranks, or rewards, as the backends take them; raise unless what ranks the groups fits together."""
    ranks(oracle_ranks, ("N", "G"), like=like)
    N, G = oracle_ranks.shape
    if not 1 <= G <= MAX_GROUP_SIZE:
        raise ValueError(f"oracle_ranks must have between 1 and {MAX_GROUP_SIZE} responses a group; got {G}")
    if scores is not None:
        floating("scores", scores, (N, G), like=like)
    if judged is not None:
        boolean("judged", judged, (N, G), like=like)
    if weights is not None:
        unit_weights("weights", weights, N, like, validate)
    if valid is not None:
        boolean("valid", valid, (N,), like=like)
    count, read = members_of(judged, valid), values.can_read(oracle_ranks, validate)
    are_rewards = options.kind == "zscore"
    if read:
        values.finite_ranks(oracle_ranks, count, negative=are_rewards)
    oracle_ranks = oracle_ranks.detach()
    if are_rewards:
        oracle_ranks = without_offset(oracle_ranks, count)
    if read:
        wide = torch.promote_types(like.dtype, torch.float32)
        if oracle_ranks.element_size() > wide.itemsize or oracle_ranks.dtype == torch.int32:
            values.distinct_in(wide, oracle_ranks, count)
        if are_rewards:
            values.squares_in(wide, oracle_ranks, count)
        if scores is not None and options.orders_policy:
            values.scores_not_nan(scores, count)
    return oracle_ranks


def rank_inputs(
    scores: Tensor,  # (N, G)
    oracle_ranks: Tensor,  # (N, G)
    judged: Tensor | None,  # (N, G) bool
    weights: Tensor | None,  # (N,)
    valid: Tensor | None,  # (N,) bool
    options: RankOptions,
    validate: bool,
) -> RankInputs:
    """Return the tensors of the rank penalty as the backends take them, or raise."""
    floating("scores", scores, ("N", "G"))
    given = (judged, weights, valid, options)
    oracle_ranks = ranking(oracle_ranks, scores, *given, like=scores, validate=validate)
    scores = scores.detach()
    if not options.orders_policy:
        scores = scores.nan_to_num()  # ignored, so it may hold anything
    count = members_of(judged, valid)
    return RankInputs(
        scores,
        oracle_ranks,
        None if count is None else count.expand(scores.shape),
        None if weights is None else weights.detach(),
    )


def grouped(name: str, value: Any, group_size: int | None, responses: int, like: Tensor) -> Tensor:  # (N, G)
    """Bring a flat (B,) or grouped tensor to (N, G) with N * G = responses."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (N, G) or (B,); got {describe(value)}")
    check_group_size(group_size, responses)
    if value.dim() == 1:
        if group_size is None:
            raise ValueError(f"group_size must be given with flat {name}; got {describe(value)}")
        tensor(name, value, (responses,), like=like)
        return value.view(-1, group_size)
    tensor(name, value, ("N", "G"), like=like)
    N, G = value.shape
    if responses != N * G:
        raise ValueError(f"{name} must be (N, G) with N * G = {responses}; got {tuple(value.shape)}")
    if group_size is not None and group_size != G:
        raise ValueError(f"group_size must be the G of {name}, {G}; got {group_size}")
    return value


def check_group_size(value: Any, responses: int) -> None:
    """Raise unless `value` is None or an int that divides the responses into groups."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"group_size must be an int; got {describe(value)}")
    if value < 1 or responses % value:
        raise ValueError(f"group_size must divide the {responses} responses; got {value}")


def num_items(value: Any, like: Tensor, validate: bool) -> Tensor | None:  # scalar
    """Return the number of items of the batch as a scalar in the dtype of the loss, or raise."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"num_items_in_batch must be a number or a scalar tensor; got {describe(value)}")
        if values.can_read(value, validate) and not 0 < value < math.inf:
            raise ValueError(f"num_items_in_batch must be above 0 and finite; got {value.item()}")
        return value.detach().reshape(()).to(like.device, dtype)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"num_items_in_batch must be a number or a scalar tensor; got {describe(value)}")
    if not 0 < value < math.inf:
        raise ValueError(f"num_items_in_batch must be above 0 and finite; got {value}")
    return torch.full((), value, device=like.device, dtype=dtype)


def loss_options(arguments: LossArguments) -> LossOptions:
    """Return the hyper-parameters among the keyword arguments of a loss."""
    unknown = sorted(set(arguments).difference(LossArguments.__annotations__))
    if unknown:
        raise TypeError(f"the loss has no argument {', '.join(map(repr, unknown))}")
    check_flag("validate", arguments.get("validate", True))
    names = LossOptions.__dataclass_fields__.keys()
    chosen: dict[str, Any] = {name: value for name, value in arguments.items() if name in names}
    epsilon = arguments.get("epsilon", LossOptions.epsilon_low)
    high = arguments.get("epsilon_high")
    return LossOptions(
        **{**chosen, "epsilon_low": epsilon, "epsilon_high": epsilon if high is None else high}
    )


def loss_inputs(
    like: Tensor,  # its dtype is that of the statistics
    shape: tuple[int, ...],  # of every per-token tensor: (B, T), or (M,) when packed
    responses: int,  # B
    oracle_ranks: Tensor | None,
    arguments: LossArguments,
) -> tuple[TokenInputs, LossOptions]:
    """Check every argument of a loss against the others; return them as the backends take them."""
    options = loss_options(arguments)
    get: Callable[..., Any] = arguments.get
    validate = get("validate", True)
    if (get("advantages") is None) == (oracle_ranks is None):
        what = "neither" if oracle_ranks is None else "both"
        raise ValueError(f"exactly one of oracle_ranks and advantages must be given; got {what}")
    if oracle_ranks is None:
        groups = {"advantages": given_advantages(shape, responses, arguments, like)}
    else:
        groups = ranked_groups(oracle_ranks, responses, arguments, options, like)
    if options.beta != 0.0 and get("ref_logps") is None:
        raise ValueError(f"ref_logps must be given when beta is not 0; got None with beta={options.beta}")
    inputs = TokenInputs(
        **groups,
        old_logps=per_token("old_logps", get("old_logps"), shape, like),
        ref_logps=per_token("ref_logps", get("ref_logps"), shape, like),
        mask=mask(get("mask"), shape, like, validate),
        sampling_ratio=sampling_ratio(get("sampling_ratio"), shape, responses, like),
        num_items=num_items(get("num_items_in_batch"), like, validate),
    )
    if values.can_read(like, validate):
        for name in ("advantages", "sampling_ratio"):
            values.finite_weights(name, getattr(inputs, name), inputs.mask)
    return inputs, options


def ranked_groups(
    oracle_ranks: Tensor, responses: int, arguments: LossArguments, options: LossOptions, like: Tensor
) -> dict[str, Any]:
    """Return the tensors of `TokenInputs` that rank the groups, or raise."""
    get: Callable[..., Any] = arguments.get
    size, valid, weights = get("group_size"), get("valid"), get("weights")
    oracle_ranks = grouped("oracle_ranks", oracle_ranks, size, responses, like)
    scores, judged = (
        None if (x := get(name)) is None else grouped(name, x, oracle_ranks.shape[1], responses, like)
        for name in ("scores", "judged")
    )
    given, validate = (judged, weights, valid, options), get("validate", True)
    oracle_ranks = ranking(oracle_ranks, scores, *given, like=like, validate=validate)
    wide = torch.promote_types(like.dtype, torch.float32)

    def cast(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(wide)

    return {
        "oracle_ranks": cast(oracle_ranks),
        "scores": cast(scores),
        "judged": judged,
        "weights": cast(weights),
        "valid": valid,
    }


def given_advantages(
    shape: tuple[int, ...], responses: int, arguments: LossArguments, like: Tensor
) -> Tensor:
    """Return the advantages of another trainer; raise where an argument that belongs to ranks was given too."""
    advantages: Any = arguments.get("advantages")
    per_response = not (isinstance(advantages, Tensor) and advantages.shape == shape)
    if per_response and isinstance(advantages, Tensor) and advantages.shape == (responses, 1):
        advantages = advantages.squeeze(1)
    floating("advantages", advantages, (responses,) if per_response else shape, like=like)
    for name in ("valid", "judged", "weights", "scores"):
        if arguments.get(name) is not None:
            raise ValueError(f"{name} belongs to oracle_ranks, not to advantages (mask rows instead)")
    for name in OF_RANKS:
        value, default = arguments.get(name), getattr(LossOptions, name)
        if value is not None and value != default:
            raise ValueError(f"{name} belongs to oracle_ranks, not to advantages; got {value!r}")
    check_group_size(arguments.get("group_size"), responses)
    return advantages.detach()


def per_token(name: str, value: Any, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """Return a float tensor with a value for each token, detached."""
    if value is None:
        return None
    floating(name, value, shape, like=like)
    return value.detach()


def sampling_ratio(value: Any, shape: tuple[int, ...], responses: int, like: Tensor) -> Tensor | None:
    """Return the weights of the policy term: one a token, or one a response as (B, 1)."""
    per_response = isinstance(value, Tensor) and value.shape in ((responses,), (responses, 1))
    if per_response and value.shape != shape:
        ratio = per_token("sampling_ratio", value, tuple(value.shape), like)
        return None if ratio is None else ratio.view(responses, 1)
    return per_token("sampling_ratio", value, shape, like)


def mask(value: Any, shape: tuple[int, ...], like: Tensor, validate: bool) -> Tensor | None:
    """Return a mask of any dtype that holds 0 and 1 as bool."""
    if value is None:
        return None
    tensor("mask", value, shape, like=like)
    if value.dtype == torch.bool:
        return value
    if values.can_read(value, validate) and not ((value == 0) | (value == 1)).all():
        raise ValueError("mask must be bool or hold only 0 and 1; got other values")
    return value != 0


def scaling(
    temperature: Any,
    softcap: float | None,
    scale: float,
    shape: tuple[int, ...],  # of the tokens
    like: Tensor,
    validate: bool,
) -> Scaling:
    """Return what happens to the logits before the softmax, or raise."""
    per_token = isinstance(temperature, Tensor)
    check_scaling(1.0 if per_token else temperature, softcap, scale)
    if not per_token:
        return Scaling(temperature, None, softcap, scale)
    floating("temperature", temperature, shape, like=like)
    if values.can_read(temperature, validate) and temperature.numel():
        for bound in torch.stack(temperature.aminmax()).tolist():  # NaN where one is
            check_scaling(bound, softcap, scale)
    return Scaling(1.0, temperature.detach().reshape(-1), softcap, scale)


def logits(value: Any, ids: Tensor, mask: Tensor | None, validate: bool) -> None:
    """Raise unless logits (..., V) and the ids of tokens (...) fit together."""
    if not isinstance(value, Tensor):
        raise TypeError(f"logits must be a tensor of shape (..., V); got {describe(value)}")
    if value.dim() < 1 or value.shape[-1] < 1:
        raise ValueError(f"logits must be (..., V) with V of at least 1; got {describe(value)}")
    floating("logits", value, tuple(value.shape))
    integers("token_ids", ids, tuple(value.shape[:-1]), like=value)
    values.ids_in_range(ids, value.shape[-1], mask, validate)


def head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_size: int | None, float32: Tensor | None
) -> None:
    """Raise unless hidden states (..., H), a weight (V, H), what it is rounded from, and a bias (V,) fit together."""
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden must be a tensor of shape (..., H); got {describe(hidden)}")
    floating("hidden", hidden, tuple(hidden.shape))
    floating("weight", weight, ("V", hidden.shape[-1]), like=hidden)
    if dtype_of(weight.device, weight.dtype) != dtype_of(hidden.device, hidden.dtype):
        raise TypeError(f"weight must have the dtype of hidden, {hidden.dtype}; got {describe(weight)}")
    if weight.shape[0] < 1:
        raise ValueError(f"weight must be (V, H) with V of at least 1; got {describe(weight)}")
    if bias is not None:
        floating("bias", bias, (weight.shape[0],), like=hidden)
    if float32 is not None:
        floating("float32_weight", float32, tuple(weight.shape), like=hidden)
        if float32.dtype != torch.promote_types(weight.dtype, torch.float32):
            raise TypeError(f"float32_weight must be float32; got {describe(float32)}")
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)


def lengths(value: Any, packed: int, like: Tensor, arguments: Mapping[str, Any]) -> int:
    """Return how many responses there are; raise unless their lengths (B,) add up to the packed rows, and what comes
    flat among the arguments is either one a response or one a token."""
    integers("lengths", value, ("B",), like=like)
    if not values.can_read(value, arguments.get("validate", True)):
        return value.shape[0]
    if (value < 0).any():
        raise ValueError(f"lengths must be at least 0; got {int(value.min())}")
    if int(value.sum()) != packed:
        raise ValueError(f"lengths must add up to the {packed} rows of hidden; got {int(value.sum())}")
    for name in ("advantages", "sampling_ratio"):
        flat = arguments.get(name)
        if isinstance(flat, Tensor) and flat.shape == value.shape == (packed,) and not value.all():
            raise ValueError(
                f"{name} must be (B, 1) for one a response, or come without empty responses for one a token; got "
                f"{tuple(flat.shape)} with {packed} responses and as many tokens"
            )
    return value.shape[0]
