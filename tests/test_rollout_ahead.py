"""`rollout_lag: 1`: the weights that a step's responses are drawn with, the ratio that corrects for it, resuming."""

from __future__ import annotations

import copy
from concurrent.futures import Future
from typing import ClassVar

import pytest
import torch
from tiny_runs import SMALL, metrics
from vllm_parts import PolicyEngine, serving

from rlaif_fast import train as train_module
from rlaif_fast.distributed.world import World
from rlaif_fast.errors import UsageError
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.testing import make_policy, standard_prompts
from rlaif_fast.rollout import SharedPrefixSampler, VllmSampler
from rlaif_fast.rollout.base import Begun, EngineLost, SamplingParams
from rlaif_fast.rollout.vllm import sampler as module
from rlaif_fast.trainer import rl
from rlaif_fast.trainer import run as run_module
from rlaif_fast.trainer.ahead import RolloutAhead
from rlaif_fast.trainer.options import TrainConfig

PARAMS = SamplingParams(5, temperature=0.8, min_new_tokens=0, seed=1)
URLS = {"urls": ["http://127.0.0.1:1"]}


def change(policy, factor=1.5):
    with torch.no_grad():
        policy.model.model.language_model.norm.weight.mul_(factor)


def logps_of(policy, rollout):
    with torch.no_grad():
        return policy.response_logps(
            rollout.prompts, rollout.token_ids, rollout.mask.sum(1), temperature=PARAMS.temperature
        )


def test_the_ratio_is_of_the_weights_that_learn_over_those_that_drew():
    policy, prompts = make_policy("qwen3_vl"), standard_prompts("qwen3_vl")
    with serving(policy, prompts) as server:
        sampler = VllmSampler(policy, urls=[server.url])
        sampler.sync_weights(policy)
        begun = sampler.begin(prompts, 3, PARAMS)
        before = Policy(copy.deepcopy(policy.model), policy.tokenizer)
        begun.answers.result()
        change(policy)
        rollout = sampler.finish(begun)
        sampler.close()
    ours, theirs = logps_of(policy, rollout), logps_of(before, rollout)
    assert (ours - theirs).abs().max() > 0.01
    torch.testing.assert_close(rollout.logps[rollout.mask], ours, rtol=0, atol=1e-4)
    ratio = rollout.sampling_ratio[rollout.mask]
    torch.testing.assert_close(ratio, (ours - theirs).exp(), rtol=1e-3, atol=1e-4)


def test_new_weights_wait_until_what_draws_is_drawn():
    policy, prompts = make_policy("qwen3_vl"), standard_prompts("qwen3_vl")
    with serving(policy, prompts) as server:
        sampler = VllmSampler(policy, urls=[server.url])
        begun = sampler.begin(prompts, 3, PARAMS)
        change(policy)
        sampler.sync_weights(policy)
        assert begun.answers.done()
        asked = [path for path, _ in server.asked]
        sampler.close()
    assert asked[-1] == "/reset_encoder_cache"  # no rollout behind the update
    assert sampler.version == 2


def test_a_server_that_is_lost_meanwhile_is_told_when_the_rollout_is_wanted():
    policy, prompts = make_policy("qwen3_vl"), standard_prompts("qwen3_vl")
    with serving(policy, prompts) as server:
        sampler = VllmSampler(policy, urls=[server.url])
        sampler.sample(prompts, 2, PARAMS)
        server.replies["/inference/v1/generate"] = 500, b""
        begun = sampler.begin(prompts, 2, PARAMS)
        with pytest.raises(EngineLost, match=server.url):
            sampler.finish(begun)
        sampler.close()


# --- the run ---------------------------------------------------------------------------------------------------


class AtOnce:
    """An executor that has no thread, so that no two policies compute at a time in this process."""

    def submit(self, function, *arguments) -> Future:
        future: Future = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self) -> None:
        """Nothing runs."""


class StandIn(PolicyEngine):
    """Servers, without HTTP; it notes what the weights were with each rollout of several responses."""

    drawn_with: ClassVar[list[float]] = []

    def __init__(self, policy, urls, timeout) -> None:
        self.options = {}
        self.policy = Policy(copy.deepcopy(policy.model), policy.tokenizer)
        self.loads = 0

    def generate(self, prompts, options, seeds):
        if options["n"] > 1:
            self.drawn_with.append(norm(self.policy))
        return super().generate(prompts, options, seeds)

    def close(self) -> None:
        """Nothing to close."""


def norm(policy) -> float:
    return sum(float(p.detach().double().square().sum()) for p in policy.model.parameters())


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Runs the command with servers that are stood in for; returns its exit code."""
    monkeypatch.setattr(module, "ServedEngine", StandIn)
    monkeypatch.setattr(module, "ThreadPoolExecutor", lambda threads: AtOnce())
    monkeypatch.setattr(StandIn, "drawn_with", [])

    def start(name, **changes):
        values = SMALL | {"output_dir": tmp_path / name, "cache_dir": tmp_path / "cache", "sft_steps": 2}
        values |= {"learning_rate": 1e-3, "warmup_steps": 0, "max_steps": 5, "gallery_clips": 0}
        values |= {"sampler": "vllm", "sampler_options": '{"urls": ["http://a"]}', "rollout_lag": 1} | changes
        return train_module.main([f"--{key}={value}" for key, value in values.items()])

    return start


def test_each_step_learns_from_what_the_weights_before_the_last_update_drew(train, tmp_path, monkeypatch):
    learned_with, sample = [], rl.sample_and_rank

    def noted(run, *arguments):
        learned_with.append(norm(run.policy))
        return sample(run, *arguments)

    monkeypatch.setattr(rl, "sample_and_rank", noted)
    assert train("run") == 0
    assert len(set(learned_with)) == 5
    assert StandIn.drawn_with == [learned_with[0], *learned_with[:4]]
    ratios = [row["sampling_ratio_max"] for row in metrics(tmp_path / "run") if "sampling_ratio_max" in row]
    assert ratios[0] == pytest.approx(1, abs=1e-4)
    assert min(abs(ratio - 1) for ratio in ratios[1:]) > 1e-3


@pytest.mark.parametrize("step", [2, 4])  # both behind a checkpoint
def test_a_resumed_run_learns_from_what_was_drawn_before(train, tmp_path, monkeypatch, step):
    class Killed(BaseException):
        pass

    assert train("whole") == 0
    sample, calls = rl.sample_and_rank, []

    def sample_or_die(*arguments):
        calls.append(1)
        if len(calls) > step:
            raise Killed
        return sample(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(rl, "sample_and_rank", sample_or_die)
        with pytest.raises(Killed):
            train("run")
    assert train_module.main(["--resume", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_an_evaluation_that_a_resumed_run_owes_keeps_what_was_drawn_before(train, tmp_path, monkeypatch):
    """The run is ended in the evaluation behind step 2, resumed, and ended again behind that evaluation."""
    assert train("whole") == 0
    sample, evaluate, calls = rl.sample_and_rank, run_module.evaluate, []

    def evaluate_or_end(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:  # the test of the supervised stage, the start, step 2
            raise KeyboardInterrupt
        return evaluate(*arguments, **options)

    def end(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "evaluate", evaluate_or_end)
        assert train("run") == 130
        patched.setattr(rl, "sample_and_rank", end)
        assert train_module.main(["--resume", str(tmp_path / "run")]) == 130
    assert rl.sample_and_rank is sample
    assert train_module.main(["--resume", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_what_was_drawn_for_other_prompts_is_drawn_anew(monkeypatch):
    policy, prompts = make_policy("qwen3_vl"), standard_prompts("qwen3_vl")
    monkeypatch.setattr(module, "ServedEngine", StandIn)
    monkeypatch.setattr(module, "ThreadPoolExecutor", lambda threads: AtOnce())
    sampler = VllmSampler(policy, **URLS)
    for i, prompt in enumerate(prompts):
        object.__setattr__(prompt, "example", type("Row", (), {"id": f"row {i}"}))
    first = RolloutAhead(sampler, policy, 2, lambda step: (prompts[:3], PARAMS), 9)
    begun = first.begin(4)
    kept = first.drawn(4, World())
    assert [example_id for example_id, _ in kept] == ["row 0", "row 1", "row 2"]
    fewer = RolloutAhead(sampler, policy, 2, lambda step: (prompts[1:3], PARAMS), 9, kept).begin(4)
    assert fewer.answers.result() == begun.answers.result()[1:]
    loads = len(StandIn.drawn_with)
    RolloutAhead(sampler, policy, 2, lambda step: (prompts[2:4], PARAMS), 9, kept).begin(4)
    assert len(StandIn.drawn_with) == loads + 1
    assert first.begin(9) is None and first.drawn(9, World()) == []


def test_a_checkpoint_that_lacks_what_was_drawn_ahead_says_so(monkeypatch):
    """The other process is gone; then this one's server is."""
    policy, prompts = make_policy("qwen3_vl"), standard_prompts("qwen3_vl")[:1]
    monkeypatch.setattr(module, "ServedEngine", StandIn)
    monkeypatch.setattr(module, "ThreadPoolExecutor", lambda threads: AtOnce())
    object.__setattr__(prompts[0], "example", type("Row", (), {"id": "row"}))
    ahead = RolloutAhead(VllmSampler(policy, **URLS), policy, 2, lambda step: (prompts, PARAMS), 9)
    ahead.begin(4)
    said: list[str] = []
    assert len(ahead.drawn(4, World(), note=said.append)) == 1 and not said
    assert len(ahead.drawn(4, World(0, 2), alone=True, note=said.append)) == 1
    monkeypatch.setattr(AtOnce, "submit", lambda self, function, *arguments: lost)
    lost: Future = Future()
    lost.set_exception(EngineLost("http://a is gone"))
    ahead.begin(5)
    assert ahead.drawn(5, World(), note=said.append) == []
    assert said == [
        f"the checkpoint lacks responses that were drawn ahead for step {step}; a resumed run draws anew"
        for step in (5, 6)
    ]
    assert ahead.drawn(9, World(0, 2), alone=True, note=said.append) == [] and len(said) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": "auto", "sampler_options": {}}, "0 where sampler is auto without urls"),
        ({"sampler": "shared_prefix", "sampler_options": {}}, "0 where sampler is shared_prefix"),
        ({"sampler_options": {"max_model_len": 512}}, "0 where sampler is vllm without urls"),
        ({"rollout_lag": 2}, "expected 0 or 1, got 2"),
        ({"dynamic_sampling": True}, "0 where dynamic_sampling is true"),
        ({"algorithm": "dpo"}, "0 where algorithm is dpo"),
    ],
)
def test_where_nothing_can_be_drawn_ahead_it_is_refused(changes, words):
    values = {"sampler": "vllm", "sampler_options": URLS, "rollout_lag": 1} | changes
    with pytest.raises(UsageError, match=f"rollout_lag: .*{words}"):
        TrainConfig(**values)


class Elsewhere:
    """A sampler of another package, whose rollouts are its prompts' number."""

    draws_elsewhere = True

    def __init__(self) -> None:
        self.calls: list[str] = []

    def sync_weights(self, policy) -> None:
        self.calls.append("sync_weights")

    def begin(self, prompts, num_generations, params) -> Begun:
        self.calls.append(f"begin {len(prompts)}")
        return Begun(prompts, params, Future())

    def finish(self, begun, features=None) -> int:
        return len(begun.prompts)


def test_any_sampler_that_draws_elsewhere_draws_ahead():
    config = TrainConfig(sampler="of another package", rollout_lag=1)
    sampler, prompts = Elsewhere(), standard_prompts("qwen3_vl")
    ahead = RolloutAhead(sampler, None, 2, lambda step: (prompts[: step + 1], PARAMS), config.max_steps)
    first = ahead.begin(0)
    ahead.begin(1)
    assert sampler.calls == ["sync_weights", "begin 1", "sync_weights", "begin 2"]
    assert ahead.finish(first, None) == 1 and ahead.finish(ahead.begin(1), None) == 2


def test_a_sampler_of_this_process_is_refused_by_name():
    policy = make_policy("qwen3_vl")
    with pytest.raises(UsageError, match="rollout_lag: expected 0 where no server draws"):
        RolloutAhead(SharedPrefixSampler(policy), policy, 2, lambda step: ((), PARAMS), 9)
