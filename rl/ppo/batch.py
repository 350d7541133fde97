"""Experience: T steps of N environments as a rollout, and its rows as a batch, which travels as bytes."""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from rl.ppo.agent import Agent
from rl.spaces import stored_dtype, stored_space


class Rollout(NamedTuple):
    """T steps of N environments. Step t of an environment is one row of experience."""

    raw_observations: Tensor  # [T, N, *shape], as the environment gave them
    observations: Tensor  # [T, N, *shape], normalised s_t
    actions: Tensor  # [T, N, ...], a_t
    log_probs: Tensor  # float32 [T, N], log π(a_t | s_t)
    rewards: Tensor  # float32 [T, N], r_t
    dones: Tensor  # bool [T, N], whether step t ended an episode
    values: Tensor  # float32 [T, N], V(s_t)
    next_values: Tensor  # float32 [T, N], V of the observation that step t led to, 0 if it terminated the episode
    reward_sums: Tensor | None = None  # float64 [T, N], discounted sums of the rewards of the running episodes


class Episodes(NamedTuple):
    """The episodes that ended in a rollout."""

    returns: list[float]  # sum of the rewards of each
    lengths: list[int]  # number of steps of each


class Batch(NamedTuple):
    """B rows of experience, in no order that matters."""

    observations: Tensor  # [B, *shape], normalised
    actions: Tensor  # [B, ...]
    log_probs: Tensor  # float32 [B]
    values: Tensor  # float32 [B]
    advantages: Tensor  # float32 [B]
    returns: Tensor  # float32 [B]

    @classmethod
    def from_rollout(cls, rollout: Rollout, advantages: Tensor, returns: Tensor) -> "Batch":
        """Flatten [T, N] to [B], environment after environment.

        So the rows of all ranks one after the other are the rows of one process with all environments.
        """
        fields = (rollout.observations, rollout.actions, rollout.log_probs, rollout.values, advantages, returns)
        return cls(*(field.transpose(0, 1).flatten(0, 1) for field in fields))

    @classmethod
    def zeros(cls, num_rows: int, agent: Agent) -> "Batch":
        """Return rows of zeros, on the device and in the precision of the agent.

        No rows are enough for the shapes and types that `unpack` needs.

        Args:
            num_rows: number of rows.
            agent: whose observations and actions they are.
        """
        space, weights = agent.observation_space, next(agent.parameters())
        observations = torch.zeros(num_rows, *stored_space(space).shape, dtype=getattr(torch, stored_dtype(space)))
        fields = (observations, agent.distribution.empty_actions(num_rows), *weights.new_zeros(4, num_rows))
        return cls(*(field.to(weights if field.is_floating_point() else weights.device) for field in fields))

    def pack(self) -> Tensor:
        """Return the rows as bytes, uint8 [B, bytes of a row]: one message, whatever the types."""
        columns = (field.reshape(len(field), prod(field.shape[1:])).view(torch.uint8) for field in self)
        return torch.cat(list(columns), dim=1)

    def unpack(self, packed: Tensor) -> "Batch":
        """Return the batch that was packed; this batch gives the shapes and types, its own rows do not matter."""
        # A copy of each column is aligned. `contiguous` would not copy that of a single row.
        columns = [column.clone(memory_format=torch.contiguous_format) for column in packed.split(self.field_bytes, 1)]
        return Batch(
            *(
                column.view(field.dtype).reshape(len(packed), *field.shape[1:])
                for column, field in zip(columns, self, strict=True)
            )
        )

    @property
    def num_rows(self) -> int:
        """B; the length of the tuple is the number of fields."""
        return len(self.actions)

    @property
    def field_bytes(self) -> list[int]:
        """Bytes of each field in a row."""
        return [prod(field.shape[1:]) * field.dtype.itemsize for field in self]
