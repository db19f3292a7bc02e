"""Continuous batching around the generation core: what requests share, and what they must not."""

import dataclasses
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ODD, TINY, assert_close, random_params, random_tokens, run, run_head

import zaya_jax
from zaya_jax import InputError, Interrupted, Sampling, Zaya, init_state
from zaya_jax.generation import engine as engine_module
from zaya_jax.generation.step import decode_block, prefill_chunk
from zaya_jax.layouts import for_cpu, is_for_cpu, split_experts

MODEL = Zaya(random_params(TINY), dataclasses.replace(TINY, eos_token_ids=(0,)))
PROMPTS = [random_tokens(n, n).tolist() for n in (9, 1, 30, 17, 4)]


def outcome(result):
    return result.tokens, result.logprobs, result.sampled_logprobs, result.experts.tolist()


def test_a_request_is_repeated_bit_for_bit_whatever_else_is_in_the_batch():
    """Other neighbours, other slots, later admission, another place in the list."""
    settings = dict(max_new_tokens=20, seed=5, top_k=40, batch_size=4)
    alone = [outcome(MODEL.generate([prompt], **settings)[0]) for prompt in PROMPTS]
    assert [outcome(r) for r in MODEL.generate(PROMPTS, **settings)] == alone
    backwards = MODEL.generate([*PROMPTS[::-1], [7, 7, 7]], **settings)
    assert [outcome(r) for r in backwards[:5]] == alone[::-1]


def test_rows_are_replaced_as_they_finish():
    """Seven requests of different lengths in two slots take fewer blocks than in turns of two."""
    lengths = [3, 40, 3, 3, 3, 3, 3]
    prompts = [random_tokens(50 + i, 6).tolist() for i in range(7)]
    each = [Sampling(max_new_tokens=n, temperature=0) for n in lengths]
    calls = []

    def counted(*arguments):
        calls.append(1)
        return decode_block(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "decode_block", counted)
        results = MODEL.engine.run(prompts, each, batch_size=2)
    assert [len(r.tokens) for r in results] == lengths
    assert len(calls) == 6  # the long one takes five, the others run beside it but one


def test_samples_of_one_prompt_share_its_prefill_and_differ(monkeypatch):
    reads = []

    def counted(*arguments):
        reads.append(1)
        return prefill_chunk(*arguments)

    monkeypatch.setattr(engine_module, "prefill_chunk", counted)
    results = MODEL.generate([PROMPTS[0], PROMPTS[1]] * 6, 8, batch_size=4)
    assert len(reads) == 2
    assert len({tuple(r.tokens) for r in results[::2]}) > 3
    again = MODEL.generate([PROMPTS[0]] * 6, 8, batch_size=4)
    assert [outcome(r) for r in again] == [outcome(r) for r in results[::2]]


def test_every_request_may_have_its_own_seed():
    prompts = [PROMPTS[0]] * 2
    a, b = MODEL.generate(prompts, 12, seed=[3, 4], batch_size=2)
    assert a.tokens == MODEL.generate(prompts, 12, seed=3, batch_size=2)[0].tokens
    assert b.tokens == MODEL.generate(prompts, 12, seed=4, batch_size=2)[0].tokens
    assert a.tokens != b.tokens
    with pytest.raises(InputError, match="2 prompts have 3 sampling settings"):
        MODEL.generate(prompts, 12, seed=[1, 2, 3])


def test_a_stop_token_ends_the_answer_and_belongs_to_it():
    (free,) = MODEL.generate([PROMPTS[0]], 12, temperature=0)
    stop = free.tokens[5]
    (result,) = MODEL.generate([PROMPTS[0]], 12, temperature=0, stop_tokens=[stop])
    assert result.tokens == free.tokens[: free.tokens.index(stop) + 1]
    assert result.finish_reason == "stop"


def test_no_tokens_and_no_prompts_are_answered_as_asked():
    assert MODEL.generate([]) == []
    (none, some) = MODEL.engine.run(
        PROMPTS[:2], [Sampling(max_new_tokens=0), Sampling(max_new_tokens=2)]
    )
    assert none.tokens == [] and none.finish_reason == "length" and none.experts.shape == (9, 2)
    assert len(some.tokens) == 2


def test_a_row_whose_logits_are_nan_is_reported_and_the_others_go_on():
    table = MODEL.params["params"]["embed_tokens"]["weight"]
    broken = {**MODEL.params["params"], "embed_tokens": {"weight": table.at[11].set(jnp.nan)}}
    broken["lm_head"] = {"weight": table}
    config = dataclasses.replace(MODEL.config, tie_word_embeddings=False)
    model = Zaya({**MODEL.params, "params": broken}, config)
    prompts = [[5, 6, 7], [5, 11, 7], [8, 9]]
    good, bad, also_good = model.generate(prompts, 6, temperature=0, batch_size=4)
    assert bad.finish_reason == "nan" and bad.tokens == []
    assert bad.error == "prompt 1: the logits for position 3 hold NaN"
    for result, prompt in ((good, prompts[0]), (also_good, prompts[2])):
        (wanted,) = MODEL.generate([prompt], 6, temperature=0, batch_size=4)
        assert outcome(result) == outcome(wanted) and result.error is None


def test_a_full_cache_ends_the_row_with_the_token_it_had_no_room_for():
    params, config = MODEL.params, MODEL.config
    state = init_state(params, config, 1, 16)
    out = prefill_chunk(params, config, random_tokens(1, 1, 16), np.array([16]), state)
    request = engine_module._request([MODEL.engine._rows([[3]], Sampling(temperature=0))[0]])
    block = decode_block(params, config, out.state, out.last_logits, request, 4)
    assert (np.asarray(block.tokens)[0, 0] >= 0) and (np.asarray(block.tokens)[0, 1:] == -1).all()
    assert int(block.request.remaining[0]) == 0 and int(block.state.lengths[0]) == 16


def test_an_interrupt_carries_what_there_was(monkeypatch):
    blocks = []

    def interrupted(*arguments):
        if len(blocks) == 2:
            raise KeyboardInterrupt
        blocks.append(1)
        return decode_block(*arguments)

    (whole,) = MODEL.generate([PROMPTS[0]], 40, temperature=0)
    monkeypatch.setattr(engine_module, "decode_block", interrupted)
    with pytest.raises(Interrupted) as caught:
        MODEL.generate([PROMPTS[0]], 40, temperature=0)
    assert isinstance(caught.value, KeyboardInterrupt)
    (part,) = caught.value.results
    assert part.tokens == whole.tokens[:16] and part.finish_reason == "interrupted"
    monkeypatch.undo()
    (again,) = MODEL.generate([PROMPTS[0]], 40, temperature=0)
    assert outcome(again) == outcome(whole)


def test_a_prompt_goes_on_from_a_prefix_that_was_read():
    whole = random_tokens(3, 50).tolist()
    (wanted,) = MODEL.generate([whole], 10, temperature=0)
    prefix = MODEL.engine.read(whole[:37], 64)
    for _ in range(2):  # it can be used again
        (result,) = MODEL.engine.run(
            [whole], Sampling(max_new_tokens=10, temperature=0), prefix=prefix, keep=True
        )
        assert result.tokens == wanted.tokens
        np.testing.assert_array_equal(result.experts, wanted.experts)
    longer = [*whole, *result.tokens, 5, 6]
    (wanted,) = MODEL.generate([longer], 10, temperature=0)
    sampling = Sampling(max_new_tokens=10, temperature=0)
    (result,) = MODEL.engine.run([longer], sampling, prefix=result.end)
    assert result.tokens == wanted.tokens
    np.testing.assert_array_equal(result.experts, wanted.experts)


@pytest.mark.parametrize("config", [TINY, ODD], ids=["tiny", "odd"])
def test_the_form_for_the_cpu_computes_the_same(config):
    params = random_params(config)
    tokens = random_tokens(0, 2, 9)
    wanted = run(params, config, tokens)
    for form in (for_cpu(params, config), split_experts(params)):
        got = run(form, config, tokens)
        assert_close(got.hidden, wanted.hidden)
        np.testing.assert_array_equal(got.experts, wanted.experts)
    assert is_for_cpu(for_cpu(params, config)) and not is_for_cpu(params)
    head = run_head(for_cpu(params, config), config, wanted.hidden)
    assert_close(head, run_head(params, config, wanted.hidden))


def test_split_experts_share_the_memory_of_the_canonical_ones():
    params = random_params(TINY)
    whole = params["params"]["layers"][0]["mlp"]["experts"]["down_proj"]
    parts = split_experts(params)["params"]["layers"][0]["mlp"]["experts"]["down_proj"]
    start = whole.unsafe_buffer_pointer()
    places = [part.unsafe_buffer_pointer() - start for part in parts]
    assert places == [i * parts[0].nbytes for i in range(TINY.num_experts)]


def test_a_model_loaded_for_decoding_generates_the_same_and_refuses_to_be_saved(tmp_path):
    canonical, decoding = zaya_jax.load(), zaya_jax.load(layout="decoding")
    settings = dict(max_new_tokens=8, temperature=0)
    prompt = "Spell this word backward"
    (wanted,), (got,) = (m.generate(prompt, **settings) for m in (canonical, decoding))
    assert outcome(got) == outcome(wanted)
    with pytest.raises(zaya_jax.CheckpointError, match="loaded for decoding cannot be saved"):
        decoding.save(tmp_path / "copy")


def test_programs_are_kept_on_disk(tmp_path):
    """A second process reads them instead of compiling; a folder of the user's is respected."""
    program = "import zaya_jax; print(zaya_jax.load().generate('x', 2, temperature=0)[0].tokens)"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # or chance decides on some
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def generate(**more):
        command = [sys.executable, "-c", program]
        run = subprocess.run(command, env=environment | more, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout

    def programs(folder):
        return {file.name for file in folder.rglob("*-cache")}

    first = generate()
    kept = programs(tmp_path / "cache" / "zaya-jax")
    assert kept
    assert generate(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own")) == first
    assert programs(tmp_path / "own")
    assert generate() == first and programs(tmp_path / "cache" / "zaya-jax") == kept


def test_prompts_that_begin_alike_are_read_from_where_they_part(monkeypatch):
    """Each part once, whatever the order of the prompts; bit for bit what reading alone gives."""
    read = []

    def counted(params, config, tokens, new_lengths, state):
        read.append(int(new_lengths[0]))
        return prefill_chunk(params, config, tokens, new_lengths, state)

    monkeypatch.setattr(engine_module, "prefill_chunk", counted)
    a, b, c, d = (random_tokens(60 + i, 7).tolist() for i in range(4))
    prompts = [[*a, *b, *c], [*d, *c], [*a, *b, *d], [*a, *c], [*a, *b, *c]]
    cuts = [[7, 14], [7], [7, 14], [7], [7, 14]]
    sampling = Sampling(max_new_tokens=12, seed=3)
    shared = MODEL.engine.run(prompts, sampling, batch_size=2, cuts=cuts)
    assert sum(read) == 7 * 7 == sum(result.prompt_read for result in shared)
    alone = MODEL.engine.run(prompts, sampling, batch_size=2, cuts=cuts, share=False)
    assert list(map(outcome, alone)) == list(map(outcome, shared))
    assert [result.prompt_read for result in alone] == [21, 14, 21, 14, 21]


def test_other_cuts_in_the_same_tokens_are_not_shared():
    """Their state rounds otherwise, and what comes out must not depend on the neighbours."""
    prompt = random_tokens(70, 20).tolist()
    results = MODEL.engine.run(
        [prompt, prompt], Sampling(max_new_tokens=2), cuts=[[5], [9]], batch_size=2
    )
    assert [result.prompt_read for result in results] == [20, 20]


@pytest.mark.parametrize("cuts", [[[0]], [[5, 5]], [[9]], [[3, 2]], [[1], [2]]])
def test_cuts_that_are_none_are_refused(cuts):
    with pytest.raises(InputError, match="cuts"):
        MODEL.engine.run([PROMPTS[0]], Sampling(), cuts=cuts)


def test_a_capacity_must_hold_prompt_and_answer():
    (result,) = MODEL.engine.run([PROMPTS[0]], Sampling(max_new_tokens=6), capacity=15)
    assert len(result.tokens) <= 6
    with pytest.raises(InputError, match="capacity of 14 must hold 15"):
        MODEL.engine.run([PROMPTS[0]], Sampling(max_new_tokens=6), capacity=14)
