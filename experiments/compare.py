r"""Methods side by side on the embedded task, at an equal budget of generated tokens and of updates.

    python compare.py                          # `make compare`: all methods, 5 seeds; results/methods.md and .png
    python compare.py --experiment rare        # the same where GRPO has one right answer in 20 updates; 10 seeds
    python compare.py --experiment branches    # K = 4, 8, 16 and TreeRL there; 20 seeds
    python compare.py --experiment prefix      # the prefix of a branch masked, and trained
    python compare.py --experiment stapo       # with and without STAPO
    python compare.py --experiment ablations   # DEEP-GRPO without one of its parts

Every update of every method has the same generated tokens (--step-tokens), so at the end of the budget the number of
updates is equal, too: a method that needs fewer tokens for a question gets more questions. All start from one base
model and walk through the same questions in the same order; two runs at a time, one thread each. Runs are kept in
--out: finished ones are not run again, interrupted ones go on.
"""
import argparse
import contextlib
import io
import json
import math
import os
import platform
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import transformers
from tqdm import tqdm

from tasks.lock import Lock, make_base
from trainer.plot import read_metrics
from trainer.settings import OneLineParser, command_line, count, parse_args

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend that needs no screen)


class Arm(NamedTuple):
    """What is compared: its name in tables, the flags of train_gsm8k.py, its color."""
    label: str
    flags: str
    color: str


class Experiment(NamedTuple):
    """Arms that run with equal budgets; the first one is what the others are compared with. lock: a difficulty of the
    embedded task for which a base policy is made first (None: that of the preset)."""
    title: str
    seeds: int
    budget_tokens: int
    flags: str
    arms: dict[str, Arm]
    lock: Lock | None = None


ARMS = {
    "grpo": Arm("GRPO, G = 8", "--method grpo --questions 4", "black"),
    "grpo64": Arm("GRPO, G = 64", "--method grpo --group-size 64", "tab:gray"),
    "dr_grpo": Arm("Dr. GRPO, G = 8", "--method dr_grpo --questions 4", "tab:brown"),
    "deep_grpo": Arm("DEEP-GRPO, G = 8, K = 8", "--method deep_grpo", "tab:red"),
    "treerl": Arm("TreeRL, 6 trees", "--method treerl --questions 2", "tab:green"),
    "attnrl": Arm("AttnRL, 6 trees", "--method attnrl --questions 2", "tab:olive"),
    "fr3e": Arm("FR3E, G = 16, K = 8", "--method fr3e --branches 8", "tab:blue"),
    "rrpo": Arm("RRPO, 5 + 4", "--method rrpo --questions 4", "tab:purple"),
    "prefix": Arm("DEEP-GRPO, prefix trained", "--method deep_grpo --train-prefix", "tab:blue"),
    "authors": Arm("DEEP-GRPO, authors' form", "--method deep_grpo --objective authors", "tab:orange"),
    "authors_prefix": Arm("authors' form, prefix trained",
                          "--method deep_grpo --objective authors --train-prefix", "tab:green"),
    "stapo": Arm("DEEP-GRPO + STAPO", "--method deep_grpo --stapo", "tab:blue"),
    "grpo_stapo": Arm("GRPO + STAPO", "--method grpo --questions 4 --stapo", "tab:gray"),
    "grpo24": Arm("GRPO, G = 24", "--method grpo --group-size 24", "black"),
    "k4": Arm("K = 4", "--method deep_grpo --branches 4", "tab:orange"),
    "k16": Arm("K = 16", "--method deep_grpo --branches 16", "tab:brown"),
    "two_pivots": Arm("two pivots", "--method deep_grpo --pivots 2", "tab:pink"),
    "uniform": Arm("uniform pivot", "--method deep_grpo --uniform-pivot", "tab:green"),
    "root": Arm("from the question (gamma = -20)", "--method deep_grpo --gamma -20", "tab:gray"),
    "branch_all": Arm("right rollouts branched, too", "--method deep_grpo --branch-all", "tab:olive"),
    "one_stream": Arm("one stream", "--method deep_grpo --one-stream", "tab:purple"),
    "no_std": Arm("no std", "--method deep_grpo --no-std", "tab:blue"),
}
EQUAL = "--preset tiny-deep --eval-every 2 --step-tokens 8000"
RARE = Lock(turns=(12, 14), hard=3, place=(1, 4), p=0.1)
METHODS = {name: ARMS[name] for name in ("grpo", "grpo64", "dr_grpo", "deep_grpo", "treerl", "attnrl", "fr3e", "rrpo")}
EXPERIMENTS = {
    "methods": Experiment("The methods at equal budget", 5, 128_000, EQUAL, METHODS),
    "rare": Experiment("The methods where right answers are rare", 10, 128_000, f"{EQUAL} --lr 1.6e-4", METHODS, RARE),
    "branches": Experiment("How many branches where right answers are rare", 20, 128_000, f"{EQUAL} --lr 1.6e-4", {
        name: ARMS[name] for name in ("deep_grpo", "k4", "k16", "treerl")}, RARE),
    "prefix": Experiment("The prefix of a branch masked, and trained", 5, 128_000, EQUAL, {
        name: ARMS[name] for name in ("deep_grpo", "prefix", "authors", "authors_prefix")}),
    "stapo": Experiment("With and without STAPO", 5, 128_000, EQUAL, {
        name: ARMS[name] for name in ("grpo", "grpo_stapo", "deep_grpo", "stapo")}),
    "ablations": Experiment("DEEP-GRPO without one of its parts", 5, 128_000, EQUAL, {name: ARMS[name] for name in (
        "deep_grpo", "k4", "k16", "two_pivots", "uniform", "root", "branch_all", "one_stream", "no_std", "grpo24")}),
}


def base_flags(folder) -> str:
    """The flags of train_gsm8k.py for the base policy and the rows that tasks.lock.make_base has put there."""
    return (f"--model {folder} --data {folder / 'train.jsonl'} --eval-data {folder / 'eval.jsonl'} "
            "--eval-rows 128")


def run_all(experiment, out, jobs=2, enough=lambda directory: False) -> dict[str, list[Path]]:
    """Run every arm with every seed, `jobs` at a time; returns arm -> run directories, in `out`.

    enough(directory): need this run not go on, whatever is left of its budget?
    """
    directories = {arm: [out / f"{arm}-{seed}" for seed in range(experiment.seeds)] for arm in experiment.arms}
    everything = [(arm, seed, d) for arm in experiment.arms for seed, d in enumerate(directories[arm])]
    commands = {d: flags_of(experiment, arm, seed, d) for arm, seed, d in everything}
    for d, flags in commands.items():
        check_settings(d, flags)
    waiting = [entry for entry in everything if not (entry[2] / "run.png").exists()       # written last
               and not enough(entry[2])]
    kept = len(everything) - len(waiting)
    if kept:
        print(f"{kept} finished runs in {out} are kept; delete the folder to run them again")
    waiting.sort(key=lambda entry: entry[1])                                              # seed by seed
    running = {}
    total = len(everything) * experiment.budget_tokens
    with tqdm(total=total, unit="token", unit_scale=True, desc="generated") as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                directory = waiting.pop(0)[2]
                running[directory] = start_run(directory, commands[directory])
            time.sleep(0.5)
            for directory, process in list(running.items()):
                if enough(directory):
                    process.kill()                   # a run survives that, and has logged what is asked of it
                    process.wait()
                if process.poll() is not None:
                    del running[directory]
                    if process.returncode and not enough(directory):
                        for other in running.values():
                            other.terminate()
                        last_line = log_of(directory).read_text().splitlines()[-1]
                        sys.exit(f"error: {directory} failed, its last line: {last_line}")
            bar.n = sum(min(experiment.budget_tokens, tokens_so_far(d)) for _, _, d in everything)
            bar.refresh()
    return directories


def flags_of(experiment, arm, seed, directory) -> list[str]:
    """The flags of train_gsm8k.py for one run."""
    own = f"{experiment.flags} {experiment.arms[arm].flags}".split()
    return [*own, "--seed", str(seed), "--budget-tokens", str(experiment.budget_tokens), "--steps", "100000",
            "--out", str(directory)]


def check_settings(directory, flags) -> None:
    """Ends the program if the directory holds a run with other settings than these flags."""
    if (directory / "config.json").exists():
        with contextlib.redirect_stdout(io.StringIO()):
            wanted = {k: str(v) if isinstance(v, Path) else v for k, v in vars(parse_args(flags)).items()}
        found = json.loads((directory / "config.json").read_text())["settings"]
        for name in found:
            if found[name] != wanted.get(name):
                sys.exit(f"error: {directory} holds a run with {name} = {found[name]!r}, here it is "
                         f"{wanted.get(name)!r}: delete it, or choose another --out")


def start_run(directory, flags) -> subprocess.Popen:
    """One training run in a process of its own, one thread, its output in a .log beside its directory."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    interrupted = (directory / "config.json").exists()
    command = [sys.executable, str(Path(__file__).parents[1] / "train_gsm8k.py"),
               *(["--resume", str(directory)] if interrupted else flags)]
    with open(log_of(directory), "w") as output:
        return subprocess.Popen(command, stdout=output, stderr=output,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})


def log_of(run_dir):
    """What a run printed."""
    return run_dir.with_suffix(".log")


def tokens_so_far(run_dir):
    """Generated tokens that metrics.jsonl reports; 0 before there is one."""
    try:
        return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["generated_total"]
    except (OSError, IndexError, ValueError):        # not there, empty, or its last line is being written
        return 0


def seconds_of(metrics) -> np.ndarray:
    """Seconds of every update of a run, without evaluation; metrics: of read_metrics."""
    return sum(metrics[f"seconds_{part}"][1] for part in ("rollout", "resample", "score", "update"))


def curve(metrics, x_name, y_name="eval_accuracy") -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of a run where y was measured; x_name: generated_total, seconds, or None for updates."""
    steps, values = metrics[y_name]
    if x_name == "seconds":
        return np.concatenate([[0], np.cumsum(seconds_of(metrics))])[steps.astype(int)], values
    return (np.interp(steps, *metrics[x_name]) if x_name else steps), values


def read_run(run) -> dict:
    """What one run got and what it cost: accuracy after half and all of the tokens and as a mean over them; right
    answers, rollouts and branches, per 1,000 tokens of the first third of its updates, and generated tokens up to the
    end of the first update that has one (inf: none has); sums and means."""
    metrics = read_metrics(run)
    grid = np.linspace(0, metrics["generated_total"][1][-1], 201)
    accuracy = np.interp(grid, *curve(metrics, "generated_total"))
    sums = {name: metrics[name][1].sum() for name in ("questions", "sequences", "generated_tokens", "forwarded_tokens",
                                                      "trained_tokens", "optimizer_steps")}
    roots = metrics["questions"][1] * json.loads((run / "config.json").read_text())["settings"]["group_size"]
    branch_reward = dict(zip(*metrics.get("branch_reward", ((), ()))))
    branch_reward = np.array([branch_reward.get(step, 0.0) for step in metrics["questions"][0]])
    right = metrics["reward"][1] * roots + branch_reward * (metrics["sequences"][1] - roots)
    spent, third = np.cumsum(metrics["generated_tokens"][1]), math.ceil(len(right) / 3)
    return {"half": accuracy[100], "all": accuracy[-1], "mean": float(np.mean(accuracy)), **sums,
            "right": 1000 * right[:third].sum() / spent[third - 1],
            "first": next((spent[i] for i in np.flatnonzero(right)), np.inf),
            "dead_groups": metrics["dead_groups"][1].mean(), "seconds": seconds_of(metrics).sum()}


def t_tail(t, df) -> float:
    """P(|T| > t) of Student's t with df degrees of freedom: with t = sqrt(df) tan a the density is cos(a)^(df - 1)."""
    def integral(start):
        angle = np.linspace(start, np.pi / 2, 100_001)
        return np.trapezoid(np.cos(angle) ** (df - 1), angle)

    return float(integral(np.arctan(t / np.sqrt(df))) / integral(0.0))


@cache
def t_quantile(df) -> float:
    """The t with P(|T| > t) = .05."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > 0.05 else (low, middle)
    return low


def interval(values) -> tuple[float, float, float]:
    """(mean, half width of the 95 % interval, p of mean = 0) by Student's t; of one value (mean, inf, 1)."""
    mean, n = float(np.mean(values)), len(values)
    error = float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else np.inf
    if error == 0 or n == 1:
        return mean, error, 1.0 if mean == 0 or n == 1 else 0.0
    return mean, t_quantile(n - 1) * error, t_tail(abs(mean) / error, n - 1)


def tables(experiment, directories) -> str:
    """Markdown: accuracy with 95 % intervals and the paired test against the first arm; costs; every seed."""
    runs = {arm: [read_run(d) for d in paths] for arm, paths in directories.items()}
    base = next(iter(runs))

    def column(arm, name):
        return np.array([run[name] for run in runs[arm]], dtype=float)

    def lines(header, row):
        yield f"| method | {' | '.join(header)} |"
        yield "|---" * (len(header) + 1) + "|"
        for arm in runs:
            yield f"| {experiment.arms[arm].label} | {' | '.join(row(arm))} |"

    def accuracy(arm):
        for name in ("half", "all", "mean"):
            mean, width, _ = interval(column(arm, name))
            yield f"{mean:.3f} \u00b1 {width:.3f}"
        mean, width, p = interval(column(arm, "mean") - column(base, "mean"))
        yield "" if arm == base else f"{mean:+.3f} \u00b1 {width:.3f}"
        yield "" if arm == base else f"{p:.3f}"

    def cost(arm):
        for name in ("optimizer_steps", "questions", "sequences", "generated_tokens", "forwarded_tokens",
                     "trained_tokens"):
            yield f"{column(arm, name).mean():,.0f}"
        yield f"{column(arm, 'right').mean():.3g}"
        first = np.median(column(arm, "first"))
        yield f"{first:,.0f}" if np.isfinite(first) else "-"
        yield f"{column(arm, 'dead_groups').mean():.2f}"
        yield f"{np.mean(column(arm, 'seconds') / column(base, 'seconds')):.2f}"

    def seeds(arm):
        return (f"{run['mean']:.3f}" for run in runs[arm])

    label = experiment.arms[base].label
    return "\n".join([
        f"Greedy accuracy on held-out questions: mean of {experiment.seeds} seeds \u00b1 95 % interval (Student's t). "
        "The mean over the run is",
        "the area under the curve over generated tokens. p: paired t test by seed, two-sided, not corrected for the",
        "number of methods.", "",
        *lines(("half of the tokens", "all tokens", "mean over the run", f"minus {label}", "p"), accuracy), "",
        "Cost of a run, means. Right: right answers per 1,000 generated tokens in the first third of the updates.",
        "First: generated tokens up to the end of the first update with one, median (-: half of the runs have none).",
        f"Time: relative to {label}, same seed, two runs at a time on two cores.", "",
        *lines(("updates", "questions", "sequences", "generated", "forwarded", "trained", "right", "first",
                "dead groups", "time"), cost),
        "", "Mean over the run, every seed:", "",
        *lines([str(seed) for seed in range(experiment.seeds)], seeds)])


def draw(experiment, directories, path):
    """Accuracy over generated tokens, updates and time, mean and 95 % interval over seeds; the figure is returned."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 5.5), layout="constrained", sharey=True)
    runs = {arm: [read_metrics(d) for d in paths] for arm, paths in directories.items()}
    unit = np.mean([seconds_of(metrics).sum() for metrics in next(iter(runs.values()))])
    for arm in runs:
        for axis, x_name, scale in zip(axes, ("generated_total", None, "seconds"), (1, 1, unit)):
            curves = [(x / scale, y) for x, y in (curve(metrics, x_name) for metrics in runs[arm])]
            grid = np.linspace(0, min(x[-1] for x, _ in curves), 40)
            values = np.array([np.interp(grid, x, y) for x, y in curves])
            mean, width, _ = np.array([interval(v) for v in values.T]).T
            label, _, color = experiment.arms[arm]
            axis.plot(grid, mean, color=color, label=label, linewidth=2)
            if len(curves) > 1:
                axis.fill_between(grid, mean - width, mean + width, color=color, alpha=0.12, linewidth=0)
    unit_name = next(iter(experiment.arms.values())).label
    for axis, name in zip(axes, ("generated tokens", "updates", f"time ({unit_name} = 1)")):
        axis.set(xlabel=name, ylim=(0, 1))
    axes[0].set(ylabel="greedy accuracy on held-out questions")
    axes[0].legend(fontsize=8, loc="upper left")
    figure.suptitle(f"{experiment.title}: mean of {experiment.seeds} seeds, 95 % intervals")
    figure.savefig(path, dpi=90)
    return figure


def main(argv=None):
    """Run what is missing, then write table and figure."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", choices=EXPERIMENTS, default="methods")
    parser.add_argument("--arms", help="only these, separated by commas, the one to compare with first")
    parser.add_argument("--seeds", type=count, help="5")
    parser.add_argument("--budget-tokens", type=count, help="generated tokens per run")
    parser.add_argument("--jobs", type=count, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="run directories, of all experiments")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of table and figure")
    args = parser.parse_args(argv)
    experiment = EXPERIMENTS[args.experiment]
    names = args.arms.split(",") if args.arms else list(experiment.arms)
    if unknown := [name for name in names if name not in ARMS]:
        parser.error(f"argument --arms: {', '.join(unknown)}: choose from {', '.join(ARMS)}")
    experiment = experiment._replace(arms={name: ARMS[name] for name in names},
                                     seeds=args.seeds or experiment.seeds,
                                     budget_tokens=args.budget_tokens or experiment.budget_tokens)
    start, out, flags = time.time(), args.out, experiment.flags
    if experiment.lock:
        out = out / args.experiment
        make_base(experiment.lock, out / "base")
        flags += f" {base_flags(out / 'base')}"
    directories = run_all(experiment._replace(flags=flags), out, args.jobs)
    text = tables(experiment, directories)
    args.results.mkdir(parents=True, exist_ok=True)
    about = (f"# {experiment.title}\n\n    {command_line('compare.py', argv)}\n\n"
             f"{experiment.flags}, {experiment.budget_tokens:,} tokens; {experiment.lock or 'the lock of the preset'}; "
             f"{platform.processor() or platform.machine()}, "
             f"torch {torch.__version__}, transformers {transformers.__version__}.\n\n"
             f"![accuracy]({args.experiment}.png)\n\n")
    (args.results / f"{args.experiment}.md").write_text(about + text + "\n")
    plt.close(draw(experiment, directories, args.results / f"{args.experiment}.png"))
    print(f"\n{text}\n\n{args.results / args.experiment}.md and .png   ({time.time() - start:.0f} seconds)")


if __name__ == "__main__":
    main()
