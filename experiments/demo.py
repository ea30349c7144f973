r"""The demo: DEEP-GRPO beside GRPO on the embedded task, at an equal budget of generated tokens.

    python -m experiments.demo           # `make demo`: tiny-deep, 3 seeds of each, two runs at a time, one thread each

All runs start from the shipped base model. DEEP-GRPO draws 8 rollouts per question and 8 short branches per failure.
While nearly everything fails, most of the tokens are those of branches. It is compared with two methods that spend less
on branches and have more updates instead:

    GRPO, G = 8          no branches. An update has a third of the tokens at first.
    DEEP-GRPO, S = 1/2   only half of the failures are branched, drawn at random (--branch-share .5, variants/thin.py).

All of them run until the same number of tokens has been generated. The demo takes about eight minutes on two cores. The
demo writes a run directory for each run, table.md and comparison.png. Finished runs in --out are kept and are not run
again.
"""
import argparse
import textwrap
import time
from pathlib import Path

import numpy as np
import torch

from experiments.figures import ACCENT, GREY, INK, LIGHT, new_figure, plot_accuracies, save_figure
from experiments.runs import Arm, Experiment, accuracy_curve, interval, run_all, seconds_of
from recoverability import sigmoid
from trainer.checkpoint import find_checkpoints
from trainer.plot import read_metrics
from trainer.settings import OneLineParser, count

ARMS = {"deep_grpo": Arm("DEEP-GRPO, G = 8, K = 8", "--method deep_grpo"),
        "grpo": Arm("GRPO, G = 8", "--method grpo"),
        "half": Arm("DEEP-GRPO, S = 1/2", "--method deep_grpo --branch-share .5")}
NAMES = {"deep_grpo": "DEEP-GRPO", "grpo": "GRPO", "half": "DEEP-GRPO, S = 1/2"}
LOOKS = {"deep_grpo": (ACCENT, "-"), "grpo": (INK, "--"), "half": (ACCENT, ":")}


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


def accuracy_at(runs, tokens) -> np.ndarray:
    """Greedy accuracy of every run after so many generated tokens, linear between evaluations."""
    return np.array([np.interp(tokens, *accuracy_curve(read_metrics(run))) for run in runs])


def shared_tokens(directories) -> float:
    """The generated tokens that every run has reached."""
    return min(read_metrics(run)["generated_total"][1][-1] for runs in directories.values() for run in runs)


def verdict_of(found) -> str:
    """Which differences to DEEP-GRPO are significant: a paired t test by seed, 95 %. found: method -> accuracies."""
    clear = []
    for method in ("grpo", "half"):
        mean, width, _ = interval(found["deep_grpo"] - found[method])
        if abs(mean) > width:
            clear.append(f"{'ahead of' if mean > 0 else 'behind'} {NAMES[method]}")
    return (f"DEEP-GRPO is significantly {' and '.join(clear)}" if clear else
            f"with {len(found['grpo'])} seeds no difference to DEEP-GRPO is significant")


def caption(directories) -> str:
    """Two sentences made from the numbers: all methods after half and after all of the tokens."""
    tokens, sentences = shared_tokens(directories), []
    for x, start in ((tokens / 2, "After half of the tokens"), (tokens, "At the end")):
        found = {method: accuracy_at(runs, x) for method, runs in directories.items()}
        reached = [f"{100 * found[method].mean():.0f} % with {NAMES[method]}" for method in ARMS]
        sentences.append(f"{start} the accuracy is {reached[0]}, {reached[1]} and {reached[2]}; {verdict_of(found)}.")
    return "\n".join(sentences)


def plot_accuracy(axis, directories):
    """Accuracy over generated tokens: the mean over seeds, with all seeds behind it, named at its end."""
    curves = []
    for method, runs in directories.items():
        seeds = [accuracy_curve(read_metrics(run)) for run in runs]
        curves.append((NAMES[method], *LOOKS[method], [(tokens / 1000, 100 * accuracy) for tokens, accuracy in seeds]))
    means = plot_accuracies(axis, curves, shared_tokens(directories) / 1000)
    best, *_ = max(zip([name for name, *_ in curves], means), key=lambda pair: pair[1][len(pair[1]) // 2])
    axis.set(xlabel=f"generated tokens (thousands); bold lines are means of {len(runs)} seeds",
             title=f"After half of the tokens {best} has the highest accuracy")


def outcomes_of(runs) -> list[dict]:
    """The state of Eq. (P) of every run at its end: w, b, and the outcomes [(relative depth, success)]."""
    newest = [find_checkpoints(run)[-1][1] for run in runs]
    return [torch.load(folder / "trainer.pt", weights_only=False)["recoverability"] for folder in newest]


def plot_fit(axis, states):
    """P(success given depth): observed at every tenth of the depth, and the fit of Eq. (P) of every seed."""
    ratio, success = np.array([outcome for state in states for outcome in state["outcomes"]]).T
    place = np.rint(10 * ratio)                                              # depths to the nearest tenth
    used = np.unique(place)
    rate = np.array([success[place == i].mean() for i in used])
    error = np.sqrt(rate * (1 - rate) / [(place == i).sum() for i in used])
    axis.errorbar(used / 10, 100 * rate, yerr=100 * error, fmt="o", color=INK, markersize=5)
    depth = np.linspace(0.05, 0.95, 50)
    for state in states:
        axis.plot(depth, 100 * sigmoid(state["w"] * depth + state["b"]), color=ACCENT, alpha=0.7, linewidth=1.5)
    axis.text(0.04, 0.11, "observed, standard errors", color=INK, transform=axis.transAxes, fontsize=9)
    axis.text(0.04, 0.03, "fit of Eq. (P), every seed", color=ACCENT, transform=axis.transAxes, fontsize=9)
    falls = all(state["w"] < 0 for state in states)
    axis.set(title="Recovery falls with depth" if falls else "How often pivots are recovered",
             xlabel="relative depth of the pivot", ylim=(0, 100), xlim=(0, 1),
             ylabel="at least one of 8\nbranches is correct (%)")


def plot_pivot_depths(axis, states):
    """Where pivots were drawn: the share of each tenth of the depth, in the first and the second half of all pivots."""
    halves = [[], []]
    for outcomes in (state["outcomes"] for state in states):
        halves[0] += [r for r, _ in outcomes[:len(outcomes) // 2]]
        halves[1] += [r for r, _ in outcomes[len(outcomes) // 2:]]
    axis.hist(halves, bins=np.arange(-0.05, 1.1, 0.1), color=[LIGHT, ACCENT],
              weights=[np.full(len(half), 100 / len(half)) for half in halves])
    axis.text(0.04, 0.90, "first half of all pivots", color=GREY, transform=axis.transAxes, fontsize=9)
    axis.text(0.04, 0.81, "second half", color=ACCENT, transform=axis.transAxes, fontsize=9)
    late = np.median(halves[0] + halves[1]) > 0.5
    axis.set(title="Most pivots are late" if late else "Where pivots were drawn", xlabel="relative depth of the pivot",
             ylabel="share of pivots (%)", xlim=(0, 1))


def plot_demo(directories):
    """Accuracy above; below, what DEEP-GRPO has learned about its failures, and where it branched."""
    figure, axes = new_figure(7, "aa;fp", height_ratios=(1.25, 1))
    plot_accuracy(axes["a"], directories)
    states = outcomes_of(directories["deep_grpo"])
    plot_fit(axes["f"], states)
    plot_pivot_depths(axes["p"], states)
    sentences = caption(directories).replace("G = ", "G\u00a0=\u00a0").split("\n")       # a line ends elsewhere
    lines = [line for sentence in sentences for line in textwrap.wrap(sentence, 112)]
    figure.supxlabel("\n".join(lines), fontsize=9, color=INK, x=0.01, ha="left")
    return figure


def main(argv=None):
    """Run what is missing, then print the table and write the figure."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["tiny", "tiny-deep"], default="tiny-deep",
                        help="Selects the base model and the length of the questions. The default is tiny-deep.")
    parser.add_argument("--seeds", type=count, default=3, help="Sets the seeds of every method. The default is 3.")
    parser.add_argument("--budget-tokens", type=count, default=80_000,
                        help="Sets the generated tokens of a run. The default is 80000.")
    parser.add_argument("--eval-every", type=count, default=4,
                        help="Evaluates after this many updates. GRPO with G = 8, whose updates are a third as "
                        "long, is evaluated after three times as many. The default is 4.")
    parser.add_argument("--jobs", type=count, default=2,
                        help="Sets how many runs go on at a time, with one thread each. The default is 2.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"),
                        help="Names the folder for run directories, table and figure. The default is runs/demo.")
    args = parser.parse_args(argv)
    start = time.time()
    arms = ARMS | {"grpo": ARMS["grpo"]._replace(flags=f"{ARMS['grpo'].flags} --eval-every {3 * args.eval_every}")}
    flags = f"--preset {args.preset} --eval-every {args.eval_every}"
    directories = run_all(Experiment("demo", args.seeds, args.budget_tokens, flags, arms), args.out, args.jobs)
    text = table(directories)
    (args.out / "table.md").write_text(text + "\n")
    save_figure(plot_demo(directories), args.out / "comparison.png")
    print(f"\n{args.preset}, {args.seeds} seeds, mean ± standard deviation:\n\n{text}\n\n"
          f"{caption(directories)}\n")
    print(f"figure: {args.out / 'comparison.png'}   ({time.time() - start:.0f} seconds)")


if __name__ == "__main__":
    main()
