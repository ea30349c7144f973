r"""Where does resampling from pivots pay? A map over the embedded task: how rare, how deep, how many, how long.

    python where.py --predict        # seconds: the prediction alone
    python where.py                  # hours on two cores: results/where.md and .png

A cell of the map is a lock (tiny.py): the probability p that the base policy does a hard turn right, the number of hard
turns, whether they come late or early, and the length of the easy rest. In each, GRPO (G = 8) and DEEP-GRPO (8 + 8)
train on equal tokens per update until half of the held-out questions are right; the factor is tokens of GRPO over
tokens of DEEP-GRPO.

The prediction counts right answers per generated token, at the base policy. A rollout of T tokens is right with
probability s. A branch of a failed one makes c T tokens anew and is right with probability q. With r = (1 - s) K
branches per rollout

    factor = (right answers per token of DEEP-GRPO) / (of GRPO) = (1 + r q/s) / (1 + r c)

Resampling pays where q/s > c: where a branch is more often right than a new rollout, per token. With one hard turn q/s
is the probability f that the pivot comes before it, so the boundary is f = c, whatever p is: late errors pay, early
ones do not. Eq. (P) moves pivots to where f is high, but there c is high, too: after early errors the factor comes back
to about 1 at best. q and c are computed here from Eq. (Q), and an Eq. (P) fitted to simulated outcomes.

Measured, that is the limit of rare right answers: a step of AdamW is as long for one of them as for ten, so with more
than about one in an update the factor goes to 1 (results/README.md).
"""
import argparse
import json
import random
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from tqdm import tqdm

import tasks.lock
from experiments.compare import ARMS, Experiment, base_flags, curve, interval, run_all
from pivot import draw_pivots
from recoverability import Recoverability
from tasks.lock import Lock, make_base
from trainer.plot import read_metrics
from trainer.settings import OneLineParser, command_line, count

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend that needs no screen)

P = (0.3, 0.1, 0.03, 0.01)
SHORT, LONG = (5, 6), (12, 14)
ROWS = {                                             # name -> lock for a p
    "short, early": lambda p: Lock(SHORT, 1, (4, 5), p),
    "short, late": lambda p: Lock(SHORT, 1, (1, 2), p),
    "long, early": lambda p: Lock(LONG, 1, (11, 12), p),
    "long, late": lambda p: Lock(LONG, 1, (1, 2), p),
    "long, late, 2 hard": lambda p: Lock(LONG, 2, (1, 3), p),
    "long, late, 3 hard": lambda p: Lock(LONG, 3, (1, 4), p),
}
CELLS = {(row, p): lock(p) for row, lock in ROWS.items() for p in P if lock(p).hard == 1 or p >= 0.1}
METHODS = {name: ARMS[name]._replace(flags=f"--method {name}") for name in ("grpo", "deep_grpo")}


@cache
def predict(lock, branches=8, gamma=2.0, n=2000, seed=0) -> dict[str, float]:
    """s, q, c, T and the factor of the docstring, by simulation of n failed rollouts; easy turns are always right.

    A response has 9 tokens per turn and 4 of answer; its steps are the turns and the answer.
    """
    rng, draws = random.Random(seed), np.random.default_rng(seed)
    s, estimate = lock.p ** lock.hard, Recoverability()
    q, c, lengths = [], [], []
    while len(q) < n:
        turns = tasks.lock.draw_turns(lock, rng)
        hard = [i for i, turn in enumerate(turns) if turn == tasks.lock.HARD]
        right = [rng.random() < lock.p for _ in hard]
        if all(right):
            continue
        error = hard[right.index(False)]             # number of turns before the first wrong one
        length = 9 * len(turns) + 4
        ends = [*range(9, 9 * len(turns) + 1, 9), length]
        (kept, ratio), = draw_pivots(ends, estimate, gamma, draws)
        left = sum(i >= kept // 9 for i in hard)     # hard turns that a branch has to do
        p_branch = lock.p ** left if kept // 9 <= error else 0.0
        estimate.observe(ratio, bool(draws.random() < 1 - (1 - p_branch) ** branches))
        if len(q) % 20 == 0:
            estimate.fit()
        q.append(p_branch)
        c.append(1 - kept / length)
        lengths.append(length)
    q, c = np.mean(q[n // 4:]), np.mean(c[n // 4:])  # after Eq. (P) has learned
    r = (1 - s) * branches
    return {"s": s, "q/s": q / s, "c": c, "T": np.mean(lengths), "factor": (1 + r * q / s) / (1 + r * c)}


def tokens_to_half(directory) -> float:
    """Generated tokens at which greedy accuracy first reaches .5, linear between evaluations; inf if it has not."""
    try:
        tokens, accuracy = curve(read_metrics(directory), "generated_total")
    except (OSError, KeyError, ValueError):          # there is no log yet, or its last line is being written
        return np.inf
    for i in np.flatnonzero(accuracy >= 0.5)[:1]:
        if i == 0:
            return float(tokens[0])
        share = (0.5 - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
        return float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))
    return np.inf


def factor(grpo, deep, budget) -> tuple[float, float, str]:
    """(factor, half width of the 95 % interval of its logarithm, how to print it) from tokens to half, seed by seed.

    Geometric mean. A run that did not get there counts with its whole budget, and the factor is then a bound.
    """
    capped = [np.minimum(values, budget) for values in (grpo, deep)]
    mean, width, _ = interval(np.log(capped[0] / capped[1]))
    bound = {(False, False): "", (True, False): "> ", (False, True): "< ", (True, True): "? "}[
        bool(np.isinf(grpo).any()), bool(np.isinf(deep).any())]
    if np.isinf(grpo).all() and np.isinf(deep).all():
        return 1.0, np.inf, "neither"
    low, high = np.exp(mean - width), np.exp(mean + width)
    return float(np.exp(mean)), width, f"{bound}{np.exp(mean):.2f} ({low:.2f} to {high:.2f})"


def measure(lock, out, args) -> dict:
    """Tokens to half accuracy of both methods, every seed (None: not within the budget), in one cell."""
    base = make_base(lock, out / "base", args.base_steps)
    flags = (f"--preset tiny-deep {base_flags(out / 'base')} --eval-every 2 --step-tokens {args.step_tokens} "
             f"--lr {args.lr}")
    experiment = Experiment("", args.seeds, args.step_tokens * args.updates, flags, METHODS)
    directories = run_all(experiment, out, args.jobs, lambda d: np.isfinite(tokens_to_half(d)))
    tokens = {name: [tokens_to_half(d) for d in runs] for name, runs in directories.items()}
    return {"base": base, **{name: [t if np.isfinite(t) else None for t in ts] for name, ts in tokens.items()}}


def factor_of(found, args) -> tuple[float, float, str]:
    """factor() of a cell as measure() gives it."""
    return factor(*tokens_of(found), args.step_tokens * args.updates)


def tokens_of(found) -> list[np.ndarray]:
    """Tokens to half of GRPO and of DEEP-GRPO, every seed, of a cell as measure() gives it; inf: not there."""
    return [np.array([np.inf if t is None else t for t in found[name]]) for name in METHODS]


def right_per_update(lock, found, args) -> float:
    """Right answers that GRPO expects among the rollouts of its first update."""
    return found["base"]["hard"] ** lock.hard * args.step_tokens / predict(lock)["T"]


def table(cells, args) -> str:
    """Markdown: prediction and measurement of every cell."""
    lines = ["| cell | p | base policy, hard turn | right per update, GRPO | q/s | c | predicted | measured (95 %) | "
             "GRPO, tokens to half | DEEP-GRPO |", "|---" * 10 + "|"]
    for (row, p), lock in CELLS.items():
        expected, found = predict(lock), cells.get(f"{row} {p}")
        measured = [""] * 5
        if found:
            shown = [" ".join("-" if np.isinf(t) else f"{t / 1000:.0f}k" for t in ts) for ts in tokens_of(found)]
            measured = [f"{found['base']['hard']:.3f}", f"{right_per_update(lock, found, args):.2g}",
                        factor_of(found, args)[2], *shown]
        lines.append(f"| {row} | {p} | {measured[0]} | {measured[1]} | {expected['q/s']:.2f} | {expected['c']:.2f} | "
                     f"{expected['factor']:.2f} | {' | '.join(measured[2:])} |")
    return "\n".join(lines)


def draw(cells, args, path):
    """The map, predicted beside measured: color is the factor, red where DEEP-GRPO needs fewer tokens. And the measured
    factor over what GRPO has in an update, of the base policy as it is: its right answers."""
    figure, axes = plt.subplots(1, 3, figsize=(19, 5), layout="constrained")
    for axis, title in zip(axes, ("predicted: right answers per token", "measured: tokens to half accuracy")):
        values, texts = np.full((len(ROWS), len(P)), np.nan), {}
        for (row, p), lock in CELLS.items():
            at = list(ROWS).index(row), P.index(p)
            if axis is axes[0]:
                values[at] = predict(lock)["factor"]
                texts[at] = f"{values[at]:.2f}"
            elif f"{row} {p}" in cells:
                values[at], _, text = factor_of(cells[f"{row} {p}"], args)
                texts[at] = text.replace(" (", "\n(")
        image = axis.imshow(np.log2(values), cmap="RdBu_r", vmin=-1.5, vmax=1.5, aspect="auto")
        for (y, x), text in texts.items():
            axis.text(x, y, text, ha="center", va="center", fontsize=8)
        axis.set(title=title, xticks=range(len(P)), xticklabels=P, yticks=range(len(ROWS)), yticklabels=list(ROWS),
                 xlabel="probability p that the base policy does a hard turn right")
    figure.colorbar(image, ax=axes[:2], label="log2(tokens of GRPO / tokens of DEEP-GRPO)")
    for row, marker in zip(ROWS, "ovos^D"):
        found = [(right_per_update(lock, cells[f"{row} {p}"], args), *factor_of(cells[f"{row} {p}"], args)[:2])
                 for (name, p), lock in CELLS.items() if name == row and f"{row} {p}" in cells]
        if found:
            right, value, width = np.array(found).T
            bars = value * (1 - np.exp(-width)), value * np.minimum(np.exp(width) - 1, 10)
            axes[2].errorbar(right, value, yerr=bars, fmt=marker, label=row, capsize=2,
                             color="tab:red" if "late" in row else "tab:blue",
                             fillstyle="none" if "short" in row else "full")
            axes[2].legend(fontsize=8)
    axes[2].axhline(1, color="black", linewidth=0.8)
    axes[2].axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes[2].set(xscale="log", yscale="log", title="measured, and why", ylabel="tokens of GRPO / tokens of DEEP-GRPO",
                xlabel="right answers in an update of GRPO, at the base policy")
    figure.savefig(path, dpi=90)
    return figure


def main(argv=None):
    """Predict; measure the cells that are not in results/where.json; write table and figure."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predict", action="store_true", help="print the prediction, and end")
    parser.add_argument("--cells", help="only these: names separated by ';', as 'long, late 0.03'")
    parser.add_argument("--seeds", type=count, default=5)
    parser.add_argument("--updates", type=count, default=32, help="the most")
    parser.add_argument("--step-tokens", type=count, default=3000, help="generated tokens per update")
    parser.add_argument("--lr", type=float, default=1.6e-4, help="learning rate of both methods")
    parser.add_argument("--base-steps", type=count, default=300, help="supervised, to make a cell's base policy")
    parser.add_argument("--jobs", type=count, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/where"))
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of table, figure, where.json")
    args = parser.parse_args(argv)
    if not 0 < args.lr < np.inf:
        parser.error(f"argument --lr: must be positive, got {args.lr}")
    known = args.results / "where.json"
    settings = {name: getattr(args, name) for name in ("seeds", "updates", "step_tokens", "lr", "base_steps")}
    kept = json.loads(known.read_text()) if known.exists() else {"settings": settings, "cells": {}}
    if args.predict:
        print(table(kept["cells"], args))
        return
    if kept["settings"] != settings:
        parser.error(f"{known} holds a map with {kept['settings']}, here it is {settings}: choose another --results")
    names = {f"{row} {p}": lock for (row, p), lock in CELLS.items()}
    chosen = args.cells.split(";") if args.cells else list(names)
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"argument --cells: {'; '.join(unknown)}: choose from {'; '.join(names)}")
    args.results.mkdir(parents=True, exist_ok=True)
    for name in tqdm([name for name in chosen if name not in kept["cells"]], desc="cells"):
        folder = args.out / name.replace(", ", "-").replace(" ", "-")
        kept["cells"][name] = measure(names[name], folder, args)
        known.write_text(json.dumps(kept, indent=1) + "\n")
    text = table(kept["cells"], args)
    (args.results / "where.md").write_text(
        f"# Where does resampling from pivots pay?\n\n    {command_line('where.py', argv)}\n\n"
        f"Factor: tokens of GRPO (G = 8) to half accuracy over those of DEEP-GRPO (8 + 8), geometric mean of "
        f"{args.seeds} seeds; at most {args.updates} updates of {args.step_tokens} tokens, learning rate {args.lr}; "
        f"- : not within them, and the factor is then a bound.\n\n![map](where.png)\n\n{text}\n")
    plt.close(draw(kept["cells"], args, args.results / "where.png"))
    print(text)


if __name__ == "__main__":
    main()
