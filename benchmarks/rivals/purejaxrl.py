"""PureJaxRL's ppo.py as it stands, run in this process; its environments are in JAX, and compiled with the rest."""

import os
import sys
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])  # not this folder: its files have the names of the libraries
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import jax

from benchmarks import rivals


def main(args: Namespace) -> None:
    """Train."""
    report = rivals.Report()
    sys.modules["brax"] = SimpleNamespace(envs=None)  # type: ignore[assignment]  # other environments, not needed here
    sys.path.insert(0, str(args.checkout.resolve(strict=True)))
    from purejaxrl.ppo import make_train

    config: dict[str, Any] = {
        "ENV_NAME": args.env_id,
        "TOTAL_TIMESTEPS": args.updates * rivals.STEPS_PER_UPDATE,
        "LR": args.learning_rate,
        "ANNEAL_LR": False,
        "NUM_ENVS": rivals.NUM_ENVS,
        "NUM_STEPS": rivals.ROLLOUT_LENGTH,
        "NUM_MINIBATCHES": rivals.STEPS_PER_UPDATE // args.minibatch_size,
        "UPDATE_EPOCHS": args.epochs,
        "GAMMA": rivals.GAMMA,
        "GAE_LAMBDA": rivals.GAE_LAMBDA,
        "CLIP_EPS": rivals.CLIP,
        "ENT_COEF": 0.0,
        "VF_COEF": 0.5,
        "MAX_GRAD_NORM": rivals.MAX_GRAD_NORM,
        "ACTIVATION": "tanh",
        "DEBUG": True,  # so that it calls back after each update
    }
    call_back = jax.debug.callback
    jax.debug.callback = lambda _, metrics: call_back(lambda _: report.update(), metrics["timestep"])
    jax.block_until_ready(jax.jit(make_train(config))(jax.random.PRNGKey(args.seed)))
    jax.effects_barrier()
    report.end(args, f"with gymnax {version('gymnax')}")


if __name__ == "__main__":
    parser = rivals.make_parser(__doc__)
    parser.add_argument("--checkout", type=Path, required=True, help="folder that holds purejaxrl/ppo.py")
    main(parser.parse_args())
