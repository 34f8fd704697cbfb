"""How other libraries compute the same: log-probabilities from a head or from logits, and entropy if they have it.

The benchmarks apply `token_loss` after each; `tests/test_peers.py` compares each with the reference. A peer runs
if its package imports and the device suits; `missing` says why it does not. The labels say which parts of the whole
loss, the gradient included, a peer lacks. Read from the packages themselves: cut-cross-entropy 25.1.1,
liger-kernel 0.8.5, quack-kernels 0.6.5, trl 1.16.0, verl 0.9.1.

Letters: B responses, T tokens, M rows (B * T), H hidden, V vocabulary.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from benchmarking import FULL
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
COMPILED = "compiled arms run on a CPU with RLAIF_FAST_BENCH=full only"
Logps = tuple[Tensor, Tensor | None]  # log-probabilities like token_ids, or their mean (); entropy, or None


@dataclass(frozen=True)
class Peer:
    """A function of another library.

    Attributes:
        label: Its arm in the tables, with what it lacks.
        package: What pip calls it.
        module: What is imported.
        logps: (imported module, hidden (M, H), weight (V, H), token_ids (M,)) -> Logps, or
            (imported module, logits (B, T, V), token_ids (B, T)) -> Logps.
        dtypes: What it takes.
        capability: Least compute capability; None where it runs on a CPU too.
        hopper: What it also imports on compute capability 9.0.
        compiled: It goes through torch.compile.
        exact: Its gradient is that of its log-probabilities, up to rounding.
        matmuls: Products of M, H and V that a head makes.
        attribute: What the module has since some release.
    """

    label: str
    package: str
    module: str
    logps: Callable[..., Logps]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALF)
    capability: tuple[int, int] | None = (8, 0)
    hopper: str = ""
    compiled: bool = False
    exact: bool = True
    matmuls: int = 4
    attribute: str = ""

    def refuses(self, device: str, dtype: torch.dtype) -> str | None:
        """Return why it is not measured here, or None."""
        if device == "cpu" and self.capability is not None:
            return "needs a GPU"
        if dtype not in self.dtypes:
            return f"takes {' or '.join(str(each)[6:] for each in self.dtypes)}, not {str(dtype)[6:]}"
        if device == "cpu" and self.compiled and not FULL:
            return COMPILED
        if device == "cuda" and torch.cuda.get_device_capability() < (self.capability or (0, 0)):
            return "needs compute capability {}.{}".format(*self.capability)
        modules = [self.module]
        if device == "cuda" and self.hopper and torch.cuda.get_device_capability() == (9, 0):
            modules.append(self.hopper)
        reason = next(filter(None, (missing(self.package, module) for module in modules)), None)
        if reason is None and not hasattr(importlib.import_module(self.module), self.attribute or "__name__"):
            return f"{self.package} {version(self.package)} has no {self.module}.{self.attribute}"
        return reason

    def __call__(self, *inputs: Tensor) -> Logps:
        return self.logps(importlib.import_module(self.module), *inputs)


def missing(package: str, module: str) -> str | None:
    """Return why a module cannot be imported, or None; only import errors are caught.

    Args:
        package: What pip calls it.
        module: Dotted name.
    """
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{package} is installed, but {module} does not import: {error}"
    return None


def token_loss(
    logps: Tensor,  # (B, T)
    entropy: Tensor | None,  # (B, T)
    old: Tensor,  # (B, T)
    ref: Tensor,  # (B, T)
    advantages: Tensor,  # (B, 1)
) -> Tensor:
    """The loss as a trainer writes it, on log-probabilities; without entropy, the entropy term is left out."""
    ratio = (logps - old).exp()
    objective = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    kl = (ref - logps).exp() - (ref - logps) - 1
    objective = objective - 0.04 * kl
    if entropy is not None:
        objective = objective + 0.01 * entropy
    return -objective.mean(-1).mean()


def peer_loss(found: Logps, old: Tensor, ref: Tensor, advantages: Tensor) -> Tensor:  # (B, T), (B, T), (B, 1)
    """Apply the loss to what a peer returns; a bare mean is returned as it is."""
    logps, entropy = found
    if logps.dim() == 0:
        return -logps
    entropy = None if entropy is None else entropy.view(old.shape)
    return token_loss(logps.view(old.shape), entropy, old, ref, advantages)


def _trl_head(trl: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Logps:
    logps, entropy, *_ = trl.ChunkedLogProbFunction.apply(
        hidden, weight, None, ids, 1.0, 8192, None, 1.0, ("entropy",)
    )
    return logps, entropy


def _trl_logits(trl: Any, logits: Tensor, ids: Tensor) -> Logps:
    return trl.selective_log_softmax_and_entropy(logits, ids)


def _torch_chunked(functional: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Logps:
    chunks = torch.nn.LinearCrossEntropyOptions()  # without them the logits are kept
    return -functional.linear_cross_entropy(hidden, weight, ids, reduction="mean", options=chunks), None


def _liger(liger: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Logps:
    nll, entropy = liger.LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden, weight, ids, 1.0, -100, 1, True
    )
    return -nll, entropy


def _cce(impl: str, filter_eps: str | None) -> Callable[..., Logps]:
    def logps(cce: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Logps:
        nll = cce.linear_cross_entropy(
            hidden, weight, ids, reduction="none", filter_eps=filter_eps, impl=impl
        )
        return -nll, None

    return logps


def _quack_chunked(quack: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Logps:
    return -quack.chunked_linear_cross_entropy(hidden, weight, ids, reduction="mean"), None


def _quack_head(quack: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Logps:
    # the logits are its own
    nll = quack.linear_cross_entropy_func(hidden, weight, None, ids, reduction="none", inplace_backward=True)
    return -nll, None


def _quack_logits(quack: Any, logits: Tensor, ids: Tensor) -> Logps:
    return -quack.cross_entropy(logits.flatten(0, -2), ids.flatten(), reduction="none"), None


def _verl_head(verl: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Logps:
    return verl.linear_cross_entropy(hidden, weight, ids, 1.0, "none", None)


def _verl_chunked(verl: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Logps:
    return verl.FusedLinearForPPO()(hidden, weight, ids)


def _verl_logits(verl: Any, logits: Tensor, ids: Tensor) -> Logps:
    logps = verl.logprobs_from_logits(logits, ids, inplace_backward=False)
    return logps, verl.entropy_from_logits(logits)


HEADS = (
    Peer("TRL chunked head", "trl", "trl.kernels.chunked_logprob", _trl_head, capability=None),
    Peer(
        "Liger fused linear scaled CE",  # its own kernel on compute capability 9.0, elsewhere verl's chunks
        "liger-kernel",
        "liger_kernel.ops.fused_linear_scaled_cross_entropy",
        _liger,
        capability=None,
        hopper="liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90",
    ),
    Peer(
        "cut-cross-entropy, no entropy",
        "cut-cross-entropy",
        "cut_cross_entropy",
        _cce("cce", None),
        HALF,
    ),
    Peer(
        "cut-cross-entropy, no entropy, small gradients dropped",
        "cut-cross-entropy",
        "cut_cross_entropy",
        _cce("cce", "high"),
        HALF,
        exact=False,
    ),
    Peer(
        "cut-cross-entropy torch_compile, no entropy",
        "cut-cross-entropy",
        "cut_cross_entropy",
        _cce("torch_compile", None),
        capability=None,
        compiled=True,
        matmuls=3,
    ),
    Peer(
        "quack chunked_linear_cross_entropy, mean NLL only",
        "quack-kernels",
        "quack.linear_cross_entropy",
        _quack_chunked,
        HALF,
        (9, 0),
        matmuls=3,
    ),
    Peer(
        "quack linear_cross_entropy_func, logits kept, no entropy",
        "quack-kernels",
        "quack.linear_cross_entropy",
        _quack_head,
        HALF,
        (9, 0),
        matmuls=3,
    ),
    Peer(
        "torch linear_cross_entropy chunked, mean NLL only",
        "torch",
        "torch.nn.functional",
        _torch_chunked,
        capability=None,
        matmuls=3,
        attribute="linear_cross_entropy",
    ),
    Peer("verl linear_cross_entropy", "verl", "verl.utils.kernel.linear_cross_entropy", _verl_head),
    Peer(
        "verl FusedLinearForPPO",
        "verl",
        "verl.utils.experimental.torch_functional",
        _verl_chunked,
        capability=None,
    ),
)

LOGITS = (
    Peer("TRL selective_log_softmax_and_entropy", "trl", "trl.kernels.logprob_entropy", _trl_logits),
    Peer(
        "quack cross_entropy, no entropy",
        "quack-kernels",
        "quack.cross_entropy",
        _quack_logits,
        capability=(9, 0),
    ),
    Peer(
        "verl logprobs_from_logits and entropy_from_logits",
        "verl",
        "verl.utils.torch_functional",
        _verl_logits,
        capability=None,
    ),
)
