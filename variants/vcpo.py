r"""VCPO (arXiv 2602.17616): smaller steps and another baseline where the batch was drawn by an older policy.

Setting. With `--lag k` a batch is trained k steps after it was drawn, as with an asynchronous sampler. Of each of its B
rollouts, w_i = exp(sum_t log pi_theta - log pi_mu) is how much likelier it is now than when pi_mu drew it, s_i is the
gradient of sum_t log pi_theta, and L_i is its number of tokens.

    learning rate of this step = lr sqrt(min(1, e)),    e = (sum w)^2 / (B sum w^2)    effective sample size, by B

    A_i = (R_i - b) / sd     b = sum W R / sum W over the group, W_i = w_i^2 |s_i|^2;   sd of the population

    gradient of J = 1/B sum_i min(w_i, 8) A_i s_i / L_i          w_i is a constant of it; no clip, and beta = 0

Without the cap, and with rollouts of equally many tokens, b is the baseline under which the gradient varies least. If
the batch was drawn by the current policy, e is 1 and the cap does nothing. What then differs from GRPO is the baseline,
the std and that there is no KL term; b is the mean only where all |s_i| are equal. In bf16 e is below 1 even then,
because the small differences between sampling and update add up over a response (sampler_gap).

Differs from deep_grpo.py in: K = 0, the weights of J, the learning rate, and no clip. Before the usual update it scores
the batch, and then computes |s_i| one rollout at a time. With --updates above 1, e, b and w stay those of before the
first of them, and rho multiplies w. --maspo has an effect only then, and --stapo and --prob-mask change J but not w, e
and |s_i|. The authors' code also multiplies W by min(w, 8)^2. Their README does not, and is followed here. Their weight
decay is .1, that of train_gsm8k.py is .01. For models that use tools they take e / .55 in the place of e.
"""
import math
from functools import partial
from statistics import pstdev

import torch
from torch import Tensor

import deep_grpo
from deep_grpo import ALONE, Group, known_logps, score_groups
from loss import Span

CAP = 8.0


def effective_share(log_w: Tensor) -> float:
    """e = (sum w)^2 / (B sum w^2), between 1/B and 1. log_w: [B], in nats; w itself may be too large for a float."""
    w = torch.exp(log_w - log_w.max())
    return (w.sum() ** 2 / (len(w) * (w ** 2).sum())).item()


def baseline(rewards: Tensor, log_w: Tensor, squared_norms: Tensor) -> float:
    """b of one group. All arguments are [G]. Where all gradients are 0, the mean."""
    W = torch.exp(2 * (log_w - log_w.max())) * squared_norms
    return ((W @ rewards) / W.sum()).item() if W.sum() > 0 else rewards.mean().item()


def weights(groups, config, log_w=None, squared_norms=None) -> list[Span]:
    """The constants of J above. log_w, squared_norms: [B], of all rollouts in order.

    If they are None, the rollouts are those of the current policy, and all |s_i| are equal.
    """
    B = sum(len(g.trajectories) for g in groups)
    log_w = torch.zeros(B, dtype=torch.float64) if log_w is None else log_w
    squared_norms = torch.ones(B, dtype=torch.float64) if squared_norms is None else squared_norms
    sizes = [len(g.trajectories) for g in groups]
    spans = []
    for g, log_w_g, norms in zip(groups, log_w.split(sizes), squared_norms.split(sizes)):
        rewards = torch.tensor([t.reward for t in g.trajectories], dtype=torch.float64)
        b, sd = baseline(rewards, log_w_g, norms), pstdev(rewards.tolist())
        for t, log_w_i in zip(g.trajectories, log_w_g.tolist()):
            n, w = len(t.response), math.exp(min(log_w_i, math.log(CAP)))
            A = (t.reward - b) / sd if sd > 1e-8 else 0.0
            spans.append(Span(n, A, w / (B * n), config.beta / (B * n)))
    return spans


def update(model, optimizer, groups, config, ref_model=None, micro_batch_tokens=None, ranks=ALONE, stale=False,
           weights=weights, **options) -> dict:
    """Lines 5 to 8 with the weights and the learning rate above. stale is not read: w is known in any case.

    The metrics have two more: ess_share, which is e, and lr_scale, by which the learning rate was multiplied.
    """
    if not groups:                                       # as in the first steps with --lag
        metrics = deep_grpo.update(model, optimizer, groups, config, ref_model, micro_batch_tokens, ranks, **options)
        return metrics | {"ess_share": None, "lr_scale": None}
    logps, _, forwarded = score_groups(model, groups, config, micro_batch_tokens, ranks)
    lengths = [len(t.response) for g in groups for t in g.trajectories]
    log_w = torch.stack([part.sum() for part in (torch.cat(logps) - known_logps(groups)).split(lengths)])
    squared_norms, more = gradient_norms(model, groups, config, ranks)
    e = effective_share(log_w)
    scale, before = math.sqrt(min(1.0, e)), [group["lr"] for group in optimizer.param_groups]
    try:
        for group, lr in zip(optimizer.param_groups, before):
            group["lr"] = lr * scale
        metrics = deep_grpo.update(model, optimizer, groups, config, ref_model, micro_batch_tokens, ranks,
                                   weights=partial(weights, log_w=log_w, squared_norms=squared_norms), **options)
    finally:
        for group, lr in zip(optimizer.param_groups, before):
            group["lr"] = lr
    metrics["forwarded_tokens"] += forwarded + more
    return metrics | {"ess_share": e, "lr_scale": scale}


def gradient_norms(model, groups, config, ranks=ALONE) -> tuple[Tensor, int]:
    """(|s_i|^2 of all rollouts, fp64 [B], and the tokens that were forwarded), one rollout at a time.

    Groups of equal rewards are left out, because their advantages are 0 whatever their norms are: they get 0.
    """
    def alone(groups, config):
        return [Span(len(g.trajectories[0].response), 1.0, 1.0, 0.0) for g in groups]

    norms, forwarded = [], 0
    for g in groups:
        living = len({t.reward for t in g.trajectories}) > 1
        for t in g.trajectories:
            if living:
                model.zero_grad()
                _, metrics = deep_grpo.objective(model, [Group(g.prompt, [t])], config, backward=True, weights=alone,
                                                 surrogate=lambda logp, old, A: logp * A, ranks=ranks)
                norm = deep_grpo.clip_gradient(model, math.inf)
                forwarded += metrics["forwarded_tokens"]
            norms.append(norm.item() ** 2 if living else 0.0)
    return torch.tensor(norms, dtype=torch.float64), forwarded
