"""The course from nothing to a model that answers, at a few steps of each phase."""

import json
import os
import signal

import pytest

import zaya_jax
from train.course.phases import PHASES
from train.course.report import load as load_reports
from train.course.run import course
from train.run import Silent
from zaya_jax.evaluation.families import FAMILIES
from zaya_jax.loading import NANO

LENGTH = 0.002


class Told(Silent):
    """Remembers what it is told, and stops the course at the first step of its n-th phase."""

    def __init__(self, stop_in=None):
        self.said, self.phases, self.stop_in = [], [], stop_in

    def say(self, line):
        self.said.append(line)

    def begin(self, phase, at, steps):
        self.phases.append((phase, at, steps))

    def show(self, at, values):
        if self.stop_in == len(self.phases):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_the_course_goes_on_where_it_was_stopped_and_ends_in_a_model_that_answers(tmp_path):
    stopped, out = Told(stop_in=len(PHASES)), tmp_path / "nano"
    assert not course(out, stopped, LENGTH)
    assert stopped.said[-1].startswith("stopped and saved")
    assert not (out / "model").exists()

    again = Told()
    assert course(out, again, LENGTH)
    phases = [phase for phase, *_ in stopped.phases]
    assert phases == ["pretrain", "midtrain", "sft", "sft"]  # the last on examples of aggregation
    phase, taken, steps = again.phases[-1]
    assert phase == "sft" and 0 < taken < steps == 7  # 0.002 of its steps, rounded up
    lines = (out / "pretrain" / "metrics.jsonl").read_text().splitlines()
    held_out = [json.loads(line) for line in lines][-1]
    assert held_out["step"] == 3 and held_out["held_out_loss"] < 7

    reports = load_reports(out / "report.json")
    assert list(reports) == list(PHASES)
    assert all([row.family for row in rows] == list(FAMILIES) for rows in reports.values())

    model = zaya_jax.load(out / "model")
    assert model.config == zaya_jax.load(NANO).config  # but for its weights, the embedded one
    (answer,) = model.generate(["1 + 1 ="], 4)
    assert len(answer.tokens) <= 4
