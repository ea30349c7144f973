r"""STAPO (arXiv 2602.15620): tokens that a right answer would reward by accident are left out of the loss.

Rule. A token with A > 0, such as one of a right response, is improbable when pi(y_t) < .002, where pi is the policy
before the optimizer step, also if an older one drew the batch. It is spurious when its entropy is also below the 75 %
quantile of the entropies of all improbable tokens with A > 0 that have a weight in the batch. Spurious tokens have
weight 0. The weights of the others grow by one factor, so that their sum stays what it was. With the weights 1/N of a
token mean, that is the mean over the rest.

Differs from deep_grpo.py in: two columns of the table of loss tokens (`reweigh` of objective()). It composes with every
method (`--stapo`), and costs one more pass over all loss tokens. With two streams the factor is one for both, so the
branches weigh less where more of their tokens are spurious.

Differs from the paper in: its quantile is over the improbable tokens of all right responses. Tokens of a group whose
responses are all right have A = 0 and are not trained, so they do not count here. With a method that gives segments
advantages of their own, A > 0 also occurs in wrong responses, and counts.

"""
from torch import Tensor


def silence_spurious(table: Tensor, logp: Tensor, entropy: Tensor, probability=0.002, quantile=0.75) -> Tensor:
    """The table of loss tokens (loss.loss_table) with w and w_kl of spurious tokens at 0, and the rest rescaled.

    table: [N, 5]. logp, entropy: what the policy thinks of the N tokens, in nats. Returns a new table.
    """
    A, w = table[:, 0], table[:, 1]
    improbable = (A > 0) & (w > 0) & (logp.exp() < probability)
    if not improbable.any():
        return table
    spurious = improbable & (entropy < entropy[improbable].quantile(quantile))
    kept = (~spurious).to(table)
    factors = kept * w.sum() / (kept * w).sum()                              # the one of highest entropy is kept
    table = table.clone()
    table[:, 1:3] *= factors[:, None]
    return table
