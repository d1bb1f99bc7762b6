"""Randomness: one root seed, and named streams derived from it.

A stream is a name and integers: ``("noise", 17)`` is the noise of step 17. Its seed is a hash of the root seed and those,
so that noise at step s depends on (seed, s) only: evaluating more often, resuming half way or drawing more samples
elsewhere never moves it. Streams in use: ``init`` (weights), ``order`` (of the images, one an epoch), ``noise`` (one a
step: binarisation and posterior samples), ``eval`` (evaluation), ``sample`` (prior samples), ``split``.

Same seed, same machine, same number of threads: same bits.
"""

import hashlib

import torch


def stream_seed(root: int, name: str, *index: int) -> int:
    """The 63-bit seed of a named stream.

    Args:
        root: the root seed of the run.
        name: the stream.
        index: integers inside the stream (an epoch, a step).
    """
    text = ":".join([str(root), name, *map(str, index)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def stream(root: int, name: str, *index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator at the start of a named stream, see `stream_seed`."""
    return torch.Generator(device).manual_seed(stream_seed(root, name, *index))
