r"""The policy: all that the algorithm asks of a model and of a grader.

`deep_grpo.step` and the methods of variants/ call four things: `sample` draws continuations of token prefixes,
`rewards` grades them, `text` and `encode` pass between token ids and text. Two more serve methods that look inside the
model before they branch: `score` and `each`. With `of_prompts`, a teacher looks at all questions before a run.

Every method here divides its work among the processes of torchrun and gives every process all of the results. On a
GPU it computes in bf16. Sharded weights are gathered for its duration.

Your own reward: make a subclass with another `reward`, or replace that method.
"""
import time
from collections import Counter
from contextlib import contextmanager
from functools import lru_cache, partial
from math import inf
from numbers import Real

from deep_grpo import score_groups
from grading import GRADERS, r1_text
from resample import sample
from tasks import chat_prompt, plain_prompt
from trainer.model import Ranks, as_forward, gathered, precision
from trainer.ranks import imbalance, share


class Clock:
    """Seconds per phase. A phase inside another one counts for itself only."""

    def __init__(self):
        self.seconds = Counter()
        self.inner = []                                  # seconds of the phases inside each phase that is open

    @contextmanager
    def phase(self, name):
        """Count the seconds of this block under `name`."""
        start = time.perf_counter()
        self.inner.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            self.seconds[name] += whole - self.inner.pop()
            if self.inner:
                self.inner[-1] += whole


class BadReward(ValueError):
    """A reward that is neither a failure nor a success."""


class Policy:
    """A model with its tokenizer, its stop ids and the Config of the run.

    Attributes: generated and forwarded (tokens so far: drawn, and scored to choose states), clock, and imbalance
    ({phase: generated tokens of the most loaded rank over the mean}, the largest since it was last emptied).
    """

    def __init__(self, model, tokenizer, stop, config, micro_batch_tokens=None, sampler=sample):
        self.model, self.tokenizer, self.stop, self.config = model, tokenizer, stop, config
        self.sampler = sampler                           # resample.sample or, with its arguments, trainer.decoding's
        self.micro_batch_tokens = micro_batch_tokens
        self.generated = self.forwarded = 0
        self.clock, self.imbalance = Clock(), {}
        self.decode = partial(tokenizer.decode, skip_special_tokens=True)
        self.decode_kept = lru_cache(2**16)(self.decode)

    def sample(self, prefixes, k, max_new_tokens, expected_tokens=None, temperature=None):
        """[N][k] continuations of N prefixes (token ids), at the run's temperature unless given.

        max_new_tokens: a cap, or one for each prefix. expected_tokens: for branches, how long a continuation of each
        prefix may become, by which the work is divided among the ranks; None: equal.
        """
        phase = "rollout" if expected_tokens is None else "resample"
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.stop[0]
        rows = [n for n in range(len(prefixes)) for _ in range(k)]
        caps = [max_new_tokens] * len(prefixes) if isinstance(max_new_tokens, int) else max_new_tokens
        costs = [expected_tokens[n] for n in rows] if expected_tokens else None

        def draw_part(part):
            counts = Counter(part)                       # a prefix may be dealt out to two ranks
            with precision(self.model):
                tails = self.sampler(self.model, [prefixes[n] for n in counts], [*counts.values()],
                               max_new_tokens=[caps[n] for n in counts], eos_token_id=self.stop, pad_token_id=pad,
                               temperature=self.config.temperature if temperature is None else temperature)
            return [y for drawn in tails for y in drawn]

        with self.clock.phase(phase), gathered(self.model):
            drawn = share(rows, draw_part, costs)
        uneven = imbalance([len(y) for y in drawn], costs)
        self.imbalance[phase] = max(self.imbalance.get(phase, 1.0), uneven)
        self.generated += sum(map(len, drawn))
        return [drawn[i:i + k] for i in range(0, len(drawn), k)]

    def reward(self, question, response) -> float:
        """1.0 if the response (token ids) ended within the cap and its final answer is right, else 0.0."""
        if response[-1] not in self.stop:
            return 0.0
        text = self.text(response)
        if question.template == "r1":
            text = r1_text(text, question.answer, finished=True)
        return float(GRADERS[question.answer](text, question.gold))

    def rewards(self, pairs) -> list[float]:
        """The rewards of (question, response) pairs; each is graded on one rank only.

        0 is a failure, and anything above is a success. Raises BadReward for what is neither.
        """
        def graded(question, response):
            try:
                return self.reward(question, response)
            except (OSError, ArithmeticError) as error:  # which would be taken for a full disk, or for an update
                raise BadReward(f"the reward of the question {question.text[:40]!r} failed: {type(error).__name__}: "
                                f"{error}") from error

        with self.clock.phase("score"):
            rewards = share(pairs, lambda part: [graded(*pair) for pair in part])
        if wrong := [reward for reward in rewards if not isinstance(reward, Real) or not 0 <= reward < inf]:
            raise BadReward(f"a reward must be a number, 0 (a failure, which is branched) or above; got {wrong[0]!r}")
        return [float(reward) for reward in rewards]

    def text(self, ids) -> str:
        """Token ids as text, without special tokens. Pairs are kept, because pivot.py asks for the same ones often."""
        return self.decode_kept(tuple(ids)) if len(ids) <= 2 else self.decode(ids)

    def encode(self, text) -> list[int]:
        """The prompt of one user message."""
        if self.tokenizer.chat_template is None:
            return plain_prompt(self.tokenizer, text)
        return chat_prompt(self.tokenizer, text)

    def score(self, groups):
        """(log-probabilities, entropies) of all loss tokens, in nats: lists with a tensor per rollout of the groups."""
        with gathered(self.model):
            logps, entropies, tokens = score_groups(self.model, groups, self.config, self.micro_batch_tokens, Ranks())
        self.forwarded += tokens
        return logps, entropies

    def of_prompts(self, function, prompts) -> list:
        """function(model, prompts), which gives one result per prompt. Each rank computes those of a part."""
        with gathered(self.model), precision(self.model):
            return share(prompts, as_forward(self.model, function), [len(prompt) for prompt in prompts])

    def each(self, function, items) -> list:
        """[function(model, *item) for item in items], where an item begins with a prompt and a response."""
        def part(items):
            with precision(self.model):
                return [as_forward(self.model, function)(*item) for item in items]

        with gathered(self.model):
            results = share(items, part)
        self.forwarded += sum(len(prompt) + len(response) for prompt, response, *_ in items)
        return results
