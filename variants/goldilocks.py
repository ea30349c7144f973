r"""Goldilocks (arXiv 2602.14868): a small teacher chooses the questions that are neither too easy nor too hard.

Rule. The utility of a question q, of whose G rollouts a share p_q is right, is

    y_q = sqrt(p_q (1 - p_q))                                    between 0 and 1/2

The teacher predicts it from the question alone: f(q) = 1/2 sigmoid(w . h_q + b), where h_q is the mean of the hidden
states of the frozen starting model over the prompt. Its loss is the mean of (f(q) - y_q)^2 over a sliding buffer of the
questions that were asked last. For every question of a batch, C random candidates are drawn. With probability 1 - eps
the one with the largest f is asked, and otherwise a random one of the C.

Why. With advantages (R - mean) / std, the gradient of a question is sqrt(p (1 - p)) times the difference between the
mean scores grad log pi of its right and of its wrong answers. (The unbiased std of loss.py adds a constant factor.) A
question that is always or never answered right has utility 0, because all of its advantages are 0.

Differs from deep_grpo.py in: which questions x are drawn; nothing else. It composes with every method
(--select goldilocks). With C = 1, eps = 1 or a constant teacher, the choice is uniform. Questions with p near 1/2 also
change the number of branches of DEEP-GRPO, so compare runs at equal tokens.

No public code was found. We do not know the paper's C, eps, length of the buffer and learning rate, so these are flags
with defaults of ours. Nor do we know how it scales the features: here they are standardised. After every step the
teacher makes FIT_STEPS steps of Adam on the whole buffer. On the embedded task (d = 128), learning rates from .03 to .3
asked about equally useful questions. Candidates that are not chosen are passed over until the next epoch. With finite G
the utility is biased towards 0: at G = 8 and p = .1 the mean of y is .2095, while sqrt(p (1 - p)) is .3.
"""
from collections import deque

import numpy as np
import torch

from recoverability import sigmoid

FIT_STEPS = 10                                       # of Adam, after every training step


def utility(rewards) -> float:
    """y = sqrt(p (1 - p)), where p is the share of rewards that are 1."""
    p = sum(rewards) / len(rewards)
    return (p * (1 - p)) ** 0.5


def squared_error(logits, y):
    """(mean of (f - y)^2, its gradient with respect to the logits), where f = 1/2 sigmoid(logits). Arrays of N."""
    f = sigmoid(logits) / 2
    return ((f - y) ** 2).mean(), 2 * (f - y) * f * (1 - 2 * f) / len(y)             # df/dlogit = f (1 - 2 f)


@torch.no_grad()
def mean_states(model, prompts, tokens=16384) -> list[np.ndarray]:
    """For each prompt (token ids), the mean over its tokens of the last hidden states: float32, [d].

    tokens: at most so many padded tokens go through the model at once. Prompts of similar length share a batch, and
    padding is on the right, where causal attention keeps it from the tokens of the prompt.
    """
    was_training, states = model.training, [None] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = max(1, tokens // max(map(len, prompts), default=1))
    model.eval()
    for part in (by_length[i:i + size] for i in range(0, len(prompts), size)):
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompts[i]) for i in part], batch_first=True)     # (B, L)
        lengths = torch.tensor([len(prompts[i]) for i in part])[:, None]
        mask = (torch.arange(ids.shape[1]) < lengths).to(model.device)
        hidden = model.base_model(input_ids=ids.to(model.device), attention_mask=mask.long(), use_cache=False)[0]
        sums = (hidden.float() * mask[..., None]).sum(1).cpu()                                               # (B, d)
        for i, mean in zip(part, (sums / lengths).numpy()):
            states[i] = mean
    model.train(was_training)
    return states


def standardized(states) -> np.ndarray:
    """[N, d] float32: every dimension with mean 0 and variance 1 over the N questions, divided by sqrt(d).

    Hidden states have a large common part and a few very large dimensions, which say little about a question. With
    the factor, a question's features have a length of about 1 for models of any width.
    """
    states = np.asarray(states, dtype=np.float64)
    scale = np.maximum(states.std(0), 1e-8) * np.sqrt(states.shape[1])               # a constant dimension becomes 0
    return ((states - states.mean(0)) / scale).astype(np.float32)


class Teacher:
    """f(q) for all training questions, and how it learns. Questions are numbered as the rows of the features.

    prompts: the token ids of the questions, by which learn() finds their numbers.
    """

    def __init__(self, features, prompts=(), epsilon=0.1, window=1024, lr=0.05):
        self.x = np.column_stack([features, np.ones(len(features), np.float32)])     # (N, d + 1): h_q, and 1 for b
        self.number = {tuple(prompt): i for i, prompt in enumerate(prompts)}
        self.epsilon, self.lr = epsilon, lr
        self.phi, self.m, self.v = np.zeros((3, self.x.shape[1]))                    # (w, b), and Adam's two moments
        self.steps = 0
        self.buffer = deque(maxlen=window)                                           # (number, utility), oldest first

    def predict(self, questions) -> np.ndarray:
        """f of questions, given as numbers in an array of any shape."""
        return sigmoid(self.x[np.asarray(questions)] @ self.phi) / 2

    def choose(self, candidates, rng) -> np.ndarray:
        """[n, C] numbers of candidates -> n numbers of questions. rng: numpy Generator.

        Among equal predictions the first candidate wins, which is a random one because the candidates are random.
        """
        candidates = np.asarray(candidates)
        n, C = candidates.shape
        best, other, explores = self.predict(candidates).argmax(1), rng.integers(C, size=n), rng.random(n)
        return candidates[np.arange(n), np.where(explores < self.epsilon, other, best)]

    def observe(self, question: int, y: float) -> None:
        """Add the utility of one question to the buffer."""
        self.buffer.append((int(question), float(y)))

    def fit(self) -> None:
        """FIT_STEPS steps of Adam on the mean of (f - y)^2 over the buffer."""
        x, y = self.x[[q for q, _ in self.buffer]], np.array([y for _, y in self.buffer])
        for _ in range(FIT_STEPS):
            gradient = squared_error(x @ self.phi, y)[1] @ x
            self.steps += 1
            self.m = 0.9 * self.m + 0.1 * gradient
            self.v = 0.999 * self.v + 0.001 * gradient**2
            m, v = self.m / (1 - 0.9**self.steps), self.v / (1 - 0.999**self.steps)
            self.phi = self.phi - self.lr * m / (np.sqrt(v) + 1e-8)

    def learn(self, groups) -> dict:
        """Observe all questions of a step, then fit. Returns mean utilities: predicted before the fit, and observed."""
        asked = [self.number[tuple(g.prompt)] for g in groups]
        y = [utility([t.reward for t in g.trajectories]) for g in groups]
        predicted = self.predict(asked)
        for pair in zip(asked, y):
            self.observe(*pair)
        self.fit()
        return {"predicted_utility": float(predicted.mean()), "observed_utility": float(np.mean(y))}

    def state_dict(self) -> dict:
        """Everything a checkpoint needs, as plain Python values."""
        return {"phi": self.phi.tolist(), "m": self.m.tolist(), "v": self.v.tolist(), "steps": self.steps,
                "buffer": list(self.buffer)}

    def load_state_dict(self, state) -> None:
        """Continue from another teacher's `state_dict()`. This object keeps its own features and settings."""
        self.phi, self.m, self.v = (np.array(state[name]) for name in ("phi", "m", "v"))
        self.steps, self.buffer = state["steps"], deque(state["buffer"], maxlen=self.buffer.maxlen)
