r"""FR3E (arXiv 2507.07017): a right and a wrong rollout are branched where the policy was least certain.

Rule. Of each question with right and wrong rollouts, the first of either kind is forked at its 4 positions of highest
entropy, each into 16 branches. The first position, which is the question, is left out. The token at a fork is sampled
anew. The 16 rollouts are the branches of the question.

Advantage. V_j is the mean reward of the branches of state j of a rollout; state 0 is the question.

    A = R - V_0 for rollouts          A = (R - V_j) exp(-(V_j - V_{j-1})) for the branches of state j

So advantages shrink where the value rises along the rollout, and grow where it falls.

    J = 1/(all tokens) sum_t [ rho_t A_t (clipped) - beta k3_t ]        over rollouts and suffixes

Differs from deep_grpo.py in: line 2, and the weights of J (one token mean, and the factor of the advantages). Left out:
the rejection of questions whose rollouts agree, and a wider upper clip (inert with one update per fresh batch).
"""
import math

from deep_grpo import Group
from loss import Span
from variants.treerl import fork_at, mean


def choose_pivots(policy, questions, groups, config, recoverability, rng) -> list[Group]:
    """Line 2: the 4 positions of highest entropy of the first right and of the first wrong rollout."""
    _, entropies = policy.score(groups)
    entropies, result = iter(entropies), []
    for g in groups:
        right = [t.reward > 0 for t in g.trajectories]
        bases = {right.index(True), right.index(False)} if len(set(right)) == 2 else set()
        result.append(Group(g.prompt, []))
        for i, (t, entropy) in enumerate(zip(g.trajectories, entropies)):
            by_entropy = sorted(range(1, len(t.response)), key=lambda j: -entropy[j].item())
            result[-1].trajectories.append(fork_at(t, by_entropy[:4]) if i in bases else t)
    return result


def weights(groups, config) -> list[Span]:
    """The constants of J above."""
    w = 1 / sum(len(y) for g in groups for t in g.trajectories for y in t.sequences)
    spans = []
    for g in groups:
        V_0 = mean([t.reward for t in g.trajectories])
        for t in g.trajectories:
            spans.append(Span(len(t.response), t.reward - V_0, w, config.beta * w))
            before = V_0
            for fork in t.forks:                                             # by depth
                V = mean(fork.rewards)
                spans += [Span(len(y), (r - V) * math.exp(before - V), w, config.beta * w)
                          for y, r in zip(fork.branches, fork.rewards)]
                before = V
    return spans
