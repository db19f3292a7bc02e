"""CCA mixing in Pallas: from projections to attention-ready queries, keys and values in one pass.

Shapes and symbols as in `reference`. A program takes some tokens, and the heads of one key head's
group, because QK-mean couples these; where tokens are few, as in decoding, one head of it.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.blocks import Blocks, blocks_for
from pallas_kernels.cca_mix import backward, columns, reference, value_shift
from pallas_kernels.cca_mix.heads import (
    Head,
    Inputs,
    Sizes,
    Tokens,
    consecutive,
    in_order,
    in_pairs,
    key,
    load,
    mixed,
    query,
    store,
    turn,
    unit_scale,
    whole,
)
from pallas_kernels.cca_mix.reference import Carry, Weights
from pallas_kernels.launch import launch, power_of_two

FORWARD, DECODE = "cca_mix", "cca_mix_decode"
DEFAULT = Blocks((64, 32))  # tokens, and input channels that are multiplied at once
DEFAULT_DECODE = Blocks((16, 32))
FEW = 512  # tokens, up to which a program takes one head of them


def cca_mix(
    q: jax.Array,
    k: jax.Array,
    current: jax.Array,
    delayed: jax.Array,
    weights: Weights,
    carry: Carry,
    new_lengths: jax.Array,
    age: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, Carry]:
    """As `reference.cca_mix`: no gradient flows to `cos` and `sin`, which are tables."""
    if q.size == 0:  # nothing to mix, but a carry to keep
        return reference.cca_mix(q, k, current, delayed, weights, carry, new_lengths, age, cos, sin)
    return _cca_mix(q, k, current, delayed, weights, carry, new_lengths, age, cos, sin)


@jax.custom_vjp
def _cca_mix(q, k, current, delayed, weights, carry, new_lengths, age, cos, sin):
    sizes = _sizes(q, k, weights, age, cos)
    inputs = _inputs(sizes, q, k, weights, carry, age, cos, sin)
    flat = _forward(sizes, inputs, current, delayed, weights, carry)
    mixed_q, mixed_k, v = (x.reshape(*q.shape[:2], -1, sizes.head_dim) for x in flat)
    tail = [columns.take(carry.conv_tail[..., : q.shape[-1]], q, new_lengths)]
    tail += [columns.take(carry.conv_tail[..., q.shape[-1] :], k, new_lengths)]
    value = columns.take(carry.delayed_value[:, None], delayed, new_lengths)[:, 0]
    return mixed_q, mixed_k, v, Carry(jnp.concatenate(tail, axis=-1), value)


def _cca_mix_forward(*args):
    return _cca_mix(*args), args


def _cca_mix_backward(args, cotangents):
    q, k, current, _, weights, carry, new_lengths, age, cos, sin = args
    of_q, of_k, of_v, of_carry = cotangents
    sizes = _sizes(q, k, weights, age, cos)
    inputs = _inputs(sizes, q, k, weights, carry, age, cos, sin)
    results = of_q.reshape(-1, q.shape[-1]), of_k.reshape(-1, k.shape[-1])
    dq, dk, of_tail, of_weights = backward.of_heads(
        sizes, inputs, *results, of_carry.conv_tail, new_lengths, weights
    )
    of_current, of_delayed, of_carried, of_initial = value_shift.gradients(
        sizes, of_v.reshape(-1, k.shape[-1]), of_carry.delayed_value, inputs.age, new_lengths
    )
    of_current, of_delayed = (x.reshape(current.shape) for x in (of_current, of_delayed))
    of_weights = of_weights._replace(initial_value=of_initial.astype(weights.initial_value.dtype))
    dq, dk, of_carry = dq.reshape(q.shape), dk.reshape(k.shape), Carry(of_tail, of_carried)
    return dq, dk, of_current, of_delayed, of_weights, of_carry, None, None, None, None


_cca_mix.defvjp(_cca_mix_forward, _cca_mix_backward)


def _sizes(q, k, weights, age, cos) -> Sizes:
    head_dim, k1 = weights.grouped.shape[1:]
    return Sizes(
        batch=q.shape[0],
        length=q.shape[1],
        heads=q.shape[-1] // head_dim,
        kv_heads=k.shape[-1] // head_dim,
        head_dim=head_dim,
        k0=weights.depthwise.shape[-1],
        k1=k1,
        half=cos.shape[-1],
        packed=age is not None,
        few=q.shape[0] * q.shape[1] <= FEW,
        eps=float(jnp.finfo(weights.temperature.dtype).eps),
    )


def _inputs(sizes, q, k, weights, carry, age, cos, sin) -> Inputs:
    """The arrays in the form that kernels see."""
    rows, channels = sizes.batch * sizes.length, weights.grouped.shape[0]
    matrices = weights.grouped.reshape(channels, -1)
    if not sizes.few:
        shape = -1, sizes.head_dim, sizes.head_dim, sizes.k1
        matrices = weights.grouped.reshape(shape).transpose(0, 3, 2, 1)
        matrices = matrices.reshape(-1, sizes.head_dim)
    # No kernel has an array without elements.
    tail = carry.conv_tail if sizes.tail else jnp.zeros((1, 1, channels))
    cos, sin = (x.reshape(rows, -1) if sizes.half else jnp.ones((1, 1)) for x in (cos, sin))
    return Inputs(
        q.reshape(rows, -1),
        k.reshape(rows, -1),
        tail.reshape(-1, channels),
        jnp.zeros(1, jnp.int32) if age is None else age.reshape(rows).astype(jnp.int32),
        cos,
        sin,
        weights.depthwise[:, 0],
        weights.depthwise_bias,
        matrices,
        weights.grouped_bias,
        weights.temperature,
    )


def _forward(
    sizes: Sizes,
    inputs: Inputs,
    current: jax.Array,
    delayed: jax.Array,
    weights: Weights,
    carry: Carry,
) -> Any:
    """q, k and v [B S, heads d], in the dtype of the temperature."""
    rows = sizes.batch * sizes.length
    values = (
        current.reshape(rows, -1),
        delayed.reshape(rows, -1),
        carry.delayed_value,
        weights.initial_value,
    )
    name, default = (DECODE, DEFAULT_DECODE) if sizes.few else (FORWARD, DEFAULT)
    dtype = weights.temperature.dtype
    (block, width), warps, stages = blocks_for(name, sizes[2:7], dtype, default)
    operands = (*inputs, *values)
    widths = inputs.q.shape[-1], inputs.k.shape[-1], inputs.k.shape[-1]
    return launch(
        partial(_mix, sizes=sizes, block=block, width=min(width, 2 * sizes.lanes)),
        tuple(jax.ShapeDtypeStruct((rows, w), dtype) for w in widths),
        name=name,
        grid=(pl.cdiv(rows, block), sizes.kv_heads, sizes.group + 1 if sizes.few else 1),
        in_specs=[whole(x.shape) for x in operands],
        out_specs=tuple(whole((rows, w)) for w in widths),
        warps=warps,
        stages=stages,
    )(*operands)


def _mix(*refs, sizes, block, width):
    inputs, values, outputs = Inputs(*refs[:11]), refs[11:15], refs[15:]
    here = consecutive(inputs.age, sizes, pl.program_id(0) * block, block)
    kv_head, member = pl.program_id(1), pl.program_id(2)
    put = partial(_put_head, inputs, outputs, sizes, here=here, width=width)

    def put_query(member):
        put(query(sizes, kv_head, member))

    def put_key_and_value():
        put(key(sizes, kv_head))
        _put_value(values, outputs[2], sizes, here, kv_head)

    if sizes.few:
        pl.when(member < sizes.group)(lambda: put_query(member))
        pl.when(member == sizes.group)(put_key_and_value)
    else:
        jax.lax.fori_loop(0, sizes.group, lambda member, _: put_query(member), None)
        put_key_and_value()


def _put_head(inputs, outputs, sizes, head: Head, here: Tokens, width):
    first, second = mixed(inputs, sizes, head, here, width)
    _, scale = unit_scale(sizes, first, second)
    if head.is_key:
        scale = scale * inputs.temperature[head.kv_head].astype(jnp.float32)
    cos, sin = turn(inputs, sizes, here)
    first, second = first * scale, second * scale
    turned = first * cos - second * sin, second * cos + first * sin
    for channels, part in zip(in_pairs(sizes), turned, strict=True):
        store(outputs[head.is_key], sizes, head.place(sizes), here, channels, part)


def _put_value(refs, out_ref, sizes, here, kv_head):
    """The first half of all value channels is the token's own, the second that of the one
    before."""
    current_ref, delayed_ref, carried_ref, initial_ref = refs
    width = power_of_two(sizes.head_dim, 2 * sizes.head_dim)
    channels, half = in_order(sizes, 0, width), sizes.kv_heads * sizes.head_dim // 2
    number = kv_head * sizes.head_dim + channels.number
    own, shifted = channels.real & (number < half), channels.real & (number >= half)
    index, inside = here.at(sizes)
    before, known = here.at(sizes, 1)
    initial = triton.load(initial_ref.at[number - half], mask=shifted, other=0)
    first = (inside & (here.position == 0))[:, None] & shifted[None, :]
    rows = jnp.broadcast_to(here.row, index.shape)
    carried = load(carried_ref, rows, number - half, first)
    previous = load(delayed_ref, before, number - half, known[:, None] & shifted[None, :])
    previous = jnp.where(first, carried, previous)
    previous = jnp.where(here.see(1)[:, None], previous, initial.astype(jnp.float32)[None, :])
    value = load(current_ref, index, number, inside[:, None] & own[None, :])
    value = jnp.where(own[None, :], value, previous)
    store(out_ref, sizes, kv_head, here, channels, value)
