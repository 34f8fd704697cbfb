"""What is kept of each answer, and the folder from which an evaluation continues."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rlaif_fast.data.schema import Example
from rlaif_fast.errors import RlaifFastError, UsageError, writing
from rlaif_fast.evals.identity import asked_digest
from rlaif_fast.oracle.grading import Grade
from rlaif_fast.outputs import write_atomically
from rlaif_fast.runs.files import json_line, read_jsonl
from rlaif_fast.runs.folder import RunDir


@dataclass(frozen=True)
class Record:
    """One item and its result.

    Attributes:
        id: Id of the item.
        video: What it is about; the bootstrap draws whole videos.
        groups: What it is reported by, its category first.
        question: The question.
        answer: The reference answer.
        prediction: The policy's answer; None if the item could not be asked, which counts as wrong.
        correct: Whether the prediction is right by the rules.
        trouble: Why it could not be asked.
        pred: A judge's yes or no; None if it gave none, or was not asked.
        score: A judge's grade, 0 to 5.
        asked: Digest of everything that was asked (see `asked_digest`).
    """

    id: str
    video: str
    groups: Mapping[str, str]
    question: str
    answer: str | None
    prediction: str | None
    correct: bool
    trouble: str = ""
    pred: bool | None = None
    score: int | None = None
    asked: str = ""


@dataclass
class EvalFolder:
    """The folder of one evaluation: `settings.json`, `items.jsonl`, then the tables.

    Attributes:
        path: Where it is.
        records: Answers so far, by id.
    """

    path: Path
    records: dict[str, Record] = field(default_factory=dict)

    @property
    def items(self) -> Path:
        """The file with one record per line."""
        return self.path / "items.jsonl"

    @classmethod
    def open(cls, path: str | Path, settings: Mapping[str, Any]) -> EvalFolder:
        """Make the folder, or continue in one with the same settings; an item whose line was cut off is answered again.

        A folder without any answer yet accepts other settings.

        Raises:
            UsageError: It holds an evaluation with other settings, or something else.
        """
        folder = cls(Path(path).expanduser())
        file = folder.path / "settings.json"
        text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
        if folder.path.exists() and not folder.path.is_dir():
            raise UsageError(f"output_dir: {folder.path} is a file; give a folder")
        if not file.exists():
            if folder.path.is_dir() and any(folder.path.iterdir()):
                raise UsageError(f"output_dir: {folder.path} is not empty and holds no evaluation")
            folder.path.mkdir(parents=True, exist_ok=True)
            write_atomically(file, text)
            return folder
        if file.read_bytes() != text.encode():
            was, now = _settings(file), json.loads(text)
            if not folder.items.exists():  # it ended before the first answer, so nothing would be mixed
                with RunDir(folder.path).lock():
                    write_atomically(file, text)
                return folder
            other = sorted(key for key in {*was, *now} if was.get(key) != now.get(key))
            raise UsageError(
                f"output_dir: {folder.path} holds an evaluation with other {', '.join(other)}; give another folder"
            )
        if folder.items.exists():
            folder.records = {record.id: record for record in read_records(folder.items, cut_off=True)}
        return folder

    def refuse_other_questions(self, examples: Iterable[Example]) -> None:
        """Check that existing answers are to the questions as they are now; those without an answer are asked again.

        Raises:
            UsageError: A question, its answer, options or media have changed since.
        """
        known = len(self.records)
        for example in examples:
            record = self.records.get(example.id)
            if record is None:
                continue
            if record.prediction is None:
                del self.records[example.id]
                continue
            what = f"output_dir: {self.path} holds an answer to {example.id!r} that was asked "
            if (record.question, record.answer) != (example.question, example.answer):
                raise UsageError(
                    f"{what}{record.question!r:.60} (right: {record.answer!r:.40}), and the data now ask "
                    f"{example.question!r:.60} (right: {example.answer!r:.40}); give another folder"
                )
            if record.asked != asked_digest(example):
                raise UsageError(
                    f"{what}{record.question!r:.60} with other options, media, cuts or prompt than the data "
                    "have now; give another folder"
                )
        if len(self.records) < known:
            self._write()

    def _write(self) -> None:
        write_atomically(self.items, "".join(json_line(asdict(r)) for r in self.records.values()))

    def grade(self, grades: Mapping[str, Grade]) -> None:
        """Record a judge's grades of answers, by id."""
        if not grades:
            return
        for name, grade in grades.items():
            self.records[name] = replace(self.records[name], pred=grade.correct, score=grade.score)
        self._write()

    def add(self, records: Sequence[Record]) -> None:
        """Record some answers."""
        self.records.update((record.id, record) for record in records)
        with writing(self.items), self.items.open("a", encoding="utf-8") as lines:
            lines.writelines(json_line(asdict(record)) for record in records)


def _settings(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is damaged: not JSON ({error}); give another output_dir") from None
    if not isinstance(found, dict):
        raise UsageError(f"{file} is damaged: it holds no object; give another output_dir")
    return found


def scored_otherwise(items: str | Path, settings: Mapping[str, Any]) -> list[str]:
    """Scoring settings in which the evaluation of an `items.jsonl` differs from these, as far as known."""
    file = Path(items).expanduser().with_name("settings.json")
    was = _settings(file) if file.is_file() else {**settings}
    return [name for name in ("scoring", "rules") if was.get(name) != settings.get(name)]


def read_records(path: str | Path, *, cut_off: bool = False) -> list[Record]:
    """The records of an `items.jsonl`.

    Args:
        path: The file.
        cut_off: Leave out a last line that was not completely written.

    Raises:
        UsageError: There is no such file, or it is not a list of records.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give the items.jsonl of an evaluation")
    if cut_off:
        data = path.read_bytes()
        lines = data[: data.rfind(b"\n") + 1]
        if lines != data and _is_text(lines):
            write_atomically(path, lines.decode())
    try:
        return [_record(row) for row in read_jsonl(path)]
    except (TypeError, ValueError, RecursionError, RlaifFastError) as error:
        raise UsageError(f"{path} is not the items.jsonl of an evaluation: {error}") from None


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _record(row: Mapping[str, Any]) -> Record:
    """A record, with values of the types that an evaluation writes."""
    record = Record(**row)
    texts = (record.id, record.video, record.question, record.trouble, record.asked)
    optional = (record.answer, record.prediction)
    if (
        not all(isinstance(text, str) for text in texts)
        or not all(text is None or isinstance(text, str) for text in optional)
        or not isinstance(record.groups, Mapping)
        or not all(isinstance(value, str) for value in record.groups.values())
        or not isinstance(record.correct, bool)
        or not isinstance(record.pred, bool | None)
        or not isinstance(record.score, int | None)
    ):
        raise TypeError(f"a value of {str(record.id)!r:.60} is of another type")
    return record
