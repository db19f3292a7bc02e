"""ZAYA: embed -> layers -> head. The only file that knows the order of things.

Parameters are a dict of two collections, "params" and "balancing" (the routers' balancing biases),
whose leaves follow the Hugging Face names; see `convert.mapping`.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from pallas_kernels.norm import api as norm
from zaya_jax.attention import Attention, GroupedQueryAttention, Tokens
from zaya_jax.config import SLIDING, ZayaConfig
from zaya_jax.errors import InputError
from zaya_jax.layers import (
    INIT,
    ResidualScaling,
    Scale,
    linear,
    parameter,
    rotary_table,
)
from zaya_jax.moe import BALANCING, MoE
from zaya_jax.parallel import (
    by_rows,
    context_size,
    gather_sequence,
    gathered,
    own_start,
    rematerialized,
)
from zaya_jax.state import DecodeState, LayerState

Params = dict[str, Any]


class Output(NamedTuple):
    """Result of `forward` for tokens [B, S]."""

    hidden: jax.Array  # float32 [B, S, D], after the final norm
    state: DecodeState | None  # None where none was given
    experts: jax.Array  # uint8 [B, S, L]; E is the skip class, 255 stands for padding
    expert_counts: jax.Array  # int32 [L, E + 1], padding excluded


class Layer(nn.Module):
    """One ZAYA layer: CCA attention, then mixture of experts, each joined to the stream by residual
    scaling; or plain forms of these (`ZayaConfig`)."""

    config: ZayaConfig
    first: bool = False

    def setup(self) -> None:
        size = self.config.hidden_size
        plain = self.config.attention == "gqa"
        self.input_layernorm = Scale(size)
        self.self_attn = GroupedQueryAttention(self.config) if plain else Attention(self.config)
        self.post_attention_layernorm = Scale(size)
        self.mlp = MoE(self.config, self.first)
        if self.config.residual_scaling:
            self.post_attention_residual_scale = ResidualScaling(size)
            self.post_mlp_residual_scale = ResidualScaling(size)

    def __call__(
        self,
        h: jax.Array,
        router_state: jax.Array | None,
        tokens: Tokens,
        rotary: tuple[jax.Array, jax.Array],
        window: int | jax.Array | None = None,
        state: LayerState | None = None,
        forced: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None, LayerState | None, jax.Array]:
        eps, scaling = self.config.rms_norm_eps, self.config.residual_scaling
        x = norm.rms_norm(h, self.input_layernorm(), eps)
        a, state = self.self_attn(x, tokens, rotary, window, state)
        if scaling:
            kernels = self.config.kernels
            join = partial(norm.scale_residual_and_norm, eps=eps, implementation=kernels)
            vectors = *self.post_attention_residual_scale(), self.post_attention_layernorm()
            h, x = by_rows(lambda rows, shared: join(*rows, *shared), (a, h), vectors, kernels)
        else:
            h = h + a
            x = norm.rms_norm(h, self.post_attention_layernorm(), eps)
        m, router_state, experts = self.mlp(x, router_state, tokens.valid, forced)
        h = norm.scale_residual(m, h, *self.post_mlp_residual_scale()) if scaling else h + m
        return h, router_state, state, experts


class Ends(nn.Module):
    """What lies around the layers: the embedding, the final norm, and the head."""

    config: ZayaConfig

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = Weight((c.vocab_size, c.hidden_size))
        if c.residual_scaling:
            scale, bias = nn.initializers.ones, nn.initializers.zeros
            size = (c.hidden_size,)
            self.input_hidden_states_scale = self.param("input_hidden_states_scale", scale, size)
            self.input_hidden_states_bias = self.param("input_hidden_states_bias", bias, size)
        self.norm = Scale(c.hidden_size)
        self.lm_head = Head(c)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.head(self.final_norm(self.embed(tokens)))

    def embed(self, tokens: jax.Array) -> jax.Array:
        h = self.embed_tokens()[tokens].astype(jnp.float32)
        if not self.config.residual_scaling:
            return h
        h = h + self.input_hidden_states_bias.astype(jnp.float32)
        return h * self.input_hidden_states_scale.astype(jnp.float32)

    def final_norm(self, h: jax.Array) -> jax.Array:
        return norm.rms_norm(h, self.norm(), self.config.rms_norm_eps)

    def head(self, hidden: jax.Array) -> jax.Array:
        return self.lm_head(hidden, self.embed_tokens())


class Weight(nn.Module):
    """A matrix by itself."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("weight", INIT, self.shape)


class Head(nn.Module):
    """Hidden states to logits, with its own weight or the embedding's, and maybe a bias."""

    config: ZayaConfig

    @nn.compact
    def __call__(self, hidden: jax.Array, embedding: jax.Array) -> jax.Array:
        weight, bias = embedding, None
        if not self.config.tie_word_embeddings or self.has_variable("params", "weight"):
            weight = parameter(self, "weight", INIT, embedding.shape)
        if self.config.lm_head_bias:
            bias = self.param("bias", nn.initializers.zeros, embedding.shape[:1])
        return linear(hidden, weight, bias)


def init(config: ZayaConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Fresh parameters in canonical form, as the authors initialise them (temperatures 1); biases
    stay float32."""
    ends_key, *layer_keys = jax.random.split(key, config.num_hidden_layers + 1)
    tokens = jnp.zeros((1, 1), jnp.int32)
    ends = Ends(config).init(ends_key, tokens)["params"]
    h = jnp.zeros((1, 1, config.hidden_size))
    router_state = jnp.zeros((1, 1, config.router_hidden_size))
    where = place_tokens(tokens)
    rotary = rotary_table(tokens, config.head_dim, config.rope)
    layers = [
        Layer(config, first=i == 0).init(layer_key, h, router_state, where, rotary)
        for i, layer_key in enumerate(layer_keys)
    ]
    params = {**ends, "layers": tuple(layer["params"] for layer in layers)}
    return {
        "params": jax.tree.map(lambda x: x.astype(dtype), params),
        BALANCING: {"layers": tuple(layer[BALANCING] for layer in layers)},
    }


def parameter_counts(config: ZayaConfig) -> tuple[int, int]:
    """All trained parameters, and those that one token uses, embedding and untied head excluded."""
    layers = min(config.num_hidden_layers, 2)  # all but the first are alike
    short = dataclasses.replace(
        config, num_hidden_layers=layers, layer_types=config.layer_types[:layers]
    )
    tree = jax.eval_shape(partial(init, short), jax.random.key(0))["params"]

    def size(part: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(part))

    total = size(tree) + (config.num_hidden_layers - layers) * size(tree["layers"][-1])
    tables = size([tree["embed_tokens"], tree.get("lm_head")])
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = config.num_hidden_layers * (config.num_experts - 1) * expert
    return total, total - tables - idle


def init_state(params: Params, config: ZayaConfig, batch: int, capacity: int) -> DecodeState:
    """The state before a first token, with room for `capacity` tokens in each of `batch` rows.
    Raises `ConfigError` where the model is no ZAYA."""
    config.check_is_zaya()
    layers: list[Any] = [
        Attention(config).apply(
            {"params": layer["self_attn"]}, batch, capacity, method="initial_state"
        )
        for layer in _unstacked(params["params"]["layers"])
    ]
    return DecodeState.from_layers(layers, jnp.zeros(batch, jnp.int32))


def forward(
    params: Params,
    config: ZayaConfig,
    tokens: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    new_lengths: jax.Array | None = None,
    state: DecodeState | None = None,
    forced_experts: jax.Array | None = None,
) -> Output:
    """Runs tokens through the model: prefill, decoding, scoring and training differ only in what
    they pass.

    Args:
      params: canonical (a tuple of layers) or stacked (`layouts.stack`: runs as a scan, which
        compiles faster).
      config: the architecture; static under `jax.jit`.
      tokens: int32 [B, S].
      segment_ids: int32 [B, S] of packed rows: 0 is padding, other ids contiguous runs, not reused
        in a row. Every segment behaves as if it ran alone. Exclusive with `state` and
        `new_lengths`; needed where devices share rows (inside a `shard_map` over context).
      positions: int32 [B, S] for the rotary embedding; by default those of the row or segment.
      new_lengths: int32 [B], real tokens of this call in each right-padded row; 0 leaves a row's
        state untouched.
      state: of the tokens before. A row without room for its new ones gets NaN as hidden states.
      forced_experts: uint8 [B, S, L], experts to use instead of the routers' choices; 255 leaves
        one free. A number that is no class gives NaN.

    Raises:
      InputError: `segment_ids` beside `state` or `new_lengths`.
      ConfigError: `state` where the model is no ZAYA.

    Returns:
      `Output`. Logits are `head(params, config, hidden)` of the positions that need them.
    """
    if segment_ids is not None and (state is not None or new_lengths is not None):
        raise InputError("segment_ids cannot be combined with state or new_lengths")
    if state is not None:
        config.check_is_zaya()
    if segment_ids is None and context_size() > 1:
        raise InputError("a sequence that is spread over devices needs segment_ids")
    lengths = None if state is None else state.lengths
    where = place_tokens(tokens, segment_ids, new_lengths, lengths)
    if positions is None:
        index = where.offsets[:, None] + jnp.arange(tokens.shape[1])
        positions = index if where.age is None else where.age
    rotary = rotary_tables(positions, config)
    h = apply_ends(params, config, "embed", tokens)
    run = _run_layers if isinstance(params["params"]["layers"], tuple) else _scan_layers
    h, layers, experts = run(params, config, h, where, rotary, state, forced_experts)
    hidden = apply_ends(params, config, "final_norm", h)
    if state is not None:
        lengths = where.offsets + where.new_lengths
        fits = lengths <= state.capacity
        hidden = jnp.where(fits[:, None, None], hidden, jnp.nan)  # compiled code cannot raise
        state = DecodeState.from_layers(layers, lengths)
    classes = jnp.arange(config.num_experts + 1, dtype=experts.dtype)
    counts = jax.vmap(lambda e: jnp.sum(e[..., None] == classes, axis=(0, 1)), in_axes=2)(experts)
    return Output(hidden, state, experts, counts.astype(jnp.int32))


def head(params: Params, config: ZayaConfig, hidden: jax.Array) -> jax.Array:
    """Logits of hidden states: float32 [..., D] -> float32 [..., V]."""
    return apply_ends(params, config, "head", hidden)


def place_tokens(
    tokens: jax.Array,
    segment_ids: jax.Array | None = None,
    new_lengths: jax.Array | None = None,
    lengths: jax.Array | None = None,
) -> Tokens:
    """Where the tokens [B, S] of one call stand; the arguments are those of `forward`, with the
    state's `lengths`."""
    batch, length = tokens.shape
    offsets = jnp.zeros(batch, jnp.int32) if lengths is None else lengths
    if segment_ids is not None:
        start = own_start(length)
        row = gather_sequence(segment_ids, axis=1)
        index = jnp.arange(row.shape[1])
        before = jnp.pad(row[:, :-1], ((0, 0), (1, 0)))
        begins = (row != before) | (index == 0)
        age = index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
        age = jax.lax.dynamic_slice_in_dim(age, start, length, axis=1)
        return Tokens(segment_ids != 0, offsets + start, jnp.full(batch, length), row, age)
    if new_lengths is None:
        new_lengths = jnp.full(batch, length, jnp.int32)
    valid = jnp.arange(length) < new_lengths[:, None]
    return Tokens(valid, offsets, new_lengths, None, None)


def rotary_tables(
    positions: jax.Array, config: ZayaConfig
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The rotary table of each layer type, for positions [B, S]."""
    return {
        kind: rotary_table(positions, config.head_dim, config.layer_rope(kind))
        for kind in dict.fromkeys(config.layer_types)
    }


def apply_ends(params: Params, config: ZayaConfig, method: str, x: jax.Array) -> jax.Array:
    """One of the methods of `Ends`: "embed" [B, S], "final_norm" or "head" [B, S, D]. Of `params`,
    only what `ends_params` gives is needed."""
    return cast(jax.Array, Ends(config).apply(ends_params(params), x, method=method))


def ends_params(params: Params) -> Params:
    """The variables around the layers."""
    ends = {name: leaf for name, leaf in params["params"].items() if name != "layers"}
    return {"params": ends}


def apply_layer(
    layer: Params,
    config: ZayaConfig,
    kind: str,
    first: bool,
    h: jax.Array,
    router_state: jax.Array | None,
    where: Tokens,
    rotary: tuple[jax.Array, jax.Array],
    state: LayerState | None,
    forced: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None, LayerState | None, jax.Array]:
    """One layer of an unstacked tree, of attention type `kind`.

    Takes what `layer_params` gives, the stream [B, S, D] and the router state [B, S, R]; returns
    both behind the layer, its new state, and the experts uint8 [B, S].
    """
    window = config.layer_window(kind)
    out: Any = Layer(config, first).apply(
        layer, h, router_state, where, rotary, window, state, forced
    )
    return out


def layer_params(params: Params, index: int) -> Params:
    """The variables of one layer of an unstacked tree."""
    return {name: params[name]["layers"][index] for name in ("params", BALANCING)}


def _run_layers(params, config, h, where, rotary, state, forced):
    """Layers one after the other: each is compiled, and may differ from the others."""
    states = [None] * config.num_hidden_layers if state is None else state.layers()
    router_state, chosen = None, []
    for i, kind in enumerate(config.layer_types):
        h, router_state, states[i], experts = apply_layer(
            layer_params(params, i),
            config,
            kind,
            i == 0,
            h,
            router_state,
            where,
            rotary[kind],
            states[i],
            None if forced is None else forced[..., i],
        )
        chosen.append(experts)
    return h, states, jnp.stack(chosen, axis=-1)


def _scan_layers(params, config, h, where, rotary, state, forced):
    """Stacked layers as one scan: compiled once; layers of both attention types choose theirs by
    number."""
    kinds = list(rotary)
    mixed = len(kinds) == 2

    def step(carry, layer):
        h, router_state = carry
        variables, kind, layer_state, layer_forced = layer
        table, window = rotary[kinds[0]], config.layer_window(kinds[0])
        if mixed:
            pick = partial(jnp.where, kind)
            table = jax.tree.map(pick, rotary[SLIDING], rotary[kinds[1 - kinds.index(SLIDING)]])
            window = jnp.where(kind, config.sliding_window, jnp.iinfo(jnp.int32).max)
        out: Any = Layer(config).apply(
            gathered(variables), h, router_state, where, table, window, layer_state, layer_forced
        )
        h, router_state, layer_state, experts = out
        return (h, router_state), (layer_state, experts)

    variables = {"params": params["params"]["layers"], BALANCING: params[BALANCING]["layers"]}
    sliding = jnp.array([kind == SLIDING for kind in config.layer_types])
    layers = None if state is None else jax.tree.map(lambda *x: jnp.stack(x), *state.layers())
    forced = None if forced is None else jnp.moveaxis(forced, -1, 0)
    router_state = jnp.zeros((*h.shape[:-1], config.router_hidden_size))
    (h, _), (layers, experts) = jax.lax.scan(
        rematerialized(step, config.remat, variables),
        (h, router_state),
        (variables, sliding, layers, forced),
    )
    return h, None if state is None else _unstacked(layers), jnp.moveaxis(experts, 0, -1)


def _unstacked(layers: Any) -> Any:
    """A sequence of layers from either form."""
    if isinstance(layers, tuple) and not isinstance(layers, LayerState):
        return layers
    count = jax.tree.leaves(layers)[0].shape[0]
    return [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count)]
