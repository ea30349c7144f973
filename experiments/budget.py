r"""At equal tokens per update: should they go to more questions, to more rollouts, or to branches?

    python -m experiments.budget             # eight splits in four locks, 10 seeds: three and a half hours on two cores
    python -m experiments.budget --extend    # only the seeds that results/budget.json does not have
    python -m experiments.budget --redraw    # the figure again, from the kept numbers

Every update of every run generates the same number of tokens. Tokens that one question does not need go to others. A
split says how they are spent: on few rollouts of many questions (GRPO with G = 4), on many rollouts of few questions
(G = 32), or on branches of few questions (DEEP-GRPO), where only a share S of the failures may be branched
(variants/thin.py).

A lock is a difficulty of the embedded task. There are four, which are cells of the map (where.py): the hard turn is
early or late, and correct answers are frequent (the base policy does the turn right with probability .1) or rare (.01).

Writes results/budget.json after every lock, results/budget.png, and the tables of results/budget.md.
"""
import argparse
import json

import numpy as np

from experiments.compare import EQUAL, differences, known_runs, measure, tables
from experiments.figures import GREY_TO_ACCENT, INK, new_figure, save_figure
from experiments.runs import (
    Arm,
    Experiment,
    add_common_flags,
    interval,
    kept_numbers,
    make_task,
    write_page,
    written_by,
)
from experiments.where import CELLS
from trainer.settings import OneLineParser, count

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
MESSAGE = "In four locks, no use of branches is shown to beat GRPO with G = 8"


def signs(measured) -> dict[str, float]:
    """Two numbers that a user sees early in a run: means over the first quarter of the updates, over all seeds.

    dead_groups of the first arm, and recovered, the share of pivots with a correct branch, of DEEP-GRPO with S = 1. A
    run whose first quarter has no pivot is left out.
    """
    def mean(arm, name):
        values = [run[name] for run in measured["arms"][arm]["seeds"]]
        return float(np.mean([value for value in values if value is not None]))

    return {"dead_groups": mean("g8", "early_dead_groups"), "recovered": mean("s100", "early_recovered")}


def measure_lock(lock, out, args, kept=None) -> dict:
    """The numbers of all runs with one lock, as compare.collect returns them. kept: those that are not made again."""
    experiment = Experiment(TITLE, args.seeds, args.budget_tokens, FLAGS, ARMS, lock)
    known = known_runs(kept, experiment)
    return measure(experiment, out, args.jobs, make_task(experiment, out / "base"), known)


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
        lines.append(f"| {label} | {' | '.join(f'{signs(m)[name]:.2f}' for m in kept.values())} |")
    return "\n".join(lines)


def plot_budget(kept, title):
    """A heat map: a row per split, a column per lock, the difference to the first split in points."""
    mean, significant = grid(kept)
    figure, axes = new_figure(1.4 + 0.42 * len(ARMS))
    limit = max(1.0, np.abs(mean).max())
    axes["a"].imshow(mean, cmap=GREY_TO_ACCENT, vmin=-limit, vmax=limit, aspect="auto")
    texts = [[f"{100 * measured['arms']['g8']['summary']['accuracy_mean']:.0f} %" for measured in kept.values()],
             *([f"{np.round(value, 1) + 0:+.1f}".replace("-", "\u2212") for value in row] for row in mean[1:])]
    for (row, column), text in np.ndenumerate(texts):
        axes["a"].text(column, row, text, ha="center", va="center",
                       color="white" if mean[row, column] < -0.7 * limit else INK,
                       weight="bold" if significant[row, column] else "normal")
    methods = ["GRPO" if "--method grpo" in arm.flags else "DEEP-GRPO" for arm in ARMS.values()]
    axes["a"].set(xticks=range(len(kept)), xticklabels=[name.replace(", ", ",\n") + " answers" for name in kept],
                  yticks=range(len(ARMS)),
                  yticklabels=[f"{method}, {arm.label}" for method, arm in zip(methods, ARMS.values())])
    axes["a"].tick_params(length=0)
    axes["a"].set_xlabel("mean accuracy over the run of G = 8, and differences to it in percentage points;\n"
                         "bold: the 95 % interval excludes 0, without a correction for the number of cells", fontsize=9)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def settings_of_all(kept) -> set[tuple[int, int]]:
    """(seeds, tokens of a run) of the kept locks."""
    return {(measured["seeds"], measured["budget_tokens"]) for measured in kept.values()}


def main(argv=None):
    """Run what is missing, lock by lock, then write numbers, figure and tables."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=count, default=10, help="Sets how many seeds each arm has. The default is 10.")
    parser.add_argument("--budget-tokens", type=count, default=128_000,
                        help="Sets the generated tokens of a run. The default is 128000.")
    parser.add_argument("--locks", help="Measures only these locks, separated by ';'. The default is all of "
                        f"'{';'.join(LOCKS)}'.")
    parser.add_argument("--extend", action="store_true", help="Makes only those of the --seeds whose numbers are not "
                        "kept. The default is to make all of them.")
    add_common_flags(parser, "runs/budget")
    args = parser.parse_args(argv)
    numbers, picture, page = (args.results / f"budget.{ending}" for ending in ("json", "png", "md"))
    names = args.locks.split(";") if args.locks else list(LOCKS)
    if unknown := [name for name in names if name not in LOCKS]:
        parser.error(f"argument --locks: {'; '.join(unknown)}: choose from {'; '.join(LOCKS)}")
    kept = kept_numbers(parser, numbers) if args.redraw or numbers.exists() else {}
    settings = args.seeds, args.budget_tokens
    others = settings_of_all({name: measured for name, measured in kept.items() if name not in names}) - {settings}
    if others and not args.redraw:
        parser.error(f"{numbers} has seeds and tokens {', '.join(map(str, others))}, here they are {settings}: choose "
                     "another --results")
    if not args.redraw:
        args.results.mkdir(parents=True, exist_ok=True)
        for name in names:
            folder = args.out / name.replace(", ", "-").replace(" ", "-")
            kept[name] = measure_lock(LOCKS[name], folder, args, kept.get(name) if args.extend else None)
            numbers.write_text(json.dumps(kept, indent=1) + "\n")
        about = (written_by("-m experiments.budget", argv, f"{FLAGS}, {args.budget_tokens:,} tokens")
                 + f" Mean accuracy over the run in percent, {args.seeds} seeds, and the paired difference to G = 8 "
                 "with its 95 % interval.")
        parts = [f"### {name}\n\n{tables(measured)}" for name, measured in kept.items()]
        write_page(page, TITLE, picture.name, "\n\n".join([about, table(kept), *parts]))
        print(table(kept))
    kept_result = list(kept) == list(LOCKS) and settings_of_all(kept) == {(10, 128_000)}
    save_figure(plot_budget(kept, MESSAGE if kept_result else TITLE), picture)
    print(picture)


if __name__ == "__main__":
    main()
