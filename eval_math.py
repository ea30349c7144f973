r"""Evaluate any checkpoint on GSM8K and the five MATH sets of the paper, with confidence intervals.

    python eval_math.py --model Qwen/Qwen2.5-0.5B-Instruct --sets gsm8k --max-new-tokens 768
    python eval_math.py --model runs/mine/checkpoints/step_100 --sets aime24,amc,math500,minerva,olympiadbench
    python eval_math.py --model sail/Qwen2.5-Math-7B-Oat-Zero --template qwen_math --sets math500 \
                        --samples 8 --temperature 0.6
    python eval_math.py --model assets/tiny --sets tiny --max-new-tokens 96      # embedded task, no download
    python eval_math.py --model runs/mine/checkpoints/step_100 --sets mine.jsonl     # questions of your own
    torchrun --nproc-per-node 8 eval_math.py ...     # the same answers, each GPU does every 8th batch

On the five MATH sets, the protocol is that of the paper's table, which is that of Dr. GRPO. Decoding is greedy, with at
most 3,000 new tokens, and at most 4,096 with the prompt. The last \boxed{} counts, and unfinished answers are graded
like all others, also in math_train. Everywhere else, also in a file of your own, an unfinished answer is incorrect, as
in training. So a training run on MATH counts fewer answers as correct than this program does.

On GSM8K the number after `####` counts, unless --answer says otherwise. Two further columns stand beside the accuracy:
`strict` is the plain `#### n` rule, and `last number` takes the last number anywhere in the answer. The latter is for
models that were not told the format.

accuracy   The share of correct answers. With k samples it is the mean over questions and samples.
interval   Wilson's 95 % interval with n = number of questions. With k samples, which are not independent, it is
           conservative.
pass@j     1 - C(k - c, j) / C(k, j) for c correct answers of k samples, as the mean over questions. It is unbiased
           for j draws (arXiv 2107.03374, Eq. 1).
tokens     The mean length of an answer.
truncated  The share of answers without a stop id (with r1 also without </answer>) within the cap.

--out holds config.json, answers.jsonl (a line per answer, written batch by batch), results.json and results.md. The
same command goes on with an interrupted evaluation, while torch, transformers and math-verify have the versions that it
began with. Batches and their seeds depend on the settings alone, so the result is that of an uninterrupted evaluation.
There is one exception: a GPU that runs out of memory splits a batch, which then draws other samples.
Exit codes: 0 done, 2 bad input (with one line on stderr), 1 anything else.
"""
import argparse
import datetime
import itertools
import json
import math
import os
import random
import sys
from contextlib import ExitStack
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import tasks.lock
from grading import GRADERS, grade_gsm8k, grade_last_number, r1_answer, r1_text
from tasks import SETS, TEMPLATES, digests, fix_date, load_rows, load_set, make_questions, stop_ids
from trainer.check import check_model, check_prompts, choose_sampler, context_of
from trainer.checkpoint import append_lines, write_whole
from trainer.model import checksum, load_model
from trainer.ranks import device, end, fail, first, first_line, gather, rank, start, world_size
from trainer.session import owned
from trainer.settings import PRESETS, OneLineParser, count

MATH_SETS = ["aime24", "amc", "math500", "minerva", "olympiadbench"]
TOTAL_TOKENS = 4096                                  # on the MATH sets: prompt and answer together
PAPER = {                                            # accuracies of the paper's two tables
    **{f"{method}, Qwen2.5-0.5B-Instruct": {"gsm8k": x} for method, x in (
        ("GRPO, N = 8", .641), ("GRPO, N = 64", .662), ("TreeRL", .655), ("AttnRL", .670),
        ("DEEP-GRPO", .677))},
    "Oat-Zero-1.5B (Dr. GRPO)": dict(zip(MATH_SETS, (.200, .530, .742, .257, .376)), mean=.421),
    "DEEP-GRPO-1.5B": dict(zip(MATH_SETS, (.267, .506, .752, .272, .367)), mean=.433),
    "Oat-Zero-7B (Dr. GRPO)": dict(zip(MATH_SETS, (.433, .627, .800, .301, .410)), mean=.514),
    "DEEP-GRPO-7B": dict(zip(MATH_SETS, (.467, .651, .816, .338, .426)), mean=.540)}


def parse_args(argv=None):
    """Parse the flags and check them."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                           allow_abbrev=False)
    parser.add_argument("--model", required=True, help="the model to evaluate, a hub name or a local folder; required")
    parser.add_argument("--sets", required=True, help="the sets to evaluate it on, separated by commas, out of "
                        f"{', '.join([*SETS, *tasks.lock.LOCKS])}; a file of your own, whose name ends in .jsonl, is "
                        "one, too; required")
    parser.add_argument("--data-dir", type=Path, help="a folder with local files of the sets (gsm8k_test.jsonl, "
                        "eval_aime24.jsonl, ...); default: read them from the hub")
    parser.add_argument("--out", type=Path, help="the folder to write, or to go on in; default: runs/eval-MODEL")
    parser.add_argument("--samples", type=count, default=1, help="k, the number of answers to each question; "
                        "default: 1")
    parser.add_argument("--temperature", type=float, default=0.0, help="the temperature of the samples; "
                        "default: 0, the one greedy answer")
    parser.add_argument("--template", choices=TEMPLATES, default="chat", help="the prompt around a question, of which "
                        "all but chat are for base models; default: chat, the model's own chat template")
    parser.add_argument("--answer", choices=GRADERS, help="how an answer is asked for and read: hash, the number after "
                        "####; last, that or else the last number; boxed, the last \\boxed{}; default: hash for GSM8K, "
                        "boxed for MATH")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the samples; default: 0")
    sizes = ", ".join(f"{preset['max_new_tokens']} for {name}" for name, preset in PRESETS.items())
    parser.add_argument("--max-new-tokens", type=count, default=3000, help="the cap of an answer, in tokens; the "
                        f"presets of train_gsm8k.py train with {sizes}; default: 3000")
    parser.add_argument("--batch-tokens", type=count, default=262_144, help="the number of answers at a time, times "
                        "their greatest length in tokens; default: 262144")
    args = parser.parse_args(argv)
    args.sets = list(dict.fromkeys(name.strip() for name in args.sets.split(",")))
    for name in args.sets:
        if name not in SETS and name not in tasks.lock.LOCKS and not name.endswith(".jsonl"):
            parser.error(f"argument --sets: {name!r} is neither a .jsonl file nor one of "
                         f"{', '.join([*SETS, *tasks.lock.LOCKS])}")
    if args.max_new_tokens >= TOTAL_TOKENS and (capped := [name for name in args.sets if name in MATH_SETS]):
        parser.error(f"argument --max-new-tokens: on {capped[0]} prompt and answer have {TOTAL_TOKENS} tokens "
                     f"together, as in the paper, got {args.max_new_tokens}")
    if not 0 <= args.temperature < float("inf"):
        parser.error(f"argument --temperature: must be 0 (greedy) or positive, got {args.temperature}")
    if args.samples > 1 and args.temperature == 0:
        parser.error(f"argument --samples: {args.samples} greedy answers would all be the same; "
                     "give a --temperature above 0")
    *_, run, folder, name = "", "", "", *Path(args.model).parts          # RUN/checkpoints/step_N has the run's name
    args.out = args.out or Path("runs") / f"eval-{f'{run}-' if folder == 'checkpoints' else ''}{name}"
    return args


def describe(args, model, stop, questions, date=None):
    """Everything that an answer and its grade depend on, for config.json. Weights and questions are checksums.

    date: the one in the prompts, where the chat template asks for today's. It and --answer are left out where they are
    not given, as in the files of older versions.
    """
    flags = ("model", "sets", "template", "samples", "temperature", "seed", "max_new_tokens", "batch_tokens")
    return {name: getattr(args, name) for name in flags} | {
        "stop_ids": stop, "dtype": str(model.dtype), "device": model.device.type, "weights": checksum(model),
        "questions": {name: digests(asked) for name, asked in questions.items()},
        **{package: metadata.version(package) for package in ("torch", "transformers", "math-verify")}} | {
        name: value for name, value in (("date", date), ("answer", args.answer)) if value}


def read_folder(out):
    """The config.json of the evaluation in `out`, None if there is none. Raises ValueError when it cannot be read."""
    try:
        return dict(json.loads((out / "config.json").read_text()).items())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"--out {out} holds no readable config.json ({error}): choose another") from error


def check_folder(out, config):
    """Raise ValueError when `out` holds an evaluation with another config."""
    there = read_folder(out)
    for name in there | config if there is not None else ():
        if there.get(name) != config.get(name):
            raise ValueError(f"{out} holds another evaluation: {name} is {there.get(name)!r:.60} there, "
                             f"{config.get(name)!r:.60} now; choose another --out, or delete that folder")


def make_batches(questions, k, new_tokens, batch_tokens):
    """Return lists of question indices, longest prompt first: rows * (longest prompt + new_tokens) <= batch_tokens.

    A question whose k answers are longer than that is a batch of its own. sample() halves it when memory runs out.
    """
    batches, width = [], 0
    for i in sorted(range(len(questions)), key=lambda i: -len(questions[i].prompt)):
        if not batches or (len(batches[-1]) + 1) * k * width > batch_tokens:
            batches.append([])
            width = len(questions[i].prompt) + new_tokens
        batches[-1].append(i)
    return batches


def grade(question, text, finished, template, math_protocol=True):
    """Return {column: is it correct?} of an answer: only `correct` if it is boxed, else also strict and last_number.

    math_protocol: a boxed answer counts although the response is not finished.
    """
    if template == "r1":
        text = r1_text(text, question.answer, finished)
    right = GRADERS[question.answer](text, question.gold)
    if question.answer == "boxed":
        return {"correct": right and (finished or math_protocol)}
    return {"correct": finished and right,
            "strict": finished and grade_gsm8k(text, question.gold, strict=True),
            "last_number": finished and grade_last_number(text, question.gold)}


def answer_batch(args, model, sampler, tokenizer, stop, name, questions, batch):
    """Yield the answers to the questions of a batch as dicts, one per line of answers.jsonl.

    The randomness is that of torch's global generator.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop[0]
    total = min(TOTAL_TOKENS if name in MATH_SETS else math.inf, context_of(model))
    room = [max(0, min(args.max_new_tokens, total - len(questions[i].prompt))) for i in batch]
    tails = sampler(model, [questions[i].prompt for i in batch], args.samples, eos_token_id=stop, pad_token_id=pad,
                    max_new_tokens=[max(1, n) for n in room], temperature=args.temperature)
    for i, space, own in zip(batch, room, tails):
        for j, ids in enumerate(own):
            ids = ids[:space]                        # each has its own cap, so answers do not depend on the batch
            text = tokenizer.decode(ids, skip_special_tokens=True)
            finished = bool(ids) and ids[-1] in stop or args.template == "r1" and bool(r1_answer(text)[1])
            graded = grade(questions[i], text, finished, args.template, name in (*MATH_SETS, "math_train"))
            yield {"set": name, "row": i, "sample": j,
                   "question": questions[i].text, "gold": questions[i].gold,
                   "response": text, "tokens": len(ids), "finished": finished, **graded}


def read_answers(path, keys):
    """Return [(answer, bytes of its line)], for as long as lines are whole and in the order of keys.

    keys: tuples (set, row, sample).
    """
    answers = []
    for line, key in zip(path.read_bytes().splitlines(keepends=True) if path.exists() else [], keys):
        try:
            answer = json.loads(line)
            good = line.endswith(b"\n") and (answer["set"], answer["row"], answer["sample"]) == key
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            break
        answers.append((answer, len(line)))
    return answers


def evaluate(args, model, sampler, tokenizer, stop, questions):
    """Answer the questions that are still open in args.out. Returns all answers, as they are in answers.jsonl."""
    batches = [(name, batch) for name, asked in questions.items()
               for batch in make_batches(asked, args.samples, args.max_new_tokens, args.batch_tokens)]
    ends = list(itertools.accumulate((len(batch) * args.samples for _, batch in batches), initial=0))
    path = args.out / "answers.jsonl"
    keys = [(name, i, j) for name, batch in batches for i in batch for j in range(args.samples)]
    there = first(lambda: read_answers(path, keys))
    done = max(b for b, end in enumerate(ends) if end <= len(there))             # whole batches, as each has a seed
    answers = [answer for answer, _ in there[:ends[done]]]

    def answer_numbered(b):
        if b >= len(batches):
            return []
        torch.manual_seed(random.Random(f"{args.seed} {b}").getrandbits(63))
        name, batch = batches[b]
        return list(answer_batch(args, model, sampler, tokenizer, stop, name, questions[name], batch))

    def cut():
        path.touch()
        os.truncate(path, sum(size for _, size in there[:ends[done]]))

    first(cut)
    with tqdm(total=ends[-1], initial=ends[done], unit="answer", desc="evaluation", disable=rank() > 0) as bar:
        for b in range(done, len(batches), world_size()):                        # a batch for each rank
            new = [answer for part in gather(partial(answer_numbered, b + rank())) for answer in part]
            first(partial(append_lines, path, new))
            answers += new
            bar.update(len(new))
    return answers


def wilson(p, n, z=1.959964):
    """Wilson's 95 % interval (low, high) for a share p of n."""
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def pass_at(j, c, k):
    """The probability that j of the k samples, drawn without replacement, hold at least one of the c correct ones."""
    return 1 - math.comb(k - c, j) / math.comb(k, j)


def summarize(answers, k):
    """Return the numbers of one set, from its answers (lines of answers.jsonl)."""
    def share(column):
        return sum(answer[column] for answer in answers) / len(answers)

    right = {}
    for answer in answers:
        right[answer["row"]] = right.get(answer["row"], 0) + answer["correct"]
    n, accuracy = len(right), share("correct")
    draws = sorted({1 << bit for bit in range(k.bit_length())} | {k})            # 1, 2, 4, ... and k
    result = {"n": n, "accuracy": accuracy, "interval": wilson(accuracy, n), "tokens": share("tokens"),
              "truncated": 1 - share("finished"),
              "pass": {str(j): sum(pass_at(j, c, k) for c in right.values()) / n for j in draws}}
    return result | {column: share(column) for column in ("strict", "last_number")
                     if all(column in answer for answer in answers)}    # a file may have questions of both kinds


def write_table(results):
    """Return Markdown: a table with a row per set, then one with the rows of the paper for the sets that there are."""
    def row(*cells):
        return "| " + " | ".join(f"{100 * x:.1f}" if isinstance(x, float) else str(x) for x in cells) + " |"

    config, sets = results["config"], results["sets"]
    k = config["samples"]
    how = f"mean of {k} samples, T = {config['temperature']:g}" if config["temperature"] else "greedy"
    head = ["set", "n", "accuracy %", "95 % interval", *([f"pass@{k} %"] if k > 1 else []),
            "tokens", "truncated %", "strict %", "last number % (fallback)"]
    lines = [f"{config['model']}, {how}, template {config['template']}", "",
             row(*head), "|---" * len(head) + "|"]
    for name, r in sets.items():
        interval = "{:.1f} to {:.1f}".format(*(100 * x for x in r["interval"]))
        passed = [r["pass"][str(k)]] if k > 1 else []
        lines.append(row(name, r["n"], r["accuracy"], interval, *passed, round(r["tokens"]), r["truncated"],
                         r.get("strict", ""), r.get("last_number", "")))
    own = {name: r["accuracy"] for name, r in sets.items()}
    if results["math_mean"] is not None:
        own["mean"] = results["math_mean"]
    columns = [name for name in ("gsm8k", *MATH_SETS, "mean") if name in own]
    rows = {name: numbers for name, numbers in PAPER.items() if any(c in numbers for c in columns)}
    if rows:
        how_chosen = "the paper's are greedy, and on GSM8K the best of many on the test set"
        lines += ["", row(f"accuracy %; {how_chosen}", *columns), "|---" * (len(columns) + 1) + "|"]
        lines += [row(name, *(numbers.get(c, "") for c in columns)) for name, numbers in rows.items()]
        lines.append(row(f"{config['model']}, {how}", *(own[c] for c in columns)))
    return "\n".join(lines) + "\n"


def prepare(args, today):
    """Return ((model, its sampler, tokenizer, stop ids, questions by set), config). It writes nothing.

    today: the date for prompts, as text, unless args.out has an evaluation that began on another day. Raises ValueError
    or OSError on bad input.
    """
    if args.data_dir is not None and not args.data_dir.is_dir():
        raise ValueError(f"--data-dir {args.data_dir} is not a folder")
    rows = {name: tasks.lock.make_rows(tasks.lock.LOCKS[name], 256, seed=0) if name in tasks.lock.LOCKS
            else load_set(name, args.data_dir) if name in SETS else load_rows(name, "test") for name in args.sets}
    there = read_folder(args.out) or {}
    model, tokenizer = load_model(args.model, torch.bfloat16 if device().type == "cuda" else torch.float32)
    check_model(model.to(device()).eval(), args.model, training=False)
    stop = stop_ids(tokenizer, model)
    date = fix_date(tokenizer, there.get("date") or today)
    questions = {name: make_questions(rows[name], tokenizer, float("inf"), args.template, args.answer)[0]
                 for name in args.sets}
    prompts = [q.prompt for asked in questions.values() for q in asked]
    check_prompts(model, args.model, prompts, stop, 1)
    if context_of(model) < max(map(len, prompts)) + args.max_new_tokens:
        print(f"the context of {args.model} has {context_of(model)} tokens: prompt and answer share them")
    return (model, choose_sampler(model), tokenizer, stop, questions), describe(args, model, stop, questions, date)


def main(argv=None) -> int:
    """Parse, prepare, evaluate, report."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start()
    args = first(lambda: parse_args(argv))
    today = first(lambda: datetime.date.today().isoformat())
    prepared, there = [], f"the answers so far are in {args.out}, the same command goes on from there"

    def load():
        if not prepared:
            prepared.append(prepare(args, today))

    def write(results):
        write_whole(args.out / "results.json", json.dumps(results, indent=2) + "\n")
        write_whole(args.out / "results.md", write_table(results))
        print(write_table(results))

    with ExitStack() as stack:
        try:
            first(load)                                  # rank 0 goes first, as it may have to download
            gather(load)
            (parts, config), = prepared
            first(lambda: stack.enter_context(owned(args.out)))
            first(lambda: check_folder(args.out, config))
            first(lambda: write_whole(args.out / "config.json", json.dumps(config, indent=2) + "\n"))
        except (ValueError, OSError) as error:
            return fail(error, 2)
        except torch.OutOfMemoryError as error:
            return fail(f"the model does not fit into the memory of the GPU: {first_line(error)}", 1)
        try:
            answers = evaluate(args, *parts)
        except KeyboardInterrupt:                        # every rank gets it
            if rank() == 0:
                print(f"interrupted; {there}", file=sys.stderr)
            return 1
        except (OSError, FloatingPointError, torch.OutOfMemoryError) as error:
            return fail(f"{error}; {there}", 1)
        sets = {name: summarize([answer for answer in answers if answer["set"] == name], args.samples)
                for name in args.sets}
        mean = (sum(sets[s]["accuracy"] for s in MATH_SETS) / len(MATH_SETS)
                if all(s in sets for s in MATH_SETS) else None)
        results = {"config": config, "sets": sets, "math_mean": mean}
        first(lambda: write(results))
        end()
        return 0


if __name__ == "__main__":
    sys.exit(main())
