"""Long runs: killed at random moments, told to stop, out of room, with a checkpoint that cannot be read."""
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model

from trainer import checkpoint
from trainer.checkpoint import (
    append_lines,
    cut_logs,
    find_checkpoints,
    optimizer_state,
    save_checkpoint,
    write_whole,
)
from trainer.session import PIVOT_COLUMNS

ROOT = Path(__file__).parents[2]
RUN = ["--preset", "tiny", "--group-size", "4", "--branches", "2", "--questions", "1", "--steps", "6",
       "--save-every", "1", "--eval-every", "2", "--eval-rows", "4", "--max-new-tokens", "24", "--seed", "3",
       "--temperature", "2"]                         # at 1 the rollouts of a question are nearly the same

# Runs are forks of a process that has imported everything: a second each, not ten. `what` happens in the fork:
#   ["call", n]     SIGKILL instead of the n-th rename, removal or flush: between the steps of writing a checkpoint
#   ["log", n]      SIGKILL in the middle of the n-th addition to a log, with half of the text written
#   ["weights", n]  SIGKILL in the middle of the n-th trainer.pt
#   ["time", t]     SIGKILL t seconds after training began
#   ["SIGINT", n], ["SIGTERM", n]   that signal, twice in a row, after the n-th addition to a log
#   ["disk", b]     no file can grow beyond b bytes: write() fails as on a full disk
SERVER = r"""
import json, os, resource, signal, sys, threading, time
import torch
import train_gsm8k
from trainer import checkpoint, session

make_rows = train_gsm8k.tasks.lock.make_rows
train_gsm8k.tasks.lock.make_rows = lambda lock, n, seed: make_rows(lock, min(n, 32), seed)
train_gsm8k.plot_run = lambda run_dir: None          # these two are most of the time of such a short run
# A rollout of 24 tokens is never correct, and without rewards there is neither a gradient nor a fit of Eq. (P).
train_gsm8k.Policy.reward = lambda self, question, response: float(sum(response) % 3 == 0)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def at(n, function, event):
    calls = [0]
    def call(*args, **kwargs):
        calls[0] += 1
        return event(function, *args, **kwargs) if calls[0] == n else function(*args, **kwargs)
    return call

def half_a_log(function, path, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with open(path, "a") as file:
        file.write(text[:len(text) // 2])
    die()

def half_the_weights(function, state, path):
    function(state, path)
    os.truncate(path, os.path.getsize(path) // 2)
    die()

def prepare(kind, n):
    if kind == "call":
        event = at(n, lambda name, function, *a, **k: function(*a, **k), lambda *_, **__: die())
        real = os.replace, os.fsync, checkpoint.shutil.rmtree
        os.replace, os.fsync, checkpoint.shutil.rmtree = (
            lambda *a, f=f, **k: event(f.__name__, f, *a, **k) for f in real)
    elif kind == "log":
        session.append_lines = at(n, session.append_lines, half_a_log)
    elif kind == "weights":
        torch.save = at(n, torch.save, half_the_weights)
    elif kind == "time":
        loop = train_gsm8k.train
        train_gsm8k.train = lambda *run: (threading.Timer(n, die).start(), loop(*run))[1]
    elif kind == "disk":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))
    else:
        def send(function, *args):
            function(*args)
            time.monotonic = lambda: 0.0                 # a second may pass between two lines on a busy machine
            for _ in range(2):
                os.kill(os.getpid(), getattr(signal, kind))
        session.append_lines = at(n, session.append_lines, send)

for line in sys.stdin:
    what, argv, out, err = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        try:
            if what:
                prepare(*what)
            code = train_gsm8k.main(argv)
        except SystemExit as stop:
            code = stop.code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train(flags, what) -> (exit code, stdout, stderr) of the command, with what happens to it."""
    folder = tmp_path_factory.mktemp("output")
    server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(flags, what=None):
        request = [what, [str(flag) for flag in flags], str(folder / "out"), str(folder / "err")]
        print(json.dumps(request), file=server.stdin, flush=True)
        return int(server.stdout.readline()), (folder / "out").read_text(), (folder / "err").read_text()

    yield run
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The run that is never interrupted. It learns and fits P, because else there would be little to compare."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train([*RUN, "--out", out])[0] == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    assert sum(row["w"] != 0 for row in rows) >= 2 and max(row["grad_norm"] for row in rows) > 0.01
    return out


def assert_same(run, whole):
    for log in ("metrics.jsonl", "samples.jsonl", "pivots.csv"):
        assert (run / log).read_bytes() == (whole / log).read_bytes(), log
    assert [step for step, _ in find_checkpoints(run)] == [step for step, _ in find_checkpoints(whole)]
    last, expected = find_checkpoints(run)[-1][1], find_checkpoints(whole)[-1][1]
    assert (last / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    a, b = (torch.load(folder / "trainer.pt", weights_only=False) for folder in (last, expected))
    assert a.keys() == b.keys() == {"optimizer", "step", "rounds", "generated_total", "best_step", "best_accuracy",
                                    "recoverability", "pivot_rng", "torch_rng", "cuda_rng"}
    for name in a.keys() - {"optimizer", "torch_rng"}:
        assert a[name] == b[name], name
    assert torch.equal(*a["torch_rng"], *b["torch_rng"])             # lists over ranks, of one
    for key, state in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][key][name]) for name, value in state.items())


MOMENTS = random.Random(0)
KILLS = ([["call", MOMENTS.randint(1, 90)] for _ in range(6)] + [["log", MOMENTS.randint(1, 20)] for _ in range(4)]
         + [["weights", MOMENTS.randint(1, 6)] for _ in range(3)]
         + [["time", MOMENTS.uniform(0, 0.8)] for _ in range(7)])      # of the time that the whole run takes


def killed(train, out, kills):
    """Begin the run in `out`, kill it by the first of `kills`, resume it, kill it again, ..., and let it end.

    Returns the exit codes of those that were to be killed: 0 where the moment came after the end.
    """
    begin, codes = [*RUN, "--out", out], []
    for what in (*kills, None):
        # Killed before config.json was there, nothing had begun, and the same command is typed again.
        code, _, errors = train(["--resume", out] if (out / "config.json").exists() else begin, what)
        assert code in (0, -signal.SIGKILL), (kills, errors)
        codes.append(code)
    assert codes.pop() == 0
    return codes


def test_killed_in_a_log_in_the_weights_and_in_a_checkpoint_it_ends_as_if_it_had_not_been(train, whole, tmp_path):
    out = tmp_path / "run"
    assert killed(train, out, [["log", 8], ["weights", 2], ["call", 9]]) == [-signal.SIGKILL] * 3
    assert_same(out, whole)


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_ends_as_if_it_had_not_been(train, whole, tmp_path):
    """Ten runs are killed, resumed, killed again, and resumed: in the writing of checkpoints and logs, and anywhere."""
    clock = [json.loads(line) for line in (whole / "timing.jsonl").read_text().splitlines()]
    seconds = sum(value for line in clock for name, value in line.items() if name.startswith("seconds_"))
    kills = [[kind, n * seconds if kind == "time" else n] for kind, n in KILLS]
    MOMENTS.shuffle(kills)
    deaths = Counter()
    for i, pair in enumerate(zip(kills[::2], kills[1::2])):
        for (kind, _), code in zip(pair, killed(train, tmp_path / str(i), pair)):
            deaths["in time" if kind == "time" else "in writing"] += code != 0
        assert_same(tmp_path / str(i), whole)
    assert deaths["in writing"] >= 8 and deaths["in time"] >= 1      # some moments come after the end


def test_killed_before_the_old_checkpoints_were_removed_it_removes_them(train, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.copytree(out / "checkpoints" / "step_6", out / "checkpoints" / "step_5")
    assert [step for step, _ in find_checkpoints(out)] == [2, 5, 6]
    assert train(["--resume", out])[0] == 0
    assert_same(out, whole)


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_told_to_stop_it_ends_the_step_saves_and_says_how_to_go_on(number, train, whole, tmp_path):
    out = tmp_path / "run"
    code, printed, errors = train([*RUN, "--out", out], [number, 8])       # three additions a step, from step 0 on
    assert code == 1 and "Traceback" not in errors and f"{number}: ending after this step" in errors
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert f"{number}: ended after step {last} of 6" in printed and f"--resume {out}" in printed
    assert 0 < last < 6 and find_checkpoints(out)[-1][0] == last
    assert train(["--resume", out])[0] == 0
    assert_same(out, whole)


def test_max_hours_ends_in_time_and_goes_on(train, whole, tmp_path):
    out = tmp_path / "run"
    code, printed, _ = train([*RUN, "--out", out, "--max-hours", 1e-9])
    assert code == 0 and "--max-hours 1e-09: ended after step 0 of 6" in printed
    assert train(["--resume", out])[0] == 0              # the limit is not one of the run's settings
    assert_same(out, whole)


def test_an_optimizer_is_saved_before_its_first_step_as_it_is():
    """torch makes its state by a step, and a count of 1 would change the size of the first real one."""
    models = [make_model(seed=0) for _ in range(2)]
    saved, fresh = (torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01) for model in models)
    state = optimizer_state(SimpleNamespace(policy=SimpleNamespace(model=models[0]), optimizer=saved))
    assert all(s["step"] == 0 and not s["exp_avg"].any() for s in state["state"].values()) and state["state"]
    for model, optimizer in zip(models, (saved, fresh)):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models)))
    assert all(s["step"] == 1 for s in saved.state.values())


def test_a_full_disk_is_one_line_and_the_previous_checkpoint_resumes(train, whole, tmp_path):
    out = tmp_path / "run"
    assert train([*RUN, "--out", out, "--steps", 3])[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (out / "checkpoints").rglob("*")}
    size = (find_checkpoints(out)[-1][1] / "trainer.pt").stat().st_size
    code, _, errors = train(["--resume", out, "--steps", 6], ["disk", size - 4096])
    lines = [line for line in errors.splitlines() if line.startswith("error:")]
    assert code == 1 and len(lines) == 1 and "Traceback" not in errors
    assert "step_4 could not be written" in lines[0] and f"--resume {out}" in lines[0]
    assert {path: path.stat().st_mtime_ns for path in (out / "checkpoints").rglob("*")} == before
    assert train(["--resume", out, "--steps", 6])[0] == 0
    assert find_checkpoints(out)[-1][0] == 6


def test_an_unreadable_checkpoint_is_one_line_and_the_previous_one_resumes(train, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (previous, _), (newest, folder) = find_checkpoints(out)[-2:]
    for name, torn in itertools.product(("trainer.pt", "model.safetensors"), (True, False)):
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        if torn:
            (folder / name).write_bytes(data[:len(data) // 2])
        code, _, errors = train(["--resume", out])
        assert code == 2 and errors.count("\n") == 1, (name, torn, errors)
        assert f"step_{newest} cannot be read" in errors and f"the one before, step_{previous}" in errors
        (folder / name).write_bytes(data)
    shutil.rmtree(folder)
    assert train(["--resume", out])[0] == 0
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


# ---- the pieces ----

def filled(folder):
    (folder / "file").write_text("x")


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, best, kept in [(1, None, [1]), (2, 2, [1, 2]), (3, 2, [2, 3]), (4, 2, [2, 4]), (5, 5, [4, 5]),
                             (6, 5, [5, 6]), (10, 5, [5, 10])]:
        save_checkpoint(tmp_path, step, filled, best)
        assert [s for s, _ in find_checkpoints(tmp_path)] == kept


def test_leftovers_of_a_killed_process_are_not_checkpoints_and_go(tmp_path):
    save_checkpoint(tmp_path, 1, filled)
    for name in ("step_2.partial", "step_0.old"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert [s for s, _ in find_checkpoints(tmp_path)] == [1]
    save_checkpoint(tmp_path, 2, filled)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_1", "step_2"]


def test_a_failing_write_leaves_what_was_there(tmp_path):
    save_checkpoint(tmp_path, 1, filled)

    def fail(folder):
        filled(folder)
        raise RuntimeError("no room")

    with pytest.raises(OSError, match="step_2 could not be written: no room"):
        save_checkpoint(tmp_path, 2, fail)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_1"]


def test_logs_are_cut_to_whole_lines_up_to_the_step(tmp_path):
    for name in checkpoint.LOGS[:2]:
        append_lines(tmp_path / name, [{"step": step, "x": "é"} for step in (0, 1, 1, 2, 3)])
        with open(tmp_path / name, "a") as file:
            file.write('{"step": 4, "x')
    for step, kept in ((3, [0, 1, 1, 2, 3]), (1, [0, 1, 1])):
        cut_logs(tmp_path, step)
        for name in checkpoint.LOGS[:2]:
            assert [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()] == kept
    cut_logs(tmp_path, -1)
    assert (tmp_path / "metrics.jsonl").read_text() == "" and not (tmp_path / "timing.jsonl").exists()


def test_a_damaged_line_of_a_log_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": \n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: it is damaged \(.*\); remove it and what"):
        cut_logs(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch):
    """On a network disk a folder stays as long as another process reads a file in it. It goes with a later save."""
    remove = checkpoint.shutil.rmtree

    def busy(path, ignore_errors=False):
        if path.exists() and not ignore_errors:
            raise OSError(39, "Directory not empty")

    for step in (1, 2):
        save_checkpoint(tmp_path, step, filled)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", busy)
    save_checkpoint(tmp_path, 3, filled)
    assert (tmp_path / "checkpoints" / "step_1.old").exists()
    assert [step for step, _ in find_checkpoints(tmp_path)] == [2, 3]
    monkeypatch.setattr(checkpoint.shutil, "rmtree", remove)
    save_checkpoint(tmp_path, 4, filled)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_3", "step_4"]


def test_write_whole_replaces_or_leaves(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"


def test_a_checkpoint_gets_its_name_after_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    did, to_disk, rename = [], checkpoint._to_disk, os.replace
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    monkeypatch.setattr(checkpoint, "_to_disk", lambda path: did.append(path.name) or to_disk(path))
    monkeypatch.setattr(os, "replace", lambda a, b: did.append("rename") or rename(a, b))
    save_checkpoint(tmp_path, 1, lambda folder: (folder / "file").write_text("x"))
    assert sorted(did[:2]) == ["file", "metrics.jsonl"] and did[2] == "rename"       # first all of it is on the disk


def test_all_logs_are_cut_to_the_step(tmp_path):
    pivots = "".join(f"{step},9,3,0.5,1,2,0.5\n" for step in (1, 1, 2, 3)) + "3,9"                  # torn
    (tmp_path / "pivots.csv").write_text(PIVOT_COLUMNS + pivots)
    (tmp_path / "timing.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (0, 1, 2, 3)))
    cut_logs(tmp_path, 2)
    lines = (tmp_path / "pivots.csv").read_text().splitlines(keepends=True)
    assert lines[0] == PIVOT_COLUMNS and [line[0] for line in lines[1:]] == ["1", "1", "2"]
    assert [json.loads(line)["step"] for line in (tmp_path / "timing.jsonl").read_text().splitlines()] == [0, 1, 2]
