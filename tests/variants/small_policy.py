"""What line 2 of a method is called with: a small policy whose words can be read, and short helpers around it."""
import numpy as np
from conftest import EOS, PAD

from deep_grpo import Config
from trainer.policy import Policy


class Words:
    """A tokenizer: token 2 ends a sentence, 4 is a blank line, any other number n is the word wn."""
    chat_template, pad_token_id = None, PAD

    def decode(self, ids, skip_special_tokens=True):
        return "".join({2: ".\n", 4: "\n\n", EOS: ""}.get(i, f" w{i}") for i in ids)


def make_policy(model=None, kind=Policy, **settings):
    """A policy of the trainer around a small model. settings: of Config."""
    return kind(model, Words(), [EOS], Config(**settings))


class Told(Policy):
    """A policy whose log-probabilities and entropies are those that it is told: one list per rollout."""
    logps = entropies = None

    def score(self, groups):
        return self.logps, self.entropies


def choose(choose_pivots, policy, groups, questions=None, seed=None):
    """Line 2 of a method that needs no fit; without a seed it must not draw anything."""
    rng = None if seed is None else np.random.default_rng(seed)
    return choose_pivots(policy, questions or [None] * len(groups), groups, policy.config, None, rng)


def pivots(groups):
    """The pivots of every rollout, question by question."""
    return [[[fork.pivot for fork in t.forks] for t in g.trajectories] for g in groups]
