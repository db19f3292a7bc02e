"""What transformers computes of a checkpoint that we wrote: python logits.py FOLDER IDS OUT."""

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import ZayaForCausalLM


@torch.no_grad()
def main(folder, ids, out):
    torch.set_num_threads(1)
    reference = load_file(ids)
    model = ZayaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stored = load_file(f"{folder}/model.safetensors")
    for i, layer in enumerate(model.model.layers):  # from_pretrained overwrites the last bias
        biases = stored[f"model.layers.{i}.mlp.gate.balancing_biases"]
        layer.mlp.gate.balancing_biases.copy_(biases)
    lengths = reference["lengths"].tolist()
    rows = [row[:n].long() for row, n in zip(reference["ids"], lengths, strict=True)]
    logits = [model(row[None]).logits[0].float() for row in rows]
    save_file({"logits": torch.cat(logits)}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
