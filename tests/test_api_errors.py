"""Bad input is refused with the name of the argument, what was expected and what came."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from rlaif_fast import (
    GRPORankLoss,
    fused_linear_grpo_rank_loss,
    grpo_rank_loss,
    grpo_rank_loss_from_logits,
    rank_advantages,
    selective_log_softmax,
    token_logps,
)
from rlaif_fast.loss.preference import fused_linear_dpo_loss

B, T, V, H = 6, 5, 11, 8
LOGPS = torch.zeros(B, T)
RANKS = torch.arange(6).view(2, 3)
IDS = torch.zeros(B, T, dtype=torch.long)
LOGITS = torch.zeros(B, T, V)
HIDDEN, WEIGHT = torch.zeros(B, T, H), torch.zeros(V, H)
BAD_IDS = [IDS.clone().index_fill_(1, torch.tensor([2]), value) for value in (V, -1, 2**40)]


def ranks_with(value: float) -> torch.Tensor:
    ranks = RANKS.float()
    ranks[1, 2] = value
    return ranks


LOSS_CASES = {
    # arguments that differ from a good call: (error, words of its message)
    "logps not a tensor": ({"logps": [1.0]}, TypeError, "logps must be a tensor.*got list"),
    "logps 1-d": ({"logps": LOGPS[0]}, ValueError, r"logps must be .*\(B, T\); got .*\(5,\)"),
    "logps int": (
        {"logps": LOGPS.long()},
        TypeError,
        "logps must have a floating point dtype of at least 16 bits; got .*int64",
    ),
    "ranks of the wrong length": (
        {"oracle_ranks": RANKS[:1]},
        ValueError,
        r"oracle_ranks .* 6; got \(1, 3\)",
    ),
    "ranks 3-d": ({"oracle_ranks": RANKS[None]}, ValueError, r"oracle_ranks must be .*\(N, G\)"),
    "ranks a list": ({"oracle_ranks": [[0] * 99] * 99}, TypeError, "oracle_ranks must be.* list.{9,250}$"),
    "ranks bool": ({"oracle_ranks": RANKS > 1}, TypeError, "oracle_ranks must be int, uint8 or float.*bool"),
    "negative rank": (
        {"oracle_ranks": ranks_with(-1)},
        ValueError,
        r"oracle_ranks .*at least 0; got -1.0 at \[1, 2\]",
    ),
    "NaN rank": ({"oracle_ranks": ranks_with(math.nan)}, ValueError, r"oracle_ranks .* got nan at \[1, 2\]"),
    "infinite rank": ({"oracle_ranks": ranks_with(math.inf)}, ValueError, "oracle_ranks .* got inf"),
    "NaN reward": (
        {"oracle_ranks": ranks_with(math.nan), "kind": "zscore"},
        ValueError,
        "oracle_ranks must be finite; got nan",
    ),
    "group too large": (
        {"logps": torch.zeros(65, T), "oracle_ranks": torch.zeros(1, 65)},
        ValueError,
        "between 1 and 64 responses a group; got 65",
    ),
    "flat ranks without group_size": (
        {"oracle_ranks": RANKS.flatten()},
        ValueError,
        "group_size must be given",
    ),
    "group_size does not divide": (
        {"oracle_ranks": RANKS.flatten(), "group_size": 4},
        ValueError,
        "group_size must divide the 6 responses; got 4",
    ),
    "group_size 0": ({"group_size": 0}, ValueError, "group_size must divide .* got 0"),
    "group_size not an int": ({"group_size": 3.0}, TypeError, "group_size must be an int; got float"),
    "group_size is not G": (
        {"group_size": 2},
        ValueError,
        "group_size must be the G of oracle_ranks, 3; got 2",
    ),
    "neither ranks nor advantages": ({"oracle_ranks": None}, ValueError, "exactly one .* got neither"),
    "ranks and advantages": ({"advantages": torch.zeros(B)}, ValueError, "exactly one .* got both"),
    "advantages of the wrong length": (
        {"oracle_ranks": None, "advantages": torch.zeros(B + 1)},
        ValueError,
        r"advantages must be .*\(6,\); got .*\(7,\)",
    ),
    "valid with advantages": (
        {"oracle_ranks": None, "advantages": torch.zeros(B), "valid": torch.ones(2, dtype=torch.bool)},
        ValueError,
        "valid belongs to oracle_ranks",
    ),
    "valid of the wrong length": (
        {"valid": torch.ones(3, dtype=torch.bool)},
        ValueError,
        r"valid must be .*\(2,\)",
    ),
    "valid not bool": ({"valid": torch.ones(2)}, TypeError, "valid must be bool; got .*float32"),
    "old_logps shape": (
        {"old_logps": torch.zeros(B, T + 1)},
        ValueError,
        r"old_logps must be .*\(6, 5\); got",
    ),
    "ref_logps int": ({"ref_logps": IDS}, TypeError, "ref_logps must have a floating point dtype"),
    "mask shape": ({"mask": torch.ones(T, B)}, ValueError, r"mask must be .*\(6, 5\); got .*\(5, 6\)"),
    "mask not 0/1": ({"mask": torch.full((B, T), 2)}, ValueError, "mask must be bool or hold only 0 and 1"),
    "sampling_ratio shape": ({"sampling_ratio": torch.ones(B + 1)}, ValueError, "sampling_ratio must be"),
    "entropy shape": ({"entropy": torch.zeros(B)}, ValueError, r"entropy must be .*\(6, 5\)"),
    "entropy missing": ({"entropy_coef": 0.1}, ValueError, "entropy must be given when entropy_coef"),
    "beta without reference": ({"beta": 0.1}, ValueError, "ref_logps must be given when beta"),
    "another device": (
        {"old_logps": torch.zeros(B, T, device="meta")},
        ValueError,
        "old_logps must be on cpu.*meta",
    ),
    "kind": ({"kind": "direct"}, ValueError, "kind must be one of 'directed', .*; got 'direct'"),
    "scale": ({"scale": "batch"}, ValueError, "scale must be one of .* got 'batch'"),
    "score": ({"score": "max"}, ValueError, "score must be one of"),
    "kl": ({"kl": "k4"}, ValueError, "kl must be one of"),
    "loss_type": ({"loss_type": "bnpoo"}, ValueError, "loss_type must be one of"),
    "level": ({"importance_sampling_level": "word"}, ValueError, "importance_sampling_level must be one of"),
    "epsilon": ({"epsilon": -0.1}, ValueError, "epsilon must be finite and at least 0.0; got -0.1"),
    "epsilon_high": ({"epsilon_high": math.nan}, ValueError, "epsilon_high must be finite"),
    "delta": ({"delta": 0.0}, ValueError, "delta must be finite and above 0.0; got 0.0"),
    "beta a string": ({"beta": "0.1"}, TypeError, "beta must be a number; got str"),
    "penalty_weight": ({"penalty_weight": -1.0}, ValueError, "penalty_weight must be .* got -1.0"),
    "dr_grpo without a length": ({"loss_type": "dr_grpo"}, ValueError, "max_completion_length must be given"),
    "max_completion_length": (
        {"loss_type": "dr_grpo", "max_completion_length": 0},
        ValueError,
        "max_completion_length must be .* got 0",
    ),
    "num_items": (
        {"num_items_in_batch": 0},
        ValueError,
        "num_items_in_batch must be above 0 and finite; got 0",
    ),
    "num_items a list": ({"num_items_in_batch": [1]}, TypeError, "num_items_in_batch must be a number"),
    "num_items a vector": ({"num_items_in_batch": torch.ones(2)}, ValueError, "num_items_in_batch must be"),
    "unknown backend": ({"backend": "fast"}, ValueError, "backend must be 'auto' or one of .* got 'fast'"),
    "backend without the op": (
        {"backend": "cuda"},
        ValueError,
        "backend='cuda' does not implement rank_loss",
    ),
    "unknown argument": ({"betta": 0.1}, TypeError, "betta"),
}


@pytest.mark.parametrize("case", LOSS_CASES.values(), ids=LOSS_CASES.keys())
def test_token_loss(case):
    changes, error, words = case
    with pytest.raises(error, match=words):
        grpo_rank_loss(**{"logps": LOGPS, "oracle_ranks": RANKS, **changes})


def test_the_same_checks_guard_every_form():
    """The other two forms share the checks: one of each suffices."""
    for name, (changes, error, words) in LOSS_CASES.items():
        if name.startswith(("logps", "entropy", "group too large", "backend without")):
            continue
        with pytest.raises(error, match=words):
            grpo_rank_loss_from_logits(LOGITS, IDS, **{"oracle_ranks": RANKS, **changes})
        with pytest.raises(error, match=words):
            fused_linear_grpo_rank_loss(HIDDEN, WEIGHT, IDS, **{"oracle_ranks": RANKS, **changes})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("ids", BAD_IDS, ids=lambda ids: str(int(ids[0, 2])))
def test_ids_out_of_range(ids, backend):
    words = rf"token_ids must be in \[0, {V}\); got {int(ids[0, 2])} at \[0, 2\]"
    calls = (
        lambda: grpo_rank_loss_from_logits(LOGITS, ids, RANKS, backend=backend),
        lambda: fused_linear_grpo_rank_loss(HIDDEN, WEIGHT, ids, RANKS, backend=backend),
        lambda: selective_log_softmax(LOGITS, ids, backend=backend),
        lambda: token_logps(HIDDEN, WEIGHT, ids, backend=backend),
    )
    for call in calls:
        with pytest.raises(ValueError, match=words):
            call()
    mask = torch.arange(T).ne(2).expand(B, T)
    assert torch.isfinite(grpo_rank_loss_from_logits(LOGITS, ids, RANKS, mask=mask, backend=backend).loss)
    assert torch.isfinite(
        fused_linear_grpo_rank_loss(HIDDEN, WEIGHT, ids, RANKS, mask=mask, backend=backend).loss
    )


def test_logits_and_hidden_states():
    with pytest.raises(ValueError, match=r"token_ids must be .*\(6, 5\); got .*\(5, 6\)"):
        grpo_rank_loss_from_logits(LOGITS, IDS.t(), RANKS)
    with pytest.raises(TypeError, match=r"token_ids must be int64 or int32; got .*float32"):
        grpo_rank_loss_from_logits(LOGITS, IDS.float(), RANKS)
    with pytest.raises(ValueError, match=r"logits must be .*\(B, T, V\)"):
        grpo_rank_loss_from_logits(LOGITS[0], IDS, RANKS)
    with pytest.raises(ValueError, match="V of at least 1"):
        grpo_rank_loss_from_logits(LOGITS[..., :0], IDS, RANKS)
    with pytest.raises(ValueError, match=r"temperature must be finite and above 0.0; got 0.0"):
        grpo_rank_loss_from_logits(LOGITS, IDS, RANKS, temperature=0.0)
    for form, inputs in (
        (grpo_rank_loss_from_logits, (LOGITS, IDS, RANKS)),
        (fused_linear_grpo_rank_loss, (HIDDEN, WEIGHT, IDS, RANKS)),
        (selective_log_softmax, (LOGITS, IDS)),
        (token_logps, (HIDDEN, WEIGHT, IDS)),
    ):
        infinite = torch.ones(IDS.shape).index_fill(1, torch.tensor([2]), math.inf)
        for temperature in (1e-40, torch.full(IDS.shape, 1e-40), infinite):
            with pytest.raises(ValueError, match="temperature must be"):
                form(*inputs, temperature=temperature)
        with pytest.raises(ValueError, match=r"temperature must be at least 0.01, float32 .*; got 0.001"):
            form(*inputs, temperature=1e-3, logit_scale=1e28)
        with pytest.raises(ValueError, match="logit_softcap must be at least 1e-30"):
            form(*inputs, logit_softcap=1e-40)
    with pytest.raises(ValueError, match=r"weight must be .*\(V, 8\); got .*\(11, 7\)"):
        fused_linear_grpo_rank_loss(HIDDEN, WEIGHT[:, 1:], IDS, RANKS)
    with pytest.raises(TypeError, match="weight must have the dtype of hidden"):
        fused_linear_grpo_rank_loss(HIDDEN, WEIGHT.double(), IDS, RANKS)
    with pytest.raises(ValueError, match=r"bias must be .*\(11,\); got .*\(8,\)"):
        fused_linear_grpo_rank_loss(HIDDEN, WEIGHT, IDS, RANKS, bias=torch.zeros(H))
    with pytest.raises(ValueError, match=r"chunk_size must be .* got 0"):
        fused_linear_grpo_rank_loss(HIDDEN, WEIGHT, IDS, RANKS, chunk_size=0)
    with pytest.raises(TypeError, match="hidden must be a tensor"):
        token_logps([1.0], WEIGHT, IDS)
    with pytest.raises(TypeError, match="return_entropy must be True or False; got str 'no'"):
        token_logps(HIDDEN, WEIGHT, IDS, return_entropy="no")
    with pytest.raises(TypeError, match="return_entropy must be True or False; got int 1"):
        selective_log_softmax(HIDDEN @ WEIGHT.T, IDS, return_entropy=1)
    tiny = torch.float8_e4m3fn
    with pytest.raises(
        TypeError, match=r"hidden must have a floating point dtype of at least 16 bits; got .*float8"
    ):
        fused_linear_grpo_rank_loss(HIDDEN.to(tiny), WEIGHT.to(tiny), IDS, RANKS)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_sharded_parameter_is_refused_by_name(backend, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        weight = distribute_tensor(WEIGHT, init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(TypeError, match=r"weight must be a plain tensor.*full_tensor.*got a DTensor"):
            fused_linear_grpo_rank_loss(HIDDEN, weight, IDS, RANKS, backend=backend)
        plain = fused_linear_grpo_rank_loss(HIDDEN, weight.full_tensor(), IDS, RANKS, backend=backend)
        assert torch.isfinite(plain.loss)
    finally:
        dist.destroy_process_group()


def test_tensors_without_values_have_shapes():
    """A model on the device "meta" goes through the loss, autocast or not."""
    arguments = {"oracle_ranks": RANKS.to("meta"), "mask": torch.ones(B, T, device="meta")}
    ids, hidden = IDS.to("meta"), HIDDEN.to("meta").requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [
            grpo_rank_loss(LOGPS.to("meta"), **arguments),
            grpo_rank_loss_from_logits(LOGITS.to("meta"), ids, **arguments),
            fused_linear_grpo_rank_loss(hidden, WEIGHT.to("meta"), ids, **arguments),
        ]
    outputs[-1].loss.backward()
    assert hidden.grad.shape == hidden.shape and hidden.grad.is_meta
    for out in outputs:
        assert out.loss.is_meta and out.loss.shape == () and out.advantages.shape == (B,)


def test_packed_hidden_states():
    hidden, ids = HIDDEN.view(-1, H), IDS.view(-1)
    lengths = torch.full((B,), T)
    assert torch.isfinite(fused_linear_grpo_rank_loss(hidden, WEIGHT, ids, RANKS, lengths=lengths).loss)
    with pytest.raises(ValueError, match="lengths must add up to the 30 rows of hidden; got 31"):
        fused_linear_grpo_rank_loss(hidden, WEIGHT, ids, RANKS, lengths=torch.tensor([5, 5, 5, 5, 5, 6]))
    with pytest.raises(ValueError, match="lengths must be at least 0; got -1"):
        fused_linear_grpo_rank_loss(hidden, WEIGHT, ids, RANKS, lengths=torch.tensor([5, 5, 5, 5, 11, -1]))
    with pytest.raises(TypeError, match="lengths must be int64 or int32"):
        fused_linear_grpo_rank_loss(hidden, WEIGHT, ids, RANKS, lengths=lengths.float())
    with pytest.raises(ValueError, match=r"hidden must be .*\(M, H\)"):
        fused_linear_grpo_rank_loss(HIDDEN, WEIGHT, ids, RANKS, lengths=lengths)
    with pytest.raises(ValueError, match=r"oracle_ranks .* 5"):
        fused_linear_grpo_rank_loss(hidden[:25], WEIGHT, ids[:25], RANKS, lengths=lengths[:5])


def test_ranking():
    scores = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"scores must be .*\(2, 3\); got .*\(2, 4\)"):
        rank_advantages(torch.zeros(2, 4), RANKS)
    with pytest.raises(TypeError, match="scores must have a floating point dtype"):
        rank_advantages(RANKS, RANKS)
    with pytest.raises(ValueError, match=r"scores must not be NaN; got NaN at \[1, 2\]"):
        rank_advantages(ranks_with(math.nan), RANKS)
    with pytest.raises(ValueError, match=r"oracle_ranks .* got -1.0"):
        rank_advantages(scores, ranks_with(-1))
    with pytest.raises(ValueError, match="backend='cuda' cannot run rank_penalty"):
        rank_advantages(scores, RANKS, backend="cuda")


def test_module():
    loss = GRPORankLoss(beta=0.04, loss_type="dapo")
    with pytest.raises(ValueError, match="exactly one of logps, logits and hidden must be given; got none"):
        loss(oracle_ranks=RANKS)
    with pytest.raises(ValueError, match="token_ids must be given with logits"):
        loss(logits=LOGITS, oracle_ranks=RANKS)
    with pytest.raises(ValueError, match="weight must be given with hidden"):
        loss(hidden=HIDDEN, token_ids=IDS, oracle_ranks=RANKS)
    with pytest.raises(ValueError, match="weight, lengths, entropy must be None with logits"):
        loss(
            logits=LOGITS, token_ids=IDS, oracle_ranks=RANKS, weight=WEIGHT, lengths=IDS[:, 0], entropy=LOGPS
        )
    with pytest.raises(ValueError, match="token_ids must be None with logps"):
        loss(LOGPS, RANKS, token_ids=IDS)
    with pytest.raises(TypeError, match="mask belong"):
        GRPORankLoss(mask=LOGPS)
    with pytest.raises(TypeError, match="no option 'betta'"):
        GRPORankLoss(betta=1)
    assert "beta=0.04" in repr(loss)
    assert repr(GRPORankLoss(temperature=0.7)) != repr(GRPORankLoss())


def test_module_gives_what_the_functions_give():
    torch.manual_seed(0)
    hidden, weight = torch.randn(B, T, H), torch.randn(V, H)
    logits = hidden @ weight.t()
    logps = selective_log_softmax(logits, IDS)
    loss = GRPORankLoss(kind="oracle", epsilon=0.1)
    want = grpo_rank_loss(logps, RANKS, kind="oracle", epsilon=0.1).loss
    for inputs in ({"logps": logps}, {"logits": logits}, {"hidden": hidden, "weight": weight}):
        ids = {} if "logps" in inputs else {"token_ids": IDS}
        torch.testing.assert_close(loss(oracle_ranks=RANKS, **inputs, **ids).loss, want)


def test_counts_are_integers():
    with pytest.raises(TypeError, match="max_completion_length must be an integer; got float"):
        grpo_rank_loss(LOGPS, RANKS, loss_type="dr_grpo", max_completion_length=7.5)
    with pytest.raises(TypeError, match="chunk_size must be an integer; got float"):
        fused_linear_grpo_rank_loss(HIDDEN, WEIGHT, IDS, RANKS, chunk_size=1.5)


@pytest.mark.parametrize("weight", [math.nan, math.inf, -0.5])
def test_confidence_is_no_sign_and_no_gap(weight):
    weights = torch.tensor([1.0, weight])
    with pytest.raises(ValueError, match="weights must be finite and at least 0"):
        grpo_rank_loss(LOGPS, RANKS, weights=weights)
    with pytest.raises(ValueError, match="weights must be finite and at least 0"):
        rank_advantages(torch.zeros(2, 3), RANKS, weights=weights)


@pytest.mark.parametrize("name", ["advantages", "sampling_ratio"])
def test_a_packed_tensor_with_two_meanings_is_refused(name):
    """Five responses of five tokens in all: a flat tensor of five may be one a response or one a token."""
    torch.manual_seed(0)
    hidden, weight, ids = torch.randn(5, H), torch.randn(V, H), torch.arange(5)
    lengths, values = torch.tensor([2, 0, 1, 1, 1]), torch.arange(5.0)
    given = {"advantages": torch.ones(5, 1), "loss_type": "luspo"}
    with pytest.raises(
        ValueError, match=rf"{name} must be \(B, 1\) for one a response, .* got \(5,\) with 5 responses"
    ):
        fused_linear_grpo_rank_loss(hidden, weight, ids, lengths=lengths, **{**given, name: values})
    out = fused_linear_grpo_rank_loss(
        hidden, weight, ids, lengths=lengths, **{**given, name: values[:, None]}
    )
    assert out.advantages.shape == (5,)
    assert out.loss.item() == pytest.approx(-(values * lengths).sum().item() / 5)
    one = {"lengths": torch.ones_like(lengths), **given, name: values}  # both meanings are the same
    assert fused_linear_grpo_rank_loss(hidden, weight, ids, **one).loss.item() == pytest.approx(-2.0)


def test_advantages_may_be_a_column():
    advantages = torch.arange(float(B))
    column = grpo_rank_loss(LOGPS, advantages=advantages[:, None])
    assert column.loss == grpo_rank_loss(LOGPS, advantages=advantages).loss
    assert column.advantages.shape == (B,)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_word_is_no_flag_of_any_function(backend):
    calls = {
        "inplace_backward": [
            lambda **no: grpo_rank_loss_from_logits(LOGITS, IDS, RANKS, backend=backend, **no),
        ],
        "validate": [
            lambda **no: fused_linear_grpo_rank_loss(HIDDEN, WEIGHT, IDS, RANKS, backend=backend, **no),
            lambda **no: rank_advantages(torch.zeros(2, 3), RANKS, backend=backend, **no),
            lambda **no: selective_log_softmax(LOGITS, IDS, backend=backend, **no),
            lambda **no: token_logps(HIDDEN, WEIGHT, IDS, backend=backend, **no),
            lambda **no: fused_linear_dpo_loss(
                HIDDEN, WEIGHT, IDS, ref_logps_sum=torch.zeros(B), backend=backend, **no
            ),
        ],
    }
    for name, functions in calls.items():
        for function in functions:
            with pytest.raises(TypeError, match=f"{name} must be True or False; got str 'no'"):
                function(**{name: "no"})
