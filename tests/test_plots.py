"""The plots show their data."""

import pytest
import torch
from PIL import Image

from realera.concepts import Concept
from realera.mining.noise import GaussianNeighbourhood, radii_of
from realera.mining.pairs import Pairs
from realera.mining.plan import Plan
from realera.report.plots import grid, loss_curve, points, scope_picture, to_pil
from realera.report.scope import WordEffect
from realera.settings import NeighborSettings
from realera.text.encoding import Encoding

RED, BLUE = torch.tensor([1.0, 0, 0]), torch.tensor([0, 0, 1.0])


def plain(colour: torch.Tensor, side: int = 8) -> torch.Tensor:
    return colour[:, None, None].expand(3, side, side)


def colours(picture: Image.Image) -> set[tuple[int, ...]]:
    return {colour for _, colour in picture.getcolors(1 << 24)}


def pairs(prompts: int = 2, tokens: int = 4, dim: int = 64) -> Pairs:
    """Rows of about the norm that a text encoder gives, the span from row 1 on."""
    draw = torch.Generator().manual_seed(0)
    context, target = torch.randn(2, prompts, tokens, dim, generator=draw)
    span = torch.ones(prompts, tokens, dtype=torch.bool)
    span[:, 0] = False
    concept = Concept("airplane", "ground", tuple(f"{n} {{}}" for n in range(prompts)))
    names = tuple(f"{n} airplane" for n in range(prompts))
    e, anchor = Encoding({"context": context}), Encoding({"context": target})
    first, ends = torch.zeros(prompts, dtype=torch.int64), (context[:, 2], target[:, 2])
    return Pairs((concept,), names, names, first, e, anchor, anchor, {"context": span}, *ends)


def test_a_picture_has_the_images_pixels():
    image = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    picture = to_pil(image)
    assert picture.size == (7, 5)
    assert picture.getpixel((6, 4)) == tuple(int(v) for v in (image[:, 4, 6] * 255).round())


def test_a_grid_places_its_images_by_row_and_column_and_leaves_gaps_empty():
    sheet = grid([[plain(RED), None], [plain(RED), plain(BLUE)]], size=64)
    width, height = sheet.size
    quarter = [(width // 4, height // 4), (3 * width // 4, height // 4)]
    quarter += [(x, 3 * height // 4) for x, _ in quarter]
    red, white, blue = (255, 0, 0), (255, 255, 255), (0, 0, 255)
    assert [sheet.getpixel(place) for place in quarter] == [red, white, red, blue]


def test_names_make_room_for_themselves_and_must_fit():
    bare = grid([[plain(RED)]], size=64)
    named = grid([[plain(RED)]], ["before"], ["a photo of the airplane at an airport"], size=64)
    assert named.width > bare.width and named.height > bare.height
    with pytest.raises(ValueError, match="2 row names for 1 rows"):
        grid([[plain(RED)]], ["before", "after"])
    with pytest.raises(ValueError, match="2 column names for 1 columns"):
        grid([[plain(RED)]], (), ["a", "b"])
    with pytest.raises(ValueError, match="at least one image"):
        grid([])


@pytest.mark.parametrize(
    "losses", [[], [0.5], [0.5, 0.4], [1 / (n + 1) for n in range(200)], [0.0] * 9]
)
def test_a_loss_curve_is_drawn_from_the_first_step_on(losses):
    curve = loss_curve(dict(enumerate(losses, 1)))
    assert curve.width > 300
    assert curve.tobytes() == loss_curve(dict(enumerate(losses, 1))).tobytes()


def test_the_plot_of_a_resumed_run_has_the_numbers_of_its_steps():
    losses = [1.0, 5.0] * 10
    first, later = (loss_curve(dict(enumerate(losses, start))) for start in (1, 26))
    assert first.tobytes() != later.tobytes()  # Eq. 8 is on odd steps, wherever the run began


def test_the_ring_shows_neighbours_and_beyond_points_apart():
    generator = torch.Generator().manual_seed(0)
    plan = Plan(pairs().concepts, NeighborSettings(source="isotropic"), None)
    ring = GaussianNeighbourhood(plan, pairs(), radii_of(plan, pairs()))
    near, far = ring.neighbors(20, generator), ring.beyond(20, generator)
    nothing = ring.beyond(0, generator)
    both, alone = points(ring, near, far), points(ring, near, nothing)
    assert both.tobytes() != alone.tobytes()
    assert len(colours(both)) > 2


def test_the_scope_picture_shows_the_farthest_words_first_and_only_so_many():
    effects = [WordEffect(f"word{n}", "airplane", 0.5, n / 100, n / 100, "") for n in range(100)]
    few, many = scope_picture(effects, 10), scope_picture(effects, 60)
    assert few.height < many.height
    assert few.tobytes() == scope_picture(effects[90:]).tobytes()
    with pytest.raises(ValueError, match="empty scope"):
        scope_picture([])
