"""Flags win over files wherever they stand, and what both set is told."""

import errno
import json
import logging
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rlaif_fast import cli
from rlaif_fast import train as train_module
from rlaif_fast.cli import given_values, parse_config
from rlaif_fast.data.synthetic.dataset import SyntheticConfig
from rlaif_fast.errors import UsageError
from rlaif_fast.evals.options import EvaluateConfig, configuration
from rlaif_fast.evaluate import main as evaluate_main
from rlaif_fast.plan import __main__ as plan_module
from rlaif_fast.policy.tiny import TinySize, make_tiny
from rlaif_fast.trainer.cached_model import defaults_of
from rlaif_fast.trainer.options import TrainConfig

TEXTS = {"prog": "p", "description": "d"}


@dataclass
class Options:
    """A few.

    Attributes:
        model: A name.
        steps: A number.
        names: A list.
        more: Anything.
    """

    model: str = "default"
    steps: int = 1
    names: list[str] = field(default_factory=list)
    more: dict = field(default_factory=dict)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "one.yaml").write_text("model: one\nsteps: 10\nmore: {a: 1}\n")
    (tmp_path / "two.yaml").write_text("model: two\nnames: [x]\n")
    return str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml")


@pytest.mark.parametrize(
    "order",
    [
        ["--model", "flag", "--config", "ONE"],
        ["--config", "ONE", "--model", "flag"],
        ["--model=flag", "--config=ONE"],
        ["--config=ONE", "--model=flag"],
        ["--model", "early", "--config", "ONE", "--model", "flag"],
        ["--model", "flag", "--config", "TWO", "--config", "ONE"],
    ],
)
def test_a_flag_wins_wherever_it_stands(files, order, capsys):
    words = [word.replace("ONE", files[0]).replace("TWO", files[1]) for word in order]
    config = parse_config(Options, words, **TEXTS)
    assert (config.model, config.steps) == ("flag", 10)
    assert given_values(Options, words, **TEXTS)["model"] == "flag"
    told = capsys.readouterr().err.splitlines()
    assert told[-1 - ("early" in order)].startswith("model: 'flag' (the flag; ")
    assert told[-1].endswith("(the last of 2 flags)" if "early" in order else "says 'one')")


@pytest.mark.parametrize(("rank", "said"), [("0", "steps: 3 (the last of 2 flags)\n"), ("1", "")])
def test_of_the_processes_of_torchrun_the_first_tells(rank, said, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    assert parse_config(Options, ["--steps", "2", "--steps", "3"], **TEXTS).steps == 3
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(("rank", "said"), [("0", ["other.csv"]), ("1", [])])
def test_of_the_processes_of_torchrun_the_first_names_files_that_are_not_read(
    rank, said, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("RANK", rank)
    (tmp_path / "rows.jsonl").write_text('{"id": "1", "video": "gone.mp4", "question": "?", "answer": "a"}\n')
    (tmp_path / "other.csv").write_text("a,b\n")
    try:
        assert evaluate_main(["--benchmark", "jsonl", "--data", str(tmp_path), "--model", "none"]) == 2
    finally:
        logging.getLogger("rlaif_fast.data").setLevel(logging.NOTSET)
    assert [record.getMessage().rpartition(" ")[2] for record in caplog.records] == said


def test_every_key_that_both_set_to_other_values_is_told(files, capsys):
    words = ["--steps", "5", "--more", '{"b": 2}', "--config", files[0], "--names", '["y"]', "--model", "one"]
    config = parse_config(Options, words, **TEXTS)
    assert (config.model, config.steps, config.more, config.names) == ("one", 5, {"b": 2}, ["y"])
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "steps: 5 (the flag; the file says 10)",
        "more: {'b': 2} (the flag; the file says {'a': 1})",
    ]


def test_of_two_files_the_later_wins_and_one_below_yields_to_both(files, tmp_path, capsys):
    one, two = files
    assert parse_config(Options, ["--config", one, "--config", two], **TEXTS).model == "two"
    assert capsys.readouterr().err == f"model: 'two' ({two}; {one} says 'one')\n"
    assert parse_config(Options, ["--config", two, "--config", one], **TEXTS).model == "one"
    assert capsys.readouterr().err == f"model: 'one' ({one}; {two} says 'two')\n"
    under = tmp_path / "under.yaml"
    under.write_text("model: under\nsteps: 3\n")
    assert parse_config(Options, ["--config", two], under=under, **TEXTS) == Options("two", 3, ["x"])
    assert parse_config(Options, ["--steps", "4"], under=under, **TEXTS) == Options("under", 4)
    assert capsys.readouterr().err == ""  # nothing that the user set twice


@pytest.mark.parametrize("flag", ["--config FILE", "--config=FILE"])
def test_a_key_that_stands_twice_in_a_file_is_refused(tmp_path, flag):
    file = tmp_path / "twice.yaml"
    file.write_text("model: one\nmore:\n  a: 1\nmodel: two\n")
    with pytest.raises(UsageError, match=r"twice.yaml:4: the key 'model' stands twice"):
        parse_config(Options, flag.replace("FILE", str(file)).split(), **TEXTS)
    file.write_text("model: one\nmore:\n  a: 1\n  a: 2\n")
    with pytest.raises(UsageError, match=r"twice.yaml:4: the key 'a' stands twice"):
        parse_config(Options, flag.replace("FILE", str(file)).split(), **TEXTS)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no keys"),
        (b"# steps: 1\n", "holds no keys"),
        (b"- a\n", "holds no keys"),
        (b"\xff\xfe", "is no text in UTF-8"),
        (b"steps: [1\n", "cannot read .* line 2"),
    ],
)
def test_a_file_that_holds_no_keys_is_refused_by_name(tmp_path, content, words):
    file = tmp_path / "some.yaml"
    file.write_bytes(content)
    for read in (parse_config, given_values):
        with pytest.raises(UsageError, match=f"config: .*{words}") as told:
            read(Options, ["--config", str(file)], **TEXTS)
        assert str(file) in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--max_steps 2.0", "max_steps: expected a whole number, got 2.0"),
        ("--beta no", "beta: expected a number or null, got no"),
        ("--learning_rate nan", "learning_rate: expected a number, got nan"),
        ("--report maybe", "report: expected true or false, got maybe"),
        ("--report_to wandb", "report_to: expected a list, [a, b], of text, got wandb"),
        ("--oracle_options {bad", "oracle_options: expected keys with values, {KEY: value}, got {bad"),
        ("--dtype fp32", "dtype: expected one of auto, float32, bfloat16, float16, got fp32"),
    ],
)
def test_a_value_of_another_type_is_refused_in_plain_words(words, told):
    with pytest.raises(UsageError, match=f"^{re.escape(told)}$"):
        parse_config(TrainConfig, words.split(), **TEXTS)


def test_a_quoted_text_among_the_options_of_an_oracle_stays_one(tmp_path):
    """A regular expression with a colon would become a mapping, a model's name of digits a number."""
    texts = {"extract": "Answer: (.*)", "model": "16", "more": "[x]", "rate": 0.001, "number": 5}
    file = tmp_path / "some.yaml"
    file.write_text(
        "oracle_options: {extract: 'Answer: (.*)', model: \"16\", more: '[x]', rate: 1e-3, number: 5}\n"
    )
    flag = '{"extract": "Answer: (.*)", "model": "16", "more": "[x]", "rate": 1e-3, "number": 5}'
    for words in (["--config", str(file)], ["--oracle_options", flag], [f"--oracle_options={flag}"]):
        assert parse_config(TrainConfig, words, **TEXTS).oracle_options == texts
        assert given_values(TrainConfig, words, **TEXTS)["oracle_options"] == texts
    words = ["--config", str(file), "--oracle_options", "{model: 17}"]
    assert parse_config(TrainConfig, words, **TEXTS).oracle_options["model"] == 17
    sections = cli.typed_sections(TrainConfig, {"arm": {"oracle_options": texts}})
    assert sections["arm"]["oracle_options"] == texts


def test_a_section_in_place_of_a_key_is_an_unknown_key(tmp_path):
    (tmp_path / "some.yaml").write_text("lora: {r: 4}\n")
    with pytest.raises(UsageError, match=r"unknown key 'lora.r'; did you mean 'lora_r'\?"):
        parse_config(TrainConfig, ["--config", str(tmp_path / "some.yaml")], **TEXTS)


def test_a_key_that_takes_several_numbers_says_how_many():
    with pytest.raises(UsageError, match="difficulty: expected a list of 3, each a number, got 1,1"):
        parse_config(SyntheticConfig, ["--difficulty", "1,1"], **TEXTS)


def test_a_file_that_cannot_be_read_and_a_word_alone_are_told_in_words(tmp_path, monkeypatch):
    """`train configs/tiny.yaml` was told of an unknown key 'configs'; a pipe of an "Unexpected config:"."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "some.yaml").write_text('oracle_options: {model: "16"}\n')
    os.mkfifo(tmp_path / "pipe")
    for words, told in (
        (
            ["configs/tiny.yaml"],
            "unexpected 'configs/tiny.yaml'; a configuration file goes with --config FILE",
        ),
        (["--max_steps", "3", "x", "y"], "unexpected 'x y'; "),
        (["--config", "/no/such.yaml"], "config: cannot read /no/such.yaml: No such file or directory"),
        ([f"--config={tmp_path}"], f"config: cannot read {tmp_path}: Is a directory"),
        (
            ["--config", str(tmp_path / "pipe")],
            f"config: {tmp_path / 'pipe'} is a pipe, and the file is read",
        ),
    ):
        with pytest.raises(UsageError, match=re.escape(told)):
            parse_config(TrainConfig, words, **TEXTS)
    assert parse_config(TrainConfig, ["--config=~/some.yaml"], **TEXTS).oracle_options == {"model": "16"}


def test_a_file_that_is_named_without_a_name_is_refused():
    with pytest.raises(UsageError):
        parse_config(Options, ["--steps", "1", "--config"], **TEXTS)


def test_the_model_of_the_flag_is_trained_not_the_tiny_one(tmp_path, monkeypatch):
    """`--model PATH --config tiny.yaml` trained the tiny model."""
    tiny = tmp_path / "tiny.yaml"
    tiny.write_text("model: tiny\nmax_steps: 7\n")
    seen = []
    monkeypatch.setattr(train_module, "train", lambda config, given: seen.append((config, given)))
    assert train_module.main(["--model", "/some/model", "--config", str(tiny)]) == 0
    config, given = seen[0]
    assert (config.model, given["model"], config.max_steps) == ("/some/model", "/some/model", 7)
    assert config.learning_rate == TrainConfig().learning_rate  # not that of the packaged toy
    assert train_module.main(["--config", str(tiny)]) == 0
    assert (seen[1][0].model, seen[1][0].learning_rate) == ("tiny", 4e-4)


COMMANDS = {
    "train": [],
    "evaluate": [],
    "compare": [],
    "doctor": [],
    "export": ["RUN", "--out", "DIR"],
    "plan": [],
    "data": ["check", "FILE"],
    "video": ["check", "FILE"],
    "oracle": ["list"],
    "report.html": ["RUN"],
    "adapters.parity": [],
}


def test_the_commands_are_these():
    root = Path(train_module.__file__).parent
    found = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__main__")
        for path in root.rglob("*.py")
        if 'if __name__ == "__main__":' in path.read_text()
    }
    assert found - {"video.worker"} == set(COMMANDS)  # a child process that people do not start


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_an_argument_that_it_does_not_know(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command, *COMMANDS[command], "--no_such_option"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"rlaif_fast.{command}", run_name="__main__")
    assert end.value.code == 2
    assert "no_such_option" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"doctor", "adapters.parity"}))
def test_a_flag_that_an_error_names_is_one_that_the_command_takes(command, monkeypatch, capsys):
    """`--debug true` was refused by six of them."""
    seen = []

    def run_command(command, *, debug=False, flag=""):
        seen.append((debug, flag))
        return 0

    monkeypatch.setattr(cli, "run_command", run_command)
    words = {"compare": ["RUN"]}.get(command, COMMANDS[command])
    for flag in ("", "given"):
        given = seen[0][1].split() if flag else []
        rest = words[1:] if given[1:] == words[:1] else words  # it stands in front of what is to be done
        monkeypatch.setattr(sys, "argv", [command, *given, *rest])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(f"rlaif_fast.{command}", run_name="__main__")
        assert end.value.code == 0, capsys.readouterr().err
    assert [debug for debug, _ in seen] == [False, bool(seen[0][1])]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("compare", ["RUN", "--categ"]),
        ("doctor", ["--mod", "PATH"]),
        ("export", ["RUN", "--out", "DIR", "--mer"]),
        ("data", ["check", "FILE", "--skip"]),
        ("video", ["probe", "FILE", "--js"]),
        ("oracle", ["rank", "FILE", "--out", "OTHER"]),
    ],
)
def test_no_command_takes_an_abbreviated_flag(command, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command, *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"rlaif_fast.{command}", run_name="__main__")
    assert end.value.code == 2
    assert "unrecognized arguments: --" in capsys.readouterr().err


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_closes_the_pipe_is_no_error(unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "rlaif_fast.oracle", "list"],
            stdout=output,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            timeout=100,
        )
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("words", [["oracle", "list"], ["train", "--print-config"]])
def test_closed_outputs_are_no_error(words):
    """As a daemon has them."""
    command = shlex.join([sys.executable, "-m", f"rlaif_fast.{words[0]}", *words[1:]])
    for closed in (">&-", ">&- 2>&-"):
        done = subprocess.run(f"{command} {closed}", shell=True, check=False, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, b"")


def test_a_pipe_that_breaks_elsewhere_is_an_error(capfd):
    def command():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    assert cli.run_command(command) == 1
    assert capfd.readouterr().err == "error: Broken pipe\n"


def test_an_unexpected_error_names_the_flag_where_there_is_one(capsys):
    def command():
        raise KeyError("gone")

    assert cli.run_command(command) == 1 and cli.run_command(command, flag="--debug") == 1
    first, second = capsys.readouterr().err.splitlines()
    assert (first, second) == (
        "error: KeyError: 'gone'",
        "error: KeyError: 'gone' (run with --debug for the traceback)",
    )


@pytest.mark.parametrize("adapters", [False, True])
def test_a_checkpoint_of_a_tiny_run_starts_from_the_tiny_defaults(tmp_path, monkeypatch, capsys, adapters):
    """It started from those of a model of billions: frames of 128 times as many pixels, a rate 400 times smaller."""
    checkpoint = make_tiny(tmp_path / "tiny", ["red"])
    if adapters:
        (tmp_path / "lora").mkdir()
        settings = {"base_model_name_or_path": str(checkpoint)}
        (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
        checkpoint = tmp_path / "lora"
    seen = []
    monkeypatch.setattr(train_module, "train", lambda config, given: seen.append(config))
    assert train_module.main(["--model", str(checkpoint), "--warmup_steps", "7"]) == 0
    [config] = seen
    assert (config.model, config.max_pixels, config.learning_rate) == (str(checkpoint), 1024, 4e-4)
    assert config.warmup_steps == 7
    assert "is a tiny policy, so what is not set is that of configs/tiny.yaml" in capsys.readouterr().err
    evaluated = configuration(EvaluateConfig(model=str(checkpoint), data="test.jsonl"))
    assert (evaluated.model, evaluated.max_pixels, evaluated.fps) == (str(checkpoint), 1024, 3.0)


def test_another_small_model_is_not_taken_for_the_tiny_one(tmp_path):
    checkpoint = make_tiny(tmp_path / "small", ["red"], size=TinySize(hidden_size=64))
    told: list[str] = []
    assert defaults_of(str(checkpoint), told.append) is None
    (checkpoint / "config.json").write_text("{")
    assert defaults_of(str(checkpoint), told.append) is None and not told


def test_a_plan_of_the_tiny_policy_has_the_tiny_defaults(capsys):
    """Training took those, and the plan foretold a step with frames of 128 times as many pixels."""
    with pytest.raises(SystemExit):
        plan_module.main(["--print-config", "--model", "tiny"])
    assert "\nmax_pixels: 1024\n" in capsys.readouterr().out


def test_the_help_of_a_plan_shows_that_a_file_may_come_first(capsys):
    with pytest.raises(SystemExit):
        plan_module.main(["--help"])
    assert capsys.readouterr().out.startswith("usage: rlaif_fast.plan [CONFIG] [--config")
