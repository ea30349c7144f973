r"""Goldilocks (arXiv 2602.14868): a small teacher chooses the questions that are neither too easy nor too hard.

Rule. The utility of a question q, of whose G rollouts a share p_q is right, is

    y_q = sqrt(p_q (1 - p_q))                                    between 0 and 1/2

The teacher predicts it from the question alone: f(q) = 1/2 sigmoid(w . h_q + b), where h_q is the mean of the hidden
states of the frozen starting model over the prompt. (The b is ours. Standardised features need one.) Its loss is the
mean of (f(q) - y_q)^2 over a sliding buffer of the questions that were asked last. For every question of a batch, C
random candidates are drawn. With probability 1 - eps the one with the largest f is asked, and otherwise a random one of
the C.

Why. With advantages (R - mean) / std, the gradient of a question is sqrt(p (1 - p)) times the difference between the
mean scores grad log pi of its right and of its wrong answers. (The unbiased std of loss.py adds a constant factor.) A
question that is always or never answered right has utility 0, because all advantages of its rollouts are 0. (With
DEEP-GRPO its branches may still have some. The teacher does not know of them and avoids such questions.)

Differs from deep_grpo.py in: which questions x are drawn; nothing else. It composes with every method (--select
goldilocks). With spo_tree, p_q is the share over all paths of its trees, in which long rollouts count more. With C = 1,
eps = 1 or a constant teacher, the choice is uniform. Questions with p near 1/2 also change the number of branches of
DEEP-GRPO, so compare runs at equal tokens.

No public code was found. We do not know the paper's C, eps, length of the buffer and learning rate, so these are flags
with defaults of ours. Nor do we know how it scales the features: here they are standardised. After every step the
teacher makes FIT_STEPS steps of Adam on the whole buffer. On the embedded task (d = 128), the questions that were asked
were about equally useful with learning rates from .03 to .3. Candidates that are not chosen are passed over until the
next epoch. With finite G the utility is biased towards 0: at G = 8 and p = .1 the mean of y is .2095, while
sqrt(p (1 - p)) is .3.
"""
from collections import deque
from copy import deepcopy

import numpy as np
import torch

FIT_STEPS = 10                                       # of Adam, after every training step


def utility(rewards) -> float:
    """y = sqrt(p (1 - p)), where p is the share of rewards that are not 0."""
    p = sum(r != 0 for r in rewards) / len(rewards)
    return (p * (1 - p)) ** 0.5


def squared_error(logits, y):
    """The mean of (f - y)^2, where f = 1/2 sigmoid(logits). Tensors of N."""
    return ((logits.sigmoid() / 2 - y) ** 2).mean()


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
        features = torch.as_tensor(features, dtype=torch.float64)
        self.x = torch.cat([features, torch.ones(len(features), 1)], 1)              # (N, d + 1): h_q, and 1 for b
        self.number = {tuple(prompt): i for i, prompt in enumerate(prompts)}
        self.epsilon = epsilon
        self.phi = torch.zeros(self.x.shape[1], dtype=torch.float64, requires_grad=True)                     # (w, b)
        self.optimizer = torch.optim.Adam([self.phi], lr)
        self.buffer = deque(maxlen=window)                                           # (number, utility), oldest first

    def predict(self, questions) -> np.ndarray:
        """f of questions, given as numbers in an array of any shape."""
        with torch.no_grad():
            return ((self.x[torch.as_tensor(questions)] @ self.phi).sigmoid() / 2).numpy()

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
        numbers, y = zip(*self.buffer)
        x, y = self.x[list(numbers)], torch.tensor(y, dtype=torch.float64)
        for _ in range(FIT_STEPS):
            self.optimizer.zero_grad()
            squared_error(x @ self.phi, y).backward()
            self.optimizer.step()

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
        """Everything a checkpoint needs, as a copy of its own."""
        return {"phi": self.phi.detach().clone(), "adam": deepcopy(self.optimizer.state_dict()),
                "buffer": list(self.buffer)}

    def load_state_dict(self, state) -> None:
        """Continue from another teacher's `state_dict()`. This object keeps its own features, epsilon and length of
        the buffer."""
        with torch.no_grad():
            self.phi.copy_(state["phi"])
        self.optimizer.load_state_dict(deepcopy(state["adam"]))
        self.buffer = deque(state["buffer"], maxlen=self.buffer.maxlen)
