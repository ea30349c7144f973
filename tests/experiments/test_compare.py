"""The comparison: its tables and figure by hand, kept numbers, the commands of its arms, a short run."""
import json
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from test_runs import run_here, write_run

import tasks.lock
from experiments import compare, runs
from experiments.compare import (
    ARMS,
    EXPERIMENTS,
    collect,
    differences,
    headline,
    plot_comparison,
    settings_of,
    tables,
)
from experiments.runs import flags_of, interval, read_run
from tasks.lock import Lock
from trainer.settings import parse_args

ROOT = Path(__file__).parents[2]
SHORT = "--preset tiny --eval-every 1 --eval-rows 4 --step-tokens 500 --max-new-tokens 48 --temperature 1.8"


@pytest.fixture
def small(tmp_path):
    """(experiment, its run directories): two arms, two seeds, numbers by hand."""
    accuracies = {"grpo": [(0.0, 0.4, 0.6), (0.0, 0.2, 0.6)], "treerl": [(0.0, 0.6, 0.8), (0.0, 0.5, 0.9)]}
    directories = {arm: [write_run(tmp_path / f"{arm}-{i}", a, seconds=1.0 + (arm == "treerl"))
                         for i, a in enumerate(runs)] for arm, runs in accuracies.items()}
    return EXPERIMENTS["methods"]._replace(seeds=2, arms={arm: ARMS[arm] for arm in accuracies}), directories


def test_tables_by_hand(small):
    experiment, directories = small
    measured = collect(experiment, directories)
    assert measured == json.loads(json.dumps(measured)) and measured["arms"]["grpo"]["seeds"] == [
        read_run(d) for d in directories["grpo"]]
    first, pairs, costs, seeds = (block.splitlines() for block in tables(measured).split("\n\n")
                                  if block.startswith("|"))
    means = {arm: [read_run(d)["accuracy_mean"] for d in runs] for arm, runs in directories.items()}
    differences = [b - a for a, b in zip(means["grpo"], means["treerl"])]
    mean, width, p = interval(differences)
    assert first[3].split(" | ")[-4:] == [f"{mean:+.3f} ± {width:.3f}", f"{p:.3f}", f"{p:.3f}", "2 |"]
    assert first[2].startswith("| GRPO, G = 8 | 0.200 ± ") and first[2].endswith("|  |  |  | 2 |")
    assert pairs[0] == "| method | GRPO, G = 8 | TreeRL, 6 trees |"
    assert pairs[2:] == [f"| GRPO, G = 8 |  | {-mean:+.3f} ± {width:.3f} |",
                         f"| TreeRL, 6 trees | {mean:+.3f} ± {width:.3f} |  |"]
    assert costs[3] == "| TreeRL, 6 trees | 3 | 6 | 48 | 400 | 3,000 | 30 | 25 | 100 | 0.50 | 2.00 |"
    assert seeds[0] == "| method | 0 | 1 |"
    assert seeds[2] == f"| GRPO, G = 8 | {means['grpo'][0]:.3f} | {means['grpo'][1]:.3f} |"
    later = tables(collect(experiment._replace(first_seed=20), directories))
    assert "| method | 20 | 21 |" in later


def test_runs_above_a_tenth_are_counted_at_their_end(small, tmp_path):
    experiment, directories = small
    directories["treerl"][0] = write_run(tmp_path / "fallen", (0.0, 0.9, 0.05))
    first, *_ = (block.splitlines() for block in tables(collect(experiment, directories)).split("\n\n")
                 if block.startswith("|"))
    assert [row.split(" | ")[-1] for row in first[2:]] == ["2 |", "1 |"]


def test_the_first_correct_answer_is_a_median_over_seeds(small, monkeypatch):
    experiment, directories = small
    for found, median in (((100, None), None), ((100, 300), 200)):
        tokens = dict(zip(directories["grpo"], found))
        monkeypatch.setattr(compare, "read_run",
                            lambda d, t=tokens: read_run(d) | {"tokens_to_first_correct": t.get(d, 1)})
        measured = collect(experiment, directories)
        assert measured["arms"]["grpo"]["summary"]["tokens_to_first_correct"] == median
        assert ("| - |" in tables(measured)) == (median is None)


def test_the_figure_by_hand(small):
    experiment, directories = small
    measured = collect(experiment, directories)
    figure = plot_comparison(measured, "The message")
    axis, = figure.axes
    differences = [100 * (read_run(b)["accuracy_mean"] - read_run(a)["accuracy_mean"])
                   for a, b in zip(*directories.values())]
    mean, width, _ = interval(differences)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["GRPO, G = 8", "TreeRL, 6 trees"]
    points, (_, _, (bar,)) = [container.lines[0].get_data() for container in axis.containers], axis.containers[1].lines
    assert [float(x[0]) for x, _ in points] == pytest.approx([0, mean]) and [y[0] for _, y in points] == [0, 1]
    assert bar.get_segments()[0][:, 0].tolist() == pytest.approx([mean - width, mean + width])
    texts = [text.get_text() for text in axis.texts]
    assert {"6", "mean\naccuracy"} <= set(texts) and figure.get_suptitle() == "The message"
    assert f"{100 * measured['arms']['treerl']['summary']['accuracy_mean']:.0f} %" in texts
    plt.close(figure)


@pytest.mark.parametrize("name", [name for name, experiment in EXPERIMENTS.items() if experiment.message])
def test_kept_numbers_are_those_of_the_experiment_and_can_be_drawn(name, tmp_path):
    """--redraw needs no runs. The title is the message of the kept result, and of no other one."""
    experiment, kept = EXPERIMENTS[name], ROOT / "results" / f"{name}.json"
    measured = json.loads(kept.read_text())
    assert headline(experiment, measured) == experiment.message
    assert measured["flags"] == experiment.flags and {arm: own["label"] for arm, own in measured["arms"].items()} == {
        arm: own.label for arm, own in experiment.arms.items()}
    for own in measured["arms"].values():
        seeds = [run["accuracy_mean"] for run in own["seeds"]]
        assert len(seeds) == experiment.seeds
        assert own["summary"]["accuracy_mean"] == pytest.approx(np.mean(seeds), abs=1e-3)
    for other in (measured | {"seeds": 2}, measured | {"budget_tokens": 10}, measured | {"arms": {"grpo": None}}):
        assert headline(experiment, other) == experiment.title
    (tmp_path / kept.name).write_text(kept.read_text())
    compare.main(["--experiment", name, "--redraw", "--results", str(tmp_path)])
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}


def kept(name, lock=None):
    """The kept numbers of an experiment; of the budget's, those of one lock."""
    measured = json.loads((ROOT / "results" / f"{name}.json").read_text())
    return measured[lock] if lock else measured


THE_TABLE = {                                          # of the README: setting -> (kept numbers, links to their pages)
    "the preset of the task": (
        [kept("methods"), kept("thinning-methods")],
        "[methods](results/methods.md), [thinning](results/thinning-methods.md)"),
    "the same, each at its best learning rate": ([kept("methods-tuned")],
                                                   "[tuned](results/methods-tuned.md)"),
    **{f"{lock} correct answers": ([kept("budget", lock)], "[budget](results/budget.md)")
       for lock in ("early error, frequent", "early error, rare", "late error, frequent", "late error, rare")},
    "three late errors, very rare correct answers": (
        [kept("branches"), kept("thinning")], "[branches](results/branches.md), [thinning](results/thinning.md)"),
    "easy and hard questions mixed": ([kept("uneven")], "[uneven](results/uneven.md)"),
    "hot sampling, temperature 1.8": ([kept("hot")], "[hot](results/hot.md)"),
}


def line_of(setting, pages, links) -> str:
    """A line of the README's table, from the kept numbers of one page or of several that have other seeds."""
    grpo, deep = (100 * np.array([run["accuracy_mean"] for page in pages for run in page["arms"][arm]["seeds"]])
                  for arm in (("g8", "s100") if "budget" in links else ("grpo", "deep_grpo")))
    mean, width, _ = interval(deep - grpo)
    ahead = "not shown" if abs(mean) <= width else "DEEP-GRPO" if mean > 0 else "GRPO"
    return (f"| {setting} | {len(deep)} | {grpo.mean():.1f} | {deep.mean():.1f} | {mean:+.1f} \u00b1 {width:.1f} "
            f"| {links} | {ahead} |")


@pytest.mark.parametrize("setting", THE_TABLE)
def test_the_table_of_the_readme_has_the_kept_numbers(setting):
    assert line_of(setting, *THE_TABLE[setting]) in (ROOT / "README.md").read_text()


def test_the_differences_over_60_seeds_are_those_of_the_kept_numbers():
    """Where correct answers are rare: the seeds 0 to 19 of one page and 20 to 59 of another."""
    found = {}
    for arm, other in (("deep_grpo", "grpo"), ("treerl", "grpo"), ("treerl", "deep_grpo")):
        seeds = [100 * d for page in (kept("branches"), kept("thinning")) for d in differences(page, arm, other)]
        mean, width, _ = interval(seeds)
        assert len(seeds) == 60
        found[arm, other] = f"{mean:.0f} \u00b1 {width:.0f}"
    readme, answers = (" ".join((ROOT / name).read_text().split()) for name in ("README.md", "results/README.md"))
    assert f"is ahead of GRPO by {found['treerl', 'grpo']} points" in readme
    assert f"and of DEEP-GRPO by {found['treerl', 'deep_grpo']}" in readme
    assert f"TreeRL is ahead of GRPO by {found['treerl', 'grpo']} points, and DEEP-GRPO minus GRPO is " \
        f"{found['deep_grpo', 'grpo']}." in answers
    mean, width, _ = interval(100 * differences(kept("thinning"), "half", "grpo"))
    half = f"by {mean:.0f} \u00b1 {width:.0f} points"
    assert f"DEEP-GRPO is ahead of GRPO {half} in 40 seeds" in readme
    assert f"significantly ahead of GRPO, {half}" in answers


def test_nothing_can_be_drawn_without_numbers(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare.main(["--redraw", "--results", str(tmp_path)])
    assert "--redraw: " in capsys.readouterr().err


def test_every_arm_is_a_valid_command_and_budgets_are_equal():
    for experiment in EXPERIMENTS.values():
        settings = {arm: vars(parse_args(flags_of(experiment, arm, 3, Path("x")))) for arm in experiment.arms}
        assert experiment.seeds >= 5
        for name in ("step_tokens", "budget_tokens", "lr", "steps", "seed", "model", "data", "eval_rows"):
            assert len({str(s[name]) for s in settings.values()}) == 1, name
            assert all(s[name] is not None for s in settings.values())


def test_a_short_comparison_of_two_methods(tmp_path, monkeypatch, capsys):
    """make compare in small: equal tokens, kept and interrupted runs, other settings are refused."""
    run_here(monkeypatch, Lock((3, 3), 0, (1, 1)))
    out, results = tmp_path / "runs", tmp_path / "results"
    monkeypatch.setitem(EXPERIMENTS, "methods", EXPERIMENTS["methods"]._replace(flags=SHORT))
    flags = ["--arms", "grpo,rrpo", "--seeds", "1", "--budget-tokens", "1600", "--out", str(out),
             "--results", str(results)]
    compare.main(flags)
    capsys.readouterr()
    text, measured = (results / "methods.md").read_text(), json.loads((results / "methods.json").read_text())
    assert (results / "methods.png").read_bytes()[:4] == b"\x89PNG"
    assert f"python -m experiments.compare {' '.join(flags)}" in text and "| RRPO, 5 + 4 |" in text
    assert {arm: kept["seeds"] for arm, kept in measured["arms"].items()} == {
        arm: [read_run(out / f"{arm}-0")] for arm in ("grpo", "rrpo")}
    runs = {arm: (out / f"{arm}-0" / "metrics.jsonl").read_text() for arm in ("grpo", "rrpo")}
    rows = {arm: [json.loads(line) for line in run.splitlines()] for arm, run in runs.items()}
    for run in rows.values():
        assert run[-1]["generated_total"] >= 1600 > run[-2]["generated_total"] and run[-1]["trained_tokens"] > 0
    for arm in runs:
        assert json.loads((out / f"{arm}-0" / "config.json").read_text())["settings"]["method"] == arm
    # One was interrupted; it goes on, and the other is not run again. (It has a figure, as trainer.plot may draw it.)
    cut = runs["rrpo"].splitlines(keepends=True)[:-1]
    (out / "rrpo-0" / "metrics.jsonl").write_text("".join(cut))
    for folder in (out / "rrpo-0" / "checkpoints").iterdir():
        if folder.name == f"step_{rows['rrpo'][-1]['step']}":
            folder.rename(folder.with_name("later"))
    before = (out / "grpo-0" / "metrics.jsonl").stat().st_mtime_ns
    (results / "methods.md").write_text("# By hand\n")
    compare.main(flags)
    page = (results / "methods.md").read_text()
    assert page.startswith("# By hand\n") and page.count("| RRPO, 5 + 4 |") == 5
    assert "1 of 2 runs are finished" in capsys.readouterr().out
    assert (out / "grpo-0" / "metrics.jsonl").stat().st_mtime_ns == before
    assert (out / "rrpo-0" / "metrics.jsonl").read_text() == runs["rrpo"]
    assert "going on after step 1\n" in (out / "rrpo-0.log").read_text()
    with pytest.raises(SystemExit, match="grpo-0 holds a run with budget_tokens = 1600, here it is 4000: delete it"):
        compare.main([*flags[:5], "4000", *flags[6:]])
    with pytest.raises(SystemExit):
        compare.main(["--arms", "grpo,ppo"])
    assert "--arms: ppo: choose from grpo, " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main(["--seeds", "0"])
    assert "--seeds: must be at least 1, got 0" in capsys.readouterr().err


def test_kept_runs_are_not_made_again_but_for_the_first(tmp_path, monkeypatch):
    """--extend: another arm and another seed beside two kept runs. Their directories are gone, but for the first."""
    made, accuracies = [], {"grpo-0": (0.0, 0.4, 0.6), "grpo-1": (0.1, 0.4, 0.6), "treerl-0": (0.0, 0.2, 0.4),
                            "treerl-1": (0.3, 0.2, 0.4)}

    def run_all(experiment, out, jobs, known=()):
        seeds = range(experiment.first_seed, experiment.first_seed + experiment.seeds)
        made.append("again" if out.name == "again" else "rest")
        for name in (f"{arm}-{seed}" for arm in experiment.arms for seed in seeds if (arm, seed) not in known):
            made.append(name)
            if not (out / name).exists():
                write_run(out / name, accuracies[name])
        return {arm: [out / f"{arm}-{seed}" for seed in seeds] for arm in experiment.arms}

    monkeypatch.setattr(compare, "run_all", run_all)
    monkeypatch.setitem(EXPERIMENTS, "methods", EXPERIMENTS["methods"]._replace(arms={"grpo": ARMS["grpo"]}))

    def main(*flags):
        made.clear()
        compare.main(["--results", str(tmp_path), "--out", str(tmp_path / made_in), *flags])
        return json.loads((tmp_path / "methods.json").read_text())

    made_in = "whole"
    whole = main("--arms", "grpo,treerl", "--seeds", "2")
    assert made == ["rest", "grpo-0", "grpo-1", "treerl-0", "treerl-1"]
    made_in = "parts"
    main("--arms", "grpo", "--seeds", "1")
    extended = main("--extend", "--arms", "treerl", "--seeds", "2")
    assert made == ["again", "grpo-0", "rest", "grpo-1", "treerl-0", "treerl-1"]
    for kept in whole["arms"].values():
        assert kept["summary"].pop("relative_time") > 0
    for kept in extended["arms"].values():
        assert kept["summary"].pop("relative_time") is None              # the runs may be of two machines
    assert extended == whole
    # Without --seeds, those that are kept; what was made again before is made anew.
    accuracies["grpo-0"] = (0.0, 0.4, 0.7)
    with pytest.raises(SystemExit, match=r"again has accuracy_end 0\.7, the kept run has 0\.6: the kept runs were"):
        main("--extend", "--arms", "treerl")
    accuracies["grpo-0"] = (0.0, 0.4, 0.6)
    assert len(main("--extend", "--arms", "treerl")["arms"]["grpo"]["seeds"]) == 2
    for flags, message in ((("--budget-tokens", "5"), "have budget_tokens 128000, here it is 5: choose another"),
                           (("--seeds", "1"), "2 seeds are kept, here there are 1: raise --seeds")):
        with pytest.raises(SystemExit, match=message):
            main("--extend", *flags)
    with monkeypatch.context() as patch:
        patch.setitem(ARMS, "treerl", ARMS["treerl"]._replace(flags="--method treerl --questions 3"))
        with pytest.raises(SystemExit, match="flags of treerl --method treerl --questions 2, here it is --method"):
            main("--extend")
    for kept in whole["arms"].values():
        kept["summary"]["relative_time"] = None
    assert json.loads((tmp_path / "methods.json").read_text()) == whole
    del whole["first_seed"], whole["arms"]["treerl"]["flags"]                # as older results are
    (tmp_path / "methods.json").write_text(json.dumps(whole))
    main("--extend")
    for run in whole["arms"]["treerl"]["seeds"]:
        del run["accuracy_half"]
    (tmp_path / "methods.json").write_text(json.dumps(whole))
    with pytest.raises(SystemExit, match="of some kept runs only the mean accuracy is kept"):
        main("--extend", "--arms", "treerl", "--seeds", "2")


@pytest.mark.slow
def test_an_experiment_with_a_lock_makes_its_base_policy_first(tmp_path, monkeypatch):
    out, lock = tmp_path / "runs", Lock((2, 2), 1, (1, 1), 0.9)
    monkeypatch.setattr(runs, "make_base", partial(runs.make_base, steps=2))
    monkeypatch.setitem(EXPERIMENTS, "rare", EXPERIMENTS["rare"]._replace(flags=SHORT, lock=lock))
    compare.main(["--experiment", "rare", "--arms", "grpo", "--seeds", "1", "--budget-tokens", "1500",
                  "--out", str(out), "--results", str(tmp_path / "results")])
    settings = json.loads((out / "rare" / "grpo-0" / "config.json").read_text())["settings"]
    assert settings["model"] == str(out / "rare" / "base") and settings["eval_rows"] == 128
    rows = [json.loads(line) for line in (out / "rare" / "base" / "train.jsonl").read_text().splitlines()]
    assert rows == tasks.lock.make_rows(lock, 4096, 1)
    assert (tmp_path / "results" / "rare.md").exists()


def test_the_first_table_and_the_time_by_hand(small, tmp_path):
    experiment, directories = small
    first, *_ = (block.splitlines() for block in tables(collect(experiment, directories)).split("\n\n")
                 if block.startswith("|"))
    assert first[0].startswith("| method | half of the tokens | all tokens | mean over the run | minus GRPO, G = 8 | p")
    assert first[2].startswith("| GRPO, G = 8 | 0.200 \u00b1 0.847 | 0.600 \u00b1 0.000 | 0.225 \u00b1 0.632 |")
    directories["grpo"][1] = write_run(tmp_path / "slow", (0.0, 0.2, 0.6), seconds=4.0)
    got = collect(experiment, directories)["arms"]["treerl"]["summary"]["relative_time"]
    assert got == pytest.approx((2 / 1 + 2 / 4) / 2)


@pytest.mark.parametrize("name", [name for name, experiment in EXPERIMENTS.items() if experiment.message])
def test_the_kept_results_are_those_of_the_experiments_of_now(name):
    experiment, measured = EXPERIMENTS[name], json.loads((ROOT / "results" / f"{name}.json").read_text())
    assert {key: measured.get(key, {"first_seed": 0, "hard": []}.get(key)) for key in settings_of(experiment)} == (
        settings_of(experiment))
    for arm, own in measured["arms"].items():
        assert own.get("flags", experiment.arms[arm].flags) == experiment.arms[arm].flags


@pytest.mark.parametrize("name", ["methods", "methods-tuned", "hot", "uneven", "thinning", "thinning-methods",
                                  "choice"])
def test_the_kept_pages_have_the_tables_of_the_kept_numbers(name):
    measured = json.loads((ROOT / "results" / f"{name}.json").read_text())
    assert tables(measured) in (ROOT / "results" / f"{name}.md").read_text()
