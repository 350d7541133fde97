"""The owner of a process's environments: it collects rollouts, and knows where the environments stood."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl.args import CommonArgs
from rl.environments.making import make_envs, read_spaces, record_training, reset_envs
from rl.environments.rollout import collect_rollout
from rl.ppo.agent import Agent
from rl.ppo.batch import Episodes, Rollout
from rl.ppo.distributions import draw_action_noise


@dataclass
class DiscountedSums:
    """Where the discounted sum of rewards R_t = γ R_{t-1} + r_t of each environment stands; each episode begins at 0.

    Args:
        sums: R, float64 [N].
        gamma: discount factor γ.
    """

    sums: np.ndarray
    gamma: float

    def follow(self, rewards: Tensor, dones: Tensor) -> Tensor:
        """Return R_t for T more steps, float64 [T, N].

        Args:
            rewards: r_t, [T, N].
            dones: whether step t ended an episode, bool [T, N].
        """
        all_sums = []
        for step_rewards, step_dones in zip(rewards.cpu().numpy(), dones.cpu().numpy(), strict=True):
            sums = self.gamma * self.sums + step_rewards
            all_sums.append(sums)
            self.sums = np.where(step_dones, 0.0, sums)
        return torch.from_numpy(np.stack(all_sums)).to(rewards.device)

    def begin(self, rewards: list[np.ndarray]) -> None:
        """Let the sums stand where these rewards [steps] of each environment's running episode lead."""
        self.sums = np.zeros_like(self.sums)
        for index, episode in enumerate(rewards):
            for reward in episode.astype(np.float32):
                self.sums[index] = self.gamma * self.sums[index] + reward


class Collector:
    """Collects rollouts from the environments of this process, no two of which are alike, on any rank.

    Args:
        args: of the run.
        rank: of this process among those that run environments.
        world_size: number of all processes.
        video_folder: where episodes of the first environment are recorded, if anywhere.
    """

    def __init__(self, args: CommonArgs, rank: int, world_size: int, video_folder: Path | None = None) -> None:
        self.args = args
        self.env_indices = range(rank * args.num_envs, (rank + 1) * args.num_envs)
        self.rollout_length = args.rollout_length(world_size)
        self.envs = make_envs(args, args.num_envs, record_training(video_folder) if video_folder else None)
        # As the environment declares them; its vector has made observations flat, which hides the images among them.
        self.observation_space, self.action_space = read_spaces(args)
        self.observations = reset_envs(self.envs, args.seed, self.env_indices[0])
        self.reward_sums = DiscountedSums(np.zeros(args.num_envs), args.gamma)

    def collect(self, agent: Agent, update: int) -> tuple[Rollout, Episodes]:
        """Let the agent act for a rollout, [T, N], and return it with the episodes that ended.

        Args:
            agent: the policy and the value function.
            update: the update that the rollout is for, which decides the noise of the actions.
        """
        noise = draw_action_noise(
            agent.distribution,
            self.rollout_length,
            self.env_indices,
            self.args.seed,
            update,
            self.args.noise_correlation,
        )
        rollout, self.observations, episodes = collect_rollout(agent, self.envs, self.observations, noise)
        self.envs.mark(update)
        if self.args.normalize_rewards:
            rollout = rollout._replace(reward_sums=self.reward_sums.follow(rollout.rewards, rollout.dones))
        return rollout, episodes

    @property
    def updates(self) -> list[int]:
        """The last updates after whose rollouts the collector still knows where the environments stood."""
        return list(self.envs.marks)

    def states(self, update: int) -> list[dict[str, Any]]:
        """Return what each environment needs to be put back where it stood after the rollout for an update."""
        return self.envs.states(update)

    def restore(self, states: list[dict[str, Any]]) -> list[str]:
        """Put the environments back where they stood.

        Args:
            states: of the environments of all processes.

        Returns:
            A line for each environment that is not exactly where it was.
        """
        own = [states[index] for index in self.env_indices]
        self.observations, rewards, notes = self.envs.restore(own)
        self.reward_sums.begin(rewards)
        return notes

    def close(self) -> None:
        """Close the environments; a video that is being recorded is written."""
        self.envs.close()
