r"""DEEP-GRPO without one of its parts, or with one changed: six methods for `--method`.

    no_std           A = R - mean in both streams, without the division by the standard deviation
    two_pivots       two different states of every failure, drawn from Q(t), with K branches each
    uniform_pivot    every state is as likely as any other, instead of Q(t)
    branch_all       right rollouts are branched, too, and P_phi is fitted to both kinds
    train_prefix     the prefix of a branch carries the loss of its branch, too: no gradient masking
    one_stream       what Eq. (A) forbids: rollouts and branches of a question are one group with one mean

Each differs from deep_grpo.py in one function: line 2 for the pivots, the weights of J for no_std and one_stream, and
the groups that update() is given for train_prefix. no_std and one_stream have the paper's form of J, so they are to be
compared with deep_grpo and `--objective paper`, which gsm8k and the MATH presets do not have. K = 4, lambda, gamma and
the rest are flags and need no code.
"""
from dataclasses import replace

import numpy as np

import deep_grpo
from deep_grpo import Fork, Group, segment_ends
from loss import Span, advantages_of, paper_weights
from pivot import candidate_ratios, draw_pivot, pivot_distribution
from recoverability import Recoverability
from variants.spo import joined


def no_std(groups, config) -> list[Span]:
    """Eq. (J) with A = R - mean."""
    return paper_weights(groups, config, normalize=False)


def two_pivots(policy, questions, groups, config, recoverability, rng) -> list[Group]:
    """Line 2: two states of every failure, drawn one after the other; a response with one state gives that one."""
    def forked(t):
        if t.reward != 0:
            return t
        states = [0, *segment_ends(t.response, config, policy.text)[:-1]]
        ratios = candidate_ratios(len(states))
        q = pivot_distribution(ratios, recoverability.predict(ratios), config.gamma)
        drawn = rng.choice(len(states), size=min(2, np.count_nonzero(q)), replace=False, p=q)
        return replace(t, forks=[Fork(states[i], float(ratios[i])) for i in drawn])

    return [Group(g.prompt, [forked(t) for t in g.trajectories]) for g in groups]


def uniform_pivot(policy, questions, groups, config, recoverability, rng) -> list[Group]:
    """Line 2 with Q(t) the same for all t: gamma = 0, and P = 1 as without any outcome."""
    return deep_grpo.choose_pivots(policy, questions, groups, replace(config, gamma=0.0), Recoverability(), rng)


def branch_all(policy, questions, groups, config, recoverability, rng) -> list[Group]:
    """Line 2 for every rollout, right or wrong."""
    def forked(t):
        ends = segment_ends(t.response, config, policy.text)
        return replace(t, forks=[Fork(*draw_pivot(ends, recoverability, config.gamma, rng))])

    return [Group(g.prompt, [forked(t) for t in g.trajectories]) for g in groups]


def train_prefix(model, optimizer, groups, *args, **options) -> dict:
    """update() with every branch as a whole response: L_aux then runs over prefix and suffix.

    The prefix is computed K + 1 times.
    """
    def unmasked(t):
        forks = [replace(fork, pivot=0, branches=[joined(t.response, fork.pivot, y) for y in fork.branches])
                 for fork in t.forks]
        return replace(t, forks=forks)

    groups = [Group(g.prompt, [unmasked(t) for t in g.trajectories]) for g in groups]
    return deep_grpo.update(model, optimizer, groups, *args, **options)


def one_stream(groups, config) -> list[Span]:
    """A from the rewards of all S = G + |T_fail| K sequences of a question, and weight 1 / (questions S |y|).

    Lambda has no part in it.
    """
    spans = []
    for g in groups:
        sequences = []
        for t in g.trajectories:
            sequences.append((t.response, t.reward))
            sequences += [(y, r) for fork in t.forks for y, r in zip(fork.branches, fork.rewards)]
        advantages = advantages_of([r for _, r in sequences])
        for (y, _), A in zip(sequences, advantages):
            w = 1 / (len(groups) * len(sequences) * max(1, len(y)))
            spans.append(Span(len(y), A, w, config.beta * w))
    return spans
