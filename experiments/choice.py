r"""Which failures are worth branching, where only half of them are branched?

    python -m experiments.choice                        # four ways to choose, 20 seeds: 40 minutes on two cores
    python -m experiments.choice --redraw               # the figure again, from the kept numbers
    python -m experiments.choice run depth FLAGS        # one run, with flags of train_gsm8k.py; --out is needed

With `--branch-share S` (variants/thin.py) the failures that are branched are drawn at random. Here a rule prefers those
whose branches will probably not all get the same reward, because only these have advantages. The probability comes from
a logistic regression on earlier pivots of the same run, with the penalty of Eq. (P). It is fitted again in every step.
What it knows is the depth of the pivot, or log(1 + correct rollouts of its question), or both. A tenth of the failures
that are branched is drawn at random, so that the regression keeps learning about all of them. All rules branch equally
many failures on average, and all runs generate equally many tokens. A run that was interrupted goes on with the same
command. (`train_gsm8k.py --resume` would go on without the rule.)

On the embedded task all questions are equally hard, so a question would tell nothing. Here half of them have one hard
turn and the other half has three. The base policy does a hard turn right with probability .1.

Writes results/choice.json, results/choice.png, and the tables of results/choice.md.
"""
import argparse
import csv
import json
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np

import train_gsm8k
from experiments.calibrate import fit_logistic
from experiments.compare import EQUAL, RARE, headline, measure, plot_comparison, tables
from experiments.figures import save_figure
from experiments.runs import (
    Arm,
    Experiment,
    about_task,
    add_common_flags,
    kept_numbers,
    make_task,
    write_page,
    written_by,
)
from recoverability import sigmoid
from trainer.settings import OneLineParser, count

RULES = {"depth": [0], "rate": [1], "both": [0, 1]}      # columns of features()
EXPLORED = 0.1
HALF = "--method deep_grpo --branch-share .5 --questions 4"      # a rule chooses among the failures of four questions
ARMS = {"random": Arm("a random choice", HALF)} | {
    rule: Arm(label, HALF, f"experiments.choice run {rule}")
    for rule, label in (("depth", "by depth"), ("rate", "by the question's rate"), ("both", "by both"))}
EXPERIMENT = Experiment("Which failures should be branched?", 20, 128_000, f"{EQUAL} --lr 8e-5", ARMS, RARE,
                        "No choice of the failures that are branched is shown to help", hard=(1, 3))


# ---- one run ----

def features(depth, correct) -> np.ndarray:
    """What a rule may know of pivots, [n, 2]: their depth, and log(1 + correct rollouts of the question)."""
    return np.column_stack([depth, np.log1p(correct)])


def earlier_pivots(run, group_size) -> tuple[np.ndarray, np.ndarray]:
    """(features [n, 2], did its branches get different rewards? [n]) of the pivots in pivots.csv, which may be none."""
    path = run / "pivots.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    column = {name: np.array([float(row[name]) for row in rows])
              for name in ("depth", "question_rate", "right_branches", "branches")}
    living = (column["right_branches"] > 0) & (column["right_branches"] < column["branches"])
    return features(column["depth"], column["question_rate"] * group_size), living.astype(float)


def preferred(rule, run, groups, forked, n, config, rng) -> np.ndarray:
    """What stands in the place of at_random() of variants/thin.py: the forks that the rule prefers come first."""
    known, living = earlier_pivots(run, config.group_size)
    order = rng.permutation(len(forked))
    if len(np.unique(living)) < 2:                       # there is nothing to learn from yet
        return order
    own = features([groups[x].trajectories[i].forks[0].ratio for x, i in forked],
                   [sum(t.reward for t in groups[x].trajectories) for x, i in forked])
    w = fit_logistic(known[:, RULES[rule]], living)
    p = sigmoid(own[:, RULES[rule]] @ w[:-1] + w[-1])
    best = order[np.argsort(-p[order], kind="stable")]   # ties stay in random order
    random = int(EXPLORED * n + rng.random())
    return np.concatenate([best[:n - random], rng.permutation(best[n - random:])])


def run_one(rule=None, *flags) -> int:
    """train_gsm8k.py with this rule. flags: its flags, --out or --resume among them. Returns the exit code."""
    out = next((after for flag, after in zip(flags, flags[1:]) if flag in ("--out", "--resume")), None)
    if rule not in RULES or out is None:
        print(f"error: choice run: needs a rule of {', '.join(RULES)}, got {rule!r}, and --out DIR or --resume DIR",
              file=sys.stderr)
        return 2
    order = partial(preferred, rule, Path(out))
    with patch.object(train_gsm8k, "thinned", partial(train_gsm8k.thinned, order=order)):
        return train_gsm8k.main(list(flags))


# ---- all runs ----

def main(argv=None):
    """Run what is missing, then write numbers, figure and tables."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=count, default=20, help="Sets how many seeds each rule has. The default is 20.")
    parser.add_argument("--budget-tokens", type=count, default=128_000,
                        help="Sets the generated tokens of a run. The default is 128000.")
    add_common_flags(parser, "runs/choice")
    args = parser.parse_args(argv)
    numbers, picture, page = (args.results / f"choice.{ending}" for ending in ("json", "png", "md"))
    if args.redraw:
        measured = kept_numbers(parser, numbers)
    else:
        experiment = EXPERIMENT._replace(seeds=args.seeds, budget_tokens=args.budget_tokens)
        args.results.mkdir(parents=True, exist_ok=True)
        measured = measure(experiment, args.out, args.jobs, make_task(experiment, args.out / "base"))
        numbers.write_text(json.dumps(measured, indent=1) + "\n")
        about = written_by("-m experiments.choice", argv,
                           f"{experiment.flags} {HALF}, {args.budget_tokens:,} tokens; {about_task(experiment)}")
        write_page(page, EXPERIMENT.title, picture.name, f"{about}\n\n{tables(measured)}")
        print(tables(measured))
    save_figure(plot_comparison(measured, headline(EXPERIMENT, measured)), picture)
    print(picture)


if __name__ == "__main__":
    sys.exit(run_one(*sys.argv[2:]) if sys.argv[1:2] == ["run"] else main())
