r"""Is recoverability a function of relative depth alone?   (an open question of arXiv 2602.14169)

    python -m experiments.calibrate              # half an hour on two cores: results/calibration.json, .md and .png
    python -m experiments.calibrate --redraw     # seconds: the figure from results/calibration.json

Eq. (P) predicts from r_t = t/T alone whether at least one of K branches from a state of a failed rollout is correct.
Here K branches are drawn from *every* state of failed rollouts. This is done with the base model, and with policies
half-way through training. Then several predictions of the outcome are compared. The measure is their log-likelihood on
questions to which they were not fitted.

    constant                     the share of all states that are recovered
    r: Eq. (P)                   P(success | r), by the exact fit of recoverability.py
    r + entropy                  also the mean entropy of the policy over the step that follows the state, in nats
    r + difficulty               also the share of the question's G rollouts that failed
    r + both                     also entropy and difficulty
    one rate per depth           any function of r: a rate for each tenth of r, with one pseudo-outcome
    before or after the error    what no method can know: does the state come before the first wrong step?

The settings were fixed before the first run, and the page shows all seeds.
"""
import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import tasks.lock
import train_gsm8k
from deep_grpo import Fork, Group, resample_failures, roll_out, segment_ends
from eval_math import wilson
from experiments.figures import ACCENT, GREY, INK, LIGHT, new_figure, save_figure
from experiments.runs import interval, kept_numbers, last_line, start_run, write_page
from pivot import candidate_ratios
from recoverability import Recoverability, sigmoid
from tasks import make_questions
from trainer.settings import OneLineParser, command_line, count, parse_args

TITLE = "Is recoverability a function of relative depth alone?"
MESSAGE = "Recoverability is not a function of depth alone: it drops at the first error"
SETTINGS = dict(preset="tiny-deep", seeds=5, questions=24, steps=12)       # of the kept result
QUESTION, R, ENTROPY, DIFFICULTY, BEFORE, SUCCESS = range(6)                 # columns of a table of states
EQ_P, ORACLE = "r: Eq. (P)", "before or after the error"
PREDICTIONS = ["constant", EQ_P, "r + entropy", "r + difficulty", "r + both", "one rate per depth", ORACLE]


# ---- observe ----

def fork_everywhere(policy, groups, most) -> list[Group]:
    """The first `most` failed rollouts of every question, with a Fork at each of their states."""
    def forked(t):
        states = [0, *segment_ends(t.response, policy.config, policy.text)[:-1]]
        return replace(t, forks=[Fork(*state) for state in zip(states, candidate_ratios(len(states)).tolist())])

    return [Group(g.prompt, [forked(t) for t in g.trajectories if t.reward == 0][:most]) for g in groups]


def first_error(text, gold) -> int:
    """The number of sentences before the first wrong one, in a response to the embedded task."""
    ours, right = text.split(".\n"), gold.split(".\n")
    return next((i for i, (a, b) in enumerate(zip(ours, right)) if a != b), min(len(ours), len(right)))


def observe_states(policy, rows, questions, most=2) -> np.ndarray:
    """A row per state of failed rollouts of these questions, with the six columns that are named above.

    rows: the embedded task's rows of the same questions. most: at most so many failed rollouts of a question.
    """
    groups = roll_out(policy, questions, policy.config)
    difficulty = [np.mean([t.reward == 0 for t in g.trajectories]) for g in groups]
    groups = fork_everywhere(policy, groups, most)
    roots = [Group(g.prompt, [replace(t, forks=[]) for t in g.trajectories]) for g in groups if g.trajectories]
    groups = resample_failures(policy, questions, groups, policy.config)
    _, entropies = policy.score(roots)
    entropies, table = iter(entropies), []
    for x, g in enumerate(groups):
        for t in g.trajectories:
            entropy, error = next(entropies), first_error(policy.text(t.response), rows[x]["answer"])
            ends = [*(fork.pivot for fork in t.forks[1:]), len(t.response)]
            table += [[x, fork.ratio, entropy[fork.pivot:end].mean().item(), difficulty[x], i <= error,
                       any(fork.rewards)] for i, (fork, end) in enumerate(zip(t.forks, ends))]
    return np.array(table, dtype=float).reshape(-1, 6)


def observe_policy(model, seed, n, args) -> np.ndarray:
    """observe_states() on n questions of their own, with the policy in the folder `model`."""
    run = train_gsm8k.prepare(parse_args(["--preset", args.preset, "--model", str(model), "--beta", "0",
                                          "--seed", str(seed), "--out", str(args.out / "nothing")]))
    rows = tasks.lock.make_rows(tasks.lock.LOCKS[args.preset], n, 1000 + seed)
    questions, _ = make_questions(rows, run.policy.tokenizer, run.args.max_prompt_tokens)
    return observe_states(run.policy, rows, questions)


def trained_policy(seed, args) -> Path:
    """The checkpoint after args.steps steps of DEEP-GRPO; it is trained now if it is not there."""
    folder = args.out / f"deep_grpo-{args.preset}-{args.steps}-{seed}"
    checkpoint = folder / "checkpoints" / f"step_{args.steps}"
    if not checkpoint.exists():
        flags = ["--preset", args.preset, "--seed", str(seed), "--steps", str(args.steps), "--eval-every", "0",
                 "--out", str(folder)]
        if start_run(folder, flags).wait():
            sys.exit(f"error: {folder} failed, its last line: {last_line(folder)}")
    return checkpoint


# ---- predict ----

def fit_logistic(features, y, l2=1.0) -> np.ndarray:
    """Weights [d + 1] (the last is the bias) that minimise summed cross-entropy + l2/2 |w|^2, by Newton's method.

    This is Eq. (P) for several features. The penalty acts on the features as they are given.
    """
    x = np.column_stack([features, np.ones(len(y))])
    penalty = l2 * np.diag([1.0] * features.shape[1] + [1e-9])
    w = np.zeros(x.shape[1])
    for _ in range(50):
        p = sigmoid(x @ w)
        newton = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + penalty, x.T @ (p - y) + penalty @ w)
        w -= newton
        if np.abs(newton).max() < 1e-10:
            break
    return w


def fit_depth(table) -> Recoverability:
    """Eq. (P), fitted to a table of states."""
    estimate = Recoverability(window=len(table), min_observations=0)
    for ratio, success in table[:, [R, SUCCESS]]:
        estimate.observe(ratio, bool(success))
    estimate.fit()
    return estimate


def tenths(table) -> np.ndarray:
    """The relative depth of every state, as a number of tenths."""
    return np.rint(10 * table[:, R])


def predictions(train, test) -> dict[str, np.ndarray]:
    """P(success) of the states of `test` by each of PREDICTIONS, fitted to the states of `train`."""
    y = train[:, SUCCESS]
    result = {"constant": np.full(len(test), (y.sum() + 0.5) / (len(y) + 1)),
              EQ_P: fit_depth(train).predict(test[:, R])}
    center, scale = train.mean(0), train.std(0) + 1e-12
    for name, columns in {"r + entropy": [R, ENTROPY], "r + difficulty": [R, DIFFICULTY],
                          "r + both": [R, ENTROPY, DIFFICULTY]}.items():
        w = fit_logistic(((train - center) / scale)[:, columns], y)
        result[name] = sigmoid(((test - center) / scale)[:, columns] @ w[:-1] + w[-1])
    for name, key in {"one rate per depth": tenths, ORACLE: lambda table: table[:, BEFORE]}.items():
        rates = {k: (y[key(train) == k].sum() + 0.5) / ((key(train) == k).sum() + 1) for k in np.unique(key(train))}
        result[name] = np.array([rates.get(k, y.mean()) for k in key(test)])
    return result


def log_likelihood(p, y) -> np.ndarray:
    """The log-likelihood of each outcome, in nats; probabilities are kept from 0 and 1 by 1e-6."""
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return np.where(y == 1, np.log(p), np.log(1 - p))


def cross_validate(table, folds=5) -> dict[str, float]:
    """The mean held-out log-likelihood of every prediction; all states of a question are in one fold."""
    scores = {name: np.zeros(len(table)) for name in PREDICTIONS}
    for fold in range(folds):
        held = table[:, QUESTION] % folds == fold
        for name, p in predictions(table[~held], table[held]).items():
            scores[name][held] = log_likelihood(p, table[held, SUCCESS])
    return {name: float(values.mean()) for name, values in scores.items()}


# ---- keep and show ----

def summarize_states(seeds) -> dict:
    """What is kept of one policy; seeds: a table of states for each.

    rates: for the states before and after the first wrong step, [tenth of depth, states, recovered states].
    """
    everything, scores = np.concatenate(seeds), [cross_validate(table) for table in seeds]
    fits = [fit_depth(table) for table in seeds]

    def rates(table):
        return [[float(i) / 10, int((tenths(table) == i).sum()), int(table[tenths(table) == i, SUCCESS].sum())]
                for i in np.unique(tenths(table))]

    return {"states": len(everything), "recovered": int(everything[:, SUCCESS].sum()),
            "rates": {"before": rates(everything[everything[:, BEFORE] == 1]),
                      "after": rates(everything[everything[:, BEFORE] == 0])},
            "fits": [{"w": fit.w, "b": fit.b} for fit in fits],
            "log_likelihood": {name: [score[name] for score in scores] for name in PREDICTIONS},
            "gain": {name: [score[name] - score[EQ_P] for score in scores] for name in PREDICTIONS}}


def gain_tables(measured) -> str:
    """Markdown: held-out log-likelihood with 95 % interval, the gain over Eq. (P), and that of every seed."""
    policies = {policy[0].upper() + policy[1:]: kept for policy, kept in measured["policies"].items()}
    counts = " ".join(f"{policy}: {kept['states']} states, {kept['recovered'] / kept['states']:.2f} recovered."
                      for policy, kept in policies.items())
    lines = [f"The task is {measured['settings']['preset']}, with K = 8 branches from every state of failed rollouts. "
             f"{counts}", ""]
    for policy, kept in policies.items():
        lines += [f"**{policy}.** The table shows the log-likelihood per outcome (in nats, held out), as the mean of "
                  f"{len(kept['fits'])} seeds with its 95 % interval.", "",
                  "| model of the outcome | log-likelihood | minus Eq. (P) | every seed, minus Eq. (P) |",
                  "|---|---|---|---|"]
        for name in PREDICTIONS:
            mean, width, _ = interval(kept["log_likelihood"][name])
            gain, gain_width, _ = interval(kept["gain"][name])
            lines.append(f"| {name} | {mean:.4f} \u00b1 {width:.4f} | {gain:+.4f} \u00b1 {gain_width:.4f} | "
                         f"{' '.join(f'{g:+.4f}' for g in kept['gain'][name])} |")
        lines.append("")
    return "\n".join(lines)


def plot_rates(axis, kept):
    """Observed recovery over depth, before and after the first wrong step, and the fit of Eq. (P) for every seed."""
    for side, colour, label in (("before", INK, "before the first wrong step"), ("after", GREY, "after it")):
        seen = [row for row in kept["rates"][side] if row[1] >= 10]        # a share of fewer states says nothing
        if seen:
            r, states, recovered = np.array(seen).T
            rate = recovered / states
            low, high = np.array([wilson(p, n) for p, n in zip(rate, states)]).T
            axis.errorbar(r, rate, yerr=(rate - low, high - rate), fmt="o", color=colour, markersize=5)
            axis.annotate(label, (r.mean(), high.max()), (0, 6), textcoords="offset points", color=colour,
                          ha="center")
    depth = np.linspace(0.05, 0.95, 50)
    for fit in kept["fits"]:
        axis.plot(depth, sigmoid(fit["w"] * depth + fit["b"]), color=ACCENT, linewidth=1, zorder=0)
    axis.text(0.05, 0.5, "fit of Eq. (P),\na line per seed", color=ACCENT, va="top")
    axis.set(xlabel="relative depth r of the state", ylabel="share of states that are recovered", xlim=(0, 1),
             ylim=(-0.03, 1.12), yticks=np.linspace(0, 1, 6))


def plot_gains(axis, policies):
    """What every prediction gains over Eq. (P): mean over seeds and 95 % interval, for both policies."""
    names = {"constant": "nothing: a constant", "r + entropy": "depth and entropy",
             "r + difficulty": "depth and difficulty", "r + both": "depth and both",
             "one rate per depth": "a rate for each\ntenth of the depth",
             ORACLE: "before or after the\nfirst wrong step"}
    for offset, (policy, kept), colour in zip((-0.15, 0.15), policies.items(), (GREY, INK)):
        means, widths, _ = np.array([interval(kept["gain"][name]) for name in names]).T
        widths = np.where(np.isfinite(widths), widths, 0)                  # of one seed there is no interval
        places = np.arange(len(names)) + offset
        axis.errorbar(means, places, xerr=widths, fmt="o", color=colour, markersize=5, linewidth=1.8)
        axis.annotate(policy, (means[-1] + (widths[-1] if offset < 0 else 0), places[-1]),
                      (7, 0) if offset < 0 else (0, -8), textcoords="offset points", color=colour, fontsize=9,
                      ha="left" if offset < 0 else "center", va="center" if offset < 0 else "top")
    axis.axvline(0, color=INK, linewidth=1, zorder=0)
    axis.set(yticks=range(len(names)), yticklabels=names.values(), ylim=(len(names) + 0.1, -0.6),
             xlabel="gain in log-likelihood over Eq. (P),\nin nats per outcome")
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="x", color=LIGHT, linewidth=0.5, alpha=0.6)


def plot_calibration(measured):
    """Observed rates of the trained policy, beside what the predictions gain with both policies."""
    kept_result = measured["settings"] == SETTINGS                         # the sentences are about this one
    figure, axes = new_figure(4.4, "ab", width_ratios=(1, 1.1))
    policy, kept = list(measured["policies"].items())[-1]
    plot_rates(axes["a"], kept)
    plot_gains(axes["b"], measured["policies"])
    if kept_result:
        axes["a"].set_title("The rate is level up to the first\nwrong step and near 0 after it.")
        axes["b"].set_title("No second feature clearly helps.\nThe place of the error would.")
    figure.suptitle(MESSAGE if kept_result else TITLE, x=0.01, ha="left")
    figure.supxlabel(f"A state is recovered if one of its 8 branches is correct. Left: {policy}, 95 % intervals "
                     f"that take\nstates as independent. Right: mean of "
                     f"{len(kept['fits'])} seeds and 95 % interval, on held-out questions.",
                     fontsize=9, color=GREY, x=0.01, ha="left")
    return figure


def observe_all(args) -> dict[str, list[np.ndarray]]:
    """{policy: a table of states for each seed}. Tables that are in args.out are not observed again."""
    steps_of = {"base model": 0, f"after {args.steps} steps of DEEP-GRPO": args.steps}
    observed = {policy: [] for policy in steps_of}
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in tqdm(range(args.seeds), desc="seeds"):
        for policy, steps in steps_of.items():
            path = args.out / f"states-{args.preset}-{args.questions}-{steps}-{seed}.npy"
            if not path.exists():
                model = trained_policy(seed, args) if steps else tasks.lock.ASSETS / args.preset
                np.save(path, observe_policy(model, seed, args.questions, args))
            observed[policy].append(np.load(path))
    return observed


def main(argv=None):
    """Observe what is not there yet, then write numbers, figure and tables."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(tasks.lock.LOCKS), default=SETTINGS["preset"],
                        help="Chooses the embedded task and its base model. The default is tiny-deep.")
    parser.add_argument("--seeds", type=count, default=SETTINGS["seeds"],
                        help="Sets the seeds of each policy. The default is 5.")
    parser.add_argument("--questions", type=count, default=SETTINGS["questions"],
                        help="Sets the questions per seed and policy; at most two failures of each are branched. "
                        "The default is 24.")
    parser.add_argument("--steps", type=count, default=SETTINGS["steps"],
                        help="Sets how many steps of DEEP-GRPO train the second policy. The default is 12.")
    parser.add_argument("--out", type=Path, default=Path("runs/calibrate"),
                        help="Names the folder for policies and observed states. The default is runs/calibrate.")
    parser.add_argument("--results", type=Path, default=Path("results"),
                        help="Names the folder for numbers, figure and tables. The default is results.")
    parser.add_argument("--redraw", action="store_true",
                        help="Draws the figure again from the kept numbers and ends. The default is to observe.")
    args = parser.parse_args(argv)
    numbers, picture, page = (args.results / f"calibration.{ending}" for ending in ("json", "png", "md"))
    if args.redraw:
        measured = kept_numbers(parser, numbers)
        save_figure(plot_calibration(measured), picture)
        print(picture)
        return
    args.results.mkdir(parents=True, exist_ok=True)
    measured = {"settings": {name: getattr(args, name) for name in SETTINGS},
                "policies": {policy: summarize_states(seeds) for policy, seeds in observe_all(args).items()}}
    numbers.write_text(json.dumps(measured, indent=1) + "\n")
    save_figure(plot_calibration(measured), picture)
    text = gain_tables(measured)
    about = f"These numbers were written by `{command_line('-m experiments.calibrate', argv)}`. "
    write_page(page, TITLE, picture.name, about + text)
    print(text)


if __name__ == "__main__":
    main()
