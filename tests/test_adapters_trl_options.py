"""Options of TRL's: each is used as TRL uses it, or refused by TRL's name before a model is loaded."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install 'rlaif-fast[adapters-test]'")

import trl.trainer.grpo_trainer
from datasets import Dataset
from test_adapters_ranking import InOrder
from transformers import AutoModelForCausalLM, RecurrentGemmaConfig
from trl import GRPOConfig, GRPOTrainer

from rlaif_fast.adapters import parity
from rlaif_fast.adapters.trl import OracleGRPOTrainer
from rlaif_fast.adapters.trl_loss import add_rank_loss
from rlaif_fast.adapters.trl_metrics import CLIPPED, EXTREMES, logged
from rlaif_fast.errors import UsageError
from rlaif_fast.oracle import Ranking, ReferenceOracle

ROWS = Dataset.from_list([{"prompt": "1", "answer": "1"}])
SEQUENCE = {"importance_sampling_level": "sequence"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "vespo"}, "loss_type must be one of .* got 'vespo'"),
        ({"top_entropy_quantile": 0.5}, "has no top_entropy_quantile=0.5"),
        ({"off_policy_mask_threshold": 0.5}, "has no off_policy_mask_threshold=0.5"),
        ({"use_adaptive_entropy": True}, "has no use_adaptive_entropy=True"),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            "has no multi_objective_aggregation=normalize",
        ),
        ({"metric_for_best_model": "eval_reward"}, "has no metric_for_best_model=eval_reward"),
        ({"metric_for_best_model": "rewards/oracle_api/mean"}, "has no metric_for_best_model=rewards/"),
        ({"scale_rewards": "batch"}, "scale_rewards must be left out, .* scale='none'; got 'batch'"),
        ({"loss_type": "sapo", "delta": 2.0}, "delta must be None with loss_type='sapo'; got 2.0"),
        (
            {"loss_type": "cispo", **SEQUENCE},
            "importance_sampling_level must be 'token' with loss_type='cispo'",
        ),
        ({"loss_type": "grpo", "beta": 0.1, **SEQUENCE}, "use_bias_correction_kl must be False with"),
        (
            {"importance_sampling_level": "word"},
            "importance_sampling_level must be one of 'token', 'sequence'",
        ),
    ],
)
def test_options_this_trainer_has_not_are_refused_before_a_model_is_loaded(tmp_path, options, message):
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
    with pytest.raises(ValueError, match=message):
        OracleGRPOTrainer("no/such/model", ReferenceOracle(), args=args)


def test_a_model_whose_logits_trl_does_not_scale_is_refused():
    tiny = {
        "num_hidden_layers": 3,
        "vocab_size": 8,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "lru_width": 8,
    }
    model = AutoModelForCausalLM.from_config(RecurrentGemmaConfig(**tiny, intermediate_size=8))
    ids = torch.arange(4)[None]
    uncapped = model.lm_head(model.model(ids).last_hidden_state)
    assert torch.allclose(model(ids).logits, 30 * (uncapped / 30).tanh())
    with pytest.raises(ValueError, match=r"has no logits_soft_cap=30.0 of recurrent_gemma"):
        add_rank_loss(model)


@pytest.mark.parametrize(("kind", "weight"), [("zscore", 1.0), ("paper", 2.0)])
def test_kinds_are_checked_before_a_model_is_loaded(kind, weight):
    with pytest.raises(ValueError, match=r"^(kind must be one of|penalty_weight must be left out)"):
        OracleGRPOTrainer("no/such/model", ReferenceOracle(), kind=kind, penalty_weight=weight)


def test_an_oracle_is_needed():
    with pytest.raises(ValueError, match="oracles must be an oracle or several; got none"):
        OracleGRPOTrainer("no/such/model", [])


@pytest.mark.parametrize(
    "data", [{"train_dataset": ROWS}, {"train_dataset": None, "eval_dataset": {"first": ROWS}}]
)
def test_a_column_of_references_that_is_not_there_is_refused_before_a_model_is_loaded(data):
    with pytest.raises(UsageError, match="reference='answr': there is no such column among answer, prompt"):
        OracleGRPOTrainer("no/such/model", ReferenceOracle(), reference="answr", **data)


def test_scale_rewards_may_say_what_scale_says(tmp_path):
    assert parity.trl_trainer(str(tmp_path), scale_rewards="none").ranking.scale == "none"


def test_sequence_level_trains_with_trls_defaults(tmp_path):
    trainer = parity.trl_trainer(str(tmp_path), max_steps=1, save_strategy="no", loss_type="grpo", **SEQUENCE)
    assert trainer.args.use_bias_correction_kl and trainer.beta == 0.0
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("bf16", [False, True])
def test_a_float32_head_stays_so_under_autocast(tmp_path, bf16):
    trainer = parity.trl_trainer(str(tmp_path), bf16=bf16, cast_lm_head_to_fp32=True)
    errors = parity.trl_errors("grpo", trainer)
    assert errors.loss <= 1e-6
    assert errors.gradients <= 2e-6


def trained(folder, monkeypatch, oracle=None, **options):
    """The trainer after a step on fixed completions, half of them without an end, and what it made of them."""
    trainer = parity.trl_trainer(
        str(folder),
        max_steps=1,
        gradient_accumulation_steps=1,
        save_strategy="no",
        loss_type="grpo",
        **options,
    )
    trainer.oracles = [oracle or InOrder()]
    made = []
    rows = [[9, 8, 7, 1], [5, 1], [6] * 7, [4] * 7, [3, 2, 1], [30] * 7]  # 1 ends a completion
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda *_, **__: (rows, None))
    generate = trainer._generate_and_score_completions
    monkeypatch.setattr(
        trainer, "_generate_and_score_completions", lambda inputs: made.append(generate(inputs)) or made[0]
    )
    trainer.train()
    return trainer, made[0]


@pytest.mark.parametrize("num_iterations", [1, 2])  # 2: TRL makes the old log-probabilities
def test_truncated_completions_keep_their_place_in_the_policys_order(tmp_path, monkeypatch, num_iterations):
    options = {"num_iterations": num_iterations}
    whole, plain = trained(tmp_path, monkeypatch, **options)
    masked, cut = trained(tmp_path, monkeypatch, mask_truncated_completions=True, **options)
    torch.testing.assert_close(cut["advantages"], plain["advantages"])
    ended = torch.tensor([1, 1, 0, 0, 1, 0])[:, None]
    assert cut["completion_mask"].tolist() == (plain["completion_mask"] * ended).tolist()
    assert cut["num_items_in_batch"] == 4 + 2 + 3
    assert masked.mask_truncated_completions and not whole.mask_truncated_completions

    theirs_alone = GRPOTrainer._generate_and_score_completions
    monkeypatch.setattr(OracleGRPOTrainer, "_generate_and_score_completions", theirs_alone)
    _, theirs = trained(tmp_path, monkeypatch, mask_truncated_completions=True, **options)
    assert theirs.keys() == cut.keys()
    for name in ("completion_ids", "completion_mask", "num_items_in_batch"):
        assert torch.equal(theirs[name], cut[name])
    if num_iterations > 1:
        kept = cut["completion_mask"].bool()
        torch.testing.assert_close(cut["old_per_token_logps"][kept], theirs["old_per_token_logps"][kept])


def test_a_response_of_tools_alone_has_no_place_in_the_order(tmp_path):
    trainer = parity.trl_trainer(str(tmp_path))
    logps = torch.tensor([[-1.0, -1.0], [-2.0, -2.0]])
    output = {"old_per_token_logps": logps, "completion_mask": torch.ones(2, 2)}
    output["tool_mask"] = torch.tensor([[0, 0], [1, 0]])
    scores = trainer._scores(output)
    assert scores[0].isnan() and scores[1] == -2.0


def test_an_oracle_that_ranks_not_all_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"^oracle in order: expected 1 rankings, got 0"):
        trained(tmp_path, monkeypatch, InOrder(lambda rankings: rankings[:0]))


def test_a_missing_column_of_references_is_told_by_an_oracle_that_needs_it(tmp_path):
    trainer = parity.trl_trainer(str(tmp_path))
    trainer.oracles = [ReferenceOracle()]
    batch = [{"prompt": "1", "answer": "1"}] * 6, ["1"] * 6, list("123456"), [[2]] * 6
    with pytest.raises(UsageError, match="the trainer passed no column 'reference' among answer; add it"):
        trainer._calculate_rewards(*batch)
    trainer.oracles = [InOrder()]  # which needs none
    assert trainer._calculate_rewards(*batch).isfinite().all()


def test_what_any_row_says_reaches_the_oracle(tmp_path):
    asked = []

    class Noting(InOrder):
        def rank(self, requests):
            asked.extend(requests)
            return super().rank(requests)

    trainer = parity.trl_trainer(str(tmp_path))
    trainer.oracles = [Noting()]
    inputs = [{"prompt": "1", "reference": "1"}] + [{"prompt": "1", "reference": "1", "hint": "h"}] * 5
    trainer._calculate_rewards(inputs, ["1"] * 6, list("123456"), [[2]] * 6)
    assert [request.reference for request in asked] == ["1"]
    assert asked[0].metadata == {}  # the rows do not agree on the hint


class Owner:
    """An environment of TRL's that makes rewards itself."""

    def reset(self, **row):
        return None

    def get_reward(self):
        return 1.0


def test_the_reward_of_an_environment_is_refused(tmp_path, monkeypatch):
    init = GRPOTrainer.__init__
    monkeypatch.setattr(trl.trainer.grpo_trainer, "supports_tool_calling", lambda tokenizer: True)
    monkeypatch.setattr(
        GRPOTrainer, "__init__", lambda self, *a, **named: init(self, *a, **named, environment_factory=Owner)
    )
    with pytest.raises(ValueError, match="must give no get_reward, oracles rank; got that of Owner"):
        parity.trl_trainer(str(tmp_path))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("special", [False, True])
def test_the_oracle_reads_where_reasoning_ends(tmp_path, chat, special):
    """TRL drops special tokens of completions, those of reasoning too."""
    trainer, asked = parity.trl_trainer(str(tmp_path)), []
    trainer._tokenizer.add_tokens(["</think>"], special_tokens=special)
    mark = trainer._tokenizer.convert_tokens_to_ids("</think>")
    trainer.oracles = [InOrder(lambda rankings: rankings)]
    trainer.oracles[0].rank = lambda requests: (asked.extend(requests), InOrder().rank(requests))[1]
    ids = [[5, mark, place, 1] for place in range(2, 8)]
    texts = trainer._tokenizer.batch_decode(ids, skip_special_tokens=True)  # as TRL does
    completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
    prompt = [{"role": "user", "content": "1"}] if chat else "1"
    rows = [{"prompt": prompt, "reference": "1"}] * 6
    trainer._calculate_rewards(rows, [prompt] * 6, completions, ids)
    assert [text.split() for text in asked[0].responses] == [["5", "</think>", str(n)] for n in range(2, 8)]


def test_two_oracles_of_one_name_are_told_apart(tmp_path, monkeypatch):
    def backwards(rankings):
        return [Ranking(tuple(reversed(ranking.ranks))) for ranking in rankings]

    tiny = parity.trl_trainer(str(tmp_path), max_steps=1, save_strategy="no", logging_steps=1)
    trainer = OracleGRPOTrainer(
        tiny.model,
        [InOrder(), InOrder(backwards)],
        args=tiny.args,
        train_dataset=tiny.train_dataset,
        processing_class=tiny.processing_class,
    )
    trainer.train()
    assert trainer.reward_func_names == ["oracle_in order", "oracle_in order 2"]
    assert trainer._logs["extra"]["rank/in order"] != trainer._logs["extra"]["rank/in order 2"]
    assert trainer._logs["rewards"].keys() >= {"oracle_in order", "oracle_in order 2"}
    logged = trainer.state.log_history[0]
    assert logged["rank/in order/kendall_tau"] == pytest.approx(-logged["rank/in order 2/kendall_tau"])


def test_a_process_without_a_token_has_no_share_of_clipped_ones():
    """As TRL's nanmin and nanmax leave it out; where none has one, TRL logs NaN."""
    stats = {name: torch.tensor(0.5) for name in (*CLIPPED, *EXTREMES)} | {"tokens": torch.tensor(4.0)}
    empty = torch.zeros(1)
    found = logged(stats, "dapo", lambda x: torch.cat([x[None], empty]))
    assert found["clip_ratio/low_min"] == found["clip_ratio/high_max"] == found["clip_ratio/low_mean"] == 0.5
    none = logged({name: torch.tensor(0.0) for name in stats}, "dapo", lambda x: x[None])
    assert math.isnan(none["clip_ratio/low_min"]) and math.isnan(none["clip_ratio/high_max"])
