"""The folder of a run: where it lies, how it is named, and what is written into it first."""

import re
import time
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

from rl.args import CommonArgs


def choose_run_folder(args: CommonArgs) -> Path:
    """Return the folder of the run: the one that is resumed, or a new one.

    The name of a new one is unique; it names date, environment, experiment and seed.
    """
    if args.resume:
        resumed = Path(args.resume)
        return resumed if resumed.is_dir() else resumed.parent.parent
    date = time.strftime("%Y-%m-%d_%H-%M-%S")
    env_id = re.sub("[/:]", "-", args.env_id)
    return args.log_root / f"{date}_{env_id}_{args.exp_name}_seed{args.seed}_{uuid4().hex[:4]}"


def hyperparameter_table(args: CommonArgs) -> str:
    """Return all arguments as a table in Markdown, which TensorBoard shows."""
    rows = (f"| {name} | {value} |" for name, value in asdict(args).items())
    return "\n".join(["| argument | value |", "| --- | --- |", *rows])
