import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiBinary, MultiDiscrete, OneOf, Sequence, Text, Tuple

from rl.args import CommonArgs
from rl.environments.making import make_envs, read_spaces, reset_envs
from rl.ppo.agent import Agent
from rl.spaces import Image, Vector, check_action_space, is_image, observation_parts, stored_dtype, stored_space
from tests.spaces_env import PICTURE, PICTURE_AND_VECTOR, VECTOR, SpacesEnv

COLOUR, GREY, STACK = Box(0, 255, (96, 80, 3), np.uint8), Box(0, 255, (84, 84), np.uint8), Box(0, 255, (4, 84, 84))
NESTED = Dict(
    {  # Gymnasium sorts the keys of a dict
        "b": Tuple([Discrete(3), Box(0, 1, (2, 2)), Dict(eye=GREY, on=MultiBinary(2))]),
        "a": MultiDiscrete([2, 3]),
        "c": PICTURE,
    }
)


@pytest.mark.parametrize(
    ("space", "image"),
    [
        (COLOUR, True),
        (Box(0, 1, (96, 80, 3)), True),
        (Box(0, 255, (3, 96, 80), np.uint8), True),
        (Box(0, 1, (1, 36, 36), np.float64), True),
        (Box(0, 255, (40, 50, 16), np.uint8), True),
        (Box(0, 255, (16, 40, 50), np.uint8), True),
        (STACK, True),
        (GREY, True),
        (Box(0, 1, (84, 84)), False),  # as likely a matrix
        (Box(0, 1, (10, 10, 4), bool), True),  # MinAtar
        (Box(0, 1, (10, 10, 10), bool), True),
        (Box(0, 255, (7, 7, 3), np.uint8), True),  # MiniGrid
        (Box(0, 255, (6, 96, 3), np.uint8), False),  # a table
        (Box(0, 255, (3, 96, 6), np.uint8), False),
        (Box(0, 255, (35, 84), np.uint8), False),
        (Box(0, 1, (40, 50, 17)), False),  # no axis of channels
        (Box(0, 1, (40, 3, 50)), False),
        (Box(0, 1, (2, 40, 40, 3)), False),
        (Box(0, 255, (128,), np.uint8), False),
        (MultiBinary([40, 40]), False),
        (Discrete(3), False),
    ],
)
def test_an_image_has_two_long_axes_and_at_most_a_short_one_of_channels(space, image):
    assert is_image(space) is image


@pytest.mark.parametrize(
    ("space", "parts", "shape", "dtype"),
    [
        (VECTOR, [Vector(3)], (3,), "float32"),
        (Box(-1, 1, ()), [Vector(1)], (1,), "float32"),
        (Box(0, 9, (2, 3, 4), np.int64), [Vector(24)], (24,), "float32"),
        (Box(-1, 1, (2, 3), np.float64), [Vector(6)], (6,), "float32"),
        (Box(0, 255, (128,), np.uint8), [Vector(128)], (128,), "float32"),
        (COLOUR, [Image((96, 80, 3), 0, 255)], (96, 80, 3), "uint8"),
        (GREY, [Image((84, 84), 0, 255)], (84, 84), "uint8"),
        (STACK, [Image((4, 84, 84), 0, 255)], (4, 84, 84), "float32"),
        (Box(0, 1, (10, 10, 4), bool), [Image((10, 10, 4), 0, 1)], (10, 10, 4), "uint8"),
        (Box(-1, 1, (3, 40, 40), np.float64), [Image((3, 40, 40), -1, 1)], (3, 40, 40), "float32"),
        (Box(-np.inf, np.inf, (3, 40, 40)), [Image((3, 40, 40), 0, 1)], (3, 40, 40), "float32"),
        (Discrete(5, start=-2), [Vector(5)], (5,), "float32"),
        (MultiDiscrete([[2, 3], [4, 5]]), [Vector(14)], (14,), "float32"),
        (MultiBinary([2, 3]), [Vector(6)], (6,), "float32"),
        (Tuple([Discrete(32), Discrete(11), Discrete(2)]), [Vector(32), Vector(11), Vector(2)], (45,), "float32"),
        (Dict(only=COLOUR), [Image((96, 80, 3), 0, 255)], (23040,), "float32"),
        (
            NESTED,
            [Vector(5), Vector(3), Vector(4), Image((84, 84), 0, 255), Vector(2), Image((40, 44, 3), 0, 255)],
            (5 + 3 + 4 + 7056 + 2 + 5280,),
            "float32",
        ),
    ],
    ids=lambda value: " ".join(str(value).split())[:40],
)
def test_an_image_is_stored_as_it_is_and_everything_else_flat(space, parts, shape, dtype):
    assert observation_parts(space) == parts
    assert (stored_space(space).shape, stored_dtype(space)) == (shape, dtype)


class Showing(SpacesEnv):
    """Shows one observation only."""

    def __init__(self, space, observation):
        super().__init__(space)
        self.observation = observation

    def _observe(self):
        return self.observation


def seen(space, observation):
    """What the learner is given of an observation."""
    gym.register("Showing-v0", Showing, kwargs={"space": space, "observation": observation})
    try:
        return reset_envs(make_envs(CommonArgs(env_id="Showing-v0"), 1), 0, 0)[0]
    finally:
        del gym.registry["Showing-v0"]


@pytest.mark.parametrize(
    ("space", "observation", "expected"),
    [
        (Discrete(3), 1, [0, 1, 0]),
        (Discrete(3, start=4), 6, [0, 0, 1]),
        (MultiDiscrete([2, 3]), [1, 0], [0, 1, 1, 0, 0]),
        (MultiDiscrete([[2, 3], [2, 2]], start=[[1, 1], [0, 0]]), [[1, 3], [1, 0]], [1, 0, 0, 0, 1, 0, 1, 1, 0]),
        (MultiBinary([2, 2]), [[0, 1], [1, 1]], [0, 1, 1, 1]),
        (Box(0, 9, (2, 2)), [[1, 2], [3, 4]], [1, 2, 3, 4]),
        (Tuple([Discrete(2), Box(0, 9, (2,))]), (1, [0.25, 8]), [0, 1, 0.25, 8]),
        (Dict({"b": Discrete(2), "a": Box(0, 9, (1,))}), {"b": 1, "a": [7]}, [7, 0, 1]),
    ],
    ids=lambda value: " ".join(str(value).split()),
)
def test_choices_are_coded_one_hot_and_parts_stand_one_after_the_other(space, observation, expected):
    arrays = {Tuple: lambda o: (o[0], np.float32(o[1])), Dict: lambda o: {"b": o["b"], "a": np.float32(o["a"])}}
    observation = arrays.get(type(space), lambda o: np.array(o, dtype=space.dtype))(observation)
    assert seen(space, observation).tolist() == expected


@pytest.mark.parametrize(
    "space",
    [
        NESTED,
        PICTURE_AND_VECTOR,
        Dict(b=Discrete(2), a=Discrete(3)),
        Tuple([MultiDiscrete([3, 2]), Discrete(9, start=3)]),
    ],
    ids=lambda space: " ".join(str(space).split()),
)
def test_what_the_learner_is_given_equals_gymnasiums_own_flattening(space):
    space.seed(0)
    for _ in range(3):
        observation = space.sample()
        np.testing.assert_array_equal(seen(space, observation), gym.spaces.flatten(space, observation))


def test_the_parts_lie_where_they_are_said_to_lie():
    NESTED.seed(1)
    observation = NESTED.sample()
    parts = observation_parts(NESTED)
    pieces = np.split(seen(NESTED, observation), np.cumsum([part.size for part in parts])[:-1])
    np.testing.assert_array_equal(pieces[3].reshape(parts[3].shape), observation["b"][2]["eye"])
    np.testing.assert_array_equal(pieces[5].reshape(parts[5].shape), observation["c"])
    np.testing.assert_array_equal(pieces[2].reshape(2, 2), observation["b"][1])


@pytest.mark.parametrize("image", [COLOUR, STACK, GREY], ids=str)
def test_an_image_reaches_the_learner_untouched(image):
    image.seed(0)
    observation = image.sample()
    np.testing.assert_array_equal(seen(image, observation), observation)


BOUNDS = np.arange(40, dtype=np.float32)  # they are printed over several lines
UNSUPPORTED = [
    Text(5),
    Graph(VECTOR, None),
    Sequence(Box(-BOUNDS, BOUNDS)),
    OneOf([Discrete(2), VECTOR]),
]


@pytest.mark.parametrize("space", UNSUPPORTED, ids=lambda space: type(space).__name__)
@pytest.mark.parametrize(
    "inside",
    [lambda s: s, lambda s: Dict(a=VECTOR, b=s), lambda s: Tuple([Tuple([s])])],
    ids=["alone", "Dict", "Tuple"],
)
def test_an_observation_space_that_is_not_supported_is_named_in_one_line_with_those_that_are(space, inside):
    with pytest.raises(ValueError) as error:
        observation_parts(inside(space))
    message = str(error.value)
    assert message.startswith(f"the observation space {type(space).__name__}(")
    assert " is not supported; supported are " in message
    for supported in ("Box", "images", "Discrete", "MultiDiscrete", "MultiBinary", "Dict", "Tuple"):
        assert supported in message.partition("supported are")[2]
    assert "\n" not in message


@pytest.mark.parametrize(
    "space",
    [*UNSUPPORTED, Dict(a=Discrete(2)), Tuple([Discrete(2)]), Box(-BOUNDS.astype(int), BOUNDS.astype(int), dtype=int)],
    ids=lambda space: type(space).__name__,
)
def test_an_action_space_that_is_not_supported_is_named_in_one_line_with_those_that_are(space):
    with pytest.raises(ValueError) as error:
        check_action_space(space)
    message = str(error.value)
    assert message.startswith(f"the action space {type(space).__name__}(")
    assert " is not supported; supported are " in message
    assert message.endswith("Discrete, MultiDiscrete, MultiBinary and Box of floating-point numbers")
    assert "\n" not in message


@pytest.mark.parametrize(
    "space", [Discrete(2), MultiDiscrete([2]), MultiBinary(2), VECTOR, Box(-1, 1, (1,), np.float64)]
)
def test_the_supported_action_spaces_pass(space):
    check_action_space(space)


@pytest.mark.parametrize(
    ("name", "words"), [("Words-v0", "the observation space Text("), ("Counts-v0", "the action space Box(0, 9")]
)
def test_the_environment_of_such_a_space_is_named_too(name, words):
    with pytest.raises(ValueError, match=rf"^tests.spaces_env:{name}: ") as error:
        read_spaces(CommonArgs(env_id=f"tests.spaces_env:{name}"))
    assert words in str(error.value)


def test_a_space_of_a_users_own_subclass_is_supported_as_its_base_is():
    class Buttons(Discrete):
        pass

    check_action_space(Buttons(3))
    assert Agent(VECTOR, Buttons(3), CommonArgs()).distribution.num_outputs == 3
