r"""Methods side by side on the embedded task, at an equal budget of generated tokens and of updates.

    python -m experiments.compare                          # `make compare`: all methods, 5 seeds
    python -m experiments.compare --experiment rare        # the same where correct answers are rare, 10 seeds
    python -m experiments.compare --experiment branches    # K = 4, 8, 16, TreeRL and GRPO there, 20 seeds
    python -m experiments.compare --experiment prefix      # the prefix of a branch masked, and trained
    python -m experiments.compare --experiment stapo       # with and without STAPO
    python -m experiments.compare --experiment hot         # the same where STAPO acts, 10 seeds
    python -m experiments.compare --experiment ablations   # DEEP-GRPO without one of its parts
    python -m experiments.compare --experiment thinning    # a share of the failures branched there, 40 seeds
    python -m experiments.compare --experiment thinning-methods    # the same with the lock of the preset, 20 seeds
    python -m experiments.compare --experiment uneven      # a choice of questions, where they differ, 10 seeds
    python -m experiments.compare --extend --arms mine     # an arm that you added to ARMS beside the kept ones

After step n, every method has generated at least n times --step-tokens tokens: a step adds whole batches of questions
until it has. So all methods make about as many steps, and one that needs fewer tokens for a question gets more
questions. All runs of an experiment start from one base model. All but those with Goldilocks take the same questions in
the same order. Two runs go on at a time, with one thread each. Runs are kept in --out: finished ones are not run again,
and interrupted ones go on.

An experiment writes three files into results/. NAME.json has the numbers of every run, NAME.png is the figure, and
NAME.md has the tables between two markers. --redraw draws the figure from NAME.json, without any runs. --extend makes
only the runs that NAME.json does not have. First it repeats one kept run, and ends with an error if a number is not the
same to the last digit. It cannot extend rare, branches, prefix and ablations: of most of their runs only the mean
accuracy is kept.
"""
import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict

import numpy as np

from experiments.figures import ACCENT, GREY, INK, new_figure, plot_forest, save_figure
from experiments.runs import (
    Arm,
    Experiment,
    about_task,
    add_common_flags,
    holm,
    interval,
    kept_numbers,
    make_task,
    read_run,
    run_all,
    write_page,
    written_by,
)
from tasks.lock import Lock
from trainer.settings import OneLineParser, count

# --questions is the batch that is added until a step has its tokens. One batch should have far fewer than 8,000.
ARMS = {
    "grpo": Arm("GRPO, G = 8", "--method grpo --questions 4"),
    "grpo64": Arm("GRPO, G = 64", "--method grpo --group-size 64"),
    "dr_grpo": Arm("Dr. GRPO, G = 8", "--method dr_grpo --questions 4"),
    "deep_grpo": Arm("DEEP-GRPO, G = 8, K = 8", "--method deep_grpo"),
    "treerl": Arm("TreeRL, 6 trees", "--method treerl --questions 2"),
    "attnrl": Arm("AttnRL, 6 trees", "--method attnrl --questions 2"),
    "fr3e": Arm("FR3E, G = 16, K = 8", "--method fr3e --branches 8"),
    "rrpo": Arm("RRPO, 5 + 4", "--method rrpo --questions 4"),
    "spo_chain": Arm("SPO-chain, G = 8", "--method spo_chain --questions 2"),
    "spo_tree": Arm("SPO-tree, 3 x 3 x 3", "--method spo_tree --questions 2 --group-size 3 --branches 2"),
    "spo_tree_all": Arm("SPO-tree without its mask",
                        "--method spo_tree --questions 2 --group-size 3 --branches 2 --prob-mask 1"),
    "vcpo": Arm("VCPO, G = 8", "--method vcpo --questions 4"),
    "maspo": Arm("GRPO + MASPO", "--method grpo --questions 4 --maspo"),
    "goldilocks": Arm("GRPO + Goldilocks", "--method grpo --questions 4 --select goldilocks"),
    "deep_goldilocks": Arm("DEEP-GRPO + Goldilocks", "--method deep_grpo --select goldilocks"),
    "prefix": Arm("DEEP-GRPO, prefix trained", "--method train_prefix"),
    "authors": Arm("DEEP-GRPO, authors' form", "--method deep_grpo --objective authors"),
    "authors_prefix": Arm("authors' form, prefix trained", "--method train_prefix --objective authors"),
    "stapo": Arm("DEEP-GRPO + STAPO", "--method deep_grpo --stapo"),
    "grpo_stapo": Arm("GRPO + STAPO", "--method grpo --questions 4 --stapo"),
    "grpo24": Arm("GRPO, G = 24", "--method grpo --group-size 24"),
    "k4": Arm("K = 4", "--method deep_grpo --branches 4"),
    "k16": Arm("K = 16", "--method deep_grpo --branches 16"),
    "two_pivots": Arm("two pivots per failure", "--method two_pivots"),
    "uniform": Arm("pivots drawn uniformly", "--method uniform_pivot"),
    "root": Arm("branches from the question", "--method deep_grpo --gamma -20"),
    "branch_all": Arm("correct rollouts branched, too", "--method branch_all"),
    "one_stream": Arm("one stream instead of two", "--method one_stream"),
    "no_std": Arm("advantages without std", "--method no_std"),
    "half": Arm("S = 1/2", "--method deep_grpo --branch-share .5"),
    "quarter": Arm("S = 1/4", "--method deep_grpo --branch-share .25"),
    "eighth": Arm("S = 1/8", "--method deep_grpo --branch-share .125"),
    "half_light": Arm("S = 1/2, weights of S = 1", "--method light_branches --branch-share .5"),
}
EQUAL = "--preset tiny-deep --eval-every 2 --step-tokens 8000"
HOT = "--preset tiny --eval-every 2 --step-tokens 8000 --temperature 1.8 --lr 3e-4"
RARE = Lock(turns=(12, 14), hard=3, place=(1, 4), p=0.1)


def arms(names) -> dict[str, Arm]:
    """The arms with these names, as a text of words; the first is what the others are compared with."""
    return {name: ARMS[name] for name in names.split()}


METHODS = ("grpo grpo64 dr_grpo deep_grpo treerl attnrl fr3e rrpo "
           "spo_chain spo_tree spo_tree_all vcpo goldilocks deep_goldilocks")
EXPERIMENTS = {                                      # the last line of each is the message of the kept result
    "methods": Experiment(
        "The methods at equal budget", 5, 128_000, EQUAL,
        arms(METHODS), None,
        "At equal tokens, no method is ahead of GRPO with G = 8"),
    "rare": Experiment(
        "The methods where correct answers are rare", 10, 128_000, f"{EQUAL} --lr 1.6e-4",
        arms(METHODS), RARE,
        "Where correct answers are rare, only TreeRL's lead is significant, and only by itself"),
    "branches": Experiment(
        "How many branches where correct answers are rare", 20, 128_000, f"{EQUAL} --lr 1.6e-4",
        arms("deep_grpo k4 k16 treerl grpo"), RARE,
        "K = 4, 8 and 16 cannot be told apart in 20 seeds; TreeRL is ahead of K = 8"),
    "prefix": Experiment(
        "The prefix of a branch masked, and trained", 5, 128_000, EQUAL,
        arms("deep_grpo prefix authors authors_prefix"), None,
        "Masking the prefix of a branch costs no accuracy"),
    "stapo": Experiment(
        "With and without STAPO", 5, 128_000, EQUAL, arms("grpo grpo_stapo deep_grpo stapo"), None,
        "STAPO changes nothing on this task"),
    "hot": Experiment(
        "With and without STAPO, where sampling is hot", 10, 128_000, HOT,
        arms("grpo grpo_stapo deep_grpo stapo"), None,
        "Where it acts, STAPO is not shown to help"),
    "ablations": Experiment(
        "DEEP-GRPO without one of its parts", 5, 128_000, EQUAL,
        arms("deep_grpo k4 k16 two_pivots uniform root branch_all one_stream no_std grpo24"), None,
        "The changes that cost the most questions have the lowest accuracy"),
    "uneven": Experiment(
        "A choice of questions, where they differ", 10, 128_000, f"{EQUAL} --lr 8e-5",
        arms("grpo goldilocks deep_grpo deep_goldilocks"), RARE,
        "Where questions differ, DEEP-GRPO is behind GRPO, with Goldilocks by less", hard=(1, 3)),
    "thinning": Experiment(
        "Fewer branches, more questions, where correct answers are rare", 40, 128_000, f"{EQUAL} --lr 1.6e-4",
        arms("deep_grpo half half_light quarter eighth grpo treerl"), RARE,
        "Where correct answers are rare, half of the branches is not shown to differ from all", first_seed=20),
    "thinning-methods": Experiment(
        "Fewer branches, more questions, in the regime of the comparison of methods", 20, 128_000, EQUAL,
        arms("deep_grpo half half_light quarter eighth grpo treerl"), None,
        "Half or a quarter of the branches is better than all", first_seed=20),
}


def settings_of(experiment) -> dict:
    """What all runs of an experiment have in common, as results/NAME.json has it."""
    lock = experiment.lock and {name: list(value) if isinstance(value, tuple) else value
                                for name, value in asdict(experiment.lock).items()}
    return {"seeds": experiment.seeds, "first_seed": experiment.first_seed, "budget_tokens": experiment.budget_tokens,
            "flags": experiment.flags, "lock": lock, "hard": list(experiment.hard)}


def known_runs(measured, experiment) -> dict[tuple[str, int], dict]:
    """The numbers of all kept runs, by (arm, seed). Ends the program if they were made with other settings.

    measured: what collect() returned before; None: there are no runs.
    """
    if measured is None:
        return {}
    then, now = {"first_seed": 0, "hard": []} | measured, settings_of(experiment)    # old results do not name them
    for arm, kept in measured["arms"].items():
        now[f"flags of {arm}"] = experiment.arms[arm].flags
        then[f"flags of {arm}"] = kept.get("flags", experiment.arms[arm].flags)
    if other := [name for name in now if name != "seeds" and then[name] != now[name]]:
        sys.exit(f"error: --extend: the kept runs have {other[0]} {then[other[0]]}, here it is {now[other[0]]}: "
                 "choose another --results")
    if now["seeds"] < then["seeds"]:
        sys.exit(f"error: --extend: {then['seeds']} seeds are kept, here there are {now['seeds']}: raise --seeds")
    if any("accuracy_half" not in run for kept in measured["arms"].values() for run in kept["seeds"]):
        sys.exit("error: --extend: of some kept runs only the mean accuracy is kept: make all runs, without --extend")
    return {(arm, experiment.first_seed + i): run for arm, kept in measured["arms"].items()
            for i, run in enumerate(kept["seeds"])}


def measure(experiment, out, jobs, base="", known=()) -> dict:
    """Make the runs that are not known, and return what collect() returns for all of them.

    base: flags of the base policy. known: that of known_runs(). The first of these runs is made again; the program ends
    if it gives other numbers.
    """
    made = experiment._replace(flags=f"{experiment.flags} {base}")
    for arm, seed in list(known)[:1]:
        shutil.rmtree(out / "again", ignore_errors=True)                 # it may be of another version
        once = made._replace(arms={arm: made.arms[arm]}, seeds=1, first_seed=seed)
        now, then = read_run(run_all(once, out / "again", jobs)[arm][0]), known[arm, seed]
        if other := [name for name in then if name != "seconds" and now[name] != then[name]]:
            sys.exit(f"error: --extend: {out / 'again'} has {other[0]} {now[other[0]]}, the kept run has "
                     f"{then[other[0]]}: the kept runs were made with other versions, or on another kind of CPU. "
                     "To measure here, leave out --extend, and give --arms and --results FOLDER")
    return collect(experiment, run_all(made, out, jobs, known=known), known)


def collect(experiment, directories, known=()) -> dict:
    """The numbers of all runs, as results/NAME.json has them: of every arm its label, a summary and every seed.

    A summary is the mean over seeds, except tokens_to_first_correct, which is the median (None: half of the runs or
    more have no correct answer). relative_time compares with the run of the first arm that has the same seed.
    known: (arm, seed) -> the numbers of runs that are not read from their directories. As they may be of another
    machine, there is no relative_time then.
    """
    seeds = {arm: [known[arm, seed] if (arm, seed) in known else read_run(d)
                   for seed, d in enumerate(paths, experiment.first_seed)] for arm, paths in directories.items()}
    base = next(iter(seeds.values()))
    measured = settings_of(experiment) | {"arms": {}}
    for arm, runs in seeds.items():
        summary = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]
                   if name not in ("tokens_to_first_correct", "seconds") and not name.startswith("early_")}
        first = [run["tokens_to_first_correct"] for run in runs]
        median = float(np.median([np.inf if tokens is None else tokens for tokens in first]))
        summary["tokens_to_first_correct"] = median if np.isfinite(median) else None
        times = [run["seconds"] / other["seconds"] for run, other in zip(runs, base)]
        summary["relative_time"] = None if known else float(np.mean(times))
        measured["arms"][arm] = {"label": experiment.arms[arm].label, "flags": experiment.arms[arm].flags,
                                 "summary": summary, "seeds": runs}
    return measured


def differences(measured, arm, base=None) -> np.ndarray:
    """Mean accuracy over the run minus that of the arm `base`, seed by seed. None: the first arm."""
    own, other = ([run["accuracy_mean"] for run in measured["arms"][name]["seeds"]]
                  for name in (arm, base or next(iter(measured["arms"]))))
    return np.array(own) - np.array(other)


def tables(measured) -> str:
    """Markdown: accuracy with 95 % intervals and the paired test against the first arm, the cost, and every seed."""
    base = next(iter(measured["arms"]))
    label = measured["arms"][base]["label"]
    others = [arm for arm in measured["arms"] if arm != base]
    corrected = dict(zip(others, holm([interval(differences(measured, arm))[2] for arm in others])))

    def lines(header, row):
        yield f"| method | {' | '.join(header)} |"
        yield "|---" * (len(header) + 1) + "|"
        for arm, kept in measured["arms"].items():
            yield f"| {kept['label']} | {' | '.join(row(arm, kept))} |"

    def accuracy(arm, kept):
        for name in ("accuracy_half", "accuracy_end", "accuracy_mean"):
            mean, width, _ = interval([run[name] for run in kept["seeds"]])
            yield f"{mean:.3f} \u00b1 {width:.3f}"
        mean, width, p = interval(differences(measured, arm))
        yield "" if arm == base else f"{mean:+.3f} \u00b1 {width:.3f}"
        yield "" if arm == base else f"{p:.3f}"
        yield "" if arm == base else f"{corrected[arm]:.3f}"
        yield str(sum(run["accuracy_end"] > 0.1 for run in kept["seeds"]))

    def pairs(arm, kept):
        for other in measured["arms"]:
            mean, width, _ = interval(differences(measured, arm, other))
            yield "" if arm == other else f"{mean:+.3f} \u00b1 {width:.3f}"

    def cost(arm, kept):
        summary = kept["summary"]
        for name in ("optimizer_steps", "questions", "sequences", "generated_tokens", "forwarded_tokens",
                     "trained_tokens"):
            yield f"{summary[name]:,.0f}"
        yield f"{summary['correct_per_1000_tokens']:.3g}"
        first = summary["tokens_to_first_correct"]
        yield "-" if first is None else f"{first:,.0f}"
        yield f"{summary['dead_groups']:.2f}"
        yield "-" if summary["relative_time"] is None else f"{summary['relative_time']:.2f}"

    return "\n".join([
        f"The table has the greedy accuracy on held-out questions: mean of {measured['seeds']} seeds \u00b1 95 %",
        "interval (Student's t). The mean over the run is the area under the curve over generated tokens. The paired t",
        f"test compares runs of the same seed with {label}. It is two-sided. The second p is corrected for the number",
        "of rows (Holm). The last column has the number of runs that end above 0.1.",
        "",
        *lines(("half of the tokens", "all tokens", "mean over the run", f"minus {label}", "p", "p, corrected",
                "runs above 0.1"), accuracy), "",
        "The next table has the same difference for every pair: the method of the row minus that of the column.", "",
        *lines([other["label"] for other in measured["arms"].values()], pairs), "",
        "The next table has the mean cost of a run. Correct answers are counted per 1,000 generated tokens in the",
        "first third of the updates. The tokens to the first correct answer end with the update that has it. They are",
        f"a median, and - means that half of the runs have none. Time is relative to {label} with the same seed,",
        "while two runs go on at a time.",
        "",
        *lines(("updates", "questions", "sequences", "generated tokens", "forwarded tokens", "trained tokens",
                "correct per 1,000 tokens", "tokens to the first correct", "dead groups", "time"), cost),
        "", "The last table has the mean accuracy over the run of every seed.", "",
        *lines([str(measured["first_seed"] + i) for i in range(measured["seeds"])],
               lambda arm, kept: (f"{run['accuracy_mean']:.3f}" for run in kept["seeds"]))])


def headline(experiment, measured) -> str:
    """The message of the experiment; its plain title where arms, seeds or budget are not those of the kept result."""
    same = (measured["seeds"], measured["budget_tokens"], list(measured["arms"])) == (
        experiment.seeds, experiment.budget_tokens, list(experiment.arms))
    return experiment.message if same else experiment.title


def plot_comparison(measured, title):
    """A forest plot: every arm's paired difference of the mean accuracy to the first arm, with its 95 % interval."""
    kept = measured["arms"]
    base = next(iter(kept))
    rows = []
    for arm in kept:
        mean, width, _ = interval(100 * differences(measured, arm))
        summary = kept[arm]["summary"]
        rows.append((kept[arm]["label"], mean, width, ACCENT if arm == "deep_grpo" else INK if arm == base else GREY,
                     (f"{100 * summary['accuracy_mean']:.0f} %", f"{summary['questions']:.0f}")))
    figure, axes = new_figure(1.75 + 0.36 * len(rows))
    plot_forest(axes["a"], rows, ("mean\naccuracy", "questions\nper run"))
    axes["a"].set_xlabel(
        f"mean accuracy over the run minus that of {kept[base]['label']}, in percentage points\n"
        f"paired by seed: mean of {measured['seeds']} seeds and 95 % interval; "
        f"every run generates at least {measured['budget_tokens']:,} tokens", fontsize=9)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def main(argv=None):
    """Run what is missing, then write numbers, figure and tables."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", choices=EXPERIMENTS, default="methods",
                        help="Selects what is compared. The default is methods.")
    parser.add_argument("--arms", help="Runs only these arms, separated by commas; the first is what the others are "
                        "compared with (with --extend, the first kept one). The default is all arms of the experiment.")
    parser.add_argument("--seeds", type=count,
                        help="Sets how many seeds each arm has. The default is that of the experiment, 5 to 40; with "
                        "--extend it is the number that is kept.")
    parser.add_argument("--budget-tokens", type=count,
                        help="Sets the generated tokens of a run. The default is 128000.")
    parser.add_argument("--extend", action="store_true", help="Makes only the runs whose numbers are not kept: for "
                        "more arms or seeds. The default is to make all of them.")
    add_common_flags(parser, "runs/compare")
    args = parser.parse_args(argv)
    experiment = EXPERIMENTS[args.experiment]
    numbers, picture, page = (args.results / f"{args.experiment}.{ending}" for ending in ("json", "png", "md"))
    if args.redraw:
        measured = kept_numbers(parser, numbers)
        save_figure(plot_comparison(measured, headline(experiment, measured)), picture)
        print(picture)
        return
    kept = kept_numbers(parser, numbers, "--extend") if args.extend else None
    names = args.arms.split(",") if args.arms else list(experiment.arms)
    names = list(dict.fromkeys([*(kept["arms"] if kept else ()), *names]))
    if unknown := [name for name in names if name not in ARMS]:
        parser.error(f"argument --arms: {', '.join(unknown)}: choose from {', '.join(ARMS)}")
    chosen = experiment._replace(arms={name: ARMS[name] for name in names},
                                 seeds=args.seeds or (kept or {}).get("seeds", experiment.seeds),
                                 budget_tokens=args.budget_tokens or experiment.budget_tokens)
    known = known_runs(kept, chosen)                 # before a base policy is made, which takes minutes
    if known:
        print(f"kept, and not made again: {', '.join(kept['arms'])}")
    args.results.mkdir(parents=True, exist_ok=True)  # now: what cannot be written should not be measured
    start, out = time.time(), args.out
    if chosen.flags != EXPERIMENTS["methods"].flags:     # those with equal flags share runs
        out = out / args.experiment
    measured = measure(chosen, out, args.jobs, make_task(chosen, out / "base"), known)
    numbers.write_text(json.dumps(measured, indent=1) + "\n")
    save_figure(plot_comparison(measured, headline(experiment, measured)), picture)
    text = tables(measured)
    about = written_by("-m experiments.compare", argv,
                       f"{chosen.flags}, {chosen.budget_tokens:,} tokens; {about_task(chosen)}")
    write_page(page, experiment.title, picture.name, f"{about}\n\n{text}")
    print(f"\n{text}\n\n{page}, {picture.name} and {numbers.name}   ({time.time() - start:.0f} seconds)")


if __name__ == "__main__":
    main()
