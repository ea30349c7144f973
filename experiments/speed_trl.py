"""The row of speed.py that compares a step of GRPO with TRL: `python -m experiments.speed trl`."""
import importlib.util
import statistics
import sys
import tempfile
import time

import torch
import transformers
from transformers import PreTrainedTokenizerFast

import deep_grpo
from deep_grpo import Config, Group, Trajectory
from experiments.workload import (
    Work,
    compiled_models,
    make_model,
    our_ranks,
    our_sampler,
    synchronize,
)
from trainer.compiling import compiled_layers
from trainer.model import precision


def time_trl(args):
    """A step of GRPO against TRL's GRPOTrainer.

    Equal are model, prompts, G, caps, beta, precision, and the number of rows in a micro-batch. Equal are also T = 1,
    top_k 0, top_p 1, one update per batch, AdamW, no gradient checkpointing, sequence means (loss_type "grpo") and a
    metric of entropy. TRL's step alone includes tokenisation and its logging.
    """
    if importlib.util.find_spec("trl") is None:
        print("the row trl is left out, because TRL is not installed: pip install trl==1.16.0", file=sys.stderr)
        return
    n, prompt, cap, rows = {"0.5b": (64, 100, 256, 32), "test": (2, 10, 8, 8)}.get(args.size, (4, 100, 96, 8))
    model, ref_model = make_model(args.size), make_model(args.size)
    ids = Work(model, 1, 8, 8).ids
    prompts = [ids(prompt) for _ in range(n)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    config = Config(branches=0, max_new_tokens=cap)
    clock = {name: {"generation": [], "update": []} for name in ("this repository", "TRL")}

    def our_step():
        ours, start = clock["this repository"], time.perf_counter()
        with precision(model):
            tails = our_sampler()(model, prompts, 8, max_new_tokens=cap, eos_token_id=1, pad_token_id=0)
        synchronize()
        ours["generation"].append(time.perf_counter() - start)
        groups = [Group(p, [Trajectory(y, float(j % 2)) for j, y in enumerate(ys)]) for p, ys in zip(prompts, tails)]
        with compiled_layers(*compiled_models(model, ref_model)):
            deep_grpo.update(model, optimizer, groups, config, ref_model, rows * (prompt + cap), our_ranks())
        synchronize()
        ours["update"].append(time.perf_counter() - start - ours["generation"][-1])
        args.bar.update()

    train_with_trl(model, prompts, config, rows, args.repeats + 1, clock["TRL"], our_step)
    for part in ("generation", "update"):
        medians = {name: statistics.median(times[part][1:]) for name, times in clock.items()}
        for name, times in clock.items():
            yield {"row": f"GRPO {part}, {n} x 8 x {prompt}+{cap}", "variant": name, "seconds": medians[name],
                   "x": medians[name] / medians["this repository"], "runs": times[part][1:], "peak_mb": None,
                   "work": ""}


def train_with_trl(model, prompts, config, rows, steps, times, between):
    """Run GRPOTrainer on the prompts, `rows` in a micro-batch. Fills `times`, and calls between() after each step."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import GRPOConfig, GRPOTrainer

    class TimedTrainer(GRPOTrainer):
        def _generate(self, *args, **kwargs):
            start = time.perf_counter()
            out = super()._generate(*args, **kwargs)
            synchronize()
            times["generation"].append(time.perf_counter() - start)
            return out

    class StepTimer(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):                # after the optimizer
            synchronize()
            times["update"].append(time.perf_counter() - self.start - times["generation"][-1])
            between()

    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(model.config.vocab_size)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="w1", pad_token="w0", padding_side="left")
    data = [{"prompt": " ".join(f"w{i}" for i in p)} for p in prompts] * steps
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        settings = GRPOConfig(
            output_dir=folder, model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"}, bf16=gpu,
            use_cpu=not gpu, per_device_train_batch_size=rows, gradient_accumulation_steps=len(prompts) * 8 // rows,
            num_generations=8, max_completion_length=config.max_new_tokens, beta=config.beta, loss_type="grpo",
            learning_rate=1e-6, lr_scheduler_type="constant", max_steps=steps, gradient_checkpointing=False,
            report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=10**6, shuffle_dataset=False)
        trainer = TimedTrainer(
            folder, args=settings, train_dataset=Dataset.from_list(data), processing_class=tokenizer,
            callbacks=[StepTimer()],
            reward_funcs=lambda completions, **_: [float(j % 2) for j in range(len(completions))])
        trainer.train()
