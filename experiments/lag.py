r"""What does a sampler that lags behind cost, and does VCPO give it back? On the embedded task.

    python -m experiments.lag             # lags 0, 4 and 12, GRPO and VCPO, 5 seeds: half an hour on two cores
    python -m experiments.lag --redraw    # the figure again, from the kept numbers

With `--lag K` every update trains the batch that was drawn K steps before, as if sampling and training went on at the
same time on two machines. All runs generate equally many tokens. A run with a lag has therefore K updates fewer, and
methods are compared at equal numbers of updates. (An update whose groups are all dead counts, too. GRPO then moves by
its KL term and by AdamW's momentum, and VCPO, which has beta = 0, makes no step.)

Writes results/lag.json, results/lag.png, and the table of results/lag.md.
"""
import argparse
import json

import numpy as np

from experiments.figures import GREY, INK, new_figure, plot_accuracies, save_figure
from experiments.runs import (
    Arm,
    Experiment,
    add_common_flags,
    interval,
    kept_numbers,
    run_all,
    write_page,
    written_by,
)
from trainer.plot import read_metrics
from trainer.settings import OneLineParser, count

LAGS = (0, 4, 12)
MIDWAY = 24                                          # updates
PANELS = {"grpo": "GRPO", "vcpo": "VCPO"}
FLAGS = "--preset tiny --questions 4 --eval-every 4 --step-tokens 2000"
ARMS = {f"{method}-{lag}": Arm(f"{label}, lag {lag}", f"--method {method} --lag {lag}")
        for method, label in PANELS.items() for lag in LAGS}
LOOKS = {0: (GREY, "-"), 4: (INK, "--"), 12: (INK, "-.")}
TITLE = "A sampler that lags behind, with and without VCPO"
MESSAGE = "A lag delays GRPO, and VCPO is not shown to give it back"


def read_curve(run, lag) -> dict:
    """Of one run: its numbers of updates, from 0 on, where it was evaluated, and the accuracy after each of them.

    Also the mean ess_share (None without VCPO), the median norm of the gradient, and the mean share of tokens that the
    clip holds, over the steps with an update (None if there is none).
    """
    def over(reduce, name):
        values = metrics[name][1][metrics["optimizer_steps"][1] > 0]
        return float(reduce(values)) if len(values) else None

    metrics = read_metrics(run)
    steps, accuracy = metrics["eval_accuracy"]
    updates = np.maximum(steps - lag, 0)
    first = np.flatnonzero(updates == 0)[-1]             # nothing is learned until then
    shares = metrics.get("ess_share", (np.zeros(0), np.zeros(0)))[1]
    return {"updates": updates[first:].tolist(), "accuracy": accuracy[first:].tolist(),
            "ess_share": float(shares.mean()) if len(shares) else None,
            "grad_norm": over(np.median, "grad_norm"), "clip_fraction": over(np.mean, "clip_fraction")}


def collect(directories, settings) -> dict:
    """The numbers of all runs, as results/lag.json has them: of every arm its label and the curve of every seed."""
    return {"settings": settings, "arms": {
        arm: {"label": ARMS[arm].label, "seeds": [read_curve(run, int(arm.split("-")[1])) for run in runs]}
        for arm, runs in directories.items()}}


def shared_updates(measured) -> int:
    """The updates that every run has made."""
    return min(int(run["updates"][-1]) for arm in measured["arms"].values() for run in arm["seeds"])


def accuracies(measured, arm) -> dict[str, np.ndarray]:
    """Of every seed of an arm: the mean accuracy over the shared updates, and the accuracy after them and, where there
    are more than 24, after 24 of them."""
    end = shared_updates(measured)

    def at(updates):
        return np.array([np.interp(updates, run["updates"], run["accuracy"]) for run in measured["arms"][arm]["seeds"]])

    midway = {f"after {MIDWAY} updates": at(MIDWAY)} if end > MIDWAY else {}
    return {f"mean over {end} updates": at(np.linspace(0, end, 201)).mean(1), **midway, f"after {end} updates": at(end)}


def tables(measured) -> str:
    """Markdown: accuracy of every arm with 95 % intervals, VCPO against GRPO of the same lag, and every seed."""
    of_arm = {arm: accuracies(measured, arm) for arm in measured["arms"]}
    header = list(of_arm["grpo-0"])
    seeds = len(measured["arms"]["grpo-0"]["seeds"])

    def mean_of(arm, name, form):
        values = [run[name] for run in measured["arms"][arm]["seeds"]]
        return "" if None in values else format(np.mean(values), form)

    def row(label, cells):
        return f"| {label} | {' | '.join(cells)} |"

    def head(label, columns):
        return [row(label, columns), "|---" * (len(columns) + 1) + "|"]

    lines = [f"The table has the greedy accuracy on held-out questions: mean of {seeds} seeds \u00b1 95 % interval",
             "(Student's t). Between two evaluations it is a straight line. ESS is the effective sample size divided",
             "by the number of rollouts. ESS and the share of clipped tokens are means over all updates of a run, and",
             "the norm of the gradient is the median over them.", "",
             *head("method", [*header, "ESS", "norm of the gradient", "clipped"])]
    for arm, kept in measured["arms"].items():
        lines.append(row(kept["label"], [*("{:.3f} \u00b1 {:.3f}".format(*interval(x)) for x in of_arm[arm].values()),
                                         mean_of(arm, "ess_share", ".2f"), mean_of(arm, "grad_norm", ".3f"),
                                         mean_of(arm, "clip_fraction", ".4f")]))
    lines += ["", "The next table has VCPO minus GRPO with the same lag, paired by seed. p is two-sided.", "",
              *head("lag", header)]
    for lag in LAGS:
        found = [interval(of_arm[f"vcpo-{lag}"][name] - of_arm[f"grpo-{lag}"][name]) for name in header]
        lines.append(row(lag, ["{:+.3f} \u00b1 {:.3f}, p = {:.3f}".format(*x) for x in found]))
    lines += ["", f"The last table has every seed: {'; '.join(header)}.", "",
              *head("method", [str(seed) for seed in range(seeds)])]
    for arm, kept in measured["arms"].items():
        cells = ["; ".join(f"{x:.3f}" for x in values) for values in zip(*of_arm[arm].values())]
        lines.append(row(kept["label"], cells))
    return "\n".join(lines)


def plot_lags(measured, title):
    """A panel for each method: accuracy over updates, a line per lag (mean of the seeds), and the seeds behind it."""
    figure, axes = new_figure(3.6, "ab", sharey=True)
    for axis, (method, label) in zip(axes.values(), PANELS.items()):
        curves = []
        for lag in LAGS:
            seeds = measured["arms"][f"{method}-{lag}"]["seeds"]
            curves.append((f"lag {lag}", *LOOKS[lag],
                           [(run["updates"], 100 * np.array(run["accuracy"])) for run in seeds]))
        plot_accuracies(axis, curves, shared_updates(measured))
        axis.set(title=label, xlabel=f"updates; bold lines are means of {len(seeds)} seeds")
    axes["b"].set_ylabel("")
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def main(argv=None):
    """Run what is missing, then write numbers, figure and tables."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=count, default=5, help="Sets how many seeds each arm has. The default is 5.")
    parser.add_argument("--batches", type=count, default=60,
                        help="A run generates this many times 2000 tokens. The default is 60.")
    add_common_flags(parser, "runs/lag")
    args = parser.parse_args(argv)
    numbers, picture, page = (args.results / f"lag.{ending}" for ending in ("json", "png", "md"))
    settings = {"seeds": args.seeds, "batches": args.batches, "flags": FLAGS}
    if args.redraw:
        measured = kept_numbers(parser, numbers)
    else:
        args.results.mkdir(parents=True, exist_ok=True)
        directories = run_all(Experiment(TITLE, args.seeds, 2000 * args.batches, FLAGS, ARMS), args.out, args.jobs)
        measured = collect(directories, settings)
        numbers.write_text(json.dumps(measured, indent=1) + "\n")
        about = written_by("-m experiments.lag", argv, f"{FLAGS}, {2000 * args.batches:,} tokens")
        write_page(page, TITLE, picture.name, f"{about}\n\n{tables(measured)}")
        print(tables(measured))
    kept = (measured["settings"]["seeds"], measured["settings"]["batches"]) == (5, 60)
    save_figure(plot_lags(measured, MESSAGE if kept else TITLE), picture)
    print(picture)


if __name__ == "__main__":
    main()
