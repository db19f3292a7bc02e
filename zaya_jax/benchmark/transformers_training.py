"""Measures training steps of PyTorch's ZAYA (transformers) on a checkpoint.

    python transformers_training.py CHECKPOINT grouped_mm+bfloat16 [--batch 4x256] [--steps 3]

Runs in an environment with PyTorch and transformers, and imports nothing of ours. A step is
forward, backward, clipping and AdamW ("fused", the fastest on the CPU) on float32 weights and
always the same tokens. A variant is an implementation of the experts and the dtype of products,
which for bfloat16 is autocast, with "+compile" under `torch.compile`; attention is "sdpa". Prints
a JSON object: the median of the steps' seconds, their losses, and the process's peak of memory; or
why the variant was skipped.
"""

import argparse
import contextlib
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from transformers import ZayaForCausalLM
from transformers_reference import busy_seconds, peak_rss, reason, report


def trainer(model, name, ids, learning_rate):
    """A function that takes one step of that variant and returns its loss."""
    experts, dtype, *compiled = name.split("+")
    model.set_experts_implementation(experts)
    model.set_attn_implementation("sdpa")
    optimizer = torch.optim.AdamW(
        model.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    run = torch.compile(model, dynamic=False) if compiled else model

    def products():
        if dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def step():
        with products():
            loss = run(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure(name, step, tokens, steps):
    """Prints the speed of the steps behind a first one, which also compiles."""
    try:
        begin = time.perf_counter()
        losses, times = [step()], []
        warm_up = time.perf_counter() - begin
        busy, begin = busy_seconds(), time.perf_counter()
        for _ in range(steps):
            last = time.perf_counter()
            losses.append(step())
            times.append(time.perf_counter() - last)
        others = (busy_seconds() - busy) / (time.perf_counter() - begin)
    except Exception as error:  # whatever a variant fails with is its result
        report(variant=name, case="training", skipped=reason(error))
        return
    seconds = statistics.median(times)
    report(
        variant=name,
        case="training",
        tokens_per_second=round(tokens / seconds, 2),
        best=round(tokens / min(times), 2),
        seconds=round(seconds, 4),
        other_processes=round(others, 2),
        warm_up=round(warm_up, 2),
        losses=losses,
        peak_rss=peak_rss(),
    )


def main():
    arguments = parse()
    rows, length = map(int, arguments.batch.split("x"))
    model = ZayaForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).train()
    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, (rows, length))
    step = trainer(model, arguments.variant, torch.from_numpy(tokens), arguments.learning_rate)
    measure(arguments.variant, step, rows * length, arguments.steps)


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("variant")
    parser.add_argument("--batch", default="4x256")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    return parser.parse_args()


if __name__ == "__main__":
    main()
