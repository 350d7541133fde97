import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Tuple
from torch import nn
from torch.nn.functional import conv2d, linear
from torch.testing import assert_close

from rl.args import CommonArgs
from rl.ppo.agent import Agent
from rl.ppo.encoders import IMAGE_FEATURES, Encoder

HEIGHT, WIDTH = 44, 52
BYTES_LAST = Box(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
BYTES_FIRST = Box(0, 255, (3, HEIGHT, WIDTH), np.uint8)


def bytes_of(*shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def encoder(space, like=None):
    torch.manual_seed(0)
    made = Encoder(space, nn.ReLU)
    if like is not None:
        made.load_state_dict(like.state_dict())
    return made


def nature_network(weights, pictures):
    """Mnih et al. 2015, written out, for float pictures [B, C, H, W] of 0..1."""
    w = list(weights)
    hidden = conv2d(pictures, w[0], w[1], stride=4).relu()
    hidden = conv2d(hidden, w[2], w[3], stride=2).relu()
    hidden = conv2d(hidden, w[4], w[5]).relu()
    return linear(hidden.flatten(1), w[6], w[7]).relu()


def test_the_features_of_an_image_are_those_of_the_network_written_out():
    pictures, network = bytes_of(5, HEIGHT, WIDTH, 3), encoder(BYTES_LAST)
    expected = nature_network(network.parameters(), pictures.movedim(-1, 1) / 255)
    assert_close(network(pictures), expected)
    assert expected.shape == (5, IMAGE_FEATURES)
    assert len(expected.unique(dim=0)) == 5


def test_the_layers_for_four_frames_of_84_x_84_are_those_of_mnih_et_al():
    """32 filters of 8 x 8 with stride 4, 64 of 4 x 4 with stride 2, 64 of 3 x 3 with stride 1: 84 -> 20 -> 9 -> 7."""
    network = encoder(Box(0, 255, (84, 84, 4), np.uint8))
    weights = [parameter.shape for name, parameter in network.state_dict().items() if name.endswith("weight")]
    assert weights == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (256, 64 * 7 * 7)]
    sizes = []
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, inputs, outputs: sizes.append(outputs.shape[1:]))
    assert network(bytes_of(2, 84, 84, 4)).shape == (2, 256)
    assert sizes == [(32, 20, 20), (64, 9, 9), (64, 7, 7)]


def test_the_features_of_a_small_image_are_those_of_one_convolution_written_out():
    """Young & Tian 2019: 16 filters of 3 x 3 with stride 1."""
    network = encoder(Box(0, 1, (10, 10, 4), bool))
    pictures = bytes_of(5, 10, 10, 4) % 2
    w = list(network.parameters())
    hidden = conv2d(pictures.movedim(-1, 1).float(), w[0], w[1]).relu()
    assert_close(network(pictures), linear(hidden.flatten(1), w[2], w[3]).relu())
    assert [tuple(weights.shape) for weights in w[::2]] == [(16, 4, 3, 3), (256, 16 * 8 * 8)]


@pytest.mark.parametrize("size", [7, 35, 36])
def test_the_smallest_images_of_each_network_have_features(size):
    first, pictures = encoder(Box(0, 255, (3, size, size), np.uint8)), bytes_of(2, 3, size, size)
    assert_close(encoder(Box(0, 255, (size, size, 3), np.uint8), like=first)(pictures.movedim(1, -1)), first(pictures))


def test_channels_first_and_channels_last_give_the_same_features():
    last, pictures = encoder(BYTES_LAST), bytes_of(5, HEIGHT, WIDTH, 3)
    assert_close(encoder(BYTES_FIRST, like=last)(pictures.movedim(-1, 1)), last(pictures))


def test_a_grey_picture_needs_no_axis_of_channels():
    pictures = bytes_of(5, HEIGHT, WIDTH)
    none = encoder(Box(0, 255, (HEIGHT, WIDTH), np.uint8))
    last = encoder(Box(0, 255, (HEIGHT, WIDTH, 1), np.uint8), like=none)
    first = encoder(Box(0, 255, (1, HEIGHT, WIDTH), np.uint8), like=none)
    assert_close(last(pictures.unsqueeze(-1)), none(pictures))
    assert_close(first(pictures.unsqueeze(1)), none(pictures))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-1, 1), (-3, 5)])
def test_bytes_and_floats_of_the_same_picture_give_the_same_features(low, high):
    of_bytes, pictures = encoder(BYTES_LAST), bytes_of(5, HEIGHT, WIDTH, 3)
    of_floats = encoder(Box(low, high, (HEIGHT, WIDTH, 3)), like=of_bytes)
    assert_close(of_floats(low + (high - low) * (pictures / 255)), of_bytes(pictures))


def test_a_picture_without_bounds_is_taken_as_it_is():
    bounded, pictures = encoder(Box(0, 1, (HEIGHT, WIDTH, 3))), bytes_of(2, HEIGHT, WIDTH, 3) / 255
    unbounded = encoder(Box(-np.inf, np.inf, (HEIGHT, WIDTH, 3)), like=bounded)
    assert_close(unbounded(pictures), bounded(pictures))


@pytest.mark.parametrize(
    ("space", "shape"),
    [
        (BYTES_LAST, BYTES_LAST.shape),
        (BYTES_FIRST, BYTES_FIRST.shape),
        (Box(-1, 1, (3,)), (3,)),
        (Dict(a=BYTES_LAST, b=Box(-1, 1, (3,))), (HEIGHT * WIDTH * 3 + 3,)),
    ],
    ids=["last", "first", "vector", "Dict"],
)
def test_leading_axes_of_time_and_environment_stay(space, shape):
    network = encoder(space)
    observations = bytes_of(6, *shape).float()
    assert_close(network(observations.unflatten(0, (2, 3))), network(observations).unflatten(0, (2, 3)))
    assert_close(network(observations[0]), network(observations)[0])


def test_the_features_of_parts_stand_side_by_side_in_the_order_of_the_parts():
    number_and_eye = Dict({"b": Box(0, 1, (1, 40, 40)), "a": Box(-9, 9, (1,))})  # sorted: a, b
    space = Tuple([Discrete(2), BYTES_LAST, Box(-1, 1, (3,)), number_and_eye])
    network = encoder(space)
    eyes = bytes_of(4, HEIGHT, WIDTH, 3), bytes_of(4, 1, 40, 40) / 255
    one_hot, vector, number = torch.eye(2)[[0, 1, 1, 0]], torch.rand(4, 3), torch.rand(4, 1)
    observations = torch.cat([one_hot, eyes[0].flatten(1), vector, number, eyes[1].flatten(1)], 1)
    weights = [list(image.parameters()) for image in network.images]
    features = [
        nature_network(weights[0], eyes[0].movedim(-1, 1) / 255),
        nature_network(weights[1], eyes[1]),
    ]
    assert_close(network(observations), torch.cat([one_hot, features[0], vector, number, features[1]], 1))
    assert network.num_features == 2 + 256 + 3 + 1 + 256
    assert not torch.equal(weights[0][2], weights[1][2])  # each picture has a network of its own


def test_a_vector_is_its_own_feature():
    observations = torch.rand(5, 3)
    network = encoder(Box(-1, 1, (3,)))
    assert torch.equal(network(observations), observations)
    assert (network.num_features, list(network.parameters())) == (3, [])


def test_the_policy_and_the_value_function_send_gradients_into_every_weight_of_the_encoder():
    agent = Agent(Dict(a=BYTES_LAST, b=Box(0, 1, (1, 40, 40)), c=Box(-1, 1, (3,))), Discrete(3), CommonArgs())
    observations = torch.rand(8, HEIGHT * WIDTH * 3 + 1600 + 3)
    log_probs, _, values = agent(observations, torch.zeros(8, dtype=torch.int64))
    for output in (log_probs, values):
        gradients = torch.autograd.grad(output.sum(), agent.encoder.parameters(), retain_graph=True)
        assert len(gradients) == 16
        assert all(gradient.any() for gradient in gradients)


def test_orthogonal_initialisation_reaches_the_convolutions_with_gain_root_two_and_no_bias():
    torch.manual_seed(0)
    agent = Agent(BYTES_LAST, Discrete(3), CommonArgs(ortho_init=True))
    layers = [layer for layer in agent.encoder.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert [type(layer).__name__ for layer in layers] == ["Conv2d"] * 3 + ["Linear"]
    for layer in layers:
        rows = layer.weight.flatten(1)
        small = rows if rows.shape[0] <= rows.shape[1] else rows.T
        assert_close(small @ small.T, 2 * torch.eye(len(small)), rtol=0, atol=1e-5)
        assert not layer.bias.any()


def test_the_convolutions_take_the_activation_of_the_flag():
    for name, kind in (("tanh", nn.Tanh), ("relu", nn.ReLU)):
        agent = Agent(BYTES_LAST, Discrete(3), CommonArgs(activation_function=name))
        activations = [layer for layer in agent.encoder.modules() if isinstance(layer, nn.Tanh | nn.ReLU)]
        assert [type(activation) for activation in activations] == [kind] * 4
