"""PPO of other libraries doing the same work as our scripts: one script each, run by that library's own Python.

    python benchmarks/rivals/stable_baselines3.py --env-id LunarLander-v3 --minibatch-size 64 --epochs 10 --updates 12

What the scripts share: the work, and the JSON lines that tell when each update was done. Nothing here needs more than
the standard library, because the rivals' installations do not hold our packages.
"""

import json
import os
import resource
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

NUM_ENVS = 8
ROLLOUT_LENGTH = 256  # in each environment
STEPS_PER_UPDATE = NUM_ENVS * ROLLOUT_LENGTH
HIDDEN_SIZES = (64, 64)
GAMMA = 0.99
GAE_LAMBDA = 0.95
CLIP = 0.2
MAX_GRAD_NORM = 0.5


def make_parser(description: str) -> ArgumentParser:
    """Return a parser of the flags that all rivals have."""
    parser = ArgumentParser(description=description, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--env-id", default="LunarLander-v3", help="Gymnasium's id of the environment")
    parser.add_argument("--minibatch-size", type=int, default=64, help="rows per optimizer step")
    parser.add_argument("--epochs", type=int, default=10, help="passes over each rollout")
    parser.add_argument("--updates", type=int, default=12, help=f"rollouts of {STEPS_PER_UPDATE} steps in all")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="Adam's")
    parser.add_argument("--seed", type=int, default=1, help="of the networks and the environments")
    return parser


class Report:
    """The JSON lines: one when an update is done, one at the end.

    They alone go to stdout; what a library prints of its own goes to stderr.
    """

    def __init__(self) -> None:
        self._start = process_start()
        self._updates = 0
        self._stdout = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # for those, too, who hold sys.stdout already

    def update(self) -> None:
        """Print the seconds since the process started; to be called after each update."""
        self._updates += 1
        self._print(update=self._updates, seconds=time.perf_counter() - self._start)

    def end(self, args: Namespace, version: str) -> None:
        """Print the peak memory and the version of the library.

        Raises:
            RuntimeError: if the library did not make the updates it was asked for.
        """
        if self._updates != args.updates:
            raise RuntimeError(f"{self._updates} updates instead of {args.updates}")
        self._print(peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, version=version)

    def _print(self, **values: float | str) -> None:
        print(json.dumps(values), file=self._stdout, flush=True)


def process_start() -> float:
    """Return what `time.perf_counter` would have told when this process started, on Linux."""
    ticks = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]  # since the machine started
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter() - age
