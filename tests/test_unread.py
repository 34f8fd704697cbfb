"""A key that nothing reads is refused where a flag sets it, and told where a file does."""

import dataclasses
from dataclasses import dataclass, fields
from dataclasses import field as dataclass_field

import pytest
from tiny_runs import metrics

from rlaif_fast import train as train_module
from rlaif_fast.algorithms.rloo import Rloo
from rlaif_fast.data.synthetic.dataset import SyntheticConfig
from rlaif_fast.errors import UsageError, check_fields
from rlaif_fast.evals.options import EvaluateConfig
from rlaif_fast.rollout import SamplingParams
from rlaif_fast.trainer.drawing import sampling_params
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.unread import (
    JUDGED,
    LEARNING,
    PACKED,
    REINFORCED,
    SAMPLED,
    SUPERVISED,
    SYNTHETIC,
    tell_unread,
    unread,
)

pytest_plugins = ("tiny_runs",)

LEFT = {
    ("data", "rows.jsonl"): ("synthetic_rl_clips", "label_confusion", "codec"),
    ("data", "synthetic"): ("media_root", "holdout_fraction"),
    ("sft", "none"): ("sft_steps", "sft_learning_rate"),
    ("max_steps", 0): ("learning_rate", "videos_per_step", "dynamic_sampling_rounds", "beta", "kl", "gamma"),
    ("beta", 0.0): ("kl",),
    ("oracle", "reference"): ("weight_by_confidence",),
    ("lora_r", 0): ("lora_alpha", "lora_dropout", "lora_target_modules", "feature_cache_bytes"),
    ("sft_steps", 0): ("sft_learning_rate", "sft_warmup_steps"),
    ("num_iterations", 1): ("epsilon", "epsilon_high", "delta", "cliprange_value"),
    ("nframes", 8): ("fps",),
    ("lr_scheduler_type", "linear"): ("min_lr_ratio",),
    ("dynamic_sampling", False): ("dynamic_sampling_rounds",),
    ("sampler", "plain"): ("sampling_ratio_cap", "max_cached_tokens"),
    ("eval_steps", 501): ("blind_control",),
    ("shared_prefix", False): ("attention_backend", "feature_cache_bytes"),
}
READ = {
    **{"data": "rows.jsonl", "dynamic_sampling": True, "sampler": "vllm", "oracle": "api"},
    **{"lora_r": 4, "num_iterations": 2},
}


@pytest.mark.parametrize(("key", "names"), LEFT.items())
def test_what_one_key_leaves_unread(key, names):
    found = unread(TrainConfig(**(READ | dict([key]))))
    assert found.keys() >= set(names)
    for name in names:
        with pytest.raises(UsageError, match=f"{name}.*: not read where .*; leave it out"):
            tell_unread(TrainConfig(**(READ | dict([key]))), [name], [])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"synthetic_sft_clips": 0}, {"label_noise", "label_confusion"}),
        ({"multiple_choice_fraction": 1.0}, {"label_confusion"}),
    ],
)
def test_answers_that_synthetic_data_lacks_have_no_mistakes(options, names):
    assert not names & unread(TrainConfig()).keys()
    assert names <= unread(TrainConfig(**options)).keys()


@pytest.mark.parametrize("split", ["sft", "validation", "test"])
def test_a_file_of_its_own_leaves_a_synthetic_split_unread(split):
    found = unread(TrainConfig(**{f"{split}_data": "rows.jsonl"}))
    clips = {f"synthetic_{split}_clips"} | ({"label_noise", "label_confusion"} if split == "sft" else set())
    told = {name for name in SYNTHETIC if name in found}
    assert told == clips


def test_what_a_start_from_a_checkpoint_leaves_unread(tmp_path):
    assert unread(TrainConfig(sft="none")).keys() >= {"label_noise", "label_confusion"}
    folder = TrainConfig(sft="none", data=str(tmp_path), sft_data="rows.jsonl", model="MODEL")
    assert "sft_data" not in unread(folder)  # there is nothing else to learn from
    (tmp_path / "rl.jsonl").write_text("")
    assert "sft_data" in unread(folder)
    # it knows the words of all rows
    assert "sft_data" not in unread(dataclasses.replace(folder, model="tiny"))
    assert "sft_data" not in unread(dataclasses.replace(folder, sft="auto"))


@pytest.mark.parametrize(
    ("own", "is_read"),
    [({}, False), ({"test_data": "mvbench:DIR"}, False), ({"test_data": "rows.jsonl"}, True)],
)
def test_media_root_is_for_files_of_ones_own(own, is_read):
    assert ("media_root" not in unread(TrainConfig(**own))) == is_read


def test_replacing_groups_needs_a_round():
    with pytest.raises(UsageError, match="dynamic_sampling_rounds: expected 1 or more, got 0"):
        TrainConfig(dynamic_sampling=True, dynamic_sampling_rounds=0)
    TrainConfig(dynamic_sampling=False, dynamic_sampling_rounds=0)


def test_a_number_of_frames_leaves_bounds_to_rows_that_have_rates_of_their_own():
    bounds = {"min_frames", "max_frames"}
    assert unread(TrainConfig(nframes=8)).keys() >= bounds
    assert not unread(TrainConfig(nframes=8, data="rows.jsonl")).keys() & bounds
    assert not unread(TrainConfig(nframes=8, test_data="rows.jsonl")).keys() & bounds


def test_what_is_read_is_not_told():
    config = TrainConfig(**READ)
    assert unread(config).keys() == {*SYNTHETIC, "max_cached_tokens"}
    assert tell_unread(config, ["sampling_ratio_cap", "min_lr_ratio"], ["fps", "sft_steps"]) == []


def test_a_file_may_say_more_than_a_run_reads():
    lines = tell_unread(
        TrainConfig(sft="none", nframes=8), ["nframes"], ["fps", "sft_steps", "sft_warmup_steps"]
    )
    assert lines == [
        "not read, since sft is none: sft_steps, sft_warmup_steps",
        "not read, since nframes is 8: fps",
    ]


@pytest.mark.parametrize(
    ("changes", "is_read"), [({"sft": "none"}, False), ({"sft_steps": 0}, False), ({}, True)]
)
def test_a_run_that_learns_nothing_reads_nothing_of_learning(changes, is_read):
    assert set(LEARNING) & unread(TrainConfig(max_steps=0, **changes)).keys() == (
        set() if is_read else set(LEARNING)
    )


def test_without_rl_what_draws_and_ranks_is_read_for_the_gallery_alone(run):
    given = {
        "num_generations": 5,
        "temperature": 0.3,
        "top_p": 0.5,
        "top_k": 3,
        "score": "sum",
        "scale": "none",
    }
    off = {"max_steps": 0, "gallery_clips": 0}
    (_, one, _), (_, other, said) = run("one", **off), run("other", **off, **given)
    assert metrics(one) == metrics(other)
    assert all(name in said for name in given) and given.keys() < set(SAMPLED)
    judged = {"oracle_noise": 0.9, "oracle_shuffle": "true", "metric_for_best_model": "accuracy"}
    _, noisy, said = run("noisy", **off, **judged)
    assert (
        metrics(one) == metrics(noisy)
        and "the oracle is not the metric: oracle_noise, oracle_shuffle" in said
    )
    assert not set(JUDGED) & unread(TrainConfig(**off | {"metric_for_best_model": "oracle"})).keys()
    with_gallery = unread(TrainConfig(max_steps=0, gallery_clips=1, oracle="embedding"))
    assert not with_gallery.keys() & set(SAMPLED)


OFF_POLICY = {"epsilon": 0.01, "epsilon_high": 0.01, "delta": 1.02}


@pytest.mark.parametrize(
    ("changes", "is_read"),
    [
        ({}, set()),
        ({"num_iterations": 2}, OFF_POLICY.keys()),
        ({"steps_per_generation": 2}, OFF_POLICY.keys()),
        ({"algorithm": "test_unread:Odd"}, OFF_POLICY.keys()),  # which may read what it likes
    ],
)
def test_what_bounds_the_ratio_is_read_where_the_weights_have_moved(changes, is_read):
    assert OFF_POLICY.keys() - unread(TrainConfig(**changes)).keys() == is_read


def test_what_bounds_the_ratio_changes_nothing_before_the_weights_move(run):
    (_, one, _), (_, other, said) = run("one"), run("other", **OFF_POLICY)
    assert metrics(one) == metrics(other)
    assert f"not read, since num_iterations and steps_per_generation are 1: {', '.join(OFF_POLICY)}" in said


class Odd(Rloo):
    """Of another package."""


def test_every_name_is_a_key():
    known = {field.name for field in fields(TrainConfig)}
    assert known >= {*SYNTHETIC, *SUPERVISED, *REINFORCED, *SAMPLED, *JUDGED, *LEARNING, *PACKED}


def test_the_command_refuses_a_flag_and_tells_a_file(tmp_path, capsys):
    assert (
        train_module.main(["--sft", "none", "--sft_steps", "5", "--output_dir", str(tmp_path / "run")]) == 2
    )
    assert "error: sft_steps: not read where sft is none; leave it out" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text("sft_steps: 5\nsft: none\ndata: nothing.jsonl\n")
    words = ["--config", str(tmp_path / "mine.yaml"), "--output_dir", str(tmp_path / "run")]
    assert train_module.main(words) == 2  # there is no such file
    assert "not read, since sft is none: sft_steps\n" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_evaluation_takes_a_rate_or_a_number_of_frames():
    with pytest.raises(UsageError, match="fps: give it or nframes, not both"):
        EvaluateConfig(run="RUN", fps=2.0, nframes=8)


def test_responses_are_drawn_as_configured():
    config = TrainConfig(temperature=0.7, top_p=0.9, top_k=5, max_completion_length=9, max_reasoning_tokens=4)
    assert sampling_params(config, 3) == SamplingParams(9, 0.7, 0.9, 5, seed=3, max_reasoning_tokens=4)


@pytest.mark.parametrize(
    "name",
    ["learning_rate", "eval_steps", "seed", "top_p", "temperature", "min_pixels", "data", "sampler_options"],
)
def test_null_is_refused_where_a_key_needs_a_value(name, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(f"{name}: null\n")
    words = ["--config", str(tmp_path / "mine.yaml"), "--output_dir", str(tmp_path / "run")]
    assert train_module.main(words) == 2
    err = capsys.readouterr().err
    assert name in err and "Traceback" not in err and not (tmp_path / "run").exists()


def test_every_key_says_whether_it_may_be_null():
    for field in fields(TrainConfig):
        if "None" in str(field.type):
            continue
        with pytest.raises(UsageError, match=field.name):
            TrainConfig(**{field.name: None})


def test_null_is_refused_in_nested_options():
    @dataclass
    class Inner:
        rate: float = 1.0

    @dataclass
    class Outer:
        inner: object = dataclass_field(default_factory=lambda: Inner(None))

    with pytest.raises(UsageError, match=r"inner\.rate: expected a value, got null"):
        check_fields(Outer())


@pytest.mark.parametrize(("name", "least"), [("max_cached_tokens", 1), ("feature_cache_bytes", 0)])
def test_sizes_below_what_works_are_refused(name, least):
    with pytest.raises(UsageError, match=f"{name}: expected {least} or more, got -5"):
        TrainConfig(**{name: -5})


@pytest.mark.parametrize(
    ("options", "name"), [(EvaluateConfig, "videos_per_step"), (SyntheticConfig, "seed")]
)
def test_null_is_refused_by_the_other_commands(options, name):
    with pytest.raises(UsageError, match=f"{name}: expected a value, got null"):
        options(**{name: None})


@pytest.mark.parametrize(
    ("options", "name"),
    [(TrainConfig, "max_completion_length"), (EvaluateConfig, "videos_per_step"), (SyntheticConfig, "width")],
)
def test_numbers_beyond_64_bits_are_refused(options, name):
    with pytest.raises(UsageError, match=f"{name}: expected a number of 64 bits, got 10000"):
        options(**{name: 10**400})
