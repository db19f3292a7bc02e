"""Trains PyTorch's ZAYA (transformers) for 30 steps, and runs PyTorch's optimizers on matrices.

    python tests/oracle/training.py tests/golden/training

OUT_DIR gets the checkpoint before the first step; `curves.safetensors`: the tokens of each step,
the losses of a run whose experts are the routers' choices ("free") and of one whose experts are
given by a hook on every router ("forced"), and the experts of both; and `optimizers.safetensors`:
matrices, their gradients, and what becomes of them. Every tensor of the model is randomised. The
given experts are those of the free run, and random ones for a tenth of the tokens.
"""

import sys
from pathlib import Path

import cases
import torch
from reference import centre_routers, choices, randomise
from safetensors.torch import save_file
from transformers import ZayaConfig, ZayaForCausalLM

STEPS, BATCHES, ROWS, LENGTH = 30, 4, 2, 320
SETTINGS = dict(lr=2e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
CLIP = 1.0


def make_model(tokens):
    generator = torch.Generator().manual_seed(0)
    model = ZayaForCausalLM(ZayaConfig(**cases.settings("base"))).eval()
    randomise(model, generator, skip_bias=0.05)
    centre_routers(model, tokens)
    return model


def make_tokens(vocab):
    """Rows in which a token's successor is one of four, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1)
    successors = torch.randint(1, vocab, (vocab, 4), generator=generator)
    rows = torch.randint(1, vocab, (BATCHES * ROWS, 1), generator=generator)
    while rows.shape[1] < LENGTH:
        which = torch.randint(4, (len(rows),), generator=generator)
        rows = torch.cat([rows, successors[rows[:, -1], which][:, None]], dim=1)
    return rows.view(BATCHES, ROWS, LENGTH)


def hook_routers(model, used, given):
    """Appends each router's experts to `used`; takes them from `given`, a list, if there is one."""

    def hook(gate, _, out):
        logits, _, _, states = out
        chosen, probabilities = choices(gate, logits)
        if given is not None:
            chosen = given.pop(0)
        used.append(chosen)
        weight = probabilities.gather(1, chosen[:, None])
        skipped = chosen[:, None] == gate.num_experts
        index = chosen[:, None].masked_fill(skipped, 0)
        return logits, weight.masked_fill(skipped, 0), index, states

    return [layer.mlp.gate.register_forward_hook(hook) for layer in model.model.layers]


def train(model, tokens, experts=None):
    """Losses [steps] and experts [steps, rows, length, layers]; experts are given or the model's
    own."""
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and "conv" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "conv" in n]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, **SETTINGS)
    losses, all_used = [], []
    for step in range(STEPS):
        used = []
        given = None if experts is None else list(experts[step].flatten(0, 1).long().unbind(-1))
        hooks = hook_routers(model, used, given)
        batch = tokens[step % BATCHES]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        for hook in hooks:
            hook.remove()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.detach())
        all_used.append(torch.stack(used, -1).view(*batch.shape, -1).to(torch.uint8))
    return torch.stack(losses), torch.stack(all_used)


def write_curves(folder):
    tokens = make_tokens(cases.settings("base")["vocab_size"])
    model = make_model(tokens[0])
    free, free_experts = train(model, tokens)
    model = make_model(tokens[0])
    again, _ = train(model, tokens, free_experts)
    assert torch.equal(free, again), "the hook changes more than the choice"
    generator = torch.Generator().manual_seed(2)
    other = torch.randint(0, 5, free_experts.shape, generator=generator)
    swapped = torch.rand(free_experts.shape, generator=generator) < 0.1
    experts = torch.where(swapped, other.to(torch.uint8), free_experts)
    model = make_model(tokens[0])
    forced, used = train(model, tokens, experts)
    assert torch.equal(used, experts)
    model = make_model(tokens[0])
    for parameter in model.parameters():  # halves the file; the weights are the same
        parameter.data = parameter.data.bfloat16()
    model.save_pretrained(folder)
    stored = {"free": free, "free_experts": free_experts, "forced": forced, "experts": experts}
    save_file({"tokens": tokens.int(), **stored}, folder / "curves.safetensors")
    print("free  ", [round(x, 3) for x in free.tolist()])
    print("forced", [round(x, 3) for x in forced.tolist()])
    print("tokens by expert", torch.bincount(experts.flatten().long()).tolist())


def write_optimizers(folder):
    generator = torch.Generator().manual_seed(0)
    stored = {}
    for height, width in (24, 40), (40, 24), (32, 32):
        start = torch.randn(height, width, generator=generator)
        gradients = torch.randn(5, height, width, generator=generator)
        name = f"{height}x{width}"
        stored |= {name: start, f"{name}_gradients": gradients}
        rules = {
            "muon": lambda p: torch.optim.Muon(
                [p], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
            ),
            "adamw": lambda p: torch.optim.AdamW(
                [p], lr=0.02, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8
            ),
        }
        for kind, make in rules.items():
            matrix = torch.nn.Parameter(start.clone())
            optimizer = make(matrix)
            for gradient in gradients:
                matrix.grad = gradient.clone()
                optimizer.step()
            stored[f"{name}_{kind}"] = matrix.detach()
    save_file(stored, folder / "optimizers.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_curves(Path(sys.argv[1]))
    write_optimizers(Path(sys.argv[1]))
