"""A run's metrics as TensorBoard event files."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rlaif_fast.errors import UsageError, typed_line
from rlaif_fast.runs.folder import RunDir

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class EventFiles:
    """Writes event files into an empty folder; earlier events are written again from the metrics.

    If they cannot be written, this is reported once and the run continues without: the metrics have all the data.

    Args:
        run_dir: The run.
        tell: Prints a line.

    Raises:
        UsageError: The package is not installed.
    """

    def __init__(self, run_dir: RunDir, tell: Callable[[str], None]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                "tensorboard is not installed; pip install 'rlaif-fast[train]', or set --tensorboard false"
            ) from error
        if run_dir.tensorboard.exists():
            shutil.rmtree(run_dir.tensorboard)
        self._tell = tell
        self._created = run_dir.created
        self._writer: SummaryWriter | None = SummaryWriter(log_dir=str(run_dir.tensorboard))

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the numbers of a record of `metrics.jsonl`."""
        prefix = "/".join(str(record[key]) for key in ("stage", "phase", "split") if key in record)
        values = {key: value for key, value in record.items() if key not in ("time", "step")}
        for category, row in values.pop("by_category", {}).items():
            values[f"accuracy/{category}"] = row["accuracy"]
        walltime = self._created + record["time"]
        with self._guarded() as writer:
            for key, value in values.items():
                if writer is not None and isinstance(value, (int, float)):
                    writer.add_scalar(f"{prefix}/{key}", value, record["step"], walltime=walltime)

    def close(self) -> None:
        """Write what is left."""
        with self._guarded() as writer:
            if writer is not None:
                writer.close()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[SummaryWriter | None]:
        try:
            yield self._writer
        except Exception as error:  # raised in tensorboard's thread, reported with the next record
            self._writer = None
            self._tell(f"tensorboard: no longer written ({typed_line(error)})")
