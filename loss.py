r"""Eq. (A), (L), (J): the masked dual-stream objective, as one weighted sum over tokens.   (arXiv 2602.14169)

    (A)  A = (R - mean) / (std + eps)   over the G root rewards of a question, or the K siblings of one pivot
    (L)  L(y) = 1/|y| sum_t [ min(rho_t A, clip(rho_t, 1 - eps_low, 1 + eps_high) A) - beta k3_t ]
         rho_t = pi_theta / pi_old,   k3_t = exp(d) - d - 1,   d = log pi_ref - log pi_theta
    (J)  J = E_x [ 1/G sum_i L_main(tau^i) + lambda 1/|T_fail| sum_{i in T_fail} 1/K sum_k L_aux(tau^{i,k}) ]

L_main runs over a whole response, L_aux over the suffix only: the shared prefix of a branch gets no loss.
All normalisers of (J) are constants of a sequence, so J = sum_t [ policy_t * surrogate_t - kl_t * k3_t ] with
per-token weights that are computed once over the whole batch. How the batch is then cut into micro-batches
cannot change the gradient.

Config.objective = "authors" is the form of the authors' code: A = R - mean, sequences with |A| < 1e-8 left
out (no KL either), sum over surviving main tokens / T_main + lambda * sum over surviving branch tokens /
T_branch, and a KL term that lambda does not touch. Not copied from it: dual clip and clamps (inert with their
one optimizer step per batch) and the rule that drops all branches of a step when fewer than 128 survive.
"""
from typing import NamedTuple

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, normalize: bool = True, eps: float = 1e-6) -> Tensor:
    """Eq. (A): (R - mean) / (std + eps) over the last dimension, unbiased std; without normalize R - mean.

    rewards: [..., G]; returns the same shape. Groups of equal rewards, and groups of one, give exactly 0
    (rounding of the mean would otherwise be blown up by the division).
    """
    if rewards.ndim == 0 or rewards.shape[-1] == 0:
        raise ValueError(f"rewards must be [..., G] with G at least 1, got shape {tuple(rewards.shape)}")
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    equal = (rewards == rewards[..., :1]).all(-1, keepdim=True)
    advantages = rewards - rewards.mean(-1, keepdim=True)
    if normalize and rewards.shape[-1] > 1:
        advantages = advantages / (rewards.std(-1, keepdim=True) + eps)
    return torch.where(equal, torch.zeros_like(advantages), advantages)


def k3_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k3 of Eq. (L), per token: exp(d) - d - 1 with d = ref_logp - logp.

    At least 0; its mean under pi_theta is KL(pi_theta || pi_ref). logp, ref_logp: log-probabilities in nats,
    of one shape, which is returned.
    """
    d = ref_logp - logp
    return torch.expm1(d) - d                        # expm1: exact where the policies agree almost


def clipped_surrogate(logp, old_logp, advantages, clip_low=0.2, clip_high=0.2) -> Tensor:
    """min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) of Eq. (L), per token, to be maximised.

    logp, old_logp: log-probabilities in nats; advantages: broadcastable to them. Returns their shape.
    """
    ratio = torch.exp(logp - old_logp)               # rho
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(ratio * advantages, clipped * advantages)


class SequenceWeights(NamedTuple):
    """What each token of one sequence carries into the objective: policy * surrogate(advantage) - kl * k3."""
    advantage: float
    policy: float
    kl: float


def sequence_weights(groups, config) -> list[list[list[SequenceWeights]]]:
    """The constants of Eq. (J): result[x][i] = [root rollout i of question x, its branch 1, ..., branch K].

    groups: Groups with rewards filled in. config: reads objective, lam, beta. T_fail of a question are its
    trajectories with branches (those with reward 0, when K > 0); without any, there is no auxiliary term.
    """
    authors = config.objective == "authors"

    def advantages(rewards):
        return group_advantages(torch.tensor(rewards, dtype=torch.float64), normalize=not authors).tolist()

    main = [advantages([t.reward for t in g.trajectories]) for g in groups]
    aux = [[advantages(t.branch_rewards) if t.branches else [] for t in g.trajectories] for g in groups]
    if authors:
        def alive(advantage):
            return abs(advantage) >= 1e-8
        everything = [(t, a, a_branch) for g, a_main, a_aux in zip(groups, main, aux)
                      for t, a, a_branch in zip(g.trajectories, a_main, a_aux)]
        t_main = sum(len(t.response) for t, a, _ in everything if alive(a))
        t_branch = sum(len(y) for t, _, a_branch in everything
                       for y, a in zip(t.branches, a_branch) if alive(a))

    weights = []
    for g, a_main, a_aux in zip(groups, main, aux):
        t_fail = sum(bool(t.branches) for t in g.trajectories)                 # |T_fail|
        weights.append([])
        for t, a, a_branch in zip(g.trajectories, a_main, a_aux):
            if authors:
                row = [SequenceWeights(a, 1 / t_main, config.beta / t_main) if alive(a)
                       else SequenceWeights(0.0, 0.0, 0.0)]
                row += [SequenceWeights(b, config.lam / t_branch, config.beta / t_branch) if alive(b)
                        else SequenceWeights(0.0, 0.0, 0.0) for b in a_branch]
            else:
                w = 1 / (len(groups) * len(g.trajectories) * max(1, len(t.response)))
                row = [SequenceWeights(a, w, config.beta * w)]
                for y, b in zip(t.branches, a_branch):
                    w = config.lam / (len(groups) * t_fail * len(t.branches) * max(1, len(y)))
                    row.append(SequenceWeights(b, w, config.beta * w))
            weights[-1].append(row)
    return weights


def weighted_objective(logp, old_logp, ref_logp, advantage, policy, kl,
                       clip_low=0.2, clip_high=0.2) -> Tensor:
    """Eq. (J) with the weights of `sequence_weights`: sum_t [ policy_t * surrogate_t - kl_t * k3_t ].

    All arguments are [tokens]; ref_logp may be None (no KL term). Returns a scalar.
    """
    total = (policy * clipped_surrogate(logp, old_logp, advantage, clip_low, clip_high)).sum()
    if ref_logp is not None:
        total = total - (kl * k3_kl(logp, ref_logp)).sum()
    return total
