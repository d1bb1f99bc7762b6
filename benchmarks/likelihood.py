"""log p(x) by importance sampling: pythae's `get_nll` and vaelab's, with the same weights on the same images.

Throughput is images times samples a second. pythae reads the number of samples and gives their mean log-likelihood.
"""

import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ours import Ours
from vaelab.evaluation import importance_sampled
from vaelab.models.vae import VAE

SAMPLES = 5000
EPOCHS = 2


class Sampling:
    """`vaelab`: one network, trained for two epochs on dynamic bits; `rate(n)` measures n images."""

    def __init__(self, seed: int = 0, precision: str = "float32") -> None:
        trained = Ours(seed, protocol="dynamic", lr=3e-3)
        for _ in range(EPOCHS):
            trained.epoch()
        self.model: VAE = trained.model
        from vaelab.data.protocol import protocol

        self.images = protocol("dynamic").test_set(trained.data.test.pixels)
        self.precision = precision

    def rate(self, n: int) -> tuple[float, list[float]]:
        """Images times samples a second, and -log p(x) of each image."""
        start = time.perf_counter()
        found = importance_sampled(self.model, self.images[:n], SAMPLES, precision=self.precision)
        return n * SAMPLES / (time.perf_counter() - start), (-found.log_px).tolist()


class Peer(Sampling):
    """`pythae`: the same weights in its VAE."""

    def __init__(self, seed: int = 0) -> None:
        from pythae.models import VAE as PeerVAE
        from pythae.models import VAEConfig
        from pythae.models.base.base_utils import ModelOutput
        from pythae.models.nn import BaseDecoder, BaseEncoder

        super().__init__(seed)
        model = self.model

        class Encoder(BaseEncoder):
            def __init__(self) -> None:
                nn.Module.__init__(self)
                self.body, self.head = model.encoder, model.posterior.head

            def forward(self, x: Tensor) -> Any:
                mean, log_variance = self.head(self.body(x)).chunk(2, -1)
                return ModelOutput(embedding=mean, log_covariance=log_variance)

        class Decoder(BaseDecoder):
            def __init__(self) -> None:
                nn.Module.__init__(self)
                self.body = model.likelihood.decoder

            def forward(self, z: Tensor) -> Any:
                return ModelOutput(reconstruction=torch.sigmoid(self.body(z)))

        config = VAEConfig(input_dim=(1, 28, 28), latent_dim=model.latent_dim, reconstruction_loss="bce")
        self.peer = PeerVAE(config, encoder=Encoder(), decoder=Decoder())

    def rate(self, n: int) -> tuple[float, list[float]]:
        start, found = time.perf_counter(), []
        for image in self.images[:n]:
            found.append(-float(self.peer.get_nll(image.unsqueeze(0), n_samples=SAMPLES, batch_size=100)))
        return n * SAMPLES / (time.perf_counter() - start), found
