"""Eq. 7 against its definition, on random rows in float64."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realera.edit import closed_form
from realera.edit.closed_form import (
    BankGram,
    Edit,
    PackedSums,
    Sums,
    condensed,
    shift_cov_of,
    solve,
)
from realera.edit.triangles import pack, unpack

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
    sums = Sums.zeros(dim).add_erased(e, target).add_preserved(kept, lambda1)
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
    together = solve(Sums.zeros(6).add_erased(e, target), None, 0.1, 0.1)
    apart = Sums.zeros(6)
    for i in order:
        apart = apart.add_erased(e[i : i + 1], target[i : i + 1])
    assert torch.allclose(together.matrix, solve(apart, None, 0.1, 0.1).matrix, atol=1e-4)


@QUICK
@given(seeds)
def test_sums_of_two_concepts_add_up_to_the_joint_fit(seed):
    first = rows_of(seed, 8, 3), rows_of(seed + 1, 8, 3)
    second = rows_of(seed + 2, 8, 5), rows_of(seed + 3, 8, 5)
    kept = rows_of(seed + 4, 8, 4)
    joint = Sums.zeros(8).add_erased(*first).add_erased(*second).add_preserved(kept, 0.1)
    merged = Sums.zeros(8).add_erased(*first).add_preserved(kept, 0.1)
    merged = merged + Sums.zeros(8).add_erased(*second)
    assert torch.allclose(*(solve(s, None, 0.1, 0.1).matrix for s in (joint, merged)), atol=1e-5)


@QUICK
@given(seeds)
def test_a_preserved_row_maps_to_what_it_mapped_to_as_its_weight_grows(seed):
    e, target, kept = rows_of(seed, 10, 4), rows_of(seed + 1, 10, 4), rows_of(seed + 2, 10, 3)
    errors = []
    for lambda1 in (0.1, 10.0, 1e5):
        sums = Sums.zeros(10).add_erased(e, target).add_preserved(kept, lambda1)
        edit = solve(sums, None, lambda1, 1e-9)
        errors.append(float((edit(kept.float()) - kept).norm() / kept.norm()))
    assert errors[2] < 1e-3
    assert errors[2] <= errors[0] + 1e-6


def test_a_heavy_pair_stays_exact_among_many_mined_rows():
    e, target = rows_of(0, 32, 1), rows_of(1, 32, 1)
    near = e + 0.5 * rows_of(2, 32, 400)
    sums = Sums.zeros(32).add_erased(near, target.expand(400, -1))

    def error(weight: float) -> float:
        edit = solve(sums.add_erased(e, target, weight), None, 0.1, 1e-6)
        return float((edit(e.float()) - target).norm() / (e - target).norm())

    assert error(1e6) < 1e-3 < error(1.0)


def test_a_row_of_weight_2_counts_like_the_row_twice():
    e, target = rows_of(0, 6, 3), rows_of(1, 6, 3)
    twice = Sums.zeros(6).add_erased(e, target).add_erased(e, target)
    assert torch.equal(twice.gram, Sums.zeros(6).add_erased(e, target, 2.0).gram)


def test_one_row_alone_gives_a_finite_edit_that_leaves_orthogonal_rows():
    e, target = rows_of(0, 16, 1), rows_of(1, 16, 1)
    edit = solve(Sums.zeros(16).add_erased(e, target), None, 0.1, 1e-6)
    other = rows_of(2, 16, 1)
    other = other - (other @ e.T) / (e @ e.T) * e
    assert torch.allclose(edit(e.float()), target.float(), atol=1e-3)
    assert torch.allclose(edit(other.float()), other.float(), atol=1e-3)


def test_the_probes_of_a_wide_encoder_stop_at_the_rank_of_a_narrow_edit(monkeypatch):
    solved, solves = closed_form._solved, []
    monkeypatch.setattr(closed_form, "_solved", lambda *two: solves.append(two) or solved(*two))
    sums = Sums.zeros(320).add_erased(rows_of(0, 320, 3), rows_of(1, 320, 3))
    assert solve(sums, None, 0.1, 1e-3).rank == 3
    assert len(solves) == 3  # the probes that find the range, those that find no more, the factor


@QUICK
@given(seeds, st.floats(1e-4, 0.3))
def test_low_rank_factors_keep_the_edit_to_the_stated_tolerance(seed, tolerance):
    edit = Edit.from_matrix(torch.eye(12) + rows_of(seed, 12, 12).float())
    cut, rest = edit.split(tolerance)
    change = edit.matrix - torch.eye(12)
    error = (cut.matrix - edit.matrix).norm()
    assert error <= tolerance * change.norm() + 1e-4
    assert abs(float(error - (rest.up @ rest.down).norm())) < 1e-3


def test_an_edited_weight_reads_a_row_as_the_weight_reads_the_edited_row():
    edit = Edit.from_matrix(torch.eye(8) + 0.1 * rows_of(0, 8, 8).float())
    weight, row = rows_of(1, 8, 5).float(), rows_of(2, 8, 1).float()
    assert torch.allclose(row @ edit.apply_to_weight(weight).T, edit(row) @ weight.T, atol=1e-5)
    assert torch.equal(edit.apply_to_weight(weight, strength=0.0), weight)
    gain = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 1.0, 0.1, 4.0])
    gained = edit.apply_to_weight(weight, gain=gain)
    assert torch.allclose(gain * row @ gained.T, edit(row) * gain @ weight.T, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gain", [None, torch.linspace(0.01, 300, 64)])
@pytest.mark.parametrize("autocast", [False, True])
def test_untouched_rows_of_a_weight_keep_their_bits_and_elsewhere_only_the_change_is_rounded(
    dtype, gain, autocast
):
    """T maps the first 8 columns; the last 56 columns, and rows that read only those, stay."""
    dim, rows = 64, rows_of(0, 64, 40).float()
    change = torch.zeros(dim, dim)
    change[:8, :8] = 0.1 * rows_of(1, 8, 8).float()
    edit, weight = Edit.from_matrix(torch.eye(dim) + change), rows.to(dtype)
    weight[:10, :8] = 0
    for strength in (1.0, 0.3):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            new = edit.apply_to_weight(weight, strength, gain)
        assert new.dtype == dtype
        assert torch.equal(new[:10], weight[:10]) and torch.equal(new[:, 8:], weight[:, 8:])
        scale = torch.ones(dim) if gain is None else gain
        due = weight.double() * scale @ (strength * change.double()) / scale
        missing = (new.double() - weight.double() - due)[:, :8]
        rounding = torch.finfo(dtype).eps * (weight.double() + due)[:, :8].abs()
        assert (missing.abs() <= rounding + (2e-2 if autocast else 1e-5) * due.abs().max()).all()


@pytest.mark.parametrize(("lambda1", "lambda2"), [(0.1, 0.0), (-1.0, 1e-4)])
def test_a_lambda_that_can_make_the_system_singular_is_refused(lambda1, lambda2):
    sums = Sums.zeros(4).add_erased(rows_of(0, 4, 1), rows_of(1, 4, 1))
    with pytest.raises(ValueError, match="λ1"):
        solve(sums, None, lambda1, lambda2)
    assert solve(sums, None, 0.0, 1e-4).rank == 1


def bank_of(rows: torch.Tensor, dropped=(), name: str = "") -> BankGram:
    rows = rows.double()
    return BankGram(pack(rows.T @ rows), rows[:1].float(), dict(dropped), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_banks_of_one_name_add_up_whatever_the_encoder_computes_in(dtype):
    rows = rows_of(0, 8, 1000)
    one = bank_of(rows, {"a cat": rows[:1].float()}, "a bank")
    same = bank_of(rows.to(dtype), {"a dog": rows[1:2].float()}, "a bank")
    assert torch.equal((one | same).triangle, one.triangle)
    assert (one | same).dropped.keys() == {"a cat", "a dog"}


def test_another_bank_is_refused_by_its_name_and_another_encoder_by_its_rows():
    rows = rows_of(0, 8, 1000)
    one = bank_of(rows, name="a bank")
    for other in (
        bank_of(rows, name="another"),  # a prompt more would be a thousandth of the sums
        bank_of(rows_of(1, 8, 1000) * torch.linspace(0.5, 1.5, 8), name="a bank"),
        bank_of(rows_of(0, 9, 1000), name="a bank"),
    ):
        with pytest.raises(ValueError, match="different preservation banks"):
            one | other
        assert one.is_same(other) is False
    older = BankGram(one.triangle, one.mean)  # of a file from before banks had names
    assert torch.equal((one | older).triangle, one.triangle) and one.is_same(older) is True


def test_edits_sums_and_banks_never_change_once_made():
    made = [Edit.from_matrix(torch.eye(3)), Sums.zeros(3), bank_of(rows_of(0, 3, 2))]
    for value in [*made, PackedSums(torch.zeros(6), torch.zeros(1, 3))]:
        with pytest.raises(FrozenInstanceError):
            value.triangle = torch.ones(6)
    assert (made[0] == Edit.from_matrix(torch.eye(3))) is False  # by identity, not by tensors


@QUICK
@given(seeds, st.integers(1, 12))
def test_a_packed_gram_matrix_comes_back_whatever_its_rank(seed, rank):
    rows = rows_of(seed, 12, rank) * torch.logspace(0, 3, 12, dtype=torch.float64)
    gram = rows.T @ rows
    triangle = pack(gram)
    assert triangle.dtype == torch.float32 and len(triangle) == 78
    assert (unpack(triangle) - gram).norm() <= 1e-6 * gram.norm()


def test_condensed_rows_have_the_gram_matrix_of_all():
    rows = torch.cat([rows_of(0, 8, 5), rows_of(1, 8, 1).expand(60, -1)]).float()
    few = condensed(rows)
    assert len(few) == 6
    gram = rows.T @ rows
    assert (few.T @ few - gram).norm() <= 1e-5 * gram.norm()


def test_condensed_rows_leave_out_a_ten_thousandth_of_the_norm():
    rows = torch.diag(torch.tensor([1.0, 2e-4, 5e-5, 5e-5]))
    assert len(condensed(rows)) == 2
    assert len(condensed(rows[:3, :3] + torch.diag(torch.tensor([0.0, 0, 1e-4])))) == 3


def test_sums_of_two_families_are_not_merged():
    with pytest.raises(ValueError, match="different model families"):
        Sums.zeros(4) + Sums.zeros(5)
    with pytest.raises(ValueError, match="no row to erase"):
        solve(Sums.zeros(4), None, 0.1, 0.1)


# ---------------------------------------------------------------- theorems


def problem(seed: int, dim: int = 7):
    """Rows to erase, their targets, rows to preserve, and the sums of the first two."""
    e, target, kept = rows_of(seed, dim, 5), rows_of(seed + 1, dim, 5), rows_of(seed + 2, dim, 9)
    return e, target, kept, Sums.zeros(dim).add_erased(e, target, 2.0)


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
    matrix = solve(sums.add_preserved(kept, lambda1), None, lambda1, lambda2).matrix.double()
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
        workers[worker] = workers[worker].add_erased(e[row : row + 1], target[row : row + 1])
    a, b, c, d = workers
    whole = Sums.zeros(6).add_erased(e, target)
    trees = (a + b + c + d, d + (c + (b + a)), (a + d) + (Sums.zeros(6) + c) + b)
    expected = solve(whole, None, 0.1, 0.1).matrix
    for tree in trees:
        torch.testing.assert_close(tree.shift_cov, whole.shift_cov, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(solve(tree, None, 0.1, 0.1).matrix, expected)


@QUICK
@given(seeds, st.floats(0.1, 10))
def test_a_rotated_and_scaled_embedding_gives_the_rotated_t(seed, scale):
    e, target, kept, sums = problem(seed)
    q = torch.linalg.qr(rows_of(seed + 3, 7, 7)).Q
    turned = Sums.zeros(7).add_erased(scale * e @ q.T, scale * target @ q.T, 2.0)
    turned = turned.add_preserved(scale * kept @ q.T, 0.1)
    matrix = solve(sums.add_preserved(kept, 0.1), None, 0.1, 0.1).matrix.double()
    other = solve(turned, None, 0.1, 0.1).matrix.double()
    torch.testing.assert_close(other, q @ matrix @ q.T, rtol=1e-4, atol=1e-5)


@QUICK
@given(seeds)
def test_a_bank_counts_like_preserved_rows_without_the_dropped_ones(seed):
    sums = problem(seed)[-1]
    bank, dropped = rows_of(seed + 4, 7, 11), rows_of(seed + 5, 7, 3)
    kept = bank_of(torch.cat([bank, dropped]), {"a cat": dropped.float()})
    assert kept.dim == 7
    by_gram = solve(sums, kept, 0.3, 0.1)
    by_rows = solve(sums.add_preserved(bank, 0.3), None, 0.3, 0.1)
    torch.testing.assert_close(by_gram.matrix, by_rows.matrix, rtol=1e-4, atol=1e-5)


@QUICK
@given(seeds, st.floats(0.1, 2))
def test_suppression_takes_the_concepts_towards_the_mean_by_its_measure_and_nothing_else_along(
    seed, suppression
):
    """The bank fills all directions alike and next to nothing is erased: it is all that T does."""
    v, mean = rows_of(seed, 7, 4), rows_of(seed + 1, 7, 2)  # two concepts, of two parts each
    kept, unit = BankGram(pack(3 * torch.eye(7).double()), mean), torch.eye(7).double()
    sums = replace(Sums.zeros(7).add_erased(1e-4 * v, 1e-4 * v), representatives=v)

    def change(sums, suppression):
        return solve(sums, kept, 1.0, 0.1, suppression).matrix.double() - unit

    once, moved = change(sums, 1.0), v @ change(sums, suppression).T
    assert float(((torch.cat([mean, mean]) - v) * moved).sum()) > 0
    torch.testing.assert_close(moved, suppression * v @ once.T, rtol=1e-4, atol=1e-5)
    others = torch.linalg.svd(torch.cat([v, mean]))[2][6:]  # orthogonal to concepts and mean
    assert (others @ once.T).norm() < 1e-5
    prompt = rows_of(seed + 2, 7, 1)
    held = change(sums.add_preserved(prompt, 1e6), 1.0)
    assert (prompt @ held.T).norm() < 0.1 * (prompt @ once.T).norm()


@QUICK
@given(seeds, st.integers(1, 3), st.sampled_from([1.0, 0.01]))
def test_the_mean_moves_by_a_tenth_of_the_mean_shift_and_a_row_that_is_orthogonal_by_5_sixths(
    seed, parts, size
):
    """A concept of orthogonal rows, one of each part, and a bank as in the last test."""
    rows = torch.linalg.qr(rows_of(seed, 7, 6).T).Q.T
    v, mean = rows[:parts], size * rows[3 : 3 + parts].float()
    kept, unit = BankGram(pack(3 * torch.eye(7).double()), mean), torch.eye(7).double()
    three = torch.cat([v, 2 * v, 3 * v])
    for some, count in ((v, 1), (three, 3)):
        sums = replace(Sums.zeros(7).add_erased(1e-4 * v, 1e-4 * v), representatives=some)
        once = solve(sums, kept, 1.0, 0.1, 1.0).matrix.double() - unit
        shift = mean.double() - some.view(count, parts, 7).mean(0)
        torch.testing.assert_close(mean.double() @ once.T, 0.1 * shift, rtol=1e-2, atol=1e-3)
    if size < 1:
        return
    sums = replace(sums, representatives=v[:1])
    once = solve(sums, replace(kept, mean=mean[:1]), 1.0, 0.1, 1.0).matrix.double() - unit
    torch.testing.assert_close(v[:1] @ once.T, 5 / 6 * (mean[:1] - v[:1]), rtol=1e-3, atol=1e-4)


def test_without_a_bank_or_a_representative_or_unasked_suppression_changes_nothing():
    sums, bank = problem(0)[-1], bank_of(rows_of(4, 7, 11))
    known = replace(sums, representatives=rows_of(6, 7, 1))
    assert torch.equal(solve(known, None, 0.1, 0.1, 1.0).matrix, solve(sums, None, 0.1, 0.1).matrix)
    plain = solve(sums, bank, 0.1, 0.1).matrix
    assert torch.equal(solve(known, bank, 0.1, 0.1).matrix, plain)
    assert torch.equal(solve(sums, bank, 0.1, 0.1, 1.0).matrix, plain)
    assert not torch.equal(solve(known, bank, 0.1, 0.1, 1.0).matrix, plain)
    with pytest.raises(ValueError, match=r"suppression = -0\.5: it must be at least 0"):
        solve(sums, None, 0.1, 0.1, -0.5)


@QUICK
@given(seeds, st.floats(1e-3, 0.3))
def test_no_factors_of_that_rank_come_nearer_to_the_edit(seed, tolerance):
    """Eckart and Young: the cut is the norm of the singular values that are left out."""
    edit = Edit.from_matrix(torch.eye(9) + rows_of(seed, 9, 9).float())
    cut, rest = edit.split(tolerance)
    values = torch.linalg.svdvals(edit.up.double() @ edit.down.double())
    norm = float((rest.up @ rest.down).norm())
    assert norm == pytest.approx(float(values[cut.rank :].norm()), rel=1e-4, abs=1e-5)
    assert cut.rank == 1 or values[cut.rank - 1 :].norm() > tolerance * values.norm() * (1 - 1e-5)
    assert float((cut.matrix - edit.matrix).norm()) == pytest.approx(norm, abs=1e-4)


@pytest.mark.parametrize(
    ("dim", "size", "rank"), [(256, 1.0, 30), (768, 5.0, 30), (256, 5.0, 100), (768, 1.0, 100)]
)
def test_a_dense_edit_of_an_older_file_has_the_rank_that_it_had_before_it_was_rounded(
    dim, size, rank
):
    """Its rounding to float32 would fill all directions: minutes at dim = 4096."""
    left, right = rows_of(0, dim, rank), rows_of(1, dim, rank)
    change = size * left.T @ right / (left.T @ right).norm()
    edit = Edit.from_matrix((torch.eye(dim, dtype=torch.float64) + change).float())
    assert edit.rank == rank
    assert (edit.up.double() @ edit.down.double() - change).norm() <= 1e-6 * change.norm()


@pytest.mark.parametrize(
    ("dim", "count", "smallest"),
    [(300, 20, 1), (300, 200, 1), (40, 100, 1), (100, 150, 1), (300, 200, 1e-9)],
)
def test_an_edit_has_no_more_directions_than_rows_and_is_the_solution_to_1e_6(dim, count, smallest):
    """smallest: share of the last row's shift, beside the first's of 1e-6"""
    e, target = rows_of(0, dim, count), rows_of(1, dim, count)
    sizes = torch.logspace(0, math.log10(smallest), count, dtype=torch.float64)[:, None]
    target = target if smallest == 1 else e + 1e-6 * sizes * (target - e)
    sums = Sums.zeros(dim).add_erased(e, target)
    edit = solve(sums, None, 0.1, 0.1)
    assert edit.rank <= min(dim, count)
    ridge = 0.1 * sums.gram.diagonal().mean() * torch.eye(dim, dtype=torch.float64)
    due = torch.linalg.solve(sums.gram + ridge, sums.shift_cov.T).T
    assert (edit.up.double() @ edit.down.double() - due).norm() <= 1e-6 * due.norm()
    again = solve(sums, None, 0.1, 0.1)
    assert torch.equal(edit.up, again.up) and torch.equal(edit.down, again.down)


@QUICK
@given(seeds, st.floats(0, 2))
def test_the_sums_of_an_edit_follow_from_it_and_from_their_gram_matrix(seed, suppression):
    *_, sums = problem(seed)
    sums = replace(sums, representatives=rows_of(seed + 6, 7, 2).float())
    solved = bank_of(rows_of(seed + 4, 7, 11)), 0.3, 0.1, suppression
    edit = solve(sums, *solved)
    found = shift_cov_of(edit, sums.gram, sums.representatives, *solved)
    assert (found - sums.shift_cov).norm() <= 1e-5 * sums.shift_cov.norm()


def test_an_edit_that_moves_nothing_is_of_rank_one():
    rows = rows_of(0, 30, 4)
    edit = solve(Sums.zeros(30).add_erased(rows, rows), None, 0.1, 0.1)
    assert edit.rank == 1 and torch.equal(edit.matrix, torch.eye(30))
    assert Edit.from_matrix(torch.eye(30)).rank == 1
