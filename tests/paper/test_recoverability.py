"""Eq. (P): the fit against an independent optimiser, hand-computed minima, and little or odd data."""
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from recoverability import Recoverability, sigmoid


def filled(outcomes, **options):
    estimate = Recoverability(**options)
    for ratio, success in outcomes:
        estimate.observe(ratio, success)
    estimate.fit()
    return estimate


def simulate(n, w=-5.0, b=2.0, seed=0):
    rng = np.random.default_rng(seed)
    return [(r, bool(rng.uniform() < sigmoid(w * r + b))) for r in rng.uniform(size=n)]


def lbfgs_optimum(outcomes, l2):
    """The slow twin: summed BCE + l2/2 w^2 from torch's own loss, minimised by torch's LBFGS."""
    r, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*outcomes))
    w, b = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.LBFGS([w, b], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        bce = torch.nn.functional.binary_cross_entropy_with_logits(w * r + b, y, reduction="sum")
        loss = bce + l2 / 2 * w**2
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.item(), b.item()


@pytest.mark.parametrize("n, l2", [(40, 1.0), (400, 1.0), (400, 0.01), (400, 100.0)])
def test_fit_is_the_optimum_that_lbfgs_finds(n, l2):
    outcomes = simulate(n)
    estimate = filled(outcomes, l2=l2)
    assert (estimate.w, estimate.b) == pytest.approx(lbfgs_optimum(outcomes, l2), abs=1e-6)


def test_the_gradient_vanishes_at_the_fit_after_a_few_newton_steps(monkeypatch):
    # Rounding once made the line search halve every step to nothing, until 100 iterations were used up: 3.7 s
    # for 10,000 outcomes, in each step of training.
    solve, steps = np.linalg.solve, []
    monkeypatch.setattr(np.linalg, "solve", lambda *args: steps.append(1) or solve(*args))
    for seed in range(30):
        rng = np.random.default_rng(seed)
        outcomes = simulate(rng.integers(11, 3000), w=rng.uniform(-8, 2), b=rng.uniform(-3, 3), seed=seed)
        steps.clear()
        estimate = filled(outcomes)
        r, y = np.array(outcomes).T
        error = 1 / (1 + np.exp(-(estimate.w * r + estimate.b))) - y
        assert abs(error.sum()) < 1e-8 and abs(error @ r + estimate.w) < 1e-8
        assert 1 < len(steps) < 20


def test_a_full_newton_step_that_overshoots_is_halved():
    # One success deeper than 100 failures: full steps from the start lead to overflow and w = nan.
    outcomes = [(0.3 * i / 100, False) for i in range(100)] + [(1.0, True)]
    estimate = filled(outcomes, l2=1e-3)
    assert (estimate.w, estimate.b) == pytest.approx(lbfgs_optimum(outcomes, 1e-3), rel=1e-3)


def test_equal_depths_give_the_hand_computed_minimum():
    # With one depth only the intercept explains everything: w = 0 costs nothing, b = logit of the share.
    # A penalised intercept (or one penalised through its mean) would not reach it.
    estimate = filled([(0.5, i < 15) for i in range(20)])
    assert estimate.w == pytest.approx(0, abs=1e-10)
    assert estimate.b == pytest.approx(math.log(3), abs=1e-10)


def test_fit_recovers_the_truth():
    estimate = filled(simulate(10_000))
    assert estimate.w == pytest.approx(-5, abs=0.4) and estimate.b == pytest.approx(2, abs=0.25)   # 4 s.e.


def test_uniform_until_enough_outcomes_of_both_classes():
    few = [(i / 10, i % 2 == 0) for i in range(10)]
    depths = np.array([[0.1, 0.5], [0.7, 0.9]])
    for outcomes in ([], few, [(0.5, True)] * 50, [(0.5, False)] * 50):
        estimate = filled(outcomes)
        assert not estimate.fitted and np.array_equal(estimate.predict(depths), np.ones((2, 2)))
    estimate = filled([*few, (0.95, False)])                     # the 11th: more than min_observations
    assert estimate.fitted and estimate.predict(depths).shape == (2, 2)
    logit = estimate.w * 0.5 + estimate.b
    assert estimate.predict(np.array([0.5]))[0] == pytest.approx(1 / (1 + math.exp(-logit)))


def test_separable_outcomes_stay_finite():
    outcomes = [(0.1, True)] * 50 + [(0.9, False)] * 50
    estimate = filled(outcomes)
    assert (estimate.w, estimate.b) == pytest.approx(lbfgs_optimum(outcomes, 1.0), abs=1e-6)
    assert estimate.w < -1
    assert all(math.isfinite(x) for x in (filled(outcomes, l2=1e-6).w, filled(outcomes, l2=1e-6).b))


def test_nearly_all_of_one_class_converges():
    outcomes = [(0.2 + 0.6 * i / 9999, i == 0) for i in range(10_000)]
    assert (filled(outcomes).w, filled(outcomes).b) == pytest.approx(lbfgs_optimum(outcomes, 1.0), abs=1e-4)


def test_window_forgets_the_oldest_outcomes():
    new = simulate(60, seed=1)
    windowed, fresh = filled(simulate(100) + new, window=60), filled(new)
    assert list(windowed.outcomes) == new and windowed.w == fresh.w


def test_a_fit_is_kept_when_one_class_leaves_the_window():
    estimate = filled(simulate(60), window=60)
    w = estimate.w
    for _ in range(60):
        estimate.observe(0.5, False)
    estimate.fit()
    assert estimate.fitted and estimate.w == w


def test_state_dict_restores_everything():
    for n in (5, 100):                                           # before the first fit, and after it
        a, b = filled(simulate(n), window=100), Recoverability(window=100)
        b.load_state_dict(a.state_dict())
        assert b.fitted == (n == 100)
        for _ in range(2):                                       # at once, and one outcome later
            assert (a.w, a.b, a.fitted, list(a.outcomes)) == (b.w, b.b, b.fitted, list(b.outcomes))
            assert a.predict(np.linspace(0, 1, 11)).tolist() == b.predict(np.linspace(0, 1, 11)).tolist()
            for estimate in (a, b):
                estimate.observe(0.3, True)
                estimate.fit()
        assert len(b.outcomes) <= 100                            # the window holds after loading, too


def test_sigmoid_does_not_overflow():
    assert sigmoid(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("name, call", [
    ("window", lambda: Recoverability(window=0)),
    ("min_observations", lambda: Recoverability(min_observations=-1)),
    ("l2", lambda: Recoverability(l2=0.0)), ("l2", lambda: Recoverability(l2=float("nan"))),
    ("l2", lambda: Recoverability(l2=math.inf)),
    ("ratio", lambda: Recoverability().observe(1.2, True)),
    ("ratio", lambda: Recoverability().observe(-0.1, True)),
    ("ratio", lambda: Recoverability().observe(float("nan"), True))])
def test_bad_arguments_are_named(name, call):
    with pytest.raises(ValueError, match=name):
        call()


def test_demo_prints_estimates_that_approach_the_truth():
    out = subprocess.run([sys.executable, "recoverability.py"], capture_output=True, text=True, check=True,
                         cwd=Path(__file__).parents[2]).stdout
    errors = [abs(float(w) + 6) for w in re.findall(r"w +(-?[\d.]+) \(truth -6\.0\)", out)]
    assert len(errors) == 5 and errors[-1] < 0.3 < errors[0]


def test_the_saved_state_does_not_change_with_later_outcomes():
    estimate = Recoverability()
    estimate.observe(0.5, True)
    state = estimate.state_dict()
    estimate.observe(0.2, False)
    assert state["outcomes"] == [(0.5, True)]                # it is that of then


def test_the_defaults_are_those_of_the_readme():
    estimate = Recoverability()
    assert (estimate.outcomes.maxlen, estimate.min_observations, estimate.l2) == (10_000, 10, 1.0)
