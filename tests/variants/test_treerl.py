"""TreeRL: advantages of its tree by hand, its gradient against all leaf paths one at a time, and where it forks."""
import math
import random

import numpy as np
import pytest
import torch
from conftest import EOS, make_model
from small_policy import Told, choose, make_policy, pivots

import deep_grpo
from deep_grpo import Config, Fork, Group, Trajectory, objective
from packing import attention_length, pack_groups
from variants import METHODS, treerl

BETA = 0.3


# ---- advantages by hand ----

def test_advantages_of_the_example_in_the_paper():
    """Tree A is a prefix with the leaves 0 and 1, tree B is one leaf 1. V_root is 2/3."""
    groups = [Group([3], [Trajectory([5, 6, 7, EOS], 0.0, [Fork(2, 0.5, [[8, EOS]], [1.0])]),
                          Trajectory([9, EOS], 1.0)])]
    spans = treerl.weights(groups, Config(beta=0.5))
    prefix, leaf_0, leaf_1, b = spans
    assert [span.A for span in spans] == pytest.approx([-0.2357, -1.1667, 0.8333, 0.6667], abs=5e-5)
    assert prefix.A == pytest.approx(2 * (1 / 2 - 2 / 3) / math.sqrt(2), rel=1e-12)
    assert [leaf_0.A, leaf_1.A, b.A] == pytest.approx([-7 / 6, 5 / 6, 2 / 3], rel=1e-12)
    assert [span.tokens for span in spans] == [2, 2, 2, 2]
    paths = 4 + 4 + 2                                      # the tokens of three paths; the prefix is in two of them
    assert [span.w for span in spans] == pytest.approx([2 / paths, 1 / paths, 1 / paths, 1 / paths], rel=1e-12)
    assert [span.w_kl for span in spans] == pytest.approx([0.5 * span.w for span in spans], rel=1e-12)


def test_advantages_of_a_rollout_with_two_forks():
    """Leaves: the rollout 0, two branches at the first fork with 1 and 1, one at the second with 0. V_root = 1/2."""
    forks = [Fork(1, 0.2, [[6], [7, 7]], [1.0, 1.0]), Fork(3, 0.6, [[8, 8, 8]], [0.0])]
    spans = treerl.weights([Group([3], [Trajectory([5] * 5, 0.0, forks)])], Config(beta=0.0))
    # Stem: up to the first fork all 4 leaves (V 1/2), up to the second the rollout and its last branch (V 0), the rest.
    assert [span.tokens for span in spans] == [1, 2, 2, 1, 2, 3]
    expected = [0.0, ((0 - 0.5) + (0 - 0.5)) / math.sqrt(2), (0 - 0.5) + (0 - 0), *[(1 - 0.5) + (1 - 0.5)] * 2,
                (0 - 0.5) + (0 - 0)]
    assert [span.A for span in spans] == pytest.approx(expected, rel=1e-12)
    paths = 5 + (1 + 1) + (1 + 2) + (3 + 3)
    assert [span.w for span in spans] == pytest.approx([n / paths for n in (4, 2, 1, 1, 1, 1)], rel=1e-12)


def test_branches_of_the_question_itself_have_it_as_parent():
    """Four draws from one question, two of them right: V_root = 1/2 is also the value of their parent."""
    groups = [Group([3], [Trajectory([5, EOS], 0.0, [Fork(0, 0.0, [[8, EOS], [7, EOS]], [1.0, 0.0])]),
                          Trajectory([9, EOS], 1.0)])]
    stem, *spans = treerl.weights(groups, Config())
    assert stem.tokens == 0
    assert [(span.tokens, span.A) for span in spans] == [(2, -1.0), (2, 1.0), (2, -1.0), (2, 1.0)]


def test_questions_do_not_mix_but_for_the_number_of_paths():
    def question(reward):
        return Group([3], [Trajectory([5, EOS], 0.0), Trajectory([6] * 4, reward)])

    spans = treerl.weights([question(1.0), question(0.0)], Config())
    assert [span.A for span in spans] == [-1.0, 1.0, 0.0, 0.0] and {span.w for span in spans} == {1 / 12}


# ---- the gradient ----

def forest():
    """Two questions: rollouts with two forks, with one at the question itself, with none; and all wrong but one."""
    return [Group([3, 5], [
                Trajectory([6, 7, 8, 9, 6, EOS], 0.0, [Fork(1, 0.2, [[5, EOS], [7, 7, EOS]], [1.0, 0.0]),
                                                       Fork(4, 0.7, [[9, EOS], [8, EOS]], [1.0, 1.0])]),
                Trajectory([9, 2, EOS], 1.0, [Fork(0, 0.0, [[5, 5, EOS], [4, EOS]], [0.0, 0.0])]),
                Trajectory([7, EOS], 1.0)]),
            Group([7], [Trajectory([4, 5, 6, 7], 0.0, [Fork(2, 0.5, [[EOS], [6, 8, EOS]], [0.0, 1.0])]),
                        Trajectory([4, EOS], 0.0)])]


def leaf_paths(trajectory):
    """[(tokens, reward, depth at which it leaves the rollout, or None)] of the paths of one tree."""
    return [(trajectory.response, trajectory.reward, None),
            *((trajectory.response[:fork.pivot] + y, r, fork.pivot)
              for fork in trajectory.forks for y, r in zip(fork.branches, fork.rewards))]


def tree_j(model, ref_model, groups):
    """J of TreeRL from its definition, every leaf path alone, token by token; a node is the set of leaves below."""
    total, tokens = 0.0, 0
    for g in groups:
        rewards = [r for t in g.trajectories for _, r, _ in leaf_paths(t)]
        v_root = sum(rewards) / len(rewards)
        for t in g.trajectories:
            paths = leaf_paths(t)

            def value(leaves, paths=paths):
                return sum(paths[i][1] for i in leaves) / len(leaves)

            for i, (path, _, left_at) in enumerate(paths):
                logits = model(input_ids=torch.tensor([g.prompt + path])).logits[0, len(g.prompt) - 1:-1]
                ref = ref_model(input_ids=torch.tensor([g.prompt + path])).logits[0, len(g.prompt) - 1:-1]
                # The branches below the token at depth d leave the rollout deeper; so does the rollout's own end.
                below = [[i] if left_at is not None and d >= left_at else
                         [j for j, (*_, other) in enumerate(paths) if other is None or other > d]
                         for d in range(len(path))]
                seen = []                            # nodes from the question on, whose own value is V_root
                for d, token in enumerate(path):
                    if not seen or seen[-1] != below[d]:
                        seen.append(below[d])
                    parent = value(seen[-2]) if len(seen) > 1 else v_root
                    advantage = (value(below[d]) - v_root + value(below[d]) - parent) / math.sqrt(len(below[d]))
                    logp, ref_logp = (x[d].log_softmax(-1)[token] for x in (logits, ref))
                    k3 = torch.exp(ref_logp - logp) - (ref_logp - logp) - 1
                    total = total + torch.exp(logp - logp.detach()) * advantage - BETA * k3
                    tokens += 1
    return total / tokens


@pytest.mark.parametrize("a", [1e9, 1e-9])
def test_the_gradient_is_that_of_all_leaf_paths(a, monkeypatch):
    monkeypatch.setattr(deep_grpo, "attention_length", lambda model: a)
    model, ref_model = make_model(), make_model(seed=1).requires_grad_(False)
    (-tree_j(model, ref_model, forest())).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss, metrics = objective(model, forest(), Config(beta=BETA), ref_model, None, 30, backward=True,
                              weights=treerl.weights)
    assert loss.item() == pytest.approx(-tree_j(model, ref_model, forest()).item(), rel=1e-10)
    for name, p in model.named_parameters():
        assert expected[name].abs().max() > 1e-3
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-8, atol=1e-11)
    # Every token has A != 0 but for those of nodes worth what their parent and the question are.
    spans = treerl.weights(forest(), Config())
    assert metrics["trained_tokens"] == sum(span.tokens for span in spans if span.A != 0) > 20


# ---- where it forks ----

def test_it_forks_at_the_least_likely_tokens_of_the_model():
    rng = np.random.default_rng(0)
    policy, responses = make_policy(make_model()), [rng.integers(2, 23, n).tolist() + [EOS] for n in (39, 25, 11, 9)]
    groups = [Group([3, 5], [Trajectory(y, 0.0) for y in responses])]
    chosen = choose(treerl.choose_pivots, policy, groups)
    for before, t in zip(responses, chosen[0].trajectories):
        logits = policy.model(input_ids=torch.tensor([[3, 5] + before])).logits[0, 1:-1].log_softmax(-1)
        surprise = -logits.gather(-1, torch.tensor([before]).T)[:, 0]
        eligible = [i for i in range(len(before)) if i >= 0.05 * len(before) and i < len(before) - 10]
        best = sorted(sorted(eligible, key=lambda i: surprise[i].item(), reverse=True)[:2])
        assert [(fork.pivot, fork.ratio) for fork in t.forks] == [(p, p / len(before)) for p in best]
        assert (t.response, t.reward, t.branches) == (before, 0.0, [])
    assert [len(t.forks) for t in chosen[0].trajectories] == [2, 2, 1, 0]            # 12 tokens leave one place
    assert policy.forwarded == sum(len(row.ids) for row in pack_groups(groups, attention_length(policy.model)))


@pytest.mark.parametrize("n, first, last", [(40, 2, 29), (41, 3, 30), (60, 3, 49), (100, 5, 89)])
def test_the_first_5_percent_and_the_last_10_tokens_are_not_forked(n, first, last):
    """The places at the edges are the least likely in turn; right rollouts are forked as well."""
    for unlikely, expected in (([0, 1, first, last + 1, n - 1], [first]), ([last, last + 1, first - 1], [last]),
                               ([first, last], [first, last])):
        policy, logp = make_policy(kind=Told), torch.full((n,), -0.1)
        logp[unlikely] = torch.tensor([-5.0] * len(unlikely))
        spare = random.Random(n).choice([i for i in range(first + 1, last) if i not in unlikely])
        logp[spare] = -1.0                                 # the second one, where only one of the edges is allowed
        policy.logps = [logp, logp]
        groups = [Group([3], [Trajectory([5] * n, 1.0)]), Group([3], [Trajectory([5] * n, 0.0)])]
        wanted = sorted((expected + [spare])[:2])
        assert pivots(choose(treerl.choose_pivots, policy, groups)) == [[wanted], [wanted]]


def test_forks_are_in_the_order_of_their_depth():
    """The weights walk along the rollout; a fork out of order would give a stem of negative length."""
    before = Trajectory([5] * 8, 0.0)
    assert treerl.fork_at(before, [6, 2]) == Trajectory([5] * 8, 0.0, [Fork(2, 0.25), Fork(6, 0.75)])
    assert before.forks == []


@pytest.mark.parametrize("method", ["treerl", "fr3e"])
def test_equal_rewards_give_no_advantage_whatever_they_are(method):
    """A tenth has no exact sum. Seven rollouts of a tenth would otherwise be trained by what rounding leaves."""
    tree = Trajectory([5] * 4, 0.1, [Fork(2, 0.5, [[6], [7]], [0.1, 0.1])])
    assert sum([0.1] * 21) / 21 != 0.1
    assert {span.A for span in METHODS[method].weights([Group([3], [tree] * 7)], Config())} == {0.0}
