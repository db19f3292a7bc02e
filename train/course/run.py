"""The course of the embedded model, from nothing to a model that talks: `zaya train nano`.

Writes its data, trains the phases one after the other, each from the weights of the one
before, and reports what each has learned.
"""

import json
import math
import time
from pathlib import Path

import jax.numpy as jnp

from train.config import CheckpointConfig, EvaluationConfig, ModelConfig, TrainConfig
from train.course.data import FACTS, facts, write
from train.course.phases import PHASES
from train.course.report import load as load_reports
from train.course.report import report
from train.course.report import save as save_reports
from train.course.voting import write_examples
from train.data.config import DataConfig, Source
from train.optimizer import OptimizerConfig
from train.run import Watcher, train
from zaya_jax.errors import ConfigError
from zaya_jax.loading import load

FORMATS = {"pretrain": "text", "midtrain": "chat", "sft": "chat", "aggregation": "tokens"}
# Of each family, asked after a phase.
PROBLEMS = {"pretrain": 100, "midtrain": 100, "sft": 200, "aggregation": 200}
REPORT = "report.json"


def course(out: Path, watcher: Watcher, length: float = 1.0, seed: int = 0) -> bool:
    """Runs the course, or goes on where it was interrupted; the model is then in `out`/model.

    Args:
      out: its folder: data, a run for each phase, report.json, model.
      watcher: is told what happens.
      length: of all phases and of the report, as a part of the whole.
      seed: of data and weights.

    Returns:
      Whether it came to its end; False where a signal stopped it.

    Raises:
      ConfigError: the length is none, or not that of the folder's course.
      ZayaError: as `train.run.train` does.
    """
    if not 0 < length <= 1:
        raise ConfigError(f"length must be above 0 and at most 1, got {length}")
    begin, data = time.perf_counter(), out / "data"
    counts = {name: math.ceil(p.documents * length) for name, p in PHASES.items()}
    if (data / FACTS).exists():
        if facts(seed, counts) != json.loads((data / FACTS).read_text()):
            raise ConfigError(f"{out}: a course of another length or seed; name another --out")
    else:
        watcher.say(f"{data}: problems and texts are written")
        write(data, seed, counts)
    for name in PHASES:
        run = out / name
        if name == "aggregation" and not (data / f"{name}.jsonl").exists():
            watcher.say(f"{data}: the model's answers become examples of aggregation")
            model = load(out / "sft", jnp.bfloat16, layout="decoding")
            write_examples(model, data, counts[name], seed)
        if not train(configuration(name, out, length, seed), run, watcher).finished:
            watcher.say("stopped and saved; the same command goes on from there")
            return False
        if not (run / REPORT).exists():
            rows = report(load(run, jnp.bfloat16), name, math.ceil(PROBLEMS[name] * length))
            save_reports(run / REPORT, {name: rows})
    reports = {name: load_reports(out / name / REPORT)[name] for name in PHASES}
    save_reports(out / REPORT, reports)
    load(run, jnp.bfloat16).save(out / "model")
    minutes = (time.perf_counter() - begin) / 60
    watcher.say(f"{out / 'model'}: written, {minutes:.1f} minutes")
    return True


def configuration(name: str, out: Path, length: float = 1.0, seed: int = 0) -> TrainConfig:
    """A phase of the course as a run's configuration."""
    phase, names = PHASES[name], list(PHASES)
    before = names[names.index(name) - 1] if name != names[0] else None
    steps = math.ceil(phase.steps * length)

    def source(file: str, weight: float = 1.0, folder: str = ".") -> Source:
        path = str(out / "data" / folder / f"{file}.jsonl")
        return Source(path=path, format=FORMATS[file], weight=weight)  # type: ignore[arg-type]

    def data(*sources: Source) -> DataConfig:
        return DataConfig(sources=sources, seed=seed, cache=str(out / "data" / "cache"))

    return TrainConfig(
        phase="sft" if name == "aggregation" else name,  # type: ignore[arg-type]
        start_from=None if before is None else str(out / before),
        model=ModelConfig(preset="nano", init="fan_in"),
        data=data(*(source(file, share) for file, share in phase.mixture.items())),
        context=phase.context,
        rope_base=phase.rope_base,
        rows=phase.rows,
        steps=steps,
        seed=seed,
        optimizer=OptimizerConfig(
            learning_rate=phase.peak_rate,
            final_ratio=phase.end_rate / phase.peak_rate,
            warmup_steps=min(40, steps // 10),
            newton_schulz_dtype="float32",  # CPUs multiply such small matrices faster so
        ),
        checkpoint=CheckpointConfig(every=200, keep=2),
        evaluation=EvaluationConfig(data=data(source(name, folder="held_out")), every=400),
        log_every=50,
    )
