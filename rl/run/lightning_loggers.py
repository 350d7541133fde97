"""The same loggers for Fabric, which takes Lightning's and any other object that has its few methods."""

from typing import Any

from lightning.fabric.loggers import Logger, TensorBoardLogger

from rl.run.loggers import CsvLog, add_flags, wandb_arguments
from rl.run.run import Run


def open_lightning_loggers(run: Run) -> list[Logger]:
    """Return the loggers that `--logger` names, in the process that writes; in the others none."""
    makers = {"tensorboard": _open_tensorboard, "csv": CsvLogger, "wandb": _open_wandb}
    return [makers[name](run) for name in run.args.logger] if run.is_first else []


class CsvLogger(Logger):
    """Writes `metrics.csv` into the folder of the run. Lightning's own deletes what a resumed run had written."""

    name, version = "csv", ""

    def __init__(self, run: Run) -> None:
        self.log = CsvLog(run)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write scalars by their names, at an environment step."""
        self.log.log(metrics, step or 0)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """They are in args.json."""


def _open_tensorboard(run: Run) -> Logger:
    logger = TensorBoardLogger(run.folder.parent, run.folder.name, version="", purge_step=run.purge_step)
    add_flags(run.closing(logger.experiment), run.args)
    return logger


def _open_wandb(run: Run) -> Logger:
    from lightning.pytorch.loggers import WandbLogger  # here, because it is optional

    logger = WandbLogger(**wandb_arguments(run))
    run.closing(logger.experiment)
    return logger
