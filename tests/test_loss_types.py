"""The loss types and conventions of other trainers, against the real TRL and Liger where they are installed."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from rlaif_fast import (
    fused_linear_grpo_rank_loss,
    grpo_rank_loss,
    grpo_rank_loss_from_logits,
    selective_log_softmax,
    token_logps,
)
from rlaif_fast.loss.options import LOSS_TYPES
from rlaif_fast.loss.testing import TOLERANCES, random_problem, relative, relative_l2

BACKENDS = ["cpu", "reference"]
ONE = torch.tensor([1.0])

# Each with the smallest input on which another trainer's figure is known: A, logps, more arguments, the loss.
FORMULAS = {
    "num_items as given": (1.0, [[-1.0, -2.0]], {"loss_type": "dapo", "num_items_in_batch": 0.5}, -4.0),
    "num_items a tensor": (1.0, [[-1.0]], {"num_items_in_batch": torch.tensor(0.5)}, -2.0),
    "luspo sums a response": (1.0, [[-1.0, -2.0]], {"loss_type": "luspo"}, -2.0),
    "bnpo averages tokens": (1.0, [[-1.0, -2.0]], {"loss_type": "bnpo"}, -1.0),
    "dual clip": (
        -1.0,
        [[0.0]],
        {"old_logps": torch.tensor([[-2.0]]), "dual_clip": 3.0},  # rho = 7.4
        3.0,
    ),
    "cispo, relative bound": (
        2.0,
        [[-0.5]],
        {"old_logps": torch.tensor([[-2.0]]), "loss_type": "cispo", "epsilon_high": 0.5},
        1.5 * 2 * 0.5,
    ),
    "cispo, absolute bound": (
        2.0,
        [[-0.5]],
        {
            "old_logps": torch.tensor([[-2.0]]),
            "loss_type": "cispo",
            "epsilon_high": 3.0,
            "cispo_bound": "absolute",
        },
        3.0 * 2 * 0.5,
    ),
    "sapo on-policy": (1.0, [[-1.0]], {"loss_type": "sapo", "sapo_temperature_pos": 2.0}, -1.0),
    "kl clamp": (
        0.0,
        [[-30.0]],
        {"ref_logps": torch.tensor([[-1.0]]), "beta": 1.0, "kl_clamp": 10.0},
        10.0,
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", FORMULAS.values(), ids=FORMULAS)
def test_formulas(case, backend):
    A, logps, options, want = case
    out = grpo_rank_loss(torch.tensor(logps), advantages=ONE * A, backend=backend, **options)
    assert float(out.loss) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_rows_count_or_not(backend):
    mask = torch.tensor([[1, 1], [0, 0]])
    arguments = {"advantages": torch.ones(2), "mask": mask, "backend": backend}
    logps = torch.zeros(2, 2)
    assert float(grpo_rank_loss(logps, **arguments).loss) == -0.5
    assert float(grpo_rank_loss(logps, empty_rows="skip", **arguments).loss) == -1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_as_the_loss_or_as_tokens(backend):
    """One response of one token (H = 1) and one of three (H = 3): (1 + 3) / 2, or (1 + 9) / 4."""
    entropy = torch.tensor([[1.0, 0, 0], [3.0, 3, 3]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    arguments = {"entropy": entropy, "mask": mask, "entropy_coef": 1.0, "backend": backend}
    logps, A = torch.zeros(2, 3), torch.zeros(2)
    assert float(grpo_rank_loss(logps, advantages=A, **arguments).loss) == -2.0
    tokens = grpo_rank_loss(logps, advantages=A, entropy_aggregate="tokens", **arguments)
    assert float(tokens.loss) == -2.5 and float(tokens.stats["loss/entropy"]) == -2.5


@pytest.mark.parametrize("items", [0, 0.0, -1, torch.tensor(0.0)])
def test_zero_items_are_refused_in_every_form(items):
    with pytest.raises(ValueError, match="num_items_in_batch must be above 0"):
        grpo_rank_loss(torch.zeros(1, 1), advantages=ONE, num_items_in_batch=items)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_sampling_ratio_a_response(shape):
    ratio = torch.tensor([0.5, 1.0, 2.0, 0.1])
    logps, A = torch.zeros(4, 3), torch.ones(4)
    want = grpo_rank_loss(logps, advantages=A, sampling_ratio=ratio[:, None].expand(4, 3).contiguous())
    got = grpo_rank_loss(logps, advantages=A, sampling_ratio=ratio.view(shape))
    assert torch.equal(got.loss, want.loss)


def test_clip_statistics_under_trl_s_names():
    old = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    logps = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    stats = grpo_rank_loss(logps, advantages=torch.tensor([1.0, -1.0]), old_logps=old).stats
    names = ("clip_ratio/low_min", "clip_ratio/high_max", "clip_ratio/region_mean")
    assert [float(stats[name]) for name in names] == [0.0, 0.5, 0.5]


OPTIONS = {
    **{name: {"loss_type": name} for name in LOSS_TYPES},
    "dual clip": {"dual_clip": 1.2, "kl_clamp": 0.02},
    "unbiased": {"unbiased_kl": True, "entropy_aggregate": "tokens"},
    "skip": {"empty_rows": "skip", "loss_type": "luspo"},
    "absolute": {"loss_type": "cispo", "cispo_bound": "absolute", "epsilon_high": 1.1},
}


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_hidden_states_give_the_loss_of_log_probabilities(options, on_policy):
    """Every option passes through the row kernels, in one sweep and in two."""
    problem = random_problem(drift=0.6, dtype=torch.float64)
    if on_policy:
        del problem.tensors["old_logps"]
    options = {"beta": 0.04, "entropy_coef": 0.01, "max_completion_length": 9, **options}
    results = []
    for backend, chunk_size in (("reference", None), ("cpu", 16), ("cpu", None)):
        leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight)]
        out = fused_linear_grpo_rank_loss(
            *leaves,
            problem.token_ids,
            problem.oracle_ranks,
            chunk_size=chunk_size,
            backend=backend,
            **problem.tensors,
            **options,
        )
        results.append((out.loss.detach(), *torch.autograd.grad(out.loss, leaves)))
    for got in results[1:]:
        assert relative(got[0], results[0][0]) <= TOLERANCES[torch.float64].value
        assert all(relative_l2(a, b) <= 1e-9 for a, b in zip(got[1:], results[0][1:]))


SCALINGS = {
    "cap": {"logit_softcap": 2.0},
    "scale": {"logit_scale": 0.3},
    "both": {"logit_softcap": 3.0, "logit_scale": 1.7, "temperature": 0.8},
}


def scaled_logits(logits, softcap, scale, temperature):
    z = logits * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z / temperature


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", SCALINGS.values(), ids=SCALINGS)
def test_soft_caps_and_scales(options, dtype, per_token):
    """The kernels on raw logits give what plain PyTorch gives on the scaled ones; also from hidden states."""
    problem = random_problem(V=2060, dtype=dtype)  # longer than a block of the CPU kernels
    options = dict(options)
    if per_token:
        options["temperature"] = torch.linspace(0.5, 1.5, problem.token_ids.numel()).view_as(problem.logps)
    t = options.get("temperature", 1.0)
    t = t[..., None].double() if per_token else t
    z = problem.logits.clone().double().requires_grad_()
    scaled = scaled_logits(z, options.get("logit_softcap"), options.get("logit_scale", 1.0), t)
    want = selective_log_softmax(scaled, problem.token_ids, return_entropy=True, backend="reference")
    (want[0].sum() + want[1].sum()).backward()
    for backend in BACKENDS:
        logits = problem.logits.clone().requires_grad_()
        got = selective_log_softmax(
            logits, problem.token_ids, return_entropy=True, backend=backend, **options
        )
        (got[0].sum() + got[1].sum()).backward()
        bound = TOLERANCES[dtype]
        assert all(relative(a, b) <= bound.value for a, b in zip(got, want))
        assert relative_l2(logits.grad, z.grad) <= bound.gradient
    results = [
        token_logps(problem.hidden, problem.weight, problem.token_ids, backend=backend, **options)
        for backend in BACKENDS
    ]
    assert relative(*results) <= TOLERANCES[dtype].value


def test_a_loss_of_capped_logits():
    problem = random_problem(dtype=torch.float64)
    options = {"logit_softcap": 1.5, "logit_scale": 0.7, "beta": 0.04}
    capped = scaled_logits(problem.hidden @ problem.weight.t(), 1.5, 0.7, 1.0)
    want = grpo_rank_loss_from_logits(
        capped, problem.token_ids, problem.oracle_ranks, beta=0.04, backend="reference", **problem.tensors
    )
    got = fused_linear_grpo_rank_loss(
        problem.hidden, problem.weight, problem.token_ids, problem.oracle_ranks, **options, **problem.tensors
    )
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-9, atol=0)


def trl_loss(problem, A, options, monkeypatch):
    """Call the real trainer's loss on given log-probabilities and entropies."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    logps, entropy = problem.logps.clone().requires_grad_(), problem.entropy
    mask = problem.tensors["mask"]
    args = SimpleNamespace(
        delta=options.get("delta"),
        use_bias_correction_kl=options.get("unbiased_kl", False),
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.0625,  # exact: TRL makes a float32 tensor of it
        steps_per_generation=1,
    )
    accelerator = SimpleNamespace(
        num_processes=1,
        sync_gradients=False,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, **_: x,
    )
    this = SimpleNamespace(
        args=args,
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropy, None),
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=options.get("entropy_coef", 0.0) != 0.0,
        entropy_coef=options.get("entropy_coef", 0.0),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_adaptive_entropy=False,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=9,
        beta=options.get("beta", 0.0),
        epsilon_low=0.2,
        epsilon_high=options.get("epsilon_high", 0.2),
        loss_type=options.get("loss_type", "grpo"),
        importance_sampling_level=options.get("importance_sampling_level", "token"),
    )
    ids = problem.token_ids
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": A,
        "old_per_token_logps": problem.tensors["old_logps"],
        "ref_per_token_logps": problem.tensors["ref_logps"],
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer._compute_loss(this, None, inputs)
    return loss.detach(), torch.autograd.grad(loss, logps)[0]


TRL = {
    **{name: {"loss_type": name} for name in LOSS_TYPES},
    "sequence": {"importance_sampling_level": "sequence"},
    "luspo sequence": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "delta": {"delta": 1.3},
    "unbiased": {"unbiased_kl": True},
    "entropy": {"entropy_coef": 0.1},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", TRL.values(), ids=TRL)
def test_trl(options, backend, monkeypatch):
    problem = random_problem(dtype=torch.float64, drift=0.5)
    A = torch.linspace(-1.5, 2, 12, dtype=torch.float64)
    options = {"beta": 0.04, **options}
    if options.get("loss_type") == "cispo":
        options |= {"epsilon_high": 1.1, "cispo_bound": "absolute"}
    want, want_grad = trl_loss(problem, A, options, monkeypatch)
    logps = problem.logps.clone().requires_grad_()
    out = grpo_rank_loss(
        logps,
        advantages=A,
        entropy=problem.entropy,
        entropy_aggregate="tokens",
        max_completion_length=9,
        sapo_temperature_neg=1.0625,
        backend=backend,
        **problem.tensors,
        **options,
    )
    assert relative(out.loss, want) <= 1e-9
    assert relative_l2(torch.autograd.grad(out.loss, logps)[0], want_grad) <= 1e-9


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_liger(name):
    """Liger's loss on log-probabilities; its luspo counts what TRL's does only at sequence level."""
    function = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss").LigerFusedLinearGRPOFunction
    problem = random_problem(dtype=torch.float64, drift=0.5)
    A = torch.linspace(-1.5, 2, 12, dtype=torch.float64)
    mask = problem.tensors["mask"].double()
    level = "sequence" if name == "luspo" else "token"
    high = 1.1 if name == "cispo" else 0.2
    beta = 0.0 if name == "luspo" else 0.04
    want, _ = function.ppo_loss_fn(
        problem.logps,
        mask,
        A,
        mask,
        ref_per_token_logps=problem.tensors["ref_logps"],
        old_per_token_logps=problem.tensors["old_logps"],
        epsilon_high=high,
        beta=beta,
        loss_type=name,
        max_completion_length=9,
        importance_sampling_level=level,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
    )
    out = grpo_rank_loss(
        problem.logps,
        advantages=A,
        epsilon_high=high,
        cispo_bound="absolute",
        beta=beta,
        loss_type=name,
        max_completion_length=9,
        importance_sampling_level=level,
        **problem.tensors,
    )
    assert relative(out.loss, want) <= 1e-9
