"""The packed forward against the plain padded one: hidden states, log-probabilities and every gradient."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from shared_prefix_parts import TOLERANCE, assert_same, distance, standard_case
from torch import Tensor

from rlaif_fast.policy.attention import (
    ATTENTION_BACKENDS,
    AttentionBackend,
    ReferenceContext,
    choose_backend,
)
from rlaif_fast.policy.testing import (
    FAMILIES,
    IDS,
    TOKENIZER,
    make_media,
    make_model,
    make_policy,
    make_prompt,
    make_responses,
    standard_prompts,
    words,
)

CPU_TRAINED = ("sdpa", "reference")  # backends whose backward pass runs on the CPU


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", CPU_TRAINED)
@pytest.mark.parametrize("max_packed_tokens", [100_000, 70])
def test_equals_the_plain_path(family: str, backend: str, max_packed_tokens: int) -> None:
    """Unequal groups in one row and in several, text only, two videos, an image and a video, the vision tower
    trained.
    """
    model = make_model(family)
    ours = make_policy(family, model=model, attention_backend=backend, max_packed_tokens=max_packed_tokens)
    assert_same(ours, make_policy(family, model=model, shared_prefix=False), standard_case(family))


def rms_norm(self, x: Tensor) -> Tensor:
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def rotate_vision(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(-2) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(-2)

    return rotate(q), rotate(k)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_plain_path_in_float64(family: str, monkeypatch) -> None:
    """Hidden states and gradients; the model's few float32 islands (norms, vision rotary) are lifted to
    float64.
    """
    model = make_model(family, dtype=torch.float64)
    modeling = sys.modules[type(model).__module__]
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            monkeypatch.setattr(type(module), "forward", rms_norm)
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb_vision", rotate_vision)
    prompts, ids, lengths, sizes = standard_case(family)
    results = []
    for shared in (True, False):
        policy = make_policy(family, model=model, shared_prefix=shared)
        model.zero_grad()
        hidden = policy.response_hidden(prompts, ids, lengths, group_sizes=sizes)
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        (hidden * weights).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((hidden.detach(), gradients))
    (hidden, gradients), (expected, expected_gradients) = results
    assert distance(hidden, expected) < TOLERANCE[torch.float64]
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert distance(gradient, expected_gradients[name]) < TOLERANCE[torch.float64], name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ([4], [1]),
        ([1], [1]),
        ([1, 1, 1], [3]),
        ([3, 1, 1, 5], [1, 3]),
        ([6, 6, 6, 6], [2, 2]),
        ([2, 7], [0, 2]),
    ],
    ids=["G=1", "one token", "one-token responses", "mixed", "equal groups", "an empty group"],
)
def test_small_groups(family: str, lengths: list[int], sizes: list[int]) -> None:
    model = make_model(family)
    prompts = standard_prompts(family)[: len(sizes)]
    ids, lengths_tensor = make_responses(lengths, width=9)
    plain = make_policy(family, model=model, shared_prefix=False)
    assert_same(make_policy(family, model=model), plain, (prompts, ids, lengths_tensor, sizes))


@pytest.mark.parametrize("family", FAMILIES)
def test_identical_responses_share_their_tokens_and_add_their_gradients(family: str) -> None:
    model = make_model(family)
    prompts = standard_prompts(family)[:2]
    ids, lengths = make_responses([5, 5, 3, 4, 4, 1])
    ids[1], ids[4, :3] = ids[0], ids[3, :3]
    plain = make_policy(family, model=model, shared_prefix=False)
    assert_same(make_policy(family, model=model), plain, (prompts, ids, lengths, None))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_sees_the_layout_again(family: str, reentrant: bool) -> None:
    model = make_model(family)
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ours = make_policy(family, model=checkpointed)
    assert_same(ours, make_policy(family, model=model, shared_prefix=False), standard_case(family))


def test_a_changed_attention_implementation_still_sees_the_layout() -> None:
    model = make_model("qwen3_vl")
    policy = make_policy("qwen3_vl", model=model)
    prompts, ids, lengths, sizes = standard_case("qwen3_vl")
    before = policy.response_logps(prompts, ids, lengths, group_sizes=sizes)
    model.set_attn_implementation("eager")
    assert distance(policy.response_logps(prompts, ids, lengths, group_sizes=sizes), before) < 1e-5


def test_an_attention_implementation_reads_its_own_name() -> None:
    """transformers' flash attention loads the kernel that the config names."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = []

    def named(module, *args, **kwargs):
        names.append(module.config._attn_implementation)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    model = make_model("qwen3_vl").eval()
    prompt = make_prompt("qwen3_vl", before=6)
    ALL_ATTENTION_FUNCTIONS.register("named", named)
    ALL_MASK_ATTENTION_FUNCTIONS.register("named", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.model.language_model.config._attn_implementation = "named"
    make_policy("qwen3_vl", model=model)
    with torch.no_grad():
        model(input_ids=prompt.input_ids[None])
    assert set(names) == {"named"}
    assert model.model.language_model.config._attn_implementation.endswith("_named")


def test_evaluating_restores_each_module() -> None:
    policy = make_policy("qwen3_vl")
    policy.vision.tower.eval()
    with policy.evaluating():
        assert not any(module.training for module in policy.model.modules())
    assert policy.model.training and not policy.vision.tower.training


def test_the_end_of_taught_answers_may_be_drawn() -> None:
    model = make_model("qwen3_vl")
    model.generation_config.eos_token_id = IDS["<|endoftext|>"]
    policy = make_policy("qwen3_vl", model=model)
    assert policy.eos_token_ids == (IDS["<|endoftext|>"], IDS["<|im_end|>"])
    assert policy.token_ids_allowed[list(policy.eos_token_ids)].all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_alone_works_as_before(family: str) -> None:
    """Installing the attention function changes nothing for a forward pass that carries no layout."""
    model = make_model(family).eval()
    prompt = make_prompt(family, before=6)
    inputs = {"input_ids": prompt.input_ids[None], "attention_mask": torch.ones(1, len(prompt.input_ids))}
    options = {"max_new_tokens": 5, "do_sample": False}
    before = model(**inputs).logits, model.generate(**inputs, **options)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        make_policy(family, model=model)
        assert model.model.language_model.config._attn_implementation.endswith(implementation)
        torch.testing.assert_close(model(**inputs).logits, before[0])
        assert torch.equal(model.generate(**inputs, **options), before[1])


def test_head_forbids_special_tokens_but_the_end() -> None:
    policy = make_policy("qwen3_vl", forbidden_token_ids=[IDS["word3"]])
    allowed = policy.token_ids_allowed
    for token in (
        "<|im_start|>",
        "<|video_pad|>",
        "<|image_pad|>",
        "<|vision_start|>",
        "<|endoftext|>",
        "word3",
    ):
        assert not allowed[IDS[token]], token
    assert allowed[IDS["<|im_end|>"]]
    assert allowed[IDS["word4"]]
    hidden = torch.randn(3, policy.head_weight.shape[1])
    probabilities = policy.logits(hidden).softmax(-1)
    assert (probabilities[:, ~allowed] == 0).all()
    # A bias moves no other token: the allowed ones keep the softmax among themselves.
    expected = (hidden @ policy.head_weight.T)[:, allowed].softmax(-1)
    torch.testing.assert_close(probabilities[:, allowed], expected)


def test_entropy_and_logps_do_not_depend_on_the_chunk() -> None:
    policy = make_policy("qwen3_vl")
    prompts, ids, lengths, sizes = standard_case("qwen3_vl")
    results = []
    for chunk in (10_000, 7):
        policy.model.zero_grad()
        logps, entropies = policy.response_logps(
            prompts, ids, lengths, group_sizes=sizes, temperature=0.7, return_entropy=True, chunk_size=chunk
        )
        (logps.sum() + entropies.sum()).backward()
        results.append((logps, entropies, policy.head_weight.grad.clone()))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_deepstack_reaches_the_first_layers() -> None:
    """With the deepstack levels blanked the answer changes, so the equality above covers them."""
    policy = make_policy("qwen3_vl")
    prompts, ids, lengths, sizes = standard_case("qwen3_vl")
    features = policy.encode_media(prompts)
    assert len(features.levels) == 2
    blank = type(features)((features.levels[0], torch.zeros_like(features.levels[1])), features.spans)
    with_deepstack = policy.response_hidden(prompts, ids, lengths, group_sizes=sizes, features=features)
    without = policy.response_hidden(prompts, ids, lengths, group_sizes=sizes, features=blank)
    assert distance(without, with_deepstack) > 1e-3


def test_auto_checks_a_backend_at_the_head_size_of_the_model(monkeypatch) -> None:
    """On some GPUs a kernel has no backward pass for large heads."""

    class Context(ReferenceContext):
        def attend(self, layer, query, keys, values, scale):
            if query.shape[-1] != 64:
                raise NotImplementedError("this head size")
            return super().attend(layer, query, keys, values, scale)

    picky = AttentionBackend("picky", 99, lambda device, dtype: None, "prefixes", Context, checked=True)
    monkeypatch.setitem(ATTENTION_BACKENDS, "picky", picky)
    assert choose_backend("auto", torch.device("cpu"), torch.float32, 64) is picky
    policy = make_policy("qwen3_vl")
    assert policy.head_size != 64 and policy.backend.name == "sdpa"


def test_wrong_arguments_are_named() -> None:
    policy = make_policy("qwen3_vl")
    prompts = standard_prompts("qwen3_vl")[:2]
    ids, lengths = make_responses([3, 2, 2])
    with pytest.raises(ValueError, match="group_sizes"):
        policy.response_hidden(prompts, ids, lengths)
    with pytest.raises(ValueError, match="group_sizes"):
        policy.response_hidden(prompts, ids, lengths, group_sizes=[1, 1])
    with pytest.raises(ValueError, match="lengths"):
        policy.response_hidden(prompts, ids, lengths[:2], group_sizes=[1, 2])
    with pytest.raises(ValueError, match="attention_backend"):
        choose_backend("fast", torch.device("cpu"), torch.float32)
    assert ATTENTION_BACKENDS["reference"].priority < 0  # never chosen by "auto"


def test_a_prompt_without_media_tokens_for_its_media_is_refused() -> None:
    policy = make_policy("qwen3_vl")
    prompt = make_prompt("qwen3_vl", (make_media("a", (2, 4, 4)),))
    broken = type(prompt)(torch.tensor(words(5, 0)), prompt.media)
    ids, lengths = make_responses([2])
    with pytest.raises(ValueError, match="video"):
        policy.response_hidden([broken], ids, lengths)
    assert TOKENIZER.eos_token_id == policy.eos_token_ids[0]


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("wrong", [5, -1])
def test_lengths_beyond_the_tokens_are_refused(shared_prefix: bool, wrong: int) -> None:
    policy = make_policy("qwen3_vl", shared_prefix=shared_prefix)
    prompts = [make_prompt("qwen3_vl", seed=seed) for seed in (1, 2)]
    token_ids = torch.tensor([words(4, seed) for seed in range(4)])
    with pytest.raises(ValueError, match=r"lengths: expected 0 to 4, the width of token_ids, got \[4, "):
        policy.response_hidden(prompts, token_ids, torch.tensor([4, wrong, 1, 2]))
