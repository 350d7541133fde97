"""EnvPool's environments have the meaning that Gymnasium's have: proven with CartPole's physics, computed apart."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import CartPoleEnv, PendulumEnv

from rl.args import CommonArgs
from rl.environments.making import check_backend, make_envs, read_spaces, reset_envs
from rl.environments.rollout import collect_rollout
from rl.ppo.agent import Agent
from rl.ppo.distributions import draw_action_noise

REASON = "EnvPool is optional: requirements-envpool.txt"
BALANCED, FALLING = range(3), range(3, 6)  # environments: some are balanced to the time limit, the others are not
STEPS, LIMIT = 1100, 500
ROUNDING = 1e-5  # EnvPool shows its double precision states as float32; a fake transition is off by 1e-2 or more
CONTROLLER = np.array([0.5, 1.0, 10.0, 2.0])  # push to the side where this sum over the state is positive


PHYSICS = CartPoleEnv()
PHYSICS.reset()


def cartpole(num_envs, first_index=0, seed=0):
    envs = make_envs(CommonArgs(env_id="CartPole-v1", env_backend="envpool"), num_envs)
    return envs, reset_envs(envs, seed, first_index).copy()


def successor(state, action):
    """What CartPole's physics makes of a state, and whether the pole has fallen, according to Gymnasium."""
    PHYSICS.state, PHYSICS.steps_beyond_terminated = np.array(state, dtype=np.float64), None
    state, _, fallen, _, _ = PHYSICS.step(int(action))
    return state, fallen


class Step(NamedTuple):
    """One step of one environment."""

    state: np.ndarray
    action: int
    seen: np.ndarray  # the observation that the step returned
    reward: float
    terminated: bool
    truncated: bool
    final: np.ndarray | None
    episode: tuple[float, int] | None  # return and length


@pytest.fixture(scope="module")
def histories():
    """The steps of each environment, one after the other."""
    pytest.importorskip("envpool", reason=REASON)
    num_envs = len(BALANCED) + len(FALLING)
    envs, observations = cartpole(num_envs)
    rng = np.random.default_rng(0)
    histories = [[] for _ in range(num_envs)]
    for _ in range(STEPS):
        actions = (observations @ CONTROLLER > 0).astype(np.int64)
        actions[FALLING] = rng.integers(2, size=len(FALLING))
        seen, rewards, terminations, truncations, info = envs.step(actions)
        for env, steps in enumerate(histories):
            final = info["final_obs"][env].copy() if "final_obs" in info and info["_final_obs"][env] else None
            ended = "episode" in info and info["_episode"][env]
            episode = (info["episode"]["r"][env], info["episode"]["l"][env]) if ended else None
            flags = bool(terminations[env]), bool(truncations[env])
            steps.append(
                Step(observations[env], actions[env], seen[env].copy(), rewards[env].item(), *flags, final, episode)
            )
        observations = seen.copy()
    envs.close()
    return histories


def episodes(histories, of):
    """The whole episodes of some environments, each a list of steps."""
    for env in of:
        episode = []
        for step in histories[env]:
            episode.append(step)
            if step.terminated or step.truncated:
                yield episode
                episode = []


def test_every_transition_obeys_the_physics_also_where_an_episode_ends(histories):
    for step in (step for steps in histories for step in steps):
        state, fallen = successor(step.state, step.action)
        np.testing.assert_allclose(step.seen if step.final is None else step.final, state, rtol=0, atol=ROUNDING)
        assert step.terminated == fallen
        assert step.reward == 1


def test_final_observations_stand_where_an_episode_ended_and_nowhere_else(histories):
    for step in (step for steps in histories for step in steps):
        ended = step.terminated or step.truncated
        assert (step.final is not None) == (step.episode is not None) == ended


def test_the_step_that_ends_an_episode_returns_the_first_observation_of_the_next(histories):
    firsts = [ep[-1].seen for ep in episodes(histories, range(len(histories)))]
    assert len(firsts) > 50
    assert np.abs(firsts).max() <= 0.05  # CartPole starts there
    assert len(np.unique(firsts, axis=0)) == len(firsts)


def test_episodes_are_truncated_after_500_steps_and_only_then(histories):
    assert [len(ep) for ep in episodes(histories, BALANCED)] == [LIMIT] * 2 * len(BALANCED)
    for episode in episodes(histories, range(len(histories))):
        assert [step.truncated for step in episode] == [False] * (len(episode) - 1) + [len(episode) == LIMIT]
        assert episode[-1].terminated == (len(episode) < LIMIT)


def test_returns_and_lengths_of_episodes_are_exact(histories):
    lengths = set()
    for episode in episodes(histories, range(len(histories))):
        assert episode[-1].episode == (sum(step.reward for step in episode), len(episode))
        lengths.add(len(episode))
    assert len(lengths) > 10


def test_environments_start_differently_over_indices_and_seeds_and_alike_when_repeated():
    pytest.importorskip("envpool", reason=REASON)
    starts = {seed: cartpole(4, seed=seed)[1] for seed in (0, 1)}
    assert len(np.unique(np.concatenate(list(starts.values())), axis=0)) == 8
    np.testing.assert_array_equal(cartpole(4)[1], starts[0])
    np.testing.assert_array_equal(np.concatenate([cartpole(1)[1], cartpole(3, first_index=1)[1]]), starts[0])


def test_a_run_repeats_also_after_episodes_have_ended():
    pytest.importorskip("envpool", reason=REASON)

    def run():
        envs, first = cartpole(3)
        steps = [envs.step(np.array([0, 1, t % 2]))[:4] for t in range(60)]
        assert sum(step[2].sum() for step in steps) > 8
        return [first, *(array.copy() for step in steps for array in step)]

    assert all(map(np.array_equal, run(), run()))


def test_reset_starts_all_environments_anew():
    pytest.importorskip("envpool", reason=REASON)
    envs, first = cartpole(2)
    for _ in range(5):
        envs.step(np.ones(2, dtype=np.int64))
    np.testing.assert_array_equal(reset_envs(envs, 0, 0), first)
    infos = [envs.step(np.ones(2, dtype=np.int64))[4] for _ in range(12)]
    steps, info = next((steps, info) for steps, info in enumerate(infos, start=1) if "episode" in info)
    assert set(info["episode"]["l"][info["_episode"]]) == {steps}


def test_a_rollout_bootstraps_from_the_true_final_observation_at_a_truncation_and_from_nothing_at_a_termination():
    pytest.importorskip("envpool", reason=REASON)
    args = CommonArgs(env_id="CartPole-v1", env_backend="envpool", num_envs=2, hidden_sizes=())
    agent = Agent(*read_spaces(args), args)
    with torch.no_grad():  # V is a sum over the state, the policy the controller or, from another start, a constant
        agent.critic[0].weight.copy_(torch.tensor([[10.0, 20.0, 30.0, 40.0]]))
        agent.critic[0].bias.fill_(5)
        agent.actor[0].weight.copy_(1e4 * torch.from_numpy(np.stack([-CONTROLLER, CONTROLLER])))
        agent.actor[0].bias.zero_()
    envs, first = cartpole(2)
    noise = draw_action_noise(agent.distribution, 520, range(2), 0, 1)
    noise[:40, 1, 0] += 1e7  # pushes the second one to the left until it has fallen
    rollout, _, ended = collect_rollout(agent, envs, first, noise)
    envs.close()
    ends = rollout.dones.nonzero().tolist()
    assert [499, 0] in ends and [499, 1] not in ends and len(ends) > 2
    assert sorted(ended.lengths)[-1] == LIMIT and ended.returns == ended.lengths
    for t in range(519):
        for env in range(2):
            state, fallen = successor(rollout.raw_observations[t, env].numpy(), rollout.actions[t, env])
            value = 0 if fallen else state @ [10, 20, 30, 40] + 5
            assert rollout.next_values[t, env] == pytest.approx(value, abs=1e-3)
            assert rollout.dones[t, env] == (fallen or [t, env] == [499, 0])


MISSING = "--env-backend envpool needs EnvPool: pip install -r requirements-envpool.txt"


def backend_error(env_id, **kwargs):
    args = CommonArgs(env_id=env_id, env_backend="envpool", **kwargs)
    with pytest.raises(ValueError) as error:
        check_backend(args, *read_spaces(args))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("env_id", "kwargs", "words"),
    [
        ("Taxi-v4", {}, "EnvPool has no Taxi-v4"),
        ("tests.spaces_env:Vector-v0", {}, "EnvPool has no tests.spaces_env:Vector-v0"),
        ("Blackjack-v1", {}, "EnvPool's Blackjack-v1 has other spaces than Gymnasium's"),
        ("Pendulum-v1", {"env_kwargs": ("g=9.0",)}, "--env-kwargs goes with --env-backend gymnasium"),
    ],
)
def test_what_envpool_cannot_run_is_named_in_one_line(env_id, kwargs, words):
    pytest.importorskip("envpool", reason=REASON)
    assert backend_error(env_id, **kwargs).startswith(words)


def test_a_missing_envpool_is_answered_by_one_line_that_names_the_requirements(monkeypatch):
    monkeypatch.setattr("rl.environments.making.find_spec", lambda package: None)
    assert backend_error("CartPole-v1") == MISSING


def test_videos_go_with_gymnasium_only():
    with pytest.raises(ValueError, match=r"^--capture-video goes with --env-backend gymnasium: EnvPool draws no"):
        CommonArgs(env_backend="envpool", capture_video=True)


FOR_CERTAIN = ["CartPole-v1", "Pendulum-v1", "LunarLander-v3"]


@pytest.mark.parametrize("env_id", [*FOR_CERTAIN, "FrozenLake-v1", "CliffWalking-v1"])
def test_an_environment_that_passes_the_check_gives_observations_as_gymnasium_does(env_id):
    pytest.importorskip("envpool", reason=REASON)
    args = CommonArgs(env_id=env_id, env_backend="envpool")
    try:
        check_backend(args, *read_spaces(args))
    except ValueError as error:
        assert env_id not in FOR_CERTAIN, error
        return  # named as not supported, which is as good
    envs, truth = make_envs(args, 2), make_envs(CommonArgs(env_id=env_id), 2)
    assert reset_envs(envs, 0, 0).shape == reset_envs(truth, 0, 0).shape
    assert envs.single_observation_space == truth.single_observation_space
    actions = truth.action_space.sample()
    assert envs.step(actions)[0].shape == truth.step(actions)[0].shape


def test_continuous_actions_reach_envpools_pendulum():
    pytest.importorskip("envpool", reason=REASON)
    envs = make_envs(CommonArgs(env_id="Pendulum-v1", env_backend="envpool"), 3)
    before = reset_envs(envs, 0, 0).copy()
    torques = np.array([[-2.0], [0.5], [2.0]], dtype=np.float32)
    after, rewards, *_ = envs.step(torques)
    for start, torque, end, reward in zip(before, torques, after, rewards, strict=True):
        physics = PendulumEnv()
        physics.reset()
        physics.state = np.array([np.arctan2(start[1], start[0]), start[2]], dtype=np.float64)
        observation, expected, *_ = physics.step(torque)
        np.testing.assert_allclose(end, observation, rtol=0, atol=1e-5)
        assert reward == pytest.approx(expected, rel=1e-4)


def test_new_episodes_after_a_resume_are_not_those_of_the_start():
    pytest.importorskip("envpool", reason=REASON)
    envs, first = cartpole(3)
    for _ in range(60):
        envs.step(np.zeros(3, dtype=np.int64))
    envs.mark(1)
    states = envs.states(1)
    assert min(state["episode"] for state in states) > 2
    restored, rewards, notes = cartpole(3)[0].restore(states)
    assert notes == ["EnvPool's environments cannot be put back"]
    assert [len(episode) for episode in rewards] == [0, 0, 0]
    assert not np.isin(restored, first).any()


def test_threads_are_for_envpool():
    with pytest.raises(ValueError, match=r"^--env-threads goes with --env-backend envpool"):
        CommonArgs(env_threads=2)
    assert CommonArgs(env_threads=2, env_backend="envpool").env_threads == 2
