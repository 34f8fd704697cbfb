"""The fused head over partly judged groups, rows of any order, and a sharded vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from linear_parts import assert_matches, evaluate

from rlaif_fast import fused_linear_grpo_rank_loss, grpo_rank_loss, grpo_rank_loss_from_logits
from rlaif_fast.loss.testing import random_problem, relative, relative_l2

SHARDS = (20, 13)


def _sharded(rank: int, rendezvous: str, where: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=len(SHARDS))
    first = sum(SHARDS[:rank])
    own = slice(first, first + SHARDS[rank])
    results, sizes_asked, all_gather = [], [], dist.all_gather

    def counted(parts, mine, **options):
        sizes_asked.extend([mine] if mine.dtype == torch.int64 else [])
        return all_gather(parts, mine, **options)

    dist.all_gather = counted
    for options in SHARDED_OPTIONS:
        problem = random_problem(V=sum(SHARDS))
        if options.pop("on_policy", False):
            del problem.tensors["old_logps"]
        hidden = problem.hidden.clone().requires_grad_()
        weight, bias = (x[own].clone().requires_grad_() for x in (problem.weight, problem.bias))
        out = fused_linear_grpo_rank_loss(
            hidden,
            weight,
            problem.token_ids,
            problem.oracle_ranks,
            bias=bias,
            process_group=dist.group.WORLD,
            **problem.tensors,
            **options,
        )
        (2 * out.loss).backward()
        results.append((out.loss.detach(), hidden.grad, weight.grad, bias.grad))
    assert len(sizes_asked) == len(SHARDED_OPTIONS)  # each call asks the others for their sizes once
    torch.save(results, Path(where) / f"{rank}.pt")
    dist.destroy_process_group()


SHARDED_OPTIONS = (
    {"beta": 0.04, "entropy_coef": 0.01},
    {"importance_sampling_level": "sequence", "chunk_size": 5},
    {"on_policy": True, "entropy_coef": 0.01, "chunk_size": 40},
)


def test_a_vocabulary_sharded_over_two_processes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))  # the processes import this module by name
    mp.spawn(_sharded, (f"file://{tmp_path / 'rendezvous'}", str(tmp_path)), nprocs=len(SHARDS))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(SHARDS))]
    for case, options in enumerate(SHARDED_OPTIONS):
        options = {k: v for k, v in options.items() if k != "chunk_size"}
        problem = random_problem(V=sum(SHARDS)).double()
        if options.pop("on_policy", False):
            del problem.tensors["old_logps"]
        want, grads = evaluate(problem, "reference", **options)
        for loss, grad_hidden, *_ in (part[case] for part in parts):
            assert relative(loss, want.loss) <= 1e-5
            assert relative_l2(grad_hidden, 2 * grads[0]) <= 1e-5
        for column in (1, 2):
            whole = torch.cat([part[case][column + 1] for part in parts])
            assert relative_l2(whole, 2 * grads[column]) <= 1e-5


@pytest.mark.parametrize("chunk_size", [3, 10_000])
@pytest.mark.parametrize("old", [True, False])
def test_partly_judged_weighted_groups_in_a_given_order(chunk_size, old):
    problem = random_problem(dtype=torch.float64)
    if not old:
        del problem.tensors["old_logps"]
    judged = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0]]).bool()
    options = {"judged": judged, "weights": torch.tensor([0.5, 2.0, 1.0]).double(), "chunk_size": chunk_size}
    assert_matches(problem, **options)
    assert_matches(problem, scores=torch.rand(3, 4).double(), **options)
    assert_matches(problem, packed=True, scores=torch.rand(3, 4).double(), **options)


@pytest.mark.parametrize("form", ["logps", "logits", "hidden", "packed"])
def test_rows_of_any_order_with_a_group_index(form):
    """Shuffled rows with their group's number give the loss and the statistics of the groups in order."""
    problem = random_problem(dtype=torch.float64)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    index = torch.arange(3).repeat_interleave(4)[order] * 10
    t = {name: x[order] for name, x in problem.tensors.items()}
    judged = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) < 0.8
    ranks = problem.oracle_ranks.flatten()[order]
    rest = {"group_index": index, "judged": judged.flatten()[order], "beta": 0.04}
    ids, hidden = problem.token_ids[order], problem.hidden[order]
    want = fused_linear_grpo_rank_loss(
        problem.hidden, problem.weight, problem.token_ids, problem.oracle_ranks, judged=judged, beta=0.04,
        **problem.tensors,
    )  # fmt: skip
    logits = hidden @ problem.weight.t()
    if form == "logps":
        logps = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
        got = grpo_rank_loss(logps, ranks, **rest, **t)
    elif form == "logits":
        got = grpo_rank_loss_from_logits(logits, ids, ranks, **rest, **t)
    elif form == "hidden":
        got = fused_linear_grpo_rank_loss(hidden, problem.weight, ids, ranks, **rest, **t)
    else:
        mask = t.pop("mask")
        flat = {name: x[mask] for name, x in t.items()}
        got = fused_linear_grpo_rank_loss(
            hidden[mask], problem.weight, ids[mask], ranks, lengths=mask.sum(-1), **rest, **flat
        )
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.advantages, want.advantages[order])
    for name in ("penalty", "ndcg", "kendall_tau", "top1_agreement", "no_signal"):
        torch.testing.assert_close(got.stats[name], want.stats[name])


def test_a_group_index_on_policy_needs_an_order():
    problem = random_problem()
    index = torch.arange(12) % 3
    arguments = {"group_index": index, "mask": problem.tensors["mask"]}
    ranks = problem.oracle_ranks.flatten()
    with pytest.raises(ValueError, match="scores or old_logps must be given with group_index"):
        fused_linear_grpo_rank_loss(problem.hidden, problem.weight, problem.token_ids, ranks, **arguments)
    with pytest.raises(ValueError, match="group_size must be None with group_index"):
        grpo_rank_loss(problem.logps, ranks, group_size=4, **arguments)


def test_a_group_without_this_process_is_refused():
    problem = random_problem()
    outside = dist.distributed_c10d.GroupMember.NON_GROUP_MEMBER  # what `new_group` gives there
    with pytest.raises(TypeError, match="process_group must be one that this process belongs to"):
        fused_linear_grpo_rank_loss(
            problem.hidden, problem.weight, problem.token_ids, problem.oracle_ranks, process_group=outside
        )
