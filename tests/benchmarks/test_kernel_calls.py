"""The calls of a denoise step: each kind saves something, and the table in the documentation is what is counted."""

import pytest

from benchmarks import kernel_calls


@pytest.fixture(scope="module")
def rows():
    return kernel_calls.count()


def test_the_documented_table_is_what_a_step_calls(rows):
    text = kernel_calls.DOCUMENT.read_text(encoding="utf-8")
    written = text.split(kernel_calls.BEGIN)[1].split(kernel_calls.END)[0].strip()
    assert written == kernel_calls.table(rows), "python -m benchmarks.kernel_calls --write"


def test_every_kind_of_call_but_attention_saves_launches_and_bytes(rows):
    """Attention is one operation in PyTorch as well: it must not cost more."""
    for kind, row in rows.items():
        if kind.op == "attention":
            assert row.launches == row.calls and row.bytes <= row.replaced_bytes
        else:
            assert row.launches > row.calls and row.bytes < row.replaced_bytes, kind


def test_the_exits_are_one_call(rows):
    assert rows[kernel_calls.EXITS].calls == 1 and kernel_calls.SINGLE_EXIT not in rows
