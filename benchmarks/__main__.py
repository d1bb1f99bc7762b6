"""`python -m benchmarks`: vaelab against reference loops and other libraries, on this machine, in one run.

    python -m benchmarks                      everything (an hour)
    python -m benchmarks training --rounds 5  one part: training, target, convolution, likelihood, start

Each part prints a table and the ratios that the project asks of itself. Nothing here is part of the test suite.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import FLOP
from benchmarks.contest import Contender, middle, ratios, table

VAELAB = str(Path(sys.executable).with_name("vaelab"))


def training(rounds: int) -> None:
    """Seconds an epoch of the 784-400-20 network at batch 128: grey levels, Adam 1e-3."""
    names = {
        "classic loop": ("benchmarks.classic:Classic", {}),
        "JAX, one compiled scan an epoch": ("benchmarks.scan:Scan", {}),
        "vaelab, float32": ("benchmarks.ours:Ours", {"precision": "float32"}),
        "vaelab": ("benchmarks.ours:Ours", {}),
        "floor": ("benchmarks.floor:Floor", {}),
    }
    found: dict[str, list[float]] = {name: [] for name in names}
    contenders = {name: Contender(where, **values) for name, (where, values) in names.items()}
    for contender in contenders.values():
        contender.call("epoch")  # the first epoch warms caches up and is not counted
    tested: list[float] = []
    for _ in range(rounds):
        for name, contender in contenders.items():
            found[name].append(contender.call("epoch"))
        tested.append(contenders["classic loop"].call("test")[0])
    rate = contenders["floor"].call("rate") / 1e9
    for contender in contenders.values():
        contender.close()
    rows = [["", "seconds an epoch, median (range)", "images/s"]]
    rows += [[name, middle(v), f"{60_000 / statistics.median(v):,.0f}"] for name, v in found.items()]
    print(table(rows))
    ours = found["vaelab"]
    print(
        f"the classic loop's test pass takes {middle(tested)} s more; floor: {FLOP / 1e12:.3f} TFLOP at {rate:.0f} GFLOP/s"
    )
    for name, wanted in (("classic loop", 10.0), ("JAX, one compiled scan an epoch", 1.4), ("floor", 0.7)):
        print(f"ratio {name} / vaelab: {middle(ratios(found[name], ours))}, asked {wanted}")


def curves(seeds: int) -> None:
    """Training curves in bfloat16 and in float32, `seeds` seeds each: the difference against the spread of seeds."""
    contender = Contender("benchmarks.ours:curve")
    found = {p: [contender.call("", 3, seed, p) for seed in range(seeds)] for p in ("float32", "bfloat16")}
    contender.close()
    rows = [["epoch", "float32, mean", "spread of seeds (sd)", "bfloat16 minus float32, mean", "s.e."]]
    for epoch in range(3):
        exact, coarse = ([curve[epoch] for curve in found[p]] for p in ("float32", "bfloat16"))
        moved = [b - a for a, b in zip(exact, coarse, strict=True)]
        rows.append(
            [str(epoch + 1), f"{statistics.mean(exact):.3f}", f"{statistics.stdev(exact):.3f}",
             f"{statistics.mean(moved):+.3f}", f"{statistics.stdev(moved) / len(moved) ** 0.5:.3f}"]
        )  # fmt: skip
    print(f"{table(rows)}\nn = {seeds} seeds")


def target(rounds: int) -> None:
    """Seconds to the test value that the classic loop has after ten epochs."""
    times, values = [], []
    classic = Contender("benchmarks.classic:Classic")
    for _ in range(10):
        seconds = classic.call("epoch")
        tested, value = classic.call("test")
        times.append(seconds + tested)
        values.append(value)
    classic.close()
    asked, whole = values[-1], sum(times)
    print(f"classic loop: {asked:.2f} nats after ten epochs, {whole:.1f} s")
    fast = Contender("benchmarks.ours:time_to")
    fast.call("", 0.0, 100)  # warms up
    found = [fast.call("", min(asked, 105.5), seed) for seed in range(max(rounds, 10))]
    fast.close()
    reached = [s for s in found if s < float("inf")]
    print(f"mnist-fast: {len(reached)} of {len(found)} seeds reach {min(asked, 105.5):.2f} nats")
    if reached:
        print(f"seconds {middle(reached)}; ratio {whole / statistics.median(reached):.1f}, asked 25")


def convolution(rounds: int) -> None:
    """A fifth of an epoch of a convolutional VAE."""
    names = {"plain float32 loop": "Plain", "vaelab": "Convolution"}
    contenders = {name: Contender(f"benchmarks.convolution:{kind}") for name, kind in names.items()}
    found: dict[str, list[float]] = {name: [] for name in names}
    for contender in contenders.values():
        contender.call("epoch")
    for _ in range(rounds):
        for name, contender in contenders.items():
            found[name].append(contender.call("epoch"))
    for contender in contenders.values():
        contender.close()
    print(table([["", "seconds for 12,800 images"], *([name, middle(v)] for name, v in found.items())]))
    print(f"ratio: {middle(ratios(found['plain float32 loop'], found['vaelab']))}, asked 3")


def likelihood(rounds: int) -> None:
    """Images times samples a second of importance sampling, K = 5000."""
    names = {
        "pythae get_nll": ("benchmarks.likelihood:Peer", {}, 4),
        "vaelab": ("benchmarks.likelihood:Sampling", {}, 40),
        "vaelab, bfloat16": ("benchmarks.likelihood:Sampling", {"precision": "bfloat16"}, 40),
    }
    contenders = {name: Contender(where, **values) for name, (where, values, _) in names.items()}
    found: dict[str, list[float]] = {name: [] for name in names}
    estimates: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, contender in contenders.items():
            rate, estimates[name] = contender.call("rate", names[name][2])
            found[name].append(rate)
    for contender in contenders.values():
        contender.close()
    n = len(estimates["pythae get_nll"])
    rows = [["", "images x samples a second, median (range)", f"-log p(x), the first {n} images"]]
    rows += [[name, middle(v, ",.0f"), " ".join(f"{x:.2f}" for x in estimates[name][:n])] for name, v in found.items()]
    print(table(rows))
    for name in ("vaelab", "vaelab, bfloat16"):
        print(f"ratio {name} / pythae: {middle(ratios(found[name], found['pythae get_nll']))}, asked 8")


def start(rounds: int) -> None:
    """Seconds of `vaelab --help` and to the first step of training; memory of training MNIST."""
    first = (
        "import gc; gc.disable()\n"  # as the command does
        "import os, sys, vaelab.optim as o; step = o.Optimiser.step\n"
        "def stop(self, *a, **k):\n    step(self, *a, **k); os._exit(0)\n"
        "o.Optimiser.step = stop\nfrom vaelab.__main__ import main\n"
        "sys.argv = ['vaelab', 'train', 'mnist', '--out', sys.argv[1]]\nmain()"
    )
    helps, firsts = [], []
    for i in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            helps.append(_seconds([VAELAB, "--help"]))
            firsts.append(_seconds([sys.executable, "-c", first, f"{folder}/{i}"]))
    print(f"vaelab --help: {middle(helps)} s, asked 0.25\nvaelab train to its first step: {middle(firsts)} s, asked 3")
    with tempfile.TemporaryDirectory() as folder:
        _seconds([VAELAB, "train", "mnist", "--epochs", "2", "--out", f"{folder}/run"])
    print(
        f"largest memory of these: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.2f} GiB, asked 1.2"
    )


def _seconds(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


PARTS = {f.__name__: f for f in (training, curves, target, convolution, likelihood, start)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which; all by default")
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement (seeds, for curves and target)")
    arguments = parser.parse_args()
    for name in arguments.parts or PARTS:
        print(f"\n## {name}: {PARTS[name].__doc__}\n", flush=True)
        PARTS[name](arguments.rounds)


if __name__ == "__main__":
    main()
