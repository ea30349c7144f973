"""SPO: its advantages by hand, its trees against slow twins, and the mask that composes with every method."""
import math
import re
from collections import Counter
from dataclasses import replace
from statistics import pstdev
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import EOS
from small_policy import choose, make_policy, pivots
from test_deep_grpo import BETA, assert_gradients, example, gradients, token_terms
from test_methods import shorten_the_task
from test_vcpo import rollouts_only

import deep_grpo
import train_gsm8k
from deep_grpo import Config, Fork, Group, Trajectory, known_logps, objective, resample_failures
from loss import loss_table, sequence_weights
from packing import attention_length, pack_groups
from resample import Continuation
from trainer.settings import parse_args
from variants import METHODS, ablations, spo, vcpo
from variants.maspo import soft_surrogate
from variants.spo import boundaries, joined, masked

EXAMPLE = [0.95, 0.5, 0.99, 0.8, 0.97, 0.6, 0.99, 0.7]                 # p of the tokens of a rollout


def drawn(ids, p):
    """Tokens that were drawn with these probabilities; their entropies are the tokens themselves."""
    return Continuation(ids, np.log(p), ids)


def with_probabilities(groups, seed=0, low=0.5):
    """The groups with p of all tokens, each drawn at random between low and 1."""
    rng = np.random.default_rng(seed)

    def seen(y):
        return drawn(y, rng.uniform(low, 0.999, len(y)))

    return [Group(g.prompt, [replace(t, response=seen(t.response),
                                     forks=[replace(f, branches=[seen(y) for y in f.branches]) for f in t.forks])
                             for t in g.trajectories]) for g in groups]


# ---- spo_chain ----

def test_a_segment_has_the_difference_of_its_values():
    """V falls from 2/3 to 1/3. The last segment ends with the reward, and what is before the first one has A = 0."""
    forks = [Fork(1, 0.1, [[6], [7, 7], [8]], [1.0, 1.0, 0.0]), Fork(4, 0.5, [[6], [7], [8]], [0.0, 0.0, 1.0])]
    groups = [Group([3], [Trajectory([5] * 10, 1.0, forks), Trajectory([5] * 6, 1.0)])]
    *spans, second = spo.chain_weights(groups, Config(beta=0.5))
    assert [span.tokens for span in spans] == [1, 3, 6, 1, 2, 1, 1, 1, 1] and second.tokens == 6
    assert [span.A for span in spans] == pytest.approx([0, -1 / 3, 2 / 3] + [0] * 6, rel=1e-12, abs=0)
    assert [(span.w, span.w_kl) for span in spans] == [(1 / 16, 0.5 / 2)] * 3 + [(0, 0)] * 6
    assert second == (6, 0, 1 / 16, 0.5 / 2)                           # a rollout without a boundary


def test_a_boundary_at_the_first_token_is_the_question_itself():
    groups = [Group([3], [Trajectory([5, EOS], 0.0, [Fork(0, 0.0, [[6], [7]], [1.0, 0.0])])])]
    spans = spo.chain_weights(groups, Config())
    assert [(span.tokens, span.A) for span in spans if span.w and span.tokens] == [(2, -0.5)]


def test_a_boundary_lies_just_before_every_fifth_cut_point_from_the_first():
    p = torch.tensor([0.95, 0.5, 0.9] + [0.1] * 10, dtype=torch.float64)         # .9 itself is no cut point
    assert boundaries(p) == [1, 3 + 4, 3 + 9] and boundaries(p, 2) == [1, 4, 6, 8, 10, 12]
    assert boundaries(p[:1]) == [] and boundaries(p[3:4]) == [0]


def test_line_2_puts_a_fork_at_every_boundary_of_every_rollout():
    groups = [Group([3], [Trajectory(drawn([5] * 13, [0.95, 0.5, 0.91] + [0.1] * 10), 1.0),
                          Trajectory(drawn([5] * 3, [0.95, 0.91, 0.92]), 0.0)]),
              Group([4], [Trajectory(drawn([6] * 4, [0.2, 0.95, 0.95, 0.2]), 0.0)])]
    chosen = choose(spo.choose_chain_pivots, make_policy(), groups)
    assert pivots(chosen) == [[[1, 7, 12], []], [[0]]]
    assert [fork.ratio for fork in chosen[0].trajectories[0].forks] == [1 / 13, 7 / 13, 12 / 13]
    assert all(t.forks == [] for g in groups for t in g.trajectories)


def test_the_example_with_an_interval_of_two(model):
    """Boundaries after the tokens 0 and 4, counted from 0; Z = 4; the loss at rho = 1 is -.25."""
    ids = [5, 6, 7, 8, 9, 5, 6, EOS]
    assert boundaries(torch.tensor(EXAMPLE), 2) == [1, 5]
    forks = [Fork(1, 0.125, [drawn([EOS], [0.5])] * 4, [1.0, 1.0, 0.0, 0.0]),
             Fork(5, 0.625, [drawn([EOS], [0.5])] * 4, [1.0, 0.0, 0.0, 0.0])]
    groups = [Group([3], [Trajectory(drawn(ids, EXAMPLE), 1.0, forks)])]
    weights = masked(spo.chain_weights, 0.9)
    A, w, w_kl, main, _ = loss_table(groups, weights(groups, Config(beta=0.5))).T
    assert (A * (w > 0)).tolist() == [0, -0.25, 0, -0.25, 0, 0.75, 0, 0.75] + [0] * 8
    assert w.tolist() == [0, 1 / 4] * 4 + [0] * 8 and w_kl.tolist() == [0, 0.5] * 4 + [0] * 8
    loss, metrics = objective(model, groups, Config(beta=0.0), weights=weights)
    assert loss.item() == pytest.approx(-0.25, rel=1e-12) and metrics["trained_tokens"] == 4


def test_branches_of_a_chain_are_not_computed(model, ref_model):
    groups = with_probabilities(example())
    loss, metrics = objective(model, groups, Config(beta=BETA), ref_model, weights=spo.chain_weights)
    bare = [Group(g.prompt, [replace(t, forks=[]) for t in g.trajectories]) for g in groups]
    assert metrics["forwarded_tokens"] == sum(len(row.ids) for row in pack_groups(bare, attention_length(model)))


# ---- trees, as they are ----

class Node(NamedTuple):
    """A node of a tree: its own tokens, and its children or, of a leaf, its reward."""
    tokens: list
    children: list
    reward: float | None = None


def value(node):
    """V: the reward of a leaf, else the mean over the children."""
    return node.reward if node.reward is not None else sum(map(value, node.children)) / len(node.children)


def edges_below(node, context=()):
    """[(context, tokens, A)] of all nodes below this one, each once."""
    for child in node.children:
        yield context, child.tokens, value(child) - value(node)
        yield from edges_below(child, (*context, *child.tokens))


def random_tree(rng, config, words=(5, 6)):
    """G nodes with M tokens each, or a leaf; K + 1 children of each; K + 1 leaves of each of these."""
    M, K = config.segment_tokens, config.branches

    def tokens(n):
        return rng.choice(words, n).tolist()

    def leaf(most):
        return Node([*tokens(rng.integers(0, most)), EOS], [], float(rng.random() < 0.5))

    def node(level):
        if level == 3:
            return leaf(4)
        if rng.random() < 0.3:
            return leaf(M)                                             # it ends within its M tokens, or just with them
        return Node(tokens(M), [node(level + 1) for _ in range(K + 1)])

    return Node([], [node(1) for _ in range(config.group_size)])


def as_group(prompt, root):
    """The tree as trajectories and forks, as lines 2 and 3 hold it."""
    trajectories = []
    for one in root.children:
        for two in one.children or [None]:
            if two is None:
                trajectories.append(Trajectory(one.tokens, one.reward))
            elif not two.children:
                trajectories.append(Trajectory(one.tokens + two.tokens, two.reward))
            else:
                (first, *others), pivot = two.children, len(one.tokens + two.tokens)
                response = one.tokens + two.tokens + first.tokens
                fork = Fork(pivot, pivot / len(response), [y.tokens for y in others], [y.reward for y in others])
                trajectories.append(Trajectory(response, first.reward, [fork]))
    return Group(prompt, trajectories)


def trained(groups, config):
    """How often each token is trained: {(question, context with the token, A): times}. w and w_kl are checked."""
    table, found, row = loss_table(groups, spo.tree_weights(groups, config)), Counter(), 0
    constants = set(map(tuple, table[:, 1:3].tolist()))
    for x, g in enumerate(groups):
        for t in g.trajectories:
            for pivot, y in [(0, t.response), *t.branches]:
                for i in range(len(y)):
                    if table[row, 1] > 0:
                        found[x, (*t.response[:pivot], *y[:i + 1]), round(table[row, 0].item(), 9)] += 1
                    row += 1
    return found, constants


# ---- spo_tree ----

def test_advantages_of_the_example_of_a_tree():
    """Children worth 2/3, 1 and 0: the root is worth 5/9. The first one has three children, the others end early."""
    config = Config(group_size=3, branches=2, segment_tokens=2, beta=0.5)
    groups = [Group([3], [*(Trajectory([5, 6, 7], r) for r in (1.0, 1.0, 0.0)), Trajectory([5, EOS], 1.0),
                          Trajectory([EOS], 0.0)])]
    spans = spo.tree_weights(groups, config)
    assert [span.tokens for span in spans] == [2, 1] * 3 + [2, 1]
    root = Node([], [Node([5, 6], [Node([7], [], r) for r in (1.0, 1.0, 0.0)]), Node([5, EOS], [], 1.0),
                     Node([EOS], [], 0.0)])
    first = [spans[0].A, spans[6].A, spans[7].A]
    assert value(root) == pytest.approx(5 / 9, rel=1e-12)
    assert first == pytest.approx([0.1111, 0.4444, -0.5556], abs=5e-5)
    assert [span.A for span in spans[1:6:2]] == pytest.approx([1 / 3, 1 / 3, -2 / 3], rel=1e-12)
    std = pstdev([value(child) for child in root.children])            # the other form of the paper
    assert [A / std for A in first] == pytest.approx([0.2673, 1.0690, -1.3363], abs=5e-5)
    tokens = 2 + 3 * 1 + 2 + 1                                         # of six nodes, each once
    kept = [1, 1, 0, 1, 0, 1, 1, 1]
    assert [span.w for span in spans] == pytest.approx([k / tokens for k in kept], rel=1e-12)
    assert [span.w_kl for span in spans] == pytest.approx([0.5 * k / 6 for k in kept], rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_a_tree_trains_every_node_with_an_advantage_once(seed):
    """Against a tree of objects, with words so few that many nodes of level 1 have the same tokens."""
    rng, config = np.random.default_rng(seed), Config(group_size=4, branches=2, segment_tokens=2, beta=0.5)
    roots = [random_tree(rng, config) for _ in range(2)]
    groups = [as_group([3], root) for root in roots]
    expected, lengths = Counter(), []
    for x, root in enumerate(roots):
        for context, tokens, A in edges_below(root):
            if abs(A) > 1e-9:
                lengths.append(len(tokens))
                expected.update((x, (*context, *tokens[:i + 1]), round(A, 9)) for i in range(len(tokens)))
    found, constants = trained(groups, config)
    assert found == expected and len(expected) > 5
    weights = sorted(constants - {(0.0, 0.0)})
    assert weights == [pytest.approx((1 / sum(lengths), 0.5 / len(lengths)), rel=1e-12)]


def test_two_nodes_with_the_same_tokens_are_two_nodes():
    """One has only right children and the other only wrong ones. As one node both would be worth 1/2, and A be 0."""
    config = Config(group_size=3, branches=1, segment_tokens=2, beta=0.0)
    groups = [Group([3], [Trajectory([5, 6, 7], 1.0), Trajectory([5, 6, 7], 1.0), Trajectory([5, EOS], 0.0),
                          Trajectory([5, 6, 7], 0.0), Trajectory([5, 6, 7], 0.0)])]
    assert [len(node) for node in spo.level_1(groups[0].trajectories, config)] == [2, 1, 2]
    spans = spo.tree_weights(groups, config)
    up, down = (2, pytest.approx(2 / 3), 1 / 6), (2, pytest.approx(-1 / 3), 1 / 6)
    assert [span[:3] for span in spans if span.w] == [up, down, down]


def test_rounding_of_a_mean_is_no_advantage():
    """The mean of six times 1/6 is not 1/6 in floating point; the nodes of level 1 have A = 0, and no weight."""
    config = Config(group_size=6, branches=5, segment_tokens=1, beta=0.5)
    groups = [Group([3], [Trajectory([5, EOS], float(i == 0)) for _ in range(6) for i in range(6)])]
    spans = spo.tree_weights(groups, config)
    assert all(span == (1, 0, 0, 0) for span in spans[0::2]) and all(span.w == 1 / 36 for span in spans[1::2])


def test_a_tree_of_one_level_is_grpo_without_std_and_dead_groups(model, ref_model):
    """All rollouts end within M tokens. The authors' form of GRPO has the same token mean of the living groups."""
    groups = [Group(g.prompt, [replace(t, forks=[]) for t in g.trajectories]) for g in example()]
    config = Config(branches=5, segment_tokens=6, max_new_tokens=6, beta=0.0, objective="authors")
    assert choose(spo.grow_tree, make_policy(max_new_tokens=6, segment_tokens=6), groups) == groups
    expected = sequence_weights(groups, config)
    assert spo.tree_weights(groups, config) == [pytest.approx(span, rel=1e-12) for span in expected]
    loss, metrics = objective(model, groups, config, backward=True)
    assert metrics["trained_tokens"] > 10
    wanted = gradients(model)
    model.zero_grad()
    own, _ = objective(model, groups, config, backward=True, weights=spo.tree_weights)
    assert own.item() == pytest.approx(loss.item(), rel=1e-12)
    assert_gradients(model, wanted)


@pytest.mark.parametrize("a", [1e9, 1e-9])
def test_the_gradient_is_that_of_a_list_of_nodes(a, model, ref_model, monkeypatch):
    """Every node with A != 0 is one sample: its tokens after a context without a loss."""
    monkeypatch.setattr(deep_grpo, "attention_length", lambda model: a)
    rng, config = np.random.default_rng(6), Config(group_size=3, branches=1, segment_tokens=2, beta=BETA)
    roots = [random_tree(rng, config, words=(5, 6, 7, 8)) for _ in range(2)]
    samples = [(prompt, context, tokens, A) for prompt, root in zip(([3, 4], [9]), roots)
               for context, tokens, A in edges_below(root) if abs(A) > 1e-9]
    assert len(samples) > 15 and {len(prompt) for prompt, *_ in samples} == {1, 2}
    J, Z = 0.0, sum(len(tokens) for _, _, tokens, _ in samples)
    for prompt, context, tokens, A in samples:
        surrogate, k3 = token_terms(model, ref_model, model, [*prompt, *context], tokens, A, config)
        J = J + surrogate / Z - BETA * k3 / len(samples)
    (-J).backward()
    expected = gradients(model)
    model.zero_grad()
    groups = [as_group(prompt, root) for prompt, root in zip(([3, 4], [9]), roots)]
    loss, metrics = objective(model, groups, config, ref_model, None, 30, backward=True, weights=spo.tree_weights)
    assert loss.item() == pytest.approx(-J.item(), rel=1e-10) and metrics["trained_tokens"] == Z
    assert_gradients(model, expected)


class Counting:
    """A policy whose every token is a new number, drawn with p = 1/(1 + number). It notes what it is asked for."""

    def __init__(self, config, lengths):
        self.config, self.lengths, self.asked, self.number, self.all = config, lengths, [], 2, []

    def sample(self, prefixes, k, caps, expected_tokens=None):
        caps = [caps] * len(prefixes) if isinstance(caps, int) else caps
        self.asked += [(tuple(prefix), k, cap) for prefix, cap in zip(prefixes, caps)]

        def one(cap):
            n = min(cap, next(self.lengths))
            ids = range(self.number, self.number + n)
            self.number += n
            self.all.append(drawn(ids, [1 / (1 + i) for i in ids]))
            return self.all[-1]

        return [[one(cap) for _ in range(k)] for cap in caps]

    def rewards(self, pairs):
        self.graded = [(q.name, *y) for q, y in pairs]
        return [float(sum(y) % 2) for _, y in pairs]


def test_every_token_that_is_drawn_is_trained_in_one_place():
    rng, config = np.random.default_rng(0), Config(group_size=3, branches=2, segment_tokens=4, max_new_tokens=11)
    policy = Counting(config, iter(rng.integers(1, 14, 1000).tolist()))
    questions = [SimpleNamespace(prompt=[0, name], name=name) for name in (0, 1)]
    groups = deep_grpo.roll_out(policy, questions, config)
    rollouts = [t for g in groups for t in g.trajectories]
    assert {len(t.response) for t in rollouts} >= {11} and any(len(t.response) <= 4 for t in rollouts)
    policy.asked.clear()
    grown = choose(spo.grow_tree, policy, groups, questions)
    assert policy.asked == [((*g.prompt, *t.response[:4]), 2, 11 - 4) for g in groups for t in g.trajectories
                            if len(t.response) > 4]
    assert set(policy.graded) == {(q.name, *t.response) for q, g in zip(questions, grown) for t in g.trajectories
                                  if not any(t.response is other.response for other in rollouts)}
    policy.asked.clear()
    full = resample_failures(policy, questions, grown, config)
    assert policy.asked == [((*g.prompt, *t.response[:8]), 2, 11 - 8) for g in grown for t in g.trajectories
                            if len(t.response) > 8] and len(policy.asked) > 3
    assert [[t.response for t in g.trajectories if any(t.response is r.response for r in rollouts)] for g in full] == [
        [t.response for t in g.trajectories] for g in groups]
    assert all(len(t.response) <= 11 and t.reward == sum(t.response) % 2 for g in full for t in g.trajectories)

    # Each response knows what the policy thought of it, whatever it is joined of.
    for y in (y for g in full for t in g.trajectories for y in (t.response, *(y for _, y in t.branches))):
        assert y.entropies.tolist() == y and np.allclose(y.logps, -np.log1p(y))
    # An advantage for every part makes every token of the tree one with a weight.
    for number, t in enumerate(t for g in full for t in g.trajectories):
        t.reward = math.pi ** -number
    found, constants = trained(full, config)
    places = Counter(context[-1] for _, context, _ in found.elements())
    assert places == Counter(token for y in policy.all for token in y) and len(constants - {(0.0, 0.0)}) == 1


def test_nothing_is_drawn_where_all_rollouts_end_early():
    groups = [Group([3], [Trajectory([5, EOS], 1.0), Trajectory([EOS], 0.0)])]
    assert choose(spo.grow_tree, make_policy(segment_tokens=2), groups) == groups


def test_what_is_joined_of_tokens_without_probabilities_has_none():
    assert joined([5, 6], 1, [7]) == [5, 7] and joined([5, 6], 1, drawn([7], [0.5])).logps is None
    assert joined(drawn([5, 6], [0.5, 0.5]), 1, [7]).logps is None


# ---- the mask ----

FORMS = [("grpo", {}), ("grpo", {"objective": "authors"}), ("deep_grpo", {}), ("deep_grpo", {"objective": "authors"}),
         ("treerl", {}), ("one_stream", {})]


@pytest.mark.parametrize("method, settings", FORMS)
def test_a_masked_loss_is_that_of_a_loop_over_tokens(method, settings, model, ref_model):
    P, config = 0.8, Config(beta=BETA, lam=0.3, **settings)
    groups, weights = with_probabilities(example()), METHODS[method].weights
    if method == "grpo":
        groups = [Group(g.prompt, [replace(t, forks=[]) for t in g.trajectories]) for g in groups]
    table, tokens = loss_table(groups, weights(groups, config)).tolist(), []
    for g in groups:
        for t in g.trajectories:
            for k, (pivot, y) in enumerate([(0, t.response), *t.branches]):
                stream = "branch" if k and METHODS[method].two_streams else "main"
                for i, token in enumerate(y):
                    A, w, w_kl, *_ = table[len(tokens)]
                    context = g.prompt + t.response[:pivot] + y[:i]
                    tokens.append((context, token, math.exp(y.logps[i]), stream, A, w, w_kl))
    total, left = Counter(), Counter()
    for _, _, p, stream, _, w, _ in tokens:
        total[stream] += w
        left[stream] += w * (p < P)
    assert all(0.1 < left[stream] / total[stream] < 0.9 for stream in total)
    J = 0.0
    for context, token, p, stream, A, w, w_kl in tokens:
        if p < P:
            surrogate, k3 = token_terms(model, ref_model, model, context, [token], A, config)
            J = J + w * total[stream] / left[stream] * surrogate - w_kl * k3
    (-J).backward()
    expected = gradients(model)
    model.zero_grad()
    loss, metrics = objective(model, groups, config, ref_model, None, 30, backward=True,
                              weights=masked(weights, P, METHODS[method].two_streams))
    assert loss.item() == pytest.approx(-J.item(), rel=1e-9)
    assert_gradients(model, expected)
    assert metrics["trained_tokens"] == sum(p < P and A != 0 and w != 0 for _, _, p, _, A, w, _ in tokens)


def test_a_token_mean_becomes_the_mean_over_the_tokens_that_are_left():
    groups = [Group([3], [Trajectory(drawn([5] * 8, EXAMPLE), 1.0), Trajectory(drawn([6] * 2, [0.95, 0.1]), 0.0)])]
    A, w, w_kl, *_ = loss_table(groups, masked(spo.chain_weights, 0.7)(groups, Config(beta=0.5))).T
    left = [0, 1, 0, 0, 0, 1, 0, 0, 0, 1]                              # p = .7 itself is not below .7
    assert w.tolist() == pytest.approx([x / 3 for x in left], rel=1e-12)
    assert w_kl.tolist() == pytest.approx([0.5 / 2 * x for x in left], rel=1e-12)


@pytest.mark.parametrize("two_streams", [False, True])
def test_a_mask_of_one_changes_nothing_and_one_of_nothing_leaves_nothing(two_streams, model):
    groups, config = with_probabilities(example()), Config(beta=BETA, lam=0.3)
    before = loss_table(groups, sequence_weights(groups, config))
    spans = masked(sequence_weights, 1.0, two_streams)(groups, config)
    assert torch.equal(loss_table(groups, spans), before)
    ends = set(np.cumsum([span.tokens for span in spans]).tolist())    # no span crosses the border of two sequences
    assert set(np.cumsum([len(y) for g in groups for t in g.trajectories
                          for y in (t.response, *(y for _, y in t.branches))]).tolist()) <= ends
    nothing = loss_table(groups, masked(sequence_weights, 0.4, two_streams)(groups, config))
    assert torch.equal(nothing[:, [0, 3]], before[:, [0, 3]]) and not nothing[:, 1:3].any()
    loss, metrics = objective(model, groups, config, weights=masked(sequence_weights, 0.4, two_streams))
    assert loss == 0 and metrics["trained_tokens"] == metrics["forwarded_tokens"] == 0


def test_the_streams_keep_their_weights_where_lambda_weighs_them():
    """Branches are unlikelier here. With one factor for all tokens, their share of the weight would grow."""
    groups, config = with_probabilities(example(), low=0.7), Config(lam=0.3)
    for y in (y for g in groups for t in g.trajectories for _, y in t.branches):
        y.logps[:] = math.log(0.5)
    sums = []
    for weights in (sequence_weights, masked(sequence_weights, 0.8, True), masked(sequence_weights, 0.8)):
        _, w, _, main, _ = loss_table(groups, weights(groups, config)).T
        sums.append(((w * main).sum().item(), (w * (1 - main)).sum().item()))
    assert sums[1] == pytest.approx(sums[0], rel=1e-12)
    assert sum(sums[2]) == pytest.approx(sum(sums[0]), rel=1e-12) and sums[2][1] > 1.2 * sums[0][1]


def test_what_an_update_knows_of_its_weights_gets_through_the_mask():
    """VCPO has ratios and norms. They are those of the weights without a mask, times one factor for all of them."""
    groups, config = with_probabilities(rollouts_only()), Config(beta=BETA)
    known = dict(log_w=torch.linspace(-1, 1, 9, dtype=torch.float64), squared_norms=torch.arange(1.0, 10).double())
    plain = loss_table(groups, vcpo.weights(groups, config, **known))
    kept = known_logps(groups).exp() < 0.8
    assert 0 < kept.sum() < len(kept)
    got = loss_table(groups, masked(vcpo.weights, 0.8)(groups, config, **known))
    torch.testing.assert_close(got[:, 0], plain[:, 0], rtol=1e-12, atol=0)
    w = plain[:, 1] * kept
    torch.testing.assert_close(got[:, 1], w * plain[:, 1].sum() / w.sum(), rtol=1e-12, atol=0)


def test_a_mask_of_one_leaves_out_tokens_that_are_certain_to_the_last_digit():
    groups = with_probabilities(rollouts_only())
    groups[0].trajectories[0].response.logps[:2] = 0.0
    w = loss_table(groups, masked(sequence_weights, 1.0)(groups, Config()))[:, 1]
    assert not w[:2].any() and (w[2:] > 0).all()


def test_tokens_with_unknown_probabilities_are_refused():
    groups = with_probabilities(example())
    groups[1].trajectories[0].response = [5, EOS]
    with pytest.raises(ValueError, match="2 of 65 are not known"):
        masked(sequence_weights, 0.9)(groups, Config())
    with pytest.raises(ValueError, match="65 of 65 are not known"):
        choose(spo.choose_chain_pivots, make_policy(), example())


def test_a_trained_prefix_is_masked_by_its_own_probabilities(monkeypatch):
    """train_prefix makes whole responses of the branches. They keep what the policy thought of both parts."""
    groups, given = with_probabilities(example()), []
    monkeypatch.setattr(deep_grpo, "update", lambda model, optimizer, groups: given.extend(groups))
    ablations.train_prefix(None, None, groups)
    pairs = [(t, fork, whole) for g, new in zip(groups, given) for t, t_new in zip(g.trajectories, new.trajectories)
             for fork, whole in zip(t.forks, t_new.forks)]
    assert len(pairs) == 5
    for t, fork, whole in pairs:
        for y, long in zip(fork.branches, whole.branches):
            assert long == t.response[:fork.pivot] + y
            assert long.logps.tolist() == [*t.response.logps[:fork.pivot].tolist(), *y.logps.tolist()]


@pytest.mark.parametrize("value", ["0", "-0.5", "1.01", "nan", "x"])
def test_an_impossible_mask_is_refused_in_one_line(value, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_args(["--preset", "tiny", "--prob-mask", value])
    error, = capsys.readouterr().err.splitlines()
    assert re.search("argument --prob-mask: (must be above 0 and at most 1|invalid float value)", error)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_mask_and_its_default(method):
    asked = ["--preset", "tiny", "--method", method]
    assert parse_args(asked).prob_mask == (0.9 if method.startswith("spo") else None)
    assert parse_args([*asked, "--prob-mask", "0.5", "--stapo", "--maspo"]).prob_mask == 0.5


@pytest.mark.parametrize("flags", ["--method deep_grpo --maspo --branch-share .5", "--method train_prefix --stapo",
                                   "--method grpo"])
def test_the_training_script_passes_the_mask_on(flags, tmp_path, monkeypatch):
    """The update gets the masked weights, with a factor for each stream where lambda weighs them; and --maspo, --stapo.
    """
    name, given = flags.split()[1], []
    shorten_the_task(monkeypatch)

    def update(model, optimizer, groups, config, ref_model, **options):
        given.append((groups, config, options["weights"], options.get("surrogate"), options.get("reweigh")))
        return row.update(model, optimizer, groups, config, ref_model, **options)

    row = METHODS[name]
    monkeypatch.setitem(train_gsm8k.METHODS, name, replace(row, update=update))
    small = "--preset tiny --questions 2 --group-size 4 --eval-every 0 --temperature 1.8 --max-new-tokens 32"
    branches = [] if name == "grpo" else ["--branches", "2"]
    run = train_gsm8k.prepare(parse_args([*small.split(), *flags.split(), *branches, "--prob-mask", "0.6", "--out",
                                          str(tmp_path / "run")]))
    metrics, *_ = train_gsm8k.train_step(run)
    (groups, config, weights, surrogate, reweigh), = given
    expected = masked(row.weights, 0.6, name in ("deep_grpo", "train_prefix"))(groups, config)
    assert weights(groups, config) == expected != row.weights(groups, config)
    assert (surrogate is soft_surrogate) == ("--maspo" in flags) and (reweigh is not None) == ("--stapo" in flags)
    assert math.isfinite(metrics["loss"]) and (metrics["pivots"] > 0) == bool(branches)
