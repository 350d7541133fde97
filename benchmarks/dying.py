"""Run a script that dies once, by SIGKILL, while it writes a checkpoint. For `benchmarks/faults.py`.

    DYING_MOMENT="half written" DYING_CHECKPOINT=update_00000003 DYING_MARKER=/tmp/died \
        torchrun --standalone --nproc_per_node=2 --max-restarts=3 benchmarks/dying.py train_torch.py --num-envs 2

The script knows nothing of it: what writes and renames files is replaced in its process. The marker is a file that is
left behind at death; where it is found, nothing is replaced, so that the restarted script goes on unharmed.
"""

import io
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

MOMENTS = ("half written", "before the rename", "after the rename")


def die() -> None:
    """Leave the time behind, and end as if killed from outside: nothing is flushed or tidied up."""
    Path(os.environ["DYING_MARKER"]).write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)


class HalfWritten(io.FileIO):
    """A file without a buffer: half of what is written first is in it, and the process is dead."""

    def write(self, data: bytes) -> int:
        """Write half of the bytes and die."""
        super().write(data[: len(data) // 2])
        die()


def set_trap(moment: str, checkpoint: str) -> None:
    """Replace what writes the checkpoint of that name, so that the process dies at that moment."""
    plain_open, plain_replace = Path.open, os.replace

    def open_file(path: Path, *args: Any, **kwargs: Any) -> Any:
        return HalfWritten(path, "w") if path.name == f"{checkpoint}.tmp" else plain_open(path, *args, **kwargs)

    def replace(source: Path, target: Path) -> None:
        struck = Path(target).name == f"{checkpoint}.ckpt"
        if struck and moment == "before the rename":
            die()
        plain_replace(source, target)
        if struck and moment == "after the rename":
            die()

    if moment == "half written":
        Path.open = open_file
    else:
        os.replace = replace  # Path.replace calls it


if __name__ == "__main__":
    if not Path(os.environ["DYING_MARKER"]).exists():
        set_trap(os.environ["DYING_MOMENT"], os.environ["DYING_CHECKPOINT"])
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as if python had been given the script
    runpy.run_path(sys.argv[0], run_name="__main__")
