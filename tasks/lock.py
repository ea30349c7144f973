r"""The embedded task: a combination lock that two CPU cores can learn by reinforcement in a minute.

A question lists labelled turns of two dials (0-9). The solution restates every turn with the dials before and after
it:

    The dials show 37.          (a) L+3: 37 -> 67.
    (a) L+3                     (b) both+3: 67 -> 90.
    (b) both+3                  #### 90
    What do they show?

A turn of one dial (`L+3`, `R+8`) is *easy*. `both+3` is *hard*. In the demonstrations that the base model is trained
on, a share 1 - p of the hard turns leave the dials unmoved, and the solution goes on from that incorrect state. The
base policy therefore does a hard turn correctly with probability p, however good it is otherwise.

A hard turn must have no fixed point, and k of them must not cancel. A swap of the dials or +5 would cancel: two errors
would make a correct answer. Moving both dials by 3 satisfies both conditions for k < 10.

This is GSM8K in miniature. Rows have the fields `question` and `answer` (ending in `#### ..`), prompts come from a chat
template, and the tokenizer and the model are Hugging Face ones. Training, segmentation, grading and logging therefore
use the very code that GSM8K uses. What DEEP-GRPO is about is one failure, late in a long valid prefix. `place` moves
that failure.

    python -m tasks.lock --preset tiny        # trains the base model in assets/tiny again, and writes pretrain.log
"""
import argparse
import math
import random
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tasks import GSM8K_INSTRUCTION, chat_prompt

EASY = [f"{dial}+{k}" for dial in "LR" for k in range(1, 10)]
HARD = "both+3"
LABELS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ["<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>"]
PIECES = ([HARD, "The dials show ", ".\n", "\n", "What do they show?", GSM8K_INSTRUCTION,
           ": ", " -> ", "#### "] + EASY + [f"({label}) " for label in LABELS] + list("0123456789"))


@dataclass(frozen=True)
class Lock:
    """One difficulty of the task.

    turns: the fewest and the most turns of a question. hard: how many of them are hard. place: where the hard turns may
    stand, counted from the end (1 = the last turn), both ends included. p: the probability that the base model does a
    hard turn correctly.
    """
    turns: tuple[int, int] = (7, 8)
    hard: int = 1
    place: tuple[int, int] = (1, 3)
    p: float = 0.04

    def __post_init__(self):
        (low, high), (first, last) = self.turns, self.place
        if not 1 <= low <= high <= len(LABELS):
            raise ValueError(f"turns must be 1 <= fewest <= most <= {len(LABELS)}, got {self.turns}")
        if not 1 <= first <= last <= low:
            raise ValueError(f"place must be 1 <= first <= last <= fewest turns ({low}), got {self.place}")
        if not 0 <= self.hard <= min(last - first + 1, 9):
            raise ValueError(f"hard must be 0 to the {last - first + 1} places there are (at most 9), "
                             f"got {self.hard}")
        if not 0 <= self.p <= 1:
            raise ValueError(f"p must be a probability, got {self.p}")


LOCKS = {"tiny": Lock(), "tiny-deep": Lock(turns=(12, 14), place=(1, 2), p=0.03)}
ASSETS = Path(__file__).parents[1] / "assets"


def draw_turns(lock, rng, n=None):
    """Return a list of n turns with the hard ones in place. rng: random.Random. n: None draws it from lock.turns."""
    n = n or rng.randint(*lock.turns)
    turns = [rng.choice(EASY) for _ in range(n)]
    places = [n - back for back in range(lock.place[0], lock.place[1] + 1) if back <= n]
    for i in rng.sample(places, min(lock.hard, len(places))):
        turns[i] = HARD
    return turns


def write_row(turns, start, right):
    """Return the row {question, answer} for these turns from the dials `start`.

    right: for every turn, whether it is done correctly. An incorrect turn leaves the dials where they are. With every
    turn done correctly, the answer is the gold answer.
    """
    left_dial, right_dial = start
    question = [f"The dials show {left_dial}{right_dial}.\n"]
    answer = []
    for label, turn, done in zip(LABELS, turns, right):
        before = f"{left_dial}{right_dial}"
        step = int(turn[-1]) if done else 0
        left_dial = (left_dial + step * (turn[0] in "Lb")) % 10
        right_dial = (right_dial + step * (turn[0] in "Rb")) % 10
        question.append(f"({label}) {turn}\n")
        answer.append(f"({label}) {turn}: {before} -> {left_dial}{right_dial}.\n")
    return {"question": "".join(question) + "What do they show?",
            "answer": "".join(answer) + f"#### {left_dial}{right_dial}"}


def make_rows(lock, n, seed):
    """Return n questions with their gold answers, as GSM8K rows. The same seed gives the same rows."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        turns = draw_turns(lock, rng)
        rows.append(write_row(turns, (rng.randrange(10), rng.randrange(10)), [True] * len(turns)))
    return rows


def demonstrate(lock, rng, p):
    """Return one row of the base model's training data. Every hard turn is correct with probability p only.

    Half of the demonstrations are shorter than the task asks for, and half of these have no hard turns. Without this
    curriculum, the model does not learn to copy the dials in the steps that there are.
    """
    short = rng.random() < 0.5
    n = rng.randint(1, lock.turns[0]) if short else None
    turns = draw_turns(lock if not short or rng.random() < 0.5 else Lock(lock.turns, 0, lock.place), rng, n)
    right = [turn != HARD or rng.random() < p for turn in turns]
    return write_row(turns, (rng.randrange(10), rng.randrange(10)), right)


def make_tokenizer():
    """Return a word-level Hugging Face tokenizer of the task's pieces. It is lossless on the task's texts."""
    vocabulary = {piece: i for i, piece in enumerate(SPECIAL + PIECES)}
    longest_first = sorted(PIECES, key=len, reverse=True)
    pattern = "|".join(re.escape(piece) for piece in longest_first)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    template = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>"], chat_template=template,
        clean_up_tokenization_spaces=False)


def encode_row(tokenizer, row):
    """Return (prompt ids, answer ids with EOS) of a row: what the policy sees, and what it should say."""
    prompt = chat_prompt(tokenizer, row["question"] + GSM8K_INSTRUCTION)
    return prompt, tokenizer.encode(row["answer"], add_special_tokens=False) + [tokenizer.eos_token_id]


def pad_rows(encoded, pad):
    """Return right-padded ids [B, L] and labels [B, L] of encoded rows. Labels are -100 on prompts and padding."""
    width = max(len(prompt) + len(answer) for prompt, answer in encoded)
    ids = [prompt + answer + [pad] * (width - len(prompt) - len(answer)) for prompt, answer in encoded]
    labels = [[-100] * len(prompt) + answer + [-100] * (width - len(prompt) - len(answer))
              for prompt, answer in encoded]
    return torch.tensor(ids), torch.tensor(labels)


@torch.no_grad()
def turn_probabilities(model, tokenizer, lock, n=256, seed=1):
    """Return (p_easy, p_hard), the mean probabilities of doing an easy turn and a hard turn correctly.

    Both are conditional: all turns before this one were done correctly.
    """
    rows = make_rows(lock, n, seed)
    encoded = [encode_row(tokenizer, row) for row in rows]
    ids, _ = pad_rows(encoded, tokenizer.pad_token_id)
    logp = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)       # (B, L-1, vocabulary)
    logp = logp.gather(-1, ids[:, 1:, None])[..., 0]                         # (B, L-1)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    easy, hard = [], []
    for b, (prompt, answer) in enumerate(encoded):
        for t, token in enumerate(answer):
            if names[token] == " -> ":               # the two tokens after it are the dials after the turn
                at = len(prompt) + t                 # logp[:, at] belongs to the token at + 1
                probability = logp[b, at:at + 2].sum().exp().item()
                (hard if names[answer[t - 4]] == HARD else easy).append(probability)
    return sum(easy) / max(1, len(easy)), sum(hard) / max(1, len(hard))


def pretrain(lock, tokenizer, steps, batch=32, lr=2e-3, seed=0, log=print, model=None):
    """Train a base policy for `lock`, a Llama with 0.56 M parameters, on demonstrations. Returns the model.

    model: the base policy of another lock, whose training goes on. log: a function that gets a line every 100 steps;
    with None nothing is measured. The model is not a Qwen2, because AutoTokenizer gives every folder with that model
    type a Qwen2Tokenizer, whatever its tokenizer.json says.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = model or LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    for step in tqdm(range(1, steps + 1), desc="base model"):
        p = max(lock.p, 0.5 - step / steps)          # learn what a hard turn does, then how rarely to do it
        encoded = [encode_row(tokenizer, demonstrate(lock, rng, p)) for _ in range(batch)]
        ids, labels = pad_rows(encoded, tokenizer.pad_token_id)
        for group in optimizer.param_groups:         # 100 steps of warm-up, then a cosine to 0
            group["lr"] = lr * min(1, step / 100) * (1 + math.cos(math.pi * step / steps)) / 2
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if log and (step % 100 == 0 or step == steps):
            easy, hard = turn_probabilities(model, tokenizer, lock, n=64 if step < steps else 1024)
            log(f"step {step:5d}  loss {loss.item():.4f}  p_easy {easy:.4f}  p_hard {hard:.4f}")
    return model


def main():
    """Train one base model into assets/ and write the log beside it."""
    parser = argparse.ArgumentParser(description="train the base model of the embedded task")
    parser.add_argument("--preset", choices=LOCKS, default="tiny")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--out", type=Path, help="folder to write; default: assets/PRESET")
    args = parser.parse_args()
    lock, out = LOCKS[args.preset], args.out or ASSETS / args.preset
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "pretrain.log", "w") as file:
        def log(line):
            tqdm.write(line)
            print(line, file=file, flush=True)
        log(f"python {' '.join(sys.argv)}   # torch {torch.__version__}, "
            f"{torch.get_num_threads()} CPU threads")
        log(f"{asdict(lock)}")
        tokenizer = make_tokenizer()
        model = pretrain(lock, tokenizer, args.steps, log=log)
    model.half().save_pretrained(out)                # fp16 halves the file, which is loaded as fp32
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
