r"""Eq. (A), (L), (J): the masked dual-stream objective, as one weighted sum over tokens.   (arXiv 2602.14169)

    (A)  A = (R - mean) / (std + eps)   over the G root rewards of a question, or the K siblings of one pivot
    (L)  L(y) = 1/|y| sum_t [ min(rho_t A, clip(rho_t, 1 - eps_low, 1 + eps_high) A) - beta k3_t ]
         rho_t = pi_theta / pi_old,   k3_t = exp(d) - d - 1,   d = log pi_ref - log pi_theta
    (J)  J = E_x [ 1/G sum_i L_main(tau^i) + lambda 1/|T_fail| sum_{i in T_fail} 1/K sum_k L_aux(tau^{i,k}) ]

L_main runs over a whole response, L_aux over the suffix only: the shared prefix of a branch gets no loss.
All normalisers of (J) are constants of a sequence, so J = sum_t [ policy_t * surrogate_t - kl_t * k3_t ] with
per-token weights that are computed once over the whole batch. How the batch is then cut into micro-batches
cannot change the gradient. The compared methods (baselines.py) are other weights in the same sum.

Config.objective = "authors" is the form of the authors' code: A = R - mean, sequences with |A| < 1e-8 left
out (no KL either), sum over surviving main tokens / T_main + lambda * sum over surviving branch tokens /
T_branch, and a KL term that lambda does not touch. Not copied from it: dual clip and the clamp of log rho (inert
with their one optimizer step per batch), k3 cut at 10 (where a token is 14 times likelier under the reference) and
the rule that drops all branches of a step when fewer than 128 survive.

Two options that compose with every method: STAPO, which leaves out spurious tokens (`silence_spurious`), and
MASPO, which replaces the clip (`soft_surrogate`).
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


def advantages_of(rewards: list[float], normalize: bool = True) -> list[float]:
    """Eq. (A) of one group, in fp64."""
    return group_advantages(torch.tensor(rewards, dtype=torch.float64), normalize).tolist()


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


def soft_surrogate(logp, old_logp, advantages) -> Tensor:
    """MASPO (arXiv 2602.17550) instead of the clip, per token: w rho A, w without gradient. Shapes as above.

    w = exp(-(rho - 1)^2 / (2 sigma^2)) where the policy has moved the way A wants (A > 0, rho > 1, or A < 0,
    rho < 1), and 1 elsewhere; sigma = clamp(pi_old^-0.3, 1, 10), wider for unlikely tokens, times 1 + 0.03 A for
    A > 0 and 1 / (1 - 0.03 A) for A < 0. At rho = 1, with one update per batch, it changes nothing.
    """
    ratio = torch.exp(logp - old_logp)               # rho
    with torch.no_grad():
        trust = torch.where(advantages > 0, 1 + 0.03 * advantages, 1 / (1 - 0.03 * advantages.clamp(max=0)))
        sigma = torch.exp(-0.3 * old_logp).clamp(1, 10) * trust
        moved = (ratio - 1) * advantages > 0
        soft = torch.where(moved, torch.exp(-(ratio - 1) ** 2 / (2 * sigma ** 2)), torch.ones_like(ratio))
    return soft * ratio * advantages


class Weights(NamedTuple):
    """What each of the next tokens carries into the objective: policy * surrogate(advantage) - kl * k3."""
    tokens: int
    advantage: float
    policy: float
    kl: float


def branch_groups(trajectory) -> list[tuple[int, slice]]:
    """(pivot, its branches) of every pivot of a trajectory: siblings are those of one pivot, K in a row."""
    if not trajectory.branches:
        return []
    k = len(trajectory.branches) // len(trajectory.pivots)
    return [(pivot, slice(i * k, (i + 1) * k)) for i, pivot in enumerate(trajectory.pivots)]


def sequence_weights(groups, config) -> list[list[list[Weights]]]:
    """The constants of Eq. (J): result[x][i] = [root rollout i of question x, its branch 1, ..., branch K].

    groups: Groups with rewards filled in. config: reads objective, std, one_stream, lam, beta. T_fail of a question
    are its trajectories with branches (K > 0: those with reward 0); without any, there is no auxiliary term.
    """
    if config.one_stream:
        return one_stream_weights(groups, config)
    authors = config.objective == "authors"
    normalize = config.std and not authors
    main = [advantages_of([t.reward for t in g.trajectories], normalize) for g in groups]
    aux = [[[a for _, part in branch_groups(t) for a in advantages_of(t.branch_rewards[part], normalize)]
            for t in g.trajectories] for g in groups]
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
            n = len(t.response)
            if authors:
                row = [Weights(n, a, 1 / t_main, config.beta / t_main) if alive(a) else Weights(n, 0.0, 0.0, 0.0)]
                row += [Weights(len(y), b, config.lam / t_branch, config.beta / t_branch) if alive(b)
                        else Weights(len(y), 0.0, 0.0, 0.0) for y, b in zip(t.branches, a_branch)]
            else:
                w = 1 / (len(groups) * len(g.trajectories) * max(1, n))
                row = [Weights(n, a, w, config.beta * w)]
                for y, b in zip(t.branches, a_branch):
                    w = config.lam / (len(groups) * t_fail * len(t.branches) * max(1, len(y)))
                    row.append(Weights(len(y), b, w, config.beta * w))
            weights[-1].append(row)
    return weights


def one_stream_weights(groups, config) -> list[list[list[Weights]]]:
    """An ablation, what Eq. (A) forbids: rollouts and branches of a question are one group, and one mean.

    A from the rewards of all S = G + |T_fail| K sequences of the question, weight 1 / (questions S |y|). Lambda has
    no part in it.
    """
    weights = []
    for g in groups:
        rewards = [r for t in g.trajectories for r in (t.reward, *t.branch_rewards)]
        advantages = iter(advantages_of(rewards, config.std))
        weights.append([])
        for t in g.trajectories:
            share = [1 / (len(groups) * len(rewards) * max(1, len(y))) for y in (t.response, *t.branches)]
            weights[-1].append([Weights(len(y), next(advantages), w, config.beta * w)
                                for y, w in zip((t.response, *t.branches), share)])
    return weights


def per_token(weights) -> Tensor:
    """A list of Weights spread over their tokens: (tokens, 3) in fp64, the columns advantage, policy, kl."""
    runs = torch.tensor(weights, dtype=torch.float64).view(-1, 4)
    return runs[:, 1:].repeat_interleave(runs[:, 0].long(), dim=0)


def silence_spurious(weights, logp, entropy, probability=0.002, quantile=0.75) -> Tensor:
    """STAPO (arXiv 2602.15620): factors [tokens] on the weights, 0 for spurious tokens, a mean over the rest.

    Spurious is a token with A > 0 whose probability is below `probability` and whose entropy is below the given
    quantile of the entropies of all tokens that improbable: an accident that a right answer would reward. The
    other weights grow by one factor, so that their sum stays what it was. weights: per_token, of the whole batch;
    logp, entropy: of its tokens, in nats.
    """
    unlikely = logp < torch.tensor(probability, dtype=logp.dtype).log()
    if not unlikely.any():
        return torch.ones(len(weights), dtype=torch.float64)
    spurious = unlikely & (weights[:, 0] > 0) & (entropy < entropy[unlikely].quantile(quantile))
    kept, policy = (~spurious).double(), weights[:, 1]
    return kept * policy.sum() / (kept * policy).sum().clamp(min=1e-300)     # (0 / 0: nothing is left to weigh)


def weighted_objective(logp, old_logp, ref_logp, advantage, policy, kl,
                       clip_low=0.2, clip_high=0.2, maspo=False) -> Tensor:
    """Eq. (J) with the weights of `sequence_weights`: sum_t [ policy_t * surrogate_t - kl_t * k3_t ].

    All arguments are [tokens]; ref_logp may be None (no KL term). maspo: soft_surrogate instead of the clip.
    Returns a scalar.
    """
    surrogate = (soft_surrogate(logp, old_logp, advantage) if maspo
                 else clipped_surrogate(logp, old_logp, advantage, clip_low, clip_high))
    total = (policy * surrogate).sum()
    if ref_logp is not None:
        total = total - (kl * k3_kl(logp, ref_logp)).sum()
    return total
