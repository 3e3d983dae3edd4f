"""What the campaign of lives calls growth: each kind of leak is seen in a life of some turns."""

import itertools

import pytest
import torch

from tests.reliability.lives import grows


def keeps_tensors(folder, every):
    kept = []
    while True:
        kept.append(torch.zeros(1))
        yield


def keeps_memory(folder, every):
    kept = bytearray()
    while True:
        kept.extend(bytes(1 << 20))
        yield


def keeps_files(folder, every):
    kept = []
    while True:
        kept.append(open(folder / "x", "w"))  # noqa: SIM115
        yield


def keeps_nothing(folder, every):
    for turn in itertools.count():
        torch.zeros(turn)
        yield


@pytest.mark.parametrize(
    "life, seen",
    [
        (keeps_tensors, {"objects"}),
        (keeps_memory, {"memory"}),
        (keeps_files, {"objects", "open files"}),
        (keeps_nothing, set()),
    ],
)
def test_leaks_are_seen(life, seen):
    assert {name for name, grown in grows(life, 20, 2).items() if grown} == seen
