"""The reference loop: a VAE as the classic tutorials write it.

One image at a time is decoded and made a tensor, a DataLoader collates them, everything is float32, autograd goes through
sigmoid and binary cross-entropy, Adam has its default form. Written for comparison, in the style of what people start from.
"""

import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import BATCH, mnist


class Digits(Dataset):
    """Byte images to float tensors in [0, 1], one by one."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images[index], mode=None)
        pixels = torch.from_numpy(np.array(image, copy=True)).unsqueeze(-1)
        return pixels.permute(2, 0, 1).contiguous().float().div(255), 0


class Network(nn.Module):
    """784-400-20, as published with many tutorials."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(784, 400), nn.Linear(400, 20), nn.Linear(400, 20)
        self.fc3, self.fc4 = nn.Linear(20, 400), nn.Linear(400, 784)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.relu(self.fc1(x.view(-1, 784)))
        mu, logvar = self.fc21(h), self.fc22(h)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mu, logvar


def loss_of(mean: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    cross_entropy = F.binary_cross_entropy(mean, x.view(-1, 784), reduction="sum")
    return cross_entropy - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


class Classic:
    """`epoch()` trains one pass and returns its seconds; `test()` the seconds and the value of a test pass."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        train, test = mnist()
        self.train = DataLoader(Digits(train), batch_size=BATCH, shuffle=True)
        self.tests = DataLoader(Digits(test), batch_size=BATCH)
        self.model = Network()
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.curve: list[float] = []

    def epoch(self) -> float:
        start, total = time.perf_counter(), 0.0
        self.model.train()
        for x, _ in self.train:
            self.optimiser.zero_grad()
            loss = loss_of(*_ordered(self.model(x), x))
            loss.backward()
            total += loss.item()
            self.optimiser.step()
        self.curve.append(total / len(self.train.dataset))  # type: ignore[arg-type]
        return time.perf_counter() - start

    def test(self) -> tuple[float, float]:
        start, total = time.perf_counter(), 0.0
        self.model.eval()
        with torch.no_grad():
            for x, _ in self.tests:
                total += loss_of(*_ordered(self.model(x), x)).item()
        return time.perf_counter() - start, total / len(self.tests.dataset)  # type: ignore[arg-type]


def _ordered(out: tuple[Tensor, Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, mu, logvar = out
    return mean, x, mu, logvar
