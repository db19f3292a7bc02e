"""The LM head's cross-entropy at the sizes of real models."""

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import Blocks
from pallas_kernels.cross_entropy import kernel
from pallas_kernels.cross_entropy.reference import CrossEntropy, product
from pallas_kernels.rocm.cases import TOKENS, Case, Sizes

CANDIDATES = {
    name: [
        Blocks((64, 128, 64), 4, 1),
        Blocks((128, 64, 64), 4, 2),
        Blocks((128, 128, 32), 4, 2),
        Blocks((128, 128, 64), 4, 1),
        Blocks((128, 128, 64), 4, 2),
        Blocks((128, 128, 64), 8, 2),
        Blocks((128, 256, 64), 8, 2),
        Blocks((256, 128, 32), 8, 2),
        Blocks((256, 128, 64), 8, 2),
    ]
    for name in (kernel.FORWARD, kernel.BACKWARD)
}


def with_all_logits(hidden: jax.Array, weight: jax.Array, targets: jax.Array) -> CrossEntropy:
    """What one would write without the op: float32 [T, V] in memory."""
    logits = product(hidden, weight)
    normalizer = jax.nn.logsumexp(logits, axis=1)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return CrossEntropy(chosen - normalizer, normalizer)


def cases(sizes: Sizes) -> list[Case]:
    args = (
        jax.ShapeDtypeStruct((TOKENS, sizes.hidden), jnp.float32),
        jax.ShapeDtypeStruct((sizes.vocabulary, sizes.hidden), jnp.bfloat16),
        jax.ShapeDtypeStruct((TOKENS,), jnp.int32),
    )
    ours, theirs = kernel.cross_entropy, with_all_logits
    targets = {2: (0, sizes.vocabulary)}
    flops = 2.0 * TOKENS * sizes.hidden * sizes.vocabulary
    return [
        Case("cross_entropy forward", ours, theirs, args, flops, integers=targets),
        Case.training("cross_entropy training", ours, theirs, args, 3 * flops, targets),
    ]
