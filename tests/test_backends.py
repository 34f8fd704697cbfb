"""The backend table, its report, the doctor, and life without the extension."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from rlaif_fast import doctor, grpo_rank_loss
from rlaif_fast.loss import backends, cuda, extension
from rlaif_fast.policy.loading import resolve_dtype


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_the_report_has_a_row_for_each_implementation_and_a_reason_for_each_absence():
    report = backends.report()
    assert {status.op for status in report} == set(backends.OPS)
    assert {status.name for status in report} == set(backends.NAMES)
    assert all(status.available == (status.reason == "") for status in report)
    for op in backends.OPS:
        here = {status.name for status in report if status.op == op and status.available}
        assert {"reference", "cpu"} <= here


def test_auto_takes_the_best_that_supports_the_call():
    assert backends.select("rank_loss", "auto", torch.zeros(1)) == "cpu"
    assert backends.select("rank_penalty", "auto", torch.zeros(1), 64) == "cpu"
    assert backends.select("rank_penalty", "auto", torch.zeros(1), 65) == "reference"
    assert backends.select("rank_loss", "reference", torch.zeros(1)) == "reference"


@pytest.mark.parametrize(
    ("of_triton", "of_numpy", "refused"),
    [
        ("3.6.0", "2.4.0", True),
        ("3.6.0", "2.3.5", False),
        ("3.7.0", "2.4.6", False),
        ("3.6.0", "3.0.0", True),
    ],
)
def test_an_interpreter_that_numpy_stops_is_refused_by_name(monkeypatch, of_triton, of_numpy, refused):
    launch, triton = (pytest.importorskip(name) for name in ("rlaif_fast_kernels.launch", "triton"))
    monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setattr(triton, "__version__", of_triton)
    monkeypatch.setattr(np, "__version__", of_numpy)
    assert ("install numpy<2.4" in (launch.unavailable() or "")) == refused


def test_a_backend_asked_for_by_name_runs_or_says_why_not():
    meta = torch.zeros(2, device="meta")
    for name in ("cpu", "triton") if importlib.util.find_spec("triton") else ("cpu",):
        with pytest.raises(ValueError, match=f"backend='{name}' cannot run rank_loss: .*meta"):
            backends.select("rank_loss", name, meta)
    with pytest.raises(ValueError, match=r"cannot run rank_loss: .* above 64"):
        backends.select("rank_loss", "cpu", torch.zeros(1), 65)


def test_importing_the_package_is_light():
    result = run("import sys, rlaif_fast; print('torch' in sys.modules, 'transformers' in sys.modules)")
    assert result.stdout.split() == ["False", "False"], result.stderr
    result = run("import sys; from rlaif_fast import grpo_rank_loss; print('transformers' in sys.modules)")
    assert result.stdout.split() == ["False"], result.stderr


def test_an_extension_older_than_the_package_is_not_used(monkeypatch):
    assert extension.unavailable() is None
    monkeypatch.setattr(extension, "OPERATORS", (*extension.OPERATORS, "of_tomorrow"))
    monkeypatch.setattr(extension, "load", extension.load.__wrapped__)
    assert "from older sources, which have no of_tomorrow; build it again" in extension.unavailable()


def test_without_the_extension_the_reference_runs_and_says_so_once():
    code = """
import sys, warnings
sys.modules["rlaif_fast._C"] = None  # what an import of a missing module finds
warnings.simplefilter("always")
import torch
from rlaif_fast import fused_linear_grpo_rank_loss, grpo_rank_loss, rank_advantages
from rlaif_fast.loss import backends
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    x = torch.randn(4, 3, requires_grad=True)
    grpo_rank_loss(x, torch.arange(4).view(2, 2)).loss.backward()
    rank_advantages(x[:, :2], torch.zeros(4, 2))
    h, w = torch.randn(4, 3, 5, requires_grad=True), torch.randn(7, 5)
    fused_linear_grpo_rank_loss(h, w, torch.zeros(4, 3, dtype=torch.long), torch.arange(4).view(2, 2)).loss.backward()
ours = [str(w.message) for w in seen if "rlaif_fast" in str(w.message)]
assert len(ours) == 1 and "not built" in ours[0], ours
assert x.grad.isfinite().all() and h.grad.isfinite().all()
try:
    grpo_rank_loss(x, torch.arange(4).view(2, 2), backend="cpu")
except ValueError as error:
    print(error)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "backend='cpu' cannot run rank_loss: the extension rlaif_fast._C is not built" in result.stdout


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_gives_the_same_numbers(capability):
    """ATEN_CPU_CAPABILITY chooses the row kernels as it chooses ATen's own."""
    code = """
import torch
from rlaif_fast.loss.testing import random_problem, relative, relative_l2
from rlaif_fast import grpo_rank_loss_from_logits
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    p = random_problem(V=2050, dtype=dtype)
    x, y = p.logits.clone().requires_grad_(), p.logits.double().requires_grad_()
    a = grpo_rank_loss_from_logits(x, p.token_ids, p.oracle_ranks, backend="cpu", **p.tensors).loss
    b = grpo_rank_loss_from_logits(y, p.token_ids, p.oracle_ranks, backend="reference", **p.double().tensors).loss
    a.backward(), b.backward()
    assert relative(a, b) <= 1e-5 and relative_l2(x.grad, y.grad) <= (1e-5 if dtype.itemsize > 2 else 4e-3)
print(torch.ops.rlaif_fast.row_instruction_set())
"""
    if capability not in ("default", torch.backends.cpu.get_cpu_capability().lower(), "avx2"):
        pytest.skip(f"this processor has no {capability}")
    result = run(code, ATEN_CPU_CAPABILITY=capability)
    assert result.stdout.strip() == capability, result.stderr


def test_doctor_prints_every_backend(capsys):
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    for word in (
        "torch",
        "triton",
        "flash-attn",
        "DALI",
        "PyAV",
        "rlaif_fast._C",
        "reference",
        *backends.OPS,
    ):
        assert word in text, word


def test_the_doctor_does_not_look_for_the_tiny_model(capsys):
    assert doctor.main(["--model", "tiny"]) == 2
    assert "model: 'tiny' is made by the run that trains it" in capsys.readouterr().err


def test_masked_out_fields_are_left_out_of_the_statistics():
    stats = grpo_rank_loss(torch.zeros(2, 3), advantages=torch.zeros(2)).stats
    clipped = {"clip_low", "clip_high"} | {
        f"clip_ratio/{name}" for name in ("low_min", "high_max", "region_mean")
    }
    assert set(stats) == {"loss/policy", "ratio_mean", "ratio_max", "tokens"} | clipped


def test_the_doctor_checks_every_kernel_against_its_reference():
    done = subprocess.run(
        [sys.executable, "-m", "rlaif_fast.doctor", "--check"], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    ran = {line.split("  ")[0].strip() for line in lines if " ok " in line}
    wanted = {f"{op}, cpu, fp32" for op in ("rank_penalty", "rank_loss", "logits_loss", "linear_loss")}
    if extension.unavailable() is None:
        assert wanted <= ran
    if importlib.util.find_spec("triton") is not None:
        kinds = ("linear_loss", "prefix_decode", "decode step", "patchify")
        assert {f"{kind}, triton, bf16" for kind in kinds} <= ran
    assert re.fullmatch(r"\d+ checks ran, 0 failed, in \d+ s", lines[-1])


def test_a_wrong_kernel_fails_the_check(monkeypatch, capsys):
    from rlaif_fast import checkup

    wrong = checkup.Check("linear_loss, cpu, fp32", 1e-2, 1e-5, "", 0.1)
    nan = checkup.Check("linear_loss, cpu, fp32", float("nan"), 1e-5, "", 0.1)
    broken = checkup._run("x", lambda: 1 / 0, 1e-5)
    assert wrong.failed and nan.failed and broken.failed and "ZeroDivisionError" in broken.reason
    monkeypatch.setattr(checkup, "checks", lambda: iter([wrong]))
    assert doctor.main(["--check"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not"),
    [
        ("8.0 9.0 10.0+PTX", [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)], [(7, 0), (7, 5)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0), (10, 0)]),
        ("9.0a", [(9, 0)], [(8, 0), (10, 0)]),
        ("10.0a 7.5+PTX", [(7, 5), (8, 0), (10, 0), (10, 3)], [(7, 0)]),
        ("10.0f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("Hopper", [(7, 5), (9, 0)], []),
    ],
)
def test_the_extension_is_for_the_devices_that_it_has_code_for(architectures, runs, does_not, monkeypatch):
    """On others its first launch would end in "no kernel image is available"."""

    class Built:
        @staticmethod
        def build_info():
            return {"cuda": "13.0", "cuda_architectures": architectures}

    monkeypatch.setattr(extension, "load", Built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability in (*runs, *does_not):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        reason = cuda.unavailable()
        assert (reason is None) == (capability in runs), (capability, reason)
        assert reason is None or f"TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]}" in reason


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(native, dtype, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation
    )
    assert resolve_dtype("auto", torch.device("cuda")) == dtype
