"""What is fuzzed: for each format a fixed corpus, the mutation that fits it, and the call that reads it.

A call is given a file, and ends, or raises one of the library's errors; all else is a finding. To add a parser, add a
function that makes its corpus and a line to `targets`.
"""

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import torch
from PIL import Image

from vaelab import strict_json, weights
from vaelab.checkpoint import Checkpoints, Snapshot, _to_bytes
from vaelab.data import datasets, readers, store
from vaelab.errors import RunError, VaelabError
from vaelab.evaluation.compare import load
from vaelab.meter import Meter
from vaelab.recipes import Recipe, recipe
from vaelab.registry import build
from vaelab.run import FORMAT, Run

MOST = 10**6
"""Bytes that gzip may hold here, and numbers that a model may."""


@dataclass(frozen=True)
class Target:
    """A parser under test.

    Attributes:
        name: of the format.
        file: the name the input is written to.
        corpus: valid inputs; each must be read without an error.
        mutate: makes an input of one of them.
        read: is given the file.
        expected: what it may raise.
        named: whether its messages must name the file.
        memory: bytes it may take beyond 64 for each byte of the input.
    """

    name: str
    file: str
    corpus: tuple[bytes, ...]
    mutate: Callable[..., bytes]
    read: Callable[[Path], object]
    expected: type[Exception] = VaelabError
    named: bool = True
    memory: int = 4 << 20


def idx_corpus() -> tuple[bytes, ...]:
    def idx(shape: tuple[int, ...], body: bytes) -> bytes:
        return bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + body

    return idx((2, 3, 4), bytes(range(24))), idx((5,), b"\0\1\2\3\4"), idx((0, 28, 28), b""), idx((1, 1, 1), b"\xff")


def read_idx(path: Path) -> None:
    with path.open("rb") as file:
        rank = 1 if file.read(4)[3:] == b"\1" else 3
    array = readers.read_idx(path, rank, MOST)
    assert array.dtype == np.uint8 and array.ndim == rank


def npz_corpus() -> tuple[bytes, ...]:
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (6, 4, 3), dtype=np.uint8), np.arange(6) % 2
    made = []
    for save, arrays in (
        (np.savez, {"x_train": pixels, "y_train": labels, "x_test": pixels[:2], "y_test": labels[:2]}),
        (np.savez_compressed, {"images": pixels / 255, "labels": labels.astype(np.uint8)}),
        (np.savez, {"data": np.asfortranarray(pixels.reshape(6, 12)[:, :9]) > 99}),
        (np.savez_compressed, {"train": np.zeros((3, 8, 8, 3), np.float16)}),
    ):
        stream = io.BytesIO()
        save(stream, **arrays)
        made.append(stream.getvalue())
    return tuple(made)


def per_image_corpus() -> tuple[bytes, ...]:
    stream = io.BytesIO()
    described = json.dumps({"protocol": {"protocol": "dynamic", "test_images": 3}, "weights": "0" * 12})
    elbo = np.array([-90.0, -91.5, -88.25])
    np.savez(stream, described=np.array(described), elbo=elbo, log_px_is=elbo[:2], is_images=np.arange(2))
    return (stream.getvalue(),)


def picture_corpus() -> tuple[bytes, ...]:
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 256, (9, 7), dtype=np.uint8), rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    made = []
    for kind in ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"):
        for pixels in (grey, colour):
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, kind)
            made.append(stream.getvalue())
    return tuple(made)


def model_of(name: str, **fields: Any) -> Recipe:
    return recipe(name, (1, 4, 4), **fields)


def weights_corpus() -> tuple[bytes, ...]:
    from safetensors.torch import save

    torch.manual_seed(0)
    model = build(model_of("mnist-2d", hidden=(3,), decoder=(3,), frequencies=2).model)
    others = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.zeros(0), "c": torch.tensor(1)}
    return save(model.state_dict()), save(others, {"format": "pt"}), save({})


def config_corpus() -> tuple[bytes, ...]:
    small: dict[str, Any] = {"hidden": (3,), "latent_dim": 2}
    chosen = (
        model_of("mnist", **small), model_of("mnist-2d", decoder=(3,), frequencies=2, **small),
        model_of("vae", network="residual", channels=(2,), prior="VampPrior(pseudo_inputs=3)", **small),
        model_of("vae", posterior="Planar(layers=2)", prior="Flow(layers=1,hidden=(4,))", classes=3, **small),
        model_of("vae", posterior="NeuralSpline(layers=1,hidden=(4,),bins=2)", objective="ELBO(beta=Linear(0, 1, 9))",
                 prior="MixtureOfGaussians(components=2,covariance='full')", **small),
    )  # fmt: skip
    return tuple(json.dumps({"format": FORMAT, **one.to_dict()}).encode() for one in chosen)


def read_config(path: Path) -> None:
    found = Run(path.parent).recipe()
    assert isinstance(found.name, str) and isinstance(found.data, str) and type(found.seed) is int
    build(found.model, limit=MOST)
    build(found.objective, limit=MOST)


def metrics_corpus() -> tuple[bytes, ...]:
    record = {"epoch": 1, "step": 5, "seconds": 0.25, "lr": 1e-3, "train": {"rate": 3.5, "distortion": 90.0},
              "test": {"rate": None, "distortion": 91.25}}  # fmt: skip
    lines = [json.dumps(record | {"epoch": epoch}) + "\n" for epoch in range(1, 5)]
    return "".join(lines).encode(), lines[0].encode(), "".join(lines).encode()[:-9]


def evaluation_corpus() -> tuple[bytes, ...]:
    quantity = {"mean": 98.125, "se": 0.5, "n": 100, "reason": ""}
    document = {
        "quantities": {"nll": quantity, "elbo": {**quantity, "mean": None, "reason": "n/a: a Dirac posterior"}},
        "protocol": {"protocol": "dynamic", "test_images": 100, "density": "p(x)"}, "alarms": ["none"], "code": "0" * 12,
    }  # fmt: skip
    return (json.dumps(document).encode(), json.dumps(document, indent=2).encode())


def checkpoint_corpus() -> tuple[bytes, ...]:
    ones = torch.ones(3)
    snapshot = Snapshot(
        3, 0.5, [{"epoch": 1, "test": {"rate": None}}], Meter().state(), 0,
        {"master": ones, "mean": ones, "count": torch.tensor(3)}, {"frequency": torch.zeros(2, 2)},
        {"cpu": torch.get_rng_state()[:40]},
    )  # fmt: skip
    return (_to_bytes(snapshot), _to_bytes(replace(snapshot, history=[], optimiser={})))


def read_checkpoint(path: Path) -> None:
    """A checkpoint is read where its checksum holds, so each input is given a name with its own."""
    folder = path.parent / "checkpoint"
    folder.mkdir(exist_ok=True)
    data = path.read_bytes()
    named = folder / f"000000003-{sha256(data).hexdigest()[:16]}.safetensors"
    named.write_bytes(data)
    try:
        found, refused = Checkpoints(folder).load()
    finally:
        named.unlink()
    if found is None:
        raise RunError(" ".join(refused))
    assert type(found.step) is int and not refused


FILES = {"a-idx1-ubyte": bytes(range(200)), "b-idx1-ubyte": b"abc" * 50}


def archive_corpus() -> tuple[bytes, ...]:
    made = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=kind) as archive:
            for name, data in {
                "package/package.json": b"{}",
                **{f"package/data/{n}": d for n, d in FILES.items()},
            }.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                info.pax_headers = {"comment": "x"} if kind == tarfile.PAX_FORMAT else {}
                archive.addfile(info, io.BytesIO(data))
        made.append(gzip.compress(stream.getvalue(), mtime=0))
    return tuple(made)


def read_archive(path: Path) -> None:
    """Install what an archive of npm holds; nothing but the published content may appear, and nowhere else."""
    into = path.parent / "installed"
    into.mkdir(exist_ok=True)
    before = set(path.parent.iterdir())
    wanted = {f"package/data/{n}": store.File(n, sha256(d).hexdigest(), len(d)) for n, d in FILES.items()}
    try:
        with path.open("rb") as raw:
            list(store._members(raw, wanted, into, None))
    finally:
        assert set(path.parent.iterdir()) == before
        for one in into.iterdir():
            assert one.is_file() and not one.is_symlink() and one.read_bytes() == FILES[one.name]
            one.unlink()


def targets() -> Iterator[Target]:
    """Every parser, with its corpus."""
    yield Target("idx", "some-idx", idx_corpus(), mutations.of_bytes, read_idx)
    packed = tuple(gzip.compress(one, mtime=0) for one in idx_corpus() if one[3] == 3)
    yield Target(
        "gz", "some-idx.gz", packed, mutations.inside_gzip(mutations.of_bytes), lambda path: readers.read_idx(path, 3, MOST)
    )  # fmt: skip
    yield Target("npz", "data.npz", npz_corpus(), mutations.inside_zip, lambda path: datasets.load(str(path)))
    yield Target("safetensors", "model.safetensors", weights_corpus(), mutations.inside_header, weights.load_weights)
    yield Target("config", "config.json", config_corpus(), mutations.of_json, read_config, named=False)
    yield Target(
        "metrics", "metrics.jsonl", metrics_corpus(), mutations.of_lines, lambda path: Run(path.parent).history()
    )
    yield Target(
        "checkpoint", "a.safetensors", checkpoint_corpus(), mutations.inside_header, read_checkpoint, named=False
    )  # fmt: skip
    yield Target("evaluation", "evaluation.json", evaluation_corpus(), mutations.of_json, strict_json.read)
    yield Target(
        "per-image", "evaluation.npz", per_image_corpus(), mutations.inside_zip, lambda path: load(Run(path.parent))
    )
    yield Target(
        "picture", "picture.png", picture_corpus(), mutations.of_bytes, lambda path: readers.read_images([path]),
        memory=80 << 20,
    )  # fmt: skip
    yield Target(
        "archive", "pack.tgz", archive_corpus(), mutations.inside_gzip(mutations.of_bytes), read_archive, store.SourceError,
        named=False,
    )  # fmt: skip
