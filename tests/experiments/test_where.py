"""The map: its prediction against an enumeration, tokens to half accuracy by hand, one cell in small."""
import json
from argparse import Namespace
from functools import cache, partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from test_runs import run_here, write_run

from experiments import where
from experiments.where import CELLS, correct_per_update, factor, predict, tokens_to_half
from pivot import candidate_ratios, pivot_distribution
from tasks.lock import Lock

ROOT = Path(__file__).parents[2]
roughly = cache(partial(predict, n=100))             # where a test shows predictions and does not judge them


@pytest.mark.parametrize("place, p", [((1, 1), 0.5), ((3, 3), 0.5), ((5, 5), 1e-6)])
def test_prediction_by_enumeration(place, p, monkeypatch):
    """One hard turn at one place; without Eq. (P), so that Q(t) ~ r^2 can be summed over."""
    monkeypatch.setattr(where.Recoverability, "fit", lambda self: None)
    got = predict(Lock((6, 6), 1, place, p), n=20_000)
    ratios = candidate_ratios(7)                                       # the question and 6 turns
    q = pivot_distribution(ratios, np.ones(7), 2.0)
    before = q[:6 - place[0] + 1].sum()                                # states with at most so many turns
    again = sum(q[i] * (1 - 9 * i / 58) for i in range(7))             # of 6 * 9 + 4 tokens
    assert got["s"] == p and got["q/s"] == pytest.approx(before, abs=0.01)
    assert got["c"] == pytest.approx(again, abs=0.005) and got["T"] == 58
    r = 8 * (1 - p)
    assert got["factor"] == pytest.approx((1 + r * before) / (1 + r * again), rel=0.02)


def test_prediction_of_two_hard_turns_by_enumeration(monkeypatch):
    monkeypatch.setattr(where.Recoverability, "fit", lambda self: None)
    got = predict(Lock((4, 4), 2, (1, 2), 0.4), n=20_000)              # turns 3 and 4 of 4
    q = pivot_distribution(candidate_ratios(5), np.ones(5), 2.0)       # the question and 4 turns
    s = 0.4 ** 2
    first_wrong = 0.6 / (1 - s)                                        # of failed rollouts
    # At most two turns kept: both are to be done. Three: one, if the first is right. Four: nothing can be saved.
    by_hand = q[:3].sum() * s + q[3] * (1 - first_wrong) * 0.4
    assert got["q/s"] == pytest.approx(by_hand / s, abs=0.02)


def test_the_boundary_is_where_a_branch_is_as_good_per_token():
    for lock in CELLS.values():
        got = predict(lock, n=200)
        assert (got["factor"] > 1) == (got["q/s"] > got["c"])
    late, early = predict(CELLS["long, late", 0.03]), predict(CELLS["long, early", 0.03])
    assert late["factor"] > 1.5 and early["factor"] < 0.6


def test_correct_answers_of_an_update_by_hand():
    """580 tokens are 10 rollouts of 58; two hard turns, each right in half of the cases."""
    assert correct_per_update(Lock((6, 6), 2, (1, 2), 0.3), {"base": {"hard": 0.5}}, Namespace(step_tokens=580)) == 2.5


def test_tokens_to_half_by_hand(tmp_path):
    run = write_run(tmp_path / "a", (0.0, 0.4, 0.9))                   # at 0, 300 and 400 tokens
    assert tokens_to_half(run) == pytest.approx(320)
    assert tokens_to_half(write_run(tmp_path / "b", (0.5, 0.4, 0.9))) == 0
    assert tokens_to_half(write_run(tmp_path / "c", (0.0, 0.4, 0.49))) == np.inf
    assert tokens_to_half(tmp_path / "nothing") == np.inf
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"step": 4, "eval_acc')
    assert tokens_to_half(run) == np.inf                               # a line is being written: asked again later


def test_factors_by_hand():
    mean, width, text = factor(np.array([200.0, 400.0]), np.array([100.0, 100.0]), 1000)
    assert mean == pytest.approx(8 ** 0.5) and width == pytest.approx(12.706 * np.log(2) / 2, rel=1e-3)
    assert text.startswith("2.83 (")
    assert factor(np.array([np.inf, 500.0]), np.array([100.0, 500.0]), 1000)[2].startswith("> 3.16 (")
    assert factor(np.array([100.0, 500.0]), np.array([100.0, np.inf]), 1000)[2].startswith("< 0.71 (")
    assert factor(np.array([np.inf]), np.array([np.inf]), 1000)[2] == "neither"
    assert factor(np.array([np.inf, 500.0]), np.array([100.0, np.inf]), 1000)[2].startswith("? ")


def test_the_kept_map_can_be_drawn_again(tmp_path, monkeypatch):
    """--redraw needs no runs; the titles are the messages of the whole map, and a part of it does not claim them."""
    monkeypatch.setattr(where, "predict", roughly)                     # only its T is in the figure
    kept = json.loads((ROOT / "results" / "where.json").read_text())
    (tmp_path / "where.json").write_text(json.dumps(kept))
    where.main(["--redraw", "--results", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"where.json", "where.png"}
    args = Namespace(**kept["settings"])
    figure = where.plot_where(kept["cells"], args)
    shown = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert len(shown) == len(CELLS) == len(kept["cells"]) and "no clear gain" in figure.get_suptitle()
    for (row, p) in CELLS:
        at = where.P.index(p), list(where.ROWS).index(row)
        assert where.factor_of(kept["cells"][f"{row} {p}"], args)[2].startswith(f"{shown[at]} (")
    part = where.plot_where({"long, late 0.3": kept["cells"]["long, late 0.3"]}, args)
    assert part.get_suptitle() == where.TITLE and not any(axis.get_title(loc="left") for axis in part.axes)
    for drawn in (figure, part):
        plt.close(drawn)


def test_nothing_is_drawn_without_cells(tmp_path, capsys):
    """An empty map would replace the kept figure."""
    for text, message in ((None, "does not exist"), ("{", "is damaged"),
                          (json.dumps({"settings": {}, "cells": {}}), "has no cells")):
        if text is not None:
            (tmp_path / "where.json").write_text(text)
        with pytest.raises(SystemExit):
            where.main(["--redraw", "--results", str(tmp_path)])
        assert message in capsys.readouterr().err and not (tmp_path / "where.png").exists()


def test_one_cell_in_small(tmp_path, monkeypatch, capsys):
    run_here(monkeypatch)
    monkeypatch.setattr(where, "predict", roughly)
    monkeypatch.setattr(where, "CELLS", {("long, late", 0.3): Lock((2, 2), 1, (1, 1), 0.9)})
    flags = ["--seeds", "1", "--updates", "2", "--step-tokens", "600", "--base-steps", "2",
             "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    where.main(flags)
    kept = json.loads((tmp_path / "results" / "where.json").read_text())["cells"]["long, late 0.3"]
    assert len(kept["grpo"]) == len(kept["deep_grpo"]) == 1 and 0 <= kept["base"]["hard"] <= 1
    page = tmp_path / "results" / "where.md"
    text = page.read_text()
    page.write_text("# By hand\n\n" + text)
    assert "| long, late | 0.3 |" in text and (tmp_path / "results" / "where.png").read_bytes()[:4] == b"\x89PNG"
    before = (tmp_path / "results" / "where.json").read_bytes()
    with monkeypatch.context() as context:
        context.setattr(where, "measure_cell", None)
        where.main(flags)                                              # what is known is not measured again
    assert (tmp_path / "results" / "where.json").read_bytes() == before
    assert page.read_text().startswith("# By hand\n\n") and page.read_text().count("| long, late | 0.3 |") == 1
    with pytest.raises(SystemExit):
        where.main([*flags[:3], "3", *flags[4:]])
    assert "choose another --results" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        where.main([*flags, "--lr", "0"])
    assert "--lr: must be positive, got 0.0" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="the base policy of another lock or number of steps: delete .*long-late-0.3"):
        where.main([*flags[:7], "3", *flags[8:-1], str(tmp_path / "others")])
    with pytest.raises(SystemExit):
        where.main([*flags, "--cells", "nowhere 1"])
    assert "--cells: nowhere 1: choose from long, late 0.3" in capsys.readouterr().err


def test_the_factor_is_grpo_over_deep_grpo():
    args = Namespace(step_tokens=100, updates=10)
    assert where.factor_of({"grpo": [400.0, None], "deep_grpo": [100.0, 200.0]}, args)[2].startswith("> 4.47 (")


def test_the_kept_page_has_the_table_of_the_kept_numbers():
    kept = json.loads((ROOT / "results" / "where.json").read_text())
    assert where.table(kept["cells"], Namespace(**kept["settings"])) in (ROOT / "results" / "where.md").read_text()


def test_the_runs_of_a_cell_have_its_base_policy(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(where, "make_base", lambda lock, folder, steps: {"hard": 0.1})
    monkeypatch.setattr(where, "run_all", lambda made, *rest: seen.append(made) or dict.fromkeys(where.ARMS, []))
    where.measure_cell(Lock(), tmp_path, Namespace(base_steps=2, step_tokens=600, lr=1e-4, seeds=1, updates=2, jobs=1))
    assert f"--model {tmp_path / 'base'} " in seen[0].flags and seen[0].budget_tokens == 1200
