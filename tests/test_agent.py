import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn

from rl.args import CommonArgs
from rl.ppo.agent import Agent
from rl.ppo.batch import Batch
from rl.ppo.lightning_agent import LightningAgent
from rl.ppo.loss import ppo_loss

OBSERVATION_SPACE, ACTION_SPACE = Box(-1, 1, (4,)), Discrete(3)


def make_agent(agent_class=Agent, seed=0, **flags):
    torch.manual_seed(seed)
    return agent_class(OBSERVATION_SPACE, ACTION_SPACE, CommonArgs(**flags))


def random_batch(rows=6):
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(4, rows, generator=generator)
    observations = torch.randn(rows, 4, generator=generator)
    return Batch(observations, torch.randint(3, (rows,), generator=generator), -1 + 0.1 * numbers[0], *numbers[1:])


def linears(network):
    return [layer for layer in network if isinstance(layer, nn.Linear)]


def test_the_policy_and_the_value_function_are_networks_of_their_own_with_two_hidden_layers_of_64():
    agent = make_agent()
    assert [tuple(layer.weight.shape) for layer in linears(agent.actor)] == [(64, 4), (64, 64), (3, 64)]
    assert [tuple(layer.weight.shape) for layer in linears(agent.critic)] == [(64, 4), (64, 64), (1, 64)]
    assert sum(parameter.numel() for parameter in agent.parameters()) == 2 * (5 * 64 + 65 * 64) + 65 * (3 + 1)


@pytest.mark.parametrize("leading", [(), (5,), (7, 5)])
def test_outputs_have_the_leading_shape_of_the_observations(leading):
    agent = make_agent()
    observations = torch.randn(*leading, 4)
    actions = agent.act(observations, torch.zeros(*leading, 3))
    assert (actions.shape, actions.dtype) == (leading, torch.int64)
    assert agent.act_greedily(observations).shape == leading
    assert agent.value(observations).shape == leading
    assert [output.shape for output in agent(observations, actions)] == [leading] * 3


@pytest.mark.parametrize(("name", "activation"), [("relu", torch.relu), ("tanh", torch.tanh)])
def test_the_value_is_that_of_the_layers_written_out(name, activation):
    agent = make_agent(activation_function=name)
    (w1, b1), (w2, b2), (w3, b3) = ((layer.weight.double(), layer.bias.double()) for layer in linears(agent.critic))
    observations = torch.randn(8, 4)
    hidden = activation(activation(observations.double() @ w1.T + b1) @ w2.T + b2)
    truth = (hidden @ w3.T + b3)[:, 0]
    torch.testing.assert_close(agent.value(observations).double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("network", "output_gain"), [("actor", 0.01), ("critic", 1.0)])
def test_orthogonal_initialisation_gives_orthogonal_rows_or_columns_of_the_length_of_the_gain(network, output_gain):
    layers = linears(getattr(make_agent(ortho_init=True), network))
    for layer, gain in zip(layers, [2**0.5, 2**0.5, output_gain], strict=True):
        weight = layer.weight.detach().double()
        rows, columns = weight.shape
        gram = weight @ weight.T if rows <= columns else weight.T @ weight
        torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)).double(), rtol=1e-6, atol=2e-6 * gain**2)
        assert torch.equal(layer.bias, torch.zeros(rows))


def test_without_orthogonal_initialisation_layers_are_initialised_as_pytorch_does():
    for network in (make_agent().actor, make_agent().critic):
        for layer in linears(network):
            bound = layer.in_features**-0.5
            assert layer.weight.abs().max() <= bound
            assert 0 < layer.bias.abs().max() <= bound


@pytest.mark.parametrize("ortho_init", [False, True])
def test_the_weights_are_a_function_of_the_seed(ortho_init):
    first, again, other = (make_agent(seed=seed, ortho_init=ortho_init) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.actor[0].weight, other.actor[0].weight)


def test_forward_agrees_with_value_and_act_greedily():
    agent, observations = make_agent(), torch.randn(200, 4)
    log_probs = torch.stack([agent(observations, torch.full((200,), action))[0] for action in range(3)], dim=1)
    assert torch.equal(log_probs.argmax(1), agent.act_greedily(observations))
    assert len(log_probs.argmax(1).unique()) > 1
    _, _, values = agent(observations, torch.zeros(200, dtype=torch.int64))
    assert torch.equal(values, agent.value(observations))


def test_forward_gives_the_log_probabilities_and_entropies_of_the_policy():
    agent, batch = make_agent(), random_batch()
    log_probs, entropies, _ = agent(batch.observations, batch.actions)
    truth = torch.distributions.Categorical(logits=agent.actor(batch.observations).double())
    torch.testing.assert_close(log_probs.double(), truth.log_prob(batch.actions), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropies.double(), truth.entropy(), rtol=1e-6, atol=1e-6)


def test_act_takes_the_action_that_the_noise_decides_for():
    agent, observations = make_agent(), torch.randn(3, 4)
    assert agent.act(observations, 1e6 * torch.eye(3)).tolist() == [0, 1, 2]
    assert torch.equal(agent.act(observations, torch.zeros(3, 3)), agent.act_greedily(observations))


def test_only_forward_carries_gradients_into_all_parameters():
    agent, batch = make_agent(), random_batch()
    assert not agent.act(batch.observations, torch.zeros(6, 3)).requires_grad
    assert not agent.act_greedily(batch.observations).requires_grad

    def reached(output):
        agent.zero_grad()
        output.sum().backward()
        return {name.split(".")[0] for name, parameter in agent.named_parameters() if parameter.grad is not None}

    assert reached(agent.value(batch.observations)) == {"critic"}
    log_probs, entropies, values = agent(batch.observations, batch.actions)
    assert reached(torch.stack([log_probs, entropies, values])) == {"actor", "critic"}
    assert all(parameter.grad.abs().max() > 0 for parameter in agent.parameters())


def test_the_lightning_agent_has_the_weights_of_the_plain_one_under_the_same_names():
    plain, lightning = make_agent().state_dict(), make_agent(LightningAgent).state_dict()
    assert list(plain) == list(lightning)
    assert all(torch.equal(plain[name], lightning[name]) for name in plain)


def test_the_lightning_agents_training_step_is_the_loss():
    flags = {"ent_coef": 0.01, "vf_coef": 0.3, "clip_vloss": True, "clip_coef": 0.1}
    batch = random_batch()
    actual = make_agent(LightningAgent, **flags).training_step(batch, 5.5)
    expected = ppo_loss(make_agent(**flags), batch, 5.5, CommonArgs(**flags))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
