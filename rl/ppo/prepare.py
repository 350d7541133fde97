"""From a rollout to the batch that is learnt from: normalisation, advantages, returns."""

from collections.abc import Callable

from torch import Tensor

from rl.args import CommonArgs
from rl.ppo.agent import Agent
from rl.ppo.batch import Batch, Rollout
from rl.ppo.gae import generalized_advantage_estimation
from rl.ppo.normalize import ObservationNormalizer, RewardNormalizer, moments, normalize_advantages


def prepare_batch(
    rollout: Rollout, agent: Agent, args: CommonArgs, sum_over_ranks: Callable[[Tensor], Tensor] = lambda alone: alone
) -> Batch:
    """Return the rows of a rollout, with advantages and returns; call it on all ranks that collected one.

    All statistics are those of all ranks. Those of the observations count from the next rollout on, so that the policy
    that is improved is the one that acted.

    Args:
        rollout: T steps of N environments.
        agent: of this process; its statistics of observations and rewards are updated.
        args: `gamma`, `gae_lambda`, `clip_rewards` and the three `normalize_...` count here.
        sum_over_ranks: adds up a tensor over the ranks that collected.
    """
    if isinstance(agent.observation_normalizer, ObservationNormalizer):
        agent.observation_normalizer.update(sum_over_ranks(moments(rollout.raw_observations)))
    if isinstance(agent.reward_normalizer, RewardNormalizer) and rollout.reward_sums is not None:
        agent.reward_normalizer.update(sum_over_ranks(moments(rollout.reward_sums)))
    rewards = rollout.rewards.sign() if args.clip_rewards else agent.reward_normalizer(rollout.rewards)
    advantages = generalized_advantage_estimation(
        rewards, rollout.values, rollout.next_values, rollout.dones, args.gamma, args.gae_lambda
    )
    returns = advantages + rollout.values
    if args.normalize_advantages:
        advantages = normalize_advantages(advantages, sum_over_ranks(moments(advantages)))
    return Batch.from_rollout(rollout, advantages, returns)
