"""The tables of docs/numerics.md: complete, and within what the page promises; and the yardstick notices errors."""

import re

import numpy as np
import pytest

import accuracy
from tolerances import DX_ULP, STATISTICS_ULP

QUANTITIES = pytest.mark.parametrize("quantity", accuracy.QUANTITIES)


@pytest.fixture(name="rows")
def rows_of_the_page(quantity):
    """{case: {contender: what the page shows}}"""
    if not accuracy.PAGE.exists():
        pytest.skip("not a source tree")
    table = re.search(rf"^\| {quantity}, error in ulp \|.*?\n\n", accuracy.PAGE.read_text(), re.M | re.S)[0]
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


@QUANTITIES
def test_accuracy_tables_are_complete_and_keep_the_promises(quantity, rows):
    """float32 and half precision; two values per channel, whose terms of dx cancel, have a rule of their own."""
    assert list(rows) == [case.name for case in accuracy.CASES]
    promised = {"mean": STATISTICS_ULP, "var": STATISTICS_ULP, "dx": DX_ULP}.get(quantity)
    for name, row in rows.items():
        assert list(row) == list(accuracy.CONTENDERS)
        if promised and not name.startswith(("float64", "2^1 ")):
            assert all(float(error) <= promised for who, error in row.items() if who.startswith("fastbn") and error)


@QUANTITIES
def test_accuracy_tables_have_nobody_more_accurate(quantity, rows):
    """Or fastbn is within 1 ulp."""
    for row in rows.values():
        errors = {who: float(error.replace("wrong", "inf")) for who, error in row.items() if error}
        best = min((error for who, error in errors.items() if not who.startswith("fastbn")), default=0.0)
        assert all(error <= max(1.0, best) for who, error in errors.items() if who.startswith("fastbn")), row


def test_accuracy_of_a_small_case_is_measured():
    case = accuracy.CASES[2]._replace(count=256)
    ours = ("fastbn, NCHW", "fastbn, NHWC")
    measured = accuracy.measure(case, (*ours, "NumPy"))
    for name in ours:
        assert measured[name]["mean"] <= STATISTICS_ULP and measured[name]["var"] <= STATISTICS_ULP
        assert 0 < measured[name]["dx"] <= DX_ULP
    assert measured["NumPy"]["y"] > 8 * measured["fastbn, NHWC"]["y"]


def test_accuracy_notices_a_wrong_bit():
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((64, accuracy.CHANNELS)).astype(np.float32) for _ in range(2))
    ones = np.ones(accuracy.CHANNELS, np.float32)
    exact = accuracy.Exact(x, dy, ones, ones)
    good = accuracy.by_fastbn(x, dy, ones, ones, planar=False)
    before = exact.errors(good, x.dtype, x.dtype)
    for quantity in accuracy.QUANTITIES:
        wrong = getattr(good, quantity).copy()
        wrong.flat[np.abs(wrong).argmax()] *= np.float32(1 + 2**-18)  # 32 to 64 ulp; fewer of std for a small mean
        errors = exact.errors(good._replace(**{quantity: wrong}), x.dtype, x.dtype)
        assert max(before.values()) < 3 < errors[quantity] < 70
        broken = np.full_like(wrong, np.nan)
        assert exact.errors(good._replace(**{quantity: broken}), x.dtype, x.dtype)[quantity] == float("inf")
