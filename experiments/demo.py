r"""The demo: GRPO and DEEP-GRPO side by side on the embedded task, at an equal budget of generated tokens.

    python demo.py           # `make demo`: tiny-deep, 3 seeds each, two runs at a time, one thread each

Both methods start from the shipped base model and see the same questions. A DEEP-GRPO step costs 8 rollouts
per question and 8 short branches per failure, which while nearly everything fails is as many tokens as 24
rollouts: GRPO gets G = 24. As failures get rarer DEEP-GRPO steps get cheaper; both run until the same number
of tokens has been generated.
Writes one run directory each, table.md and comparison.png. Finished runs in --out are kept and not run again.
"""
import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch

from experiments.compare import Arm, Experiment, curve, run_all, seconds_of
from recoverability import sigmoid
from trainer.checkpoint import find_checkpoints
from trainer.plot import read_metrics
from trainer.settings import OneLineParser, count

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend that needs no screen)

ARMS = {"grpo": Arm("GRPO, G = 24", "--method grpo --group-size 24", "tab:gray"),
        "deep_grpo": Arm("DEEP-GRPO, G = 8, K = 8", "--method deep_grpo", "tab:red")}


def table(directories) -> str:
    """A Markdown table: mean and standard deviation over seeds."""
    lines = ["| method | accuracy before | after | updates | generated tokens | trained tokens | seconds |",
             "|---|---|---|---|---|---|---|"]
    for method, runs in directories.items():
        metrics = [read_metrics(run) for run in runs]
        seconds = [seconds_of(m).sum() for m in metrics]
        columns = [[m["eval_accuracy"][1][0] for m in metrics], [m["eval_accuracy"][1][-1] for m in metrics],
                   [m["grad_norm"][0][-1] for m in metrics], [m["generated_total"][1][-1] for m in metrics],
                   [m["trained_tokens"][1].sum() for m in metrics], seconds]
        forms = [".3f", ".3f", ".0f", ".0f", ".0f", ".0f"]
        cells = [f"{np.mean(c):{form}} ± {np.std(c, ddof=len(c) > 1):{form}}"
                 for c, form in zip(columns, forms)]
        lines.append(f"| {ARMS[method].label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_curves(axis, directories, x_name, y_name):
    """Mean over seeds with all seeds behind it. x_name: generated_total, or None for updates."""
    for method, runs in directories.items():
        label, _, color = ARMS[method]
        curves = []
        for run in runs:
            x, values = curve(read_metrics(run), x_name, y_name)
            axis.plot(x, values, color=color, alpha=0.25, linewidth=1)
            curves.append((x, values))
        grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 60)
        mean = np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)
        axis.plot(grid, mean, color=color, linewidth=2.5, label=label)
    axis.legend(fontsize=8)


def draw_pivots(fit_axis, where_axis, runs):
    """The fit of Eq. (P) over the observed recovery rates, and where pivots were drawn, from all seeds."""
    newest = [find_checkpoints(run)[-1][1] for run in runs]
    states = [torch.load(folder / "trainer.pt", weights_only=False)["recoverability"] for folder in newest]
    ratio, success = np.array([outcome for state in states for outcome in state["outcomes"]]).T
    place = np.rint(10 * ratio)                                              # depths to the nearest tenth
    used = np.unique(place)
    rate = np.array([success[place == i].mean() for i in used])
    error = np.sqrt(rate * (1 - rate) / [(place == i).sum() for i in used])
    fit_axis.errorbar(used / 10, rate, yerr=error, fmt="o", color="black", label="observed ± standard error")
    depth = np.linspace(0.05, 0.95, 50)
    for i, state in enumerate(states):
        fit_axis.plot(depth, sigmoid(state["w"] * depth + state["b"]), color="tab:red", alpha=0.6,
                      label=None if i else "fit of Eq. (P), a line per seed")
    fit_axis.set(title="P(success | r): at least one of K branches right",
                 xlabel="relative depth r of the pivot", ylim=(0, 1))
    fit_axis.legend(fontsize=8)
    first, second = [], []
    for outcomes in (state["outcomes"] for state in states):
        first += [r for r, _ in outcomes[:len(outcomes) // 2]]
        second += [r for r, _ in outcomes[len(outcomes) // 2:]]
    where_axis.hist([first, second], bins=np.arange(-0.05, 1.1, 0.1), density=True,
                    color=["tab:pink", "tab:red"], label=["first half of all pivots", "second half"])
    where_axis.set(title="where pivots were drawn", xlabel="relative depth r", ylabel="density")
    where_axis.legend(fontsize=8)


def caption(directories) -> str:
    """What is seen, made from the numbers: both methods at half and at all of the tokens, and of the updates."""
    metrics = [read_metrics(run) for runs in directories.values() for run in runs]
    sentences = []
    for x_name, unit in (("generated_total", "generated tokens"), (None, "updates")):
        most = min(m[x_name][1][-1] if x_name else m["grad_norm"][0][-1] for m in metrics)
        for x in (most / 2, most):
            grpo, deep = (np.array([np.interp(x, *curve(read_metrics(run), x_name)) for run in directories[m]])
                          for m in ("grpo", "deep_grpo"))
            difference = deep.mean() - grpo.mean()
            error = np.sqrt(sum(np.var(v, ddof=len(v) > 1) / len(v) for v in (grpo, deep)))
            verdict = ("ahead" if difference > 2 * error else
                       "behind" if difference < -2 * error else "no clear difference")
            sentences.append(f"After {x:.0f} {unit}: GRPO {grpo.mean():.2f}, DEEP-GRPO {deep.mean():.2f}; "
                             f"{difference:+.2f} \u00b1 {error:.2f} (standard error): {verdict}.")
    return "\n".join(sentences)


def draw(directories, path):
    """The figure of the comparison, also returned."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 9), layout="constrained")
    draw_curves(axes[0, 0], directories, "generated_total", "eval_accuracy")
    axes[0, 0].set(title="greedy accuracy on held-out questions", xlabel="generated tokens")
    draw_curves(axes[0, 1], directories, None, "eval_accuracy")
    axes[0, 1].set(title="greedy accuracy on held-out questions", xlabel="updates")
    draw_curves(axes[0, 2], directories, None, "entropy")
    axes[0, 2].set(title="entropy of the policy (nats per token)", xlabel="updates")
    draw_pivots(axes[1, 0], axes[1, 1], directories["deep_grpo"])
    draw_curves(axes[1, 2], directories, None, "reward")
    axes[1, 2].set(title="mean reward of the rollouts", xlabel="updates")
    seeds = len(directories["grpo"])
    figure.supxlabel(f"Bold: mean of {seeds} seeds.\n{caption(directories)}", fontsize=10)
    figure.savefig(path, dpi=90)
    return figure


def main():
    """Run what is missing, then print the table and write the figure."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["tiny", "tiny-deep"], default="tiny-deep")
    parser.add_argument("--seeds", type=count, default=3)
    parser.add_argument("--budget-tokens", type=int, default=80_000, help="generated tokens per run")
    parser.add_argument("--eval-every", type=int, default=4, help="updates between evaluations")
    parser.add_argument("--jobs", type=count, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    args = parser.parse_args()
    start = time.time()
    flags = f"--preset {args.preset} --eval-every {args.eval_every}"
    directories = run_all(Experiment("demo", args.seeds, args.budget_tokens, flags, ARMS), args.out, args.jobs)
    text = table(directories)
    (args.out / "table.md").write_text(text + "\n")
    draw(directories, args.out / "comparison.png")
    print(f"\n{args.preset}, {args.seeds} seeds, mean ± standard deviation:\n\n{text}\n\n"
          f"{caption(directories)}\n")
    print(f"figure: {args.out / 'comparison.png'}   ({time.time() - start:.0f} seconds)")


if __name__ == "__main__":
    main()
