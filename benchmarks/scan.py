"""JAX: a whole epoch of the same network in one compiled scan, float32, Adam written out."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import BATCH, HIDDEN, LATENT, mnist


def _linear(key, inputs, outputs):
    bound = inputs**-0.5
    k_weight, k_bias = jax.random.split(key)
    weight = jax.random.uniform(k_weight, (inputs, outputs), minval=-bound, maxval=bound)
    return weight, jax.random.uniform(k_bias, (outputs,), minval=-bound, maxval=bound)


def _loss(parameters, x, key):
    (w1, b1), (w2, b2), (w3, b3), (w4, b4) = parameters
    mu, log_variance = jnp.split(jax.nn.relu(x @ w1 + b1) @ w2 + b2, 2, axis=-1)
    z = mu + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mu.shape)
    logits = jax.nn.relu(z @ w3 + b3) @ w4 + b4
    cross_entropy = (jax.nn.softplus(logits) - x * logits).sum()
    return (cross_entropy - 0.5 * (1 + log_variance - mu**2 - jnp.exp(log_variance)).sum()) / len(x)


@jax.jit
def _epoch(state, images, key):
    k_order, k_noise = jax.random.split(key)
    whole = len(images) // BATCH * BATCH  # a scan has one shape: the last 96 images of the order are left out
    order = jax.random.permutation(k_order, len(images))[:whole].reshape(-1, BATCH)

    def step(state, inputs):
        parameters, mean, square, count = state
        index, key = inputs
        x = images[index].astype(jnp.float32) / 255
        loss, gradient = jax.value_and_grad(_loss)(parameters, x, key)
        count = count + 1
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, gradient)
        square = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g * g, square, gradient)
        at_m, at_s = 1 - 0.9**count, 1 - 0.999**count
        parameters = jax.tree.map(
            lambda p, m, s: p - 1e-3 * (m / at_m) / (jnp.sqrt(s / at_s) + 1e-8), parameters, mean, square
        )
        return (parameters, mean, square, count), loss

    state, losses = jax.lax.scan(step, state, (order, jax.random.split(k_noise, len(order))))
    return state, losses.mean()


class Scan:
    """`epoch()` trains one pass and returns its seconds; the first call, which compiles, is made here."""

    def __init__(self, seed: int = 0) -> None:
        self.key = jax.random.PRNGKey(seed)
        train, _ = mnist()
        self.images = jnp.asarray(np.ascontiguousarray(train).reshape(-1, 784))
        keys = jax.random.split(self.key, 4)
        sizes = (784, HIDDEN), (HIDDEN, 2 * LATENT), (LATENT, HIDDEN), (HIDDEN, 784)
        parameters = [_linear(k, *size) for k, size in zip(keys, sizes, strict=True)]
        zeros = jax.tree.map(jnp.zeros_like, parameters)
        self.state = (parameters, zeros, zeros, jnp.zeros(()))
        self.curve: list[float] = []
        self.epoch()

    def epoch(self) -> float:
        start = time.perf_counter()
        self.key, key = jax.random.split(self.key)
        self.state, loss = _epoch(self.state, self.images, key)
        self.curve.append(float(loss))
        return time.perf_counter() - start
