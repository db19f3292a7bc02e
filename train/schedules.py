"""Learning rates over a run."""

import optax

from zaya_jax.errors import ConfigError

KINDS = ("constant", "cosine", "wsd")


def learning_rate(
    kind: str,
    peak: float,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    final_ratio: float = 0.0,
    decay_fraction: float = 0.2,
) -> optax.Schedule:
    """The learning rate of each update, numbered from 0.

    It rises linearly to the peak at update `warmup_steps`, beginning with one step's share of it,
    so that the first update moves something. Then it stays ("constant"), falls along half a cosine
    ("cosine"), or stays and falls linearly over the last part of the run ("wsd": warm-up, stable,
    decay), to `final_ratio` times the peak at `total_steps`, and from there on.

    Args:
      kind: one of `KINDS`.
      peak: the highest rate.
      total_steps: updates of the run, warm-up included.
      warmup_steps: updates before the peak.
      final_ratio: of the last rate to the peak.
      decay_fraction: of `total_steps`, in which "wsd" falls.

    Raises:
      ConfigError: no such kind, or phases that do not fit into the run.
    """
    if kind not in KINDS:
        raise ConfigError(f"schedule {kind!r} is unknown: one of {', '.join(KINDS)}")
    decay_steps = {
        "constant": 0,
        "cosine": total_steps - warmup_steps,
        "wsd": round(total_steps * decay_fraction),
    }[kind]
    stable_steps = total_steps - warmup_steps - decay_steps
    if warmup_steps > total_steps:
        raise ConfigError(f"warmup_steps {warmup_steps} exceeds the run's {total_steps} steps")
    if stable_steps < 0:
        raise ConfigError(
            f"warmup_steps {warmup_steps} and decay_fraction {decay_fraction} exceed the run's "
            f"{total_steps} steps"
        )
    first, final = peak / (warmup_steps + 1), peak * final_ratio
    rising = optax.linear_schedule(first, peak, warmup_steps)
    after: optax.Schedule = optax.constant_schedule(peak)
    if kind == "cosine" and decay_steps:
        after = optax.cosine_decay_schedule(peak, decay_steps, final_ratio)
    elif kind == "wsd" and decay_steps:
        after = optax.linear_schedule(peak, final, decay_steps, stable_steps)
    return optax.join_schedules([rising, after], [warmup_steps]) if warmup_steps else after
