"""The training step of a model on clusters of GPUs: compiled for them by `train.aot`, and what it
would take, on paper."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from pallas_kernels.rocm import roofline
from pallas_kernels.rocm.hlo import Collective
from pallas_kernels.rocm.toolchain import NODE, devices
from train.config import MeshConfig, ModelConfig, TrainConfig, for_run, new_model
from train.data.batch import Batch
from train.data.config import DataConfig
from train.flops import training_flops
from train.setup import plan
from train.step import Step, TrainState, make_step
from zaya_jax.sharding import AXES, BATCH, make_mesh

# Bytes a second that a GPU sends: to the seven others of its node, 7 links of 64 GB/s (AMD's data
# sheet of the MI300X); to other nodes, a network card of 400 Gb/s for each GPU, as in the authors'
# cluster (arXiv 2511.17127).
LINKS, NETWORK = 448e9, 50e9
# Assumed, of these peaks and of the products'. Others measured about half of the latter, of large
# products by themselves.
REACHED_LINKS, REACHED_NETWORK, REACHED_FLOPS = 0.7, 0.8, 0.4
REPORTED = 6500  # tokens a second and GPU, on 1,024 of them (arXiv 2605.05365)


class Training(NamedTuple):
    """A compiled training step's source.

    Attributes:
      config: of the run.
      function: the step, under `jax.jit`; its state is donated.
      args: shapes and shardings of the state and of a batch.
    """

    config: TrainConfig
    function: Step
    args: tuple[TrainState, Batch]

    @property
    def name(self) -> str:
        mesh = self.config.mesh
        sizes = {axis: getattr(mesh, axis) for axis in AXES}
        spread = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
        return f"{self.config.context:,} tokens a row, {spread}"

    @property
    def tokens(self) -> int:
        """Of a device in a step."""
        mesh = self.config.mesh
        return self.config.tokens_per_step // (mesh.data * mesh.expert * mesh.context)

    @property
    def flops(self) -> float:
        """Of a device in a step, at least: what is computed again is not counted."""
        model = for_run(self.config, new_model(self.config))
        return training_flops(model, self.config.context) * self.tokens


def eight_b() -> list[TrainConfig]:
    """The 8B model's base phase on 128 GPUs and on the authors' 1,024, with their 16,384 tokens for
    each, and its midtraining on 128, with context 2 as they had it.

    Experts, and parts of a row, are spread within nodes, where most is exchanged.
    """
    model = ModelConfig(preset="zaya1_8b", remat="full")
    base = TrainConfig(
        phase="pretrain", data=DataConfig(), model=model, rows=512, mesh=MeshConfig(16, 8)
    )
    long = dataclasses.replace(
        base, context=32768, rope_base=1e6, rows=64, mesh=MeshConfig(16, 4, 2)
    )
    authors = dataclasses.replace(base, rows=4096, mesh=MeshConfig(128, 8))
    return [base, long, authors]


def training(config: TrainConfig) -> Training:
    """The step of a run with new weights, on GPUs to compile for."""
    sizes = config.mesh
    gpus = devices(sizes.data * sizes.expert * sizes.context)
    mesh = make_mesh(sizes.data, sizes.expert, sizes.context, gpus)
    model = for_run(config, new_model(config))
    rule, balancer, like = plan(config, model, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    function = make_step(config, model, mesh, rule, balancer, shardings)
    rows = NamedSharding(mesh, BATCH)

    def array(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.rows, config.context), dtype, sharding=rows)

    int32 = array(jnp.int32)
    batch = Batch(int32, segment_ids=int32, targets=int32, weights=array(jnp.float32))
    return Training(config, function, (like, batch))


def exchanged(name: str, collectives: Sequence[Collective]) -> list[dict[str, str]]:
    """Rows of the table of what devices exchange: by kind, within nodes and between them."""
    times, sent = Counter[tuple[str, bool]](), Counter[tuple[str, bool]]()
    for one in collectives:
        where = one.kind, one.within(NODE)
        times[where] += one.times
        sent[where] += round(one.sent)
    return [
        {
            "program": name,
            "collective": kind,
            "between": "GPUs of a node" if within else "nodes",
            "times": f"{times[kind, within]:,}",
            "GB": f"{sent[kind, within] / 1e9:,.2f}",
        }
        for kind, within in sorted(sent, key=sent.__getitem__, reverse=True)
    ]


def on_paper(source: Training, moved: float, collectives: Sequence[Collective]) -> dict[str, str]:
    """A row of the table of what a step would take, where nothing slows it but what is counted."""
    again = 4 / 3 if source.config.model.remat == "full" else 1
    reached = roofline.PEAK_FLOPS * REACHED_FLOPS
    sent = {
        within: sum(c.sent for c in collectives if c.within(NODE) == within)
        for within in (True, False)
    }
    parts = {
        "products": source.flops * again / reached,
        "memory": moved / roofline.MEASURED_BANDWIDTH,
        "within nodes": sent[True] / (LINKS * REACHED_LINKS),
        "between nodes": sent[False] / (NETWORK * REACHED_NETWORK),
    }
    mesh = source.config.mesh
    gpus = mesh.data * mesh.expert * mesh.context
    return {
        "program": source.name,
        "GPUs": f"{gpus:,}",
        **{f"{name}, ms": f"{seconds * 1e3:,.0f}" for name, seconds in parts.items()},
        "tokens/s a GPU, one after the other": f"{source.tokens / sum(parts.values()):,.0f}",
        "all at once": f"{source.tokens / max(parts.values()):,.0f}",
        "reported": f"{REPORTED:,}" if gpus == 1024 else "",
    }


def page(
    programs: list[dict[str, str]], exchanges: list[dict[str, str]], papers: list[dict[str, str]]
) -> str:
    """The section of docs/programs.md."""
    return _PAGE.format(*map(roofline.plain_table, (programs, exchanges, papers)))


_PAGE = f"""
## Training on a cluster

The whole step that `zaya train` takes, of the 8B model: bfloat16 products, float32 master weights,
Muon, its state divided over all devices (ZeRO-1), router balancing, and each layer's forward pass
computed again for its gradient. Each GPU has 16,384 tokens of a step, all at once, as the authors'
1,024 had (16.8M tokens a step). A node has {NODE} GPUs. The state is donated: *arguments* are the
old state and the batch, and the new state takes the old one's place.

{{0}}
What each GPU sends in a step, by the way of computing a collective that sends least. Room for
tokens that are sent to experts counts as full: a GPU has room for all tokens of each GPU that it
exchanges with, so that none is dropped however they are routed. Where routing is even, one in as
many rows as there are GPUs on the expert axis holds a token.

{{1}}
### On paper

**Nothing of this has run.** What a step would take if each part went at a stated fraction of a
peak:

- *products*, those that are computed again included but not Muon's, at {REACHED_FLOPS} of
  1,307 TFLOP/s;
- *memory*, all bytes that kernels read and write, empty room included, at 4.33 TB/s, which others
  measured;
- what is sent *within nodes*, empty room included, at {REACHED_LINKS} of {LINKS / 1e9:.0f} GB/s
  (seven links of 64 GB/s, AMD's data sheet);
- *between nodes* at {REACHED_NETWORK} of {NETWORK / 1e9:.0f} GB/s (a card of 400 Gb/s for each GPU,
  as in the authors' cluster, arXiv 2511.17127), also where a part could stay within nodes.

The fractions are assumptions. Time that is lost to launches, to waiting for the busiest expert, to
data and to checkpoints is not in it. *Reported* is what the authors measured, all of that included,
with experts that were not spread over GPUs.

{{2}}"""
