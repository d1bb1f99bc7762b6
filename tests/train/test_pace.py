"""How many threads a training's kernels use (`native/pace.py`), with a clock that the tests turn."""

from types import SimpleNamespace

import pytest
import torch

from vaelab.native import pace


@pytest.fixture
def run(monkeypatch):
    """Makes some steps, which take `seconds(threads)`; returns how many threads each had."""
    clock = [0.0]

    def pass_by(seconds):
        clock[0] += seconds

    monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=lambda: clock[0], pass_by=pass_by))
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def steps(paced, count, seconds):
        used = []
        for _ in range(count):
            paced.start()
            used.append(torch.get_num_threads())
            pass_by(seconds(used[-1]))
            paced.step()
        return used

    yield steps
    torch.set_num_threads(before)


def test_two_threads_stay_where_they_are_faster(run):
    paced = pace.Pace(chooses=True)
    used = run(paced, 500, {1: 1.6e-3, 2: 1e-3}.__getitem__)
    assert used[0] == used[-1] == 2
    assert used.count(1) == pace.AWAKE + pace.ENOUGH  # one trial, ended as soon as it was clear


def test_one_thread_is_taken_where_it_is_faster_and_left_when_it_is_not(run):
    paced = pace.Pace(chooses=True)
    assert run(paced, 100, {1: 1e-3, 2: 10e-3}.__getitem__)[-40:] == 40 * [1]
    used = run(paced, 2000, {1: 1e-3, 2: 0.6e-3}.__getitem__)
    assert used[-500:] == 500 * [2]
    paced.restore()
    assert torch.get_num_threads() == 2
    paced.begin()
    assert torch.get_num_threads() == 2


def test_trials_of_long_steps_take_little_of_the_time(run):
    paced = pace.Pace(chooses=True)
    used = run(paced, 2000, {1: 0.020, 2: 0.010}.__getitem__)
    assert used[16:].count(1) * 0.020 < 0.06 * 2000 * 0.010
    nearly = run(pace.Pace(chooses=True), 2000, {1: 0.011, 2: 0.010}.__getitem__)
    assert 16 < nearly.count(1) < 0.08 * 2000


def test_a_step_that_takes_very_long_ends_a_trial(run):
    used = run(pace.Pace(chooses=True), 30, {1: 1.0, 2: 1e-3}.__getitem__)
    assert used.count(1) == pace.AWAKE + 1


def test_a_trial_that_ends_early_is_lost(run):
    """Whatever its first steps took."""
    for times in (3 * [0.9e-3] + [4e-3], 5 * [0.9e-3] + 3 * [1.4e-3]):
        paced, left = pace.Pace(chooses=True), iter(times)
        run(paced, 16 + len(times), lambda threads, left=left: 1e-3 if threads == 2 else next(left))
        assert torch.get_num_threads() == 2


def test_an_evaluation_in_a_trial_is_no_part_of_it(run):
    paced = pace.Pace(chooses=True)
    run(paced, 20, {1: 1.1e-3, 2: 1e-3}.__getitem__)
    pace.time.pass_by(10.0)
    run(paced, 40, {1: 1.1e-3, 2: 1e-3}.__getitem__)
    assert paced.pause == pace.EVERY


def test_nothing_is_tried_where_there_is_no_choice(run):
    assert run(pace.Pace(chooses=False), 100, {1: 1e-3, 2: 1.0}.__getitem__) == 100 * [2]
    torch.set_num_threads(1)
    assert run(pace.Pace(chooses=True), 100, {1: 1.0}.__getitem__) == 100 * [1]


def test_as_many_steps_at_once_as_take_a_fiftieth_of_a_second(run):
    paced = pace.Pace(chooses=False)
    run(paced, pace.WARMING - 1, lambda threads: 1.01e-3)
    assert paced.ahead(16) == 1  # its time is not known yet
    run(paced, 1, lambda threads: 1.01e-3)
    found = []
    for _ in range(6):
        found.append(asked := paced.ahead(16))
        paced.start()
        pace.time.pass_by(asked * 1.01e-3)
        paced.step(asked, asked)
    assert found == [2, 4, 8, 16, 16, 16]
    assert paced.ahead(30) == 19
    paced.start()
    paced.step(3, 16)  # whose fourth is not for the pass to make
    assert paced.ahead(16) == 1
    run(paced, 8, lambda threads: 1.0)
    assert paced.ahead(16) == 1


def test_threads_are_compared_by_single_steps(run):
    paced = pace.Pace(chooses=True)
    two = {1: 1.3e-3, 2: 1e-3}.__getitem__
    run(paced, 40, two)
    assert not paced.trying and paced.ahead(16) > 1
    pace.time.pass_by(paced.pause)
    assert paced.ahead(16) == 1
    paced.start()
    pace.time.pass_by(16e-3)
    paced.step(16, 16)  # asked for before it was due
    assert not paced.times
    assert run(paced, pace.WARMING + pace.TRIED + 1, two)[-1] == 1
