r"""GRPO and DEEP-GRPO side by side on the embedded task, at an equal budget of generated tokens.

    python compare.py        # what `make demo` runs: tiny-deep, 3 seeds each, two runs at a time with one thread each

Both methods start from the shipped base model and see the same questions. A DEEP-GRPO step costs 8 rollouts per question and 8
short branches per failure, which while nearly everything fails is as many tokens as 24 rollouts: GRPO gets G = 24. As failures
get rarer DEEP-GRPO steps get cheaper; both run until the same number of tokens has been generated.
Writes one run directory each, table.md and comparison.png. Finished runs in --out are kept and not run again.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

from plot import read_metrics
from recoverability import sigmoid

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend that needs no screen)

METHODS = {"grpo": ("GRPO, G = 24", ["--method", "grpo", "--group-size", "24"], "tab:gray"),
           "deep_grpo": ("DEEP-GRPO, G = 8, K = 8", ["--method", "deep_grpo"], "tab:red")}


def run_all(args) -> dict[str, list[Path]]:
    """Run every method with every seed, args.jobs at a time; returns method -> run directories."""
    directories = {m: [args.out / f"{m}-{seed}" for seed in range(args.seeds)] for m in METHODS}
    waiting = [(m, seed, d) for m in METHODS for seed, d in enumerate(directories[m])]
    waiting.sort(key=lambda entry: entry[1])
    kept = [entry for entry in waiting if (entry[2] / "run.png").exists()]        # written last
    if kept:
        print(f"{len(kept)} finished runs in {args.out} are kept; delete the folder to run them again")
    waiting = [entry for entry in waiting if entry not in kept]
    running = {}
    with tqdm(total=len(waiting) * args.budget_tokens, unit="token", unit_scale=True, desc="generated") as bar:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                method, seed, directory = waiting.pop(0)
                shutil.rmtree(directory, ignore_errors=True)                      # of an interrupted comparison
                directory.parent.mkdir(parents=True, exist_ok=True)
                command = [sys.executable, str(Path(__file__).parent / "train_gsm8k.py"), "--preset", args.preset, *METHODS[method][1],
                           "--seed", str(seed), "--budget-tokens", str(args.budget_tokens), "--steps", "100000", "--out", str(directory)]
                output = open(directory.with_suffix(".log"), "w")
                running[directory] = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"})
            time.sleep(0.5)
            for directory, process in list(running.items()):
                if process.poll() is not None:
                    del running[directory]
                    if process.returncode:
                        for other in running.values():
                            other.terminate()
                        sys.exit(f"error: {directory} failed, its last line: {directory.with_suffix('.log').read_text().splitlines()[-1]}")
            bar.n = sum(min(args.budget_tokens, tokens_so_far(d)) for m in METHODS for d in directories[m]) - len(kept) * args.budget_tokens
            bar.refresh()
    return directories


def tokens_so_far(run_dir):
    """Generated tokens that metrics.jsonl reports; 0 before there is one."""
    try:
        return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["generated_total"]
    except (OSError, IndexError, ValueError):        # not there, empty, or its last line is being written
        return 0


def table(directories) -> str:
    """A Markdown table: mean and standard deviation over seeds."""
    lines = ["| method | accuracy before | after | updates | generated tokens | trained tokens | seconds |",
             "|---|---|---|---|---|---|---|"]
    for method, runs in directories.items():
        metrics = [read_metrics(run) for run in runs]
        columns = [[m["eval_accuracy"][1][0] for m in metrics], [m["eval_accuracy"][1][-1] for m in metrics],
                   [m["grad_norm"][0][-1] for m in metrics], [m["generated_total"][1][-1] for m in metrics],
                   [m["trained_tokens"][1].sum() for m in metrics],
                   [sum(m[f"seconds_{part}"][1].sum() for part in ("rollout", "resample", "score", "update")) for m in metrics]]
        forms = [".3f", ".3f", ".0f", ".0f", ".0f", ".0f"]
        cells = [f"{np.mean(c):{form}} ± {np.std(c, ddof=len(c) > 1):{form}}" for c, form in zip(columns, forms)]
        lines.append(f"| {METHODS[method][0]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_curves(axis, directories, x_name, y_name):
    """Mean over seeds with all seeds behind it. x_name: generated_total, or None for updates."""
    for method, runs in directories.items():
        label, _, color = METHODS[method]
        curves = []
        for run in runs:
            metrics = read_metrics(run)
            steps, values = metrics[y_name]
            x = np.interp(steps, *metrics[x_name]) if x_name else steps
            axis.plot(x, values, color=color, alpha=0.25, linewidth=1)
            curves.append((x, values))
        grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 60)
        axis.plot(grid, np.mean([np.interp(grid, x, y) for x, y in curves], axis=0), color=color, linewidth=2.5, label=label)
    axis.legend(fontsize=8)


def draw_pivots(fit_axis, where_axis, runs):
    """The fit of Eq. (P) over the observed recovery rate per depth, and where pivots were drawn, from all seeds."""
    states = [torch.load(sorted(run.glob("checkpoints/step_*/trainer.pt"))[-1], weights_only=False)["recoverability"] for run in runs]
    bins = np.linspace(0, 1, 11)
    ratio, success = np.array([outcome for state in states for outcome in state["outcomes"]]).T
    place = np.digitize(ratio, bins) - 1
    used = [i for i in range(10) if (place == i).any()]
    rate = np.array([success[place == i].mean() for i in used])
    error = np.array([np.sqrt(rate[j] * (1 - rate[j]) / (place == i).sum()) for j, i in enumerate(used)])
    fit_axis.errorbar(bins[used] + 0.05, rate, yerr=error, fmt="o", color="black", label="observed ± standard error")
    depth = np.linspace(0.05, 0.95, 50)
    for i, state in enumerate(states):
        fit_axis.plot(depth, sigmoid(state["w"] * depth + state["b"]), color="tab:red", alpha=0.6, label=None if i else "fit of Eq. (P), a line per seed")
    fit_axis.set(title="P(success | r): at least one of K branches right", xlabel="relative depth r of the pivot", ylim=(0, 1))
    fit_axis.legend(fontsize=8)
    halves = [[r for state in states for r, _ in part(state["outcomes"])] for part in (lambda o: o[:len(o) // 2], lambda o: o[len(o) // 2:])]
    where_axis.hist(halves, bins=bins, density=True, label=["first half of the run", "second half"], color=["tab:pink", "tab:red"])
    where_axis.set(title="where pivots were drawn", xlabel="relative depth r", ylabel="density")
    where_axis.legend(fontsize=8)


def draw(directories, path):
    """The figure of the comparison."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    draw_curves(axes[0, 0], directories, "generated_total", "eval_accuracy")
    axes[0, 0].set(title="greedy accuracy on held-out questions", xlabel="generated tokens")
    draw_curves(axes[0, 1], directories, None, "eval_accuracy")
    axes[0, 1].set(title="greedy accuracy on held-out questions", xlabel="updates")
    draw_curves(axes[0, 2], directories, None, "entropy")
    axes[0, 2].set(title="entropy of the policy (nats per token)", xlabel="updates")
    draw_pivots(axes[1, 0], axes[1, 1], directories["deep_grpo"])
    draw_curves(axes[1, 2], directories, None, "reward")
    axes[1, 2].set(title="mean reward of the rollouts", xlabel="updates")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main():
    """Run what is missing, then print the table and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["tiny", "tiny-deep"], default="tiny-deep")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget-tokens", type=int, default=300_000, help="generated tokens per run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    args = parser.parse_args()
    start = time.time()
    directories = run_all(args)
    text = table(directories)
    (args.out / "table.md").write_text(text + "\n")
    draw(directories, args.out / "comparison.png")
    print(f"\n{args.preset}, {args.seeds} seeds, mean ± standard deviation:\n\n{text}\n")
    print(f"figure: {args.out / 'comparison.png'}   ({time.time() - start:.0f} seconds)")


if __name__ == "__main__":
    main()
