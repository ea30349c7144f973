r"""Where does resampling from pivots pay? A map over the embedded task: how rare, how deep, how many, how long.

    python -m experiments.where --predict        # seconds: the prediction alone
    python -m experiments.where --redraw         # seconds: the figure from results/where.json
    python -m experiments.where                  # two hours on two cores: results/where.json, .md and .png

A cell of the map is a lock (tasks/lock.py). It has a probability p that the base policy does a hard turn right, a
number of hard turns, which come late or early, and a number of easy turns. In each cell, GRPO (G = 8) and DEEP-GRPO
(8 + 8) train on equal tokens per update until half of the held-out questions are answered correctly. The factor is the
tokens that GRPO needs over the tokens that DEEP-GRPO needs.

The prediction counts correct answers per generated token, at the base policy. A rollout of T tokens is correct with
probability s. A branch of a failed rollout generates c T tokens and is correct with probability q. There are
r = (1 - s) K branches per rollout, so

    factor = (correct answers per token of DEEP-GRPO) / (of GRPO) = (1 + r q/s) / (1 + r c)

Resampling pays where q/s > c, that is where a branch is more often correct than a new rollout, per token. With one hard
turn q/s is the probability f that the pivot comes before it. The boundary is then f = c, whatever p is: late errors
pay, early ones do not. Eq. (P) moves pivots to where f is high, but there c is high, too. After early errors the factor
therefore comes back to about 1 at best. q and c are computed here from Eq. (Q) and from an Eq. (P) fitted to simulated
outcomes.

The measured factors approach this prediction only as correct answers get rare. The length of an AdamW step barely
depends on how many correct answers are behind it. With more than about one correct answer in an update the factor
therefore goes to 1 (results/where.md).
"""
import argparse
import json
import random
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

import tasks.lock
from experiments.figures import ACCENT, GREY, GREY_TO_ACCENT, INK, new_figure, save_figure
from experiments.runs import (
    Arm,
    Experiment,
    accuracy_curve,
    base_flags,
    interval,
    kept_numbers,
    make_base,
    run_all,
    write_page,
)
from pivot import draw_pivot
from recoverability import Recoverability
from tasks.lock import Lock
from trainer.plot import read_metrics
from trainer.settings import OneLineParser, command_line, count

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
ARMS = {"grpo": Arm("GRPO, G = 8", "--method grpo"), "deep_grpo": Arm("DEEP-GRPO, G = 8, K = 8", "--method deep_grpo")}
TITLE = "Where does resampling from pivots pay?"


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
        kept, ratio = draw_pivot(ends, estimate, gamma, draws)
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
    """Generated tokens at which greedy accuracy first reaches .5, linear between evaluations; inf if it never does."""
    try:
        tokens, accuracy = accuracy_curve(read_metrics(directory))
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


def measure_cell(lock, out, args) -> dict:
    """Tokens to half accuracy of both methods, every seed (None: not within the budget), in one cell."""
    base = make_base(lock, out / "base", args.base_steps)
    flags = (f"--preset tiny-deep {base_flags(out / 'base')} --eval-every 2 --step-tokens {args.step_tokens} "
             f"--lr {args.lr}")
    experiment = Experiment("", args.seeds, args.step_tokens * args.updates, flags, ARMS)
    directories = run_all(experiment, out, args.jobs, lambda d: np.isfinite(tokens_to_half(d)))
    tokens = {name: [tokens_to_half(d) for d in runs] for name, runs in directories.items()}
    return {"base": base, **{name: [t if np.isfinite(t) else None for t in ts] for name, ts in tokens.items()}}


def factor_of(found, args) -> tuple[float, float, str]:
    """factor() of a cell as measure_cell() returns it."""
    return factor(*tokens_of(found), args.step_tokens * args.updates)


def tokens_of(found) -> list[np.ndarray]:
    """Tokens to half of GRPO and of DEEP-GRPO, every seed, of a cell as measure_cell() returns it; inf: not there."""
    return [np.array([np.inf if t is None else t for t in found[name]]) for name in ARMS]


def correct_per_update(lock, found, args) -> float:
    """Correct answers that GRPO expects among the rollouts of its first update."""
    return found["base"]["hard"] ** lock.hard * args.step_tokens / predict(lock)["T"]


def table(cells, args) -> str:
    """Markdown: prediction and measurement of every cell."""
    lines = ["| cell | p | base policy, hard turn | correct per update, GRPO | q/s | c | predicted | measured (95 %) | "
             "GRPO, tokens to half | DEEP-GRPO |", "|---" * 10 + "|"]
    for (row, p), lock in CELLS.items():
        expected, found = predict(lock), cells.get(f"{row} {p}")
        measured = [""] * 5
        if found:
            shown = [" ".join("-" if np.isinf(t) else f"{t / 1000:.0f}k" for t in ts) for ts in tokens_of(found)]
            measured = [f"{found['base']['hard']:.3f}", f"{correct_per_update(lock, found, args):.2g}",
                        factor_of(found, args)[2], *shown]
        lines.append(f"| {row} | {p} | {measured[0]} | {measured[1]} | {expected['q/s']:.2f} | {expected['c']:.2f} | "
                     f"{expected['factor']:.2f} | {' | '.join(measured[2:])} |")
    return "\n".join(lines)


def plot_map(axis, cells, args):
    """The measured factor of every cell, in red where DEEP-GRPO needs fewer tokens; bold if its interval excludes 1."""
    values = np.full((len(ROWS), len(P)), np.nan)
    for row, p in CELLS:
        if f"{row} {p}" not in cells:
            continue
        y, x = list(ROWS).index(row), P.index(p)
        values[y, x], width, text = factor_of(cells[f"{row} {p}"], args)
        clear = abs(np.log(values[y, x])) > width
        axis.text(x, y, text.split(" (")[0], ha="center", va="center", color=INK,
                  fontweight="bold" if clear else "normal")
    axis.imshow(np.log2(values), cmap=GREY_TO_ACCENT, vmin=-2, vmax=2, aspect="auto")
    axis.set(xticks=range(len(P)), xticklabels=P, yticks=range(len(ROWS)), yticklabels=list(ROWS),
             xlabel="probability p that the base policy\ndoes a hard turn right")


def plot_factors(axis, cells, args):
    """The measured factor over the correct answers that GRPO expects in an update, at the base policy."""
    for row, marker in zip(ROWS, "ovos^D"):
        found = [(correct_per_update(lock, cells[f"{row} {p}"], args), *factor_of(cells[f"{row} {p}"], args)[:2])
                 for (name, p), lock in CELLS.items() if name == row and f"{row} {p}" in cells]
        if found:
            correct, value, width = np.array(found).T
            bars = value * (1 - np.exp(-width)), value * np.minimum(np.exp(width) - 1, 10)
            axis.errorbar(correct, value, yerr=bars, fmt=marker, markersize=5, linewidth=1.2,
                          color=ACCENT if "late" in row else GREY, fillstyle="none" if "short" in row else "full")
    axis.axhline(1, color=INK, linewidth=1, zorder=0)
    axis.axvline(1, color=INK, linewidth=0.8, linestyle=":", zorder=0)
    axis.set(xscale="log", yscale="log", yticks=(0.25, 0.5, 1, 2, 4), yticklabels=("1/4", "1/2", "1", "2", "4"),
             ylim=(0.15, 4.5), xticks=(0.01, 0.1, 1, 10), xticklabels=("0.01", "0.1", "1", "10"),
             ylabel="tokens of GRPO / tokens of DEEP-GRPO",
             xlabel="correct answers in an update of GRPO,\nat the base policy")
    axis.minorticks_off()
    axis.text(0.02, 0.30, "early errors", color=GREY, transform=axis.transAxes)
    axis.text(0.02, 0.94, "late errors", color=ACCENT, transform=axis.transAxes)


def plot_where(cells, args):
    """The map beside what explains it; the titles say what the whole map shows, so a part of it has none."""
    figure, axes = new_figure(4.9, "ab", width_ratios=(1.15, 1))
    plot_map(axes["a"], cells, args)
    plot_factors(axes["b"], cells, args)
    whole = all(f"{row} {p}" in cells for row, p in CELLS)
    if whole:
        axes["a"].set_title("After early errors, GRPO needs\nfewer tokens")
        axes["b"].set_title("They differ most where correct\nanswers are rare")
    figure.suptitle("Resampling shows no clear gain in any cell, and a loss after early errors" if whole else TITLE,
                    x=0.01, ha="left")
    figure.supxlabel(
        f"Numbers: tokens of GRPO over tokens of DEEP-GRPO to half accuracy, mean of {args.seeds} seeds. Red: "
        "DEEP-GRPO needs fewer.\nBold: the 95 % interval excludes 1.  <, >, ?: some runs did not get there. Right: "
        "filled markers are long questions.", fontsize=9, color=GREY, x=0.01, ha="left")
    return figure


def main(argv=None):
    """Predict; measure the cells that are not in results/where.json; write numbers, table and figure."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predict", action="store_true",
                        help="Prints the prediction and ends. The default is to measure.")
    parser.add_argument("--redraw", action="store_true",
                        help="Draws the figure again from the kept numbers and ends. The default is to measure.")
    parser.add_argument("--cells", help="Measures only these cells, with names such as 'long, late 0.03' separated "
                        "by ';'. The default is all cells.")
    parser.add_argument("--seeds", type=count, default=5, help="Sets the seeds of every cell. The default is 5.")
    parser.add_argument("--updates", type=count, default=32,
                        help="Ends a run after this many updates at the latest. The default is 32.")
    parser.add_argument("--step-tokens", type=count, default=3000,
                        help="Sets the generated tokens of an update. The default is 3000.")
    parser.add_argument("--lr", type=float, default=1.6e-4,
                        help="Sets the learning rate of both methods. The default is 1.6e-4.")
    parser.add_argument("--base-steps", type=count, default=300,
                        help="Sets the supervised steps that make the base policy of a cell. The default is 300.")
    parser.add_argument("--jobs", type=count, default=2,
                        help="Sets how many runs go on at a time, with one thread each. The default is 2.")
    parser.add_argument("--out", type=Path, default=Path("runs/where"),
                        help="Names the folder for the run directories. The default is runs/where.")
    parser.add_argument("--results", type=Path, default=Path("results"),
                        help="Names the folder for numbers, table and figure. The default is results.")
    args = parser.parse_args(argv)
    if not 0 < args.lr < np.inf:
        parser.error(f"argument --lr: must be positive, got {args.lr}")
    known = args.results / "where.json"
    settings = {name: getattr(args, name) for name in ("seeds", "updates", "step_tokens", "lr", "base_steps")}
    kept = (kept_numbers(parser, known) if args.redraw or known.exists()
            else {"settings": settings, "cells": {}})
    if args.predict:
        print(table(kept["cells"], args))
        return
    if not kept["cells"] and args.redraw:
        parser.error(f"argument --redraw: {known} has no cells")
    if kept["settings"] != settings:
        parser.error(f"{known} holds a map with {kept['settings']}, here it is {settings}: choose another --results")
    if not args.redraw:
        measure_missing(kept, known, args, parser)
        text = (f"These numbers were written by `{command_line('-m experiments.where', argv)}`. The measured factor is "
                f"the tokens of GRPO (G = 8) to half accuracy over those of DEEP-GRPO (8 + 8), as the geometric mean "
                f"of {args.seeds} seeds. A run has at most {args.updates} updates of {args.step_tokens} tokens, and "
                f"the learning rate is {args.lr}. Where a run does not get to half accuracy within them (-), the "
                f"factor is a bound.\n\n{table(kept['cells'], args)}")
        write_page(args.results / "where.md", TITLE, "where.png", text)
        print(text)
    save_figure(plot_where(kept["cells"], args), args.results / "where.png")


def measure_missing(kept, known, args, parser):
    """Measure the chosen cells that `kept` does not have, and write it to the file `known` after each."""
    names = {f"{row} {p}": lock for (row, p), lock in CELLS.items()}
    chosen = args.cells.split(";") if args.cells else list(names)
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"argument --cells: {'; '.join(unknown)}: choose from {'; '.join(names)}")
    args.results.mkdir(parents=True, exist_ok=True)
    for name in tqdm([name for name in chosen if name not in kept["cells"]], desc="cells"):
        folder = args.out / name.replace(", ", "-").replace(" ", "-")
        kept["cells"][name] = measure_cell(names[name], folder, args)
        known.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
