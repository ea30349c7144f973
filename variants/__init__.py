"""The methods that the paper is compared with or can be combined with, each as a small difference to deep_grpo.py.

All of them run through `deep_grpo.step`. A method is a row of METHODS, the table that `--method` reads. It names
hyper-parameters and replaces one or two functions of the algorithm:

    choose_pivots(policy, questions, groups, config, recoverability, rng) -> groups    line 2: the states to branch
    weights(groups, config) -> [Span(tokens, A, w, w_kl), ...]                         lines 5 to 7: constants of J
    update(model, optimizer, groups, config, ...) -> metrics                           lines 5 to 8 as a whole

To add a method, copy the file that is nearest to it: dr_grpo.py (only weights, 20 lines), treerl.py (states and
weights), or ablations.py (a change of one function). Write its paper, its rule and "differs from deep_grpo.py in" at
the top, add a row here under a new name, and write a test of its own. Three tables of tests/variants/test_methods.py
name every method: its G and K, its functions, and whether it fits P. A fourth one has its forks, if it chooses states
in its own way. Every Fork gets config.branches branches. Two forks with K/2 each are a row with half of the branches;
loss.py divides by the branches of the whole rollout. A constant of the method stands at the top of its file; a flag
needs a field of deep_grpo.Config and a line in trainer/settings.py. An update() of its own returns the metrics of
deep_grpo.update, best by calling it. The policy offers text, encode, sample, rewards, score and each
(trainer/policy.py).

Six options are no methods, and can be combined with them where they have a meaning: stapo.py, maspo.py, thin.py,
goldilocks.py, the mask of spo.py, and --lag, which vcpo.py is about.

Files of this folder import the paper's files and one another, nothing else. GRPO is K = 0 and needs no file.
"""
from collections.abc import Callable
from dataclasses import dataclass, field

import deep_grpo
from loss import sequence_weights
from variants import ablations, attnrl, dr_grpo, fr3e, rrpo, spo, thin, treerl, vcpo


@dataclass(frozen=True)
class Method:
    """One value of --method. settings: of deep_grpo.Config, where they differ from its defaults.

    fits_p: outcomes of its forks go into the buffer of Eq. (P). flags: those of train_gsm8k.py that have a meaning for
    this method and not for all. prob_mask: the default of --prob-mask; None is no mask.
    forks(config): the most states of a rollout that are branched, from which memory is computed.
    """
    settings: dict = field(default_factory=dict)
    choose_pivots: Callable = deep_grpo.choose_pivots
    weights: Callable = sequence_weights
    update: Callable = deep_grpo.update
    fits_p: bool = False
    flags: tuple[str, ...] = ()
    prob_mask: float | None = None
    forks: Callable = lambda config: 1

    @property
    def two_streams(self) -> bool:
        """Does lambda weigh rollouts against branches? Else they are one stream with one normaliser."""
        return "lam" in self.flags


THIN = ("branch_share",)                             # the flag of methods that can do without some of their branches
STEPS = ("segment_tokens", *THIN)                    # those of methods that also cut a response into steps
STREAMS = ("gamma", "lam", *STEPS)                   # those of DEEP-GRPO and most of its ablations
NO_CLIP = dict(clip_low=1.0, clip_high=1e6)

METHODS = {
    "deep_grpo": Method(fits_p=True, flags=("objective", *STREAMS)),
    "grpo": Method(dict(branches=0), flags=("objective",)),
    "dr_grpo": Method(dict(branches=0, beta=0.0), weights=dr_grpo.weights),
    "treerl": Method(dict(group_size=6, branches=2), treerl.choose_pivots, treerl.weights, flags=THIN,
                     forks=lambda config: 2),
    "attnrl": Method(dict(group_size=6, branches=2), attnrl.choose_pivots, treerl.weights, flags=STEPS,
                     forks=lambda config: 2),
    "fr3e": Method(dict(group_size=16, branches=16), fr3e.choose_pivots, fr3e.weights, flags=THIN,
                   forks=lambda config: 4),
    "rrpo": Method(dict(group_size=5, branches=4, **NO_CLIP), rrpo.choose_pivots, rrpo.weights, flags=STEPS),
    "srpo": Method(dict(group_size=5, branches=4, **NO_CLIP), rrpo.choose_named, rrpo.weights, flags=STEPS),
    "spo_chain": Method(dict(branches=4), spo.choose_chain_pivots, spo.chain_weights, prob_mask=0.9,
                        forks=lambda config: -(-config.max_new_tokens // 5)),
    "spo_tree": Method(dict(group_size=6, branches=5, segment_tokens=30), spo.grow_tree, spo.tree_weights,
                       flags=("segment_tokens",), prob_mask=0.9, forks=lambda config: config.branches + 1),
    "vcpo": Method(dict(branches=0, beta=0.0, **NO_CLIP), weights=vcpo.weights, update=vcpo.update),
    "no_std": Method(weights=ablations.no_std, fits_p=True, flags=STREAMS),
    "two_pivots": Method(choose_pivots=ablations.two_pivots, fits_p=True, flags=("objective", *STREAMS),
                         forks=lambda config: 2),
    "uniform_pivot": Method(choose_pivots=ablations.uniform_pivot, fits_p=True, flags=("objective", "lam", *STEPS)),
    "branch_all": Method(choose_pivots=ablations.branch_all, fits_p=True, flags=("objective", *STREAMS)),
    "train_prefix": Method(update=ablations.train_prefix, fits_p=True, flags=("objective", *STREAMS)),
    "one_stream": Method(weights=ablations.one_stream, fits_p=True, flags=("gamma", *STEPS)),
    "light_branches": Method(weights=thin.light_weights, fits_p=True, flags=STREAMS),
}
