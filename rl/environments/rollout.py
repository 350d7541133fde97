"""The rollout: what the environments answered to the agent. The only loop over environment steps."""

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rl.environments.replay import EnvironmentFailure
from rl.fast.policy import make_policy
from rl.ppo.agent import Agent
from rl.ppo.batch import Episodes, Rollout
from rl.spaces import stored_dtype
from rl.voice import RunError

if TYPE_CHECKING:
    from rl.environments.making import Envs

# Rows of a rollout that go through the network at once, and numbers in them: that bounds the memory.
ROWS_AT_ONCE, NUMBERS_AT_ONCE = 2048, 2**20


@torch.no_grad()
def collect_rollout(
    agent: Agent, envs: "Envs", observations: np.ndarray, noise: Tensor
) -> tuple[Rollout, np.ndarray, Episodes]:
    """Let the agent act in the environments, T steps in each.

    At a time limit the episode is truncated, not terminated: the state still has a value, that of the episode's
    final observation (Pardo et al. 2018, "Time Limits in Reinforcement Learning").

    Args:
        agent: the policy and the value function.
        envs: N environments that reset in the step that ends an episode.
        observations: [N, *shape], where the environments are now.
        noise: [T, N, ...], the action noise of the whole rollout.

    Returns:
        The rollout on the agent's device, the observations [N, *shape] to go on from, and the episodes that ended.

    Raises:
        RunError: if an environment fails, or what it returns is not finite; it names the environment and the step.
    """
    device = next(agent.parameters()).device
    shape = noise.shape[:2]  # T, N
    all_noise = noise.numpy()
    # Torch allocates what the network reads, at addresses that are aligned: the last bit of a matrix product depends
    # on that. The environments fill NumPy's view of it.
    dtype = getattr(torch, stored_dtype(envs.single_observation_space))
    raw = torch.empty(len(all_noise) + 1, *observations.shape, dtype=dtype)
    acted = agent.distribution.empty_actions(*shape)
    raw_observations, actions = raw.numpy(), acted.numpy()
    rewards = np.empty(shape, dtype=np.float32)
    terminations = np.empty(shape, dtype=bool)
    truncations = np.empty(shape, dtype=bool)
    final_observations: dict[tuple[int, int], np.ndarray] = {}
    episodes = Episodes([], [])

    raw_observations[0] = observations
    policy, to_env = make_policy(agent, raw_observations[0]), agent.distribution.to_env
    for t in range(len(all_noise)):
        actions[t] = action = policy(raw_observations[t], all_noise[t])
        try:
            step = envs.step(to_env(torch.from_numpy(action)).numpy())
        except EnvironmentFailure as failure:
            _check_finite(
                raw_observations[: t + 1], rewards[:t], final_observations
            )  # an action of NaN, say, comes of it
            raise EnvironmentFailure(failure.who, failure.reason, f" in step {t}") from failure
        raw_observations[t + 1], rewards[t], terminations[t], truncations[t], info = step
        if "life_lost" in info:
            terminations[t, info["life_lost"]] = True
        if "final_obs" in info:
            for env in info["_final_obs"].nonzero()[0]:
                final_observations[t, env] = info["final_obs"][env]
            episodes.returns.extend(info["episode"]["r"][info["_episode"]].tolist())
            episodes.lengths.extend(info["episode"]["l"][info["_episode"]].tolist())

    _check_finite(raw_observations, rewards, final_observations)
    # Everything else follows from the whole at once, which is faster than step by step.
    raw, acted = raw.to(device), acted.to(device)
    last = agent.observation_normalizer(raw[-1:])
    # In memory environment after environment, as a batch has them: so that takes no copy.
    observed = last.new_empty(shape[1], shape[0], *last.shape[2:]).transpose(0, 1)
    rows_at_once = min(ROWS_AT_ONCE, NUMBERS_AT_ONCE // last[0, 0].numel())
    split = partial(torch.split, split_size_or_sections=max(1, rows_at_once // shape[1]))
    outputs = []
    for block, normalised, chosen in zip(split(raw[:-1]), split(observed), split(acted), strict=True):
        seen = agent.observation_normalizer(block)
        normalised.copy_(seen)
        outputs.append(agent(seen, chosen))
    log_probs, _, values = map(torch.cat, zip(*outputs, strict=True))
    next_values = torch.cat([values[1:], agent.value(last)])
    if final_observations:
        steps, indices = torch.tensor(list(final_observations), device=device).T
        finals = torch.tensor(np.stack(list(final_observations.values())), dtype=dtype, device=device)
        next_values[steps, indices] = agent.value(agent.observation_normalizer(finals))
    terminated = torch.from_numpy(terminations).to(device)
    rollout = Rollout(
        raw_observations=raw[:-1],
        observations=observed,
        actions=acted,
        log_probs=log_probs,
        rewards=torch.from_numpy(rewards).to(device),
        dones=terminated | torch.from_numpy(truncations).to(device),
        values=values,
        next_values=next_values.masked_fill(terminated, 0.0),
    )
    return rollout, raw_observations[-1].copy(), episodes  # a view would keep all of them alive


def _check_finite(
    observations: np.ndarray, rewards: np.ndarray, final_observations: dict[tuple[int, int], np.ndarray]
) -> None:
    """Check what the environments returned; the observations are those before each step and after the last."""
    for what, values in (("reward", rewards), ("observation", observations)):
        if (place := _first_not_finite(values)) is not None:
            step = place[0] - (what == "observation")  # the step that returned it; -1 where that was the reset
            when = "after the reset" if step < 0 else f"in step {step}"
            raise RunError(f"environment {place[1]} returned a NaN or infinite {what} {when}: {values[place]}")
    for (step, env), values in final_observations.items():
        if (place := _first_not_finite(values)) is not None:
            what = f"final observation in step {step}: {values[place]}"
            raise RunError(f"environment {env} returned a NaN or infinite {what}")


def _first_not_finite(values: np.ndarray) -> tuple[int, ...] | None:
    """Return the place of the first number that is NaN or infinite, if there is one."""
    if not np.issubdtype(values.dtype, np.floating) or np.isfinite(values).all():
        return None
    return tuple(np.argwhere(~np.isfinite(values))[0].tolist())
