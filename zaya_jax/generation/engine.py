"""Everything around the generation core: prompts in, continuations out."""

import contextlib
import time
from collections import Counter, deque
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from zaya_jax.allocation import keep_freed_memory
from zaya_jax.compilation import use_persistent_cache
from zaya_jax.config import ZayaConfig
from zaya_jax.errors import InputError
from zaya_jax.generation.batching import MAX_CHUNK, bucket, check_cuts, check_tokens, pad_rows
from zaya_jax.generation.reading import Reader, in_reading_order
from zaya_jax.generation.rows import Generation, Interrupted, OnText, Prefix, Row
from zaya_jax.generation.sampling import Request, Sampling
from zaya_jax.generation.step import Block, decode_block, insert_rows, prefill_chunk
from zaya_jax.layouts import for_cpu, is_for_cpu
from zaya_jax.model import Params, init_state
from zaya_jax.sharding import rows_sharding
from zaya_jax.state import DecodeState
from zaya_jax.text.tokenizer import Tokenizer

BLOCK = 8  # tokens decoded between two looks at the rows
BATCH = 16  # rows decoded at once, where there are more prompts


class Engine:
    """A model made ready to generate.

    Prompts are read one by one, each in chunks of fixed sizes, and decoded together; a row that
    finishes makes room for the next prompt. Equal prompts are read once. What comes out for a
    prompt depends on it, its settings, the seed, and on how many equal requests came before it: in
    batches of one size, bit for bit.

    Args:
      params: canonical (on the CPU a copy `for_cpu` is made), `for_cpu`, or stacked (which runs
        each block as one program).
      config: the architecture.
      tokenizer: for text, stop strings and streaming.
      mesh: of the parameters; the rows are spread over its `data` axis.
    """

    def __init__(
        self,
        params: Params,
        config: ZayaConfig,
        tokenizer: Tokenizer | None = None,
        mesh: Mesh | None = None,
    ):
        use_persistent_cache()
        if jax.default_backend() == "cpu":
            keep_freed_memory()
        canonical = isinstance(params["params"]["layers"], tuple) and not is_for_cpu(params)
        if canonical and mesh is None and jax.default_backend() == "cpu":
            params = for_cpu(params, config)
        self.params, self.config, self.tokenizer, self.mesh = params, config, tokenizer, mesh

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        on_text: OnText | None = None,
        *,
        batch_size: int | None = None,
        prefix: Prefix | None = None,
        keep: bool = False,
        cuts: Sequence[Sequence[int]] | None = None,
        share: bool = True,
        capacity: int | None = None,
    ) -> list[Generation]:
        """Continues every prompt.

        Args:
          prompts: token ids.
          sampling: of all prompts, or of each.
          on_text: called with a prompt's number and each new piece of its text, whole characters
            only.
          batch_size: rows decoded at once, made a power of two; by default as many as there are
            prompts, at most 16.
          prefix: read before; prompts that begin with it are read from its end on.
          keep: gives each result its `end`, as a prefix for what follows it.
          cuts: of each prompt, ascending, lengths of beginnings that other prompts may have too,
            token for token: each is read once. No chunk crosses a cut, so that sharing changes no
            bit of what comes out.
          share: False reads every prompt on its own, at the same cuts.
          capacity: tokens that a row has room for, prompt included; by default the next power of
            two that holds the longest.

        Raises:
          InputError: an empty prompt, an unknown token, a prompt that fills the context or leaves
            no room in the capacity, stop strings without tokenizer, not one `sampling` for each
            prompt, or cuts that are none.
          Interrupted: on Ctrl-C, with the results so far.
        """
        rows = self._rows(prompts, sampling, cuts)
        if not rows:
            return []
        slots = self._slots(batch_size, len(rows))
        longest = max(len(row.prompt) + row.budget for row in rows)
        if capacity is None:
            capacity = bucket(longest, 64)
        elif capacity < longest:
            raise InputError(f"the capacity of {capacity} must hold {longest} tokens")
        reader = Reader(lambda tokens, start: self.read(tokens, capacity, start), prefix, share)
        try:
            with self._on_mesh():
                self._run(rows, slots, capacity, on_text, reader, keep)
        except KeyboardInterrupt:
            raise Interrupted([row.result() for row in rows]) from None
        return [row.result() for row in rows]

    def read(self, tokens: Sequence[int], capacity: int, prefix: Prefix | None = None) -> Prefix:
        """Prefills one row with room for `capacity` tokens, from the end of `prefix` where the
        tokens begin with it."""
        tokens = list(tokens)
        if prefix is None or tokens[: len(prefix.tokens)] != prefix.tokens:
            prefix = self._nothing(capacity)
        state = prefix.state.resize(capacity)
        logits, experts = prefix.last_logits, list(prefix.experts)
        with self._on_mesh():
            for start in range(len(prefix.tokens), len(tokens), MAX_CHUNK):
                part = tokens[start : start + MAX_CHUNK]
                padded = pad_rows([part], bucket(len(part), 16), self.config.pad_token_id)
                out = prefill_chunk(self.params, self.config, *padded, state)
                logits, state = out.last_logits, out.state
                experts.extend(np.asarray(out.experts)[0, : len(part)])
        return Prefix(tokens, state, logits, experts)

    def warmup(
        self, batch_size: int = 1, prompt_tokens: int = 64, max_new_tokens: int = 256
    ) -> float:
        """Compiles what prompts of up to `prompt_tokens` and answers of up to `max_new_tokens` need
        in batches of that size. Returns the seconds it took."""
        start = time.perf_counter()
        capacity = bucket(prompt_tokens + max_new_tokens, 64)
        chunk = bucket(min(prompt_tokens, MAX_CHUNK), 16)
        while chunk >= 16:
            read = self.read([0] * chunk, max(capacity, chunk))
            chunk //= 2
        slots = self._slots(batch_size, 1)
        slots[0] = Row(0, 0, read.tokens, self.config, Sampling(max_new_tokens=2), None)
        with self._on_mesh():
            state, logits = self._place(*self._empty(len(slots), capacity), 0, read)
            request = _request(slots)
            block = decode_block(self.params, self.config, state, logits, request, BLOCK)
            jax.block_until_ready(block.last_logits)
        return time.perf_counter() - start

    def _run(
        self,
        rows: list[Row],
        slots: list[Row | None],
        capacity: int,
        on_text: OnText | None,
        reader: Reader,
        keep: bool,
    ) -> None:
        """Continuous batching: fills free slots with waiting rows, decodes a block, and again."""
        waiting = deque(in_reading_order(rows))
        state, logits = self._empty(len(slots), capacity)
        while waiting or any(slots):
            while waiting and None in slots:
                row = waiting.popleft()
                read = reader.read(row, waiting[0] if waiting else None)
                row.start(read.experts)
                if row.finish is None:
                    slot = slots.index(None)
                    slots[slot] = row
                    state, logits = self._place(state, logits, slot, read)
            if not any(slots):
                continue
            request = _request(slots)
            block = decode_block(self.params, self.config, state, logits, request, BLOCK)
            state, logits = block.state, block.last_logits
            self._take(block, slots, on_text)
            for slot, done in enumerate(slots):
                if done is not None and done.finish is not None:
                    if keep:
                        done.keep(slot, state, logits)
                    slots[slot] = None

    @staticmethod
    def _take(block: Block, slots: list[Row | None], on_text: OnText | None) -> None:
        """Gives each row its part of a block."""
        kinds = (block.tokens, block.logprobs, block.sampled_logprobs, block.experts)
        parts = list(zip(*jax.device_get(kinds), strict=True))
        remaining = np.asarray(block.request.remaining)
        for slot, row in enumerate(slots):
            if row is not None:
                row.extend(parts[slot], int(remaining[slot]), on_text)

    def _rows(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        cuts: Sequence[Sequence[int]] | None = None,
    ) -> list[Row]:
        prompts = check_tokens(prompts, self.config)
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(each) != len(prompts):
            raise InputError(f"{len(prompts)} prompts have {len(each)} sampling settings")
        if self.tokenizer is None and any(one.stop for one in each):
            raise InputError("stop strings need a tokenizer, which this checkpoint has not")
        parts = check_cuts(cuts, prompts)
        rows: list[Row] = []
        seen: Counter[tuple[int, ...]] = Counter()
        for number, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
            request = (one.seed, *prompt)
            row = Row(number, seen[request], prompt, self.config, one, self.tokenizer)
            row.ends = parts[number]
            rows.append(row)
            seen[request] += 1
        return rows

    def _slots(self, batch_size: int | None, rows: int) -> list[Row | None]:
        """Empty places for rows: a power of two, as in other numbers the last place is computed by
        other instructions, which round differently; and a multiple of the mesh's data axis."""
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        count = bucket(min(rows, BATCH) if batch_size is None else batch_size)
        size = 1 if self.mesh is None else self.mesh.shape["data"]
        return [None] * (-(-count // size) * size)

    def _on_mesh(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _empty(self, batch: int, capacity: int) -> tuple[DecodeState, jax.Array]:
        """State and logits of rows without tokens, spread over the mesh."""
        empty = (
            init_state(self.params, self.config, batch, capacity),
            jnp.zeros((batch, self.config.vocab_size)),
        )
        return (
            empty if self.mesh is None else jax.device_put(empty, rows_sharding(self.mesh, batch))
        )

    def _nothing(self, capacity: int) -> Prefix:
        return Prefix([], *self._empty(1, capacity), [])

    def _place(
        self, state: DecodeState, logits: jax.Array, slot: int, read: Prefix
    ) -> tuple[DecodeState, jax.Array]:
        """A copy of what was read in that slot."""
        rows = np.array([slot], np.int32)
        return insert_rows(state, rows, read.state), logits.at[rows].set(read.last_logits)


def _request(slots: Sequence[Row | None]) -> Request:
    """The settings of the rows in their slots; empty ones have nothing to sample."""
    idle = Sampling(max_new_tokens=0, temperature=0, top_p=1)
    settings = [idle if row is None else row.sampling for row in slots]
    stops = [sorted(row.stop_tokens) if row is not None else [] for row in slots]
    stop_tokens, _ = pad_rows(stops, bucket(max(map(len, stops)), 4), -1)

    def column(name: str, dtype: type[np.generic]) -> np.ndarray:
        return np.array([getattr(one, name) for one in settings], dtype)

    columns = (
        np.array([0 if row is None else row.request_id for row in slots], np.int32),
        column("seed", np.uint32),
        column("temperature", np.float32),
        column("top_p", np.float32),
        column("top_k", np.int32),
        column("min_p", np.float32),
        stop_tokens,
        np.array([0 if row is None else row.remaining for row in slots], np.int32),
    )
    return Request(*map(jnp.asarray, columns))
