"""The states of environments arrive as they were sent, and what is none of them is refused with a ValueError."""

import json
import time

import numpy as np
import pytest
import torch

from rl.environments.packing import pack, unpack

STATES = [
    {"seed": 2**31 - 1, "episode": 7},  # of an episode too long to be repeated
    {
        "seed": 5,
        "episode": 0,
        "actions": np.arange(12, dtype=np.uint8).reshape(6, 2).T,  # not contiguous
        "observation": np.array([np.pi, -0.0, 1e-310, np.inf]),
        "return": 0.1 + 0.2,
        "numbers": {"level": 1 / 3},
    },
    {
        "seed": 6,
        "episode": 1,
        "actions": np.zeros((0, 3), dtype=np.float32),
        "observation": np.full((2, 2), 10, dtype=np.uint8),  # 10 is a line's end
        "return": 0.0,
        "numbers": {},
    },
]


def test_states_arrive_bit_for_bit():
    packed = pack(STATES)
    assert (packed.dtype, packed.ndim) == (torch.uint8, 1)
    arrived = unpack(packed)
    for state, sent in zip(arrived, STATES, strict=True):
        assert state.keys() == sent.keys()
        for key, value in sent.items():
            if isinstance(value, np.ndarray):
                assert (state[key].dtype, state[key].shape) == (value.dtype, value.shape)
                assert state[key].tobytes() == value.tobytes()
            else:
                assert state[key] == value


def test_no_environments_are_packed_too():
    assert unpack(pack([])) == []


def bytes_of(content):
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def state_with(**changes):
    """A state as `pack` writes it, one thing of it changed, and 64 bytes of arrays."""
    array = {"dtype": "|u1", "shape": [4]}
    state = {"seed": 1, "episode": 0, "actions": array, "observation": array, "return": 0.0, "numbers": {}}
    return bytes_of(json.dumps([state | changes]).encode() + b"\n" + bytes(64))


HOSTILE = {
    "nothing": torch.empty(0, dtype=torch.uint8),
    "no tensor": [1, 2],
    "a tensor that learns": torch.zeros(4, requires_grad=True),
    "no text": bytes_of(b"\xff\xfe"),
    "a number": bytes_of(b"7"),
    "a list of numbers": bytes_of(b"[7]"),
    "a text": bytes_of(b'"states"'),
    "lists in lists without an end": bytes_of(b"[" * 100_000),
    "a state of nothing": bytes_of(b"[{}]"),
    "a seed that is text": state_with(seed="PCG64"),
    "a seed that is a truth": state_with(seed=True),
    "a seed below 0": state_with(seed=-1),
    "a seed of 64 bits": state_with(seed=2**63),
    "an episode that is a fraction": state_with(episode=0.5),
    "an array of objects": state_with(actions={"dtype": "|O", "shape": [4]}),
    "an array of texts": state_with(actions={"dtype": "<U1", "shape": [4]}),
    "an array of fields": state_with(actions={"dtype": "f4,f4", "shape": [4]}),
    "an array of an unknown type": state_with(actions={"dtype": "float7", "shape": [4]}),
    "an array of no type": state_with(actions={"dtype": {}, "shape": [4]}),
    "an array larger than the content": state_with(actions={"dtype": "|u1", "shape": [2**40]}),
    "an array larger than any memory": state_with(actions={"dtype": "|u1", "shape": [2**40, 2**40]}),
    "an array of half a row": state_with(actions={"dtype": "|u1", "shape": [0.5]}),
    "an array below nothing": state_with(actions={"dtype": "|u1", "shape": [-1, -4]}),
    "an array without a shape": state_with(actions={"dtype": "|u1", "shape": None}),
    "one action for all steps": state_with(actions={"dtype": "|u1", "shape": []}),
    "actions that are text": state_with(actions="left"),
    "a return that is text": state_with(**{"return": "high"}),
    "numbers that are a list": state_with(numbers=[1.0]),
    "numbers that are arrays": state_with(numbers={"level": {"dtype": "|u1", "shape": [4]}}),
    "only half of a state": bytes_of(b'[{"seed": 1, "episode": 0, "return": 1.0}]'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_state_is_refused_at_once(name):
    start = time.process_time()
    with pytest.raises(ValueError):
        unpack(HOSTILE[name])
    assert time.process_time() - start < 1


def test_the_state_of_which_the_hostile_ones_are_made_is_taken():
    assert unpack(state_with())[0]["actions"].tolist() == [0] * 4
