"""Stands in for `Agent.act` in a rollout: from observations to actions, in NumPy, the language of environments."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

from rl.ppo.agent import Agent
from rl.ppo.distributions import Categorical, DiagonalGaussian
from rl.ppo.normalize import ObservationNormalizer
from rl.voice import say_first

Policy = Callable[[np.ndarray, np.ndarray], np.ndarray]
Outputs = Callable[[np.ndarray], np.ndarray]

PROOF_ROWS = 32
MOST_WEIGHTS = 100_000  # of an agent on a GPU: a smaller one acts on the CPU, where a step needs no transfer
TOLERANCE = 1e-4  # rounding leaves 1e-6 of the largest output

ZERO = np.zeros((), dtype=np.float32)  # a Python number would be converted in each step


def make_policy(agent: Agent, observations: np.ndarray) -> Policy:
    """Return what `agent.act` computes, normalisation included, as a function of arrays; it holds until a weight moves.

    It maps observations [N, *shape] as the environments give them, and noise [N, ...], to actions [N, ...] as the
    learner stores them. Where a few layers are all there is, NumPy calculates them: for a few rows in a quarter of the
    time that PyTorch's operations take, and equal but for the last bits. That it is equal is proven each time, on what
    the agent is about to see; where it is not, `agent.act` itself is called, and a line says so.

    Args:
        agent: of this process.
        observations: with which the rollout begins, [N, *shape].
    """
    device = next(agent.parameters()).device

    @torch.no_grad()
    def act(observations: np.ndarray, noise: np.ndarray) -> np.ndarray:
        inputs = agent.observation_normalizer(torch.from_numpy(observations).to(device))
        return agent.act(inputs, torch.from_numpy(noise).to(device)).cpu().numpy()

    if agent.encoder.images or type(agent.distribution) not in (Categorical, DiagonalGaussian):
        return act
    if device.type != "cpu" and sum(parameter.numel() for parameter in agent.actor.parameters()) > MOST_WEIGHTS:
        return act
    try:
        outputs, fast = _numpy_policy(agent)
        difference = _difference(agent, outputs, fast, act, observations)
    except (AttributeError, TypeError, ValueError) as error:  # an agent of another make
        difference = f"{type(error).__name__}: {error}"
    if not difference:
        return fast
    say_first("policy", f"the agent acts through PyTorch, since NumPy does not calculate the same: {difference}")
    return act


@torch.no_grad()
def _difference(agent: Agent, outputs: Outputs, fast: Policy, act: Policy, observations: np.ndarray) -> str:
    """Return in what NumPy's way differs by more than rounding, empty if in nothing.

    The observations alone may be all alike, or zero as many layers leave it, so they are also shaken.
    """
    if not np.isfinite(observations).all():
        return ""  # the rollout ends with a line about it
    rng = np.random.default_rng(0)
    shaken = np.repeat(observations, -(-PROOF_ROWS // len(observations)), 0)
    shaken = np.concatenate([observations, shaken + rng.standard_normal(shaken.shape, dtype=np.float32)])
    ours = outputs(shaken)
    inputs = agent.observation_normalizer(torch.from_numpy(shaken).to(next(agent.parameters()).device))
    truth = agent.actor(agent.encoder(inputs)).cpu().numpy()
    largest = np.abs(truth).max()
    if not np.allclose(ours, truth, rtol=0, atol=TOLERANCE * largest):
        return f"the policy's outputs differ by up to {np.abs(ours - truth).max():.2g}"
    noise = agent.distribution.draw_noise(rng, len(shaken))
    noise[::2] *= largest  # beside outputs that are small, as they are at first, all noise acts alike
    actions, expected = fast(shaken, noise), act(shaken, noise)
    if isinstance(agent.distribution, Categorical):  # which of two actions that are as good, rounding may decide
        scores = truth + noise
        chosen, best = (np.take_along_axis(scores, choice[:, None], 1) for choice in (actions, expected))
        return "its actions differ" if np.abs(best - chosen).max() > TOLERANCE * largest else ""
    return "" if np.allclose(actions, expected, rtol=TOLERANCE, atol=TOLERANCE * largest) else "its actions differ"


def _numpy_policy(agent: Agent) -> tuple[Outputs, Policy]:
    """Return functions from observations to the policy's outputs, and from observations and noise to actions."""
    linear = [layer for layer in agent.actor if isinstance(layer, nn.Linear)]
    weights = [(_array(layer.weight.T.contiguous()), _array(layer.bias)) for layer in linear]
    *hidden, (last_weight, last_bias) = weights
    activate = np.tanh if any(isinstance(layer, nn.Tanh) for layer in agent.actor) else partial(np.maximum, ZERO)
    normalizer = (
        agent.observation_normalizer if isinstance(agent.observation_normalizer, ObservationNormalizer) else None
    )
    if normalizer:
        mean, std, limit = map(_array, (normalizer.mean, normalizer.std, normalizer.limit))
    if isinstance(agent.distribution, DiagonalGaussian):
        deviation = _array(agent.distribution.log_std.exp())

    def outputs(observations: np.ndarray) -> np.ndarray:
        features = observations
        if normalizer:
            features = ((observations - mean) / std).clip(-limit, limit)
        for weight, bias in hidden:
            features = features @ weight
            features += bias
            activate(features, out=features)
        features = features @ last_weight
        features += last_bias
        return features

    def act(observations: np.ndarray, noise: np.ndarray) -> np.ndarray:
        if isinstance(agent.distribution, DiagonalGaussian):
            return outputs(observations) + deviation * noise
        return (outputs(observations) + noise).argmax(-1)

    return outputs, act


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
