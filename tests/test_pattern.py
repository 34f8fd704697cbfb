"""Windows and pictures in packed rows, against a dense mask that is written out, and against the models themselves."""

from __future__ import annotations

import family_checkpoints
import numpy as np
import pytest
import torch
from test_families_packed import gradients, make_encoder, make_prompts, responses
from test_linear_attention import ROWS

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.families import check_shared_prefix
from rlaif_fast.policy.families.base import BY_LAYER, DECODERS, WINDOWED
from rlaif_fast.policy.loading import ModelOptions, load_model
from rlaif_fast.policy.packing import PackedRow, make_buckets
from rlaif_fast.policy.pattern import Pattern, PatternContext, backend_name, picture_runs, row_context
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.testing import (
    TOKENIZER,
    make_model,
    make_policy,
    make_responses,
    standard_prompts,
)
from rlaif_fast.rollout.base import SamplingParams
from rlaif_fast.rollout.graphs import GraphSampler
from rlaif_fast.rollout.plain import PlainSampler
from rlaif_fast.rollout.shared_prefix import SharedPrefixSampler

TOLERANCE = 1e-5


def dense(row: PackedRow, window: int | None, runs: list[np.ndarray] | None) -> torch.Tensor:
    """(S, S) what each token sees, token by token."""
    allowed = row.allowed()
    place = np.zeros(row.tokens, dtype=np.int64)
    run = np.full(row.tokens, -1)
    for group, (begin, length) in enumerate(zip(row.group_starts, row.prompt_lengths)):
        place[begin : begin + length] = np.arange(length)
        if runs is not None:
            named = runs[group] >= 0
            run[begin : begin + length][named] = runs[group][named] + 1000 * group
    group_of = np.repeat(np.arange(len(row.node_counts)), row.node_counts)
    place[row.node_index] = row.prompt_lengths[group_of] + row.node_depth
    allowed = allowed | ((run[:, None] == run) & (run >= 0))
    if window is not None:
        allowed &= place[:, None] - place < window
    return torch.from_numpy(allowed)


@pytest.mark.parametrize("name", sorted(ROWS))
@pytest.mark.parametrize("window", [None, 1, 3, 200])
@pytest.mark.parametrize("pictures", [False, True])
def test_the_attention_of_a_row_is_that_of_its_mask(name, window, pictures) -> None:
    row = ROWS[name]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.Generator().manual_seed(1)
    runs = [
        picture_runs((torch.rand(int(length), generator=drawn) < 0.6).numpy())
        for length in row.prompt_lengths
    ]
    context = PatternContext(row, torch.device("cpu"), Pattern((None, window), pictures), runs)
    tensors = [
        torch.randn(1, heads, row.tokens, 4, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    ]
    weights = torch.randn(1, row.tokens, 4, 4, generator=generator, dtype=torch.float64)
    output = context.attend(1, *tensors, 0.5)
    grads = torch.autograd.grad((output * weights).sum(), tensors)
    query, key, value = tensors
    key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
    allowed = dense(row, window, runs if pictures else None)
    scores = (query @ key.transpose(-1, -2) * 0.5).masked_fill(~allowed, float("-inf"))
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(grads, torch.autograd.grad((expected * weights).sum(), tensors))


def test_rows_of_several_buckets_are_among_them() -> None:
    assert max(len(make_buckets(row)) for row in ROWS.values()) > 1


def test_picture_runs() -> None:
    is_media = np.array([0, 1, 1, 0, 1, 0, 0, 1, 1], dtype=bool)
    assert picture_runs(is_media).tolist() == [-1, 0, 0, -1, 1, -1, -1, 2, 2]
    assert picture_runs(~is_media).tolist() == [0, -1, -1, 1, -1, 2, 2, -1, -1]


def test_a_window_in_some_layers_is_kept_in_other_families() -> None:
    """Prompts of more tokens than the window; the model's own forward makes the masks of the plain path."""
    family = "qwen2_5_vl"
    model = make_model(family, dtype=torch.float64)
    text, decoder = model.config.text_config, model.model.language_model
    text.layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
    text.sliding_window = 6
    decoder.has_sliding_layers = True
    prompts = standard_prompts(family)
    assert max(len(prompt.input_ids) for prompt in prompts) > 12
    ids, lengths = make_responses([5, 4, 3, 2, 4, 1, 5, 5, 2, 3])
    plain, plain_grads = gradients(Policy(model, TOKENIZER, shared_prefix=False), prompts, ids, lengths)
    packed, packed_grads = gradients(Policy(model, TOKENIZER), prompts, ids, lengths)
    torch.testing.assert_close(packed, plain, rtol=0, atol=TOLERANCE)
    for name, grad in plain_grads.items():
        scale = max(1.0, float(grad.abs().max()))
        torch.testing.assert_close(packed_grads[name], grad, rtol=0, atol=TOLERANCE * scale, msg=name)
    text.layer_types = ["full_attention"] * 3
    other, _ = gradients(Policy(model, TOKENIZER), prompts, ids, lengths)
    assert float((other - packed).abs().max()) > 1e-3  # the windows matter


def test_gemma_draws_behind_its_window() -> None:
    """More new tokens than a window, some prompts in turns, and groups that end early."""
    model, tokenizer = family_checkpoints.make_model("gemma3", dtype=torch.float64)
    prompts = make_prompts(make_encoder("gemma3", tokenizer, model.config))
    params = SamplingParams(max_new_tokens=20, seed=3)
    policies = [Policy(model, tokenizer, shared_prefix=shared) for shared in (False, True)]
    for policy in policies:
        policy.forbidden_bias[tokenizer.eos_token_id] += 3.0
    policies[1].max_cached_tokens = 300
    plain = PlainSampler(policies[0]).sample(prompts, 3, params)
    shared = SharedPrefixSampler(policies[1]).sample(prompts, 3, params)
    assert plain.finished.any() and not plain.finished.all()
    assert shared.token_ids.tolist() == plain.token_ids.tolist()
    torch.testing.assert_close(shared.logps, plain.logps, rtol=0, atol=TOLERANCE)


def test_what_does_not_know_patterns_is_refused() -> None:
    model, tokenizer = family_checkpoints.make_model("gemma3")
    with pytest.raises(
        UsageError, match=r"attention_backend: .*reference does not know them, use auto or sdpa"
    ):
        Policy(model, tokenizer, attention_backend="reference")
    policy = Policy(model, tokenizer)
    assert policy.backend.name == "sdpa"
    assert backend_name("reference", None) == "reference"
    prompts = make_prompts(make_encoder("gemma3", tokenizer, model.config))
    with pytest.raises(UsageError, match="cuda_graphs does not know layers with a window"):
        GraphSampler(policy).sample(prompts, 2, SamplingParams(max_new_tokens=2))


def test_a_causal_model_has_no_pattern() -> None:
    assert make_policy("qwen3_vl").pattern is None
    row, marks = ROWS["tree"], []
    made = row_context(row, torch.device("cpu"), None, [], lambda *given: marks.append(given))
    assert made is None and marks == [(row, torch.device("cpu"))]


def test_the_tokens_of_a_picture_see_each_other() -> None:
    """Without that Gemma 3 gives other log-probabilities, so the comparison with its own forward can fail."""
    model, tokenizer = family_checkpoints.make_model("gemma3")
    prompts = make_prompts(make_encoder("gemma3", tokenizer, model.config))
    ids, lengths = responses(tokenizer)
    policy = Policy(model, tokenizer)
    expected = policy.response_logps(prompts, ids, lengths).detach()
    policy.pattern = Pattern(policy.pattern.windows, pictures=False)
    other = policy.response_logps(prompts, ids, lengths).detach()
    assert float((other - expected).abs().max()) > 1e-3


EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
WITH_WINDOW = {
    *WINDOWED,
    "cohere2",
    "exaone4",
    "gemma3_text",
    "gpt_oss",
    "ministral",
    "olmo3",
    "qwen2",
    "qwen3",
}
SIZES = {
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "glm4_moe": {"moe_intermediate_size": 16, "n_group": 1, "topk_group": 1},
    "qwen2_moe": {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"moe_intermediate_size": 16},
}


def with_decoder(kind: str, **values):
    """InternVL with a decoder of another type; the window is shorter than a prompt, and some types have none."""
    window = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}
    window = window if kind in WITH_WINDOW else {}
    own = EXPERTS if "moe" in kind or kind in ("mixtral", "gpt_oss") else {}
    text = {"model_type": kind} | family_checkpoints.TEXT | window | own | SIZES.get(kind, {}) | values
    return family_checkpoints.RECIPES["internvl"][0] | {"text_config": text}


@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_a_decoder_of_another_type_attends_as_alone(kind) -> None:
    """Windows too of those whose configurations have no `layer_types`: there a window is of every layer."""
    model, tokenizer = family_checkpoints.make_model(
        "internvl", dtype=torch.float64, values=with_decoder(kind)
    )
    policies = [Policy(model, tokenizer, shared_prefix=shared) for shared in (False, True)]
    assert (policies[1].pattern is not None) == (kind in WITH_WINDOW)
    prompts = make_prompts(make_encoder("internvl", tokenizer, model.config))
    ids, lengths = responses(tokenizer)
    (plain, plain_grads), (packed, packed_grads) = (gradients(p, prompts, ids, lengths) for p in policies)
    torch.testing.assert_close(packed, plain, rtol=0, atol=TOLERANCE)
    assert packed_grads.keys() == plain_grads.keys()
    for name, grad in plain_grads.items():
        scale = max(1.0, float(grad.abs().max()))
        torch.testing.assert_close(packed_grads[name], grad, rtol=0, atol=TOLERANCE * scale, msg=name)
    params = SamplingParams(max_new_tokens=6, seed=1)
    drawn = PlainSampler(policies[0]).sample(prompts, 2, params)
    shared = SharedPrefixSampler(policies[1]).sample(prompts, 2, params)
    assert shared.token_ids.tolist() == drawn.token_ids.tolist()


@pytest.mark.parametrize("kind", sorted(DECODERS))
@pytest.mark.parametrize("types", [("sliding_attention", "full_attention"), ("full_attention",) * 2])
def test_windows_by_layer_are_those_of_the_model(kind, types) -> None:
    """Some decoders do not read `layer_types`; packed rows would have windows that their own forward has not."""
    mixed = {"layer_types": list(types), "sliding_window": 8, "use_sliding_window": True}

    def logps(shared: bool, **values) -> torch.Tensor:
        config = with_decoder(kind, **mixed | values)
        model, tokenizer = family_checkpoints.make_model("internvl", dtype=torch.float64, values=config)
        prompts = make_prompts(make_encoder("internvl", tokenizer, model.config))
        policy = Policy(model, tokenizer, shared_prefix=shared)
        return policy.response_logps(prompts, *responses(tokenizer)).detach()

    told = kind in BY_LAYER or (kind not in WINDOWED and set(types) == {"full_attention"})
    if told:
        torch.testing.assert_close(logps(True), logps(False), rtol=0, atol=TOLERANCE)
        return
    with pytest.raises(UsageError, match=f"decoder '{kind}' does not read the windows that layer_types"):
        logps(True)
    # The model computes the same without them.
    own = ["sliding_attention" if kind in WINDOWED else "full_attention"] * 2
    torch.testing.assert_close(logps(False), logps(False, layer_types=own), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("types", [None, ("sliding_attention", "full_attention"), ("full_attention",) * 2])
def test_windows_that_a_decoder_does_not_read_do_not_change_what_is_drawn(kind, types) -> None:
    """Transformers makes caches by the configuration alone, and drops what is outside a window."""
    values = {"sliding_window": 8, "use_sliding_window": True} | (
        {"layer_types": list(types)} if types else {}
    )
    model, tokenizer = family_checkpoints.make_model(
        "internvl", dtype=torch.float64, values=with_decoder(kind, **values)
    )
    prompts = make_prompts(make_encoder("internvl", tokenizer, model.config))
    policy = Policy(model, tokenizer, shared_prefix=False)
    drawn = PlainSampler(policy).sample(prompts, 2, SamplingParams(max_new_tokens=6, seed=1))
    logps = policy.response_logps(prompts, drawn.token_ids, drawn.mask.sum(1)).detach()
    torch.testing.assert_close(drawn.logps[drawn.mask].double(), logps, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3_5", "glm4v"])
def test_a_family_without_windows_is_given_none(model_type) -> None:
    text = family_checkpoints.RECIPES[model_type][0]["text_config"]
    text = text | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    values = family_checkpoints.RECIPES[model_type][0] | {"text_config": text}
    config = family_checkpoints.make_config(model_type, family_checkpoints.make_tokenizer(model_type), values)
    with pytest.raises(UsageError, match=r"does not read the windows.*take layer_types out"):
        check_shared_prefix(config)


@pytest.mark.parametrize("kind", ["gpt_oss", "gemma2", "stablelm", "nemotron"])
def test_a_decoder_with_an_attention_of_its_own_is_refused(kind) -> None:
    """Sinks, soft caps, or no way down for the layout: packed rows would be wrong without a word."""
    tokenizer = family_checkpoints.make_tokenizer("internvl")
    config = family_checkpoints.make_config("internvl", tokenizer, with_decoder(kind))
    with pytest.raises(UsageError, match=f"shared_prefix: InternVL.*decoder '{kind}'.*shared_prefix: false"):
        check_shared_prefix(config)


def test_a_model_without_sdpa_gets_the_attention_that_it_has(tmp_path) -> None:
    """Sinks are in the model's own attention alone; on the plain path it has its say."""
    model, tokenizer = family_checkpoints.make_model("internvl", values=with_decoder("gpt_oss"))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    family_checkpoints.write_processor(tmp_path)
    loaded = load_model(ModelOptions(model=str(tmp_path), device="cpu", dtype="float32", shared_prefix=False))
    assert any("eager (the model does not support sdpa)" in note for note in loaded.notes)
    policy = Policy(loaded.model, loaded.tokenizer, shared_prefix=False)
    prompts = make_prompts(make_encoder("internvl", tokenizer, model.config))
    ids, lengths = responses(tokenizer)
    ours = policy.response_logps(prompts, ids, lengths)
    model.set_attn_implementation("eager")
    expected = Policy(model, tokenizer, shared_prefix=False).response_logps(prompts, ids, lengths)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="cannot load"):
        load_model(ModelOptions(model=str(tmp_path), device="cpu", attn_implementation="sdpa"))
