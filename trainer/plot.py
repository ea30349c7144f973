r"""The figure of a run. A run on GSM8K is drawn beside the numbers of the paper.

    python -m trainer.plot RUN_DIR [RUN_DIR ...]        # writes run.png into each
"""
import json
import os
import sys
from pathlib import Path

import numpy as np

# Files only: no screen is needed. The choice must stand before the import, because matplotlib refuses to be imported
# where the environment names a backend that this Python does not have, as in a shell started from a notebook.
os.environ["MPLBACKEND"] = "agg"
import matplotlib.pyplot as plt  # noqa: E402

PAPER_GSM8K = {"paper: GRPO, N = 8": 0.641, "paper: DEEP-GRPO": 0.677}       # Qwen2.5-0.5B-Instruct, test set


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
    settings = json.loads((Path(run_dir) / "config.json").read_text())["settings"]
    if settings["preset"] == "gsm8k":
        for (name, accuracy), style in zip(PAPER_GSM8K.items(), (":", "--")):
            axes.flat[0].axhline(accuracy, color="black", linewidth=1, linestyle=style, label=name)
        axes.flat[0].legend(fontsize=8)
    path = Path(run_dir) / "run.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m trainer.plot RUN_DIR [RUN_DIR ...]")
    for directory in sys.argv[1:]:
        print(plot_run(directory))
