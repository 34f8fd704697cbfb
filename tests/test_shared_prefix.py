"""The packed forward against the plain padded one: hidden states, log-probabilities and every gradient."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlaif_fast.policy.attention import ATTENTION_BACKENDS, ReferenceContext, choose_backend
from rlaif_fast.policy.flash import Call, FlashContext, Sequences, TorchFlash, refuses_torch_flash
from rlaif_fast.policy.packing import pack
from rlaif_fast.policy.policy import Policy
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

# Relative l2. The two paths add the same terms in another order, so a few units in the last place over some
# hundred additions.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CPU_TRAINED = ("sdpa", "reference")  # backends whose backward pass runs on the CPU


def distance(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()


def passes(policy: Policy, case) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Hidden states, log-probabilities, entropies and the gradients of a weighted sum of the latter two."""
    prompts, ids, lengths, sizes = case
    policy.model.zero_grad()
    hidden = policy.response_hidden(prompts, ids, lengths, group_sizes=sizes)
    logps, entropies = policy.response_logps(prompts, ids, lengths, group_sizes=sizes, return_entropy=True)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, len(logps), generator=generator).to(logps)
    (logps * weights[0] + 0.1 * entropies * weights[1]).sum().backward()
    gradients = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    return hidden.detach(), logps.detach(), entropies.detach(), gradients


def assert_same(ours: Policy, plain: Policy, case) -> None:
    hidden, logps, entropies, gradients = passes(ours, case)
    expected = passes(plain, case)
    dtype = hidden.dtype
    assert hidden.shape == (int(case[2].sum()), ours.head_weight.shape[1])
    for name, a, b in zip(("hidden", "logps", "entropies"), (hidden, logps, entropies), expected):
        assert distance(a, b) < (TOLERANCE[dtype] if name == "hidden" else TOLERANCE[torch.float32]), name
    assert gradients.keys() >= expected[3].keys()
    for name, gradient in gradients.items():
        reference = expected[3].get(name, torch.zeros_like(gradient))
        assert distance(gradient, reference) < TOLERANCE[torch.float32], name


def standard_case(family: str):
    prompts = standard_prompts(family)
    sizes = [3, 1, 4, 2, 3]
    ids, lengths = make_responses([5, 1, 7, 4, 2, 2, 9, 1, 3, 6, 8, 8, 2])
    return prompts, ids, lengths, sizes


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


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_and_its_reference(family: str) -> None:
    peft = pytest.importorskip("peft")
    base = make_model(family)
    untouched = make_policy(family, model=copy.deepcopy(base), shared_prefix=False)
    config = peft.LoraConfig(
        r=4, target_modules=r".*language_model.*\.(q_proj|v_proj|up_proj)", init_lora_weights=False
    )
    model = peft.get_peft_model(base, config)
    ours, plain = make_policy(family, model=model), make_policy(family, model=model, shared_prefix=False)
    case = standard_case(family)
    assert_same(ours, plain, case)
    prompts, ids, lengths, sizes = case
    expected = untouched.response_logps(prompts, ids, lengths, group_sizes=sizes)
    features = ours.encode_media(prompts)
    for policy in (ours, plain):
        reference = policy.reference_logps(prompts, ids, lengths, group_sizes=sizes, features=features)
        assert distance(reference, expected) < 1e-5
        assert not reference.requires_grad
    assert distance(ours.response_logps(prompts, ids, lengths, group_sizes=sizes), expected) > 1e-3


def test_lora_in_the_vision_tower_does_not_leak_into_the_reference() -> None:
    peft = pytest.importorskip("peft")
    base = make_model("qwen3_vl")
    untouched = make_policy("qwen3_vl", model=copy.deepcopy(base))
    config = peft.LoraConfig(r=4, target_modules=r".*visual.*\.(qkv|linear_fc1)", init_lora_weights=False)
    ours = make_policy("qwen3_vl", model=peft.get_peft_model(base, config))
    prompts, ids, lengths, sizes = standard_case("qwen3_vl")
    expected = untouched.response_logps(prompts, ids, lengths, group_sizes=sizes)
    features = ours.encode_media(prompts)
    reference = ours.reference_logps(prompts, ids, lengths, group_sizes=sizes, features=features)
    assert distance(reference, expected) < 1e-5


@pytest.mark.parametrize("frozen_tower", [True, False])
def test_reference_copy_stays_where_the_policy_was(frozen_tower: bool) -> None:
    policy = make_policy("qwen3_vl")
    policy.vision.tower.requires_grad_(not frozen_tower)
    prompts, ids, lengths, sizes = standard_case("qwen3_vl")
    with pytest.raises(RuntimeError, match="freeze_reference"):
        policy.reference_logps(prompts, ids, lengths, group_sizes=sizes)
    policy.freeze_reference()
    before = policy.response_logps(prompts, ids, lengths, group_sizes=sizes).detach()
    optimizer = torch.optim.SGD([p for p in policy.model.parameters() if p.requires_grad], lr=0.05)
    policy.response_logps(prompts, ids, lengths, group_sizes=sizes).sum().backward()
    optimizer.step()
    features = policy.encode_media(prompts)
    calls = []
    policy.vision.tower.register_forward_pre_hook(lambda *_: calls.append(1))
    reference = policy.reference_logps(prompts, ids, lengths, group_sizes=sizes, features=features)
    assert len(calls) == (0 if frozen_tower else 1)
    assert distance(reference, before) < 1e-6
    assert distance(policy.response_logps(prompts, ids, lengths, group_sizes=sizes).detach(), before) > 1e-3


def test_reference_of_a_trained_adapter_is_where_rl_starts() -> None:
    """An adapter that supervised fine-tuning has moved is part of the reference; so are other weights that train."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], modules_to_save=["visual.merger"])
    policy = make_policy("qwen3_vl", model=peft.get_peft_model(make_model("qwen3_vl"), config))
    case = standard_case("qwen3_vl")
    prompts, ids, lengths, sizes = case

    def logps(features=None) -> Tensor:
        return policy.response_logps(prompts, ids, lengths, group_sizes=sizes, features=features).detach()

    def reference() -> Tensor:
        features = policy.encode_media(prompts)
        return policy.reference_logps(prompts, ids, lengths, group_sizes=sizes, features=features)

    def train() -> None:
        policy.response_logps(prompts, ids, lengths, group_sizes=sizes).sum().backward()
        for parameter in policy.model.parameters():
            if parameter.grad is not None:
                parameter.data.add_(parameter.grad, alpha=0.02)
                parameter.grad = None

    untrained = logps()
    train()
    started = logps()
    assert distance(started, untrained) > 1e-2
    policy.freeze_reference()
    assert distance(reference(), started) < 1e-6
    train()
    assert distance(logps(), started) > 1e-2
    assert distance(reference(), started) < 1e-6
    assert distance(logps(), started) > 1e-2  # the policy has its own weights back


def test_reference_of_a_new_adapter_costs_nothing() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    policy = make_policy("qwen3_vl", model=peft.get_peft_model(make_model("qwen3_vl"), config))
    policy.freeze_reference()
    assert policy._reference is None


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


# --- backends whose kernels do not run here -----------------------------------------------------------------


class TorchVarlen:
    """The varlen interface in plain PyTorch, sequence by sequence; the backward pass reads `lse` and `out` as
    given.
    """

    @staticmethod
    def _parts(call: Call):
        both = (call.queries, call.keys)
        each = [[slice(*pair) for pair in itertools.pairwise(s.ends.tolist())] for s in both]
        return list(zip(*each))

    @staticmethod
    def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        return scores.masked_fill(future, float("-inf")) if causal else scores

    def forward(self, call):
        q, k, v = call.tensors
        out, lse = torch.zeros_like(q), q.new_zeros(q.shape[1], len(q))
        repeat = q.shape[1] // k.shape[1]
        for a, b in self._parts(call):
            scores = self._scores(q[a], k[b], call.scale, call.causal)
            lse[:, a] = scores.logsumexp(-1)
            out[a] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[b].repeat_interleave(repeat, dim=1))
        return out, lse

    def backward(self, call, dout, out, lse):
        q, k, v = call.tensors
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        heads, repeat = k.shape[1], q.shape[1] // k.shape[1]
        delta = (dout * out).sum(-1)  # (Tq, H)
        for a, b in self._parts(call):
            p = (self._scores(q[a], k[b], call.scale, call.causal) - lse[:, a, None]).exp()
            dp = torch.einsum("qhd,khd->hqk", dout[a], v[b].repeat_interleave(repeat, dim=1))
            ds = p * (dp - delta[a].T[:, :, None]) * call.scale
            dq[a] = torch.einsum("hqk,khd->qhd", ds, k[b].repeat_interleave(repeat, dim=1))
            for whole, weights, other in ((dk, ds, q[a]), (dv, p, dout[a])):
                each = torch.einsum("hqk,qhd->khd", weights, other)
                whole[b] = each.unflatten(1, (heads, repeat)).sum(2)
        return dq, dk, dv


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_merges_two_calls_exactly(family: str, monkeypatch) -> None:
    """The whole model on the flash backend's code, with its three kernel calls answered by PyTorch."""
    backend = replace(
        ATTENTION_BACKENDS["flash"],
        refuses=lambda device, dtype: None,
        context=lambda row, device: FlashContext(row, device, TorchVarlen()),
    )
    monkeypatch.setitem(ATTENTION_BACKENDS, "flash", backend)
    model = make_model(family)
    ours = make_policy(family, model=model, attention_backend="flash")
    prompts, ids, lengths, sizes = standard_case(family)
    ids[1] = ids[0]  # a whole response twice; prefixes in common are not shared on this backend
    lengths[1] = lengths[0]
    assert_same(ours, make_policy(family, model=model, shared_prefix=False), (prompts, ids, lengths, sizes))


def test_flash_attends_inside_a_gradient_checkpoint() -> None:
    """A checkpoint makes the layer again, and hands out each tensor that it saved once."""
    policy = make_policy("qwen3_vl")
    row = pack(np.array([[1, 2, 3], [4, 5, 0]]), np.array([3, 2]), np.array([4]), np.array([2]), "duplicates")
    context = FlashContext(row, policy.device, TorchVarlen())
    leaves = [torch.randn(1, 2, row.tokens, 8, requires_grad=True) for _ in range(3)]

    def attended() -> Tensor:
        return context.attend(0, *leaves, 0.3).square().sum()

    expected = torch.autograd.grad(attended(), leaves)
    again = checkpoint(attended, use_reentrant=False)
    for ours, wanted in zip(torch.autograd.grad(again, leaves), expected):
        torch.testing.assert_close(ours, wanted)


def test_flash_merge_against_autograd_in_float64() -> None:
    ids, lengths = make_responses([4, 1, 6, 3, 5])
    row = pack(ids.numpy(), lengths.numpy(), np.asarray([5, 2, 7]), np.asarray([3, 1, 1]), "none")
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, row.tokens, 8) for heads in (4, 2, 2)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    weights = torch.randn(1, row.tokens, 4, 8, generator=generator, dtype=torch.float64)
    results = []
    cpu = torch.device("cpu")
    for context in (FlashContext(row, cpu, TorchVarlen()), ReferenceContext(row, cpu)):
        output = context.attend(0, *inputs, scale=0.3)
        results.append((output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)))
    for ours, expected in zip(*results):
        assert distance(ours, expected) < 1e-14


@pytest.mark.parametrize("family", FAMILIES)
def test_flex_forward(family: str, monkeypatch) -> None:
    """FlexAttention has no backward pass on the CPU: the forward pass here, the gradients where there is a
    GPU.
    """
    backend = replace(ATTENTION_BACKENDS["flex"], refuses=lambda device, dtype: None)
    model = make_model(family)
    with pytest.raises(ValueError, match="backward"):
        make_policy(family, model=model, attention_backend="flex")
    monkeypatch.setitem(ATTENTION_BACKENDS, "flex", backend)
    ours = make_policy(family, model=model, attention_backend="flex")
    prompts, ids, lengths, sizes = standard_case(family)
    plain = make_policy(family, model=model, shared_prefix=False)
    with torch.no_grad():
        hidden = ours.response_hidden(prompts, ids, lengths, group_sizes=sizes)
        expected = plain.response_hidden(prompts, ids, lengths, group_sizes=sizes)
    assert distance(hidden, expected) < 1e-5


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_equals_the_plain_path_on_a_gpu(family: str, backend: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    # That of the patches' convolution is on by default.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = make_model(family).cuda()
    ours = make_policy(family, model=model, attention_backend=backend)
    assert_same(ours, make_policy(family, model=model, shared_prefix=False), standard_case(family))


def test_torch_flash_matches_the_operators_of_this_torch() -> None:
    """Shapes and dtypes by PyTorch's own shape functions, which run without a GPU."""
    reason = refuses_torch_flash(torch.device("cpu"), torch.bfloat16)
    assert reason == "it needs a CUDA device"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        pytest.skip("needs PyTorch 2.10")
    q, kv = (torch.empty(9, heads, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    sequences = Sequences(torch.empty(3, dtype=torch.int32, device="meta"), 5)
    call = Call(q, kv, kv, sequences, sequences, 0.25, causal=True)
    out, lse = TorchFlash().forward(call)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (4, 9), torch.float32)
    gradients = TorchFlash().backward(call, out, out, lse)
    assert [g.shape for g in gradients] == [q.shape, kv.shape, kv.shape]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["flash", "torch_flash"])
def test_flash_on_a_gpu(backend: str) -> None:
    """bfloat16 against the reference in bfloat16: both round alike at about 2^-8."""
    reason = ATTENTION_BACKENDS[backend].refuses(torch.device("cuda"), torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    model = make_model("qwen3_vl", dtype=torch.bfloat16).cuda()
    case = standard_case("qwen3_vl")
    ours, dense = (make_policy("qwen3_vl", model=model, attention_backend=b) for b in (backend, "reference"))
    _, logps, _, gradients = passes(ours, case)
    _, expected, _, reference = passes(dense, case)
    assert distance(logps, expected) < 2e-2
    for name, gradient in gradients.items():
        assert distance(gradient, reference[name]) < 8e-2, name
