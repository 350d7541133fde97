"""The folder of a run: where it lies, how it is named, and what is written into it first."""

import os
import re
import time
from pathlib import Path
from uuid import uuid4
from zipfile import BadZipFile, ZipFile

from rl.args import CommonArgs
from rl.voice import is_rank_zero, say


def choose_run_folder(args: CommonArgs) -> Path:
    """Return the folder of the run: that which this launch had before a restart, that which is resumed, or a new one.

    A run goes on in its folder only after its last checkpoint, so nothing there is deleted or overwritten. The name of
    a new folder is unique; it names date, environment, experiment and seed.
    """
    if (before := run_before_restart()) is not None:
        folder = before
    elif args.resume is not None and _is_last(resumed := Path(args.resume)):
        folder = resumed.parents[1]
    else:
        date = time.strftime("%Y-%m-%d_%H-%M-%S")
        env_id = re.sub("[/:]", "-", args.env_id)
        folder = args.log_root / f"{date}_{env_id}_{args.exp_name}_seed{args.seed}_{uuid4().hex[:4]}"
        if args.resume is not None:
            say(f"{args.resume} is not the last checkpoint of a run: going on in a new folder, {folder}")
    if is_rank_zero() and (note := _note_of_launch()) is not None:
        note.write_text(str(folder))
    return folder


def _is_last(checkpoint: Path) -> bool:
    """Return whether a checkpoint lies where a run has written it, and no later one that can be read beside it."""
    if checkpoint.parent.name != "checkpoints" or not checkpoint.match("update_*.ckpt"):
        return False
    return not any(is_whole(other) for other in checkpoint.parent.glob("update_*.ckpt") if other > checkpoint)


def is_whole(checkpoint: Path) -> bool:
    """Return whether the check sums of a checkpoint are right; torch does not look at them."""
    try:
        with ZipFile(checkpoint) as file:
            return file.testzip() is None
    except (BadZipFile, OSError, ValueError, EOFError):
        return False


def run_before_restart() -> Path | None:
    """Return the folder of the run that this launch began before the launcher restarted the processes, if any."""
    note = _note_of_launch()
    return Path(folder) if note is not None and note.exists() and (folder := note.read_text()) else None


def _note_of_launch() -> Path | None:
    """Return where a launch keeps the name of its run: in the launcher's own folder, which outlives its processes."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # <folder of the launch>/attempt_<n>/<local rank>/error.json
    return Path(error_file).parents[2] / "run_folder" if error_file else None
