r"""Training runs at an equal budget: start them, several at a time, read them back, and write what was measured.

An experiment is a table of arms (a method and its flags), a number of seeds and a budget of generated tokens. Every run
is a process of train_gsm8k.py with one thread and a directory of its own. A run that is finished is not run again, and
one that was interrupted goes on.
"""
import contextlib
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from tqdm import tqdm

from tasks.lock import ASSETS, Lock, make_rows, pretrain, turn_probabilities
from trainer.model import load_model
from trainer.plot import read_metrics
from trainer.settings import command_line, count, parse_args

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


class Arm(NamedTuple):
    """What is compared: its name in tables and figures, and its flags of train_gsm8k.py.

    module: what `python -m` starts, with any words that come before the flags.
    """
    label: str
    flags: str
    module: str = "train_gsm8k"


class Experiment(NamedTuple):
    """Arms that run with equal budgets. The others are compared with the first one.

    seeds: how many seeds each arm has. first_seed: the first of them.
    lock: a difficulty of the embedded task, for which a base policy is made first; None is the one of the preset.
    message: what the kept result says, in one sentence. It is the title of the figure.
    hard: the numbers of hard turns between which its questions alternate; () means that all have those of the lock.
    """
    title: str
    seeds: int
    budget_tokens: int
    flags: str
    arms: dict[str, Arm]
    lock: Lock | None = None
    message: str = ""
    first_seed: int = 0
    hard: tuple[int, ...] = ()


# ---- start ----

def make_base(lock, folder, steps=300) -> dict[str, float]:
    """Train the base policy of tiny-deep on for this lock, and write training and evaluation rows beside it.

    Returns the probabilities with which it does an easy and a hard turn right; they are also kept in base.json. One
    thread computes, as in the runs, because another number of threads would change the last digits of all weights.
    """
    settings = {"lock": asdict(lock), "steps": steps}
    if not (folder / "base.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        model, tokenizer = load_model(str(ASSETS / "tiny-deep"))
        model = pretrain(lock, tokenizer, steps, lr=5e-4, log=None, model=model)
        easy, hard = turn_probabilities(model, tokenizer, lock, n=1024)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_rows(folder, [lock])
        (folder / "base.json").write_text(json.dumps({"easy": easy, "hard": hard, **settings}))
    base = json.loads((folder / "base.json").read_text())
    if any(base.get(name) != value for name, value in json.loads(json.dumps(settings)).items()):
        sys.exit(f"error: {folder} holds the base policy of another lock or number of steps: delete {folder.parent}, "
                 "or choose another --out")
    return base


def write_rows(folder, locks, kind="") -> None:
    """Write 4,096 training and 128 evaluation rows, which alternate between these locks. kind: that of base_flags().
    """
    for name, n, seed in (("train", 4096, 1), ("eval", 128, 0)):
        of_lock = [make_rows(lock, n // len(locks), seed) for lock in locks]
        rows = [row for one_of_each in zip(*of_lock) for row in one_of_each]
        (folder / f"{kind}{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def base_flags(folder, kind="") -> str:
    """The flags of train_gsm8k.py for the base policy and the rows that make_base has put there.

    kind: what the names of the files with the rows begin with.
    """
    return (f"--model {folder} --data {folder / f'{kind}train.jsonl'} --eval-data {folder / f'{kind}eval.jsonl'} "
            "--eval-rows 128")


def make_task(experiment, folder) -> str:
    """Make the base policy and the questions of an experiment in `folder`; returns their flags of train_gsm8k.py.

    For the lock of the preset there is nothing to make.
    """
    if experiment.lock is None:
        return ""
    make_base(experiment.lock, folder)
    if not experiment.hard:
        return base_flags(folder)
    write_rows(folder, [replace(experiment.lock, hard=hard) for hard in experiment.hard], "mixed-")
    return base_flags(folder, "mixed-")


def about_task(experiment) -> str:
    """The lock and the hard turns of an experiment, in words."""
    mixed = f"; the questions alternate between {' and '.join(map(str, experiment.hard))} hard turns"
    return f"{experiment.lock or 'the lock of the preset'}{mixed if experiment.hard else ''}"


def run_all(experiment, out, jobs=2, enough=lambda directory: False, known=()) -> dict[str, list[Path]]:
    """Run every arm with every seed, `jobs` at a time; returns arm -> run directories, in `out`.

    enough(directory): may this run end now, whatever is left of its budget?
    known: (arm, seed) of runs that are not made, because their numbers are known; they may have no directory.
    No run goes on when this function ends, whatever ends it.
    """
    seeds = range(experiment.first_seed, experiment.first_seed + experiment.seeds)
    directories = {arm: [out / f"{arm}-{seed}" for seed in seeds] for arm in experiment.arms}
    everything = [(arm, seed, d) for arm in experiment.arms for seed, d in zip(seeds, directories[arm])
                  if (arm, seed) not in known]
    commands = {d: flags_of(experiment, arm, seed, d) for arm, seed, d in everything}
    for d, flags in commands.items():
        check_settings(d, flags)
    # The figure is written last, and by trainer.plot also of a run that is not at its end.
    waiting = [entry for entry in everything
               if not ((entry[2] / "run.png").exists() and tokens_so_far(entry[2]) >= experiment.budget_tokens)
               and not enough(entry[2])]
    kept = len(everything) - len(waiting)
    if kept:
        print(f"{kept} of {len(everything)} runs are finished and kept in {out}; delete the folder to run them again")
    waiting.sort(key=lambda entry: entry[1])                                              # seed by seed
    running = {}
    total = len(everything) * experiment.budget_tokens
    tokens = {d: min(experiment.budget_tokens, tokens_so_far(d)) for _, _, d in everything}
    with tqdm(total=total, unit="token", unit_scale=True, desc="generated") as bar, all_ended(running):
        while waiting or running:
            while waiting and len(running) < jobs:
                arm, _, directory = waiting.pop(0)
                running[directory] = start_run(directory, commands[directory], experiment.arms[arm].module)
            time.sleep(0.5)
            for directory, process in list(running.items()):
                if enough(directory):
                    process.kill()                   # a run survives that, and has logged what is asked of it
                    process.wait()
                if process.poll() is not None:
                    del running[directory]
                    if process.returncode and not enough(directory):
                        sys.exit(f"error: {directory} failed, its last line: {last_line(directory)}")
                tokens[directory] = min(experiment.budget_tokens, tokens_so_far(directory))
            bar.n = sum(tokens.values())
            bar.refresh()
    return directories


@contextlib.contextmanager
def all_ended(running):
    """End the processes that are among the values of `running` when the block ends, also by Ctrl-C or SIGTERM."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM; the same command goes on from here"))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def flags_of(experiment, arm, seed, directory) -> list[str]:
    """The flags of train_gsm8k.py for one run; those of an arm win over those of the experiment."""
    own = f"{experiment.flags} {experiment.arms[arm].flags}".split()
    return [*own, "--seed", str(seed), "--budget-tokens", str(experiment.budget_tokens), "--steps", "100000",
            "--out", str(directory)]


def check_settings(directory, flags) -> None:
    """End the program if the directory holds a run with other settings than these flags."""
    if (directory / "config.json").exists():
        with contextlib.redirect_stdout(io.StringIO()):
            wanted = {k: str(v) if isinstance(v, Path) else v for k, v in vars(parse_args(flags)).items()}
        found = json.loads((directory / "config.json").read_text())["settings"]
        for name in found:
            if found[name] != wanted.get(name):
                sys.exit(f"error: {directory} holds a run with {name} = {found[name]!r}, here it is "
                         f"{wanted.get(name)!r}: delete it, or choose another --out")


def start_run(directory, flags, module="train_gsm8k") -> subprocess.Popen:
    """Start one training run as a process with one thread; its output goes to a .log beside its directory."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    interrupted = (directory / "config.json").exists()
    command = [sys.executable, "-m", *module.split(), *(["--resume", str(directory)] if interrupted else flags)]
    with open(log_of(directory), "w") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.getenv("PYTHONPATH")])])})


def log_of(run_dir) -> Path:
    """The file with what a run printed."""
    return run_dir.with_name(f"{run_dir.name}.log")


def last_line(run_dir) -> str:
    """The last line that a run printed."""
    return (log_of(run_dir).read_text().splitlines() or ["(it printed nothing)"])[-1]


# ---- read ----

def tokens_so_far(run_dir) -> int:
    """Generated tokens that metrics.jsonl reports; 0 before there is one."""
    try:
        return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["generated_total"]
    except (OSError, IndexError, ValueError):        # not there, empty, or its last line is being written
        return 0


def seconds_of(metrics) -> np.ndarray:
    """Seconds of every update of a run, without evaluation. metrics: what read_metrics returns."""
    return sum(metrics[f"seconds_{part}"][1] for part in ("rollout", "resample", "score", "update"))


def accuracy_curve(metrics) -> tuple[np.ndarray, np.ndarray]:
    """(generated tokens, greedy accuracy) of a run at its evaluations."""
    steps, accuracy = metrics["eval_accuracy"]
    return np.interp(steps, *metrics["generated_total"]), accuracy


def read_run(run) -> dict[str, float | None]:
    """What one run got and what it cost, as plain numbers.

    accuracy_half, accuracy_end, accuracy_mean: greedy accuracy after half and after all of the tokens, and its mean
    over them, which is the area under the curve. correct_per_1000_tokens: correct rollouts and branches, in the first
    third of the updates (of SPO-tree, whose questions have more rollouts than G, an estimate). tokens_to_first_correct:
    generated tokens up to the end of the first update that has a correct one; None if there is none. dead_groups: mean
    over updates. early_dead_groups, early_recovered: means over the first quarter of the updates, of recovered over
    those that have pivots; None if there are none. All other numbers are sums over the run.
    """
    def early(name):
        steps, values = metrics.get(name, (np.zeros(0), np.zeros(0)))
        values = values[steps <= max(1, metrics["reward"][0][-1] / 4)]
        return np.mean(values) if len(values) else None

    metrics = read_metrics(run)
    grid = np.linspace(0, metrics["generated_total"][1][-1], 201)
    accuracy = np.interp(grid, *accuracy_curve(metrics))
    sums = {name: metrics[name][1].sum() for name in ("questions", "sequences", "generated_tokens", "forwarded_tokens",
                                                      "trained_tokens", "optimizer_steps")}
    roots = metrics["questions"][1] * json.loads((run / "config.json").read_text())["settings"]["group_size"]
    branch_reward = dict(zip(*metrics.get("branch_reward", ((), ()))))
    branch_reward = np.array([branch_reward.get(step, 0.0) for step in metrics["questions"][0]])
    correct = metrics["reward"][1] * roots + branch_reward * (metrics["sequences"][1] - roots)
    spent, third = np.cumsum(metrics["generated_tokens"][1]), math.ceil(len(correct) / 3)
    numbers = {"accuracy_half": accuracy[100], "accuracy_end": accuracy[-1], "accuracy_mean": np.mean(accuracy), **sums,
               "correct_per_1000_tokens": 1000 * correct[:third].sum() / spent[third - 1],
               "tokens_to_first_correct": next((spent[i] for i in np.flatnonzero(correct)), None),
               "dead_groups": metrics["dead_groups"][1].mean(), "early_dead_groups": early("dead_groups"),
               "early_recovered": early("recovered"),
               "silenced_tokens": np.sum(metrics.get("silenced_tokens", ((), ()))[1]),
               "seconds": seconds_of(metrics).sum()}
    return {name: None if value is None else float(value) for name, value in numbers.items()}


# ---- Student's t ----

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


def holm(ps) -> list[float]:
    """p values, corrected for their number by the method of Holm."""
    corrected, largest = [0.0] * len(ps), 0.0
    for tests_before, i in enumerate(np.argsort(ps)):
        largest = max(largest, min(1.0, ps[i] * (len(ps) - tests_before)))
        corrected[i] = largest
    return corrected


# ---- the programs: what they share ----

def add_common_flags(parser, out) -> None:
    """The flags of every program that starts runs in the folder `out`."""
    parser.add_argument("--jobs", type=count, default=2,
                        help="Sets how many runs go on at a time, with one thread each. The default is 2.")
    parser.add_argument("--out", type=Path, default=Path(out),
                        help=f"Names the folder for the run directories. The default is {out}.")
    parser.add_argument("--results", type=Path, default=Path("results"),
                        help="Names the folder for numbers, figure and tables. The default is results.")
    parser.add_argument("--redraw", action="store_true",
                        help="Draws the figure again from the kept numbers and ends. The default is to run.")


def kept_numbers(parser, path, flag="--redraw") -> dict:
    """The numbers that a program has kept; ends it where there are none. flag: the one that needs them."""
    if not path.exists():
        parser.error(f"argument {flag}: {path} does not exist, so there are no kept numbers")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        parser.error(f"{path} is damaged ({error}): remove it to measure again")


def written_by(program, argv, settings) -> str:
    """The sentence that stands above all tables: the command, its settings, the machine and the versions."""
    return (f"These numbers were written by `{command_line(program, argv)}`: {settings}; "
            f"{platform.processor() or platform.machine()}, torch {torch.__version__}, transformers "
            f"{transformers.__version__}.")


# ---- write ----

def write_page(path, title, figure, text) -> None:
    """Put `text` between the two markers of a page; people write the rest of it, and it stays as it is.

    A page that does not exist is made, with title, figure (None: without one) and markers. A page without markers gets
    them at its end.
    """
    picture = f"\n![{title}]({figure})\n" if figure else ""
    page = path.read_text() if path.exists() else f"# {title}\n{picture}"
    if (page.count(BEGIN), page.count(END)) == (0, 0):
        page = f"{page.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end or BEGIN in rest or END in before + after:
        raise ValueError(f"{path} must have the lines {BEGIN} and {END} once each and in this order, or neither")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")
