"""What a comparison runs: one start per seed, and from it every arm under every kind of feedback.

The file (`configs/compare.yaml` is an example):

    output_dir: runs/compare
    common: {...}        keys of `rlaif_fast.train` that all runs share
    start: {...}         keys of only the supervised start
    arms:                name -> keys of that arm
      grpo: {algorithm: grpo}
      grpo_rank: {algorithm: grpo_rank, advantage: directed}
    feedback:            name -> keys of that kind of feedback
      exact: {}
      heavy_tails: {feedback: heavy_tails}
    tables:              name -> what it compares, and the arm that the others are measured against
      main: {seeds: [1, 2, 3], arms: [grpo, grpo_rank], feedback: [exact, heavy_tails], baseline: grpo}
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif_fast.cli import typed_sections
from rlaif_fast.errors import UsageError, nearest
from rlaif_fast.yaml_keys import load, refuse_repeated_keys

if TYPE_CHECKING:
    from rlaif_fast.trainer.options import TrainConfig

# keys that the comparison sets for every run
OWN = ("seed", "output_dir", "sft", "resume", "overwrite_output_dir")


@dataclass(frozen=True)
class Table:
    """One table of the report.

    Attributes:
        name: Its key in the file.
        seeds: Seeds of data, weights and draws.
        arms: Names of arms.
        feedback: Names of kinds of feedback.
        baseline: The arm that the others are measured against.
    """

    name: str
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    feedback: tuple[str, ...]
    baseline: str


@dataclass(frozen=True)
class Job:
    """One training run of the comparison.

    Attributes:
        folder: Its run folder.
        values: Its configuration, keys of `rlaif_fast.train`.
        after: Folder of the run that must finish first; None for a start.
    """

    folder: Path
    values: Mapping[str, Any]
    after: Path | None = None


@dataclass(frozen=True)
class Plan:
    """A comparison as its file describes it (see the module)."""

    output_dir: Path
    common: Mapping[str, Any]
    start: Mapping[str, Any]
    arms: Mapping[str, Mapping[str, Any]]
    feedback: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"exact": {}})
    tables: tuple[Table, ...] = ()

    def unused(self) -> list[str]:
        """Arms and kinds of feedback that no table names, as "arms.NAME" and "feedback.NAME"."""
        named = {f"arms.{arm}" for table in self.tables for arm in table.arms}
        named |= {f"feedback.{kind}" for table in self.tables for kind in table.feedback}
        given = [f"arms.{arm}" for arm in self.arms] + [f"feedback.{kind}" for kind in self.feedback]
        return [name for name in given if name not in named]

    def start_folder(self, seed: int) -> Path:
        """Folder of the supervised start of a seed."""
        return self.output_dir / f"seed-{seed}" / "start"

    def arm_folder(self, seed: int, feedback: str, arm: str) -> Path:
        """Folder of the run of an arm."""
        return self.output_dir / f"seed-{seed}" / feedback / arm

    def jobs(self) -> list[Job]:
        """Every run that the tables need, each once, starts before the runs that follow them."""
        found: dict[Path, Job] = {}
        for table in self.tables:
            for seed in table.seeds:
                start = self.start_folder(seed)
                found.setdefault(start, Job(start, self._values(seed, start, {**self.start, "max_steps": 0})))
                sft = str(start / "checkpoints" / "sft")
                for feedback, arm in itertools.product(table.feedback, table.arms):
                    folder = self.arm_folder(seed, feedback, arm)
                    keys = {**self.feedback[feedback], **self.arms[arm], "sft": sft}
                    found.setdefault(folder, Job(folder, self._values(seed, folder, keys), after=start))
        return list(found.values())

    def _values(self, seed: int, folder: Path, keys: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.common, **keys, "seed": seed, "output_dir": str(folder)}


def read_plan(file: str | Path, output_dir: str | Path | None = None) -> Plan:
    """Read a comparison from its YAML file.

    Args:
        file: The file.
        output_dir: Replaces the one that the file names.

    Raises:
        UsageError: The file cannot be read, or a key, an arm or a kind of feedback is unknown.
    """
    import yaml

    try:
        refuse_repeated_keys(file)
        values = load(Path(file).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"config: cannot read {file}: {' '.join(str(error).split())}") from error
    known = [entry.name for entry in dataclasses.fields(Plan)]
    if not isinstance(values, dict) or not {"arms", "tables"} <= values.keys():
        raise UsageError(
            f"config: {file} needs the sections arms and tables; there can be {', '.join(known)}"
        )
    unknown = sorted(map(str, values.keys() - set(known)))
    if unknown:
        raise UsageError(
            f"config: {file} has unknown sections {', '.join(unknown)}; there can be {', '.join(known)}"
        )
    folder = output_dir or values.get("output_dir")
    if not folder or not isinstance(folder, (str, Path)):
        raise UsageError(f"config: {file} names no output_dir; add one, or --output_dir")
    folder = Path(folder).expanduser()
    if folder.is_file():
        raise UsageError(f"output_dir: {folder} is a file; give a folder")
    values = {**values, "feedback": values.get("feedback") or {"exact": {}}}
    sections = _sections(values)
    plan = Plan(
        output_dir=folder,
        common=sections["common"],
        start=sections["start"],
        arms={name: sections[f"arms.{name}"] for name in values["arms"]},
        feedback={name: sections[f"feedback.{name}"] for name in values["feedback"]},
        tables=tuple(_tables(values["tables"])),
    )
    for table in plan.tables:
        _check_names(table, plan)
    _refuse_unread(plan)
    return plan


def _sections(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The keys of each section and of its entries ("arms.NAME"), with the types that the trainer reads."""
    from rlaif_fast.trainer.options import TrainConfig

    for section in ("arms", "feedback", "tables"):
        if not isinstance(values[section], dict):
            raise UsageError(f"config: {section} must give each entry a name, got {values[section]!r}")
        for name in values[section]:
            _check_name(section, name)
    start = (*OWN, "max_steps")
    found = {
        "common": _keys(values.get("common"), "common", OWN),
        "start": _keys(values.get("start"), "start", start),
        **{f"arms.{name}": _keys(keys, f"arms.{name}", OWN) for name, keys in values["arms"].items()},
        **{f"feedback.{k}": _keys(keys, f"feedback.{k}", start) for k, keys in values["feedback"].items()},
    }
    return typed_sections(TrainConfig, found)


def _check_name(section: str, name: Any) -> None:
    """Refuse a name under which its runs, or its figure, cannot be stored."""
    usable = isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")
    if not usable or (section == "feedback" and name == "start"):
        raise UsageError(
            f"config: {section}: expected names that can be file names (numbers in quotes; no feedback start), got "
            f"{name!r}"
        )


def _refuse_unread(plan: Plan) -> None:
    """Refuse keys of the start, an arm or a kind of feedback that have no effect there.

    The keys that all runs share may include some that only some runs read.
    """
    from rlaif_fast.trainer.unread import unread

    start = unread(_config("start", {**plan.common, **plan.start, "max_steps": 0}))
    for name in plan.start.keys() & start.keys():
        raise UsageError(f"config: start.{name}: not read where {start[name]}; leave it out")
    for table in plan.tables:
        for arm, feedback in itertools.product(table.arms, table.feedback):
            keys = {**plan.feedback[feedback], **plan.arms[arm]}
            sft = str(plan.start_folder(0))
            found = unread(_config(f"arms.{arm}, feedback.{feedback}", {**plan.common, **keys, "sft": sft}))
            for name in keys.keys() & found.keys():
                section = f"arms.{arm}" if name in plan.arms[arm] else f"feedback.{feedback}"
                raise UsageError(f"config: {section}.{name}: not read where {found[name]}; leave it out")


def _config(section: str, values: Mapping[str, Any]) -> TrainConfig:
    """The configuration of a run; an error in its values names the section."""
    from rlaif_fast.trainer.options import TrainConfig

    try:
        return TrainConfig(**values)
    except UsageError as error:
        raise UsageError(f"config: {section}: {error}") from None


def _keys(keys: Any, section: str, reserved: tuple[str, ...]) -> dict[str, Any]:
    """The keys of one section, checked against those of the trainer."""
    from rlaif_fast.trainer.options import TrainConfig

    keys = keys or {}
    if not isinstance(keys, dict):
        raise UsageError(f"config: {section} must hold keys of rlaif_fast.train, got {keys!r}")
    known = {entry.name for entry in dataclasses.fields(TrainConfig)}
    for name in keys:
        if name in reserved:
            raise UsageError(f"config: {section}.{name} is set by the comparison itself; leave it out")
        if name not in known:
            hint = nearest(str(name), known, "; see its --help")
            raise UsageError(f"config: {section}.{name} is no key of rlaif_fast.train{hint}")
    return keys


def _tables(tables: Any) -> Iterator[Table]:
    for name, keys in tables.items():
        wanted = [entry.name for entry in dataclasses.fields(Table) if entry.name != "name"]
        if not isinstance(keys, dict) or sorted(keys) != sorted(wanted):
            raise UsageError(f"config: tables.{name} needs exactly {', '.join(wanted)}, got {keys!r}")
        yield Table(
            name,
            seeds=_entries(keys["seeds"], f"tables.{name}.seeds", int, "integers"),
            arms=_entries(keys["arms"], f"tables.{name}.arms", str, "names"),
            feedback=_entries(keys["feedback"], f"tables.{name}.feedback", str, "names"),
            baseline=str(keys["baseline"]),
        )


def _entries(values: Any, where: str, kind: type, words: str) -> tuple[Any, ...]:
    """The entries of a list, all distinct and of the kind that `words` describes."""
    if not isinstance(values, list) or not values:
        raise UsageError(f"config: {where} must be a list of at least one entry, got {values!r}")
    for place, value in enumerate(values):
        if value in values[:place]:
            raise UsageError(f"config: {where} names {value!r} twice; it would count twice")
        if type(value) is not kind:
            raise UsageError(f"config: {where} must list {words}, got {value!r}")
    return tuple(values)


def _check_names(table: Table, plan: Plan) -> None:
    for kind, names, there in (
        ("arm", (*table.arms, table.baseline), plan.arms),
        ("feedback", table.feedback, plan.feedback),
    ):
        for name in names:
            if name not in there:
                raise UsageError(
                    f"config: tables.{table.name} names the {kind} {name!r}; there are {', '.join(there)}"
                )
    if table.baseline not in table.arms:
        raise UsageError(f"config: tables.{table.name}.baseline {table.baseline!r} is not among its arms")
    for arm, feedback in itertools.product(table.arms, table.feedback):
        both = sorted(plan.arms[arm].keys() & plan.feedback[feedback].keys())
        if both:
            raise UsageError(
                f"config: arms.{arm} and feedback.{feedback}, which tables.{table.name} puts together, both set "
                f"{', '.join(both)}; leave it out of one"
            )
