r"""TreeRL (arXiv 2506.11902): every rollout is branched at the tokens that the policy found least likely.

Rule. Of each of 6 rollouts, the 2 response tokens with the largest -log pi are forked, each into 2 branches. The first
5 % of the response and its last 10 tokens are not forked. The forked token itself is sampled anew.

Advantage. Rollouts and branches form a tree with leaves of reward 0 or 1. A node s is a stretch of tokens between two
forks, n(s) is the number of leaves below it, and V(s) is the share of right leaves among them.

    A(s) = [ (V(s) - V_root) + (V(s) - V(parent of s)) ] / sqrt(n(s))      V_root over all leaves of the question

    J = 1/(tokens of all paths) sum over the paths to all leaves, over their tokens, of
                                                                    rho_t A_t (clipped) - beta k3_t

A token of node s lies on n(s) paths, so it counts n(s) times.

Differs from deep_grpo.py in: line 2 (states of every rollout, not only of failures, by likelihood, not by Q(t)) and
the weights of J (one tree per question instead of two streams; the shared prefix is trained). Left out: more than one
round of expansion.
"""
import math
from dataclasses import replace

from deep_grpo import Fork, Group
from loss import Span


def fork_at(trajectory, pivots):
    """The trajectory with a Fork at each of these pivots, by depth. Its ratio is the share of tokens that it keeps."""
    return replace(trajectory, forks=[Fork(p, p / len(trajectory.response)) for p in sorted(pivots)])


def mean(values):
    """The mean of a list that is not empty. That of equal values is exact, so that differences to it are 0."""
    return values[0] if len(set(values)) == 1 else sum(values) / len(values)


def choose_pivots(policy, questions, groups, config, recoverability, rng) -> list[Group]:
    """Line 2: the 2 least likely tokens of every rollout."""
    logps, _ = policy.score(groups)
    logps = iter(logps)

    def forked(t):
        logp, n = next(logps), len(t.response)
        return fork_at(t, sorted(range(math.ceil(0.05 * n), n - 10), key=lambda i: logp[i].item())[:2])

    return [Group(g.prompt, [forked(t) for t in g.trajectories]) for g in groups]


def weights(groups, config) -> list[Span]:
    """The constants of J above: an advantage per node of the tree, a token mean over all paths."""
    paths = sum(len(t.response) + sum(pivot + len(y) for pivot, y in t.branches)
                for g in groups for t in g.trajectories)
    spans = []
    for g in groups:
        V_root = mean([r for t in g.trajectories for r in (t.reward, *(r for f in t.forks for r in f.rewards))])

        def node(tokens, leaves, V_parent, V_root=V_root):
            V, n = mean(leaves), len(leaves)
            return Span(tokens, (V - V_root + V - V_parent) / math.sqrt(n), n / paths, config.beta * n / paths)

        for t in g.trajectories:
            stem, suffixes, V_parent, start = [], [], V_root, 0              # stem: the nodes of the rollout itself
            for i, fork in enumerate(t.forks):                               # by depth
                leaves = [t.reward, *(r for deeper in t.forks[i:] for r in deeper.rewards)]
                stem.append(node(fork.pivot - start, leaves, V_parent))
                V_parent, start = mean(leaves) if fork.pivot else V_root, fork.pivot     # at 0 the parent is the root
                suffixes += [node(len(y), [r], V_parent) for y, r in zip(fork.branches, fork.rewards)]
            spans += [*stem, node(len(t.response) - start, [t.reward], V_parent), *suffixes]
    return spans
