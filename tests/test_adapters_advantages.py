"""The advantage hooks of other trainers: advantages are those of `rank_advantages`, whatever the order of the rows."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from rlaif_fast import rank_advantages
from rlaif_fast.adapters import ms_swift, openrlhf
from rlaif_fast.adapters.ranking import RowRanker, mean_logps
from rlaif_fast.oracle import Ranking, ReferenceOracle

# Two groups of three, their rows mixed; nothing can be said of the empty response.
IDS = ["p", "q", "q", "p", "p", "q"]
TEXTS = ["7", "4", "5", "8", "none", ""]
ANSWERS = {"p": "7", "q": "5"}
T = 4
LENGTHS = torch.tensor([4, 2, 3, 1, 2, 1])
MASK = torch.arange(T) < LENGTHS[:, None]
LOGPS = -torch.rand(6, T, generator=torch.Generator().manual_seed(2))
WORDS = {text: 100 + place for place, text in enumerate(TEXTS)}


class Abstaining(ReferenceOracle):
    """Ranks no empty response."""

    def rank(self, requests):
        return [
            Ranking(ranks=tuple(r if text else None for r, text in zip(ranking.ranks, request.responses)))
            for request, ranking in zip(requests, super().rank(requests))
        ]


class Tokenizer:
    """A response is one token of text, and eights that are dropped."""

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        names = {number: text for text, number in WORDS.items()}
        return ["".join(names.get(int(token), "") for token in row) for row in rows]


def expected(**options):
    rows = {"p": [0, 3, 4], "q": [1, 2, 5]}
    scores = mean_logps(LOGPS, MASK)
    result = torch.zeros(6)
    for name, ranks in (("p", [0, 1, 2]), ("q", [1, 0, 0])):
        judged = torch.tensor([[TEXTS[row] != "" for row in rows[name]]])
        ranked = rank_advantages(scores[rows[name]][None], torch.tensor([ranks]), judged=judged, **options)
        result[rows[name]] = ranked.advantages[0]
    assert result[5] == 0 and result[0] > 0
    return result


@pytest.mark.parametrize("options", [{}, {"kind": "oracle"}, {"scale": "group", "penalty_weight": 0.5}])
def test_rows_of_any_order(options):
    ranker = RowRanker(Abstaining(), **options)
    ranked = ranker(IDS, IDS, TEXTS, [ANSWERS[i] for i in IDS], mean_logps(LOGPS, MASK))
    torch.testing.assert_close(ranked.advantages, expected(**options))
    assert ranked.gains[0] == ranked.gains[2] == 1.0 and ranked.gains[5] == 0.0


def responses(width=T):
    """(6, T) token ids: the text's token, then eights."""
    ids = torch.full((6, width), 8)
    ids[:, 0] = torch.tensor([WORDS[text] for text in TEXTS])
    return ids


@contextmanager
def without_models():
    """OpenRLHF's packages import flash-attn, which needs a GPU, for parts that the experience maker does not use."""
    found = importlib.util.find_spec("openrlhf")
    if found is None or found.origin is None:
        pytest.skip("OpenRLHF is not installed")
    folder = Path(found.origin).parent
    added = {}
    for name in ("models", "trainer", "trainer.ppo_utils", "trainer.ray"):
        added[f"openrlhf.{name}"] = package = ModuleType(f"openrlhf.{name}")
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
    added["openrlhf.trainer.ray.launcher"] = launcher = ModuleType("launcher")
    launcher.RayActorGroup = object  # an annotation
    before = {name for name in sys.modules if name.startswith("openrlhf")}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.startswith("openrlhf") and name not in before]:
            del sys.modules[name]


def test_openrlhf_spreads_our_advantages():
    with without_models():
        try:
            makers = importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker")
        except ModuleNotFoundError as error:
            pytest.skip(f"OpenRLHF's experience maker cannot be imported: {error}")
    kind = openrlhf.experience_maker(makers.RemoteExperienceMaker, Abstaining())
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=SimpleNamespace(estimator="dr_grpo", gamma=1.0, lambd=1.0)),
        rollout=SimpleNamespace(n_samples_per_prompt=3),
        reward=SimpleNamespace(clip_range=None, overlong_buffer_len=None, stop_properly_penalty_coef=None),
    )
    controller = SimpleNamespace(value=0.0)
    maker = kind(None, None, None, None, controller, SimpleNamespace(args=args), Tokenizer())
    order = [0, 3, 4, 1, 2, 5]  # of the prompts, each prompt's responses together
    place = {row: index for index, row in enumerate(order)}

    def experience(rows):
        sequences = torch.cat([torch.zeros(len(rows), 2, dtype=torch.long), responses()[rows]], dim=1)
        mask = torch.cat([torch.zeros(len(rows), 1, dtype=torch.bool), MASK[rows]], dim=1)
        return makers.Experience(
            sequences=sequences, action_mask=mask, index=[place[row] for row in rows],
            action_log_probs=torch.cat([torch.zeros(len(rows), 1), LOGPS[rows]], dim=1),
            prompts=[IDS[row] for row in rows], labels=[ANSWERS[IDS[row]] for row in rows],
            kl=torch.zeros(len(rows), T + 1), rewards=torch.zeros(len(rows)), info={},
        )  # fmt: skip

    batches = [[0, 1, 2], [3, 4, 5]]
    made = maker.compute_advantages_and_returns([experience(rows) for rows in batches])
    for rows, done in zip(batches, made):
        tokens = expected()[rows][:, None] * MASK[rows]
        torch.testing.assert_close(done.advantages[:, 1:] * MASK[rows], tokens, rtol=1e-5, atol=1e-6)


class SwiftTrainer:
    """What of ms-swift's trainer the hook needs, of the documented signature."""

    def __init__(self, model, args):
        self.model, self.args = model, args

    def _compute_advantages(self, samples, rewards_per_func, batch_encoded_inputs):
        self.logged = rewards_per_func
        return rewards_per_func.sum(1)


def swift_samples():
    return [
        SimpleNamespace(
            messages=[{"role": "user", "content": name}, {"role": "assistant", "content": text}],
            images=[], videos=[], prompt_id=name, extra={"solution": ANSWERS[name]},
        )
        for name, text in zip(IDS, TEXTS)
    ]  # fmt: skip


def swift_batches(logps):
    parts = [slice(0, 4), slice(4, 6)]
    return [
        {
            "grpo_batch": SimpleNamespace(
                old_per_token_logps=None if logps is None else logps[part], completion_mask=MASK[part]
            )
        }
        for part in parts
    ]


def swift_trainer(**options):
    args = {"advantage_estimator": "grpo", "kl_in_reward": False, "beta": 0.04, "scale_rewards": "group"}
    return ms_swift.ranked_trainer(SwiftTrainer, Abstaining(), **options)(
        "model", args=SimpleNamespace(**args)
    )


def test_ms_swift():
    trainer = swift_trainer()
    rewards = torch.rand(6, 2)
    advantages = trainer._compute_advantages(swift_samples(), rewards, swift_batches(LOGPS))
    torch.testing.assert_close(advantages, expected())
    assert trainer.logged is rewards
    with pytest.raises(ValueError, match="made no old log-probabilities"):
        trainer._compute_advantages(swift_samples(), rewards, swift_batches(None))
    plain = swift_trainer(kind="oracle")
    advantages = plain._compute_advantages(swift_samples(), rewards, swift_batches(None))
    torch.testing.assert_close(advantages, expected(kind="oracle"))


@pytest.fixture
def queue():
    """The real TransferQueue in this process's own Ray."""
    pytest.importorskip("verl", reason="verl is not installed")
    pytest.importorskip("transfer_queue", reason="TransferQueue is not installed")
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    import transfer_queue

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)  # the queue has three actors
    try:
        transfer_queue.init()
        yield transfer_queue
        transfer_queue.close()
    finally:
        ray.shutdown()


def test_verl_ranks_before_it_makes_advantages(queue):
    from omegaconf import OmegaConf
    from tensordict import TensorDict
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
    from verl.utils import tensordict_utils

    from rlaif_fast.adapters.verl_trainer import ranked

    def nested(x):
        return torch.nested.as_nested_tensor([row[:n] for row, n in zip(x, LENGTHS)], layout=torch.jagged)

    fields = tensordict_utils.get_tensordict(
        {
            "responses": nested(responses()), "response_mask": nested(MASK.long()),
            "old_log_probs": nested(LOGPS), "rm_scores": nested(torch.zeros(6, T)),
            "rollout_log_probs": nested(LOGPS), "uid": IDS,
            "raw_prompt": [[{"role": "user", "content": name}] for name in IDS],
            "reward_model": [{"ground_truth": ANSWERS[name]} for name in IDS],
        }
    )  # fmt: skip
    keys = [f"{name}_{row}_0" for row, name in enumerate(IDS)]
    batch = queue.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=[{}] * 6)
    assert isinstance(fields, TensorDict)
    trainer = object.__new__(ranked(PPOTrainerSync, Abstaining()))
    trainer.tokenizer = Tokenizer()
    algorithm = {"adv_estimator": "rlaif_fast", "use_kl_in_reward": False, "gamma": 1.0, "lam": 1.0}
    trainer.config = OmegaConf.create({"algorithm": algorithm, "actor_rollout_ref": {"rollout": {"n": 3}}})
    metrics: dict = {}
    done = trainer._compute_advantage(batch, metrics)
    got = queue.kv_batch_get(keys=done.keys, partition_id="train", select_fields=["advantages", "returns"])
    advantages = got["advantages"].to_padded_tensor(0.0)
    torch.testing.assert_close(advantages, expected()[:, None] * MASK, rtol=1e-5, atol=1e-6)
    assert 0.0 < metrics["oracle/gain"] < 1.0
