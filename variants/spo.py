r"""SPO, segment policy optimisation (arXiv 2505.23564): an advantage for every segment of a rollout.

Both methods take V of a state, the chance of a right answer from there, as a mean over samples. A segment has the
advantage by which it changes V. Below, p is the probability with which a token was drawn. One more part of the paper,
the probability mask, composes with every method (`--prob-mask P`); spo_chain and spo_tree have P = .9.

spo_chain. The cut points of a rollout are its tokens with p < .9. A boundary lies just before every fifth of them,
starting with the first. V(boundary) is the mean reward of K = 4 fresh continuations. They are graded and then thrown
away: no branch is trained. The last segment ends with V(end) = R, and the tokens before the first boundary have A = 0.

    A(segment) = V(end) - V(start)        J = 1/N sum_t rho_t A_t (clipped) - beta 1/n sum_t k3_t
                                          over the N tokens of the n rollouts of the batch

spo_tree. Each of G = 6 nodes of level 1 has M tokens and K + 1 = 6 children; each of these has M tokens, too, and 6
children, which run to the end. A node that ends earlier is a leaf.

    V(leaf) = R      V(node) = mean of V over its children      A(node) = V(node) - V(parent)
    J = 1/Z sum_t rho_t A_t (clipped) - beta 1/E sum_t k3_t       over the Z tokens of the E nodes with A != 0

The tree is grown from whole rollouts. This has the same distribution and wastes nothing: the first M tokens of a
rollout are a node of level 1, the next M tokens are the first child of it, and the rest is the first child of that
child. A node trains its own tokens once, although all of its descendants have them in their prefix. The paper also has
the form (V(node) - V(parent)) / s with the population std s of the siblings, which is not built here.

The mask. M_t = [p_t < P] is a factor of all weights, where p_t is the probability with which a token was drawn.
With it, the weights 1/N and 1/Z become 1/(sum of M_t), and the KL term becomes beta 1/n sum_t M_t k3_t. With P = 1,
tokens are still left out whose p is 1 to the last digit of float32; an update hardly moves these.

Differs from deep_grpo.py in: line 2 (states of all rollouts; spo_tree also adds trajectories), and the weights of J.
Left out: the replay of up to 32 nodes of a question in later steps. The authors' code also whitens the advantages over
the masked tokens of a micro-batch, which can turn their signs, and which is not done here. Like their code, and unlike
the paper, we take p from softmax(logits / T), because that is the policy that is sampled and trained. The paper samples
at T = .6, and draws 9 continuations of a boundary with a model of 1.1 billion parameters.
"""
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from deep_grpo import Group, Trajectory, known_logps
from loss import Span, loss_table
from resample import Continuation
from variants.treerl import fork_at, mean

# ---- spo_chain ----


def boundaries(p: Tensor, interval: int = 5) -> list[int]:
    """How many tokens stand before each boundary of a rollout whose tokens were drawn with the probabilities p."""
    return torch.nonzero(p < 0.9).flatten().tolist()[::interval]


def choose_chain_pivots(policy, questions, groups, config, recoverability, rng) -> list[Group]:
    """Line 2 of spo_chain: a Fork at every boundary of every rollout."""
    p = iter(known_logps(groups).exp().split([len(t.response) for g in groups for t in g.trajectories]))
    return [Group(g.prompt, [fork_at(t, boundaries(next(p))) for t in g.trajectories]) for g in groups]


def chain_weights(groups, config) -> list[Span]:
    """The constants of J of spo_chain. Branches have no weight, so they are not computed either."""
    rollouts = [t for g in groups for t in g.trajectories]
    w, w_kl, spans = 1 / sum(len(t.response) for t in rollouts), config.beta / len(rollouts), []
    for t in rollouts:
        starts = [fork.pivot for fork in t.forks]                            # by depth
        values = [mean(fork.rewards) for fork in t.forks] + [t.reward]
        before = starts[0] if starts else len(t.response)
        spans.append(Span(before, 0.0, w, w_kl))
        spans += [Span(end - start, V_end - V, w, w_kl) for start, end, V, V_end in
                  zip(starts, [*starts[1:], len(t.response)], values, values[1:])]
        spans += [Span(len(y), 0.0, 0.0, 0.0) for _, y in t.branches]
    return spans


# ---- spo_tree ----


def joined(response, n: int, suffix) -> Continuation:
    """The first n tokens of a response and then the suffix, with their log-probabilities and entropies."""
    def both(name):
        first, second = getattr(response, name, None), getattr(suffix, name, None)
        return None if first is None or second is None else np.concatenate([first[:n], second])

    return Continuation([*response[:n], *suffix], both("logps"), both("entropies"))


def grow_tree(policy, questions, groups, config, recoverability, rng) -> list[Group]:
    """Line 2 of spo_tree: K more trajectories with the first M tokens of each rollout, and a Fork after 2 M tokens.

    Of a rollout that ends within M tokens there are no more. Line 3 then draws K more leaves from every Fork.
    """
    M = config.segment_tokens
    long = [(q, g, t) for q, g in zip(questions, groups) for t in g.trajectories if len(t.response) > M]
    drawn = policy.sample([g.prompt + t.response[:M] for _, g, t in long], config.branches, config.max_new_tokens - M,
                          [len(t.response) - M for *_, t in long]) if long else []
    drawn = [[joined(t.response, M, y) for y in suffixes] for (*_, t), suffixes in zip(long, drawn)]
    rewards = iter(policy.rewards([(q, y) for (q, *_), responses in zip(long, drawn) for y in responses]))
    drawn = iter(drawn)

    def node(t):
        """The trajectories that share the first M tokens of t."""
        more = next(drawn) if len(t.response) > M else []
        all_of_it = [t, *(Trajectory(y, next(rewards)) for y in more)]
        return [fork_at(t, [2 * M] if len(t.response) > 2 * M else []) for t in all_of_it]

    return [Group(g.prompt, [child for t in g.trajectories for child in node(t)]) for g in groups]


def level_1(trajectories, config) -> list[list[Trajectory]]:
    """The trajectories of a question by their node of level 1, as grow_tree() has put them.

    A node has K + 1 trajectories, or one if it is a leaf. Nodes cannot be told apart by their tokens, because two that
    were drawn independently may have the same ones.
    """
    nodes, rest = [], trajectories
    while rest:
        size = config.branches + 1 if len(rest[0].response) > config.segment_tokens else 1
        nodes, rest = [*nodes, rest[:size]], rest[size:]
    return nodes


def tree_weights(groups, config) -> list[Span]:
    """The constants of J of spo_tree. Of the trajectories of a node, the first one trains the M tokens that they share.

    A difference below 1e-8 is the rounding of a mean, and counts as 0.
    """
    M, parts = config.segment_tokens, []             # parts: (tokens, A, are they trained here?), in the order of J
    for g in groups:
        nodes = level_1(g.trajectories, config)
        V_2 = [[mean([t.reward, *(r for fork in t.forks for r in fork.rewards)]) for t in node] for node in nodes]
        V_1 = [mean(values) for values in V_2]
        V_root = mean(V_1)
        for node, V, children in zip(nodes, V_1, V_2):
            for i, (t, V_t) in enumerate(zip(node, children)):
                n = len(t.response)
                own = [(min(n, M), V - V_root, i == 0), (min(n, 2 * M) - M, V_t - V, True),
                       (n - 2 * M, t.reward - V_t, True)]
                parts += [part for part in own if part[0] > 0]
                parts += [(len(y), r - V_t, True) for fork in t.forks for y, r in zip(fork.branches, fork.rewards)]
    trained = [n for n, A, here in parts if here and abs(A) >= 1e-8]
    Z, E = sum(trained), len(trained)
    return [Span(n, A, 1 / Z, config.beta / E) if here and abs(A) >= 1e-8 else
            Span(n, A if abs(A) >= 1e-8 else 0.0, 0.0, 0.0) for n, A, here in parts]


# ---- the mask, for every method ----


def masked(weights: Callable, P: float, two_streams: bool = False) -> Callable:
    """Another weights(groups, config), in which tokens with p >= P have no weight. P: 0 < P <= 1.

    The w of the other tokens grow by one factor, so that their sum stays what it was. two_streams: J weighs rollouts
    and branches by lambda; each of the two streams then has a factor of its own, and lambda keeps its meaning. w_kl
    does not grow, as in the authors' code. Where no token is left, all weights are 0. The new function raises
    ValueError when the p of a token is not known.
    """
    def of_unsure_tokens(groups, config, **known) -> list[Span]:
        A, w, w_kl, main, _ = loss_table(groups, weights(groups, config, **known)).T
        M = (known_logps(groups).exp() < P).to(w)
        kept = w * M
        for stream in (main, 1 - main) if two_streams else (torch.ones_like(main),):
            factor = (w * stream).sum() / (kept * stream).sum().clamp(min=1e-300)        # nothing is left: 0
            kept = torch.where(stream > 0, kept * factor, kept)
        sequences = [len(y) for g in groups for t in g.trajectories for y in t.sequences]
        number = torch.arange(len(sequences)).repeat_interleave(torch.tensor(sequences))
        rows = torch.stack([number.to(w), A, kept, w_kl * M], 1)
        rows, counts = rows.unique_consecutive(dim=0, return_counts=True)    # runs of tokens with equal constants
        return [Span(n, *row[1:]) for n, row in zip(counts.tolist(), rows.tolist())]

    return of_unsure_tokens
