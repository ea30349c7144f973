r"""When is the outcome of a rollout decided: before or after its tokens are spent?

    python -m experiments.decided                   # the kept run on GSM8K, and the locks with runs in runs/budget
    python -m experiments.decided --run RUN_DIR     # the tables of a run of your own; writes nothing

V(s) is the probability that a rollout which has reached the state s ends correct. Over the rollouts of a question x,
the mean of V(s) is V(x) at every depth, and at the end V is 0 or 1. So the share of the outcome that is decided at the
depth r,

    D(r) = Var V(s_r) / (V(x) (1 - V(x))),

rises from 0 at the question to 1 at the end. A branch of a failed rollout, from its state at depth r, is correct with
the probability

    E[V(s_r) | failure] = E[V(s_r) (1 - V(s_r))] / (1 - V(x)) = V(x) (1 - D(r)).

A new rollout of the same question is correct with probability V(x), and a branch costs 1 - r of its tokens. Branches
therefore have (1 - D(r)) / (1 - r) times as many correct answers per token: more where D(r) < r, less where D(r) > r.

1 - D is estimated from the pivots of a run. It is the mean share of correct branches, over the mean share of correct
rollouts among the G - 1 others of the question. Both means are over all pivots, and both weigh a question by V(x) (1 -
V(x)). For the cost of a branch the tokens of branches and rollouts are counted. Intervals are from a bootstrap of the
steps of all runs.
"""
import argparse
import json
from pathlib import Path

import numpy as np

from experiments.budget import LOCKS
from experiments.figures import ACCENT, GREY, INK, LIGHT, new_figure, save_figure
from experiments.gsm8k_pivots import KEPT, read_pivots
from experiments.runs import write_page, written_by
from trainer.plot import read_metrics
from trainer.settings import OneLineParser

GSM8K = "GSM8K"
PLACES = ("early error", "late error")
LINES = {GSM8K: (GSM8K, ACCENT, -1, (-2, 10)),           # label, colour, at which point it stands, and how far away
         "early error, both": ("locks with early errors", GREY, -2, (-10, 10)),
         "late error, both": ("locks with late errors", INK, -2, (10, -14))}
EDGES = np.linspace(0, 1, 6).round(1)
TITLE = "When is the outcome of a rollout decided?"
MESSAGE = "On GSM8K, the outcome is decided only slightly later than tokens are spent"


def shares_of(run) -> dict[str, np.ndarray]:
    """Of every pivot of a run of DEEP-GRPO: step, depth, cost, and the shares of correct branches and correct others.

    depth: the share of the response's tokens that stand before the pivot. cost: the tokens of a branch, relative to
    those of a rollout. As a run keeps only their means, the tokens of all branches are divided among the pivots in
    proportion to what stood after them. others: the rollouts of the same question but the failed one itself.
    """
    settings = json.loads((run / "config.json").read_text())["settings"]
    if settings["method"] != "deep_grpo":
        raise ValueError(f"{run} has the method {settings['method']}, and only deep_grpo branches failures alone")
    pivots, metrics = read_pivots(run), read_metrics(run)
    lengths = {name: dict(zip(*metrics[name])) for name in ("branch_length", "response_length")}
    branch, response = (np.mean([lengths[name][step] for step in pivots["step"]]) for name in lengths)
    rest = pivots["response_tokens"] - pivots["pivot"]
    return {"step": pivots["step"], "depth": pivots["pivot"] / pivots["response_tokens"],
            "cost": rest / rest.mean() * branch / response, "branches": pivots["right_branches"] / pivots["branches"],
            "others": pivots["rate"].round() / (settings["group_size"] - 1)}


def decided(runs, resamples=2000) -> list[dict]:
    """A row for each interval of EDGES in which a question has a correct rollout, and a last one for all pivots.

    runs: what shares_of() returns for each. A row has the number of pivots, the means of depth, cost and both shares,
    recovered and answered (how often these are above 0), D, per_token (correct answers per token, relative to more
    rollouts of the same questions), and 95 % intervals of the last two.
    """
    names = ("depth", "cost", "branches", "others")
    depth, cost, branches, others = (np.concatenate([run[name] for run in runs]) for name in names)
    labels = np.concatenate([run["step"] + 1e6 * i for i, run in enumerate(runs)])
    step = np.unique(labels, return_inverse=True)[1]                     # of each pivot, numbered over all runs
    n = step.max() + 1
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), resamples)          # how often, in a resample
    rows = []
    for low, high in [*zip(EDGES, EDGES[1:]), (0.0, 1.0)]:
        inside = (depth >= low) & (depth < high)
        if not others[inside].any():
            continue
        columns = [np.bincount(step[inside], values[inside], n)
                   for values in (np.ones(len(depth)), cost, branches, others)]
        found, resampled = estimates(*np.sum(columns, 1)), estimates(*(drawn @ np.transpose(columns)).T)
        rows.append({"low": low, "high": high, "pivots": int(inside.sum())}
                    | {name: values[inside].mean() for name, values in zip(names, (depth, cost, branches, others))}
                    | {"recovered": (branches[inside] > 0).mean(), "answered": (others[inside] > 0).mean()}
                    | {name: float(value) for name, value in found.items()}
                    | {f"{name}_interval": np.nanpercentile(values, [2.5, 97.5]).tolist()
                       for name, values in resampled.items()})
    return rows


def estimates(pivots, cost, branches, others) -> dict:
    """D and per_token, from the number of pivots and the sums over them; arrays give arrays.

    Both are nan in a resample that has no correct rollout.
    """
    left = branches / np.where(others > 0, others, np.nan)
    return {"D": 1 - left, "per_token": left / (cost / np.maximum(pivots, 1))}


def measured_of(runs) -> dict:
    """The numbers of one source: its rows by depth, and that of all pivots in the first quarter of the steps.

    The latter is None if no question has a correct rollout there; where none has one at all, it raises ValueError.
    """
    depths, early = decided(runs), decided([first_quarter(run) for run in runs])
    if not depths:
        raise ValueError("no question has both a failed and a correct rollout")
    return {"runs": len(runs), "depths": depths, "early": early[-1] if early else None}


def first_quarter(run):
    """What shares_of() returned, of the first quarter of the steps alone."""
    early = run["step"] <= np.ceil(run["step"].max() / 4)
    return {name: values[early] for name, values in run.items()}


def tables(measured) -> str:
    """The Markdown of the page: all pivots of every source, then the intervals of depth of each."""
    lines = ["| source | pivots | depth | cost of a branch | correct branches | correct others | pivots with a correct "
             "branch | with a correct other | D | correct answers per token | in the first quarter of the steps |",
             "|---" * 11 + "|"]
    for name, found in measured.items():
        row = found["depths"][-1]
        lines.append(f"| {name} | {row['pivots']:,} | {row['depth']:.2f} | {row['cost']:.2f} | "
                     f"{100 * row['branches']:.1f} % | {100 * row['others']:.1f} % | "
                     f"{100 * row['recovered']:.1f} % | {100 * row['answered']:.1f} % | "
                     f"{between(row, 'D')} | {between(row, 'per_token')} | "
                     f"{between(found['early'], 'per_token') if found['early'] else '-'} |")
    for name, found in measured.items():
        lines += ["", f"### {name}", "", "| depth | pivots | D | correct answers per token |", "|---" * 4 + "|"]
        lines += [f"| {row['low']:.1f} to {row['high']:.1f} | {row['pivots']:,} | {between(row, 'D')} | "
                  f"{between(row, 'per_token')} |" for row in found["depths"][:-1]]
    return "\n".join(lines)


def between(row, name) -> str:
    """A value and its interval, as text."""
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.2f} ({low:.2f} to {high:.2f})"


def plot(measured, title):
    """D against the depth, a line for each source that LINES names, and the line D = r."""
    figure, axes = new_figure(4.4)
    axis = axes["a"]
    axis.fill_between([0, 1], [0, 1], color=LIGHT, alpha=0.25, linewidth=0)
    axis.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
    for name, (label, color, at, offset) in LINES.items():
        if name not in measured:
            continue
        rows = measured[name]["depths"][:-1]
        x, y = ([row[column] for row in rows] for column in ("depth", "D"))
        errors = np.abs(np.array([row["D_interval"] for row in rows]).T - y)
        axis.errorbar(x, y, yerr=errors, fmt="o-", color=color, markersize=5, linewidth=1.6, elinewidth=1)
        axis.annotate(label, (x[at], y[at]), offset, textcoords="offset points", color=color,
                      ha="left" if offset[0] > 0 else "right")
    axis.text(0.98, 0.03, "branches have more correct answers per token", ha="right", color=GREY, fontsize=9)
    axis.set(xlabel="share r of the rollout's tokens that stand before the pivot", xlim=(0, 1), ylim=(-0.25, 1.05),
             ylabel="share D(r) of the outcome\nthat is decided there")
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def main(argv=None):
    """Write numbers, figure and tables."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/budget"), help="Names the folder with the runs of "
                        "experiments.budget; locks without runs there keep their numbers. The default is runs/budget.")
    parser.add_argument("--run", type=Path, help="Names a run directory, prints its tables and ends. The default is to "
                        "write those of the kept runs.")
    parser.add_argument("--results", type=Path, default=Path("results"),
                        help="Names the folder for numbers, figure and tables. The default is results.")
    args = parser.parse_args(argv)
    if args.run is not None:
        try:
            shares = shares_of(args.run)
            print(tables({str(args.run): measured_of([shares])}))
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"argument --run: {args.run} cannot be measured: {error}")
        if len(np.unique(shares["step"])) < 5:
            print("\nThe intervals come from how much steps differ. With pivots of fewer than 5 steps they mean "
                  "nothing.")
        return
    numbers = args.results / "decided.json"
    measured = json.loads(numbers.read_text()) if numbers.exists() else {}
    folders = {GSM8K: [KEPT]} | {lock: sorted(args.out.glob(lock.replace(", ", "-").replace(" ", "-") + "/s100-*"))
                                 for lock in LOCKS}
    folders |= {f"{place}, both": [path for lock, paths in folders.items() if lock.startswith(place) for path in paths]
                for place in PLACES}
    for name, paths in folders.items():
        if runs := [shares_of(path) for path in paths if path.is_dir()]:
            measured[name] = measured_of(runs)
    args.results.mkdir(parents=True, exist_ok=True)
    numbers.write_text(json.dumps(measured, indent=1) + "\n")
    save_figure(plot(measured, MESSAGE if measured.keys() == folders.keys() else TITLE), args.results / "decided.png")
    text = tables(measured)
    write_page(args.results / "decided.md", TITLE, "decided.png",
               f"{written_by('-m experiments.decided', argv, 'pivots of kept runs')}\n\n{text}")
    print(text)


if __name__ == "__main__":
    main()
