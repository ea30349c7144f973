r"""Two real runs on GSM8K at equal tokens, DEEP-GRPO and GRPO with more questions: the figure of their page.

    python -m experiments.gsm8k_runs        # the kept runs, in seconds: results/gsm8k/second-run.png

The left panel has the share of correct rollouts of every step, which is measured on the questions that are trained. The
right panel has the greedy accuracy on all test questions, with its 95 % interval.
"""
import argparse
from pathlib import Path

from eval_math import wilson
from experiments.figures import ACCENT, INK, new_figure, save_figure
from trainer.plot import read_metrics
from trainer.settings import OneLineParser

RUNS = {"deep": ("DEEP-GRPO, 32 questions", ACCENT), "grpo": ("GRPO, 150 questions", INK)}
TEST_QUESTIONS = 1319
KEPT = Path(__file__).parents[1] / "results" / "gsm8k" / "second_run"
MESSAGE = "At equal tokens, GRPO with more questions learned faster (GSM8K, one seed)"


def plot_runs(metrics):
    """Correct rollouts over steps, and test accuracy where it was measured. metrics: name of RUNS -> read_metrics()."""
    figure, axes = new_figure(3.4, "ab", width_ratios=(1.5, 1))
    for name, (label, colour) in RUNS.items():
        steps, reward = metrics[name]["reward"]
        axes["a"].plot(steps, 100 * reward, color=colour, linewidth=1.8)
        axes["a"].annotate(label, (steps[-1], 100 * reward[-3:].mean()), (0, 10 if name == "grpo" else -44),
                           textcoords="offset points", ha="right", color=colour)
        steps, accuracy = metrics[name]["eval_accuracy"]
        bounds = [wilson(value, TEST_QUESTIONS) for value in accuracy]
        below, above = ([100 * abs(bound[side] - value) for bound, value in zip(bounds, accuracy)] for side in (0, 1))
        axes["b"].errorbar(steps + (0.15 if name == "grpo" else -0.15), 100 * accuracy, yerr=[below, above], fmt="o-",
                           color=colour, linewidth=1.8)
    axes["a"].set(title="Training", xlabel="step", ylabel="correct rollouts (%)", ylim=(0, 42),
                  xticks=(1, 5, 10, 15, 20))
    axes["b"].set(title="Test", xlabel="step; bars are 95 % intervals", ylabel="greedy accuracy (%)",
                  xticks=(0, 10, 20))
    figure.suptitle(MESSAGE, x=0.01, ha="left")
    return figure


def main(argv=None):
    """Draw the figure."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/gsm8k"),
                        help="Names the folder for the figure. The default is results/gsm8k.")
    args = parser.parse_args(argv)
    args.results.mkdir(parents=True, exist_ok=True)
    picture = args.results / "second-run.png"
    save_figure(plot_runs({name: read_metrics(KEPT / name) for name in RUNS}), picture)
    print(picture)


if __name__ == "__main__":
    main()
