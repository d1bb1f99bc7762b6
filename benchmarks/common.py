"""What all contenders share: the images and the sizes."""

from functools import cache

import numpy as np

BATCH = 128
HIDDEN = 400
LATENT = 20
STEPS = 469
"""Updates an epoch: 60,000 images in batches of 128, the last of 96."""
FLOP = 2 * 3 * 60_000 * (784 * HIDDEN + HIDDEN * 2 * LATENT + LATENT * HIDDEN + HIDDEN * 784)
"""Of the matrix products of an epoch: each weight once forward and twice backward for each image."""


@cache
def mnist() -> tuple[np.ndarray, np.ndarray]:
    """Training and test images as bytes, (N, 28, 28)."""
    from vaelab.data.datasets import load

    data = load("mnist")
    return data.train.pixels[:, 0], data.test.pixels[:, 0]
