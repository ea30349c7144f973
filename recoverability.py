r"""Eq. (P): can a failed rollout still be saved from relative depth r?   (arXiv 2602.14169)

    P_phi(success | r) = sigmoid(w r + b),   phi = (w, b)

After the K branches of a pivot at depth r are graded, the outcome (r, y) joins a buffer M. y is 1 if at least one of
the branches is correct, and 0 otherwise. phi minimises the binary cross-entropy over M. Only two numbers are fitted, to
a few thousand points. Instead of following the gradient online, we therefore solve for the exact minimum with Newton's
method after every step.

There are three more departures from the paper, all of them as in the authors' code. First, M keeps the last `window`
outcomes. Second, an L2 penalty of l2/2 * w^2 (there is none on b) keeps w finite when r separates the classes. This is
their LogisticRegression(C=1). Third, P is 1 everywhere until there are more than `min_observations` outcomes and both
classes among them. Eq. (Q) then goes by depth alone.

    python recoverability.py        # fits simulated outcomes and prints truth against estimate
"""
import math
from collections import deque

import numpy as np


def sigmoid(x):
    """1 / (1 + exp(-x)) for an array of any shape, without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(x, dtype=float)))


class Recoverability:
    """The buffer M of the last `window` outcomes (r, y) and the logistic fit to it.

    Attributes: w, b (floats, 0 until fitted) and fitted (bool). The algorithm asks for observe(), fit() and predict().
    The logs and figures of a run, and experiments/, read w and b: they are to be changed with another form of P.
    """

    def __init__(self, window=10_000, min_observations=10, l2=1.0):
        if window < 1:
            raise ValueError(f"window must be at least 1 outcome, got {window}")
        if min_observations < 0:
            raise ValueError(f"min_observations must be 0 or more, got {min_observations}")
        if not 0 < l2 < math.inf:
            raise ValueError(f"l2 must be positive (it keeps w finite on separable outcomes), got {l2}")
        self.outcomes = deque(maxlen=window)          # M, oldest first
        self.min_observations, self.l2 = min_observations, l2
        self.w, self.b, self.fitted = 0.0, 0.0, False

    def observe(self, ratio: float, success: bool) -> None:
        """Add one outcome: the relative depth r of a pivot, in [0, 1], and whether any of its branches was correct.

        Raises ValueError when the depth is not in [0, 1].
        """
        if not (math.isfinite(ratio) and 0 <= ratio <= 1):
            raise ValueError(f"ratio must be a relative depth in [0, 1], got {ratio}")
        self.outcomes.append((float(ratio), bool(success)))

    def fit(self) -> None:
        r"""Set (w, b) to the minimum of sum_M BCE(sigmoid(w r + b), y) + l2/2 * w^2.

        Nothing changes, and an earlier fit is kept, until there are more than min_observations outcomes and both
        classes among them.
        """
        ratio = np.array([r for r, _ in self.outcomes])                       # (n,)
        success = np.array([y for _, y in self.outcomes], dtype=float)        # (n,)
        if len(ratio) <= self.min_observations or success.min() == success.max():
            return
        x = np.stack([ratio, np.ones_like(ratio)], axis=1)                    # (n, 2): r and the intercept
        penalty = np.array([self.l2, 0.0])

        def loss(phi):                                                        # BCE is log(1 + e^z) - y z
            z = x @ phi
            return np.sum(np.logaddexp(0.0, z) - success * z) + 0.5 * penalty @ phi**2

        phi = np.array([0.0, math.log(success.mean() / (1 - success.mean()))])
        for _ in range(100):
            p = sigmoid(x @ phi)
            gradient = x.T @ (p - success) + penalty * phi                    # (2,)
            hessian = (x * (p * (1 - p))[:, None]).T @ x + np.diag(penalty)   # (2, 2), positive as l2 > 0
            newton = np.linalg.solve(hessian, gradient)
            size, bound = 1.0, loss(phi) * (1 + 1e-12)                        # rounding may exceed loss(phi)
            while loss(phi - size * newton) > bound:                          # a full step overshoots
                size /= 2
            phi = phi - size * newton
            if np.abs(newton).max() < 1e-9:                                   # the next is about the square of it
                break
        self.w, self.b, self.fitted = float(phi[0]), float(phi[1]), True

    def predict(self, ratio: np.ndarray) -> np.ndarray:
        """P_phi(success | r) for relative depths of any shape. It is 1 everywhere until fitted."""
        ratio = np.asarray(ratio, dtype=float)
        return sigmoid(self.w * ratio + self.b) if self.fitted else np.ones_like(ratio)

    def state_dict(self) -> dict:
        """Everything a checkpoint needs, as plain Python values."""
        return {"outcomes": list(self.outcomes), "w": self.w, "b": self.b, "fitted": self.fitted}

    def load_state_dict(self, state) -> None:
        """Continue from another run's `state_dict()`. This object keeps its own window, min_observations and l2."""
        self.outcomes = deque(state["outcomes"], maxlen=self.outcomes.maxlen)
        self.w, self.b, self.fitted = state["w"], state["b"], state["fitted"]


if __name__ == "__main__":
    w, b = -6.0, 2.0
    rng = np.random.default_rng(0)
    estimate = Recoverability()
    for n in (10, 30, 100, 1000, 10_000):
        while len(estimate.outcomes) < n:
            r = rng.uniform()
            estimate.observe(r, rng.uniform() < sigmoid(w * r + b))
        estimate.fit()
        print(f"{n:6d} outcomes: w {estimate.w:6.2f} (truth {w})   b {estimate.b:5.2f} (truth {b})")
    print("\n   r   truth  estimate")
    for r in np.arange(0.1, 1.0, 0.2):
        print(f" {r:.1f}    {sigmoid(w * r + b):.3f}     {estimate.predict(r):.3f}")
