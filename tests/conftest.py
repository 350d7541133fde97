"""What all tests share."""

import os
from unittest import mock

import pytest
import torch

torch.set_num_threads(1)  # as in the scripts: more threads would fight for the cores, and round differently


def pytest_collection_modifyitems(items):
    """Mark what starts processes: the tests of a module that holds a function of `tests.launching`."""
    for item in items:
        if any(getattr(thing, "__module__", None) == "tests.launching" for thing in vars(item.module).values()):
            item.add_marker(pytest.mark.processes)


@pytest.fixture(autouse=True)
def own_environment():
    """What a test sets in the environment ends with it: plain `python` sets a launcher's variables, too."""
    with mock.patch.dict(os.environ):
        yield
