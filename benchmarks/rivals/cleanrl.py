"""CleanRL's ppo.py as it stands, run in this process.

In CleanRL 1.2.0 it wants Gym 0.23, where the lander is called LunarLander-v2; --gymnasium gives it Gymnasium's
environments instead, the same as all the others run.
"""

import os
import runpy
import sys
from argparse import Namespace
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])  # not this folder: its files have the names of the libraries

import torch
from torch.utils.tensorboard import SummaryWriter

from benchmarks import rivals

LAST_SCALAR = "charts/SPS"  # ppo.py writes it at the end of each update


def main(args: Namespace) -> None:
    """Train."""
    report = rivals.Report()
    torch.set_num_threads(1)
    flags = {
        "env-id": args.env_id,
        "total-timesteps": args.updates * rivals.STEPS_PER_UPDATE,
        "learning-rate": args.learning_rate,
        "num-envs": rivals.NUM_ENVS,
        "num-steps": rivals.ROLLOUT_LENGTH,
        "num-minibatches": rivals.STEPS_PER_UPDATE // args.minibatch_size,
        "update-epochs": args.epochs,
        "gamma": rivals.GAMMA,
        "gae-lambda": rivals.GAE_LAMBDA,
        "clip-coef": rivals.CLIP,
        "ent-coef": 0.0,
        "max-grad-norm": rivals.MAX_GRAD_NORM,
        "seed": args.seed,
    }
    if args.gymnasium:
        from benchmarks.rivals import old_gym  # here, because Gymnasium is not needed otherwise

        old_gym.install()
    add_scalar = SummaryWriter.add_scalar

    def add_scalar_and_report(writer: SummaryWriter, tag: str, *values: Any) -> None:
        add_scalar(writer, tag, *values)
        if tag == LAST_SCALAR:
            report.update()

    SummaryWriter.add_scalar = add_scalar_and_report
    checkout = args.checkout.resolve(strict=True)
    script = str(checkout / "cleanrl" / "ppo.py")
    sys.argv = [script, *(f"--{name}={value}" for name, value in flags.items())]
    with TemporaryDirectory() as folder:
        os.chdir(folder)  # for its log
        runpy.run_path(script, run_name="__main__")
    versions = [distribution.version for distribution in distributions(name="cleanrl", path=[str(checkout)])]
    report.end(args, versions[0] if versions else "not a release")


if __name__ == "__main__":
    parser = rivals.make_parser(__doc__)
    parser.add_argument("--checkout", type=Path, required=True, help="folder that holds cleanrl/ppo.py")
    parser.add_argument("--gymnasium", action="store_true", help="run Gymnasium's environments instead of Gym's")
    main(parser.parse_args())
