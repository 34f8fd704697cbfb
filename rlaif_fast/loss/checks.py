"""Checks of the arguments of the public functions: each failure names the argument, what was expected and
what came.

Checks of values read the data. On an accelerator that is one synchronisation a call; they are skipped while
torch.compile traces and while a CUDA graph is captured, where the kernels still guard every read by id.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlaif_fast.loss.inputs import LossArguments, RankInputs, TokenInputs
from rlaif_fast.loss.options import MAX_GROUP_SIZE, LossOptions, check_number


def describe(value: Any) -> str:
    """Say what `value` is, for an error message."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def tensor(name: str, value: Any, shape: tuple[int | str, ...], *, like: Tensor | None = None) -> None:
    """Raise unless `value` is a tensor of `shape` (a letter stands for any size) on the device of `like`."""
    expected = f"a tensor of shape ({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be {expected}; got {describe(value)}")
    fits = value.dim() == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, value.shape)
    )
    if not fits:
        raise ValueError(f"{name} must be {expected}; got {describe(value)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the other tensors; got {describe(value)}")


def floating(name: str, value: Any, shape: tuple[int | str, ...], *, like: Tensor | None = None) -> None:
    """Raise unless `value` is a floating point tensor (see `tensor`)."""
    tensor(name, value, shape, like=like)
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating point dtype; got {describe(value)}")


def token_ids(name: str, value: Any, shape: tuple[int | str, ...], *, like: Tensor) -> None:
    """Raise unless `value` is an int64 or int32 tensor (see `tensor`)."""
    tensor(name, value, shape, like=like)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32; got {describe(value)}")


def can_read(x: Tensor) -> bool:
    """Return whether values may be looked at: not while tracing, nor while a CUDA graph is captured."""
    if torch.compiler.is_compiling():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def finite_ranks(name: str, value: Tensor, valid: Tensor | None, *, negative: bool) -> None:
    """Raise if a rank of a valid group is NaN, infinite, or (unless `negative`) below 0."""
    if not can_read(value) or not value.numel():
        return
    low, high = value.aminmax()  # one pass; NaN comes through
    if low.isfinite() and high.isfinite() and (negative or low >= 0):
        return
    bad = ~value.isfinite() if negative else ~(value.isfinite() & (value >= 0))
    if valid is not None:
        bad = bad & valid[:, None]
    if bad.any():
        n, g = bad.nonzero()[0].tolist()
        expected = "finite" if negative else "finite and at least 0"
        raise ValueError(f"{name} must be {expected}; got {value[n, g].item()} at [{n}, {g}]")


def ids_in_range(name: str, ids: Tensor, vocabulary: int, mask: Tensor | None) -> None:
    """Raise if the id of an unmasked token is outside [0, vocabulary)."""
    if not can_read(ids):
        return
    bad = (ids < 0) | (ids >= vocabulary)
    if mask is not None:
        bad = bad & mask
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise ValueError(f"{name} must be in [0, {vocabulary}); got {ids[tuple(at)].item()} at {at}")


def not_nan(name: str, value: Tensor, valid: Tensor | None) -> None:
    """Raise if a score of a valid group is NaN, which has no place in an order."""
    if not can_read(value) or not value.numel() or not value.amax().isnan():
        return
    bad = value.isnan() if valid is None else value.isnan() & valid[:, None]
    if bad.any():
        raise ValueError(f"{name} must not be NaN; got NaN at {bad.nonzero()[0].tolist()}")


def zero_or_one(name: str, value: Tensor) -> None:
    """Raise if a mask that is not bool holds anything but 0 and 1."""
    if can_read(value) and not ((value == 0) | (value == 1)).all():
        raise ValueError(f"{name} must be bool or hold only 0 and 1; got other values")


def ranks(oracle_ranks: Tensor, valid: Tensor | None, kind: str, *, like: Tensor) -> None:
    """Raise unless ranks (N, G) and validity (N,) fit together and hold possible values."""
    tensor("oracle_ranks", oracle_ranks, ("N", "G"), like=like)
    if oracle_ranks.dtype == torch.bool or oracle_ranks.is_complex():
        raise TypeError(f"oracle_ranks must be integer or floating point; got {describe(oracle_ranks)}")
    N, G = oracle_ranks.shape
    if not 1 <= G <= MAX_GROUP_SIZE:
        raise ValueError(f"oracle_ranks must have between 1 and {MAX_GROUP_SIZE} responses a group; got {G}")
    if valid is not None:
        tensor("valid", valid, (N,), like=like)
        if valid.dtype != torch.bool:
            raise TypeError(f"valid must be bool; got {describe(valid)}")
    finite_ranks("oracle_ranks", oracle_ranks, valid, negative=kind == "zscore")


def rank_inputs(scores: Tensor, oracle_ranks: Tensor, valid: Tensor | None, kind: str) -> RankInputs:
    """Return the tensors of the rank penalty as the backends take them, or raise."""
    floating("scores", scores, ("N", "G"))
    ranks(oracle_ranks, valid, kind, like=scores)
    floating("scores", scores, tuple(oracle_ranks.shape))
    scores = scores.detach()
    if kind in ("oracle", "zscore"):
        scores = scores.nan_to_num()  # ignored, so it may hold anything
    else:
        not_nan("scores", scores, valid)
    return RankInputs(scores, oracle_ranks.detach(), valid)


def grouped(oracle_ranks: Any, group_size: int | None, responses: int, like: Tensor) -> Tensor:  # (N, G)
    """Bring flat or grouped ranks to (N, G) with N * G = responses."""
    if not isinstance(oracle_ranks, Tensor):
        raise TypeError(
            f"oracle_ranks must be a tensor of shape (N, G) or (B,); got {describe(oracle_ranks)}"
        )
    divides("group_size", group_size, responses)
    if oracle_ranks.dim() == 1:
        if group_size is None:
            raise ValueError(f"group_size must be given with flat oracle_ranks; got {describe(oracle_ranks)}")
        tensor("oracle_ranks", oracle_ranks, (responses,), like=like)
        return oracle_ranks.view(-1, group_size)
    tensor("oracle_ranks", oracle_ranks, ("N", "G"), like=like)
    N, G = oracle_ranks.shape
    if responses != N * G:
        raise ValueError(
            f"oracle_ranks must be (N, G) with N * G = {responses}; got {tuple(oracle_ranks.shape)}"
        )
    if group_size is not None and group_size != G:
        raise ValueError(f"group_size must be the G of oracle_ranks, {G}; got {group_size}")
    return oracle_ranks


def divides(name: str, value: Any, responses: int) -> None:
    """Raise unless `value` is None or an int that divides the responses into groups."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {describe(value)}")
    if value < 1 or responses % value:
        raise ValueError(f"{name} must divide the {responses} responses; got {value}")


def num_items(value: Any, like: Tensor) -> Tensor | None:  # scalar
    """Return the number of items of the batch as a scalar in the dtype of the loss, or raise."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"num_items_in_batch must be a number or a scalar tensor; got {describe(value)}")
        return value.detach().reshape(()).to(like.device, dtype)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"num_items_in_batch must be a number or a scalar tensor; got {describe(value)}")
    if not value > 0:
        raise ValueError(f"num_items_in_batch must be above 0; got {value}")
    return torch.full((), value, device=like.device, dtype=dtype)


def loss_options(arguments: LossArguments) -> LossOptions:
    """Return the hyper-parameters among the keyword arguments of a loss."""
    unknown = sorted(arguments.keys() - LossArguments.__annotations__.keys())
    if unknown:
        raise TypeError(f"the loss has no argument {', '.join(map(repr, unknown))}")
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
    get: Callable[[str], Any] = arguments.get
    advantages, valid = get("advantages"), get("valid")
    if (advantages is None) == (oracle_ranks is None):
        what = "neither" if advantages is None else "both"
        raise ValueError(f"exactly one of oracle_ranks and advantages must be given; got {what}")
    if oracle_ranks is None:
        advantages = given_advantages(advantages, shape, responses, arguments, like)
    else:
        oracle_ranks = grouped(oracle_ranks, get("group_size"), responses, like)
        ranks(oracle_ranks, valid, options.kind, like=like)
        oracle_ranks = oracle_ranks.detach().to(torch.promote_types(like.dtype, torch.float32))
    if options.beta != 0.0 and get("ref_logps") is None:
        raise ValueError(f"ref_logps must be given when beta is not 0; got None with beta={options.beta}")
    inputs = TokenInputs(
        advantages=advantages,
        oracle_ranks=oracle_ranks,
        valid=valid,
        old_logps=per_token("old_logps", get("old_logps"), shape, like),
        ref_logps=per_token("ref_logps", get("ref_logps"), shape, like),
        mask=mask(get("mask"), shape, like),
        sampling_ratio=sampling_ratio(get("sampling_ratio"), shape, responses, like),
        num_items=num_items(get("num_items_in_batch"), like),
    )
    return inputs, options


def given_advantages(
    advantages: Any, shape: tuple[int, ...], responses: int, arguments: LossArguments, like: Tensor
) -> Tensor:
    """Return the advantages of another trainer, or raise where something that belongs to ranks came along."""
    per_response = not (isinstance(advantages, Tensor) and advantages.shape == shape)
    floating("advantages", advantages, (responses,) if per_response else shape, like=like)
    if arguments.get("valid") is not None:
        raise ValueError("valid belongs to oracle_ranks: with advantages, mask the rows that must not count")
    divides("group_size", arguments.get("group_size"), responses)
    return advantages.detach()


def per_token(name: str, value: Any, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """Return a float tensor with a value for each token, detached."""
    if value is None:
        return None
    floating(name, value, shape, like=like)
    return value.detach()


def sampling_ratio(value: Any, shape: tuple[int, ...], responses: int, like: Tensor) -> Tensor | None:
    """Return the weights of the policy term, one a token or one a response."""
    per_row = isinstance(value, Tensor) and value.shape == (responses, 1)
    return per_token("sampling_ratio", value, (responses, 1) if per_row else shape, like)


def mask(value: Any, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """Return a mask as bool."""
    if value is None:
        return None
    tensor("mask", value, shape, like=like)
    if value.dtype == torch.bool:
        return value
    zero_or_one("mask", value)
    return value != 0


def logits(value: Any, ids: Tensor, temperature: float, mask: Tensor | None = None) -> None:
    """Raise unless logits (..., V) and the ids of tokens (...) fit together."""
    if not isinstance(value, Tensor):
        raise TypeError(f"logits must be a tensor of shape (..., V); got {describe(value)}")
    if value.dim() < 1 or value.shape[-1] < 1:
        raise ValueError(
            f"logits must be a tensor of shape (..., V) with V of at least 1; got {describe(value)}"
        )
    floating("logits", value, tuple(value.shape))
    token_ids("token_ids", ids, tuple(value.shape[:-1]), like=value)
    check_number("temperature", temperature, minimum=0.0, strict=True)
    ids_in_range("token_ids", ids, value.shape[-1], mask)


def head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, chunk_size: int | None
) -> None:
    """Raise unless hidden states (..., H), a weight (V, H) and a bias (V,) fit together."""
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden must be a tensor of shape (..., H); got {describe(hidden)}")
    floating("hidden", hidden, tuple(hidden.shape))
    floating("weight", weight, ("V", hidden.shape[-1]), like=hidden)
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(f"weight must have the dtype of hidden, {hidden.dtype}; got {describe(weight)}")
    if weight.shape[0] < 1:
        raise ValueError(f"weight must be (V, H) with V of at least 1; got {describe(weight)}")
    if bias is not None:
        floating("bias", bias, (weight.shape[0],), like=hidden)
    check_number("temperature", temperature, minimum=0.0, strict=True)
    if chunk_size is not None:
        check_number("chunk_size", chunk_size, minimum=1)


def lengths(value: Any, packed: int, like: Tensor) -> int:
    """Return how many responses there are; raise unless their lengths (B,) add up to the packed rows."""
    tensor("lengths", value, ("B",), like=like)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"lengths must be int64 or int32; got {describe(value)}")
    if can_read(value):
        if (value < 0).any():
            raise ValueError(f"lengths must be at least 0; got {int(value.min())}")
        if int(value.sum()) != packed:
            raise ValueError(f"lengths must add up to the {packed} rows of hidden; got {int(value.sum())}")
    return value.shape[0]
