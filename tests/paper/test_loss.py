"""Eq. (A), (L), (J): values by hand, gradients, and the KL estimator against exact enumeration."""
import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from deep_grpo import Config, Fork, Group, Trajectory
from loss import (
    Span,
    advantages_of,
    authors_weights,
    clipped_surrogate,
    group_advantages,
    k3_kl,
    loss_table,
    paper_weights,
    sequence_weights,
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
    failed = Trajectory([5] * 4, 0.0, [Fork(1, 0.3, [[6] * 2, [6] * 3, [6] * 5], [1.0, 0.0, 0.0])])
    hopeless = Trajectory([5] * 7, 0.0, [Fork(2, 0.4, [[6] * 1, [6] * 2, [6] * 3], [0.0, 0.0, 0.0])])
    return [Group([1, 2], [Trajectory([5] * 10, 1.0), failed, hopeless]),
            Group([1], [Trajectory([5] * 2, 1.0), Trajectory([5] * 3, 1.0), Trajectory([5] * 6, 1.0)])]


LENGTHS = [10, 4, 2, 3, 5, 7, 1, 2, 3, 2, 3, 6]              # of its sequences, a rollout and then its branches


def test_advantages_of_one_group_are_computed_in_fp64():
    assert advantages_of([1.0, 0.0, 0.0]) == pytest.approx(
        [(2 / 3) / (math.sqrt(1 / 3) + 1e-6), *[(-1 / 3) / (math.sqrt(1 / 3) + 1e-6)] * 2], rel=1e-14)
    assert advantages_of([1.0, 0.0, 0.0], normalize=False) == pytest.approx([2 / 3, -1 / 3, -1 / 3], rel=1e-15)
    assert advantages_of([0.1] * 7) == [0.0] * 7


def test_weights_of_the_papers_objective_by_hand():
    spans = sequence_weights(example(), Config(lam=0.5, beta=0.01))
    std3 = math.sqrt((4 / 9 + 1 / 9 + 1 / 9) / 2) + 1e-6           # of rewards 1, 0, 0
    high, low = (2 / 3) / std3, (-1 / 3) / std3
    main, aux = 1 / (2 * 3), 0.5 / (2 * 2 * 3)                     # 1/questions, 1/G; lambda/questions, 1/|T_fail|, 1/K
    expected = [(high, main), (low, main), (high, aux), (low, aux), (low, aux),
                (low, main), (0.0, aux), (0.0, aux), (0.0, aux),   # equal siblings: the KL still acts
                (0.0, main), (0.0, main), (0.0, main)]
    assert len(spans) == len(expected)
    for span, n, (A, w) in zip(spans, LENGTHS, expected):
        assert span == pytest.approx((n, A, w / n, 0.01 * w / n), rel=1e-12)                   # 1/|y|


def test_weights_of_the_authors_code_by_hand():
    spans = sequence_weights(example(), Config(lam=0.5, beta=0.01, objective="authors"))
    t_main, t_branch = 10 + 4 + 7, 2 + 3 + 5                       # only sequences with an advantage count
    main = [1 / t_main, 0.01 / t_main]
    branch = [0.5 / t_branch, 0.01 / t_branch]                     # lambda leaves the KL alone
    nothing = (0.0, 0.0, 0.0)
    expected = [(2 / 3, *main), (-1 / 3, *main), (2 / 3, *branch), (-1 / 3, *branch), (-1 / 3, *branch),
                (-1 / 3, *main), nothing, nothing, nothing, nothing, nothing, nothing]
    assert len(spans) == len(expected)
    for span, n, constants in zip(spans, LENGTHS, expected):
        assert span == pytest.approx((n, *constants), rel=1e-12, abs=0)
    assert spans == authors_weights(example(), Config(lam=0.5, beta=0.01)) != paper_weights(example(), Config())


def test_in_the_authors_form_seven_wrong_of_eight_keep_their_small_advantage():
    """One right of eight has A = -.125 for the others: a threshold of .2 would train on right answers only."""
    rollouts = [Trajectory([5] * 2, 1.0), *(Trajectory([5] * 3, 0.0) for _ in range(6))]
    forked = Trajectory([5] * 4, 0.0, [Fork(1, 0.5, [[6]] * 8, [1.0] * 7 + [0.0])])
    spans = sequence_weights([Group([1], [*rollouts, forked])], Config(objective="authors", lam=0.5, beta=0.1))
    t_main = 2 + 6 * 3 + 4
    assert spans[0] == (2, 0.875, 1 / t_main, 0.1 / t_main)
    assert spans[1:7] == [(3, -0.125, 1 / t_main, 0.1 / t_main)] * 6
    assert spans[7] == (4, -0.125, 1 / t_main, 0.1 / t_main)
    assert spans[8:] == [(1, 0.125, 0.5 / 8, 0.1 / 8)] * 7 + [(1, -0.875, 0.5 / 8, 0.1 / 8)]


@pytest.mark.parametrize("A, kept", [(0.9e-8, False), (1e-8, True), (1.1e-8, True)])
def test_the_authors_threshold_is_1e_8(A, kept):
    """Rewards 0 and 2 A have the advantages -A and A, exactly. What is left out has no part in T either."""
    alive = Group([1], [Trajectory([5] * 4, 1.0), Trajectory([5] * 4, 0.0, [Fork(1, 0.5, [[6]] * 2, [1.0, 0.0])])])
    close = Group([1], [Trajectory([5] * 3, 0.0), Trajectory([5] * 3, 2 * A, [Fork(1, 0.5, [[6]] * 2, [0.0, 2 * A])])])
    spans = sequence_weights([alive, close], Config(objective="authors", beta=0.1))
    T_main, T_branch = (14, 4) if kept else (8, 2)
    main, branch = (1 / T_main, 0.1 / T_main), (1 / T_branch, 0.1 / T_branch)
    assert spans[0] == (4, 0.5, *main) and spans[2] == (1, 0.5, *branch)
    assert spans[4:] == ([(3, -A, *main), (3, A, *main), (1, -A, *branch), (1, A, *branch)] if kept else
                         [(n, 0.0, 0.0, 0.0) for n in (3, 3, 1, 1)])


def test_in_the_authors_form_a_batch_without_any_advantage_has_no_weights():
    groups = [Group([1], [Trajectory([5, 5], 1.0), Trajectory([5], 1.0)])]
    assert authors_weights(groups, Config()) == [(2, 0.0, 0.0, 0.0), (1, 0.0, 0.0, 0.0)]


def test_an_empty_sequence_divides_nothing_by_zero():
    group = Group([1], [Trajectory([], 0.0, [Fork(0, 0.5, [[], [6]], [1.0, 0.0])]), Trajectory([5, 5], 1.0)])
    assert [span.w for span in sequence_weights([group], Config())] == [1 / 2, 1 / 2, 1 / 2, 1 / 4]
    assert loss_table([group], sequence_weights([group], Config()))[:, 3].tolist() == [0.0, 1.0, 1.0]


def test_groups_and_siblings_are_never_mixed():
    groups = example()
    before = sequence_weights(groups, Config())
    groups[0].trajectories[2].forks[0].rewards = [1.0, 1.0, 0.0]   # another pivot, and another question
    groups[1].trajectories[0].reward = 0.0
    after = sequence_weights(groups, Config())
    assert after[:6] == before[:6]                                 # the first two rollouts, and the root of the third
    assert all(a != b for a, b in zip(after[6:], before[6:]))


def test_siblings_are_those_of_one_fork():
    two = Trajectory([5] * 6, 0.0, [Fork(2, 0.3, [[6], [6] * 2], [1.0, 0.0]),
                                    Fork(4, 0.6, [[7] * 3, [7] * 4], [1.0, 1.0])])
    assert two.branches == [(2, [6]), (2, [6] * 2), (4, [7] * 3), (4, [7] * 4)]
    assert Trajectory([5], 0.0, [Fork(0, 0.5)]).branches == Trajectory([5], 1.0).branches == []
    _, *branches = paper_weights([Group([1], [two])], Config(beta=0.0), normalize=False)
    assert [span.A for span in branches] == [0.5, -0.5, 0.0, 0.0]          # not of all four: their mean is 3/4
    # 1/|T_fail| of one failed rollout, 1/4 of its branches, 1/|y|.
    assert [span.w for span in branches] == pytest.approx([1 / (4 * n) for n in (1, 2, 3, 4)], rel=1e-12)
    _, *branches = authors_weights([Group([1], [two])], Config())
    assert branches == [(1, 0.5, 1 / 3, 1e-4 / 3), (2, -0.5, 1 / 3, 1e-4 / 3), (3, 0.0, 0.0, 0.0), (4, 0.0, 0.0, 0.0)]


def test_without_branches_only_the_first_half_is_left():
    groups = [Group(g.prompt, [Trajectory(t.response, t.reward) for t in g.trajectories]) for g in example()]
    full = sequence_weights(example(), Config())
    assert sequence_weights(groups, Config()) == [full[i] for i in (0, 1, 5, 9, 10, 11)]


def test_without_normalize_the_advantages_are_the_differences():
    spans, full = paper_weights(example(), Config(), normalize=False), paper_weights(example(), Config())
    assert [span.A for span in spans] == pytest.approx(
        [2 / 3, -1 / 3, 2 / 3, -1 / 3, -1 / 3, -1 / 3, *[0.0] * 6], rel=1e-12, abs=0)
    assert [(span.tokens, span.w, span.w_kl) for span in spans] == [(span.tokens, span.w, span.w_kl) for span in full]


def test_sequence_weights_need_only_three_settings():
    config = SimpleNamespace(objective="paper", lam=1.0, beta=0.0)
    assert all(span.w_kl == 0 for span in sequence_weights(example(), config))


def test_the_table_of_loss_tokens_by_hand():
    """A row per token with A, w, w_kl, main and log pi_old; a method may have several Spans in one sequence."""
    failed = Trajectory([5] * 3, 0.0, [Fork(1, 0.3, [[6] * 2, [7]], [1.0, 0.0]), Fork(2, 0.6, [[8], []], [0.0, 0.0])])
    groups = [Group([1, 2], [Trajectory([4], 1.0), failed]), Group([3], [Trajectory([9] * 2, 0.0)])]
    spans = [Span(1, 1.5, 0.5, 0.05), Span(2, -1.0, 0.25, 0.02), Span(1, -2.0, 0.125, 0.01),   # of failed: 2 + 1 tokens
             Span(2, 0.5, 0.1, 0.3), Span(1, -0.5, 0.2, 0.4), Span(1, 3.0, 0.7, 0.6), Span(0, 4.0, 9.0, 9.0),
             Span(2, 0.0, 0.8, 0.9)]
    old = [torch.tensor([-0.1], dtype=torch.float64), -torch.arange(1.0, 8.0, dtype=torch.float64),
           torch.tensor([-0.8, -0.9], dtype=torch.float64)]
    expected = [[1.5, 0.5, 0.05, 1.0, -0.1],
                [-1.0, 0.25, 0.02, 1.0, -1.0], [-1.0, 0.25, 0.02, 1.0, -2.0], [-2.0, 0.125, 0.01, 1.0, -3.0],
                [0.5, 0.1, 0.3, 0.0, -4.0], [0.5, 0.1, 0.3, 0.0, -5.0], [-0.5, 0.2, 0.4, 0.0, -6.0],
                [3.0, 0.7, 0.6, 0.0, -7.0],
                [0.0, 0.8, 0.9, 1.0, -0.8], [0.0, 0.8, 0.9, 1.0, -0.9]]
    table = loss_table(groups, spans, old)
    assert table.dtype == torch.float64 and table.tolist() == expected
    assert loss_table(groups, spans).tolist() == [[*row[:4], 0.0] for row in expected]
    with pytest.raises(ValueError, match="spans must cover the 10 loss tokens of the groups, got 8"):
        loss_table(groups, spans[:-1])
