"""Small composed models, and the digits cut short."""

import pytest
import torch

from vaelab import likelihoods, posteriors, priors
from vaelab.data.datasets import Dataset, Images
from vaelab.models.vae import VAE
from vaelab.nn.mlp import MLP


@pytest.fixture
def vae():
    """A VAE on (1, 8, 8) images with fixed weights: latent dimensions, posterior, likelihood."""

    def make(dim=2, posterior=posteriors.Gaussian, likelihood=likelihoods.Bernoulli, scale=1.0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            encoder = MLP((1, 8, 8), (), (16,), "tanh", out_activation=True)
            decoder = MLP((dim,), (16,), (1, 8, 8), "tanh")
            model = VAE(encoder, posterior(16, dim), priors.StandardNormal(dim), likelihood(decoder))
        with torch.no_grad():
            model.posterior.head.weight.mul_(scale)
        return model.eval()

    return make


@pytest.fixture
def few(digits) -> Dataset:
    """200 training and 60 test images of the digits."""
    return cut(digits, 200, 60)


@pytest.fixture
def cut_digits(digits):
    return lambda train, test: cut(digits, train, test)


def cut(data, train, test):
    parts = [Images(p.pixels[:n], p.labels[:n]) for p, n in ((data.train, train), (data.test, test))]
    return Dataset("digits", *parts, data.classes, data.source)
