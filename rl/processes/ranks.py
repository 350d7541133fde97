"""How a process learns its rank, and that it ends with its launcher."""

import ctypes
import os
import signal
import sys
from typing import NamedTuple

from rl.voice import LAUNCH_VARIABLES, fail

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


class Ranks(NamedTuple):
    """The place of this process among all processes, and among those of this machine."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


def read_ranks() -> Ranks:
    """Read the place of this process from the launcher's environment variables.

    Plain `python` is a world of one process: the variables are then set as a launcher would, so that PyTorch and
    Fabric, which read them later, find the same world.

    Raises:
        SystemExit: if only some of the variables are set, or they name no process.
    """
    missing = [name for name in LAUNCH_VARIABLES if name not in os.environ]
    if len(missing) == len(LAUNCH_VARIABLES):
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0"
        )
    elif missing:
        fail(f"the launcher's variable {missing[0]} is not set: start with `torchrun`, `fabric run` or plain `python`")
    values = [os.environ[name] for name in LAUNCH_VARIABLES[:4]]
    if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[2]):
        fail(f"the launcher's variables {', '.join(LAUNCH_VARIABLES[:4])} name no process: {', '.join(values)}")
    return Ranks(*map(int, values))


def end_with_launcher() -> None:
    """Have this process killed when its launcher dies, so that none is left behind (Linux only)."""
    if sys.platform == "linux" and int(os.environ["WORLD_SIZE"]) > 1:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
