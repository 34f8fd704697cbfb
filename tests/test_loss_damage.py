"""What is wrong with a batch is refused, or does no harm: each case once gave the loss of something else."""

import math

import pytest
import torch

from rlaif_fast import (
    GRPORankLoss,
    fused_linear_dpo_loss,
    fused_linear_grpo_rank_loss,
    fused_linear_lipo_loss,
    grpo_rank_loss,
    grpo_rank_loss_from_logits,
    rank_advantages,
    selective_log_softmax,
    token_logps,
)
from rlaif_fast.loss.reference import policy_scores
from rlaif_fast.loss.testing import random_problem, relative_l2

RANKS = torch.tensor([[0, 1, 2]])
INDEX = torch.zeros(3, dtype=torch.int64)
BACKENDS = ["cpu", "reference"]


def logps_of(B=3, T=4, dtype=torch.float32, seed=0):
    return -torch.rand(B, T, generator=torch.Generator().manual_seed(seed)).to(dtype)


def small(seed=0, B=3, T=4, H=5, V=11):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(B, T, H, generator=g), torch.randn(V, H, generator=g)
    return hidden, weight, torch.randint(0, V, (B, T), generator=g)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_response_without_a_token_stands_last(backend):
    """Logps -1 and -2 for ranks 0 and 1, a masked response ranked last: the orders agree."""
    logps = torch.tensor([[-1.0], [-2.0], [-3.0]])
    mask = torch.tensor([[1], [1], [0]])
    options = {"kind": "directed", "backend": backend}
    masked = grpo_rank_loss(logps, RANKS, mask=mask, **options)
    whole = grpo_rank_loss(logps, RANKS, **options)
    assert torch.equal(masked.advantages, whole.advantages)
    assert masked.stats["kendall_tau"] == 1 and masked.stats["top1_agreement"] == 1
    by_index = grpo_rank_loss(logps, RANKS.view(-1), group_index=INDEX, mask=mask, **options)
    assert torch.equal(by_index.advantages, whole.advantages)
    assert policy_scores(logps, mask.bool(), 3, "sum")[0, 2] < -1e38


def test_a_group_index_does_not_overwrite_advantages():
    with pytest.raises(ValueError, match="group_index belongs to oracle_ranks; got advantages"):
        grpo_rank_loss(logps_of(), RANKS.view(-1), advantages=torch.full((3,), 100.0), group_index=INDEX)


@pytest.mark.parametrize(
    ("name", "value"), [("kind", "oracle"), ("penalty_weight", 2.0), ("scale", "group"), ("score", "sum")]
)
def test_options_of_ranks_do_not_go_with_advantages(name, value):
    with pytest.raises(ValueError, match=f"{name} belongs to oracle_ranks, not to advantages; got {value!r}"):
        grpo_rank_loss(logps_of(), advantages=torch.ones(3), **{name: value})
    grpo_rank_loss(logps_of(), RANKS.view(-1), group_index=INDEX, **{name: value})


def logits_of(base=None):
    """A leaf, and logits that are no leaf: those may be written over."""
    leaf = torch.randn(3, 4, 11, generator=torch.Generator().manual_seed(1)) if base is None else base
    leaf = leaf.clone().requires_grad_()
    return leaf, leaf * 1.0


def loss_in_place(logits, **options):
    ids = torch.arange(12).view(3, 4) % 11
    return grpo_rank_loss_from_logits(logits, ids, RANKS, inplace_backward=True, **options).loss


def test_writing_over_the_logits_is_noticed_by_what_saved_them():
    _, logits = logits_of()
    other = logits.square().mean()
    loss = loss_in_place(logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_two_losses_do_not_write_over_the_same_logits():
    _, logits = logits_of()
    with pytest.raises(RuntimeError, match="something has written to them"):
        (loss_in_place(logits) + loss_in_place(logits)).backward()


def test_logits_that_changed_are_not_used():
    _, logits = logits_of()
    loss = loss_in_place(logits)
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="something has written to them"):
        loss.backward()


def test_rows_that_share_memory_are_not_written_over():
    base = torch.randn(11, generator=torch.Generator().manual_seed(2))
    gradients = []
    for in_place in (False, True):
        leaf = base.clone().requires_grad_()
        logits = (leaf * 1.0).expand(3, 4, 11)
        ids = torch.arange(12).view(3, 4) % 11
        grpo_rank_loss_from_logits(logits, ids, RANKS, inplace_backward=in_place).loss.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("form", ["logps", "hidden", "dpo", "token_logps", "log_softmax"])
def test_a_second_derivative_is_refused(form):
    hidden, weight, ids = small(B=4)
    ranks = torch.tensor([[0, 1], [1, 0]])
    leaf = {"logps": logps_of(4), "log_softmax": hidden @ weight.T}.get(form, hidden).requires_grad_()
    losses = {
        "logps": lambda: grpo_rank_loss(leaf, ranks, backend="cpu").loss,
        "hidden": lambda: fused_linear_grpo_rank_loss(leaf, weight, ids, ranks, backend="cpu").loss,
        "dpo": lambda: (
            fused_linear_dpo_loss(leaf, weight, ids, ref_logps_sum=torch.zeros(4), backend="cpu").loss
        ),
        "token_logps": lambda: token_logps(leaf, weight, ids, backend="cpu").sum(),
        "log_softmax": lambda: selective_log_softmax(leaf, ids, backend="cpu").sum(),
    }
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(losses[form](), leaf, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("name", ["logps", "old_logps"])
def test_the_order_of_16_bit_logps_is_taken_in_float32(name):
    logps = logps_of(64, 300, torch.bfloat16)
    ranks = torch.arange(64) % 8
    given = {"old_logps": logps} if name == "old_logps" else {}
    grid = grpo_rank_loss(logps, ranks.view(8, 8), **given)
    index = grpo_rank_loss(logps, ranks, group_index=torch.arange(64) // 8, **given)
    assert index.advantages.dtype == torch.float32
    torch.testing.assert_close(grid.advantages.flatten(), index.advantages)
    torch.testing.assert_close(grid.stats["kendall_tau"], index.stats["kendall_tau"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_reference_computes_16_bit_logps_in_float32(dtype):
    logps = logps_of(6, 300, dtype)
    ranks = torch.tensor([[0, 1, 2], [2, 1, 0]])
    for options in ({"loss_type": "dapo"}, {"score": "sum"}):
        got = grpo_rank_loss(logps, ranks, backend="reference", **options)
        want = grpo_rank_loss(logps.double(), ranks, backend="reference", **options)
        assert got.loss.dtype == torch.float32
        torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(got.advantages.double(), want.advantages, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["logits", "hidden", "dpo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_masked_token_may_be_nan(dtype, form, backend):
    hidden, weight, ids = (x.to(dtype) if x.is_floating_point() else x for x in small(B=4))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1, 2:] = False
    gradients = []
    for damage in (0.0, math.nan):
        leaf = hidden.clone()
        leaf[1, 3] = damage
        leaf.requires_grad_()
        head = weight.clone().requires_grad_()
        options = {"mask": mask, "backend": backend}
        ranks = torch.tensor([[0, 1], [1, 0]])
        if form == "logits":
            loss = grpo_rank_loss_from_logits(
                leaf @ torch.eye(5, dtype=dtype), ids % 5, ranks, **options
            ).loss
            loss = loss + 0 * head.sum()
        elif form == "hidden":
            loss = fused_linear_grpo_rank_loss(leaf, head, ids, ranks, **options).loss
        else:
            loss = fused_linear_dpo_loss(leaf, head, ids, ref_logps_sum=torch.zeros(4), **options).loss
        gradients.append((loss, *torch.autograd.grad(loss, (leaf, head))))
    kept = gradients[1][1].isfinite() if form == "logits" else torch.ones_like(hidden, dtype=torch.bool)
    assert kept[mask].all()
    for clean, damaged in zip(*gradients):
        where = kept if clean.shape == hidden.shape else torch.ones_like(clean, dtype=torch.bool)
        torch.testing.assert_close(clean[where], damaged[where])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["logits", "hidden", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_group_that_is_not_valid_may_be_nan(dtype, form, backend):
    hidden, weight, ids = (x.to(dtype) if x.is_floating_point() else x for x in small(B=4))
    ranks, valid = torch.tensor([[0, 1], [1, 0]]), torch.tensor([True, False])
    gradients = []
    for damage in (0.0, math.nan):
        leaf, head = hidden.clone(), weight.clone().requires_grad_()
        leaf[2:] = damage
        leaf.requires_grad_()
        if form == "logits":
            loss = grpo_rank_loss_from_logits(leaf, ids % 5, ranks, valid=valid, backend=backend).loss
            loss = loss + 0 * head.sum()
        elif form == "hidden":
            loss = fused_linear_grpo_rank_loss(leaf, head, ids, ranks, valid=valid, backend=backend).loss
        else:
            options = {"lengths": torch.tensor([4, 4, 5, 3]), "valid": valid, "backend": backend}
            loss = fused_linear_grpo_rank_loss(leaf.flatten(0, 1), head, ids.flatten(), ranks, **options).loss
        gradients.append((loss, *torch.autograd.grad(loss, (leaf, head))))
    assert gradients[0][1].count_nonzero() > 0
    for clean, damaged in zip(*gradients):
        assert torch.equal(clean, damaged)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_advantages_come_back_as_given(backend):
    hidden, weight, ids = small()
    given = {"advantages": torch.randn(12), "lengths": torch.tensor([3, 4, 5]), "backend": backend}
    out = fused_linear_grpo_rank_loss(hidden.view(12, 5), weight, ids.view(12), **given)
    assert torch.equal(out.advantages, given["advantages"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_response_that_was_not_judged_may_be_nan(backend):
    hidden, weight, ids = small()
    judged = torch.tensor([[True, True, False]])
    results = []
    for damage in (-7.0, math.nan):
        leaf = hidden.clone().requires_grad_()
        out = fused_linear_lipo_loss(
            leaf,
            weight,
            ids,
            ref_logps_sum=torch.tensor([-5.0, -6.0, damage]),
            labels=torch.tensor([[1.0, 0.5, damage]]),
            judged=judged,
            backend=backend,
        )
        results.append((out.loss, *torch.autograd.grad(out.loss, leaf)))
    for clean, damaged in zip(*results):
        torch.testing.assert_close(clean, damaged)


@pytest.mark.parametrize(
    ("changes", "words"),
    {
        "labels overflow": ({"labels": torch.tensor([[200.0, 199.0, 0.0]])}, "labels must be finite"),
        "labels are NaN": ({"labels": torch.tensor([[math.nan, 1.0, 0.0]])}, "labels must be finite"),
        "no response": ({"labels": torch.zeros(3, 0)}, "labels must be"),
        "a weight below 0": ({"group_weights": torch.tensor([-1.0])}, "group_weights must be finite and at least 0"),
    }.values(),
)  # fmt: skip
def test_lipo_refuses(changes, words):
    hidden, weight, ids = small()
    arguments = {"ref_logps_sum": torch.zeros(3), "labels": torch.tensor([[1.0, 0.5, 0.0]]), **changes}
    with pytest.raises(ValueError, match=words):
        fused_linear_lipo_loss(hidden, weight, ids, **arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_pairs_get_no_gradient(backend):
    hidden, weight, ids = small(B=4)
    weights = torch.ones(2, requires_grad=True)
    out = fused_linear_dpo_loss(
        hidden.requires_grad_(), weight, ids, ref_logps_sum=torch.zeros(4), pair_weights=weights, backend=backend
    )  # fmt: skip
    out.loss.backward()
    assert weights.grad is None


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["grpo_rank", "dpo", "lipo"])
def test_a_loss_scale_reaches_float16_gradients_before_they_are_rounded(name, packed, autocast):
    """With 65,536 items a gradient is 1e-5 of a probability: 0 in float16 before it is scaled."""
    problem = random_problem(N=4, G=3, V=65, dtype=torch.float16)
    mask = problem.tensors["mask"]
    ranks = torch.tensor([[0, 1, 2]] * 4)
    sums = torch.zeros(12)
    gradients = []
    for dtype, backend in ((torch.float16, "cpu"), (torch.float64, "reference")):
        kept = torch.float32 if autocast and dtype == torch.float16 else dtype
        hidden = problem.hidden.detach().to(kept).requires_grad_()
        weight = problem.weight.detach().to(kept).requires_grad_()
        rows, ids, layout = hidden, problem.token_ids.where(mask, 0), {"mask": mask}
        if packed:
            rows, ids, layout = hidden[mask], ids[mask], {"lengths": mask.sum(1)}
        options = {"num_items_in_batch": 65536, "backend": backend, **layout}
        with torch.autocast("cpu", torch.float16, enabled=kept != dtype):
            if name == "grpo_rank":
                loss = fused_linear_grpo_rank_loss(rows, weight, ids, ranks, loss_type="dapo", **options).loss
            elif name == "dpo":
                loss = fused_linear_dpo_loss(rows, weight, ids, ref_logps_sum=sums, **options).loss
            else:
                labels = -ranks.to(dtype)
                loss = fused_linear_lipo_loss(
                    rows, weight, ids, ref_logps_sum=sums, labels=labels, **options
                ).loss
        (loss.double() * 4096).backward()
        gradients.append((hidden.grad, weight.grad))
    for got, want in zip(*gradients):
        assert relative_l2(got, want) < 4e-3


def test_float64_is_not_rounded_by_autocast():
    hidden, weight, ids = (x.double() if x.is_floating_point() else x for x in small())
    plain = token_logps(hidden, weight, ids)
    with torch.autocast("cpu", torch.bfloat16):
        cast = token_logps(hidden, weight, ids)
        with pytest.raises(TypeError, match="weight must have the dtype of hidden"):
            token_logps(hidden, weight.float(), ids)
    assert cast.dtype == torch.float64 and torch.equal(plain, cast)


@pytest.mark.parametrize(
    ("ranks", "kind"),
    [
        (torch.tensor([[2**24, 2**24 + 1, 0]]), "oracle"),
        (torch.tensor([[1e9, 1e9 + 1, 0]], dtype=torch.float64), "zscore"),
        (torch.tensor([[1e300, 1.0, 0]], dtype=torch.float64), "zscore"),
    ],
)
def test_ranks_that_float32_cannot_tell_apart_are_refused(ranks, kind):
    with pytest.raises(ValueError, match="oracle_ranks must differ in"):
        rank_advantages(torch.zeros(1, 3), ranks, kind=kind)
    with pytest.raises(ValueError, match="oracle_ranks must differ in"):
        grpo_rank_loss(logps_of(), ranks, kind=kind)
    rank_advantages(
        torch.zeros(1, 3), ranks, kind=kind, judged=torch.tensor([[True, True, True]]).logical_not()
    )
    if kind == "oracle":
        assert rank_advantages(torch.zeros(1, 3, dtype=torch.float64), ranks, kind=kind).has_signal.all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["oracle", "zscore"])
def test_what_float64_arithmetic_leaves_of_equal_rewards_is_a_tie(kind, backend):
    ranks = torch.tensor([[0.1 + 0.2, 0.3, 0.9]], dtype=torch.float64)
    assert ranks[0, 0] != ranks[0, 1]
    for scores, ranked in ((torch.zeros(1, 3), ranks), (torch.zeros(2, 3), torch.cat([ranks, 1 - ranks]))):
        found = rank_advantages(scores, ranked, kind=kind, backend=backend).advantages
        assert torch.equal(found[:, 0], found[:, 1])


@pytest.mark.parametrize("name", ["scores", "old_logps", "oracle_ranks"])
def test_a_list_is_refused_by_name(name):
    given = {"oracle_ranks": RANKS.view(-1), "group_index": INDEX, name: [0.0, 1.0, 2.0]}
    with pytest.raises(TypeError, match=f"{name} must be a tensor"):
        grpo_rank_loss(logps_of(), **given)


def test_old_logps_of_another_shape_are_named():
    with pytest.raises(ValueError, match="old_logps must be a tensor of shape"):
        grpo_rank_loss(logps_of(), RANKS.view(-1), group_index=INDEX, old_logps=logps_of(3, 2))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_numbers_that_make_a_loss_of_nothing_are_refused(bad):
    with pytest.raises(ValueError, match="num_items_in_batch must be above 0 and finite"):
        grpo_rank_loss(logps_of(), RANKS, num_items_in_batch=bad)
    with pytest.raises(ValueError, match="num_items_in_batch must be above 0 and finite"):
        grpo_rank_loss(logps_of(), RANKS, num_items_in_batch=torch.tensor(bad))
    with pytest.raises(ValueError, match=r"advantages must be finite; got .* at \[1\]"):
        grpo_rank_loss(logps_of(), advantages=torch.tensor([1.0, bad, 0.0]))
    with pytest.raises(ValueError, match=r"sampling_ratio must be finite; got .* at \[1, 0\]"):
        grpo_rank_loss(logps_of(), RANKS, sampling_ratio=torch.tensor([1.0, bad, 1.0]))
    mask = torch.ones(3, 4)
    mask[1] = 0
    damaged = grpo_rank_loss(logps_of(), advantages=torch.tensor([1.0, bad, 0.0]), mask=mask)
    assert damaged.loss.isfinite()


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "bogus"},
        {"logit_softcap": -5.0},
        {"logit_scale": 0.0},
        {"backend": "bogus"},
        {"loss_type": "dr_grpo"},
    ],
)
def test_the_module_refuses_options_at_its_construction(options):
    with pytest.raises(ValueError, match=next(iter(options)).replace("loss_type", "max_completion_length")):
        GRPORankLoss(**options)


@pytest.mark.parametrize("options", [{"backend": "cpu"}, {"temperature": 2.0}])
def test_the_module_refuses_its_options_in_a_call(options):
    with pytest.raises(
        TypeError, match=f"{next(iter(options))} belong.* to the construction of GRPORankLoss"
    ):
        GRPORankLoss()(logps_of(), RANKS, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["unbiased_kl", "validate"])
def test_a_word_is_no_flag(name, backend):
    """The reference read "false" as true, and multiplied the KL by the ratio."""
    with pytest.raises(TypeError, match=f"{name} must be True or False; got str 'false'"):
        grpo_rank_loss(logps_of(), RANKS, ref_logps=logps_of(), beta=0.1, backend=backend, **{name: "false"})
