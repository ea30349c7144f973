r"""Is recoverability a function of depth alone, on real language? The pivots of a run, from its pivots.csv.

    python -m experiments.gsm8k_pivots                              # those of the kept run on GSM8K, in seconds
    python -m experiments.gsm8k_pivots --run runs/mine --results /tmp/mine

A pivot is recovered when at least one of its branches is correct. Every pivot was drawn with the fit of Eq. (P) at the
end of the step before, which metrics.jsonl has. Predictions are logistic regressions with the penalty of Eq. (P), which
are fitted to the first half of the steps and tested on the others. The rate of a question is the share of its rollouts
that are correct; the regressions see log(1 + correct rollouts).
"""
import argparse
import csv
import json
from pathlib import Path

import numpy as np

from eval_math import wilson
from experiments.calibrate import fit_logistic, log_likelihood
from experiments.figures import ACCENT, GREY, INK, LIGHT, new_figure, save_figure
from experiments.runs import write_page
from recoverability import sigmoid
from trainer.plot import read_metrics
from trainer.settings import OneLineParser, command_line

KEPT = Path("results/gsm8k/second_run/deep")
TITLE = "Is recoverability a function of depth alone, on real language?"
MESSAGE = "The question says as much as the depth, and the two add up."


def read_pivots(run) -> dict[str, np.ndarray]:
    """The columns of pivots.csv, and: recovered (0 or 1), rate (correct rollouts of the question, of G), and fit, what
    Eq. (P) said when the pivot was drawn (nan before the first fit)."""
    with open(run / "pivots.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{run / 'pivots.csv'} has no pivots")
    pivots = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    metrics = read_metrics(run)
    w, b = (dict(zip(*metrics[name])) for name in ("w", "b"))
    before = pivots["step"] - 1
    known = np.array([(w.get(step, 0), b.get(step, 0)) for step in before])
    fit = sigmoid(known[:, 0] * pivots["depth"] + known[:, 1])
    G = json.loads((run / "config.json").read_text())["settings"]["group_size"]
    return pivots | {"recovered": (pivots["right_branches"] > 0).astype(float), "rate": pivots["question_rate"] * G,
                     "fit": np.where((known == 0).all(1), np.nan, fit)}


def groups_of(pivots, values, edges) -> list[dict]:
    """Of the pivots in each interval of `values`: how many, the share that is recovered, its interval, and the fit.

    Pivots that were drawn before the first fit are left out.
    """
    found = []
    for low, high in zip(edges, edges[1:]):
        inside = (values >= low) & (values < high) & ~np.isnan(pivots["fit"])
        if n := int(inside.sum()):
            k = pivots["recovered"][inside].sum()
            found.append({"low": low, "high": high, "pivots": n, "recovered": k / n, "interval": wilson(k / n, n),
                          "at": float(values[inside].mean()), "fit": float(pivots["fit"][inside].mean())})
    return found


def area(score, y) -> float:
    """The area under the ROC curve: how often a recovered pivot has a higher score than another one, ties half."""
    order = np.sort(score)
    ranks = (np.searchsorted(order, score, "left") + np.searchsorted(order, score, "right") + 1) / 2
    n = y.sum()
    return float((ranks[y == 1].sum() - n * (n + 1) / 2) / (n * (len(y) - n)))


def predictions(pivots) -> dict:
    """{what is known: {log-loss, AUC}} on the later half of the steps, fitted on the earlier half."""
    early = pivots["step"] <= np.floor(pivots["step"].max() / 2)
    y, depth, rate = pivots["recovered"], pivots["depth"], np.log1p(pivots["rate"])
    known = {"nothing: a constant": [], "depth": [depth], "the rate of the question": [rate], "both": [depth, rate]}
    found = {}
    for name, columns in known.items():
        features = np.stack(columns, 1) if columns else np.zeros((len(y), 0))
        weights = fit_logistic(features[early], y[early])
        p = sigmoid(features[~early] @ weights[:-1] + weights[-1])
        found[name] = {"log-loss": -float(log_likelihood(p, y[~early]).mean()),
                       "AUC": area(p, y[~early]) if columns else None}
    return found


def tables(measured) -> str:
    """The Markdown of the page."""
    def shares(rows, name):
        lines = [f"| {name} | pivots | recovered | 95 % interval | Eq. (P) when they were drawn |",
                 "|---|---|---|---|---|"]
        for row in rows:
            label = f"{row['low']:.1f} to {row['high']:.1f}" if name.startswith("depth") else f"{row['low']:.0f}"
            low, high = (f"{100 * x:.1f}" for x in row["interval"])
            lines.append(f"| {label} | {row['pivots']:,} | {100 * row['recovered']:.1f} % | {low} to {high} % | "
                         f"{100 * row['fit']:.1f} % |")
        return lines

    lines = shares(measured["by depth"], "depth of the pivot") + [""]
    lines += shares(measured["by rate"], "correct rollouts of the question") + [""]
    lines += ["| what the prediction knows | log-loss on the later steps | area under the ROC curve |",
              "|---|---|---|"]
    for name, row in measured["predictions"].items():
        auc = "" if row["AUC"] is None else f"{row['AUC']:.2f}"
        lines.append(f"| {name} | {row['log-loss']:.3f} | {auc} |")
    return "\n".join(lines)


def plot(measured):
    """The shares by depth and by the rate of the question, each beside what Eq. (P) said."""
    figure, axes = new_figure(4.2, "ab", sharey=True)
    for name, key in (("a", "by depth"), ("b", "by rate")):
        rows = measured[key]
        x, y, fit = ([row[column] for row in rows] for column in ("at", "recovered", "fit"))
        errors = np.abs(np.array([row["interval"] for row in rows]).T - y)
        axes[name].errorbar(x, y, yerr=errors, fmt="o", color=INK, markersize=5, linewidth=1.5)
        axes[name].plot(x, fit, color=ACCENT, linewidth=1.6, marker="." if name == "b" else None)
        axes[name].grid(axis="y", color=LIGHT, linewidth=0.5, alpha=0.6)
    axes["a"].text(0.14, 0.56, "Eq. (P) when the\npivots were drawn", color=ACCENT)
    axes["a"].set(xlabel="relative depth of the pivot", ylabel="share of pivots that are recovered", xlim=(0, 1),
                  ylim=(0, 0.75))
    axes["b"].set(xlabel="correct rollouts of its question")
    if measured["run"] == str(KEPT):                 # the sentences are about this one
        axes["a"].set_title("Eq. (P) is too high for late pivots.")
        axes["b"].set_title("It does not see the question.")
    figure.suptitle(MESSAGE if measured["run"] == str(KEPT) else TITLE, x=0.01, ha="left")
    figure.supxlabel(f"{measured['pivots']:,} pivots with Wilson's 95 % intervals; those of one question are not "
                     "independent.", fontsize=9, color=GREY, x=0.01, ha="left")
    return figure


def main(argv=None):
    """Write numbers, figure and tables."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=KEPT, help=f"Names the run directory. The default is {KEPT}.")
    parser.add_argument("--results", type=Path, help="Names the folder for numbers, figure and tables. The default is "
                        "results/gsm8k; with another --run it must be named.")
    args = parser.parse_args(argv)
    if args.results is None and args.run != KEPT:
        parser.error("argument --results: name a folder, because results/gsm8k has the numbers of the kept run")
    args.results = args.results or Path("results/gsm8k")
    try:
        pivots = read_pivots(args.run)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"argument --run: {args.run} has no pivots to read: {error}")
    measured = {"run": str(args.run), "pivots": len(pivots["step"]),
                "by depth": groups_of(pivots, pivots["depth"], np.linspace(0, 1, 11).round(1)),
                "by rate": groups_of(pivots, pivots["rate"].round(), np.arange(pivots["rate"].max() + 2)),
                "predictions": predictions(pivots)}
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "recoverability.json").write_text(json.dumps(measured, indent=1) + "\n")
    save_figure(plot(measured), args.results / "recoverability.png")
    text = tables(measured)
    write_page(args.results / "recoverability.md", TITLE, "recoverability.png",
               f"These numbers were written by `{command_line('-m experiments.gsm8k_pivots', argv)}`.\n\n{text}")
    print(text)


if __name__ == "__main__":
    main()
