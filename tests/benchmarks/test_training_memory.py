"""Memory by recipe: the counts are those of the networks, and each recipe saves what it says."""

import dataclasses

import pytest
import torch

from benchmarks import jobs, training_memory
from benchmarks.device_free import Model
from benchmarks.training_memory import GB, RECIPES, TEXT_ENCODERS, Counts, Recipe, bytes_of
from controlnet.model.controlnet import ControlNet

TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
COUNTS = Counts(1000, 400, 30, 50, 20, {True: 7, False: 70}, 1.0, 0.1, 0.8, 0.3, 0.4)


@pytest.fixture(scope="module")
def counts():
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(TEXT_ENCODERS, "small", (TEXT, TEXT | {"projection_dim": 32}))
        return training_memory.measure(Model("small", jobs.TINY, 8))


def test_what_is_counted_is_the_network(counts):
    with torch.device("meta"):
        control = ControlNet(**jobs.TINY, hint_channels=3)
    assert counts.trained == sum(parameter.numel() for parameter in control.parameters()) < counts.locked
    assert 0 < counts.saved[True] < counts.saved[False]
    assert 0 < counts.unet_encoder < counts.unet and counts.control > counts.unet_encoder  # with the hint
    assert 0 < counts.share_of_encoded < 1


def test_each_recipe_saves_what_it_says():
    plain = bytes_of(Recipe("", "", 2), COUNTS)
    assert plain == {"weights": 4400, "gradients": 1600, "optimizer": 3200, "average": 1600, "stages": 300,
                     "activations": 140}  # fmt: skip
    for options, changed in (
        ({"ranks_of_zero": 4}, {"optimizer": 800}),
        ({"state_bytes": training_memory.EIGHT_BIT}, {"optimizer": 800}),
        ({"average": False}, {"average": 0}),
        ({"checkpointing": True}, {"activations": 14}),
        ({"batch": 3}, {"activations": 210}),
    ):
        recipe = dataclasses.replace(Recipe("", "", 2), **options)
        assert bytes_of(recipe, COUNTS) == plain | changed, options


def test_the_table_has_every_base_and_way_to_save():
    big = dataclasses.replace(COUNTS, locked=int(5 * GB), trained=int(GB))
    rows = training_memory.table({"SD 1.5": big, "SDXL": big}).splitlines()[2:]
    assert len(rows) == len(RECIPES)
    for base in ("SD 1.5", "SDXL"):
        for what in ("checkpointing", "8-bit AdamW", "ZeRO-1 over 8 GPUs", "no average", "batch 4 "):
            assert any(f"{base}:" in row and what in row for row in rows), (base, what)
    assert all(row.split("|")[2].strip() == "16.00" for row in rows)
