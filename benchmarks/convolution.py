"""A convolutional VAE of 32 and 64 channels on 28 x 28: the same network in a plain float32 loop, and in vaelab's."""

import time

import torch
import torch.nn.functional as F

from benchmarks.common import BATCH
from benchmarks.ours import Ours
from vaelab.training import initial_model

IMAGES = 12_800
"""A fifth of an epoch, so that rounds are short."""


class Plain:
    """Data in memory, float32, autograd through binary cross-entropy, Adam with its defaults."""

    def __init__(self, seed: int = 0) -> None:
        ours = Convolution(seed)
        self.model = initial_model(ours.recipe).train()
        self.pixels = torch.from_numpy(ours.data.train.pixels)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def epoch(self) -> float:
        start = time.perf_counter()
        for index in torch.randperm(len(self.pixels)).split(BATCH):
            x = self.pixels[index].float() / 255
            x = (torch.rand_like(x) < x).float()
            mean, log_variance = self.model.posterior.head(self.model.encoder(x)).chunk(2, -1)
            z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
            logits = self.model.likelihood.decoder(z)
            cross_entropy = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
            loss = cross_entropy - 0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum()
            self.optimiser.zero_grad()
            (loss / len(x)).backward()
            self.optimiser.step()
        return time.perf_counter() - start


class Convolution(Ours):
    """The recipe `vae --network conv`, on the same images."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed, name="vae", network="conv", channels=(32, 64))
        part = self.data.train
        from dataclasses import replace

        self.data = replace(self.data, train=replace(part, pixels=part.pixels[:IMAGES], labels=part.labels[:IMAGES]))
