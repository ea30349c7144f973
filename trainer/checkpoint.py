r"""A run on disk: logs that grow by whole lines, and checkpoints that are there completely or not at all.

    RUN_DIR/metrics.jsonl, samples.jsonl    what the run did: the same seed on the same CPU gives the same bytes
    RUN_DIR/timing.jsonl                    what it cost: seconds, tokens per second, memory
    RUN_DIR/checkpoints/step_N              the state after step N

A run may be killed at any moment. A checkpoint that was being written is then a folder with another name, because a
checkpoint gets its name only when all of it is on the disk. A log may then have lines of later steps than the newest
checkpoint, and its last line may be torn. These lines are dropped when the run goes on, and they are written again.

The newest checkpoint and the best one are kept. If these are the same, the one before it is kept as well, so that there
is always another one to go on from.
"""
import json
import os
import re
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from trainer.model import load_model
from trainer.ranks import distributed, first, first_line, gather, rank, seed_rank

LOGS = ("metrics.jsonl", "samples.jsonl", "timing.jsonl", "pivots.csv")


def append_lines(path, lines) -> None:
    """Append each of `lines` (dicts) to the file as one line of JSON."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def write_whole(path, text) -> None:
    """Write a file with this text. If the process dies in between, the file that was there before stays as it was."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    _to_disk(beside)
    os.replace(beside, path)


def cut_logs(run_dir, step) -> None:
    """Drop the lines of the logs that belong to later steps than `step` (-1: all lines), and a torn last line."""
    for path in (Path(run_dir) / name for name in LOGS):
        if path.exists():
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                try:
                    if not line.endswith("\n") or step_of(line) > step:
                        break
                except ValueError as error:
                    raise ValueError(f"{path}, line {len(kept) + 1}: it is damaged ({error}); remove it and what comes "
                                     "after it") from error
                kept.append(line)
            write_whole(path, "".join(kept))


def step_of(line) -> int:
    """The step that a line of a log belongs to: -1 for the header of pivots.csv, whose first column is the step."""
    if line.startswith("{"):
        return json.loads(line)["step"]
    return -1 if line.startswith("step,") else int(line.split(",")[0])


def find_checkpoints(run_dir) -> list[tuple[int, Path]]:
    """(step, folder) of all complete checkpoints of a run, the oldest first."""
    folders = (Path(run_dir) / "checkpoints").glob("step_*")
    return sorted((int(path.name[5:]), path) for path in folders if re.fullmatch(r"step_\d+", path.name))


def save_checkpoint(run_dir, step, write, best_step=None, shards=None) -> None:
    """Make checkpoints/step_N, and remove old checkpoints.

    write(folder) fills a folder with another name, which is then renamed. With several ranks, which must all see one
    disk, rank 0 writes. shards is a state dict of which each rank holds a part. It goes into optimizer/, where each
    rank writes its own part. Raises OSError when writing fails, for example on a full disk. The checkpoints that were
    there before are then still there.
    """
    folder = Path(run_dir) / "checkpoints" / f"step_{step}"
    beside = folder.with_name(folder.name + ".partial")

    def attempt(action):
        try:
            action()
        except Exception as error:                               # safetensors and torch raise their own types
            shutil.rmtree(beside, ignore_errors=True)            # its room on the disk may be needed
            raise OSError(f"the checkpoint {folder} could not be written: {error}") from error

    def begin():
        shutil.rmtree(beside, ignore_errors=True)                # left by a process that was killed here
        beside.mkdir(parents=True)
        write(beside)

    def complete():
        for path in [*beside.rglob("*"), *(Path(run_dir) / name for name in LOGS)]:
            if path.is_file():
                _to_disk(path)

    def rename():
        os.replace(beside, folder)
        _remove_old(run_dir, best_step)

    if first(folder.exists):
        return
    first(lambda: attempt(begin))
    if shards is not None:
        attempt(lambda: dcp.save(shards, checkpoint_id=beside / "optimizer"))                # all ranks together
    first(lambda: attempt(complete))
    first(rename)


def _remove_old(run_dir, best_step):
    """Remove all checkpoints but the newest and the best or, where these are the same, all but the newest two."""
    found = find_checkpoints(run_dir)
    kept = {found[-1][0], best_step}
    if len(kept & {step for step, _ in found}) == 1:
        kept |= {step for step, _ in found[-2:]}
    for step, folder in found:
        if step not in kept:
            going = folder.with_name(folder.name + ".old")       # a half removed one must not look complete
            os.replace(folder, going)
            shutil.rmtree(going, ignore_errors=True)             # a network disk keeps files that others read
    parent = found[-1][1].parent
    for leftover in [*parent.glob("*.old"), *parent.glob("*.partial")]:
        shutil.rmtree(leftover, ignore_errors=True)


def _to_disk(path):
    """Return only when the operating system has written the file, and not just promised to write it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


# ---- the state of a run (session.Run) ----

def moving_parts(run) -> dict:
    """What a resumed run needs besides weights and optimizer, as it is now."""
    some = {} if run.teacher is None else {"teacher": run.teacher.state_dict()}
    some |= {"waiting": list(run.waiting)} if run.args.lag else {}
    return {"step": run.step, "rounds": run.rounds, "generated_total": run.generated_total, **some,
            "best_step": run.best_step, "best_accuracy": run.best_accuracy,
            "recoverability": run.recoverability.state_dict(), "pivot_rng": run.pivot_rng.bit_generator.state,
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def save_run(run, parts) -> None:
    """Write checkpoints/step_N: model and tokenizer in Hugging Face format, and trainer.pt.

    trainer.pt holds the moving parts, with the random states of all ranks, and the optimizer. The optimizer of a
    sharded run is in optimizer/ instead, which all ranks write.
    """
    parts = parts | {name: gather(lambda name=name: parts[name]) for name in ("torch_rng", "cuda_rng")}
    optimizer = optimizer_state(run)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True) if distributed() else None
    weights = get_model_state_dict(run.policy.model, options=whole)             # whole on rank 0 only, if sharded

    def write(folder):
        run.policy.model.save_pretrained(folder, state_dict=weights)
        run.policy.tokenizer.save_pretrained(folder)
        torch.save(parts if distributed() else {"optimizer": optimizer, **parts}, folder / "trainer.pt")

    save_checkpoint(run.args.out, parts["step"], write, parts["best_step"], optimizer if distributed() else None)


def optimizer_state(run) -> dict:
    """The state of the optimizer, also of one that has made no step yet: then its moments and its step are 0.

    torch makes a state in that case by a step without an effect on the weights, which it counts as one.
    """
    if not run.optimizer.state:
        get_optimizer_state_dict(run.policy.model, run.optimizer)
        for state in run.optimizer.state.values():
            state["step"].zero_()
    return get_optimizer_state_dict(run.policy.model, run.optimizer)


def load_run(run) -> int:
    """Put the run back to its newest checkpoint, which may be from any number of ranks.

    Returns the step of the checkpoint, or 0 if there is none. Raises ValueError when it is damaged.
    """
    found = first(lambda: find_checkpoints(run.args.out))
    if not found:
        return 0
    folder = found[-1][1]
    try:
        parts = _read(run, folder)
    except ValueError as error:
        older = f"the one before, {found[-2][1].name}" if len(found) > 1 else "the beginning"
        raise ValueError(f"the checkpoint {folder} cannot be read ({error}); "
                         f"remove it to go on from {older}") from error
    for name in ("step", "rounds", "generated_total", "best_step", "best_accuracy"):
        setattr(run, name, parts[name])
    run.waiting = parts.get("waiting", [])
    run.recoverability.load_state_dict(parts["recoverability"])
    if run.teacher is not None:
        run.teacher.load_state_dict(parts["teacher"])
    run.pivot_rng.bit_generator.state = parts["pivot_rng"]
    if rank() < len(parts["torch_rng"]):
        torch.set_rng_state(parts["torch_rng"][rank()])
        if parts["cuda_rng"][rank()] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(parts["cuda_rng"][rank()])
    else:                                                # the checkpoint is from fewer ranks
        seed_rank(run.args.seed, run.step)
    first(lambda: _remove_old(run.args.out, run.best_step))          # what a killed process had left there
    return run.step


def _read(run, folder):
    """Read weights and optimizer of a checkpoint into the run. Returns its moving parts."""
    weights, moments = {}, {}                            # whole tensors, on rank 0 only

    def load():
        try:
            parts = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=False)
            weights.update(load_model(str(folder))[0].state_dict())
            moments.update(parts.pop("optimizer", {}))
        except Exception as error:                       # it may have many types, and the user needs one line
            raise ValueError(first_line(error)) from error
        return parts, bool(moments)

    parts, by_one_process = first(load)
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=distributed())
    set_model_state_dict(run.policy.model, weights, options=whole)
    if by_one_process:
        set_optimizer_state_dict(run.policy.model, run.optimizer, moments, options=whole)
        return parts
    moments = get_optimizer_state_dict(run.policy.model, run.optimizer)
    try:
        dcp.load(moments, checkpoint_id=folder / "optimizer")
    except Exception as error:                           # it is raised on all ranks alike
        raise ValueError(f"it holds no optimizer state: {repr(error).splitlines()[0]}") from error
    set_optimizer_state_dict(run.policy.model, run.optimizer, moments)
    return parts
