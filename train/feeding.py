"""Batches on the devices of a mesh, and the loss of held-out ones."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from train.data.batch import Batch
from train.data.batches import Plan, held_out
from train.gradients import negative_log_likelihood
from train.setup import Setup
from zaya_jax.model import Params
from zaya_jax.sharding import BATCH


def to_devices(plan: Plan, mesh: Mesh) -> Batch:
    """A batch on the devices of a mesh; only rows that this process's devices hold are read."""
    sharding = NamedSharding(mesh, BATCH)
    shape = len(plan), plan.length
    held = sharding.addressable_devices_indices_map(shape).values()
    spans = {_span(index, len(plan)) for index in held}
    parts = {span: plan.rows(range(*span)) for span in spans}

    def array(field: str) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            columns = slice(None) if index is None else index[1]
            rows: np.ndarray = getattr(parts[_span(index, len(plan))], field)
            return rows[:, columns]

        return jax.make_array_from_callback(shape, sharding, part)

    return Batch(*map(array, Batch._fields))


def _span(index: tuple[slice, ...] | None, rows: int) -> tuple[int, int]:
    first, last, _ = (slice(None) if index is None else index[0]).indices(rows)
    return first, last


def held_out_evaluation(setup: Setup) -> Callable[[Params], dict[str, float]] | None:
    """Held-out loss, perplexity and bits per byte, as a function of the parameters; None where the
    configuration names no data. Every learned token counts once, whatever its weight."""
    config = setup.config
    if config.evaluation.data is None:
        return None
    data = held_out(
        config.evaluation.data,
        setup.tokenizer,
        setup.model,
        rows=config.rows // config.accumulate,  # as many as fit, as far as the run says
        length=config.context,
        examples=config.evaluation.examples,
    )

    @jax.jit
    def sums(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return negative_log_likelihood(
            params,
            setup.model,
            batch._replace(weights=(batch.weights > 0).astype(jnp.float32)),
            setup.mesh,
            compute_dtype=jnp.dtype(config.compute_dtype),
            full_sharding=config.mesh.full_sharding,
        )

    def evaluate(params: Params) -> dict[str, float]:
        found = [jax.device_get(sums(params, to_devices(p, setup.mesh))) for p in data]
        nats, weight = np.sum(np.asarray(found, np.float64), axis=0)
        return {
            "held_out_loss": nats / weight,
            "held_out_perplexity": float(np.exp(nats / weight)),
            "bits_per_byte": nats / data.bytes / np.log(2),
        }

    return evaluate
