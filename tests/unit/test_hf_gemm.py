"""Products over rows of several micro-batches: a row's bits do not tell where it stood or in what company."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.rounding import ALGEBRA
from tinkerbell.executors.hf import gemm
from tinkerbell.executors.hf.gemm import GRAIN, HEIGHTS, Heights, cuts, filled, mm_split, rows

WEIGHTS = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((51, 36), (36, 51), (96, 64))]
HEAD = torch.randn(gemm.BLOCK + 203, 36, generator=torch.Generator().manual_seed(2))
TRIED = Heights(WEIGHTS, HEAD)
"""Every height is tried once, for each number of threads."""


@pytest.mark.parametrize("num_rows", [8, 16, 40, 264, 400, 512, 528, 1304])
def test_cuts_cover_the_rows_in_known_heights(num_rows: int) -> None:
    assert {stop - start for start, stop in pairwise(cuts(num_rows))} <= set(HEIGHTS)
    for found in (cuts(num_rows), Heights(WEIGHTS, HEAD).cuts(num_rows)):
        assert found[0] == 0 and found[-1] == num_rows and list(found) == sorted(set(found))
        assert all(cut % GRAIN == 0 for cut in found)
    assert filled(num_rows - 7) == num_rows == filled(num_rows)


def test_a_split_product_is_the_product() -> None:
    x = torch.randn(100, 36, dtype=torch.float64)
    weight = WEIGHTS[0].double()
    whole = torch.mm(x, weight.t())
    assert torch.allclose(mm_split(x, weight.t(), (0, 1, 40, 100)), whole, rtol=ALGEBRA, atol=ALGEBRA)
    assert rows(x, 3, 9).data_ptr() % 64 == 0 and torch.equal(rows(x, 3, 9), x[3:9])


@pytest.mark.parametrize("threads", [1, 2])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_row_has_its_bits_at_every_place_in_every_pass(threads: int, data: st.DataObject) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if not TRIED.alike():
            pytest.skip("no height but its own keeps a row's bits on this processor")
        weight = data.draw(st.sampled_from(WEIGHTS))
        mine = torch.randn(data.draw(st.integers(1, 40)), weight.shape[1], generator=torch.Generator().manual_seed(3))
        found = []
        for _ in range(2):
            ahead, behind = data.draw(st.integers(0, 700)), data.draw(st.integers(0, 300))
            num_rows = filled(ahead + len(mine) + behind)
            x = torch.randn(num_rows, weight.shape[1])
            x[ahead : ahead + len(mine)] = mine
            found.append(mm_split(x, weight.t(), TRIED.cuts(num_rows))[ahead : ahead + len(mine)])
        assert torch.equal(*found)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("function", ["silu", "gelu", "silu_backward"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rows_of_whole_vectors_share_an_activation(function: str, threads: int, data: st.DataObject) -> None:
    def apply(x: torch.Tensor) -> torch.Tensor:
        if function == "silu_backward":
            return torch.ops.aten.silu_backward(torch.ones_like(x), x)
        return getattr(torch.nn.functional, function)(x)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        width = data.draw(st.sampled_from([128, 640, 1536]))
        assert gemm.in_whole_vectors(width) and not gemm.in_whole_vectors(width + 8)
        mine = torch.randn(data.draw(st.integers(1, 40)), width)
        ahead, behind = (torch.randn(data.draw(st.integers(0, 300)), width) for _ in range(2))
        together = apply(torch.cat([ahead, mine, behind]))
        assert torch.equal(together[len(ahead) : len(ahead) + len(mine)], apply(mine))
    finally:
        torch.set_num_threads(before)


def test_heights_that_round_otherwise_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial must be able to fail: as a whole, and for one height."""
    honest = gemm.mm_split

    def other_sums(x: torch.Tensor, w: torch.Tensor, bounds: tuple[int, ...]) -> torch.Tensor:
        parts = [
            part * (1 + 1e-6) if len(part) in bad else part
            for part in torch.split(honest(x, w, bounds), [stop - start for start, stop in pairwise(bounds)])
        ]
        return torch.cat(parts)

    bad: set[int] = set()
    monkeypatch.setattr(gemm, "mm_split", other_sums)
    if not Heights(WEIGHTS, HEAD).alike():
        pytest.skip("no height but its own keeps a row's bits on this processor")
    bad = {64}
    assert not Heights(WEIGHTS, HEAD).alike()
    bad = {400}
    heights = Heights(WEIGHTS, HEAD)
    assert heights.alike()
    assert heights.cuts(400) == cuts(400) != (0, 400)


def test_each_number_of_threads_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(gemm, "_places_alike", lambda *_: True)
    monkeypatch.setattr(gemm, "_cut_alike", lambda *_: bool(tried.append(torch.get_num_threads())) or True)
    before = torch.get_num_threads()
    heights = Heights(WEIGHTS, HEAD)
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            assert heights.alike()
    finally:
        torch.set_num_threads(before)
    assert set(tried) == {1, 2} and tried == sorted(tried)
