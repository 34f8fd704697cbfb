"""A run's metrics in experiment trackers: Trackio, Weights & Biases, SwanLab, MLflow.

Each uses its own library, which is optional and configured as its documentation says (keys, projects, offline modes:
by its environment variables). Metrics have TRL's names if TRL has them. A resumed run continues in its tracker. Steps
after the checkpoint are made and sent again, since nothing in the run's folder says what a tracker already has.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol

from rlaif_fast.errors import UsageError, typed_line
from rlaif_fast.runs.folder import RunDir

PROJECT = "rlaif_fast"
UNKNOWN_TO_MLFLOW = re.compile(r"[^\w\-. /]")

# Ours -> TRL's (`GRPOTrainer`), for those that mean the same.
TRL_NAMES = {
    "completion_length": "completions/mean_length",
    "truncated": "completions/clipped_ratio",
    "no_signal": "frac_reward_zero_std",
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
}


class Tracker(Protocol):
    """Takes the metrics of one run."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record the metrics of a step; steps never decrease."""
        ...

    def finish(self, error: str | None) -> None:
        """The run is over, or was ended by an error or a signal."""
        ...


@dataclass(frozen=True)
class _Calls:
    """A tracker made of two functions of its library."""

    send: Callable[..., Any]
    end: Callable[[str | None], Any]

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.send(dict(values), step=step)

    def finish(self, error: str | None) -> None:
        self.end(error)


def _trackio(module: Any, run_dir: RunDir, config: dict[str, Any]) -> Tracker:
    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    # Trackio resumes by name alone, and runs in other folders may have the same name.
    name = f"{_name(run_dir)}-{_identity(run_dir)[:8]}"
    module.init(project=project, name=name, config=config, resume="allow")
    return _Calls(module.log, lambda error: module.finish())


def _wandb(module: Any, run_dir: RunDir, config: dict[str, Any]) -> Tracker:
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    _begin(module, run_dir, project=project, dir=str(run_dir.path), config=config)
    return _Calls(module.log, lambda error: module.finish(exit_code=0 if error is None else 1))


def _swanlab(module: Any, run_dir: RunDir, config: dict[str, Any]) -> Tracker:
    project, folder = os.environ.get("SWANLAB_PROJECT", PROJECT), str(run_dir.path / "swanlab")
    _begin(module, run_dir, project=project, log_dir=folder, config=config)

    def end(error: str | None) -> None:
        module.finish(**({} if error is None else {"state": "crashed", "error": error}))

    return _Calls(module.log, end)


def _begin(module: Any, run_dir: RunDir, **options: Any) -> None:
    """Begin in a library whose runs have ids, which a resumed run uses to continue."""
    module.init(name=_name(run_dir), id=_identity(run_dir), resume="allow", **options)


def _mlflow(module: Any, run_dir: RunDir, config: dict[str, Any]) -> Tracker:
    module.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
    identity = _identity(run_dir)
    found = module.search_runs(filter_string=f"tags.rlaif_fast = '{identity}'", output_format="list")
    earlier = found[0].info.run_id if found else None
    module.start_run(run_id=earlier, run_name=_name(run_dir), tags={"rlaif_fast": identity})
    if earlier is None:
        module.log_params({key: str(value)[:500] for key, value in config.items()})

    def send(values: Mapping[str, float], step: int) -> None:
        # MLflow refuses names with other characters, which a category may have.
        module.log_metrics({UNKNOWN_TO_MLFLOW.sub("_", name): x for name, x in values.items()}, step=step)

    return _Calls(send, lambda error: module.end_run("FINISHED" if error is None else "FAILED"))


MAKERS: dict[str, Callable[[Any, RunDir, dict[str, Any]], Tracker]] = {
    "trackio": _trackio,
    "wandb": _wandb,
    "swanlab": _swanlab,
    "mlflow": _mlflow,
}


def _make(name: str, run_dir: RunDir, config: dict[str, Any]) -> Tracker:
    return MAKERS[name](importlib.import_module(name), run_dir, config)


def check_trackers(names: list[str]) -> None:
    """Refuse trackers that are unknown or not installed.

    Raises:
        UsageError: One of them is.
    """
    for name in names:
        if name not in MAKERS:
            raise UsageError(f"report_to: expected names among {', '.join(MAKERS)}, got {name!r}")
        if find_spec(name) is None:
            raise UsageError(f"report_to: {name} is not installed; pip install {name}, or leave it out")


class Trackers:
    """All trackers of a run. One that fails is reported once and then left out; it never ends the run.

    Args:
        names: Keys of `MAKERS`.
        run_dir: The run; its folder's name is the run's name.
        config: Its configuration.
        tell: Prints a line.
    """

    def __init__(
        self, names: list[str], run_dir: RunDir, config: Mapping[str, Any], tell: Callable[[str], None]
    ) -> None:
        self._tell = tell
        self._live: dict[str, Tracker] = {}
        self._before = 0  # steps of the stages before this one
        self._last: tuple[str, int] = ("", 0)
        for name in names:
            made = self._guarded(name, partial(_make, name, run_dir, dict(config)))
            if made is not None:
                self._live[name] = made

    def replay(self, record: Mapping[str, Any]) -> None:
        """Take note of a record from before a resume, which the trackers already have."""
        self._step_of(record)

    def log(self, record: Mapping[str, Any]) -> None:
        """Pass a record of `metrics.jsonl` to every tracker."""
        values, step = metrics_of(record), self._step_of(record)
        for name, tracker in list(self._live.items()):
            self._guarded(name, partial(tracker.log, values, step))

    def finish(self, error: str | None = None) -> None:
        """The run is over, or was ended by an error or a signal."""
        for name, tracker in list(self._live.items()):
            self._guarded(name, partial(tracker.finish, error))

    def _step_of(self, record: Mapping[str, Any]) -> int:
        """One step count for all stages, since trackers need steps that never decrease."""
        stage = record.get("phase", record["stage"]) if record["stage"] == "eval" else record["stage"]
        known, last = self._last
        if stage in ("sft", "rl") and stage != known:
            self._before, last = self._before + last, 0
            self._last = stage, 0
        if stage in ("sft", "rl"):
            self._last = stage, max(last, record["step"])
        return self._before + self._last[1]

    def _guarded(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # other people's library, often over a network
            self._live.pop(name, None)
            self._tell(f"{name}: no longer reported to ({typed_line(error)})")
            return None


def metrics_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record under the trackers' names: TRL's for RL, else prefixed with `eval_` or `sft/`."""
    stage = record["stage"]
    place = (
        f"eval_{record.get('split', 'validation')}_" if stage == "eval" else "sft/" if stage == "sft" else ""
    )
    values = {
        f"{place}{TRL_NAMES.get(key, key) if stage == 'rl' else key}": float(value)
        for key, value in record.items()
        if key not in ("time", "step") and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    for category, row in record.get("by_category", {}).items():
        values[f"{place}accuracy/{category}"] = float(row["accuracy"])
    return values


def _name(run_dir: RunDir) -> str:
    return run_dir.path.resolve().name


def _identity(run_dir: RunDir) -> str:
    """The same for a run and its resumed self, but different for a new run in the same folder."""
    return hashlib.sha256(f"{run_dir.path.resolve()} {run_dir.created}".encode()).hexdigest()[:16]
