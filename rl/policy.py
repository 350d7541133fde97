"""What acts in a rollout: from observations to actions, in NumPy, the language of environments."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

from rl.agent import Agent
from rl.distributions import Categorical, DiagonalGaussian
from rl.normalize import ObservationNormalizer

Policy = Callable[[np.ndarray, np.ndarray], np.ndarray]

ZERO = np.zeros((), dtype=np.float32)  # a Python number would be converted in each step


def make_policy(agent: Agent) -> Policy:
    """Return what `agent.act` computes, normalisation included, as a function of arrays; it holds until a weight moves.

    It maps observations [N, *shape] as the environments give them, and noise [N, ...], to actions [N, ...] as the
    learner stores them. Where a few layers are all there is, NumPy calculates them: for a few rows in a quarter of the
    time that PyTorch's operations take, and equal but for the last bits.
    """
    device = next(agent.parameters()).device
    if (
        device.type == "cpu"
        and not agent.encoder.images
        and type(agent.distribution) in (Categorical, DiagonalGaussian)
    ):
        return _numpy_policy(agent)

    @torch.no_grad()
    def act(observations: np.ndarray, noise: np.ndarray) -> np.ndarray:
        inputs = agent.observation_normalizer(torch.from_numpy(observations).to(device))
        return agent.act(inputs, torch.from_numpy(noise).to(device)).cpu().numpy()

    return act


def _numpy_policy(agent: Agent) -> Policy:
    linear = [layer for layer in agent.actor if isinstance(layer, nn.Linear)]
    weights = [(layer.weight.detach().T.contiguous().numpy(), layer.bias.detach().numpy()) for layer in linear]
    *hidden, (last_weight, last_bias) = weights
    activate = np.tanh if any(isinstance(layer, nn.Tanh) for layer in agent.actor) else partial(np.maximum, ZERO)
    normalizer = (
        agent.observation_normalizer if isinstance(agent.observation_normalizer, ObservationNormalizer) else None
    )
    if normalizer:
        mean, std, limit = normalizer.mean.numpy(), normalizer.std.numpy(), normalizer.limit.numpy()
    if isinstance(agent.distribution, DiagonalGaussian):
        deviation = agent.distribution.log_std.detach().exp().numpy()

    def act(observations: np.ndarray, noise: np.ndarray) -> np.ndarray:
        features = observations
        if normalizer:
            features = ((observations - mean) / std).clip(-limit, limit)
        for weight, bias in hidden:
            features = features @ weight
            features += bias
            activate(features, out=features)
        outputs = features @ last_weight
        outputs += last_bias
        if isinstance(agent.distribution, DiagonalGaussian):
            return outputs + deviation * noise
        return (outputs + noise).argmax(-1)

    return act
