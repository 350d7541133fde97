"""Where the curves of a run go: the loggers by the names of `--logger`."""

import csv
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Protocol

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from rl.args import CommonArgs
from rl.run.ending import ending

if TYPE_CHECKING:
    from rl.run.run import Run

METRICS = ("Rewards/rew_avg", "Eval/return", "Test/cumulative_reward")  # by which the tab HPARAMS compares runs


class Logger(Protocol):
    """Takes the scalars of an update."""

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Write scalars by their names, at an environment step."""

    def close(self) -> None:
        """Write what is left."""


def open_loggers(run: "Run") -> list[Logger]:
    """Return the loggers that `--logger` names, in the process that writes; in the others none."""
    return [run.closing(MAKERS[name](run)) for name in run.args.logger] if run.is_first else []


class TensorBoardLog:
    """Writes TensorBoard's files into the folder of the run."""

    def __init__(self, run: "Run") -> None:
        self.writer = SummaryWriter(run.folder, purge_step=run.purge_step)
        add_flags(self.writer, run.args)

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Write scalars by their names, at an environment step."""
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, step)
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


class CsvLog:
    """Writes `metrics.csv`: a row for each step, a column for each name. A resumed run keeps the rows before it."""

    def __init__(self, run: "Run") -> None:
        self.path = run.folder / "metrics.csv"
        self.rows: list[dict[str, object]] = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                self.rows = [dict(row) for row in csv.DictReader(file) if int(row["step"]) < run.purge_step]
        self.columns = list(self.rows[0]) if self.rows else ["step"]
        self.is_begun = False  # whether the file holds these rows and no others

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Write scalars by their names, at an environment step: a row of its own, unless the last has that step."""
        columns = list(dict.fromkeys([*self.columns, *scalars]))
        is_new = not self.rows or int(str(self.rows[-1]["step"])) != step
        if is_new:
            self.rows.append({"step": step})
        self.rows[-1] |= scalars
        if is_new and self.is_begun and columns == self.columns:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, columns).writerow(self.rows[-1])
            return
        self.columns, self.is_begun = columns, True
        whole = self.path.with_suffix(".tmp")
        with whole.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        whole.replace(self.path)

    def close(self) -> None:
        """Nothing is open between two rows."""


class WandbLog:
    """Sends scalars and flags to Weights & Biases, or keeps them on the disk where WANDB_MODE=offline says so."""

    def __init__(self, run: "Run") -> None:
        import wandb  # here, because it is optional

        os.environ.setdefault("WANDB_SILENT", "true")
        name = run.folder.name  # it is the id, too: a run that is resumed goes on under it
        self.wandb_run = wandb.init(
            project="ppo", dir=run.folder, name=name, id=name, resume="allow", config=asdict(run.args)
        )

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Send scalars by their names, at an environment step."""
        self.wandb_run.log(scalars, step)

    def close(self) -> None:
        """Send what is left."""
        self.wandb_run.finish()


def add_flags(writer: SummaryWriter, args: CommonArgs) -> None:
    """Write all flags as text, and for the tab HPARAMS, by which TensorBoard compares runs."""
    flags = asdict(args)
    rows = (f"| {name} | {value} |" for name, value in flags.items())
    shown = {name: flag if isinstance(flag, bool | int | float) else str(flag) for name, flag in flags.items()}
    with ending.signals_waiting():
        writer.add_text("hyperparameters", "\n".join(["| argument | value |", "| --- | --- |", *rows]))
        for summary in hparams(shown, dict.fromkeys(METRICS, 0.0)):
            writer._get_file_writer().add_summary(summary)  # type: ignore[union-attr]  # it has one until it is closed


MAKERS: dict[str, Callable[["Run"], Logger]] = {"tensorboard": TensorBoardLog, "csv": CsvLog, "wandb": WandbLog}
