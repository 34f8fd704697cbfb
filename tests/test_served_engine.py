"""`sampler: vllm` with servers, over HTTP: what they are sent, that they draw as told, and each way that one fails."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
import torch
from tiny_runs import SMALL, metrics
from vllm_parts import choice, serving

from rlaif_fast import train as train_module
from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.policy.testing import make_model, make_policy, standard_prompts
from rlaif_fast.rollout import SharedPrefixSampler, VllmSampler
from rlaif_fast.rollout.base import Answer, EngineLost, SamplingParams
from rlaif_fast.rollout.vllm import served
from rlaif_fast.rollout.vllm.requests import MediaItem
from rlaif_fast.rollout.vllm.sampler import GUARDED_PROMPTS
from rlaif_fast.rollout.vllm.served import share_of
from rlaif_fast.rollout.vllm.wire import packed_item

PROMPTS = standard_prompts("qwen3_vl")
PARAMS = SamplingParams(5, temperature=0.8, top_k=12, seed=1)
GENERATE = "/inference/v1/generate"


@pytest.fixture
def policy():
    return make_policy("qwen3_vl")


@pytest.fixture
def server(policy):
    with serving(policy, PROMPTS) as found:
        yield found


@pytest.fixture
def sampler(policy, server):
    sampler = VllmSampler(policy, urls=[server.url])
    yield sampler
    sampler.close()


def change(policy):
    with torch.no_grad():
        policy.model.model.language_model.norm.weight.mul_(1.5)


def paths(server):
    """What was asked since the last call, by path; calls by their method."""
    found = [body["method"] if path == "/collective_rpc" else path for path, body in server.asked]
    server.asked.clear()
    return found


# --- what goes over the wire ----------------------------------------------------------------------------------


# Of vLLM 0.32: `encode_mm_kwargs_item(...)` of the same tensors, before base64.
IMAGE = (
    b"\x82\xacpixel_values\x82\xa4data\x93\xa7float32\x92\x04\x02\xc7\x20\x03%s"
    b"\xa5field\x92\xa4flat\x83\xabkeep_on_cpu\xc2\xa6slices\x91\x91\x93\x00\x04\xc0\xa3dim\x00"
    b"\xaeimage_grid_thw\x82\xa4data\x93\xa5int64\x91\x03\xc7\x18\x03%s"
    b"\xa5field\x92\xa7batched\x81\xabkeep_on_cpu\xc3"
)


def test_a_medium_is_packed_as_vllm_packs_it():
    patches = torch.arange(8.0).view(4, 2)
    item = MediaItem("image", "k", 3, 1, (1, 2, 2), patches)
    grid = torch.tensor([1, 2, 2])
    assert packed_item(item) == IMAGE % (patches.numpy().tobytes(), grid.numpy().tobytes())
    video = packed_item(MediaItem("video", "k", 3, 1, (1, 2, 2), patches.bfloat16(), 1.5))
    assert b"\xb2second_per_grid_ts\x82\xa4data\x93\xa7float32\x90\xd6\x03\x00\x00\xc0\x3f" in video
    assert (
        b"\x93\xa8bfloat16\x92\x04\x02\xd8\x03" + patches.bfloat16().view(torch.uint8).numpy().tobytes()
        in video
    )


@pytest.mark.parametrize(
    ("rows", "shape", "header"),
    [
        (100, b"\x64", b"\xc8\x01\x90"),
        (200, b"\xcc\xc8", b"\xc8\x03\x20"),
        (300, b"\xcd\x01\x2c", b"\xc8\x04\xb0"),
        (70000, b"\xce\x00\x01\x11\x70", b"\xc9\x00\x04\x45\xc0"),
    ],
)
def test_numbers_and_lengths_take_as_many_bytes_as_they_need(rows, shape, header):
    packed = packed_item(MediaItem("image", "k", 3, 1, (1, 1, rows), torch.zeros(rows, 1)))
    assert b"\x92" + shape + b"\x01" + header + b"\x03" in packed


# --- drawing ---------------------------------------------------------------------------------------------------


def test_servers_draw_with_the_policy_s_weights_before_and_after_an_update(policy, server, sampler):
    for version in (1, 2):
        sampler.sync_weights(policy)
        rollout = sampler.sample(PROMPTS, 3, PARAMS)
        assert sampler.version == version and len(rollout.texts) == 3 * len(PROMPTS)
        ratio = rollout.sampling_ratio[rollout.mask]
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-4)
        change(policy)


def test_caches_are_reset_with_each_update_and_weights_are_asked_for_with_each_rollout(
    policy, server, sampler
):
    assert paths(server) == ["rlaif_fast_describe"]
    sampler.sync_weights(policy)
    sampler.sync_weights(policy)
    loads = ["rlaif_fast_load", "/reset_prefix_cache", "/reset_encoder_cache"]
    assert paths(server) == loads
    sampler.sample(PROMPTS, 2, PARAMS)  # with the guard in front
    asked = ["rlaif_fast_describe", *[GENERATE] * len(PROMPTS)]
    assert paths(server) == ["rlaif_fast_describe", *[GENERATE] * GUARDED_PROMPTS, *asked]
    sampler.sample(PROMPTS, 2, PARAMS)
    assert paths(server) == asked
    change(policy)
    sampler.sync_weights(policy)
    assert paths(server) == loads


def test_several_servers_share_the_prompts_and_the_answers_keep_their_order(policy):
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(policy, PROMPTS)) for _ in range(3)]
        alone = VllmSampler(policy, urls=[servers[0].url]).sample(PROMPTS, 2, PARAMS)
        for server in servers:
            server.asked.clear()
        shared = VllmSampler(policy, urls=[server.url for server in servers]).sample(PROMPTS, 2, PARAMS)
        counts = [paths(server).count(GENERATE) for server in servers]
    assert shared.token_ids.tolist() == alone.token_ids.tolist()
    assert counts == [1 + 1, 2 + 1, 2 + 2]  # ours, and the four of the guard


def test_a_request_is_made_when_it_is_sent(policy, server, sampler, monkeypatch):
    """All of a rollout's at once would hold each prompt's patches as text."""
    sampler.sample(PROMPTS, 2, PARAMS)
    server.asked.clear()
    sent, made = [], served.generate_body

    def counted(*arguments):
        sent.append(sum(path == GENERATE for path, _ in server.asked))
        return made(*arguments)

    monkeypatch.setattr(served, "generate_body", counted)
    monkeypatch.setattr(served, "REQUESTS_AT_ONCE", 1)
    sampler.sample(PROMPTS, 2, PARAMS)
    assert sent == list(range(len(PROMPTS)))


def test_each_process_has_servers_of_its_own(monkeypatch):
    urls = ["http://a", "http://b", "http://c"]
    assert share_of(urls) == urls
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert share_of(urls) == ["http://b"]
    for few in (["http://a"], ["http://a", "http://a"]):
        with pytest.raises(UsageError, match="expected 2 different servers for 2 processes"):
            share_of(few)


# --- what goes wrong -------------------------------------------------------------------------------------------


def test_a_server_that_is_gone_is_named_in_one_line(policy, server, sampler):
    sampler.sample(PROMPTS, 2, PARAMS)
    server.shutdown()
    server.server_close()
    with pytest.raises(EngineLost) as caught:
        sampler.sample(PROMPTS, 2, PARAMS)
    assert server.url in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(EngineLost, match=rf"{server.url} does not answer .*Refused"):
        VllmSampler(policy, urls=[server.url])


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (404, b'{"detail":"Not Found"}', "status 404.*start it with --enable-scale-out"),
        (500, b'{"error": {"message": "out of\\nmemory"}}', r"status 500: out of memory"),
        (200, b"<html>", "what is not JSON: <html>"),
        (200, b"[]", "a reply without tokens and log-probabilities"),
        (200, json.dumps({"choices": [choice(0, Answer([5], [-1.0]))]}).encode(), "1 responses where 2"),
        (200, b'{"choices": [{"index": 0, "token_ids": [5], "logprobs": null}]}', "without tokens"),
        (
            200,
            b'{"choices": [{"index": 0, "token_ids": [5], "logprobs": {"content": [{"token_id": 6}]}}]}',
            "log-probabilities of other tokens",
        ),
    ],
)
def test_an_answer_that_was_not_asked_for_is_told(server, sampler, status, body, words):
    sampler.sample(PROMPTS, 2, PARAMS)
    server.replies[GENERATE] = status, body
    with pytest.raises(EngineLost, match=rf"{server.url} .*{words}"):
        sampler.sample(PROMPTS, 2, PARAMS)


def test_a_server_with_other_weights_than_it_was_given_is_told(server, sampler):
    sampler.sample(PROMPTS, 2, PARAMS)
    server.weights = None  # started anew
    with pytest.raises(EngineLost, match="has other weights than it was given"):
        sampler.sample(PROMPTS, 2, PARAMS)


def test_a_cache_that_is_not_reset_is_told(policy, server, sampler):
    server.replies["/reset_prefix_cache"] = 200, b'{"success": false}'
    with pytest.raises(EngineLost, match="did not reset its prefix cache"):
        sampler.sync_weights(policy)


def test_a_server_that_keeps_old_weights_stops_the_run(policy, server, sampler):
    sampler.sample(PROMPTS, 2, PARAMS)
    server.engine.load_weights = lambda folder: None
    change(policy)
    sampler.sync_weights(policy)
    with pytest.raises(RlaifFastError, match=r"after an update .* likely a prefix or encoder cache"):
        sampler.sample(PROMPTS, 2, PARAMS)


def test_a_server_of_another_model_or_with_other_settings_is_refused(policy, server):
    server.dtype = "bfloat16"
    with pytest.raises(
        UsageError, match=rf"{server.url} has dtype 'bfloat16', and the policy needs 'float32'"
    ):
        VllmSampler(policy, urls=[server.url])
    server.config = make_model("qwen2_5_vl").config
    with pytest.raises(UsageError, match="has model_type 'qwen2_5_vl', and the policy needs 'qwen3_vl'"):
        VllmSampler(policy, urls=[server.url])


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (404, b"{}", "start it with VLLM_SERVER_DEV_MODE=1"),
        (
            500,
            b'{"error": {"message": "\'Worker\' object has no attribute \'rlaif_fast_describe\'"}}',
            "start it with --worker-extension-cls rlaif_fast.rollout.vllm.worker.WeightUpdates",
        ),
        (200, b'{"results": []}', "without results"),
        (200, b'{"results": ["odd"]}', "something else"),
    ],
)
def test_a_server_that_was_started_without_what_is_needed_is_told_how(policy, server, status, body, words):
    server.replies["/collective_rpc"] = status, body
    with pytest.raises(EngineLost, match=words):
        VllmSampler(policy, urls=[server.url])


@pytest.mark.parametrize("urls", [["localhost:8000"], ["ftp://a"], ["http://user@a"], "http://a", [3]])
def test_what_is_no_list_of_addresses_is_refused(policy, urls):
    with pytest.raises(UsageError, match="urls: expected "):
        VllmSampler(policy, urls=urls)


def test_options_of_an_engine_of_our_own_are_refused_beside_urls(policy):
    with pytest.raises(UsageError, match="max_model_len: expected at the start of the servers"):
        VllmSampler(policy, urls=["http://127.0.0.1:1"], max_model_len=512)


# --- the run ---------------------------------------------------------------------------------------------------


def test_a_run_whose_engine_is_lost_keeps_its_steps_and_goes_on_alike(tmp_path, monkeypatch, capsys):
    def train(folder):
        values = SMALL | {
            "output_dir": folder,
            "cache_dir": tmp_path / "cache",
            "sft_steps": 2,
            "eval_steps": 50,
        }
        return train_module.main([f"--{key}={value}" for key, value in (values | {"max_steps": 4}).items()])

    assert train(tmp_path / "whole") == 0
    draw, drawn = SharedPrefixSampler.sample, []

    def draw_or_fail(self, prompts, num_generations, *arguments):
        drawn.append(num_generations)
        if sum(n > 1 for n in drawn) == 4:  # the third rollout of RL, behind the samples of SFT
            raise EngineLost("sampler: the vLLM server http://a does not answer")
        return draw(self, prompts, num_generations, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(SharedPrefixSampler, "sample", draw_or_fail)
        assert train(tmp_path / "run") == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("http://a does not answer")
    assert json.loads((tmp_path / "run/checkpoints/index.json").read_text())["last"] == "rl-000002"
    assert train_module.main(["--resume", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
