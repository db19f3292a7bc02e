"""Measures PyTorch's ZAYA (transformers) on a checkpoint, in every variant that counts.

    python transformers_reference.py CHECKPOINT [--dtype bfloat16] [--batch 1 8] [--prompt 64]
        [--new 128] [--prefill 1x512 4x512] [--variants grouped_mm ...] [--repeats 3]

Runs in an environment with PyTorch and transformers, and imports nothing of ours. A variant is an
implementation of the experts, with "+compile" under `torch.compile`; attention is "sdpa" ("eager"
was slower in every case of `small`). Prints one JSON object a line: the routers' balance; then
speeds, or why a case was skipped. A speed is the median of the repetitions; `undisturbed` is that
of the fastest tenth of the steps, where other processes run too (on as many cores as
`other_processes`). Prefill gives the last token's logits and keeps no cache; decoding is greedy,
stops at no token, and is timed after the prompt.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import time
from pathlib import Path

import torch
from transformers import DynamicCache, StaticCache, ZayaForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EXPERTS = ["eager", *sorted(ALL_EXPERTS_FUNCTIONS.keys())]
VARIANTS = [experts + mode for experts, mode in itertools.product(EXPERTS, ["", "+compile"])]
GATHERED_BYTES = 4e9  # of experts' weights; copying more takes minutes


class Variant:
    """The model as one variant runs it."""

    def __init__(self, model, name):
        self.model, self.name, self.run = model, name, model
        experts, *compiled = name.split("+")
        torch.compiler.reset()
        model.set_experts_implementation(experts)
        model.set_attn_implementation("sdpa")
        if compiled:
            self.run = torch.compile(model, dynamic=False)
        self.compiled = bool(compiled)
        self.gathers = experts == "batched_mm"

    def check_memory(self, tokens):
        """Raises MemoryError before a copy of one expert for each token would exhaust this
        machine, or take minutes."""
        experts = self.model.model.layers[0].mlp.experts
        needed = tokens * experts.gate_up_proj[0].nbytes
        if self.gathers and needed > min(GATHERED_BYTES, available_memory() / 2):
            raise MemoryError(f"would copy {needed / 1e9:.1f} GB of expert weights")

    def prefill(self, ids):
        """A function that runs the prompts [B, S] and returns its seconds, as a list of one."""
        self.check_memory(ids.numel())

        def prefill():
            begin = time.perf_counter()
            self.run(ids, use_cache=False, logits_to_keep=1)
            return [time.perf_counter() - begin]

        return prefill

    def decoder(self, ids, new):
        """A function that decodes `new` tokens after the prompts [B, S] and returns the seconds of
        each step."""
        self.check_memory(ids.numel())
        static = StaticCache(self.model.config, ids.shape[1] + new) if self.compiled else None

        def decode():
            if static is not None:
                static.reset()
            cache = DynamicCache(config=self.model.config) if static is None else static
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            times = [time.perf_counter()]
            for _ in range(new):
                token = out.logits[:, -1:].argmax(-1)
                out = self.run(token, past_key_values=cache, use_cache=True)
                times.append(time.perf_counter())
            return [end - begin for begin, end in itertools.pairwise(times)]

        return decode


def measure(name, case, tokens, prepare, repeats):
    """Prints one case's speed; `prepare` makes a function that takes `tokens` through the model and
    returns the seconds of its steps."""
    reset_peak()
    try:
        run = prepare()
        begin = time.perf_counter()
        run()
        warm_up = time.perf_counter() - begin
        busy, begin = busy_seconds(), time.perf_counter()
        runs = [run() for _ in range(repeats)]
        others = (busy_seconds() - busy) / (time.perf_counter() - begin)
    except Exception as error:  # whatever a variant fails with is its result
        report(variant=name, case=case, skipped=reason(error))
        return
    seconds = statistics.median(map(sum, runs))
    steps = sorted(itertools.chain(*runs))
    undisturbed = steps[len(steps) // 10] * len(runs[0])
    report(
        variant=name,
        case=case,
        tokens_per_second=round(tokens / seconds, 2),
        undisturbed=round(tokens / undisturbed, 2),
        seconds=round(seconds, 4),
        other_processes=round(others, 2),
        warm_up=round(warm_up, 2),
        peak_rss=peak_rss(),
    )


def reason(error):
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:200]}"


def report(**values):
    print(json.dumps(values), flush=True)


def balance(model, ids):
    """Prints the entropy of the experts' loads (1 is uniform): mean and minimum over the layers."""
    loads = []

    def count(gate, _, out):
        loads.append(torch.bincount(out[2].flatten(), minlength=gate.num_experts))

    hooks = [layer.mlp.gate.register_forward_hook(count) for layer in model.model.layers]
    model(ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    load = torch.stack(loads).double()
    load = load / load.sum(1, keepdim=True)
    entropy = torch.special.entr(load).sum(1) / math.log(load.shape[1])
    report(case="balance", mean=round(entropy.mean().item(), 4), min=round(entropy.min().item(), 4))


def busy_seconds():
    """CPU time that other processes than this one have used since some moment."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - time.process_time()


def available_memory():
    return kernel_figure("/proc/meminfo", "MemAvailable")


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def peak_rss():
    """Bytes resident at most since `reset_peak`, mapped weights included."""
    return kernel_figure("/proc/self/status", "VmHWM")


def kernel_figure(file, name):
    """Bytes in a line such as "VmHWM:  1234 kB"."""
    lines = (line.split() for line in Path(file).read_text().splitlines())
    return next(1024 * int(line[1]) for line in lines if line[0] == f"{name}:")


@torch.inference_mode()
def main():
    arguments = parse()
    model = ZayaForCausalLM.from_pretrained(
        arguments.checkpoint, dtype=getattr(torch, arguments.dtype)
    ).eval()
    generator = torch.Generator().manual_seed(0)

    def random_ids(rows, length):
        return torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)

    balance(model, random_ids(4, 512))
    for name in arguments.variants:
        try:
            variant = Variant(model, name)
        except Exception as error:
            report(variant=name, case="all", skipped=reason(error))
            continue
        for rows, length in arguments.prefill:
            ids = random_ids(rows, length)
            measure(
                name,
                f"prefill {rows}x{length}",
                rows * length,
                lambda ids=ids, variant=variant: variant.prefill(ids),
                arguments.repeats,
            )
        for rows in arguments.batch:
            ids = random_ids(rows, arguments.prompt)
            measure(
                name,
                f"decode {rows}",
                rows * arguments.new,
                lambda ids=ids, variant=variant: variant.decoder(ids, arguments.new),
                arguments.repeats,
            )


def parse():
    def shape(text):
        rows, length = map(int, text.split("x"))
        return rows, length

    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--prefill", type=shape, nargs="*", default=[(1, 512), (4, 512)])
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS, metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
