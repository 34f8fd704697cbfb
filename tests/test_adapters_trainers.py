"""Trainers that are made of a stand-in for another package's: what they refuse before they generate, and empty rows."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from test_adapters_ranking import InOrder
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlaif_fast import rank_advantages
from rlaif_fast.adapters import ms_swift, openrlhf, skyrl


def decoded(rows, skip_special_tokens):
    return [" ".join(map(str, row.tolist())) for row in rows]


def expected(*scores):
    return rank_advantages(torch.tensor([scores]), torch.arange(len(scores))[None]).advantages[0]


def reasoning_tokenizer():
    """Digits, of which 0 pads and 1 ends; `</think>` is a special token, as some checkpoints have it."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(10)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")
    tokenizer.add_tokens(["</think>"], special_tokens=True)
    return tokenizer


class Noting(InOrder):
    """Ranks as sampled, and notes what it read."""

    def rank(self, requests):
        self.read = [text.split() for request in requests for text in request.responses]
        return super().rank(requests)


READ = [["5", "</think>", str(n)] for n in (6, 7, 8)]


class SkyRL:
    def __init__(self, cfg):
        self.cfg, self.all_metrics = cfg, {}
        self.tokenizer = SimpleNamespace(batch_decode=decoded)

    def compute_advantages_and_returns(self, data):
        return data


def skyrl_config(step_wise=False, **changes):
    algorithm = {"advantage_estimator": "rlaif_fast", "use_kl_in_reward": False, **changes}
    return SimpleNamespace(
        trainer=SimpleNamespace(algorithm=SimpleNamespace(**algorithm)),
        generator=SimpleNamespace(step_wise_trajectories=step_wise),
    )


class Batch(dict):
    metadata = {"uids": ["u", "u", "u"]}  # noqa: RUF012


def test_skyrl_counts_the_tokens_that_are_trained():
    """The second response ends with two tokens of a tool, which are likely and not the policy's."""
    data = Batch(
        sequences=torch.tensor([[0, 0, 7, 7, 1, 1], [7, 7, 1, 1, 1, 1], [7, 7, 1, 1, 1, 1]]),
        attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [1] * 6]),
        response_mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]),
        loss_mask=torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]),
        action_log_probs=torch.tensor([[0, 0, -2.0, -2], [-3, -3, -0.1, -0.1], [-1, -1, -1, -1]]),
        rewards=torch.ones(3, 4),
    )
    trainer = skyrl.ranked_trainer(SkyRL, InOrder())(skyrl_config())
    rewards = trainer.compute_advantages_and_returns(data)["rewards"]
    first, second = expected(-2.0, -3.0).tolist()
    wanted = [[0, 0, 0, first], [0, 0, 0, second], [0, 0, 0, 0]]  # no token of the third is trained
    torch.testing.assert_close(rewards, torch.tensor(wanted))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage_estimator": "grpo"}, "must be rlaif_fast, got 'grpo'"),
        ({"use_kl_in_reward": True}, "use_kl_in_reward must be false"),
        ({"step_wise": True}, "step_wise_trajectories must be false"),
    ],
)
def test_skyrl_refuses_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        skyrl.ranked_trainer(SkyRL, InOrder())(skyrl_config(**changes))


@pytest.fixture
def verl(monkeypatch):
    """Our module of verl's trainer between stand-ins for what it imports, and the queue's fields."""
    fields: dict = {}
    stand_ins = {
        "transfer_queue": {
            "kv_batch_get": lambda **_: fields,
            "kv_batch_put": lambda **put: fields.update(put),
        },
        "tensordict": {"TensorDict": lambda held, batch_size: held},
        **{name: {} for name in ("verl", "verl.trainer", "verl.trainer.ppo")},
        "verl.trainer.ppo.core_algos": {"register_adv_est": lambda name: lambda function: function},
    }
    for name, held in stand_ins.items():
        module = ModuleType(name)
        module.__dict__.update(held)
        monkeypatch.setitem(sys.modules, name, module)
    name = "rlaif_fast.adapters.verl_trainer"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield SimpleNamespace(module=importlib.import_module(name), fields=fields)
    del sys.modules[name]


class Verl:
    def __init__(self, config):
        self.config, self.tokenizer = config, SimpleNamespace(batch_decode=decoded)

    def _compute_advantage(self, batch, metrics):
        return batch


def verl_config(**changes):
    algorithm = {"adv_estimator": "rlaif_fast", "use_kl_in_reward": False, **changes}
    return SimpleNamespace(algorithm=SimpleNamespace(**algorithm))


def nested(*rows):
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def test_verl_gives_a_response_without_a_token_no_advantage(verl):
    trainer = verl.module.ranked(Verl, InOrder())(verl_config())
    verl.fields.update(
        response_mask=nested([1, 1, 0], [0, 0], [1]), old_log_probs=nested([-1.0, -1, 0], [-9.0, -9], [-2.0]),
        responses=nested([5, 6, 7], [5, 6], [5]), rm_scores=nested([1.0, 1, 1], [1.0, 1], [1.0]), uid=["u"] * 3,
        raw_prompt=["q"] * 3, reward_model=[None] * 3,
    )  # fmt: skip
    batch = SimpleNamespace(keys=["a_0", "b_0", "c_0"], partition_id="train")
    metrics: dict = {}
    trainer._compute_advantage(batch, metrics)
    first, last = expected(-1.0, -2.0).tolist()
    put = [row.tolist() for row in verl.fields["fields"]["rm_scores"].unbind()]
    assert put == [pytest.approx(row) for row in ([0, first, 0], [0, 0], [last])]
    batch.keys = ["a_0", "a_1", "c_0"]
    with pytest.raises(ValueError, match="several outputs a session cannot be ranked, got 'a_1'"):
        trainer._compute_advantage(batch, metrics)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adv_estimator": "grpo"}, "adv_estimator must be rlaif_fast, got 'grpo'"),
        ({"use_kl_in_reward": True}, "use_kl_in_reward must be false"),
    ],
)
def test_verl_refuses_at_once(verl, changes, message):
    with pytest.raises(ValueError, match=message):
        verl.module.ranked(Verl, InOrder())(verl_config(**changes))


class Swift:
    def __init__(self, model, args):
        pytest.fail("the model was loaded")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_in_reward": True, "beta": 0.5}, "kl_in_reward must be false"),
        ({"advantage_estimator": "rloo"}, "advantage_estimator must be \"grpo\", got 'rloo'"),
        ({"scale_rewards": "batch"}, "scale_rewards must be left out, .* scale='group'; got 'batch'"),
        ({"scale_rewards": "none"}, "scale_rewards must be left out, .* scale='group'; got 'none'"),
    ],
)
def test_ms_swift_refuses_before_it_loads(changes, message):
    defaults = {"advantage_estimator": "grpo", "kl_in_reward": False, "beta": 0.0, "scale_rewards": "group"}
    trainer = ms_swift.ranked_trainer(Swift, InOrder(), scale="group")
    with pytest.raises(ValueError, match=message):
        trainer("model", args=SimpleNamespace(**{**defaults, **changes}))


class OpenRLHF:
    def __init__(self, strategy):
        self.strategy, self.tokenizer = strategy, SimpleNamespace(batch_decode=decoded)

    def compute_advantages_and_returns(self, experiences):
        return experiences


def openrlhf_strategy(estimator):
    algo = SimpleNamespace(advantage=SimpleNamespace(estimator=estimator))
    return SimpleNamespace(args=SimpleNamespace(algo=algo, rollout=SimpleNamespace(n_samples_per_prompt=3)))


def test_openrlhf_gives_a_response_without_a_token_no_advantage():
    maker = openrlhf.experience_maker(OpenRLHF, InOrder())
    with pytest.raises(ValueError, match="must be \"dr_grpo\", got 'group_norm'"):
        maker(openrlhf_strategy("group_norm"))
    experience = SimpleNamespace(
        sequences=torch.zeros(3, 4, dtype=torch.long), action_mask=torch.tensor([[0, 1, 1], [0, 0, 0], [0, 1, 0]]),
        action_log_probs=torch.tensor([[0.0, -1, -1], [0, 0, 0], [0, -2, 0]]), index=[0, 1, 2],
        prompts=["q"] * 3, labels=["a"] * 3, images=None,
    )  # fmt: skip
    [done] = maker(openrlhf_strategy("dr_grpo")).compute_advantages_and_returns([experience])
    first, last = expected(-1.0, -2.0).tolist()
    torch.testing.assert_close(done.rewards, torch.tensor([first, 0.0, last]))


def test_the_oracle_reads_where_reasoning_ends(verl):
    """`</think>` is text, also where it is a special token."""
    tokenizer, oracle = reasoning_tokenizer(), Noting()
    mark = tokenizer.convert_tokens_to_ids("</think>")
    tokens = torch.tensor([[5, mark, n, 1] for n in (6, 7, 8)])
    whole, logps = torch.ones(3, 4, dtype=torch.long), -torch.ones(3, 4)

    trainer = skyrl.ranked_trainer(SkyRL, oracle)(skyrl_config())
    trainer.tokenizer = tokenizer
    data = Batch(
        sequences=torch.cat([torch.full((3, 2), 9), tokens], 1), attention_mask=torch.ones(3, 6),
        response_mask=whole, loss_mask=whole, action_log_probs=logps, rewards=torch.ones(3, 4),
    )  # fmt: skip
    trainer.compute_advantages_and_returns(data)
    assert oracle.read == READ

    trainer = verl.module.ranked(Verl, oracle)(verl_config())
    trainer.tokenizer, oracle.read = tokenizer, []
    verl.fields.update(
        response_mask=nested(*whole.tolist()), old_log_probs=nested(*logps.tolist()), raw_prompt=["q"] * 3,
        responses=nested(*tokens.tolist()), rm_scores=nested(*logps.tolist()), uid=["u"] * 3, reward_model=[None] * 3,
    )  # fmt: skip
    trainer._compute_advantage(SimpleNamespace(keys=["a_0", "b_0", "c_0"], partition_id="train"), {})
    assert oracle.read == READ

    maker = openrlhf.experience_maker(OpenRLHF, oracle)(openrlhf_strategy("dr_grpo"))
    maker.tokenizer, oracle.read = tokenizer, []
    experience = SimpleNamespace(
        sequences=torch.cat([torch.full((3, 1), 9), tokens], 1), action_mask=whole, action_log_probs=logps,
        index=[0, 1, 2], prompts=["q"] * 3, labels=["a"] * 3, images=None,
    )  # fmt: skip
    maker.compute_advantages_and_returns([experience])
    assert oracle.read == READ
