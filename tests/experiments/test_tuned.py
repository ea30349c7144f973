"""One learning rate per method: it is chosen on other seeds than those that are reported."""
import json

import pytest
from test_runs import write_run

from experiments import compare, tuned
from experiments.compare import ARMS, EXPERIMENTS
from experiments.runs import flags_of
from trainer.settings import parse_args


def test_the_best_rate_of_other_seeds_is_reported(tmp_path, monkeypatch):
    """In the runs of the choice GRPO is best with 8e-5 and TreeRL with 3.2e-4. All reported runs are alike."""
    made = {}

    def run_all(experiment, out, jobs, known=()):
        seeds = range(experiment.first_seed, experiment.first_seed + experiment.seeds)
        for arm in experiment.arms:
            for seed in seeds:
                settings = vars(parse_args(flags_of(experiment, arm, seed, out / f"{arm}-{seed}")))
                made[f"{settings['method']}-{seed}", settings["lr"]] = None
                good = seed >= 100 and settings["lr"] == {"grpo": 8e-5, "treerl": 3.2e-4}[settings["method"]]
                write_run(out / f"{arm}-{seed}", (0.0, 0.9 if good else 0.2, 0.2 + seed / 1000))
        return {arm: [out / f"{arm}-{seed}" for seed in seeds] for arm in experiment.arms}

    monkeypatch.setattr(compare, "run_all", run_all)
    arms = {name: ARMS[name] for name in ("grpo", "treerl")}
    monkeypatch.setitem(EXPERIMENTS, "methods", EXPERIMENTS["methods"]._replace(arms=arms))
    flags = ["--seeds", "2", "--results", str(tmp_path), "--out", str(tmp_path / "runs")]
    tuned.main(flags)
    rates = {method: {(seed, lr) for (name, lr) in made for run, seed in [name.split("-")] if run == method}
             for method in ("grpo", "treerl")}
    choice = {(seed, lr) for seed in ("100", "101", "102") for lr in (8e-5, 1.6e-4, 3.2e-4)}
    assert rates == {"grpo": choice | {("0", 8e-5), ("1", 8e-5)}, "treerl": choice | {("0", 3.2e-4), ("1", 3.2e-4)}}
    measured = json.loads((tmp_path / "methods-tuned.json").read_text())
    assert [arm["label"] for arm in measured["arms"].values()] == ["GRPO, G = 8, 8e-5", "TreeRL, 6 trees, 3.2e-4"]
    assert max(measured["choice"]["treerl"], key=measured["choice"]["treerl"].get) == "3.2e-4"
    text = (tmp_path / "methods-tuned.md").read_text()
    row, = [line for line in text.splitlines() if line.startswith("| TreeRL, 6 trees | ")]
    assert [cell.startswith("**") for cell in row.split(" | ")[1:]] == [False, False, True]
    (tmp_path / "methods-tuned.png").unlink()
    tuned.main([*flags, "--redraw"])
    assert (tmp_path / "methods-tuned.png").exists()


def test_a_program_that_was_stopped_after_the_choice_goes_on_from_it(tmp_path, monkeypatch, capsys):
    """The runs of the choice are not made again. A choice among other methods or with another budget is refused."""
    made = []

    def run_all(experiment, out, jobs, known=()):
        made.append(experiment)
        if experiment.first_seed == 0:
            raise KeyboardInterrupt                  # the program is stopped before the runs that are reported
        return {arm: [write_run(out / f"{arm}-{i}", (0.0, 0.9 if arm.endswith("8e-5") else 0.2, 0.3)) for i in range(3)]
                for arm in experiment.arms}

    monkeypatch.setattr(compare, "run_all", run_all)
    arms = {name: ARMS[name] for name in ("grpo", "treerl")}
    monkeypatch.setitem(EXPERIMENTS, "methods", EXPERIMENTS["methods"]._replace(arms=arms))
    flags = ["--seeds", "2", "--results", str(tmp_path), "--out", str(tmp_path / "runs")]
    for seeds in ([100, 0], [0]):
        with pytest.raises(KeyboardInterrupt):
            tuned.main(flags)
        assert [experiment.first_seed for experiment in made] == seeds
        assert [arm.flags.split()[-1] for arm in made[-1].arms.values()] == ["8e-5", "8e-5"]
        made.clear()
    assert "| TreeRL, 6 trees | " in (tmp_path / "methods-tuned.md").read_text()
    with pytest.raises(SystemExit):
        tuned.main([*flags, "--redraw"])
    assert "no runs with them" in capsys.readouterr().err
    for change in ({"arms": {"grpo": ARMS["grpo"]}}, {"flags": "--preset tiny"}):
        monkeypatch.setitem(EXPERIMENTS, "methods", EXPERIMENTS["methods"]._replace(**{"arms": arms} | change))
        with pytest.raises(SystemExit, match="remove it to choose again"):
            tuned.main(flags)


@pytest.mark.parametrize("name", ["methods", "rare"])
def test_every_method_runs_with_the_rate_that_was_chosen(name):
    """A learning rate in the flags of an arm or of the experiment would otherwise win."""
    experiment = EXPERIMENTS[name]
    for arm in experiment.arms:
        changed = experiment._replace(arms={arm: tuned.with_rate(experiment.arms[arm], "7e-5")})
        assert vars(parse_args(flags_of(changed, arm, 0, "x")))["lr"] == 7e-5
