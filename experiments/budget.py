r"""At equal tokens per update: should they go to more questions, to more rollouts, or to branches?

    python -m experiments.budget             # eight splits in four locks, 10 seeds: four hours on two cores
    python -m experiments.budget --redraw    # the figure again, from the kept numbers

Every update of every run generates the same number of tokens. What a question does not take is there for other
questions. The splits go from few rollouts of many questions (GRPO with G = 4) to many rollouts of few questions (G = 32),
and to branches of few questions (DEEP-GRPO), of which a share S of the failures may be branched (variants/thin.py).

The locks are four cells of the map (where.py): the hard turn is early or late, and correct answers are frequent (the
base policy does the turn right with probability .1) or rare (.01).

Writes results/budget.json after every lock, results/budget.png, and the tables of results/budget.md.
"""
import argparse
import json
import platform
from pathlib import Path

import numpy as np
import torch
import transformers

from experiments.compare import EQUAL, collect, differences, tables
from experiments.figures import GREY_TO_ACCENT, INK, new_figure, save_figure
from experiments.runs import Arm, Experiment, base_flags, interval, make_base, run_all, write_page
from experiments.where import CELLS
from trainer.plot import read_metrics
from trainer.settings import OneLineParser, command_line, count

LOCKS = {"early error, frequent": CELLS["long, early", 0.1], "early error, rare": CELLS["long, early", 0.01],
         "late error, frequent": CELLS["long, late", 0.1], "late error, rare": CELLS["long, late", 0.01]}
ARMS = {                                             # the first is what the others are compared with
    "g8": Arm("G = 8", "--method grpo --questions 4"),
    "g4": Arm("G = 4", "--method grpo --questions 8 --group-size 4"),
    "g16": Arm("G = 16", "--method grpo --questions 2 --group-size 16"),
    "g32": Arm("G = 32", "--method grpo --group-size 32"),
    "s25": Arm("G = 8, K = 8, S = 1/4", "--method deep_grpo --branch-share .25"),
    "s50": Arm("G = 8, K = 8, S = 1/2", "--method deep_grpo --branch-share .5"),
    "k4": Arm("G = 8, K = 4, S = 1", "--method deep_grpo --branches 4"),
    "s100": Arm("G = 8, K = 8, S = 1", "--method deep_grpo"),
}
FLAGS = f"{EQUAL} --lr 1.6e-4"
TITLE = "At equal tokens per update: questions, rollouts or branches?"
MESSAGE = ""


def signs(directories) -> dict[str, float]:
    """Two numbers that a user sees early in a run: means over the first quarter of the updates, over all seeds.

    dead_groups of the first arm, and recovered, the share of pivots with a correct branch, of DEEP-GRPO with S = 1.
    """
    def early(run, name):
        steps, values = read_metrics(run)[name]
        return np.mean(values[:max(1, len(steps) // 4)])

    return {name: float(np.mean([early(run, name) for run in directories[arm]]))
            for name, arm in (("dead_groups", "g8"), ("recovered", "s100"))}


def measure_lock(lock, out, args) -> dict:
    """The numbers of all runs with one lock: those of compare.collect, and the two signs."""
    make_base(lock, out / "base")
    flags = f"{FLAGS} {base_flags(out / 'base')}"
    experiment = Experiment(TITLE, args.seeds, args.budget_tokens, flags, ARMS, lock)
    directories = run_all(experiment, out, args.jobs)
    return collect(experiment._replace(flags=FLAGS), directories) | {"signs": signs(directories)}


def grid(kept) -> tuple[np.ndarray, np.ndarray]:
    """(differences to the first arm in points, is their 95 % interval without 0?), [arms, locks]."""
    found = [[interval(100 * differences(measured, arm)) for measured in kept.values()] for arm in ARMS]
    mean, width, _ = np.moveaxis(np.array(found), -1, 0)
    return mean, np.abs(mean) > width


def table(kept) -> str:
    """Markdown: the difference of every split to the first one in every lock, and the two signs."""
    lines = [f"| split | {' | '.join(kept)} |", "|---" * (len(kept) + 1) + "|"]
    for arm, own in ARMS.items():
        cells = []
        for measured in kept.values():
            mean, width, _ = interval(100 * differences(measured, arm))
            own_mean = 100 * measured["arms"][arm]["summary"]["accuracy_mean"]
            cells.append(f"{own_mean:.1f}" + ("" if arm == next(iter(ARMS)) else f" ({mean:+.1f} \u00b1 {width:.1f})"))
        lines.append(f"| {own.label} | {' | '.join(cells)} |")
    for name, label in (("dead_groups", "dead groups of G = 8, first quarter"),
                        ("recovered", "recovered pivots of S = 1, first quarter")):
        lines.append(f"| {label} | {' | '.join('{:.2f}'.format(m['signs'][name]) for m in kept.values())} |")
    return "\n".join(lines)


def plot_budget(kept, title):
    """A heat map: a row per split, a column per lock, the difference to the first split in points."""
    mean, significant = grid(kept)
    figure, axes = new_figure(1.4 + 0.42 * len(ARMS))
    limit = max(1.0, np.abs(mean).max())
    axes["a"].imshow(mean, cmap=GREY_TO_ACCENT, vmin=-limit, vmax=limit, aspect="auto")
    for (row, column), value in np.ndenumerate(mean):
        of_g8 = 100 * list(kept.values())[column]["arms"]["g8"]["summary"]["accuracy_mean"]
        axes["a"].text(column, row, f"{of_g8:.0f} %" if row == 0 else f"{value:+.1f}", ha="center", va="center",
                       color=INK, weight="bold" if significant[row, column] else "normal")
    axes["a"].set(xticks=range(len(kept)), xticklabels=kept, yticks=range(len(ARMS)),
                  yticklabels=[arm.label for arm in ARMS.values()])
    axes["a"].tick_params(length=0)
    axes["a"].set_xlabel("mean accuracy over the run of G = 8, and differences to it in percentage points;\n"
                         "bold: the 95 % interval excludes 0", fontsize=9)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def main(argv=None):
    """Run what is missing, lock by lock, then write numbers, figure and tables."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=count, default=10, help="Sets how many seeds each arm has. The default is 10.")
    parser.add_argument("--budget-tokens", type=count, default=128_000,
                        help="Sets the generated tokens of a run. The default is 128000.")
    parser.add_argument("--locks", help="Measures only these locks, separated by ';'. The default is all of "
                        f"'{';'.join(LOCKS)}'.")
    parser.add_argument("--jobs", type=count, default=2,
                        help="Sets how many runs go on at a time, with one thread each. The default is 2.")
    parser.add_argument("--out", type=Path, default=Path("runs/budget"),
                        help="Names the folder for the run directories. The default is runs/budget.")
    parser.add_argument("--results", type=Path, default=Path("results"),
                        help="Names the folder for numbers, figure and tables. The default is results.")
    parser.add_argument("--redraw", action="store_true",
                        help="Draws the figure again from the kept numbers and ends. The default is to run.")
    args = parser.parse_args(argv)
    numbers, picture, page = (args.results / f"budget.{ending}" for ending in ("json", "png", "md"))
    names = args.locks.split(";") if args.locks else list(LOCKS)
    if unknown := [name for name in names if name not in LOCKS]:
        parser.error(f"argument --locks: {'; '.join(unknown)}: choose from {'; '.join(LOCKS)}")
    if args.redraw and not numbers.exists():
        parser.error(f"argument --redraw: {numbers} does not exist, so there are no numbers to draw")
    kept = json.loads(numbers.read_text()) if numbers.exists() else {}
    for name in [] if args.redraw else names:
        kept[name] = measure_lock(LOCKS[name], args.out / name.replace(", ", "-").replace(" ", "-"), args)
        args.results.mkdir(parents=True, exist_ok=True)
        numbers.write_text(json.dumps(kept, indent=1) + "\n")
    if not args.redraw:
        parts = [f"### {name}\n\n{tables(measured)}" for name, measured in kept.items()]
        about = (f"These numbers were written by `{command_line('-m experiments.budget', argv)}`: {FLAGS}, "
                 f"{args.budget_tokens:,} tokens; {platform.processor() or platform.machine()}, torch "
                 f"{torch.__version__}, transformers {transformers.__version__}. Mean accuracy over the run in percent, "
                 f"{args.seeds} seeds, and the paired difference to G = 8 with its 95 % interval.")
        write_page(page, TITLE, picture.name, "\n\n".join([about, table(kept), *parts]))
        print(table(kept))
    whole = len(kept) == len(LOCKS) and all(
        (measured["seeds"], measured["budget_tokens"]) == (10, 128_000) for measured in kept.values())
    save_figure(plot_budget(kept, MESSAGE if whole and MESSAGE else TITLE), picture)
    print(picture)


if __name__ == "__main__":
    main()
