"""The gradient step in JAX: the same networks, loss, clipping and Adam, an epoch of 16 minibatches in one `lax.scan`.

For `benchmarks/gradient_step.py`, which runs it with the Python that has JAX. Prints, for each number of rows, the
microseconds of processor time of a step on one core, and the losses of the first step, as JSON.

    python benchmarks/rivals/xla_step.py INPUTS.npz ROWS ...
"""

import json
import os
import sys
import time
from statistics import median
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

MINIBATCHES, REPEATS = 16, 21
CLIP_COEF, VF_COEF, MAX_GRAD_NORM, LEARNING_RATE = 0.2, 0.5, 0.5, 1e-3
BETA1, BETA2, EPS = 0.9, 0.999, 1e-5


def perceptron(layers: list[tuple[jax.Array, jax.Array]], features: jax.Array) -> jax.Array:
    """Linear layers, given as weight and bias, with rectified linear units between."""
    for weight, bias in layers[:-1]:
        features = jax.nn.relu(features @ weight.T + bias)
    weight, bias = layers[-1]
    return features @ weight.T + bias


def loss(weights: Any, minibatch: Any) -> tuple[jax.Array, jax.Array]:
    """Equation 9 of Schulman et al. 2017, without entropy bonus, and the six numbers that the scripts log."""
    observations, actions, old_log_probs, _, advantages, returns = minibatch
    log_softmax = jax.nn.log_softmax(perceptron(weights["actor"], observations))
    log_probs = jnp.take_along_axis(log_softmax, actions[:, None], 1)[:, 0]
    log_ratio = log_probs - old_log_probs
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - CLIP_COEF, 1 + CLIP_COEF)
    policy_loss = -jnp.minimum(ratio * advantages, clipped * advantages).mean()
    value_loss = jnp.square(perceptron(weights["critic"], observations)[:, 0] - returns).mean()
    entropy_loss = (jnp.exp(log_softmax) * log_softmax).sum(-1).mean()
    total = policy_loss + VF_COEF * value_loss
    kl, fraction = (ratio - 1 - log_ratio).mean(), (jnp.abs(ratio - 1) > CLIP_COEF).mean()
    return total, jnp.stack([total, policy_loss, value_loss, entropy_loss, kl, fraction])


def step(state: Any, minibatch: Any) -> tuple[Any, jax.Array]:
    """Take a gradient step: clip the gradient to a norm, then Adam (Kingma & Ba 2015, algorithm 1)."""
    weights, mean, square, count = state
    gradient, losses = jax.grad(loss, has_aux=True)(weights, minibatch)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient)))
    scale = jnp.minimum(MAX_GRAD_NORM / (norm + 1e-6), 1)
    gradient = jax.tree.map(lambda g: g * scale, gradient)
    count = count + 1
    mean = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, mean, gradient)
    square = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, square, gradient)
    rate, correction = LEARNING_RATE / (1 - BETA1**count), 1 / jnp.sqrt(1 - BETA2**count)
    weights = jax.tree.map(lambda w, m, v: w - rate * m / (jnp.sqrt(v) * correction + EPS), weights, mean, square)
    return (weights, mean, square, count), losses


@jax.jit
def epoch(state: Any, minibatches: Any) -> tuple[Any, jax.Array]:
    """Take a step with each minibatch, all in one call."""
    return lax.scan(step, state, minibatches)


def main(path: str, rows: list[int]) -> None:
    """Print a line of JSON for each number of rows."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    data = np.load(path)
    weights = {
        name: [(jnp.asarray(data[f"{name}.{i}.weight"]), jnp.asarray(data[f"{name}.{i}.bias"])) for i in (0, 2, 4)]
        for name in ("actor", "critic")
    }
    zeros = jax.tree.map(jnp.zeros_like, weights)
    for count in rows:
        fields = [data[f"{count}.{i}"] for i in range(6)]
        minibatches = [jnp.asarray(np.repeat(field[None], MINIBATCHES, 0)) for field in fields]
        state = (weights, zeros, zeros, jnp.zeros(()))
        _, losses = jax.block_until_ready(epoch(state, minibatches))
        times = []
        for _ in range(REPEATS):
            start = time.process_time()
            state, _ = jax.block_until_ready(epoch(state, minibatches))
            times.append(time.process_time() - start)
        print(json.dumps({"rows": count, "us": 1e6 * median(times) / MINIBATCHES, "losses": losses[0].tolist()}))


if __name__ == "__main__":
    main(sys.argv[1], [int(rows) for rows in sys.argv[2:]])
