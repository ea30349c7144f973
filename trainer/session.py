r"""A run: what it holds, what it writes into its directory, and how it is told to end.

    config.json       all settings, versions, git revision, checksums of the questions: written before the first step
    metrics.jsonl     a line per step: what was learned. The same seed on the same CPU gives the same bytes
    timing.jsonl      a line per step: seconds, tokens per second, memory
    samples.jsonl     some rollouts and branches as text
    pivots.csv        a line per pivot, or other state that was branched, with its outcome

checkpoint.py has the files of a checkpoint, and how all of these survive a process that is killed.
"""
import argparse
import fcntl
import hashlib
import inspect
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers

from grading import GRADERS, is_number, r1_text, states_gold
from recoverability import Recoverability
from tasks import digests
from trainer.checkpoint import append_lines, find_checkpoints, write_whole
from trainer.compiling import plain_rows
from trainer.policy import Policy
from trainer.ranks import distributed, gather, rank, world_size
from variants.goldilocks import Teacher

ROOT = Path(__file__).parents[1]
PIVOT_COLUMNS = "step,response_tokens,pivot,depth,right_branches,branches,question_rate\n"
OWN_REWARD = Policy.reward                           # of this repository, before a fork puts its own there
LISTS = ("training", "evaluation", "validation")     # of questions
# A run that goes on may get other values of these: how far it goes, how often it is saved, what changes memory and time
# but no result, and where its model and its questions are, which must be the same ones (check_start, check_questions).
MAY_CHANGE = ("steps", "budget_tokens", "save_every", "micro_batch_tokens", "gradient_checkpointing",
              "offload_optimizer", "compile", "model", "data", "eval_data")
OF_THIS_START = {"resume", "max_hours", "dry_run", "gpus"}       # flags that are not settings of a run


@dataclass
class Run:
    """Everything that a step works on. What of it changes from step to step is in its checkpoint."""
    args: argparse.Namespace
    policy: Policy
    ref_model: torch.nn.Module | None
    optimizer: torch.optim.Optimizer
    recoverability: Recoverability
    pivot_rng: np.random.Generator
    questions: list
    eval_questions: list
    val_questions: list
    skipped: int
    date: str | None = None                          # in prompts, where the chat template asks for today's
    start: dict | None = None                        # stop ids and checksum of the starting model; name of the reward
    score: Callable = plain_rows                     # that of the update: of compiling.py, compiled_rows or plain_rows
    teacher: Teacher | None = None                   # who chooses the questions, with --select
    step: int = 0
    rounds: int = 0                                  # batches of questions so far
    generated_total: int = 0
    waiting: list = field(default_factory=list)      # with --lag: the groups of steps that are not trained yet
    best_step: int | None = None
    best_accuracy: float = -1.0

    @property
    def finished(self) -> bool:
        """Is the run at its last step, or over its budget of generated tokens?"""
        return self.step >= self.args.steps or (self.args.budget_tokens or float("inf")) <= self.generated_total


# ---- the run directory ----

LOCK = ".lock"


def check_empty(out) -> None:
    """Raise ValueError when there is already something in the folder of a new run."""
    if (out / "config.json").exists():
        raise ValueError(f"{out} already holds a run: choose another --out, or --resume {out}")
    if out.is_file():
        raise ValueError(f"{out} is a file: choose another --out")
    if out.is_dir() and any(path.name not in (LOCK, "config.json.partial") for path in out.iterdir()):
        raise ValueError(f"{out} is not empty: choose another --out, or remove what is in it")


@contextmanager
def owned(folder):
    """The folder belongs to this process until the end of the block. Raises ValueError when another process has it.

    It is made if it is not there. The lock is one of the operating system, so a killed process does not leave it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process writes into {folder}: wait for its end, or choose another folder"
                             ) from None
        except OSError as error:                         # some network disks have no locks
            print(f"warning: {folder} cannot be locked ({error}), so no other process may write into it")
        yield


def read_config(run_dir) -> dict:
    """What the config.json of a run holds. Raises ValueError when there is none, or a damaged one."""
    try:
        about = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        parts = [about.get(name) for name in ("settings", "digests", "start")]
        if not all(isinstance(part, dict) for part in parts) or "seed" not in about["settings"]:
            raise ValueError("its config.json is damaged")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{run_dir} does not hold a run: {error}") from error
    return about


def check_questions(run_dir, before, asked) -> None:
    """Raise ValueError when a run that goes on would get other questions, or other prompts, than it began with.

    before: its config.json, empty for a new run. asked: the training, evaluation and validation questions of now.
    """
    for name, questions in zip(LISTS, asked if before else ()):
        then, now = before["digests"][name], digests(questions)
        if then["rows"] != now["rows"]:
            raise ValueError(f"{run_dir} began with other {name} questions ({before[f'{name}_questions']} then, "
                             f"{len(questions)} now): put the data back as it was, or start a new run")
        if then["prompts"] != now["prompts"]:
            raise ValueError(f"{run_dir} began with other prompts of the same {name} questions: put the tokenizer and "
                             "its chat template back as they were, or start a new run")


def name_of(reward) -> str:
    """A text that tells a reward from others: its name and, of a user's own, the checksum of the file that holds it."""
    name = f"{reward.__module__}.{reward.__qualname__}"
    if reward is OWN_REWARD:
        return name
    try:
        file = Path(inspect.getsourcefile(reward))
        return f"{name} in {file.name}, checksum {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
    except (TypeError, OSError):                         # typed into an interpreter
        return name


def check_start(run_dir, before, start) -> None:
    """Raise ValueError when a run that goes on would have another starting model or reward. start: that of Run.

    Other code is only said: it may be a mended message.
    """
    if before and (then := before.get("git_revision")) != (now := git_revision()):
        print(f"warning: {run_dir} began with the code of {then}, and this is {now}")
    for name, now in start.items():
        if (then := before["start"][name] if before else now) != now:
            what = "the reward" if name == "reward" else f"{name} of the starting model"
            raise ValueError(f"{run_dir} did not begin like this: {what} was {then} then and is {now} now; put back "
                             "what was changed, or start a new run")


def git_revision() -> str | None:
    """The commit of this code, with "-dirty" where a file of it was changed since; None without a repository or git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return None
    return found.stdout.strip() or None


def write_config(run) -> None:
    """config.json: all settings, and what the numbers depend on besides."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(run.args).items()
                if k not in OF_THIS_START}
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {"python": sys.version.split()[0], "torch": torch.__version__,
                "transformers": transformers.__version__, "numpy": np.__version__}
    parameters = sum(p.numel() for p in run.policy.model.parameters())
    asked = dict(zip(LISTS, (run.questions, run.eval_questions, run.val_questions)))
    about = {"settings": settings, **{f"{name}_questions": len(questions) for name, questions in asked.items()},
             "skipped_questions": run.skipped, "date": run.date, "start": run.start,
             "digests": {name: digests(questions) for name, questions in asked.items()}, "parameters": parameters,
             "device": hardware, "ranks": world_size(), "versions": versions,
             "git_revision": git_revision()}
    write_whole(run.args.out / "config.json", json.dumps(about, indent=2) + "\n")
    print(" ".join(f"{name}={value}" for name, value in settings.items()))
    if run.date:
        print(f"the chat template asks for the date: it is {run.date} in all prompts of this run")
    print(f"{len(run.questions)} training and {len(run.eval_questions)} evaluation questions, "
          f"{parameters / 1e6:.1f} M parameters, {world_size()} x {hardware}; writing to {run.args.out}")


def keep_changes(args) -> None:
    """What a run that goes on has been given anew (MAY_CHANGE) goes into its config.json."""
    about = read_config(args.out)
    changed = {name: getattr(args, name) for name in MAY_CHANGE}
    if about["settings"] | changed != about["settings"]:
        about["settings"] |= changed
        write_whole(args.out / "config.json", json.dumps(about, indent=2) + "\n")


def log(run, metrics, timing, samples=(), groups=()) -> None:
    """A line to metrics.jsonl and to timing.jsonl, the samples, and a line to pivots.csv for every fork."""
    append_lines(run.args.out / "samples.jsonl", samples)
    path = run.args.out / "pivots.csv"
    with open(path, "a", encoding="utf-8") as file:
        file.write(PIVOT_COLUMNS * (path.stat().st_size == 0) + "".join(pivot_lines(run.step, groups)))
    append_lines(run.args.out / "metrics.jsonl", [{"step": run.step, **metrics}])
    append_lines(run.args.out / "timing.jsonl", [{"step": run.step, **timing}])


def pivot_lines(step, groups):
    """For pivots.csv: PIVOT_COLUMNS of every fork. Correct is what has a reward above 0.

    question_rate: the share of correct rollouts of its question.
    """
    def right(rewards):
        return sum(reward > 0 for reward in rewards)

    for g in groups:
        rate = right(t.reward for t in g.trajectories) / len(g.trajectories)
        for t in g.trajectories:
            for fork in t.forks:
                yield (f"{step},{len(t.response)},{fork.pivot},{fork.ratio:.4f},{right(fork.rewards)},"
                       f"{len(fork.rewards)},{rate:.4f}\n")


def sample_lines(run, questions, groups):
    """For samples.jsonl: the first right and the first failed rollout of every question, a line for each fork."""
    text = run.policy.text
    for question, group in zip(questions, groups):
        for right in (True, False):
            for t in [t for t in group.trajectories if (t.reward > 0) == right][:1]:
                line = {"step": run.step, "question": question.text, "gold": question.gold,
                        "response": text(t.response), "reward": t.reward}
                for fork in [fork for fork in t.forks if fork.branches]:
                    branches = [{"text": text(y), "reward": r} for y, r in zip(fork.branches, fork.rewards)]
                    yield line | {"pivot": fork.pivot, "prefix": text(t.response[:fork.pivot]), "branches": branches}
                if not t.branches:
                    yield line | {"pivot": None, "prefix": None, "branches": []}


def why_nothing_is_right(run, asked) -> str:
    """One line on the form of the responses of the first steps, of which none is right. asked: (question, group)s."""
    cut = [t.response[-1] not in run.policy.stop for _, g in asked for t in g.trajectories]
    texts = [(q, run.policy.text(t.response)) for q, g in asked for t in g.trajectories]
    numbers = [(q, text) for q, text in texts if isinstance(q.gold, str) and is_number(q.gold)]

    def share(count, of=texts):
        return f"{100 * sum(count) / max(1, len(of)):.0f} %"

    def read_as(how):
        of = texts if how == "boxed" else numbers        # the others read numbers only
        return share([GRADERS[how](r1_text(text, how, finished=True) if q.template == "r1" else text, q.gold)
                      for q, text in of], of)

    marked, boxed = share("####" in text for _, text in texts), share("\\boxed" in text for _, text in texts)
    stated = share([states_gold(text, q.gold) for q, text in numbers], numbers)
    return (f"no response of the first two steps is right. {share(cut)} of them were cut off at --max-new-tokens, "
            f"{marked} contain ####, {boxed} a box, and in {stated} some number equals the gold answer. Read "
            "otherwise, finished or not, these would be right: "
            + ", ".join(f"{read_as(how)} with --answer {how}" for how in GRADERS if numbers or how == "boxed"))


def stop_after_this_step(run, signals) -> list:
    """From now on Ctrl-C and SIGTERM put their name into the returned list; a second one ends the process.

    One that comes within a second of the first is the same one: `timeout` signals a process, and then its whole group.
    (Under torchrun a second one never ends the process: torchrun passes on to all ranks what they may have had already,
    and ends them itself.)
    """
    received, began = [], 0.0

    def note(number, frame):
        nonlocal began
        name = signal.Signals(number).name
        if not received:
            received.append(name)
            began = time.monotonic()
            if rank() == 0:
                print(f"\n{name}: ending after this step"
                      + (", if torchrun waits for that: 30 seconds, or its --shutdown-timeout" if distributed()
                         else "; once more to end at once"), file=sys.stderr)
        elif time.monotonic() - began > 1 and not distributed():
            saved = max((step for step, _ in find_checkpoints(run.args.out)), default=0)
            print(f"\n{name}: ended at once, without saving; {run.step - saved} finished steps are lost, "
                  f"--resume goes on after step {saved}", file=sys.stderr, flush=True)
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in signals:
        signal.signal(number, note)
    return received


def ended_by(args, received, start, longest):
    """The signal that any rank has received, or "--max-hours" when a step as long as the longest would end too late."""
    late = args.max_hours is not None and time.perf_counter() - start + longest > 3600 * args.max_hours
    everyone = gather(lambda: received[:1] + ([f"--max-hours {args.max_hours:g}"] if late else []))
    return next((why for reasons in everyone for why in reasons), None)
