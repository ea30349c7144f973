r"""The methods at an equal budget once more, each with a learning rate of its own.

    python -m experiments.tuned                        # all methods: two to two and a half hours on two cores
    python -m experiments.tuned --experiment rare      # where correct answers are rare; not run yet

experiments.compare has one learning rate for all methods. It was chosen for none of them, but it may suit some better
than others. Here each method first runs with three learning rates and with the seeds 100 to 102. The one with the
highest mean accuracy over the run is taken. The seeds that are reported are those of experiments.compare, and were not
used for this choice.

The three learning rates are those around 1.6e-4, the one of experiments.budget. A pilot of GRPO with the seed 99 had
the mean accuracy .63 with it, .61 with twice and .06 with four times as much.

Writes results/NAME-tuned.json, .png, and the tables of .md. The choice takes most of the time, and is written first. A
program that was stopped after it goes on from there.
"""
import argparse
import json
import sys

from experiments.compare import EXPERIMENTS, measure, plot_comparison, settings_of, tables
from experiments.figures import save_figure
from experiments.runs import Arm, about_task, add_common_flags, kept_numbers, make_task, write_page, written_by
from trainer.settings import OneLineParser, count

RATES = ("8e-5", "1.6e-4", "3.2e-4")
SEEDS, FIRST_SEED = 3, 100                           # of the choice


def with_rate(arm, rate) -> Arm:
    """An arm with this learning rate."""
    return arm._replace(label=f"{arm.label}, {rate}", flags=f"{arm.flags} --lr {rate}")


def choose_rates(experiment, out, jobs, base) -> dict[str, dict[str, float]]:
    """arm -> learning rate -> mean accuracy over the runs of the choice."""
    trials = {f"{name}-{rate}": with_rate(arm, rate) for name, arm in experiment.arms.items() for rate in RATES}
    measured = measure(experiment._replace(arms=trials, seeds=SEEDS, first_seed=FIRST_SEED), out, jobs, base)
    return {name: {rate: measured["arms"][f"{name}-{rate}"]["summary"]["accuracy_mean"] for rate in RATES}
            for name in experiment.arms}


def chosen_before(numbers, experiment) -> dict[str, dict[str, float]] | None:
    """The choice of a program that was stopped after it, as `numbers` has it; None if there is none to go on from."""
    kept = json.loads(numbers.read_text()) if numbers.exists() else {}
    if "choice" not in kept or "arms" in kept:
        return None
    same = {name: list(means) for name, means in kept["choice"].items()} == {name: [*RATES] for name in experiment.arms}
    if not same or any(kept[name] != value for name, value in settings_of(experiment).items() if name != "seeds"):
        sys.exit(f"error: {numbers} has a choice with other methods, learning rates or settings: remove it to choose "
                 "again")
    print(f"the learning rates are those that {numbers} has; remove it to choose again")
    return kept["choice"]


def choice_table(experiment, found) -> str:
    """Markdown: the mean accuracy of each method with each learning rate; the highest is taken."""
    rates = list(next(iter(found.values())))
    lines = [f"The learning rate of each method is the one with the highest mean accuracy over {SEEDS} runs, with the",
             f"seeds {FIRST_SEED} to {FIRST_SEED + SEEDS - 1}. They are used for nothing else.", "",
             f"| method | {' | '.join(rates)} |", "|---" * (len(rates) + 1) + "|"]
    for name, means in found.items():
        cells = [f"**{mean:.3f}**" if rate == best_rate(means) else f"{mean:.3f}" for rate, mean in means.items()]
        lines.append(f"| {experiment.arms[name].label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def best_rate(means) -> str:
    """The learning rate with the highest mean; of equal ones, the first."""
    return max(means, key=means.get)


def main(argv=None):
    """Choose, run what is missing, then write numbers, figure and tables."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", choices=["methods", "rare"], default="methods",
                        help="Selects what is compared. The default is methods.")
    parser.add_argument("--seeds", type=count, help="Sets how many seeds are reported. The default is 5, and 10 for "
                        "rare.")
    parser.add_argument("--budget-tokens", type=count, default=128_000,
                        help="Sets the generated tokens of a run. The default is 128000.")
    add_common_flags(parser, "runs/tuned")
    args = parser.parse_args(argv)
    experiment = EXPERIMENTS[args.experiment]
    experiment = experiment._replace(seeds=args.seeds or experiment.seeds, budget_tokens=args.budget_tokens)
    numbers, picture, page = (args.results / f"{args.experiment}-tuned.{ending}" for ending in ("json", "png", "md"))
    title = f"{experiment.title}, each with its own learning rate"
    if args.redraw:
        measured = kept_numbers(parser, numbers)
        if "arms" not in measured:
            parser.error(f"argument --redraw: {numbers} has the learning rates that were chosen, but no runs with them")
    else:
        about = written_by("-m experiments.tuned", argv, f"{experiment.flags}, {args.budget_tokens:,} tokens; "
                           f"{about_task(experiment)}")
        found = chosen_before(numbers, experiment)               # before a base policy is made, which takes minutes
        out = args.out / args.experiment
        base = make_task(experiment, out / "base")
        if found is None:
            found = choose_rates(experiment, out / "choice", args.jobs, base)
            args.results.mkdir(parents=True, exist_ok=True)
            numbers.write_text(json.dumps(settings_of(experiment) | {"choice": found}, indent=1) + "\n")
            write_page(page, title, picture.name, f"{about}\n\n{choice_table(experiment, found)}")
        tuned = {name: with_rate(arm, best_rate(found[name])) for name, arm in experiment.arms.items()}
        measured = measure(experiment._replace(arms=tuned), out, args.jobs, base) | {"choice": found}
        numbers.write_text(json.dumps(measured, indent=1) + "\n")
        write_page(page, title, picture.name, "\n\n".join([about, tables(measured), choice_table(experiment, found)]))
        print(choice_table(experiment, found), tables(measured), sep="\n\n")
    save_figure(plot_comparison(measured, title), picture)
    print(picture)


if __name__ == "__main__":
    main()
