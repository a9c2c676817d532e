"""Eq. 7 against what it claims to solve, on random rows in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realera.edit.closed_form import (
    MEAN_SHIFT,
    MEAN_WEIGHT,
    SHIFT_RIDGE,
    BankGram,
    Edit,
    Sums,
    solve,
)

seeds = st.integers(0, 10_000)
QUICK = settings(max_examples=25, deadline=None)


def rows_of(seed: int, dim: int, count: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)).double()


def brute(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """argmin_T |inputs Tᵀ - outputs|², [dim, dim]."""
    return torch.linalg.lstsq(inputs, outputs).solution.T


@QUICK
@given(seeds, st.integers(2, 12), st.integers(1, 20), st.integers(1, 20), st.floats(0.01, 10))
def test_the_edit_is_the_brute_force_least_squares_solution(seed, dim, n, m, lambda1):
    e, target, kept = rows_of(seed, dim, n), rows_of(seed + 1, dim, n), rows_of(seed + 2, dim, m)
    sums = Sums.zeros(dim).erasing(e, target).preserving(kept)
    ridge = 1e-3
    edit = solve(sums, None, lambda1, ridge)

    system = e.T @ e + lambda1 * kept.T @ kept
    root = (ridge * system.diagonal().mean()).sqrt()
    unit = torch.eye(dim, dtype=torch.float64)
    inputs = torch.cat([e, lambda1**0.5 * kept, root * unit])
    outputs = torch.cat([target, lambda1**0.5 * kept, root * unit])
    expected = brute(inputs, outputs)
    assert torch.allclose(
        edit.matrix.double(), expected, atol=1e-5 * float(expected.abs().max() + 1)
    )


@QUICK
@given(seeds, st.permutations(range(9)))
def test_the_order_of_rows_and_batches_does_not_matter(seed, order):
    e, target = rows_of(seed, 6, 9), rows_of(seed + 1, 6, 9)
    together = solve(Sums.zeros(6).erasing(e, target), None, 0.1, 0.1)
    apart = Sums.zeros(6)
    for i in order:
        apart = apart.erasing(e[i : i + 1], target[i : i + 1])
    assert torch.allclose(together.matrix, solve(apart, None, 0.1, 0.1).matrix, atol=1e-4)


@QUICK
@given(seeds)
def test_sums_of_two_concepts_add_up_to_the_joint_fit(seed):
    first = rows_of(seed, 8, 3), rows_of(seed + 1, 8, 3)
    second = rows_of(seed + 2, 8, 5), rows_of(seed + 3, 8, 5)
    kept = rows_of(seed + 4, 8, 4)
    joint = Sums.zeros(8).erasing(*first).erasing(*second).preserving(kept)
    merged = Sums.zeros(8).erasing(*first).preserving(kept) + Sums.zeros(8).erasing(*second)
    assert torch.allclose(*(solve(s, None, 0.1, 0.1).matrix for s in (joint, merged)), atol=1e-5)


@QUICK
@given(seeds)
def test_a_preserved_row_maps_to_what_it_mapped_to_as_its_weight_grows(seed):
    e, target, kept = rows_of(seed, 10, 4), rows_of(seed + 1, 10, 4), rows_of(seed + 2, 10, 3)
    errors = []
    for lambda1 in (0.1, 10.0, 1e5):
        edit = solve(Sums.zeros(10).erasing(e, target).preserving(kept), None, lambda1, 1e-9)
        errors.append(float((edit(kept.float()) - kept).norm() / kept.norm()))
    assert errors[2] < 1e-3
    assert errors[2] <= errors[0] + 1e-6


def test_a_heavy_pair_stays_exact_among_many_mined_rows():
    e, target = rows_of(0, 32, 1), rows_of(1, 32, 1)
    near = e + 0.5 * rows_of(2, 32, 400)
    sums = Sums.zeros(32).erasing(near, target.expand(400, -1))

    def error(weight: float) -> float:
        edit = solve(sums.erasing(e, target, weight), None, 0.1, 1e-6)
        return float((edit(e.float()) - target).norm() / (e - target).norm())

    assert error(1e6) < 1e-3 < error(1.0)


def test_one_row_alone_gives_a_finite_edit_that_leaves_orthogonal_rows():
    e, target = rows_of(0, 16, 1), rows_of(1, 16, 1)
    edit = solve(Sums.zeros(16).erasing(e, target), None, 0.1, 1e-6)
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
    assert torch.allclose(row @ edit.on_weight(weight).T, edit(row) @ weight.T, atol=1e-5)
    assert torch.equal(edit.on_weight(weight, strength=0.0), weight)
    assert edit.on_weight(weight.half()).dtype == torch.float16


@pytest.mark.parametrize(("lambda1", "lambda2"), [(0.1, 0.0), (-1.0, 1e-4)])
def test_a_lambda_that_can_make_the_system_singular_is_refused(lambda1, lambda2):
    sums = Sums.zeros(4).erasing(rows_of(0, 4, 1), rows_of(1, 4, 1))
    with pytest.raises(ValueError, match="λ1"):
        solve(sums, None, lambda1, lambda2)


def test_banks_that_differ_by_rounding_add_up_and_by_a_prompt_do_not():
    rows = rows_of(0, 1000, 8)
    bank = rows.T.double() @ rows.double()

    mean = rows.mean(0, keepdim=True)
    one, same = (
        BankGram(gram, mean, dropped)
        for gram, dropped in (
            (bank, {"a cat": rows[:1]}),
            (bank * (1 + 1e-8), {"a dog": rows[1:2]}),
        )
    )
    assert torch.equal((one | same).gram, bank)
    assert (one | same).dropped.keys() == {"a cat", "a dog"}
    with pytest.raises(ValueError, match="different preservation banks"):
        one | BankGram(bank + rows[:1].T.double() @ rows[:1].double(), mean)


def test_sums_of_two_families_are_not_merged():
    with pytest.raises(ValueError, match="different model families"):
        Sums.zeros(4) + Sums.zeros(5)
    with pytest.raises(ValueError, match="no row to erase"):
        solve(Sums.zeros(4), None, 0.1, 0.1)


# ---------------------------------------------------------------- theorems


def problem(seed: int, dim: int = 7):
    """Rows to erase, their targets, rows to preserve, and all of them as sums."""
    e, target, kept = rows_of(seed, dim, 5), rows_of(seed + 1, dim, 5), rows_of(seed + 2, dim, 9)
    return e, target, kept, Sums.zeros(dim).erasing(e, target, 2.0).preserving(kept)


def objective(w, w_org, e, target, kept, lambda1, ridge):
    """Eq. 7 as the paper prints it, for one layer."""
    moved = (e @ w.T - target @ w_org.T).square().sum()
    stayed = (kept @ w.T - kept @ w_org.T).square().sum()
    return 2.0 * moved + lambda1 * stayed + ridge * (w - w_org).square().sum()


def ridge_of(e, kept, lambda1, lambda2):
    return lambda2 * (2.0 * e.T @ e + lambda1 * kept.T @ kept).diagonal().mean()


@QUICK
@given(seeds, st.integers(1, 20), st.floats(0.01, 10), st.floats(1e-3, 1.0))
def test_one_t_makes_the_gradient_of_eq_7_vanish_for_every_layer(seed, out, lambda1, lambda2):
    e, target, kept, sums = problem(seed)
    matrix = solve(sums, None, lambda1, lambda2).matrix.double()
    ridge = ridge_of(e, kept, lambda1, lambda2)
    for layer in range(3):  # the same T whatever the layer's own weight is
        w_org = rows_of(seed + 10 + layer, 7, out)
        w = (w_org @ matrix).requires_grad_()
        loss = objective(w, w_org, e, target, kept, lambda1, ridge)
        (gradient,) = torch.autograd.grad(loss, w)
        start = w_org.clone().requires_grad_()
        before = objective(start, w_org, e, target, kept, lambda1, ridge)
        (there,) = torch.autograd.grad(before, start)
        assert gradient.norm() < 1e-4 * (1 + there.norm())
        # Convex: no step in any direction does better.
        other = w.detach() + 1e-2 * rows_of(seed + 20 + layer, 7, out)
        assert objective(other, w_org, e, target, kept, lambda1, ridge) > loss - 1e-6 * (1 + loss)


@QUICK
@given(seeds, st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_sums_are_a_monoid_any_partition_in_any_order_gives_the_same_t(seed, of):
    e, target = rows_of(seed, 6, 12), rows_of(seed + 1, 6, 12)
    workers = [Sums.zeros(6) for _ in range(4)]
    for row, worker in enumerate(of):
        workers[worker] = workers[worker].erasing(e[row : row + 1], target[row : row + 1])
    a, b, c, d = workers
    whole = Sums.zeros(6).erasing(e, target)
    trees = (a + b + c + d, d + (c + (b + a)), (a + d) + (Sums.zeros(6) + c) + b)
    expected = solve(whole, None, 0.1, 0.1).matrix
    for tree in trees:
        torch.testing.assert_close(tree.moved, whole.moved, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(solve(tree, None, 0.1, 0.1).matrix, expected)


@QUICK
@given(seeds, st.floats(0.1, 10))
def test_a_rotated_and_scaled_embedding_gives_the_rotated_t(seed, scale):
    e, target, kept, sums = problem(seed)
    q = torch.linalg.qr(rows_of(seed + 3, 7, 7)).Q
    turned = Sums.zeros(7).erasing(scale * e @ q.T, scale * target @ q.T, 2.0)
    turned = turned.preserving(scale * kept @ q.T)
    own = solve(sums, None, 0.1, 0.1).matrix.double()
    other = solve(turned, None, 0.1, 0.1).matrix.double()
    torch.testing.assert_close(other, q @ own @ q.T, rtol=1e-4, atol=1e-5)


@QUICK
@given(seeds)
def test_what_is_kept_counts_as_if_its_rows_were_preserved_and_what_is_dropped_as_if_not(seed):
    sums = problem(seed)[-1]
    bank, dropped = rows_of(seed + 4, 7, 11), rows_of(seed + 5, 7, 3)
    whole = torch.cat([bank, dropped])
    kept = BankGram(whole.T @ whole, whole[:1], {"a cat": dropped.float()})
    by_gram = solve(sums, kept, 0.3, 0.1)
    by_rows = solve(sums.preserving(bank), None, 0.3, 0.1)
    torch.testing.assert_close(by_gram.matrix, by_rows.matrix, rtol=1e-4, atol=1e-5)


@QUICK
@given(seeds, st.floats(0, 2), st.floats(0.01, 10))
def test_what_is_kept_goes_where_the_wide_edit_puts_it_and_what_is_preserved_stays(
    seed, away, lambda1
):
    """The wide edit moves what stands for the concepts, of each part towards that part's mean."""
    e, target, preserved, sums = problem(seed)
    bank, mean = rows_of(seed + 4, 7, 11), rows_of(seed + 5, 7, 2)
    v = rows_of(seed + 6, 7, 4)  # of two concepts
    kept = BankGram(bank.T @ bank, mean)
    matrix = solve(replace(sums, concepts=v), kept, lambda1, 0.1, away).matrix.double()

    way = torch.cat([mean, mean]) - v
    unit, root = torch.eye(7, dtype=torch.float64), (SHIFT_RIDGE * way.square().sum()).sqrt()
    firm = MEAN_WEIGHT * (way.square().sum() / mean.square().sum()).sqrt()
    little = mean + away * MEAN_SHIFT * (way[:2] + way[2:]) / 2
    rows = torch.cat([v, firm * mean, root * unit])
    t1 = brute(rows, torch.cat([v + away * way, firm * little, root * unit]))
    system = 2.0 * e.T @ e + lambda1 * (preserved.T @ preserved + bank.T @ bank)
    root, weight = (0.1 * system.diagonal().mean()).sqrt(), lambda1**0.5
    rows = torch.cat([2**0.5 * e, weight * preserved, weight * bank, root * unit])
    goals = [2**0.5 * target, weight * preserved, weight * bank @ t1.T, root * t1.T]
    expected = brute(rows, torch.cat(goals))
    torch.testing.assert_close(matrix, expected, rtol=1e-4, atol=1e-5)


def test_without_a_bank_nothing_goes_away_and_nothing_goes_towards():
    sums = replace(problem(0)[-1], concepts=rows_of(6, 7, 1))
    assert torch.equal(solve(sums, None, 0.1, 0.1, 1.0).matrix, solve(sums, None, 0.1, 0.1).matrix)
    with pytest.raises(ValueError, match=r"away = -0\.5: it must be at least 0"):
        solve(sums, None, 0.1, 0.1, -0.5)


@QUICK
@given(seeds, st.floats(1e-3, 0.3))
def test_no_factors_of_that_rank_come_nearer_to_the_edit(seed, tolerance):
    """Eckart and Young: the cut is the norm of the singular values that are left out."""
    edit = Edit(torch.eye(9) + rows_of(seed, 9, 9).float())
    down, up, cut = edit.factors(tolerance)
    values = torch.linalg.svdvals(edit.matrix.double() - torch.eye(9, dtype=torch.float64))
    assert cut == pytest.approx(float(values[len(down) :].norm()), abs=1e-9)
    error = (up.double() @ down.double() - (edit.matrix.double() - torch.eye(9))).norm()
    assert float(error) == pytest.approx(cut, abs=1e-4)
