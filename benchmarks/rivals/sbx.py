"""SBX's PPO: stable-baselines3 with the update in JAX."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])  # not this folder: its files have the names of the libraries

from importlib.metadata import version

from sbx import PPO

from benchmarks import rivals
from benchmarks.rivals.stable_baselines3 import train

if __name__ == "__main__":
    train(PPO, rivals.make_parser(__doc__).parse_args(), version("sbx-rl"))
