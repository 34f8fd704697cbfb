"""`sampler: vllm` without vLLM: requests, weights, ratios, versions, the guard; a policy stands in for the engine."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer
from vllm_parts import LORA, PolicyEngine

from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.policy.parts import add_lora
from rlaif_fast.policy.testing import (
    IDS,
    make_media,
    make_model,
    make_policy,
    make_prompt,
    standard_prompts,
)
from rlaif_fast.rollout import VllmSampler, make_sampler
from rlaif_fast.rollout.base import SamplingParams
from rlaif_fast.rollout.vllm import sampler as module
from rlaif_fast.rollout.vllm.engine import ENVIRONMENT, LocalEngine
from rlaif_fast.rollout.vllm.folder import write_model_files
from rlaif_fast.rollout.vllm.guard import check_agreement
from rlaif_fast.rollout.vllm.requests import (
    check_lengths,
    check_model,
    media_items,
    sampling_options,
    seeds,
)
from rlaif_fast.rollout.vllm.weights import WeightsFolder, fingerprint, merged_weights
from rlaif_fast.streams import no_captures
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.rollout_log import ratio_stats

EOS = IDS["<|im_end|>"]


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(module, "LocalEngine", PolicyEngine)


@pytest.fixture
def policy():
    return make_policy("qwen3_vl")


# --- requests -----------------------------------------------------------------------------------------------


def test_every_media_token_of_a_prompt_has_its_patches():
    config = make_model("qwen3_vl").config
    for prompt in standard_prompts("qwen3_vl"):
        items = media_items(prompt, config)
        places = [i for item in items for i in range(item.offset, item.offset + item.length)]
        ids = prompt.input_ids.tolist()
        media = {config.video_token_id, config.image_token_id}
        assert places == [i for i, token in enumerate(ids) if token in media]
        patches = [media.patches for media in prompt.media]
        if patches:
            assert torch.equal(torch.cat([item.patches for item in items]), torch.cat(patches))
        assert all(len(item.patches) == item.length * 4 for item in items)


def test_a_temporal_patch_of_qwen3_vl_is_an_image_and_a_video_of_qwen2_5_vl_is_whole():
    media = (make_media("a", (2, 4, 4)), make_media("p", (1, 8, 4), is_video=False))
    frames = media_items(make_prompt("qwen3_vl", media), make_model("qwen3_vl").config)
    assert [(i.modality, i.key, i.grid_thw) for i in frames] == [
        ("image", "a-0", (1, 4, 4)),
        ("image", "a-1", (1, 4, 4)),
        ("image", "p", (1, 8, 4)),
    ]
    assert frames[0].fields.keys() == {"pixel_values", "image_grid_thw"}
    video, picture = media_items(make_prompt("qwen2_5_vl", media), make_model("qwen2_5_vl").config)
    assert (video.modality, video.grid_thw, video.length) == ("video", (2, 4, 4), 8)
    assert video.fields["second_per_grid_ts"].tolist() == [1.5]
    assert picture.modality == "image" and "second_per_grid_ts" not in picture.fields


def test_what_an_engine_is_not_given_is_refused(policy):
    medium = make_media("a", (1, 4, 4))
    config = policy.model.config
    kept = make_prompt("qwen3_vl", (replace(medium, kept=torch.ones(4, dtype=torch.bool)),))
    with pytest.raises(UsageError, match="tokens and patches"):
        media_items(kept, config)
    with pytest.raises(UsageError, match="max_model_len 20 is too small for a prompt of 16"):
        check_lengths([make_prompt("qwen3_vl", (), before=8, after=8)], SamplingParams(5), 20)
    check_model(policy)
    for family in ("glm4v", "qwen2_5_vl"):
        policy.model.config.model_type = family
        with pytest.raises(UsageError, match=rf"qwen3_vl, not for {family}"):
            check_model(policy)


def test_forbidden_tokens_are_not_allowed_and_end_tokens_stop(policy):
    options = sampling_options(policy, SamplingParams(9, 0.7, 0.9, 5, 2), 4)
    assert options["stop_token_ids"] == [EOS]
    assert EOS in options["allowed_token_ids"]
    assert IDS["<|video_pad|>"] not in options["allowed_token_ids"]
    wanted = {"n": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_tokens": 9, "min_tokens": 2}
    assert wanted.items() <= options.items()
    with pytest.raises(UsageError, match=r"temperature: .*0.01"):
        sampling_options(policy, SamplingParams(9, 1e-3), 4)
    with pytest.raises(UsageError, match=r"temperature: .*0.01"):
        TrainConfig(sampler="vllm", temperature=1e-3)


def test_no_two_responses_of_two_steps_share_a_seed():
    drawn = [s + i for step in range(3) for s in seeds(SamplingParams(seed=step), 5) for i in range(64)]
    assert len(set(drawn)) == len(drawn)
    torch.manual_seed(3)
    first = seeds(SamplingParams(seed=None), 2)
    assert first != seeds(SamplingParams(seed=None), 2)


# --- weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_the_engine_s_folder_names_its_model_and_processor(family, tmp_path):
    policy = make_policy(family, model=make_model(family))
    write_model_files(policy, tmp_path, 512)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [type(policy.model).__name__]
    video = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert video["size"]["longest_edge"] == 512 * (2 * policy.model.config.vision_config.patch_size) ** 2
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == policy.tokenizer.get_vocab()


@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_are_those_of_peft(tied):
    model = make_model("qwen3_vl")
    if not tied:
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model = add_lora(model, LORA)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1)
    ours = {name: weight.clone() for name, weight in merged_weights(model)}
    with model.disable_adapter():
        reference = {name: weight.clone() for name, weight in merged_weights(model)}
    merged = dict(model.merge_and_unload().named_parameters())
    assert ours.keys() == reference.keys() == merged.keys()
    assert ("lm_head.weight" in ours) is not tied
    for name, weight in ours.items():
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=1e-6)
    changed = {name for name in ours if not torch.equal(ours[name], reference[name])}
    assert any("visual" in name for name in changed) and any("q_proj" in name for name in changed)


def test_every_change_of_the_weights_shows(policy):
    start = fingerprint(policy.model)
    parameter = next(policy.model.parameters())
    with torch.no_grad():
        parameter[0].add_(1e-3)
    changed = fingerprint(policy.model)
    assert changed != start
    other = parameter.data.clone() + 1
    mine, parameter.data = parameter.data, other
    assert fingerprint(policy.model) not in (start, changed)
    parameter.data = mine
    assert fingerprint(policy.model) == changed


def test_switching_an_adapter_off_shows():
    model = add_lora(make_model("qwen3_vl"), LORA)
    start = fingerprint(model)
    with model.disable_adapter():
        assert fingerprint(model) != start
    assert fingerprint(model) == start


def test_weights_are_written_once_a_version_and_removed(policy, tmp_path):
    folder = WeightsFolder(tmp_path)
    assert folder.write(policy) and not folder.write(policy)
    assert folder.version == 1
    with torch.no_grad():
        next(policy.model.parameters()).add_(1e-3)
    assert folder.write(policy)
    assert folder.version == 2
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    with pytest.raises(RlaifFastError, match=r"cannot write .*missing"):
        WeightsFolder(tmp_path / "missing")


# --- the sampler --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(6, seed=1),
        SamplingParams(6, temperature=0.6, top_p=0.8, top_k=12, min_new_tokens=3, seed=2),
    ],
    ids=["plain softmax", "cut"],
)
def test_logps_are_the_policy_s_and_equal_engines_have_ratio_1(engine, policy, params):
    prompts = standard_prompts("qwen3_vl")
    rollout = VllmSampler(policy).sample(prompts, 3, params)
    with torch.no_grad():
        wanted = policy.response_logps(
            prompts, rollout.token_ids, rollout.mask.sum(1), temperature=params.temperature
        )
    torch.testing.assert_close(rollout.logps[rollout.mask], wanted, rtol=1e-5, atol=1e-5)
    ratio = rollout.sampling_ratio[rollout.mask]
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)
    assert (rollout.sampling_ratio[~rollout.mask] == 0).all()


def test_the_ratio_is_that_of_the_probabilities(engine, policy):
    """An engine that says half the probability of what it drew."""
    prompts, params = standard_prompts("qwen3_vl")[:2], SamplingParams(4, seed=1)
    sampler = VllmSampler(policy)
    sampler.sample(prompts, 2, params)
    answer = sampler._engine.generate

    def half(*arguments):
        shift = torch.log(torch.tensor(2.0)).item()
        return [
            [replace(a, logps=[x - shift for x in a.logps]) for a in group] for group in answer(*arguments)
        ]

    sampler._engine.generate = half
    rollout = sampler.sample(prompts, 2, params)
    ratio = rollout.sampling_ratio[rollout.mask]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2.0), rtol=0, atol=1e-4)


def test_greedy_answers_have_no_ratio_and_an_answer_of_the_end_token_alone_is_kept(engine, policy):
    policy.forbidden_bias[EOS] += 100.0
    sampler = VllmSampler(policy)
    sampler.sync_weights(policy)
    sampler._engine.policy.forbidden_bias[EOS] += 100.0
    params = SamplingParams(4, temperature=0.0, min_new_tokens=0)
    rollout = sampler.sample(standard_prompts("qwen3_vl")[:2], 1, params)
    assert rollout.sampling_ratio is None
    assert rollout.token_ids.tolist() == [[EOS], [EOS]]
    assert rollout.finished.all() and rollout.texts == ("", "")


def test_weights_are_handed_over_once_a_change(engine, policy):
    sampler = VllmSampler(policy, max_model_len=512)
    for _ in range(3):
        sampler.sync_weights(policy)
    assert (sampler.version, sampler._engine.loads) == (1, 1)
    assert sampler._engine.options == {"max_model_len": 512}
    with torch.no_grad():
        policy.model.model.language_model.norm.weight.mul_(1.5)
    sampler.sync_weights(policy)
    assert (sampler.version, sampler._engine.loads) == (2, 2)
    rollout = sampler.sample(standard_prompts("qwen3_vl"), 2, SamplingParams(4, seed=1))
    ratio = rollout.sampling_ratio[rollout.mask]
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)


def test_the_reference_is_drawn_from_with_its_own_weights(engine):
    policy = make_policy("qwen3_vl")
    policy.freeze_reference()
    sampler = VllmSampler(policy)
    with torch.no_grad():
        policy.model.model.language_model.norm.weight.mul_(1.5)
    with policy.reference_weights():
        sampler.sync_weights(policy)
        rollout = sampler.sample(standard_prompts("qwen3_vl"), 2, SamplingParams(4, seed=1))
    ratio = rollout.sampling_ratio[rollout.mask]
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)


# --- the guard ----------------------------------------------------------------------------------------------


def test_an_engine_that_keeps_old_weights_stops_the_run(engine, policy):
    prompts, params = standard_prompts("qwen3_vl"), SamplingParams(4, seed=1)
    sampler = VllmSampler(policy)
    sampler.sample(prompts, 2, params)
    sampler._engine.load_weights = lambda folder: None
    with torch.no_grad():
        policy.model.model.language_model.norm.weight.mul_(1.5)
    sampler.sync_weights(policy)
    with pytest.raises(RlaifFastError, match=r"after an update .* likely a prefix or encoder cache"):
        sampler.sample(prompts, 2, params)


def test_an_engine_that_disagrees_at_the_start_stops_the_run(engine, policy):
    sampler = VllmSampler(policy)
    sampler.sync_weights(policy)
    with torch.no_grad():
        sampler._engine.policy.model.model.visual.patch_embed.proj.weight.mul_(3)
    with pytest.raises(RlaifFastError, match=r"at the start .* likely frames that are normalised twice"):
        sampler.sample(standard_prompts("qwen3_vl"), 2, SamplingParams(4, seed=1))


@pytest.mark.parametrize(
    ("dtype", "difference", "stops"),
    [
        (torch.float32, 9e-4, False),
        (torch.float32, 1.1e-3, True),
        (torch.bfloat16, 1.9e-2, False),
        (torch.bfloat16, 2.1e-2, True),
        (torch.float32, float("inf"), True),
        (torch.float32, float("nan"), True),
    ],
)
def test_what_a_precision_explains_passes(dtype, difference, stops):
    ours = torch.zeros(3)
    theirs = torch.tensor([0.0, difference, 0.0])
    if stops:
        with pytest.raises(RlaifFastError, match="sampler: "):
            check_agreement(ours, theirs, dtype, 1)
    else:
        check_agreement(ours, theirs, dtype, 1)


# --- the run ------------------------------------------------------------------------------------------------


def test_ratios_are_logged_where_there_are_any():
    groups = [
        SimpleNamespace(sampling_ratio=torch.tensor([1.0, 3.0])),
        SimpleNamespace(sampling_ratio=torch.tensor([0.0])),
    ]
    stats = ratio_stats(groups, 2.0)
    assert stats["sampling_ratio"] == pytest.approx(4 / 3)
    assert stats["sampling_ratio_max"] == 3.0
    assert stats["sampling_ratio_capped"] == pytest.approx(1 / 3)
    assert ratio_stats([SimpleNamespace(sampling_ratio=None)], 2.0) == {}


def test_without_vllm_the_sampler_says_what_is_missing(policy, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"vllm needs vLLM.*docs/engines\.md"):
        make_sampler(policy, "vllm")


def test_vllm_starts_in_this_process_while_no_thread_uses_the_gpu(policy, tmp_path, monkeypatch):
    """It captures graphs then, in a mode in which what other threads ask of CUDA fails as well."""
    begun, entered = [], threading.Event()

    def prefetch():
        with no_captures():
            entered.set()

    class LLM:
        def __init__(self, **_):
            begun.append(threading.Thread(target=prefetch))
            begun[0].start()
            assert not entered.wait(0.1)
            self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=512))

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM))
    assert LocalEngine(policy, tmp_path, {}).max_model_len == 512
    begun[0].join(10)
    assert entered.is_set()


def test_options_of_a_sampler_that_has_none_are_refused(policy):
    with pytest.raises(UsageError, match="sampler_options: the sampler shared_prefix has none, got urls"):
        make_sampler(policy, "shared_prefix", {"urls": []})


def test_sharded_weights_are_handed_to_servers_alone():
    with pytest.raises(UsageError, match="sharding: expected none where sampler is vllm without urls"):
        TrainConfig(sharding="fsdp2", sampler="vllm")
    TrainConfig(sharding="fsdp2", sampler="vllm", sampler_options={"urls": ["http://a", "http://b"]})
