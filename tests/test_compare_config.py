"""The comparison that ships: every run can begin, and runs of a table get the same data, samples and judge."""

from collections import defaultdict
from pathlib import Path

import pytest

from rlaif_fast.cli import parse_config
from rlaif_fast.comparison.plan import read_plan
from rlaif_fast.errors import UsageError
from rlaif_fast.train import dump_config
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.yaml_keys import dump, load

SMALL = """
output_dir: runs/small
arms:
  one: {learning_rate: 1e-3, oracle: "my:Oracle", oracle_options: {model: "1.0", rate: 1e-3, more: ["1e3", 2e-3]}}
  two: {oracle: reference}
tables: {main: {seeds: [1], arms: [one, two], feedback: [exact], baseline: two}}
"""
FILE = Path(__file__).parents[1] / "configs" / "compare.yaml"
# What arms may set: how they learn, and how the samples of a step are cut into groups.
OF_AN_ARM = {"algorithm", "advantage", "beta", "num_generations", "videos_per_step", "reward_model_steps"}
OF_AN_ARM |= {"reward_model_refresh"}
OF_FEEDBACK = {"feedback", "feedback_strength", "learning_rate"}


@pytest.fixture(scope="module")
def plan():
    return read_plan(FILE)


def test_quoted_texts_among_options_stay_texts_down_to_the_run(tmp_path):
    """What a comparison writes for a run is read back as the same values."""
    file = tmp_path / "compare.yaml"
    file.write_text(SMALL)
    options = {"model": "1.0", "rate": 0.001, "more": ["1e3", 0.002]}
    values = dict(read_plan(file).arms["one"])
    assert values == {"learning_rate": 0.001, "oracle": "my:Oracle", "oracle_options": options}
    values["oracle_options"] = options = {**options, "version": "1e-3"}
    file.write_text(dump(values, sort_keys=True))
    assert load(file.read_text()) == values
    config = parse_config(TrainConfig, ["--config", str(file)], prog="", description="")
    assert config.oracle_options == options and config.learning_rate == 0.001
    again = file.with_name("config.yaml")
    again.write_text(dump_config(config))
    assert parse_config(TrainConfig, ["--config", str(again)], prog="", description="") == config


def test_an_unknown_key_of_an_arm_is_told_with_the_nearest_one(tmp_path):
    file = tmp_path / "compare.yaml"
    file.write_text(SMALL.replace("learning_rate", "learning_rte"))
    with pytest.raises(UsageError, match=r"arms.one.learning_rte is no key .*did you mean 'learning_rate'\?"):
        read_plan(file)


def test_every_run_is_a_configuration_that_can_begin(plan):
    jobs = plan.jobs()
    assert len(jobs) > 100
    seen = set()
    for job in jobs:
        key = tuple(
            sorted((k, str(v)) for k, v in job.values.items() if k not in ("seed", "sft", "output_dir"))
        )
        if key not in seen:  # seeds differ in nothing that is checked
            seen.add(key)
            TrainConfig(**job.values)


def test_arms_of_a_table_draw_as_many_samples_from_the_same_data(plan):
    common = plan.common
    assert all(set(keys) <= OF_AN_ARM for keys in plan.arms.values())
    assert all(set(keys) <= OF_FEEDBACK for keys in plan.feedback.values())
    samples = common["videos_per_step"] * common["num_generations"]
    for name, keys in plan.arms.items():
        drawn = keys.get("videos_per_step", common["videos_per_step"])
        drawn *= keys.get("num_generations", common["num_generations"])
        assert drawn == samples, name
    groups = {table.name: table for table in plan.tables}["groups"]
    sizes = defaultdict(set)
    for arm in groups.arms:
        keys = plan.arms[arm]
        sizes[keys["algorithm"]].add(keys.get("num_generations", common["num_generations"]))
    assert sizes == {"grpo": {2, 4, 8, 16}, "grpo_rank": {2, 4, 8, 16}}


def test_judges_are_asked_in_one_to_four_orders(plan):
    (table,) = [table for table in plan.tables if table.name == "orders"]
    kinds = [plan.feedback[name] for name in table.feedback]
    assert [kind["feedback_strength"] for kind in kinds] == [1, 2, 3, 4]
    assert {kind["feedback"] for kind in kinds} == {"listwise"}


def test_every_arm_is_searched_alike_on_seeds_of_no_other_table(plan):
    tables = {table.name: table for table in plan.tables}
    search = tables.pop("search")
    assert not set(search.seeds) & {seed for table in tables.values() for seed in table.seeds}
    assert set(tables["main"].arms) | {"rlrr", "odrpo", "lipo"} == set(search.arms)
    rates = defaultdict(list)
    for name in search.feedback:
        keys = plan.feedback[name]
        rates[keys.get("feedback", "exact")].append(keys["learning_rate"])
    assert len(rates) == 2 and rates["exact"] == rates["heavy_tails"] == [1e-4, 2e-4, 4e-4]
    assert not any("learning_rate" in plan.arms[arm] for arm in search.arms)  # else a column would not hold


def test_the_whole_budget_of_ppo_is_that_of_the_others(plan):
    arm = plan.arms["ppo_rm"]
    assert arm["reward_model_refresh"] is True  # the oracle ranks every rollout, as it does for the others
    assert arm["reward_model_steps"] < plan.common["max_steps"]
