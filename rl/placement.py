"""Where the processes of the decoupled script run."""

from typing import Literal

import torch

from rl.args import DecoupledArgs
from rl.launch import Ranks, fail, say


def place(args: DecoupledArgs, ranks: Ranks) -> tuple[torch.device, Literal["gloo", "nccl"]]:
    """Return the device of this process, and the backend of the trainers among themselves.

    The processes that use GPUs are dealt out to the visible ones in turn. NCCL wants a GPU for each process; where
    they share GPUs, the trainers talk through gloo.

    Raises:
        SystemExit: if GPUs are wanted and none is visible.
    """
    if not args.cuda:
        return torch.device("cpu"), "gloo"
    if not (num_gpus := torch.cuda.device_count()):
        fail("--cuda needs a GPU, and PyTorch sees none: leave --cuda out to train on the CPU")
    player_is_here = ranks.rank == ranks.local_rank
    cpu_players = 1 if player_is_here and not args.player_on_gpu else 0
    backend: Literal["gloo", "nccl"] = "nccl" if ranks.local_world_size - cpu_players <= num_gpus else "gloo"
    if backend == "gloo":
        say(f"{ranks.local_world_size - cpu_players} processes share {num_gpus} GPU: they talk through gloo, not NCCL")
    if ranks.local_rank < cpu_players:
        return torch.device("cpu"), backend
    return torch.device("cuda", (ranks.local_rank - cpu_players) % num_gpus), backend
