"""What a stage tells while it trains: a progress bar, history.jsonl, TensorBoard's events."""

import importlib.util
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from checkpoint import whole_file
from machine import device_memory_gb, to_json
from tqdm import tqdm
from workplace import Workplace

HISTORY, EVENTS = "history.jsonl", "tensorboard"
# of a row; all else in it is the same however often a run was killed
CLOCKS = ("images_per_second", "data_wait_share", "seconds_left", "memory_gb")


@dataclass
class Fitted:
    """What a stage reports: its curve and how fast it went.

    Args:
        history: a row every tenth step.
        seconds: of training, without those in which checkpoints were written.
        wait_seconds: of these, in which the loop had no batch.
        steps: that are done.
        images: that were seen, by all processes together.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    wait_seconds: float = 0.0
    steps: int = 0
    images: int = 0


class Logbook:
    """The rows of a stage, as they come; the first process alone writes.

    Args:
        stage: its name.
        steps: it will make.
        fitted: what is known of it so far, to which rows are added.
        place: the folder, the device, and whether TensorBoard is wanted.
    """

    def __init__(self, stage: str, steps: int, fitted: Fitted, place: Workplace) -> None:
        self.stage, self.steps, self.fitted, self.place = stage, steps, fitted, place
        self.since = (fitted.steps, fitted.seconds, fitted.wait_seconds, fitted.images)
        self.file: IO[str] | None = None
        self.events: Any = None
        self.bar = tqdm(
            initial=fitted.steps,
            total=steps,
            desc=f"{stage:>7}",
            unit="step",
            disable=place.rank > 0,
            mininterval=1.0 if os.isatty(2) else 15.0,
        )

    def close(self) -> None:
        """Close what is open."""
        self.bar.close()
        for opened in (self.file, self.events):
            if opened is not None:
                opened.close()

    def note(self, step: int, values: dict[str, float]) -> None:
        """Add a row: what the step gave, and how fast the steps since the last row went."""
        row = {"stage": self.stage, "step": step, "steps": self.steps, **values, **self._clocks()}
        if self.place.rank == 0:
            self._write(row)
        self.fitted.history.append(row)
        speed = f"{row['images_per_second']:.0f}/s"
        self.bar.set_postfix(
            loss=f"{row['loss']:.3f}", lr=f"{row['lr']:.1g}", images=speed, refresh=False
        )

    def _clocks(self) -> dict[str, float | None]:
        fitted = self.fitted
        now = (fitted.steps, fitted.seconds, fitted.wait_seconds, fitted.images)
        steps, seconds, waited, images = (b - a for a, b in zip(self.since, now, strict=True))
        self.since, seconds = now, max(seconds, 1e-9)
        clocks = (
            round(images / seconds, 1),
            round(waited / seconds, 4),
            round((self.steps - fitted.steps) * seconds / steps, 1),
            device_memory_gb(self.place.device),
        )
        return dict(zip(CLOCKS, clocks, strict=True))

    def _write(self, row: dict[str, Any]) -> None:
        folder = self.place.folder
        if self.file is None:
            self.file = open_history(folder / HISTORY, self.stage, self.fitted.history)
        self.file.write(to_json(row, indent=None) + "\n")
        self.file.flush()
        if not self.place.tensorboard:
            return
        if self.events is None:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (optional)

            # what a killed run wrote after its last checkpoint is not shown
            self.events = SummaryWriter(str(folder / EVENTS / self.stage), purge_step=row["step"])
        for name, value in row.items():
            if name not in ("stage", "step", "steps") and value is not None:
                self.events.add_scalar(name, value, row["step"])
        self.events.flush()


def open_history(path: Path, stage: str, rows: list[dict[str, Any]]) -> IO[str]:
    """Open history.jsonl behind the rows of other stages and those that a checkpoint holds.

    What a killed run wrote after its last checkpoint is trained, and written, once more.
    """
    kept = [row for row in _read(path) if row.get("stage") != stage]
    with whole_file(path) as file:
        file.writelines((to_json(row, indent=None) + "\n").encode() for row in [*kept, *rows])
    return path.open("a")


def check_tensorboard() -> None:
    """Refuse to begin a run whose events could not be written."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard")


def _read(path: Path) -> list[dict[str, Any]]:
    """Read the rows, but for one that a kill cut short."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
