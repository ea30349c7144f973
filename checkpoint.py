r"""A run on disk: logs that grow by whole lines, checkpoints that are there completely or not at all.

    RUN_DIR/metrics.jsonl, samples.jsonl    what the run did: the same seed on the same CPU gives the same bytes
    RUN_DIR/timing.jsonl                    what it cost: seconds, tokens per second, memory
    RUN_DIR/checkpoints/step_N              the state after step N

A run may be killed at any moment. What was being written then is a folder with another name (it is renamed when
all of it is on the disk) or the tail of a log (lines after the checkpoint, a torn one among them, are dropped
when the run goes on, and written again). Kept are the newest checkpoint and the best one; where these are one
and the same, also the one before, so that there is always another to go on from.
"""
import json
import os
import re
import shutil
from pathlib import Path

import torch.distributed.checkpoint as dcp

from ranks import first

LOGS = ("metrics.jsonl", "samples.jsonl", "timing.jsonl")


def append_lines(path, lines) -> None:
    """Append each of `lines` (dicts) to the file as one line of JSON."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def write_whole(path, text) -> None:
    """The file with this text, or, when the process dies in between, the file that was there before."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    _to_disk(beside)
    os.replace(beside, path)


def cut_logs(run_dir, step) -> None:
    """Drop the lines of the logs that belong to later steps than `step` (-1: all of them), and a torn last line."""
    for path in (Path(run_dir) / name for name in LOGS):
        if path.exists():
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if not line.endswith("\n") or json.loads(line)["step"] > step:
                    break
                kept.append(line)
            write_whole(path, "".join(kept))


def find_checkpoints(run_dir) -> list[tuple[int, Path]]:
    """(step, folder) of all complete checkpoints of a run, oldest first."""
    folders = (Path(run_dir) / "checkpoints").glob("step_*")
    return sorted((int(path.name[5:]), path) for path in folders if re.fullmatch(r"step_\d+", path.name))


def save_checkpoint(run_dir, step, write, best_step=None, shards=None) -> None:
    """Make checkpoints/step_N: write(folder) fills a folder beside it, which is then renamed; old ones are removed.

    With several ranks (who must see one disk) rank 0 writes; shards, a state dict of which each rank holds a part,
    go into optimizer/, where each rank writes its own. OSError when writing fails, a full disk for example; the
    checkpoints that were there are then there still.
    """
    folder = Path(run_dir) / "checkpoints" / f"step_{step}"
    beside = folder.with_name(folder.name + ".partial")

    def attempt(action):
        try:
            action()
        except Exception as error:                               # safetensors and torch have their own types
            shutil.rmtree(beside, ignore_errors=True)            # its room may be needed
            raise OSError(f"the checkpoint {folder} could not be written: {error}") from error

    def begin():
        shutil.rmtree(beside, ignore_errors=True)                # of a process that was killed here
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
        attempt(lambda: dcp.save(shards, checkpoint_id=beside / "optimizer"))                # of all ranks together
    first(lambda: attempt(complete))
    first(rename)


def read_shards(folder, shards) -> None:
    """Fill `shards`, a state dict as save_checkpoint took it, on this number of ranks or any other.

    ValueError when that cannot be read, or is not there.
    """
    try:
        dcp.load(shards, checkpoint_id=Path(folder) / "optimizer")
    except Exception as error:                                   # on all ranks alike
        raise ValueError(f"no optimizer state in it: {repr(error).splitlines()[0]}") from error


def _remove_old(run_dir, best_step):
    """Keep the newest checkpoint and the best, or, where these are the same, the newest two."""
    found = find_checkpoints(run_dir)
    kept = {found[-1][0], best_step}
    if len(kept & {step for step, _ in found}) == 1:
        kept |= {step for step, _ in found[-2:]}
    for step, folder in found:
        if step not in kept:
            going = folder.with_name(folder.name + ".old")       # half removed, it must not look complete
            os.replace(folder, going)
            shutil.rmtree(going)
    parent = found[-1][1].parent
    for leftover in [*parent.glob("*.old"), *parent.glob("*.partial")]:
        shutil.rmtree(leftover, ignore_errors=True)


def _to_disk(path):
    """Return when the operating system has written the file, not only promised to."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
