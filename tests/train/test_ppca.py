"""A linear VAE, trained by the real loop, reaches the maximum likelihood of probabilistic PCA, which is known in closed form.

Tipping & Bishop 1999: of all W, b and s, p(x) = N(b, W W^T + s^2 I) is likeliest on data of covariance S where b is the
mean, W spans the D leading eigenvectors, and s^2 is the mean of the other eigenvalues. The ELBO of a linear VAE has the
same maximum, and is equal to log p(x) there, where the columns of W are orthogonal (Lucas et al. 2019, arXiv 1911.02469).

Pixels are bytes with uniform noise in their bins, redrawn at each use. That is exact here: the mean log-likelihood under
a Gaussian depends on second moments alone, so the noise adds half a bin to the mean and 1 / (12 * 256^2) to S, and nothing
is left to chance.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from vaelab import likelihoods, posteriors, priors
from vaelab.data.datasets import Dataset, Images
from vaelab.data.protocol import protocol
from vaelab.models.vae import VAE
from vaelab.nn.mlp import MLP
from vaelab.objectives import ELBO, DReG
from vaelab.recipes import Training
from vaelab.rng import stream
from vaelab.training import fit

PIXELS, DIM, SHAPE = 8, 2, (1, 2, 4)
LOG_2PI = math.log(2 * math.pi)


@pytest.fixture(scope="module")
def data() -> Dataset:
    """512 images of a Gaussian of rank 2 and noise, as bytes."""
    noise = np.random.default_rng(0)
    weight = np.linalg.qr(noise.normal(size=(PIXELS, DIM)))[0] * [0.4, 0.25]
    x = 0.5 + noise.normal(size=(512, DIM)) @ weight.T + 0.06 * noise.normal(size=(512, PIXELS))
    pixels = np.clip(256 * x, 0, 255).astype(np.uint8).reshape(-1, *SHAPE)
    return Dataset("low rank", Images(pixels), Images(pixels[:4]), None, "drawn for this test")


@pytest.fixture(scope="module")
def moments(data):
    """Mean and covariance of what the model sees, over images and noise."""
    x = torch.from_numpy(data.train.pixels).flatten(1).double()
    covariance = torch.cov(x.T, correction=0) / 256**2 + torch.eye(PIXELS, dtype=torch.float64) / (12 * 256**2)
    return (x.mean(0) + 0.5) / 256, covariance


def maximum(covariance):
    """The largest mean log p(x), nats per image."""
    values = torch.linalg.eigvalsh(covariance).flip(0)
    log_det = values[:DIM].log().sum() + (PIXELS - DIM) * values[DIM:].mean().log()
    return -0.5 * (PIXELS * LOG_2PI + log_det + PIXELS).item()


def log_likelihood(model, moments):
    """The mean log p(x) of the model's own W, b and s over images and noise."""
    mean, covariance = moments
    decoder = model.likelihood.decoder.layers[0]
    weight, bias = decoder.weight.detach().double(), decoder.bias.detach().double()
    own = weight @ weight.T + torch.exp(2 * model.likelihood.log_scale.detach().double()) * torch.eye(PIXELS)
    seen = covariance + torch.outer(mean - bias, mean - bias)
    return -0.5 * (PIXELS * LOG_2PI + torch.logdet(own) + torch.trace(torch.linalg.solve(own, seen))).item()


def elbo(model, data):
    """The mean ELBO over 40 draws of the pixels' noise; that of the codes is averaged in closed form."""
    model = model.double()
    pixels = torch.from_numpy(data.train.pixels).repeat(40, 1, 1, 1)
    x = protocol("dequantised").training_batch(pixels, stream(7, "eval")).double()
    with torch.no_grad():
        q = model.encode(x)
        rate = 0.5 * (q.mean_.square() + q.std.square() - 1 - 2 * q.log_std).sum(-1)
        at_mean = -model.decode(q.mean.unsqueeze(0)).log_prob(x)[0]
        weight = model.likelihood.decoder.layers[0].weight
        spread = q.std.square() @ weight.square().sum(0) / (2 * torch.exp(2 * model.likelihood.log_scale))
    return -(at_mean + spread + rate).mean().item()


def trained(data, objective):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = MLP((DIM,), (), SHAPE)
        model = VAE(
            nn.Flatten(), posteriors.Gaussian(PIXELS, DIM), priors.StandardNormal(DIM),
            likelihoods.Gaussian(decoder, scale="shared", std=0.3),
        )  # fmt: skip
    training = Training(epochs=300, batch_size=64, k=4, lr=0.1, schedule="cosine", precision="float32")
    fit(model, objective, data, protocol("dequantised"), training)
    return model


def test_the_elbo_leads_to_the_maximum_of_probabilistic_pca_and_is_tight_there(data, moments):
    model = trained(data, ELBO())
    best, found = maximum(moments[1]), log_likelihood(model, moments)
    assert best - 0.01 < found <= best + 1e-9
    bound = elbo(model, data)
    assert best - 0.01 < bound < found


def test_dreg_leads_to_the_maximum_of_probabilistic_pca(data, moments):
    """The bound of four samples is tight for many encoders; what it makes of the decoder is the same maximum."""
    found = log_likelihood(trained(data, DReG()), moments)
    assert maximum(moments[1]) - 0.01 < found <= maximum(moments[1]) + 1e-9


def test_the_maximum_is_that_of_the_closed_form_weights(data, moments):
    """W = U (L - s^2 I)^(1/2), b the mean: any change of s makes it less likely."""
    mean, covariance = moments
    values, vectors = torch.linalg.eigh(covariance)
    s2 = values[:-DIM].mean()
    likelihood = likelihoods.Gaussian(MLP((DIM,), (), SHAPE), scale="shared").double()
    model = VAE(
        nn.Flatten(), posteriors.Gaussian(PIXELS, DIM).double(), priors.StandardNormal(DIM).double(), likelihood
    )
    decoder = model.likelihood.decoder.layers[0]
    with torch.no_grad():
        decoder.weight.copy_(vectors[:, -DIM:] * (values[-DIM:] - s2).sqrt())
        decoder.bias.copy_(mean)
        model.likelihood.log_scale.copy_(0.5 * s2.log())
    best = maximum(covariance)
    assert log_likelihood(model, moments) == pytest.approx(best, abs=1e-10)
    for change in (-0.05, 0.05):
        with torch.no_grad():
            model.likelihood.log_scale.copy_(0.5 * s2.log() + change)
        assert log_likelihood(model, moments) < best - 0.005
