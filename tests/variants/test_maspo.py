"""MASPO: the soft trust region by its formula, and in the objective and the update instead of the clip."""
import copy
import math

import pytest
import torch
from test_deep_grpo import Given, example

from deep_grpo import Config, Group, Trajectory, objective, update
from loss import Span
from variants.maspo import soft_surrogate


@pytest.mark.parametrize("rho, pi_old, advantage", [
    (1.5, 0.5, 2.0), (1.5, 0.5, -2.0), (0.6, 0.5, 2.0), (0.6, 0.5, -2.0), (1.0, 0.5, 2.0), (3.0, 1e-6, 2.0),
    (3.0, 0.9999, 1.0), (0.2, 1e-6, -3.0)])
def test_maspo_by_its_formula(rho, pi_old, advantage):
    sigma = min(max(pi_old ** -0.3, 1), 10)
    sigma = sigma * (1 + 0.03 * advantage) if advantage > 0 else sigma / (1 - 0.03 * advantage)
    moved = (advantage > 0 and rho > 1) or (advantage < 0 and rho < 1)
    m = math.exp(-(rho - 1) ** 2 / (2 * sigma ** 2)) if moved else 1.0
    old = torch.tensor(math.log(pi_old), dtype=torch.float64)
    logp = (old + math.log(rho)).requires_grad_()
    value = soft_surrogate(logp, old, torch.tensor(advantage, dtype=torch.float64))
    value.backward()
    assert value.item() == pytest.approx(m * rho * advantage, rel=1e-12)
    assert logp.grad.item() == pytest.approx(m * rho * advantage, rel=1e-12)   # no gradient through m
    assert (m < 1) == moved


@pytest.mark.parametrize("advantage, rho, m", [(1.0, 1.5, 0.9708), (-1.0, 0.5, 0.9672)])
def test_maspo_by_values_that_were_computed_elsewhere(advantage, rho, m):
    """With pi_old = .1, where sigma is 2.0551 and 1.9371. The formula above could have the same wrong constant."""
    old = torch.tensor(math.log(0.1), dtype=torch.float64)
    value = soft_surrogate(old + math.log(rho), old, torch.tensor(advantage, dtype=torch.float64))
    assert value.item() / (rho * advantage) == pytest.approx(m, abs=5e-5)


def test_maspo_in_the_objective_replaces_the_clip(model):
    logp, old = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.5])
    groups = [Group([3], [Trajectory([4], 1.0), Trajectory([5], 0.0)])]
    spans = [Span(1, 1.0, 0.5, 0.0), Span(1, -1.0, 0.25, 0.0)]
    rho = math.exp(0.5)

    def value(old, **options):
        loss, metrics = objective(model, groups, Config(beta=0.0), old_logps=old.split(1), ranks=Given(logp, None),
                                  weights=lambda groups, config: spans, **options)
        return -loss.item(), metrics["clip_fraction"]

    assert value(old) == (pytest.approx(0.5 * 1.2 - 0.25 * rho, rel=1e-6), 0.5)
    m = math.exp(-(rho - 1) ** 2 / (2 * (math.exp(0.45) * 1.03) ** 2))
    assert value(old, surrogate=soft_surrogate) == (pytest.approx(0.5 * m * rho - 0.25 * rho, rel=1e-6), 0)   # no clip
    assert value(logp, surrogate=soft_surrogate) == value(logp) == (0.25, 0)   # at rho = 1 it changes nothing


def test_maspo_in_the_update_acts_from_the_second_step_on(model):
    moved = {}
    for updates in (1, 2):
        for soft in (True, False):
            m = copy.deepcopy(model)
            options = {"surrogate": soft_surrogate} if soft else {}
            metrics = update(m, torch.optim.SGD(m.parameters(), lr=0.05), example(), Config(beta=0.0, updates=updates),
                             **options)
            moved[updates, soft] = list(m.parameters()), metrics["clip_fraction"]
    assert all(torch.equal(p, q) for p, q in zip(moved[1, True][0], moved[1, False][0]))
    assert any(not torch.equal(p, q) for p, q in zip(moved[2, True][0], moved[2, False][0]))
    assert moved[2, True][1] == 0 < moved[2, False][1]
