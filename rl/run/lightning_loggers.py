"""The same loggers for Fabric, which takes Lightning's and any other object that has their few methods."""

from typing import Any

from lightning.fabric.loggers import Logger, TensorBoardLogger

from rl.run import loggers
from rl.run.run import Run


def open_lightning_loggers(run: Run) -> list[Logger]:
    """Return the loggers that `--logger` names, in the process that writes; in the others none."""
    opened: list[Logger] = []
    for name in run.args.logger if run.is_first else ():
        if name == "tensorboard":
            logger = TensorBoardLogger(run.folder.parent, run.folder.name, version="", purge_step=run.purge_step)
            loggers.add_flags(run.closing(logger.experiment), run.args)
            opened.append(logger)
        else:
            # Lightning's own logger of tables deletes what a resumed run had written; that of W&B prints a warning.
            opened.append(Adapter(run.closing(loggers.MAKERS[name](run))))
    return opened


class Adapter(Logger):
    """Lets Fabric log to one of our loggers."""

    name, version = "", ""  # Fabric does not ask

    def __init__(self, logger: loggers.Logger) -> None:
        self.logger = logger

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write scalars by their names, at an environment step."""
        self.logger.log(metrics, step or 0)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """They are in args.json."""
