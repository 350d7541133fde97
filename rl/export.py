"""Export: the greedy policy of a trained agent as one ONNX file.

    python -m rl.export RUN_OR_CHECKPOINT agent.onnx

The file takes `observation`, [batch, *shape], an image as the environment gives it or else flat float32, and returns
`action` as the environment takes it: normalisation of observations and clipping of actions are inside.
"""

import sys

if __name__ == "__main__" and not __package__:
    sys.exit("error: this file is a module: start it with `python -m rl.export`, in the folder that holds rl/")

import logging
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from rl.environments.making import read_spaces
from rl.ppo.agent import Agent
from rl.run.command_line import parse_options
from rl.run.resuming import load_agent
from rl.spaces import stored_dtype, stored_space
from rl.voice import fail

CHECKED_OBSERVATIONS = 1000
TOLERANCE = 1e-4  # of continuous actions; two programs add up in different orders


class GreedyPolicy(nn.Module):
    """From observations as the environment gives them to actions as it takes them."""

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self.agent = agent

    def forward(self, observation: Tensor) -> Tensor:
        """Return the greedy actions, [batch, ...]."""
        agent = self.agent
        return agent.distribution.to_env(agent.act_greedily(agent.observation_normalizer(observation)))


def export(agent: Agent, observations: Tensor, path: Path) -> None:
    """Write the greedy policy as ONNX and compare the file with PyTorch.

    Args:
        agent: trained.
        observations: examples, [batch, *shape]; the file takes any number of them.
        path: of the file.

    Raises:
        ValueError: with one line, if the file cannot be written or does not compute the same.
    """
    import onnxruntime  # here, because it is optional

    policy = GreedyPolicy(agent).eval()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own use of what PyTorch deprecates
        program = torch.onnx.export(
            policy,
            (observations[:2],),
            input_names=["observation"],
            output_names=["action"],
            dynamic_shapes={"observation": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    try:
        program.save(path)  # type: ignore[union-attr]
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
    (actions,) = onnxruntime.InferenceSession(path).run(None, {"observation": observations.numpy()})
    with torch.inference_mode():
        expected = policy(observations).numpy()
    if not np.allclose(actions, expected, rtol=TOLERANCE, atol=TOLERANCE):
        path.unlink()
        raise ValueError("the exported policy acts differently from the agent; the file was removed")


@dataclass
class ExportArgs:
    """Write the greedy policy of a trained agent as an ONNX file."""

    run_or_checkpoint: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, whose last checkpoint is taken, or a checkpoint."""
    path: Annotated[Path, tyro.conf.Positional]
    """File to write."""


def main() -> None:
    """Export from the command line."""
    options = parse_options(ExportArgs)
    try:
        agent, args = load_agent(options.run_or_checkpoint)
        if any(find_spec(package) is None for package in ("onnx", "onnxruntime", "onnxscript")):
            raise ValueError("the export needs more packages: pip install -r requirements-export.txt")
        observation_space, _ = read_spaces(args)
        space, dtype = stored_space(observation_space), stored_dtype(observation_space)
        space.seed(args.seed)
        observations = np.stack([space.sample() for _ in range(CHECKED_OBSERVATIONS)]).astype(dtype)
        export(agent, torch.from_numpy(observations), options.path)
    except ValueError as error:
        fail(str(error))
    print(f"wrote {options.path}: it acts as the agent does on {CHECKED_OBSERVATIONS} random observations")


if __name__ == "__main__":
    main()
