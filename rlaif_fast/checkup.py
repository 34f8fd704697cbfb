"""Runs every kernel, attention backend and GPU decoder against its reference, at small sizes: `doctor --check`.

On a GPU the kernels run there; elsewhere Triton's run in its interpreter and the C++ ones on the CPU. Each check gives
the largest relative error and its tolerance; a check that cannot run says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from rlaif_fast import (
    fused_linear_grpo_rank_loss,
    grpo_rank_loss,
    grpo_rank_loss_from_logits,
    rank_advantages,
)
from rlaif_fast.errors import typed_line
from rlaif_fast.loss import backends
from rlaif_fast.loss.testing import TOLERANCES, Problem, random_problem, relative, relative_l2

OPTIONS: dict[str, Any] = {"beta": 0.04, "entropy_coef": 0.01}
# Triton's interpreter truncates to bfloat16, while a device rounds to nearest even.
INTERPRETER_FACTOR = 2.5
# A logit between two 16-bit numbers may be rounded the other way than the reference's.
LINEAR_FACTOR = 2.0
ATTENTION_TOLERANCE, STEP_TOLERANCE, PATCH_TOLERANCE = 2e-2, 2e-2, 2.0**-6  # for bfloat16 results


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        name: Operation, backend and dtype.
        error: Largest relative error; None if it did not run.
        tolerance: Largest allowed error.
        reason: Why it did not run, or what it raised; else "".
        seconds: Time it took.
    """

    name: str
    error: float | None
    tolerance: float
    reason: str
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether it ran and was wrong, or could run but raised."""
        return self.reason.startswith("raised") or (
            self.error is not None and not self.error <= self.tolerance
        )


def checks() -> Iterator[Check]:
    """Run one check after the other."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [row for op in backends.OPS for row in backends.rows(op) if row.name != "reference"]
    for row in rows:
        on = "cpu" if row.name == "cpu" else device
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{row.op}, {row.name}, {_short(dtype)}"
            reason = row.refuses(on, dtype, None)
            if reason is not None:
                yield Check(name, None, 0.0, reason, 0.0)
            else:
                yield _run(name, partial(_loss, row.op, row.name, dtype, on), _tolerance(row, dtype, on))
    yield from _policy_checks(device)


def _tolerance(row: backends.Backend, dtype: torch.dtype, device: str) -> float:
    bound = max(TOLERANCES[dtype].value, TOLERANCES[dtype].gradient)
    if row.name in ("triton", "cuda") and dtype != torch.float32:
        bound *= INTERPRETER_FACTOR if device == "cpu" else 1.0
        bound *= LINEAR_FACTOR if row.op == "linear_loss" else 1.0
    return bound


def _run(name: str, compute: Callable[[], float | str], tolerance: float) -> Check:
    start = time.perf_counter()
    try:
        result = compute()
    except Exception as error:  # reporting what a kernel raises is the table's purpose
        result = f"raised {typed_line(error)[:120]}"
    seconds = time.perf_counter() - start
    if isinstance(result, str):
        return Check(name, None, tolerance, result, seconds)
    return Check(name, result, tolerance, "", seconds)


def _loss(op: str, backend: str, dtype: torch.dtype, device: str) -> float:
    """The largest error of loss, advantages and gradients of an operation against the float64 reference."""
    V = 136 if backend == "cuda" else 130  # "cuda" takes rows of whole 16-byte vectors
    problem = random_problem(dtype=dtype, device=device, V=V, T=9)
    ours = _outputs(op, problem, backend)
    if op == "linear_loss" and backend in ("triton", "cuda") and dtype != torch.float32:
        expected = _of_rounded_logits(problem)
    else:
        expected = _outputs(op, problem.double(), "reference")
    # The loss is a sum of terms that largely cancel: below 1, its error is absolute.
    return max(
        relative(a, b) if a.dim() == 0 else relative_l2(a, b) for a, b in zip(ours, expected, strict=True)
    )


def _outputs(op: str, p: Problem, backend: str) -> list[Tensor]:
    if op == "rank_penalty":
        scores = torch.arange(p.oracle_ranks.numel(), device=p.oracle_ranks.device).view_as(p.oracle_ranks)
        found = rank_advantages(scores.to(p.logits.dtype), p.oracle_ranks, backend=backend)
        return [found.advantages, found.ndcg, found.kendall_tau]
    common: dict[str, Any] = {**OPTIONS, **p.tensors, "backend": backend}
    if op == "rank_loss":
        leaves = [p.logps.clone().requires_grad_(), p.entropy.clone().requires_grad_()]
        output = grpo_rank_loss(leaves[0], p.oracle_ranks, entropy=leaves[1], **common)
    elif op == "logits_loss":
        leaves = [p.logits.clone().requires_grad_()]
        output = grpo_rank_loss_from_logits(leaves[0], p.token_ids, p.oracle_ranks, **common)
    else:
        leaves = [x.clone().requires_grad_() for x in (p.hidden, p.weight, p.bias)]
        hidden, weight, bias = leaves
        output = fused_linear_grpo_rank_loss(hidden, weight, p.token_ids, p.oracle_ranks, bias=bias, **common)
    return [output.loss.detach(), output.advantages, *torch.autograd.grad(output.loss, leaves)]


def _of_rounded_logits(p: Problem) -> list[Tensor]:
    """The result of `_outputs` for the linear loss in float64, but with logits rounded to the dtype.

    A GPU stores a chunk of them in 16 bits, and the effect on a gradient (1% to 2%) depends on the problem, not on the
    kernel.
    """
    exact = p.double()
    logits = (exact.hidden @ exact.weight.t() + exact.bias).to(p.hidden.dtype).double().requires_grad_()
    common: dict[str, Any] = {**OPTIONS, **exact.tensors, "backend": "reference"}
    output = grpo_rank_loss_from_logits(logits, p.token_ids, p.oracle_ranks, **common)
    (slope,) = torch.autograd.grad(output.loss, logits)
    of_weight = slope.flatten(0, 1).t() @ exact.hidden.flatten(0, 1)
    return [output.loss.detach(), output.advantages, slope @ exact.weight, of_weight, slope.sum((0, 1))]


def _policy_checks(device: str) -> Iterator[Check]:
    """Attention, decode, patches and video: what the trainer calls besides the losses."""
    dtype = torch.bfloat16
    yield _run("prefix_decode, triton, bf16", partial(_prefix_decode, device, dtype), ATTENTION_TOLERANCE)
    try:
        from rlaif_fast.policy.attention import ATTENTION_BACKENDS
    except ImportError as error:
        yield Check("attention and video", None, 0.0, f"{error.name} is not installed", 0.0)
        return
    for name in ATTENTION_BACKENDS:
        if name != "reference":
            yield _run(f"attention, {name}, bf16", partial(_attention, name, device, dtype), 0.0)
    yield _run("decode step, cpp, fp32", _decode_step, 1e-5)
    yield _run("decode step, triton, bf16", partial(_fused_step, device, dtype), STEP_TOLERANCE)
    yield _run("patchify, triton, bf16", partial(_patchify, device, dtype), PATCH_TOLERANCE)
    yield _run("video, dali", partial(_video, device), 2 / 255)


def _prefix_decode(device: str, dtype: torch.dtype) -> float | str:
    from rlaif_fast.policy.prefix_decode import prefix_decode, prefix_decode_reference, refuses_prefix_decode

    reason = refuses_prefix_decode(device, dtype, 64)
    if reason is not None:
        return reason
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(2, heads, length, 64, generator=generator).to(device, dtype)
        for heads, length in ((4, 3), (2, 160), (2, 160))
    )
    prompts = torch.tensor([140, 7], dtype=torch.int32, device=device)
    own = torch.tensor([4], dtype=torch.int32, device=device)
    ours = prefix_decode(query, keys, values, prompts, own, 0.125)
    expected = prefix_decode_reference(query.double(), keys.double(), values.double(), prompts, own, 0.125)
    return relative_l2(ours, expected)


def _attention(name: str, device: str, dtype: torch.dtype) -> float | str:
    from rlaif_fast.policy.attention import ATTENTION_BACKENDS
    from rlaif_fast.policy.selfcheck import check_attention

    backend, place = ATTENTION_BACKENDS[name], torch.device(device)
    reason = backend.refuses(place, dtype)
    if reason is not None:
        return reason
    found = check_attention(backend, place, dtype)
    return 0.0 if found is None else f"raised or differed: {found}"


def _decode_step() -> float | str:
    """Log-probabilities of a rollout decoded in C++ against one by the model's modules, on the CPU."""
    from rlaif_fast.policy.testing import make_policy, standard_prompts
    from rlaif_fast.rollout import SamplingParams, SharedPrefixSampler
    from rlaif_fast.rollout.cpu_decoder import refuses_cpu_decoder

    policy, prompts = make_policy("qwen3_vl"), standard_prompts("qwen3_vl")
    reason = refuses_cpu_decoder(policy)
    if reason is not None:
        return reason
    logps = []
    for in_cpp in (True, False):
        sampler = SharedPrefixSampler(policy, cpu_decoder=in_cpp)
        logps.append(sampler.sample(prompts, 2, SamplingParams(max_new_tokens=6, seed=0)).logps)
        if in_cpp and not sampler.decodes_in_cpp:
            return "raised or differed: the first step is off, see the warning"
    return relative_l2(*logps)


def _fused_step(device: str, dtype: torch.dtype) -> float | str:
    """The kernels between the matmuls of a decode step against their references in float64."""
    from rlaif_fast.policy.decode_step import (
        add_rms_norm_reference,
        refuses_decode_step,
        rotate_reference,
        silu_mul_reference,
    )

    reason = refuses_decode_step(device, dtype, 256, 64)
    if reason is not None:
        return reason
    from rlaif_fast_kernels.decode_step import add_rms_norm, rotate_store, silu_mul

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, 256, generator=generator).to(device, dtype)
    weight, delta, heads = rows[0].clone(), rows.flip(0).contiguous(), rows.view(8, 4, 64)
    angles = rows[:, :64].contiguous()
    keys, place = rows.new_zeros(1, 4, 8, 64), torch.arange(8, device=device)
    query, cells = heads.clone(), (keys, keys.clone(), torch.zeros_like(place), place)
    exact = rows.double()
    normed, total = add_rms_norm_reference(exact, delta.double(), weight.double(), 1e-6)
    rotated = rotate_reference(heads.double(), angles.double(), angles.double(), None, 1e-6)
    rotate_store(query, heads, heads, angles, angles, None, 1e-6, *cells)
    residual = rows.clone()
    pairs = [
        (add_rms_norm(residual, delta, weight, 1e-6), normed),
        (residual, total),
        (query, rotated),
        (keys[0].transpose(0, 1), rotated),
        (silu_mul(rows.clone(), delta), silu_mul_reference(exact, delta.double())),
    ]
    return max(relative_l2(found, expected) for found, expected in pairs)


def _patchify(device: str, dtype: torch.dtype) -> float | str:
    from rlaif_fast.video import PatchSpec, patchify
    from rlaif_fast.video.preprocess import PATCHIFIERS

    reason = PATCHIFIERS["triton"][0](device, dtype)
    if reason is not None:
        return reason
    frames = torch.randint(
        0, 256, (4, 64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    spec = PatchSpec(16)
    ours = patchify(frames.to(device), spec, dtype, "triton")
    return relative_l2(ours.cpu(), patchify(frames, spec, torch.float32, "reference"))


def _video(device: str) -> float | str:
    """DALI against PyAV on a clip made here: mean difference as a share of a pixel's range (the decoders interpolate
    the colour planes differently).
    """
    from rlaif_fast.video.dali import DaliDecoder

    reason = DaliDecoder.unavailable()
    if reason is not None:
        return reason
    from rlaif_fast.data.synthetic.encode import encode_video
    from rlaif_fast.data.synthetic.render import render
    from rlaif_fast.data.synthetic.worlds import sample_world
    from rlaif_fast.video import decode

    with TemporaryDirectory() as folder:
        path = Path(folder, "clip.mp4")
        # NVDEC cannot read VP9 narrower or lower than 128 pixels.
        encode_video(path, render(sample_world("checkup", 1), width=256, height=192, num_frames=12))
        indices = [0, 5, 11, 5]
        ours = decode(str(path), indices, decoder="dali", device=device).cpu()
        expected = decode(str(path), indices, decoder="pyav")
    return float((ours.float() - expected.float()).abs().mean()) / 255


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
