"""Runs PyTorch's ZAYA (transformers) on random models in which every tensor matters, and stores
what it computes.

    python tests/oracle/reference.py OUT_DIR [--golden]

For each case of `cases.py`, OUT_DIR/<case>/ gets the checkpoint as transformers saves it and
`reference.safetensors`: prompt rows (padded), their lengths, and for each unpadded row the float32
logits and experts, and those of the model in bfloat16. A fresh reference model proves nothing
(temperatures 0, one busy expert): every tensor is randomised, and each router is centred so that
all its classes get tokens. Weights are representable in bfloat16, so that both models are the same
model.
"""

import argparse
from pathlib import Path

import cases
import torch
from safetensors.torch import save_file
from transformers import ZayaConfig, ZayaForCausalLM
from transformers.models.zaya import modeling_zaya


@torch.no_grad()
def randomise(model, generator, skip_bias):
    """Draws every tensor from a distribution under which its effect on the logits is large."""

    def draw(like):
        return torch.randn(like.shape, generator=generator)

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" in name:  # the rotary table is no weight
            continue
        if name.endswith("balancing_biases"):
            value = 0.05 * draw(tensor)
            value[-1] = skip_bias
        elif name.endswith("temp"):
            value = 0.5 + 2 * torch.rand(tensor.shape, generator=generator)
        elif "scale" in name or "norm" in name:
            value = 1 + 0.3 * draw(tensor)
        elif "embed" in name:
            value = draw(tensor)
        elif "conv" in name and tensor.ndim == 3:
            value = 0.4 * draw(tensor)
        elif tensor.ndim == 1:
            value = 0.1 * draw(tensor)
        else:
            value = 1.5 * draw(tensor) / tensor.shape[-1] ** 0.5
        tensor.copy_(value.bfloat16().float())


@torch.no_grad()
def centre_routers(model, ids):
    """Removes what all tokens share from each router's last product, and widens what is left."""
    for layer in model.model.layers:
        out = layer.mlp.gate.router_mlp.out_proj
        seen = []
        hook = out.register_forward_pre_hook(lambda _, args, to=seen: to.append(args[0]))
        model(ids)
        hook.remove()
        inputs = seen[0].flatten(0, -2)
        mean = inputs.mean(0)
        weight = out.weight - torch.outer(out.weight @ mean, mean) / (mean @ mean)
        weight = 2 * weight / (inputs @ weight.T).std()
        out.weight.copy_(weight.bfloat16().float())


def use_identity_skip():
    """The legacy meaning of the skip class: the expert block's input times the class's
    probability."""

    def forward(self, hidden_states, prev_router_hidden_states=None):
        logits, weight, index, states = self.gate(hidden_states, prev_router_hidden_states)
        flat = hidden_states.flatten(0, 1)
        out = self.experts(flat, index, weight)
        chosen, probabilities = choices(self.gate, logits)
        skipped = chosen == self.gate.num_experts
        identity = flat * probabilities[:, -1:].to(flat.dtype)
        out = torch.where(skipped[:, None], identity, out)
        return out.view_as(hidden_states), states

    modeling_zaya.ZayaSparseMoeBlock.forward = forward


def choices(gate, logits):
    probabilities = torch.softmax(logits, dim=-1)
    return (probabilities.float() + gate.balancing_biases).argmax(-1), probabilities


@torch.no_grad()
def run(model, rows):
    """Logits float32 [tokens, V] and experts uint8 [tokens, L] of all rows, each run alone and
    unpadded."""
    logits, experts = [], []
    for row in rows:
        seen = []
        hooks = [
            layer.mlp.gate.register_forward_hook(
                lambda gate, _, out, to=seen: to.append(choices(gate, out[0])[0])
            )
            for layer in model.model.layers
        ]
        logits.append(model(row[None]).logits[0].float())
        for hook in hooks:
            hook.remove()
        experts.append(torch.stack(seen, -1).to(torch.uint8))
    return torch.cat(logits), torch.cat(experts)


def build(name, folder, golden):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    settings = cases.settings(name)
    if settings.get("skip_expert") == "identity":
        use_identity_skip()
    model = ZayaForCausalLM(ZayaConfig(**settings)).eval()
    randomise(model, generator, skip_bias=0.05 if name.startswith("skip") else -0.15)
    lengths = cases.prompt_lengths(golden)
    ids = torch.randint(
        1, settings["vocab_size"], (len(lengths), max(lengths)), generator=generator
    )
    centre_routers(model, ids)
    rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    logits, experts = run(model, rows)
    stored = {
        "ids": ids.int(),
        "lengths": torch.tensor(lengths).int(),
        "logits": logits,
        "experts": experts,
    }
    if golden:
        for parameter in model.parameters():  # halves the files; the weights are the same
            parameter.data = parameter.data.bfloat16()
    model.save_pretrained(folder, max_shard_size="100KB" if name == "deep" else "5GB")
    if not golden:
        low_logits, low_experts = run(model.to(torch.bfloat16), rows)
        stored |= {"bf16_logits": low_logits, "bf16_experts": low_experts}
    save_file(stored, folder / "reference.safetensors")
    used = torch.bincount(experts.flatten().long(), minlength=settings["num_experts"] + 1)
    print(f"{name:26} std {logits.std():6.3f}  tokens by expert {used.tolist()}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--golden", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    usual = modeling_zaya.ZayaSparseMoeBlock.forward
    for name in cases.GOLDEN if arguments.golden else cases.CASES:
        modeling_zaya.ZayaSparseMoeBlock.forward = usual
        build(name, arguments.out / name, arguments.golden)


if __name__ == "__main__":
    main()
