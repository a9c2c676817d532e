"""Eq. 7 against what it claims to solve, on random rows in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realera.closed_form import Edit, Sums

seeds = st.integers(0, 10_000)
QUICK = settings(max_examples=25, deadline=None)


def rows_of(seed: int, dim: int, count: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)).double()


@QUICK
@given(seeds, st.integers(2, 12), st.integers(1, 20), st.integers(1, 20), st.floats(0.01, 10))
def test_the_edit_is_the_brute_force_least_squares_solution(seed, dim, n, m, lambda1):
    e, target, kept = rows_of(seed, dim, n), rows_of(seed + 1, dim, n), rows_of(seed + 2, dim, m)
    sums = Sums.zeros(dim).erasing(e, target).preserving(kept)
    ridge = 1e-3
    edit = sums.solve(lambda1, ridge)

    system = e.T @ e + lambda1 * kept.T @ kept
    root = (ridge * system.diagonal().mean()).sqrt()
    unit = torch.eye(dim, dtype=torch.float64)
    inputs = torch.cat([e, lambda1**0.5 * kept, root * unit])
    outputs = torch.cat([target, lambda1**0.5 * kept, root * unit])
    brute = torch.linalg.lstsq(inputs, outputs).solution.T
    assert torch.allclose(edit.matrix.double(), brute, atol=1e-5 * float(brute.abs().max() + 1))


@QUICK
@given(seeds, st.permutations(range(9)))
def test_the_order_of_rows_and_batches_does_not_matter(seed, order):
    e, target = rows_of(seed, 6, 9), rows_of(seed + 1, 6, 9)
    together = Sums.zeros(6).erasing(e, target).solve()
    apart = Sums.zeros(6)
    for i in order:
        apart = apart.erasing(e[i : i + 1], target[i : i + 1])
    assert torch.allclose(together.matrix, apart.solve().matrix, atol=1e-4)


@QUICK
@given(seeds)
def test_sums_of_two_concepts_add_up_to_the_joint_fit(seed):
    first = rows_of(seed, 8, 3), rows_of(seed + 1, 8, 3)
    second = rows_of(seed + 2, 8, 5), rows_of(seed + 3, 8, 5)
    kept = rows_of(seed + 4, 8, 4)
    joint = Sums.zeros(8).erasing(*first).erasing(*second).preserving(kept)
    merged = Sums.zeros(8).erasing(*first).preserving(kept) + Sums.zeros(8).erasing(*second)
    assert torch.allclose(joint.solve().matrix, merged.solve().matrix, atol=1e-5)


@QUICK
@given(seeds)
def test_a_preserved_row_maps_to_what_it_mapped_to_as_its_weight_grows(seed):
    e, target, kept = rows_of(seed, 10, 4), rows_of(seed + 1, 10, 4), rows_of(seed + 2, 10, 3)
    errors = []
    for lambda1 in (0.1, 10.0, 1e5):
        edit = Sums.zeros(10).erasing(e, target).preserving(kept).solve(lambda1, 1e-9)
        errors.append(float((edit(kept.float()) - kept).norm() / kept.norm()))
    assert errors[2] < 1e-3
    assert errors[2] <= errors[0] + 1e-6


def test_a_heavy_pair_stays_exact_among_many_mined_rows():
    e, target = rows_of(0, 32, 1), rows_of(1, 32, 1)
    near = e + 0.5 * rows_of(2, 32, 400)
    sums = Sums.zeros(32).erasing(near, target.expand(400, -1))

    def error(weight: float) -> float:
        edit = sums.erasing(e, target, weight).solve(0.1, 1e-6)
        return float((edit(e.float()) - target).norm() / (e - target).norm())

    assert error(1e6) < 1e-3 < error(1.0)


def test_one_row_alone_gives_a_finite_edit_that_leaves_orthogonal_rows():
    e, target = rows_of(0, 16, 1), rows_of(1, 16, 1)
    edit = Sums.zeros(16).erasing(e, target).solve(0.1, 1e-6)
    other = rows_of(2, 16, 1)
    other = other - (other @ e.T) / (e @ e.T) * e
    assert torch.allclose(edit(e.float()), target.float(), atol=1e-3)
    assert torch.allclose(edit(other.float()), other.float(), atol=1e-3)


@QUICK
@given(seeds, st.floats(1e-4, 0.3))
def test_low_rank_factors_keep_the_edit_to_the_stated_tolerance(seed, tolerance):
    edit = Edit(torch.eye(12) + rows_of(seed, 12, 12).float())
    down, up, cut = edit.factors(tolerance)
    change = edit.matrix - torch.eye(12)
    error = (up @ down - change).norm()
    assert error <= tolerance * change.norm() + 1e-4
    assert abs(float(error) - cut) < 1e-3


def test_an_edited_weight_reads_a_row_as_the_weight_reads_the_edited_row():
    edit = Edit(torch.eye(8) + 0.1 * rows_of(0, 8, 8).float())
    weight, row = rows_of(1, 8, 5).float(), rows_of(2, 8, 1).float()
    assert torch.allclose(row @ edit.edit(weight).T, edit(row) @ weight.T, atol=1e-5)
    assert torch.equal(edit.edit(weight, strength=0.0), weight)
    assert edit.edit(weight.half()).dtype == torch.float16


@pytest.mark.parametrize(("lambda1", "lambda2"), [(0.1, 0.0), (-1.0, 1e-4)])
def test_a_lambda_that_can_make_the_system_singular_is_refused(lambda1, lambda2):
    sums = Sums.zeros(4).erasing(rows_of(0, 4, 1), rows_of(1, 4, 1))
    with pytest.raises(ValueError, match="λ1"):
        sums.solve(lambda1, lambda2)


def test_banks_that_differ_by_rounding_add_up_and_by_a_prompt_do_not():
    rows = rows_of(0, 1000, 8)
    bank = rows.T.double() @ rows.double()

    def sums(gram):
        return Sums(torch.eye(8).double(), torch.eye(8).double(), bank * 0, gram)

    assert torch.equal((sums(bank) + sums(bank * (1 + 1e-8))).bank, bank)
    with pytest.raises(ValueError, match="different preservation banks"):
        sums(bank) + sums(bank + rows[:1].T.double() @ rows[:1].double())


def test_sums_of_two_families_are_not_merged():
    with pytest.raises(ValueError, match="different model families"):
        Sums.zeros(4) + Sums.zeros(5)
    with pytest.raises(ValueError, match="no row to erase"):
        Sums.zeros(4).solve()
