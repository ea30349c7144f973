r"""A run: what it holds, what it writes into its directory, and how it is told to end.

    config.json       all settings, versions, git revision: written before the first step
    metrics.jsonl     a line per step: what was learned. The same seed on the same CPU gives the same bytes
    timing.jsonl      a line per step: seconds, tokens per second, memory
    samples.jsonl     some rollouts and branches as text

checkpoint.py has the files of a checkpoint, and how all of these survive a process that is killed.
"""
import argparse
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from recoverability import Recoverability
from trainer.checkpoint import append_lines, write_whole
from trainer.policy import Policy
from trainer.ranks import distributed, gather, rank, world_size

ROOT = Path(__file__).parents[1]


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
    step: int = 0
    rounds: int = 0                                  # batches of questions so far
    generated_total: int = 0
    best_step: int | None = None
    best_accuracy: float = -1.0

    @property
    def finished(self) -> bool:
        """Is the run at its last step, or over its budget of generated tokens?"""
        return self.step >= self.args.steps or (self.args.budget_tokens or float("inf")) <= self.generated_total


def write_config(run) -> None:
    """config.json: all settings, and what the numbers depend on besides."""
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(run.args).items()
                if k not in ("resume", "max_hours", "dry_run", "gpus")}
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {"python": sys.version.split()[0], "torch": torch.__version__,
                "transformers": transformers.__version__, "numpy": np.__version__}
    parameters = sum(p.numel() for p in run.policy.model.parameters())
    about = {"settings": settings, "training_questions": len(run.questions),
             "evaluation_questions": len(run.eval_questions), "validation_questions": len(run.val_questions),
             "skipped_questions": run.skipped, "parameters": parameters,
             "device": hardware, "ranks": world_size(), "versions": versions,
             "git_revision": revision.stdout.strip() or None}
    write_whole(run.args.out / "config.json", json.dumps(about, indent=2) + "\n")
    print(" ".join(f"{name}={value}" for name, value in settings.items()))
    print(f"{len(run.questions)} training and {len(run.eval_questions)} evaluation questions, "
          f"{parameters / 1e6:.1f} M parameters, {world_size()} x {hardware}; writing to {run.args.out}")


def log(run, metrics, timing, samples=()) -> None:
    """A line to metrics.jsonl and to timing.jsonl, and the samples."""
    append_lines(run.args.out / "samples.jsonl", samples)
    append_lines(run.args.out / "metrics.jsonl", [{"step": run.step, **metrics}])
    append_lines(run.args.out / "timing.jsonl", [{"step": run.step, **timing}])


def sample_lines(run, questions, groups):
    """For samples.jsonl: the first right and the first failed rollout of every question, a line for each fork."""
    text = run.policy.text
    for question, group in zip(questions, groups):
        for wanted in (1.0, 0.0):
            for t in [t for t in group.trajectories if t.reward == wanted][:1]:
                line = {"step": run.step, "question": question.text, "gold": question.gold,
                        "response": text(t.response), "reward": t.reward}
                for fork in [fork for fork in t.forks if fork.branches]:
                    branches = [{"text": text(y), "reward": r} for y, r in zip(fork.branches, fork.rewards)]
                    yield line | {"pivot": fork.pivot, "prefix": text(t.response[:fork.pivot]), "branches": branches}
                if not t.branches:
                    yield line | {"pivot": None, "prefix": None, "branches": []}


def stop_after_this_step(signals) -> list:
    """From now on Ctrl-C and SIGTERM put their name into the returned list; a second one ends the process.

    (Under torchrun a second one does not: torchrun passes on to all ranks what they may have had already, and ends
    them itself.)
    """
    received = []

    def note(number, frame):
        received.append(signal.Signals(number).name)
        if rank() == 0:
            print(f"\n{received[0]}: ending after this step"
                  + (", if torchrun waits for that: 30 seconds, or its --shutdown-timeout" if distributed()
                     else "; once more to end at once"), file=sys.stderr)
        for number in signals:
            signal.signal(number, signal.SIG_IGN if distributed() else signal.SIG_DFL)

    for number in signals:
        signal.signal(number, note)
    return received


def ended_by(args, received, start, longest):
    """The signal that any rank has received, or "--max-hours" when a step as long as the longest would end too late."""
    late = args.max_hours is not None and time.perf_counter() - start + longest > 3600 * args.max_hours
    everyone = gather(lambda: received[:1] + ([f"--max-hours {args.max_hours:g}"] if late else []))
    return next((why for reasons in everyone for why in reasons), None)
