"""`python -m rlaif_fast.train`: supervised fine-tuning, reinforcement learning from an oracle's rankings, evaluation.

Without arguments it runs the whole method on a small policy and generated clips; `--model PATH --data PATH` is the
real job.
"""

from __future__ import annotations

import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # spinning threads on a shared core slow small operators several times

import contextlib
import dataclasses
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlaif_fast.cli import flag_is_true, given_values, packaged_config, parse_config, run_command
from rlaif_fast.errors import UsageError
from rlaif_fast.machine import cores, keep_freed_memory, peak_rss_bytes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(argv), debug=flag_is_true(argv, "debug"))


def _run(argv: list[str]) -> int:
    from rlaif_fast.trainer.options import TINY_FAMILIES, TrainConfig

    texts = {"prog": "rlaif_fast.train", "description": __doc__ or ""}
    given = given_values(
        TrainConfig, [word for word in argv if not word.startswith("--print-config")], **texts
    )
    if "resume" not in given and given.get("model", "tiny") in TINY_FAMILIES:
        argv = ["--config", str(packaged_config("tiny.yaml")), *argv]
    train(parse_config(TrainConfig, argv, **texts), given)
    return 0


def train(config, given: Mapping[str, Any] | None = None) -> Path:
    """Train as configured and return the run's folder.

    Args:
        config: What to do; with `resume`, the configuration of that run is taken in its place.
        given: The keys that a resuming command sets (see `resumed_config`).

    Raises:
        UsageError: The configuration, the data or the output folder is wrong.
        RlaifFastError: The run failed; its last checkpoint can be resumed.
    """
    from rlaif_fast.policy.loading import resolve_device
    from rlaif_fast.trainer import setup
    from rlaif_fast.trainer.resume import resumed_config
    from rlaif_fast.trainer.run_dir import RunDir
    from rlaif_fast.trainer.world import launch, rank_under_torchrun

    if config.resume is not None:
        run_dir = RunDir.open(config.resume)
        config = resumed_config(run_dir, given or {})
        if run_dir.finished:
            raise UsageError(f"resume: {run_dir.path} is finished; nothing is left to do")
    else:
        config = setup.resolved(config)
    with contextlib.ExitStack() as held:
        # The other processes start behind rank 0's, when the folder is as they are to find it.
        if not rank_under_torchrun():
            setup.preflight(config)
            if config.resume is None:
                run_dir = RunDir.create(config.output_dir, overwrite=config.overwrite_output_dir)
            held.enter_context(run_dir.lock())
            prepare(run_dir, config)
        launch(train_in, config, config.num_processes, resolve_device(config.device))
    return Path(config.output_dir)


def prepare(run_dir, config) -> None:
    """Bring a run's folder to the state that its processes start from."""
    from rlaif_fast.trainer.checkpoint import CheckpointStore
    from rlaif_fast.trainer.run_dir import write_atomically

    if config.resume is not None:
        state = CheckpointStore(run_dir.checkpoints, {}).last_state()
        run_dir.truncate_after(*((state["stage"], state["step"]) if state else ("sft", 0)))
    write_atomically(run_dir.config, dump_config(dataclasses.replace(config, resume=None)))


def train_in(world, config) -> None:
    """One process's part of a run whose folder is prepared.

    Args:
        world: The processes of the run.
        config: The resolved configuration; `output_dir` is the prepared folder.
    """
    import torch

    from rlaif_fast.policy.loading import load_model
    from rlaif_fast.rollout import make_sampler
    from rlaif_fast.trainer import setup
    from rlaif_fast.trainer.checkpoint import CheckpointStore, load_weights, read_processor_files
    from rlaif_fast.trainer.logging import RunLogger, SilentLogger
    from rlaif_fast.trainer.rl import train_rl
    from rlaif_fast.trainer.run import Run
    from rlaif_fast.trainer.run_dir import RunDir
    from rlaif_fast.trainer.sft import train_sft

    keep_freed_memory()
    run_dir = RunDir(config.output_dir)
    world.check_shared(run_dir.path)
    setup.set_threads(config.threads, world.local_size)
    setup.seed_everything(config.seed)
    found = CheckpointStore(run_dir.checkpoints, {}, read_only=True)
    index, state = found.index, found.last_state()
    make_logger: contextlib.AbstractContextManager = SilentLogger()
    if world.is_main:
        make_logger = RunLogger(
            run_dir,
            tensorboard=config.tensorboard,
            log_every=config.logging_steps,
            seconds=state["seconds"] if state else None,
        )
    data_notes: list[str] = []
    with contextlib.ExitStack() as open_parts, make_logger as logger:
        with world.main_first():
            with logger.timer("data"):
                data = load_with_progress(config, logger, data_notes.append)
            with logger.timer("model"):
                options = setup.resolved_model(config, data)
        with logger.timer("model"):
            loaded = load_model(options)
            policy = setup.make_policy(loaded, options)
            world.broadcast([p.data for p in policy.model.parameters()])
            torch.manual_seed(config.seed + world.rank)  # dropout differs between processes, weights do not
        notes = (*loaded.notes, *data_notes, *uneven_steps(config, world.size))
        for note in notes:
            logger.message(note)
        make_batch = open_parts.enter_context(
            setup.make_batch_maker(loaded, config, quarantine=run_dir.path / "quarantine.jsonl")
        )
        run = Run(
            config=config,
            policy=policy,
            sampler=make_sampler(policy, config.sampler),
            make_batch=make_batch,
            oracle=setup.make_oracle(config),
            data=data,
            logger=logger,
            store=CheckpointStore(
                run_dir.checkpoints, read_processor_files(options.model), read_only=not world.is_main
            ),
            world=world,
        )
        describe(run)

        if index.sft is None:
            run_sft_stage(run, config, state, train_sft)
            sft_predictions = run.evaluate(data.test, phase="sft", split="test", step=config.sft_steps)
            write_predictions(run_dir, "sft", sft_predictions, run)
            write_samples(run_dir, "sft", run)
            stage_state = {"stage": "sft", "step": config.sft_steps, "seconds": logger.seconds()}
            with logger.timer("checkpoint"):
                run.store.save("sft", policy.model, policy.tokenizer, stage_state, last=True, sft=True)
            world.barrier()
            state = None
        else:
            load_weights(policy.model, run.store.path("sft"))
        if config.beta > 0:
            policy.freeze_reference()
        in_rl = state is not None and state["stage"] == "rl"
        if in_rl:
            load_weights(policy.model, run.store.path("last"))
        reached = train_rl(run, resume_from=run.store.path("last") if in_rl else None).step

        world.barrier()
        load_weights(policy.model, run.store.path("best"))
        final = run.evaluate(data.test, phase="final", split="test", step=reached)
        write_predictions(run_dir, "final", final, run)
        write_samples(run_dir, "final", run)
        (others,) = world.sum(0 if world.is_main else peak_rss_bytes())
        if world.is_main:
            finish(run, run_dir, notes, int(others))


def run_sft_stage(run, config, state, train_sft) -> None:
    """Bring the policy to where RL starts: by training, from a checkpoint, or as it is."""
    from rlaif_fast.trainer.checkpoint import load_weights

    if config.sft == "none":
        return
    if config.sft != "auto":
        folder = Path(config.sft).expanduser()
        if not folder.is_dir():
            raise UsageError(f"sft: expected auto, none or a checkpoint folder, got {config.sft!r}")
        try:
            load_weights(run.policy.model, folder)
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"sft: {folder} does not fit the model {config.model!r}: {reason}") from error
        return
    if state is not None:
        load_weights(run.policy.model, run.store.path("last"))
    train_sft(run, resume_from=run.store.path("last") if state is not None else None)


def finish(run, run_dir, notes: Sequence[str], others_rss_bytes: int) -> None:
    """Write the report, then the summary: its presence means that the run finished.

    Args:
        run: The run.
        run_dir: Its folder.
        notes: What a reader has to know.
        others_rss_bytes: The most memory that the other processes of the run have held.
    """
    from rlaif_fast.trainer.report import write_report

    config, logger = run.config, run.logger
    summary = {
        **accuracy_summary(run_dir),
        "seconds": logger.elapsed(),
        "processes": run.world.size,
        "peak_rss_bytes": peak_rss_bytes() + others_rss_bytes,
        "seed": config.seed,
        "config": dataclasses.asdict(config),
        "git_commit": git_commit(),
        "seconds_by_stage": logger.seconds(),
        "versions": versions(),
        "machine": machine(),
        "notes": [*notes, *notes_on_data(run)],
    }
    if config.report:
        with logger.timer("report"):
            path = write_report(run_dir, summary=summary)
        logger.message(f"report: {path}")
    summary["seconds"] = logger.elapsed()
    summary["seconds_by_stage"] = logger.seconds()
    summary["peak_rss_bytes"] = peak_rss_bytes() + others_rss_bytes
    run_dir.write_summary(summary)
    print_result(summary, logger)


def accuracy_summary(run_dir) -> dict:
    """Accuracy on the test split before and after RL, in all and by category, from the predictions on disk."""
    from rlaif_fast.trainer.run_dir import read_jsonl

    tallies: dict[str, dict[str, list[bool]]] = {}
    overall = {}
    for phase in ("sft", "final"):
        rows = list(read_jsonl(run_dir.predictions(phase)))
        overall[phase] = sum(row["correct"] for row in rows) / max(len(rows), 1)
        for row in rows:
            tallies.setdefault(row["category"], {"sft": [], "final": []})[phase].append(row["correct"])
    by_category = {
        name: {
            "sft": sum(tally["sft"]) / max(len(tally["sft"]), 1),
            "final": sum(tally["final"]) / max(len(tally["final"]), 1),
            "n": len(tally["final"]),
        }
        for name, tally in sorted(tallies.items())
    }
    return {"sft_accuracy": overall["sft"], "final_accuracy": overall["final"], "by_category": by_category}


def write_predictions(run_dir, phase: str, result, run) -> None:
    """predictions-PHASE.jsonl: every test row with its greedy answer and the accuracy of blind guessing."""
    from rlaif_fast.data import chance_by_category
    from rlaif_fast.trainer.run_dir import write_jsonl

    if not run.world.is_main:
        return
    chance = chance_by_category(run.data.test, reference=run.data.rl)
    write_jsonl(
        run_dir.predictions(phase),
        (
            {
                "example_id": prediction.example.id,
                "category": prediction.example.category,
                "video": next(iter((*prediction.example.videos, *prediction.example.images)), None),
                "prediction": prediction.text,
                "answer": prediction.example.answer,
                "correct": bool(prediction.correct),
                "chance": chance[prediction.example.category],
            }
            for prediction in result.predictions
        ),
    )


def write_samples(run_dir, phase: str, run) -> None:
    """samples.jsonl: what the policy samples for a few test clips, with the oracle's ranks, for the gallery."""
    import torch

    from rlaif_fast.rollout.base import SamplingParams
    from rlaif_fast.trainer.batches import by_media
    from rlaif_fast.trainer.groups import rank_rollout, rollout_records
    from rlaif_fast.trainer.run_dir import json_line

    if not run.world.is_main:
        return
    config = run.config
    clips = by_media(run.data.test)[: config.gallery_clips]
    rows = [clip[i % len(clip)] for i, clip in enumerate(clips)]
    if not rows:
        return
    with run.logger.timer("gallery"), torch.no_grad():
        batch = run.make_batch(rows)
        params = SamplingParams(
            max_new_tokens=config.max_completion_length, temperature=config.temperature, seed=config.seed
        )
        ranked = rank_rollout(
            batch, run.sampler.sample(batch.prompts, config.num_generations, params), run.oracle, config
        )
        greedy = run.sampler.sample(batch.prompts, 1, dataclasses.replace(params, temperature=0.0)).texts
    with run_dir.samples.open("a", encoding="utf-8") as lines:
        for record, text in zip(rollout_records(ranked, 0), greedy):
            lines.write(json_line({"phase": phase, **record, "greedy": text}))


def load_with_progress(config, logger, note: Callable[[str], None]):
    """Load the data, with a bar while synthetic clips are made; `note` takes what a reader has to know."""
    from rlaif_fast.trainer import setup

    total = (
        config.synthetic_sft_clips
        + config.synthetic_rl_clips
        + config.synthetic_validation_clips
        + config.synthetic_test_clips
    )
    if config.data != "synthetic":
        return setup.load_data(config, note=note)
    with logger.stage("clips", total=total) as update:
        return setup.load_data(config, workers=cores(), progress=lambda done, _: update(done), note=note)


def describe(run) -> None:
    """Say in a few lines what is about to run."""
    parameters = sum(p.numel() for p in run.policy.model.parameters())
    trained = sum(p.numel() for p in run.policy.model.parameters() if p.requires_grad)
    data, config = run.data, run.config
    run.logger.message(
        f"policy: {config.model}, {parameters / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained; "
        f"oracle: {run.oracle.name}"
    )
    run.logger.message(
        f"rows: {len(data.sft)} sft, {len(data.rl)} rl, {len(data.validation)} validation, {len(data.test)} test"
    )


def uneven_steps(config, processes: int) -> list[str]:
    """What to know where the videos of a step cannot be divided evenly among the processes."""
    keys = ["videos_per_step"] if config.sft != "auto" else ["sft_videos_per_step", "videos_per_step"]
    notes = []
    for key in keys:
        videos = getattr(config, key)
        if videos < processes:
            notes.append(
                f"{key}: {videos} is fewer than the {processes} processes, so {processes - videos} of them have "
                f"nothing to do in a step; use a multiple of {processes}"
            )
        elif videos % processes:
            notes.append(
                f"{key}: {videos} is not a multiple of the {processes} processes, so some of them wait for the "
                "others in every step"
            )
    return notes


def notes_on_data(run) -> list[str]:
    """What a reader of the report has to know about the data."""
    corrupted = sum(bool(row.metadata.get("corrupted")) for row in run.data.sft)
    notes = []
    if run.config.data == "synthetic":
        notes.append(
            "The clips are generated: shapes that move over textured backgrounds; the policy is tiny."
        )
    if corrupted:
        notes.append(
            f"{corrupted} of {len(run.data.sft)} supervised answers have one fact wrong on purpose, as a weak "
            "annotator's would; the oracle ranks against the right answers, so most of what RL gains here is "
            "the undoing of that noise, not new perception."
        )
    if run.config.oracle_shuffle:
        notes.append("Control: the oracle's rankings were shuffled.")
    return notes


def print_result(summary: dict, logger) -> None:
    """The figures of the run, by category."""
    width = max(map(len, [*summary["by_category"], "all"]))
    logger.message(f"{'held-out accuracy':<{width}}  {'SFT':>6}  {'RL':>6}  {'n':>5}")
    for name, row in summary["by_category"].items():
        logger.message(f"{name:<{width}}  {row['sft']:6.3f}  {row['final']:6.3f}  {row['n']:5d}")
    total = sum(row["n"] for row in summary["by_category"].values())
    logger.message(
        f"{'all':<{width}}  {summary['sft_accuracy']:6.3f}  {summary['final_accuracy']:6.3f}  {total:5d}"
    )
    logger.message(f"{summary['seconds']:.0f} s, peak memory {summary['peak_rss_bytes'] / 2**30:.2f} GiB")


def dump_config(config) -> str:
    """The configuration as YAML."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def git_commit() -> str | None:
    """Commit of the source tree, with "+" where it has changes; None outside a checkout."""
    git = shutil.which("git")
    if git is None:
        return None
    root = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            [git, "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        status = subprocess.run(
            [git, "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "")


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("rlaif-fast", "torch", "transformers", "triton", "av", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """CPU count and GPU, in words."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{platform.machine()}, {cores()} cores, {gpu}"


if __name__ == "__main__":
    sys.exit(main())
