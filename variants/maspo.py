r"""MASPO (arXiv 2602.17550): a soft trust region takes the place of the clip.

    surrogate = m_t rho_t A
    m_t = exp(-(rho_t - 1)^2 / (2 sigma_t^2)) where (A > 0 and rho > 1) or (A < 0 and rho < 1), else 1; without gradient
    sigma_t = clamp(pi_old^-0.3, 1, 10), times 1 + 0.03 A for A > 0, or times 1 / (1 - 0.03 A) for A < 0

Unlikely tokens get a wider region, and so do tokens with a large positive advantage. With one update per batch rho is
1, and MASPO changes nothing, unless the batch was drawn by an older policy (--lag). The clamp is only in the authors'
code, which has the exponent -0.5 for a model of 1.5 B parameters.

Differs from deep_grpo.py in: the surrogate of Eq. (L), which has no clip then. It composes with every method
(`--maspo`). With VCPO, pi_old is the policy before the update even if an older one drew the batch, so with one update
per batch MASPO changes nothing there.
"""
import torch
from torch import Tensor


def soft_surrogate(logp, old_logp, advantages) -> Tensor:
    """m rho A per token, to be maximised. Shapes and units are those of loss.clipped_surrogate."""
    rho = torch.exp(logp - old_logp)
    with torch.no_grad():
        trust = torch.where(advantages > 0, 1 + 0.03 * advantages, 1 / (1 - 0.03 * advantages.clamp(max=0)))
        sigma = torch.exp(-0.3 * old_logp).clamp(1, 10) * trust
        moved = (rho - 1) * advantages > 0                                   # the way that A wants
        m = torch.where(moved, torch.exp(-(rho - 1) ** 2 / (2 * sigma ** 2)), torch.ones_like(rho))
    return m * rho * advantages
