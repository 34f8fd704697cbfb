"""One attention call for all pieces of a length gives what a call for each piece gives."""

import json

import pytest
import torch
from torch.nn import functional

from rlaif_fast.loss.testing import relative_l2
from rlaif_fast.policy import vision_attention
from rlaif_fast.policy.testing import make_media, make_model, make_policy, make_prompt


@pytest.mark.parametrize(
    "lengths", [[4, 4, 4], [3, 5, 3, 2, 5], [1], [2, 0, 7]], ids=["equal", "mixed", "one", "empty piece"]
)
def test_each_piece_attends_to_itself(lengths):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 2, sum(lengths), 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    )
    ends = torch.tensor([0, *lengths]).cumsum(0)
    got, _ = vision_attention.batched_sdpa(None, q, k, v, None, scaling=0.3, cu_seq_lens_q=ends)
    want = torch.cat(
        [
            functional.scaled_dot_product_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], scale=0.3)
            for a, b in zip(ends[:-1].tolist(), ends[1:].tolist())
        ],
        dim=2,
    ).transpose(1, 2)
    torch.testing.assert_close(got, want)
    weight = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), (q, k, v)),
        torch.autograd.grad((want * weight).sum(), (q, k, v)),
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_the_tower_gives_what_it_gave(family, monkeypatch):
    """Videos and pictures of several sizes, windows that are cut at the edges."""
    media = [
        make_media("a", (3, 4, 6)),
        make_media("b", (2, 8, 4)),
        make_media("c", (1, 6, 6), is_video=False),
    ]
    prompts = [make_prompt(family, (m,)) for m in media]
    found = []
    for batched in (False, True):
        model = make_model(family)
        with monkeypatch.context() as patch:
            if not batched:
                patch.setattr(vision_attention, "install", lambda tower: None)
            policy = make_policy(family, model=model)
        assert (policy.vision.tower.config._attn_implementation == vision_attention.NAME) is batched
        features = policy.encode_media(prompts)
        sum(level.pow(2).sum() for level in features.levels).backward()
        grads = [p.grad for p in policy.vision.tower.parameters()]
        found.append(([level.detach() for level in features.levels], grads))
    for old, new in zip(found[0], found[1]):
        for a, b in zip(old, new):
            assert relative_l2(b, a) < 1e-5


def test_calls_do_not_grow_with_the_frames(monkeypatch):
    calls = []
    original = functional.scaled_dot_product_attention
    policy = make_policy("qwen3_vl")
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    )
    with torch.no_grad():
        policy.encode_media(
            [make_prompt("qwen3_vl", (make_media("a", (6, 4, 4)), make_media("b", (9, 4, 4))))]
        )
    assert len(calls) == policy.vision.tower.config.depth


def test_a_saved_checkpoint_names_no_implementation_of_ours(tmp_path):
    make_policy("qwen3_vl", model=(model := make_model("qwen3_vl")))
    model.save_pretrained(tmp_path)
    assert "rlaif_fast" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
