"""The agent: a policy and a value function, each a small network of its own."""

from itertools import pairwise

import gymnasium as gym
from torch import Tensor, nn

from rl.args import NetworkArgs
from rl.distributions import Categorical

HIDDEN_SIZES = (64, 64)


class Agent(nn.Module):
    """Policy (actor) and value function (critic).

    Args:
        observation_space: flat, shape [D].
        action_space: decides the distribution of the actions.
        args: `activation_function` of the hidden layers; `ortho_init` initialises the layers orthogonally, with
            gain √2, and 0.01 for the policy's output, so that the first policy is close to uniform.
    """

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Discrete, args: NetworkArgs) -> None:
        super().__init__()
        self.distribution = Categorical(action_space)
        num_inputs, num_outputs = observation_space.shape[0], self.distribution.num_outputs
        activation = {"relu": nn.ReLU, "tanh": nn.Tanh}[args.activation_function]
        self.actor = _multilayer_perceptron(num_inputs, num_outputs, activation, 0.01 if args.ortho_init else None)
        self.critic = _multilayer_perceptron(num_inputs, 1, activation, 1.0 if args.ortho_init else None)

    def act(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Sample actions [...] for observations [..., D] with noise from the distribution's `draw_noise`."""
        return self.distribution.sample(self.actor(observations), noise)

    def act_greedily(self, observations: Tensor) -> Tensor:
        """Return the most probable actions [...] for observations [..., D]."""
        return self.distribution.mode(self.actor(observations))

    def value(self, observations: Tensor) -> Tensor:
        """Return the value function V(s), [...], for observations [..., D]."""
        return self.critic(observations).squeeze(-1)

    def forward(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities and entropies of the policy, and values, each [...]: all that the loss needs.

        This is the only path that carries gradients, so it is the one that a wrapper for distributed training
        must see.
        """
        log_probs, entropies = self.distribution.log_prob_and_entropy(self.actor(observations), actions)
        return log_probs, entropies, self.value(observations)


def _multilayer_perceptron(
    num_inputs: int, num_outputs: int, activation: type[nn.Module], output_gain: float | None
) -> nn.Sequential:
    """Make linear layers with activations between; orthogonal initialisation if an `output_gain` is given."""
    layers: list[nn.Module] = []
    for sizes in pairwise((num_inputs, *HIDDEN_SIZES)):
        layers += [nn.Linear(*sizes), activation()]
    layers.append(nn.Linear(HIDDEN_SIZES[-1], num_outputs))
    if output_gain is not None:
        linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
        for layer, gain in zip(linears, [2**0.5] * len(HIDDEN_SIZES) + [output_gain], strict=True):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)
