r"""Figures: one run, or several runs against each other.

    python plot.py RUN_DIR [RUN_DIR ...]        # writes run.png into each
"""
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend that needs no screen)


def read_metrics(run_dir) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """name -> (steps, values) of metrics.jsonl and timing.jsonl, leaving out lines where a metric is missing or null."""
    columns = {}
    for file in ("metrics.jsonl", "timing.jsonl"):
        for line in (Path(run_dir) / file).read_text().splitlines():
            row = json.loads(line)
            for name, value in row.items():
                if value is not None:
                    columns.setdefault(name, []).append((row["step"], value))
    return {name: tuple(np.array(column).T) for name, column in columns.items()}


def plot_run(run_dir) -> Path:
    """Write run.png, the metrics that tell a healthy run from a broken one; returns its path."""
    panels = [("reward and accuracy", ["reward", "branch_reward", "eval_accuracy"]),
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
                axis.plot(*metrics[name], marker="." if name == "eval_accuracy" else None, label=name)
        axis.set(title=title, xlabel="step")
        if axis.has_data():
            axis.legend(fontsize=8)
    path = Path(run_dir) / "run.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python plot.py RUN_DIR [RUN_DIR ...]")
    for directory in sys.argv[1:]:
        print(plot_run(directory))
