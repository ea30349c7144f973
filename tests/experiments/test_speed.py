"""The benchmark compares equal work: its plain twins give what the repository gives, and every row runs."""
import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch

from deep_grpo import Config
from experiments import speed, workload
from loss import authors_weights, paper_weights


def tiny_work(model, **changes):
    return workload.Work(model, **dict(questions=2, mean=8, cap=12, prompt=8, group_size=4, branches=3) | changes)


def test_the_plain_update_has_the_same_gradient(model, ref_model):
    groups = tiny_work(model).groups()
    assert any(t.branches for g in groups for t in g.trajectories)
    results = []
    for update in (workload.update_ours, workload.update_plainly):
        model.zero_grad()
        loss = update(model, groups, Config(beta=0.3), ref_model, 60)
        results.append((loss, [p.grad.clone() for p in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)               # the plain one scores in float32
    for ours, plain in zip(results[0][1], results[1][1]):
        assert ours.abs().max() > 1e-3
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)


def test_every_variant_of_a_step_has_the_same_tokens_to_generate(model):
    shapes = []
    for sampler in (workload.sample_ours, workload.sample_plainly):
        work = tiny_work(model)
        groups = work.branch(sampler, work.rollouts(sampler))
        trajectories = [t for g in groups for t in g.trajectories]
        shapes.append([(len(t.response), [(pivot, len(y)) for pivot, y in t.branches]) for t in trajectories])
        assert [len(t.response) for t in trajectories] == work.lengths.reshape(-1).tolist()
        assert all(pivot + len(y) == len(t.response) for t in trajectories for pivot, y in t.branches)
    assert shapes[0] == shapes[1] and len({n for n, *_ in shapes[0]}) > 3


def test_x_is_time_over_that_of_the_first_and_seconds_are_a_median(monkeypatch):
    now, takes = [0.0], {"ours": iter([9, 2, 4, 3, 0]), "theirs": iter([9, 6, 6, 60, 0])}    # warm-up, 3 runs, memory
    monkeypatch.setattr(workload.time, "perf_counter", lambda: now[0])

    def run(name):
        now[0] += next(takes[name])

    args = SimpleNamespace(repeats=3, bar=SimpleNamespace(update=lambda: None))
    ours, theirs = workload.side_by_side(args, "row", {name: lambda name=name: run(name) for name in takes})
    assert (ours["x"], ours["seconds"], ours["runs"]) == (1, 3, [2, 4, 3])
    assert (theirs["x"], theirs["seconds"], theirs["runs"]) == (2, 6, [6, 6, 60])


def test_a_row_that_fails_is_named_and_the_others_are_kept(monkeypatch, capsys, tmp_path):
    def broken(args):
        yield {"row": "broken", "variant": "a", "x": 1.0, "seconds": 1.0, "runs": [1.0], "peak_mb": None, "work": ""}
        raise RuntimeError("no kernel")

    monkeypatch.setitem(speed.COMPARISONS, "head", broken)
    flags = ["head", "passes", "--size", "test", "--repeats", "1", "--json", str(tmp_path / "kept.json")]
    assert speed.main(flags) == 1
    err = capsys.readouterr().err
    assert "RuntimeError: no kernel" in err and err.splitlines()[-1] == "error: failed, see above: head"
    rows = [record["row"] for record in json.loads((tmp_path / "kept.json").read_text())["records"]]
    assert rows == ["broken"] + 3 * ["update, which passes"]


def test_memory_of_a_run_is_the_peak_above_its_start():
    sizes = [workload.peak_memory(lambda n=n: torch.zeros(n * 2**18).sum()) for n in (100, 300)]        # megabytes
    assert sizes[0] == pytest.approx(100, abs=20) and sizes[1] == pytest.approx(300, abs=20)


def test_memory_that_nothing_refers_to_is_freed_before_a_run():
    """A model is a cycle of references. It would otherwise be freed during a run, whose peak would then be too low."""
    gc.collect()
    gc.disable()                                                       # it must not come before peak_memory()
    try:
        cycle = [torch.ones(200 * 2**18)]                              # 200 megabytes
        cycle.append(cycle)
        gone = weakref.ref(cycle[0])
        del cycle
        assert gone() is not None
        seen = []
        peak = workload.peak_memory(lambda: seen.append(gone()) or torch.zeros(100 * 2**18).sum())
    finally:
        gc.enable()
    assert seen == [None] and peak == pytest.approx(100, abs=20)


@pytest.mark.parametrize("argv, rows", [
    (["update", "host", "weights", "generation", "passes", "head", "step"], 25), (["growth"], 13),
    (["--gpu", "decode", "paper_update", "paper_whole", "sharded"], 27)])
def test_every_row_runs_and_json_keeps_it(argv, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workload, "peak_memory", lambda run: 12.5)        # it would run everything once more
    monkeypatch.setattr("trainer.compiling.compiled", lambda function: function)     # which takes long on a CPU
    assert speed.main([*argv, "--size", "test", "--repeats", "1", "--json", str(tmp_path / "kept.json")]) == 0
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert len(kept["records"]) == rows == capsys.readouterr().out.count("\n| ") - 1
    assert all(record["seconds"] > 0 and len(record["runs"]) == 1 for record in kept["records"])
    assert all(record["peak_mb"] == 12.5 for record in kept["records"])
    assert kept["torch"] == torch.__version__


@pytest.mark.parametrize("argv, said", [
    (["speed"], "'speed' is not one of update"), (["--repeats", "0"], "--repeats: must be at least 1, got 0"),
    (["--json", "nowhere/x.json"], "no folder nowhere"), (["--size", "huge"], "invalid choice: 'huge'")])
def test_bad_input_is_one_line_before_anything_runs(argv, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        speed.main(argv)
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and not out


def test_all_rollouts_packed_or_none(model):
    """Where branches are very short a packed row is cheaper with any A. "None" must mean none all the same."""
    groups = tiny_work(model, failed=1.0).groups()
    sequences = [(g.prompt, t) for g in groups for t in g.trajectories]
    packed = sum(len(x) + len(t.response) + sum(len(y) for _, y in t.branches) for x, t in sequences)
    separate = sum(len(x) + len(t.response) + sum(len(x) + pivot + len(y) for pivot, y in t.branches)
                   for x, t in sequences)
    assert workload.tokens_through(groups, workload.ALWAYS) == packed < separate
    assert workload.tokens_through(groups, workload.NEVER) == separate


@pytest.mark.parametrize("a", [workload.ALWAYS, workload.NEVER])
def test_the_update_computes_the_layout_that_is_asked_for(a, model, monkeypatch):
    """The two variants of the row `update` would otherwise be one and the same."""
    groups, computed = tiny_work(model).groups(), []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append((kwargs["input_ids"] != 0).sum().item()), with_kwargs=True)
    workload.with_length(a, lambda: workload.update_ours(model, groups, Config(beta=0.0), None, 500))
    assert sum(computed) == workload.tokens_through(groups, a)


@pytest.mark.parametrize("k", [0, 3])
def test_all_of_the_work_has_a_weight(model, k):
    """Sequences without an advantage are not computed, and the rows of the table count them as if they were."""
    groups = tiny_work(model, branches=k).groups()
    spans = [*paper_weights(groups, Config()), *authors_weights(groups, Config())]
    assert all(span.A and span.w for span in spans)
    assert any(t.branches for g in groups for t in g.trajectories) == (k > 0)


def test_loss_tokens_are_those_of_rollouts_and_branches(model):
    work = tiny_work(model, failed=1.0)
    rest = sum(int(n) - int(pivot) for n, pivot in zip(work.lengths.flat, work.pivots.flat))
    assert workload.loss_tokens(work.groups()) == work.lengths.sum() + 3 * rest
