"""Muon: momentum whose matrices are orthogonalised (Keller Jordan, "Muon: an optimizer for hidden
layers in neural networks", 2024), with updates as large as AdamW's (arXiv 2502.16982).

Our own and not `optax.contrib.muon`, which can take experts as batches of matrices and match the
RMS, but not use our kernel, split gate from up, iterate in bfloat16 on float32 momentum, or keep
whole matrices together on a mesh; it also turns the other parameters' AdamW into NAdam, and
corrects the momentum's bias under Nesterov, which PyTorch and Jordan do not.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pallas_kernels.newton_schulz.api import newton_schulz
from zaya_jax.parallel import by_matrices

RMS = 0.2  # of AdamW's updates, roughly


class MuonState(NamedTuple):
    """What is kept between steps."""

    momentum: Any  # float32, like the parameters; () without momentum


def scale_by_muon(
    momentum: float = 0.95,
    nesterov: bool = True,
    *,
    steps: int = 5,
    dtype: Any = jnp.bfloat16,
    parts: int = 1,
    mesh: Mesh | None = None,
    whole: bool = False,
    implementation: str | None = None,
) -> optax.GradientTransformation:
    """Gradients to orthogonal updates times 0.2 sqrt(max(rows, columns)), before the learning rate.

    Leaves are [..., rows, columns]: batches of matrices, each orthogonalised by itself.

    Args:
      momentum: m in M <- m M + (1 - m) G, in float32; with 0 nothing is kept.
      nesterov: orthogonalises m M + (1 - m) G instead of M.
      steps: Newton-Schulz iterations.
      dtype: in which they are computed, bfloat16 or float32.
      parts: matrices that stand one below the other in each matrix of a leaf: 2 for gate and up.
      mesh: of the arrays, which may be sharded in any way; leaves are as in `by_matrices`.
      whole: as in `by_matrices`: directions are then sent in `dtype`, not as float32 updates.
      implementation: of `newton_schulz`; None is the default.
    """

    def init(params: Any) -> MuonState:
        if not momentum:
            return MuonState(())
        return MuonState(jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params))

    def orthogonalize(x: jax.Array) -> jax.Array:
        *batch, height, columns = x.shape
        matrices = x.reshape(*batch, parts, height // parts, columns)
        return newton_schulz(matrices, steps, implementation=implementation).reshape(x.shape)

    def direction(gradient: jax.Array) -> jax.Array:
        moved = by_matrices(orthogonalize, gradient.astype(dtype), mesh, whole)
        height, columns = gradient.shape[-2:]
        return moved.astype(jnp.float32) * (RMS * max(height // parts, columns) ** 0.5)

    def update(gradients: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        def mixed(average: jax.Array, gradient: jax.Array) -> jax.Array:
            return momentum * average + (1 - momentum) * gradient.astype(jnp.float32)

        if not momentum:
            return jax.tree.map(direction, gradients), state
        average = jax.tree.map(mixed, state.momentum, gradients)
        looked_at = jax.tree.map(mixed, average, gradients) if nesterov else average
        return jax.tree.map(direction, looked_at), MuonState(average)

    return optax.GradientTransformation(init, update)
