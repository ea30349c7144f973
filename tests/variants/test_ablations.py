"""DEEP-GRPO with one part changed: weights by hand, pivots by their distribution, the prefix by a slow twin."""
import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import EOS
from test_deep_grpo import A, B, Scripted, example, forest, pivots_of, spread, three_sentences, token_terms
from test_loss import LENGTHS
from test_loss import example as lengths_example

import deep_grpo
from deep_grpo import Config, Fork, Group, Trajectory, update
from loss import sequence_weights
from packing import attention_length, pack_groups
from recoverability import Recoverability
from variants import METHODS, ablations

BETA = 0.3


def falling():
    """An estimate by which P falls from nearly 1 to nearly 0 at r = .5."""
    estimate = Recoverability()
    estimate.w, estimate.b, estimate.fitted = -40.0, 20.0, True
    return estimate


def rngs(n):
    return [np.random.default_rng(seed) for seed in range(n)]


def test_every_ablation_changes_one_function_of_deep_grpo():
    ours = METHODS["deep_grpo"]
    for name, changed in [("no_std", "weights"), ("two_pivots", "choose_pivots"), ("uniform_pivot", "choose_pivots"),
                          ("branch_all", "choose_pivots"), ("train_prefix", "update"), ("one_stream", "weights")]:
        method = METHODS[name]
        assert getattr(method, changed) is getattr(ablations, name)
        same = {"settings", "choose_pivots", "weights", "update", "fits_p"} - {changed}
        assert all(getattr(method, part) == getattr(ours, part) for part in same)


# ---- no_std and one_stream ----

def test_without_std_the_advantages_are_the_differences():
    config = Config(lam=0.5, beta=0.01)
    spans, full = ablations.no_std(lengths_example(), config), sequence_weights(lengths_example(), config)
    assert [span.A for span in spans] == pytest.approx(
        [2 / 3, -1 / 3, 2 / 3, -1 / 3, -1 / 3, -1 / 3, *[0.0] * 6], rel=1e-12, abs=0)
    assert [(span.tokens, span.w, span.w_kl) for span in spans] == [(span.tokens, span.w, span.w_kl) for span in full]


def test_one_stream_by_hand():
    spans = ablations.one_stream(lengths_example(), Config(lam=0.5, beta=0.01))
    std = math.sqrt((2 * (7 / 9) ** 2 + 7 * (2 / 9) ** 2) / 8) + 1e-6          # of 9 rewards, two of them 1
    assert len(spans) == 9 + 3
    for span, r, n in zip(spans[:9], [1, 0, 1, 0, 0, 0, 0, 0, 0], LENGTHS):
        w = 1 / (2 * 9 * n)                                                    # lambda has no part in it
        assert span == pytest.approx((n, (r - 2 / 9) / std, w, 0.01 * w), rel=1e-12)
    for span, n in zip(spans[9:], [2, 3, 6]):
        assert span == pytest.approx((n, 0.0, 1 / (2 * 3 * n), 0.01 / (2 * 3 * n)), rel=1e-12)


def test_one_stream_joins_the_branches_of_all_forks():
    failed = Trajectory([5] * 4, 0.0, [Fork(1, 0.3, [[6], [6] * 2], [1.0, 0.0]), Fork(2, 0.6, [[7]], [1.0])])
    spans = ablations.one_stream([Group([1], [failed])], Config(beta=0.0))
    std = math.sqrt(4 * 0.25 / 3) + 1e-6
    assert [span.A for span in spans] == pytest.approx([-0.5 / std, 0.5 / std, -0.5 / std, 0.5 / std], rel=1e-12)
    assert [(span.tokens, span.w) for span in spans] == [(n, 1 / (4 * n)) for n in (4, 1, 2, 1)]


# ---- other pivots ----

def test_branch_all_gives_right_rollouts_a_fork_too():
    groups = three_sentences()
    chosen = ablations.branch_all(Scripted(), [A, B], groups, Config(), Recoverability(), np.random.default_rng(0))
    assert [[len(t.forks) for t in g.trajectories] for g in chosen] == [[1, 1], [1]] and groups == three_sentences()
    assert pivots_of(chosen)[1] == (0, 0.5)                         # a right rollout of one sentence: its question
    deep = [ablations.branch_all(Scripted(), [A, B], groups, Config(gamma=400.0), estimate, rng)
            for estimate, rng in zip([Recoverability(), falling()], rngs(2))]
    assert [pivots_of(g) for g in deep] == [[(4, 0.75), (0, 0.5), (3, 0.666667)]] * 2       # drawn from Q(t)


def test_uniform_pivots_depend_on_neither_depth_nor_recoverability():
    groups, estimate = three_sentences(), falling()
    drawn = [pivots_of(ablations.uniform_pivot(Scripted(), [A, B], groups, Config(), estimate, rng))
             for rng in rngs(300)]
    assert all(len(both) == 2 for both in drawn)                    # the right rollout has none
    counts = Counter(first for first, _ in drawn)
    assert set(counts) == {(0, 0.25), (2, 0.5), (4, 0.75)}
    assert all(75 < n < 125 for n in counts.values())               # 100 each, 8 standard deviation


def two_pivots(groups, rng, estimate=None, **settings):
    """[(pivot, ratio), ...] of the first rollout."""
    estimate = Recoverability() if estimate is None else estimate
    chosen = ablations.two_pivots(Scripted(), [A], groups, Config(**settings), estimate, rng)
    return [(fork.pivot, fork.ratio) for fork in chosen[0].trajectories[0].forks]


def test_two_pivots_are_different_states_drawn_one_after_the_other():
    groups, rng, n = three_sentences(), np.random.default_rng(0), 1500
    states, q = [(0, 0.25), (2, 0.5), (4, 0.75)], np.array([0.25, 0.5, 0.75]) ** 2
    q /= q.sum()
    draws = [two_pivots(groups, rng) for _ in range(n)]
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    expected = np.array([n * q[i] * q[j] / (1 - q[i]) for i, j in pairs])            # without replacement
    counts = np.array([sum(pair == [states[i], states[j]] for pair in draws) for i, j in pairs])
    assert counts.sum() == n and ((counts - expected) ** 2 / expected).sum() < 25.7  # chi-square, 5 dof: p = 1e-4
    assert groups == three_sentences()
    chosen = ablations.two_pivots(Scripted(), [A, B], groups, Config(), Recoverability(), rng)
    assert [[len(t.forks) for t in g.trajectories] for g in chosen] == [[2, 0], [2]]         # failures only


def test_two_pivots_follow_recoverability_and_never_include_an_impossible_state():
    groups, rng = three_sentences(), np.random.default_rng(0)
    assert all({pivot for pivot, _ in two_pivots(groups, rng, falling())} == {0, 2} for _ in range(50))
    assert len(two_pivots(groups, rng, gamma=-2000.0)) == 1                          # Q = 0 in fp64: never drawn
    short = [Group([4], [Trajectory([8, EOS], 0.0)])]
    assert two_pivots(short, rng) == [(0, 0.5)]                                      # all the states that there are


# ---- the unmasked prefix ----

def unmasked_j(model, ref_model, old_model, groups, config):
    """Eq. (J) with L_aux over prefix and suffix, one sequence at a time."""
    total = 0.0
    for g in groups:
        rewards = [t.reward for t in g.trajectories]
        failed = [t for t in g.trajectories if t.reward == 0]
        for t in g.trajectories:
            sequences = [(t.response, (t.reward - sum(rewards) / len(rewards)) / spread(rewards),
                          1 / len(g.trajectories))]
            for fork in t.forks:
                share = config.lam / len(failed) / sum(len(f.branches) for f in t.forks)
                for y, reward in zip(fork.branches, fork.rewards):
                    advantage = (reward - sum(fork.rewards) / len(fork.rewards)) / spread(fork.rewards)
                    sequences.append((t.response[:fork.pivot] + y, advantage, share))
            for y, advantage, share in sequences:
                surrogate, kl = token_terms(model, ref_model, old_model, g.prompt, y, advantage, config)
                total = total + share * (surrogate - config.beta * kl) / len(y)
    return total / len(groups)


@pytest.mark.parametrize("groups", [example, forest])
def test_the_unmasked_prefix_carries_the_loss_of_every_branch(model, ref_model, groups):
    """Two steps on one batch, so that the clip acts in the second. One pivot per failure, and two."""
    config = Config(lam=0.4, beta=BETA, updates=2, max_grad_norm=1e9, clip_low=0.1, clip_high=0.25)
    twin, old_model = copy.deepcopy(model), copy.deepcopy(model)
    masked, before = copy.deepcopy(model), groups()
    metrics = ablations.train_prefix(model, torch.optim.SGD(model.parameters(), lr=0.05), before, config, ref_model,
                                     micro_batch_tokens=60)
    assert before == groups()                                            # the argument is left alone
    for _ in range(2):
        twin.zero_grad()
        loss = -unmasked_j(twin, ref_model, old_model, groups(), config)
        loss.backward()
        with torch.no_grad():
            for p in twin.parameters():
                p -= 0.05 * p.grad
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-8) and metrics["clip_fraction"] > 0
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
    update(masked, torch.optim.SGD(masked.parameters(), lr=0.05), groups(), config, ref_model)
    assert any((p - q).abs().max() > 1e-3 for p, q in zip(masked.parameters(), twin.parameters()))


def test_an_unmasked_prefix_is_computed_once_for_every_branch(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    metrics = ablations.train_prefix(model, optimizer, example(), Config(beta=BETA), copy.deepcopy(model))
    tokens = sum(len(row.ids) for row in pack_groups(example(), attention_length(model)))
    prefixes = 3 * (3 + 0) + 3 * (2 + 1 + 0)                             # pivots of 3, 0 and of 2, 1, 0; K = 3
    assert metrics["forwarded_tokens"] == tokens + prefixes


def test_a_trained_prefix_is_a_smaller_lambda_in_the_authors_form(model):
    """Siblings share the prefix, their advantages sum to 0 and all tokens weigh the same: at rho = 1 the prefix has no
    gradient. What is left is the larger T_branch, which counts prefix tokens."""
    alive = [(len(y), fork.pivot) for g in example() for t in g.trajectories for fork in t.forks
             if len(set(fork.rewards)) > 1 for y in fork.branches]
    smaller = sum(n for n, _ in alive) / sum(n + pivot for n, pivot in alive)
    results = []
    for function, lam in ((ablations.train_prefix, 1.0), (deep_grpo.update, smaller), (deep_grpo.update, 1.0)):
        m = copy.deepcopy(model)
        function(m, torch.optim.SGD(m.parameters(), lr=1.0), example(),
                 Config(beta=0.0, objective="authors", lam=lam, max_grad_norm=1e9))
        results.append([p - q for p, q in zip(m.parameters(), model.parameters())])
    for unmasked, same in zip(*results[:2]):
        torch.testing.assert_close(unmasked, same, rtol=1e-8, atol=1e-11)
    assert any((unmasked - other).abs().max() > 1e-3 for unmasked, _, other in zip(*results)) and smaller < 0.9
