"""The benchmarks of size and speed measure what they claim."""

import pytest
import torch

from benchmarks import growth, peers_speed, start, tolerance
from benchmarks.speed import Size
from realera.edit.closed_form import Edit
from realera.edit.erasure import Erasure
from realera.text.encoding import CONTEXT

SMALL = Size("small", 24, (8, 8, 16))


def test_our_edit_of_blocks_is_the_ridge_regression_that_the_peers_solve():
    network, rows, concepts, ridge = peers_speed.Network(SMALL), 5, 300, 0.5
    found = peers_speed.ours(network, SMALL, concepts, rows, ridge)
    both = [peers_speed.rows_of(SMALL, n, rows) for n in range(concepts)]
    e, target = (torch.cat(side).double() for side in zip(*both, strict=True))
    eye = ridge * torch.eye(SMALL.dim, dtype=torch.float64)
    for layer, weight in zip(network.layers(), found, strict=True):
        old = layer.weight.double()
        wanted = (old @ target.T @ e + old @ eye) @ torch.linalg.inv(e.T @ e + eye)
        torch.testing.assert_close(weight.double(), wanted, atol=1e-5, rtol=1e-5)


def test_a_line_is_fitted_through_points_that_lie_on_one():
    x = [10, 30, 100]
    assert growth.line(x, [3 + 2 * v for v in x]) == pytest.approx((3, 2))
    assert growth.line(x, [1 + 5 * v**3 for v in x], 3) == pytest.approx((1, 5), rel=1e-4)


def test_names_are_words_of_the_vocabulary_and_nobodys_anchor():
    words = [*(f"word{n}" for n in range(50)), *growth.ANCHORS]
    names = [concept.name for concept in growth.concepts_of(20, words)]
    assert len(set(names)) == 20 and not set(names) & set(growth.ANCHORS)


def test_a_truncated_edit_differs_within_its_tolerance():
    torch.manual_seed(0)
    matrix = torch.eye(32) + torch.randn(32, 4) @ torch.randn(4, 32) + 0.01 * torch.randn(32, 32)
    whole = Erasure({CONTEXT: Edit.from_matrix(matrix)})
    assert tolerance.cut(whole, 0.0)[0].edits == whole.edits
    shorter, rank = tolerance.cut(whole, 0.1)
    change = matrix - torch.eye(32)
    assert 0 < (shorter.edits[CONTEXT].matrix - matrix).norm() <= 0.1 * change.norm()
    assert rank <= 4


def test_processor_time_is_that_of_the_child_and_not_the_clock():
    import sys

    idle = start.worked([sys.executable, "-c", "import time; time.sleep(1)"], {})
    assert idle < 0.5
