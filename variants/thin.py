r"""Thinning: only a share S of a step's failures is branched (--branch-share S).

The paper branches every failure, S = 1. Where most groups of branches have equal rewards, as at the beginning of a
run, most branch tokens teach nothing. With --step-tokens, the tokens that are saved go to more questions.

Differs from deep_grpo.py in: line 2, whose groups lose the forks of some rollouts. They are drawn at random. Of n
rollouts with forks, n S keep them on average. T_fail of Eq. (J) are the failures that are branched, so the branches
that are left weigh more. `--method light_branches` removes this effect: its T_fail are all failures, and a branch
weighs what it weighs with S = 1 in the paper's form of J (`--objective paper`). Other methods that branch are thinned
in the same way, except SPO, which needs all of its branches to know the value of a state. With RRPO and SRPO, all
rollouts of a question whose probe loses its fork, the probe among them, are one group. SRPO asks the model about every
probe before, and these answers count as generated.
"""
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from deep_grpo import Group
from loss import Span, paper_weights


def at_random(groups, forked, n, config, rng) -> np.ndarray:
    """An order of `forked`, the (group, rollout) of all rollouts with forks. The first n of it keep theirs."""
    return rng.permutation(len(forked))


def thinned(choose_pivots: Callable, share: float, order: Callable = at_random) -> Callable:
    """Another choose_pivots, which keeps the forks of a share of the rollouts that have any. share: 0 < share <= 1."""
    def choose(policy, questions, groups, config, recoverability, rng) -> list[Group]:
        groups = choose_pivots(policy, questions, groups, config, recoverability, rng)
        forked = [(x, i) for x, g in enumerate(groups) for i, t in enumerate(g.trajectories) if t.forks]
        n = int(len(forked) * share + rng.random())                      # on average len(forked) * share
        kept = {forked[j] for j in order(groups, forked, n, config, rng)[:n]}
        return [Group(g.prompt, [t if (x, i) in kept else replace(t, forks=[]) for i, t in enumerate(g.trajectories)])
                for x, g in enumerate(groups)]

    return choose_pivots if share == 1 else choose


def light_weights(groups, config) -> list[Span]:
    """Eq. (J) with all failures of a question as T_fail, branched or not. With S = 1 it is Eq. (J) of the paper."""
    spans = []
    for g in groups:
        failures = sum(t.reward == 0 for t in g.trajectories)
        branched = sum(bool(t.branches) for t in g.trajectories)
        of_all = replace(config, lam=config.lam * branched / max(1, failures))
        spans += paper_weights([g], of_all)
    return [span._replace(w=span.w / len(groups), w_kl=span.w_kl / len(groups)) for span in spans]
