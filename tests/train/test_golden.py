"""Twenty steps with known results: whatever changes the numbers of training must change these on purpose."""

import pytest

TRAIN = {"rate": 0.3267727, "distortion": 35.474251}
TEST = {"rate": 0.2679475, "distortion": 28.793909}


def test_twenty_steps_on_digits(trained):
    """The constants were measured with torch 2.13.0 on x86-64, in float32, and hold to 1e-3 on other machines."""
    _, history = trained(frequency=1.0, activation="silu", beta=1.0, k=1, optimiser="adam", average=0.0,
                         batch_size=72, epochs=1, lr=1e-2, schedule="constant", clip=0.0)  # fmt: skip
    assert history[0]["step"] == 20
    for part, expected in (("train", TRAIN), ("test", TEST)):
        assert history[0][part] == pytest.approx(expected, rel=1e-3)
