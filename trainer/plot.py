r"""The figure of a run. A run on GSM8K is drawn over two runs of the authors, and compared with them in one line.

    python -m trainer.plot RUN_DIR [RUN_DIR ...]        # writes run.png into each

Accuracies are smoothed: each is the mean of the evaluations of the 50 steps before it, in the authors' runs at the same
steps as in this one.
"""
import csv
import json
import os
import sys
from pathlib import Path

import numpy as np

# Files only: no screen is needed. The choice must stand before the import, because matplotlib refuses to be imported
# where the environment names a backend that this Python does not have, as in a shell started from a notebook.
os.environ["MPLBACKEND"] = "agg"
import matplotlib.pyplot as plt  # noqa: E402

AUTHORS_CURVES = Path(__file__).parents[1] / "results" / "gsm8k" / "authors_curves.csv"
THEIRS = {"deep_grpo": "CRPO-sp-p1-b8-gamma2.0-lam1.0", "grpo": "crpo-no-branch"}    # DEEP-GRPO and GRPO with N = 8
WINDOW = 50                              # steps


def read_metrics(run_dir) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return {name: (steps, values)} of metrics.jsonl and timing.jsonl.

    Lines in which a metric is missing or null are left out of its values.
    """
    columns = {}
    for file in ("metrics.jsonl", "timing.jsonl"):
        for line in (Path(run_dir) / file).read_text().splitlines():
            row = json.loads(line)
            for name, value in row.items():
                if value is not None:
                    columns.setdefault(name, []).append((row["step"], value))
    return {name: tuple(np.array(column).T) for name, column in columns.items()}


def authors_curves() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{column: (steps, values)} of the authors' exported logs: accuracies from 0 to 1, and hours."""
    with open(AUTHORS_CURVES, encoding="utf-8") as file:
        names, *rows = csv.reader(line for line in file if not line.startswith("#"))
    columns = {name: [(float(row[0]), float(row[i])) for row in rows if row[i]] for i, name in enumerate(names)}
    return {name: tuple(np.array(pairs).T) for name, pairs in columns.items()}


def smooth(steps, values) -> np.ndarray:
    """The mean of the values of the last WINDOW steps, at each step."""
    return np.array([values[(steps > step - WINDOW) & (steps <= step)].mean() for step in steps])


def interval(accuracy, n):
    """Half the 95 % interval of an accuracy on n questions."""
    return 1.96 * np.sqrt(accuracy * (1 - accuracy) / n)


def on_gsm8k(about) -> bool:
    """Is a run evaluated on the test set of the authors' runs? A copy in a file is known by its number of questions.

    about: what config.json holds.
    """
    return about["settings"].get("eval_data") == "gsm8k" or about.get("evaluation_questions") == 1319


def last_words(run_dir) -> list[str]:
    """What to say of a run's evaluations: the mean of the last quarter, and, on GSM8K, where the authors' runs were.

    The interval of a run is that of its test questions, and that of an authors' run the spread of its evaluations in
    the window. Neither knows how much seeds differ.
    """
    about = json.loads((Path(run_dir) / "config.json").read_text())
    steps, values = read_metrics(run_dir).get("eval_accuracy", (np.zeros(0), np.zeros(0)))
    if not len(steps) or steps[-1] == 0:
        return []
    late = values[-max(1, len(values) // 4):]
    lines = [f"the mean accuracy on the evaluation questions over the last {len(late)} of {len(values)} evaluations is "
             f"{late.mean():.3f}: a number that is not a maximum"]
    if not on_gsm8k(about):
        return lines
    n, curves, mine = about["evaluation_questions"], authors_curves(), smooth(steps, values)[-1]
    said = f"at step {steps[-1]:.0f} this run is at {mine:.3f} +- {interval(mine, n):.3f}"
    for name, column in THEIRS.items():
        at, theirs = curves[column]
        if steps[-1] > at[-1]:
            said += f"; the authors' {name} ended before"
            continue
        spread = 1.96 * theirs[(at > steps[-1] - WINDOW) & (at <= steps[-1])].std()
        said += f"; the authors' {name} was at {smooth(steps, np.interp(steps, at, theirs))[-1]:.3f} +- {spread:.3f}"
    return [*lines, said]


def plot_run(run_dir) -> Path:
    """Write run.png with the metrics that tell a healthy run from a broken one. Returns its path."""
    panels = [("reward and accuracy", ["reward", "branch_reward", "eval_accuracy", "val_accuracy"]),
              ("entropy of the policy (nats)", ["entropy"]),
              ("dead groups (share)", ["dead_groups", "dead_branch_groups"]),
              ("pivots", ["pivot_depth", "recovered"]),
              ("length (tokens)", ["response_length", "branch_length"]),
              ("gradient norm", ["grad_norm"]),
              ("KL to the start (nats)", ["kl"]),
              ("fit of Eq. (P)", ["w", "b"])]
    metrics = read_metrics(run_dir)
    figure, axes = plt.subplots(2, 4, figsize=(16, 7), layout="constrained")
    for axis, (title, names) in zip(axes.flat, panels):
        for name in names:
            if name in metrics:
                axis.plot(*metrics[name], marker="." if name.endswith("accuracy") else None, label=name)
        axis.set(title=title, xlabel="step")
        if axis.has_data():
            axis.legend(fontsize=8)
    about = json.loads((Path(run_dir) / "config.json").read_text())
    if on_gsm8k(about):
        last, curves = max((steps[-1] for steps, _ in metrics.values()), default=0), authors_curves()
        for (name, column), style in zip(THEIRS.items(), ("-", "--")):
            steps, values = curves[column]
            if "eval_accuracy" in metrics:           # smoothed over the same steps as those of this run
                own = metrics["eval_accuracy"][0]
                own = own[own <= steps[-1]]
                steps, values = own, np.interp(own, steps, values)
            shown = steps <= max(last, 25)
            axes.flat[0].plot(steps[shown], smooth(steps, values)[shown], color="0.6", linestyle=style, zorder=0,
                              label=f"authors: {name}, smoothed")
        if "eval_accuracy" in metrics:
            steps, values = metrics["eval_accuracy"]
            mine, width = smooth(steps, values), interval(smooth(steps, values), about["evaluation_questions"])
            axes.flat[0].plot(steps, mine, color="black", label="eval_accuracy, smoothed")
            axes.flat[0].fill_between(steps, mine - width, mine + width, color="black", alpha=0.12, linewidth=0)
        axes.flat[0].legend(fontsize=8)
    figure.suptitle(f"{run_dir}: {about['settings'].get('method', '')}")
    path = Path(run_dir) / "run.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def main(argv) -> int:
    """Draw every run that is named. Returns the exit code: 2, with one line on stderr, for what is no run."""
    if not argv:
        print("error: name a run: python -m trainer.plot RUN_DIR [RUN_DIR ...]", file=sys.stderr)
        return 2
    for directory in argv:
        try:
            print(plot_run(directory), *last_words(directory), sep="\n")
        except (OSError, ValueError, KeyError) as error:
            print(f"error: {directory} does not hold a run that can be drawn: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
