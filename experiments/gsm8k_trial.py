r"""A short trial on real GSM8K with one GPU: what do branches do at equal questions, and what at equal tokens?

    python -m experiments.gsm8k_trial --model FOLDER                   # four arms, 25 steps each; not run yet
    python -m experiments.gsm8k_trial --model FOLDER --arms deep,grpo --steps 10 --no-compile
    python -m experiments.gsm8k_trial --model FOLDER --data TRAIN.jsonl --eval-data TEST.jsonl      # without the hub

    deep    DEEP-GRPO with 64 questions a step, G = 8 and K = 8
    grpo    GRPO with the same questions: against it stands what branches do at equal questions
    more    GRPO with as many generated tokens as deep, which go to more questions: at equal tokens
    half    DEEP-GRPO with as many tokens, where half of the failures are branched and the rest goes to more questions

The last two draw whole batches of 64 questions until they have the tokens, because a batch of fewer questions would
take as long. What is too much in one step is missing in the next.

The arms run one after another, each in a process with a directory of its own. A finished run is not run again, and an
interrupted one goes on. All flags that are not listed below are flags of train_gsm8k.py and hold for every arm. The
objective is that of the authors, and answers are read from \boxed{}, as small models for code and mathematics write
them. Every run is evaluated on all test questions before its first step and after its last one.

Writes the tables of results/gsm8k/trial.md, and keeps the logs of every run in results/gsm8k/trial/.
"""
import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np

from experiments.runs import Arm, check_settings, last_line, log_of, start_run, write_page, written_by
from trainer.plot import read_metrics
from trainer.settings import OneLineParser, count

ARMS = {"deep": Arm("DEEP-GRPO, 64 questions", "--method deep_grpo"),
        "grpo": Arm("GRPO, the same questions", "--method grpo"),
        "more": Arm("GRPO, as many tokens", "--method grpo"),
        "half": Arm("DEEP-GRPO, S = 1/2, as many tokens", "--method deep_grpo --branch-share .5")}
SAME_TOKENS = ("more", "half")                       # as deep, which therefore runs first
FLAGS = "--preset gsm8k --answer boxed --val-rows 0 --save-every 0"
KEPT = ("config.json", "metrics.jsonl", "timing.jsonl", "pivots.csv", "samples.jsonl")
TITLE = "Real GSM8K: branches at equal questions and at equal tokens"


def tokens_of_a_step(run) -> int:
    """Generated tokens of a step of a finished run, on average."""
    return round(float(read_metrics(run)["generated_tokens"][1].mean()))


def run_arm(arm, seed, steps, out, others) -> Path:
    """Run one arm unless it is finished; returns its directory. others: flags of train_gsm8k.py, which win."""
    directory, finished = out / f"{arm}-{seed}", out / f"{arm}-{seed}" / "run.png"           # which is written last
    flags = [*FLAGS.split(), *ARMS[arm].flags.split(), "--steps", str(steps), "--eval-every", str(steps)]
    if arm in SAME_TOKENS:
        flags += ["--step-tokens", str(tokens_of_a_step(out / f"deep-{seed}"))]
    flags += [*others, "--seed", str(seed), "--out", str(directory)]
    check_settings(directory, flags)
    if not finished.exists():
        print(f"{directory}: {ARMS[arm].label}; its progress is in {log_of(directory)}", flush=True)
        if start_run(directory, flags).wait() or not finished.exists():
            sys.exit(f"error: {directory} is not finished, its last line: {last_line(directory)}")
    return directory


def row_of(run) -> list[str]:
    """The cells of one run. The standard error of its accuracy is that of a share of the test questions."""
    metrics = read_metrics(run)
    n = json.loads((run / "config.json").read_text())["evaluation_questions"]

    def mean(name, steps=slice(None)):
        values = metrics[name][1][steps] if name in metrics else ()
        return f"{np.mean(values):.3f}" if len(values) else "-"

    before, after = (100 * metrics["eval_accuracy"][1][i] for i in (0, -1))
    error = math.sqrt(after * (100 - after) / n)
    return [f"{before:.1f}", f"**{after:.1f}** \u00b1 {error:.1f}", mean("reward", slice(5)),
            mean("reward", slice(-5, None)), mean("dead_groups"), mean("dead_branch_groups"), mean("recovered"),
            f"{metrics['questions'][1].mean():.0f}",
            f"{metrics['generated_tokens'][1].mean():,.0f}",
            *(f"{np.median(metrics[f'seconds_{part}'][1]):.1f}" for part in ("rollout", "resample", "update")),
            f"{metrics['peak_memory_gb'][1].max():.0f}"]


def table(runs) -> str:
    """Markdown: a row per run. runs: arm -> directories, seed by seed."""
    header = ["run", "accuracy before, %", "after, % \u00b1 standard error", "correct rollouts, first 5 steps",
              "last 5 steps", "dead groups", "dead branch groups", "recovered pivots", "questions in a step",
              "tokens in a step", "seconds: rollouts", "branches", "update", "peak memory, GB"]
    rows = [[f"{ARMS[arm].label}, seed {seed}", *row_of(run)] for arm in runs for seed, run in enumerate(runs[arm])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def main(argv=None):
    """Run what is missing, keep the logs, and write the table."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                           allow_abbrev=False)       # else a flag of train_gsm8k.py could be taken for one of these
    parser.add_argument("--arms", default=",".join(ARMS), help="Runs only these arms, separated by commas. The default "
                        f"is {','.join(ARMS)}.")
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="Names the model, a folder or a name on "
                        "the hub. The default is Qwen/Qwen2.5-0.5B-Instruct.")
    parser.add_argument("--seeds", type=count, default=1, help="Sets how many seeds each arm has. The default is 1.")
    parser.add_argument("--steps", type=count, default=25, help="Sets the steps of a run. The default is 25.")
    parser.add_argument("--out", type=Path, default=Path("runs/gsm8k_trial"),
                        help="Names the folder for the run directories. The default is runs/gsm8k_trial.")
    parser.add_argument("--results", type=Path, default=Path("results/gsm8k"),
                        help="Names the folder for the table and the logs. The default is results/gsm8k.")
    args, others = parser.parse_known_args(argv)
    if taken := {flag.partition("=")[0] for flag in others} & {"--seed", "--method", "--step-tokens", "--eval-every"}:
        parser.error(f"argument {min(taken)}: every arm has its own")
    others, names = ["--model", args.model, *others], args.arms.split(",")
    if unknown := [name for name in names if name not in ARMS]:
        parser.error(f"argument --arms: {', '.join(unknown)}: choose from {', '.join(ARMS)}")
    if names[0] != "deep" and set(names) & set(SAME_TOKENS):
        parser.error(f"argument --arms: {' and '.join(SAME_TOKENS)} generate as many tokens as deep, which must be the "
                     "first arm")
    runs = {arm: [] for arm in names}
    for seed in range(args.seeds):                   # seed by seed: what is interrupted has whole seeds
        for arm in names:
            run = run_arm(arm, seed, args.steps, args.out, others)
            runs[arm].append(run)
            kept = args.results / "trial" / run.name
            kept.mkdir(parents=True, exist_ok=True)
            for name in KEPT:
                shutil.copy(run / name, kept / name)
    about = written_by("-m experiments.gsm8k_trial", argv, f"{FLAGS}, {args.steps} steps")
    write_page(args.results / "trial.md", TITLE, None, f"{about}\n\n{table(runs)}")
    print(table(runs))


if __name__ == "__main__":
    main()
