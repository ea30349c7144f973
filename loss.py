r"""Eq. (A), (L) and (J): advantages, the loss of one token, and the two streams.   (arXiv 2602.14169v2)

    (A)  A = (R - mean) / (std + eps)
         A_global over the G rollouts of a question, A_local over the K branches of one pivot. They are never mixed.

    (L)  L(y) = 1/|y| sum_t [ min(rho_t A, clip(rho_t, 1 - eps_low, 1 + eps_high) A) - beta k3_t ]
         rho_t = pi_theta / pi_old,   k3_t = exp(d) - d - 1,   d = log pi_ref - log pi_theta

    (J)  J = E_x [ 1/G sum_i L_main(tau^i) + lambda 1/|T_fail| sum_{i in T_fail} 1/K sum_k L_aux(tau^{i,k}) ]
         L_main runs over a whole response with A_global. L_aux runs over the suffix only with A_local: the prefix that
         siblings share carries no loss.

Every normaliser of (J) is a constant of its sequence. So J is one weighted sum over all loss tokens,

    J = sum_t [ w_t min(rho_t A_t, clip(rho_t) A_t) - w_kl_t k3_t ]

and the constants A, w and w_kl of every token stand in one table (`loss_table`). The table is made once for the whole
batch. How the batch is then cut into micro-batches cannot change the gradient.

The authors' code has another form of (J), `authors_weights`. Four of its rules are left out. The dual clip and the
clamp of log rho have no effect while every batch is fresh and has one optimizer step; with --updates above 1 or --lag
they would. k3 is cut at 10 there, which happens where a token is 14 times likelier under the reference, or 60,000 times
less likely. And all branches of a step are dropped when fewer than 128 have an advantage.
"""
from typing import NamedTuple

import torch
from torch import Tensor

# ---- Eq. (A) ----


def group_advantages(rewards: Tensor, normalize: bool = True, eps: float = 1e-6) -> Tensor:
    """Eq. (A) over the last dimension: (R - mean) / (std + eps) with unbiased std; without normalize, R - mean.

    rewards: [..., G]. Returns the same shape. A group of equal rewards and a group of one give exactly 0, because the
    division would blow up the rounding of the mean. Raises ValueError when there is no reward.
    """
    if rewards.ndim == 0 or rewards.shape[-1] == 0:
        raise ValueError(f"rewards must be [..., G] with G at least 1, got shape {tuple(rewards.shape)}")
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    equal = (rewards == rewards[..., :1]).all(-1, keepdim=True)
    A = rewards - rewards.mean(-1, keepdim=True)
    if normalize and rewards.shape[-1] > 1:
        A = A / (rewards.std(-1, keepdim=True) + eps)
    return torch.where(equal, torch.zeros_like(A), A)


def advantages_of(rewards: list[float], normalize: bool = True) -> list[float]:
    """Eq. (A) of one group, as a list of numbers, computed in fp64. No rewards give no advantages."""
    return [] if not rewards else group_advantages(torch.tensor(rewards, dtype=torch.float64), normalize).tolist()


# ---- Eq. (L) ----


def clipped_surrogate(logp, old_logp, advantages, clip_low=0.2, clip_high=0.2) -> Tensor:
    """min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) of Eq. (L), per token, to be maximised.

    logp, old_logp: log-probabilities in nats. advantages: broadcastable to them. Returns their shape.
    """
    rho = torch.exp(logp - old_logp)
    clipped = rho.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(rho * advantages, clipped * advantages)


def k3_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k3 of Eq. (L), per token: exp(d) - d - 1 with d = ref_logp - logp.

    It is at least 0, and its mean under pi_theta is KL(pi_theta || pi_ref). logp, ref_logp: log-probabilities in nats
    of one shape, which is returned.
    """
    d = ref_logp - logp
    return torch.expm1(d) - d                        # expm1 is exact where the two policies nearly agree


# ---- Eq. (J): the constants of every loss token ----


class Span(NamedTuple):
    """The constants of the next `tokens` loss tokens: each adds w * surrogate(A) - w_kl * k3 to J."""
    tokens: int
    A: float
    w: float
    w_kl: float


def sequence_weights(groups, config) -> list[Span]:
    """The constants of J in the form that config.objective names: Eq. (J), or the form of the authors' code.

    groups: Groups with all rewards. Returns the Spans of all loss tokens, in the order of the groups: a rollout, then
    its branches. Another method than DEEP-GRPO is another function with this signature (variants/).
    """
    return {"paper": paper_weights, "authors": authors_weights}[config.objective](groups, config)


def paper_weights(groups, config, normalize: bool = True) -> list[Span]:
    """Eq. (J) of the paper. T_fail of a question are its rollouts with branches; without any, the second term is 0.

    normalize: divide advantages by the standard deviation, as Eq. (A) does.
    """
    spans = []
    for g in groups:
        n_fail = sum(bool(tau.branches) for tau in g.trajectories)                           # |T_fail|
        A_global = advantages_of([tau.reward for tau in g.trajectories], normalize)
        for tau, A_i in zip(g.trajectories, A_global):
            w = 1 / (len(groups) * len(g.trajectories) * max(1, len(tau.response)))            # E_x, 1/G, 1/|y|
            spans.append(Span(len(tau.response), A_i, w, config.beta * w))
            K = len(tau.branches)
            for fork in tau.forks:
                A_local = advantages_of(fork.rewards, normalize)
                for y, A_k in zip(fork.branches, A_local):
                    w = config.lam / (len(groups) * n_fail * K * max(1, len(y)))     # also lambda, 1/|T_fail|, 1/K
                    spans.append(Span(len(y), A_k, w, config.beta * w))
    return spans


def authors_weights(groups, config) -> list[Span]:
    """The form of the authors' code: a token mean over each stream, of the sequences that have an advantage.

        J = 1/T_main sum_t [ main ] + lambda/T_branch sum_t [ branches ] - beta (KL_main/T_main + KL_branch/T_branch)

    A = R - mean. Sequences with |A| < 1e-8 are left out, together with their KL term. T_main and T_branch count the
    tokens of those that are left, over the whole batch.
    """
    sequences = []                                   # (tokens, A, is it of the main stream?), in the order of groups
    for g in groups:
        A_global = advantages_of([tau.reward for tau in g.trajectories], normalize=False)
        for tau, A_i in zip(g.trajectories, A_global):
            sequences.append((len(tau.response), A_i, True))
            for fork in tau.forks:
                A_local = advantages_of(fork.rewards, normalize=False)
                sequences += [(len(y), A_k, False) for y, A_k in zip(fork.branches, A_local)]

    T_main = sum(n for n, A, main in sequences if main and abs(A) >= 1e-8)
    T_branch = sum(n for n, A, main in sequences if not main and abs(A) >= 1e-8)
    spans = []
    for n, A, main in sequences:
        if abs(A) < 1e-8:
            spans.append(Span(n, 0.0, 0.0, 0.0))
        elif main:
            spans.append(Span(n, A, 1 / T_main, config.beta / T_main))
        else:
            spans.append(Span(n, A, config.lam / T_branch, config.beta / T_branch))
    return spans


def loss_table(groups, spans: list[Span], old_logps: list[Tensor] | None = None) -> Tensor:
    """The table of loss tokens, fp64 [N, 5]: a row per token with the columns A, w, w_kl, main and log pi_old.

    Rows follow the order of the groups: a rollout, then its branches. main is 1 for the tokens of rollouts and 0 for
    those of branches. old_logps: log pi_old, a tensor per rollout with its branches; None leaves the column at 0.
    """
    constants = torch.tensor(spans, dtype=torch.float64).view(-1, 4)
    tokens = constants[:, 0].long()
    table = torch.zeros(int(tokens.sum()), 5, dtype=torch.float64)
    table[:, :3] = constants[:, 1:].repeat_interleave(tokens, dim=0)
    streams = [(len(y), float(i == 0)) for g in groups for tau in g.trajectories for i, y in enumerate(tau.sequences)]
    lengths, main = torch.tensor(streams, dtype=torch.float64).view(-1, 2).T
    if tokens.sum() != lengths.sum():
        raise ValueError(f"spans must cover the {lengths.sum():.0f} loss tokens of the groups, got {tokens.sum():d}: "
                         "every branch needs its reward")
    table[:, 3] = main.repeat_interleave(lengths.long())
    if old_logps is not None:
        table[:, 4] = torch.cat(old_logps)
    return table
