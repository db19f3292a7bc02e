"""What is said of training steps on clusters, of figures that are known."""

import numpy as np

from pallas_kernels.rocm.hlo import Collective
from train import cluster
from train.config import MeshConfig, ModelConfig, TrainConfig
from train.data.config import DataConfig

NODE, ALL = np.arange(16).reshape(2, 8), np.arange(16).reshape(1, 16)
COLLECTIVES = [
    Collective("all-to-all", 40, 0.7 * 448e9, NODE),  # a second each, at the assumed bandwidths
    Collective("all-reduce", 1, 0.8 * 25e9, ALL),
    Collective("all-reduce", 2, 0.8 * 25e9, ALL),
]


def source(data, expert):
    config = TrainConfig(
        phase="pretrain",
        data=DataConfig(),
        model=ModelConfig(preset="nano"),
        context=512,
        rows=4 * data * expert,
        mesh=MeshConfig(data, expert),
    )
    return cluster.Training(config, None, ())


def test_the_paper_adds_up_and_only_the_authors_cluster_is_beside_their_figure():
    row = cluster.on_paper(source(128, 8), 2 * 4.33e12, COLLECTIVES)
    seconds = [row[f"{part}, ms"] for part in ("memory", "within nodes", "between nodes")]
    assert seconds == ["2,000", "1,000", "1,000"] and row["products, ms"] == "0"
    assert row["tokens/s a GPU, one after the other"] == f"{4 * 512 / 4:,.0f}"
    assert row["all at once"] == f"{4 * 512 / 2:,.0f}"
    assert (row["GPUs"], row["reported"]) == ("1,024", "6,500")
    assert cluster.on_paper(source(2, 8), 1.0, COLLECTIVES)["reported"] == ""


def test_what_is_computed_again_takes_a_third_more_products():
    once = source(1, 1)
    model = ModelConfig(preset="nano", remat="full")
    again = once._replace(config=TrainConfig(**{**vars(once.config), "model": model}))
    rates = [
        float(cluster.on_paper(s, 0.0, [])["all at once"].replace(",", "")) for s in (once, again)
    ]
    assert abs(rates[0] / rates[1] - 4 / 3) < 1e-3


def test_exchanges_are_summed_by_kind_and_place():
    rows = cluster.exchanged("p", COLLECTIVES)
    assert [list(row.values()) for row in rows] == [
        ["p", "all-to-all", "GPUs of a node", "40", "313.60"],
        ["p", "all-reduce", "nodes", "3", "40.00"],
    ]


def test_the_8b_programs_have_the_authors_tokens_for_each_gpu():
    for config in cluster.eight_b():
        assert cluster.Training(config, None, ()).tokens == 16384
    assert cluster.eight_b()[-1].tokens_per_step == 4096 * 4096
