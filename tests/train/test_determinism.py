"""Same recipe, same bits; noise belongs to (seed, step) and to nothing else."""

import torch

from vaelab.data.protocol import Protocol, protocol
from vaelab.meter import Meter
from vaelab.registry import build
from vaelab.training import fit, initial_model

TIMES = ("seconds", "images_per_second")


def timeless(history):
    return [{key: value for key, value in record.items() if key not in TIMES} for record in history]


def test_a_recipe_trains_to_the_same_bits_and_the_same_metrics(trained, same_weights):
    (one, history), (other, again) = trained(), trained()
    assert same_weights(one, other)
    assert timeless(history) == timeless(again)


def test_bfloat16_training_is_reproducible_too(trained, same_weights):
    (one, history), (other, again) = trained(precision="bfloat16"), trained(precision="bfloat16")
    assert same_weights(one, other)
    assert timeless(history) == timeless(again)


def test_the_seed_moves_weights_and_metrics(trained, same_weights):
    (one, history), (other, again) = trained(epochs=1), trained(epochs=1, seed=1)
    assert not same_weights(one, other)
    assert history[0]["train"] != again[0]["train"]


def test_the_seed_moves_noise_and_order_not_only_the_first_weights(digits, small):
    chosen, distortions = small(epochs=1), []
    for seed in (0, 1):
        model = initial_model(chosen)
        records = fit(model, build(chosen.objective), digits, protocol("dynamic"), chosen.training, seed=seed)
        distortions.append(records[0]["train"]["distortion"])
    assert distortions[0] != distortions[1]


def test_the_first_weights_depend_on_the_seed_alone(small, same_weights):
    assert same_weights(initial_model(small()), initial_model(small(lr=0.1, epochs=7)))
    assert not same_weights(initial_model(small()), initial_model(small(seed=1)))


def test_the_global_generator_is_neither_used_nor_moved(trained, same_weights):
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        models.append(trained(epochs=1)[0])
        assert torch.equal(torch.get_rng_state(), before)
    assert same_weights(*models)


def test_showing_progress_at_every_step_changes_nothing(trained, same_weights, monkeypatch):
    """The callback evaluates the model and draws from the global generator; it is called at each step, or never."""
    calls, models = [], []

    def draw(progress):
        calls.append(progress)
        torch.rand(100)

    for due in (True, False):
        monkeypatch.setattr(Meter, "due", lambda self, due=due: due)
        models.append(trained({"on_progress": draw})[0])
    assert same_weights(*models)
    assert len(calls) == 12
    assert [p.step for p in calls] == list(range(1, 13))
    assert (calls[-1].epoch, calls[-1].epochs, calls[-1].steps, calls[-1].seconds_left) == (2, 2, 12, 0)


def test_how_many_epochs_will_follow_changes_nothing_before(trained):
    """With a constant learning rate, the first epoch of three is the first epoch of one."""
    (_, one), (_, three) = trained(epochs=1, schedule="constant"), trained(epochs=3, schedule="constant")
    assert timeless(one)[0] == timeless(three)[0]


def test_each_epoch_sees_every_image_once_in_a_new_order(digits, small):
    class Spy(Protocol):
        def training_batch(self, pixels, generator, index=None):
            seen.append(pixels[index])
            return super().training_batch(pixels, generator, index)

    chosen, seen = small(), []
    spy = Spy("threshold", "binary", False, "")
    fit(initial_model(chosen), build(chosen.objective), digits, spy, chosen.training)
    first, second = (torch.cat(part).flatten(1) for part in (seen[:6], seen[6:]))
    images = torch.from_numpy(digits.train.pixels).flatten(1)
    for epoch in (first, second):
        assert sorted(epoch.tolist()) == sorted(images.tolist())
        assert not torch.equal(epoch, images)
    assert not torch.equal(first, second)
