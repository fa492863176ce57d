"""DWA: means of epochs or of a sliding window, and the softmax of their ratios."""

from __future__ import annotations

import copy

import pytest
import torch
from training import Training

from igb_kernels import ops
from igb_kernels.losses import DWA

LOSSES = torch.tensor([[1.0, 8.0], [3.0, 4.0], [2.0, 6.0], [0.5, 2.0], [0.1, 9.0], [4.0, 1.0]], dtype=torch.float64)
"""Of six steps."""


def weights(earlier, later, temperature=2.0):
    return len(later) * torch.softmax(later / earlier / temperature, dim=0)


def test_epochs(backend):
    """Ones for two epochs; then the ratio of the last two epochs' means, through the next epoch."""
    training = Training(DWA(), backend, None)
    for result in training.epoch(LOSSES[:2]) + training.epoch(LOSSES[2:3]):
        assert result.scales.tolist() == [1.0, 1.0]
    third = training.epoch(LOSSES[3:5])
    for result in third:
        torch.testing.assert_close(result.scales, weights(LOSSES[:2].mean(0), LOSSES[2]))
    torch.testing.assert_close(training.step(LOSSES[5]).scales, weights(LOSSES[2], LOSSES[3:5].mean(0)))


def test_window(backend):
    """The last `window` steps, this one among them, to the `window` before; ones until there are as many."""
    training = Training(DWA(0.7, window=2), backend, None)
    for step, losses in enumerate(LOSSES):
        scales = training.step(losses).scales
        if step < 3:
            assert scales.tolist() == [1.0, 1.0]
        else:
            earlier, later = LOSSES[step - 3 : step - 1].mean(0), LOSSES[step - 1 : step + 1].mean(0)
            torch.testing.assert_close(scales, weights(earlier, later, 0.7))


def test_a_window_s_first_weights_do_not_depend_on_units(backend):
    """The original's do: the older half holds ones until 2 window steps have passed."""
    found = {}
    for ones in (False, True):
        for factor in (1.0, 1e-3):
            training = Training(DWA(window=3, placeholder_ones=ones), backend, None)
            found[ones, factor] = torch.stack([training.step(factor * losses).scales for losses in LOSSES])
    torch.testing.assert_close(found[False, 1.0], found[False, 1e-3])
    assert float((found[True, 1.0][:5] - found[True, 1e-3][:5]).abs().max()) > 0.1
    torch.testing.assert_close(found[True, 1.0][5], found[False, 1.0][5])  # the window is full


@pytest.mark.parametrize("factors", [(1.0, 1.0), (1e-6, 1e6)])
def test_weights_are_free_of_the_losses_units(backend, factors):
    training = Training(DWA(), backend, None)
    scaled = LOSSES * torch.tensor(factors, dtype=torch.float64)
    for losses in scaled[:2]:
        training.epoch([losses])
    torch.testing.assert_close(training.step(scaled[2]).scales, weights(LOSSES[0], LOSSES[1]))


@pytest.mark.parametrize(
    ("earlier", "later", "ratios"),
    [
        ([0.0, 1.0], [0.0, 2.0], [1.0, 2.0]),
        ([0.0, 1.0], [3.0, 2.0], [1.0, 2.0]),
        ([2.0, 1.0], [0.0, 2.0], [0.0, 2.0]),
        ([-1.0, 1.0], [-2.0, -1.0], [2.0, -1.0]),
    ],
)
def test_means_that_are_not_positive(backend, earlier, later, ratios):
    means = torch.tensor([earlier, later], dtype=torch.float64)
    scales, status = ops.loss_scales("dwa", torch.ones(2, dtype=torch.float64), means, backend=backend)
    torch.testing.assert_close(scales, 2 * torch.softmax(torch.tensor(ratios, dtype=torch.float64) / 2, dim=0))
    assert status == 0


@pytest.mark.parametrize("extreme", [1e-300, 1e300, torch.inf])
@pytest.mark.parametrize("row", [0, 1])
def test_extreme_means_give_finite_weights(backend, row, extreme):
    means = torch.ones(2, 3, dtype=torch.float64)
    means[row, 0] = extreme
    means[1 - row, 1] = extreme
    scales, _ = ops.loss_scales("dwa", torch.ones(3), means, temperature=1e-10, backend=backend)
    assert scales.isfinite().all()
    assert float(scales.sum()) == pytest.approx(3)


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("bad", [[torch.nan, 1.0], [1.0, torch.inf]])
def test_steps_that_cannot_be_used_do_not_count(backend, window, bad):
    found = []
    for spoil in (False, True):
        training = Training(DWA(window=window), backend, None)
        for losses in LOSSES[:2]:
            training.step(losses)
            if spoil:
                assert training.step(bad).scales.isnan().all()
            training.balancer.end_epoch()
            if spoil and window is None:  # nor does an epoch without any other
                training.step(bad)
                training.balancer.end_epoch()
        found.append(training.step(LOSSES[2]).scales)
    assert not torch.equal(found[0], torch.ones(2))
    assert torch.equal(*found)


@pytest.mark.parametrize("window", [None, 2])
def test_state_dict(backend, window):
    """Also in the middle of an epoch, or of a window."""
    first = Training(DWA(window=window), backend, None)
    for step, losses in enumerate(LOSSES[:5]):
        second = Training(DWA(window=window), backend, None)
        second.balancer.load_state_dict(copy.deepcopy(first.balancer.state_dict()))
        found = [training.step(losses).scales for training in (first, second)]
        assert torch.equal(*found)
        if step % 2:
            first.balancer.end_epoch()


def test_everything_stays_in_place(backend):
    """Where the replays of a CUDA graph read it, over the ends of epochs as well; and the host decides nothing."""
    for rule in (DWA(), DWA(window=2)):
        training = Training(rule, backend, None)
        training.epoch(LOSSES[:1])
        before = [t.data_ptr() for t in rule.state_dict().values() if t is not None]
        training.epoch(LOSSES[1:4])
        assert [t.data_ptr() for t in rule.state_dict().values() if t is not None] == before
        assert rule.host_decision() is None


def test_a_state_of_another_window_is_refused(backend):
    states = []
    for window in (None, 2):
        training = Training(DWA(window=window), backend, None)
        training.step(LOSSES[0])
        states.append(training.rule.state_dict())
    for rule, state in ((DWA(window=2), states[0]), (DWA(), states[1]), (DWA(window=3), states[1])):
        with pytest.raises(ValueError, match=r"window is .*, but the state's is"):
            rule.load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"window": 0}, "window"),
        ({"placeholder_ones": True}, "placeholder_ones goes with window"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DWA(**arguments)
