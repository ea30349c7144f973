r"""What does the published 67.7 on GSM8K mean? The authors' exported logs, read again.

    python -m experiments.gsm8k_curves                 # figure, numbers and tables, in seconds

The logs have the test accuracy of 17 runs, every 5 steps, one seed each (results/gsm8k/authors_curves.csv, whose first
line names the source). Their names say which run is which; that they are the runs of the paper follows from these names
and from agreeing digits.

best      the largest of the evaluations up to step 2,000 (what the paper reports of GRPO), or of all (of DEEP-GRPO)
late      the mean of the evaluations of steps 1,500 to 2,000: no maximum, and far less noise
noise     how much one evaluation differs from the next: the standard deviation of their difference over sqrt(2)
"""
import argparse
import json
from pathlib import Path

import numpy as np

from experiments.figures import ACCENT, GREY, INK, LIGHT, new_figure, save_figure
from experiments.runs import write_page
from trainer.plot import authors_curves, smooth
from trainer.settings import OneLineParser, command_line

RUNS = {"DEEP-GRPO, K = 8": "CRPO-sp-p1-b8-gamma2.0-lam1.0", "GRPO, N = 8": "crpo-no-branch",
        "GRPO, N = 16": "crpo-no-branch-n16-new", "GRPO, N = 32": "GRPO-n32", "GRPO, N = 64": "GRPO-n64",
        "K = 4": "CRPO-sp-p1b4-gamma2.0-lam1.0", "two pivots, K = 4": "CRPO-sp-p2b4-gamma2.0-lam1.0",
        "every rollout branched": "CRPO-sp-p1b8-gamma2.0-lam1.0-expandall",
        "γ = .1": "CRPO-sp-p1-b8-gamma0.1-lam1.0", "γ = 1": "CRPO-sp-p1-b8-gamma1.0-lam1.0",
        "γ = 3": "CRPO-sp-p1-b8-gamma3.0-lam1.0", "uniform pivot": "CRPO-sp-p1-b8-random-lam1.0",
        "γ = −20, the question": "CRPO-sp-p1-b8-gamma-20.0-lam1.0",
        "λ = .1": "CRPO-sp-p1-b8-gamma2.0-lam0.1", "λ = .5": "CRPO-sp-p1-b8-gamma2.0-lam0.5",
        "λ = 2": "CRPO-sp-p1-b8-gamma2.0-lam2.0"}                            # TreeRL's has another prompt and grader
DEEP, GRPO, LARGE = "DEEP-GRPO, K = 8", "GRPO, N = 8", "GRPO, N = 64"
TWINS = [DEEP, "γ = .1", "γ = 1", "γ = 3", "λ = .5", "λ = 2"]                # settings that hardly differ
WINDOWS = {"step 25": (20, 30), "step 100": (80, 120), "step 500": (450, 550), "step 1,000": (900, 1100),
           "late": (1500, 2000)}
QUESTIONS = 1319                         # of the test set
TITLE = "What does the published 67.7 on GSM8K mean?"
MESSAGE = "67.7 is the largest of 592 evaluations. Over a window the run stands at 65.7."


def window(steps, values, low, high) -> tuple[float, float]:
    """(mean, standard deviation) of the values of the steps from low to high."""
    inside = values[(steps >= low) & (steps <= high)]
    return float(inside.mean()), float(inside.std(ddof=1))


def summarize(steps, values) -> dict:
    """The numbers of one run, in percent."""
    percent, early = 100 * values, steps <= 2000
    inside = (steps >= 1500) & (steps <= 2000)
    return {"start": percent[0], **{name: window(steps, percent, *span) for name, span in WINDOWS.items()},
            "best to 2,000": percent[early].max(), "best": percent.max(), "best step": int(steps[percent.argmax()]),
            "evaluations": len(percent), "noise": float(np.diff(percent[inside]).std(ddof=1) / np.sqrt(2))}


def noise_of(runs) -> dict:
    """What one number is worth, in points: of the test set, of one evaluation, of the untrained model, and of a run."""
    late = {name: runs[name]["late"][0] for name in runs}
    p = late[DEEP] / 100
    return {"test set": 100 * float(np.sqrt(p * (1 - p) / QUESTIONS)),
            "evaluation": float(np.median([run["noise"] for run in runs.values()])),
            "start": float(np.std([run["start"] for run in runs.values()], ddof=1)),
            "run": float(np.std([late[name] for name in TWINS], ddof=1)),
            "maximum over late": float(np.median([run["best to 2,000"] - run["late"][0] for run in runs.values()]))}


def hours_to(curves, accuracies=(0.60, 0.62, 0.64)) -> dict:
    """{run: hours until its smoothed accuracy first reaches each of these; None if it never does}."""
    found = {}
    for name, column in RUNS.items():
        if f"hours {column}" in curves:
            steps, values = curves[column]
            hours = np.interp(steps, *curves[f"hours {column}"])
            reached = [hours[smooth(steps, values) >= accuracy] for accuracy in accuracies]
            found[name] = [float(h[0]) if len(h) else None for h in reached]
    return found


def tables(runs, noise, hours) -> str:
    """The Markdown of the page."""
    lines = ["| run | start | " + " | ".join(WINDOWS) + " | best to step 2,000 | best of all (step, of evaluations) |",
             "|---|---|" + "---|" * len(WINDOWS) + "---|---|"]
    for name, run in runs.items():
        spans = " | ".join(f"{run[span][0]:.1f} ± {run[span][1]:.1f}" for span in WINDOWS)
        lines.append(f"| {name} | {run['start']:.1f} | {spans} | {run['best to 2,000']:.2f} | "
                     f"{run['best']:.2f} ({run['best step']:,}, of {run['evaluations']:,}) |")
    lines += ["", "All numbers are percent of the test questions. After ± stands the standard deviation of the "
              "evaluations in the window. \"Late\" is the mean of steps 1,500 to 2,000. The run with every rollout "
              "branched ends at step 1,820.", "", "| how much one number is worth, in points | |", "|---|---|",
              f"| standard error of an accuracy of {runs[DEEP]['late'][0]:.0f} % on {QUESTIONS:,} questions | "
              f"{noise['test set']:.1f} |",
              f"| noise of one evaluation, late (median of the runs; the next one differs by √2 of it) | "
              f"{noise['evaluation']:.2f} |",
              f"| the same untrained model, over {len(runs)} runs | {noise['start']:.2f} |",
              f"| the late means of {len(TWINS)} runs whose settings hardly differ: {', '.join(TWINS)} | "
              f"{noise['run']:.2f} |",
              "| the best up to step 2,000 above the late mean (median of the runs) | "
              f"{noise['maximum over late']:.1f} |", "",
              "| DEEP-GRPO over | as published | best to step 2,000 of both | best of all of both | late means | "
              f"the mean of the {len(TWINS)} similar runs instead |", "|---|---|---|---|---|---|"]
    published = {GRPO: 67.7 - 64.1, LARGE: 67.7 - 66.2}
    twins = np.mean([runs[name]["late"][0] for name in TWINS])
    for other in (GRPO, "GRPO, N = 16", "GRPO, N = 32", LARGE):
        late = runs[other]["late"][0]
        like = " | ".join(f"{runs[DEEP][best] - runs[other][best]:.1f}" for best in ("best to 2,000", "best"))
        lines.append(f"| {other} | {f'{published[other]:.1f}' if other in published else ''} | {like} | "
                     f"{runs[DEEP]['late'][0] - late:.1f} | {twins - late:.1f} |")
    lines += ["", "| hours until the smoothed accuracy reaches | 60 % | 62 % | 64 % |", "|---|---|---|---|"]
    for name, values in hours.items():
        lines.append(f"| {name} | " + " | ".join("never" if h is None else f"{h:.1f}" for h in values) + " |")
    return "\n".join(lines)


def plot(curves, runs):
    """The smoothed curves, and beside them the best and the late mean of every run."""
    figure, axes = new_figure(4.6, "ab", width_ratios=(1.25, 1))
    for name, column in RUNS.items():
        steps, values = curves[column]
        shown = steps <= 2500
        colour = {DEEP: ACCENT, GRPO: INK, LARGE: GREY}.get(name, LIGHT)
        others = colour == LIGHT
        axes["a"].plot(steps[shown], 100 * smooth(steps, values)[shown], color=colour, zorder=0 if others else 1,
                       linewidth=0.7 if others else 1.8)
    steps, values = curves[RUNS[DEEP]]
    top = values.argmax()
    axes["a"].plot(steps[top], 100 * values[top], "o", color=ACCENT, markersize=6, markerfacecolor="white")
    axes["a"].annotate("67.7", (steps[top], 100 * values[top]), (-8, -3), textcoords="offset points", color=ACCENT,
                       ha="right")
    for name, y, colour in ((DEEP, 66.2, ACCENT), (LARGE, 64.6, GREY), (GRPO, 62.4, INK)):
        axes["a"].text(2560, y, name.replace(", K = 8", ""), color=colour, va="center")
    axes["a"].set(xlabel="step", ylabel="test accuracy, %, mean of 50 steps", ylim=(53, 68.5), xlim=(0, 2550))
    order = sorted(runs, key=lambda name: runs[name]["late"][0])
    for y, name in enumerate(order):
        colour = ACCENT if name == DEEP else INK if name.startswith("GRPO") else GREY
        late, best = runs[name]["late"][0], runs[name]["best to 2,000"]
        axes["b"].plot([late, best], [y, y], color=LIGHT, linewidth=1.2, zorder=0)
        axes["b"].plot(late, y, "o", color=colour, markersize=6)
        axes["b"].plot(best, y, "o", color=colour, markersize=6, markerfacecolor="white")
    axes["b"].set(yticks=range(len(order)), yticklabels=order,
                  xlabel="%, steps 1,500 to 2,000:\nmean; hollow: best so far")
    axes["b"].tick_params(axis="y", length=0)
    axes["b"].spines["left"].set_visible(False)
    axes["b"].grid(axis="x", color=LIGHT, linewidth=0.5, alpha=0.6)
    for label, name in zip(axes["b"].get_yticklabels(), order):
        label.set_color(ACCENT if name == DEEP else INK if name.startswith("GRPO") else GREY)
    axes["a"].set_title("DEEP-GRPO is mostly ahead\nafter step 500, in one seed.")
    axes["b"].set_title("The best evaluation of a run lies\n2 points above its mean.", x=-0.6)
    figure.suptitle(MESSAGE, x=0.01, ha="left")
    return figure


def main(argv=None):
    """Write numbers, figure and tables."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/gsm8k"),
                        help="Names the folder for numbers, figure and tables. The default is results/gsm8k.")
    args = parser.parse_args(argv)
    curves = authors_curves()
    runs = {name: summarize(*curves[column]) for name, column in RUNS.items()}
    noise, hours = noise_of(runs), hours_to(curves)
    args.results.mkdir(parents=True, exist_ok=True)
    numbers = {"runs": runs, "noise": noise, "hours": hours}
    (args.results / "curves.json").write_text(json.dumps(numbers, indent=1) + "\n")
    save_figure(plot(curves, runs), args.results / "curves.png")
    text = tables(runs, noise, hours)
    write_page(args.results / "curves.md", TITLE, "curves.png",
               f"These numbers were written by `{command_line('-m experiments.gsm8k_curves', argv)}`.\n\n{text}")
    print(text)


if __name__ == "__main__":
    main()
