"""What lm-eval's own `hf` model makes of checkpoints that we wrote: python lm_eval_hf.py JOBS OUT.

JOBS is a list of {"folder", "options" (of the model), "pairs" (context and continuation), "texts",
"chats" (messages)}; OUT gets {"pairs", "texts", "chats"} for each, as lm-eval returns them.
"""

import json
import sys
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file


@torch.no_grad()
def restore_biases(model, folder):
    """from_pretrained overwrites the last bias of each router."""
    stored = load_file(f"{folder}/model.safetensors")
    for i, layer in enumerate(model.model.layers):
        biases = stored[f"model.layers.{i}.mlp.gate.balancing_biases"]
        layer.mlp.gate.balancing_biases.copy_(biases)


def requests(kind, arguments):
    return [Instance(kind, {}, tuple(each), i) for i, each in enumerate(arguments)]


def run(job):
    model = HFLM(job["folder"], dtype="float32", device="cpu", batch_size=4, **job["options"])
    restore_biases(model.model, job["folder"])
    rolling = requests("loglikelihood_rolling", [[text] for text in job["texts"]])
    return {
        "pairs": model.loglikelihood(requests("loglikelihood", job["pairs"]), disable_tqdm=True),
        "texts": model.loglikelihood_rolling(rolling, disable_tqdm=True),
        "chats": [
            model.apply_chat_template(chat, add_generation_prompt=chat[-1]["role"] == "user")
            for chat in job["chats"]
        ],
    }


def main(jobs, out):
    torch.set_num_threads(1)
    results = [run(job) for job in json.loads(Path(jobs).read_text())]
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
