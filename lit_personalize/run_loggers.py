"""The metric files of a run: `metrics.csv` and TensorBoard events that a resumed run continues.

Lightning's own CSV logger removes the file of the run that it continues, and both write an empty `hparams.yaml`.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lightning.fabric.loggers import TensorBoardLogger as FabricTensorBoardLogger
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from lit_personalize import atomic


class MetricsFile(CSVLogger):
    """`metrics.csv` in the run directory, one row each time the loggers are due.

    Row `step` k holds the figures of optimizer step k + 1, as in all of Lightning's loggers.

    Args:
        folder: Run directory.
        resumed_at: Optimizer steps done before this start; later rows of an earlier start are dropped.
    """

    def __init__(self, folder: Path, resumed_at: int = 0):
        super().__init__(str(folder), name="", version="")
        self.resumed_at = resumed_at

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the file; on other ranks one that writes nothing."""
        if self._experiment is None:
            self._experiment = _Continued(self.log_dir, self.resumed_at)
        return self._experiment

    def save(self) -> None:
        """Write the rows that are due; an error of the disk names the file."""
        try:
            super().save()
        except OSError as error:
            error.filename = error.filename or self.experiment.metrics_file_path
            raise


class _Continued(ExperimentWriter):
    """A writer that appends to the rows of the steps before."""

    def __init__(self, folder: str, resumed_at: int):
        self._resumed_at = resumed_at
        super().__init__(folder)

    def _check_log_dir_exists(self) -> None:
        """Keep earlier rows up to the step of the checkpoint; the constructor calls this before it writes."""
        path = Path(self.metrics_file_path)
        columns, rows = rows_before(path, self._resumed_at)
        if not rows:
            path.unlink(missing_ok=True)
            return
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        atomic.write_text(path, text.getvalue())
        self.metrics_keys = columns


def rows_before(path: Path, step: int) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of the first `step` optimizer steps; a line that a kill cut short is left out."""
    if not path.is_file():
        return [], []
    with path.open(encoding="utf-8", newline="") as file:
        lines = [line for line in file if line.endswith("\n")]
    reader = csv.DictReader(lines)
    rows = [row for row in reader if (row.get("step") or "").isdigit() and int(row["step"]) < step]
    return list(reader.fieldnames or ()), rows


class EventsFile(TensorBoardLogger):
    """TensorBoard events in the run directory, without hyperparameters: `config.yaml` has them all."""

    def __init__(self, folder: Path, resumed_at: int = 0):
        # TensorBoard leaves out what an earlier start logged from `purge_step` on.
        super().__init__(str(folder), name="", version="", purge_step=resumed_at or None)

    def save(self) -> None:
        """Flush the events."""
        FabricTensorBoardLogger.save(self)


def loggers_of(folder: Path, resumed_at: int = 0) -> list[Logger]:
    """The loggers that a run has unless the configuration names others."""
    return [MetricsFile(folder, resumed_at), EventsFile(folder, resumed_at)]
