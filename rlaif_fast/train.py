"""`python -m rlaif_fast.train`: supervised fine-tuning, reinforcement learning from an oracle's rankings, evaluation.

Without arguments it runs the whole method on a small policy and generated clips; `--model PATH --data PATH` is the
real job.
"""

from __future__ import annotations

import os

# Spinning threads on a shared core make small operators several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif_fast.cli import flag_is_true, given_values, parse_config, run_command, tell
from rlaif_fast.errors import UsageError, first_line
from rlaif_fast.machine import keep_freed_memory, peak_rss_bytes
from rlaif_fast.yaml_keys import dump

if TYPE_CHECKING:
    from rlaif_fast.distributed.world import World
    from rlaif_fast.runs.folder import RunDir
    from rlaif_fast.trainer.options import TrainConfig
    from rlaif_fast.trainer.run import Run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(argv), debug=flag_is_true(argv, "debug"), flag="--debug true")


def _run(argv: list[str]) -> int:
    from rlaif_fast.trainer.cached_model import defaults_of
    from rlaif_fast.trainer.options import TrainConfig
    from rlaif_fast.trainer.unread import tell_unread

    texts: dict[str, Any] = {"prog": "rlaif_fast.train", "description": __doc__ or ""}
    words = [word for word in argv if not word.startswith("--print-config")]
    given = given_values(TrainConfig, words, **texts)
    under = None
    if "resume" not in given:
        under = defaults_of(given.get("model", TrainConfig.model), tell)
    config = parse_config(TrainConfig, argv, **texts, under=under)
    if config.resume is None:
        flags = given_values(TrainConfig, words, **texts, flags_alone=True)
        for line in tell_unread(config, flags, given.keys() - flags.keys()):
            tell(line)
    train(config, given)
    return 0


def train(config: TrainConfig, given: Mapping[str, Any] | None = None) -> Path:
    """Train as configured and return the run's folder.

    Args:
        config: What to do; with `resume`, that run's configuration replaces it.
        given: The keys that a resuming command sets (see `resumed_config`).

    Raises:
        UsageError: The configuration, the data or the output folder is wrong.
        RlaifFastError: The run failed; its last checkpoint can be resumed.
    """
    from rlaif_fast.distributed.launch import RankZeroFirst, launch
    from rlaif_fast.policy.loading import resolve_device
    from rlaif_fast.runs.folder import RunDir
    from rlaif_fast.trainer.preflight import preflight
    from rlaif_fast.trainer.resolved import resolved
    from rlaif_fast.trainer.resume import resumed_config

    first = RankZeroFirst()
    with contextlib.ExitStack() as held:
        # The other processes start (under torchrun: continue) once the folder is ready.
        with first.turn():
            if config.resume is not None:
                run_dir = RunDir.open(config.resume)
                if run_dir.finished and "max_steps" not in (given or {}):
                    resumed_config(run_dir, given or {})  # first refuse changes that the command may not make
                if first.rank == 0:
                    held.enter_context(recovered(run_dir, extends="max_steps" in (given or {})))
                config = resumed_config(run_dir, given or {})
            else:
                config = resolved(config)
            if first.rank == 0:
                preflight(config)
                if config.resume is None:
                    run_dir = RunDir.create(config.output_dir, overwrite=config.overwrite_output_dir)
                    held.enter_context(run_dir.lock())
                write_config(run_dir, dump_config(dataclasses.replace(config, resume=None)))
        try:
            launch(train_in, config, config.num_processes, resolve_device(config.device))
        except BaseException:
            if first.rank == 0 and config.resume is None and run_dir.restore():
                print(f"the earlier run in {run_dir.path} is kept: this one did not begin", file=sys.stderr)
            raise
    return Path(config.output_dir)


@contextlib.contextmanager
def recovered(run_dir: RunDir, *, extends: bool) -> Iterator[None]:
    """Hold a run that is checked and cut back to its last whole checkpoint; each damage is reported in one line.

    If the block is refused before the run has continued, its configuration and a finished run's results are restored.

    Raises:
        UsageError: The run is finished and the command does not extend it; or it is still in progress.
        RlaifFastError: No whole checkpoint is left.
    """
    from rlaif_fast.runs.checkpoint import CheckpointStore
    from rlaif_fast.runs.recovery import recover

    def last() -> str | None:
        return CheckpointStore(run_dir.checkpoints, {}, read_only=True).index.last

    if run_dir.finished and not extends:
        raise UsageError(
            f"resume: {run_dir.path} is finished; nothing is left to do, unless --max_steps asks for more"
        )
    dropped: dict[Path, tuple[int, bytes]] = {}
    with run_dir.lock():
        for line in recover(run_dir, dropped):
            print(line, file=sys.stderr)
        text, begins_at = run_dir.config.read_text(encoding="utf-8"), last()
        try:
            yield
        except BaseException as error:
            untouched = run_dir.read_config() == text
            if last() == begins_at and (untouched or isinstance(error, UsageError)):
                if not untouched:
                    write_config(run_dir, text)
                run_dir.put_back(dropped)
            raise


def write_config(run_dir: RunDir, text: str) -> None:
    """Make a text the run's configuration, and record its digest."""
    from rlaif_fast.outputs import write_atomically
    from rlaif_fast.runs.checkpoint import CheckpointStore

    write_atomically(run_dir.config, text)
    CheckpointStore(run_dir.checkpoints, {}).note_config(text)


def train_in(world: World, config: TrainConfig) -> None:
    """One process's part of a run whose folder is prepared.

    Args:
        world: The processes of the run.
        config: The resolved configuration; `output_dir` is the prepared folder.
    """
    from rlaif_fast.distributed.launch import under_torchrun
    from rlaif_fast.report.outcome import describe, finish, write_predictions, write_samples
    from rlaif_fast.runs.checkpoint import CheckpointStore, load_weights
    from rlaif_fast.runs.folder import RunDir
    from rlaif_fast.runs.logging import PackageLog, RunLogger, SilentLogger
    from rlaif_fast.termination import ECHO_SECONDS, Termination
    from rlaif_fast.trainer.rl import train_rl
    from rlaif_fast.trainer.seeds import seed_everything
    from rlaif_fast.trainer.setup import build_run, set_threads

    keep_freed_memory()
    run_dir = RunDir(config.output_dir)
    world.check_shared(run_dir.path)
    set_threads(config.threads, world.local_size)
    seed_everything(config.seed)
    found = CheckpointStore(run_dir.checkpoints, {}, read_only=True)
    index, state = found.index, found.last_state()
    make_logger: contextlib.AbstractContextManager = SilentLogger()
    if world.is_main:
        make_logger = RunLogger(
            run_dir,
            tensorboard=config.tensorboard,
            log_every=config.logging_steps,
            seconds=state["seconds"] if state else None,
            report_to=config.report_to,
            config=dataclasses.asdict(config),
        )
    with contextlib.ExitStack() as open_parts, make_logger as logger:
        if world.is_main:
            open_parts.enter_context(PackageLog(logger.message))
        # Schedulers and torchrun send SIGTERM to every process, and each has to finish the step.
        termination = open_parts.enter_context(
            Termination(
                config.grace_seconds,
                announce=world.is_main,
                echo_seconds=ECHO_SECONDS if under_torchrun() else 0.0,
            ).installed()
        )
        run, notes = build_run(world, config, run_dir, logger, open_parts, termination)
        run.peak_before = state.get("peak_rss_bytes", 0) if state else 0
        policy, data = run.policy, run.data
        describe(run)

        sft_steps = config.sft_steps if config.sft == "auto" else 0
        if index.sft is None:
            run_sft_stage(run, state)
            state = {"stage": "sft", "step": sft_steps, "test_due": True} | run.usage()
            with logger.timer("checkpoint"):
                run.store.save("sft", policy.model, policy.tokenizer, state, last=True, sft=True)
                run.wait_until_saved()
        else:
            load_weights(policy.model, run.store.path("sft"))
        if state is not None and state.get("test_due"):
            sft_predictions = run.evaluate(data.test, phase="sft", split="test", step=sft_steps)
            write_predictions(run_dir, "sft", sft_predictions, run)
            world.together(lambda: write_samples(run_dir, "sft", run))
        if "reference" in run.algorithm.extra_models:
            policy.freeze_reference(copy=run.algorithm.samples_from == "start")
        in_rl = state is not None and state["stage"] == "rl"
        if in_rl:
            load_weights(policy.model, run.store.path("last"))
        reached = train_rl(run, resume_from=run.store.path("last") if in_rl else None).step

        run.wait_until_saved()
        load_weights(policy.model, run.store.checked("best"))
        final = run.evaluate(
            data.test, phase="final", split="test", step=reached, opponents=opponents_of(run, run_dir)
        )
        write_predictions(run_dir, "final", final, run)
        world.together(lambda: write_samples(run_dir, "final", run))
        (others,) = world.sum(0 if world.is_main else peak_rss_bytes())
        if world.is_main:
            finish(run, run_dir, notes, int(others))


def opponents_of(run: Run, run_dir: RunDir) -> dict[str, str] | None:
    """The test answers at the start of RL, which the final ones are ranked against if the oracle is the metric."""
    from rlaif_fast.runs.files import read_jsonl

    if run.data.metric != "oracle":
        return None
    return {row["example_id"]: row["prediction"] for row in read_jsonl(run_dir.predictions("sft"))}


def run_sft_stage(run: Run, state: dict | None) -> None:
    """Bring the policy to the start of RL: by training, from a checkpoint, or unchanged."""
    from rlaif_fast.runs.checkpoint import load_weights
    from rlaif_fast.trainer.inputs import refuse_other_start
    from rlaif_fast.trainer.sft import train_sft

    config = run.config
    if config.sft == "none":
        return
    if config.sft != "auto":
        folder = Path(config.sft).expanduser()
        if not folder.is_dir():
            raise UsageError(f"sft: expected auto, none or a checkpoint folder, got {config.sft!r}")
        refuse_other_start(run.policy, folder)
        try:
            load_weights(run.policy.model, folder)
        except (OSError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"sft: {folder} does not fit the model {config.model!r}: {first_line(error)}"
            ) from error
        return
    if state is not None:
        load_weights(run.policy.model, run.store.path("last"))
    train_sft(run, resume_from=run.store.path("last") if state is not None else None)


def dump_config(config: TrainConfig) -> str:
    """The configuration as YAML."""
    return dump(dataclasses.asdict(config), sort_keys=False)


if __name__ == "__main__":
    sys.exit(main())
