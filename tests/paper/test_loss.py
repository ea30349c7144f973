"""Eq. (A), (L), (J): values by hand, gradients, and the KL estimator against exact enumeration."""
import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from deep_grpo import Config, Group, Trajectory
from loss import (
    branch_groups,
    clipped_surrogate,
    group_advantages,
    k3_kl,
    per_token,
    sequence_weights,
    silence_spurious,
    soft_surrogate,
    weighted_objective,
)


def test_advantages_of_the_paper():
    rewards = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0])
    std = group_advantages(rewards)
    assert std.tolist() == pytest.approx([1.2076] * 3 + [-0.7246] * 5, abs=5e-5)
    mean_only = group_advantages(rewards, normalize=False)
    assert mean_only.tolist() == pytest.approx([0.625] * 3 + [-0.375] * 5, abs=1e-7)
    unbiased, first = math.sqrt(8 * 0.375 * 0.625 / 7), group_advantages(rewards.double())[0].item()
    assert first == pytest.approx(0.625 / (unbiased + 1e-6), rel=1e-12)
    first = group_advantages(rewards.double(), eps=0.5)[0].item()
    assert first == pytest.approx(0.625 / (unbiased + 0.5), rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, 0.7, 1e8 / 3])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 24])
@pytest.mark.parametrize("normalize", [True, False])
def test_equal_rewards_give_exactly_zero(value, size, normalize):
    # 0.7 summed seven times and divided is not 0.7: that noise over std + 1e-6 gave advantages of order .1.
    with warnings.catch_warnings():
        warnings.simplefilter("error")                             # no std of a single reward
        assert torch.equal(group_advantages(torch.full((2, size), value), normalize), torch.zeros(2, size))


def test_groups_are_independent():
    rewards = torch.tensor([[1.0, 0, 0], [1, 1, 1], [0, 1, 0.5]])
    for row, advantages in zip(rewards, group_advantages(rewards)):
        assert torch.equal(advantages, group_advantages(row))
    assert group_advantages(rewards.view(1, 3, 3)).shape == (1, 3, 3)
    beside = group_advantages(torch.stack([torch.full((7,), 0.1), torch.arange(7.0)]))
    assert torch.equal(beside[0], torch.zeros(7))                  # a dead group beside one that is not
    for empty in (torch.tensor(1.0), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match="rewards"):
            group_advantages(empty)


def test_k3_is_the_kl_divergence_from_policy_to_reference_by_enumeration():
    torch.manual_seed(0)
    logp = torch.randn(5, dtype=torch.float64).log_softmax(-1)
    ref = torch.randn(5, dtype=torch.float64).log_softmax(-1)
    exact = (logp.exp() * (logp - ref)).sum()
    expected = (logp.exp() * k3_kl(logp, ref)).sum()                       # E_pi[k3] = KL(pi || ref)
    assert expected.item() == pytest.approx(exact.item(), rel=1e-12)
    assert abs((ref.exp() * (ref - logp)).sum() - exact) > 0.05            # the reversed one differs
    assert (k3_kl(logp, ref) >= 0).all() and k3_kl(ref, ref).abs().max() == 0


def test_k3_gradient_and_small_differences():
    logp = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.5, -1.0, -0.5], dtype=torch.float64)
    k3_kl(logp, ref).sum().backward()
    assert logp.grad.tolist() == pytest.approx([1 - math.exp(-0.5), 1 - math.exp(1.0), 0.0], abs=1e-14)
    close = k3_kl(torch.tensor(-1.0), torch.tensor(-1.0001)).item()        # fp32: d^2/2, no noise
    assert close == pytest.approx(5e-9, rel=2e-3)


@pytest.mark.parametrize("ratio, advantage, value, gradient", [
    (1.0, 2.0, 2.0, 2.0), (1.0, -2.0, -2.0, -2.0),
    (1.5, 2.0, 2.0 * 1.3, 0.0), (1.5, -2.0, -3.0, -3.0),         # too likely: only the good one is held back
    (0.5, 2.0, 1.0, 1.0), (0.5, -2.0, -2.0 * 0.9, 0.0),          # too unlikely: only the bad one is held back
    (1.25, 2.0, 2.5, 2.5), (0.95, -2.0, -1.9, -1.9)])            # inside [1 - .1, 1 + .3]: nothing is
def test_clipped_surrogate(ratio, advantage, value, gradient):
    logp = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
    old_logp = torch.zeros((), dtype=torch.float64)
    result = clipped_surrogate(logp, old_logp, torch.tensor(advantage), clip_low=0.1, clip_high=0.3)
    result.backward()
    assert result.item() == pytest.approx(value, rel=1e-12)
    assert logp.grad.item() == pytest.approx(gradient, rel=1e-12, abs=1e-15)


def example():
    """Two questions: one with two failures (3 branches each, other lengths), one with none."""
    failed = Trajectory([5] * 4, 0.0, 1, [[6] * 2, [6] * 3, [6] * 5], [1.0, 0.0, 0.0])
    hopeless = Trajectory([5] * 7, 0.0, 2, [[6] * 1, [6] * 2, [6] * 3], [0.0, 0.0, 0.0])
    return [Group([1, 2], [Trajectory([5] * 10, 1.0), failed, hopeless]),
            Group([1], [Trajectory([5] * 2, 1.0), Trajectory([5] * 3, 1.0), Trajectory([5] * 6, 1.0)])]


def test_weights_of_the_papers_objective_by_hand():
    config = Config(lam=0.5, beta=0.01)
    first, second = sequence_weights(example(), config)
    std3 = math.sqrt((4 / 9 + 1 / 9 + 1 / 9) / 2) + 1e-6           # of rewards 1, 0, 0
    high, low = (2 / 3) / std3, (-1 / 3) / std3

    def close(got, advantage, weight):
        assert got[1:] == pytest.approx((advantage, weight, 0.01 * weight), rel=1e-12)

    close(first[0][0], high, 1 / (2 * 3 * 10))                     # 1/questions, 1/G, 1/|y|
    close(first[1][0], low, 1 / (2 * 3 * 4))
    close(first[2][0], low, 1 / (2 * 3 * 7))
    for weights, advantage, length in zip(first[1][1:], [high, low, low], [2, 3, 5]):
        close(weights, advantage, 0.5 / (2 * 2 * 3 * length))      # lambda/questions, 1/|T_fail|, 1/K, 1/|y|
    for weights, length in zip(first[2][1:], [1, 2, 3]):
        close(weights, 0.0, 0.5 / (2 * 2 * 3 * length))            # equal siblings: the KL still acts
    for (weights,), length in zip(second, [2, 3, 6]):
        close(weights, 0.0, 1 / (2 * 3 * length))


def test_weights_of_the_authors_code_by_hand():
    first, second = sequence_weights(example(), Config(lam=0.5, beta=0.01, objective="authors"))
    t_main, t_branch = 10 + 4 + 7, 2 + 3 + 5                       # only sequences with an advantage count
    assert first[0][0][1:] == pytest.approx((2 / 3, 1 / t_main, 0.01 / t_main), rel=1e-12)
    assert first[1][0][1:] == pytest.approx((-1 / 3, 1 / t_main, 0.01 / t_main), rel=1e-12)
    assert first[2][0][1:] == pytest.approx((-1 / 3, 1 / t_main, 0.01 / t_main), rel=1e-12)
    # lambda leaves the KL alone
    assert first[1][1][1:] == pytest.approx((2 / 3, 0.5 / t_branch, 0.01 / t_branch), rel=1e-12)
    assert first[1][2][1:] == first[1][3][1:] == pytest.approx((-1 / 3, 0.5 / t_branch, 0.01 / t_branch), rel=1e-12)
    nothing = (0.0, 0.0, 0.0)
    assert {w[1:] for w in first[2][1:]} == {w[1:] for (w,) in second} == {nothing}
    assert [[w.tokens for w in row] for row in first + second] == [[10], [4, 2, 3, 5], [7, 1, 2, 3], [2], [3], [6]]


def test_an_empty_sequence_divides_nothing_by_zero():
    group = Group([1], [Trajectory([], 0.0, 0, [[], [6]], [1.0, 0.0]), Trajectory([5, 5], 1.0)])
    (empty, empty_branch, branch), (full,) = sequence_weights([group], Config())[0]
    assert (empty.policy, empty_branch.policy, branch.policy, full.policy) == (1 / 2, 1 / 2, 1 / 2, 1 / 4)


def test_groups_and_siblings_are_never_mixed():
    groups = example()
    before = sequence_weights(groups, Config())
    groups[0].trajectories[2].branch_rewards = [1.0, 1.0, 0.0]     # another pivot, and another question
    groups[1].trajectories[0].reward = 0.0
    after = sequence_weights(groups, Config())
    assert after[0][:2] == before[0][:2] and after[0][2][0] == before[0][2][0]
    assert after[0][2][1:] != before[0][2][1:] and after[1] != before[1]


def test_without_branches_only_the_first_half_is_left():
    groups = [Group(g.prompt, [Trajectory(t.response, t.reward) for t in g.trajectories]) for g in example()]
    for got, full in zip(sequence_weights(groups, Config()), sequence_weights(example(), Config())):
        assert got == [[row[0]] for row in full]


def test_weighted_objective_by_hand():
    logp = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    old, ref = torch.tensor([-1.0, -2.1, -2.5]), torch.tensor([-1.2, -2.0, -3.3])
    advantage = torch.tensor([1.0, 1.0, -2.0])
    policy, kl = torch.tensor([0.5, 0.25, 0.1]), torch.tensor([0.01, 0.02, 0.03])
    terms = [0.5 * 1.0, 0.25 * math.exp(0.1), 0.1 * -2 * 0.8]      # ratios 1, e^.1, e^-.5 -> clipped at .8
    k3 = [math.exp(-0.2) + 0.2 - 1, 0.0, math.exp(-0.3) + 0.3 - 1]
    result = weighted_objective(logp, old, ref, advantage, policy, kl)
    assert result.item() == pytest.approx(sum(terms) - 0.01 * k3[0] - 0.03 * k3[2], abs=1e-7)
    result.backward()
    assert logp.grad.tolist() == pytest.approx([0.5 - 0.01 * (1 - math.exp(-0.2)), 0.25 * math.exp(0.1),
                                                -0.03 * (1 - math.exp(-0.3))], abs=1e-7)
    without = weighted_objective(logp, old, None, advantage, policy, kl)
    assert without.item() == pytest.approx(sum(terms), abs=1e-7)


def test_sequence_weights_need_only_five_settings():
    config = SimpleNamespace(objective="paper", lam=1.0, beta=0.0, std=True, one_stream=False)
    assert all(w.kl == 0 for group in sequence_weights(example(), config) for row in group for w in row)


# ---- ablations and options ----

def test_without_std_the_advantages_are_the_differences():
    first, _ = sequence_weights(example(), Config(std=False))
    assert [row[0].advantage for row in first] == pytest.approx([2 / 3, -1 / 3, -1 / 3], rel=1e-12)
    assert [w.advantage for w in first[1][1:]] == pytest.approx([2 / 3, -1 / 3, -1 / 3], rel=1e-12)
    assert [[w.policy for w in row] for row in first] == [
        [w.policy for w in row] for row in sequence_weights(example(), Config())[0]]


def test_siblings_are_those_of_one_pivot():
    two = Trajectory([5] * 6, 0.0, [2, 4], [[6], [6] * 2, [6] * 3, [6] * 4], [1.0, 0.0, 1.0, 1.0], [0.3, 0.6])
    assert [(pivot, two.branches[part]) for pivot, part in branch_groups(two)] == [
        (2, [[6], [6] * 2]), (4, [[6] * 3, [6] * 4])]
    assert branch_groups(Trajectory([5], 0.0, 0)) == branch_groups(Trajectory([5], 1.0)) == []
    (_, *branches), = sequence_weights([Group([1], [two])], Config(std=False, beta=0.0))[0]
    assert [w.advantage for w in branches] == [0.5, -0.5, 0.0, 0.0]        # not of all four: their mean is 3/4
    # 1/|T_fail| of one failed rollout, 1/4 of its branches, 1/|y|.
    assert [w.policy for w in branches] == pytest.approx([1 / (4 * n) for n in (1, 2, 3, 4)], rel=1e-12)


def test_one_stream_by_hand():
    first, second = sequence_weights(example(), Config(one_stream=True, lam=0.5, beta=0.01))
    std = math.sqrt((2 * (7 / 9) ** 2 + 7 * (2 / 9) ** 2) / 8) + 1e-6          # of 9 rewards, two of them 1
    rewards, lengths = [[1], [0, 1, 0, 0], [0, 0, 0, 0]], [[10], [4, 2, 3, 5], [7, 1, 2, 3]]
    for row, its_rewards, its_lengths in zip(first, rewards, lengths):
        for w, r, n in zip(row, its_rewards, its_lengths):
            weight = 1 / (2 * 9 * n)                                           # lambda has no part in it
            assert w == pytest.approx((n, (r - 2 / 9) / std, weight, 0.01 * weight), rel=1e-12)
    assert [row[0].policy for row in second] == pytest.approx([1 / (2 * 3 * n) for n in (2, 3, 6)], rel=1e-12)


def test_per_token_spreads_the_weights():
    first, _ = sequence_weights(example(), Config(lam=0.5, beta=0.01))
    spread = per_token(first[1])
    assert spread.shape == (4 + 2 + 3 + 5, 3) and spread.dtype == torch.float64
    assert spread[3].tolist() == list(first[1][0][1:]) and spread[4].tolist() == list(first[1][1][1:])
    assert spread[13].tolist() == list(first[1][3][1:])


def test_stapo_silences_improbable_confident_accidents_of_right_answers():
    def doubles(values):
        return torch.tensor(values, dtype=torch.float64)

    # The probability of the last token is .002, which is not below .002.
    logp = doubles([0.001, 0.5, 0.001, 0.001, 0.001, 0.5, 0.002]).log()
    entropy = doubles([0.1, 0.1, 5.0, 0.2, 0.1, 0.1, 0.1])
    weights = doubles([[1.0, 0.1, 0.01]] * 4 + [[-1.0, 0.2, 0.02]] * 2 + [[2.0, 0.3, 0.03]])
    # Improbable are those with the entropies .1, 5, .2, .1: their 75 % quantile is .2 + .25 * 4.8. Of the three
    # below it the last has A < 0.
    scale = (0.1 * 4 + 0.2 * 2 + 0.3) / (0.1 * 2 + 0.2 * 2 + 0.3)
    factors = silence_spurious(weights, logp, entropy)
    assert factors.tolist() == pytest.approx([0, scale, scale, 0, scale, scale, scale], rel=1e-12)
    assert silence_spurious(weights, torch.zeros(7), entropy).tolist() == [1.0] * 7
    low = silence_spurious(weights, logp, entropy, quantile=0.25)                # .1, and .1 is not below it
    assert low.tolist() == pytest.approx([1.0] * 7, rel=1e-12)
    alone = silence_spurious(weights[:1], logp[:1], entropy[:1], quantile=1.0)
    assert alone.tolist() == [1.0]                                                         # nor is the only one
    assert torch.isfinite(silence_spurious(weights[[0, 2]], logp[[0, 2]], entropy[[0, 2]])).all()


@pytest.mark.parametrize("rho, pi_old, advantage", [
    (1.5, 0.5, 2.0), (1.5, 0.5, -2.0), (0.6, 0.5, 2.0), (0.6, 0.5, -2.0), (1.0, 0.5, 2.0), (3.0, 1e-6, 2.0),
    (3.0, 0.9999, 1.0), (0.2, 1e-6, -3.0)])
def test_maspo_by_its_formula(rho, pi_old, advantage):
    sigma = min(max(pi_old ** -0.3, 1), 10)
    sigma = sigma * (1 + 0.03 * advantage) if advantage > 0 else sigma / (1 - 0.03 * advantage)
    moved = (advantage > 0 and rho > 1) or (advantage < 0 and rho < 1)
    w = math.exp(-(rho - 1) ** 2 / (2 * sigma ** 2)) if moved else 1.0
    old = torch.tensor(math.log(pi_old), dtype=torch.float64)
    logp = (old + math.log(rho)).requires_grad_()
    value = soft_surrogate(logp, old, torch.tensor(advantage, dtype=torch.float64))
    value.backward()
    assert value.item() == pytest.approx(w * rho * advantage, rel=1e-12)
    assert logp.grad.item() == pytest.approx(w * rho * advantage, rel=1e-12)   # no gradient through w
    assert (w < 1) == moved


def test_maspo_in_the_objective_replaces_the_clip():
    logp, old = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.5])
    advantage, policy, kl = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.25]), torch.zeros(2)
    rho = math.exp(0.5)
    clipped = weighted_objective(logp, old, None, advantage, policy, kl)
    assert clipped.item() == pytest.approx(0.5 * 1.2 - 0.25 * rho, rel=1e-6)
    soft = weighted_objective(logp, old, None, advantage, policy, kl, maspo=True)
    w = math.exp(-(rho - 1) ** 2 / (2 * (math.exp(0.45) * 1.03) ** 2))
    assert soft.item() == pytest.approx(0.5 * w * rho - 0.25 * rho, rel=1e-6)
    assert weighted_objective(old, old, None, advantage, policy, kl, maspo=True) == weighted_objective(
        old, old, None, advantage, policy, kl)                                 # inert at rho = 1
