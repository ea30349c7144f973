r"""When is the outcome of a rollout decided: before or after its tokens are spent?

    python -m experiments.decided       # the kept run on GSM8K, and the locks whose runs are in runs/budget; seconds

V(s) is the probability that a rollout which has reached the state s ends correct. Over the rollouts of a question x,
the mean of V(s) is V(x) at every depth, and at the end V is 0 or 1. So the share of the outcome that is decided at the
depth r,

    D(r) = Var V(s_r) / (V(x) (1 - V(x))),

rises from 0 at the question to 1 at the end. A branch of a failed rollout, from its state at depth r, is correct with
the probability

    E[V(s_r) | failure] = E[V(s_r) (1 - V(s_r))] / (1 - V(x)) = V(x) (1 - D(r)).

A new rollout of the same question is correct with probability V(x), and a branch costs 1 - r of its tokens. Branches
therefore have (1 - D(r)) / (1 - r) times as many correct answers per token: more where D(r) < r, less where D(r) > r.

1 - D is estimated from the pivots of a run, as the sum of two shares over all pivots: the share of correct branches,
over the share of correct rollouts among the G - 1 others of the question. Both sums weigh a question by V(x) (1 - V(x)).
The intervals are from a bootstrap of the steps of all runs.
"""
import argparse
import json
from pathlib import Path

import numpy as np

from experiments.budget import LOCKS
from experiments.figures import ACCENT, GREY, INK, LIGHT, new_figure, save_figure
from experiments.gsm8k_pivots import KEPT, read_pivots
from experiments.runs import write_page, written_by
from trainer.settings import OneLineParser

GSM8K = "GSM8K"
EDGES = np.linspace(0, 1, 11).round(1)
TITLE = "When is the outcome of a rollout decided?"
MESSAGE = TITLE


def shares_of(run) -> dict[str, np.ndarray]:
    """Of every pivot of a run of DEEP-GRPO: step, depth in tokens, the shares of correct branches and of correct others.

    depth: the share of the response's tokens that stand before the pivot. others: the rollouts of the same question but
    the failed one itself.
    """
    settings = json.loads((run / "config.json").read_text())["settings"]
    if settings["method"] != "deep_grpo":
        raise ValueError(f"its method is {settings['method']}, and only deep_grpo branches all failures and nothing else")
    pivots = read_pivots(run)
    return {"step": pivots["step"], "depth": pivots["pivot"] / pivots["response_tokens"],
            "branches": pivots["right_branches"] / pivots["branches"],
            "others": pivots["rate"].round() / (settings["group_size"] - 1)}


def decided(runs, resamples=2000) -> list[dict]:
    """The rows of one source: for each interval of EDGES that has pivots, and for all of them.

    runs: what shares_of() returns for each. A row has pivots, branches and others (means of the shares), at (the mean
    depth), D and its 95 % interval, and per_token, (1 - D) / (1 - at), with its interval.
    """
    columns = {name: np.concatenate([run[name] for run in runs]) for name in ("depth", "branches", "others")}
    steps = np.unique(np.concatenate([np.stack([np.full(len(run["step"]), i), run["step"]], 1)
                                      for i, run in enumerate(runs)]), axis=0, return_inverse=True)[1]
    draws = np.random.default_rng(0).multinomial(steps.max() + 1, np.full(steps.max() + 1, 1 / (steps.max() + 1)),
                                                 resamples)                       # how often each step is drawn
    rows = []
    for low, high in [*zip(EDGES, EDGES[1:]), (0.0, 1.0)]:
        inside = (columns["depth"] >= low) & (columns["depth"] < high)
        if not columns["others"][inside].any():
            continue
        sums = np.stack([np.bincount(steps[inside], values[inside], steps.max() + 1) for values in
                         (np.ones(len(steps)), *(columns[name] for name in ("depth", "branches", "others")))], 1)
        n, depth, branches, others = sums.sum(0)
        left, per_token = curves(sums.sum(0))
        with np.errstate(divide="ignore", invalid="ignore"):
            intervals = [np.nanpercentile(values, [2.5, 97.5]).tolist() for values in curves((draws @ sums).T)]
        rows.append({"low": low, "high": high, "pivots": int(n), "at": depth / n, "branches": branches / n,
                     "others": others / n, "D": 1 - left, "D_interval": [1 - x for x in reversed(intervals[0])],
                     "per_token": per_token, "per_token_interval": intervals[1]})
    return rows


def curves(sums):
    """(1 - D, (1 - D) / (1 - r)) from the sums over pivots of 1, of the depth and of both shares."""
    n, depth, branches, others = sums
    return branches / others, branches / others / (1 - depth / n)
