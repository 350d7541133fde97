"""The agent: a policy and a value function, each a small network of its own on the features of an observation."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import gymnasium as gym
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from torch import Tensor, nn

from rl.args import CommonArgs
from rl.ppo.distributions import Bernoulli, Categorical, DiagonalGaussian, Distribution, MultiCategorical
from rl.ppo.encoders import Encoder
from rl.ppo.normalize import ObservationNormalizer, RewardNormalizer

DISTRIBUTIONS: dict[type[gym.Space], Callable[[Any], Distribution]] = {
    Discrete: Categorical,
    MultiDiscrete: MultiCategorical,
    MultiBinary: Bernoulli,
    Box: DiagonalGaussian,
}


class Agent(nn.Module):
    """Policy (actor) and value function (critic), on features that they share where there are images.

    What acts and what learns takes observations that went through `observation_normalizer`.

    Args:
        observation_space: as the environment declares it.
        action_space: as the environment declares it; it decides the distribution of the actions.
        args: `hidden_sizes` and `activation_function` of the hidden layers; `ortho_init` initialises the layers
            orthogonally, with gain √2, and 0.01 for the policy's output, so that the first policy is close to
            uniform; `init_log_std` of continuous actions; `normalize_observations` and `normalize_rewards`.
    """

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: CommonArgs) -> None:
        super().__init__()
        self.observation_space = observation_space
        activation = {"relu": nn.ReLU, "tanh": nn.Tanh}[args.activation_function]
        kind = next(kind for kind in DISTRIBUTIONS if isinstance(action_space, kind))
        self.distribution = DISTRIBUTIONS[kind](action_space)
        if isinstance(self.distribution, DiagonalGaussian):
            nn.init.constant_(self.distribution.log_std, args.init_log_std)
        self.encoder = Encoder(observation_space, activation)
        self.actor = _perceptron(
            self.encoder.num_features, args.hidden_sizes, self.distribution.num_outputs, activation
        )
        self.critic = _perceptron(self.encoder.num_features, args.hidden_sizes, 1, activation)
        if args.ortho_init:
            for network, output_gain in ((self.encoder, 2**0.5), (self.actor, 0.01), (self.critic, 1.0)):
                _initialize_orthogonally(network, output_gain)
        self.observation_normalizer = (
            ObservationNormalizer(observation_space) if args.normalize_observations else nn.Identity()
        )
        self.reward_normalizer = RewardNormalizer() if args.normalize_rewards else nn.Identity()

    def act(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Sample actions [...] for observations [..., *shape] with noise from the distribution's `draw_noise`."""
        return self.distribution.sample(self.actor(self.encoder(observations)), noise)

    def act_greedily(self, observations: Tensor) -> Tensor:
        """Return the actions to take without noise, [...], for observations [..., *shape]."""
        return self.distribution.greedy(self.actor(self.encoder(observations)))

    def value(self, observations: Tensor) -> Tensor:
        """Return the value function V(s), [...], for observations [..., *shape]."""
        return self.critic(self.encoder(observations)).squeeze(-1)

    def forward(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities and entropies of the policy, and values, each [...]: all that the loss needs.

        This is the only path that carries gradients, so it is the one that a wrapper for distributed training
        must see.
        """
        features = self.encoder(observations)
        log_probs, entropies = self.distribution.log_prob_and_entropy(self.actor(features), actions)
        return log_probs, entropies, self.critic(features).squeeze(-1)


def copy_weights(weights: Tensor, agent: nn.Module) -> None:
    """Give the parameters of an agent these values, [P], as `parameters_to_vector` lays them out.

    Each keeps its place in memory: the last bit of a matrix product depends on alignment.
    """
    sizes = [parameter.numel() for parameter in agent.parameters()]
    for parameter, values in zip(agent.parameters(), weights.split(sizes), strict=True):
        parameter.data.copy_(values.view_as(parameter))


def _perceptron(
    num_inputs: int, hidden_sizes: tuple[int, ...], num_outputs: int, activation: type[nn.Module]
) -> nn.Sequential:
    """Make linear layers with activations between."""
    layers: list[nn.Module] = []
    for sizes in pairwise((num_inputs, *hidden_sizes)):
        layers += [nn.Linear(*sizes), activation()]
    return nn.Sequential(*layers, nn.Linear((num_inputs, *hidden_sizes)[-1], num_outputs))


def _initialize_orthogonally(network: nn.Module, output_gain: float) -> None:
    """Give each layer orthogonal weights of gain √2, the last one of `output_gain`, and no bias."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, output_gain if layer is layers[-1] else 2**0.5)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
