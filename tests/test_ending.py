"""What a process does by itself when a run ends; tests/test_ending_runs.py ends whole runs."""

import gc
import signal
import weakref
from itertools import count
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from rl.args import TorchArgs
from rl.environments.making import make_envs, read_spaces, reset_envs
from rl.environments.rollout import collect_rollout
from rl.ppo.agent import Agent
from rl.ppo.distributions import draw_action_noise
from rl.run import checkpoints, loggers
from rl.run import run as run_module
from rl.run.ending import Ending, Stopped, leave_process_group
from rl.voice import RunError
from tests.faulty_env import FaultyEnv


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("nan_observation", "returned a NaN or infinite observation in step 5: nan"),
        ("infinite_observation", "returned a NaN or infinite observation in step 5: inf"),
        ("nan_final_observation", "returned a NaN or infinite final observation in step 5: nan"),
        ("nan_reward", "returned a NaN or infinite reward in step 5: nan"),
        ("infinite_reward", "returned a NaN or infinite reward in step 5: -inf"),
        ("raises", "failed in step 5: ValueError: the pole is broken"),
        ("raises_in_reset", "failed in step 5: ValueError: the pole is broken"),
        ("exits", "failed in step 5: SystemExit: 0"),
    ],
)
def test_a_rollout_names_the_environment_that_goes_wrong_and_the_step(monkeypatch, fault, words):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(FaultyEnv, "reset_before", count())
    kwargs = (f"fault={fault}", "index=1", "step=5")
    args = TorchArgs(env_id="tests.faulty_env:Faulty-v0", env_kwargs=kwargs, num_envs=2)
    envs, agent = make_envs(args, args.num_envs), Agent(*read_spaces(args), args)
    noise = draw_action_noise(agent.distribution, 8, range(args.num_envs), seed=1, update=1)
    with pytest.raises(RunError, match=f"^environment 1 {words}$"):
        collect_rollout(agent, envs, reset_envs(envs, seed=1, first_index=0), noise)


def test_what_was_there_before_the_first_update_is_let_go_when_the_process_leaves():
    class Module:
        """Sits in a reference cycle, as DistributedDataParallel does."""

    module = Module()
    module.itself = module
    alive = weakref.ref(module)
    gc.freeze()  # as before the first update
    del module
    leave_process_group()
    assert alive() is None


def show_progress(tmp_path, work):
    run = SimpleNamespace(progress=SimpleNamespace(show=work), scalars={}, best_return=None)
    run_module.Run.end_update(run, 1, None, None, None)


def write_flags(tmp_path, work):
    loggers.add_flags(Mock(add_text=work), TorchArgs())


def write_log(tmp_path, work):
    with run_module.Run.writing_log(SimpleNamespace()):
        work()


def hand_over_a_checkpoint(tmp_path, work):
    written = checkpoints.Checkpoints(tmp_path, TorchArgs(checkpoint_every=1), None)
    written.writer = SimpleNamespace(submit=work)
    environments = SimpleNamespace(states=lambda update: [])
    written.add(1, {}, torch.optim.Adam([torch.zeros(1)]), {}, environments)


@pytest.mark.parametrize("place", [show_progress, write_flags, write_log, hand_over_a_checkpoint])
def test_a_signal_waits_while_a_library_works_with_its_locks(monkeypatch, tmp_path, place):
    ending, done = Ending(), []
    for module in (checkpoints, loggers, run_module):
        monkeypatch.setattr(module, "ending", ending)

    def work(*args):
        signal.raise_signal(signal.SIGTERM)
        done.append(args)

    before = signal.signal(signal.SIGTERM, ending._hear)
    try:
        with pytest.raises(Stopped):
            place(tmp_path, work)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done
