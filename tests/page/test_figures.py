"""The figures: what they show, what they refuse, and that nothing in them is clipped."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from vaelab.errors import NonFiniteError
from vaelab.report import figures

NAMES = [str(digit) for digit in range(10)]
LONG = [f"a class with the long name {index}" for index in range(12)]


def images(n: int, size: int = 28, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, channels, size, size), dtype=np.float32)


def cloud(n: int, spread: float = 1.0, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Codes of `classes` classes on a ring of the radius `spread`, and their labels."""
    rng = np.random.default_rng(1)
    labels = np.arange(n) % classes
    angle = labels * 2 * np.pi / classes
    return spread * (np.stack([np.cos(angle), np.sin(angle)], 1) + 0.1 * rng.normal(size=(n, 2))), labels


def history(rate: float, epochs: int = 5) -> list[dict]:
    part = {"rate": rate, "distortion": 130.0}
    return [{"epoch": e, "seconds": 3.2 * e, "train": part, "test": part} for e in range(1, epochs + 1)]


def texts(figure: Figure) -> list[str]:
    """What is written in the figure, with the line breaks of long titles undone."""
    return [" ".join(text.get_text().split()) for text in figure.findobj(Text) if text.get_visible()]


def pictures(figure: Figure) -> list:
    return [image for axes in figure.axes for image in axes.images]


def clipped(figure: Figure) -> list[str]:
    """The texts that stick out of the figure, after a real drawing of it."""
    figure.canvas.draw()
    frame = figure.bbox.padded(1)
    found = []
    for axes in figure.axes:
        box = axes.get_tightbbox()
        if box is None or not (frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1):
            found.append(f"axes {axes.get_title()!r}")
    for text in [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]:
        box = text.get_window_extent()
        if not (frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1):
            found.append(text.get_text())
    return found


def test_the_clipping_check_notices_a_clipped_text() -> None:
    figure = figures.generation(images(4), "fits")
    assert clipped(figure) == []
    outside = figure.axes[0].annotate("half outside", (0.97, 0.5), xycoords="figure fraction")
    assert clipped(figure) == ["axes ''"]
    outside.remove()
    figure.text(0.97, 0.5, "half outside")
    assert clipped(figure) == ["half outside"]


CODES, LABELS = cloud(600)
CODES12, LABELS12 = cloud(600, classes=12)
GRID = images(49).reshape(7, 7, 1, 28, 28)
QUANTILES = (np.arange(7) + 0.5) / 7
DRAWN = {
    "reconstruction": lambda: figures.reconstruction(images(50), images(50), np.arange(50) % 10, NAMES),
    "reconstruction, unlabelled": lambda: figures.reconstruction(images(30), images(30)),
    "reconstruction, one image": lambda: figures.reconstruction(images(1), images(1), title="long words " * 20),
    "reconstruction, one class": lambda: figures.reconstruction(images(9), images(9), np.full(9, 3), NAMES),
    "reconstruction, 12 classes": lambda: figures.reconstruction(images(60), images(60), np.arange(60) % 12, LONG),
    "reconstruction, 8x8": lambda: figures.reconstruction(images(40, 8), images(40, 8), np.arange(40) % 10),
    "reconstruction, RGB": lambda: figures.reconstruction(images(40, 32, 3), images(40, 32, 3), np.arange(40) % 10),
    "generation": lambda: figures.generation(images(64), "Samples", "z ~ N(0, I)"),
    "generation, 8x8": lambda: figures.generation(images(7, 8), "Samples"),
    "generation, RGB": lambda: figures.generation(images(9, 32, 3), "Samples"),
    "generation, one": lambda: figures.generation(images(1), "A title of many words " * 4, "and a subtitle " * 8),
    "generation, wide images": lambda: figures.generation(images(8)[:, :, :7], "Samples"),
    "latent": lambda: figures.latent_space(CODES, LABELS, NAMES),
    "latent, unlabelled": lambda: figures.latent_space(CODES, title="A title of many words " * 6),
    "latent, one class": lambda: figures.latent_space(CODES, np.full(600, 4), NAMES),
    "latent, 12 classes": lambda: figures.latent_space(CODES12, LABELS12, LONG),
    "latent, one code": lambda: figures.latent_space(np.zeros((1, 2)), np.array([0])),
    "latent, spread 1e4": lambda: figures.latent_space(1e4 * CODES, LABELS, NAMES),
    "latent, 50 classes": lambda: figures.latent_space(CODES, np.arange(600) % 50, [f"class {i}" for i in range(50)]),
    "comparison": lambda: figures.latent_space_comparison(CODES, 60 * CODES, LABELS, NAMES),
    "comparison, alike": lambda: figures.latent_space_comparison(CODES, CODES[::-1], LABELS, LONG),
    "comparison, unlabelled": lambda: figures.latent_space_comparison(CODES, 60 * CODES + 70),
    "manifold": lambda: figures.manifold({"with KL": GRID, "without KL": GRID}, QUANTILES),
    "manifold, RGB, one": lambda: figures.manifold(
        {"a": images(16, 8, 3).reshape(4, 4, 3, 8, 8)}, [0.1, 0.4, 0.6, 0.9]
    ),
    "training": lambda: figures.training({"with KL": history(6), "without KL": history(4000)}),
    "training, one epoch": lambda: figures.training({"with KL": history(6, 1)}),
    "training, five": lambda: figures.training({f"a run with the long name {i}": history(6 + i) for i in range(5)}),
}


@pytest.mark.parametrize("name", DRAWN)
def test_nothing_is_clipped(name: str) -> None:
    assert clipped(DRAWN[name]()) == []


@pytest.mark.parametrize("name", ["reconstruction", "latent", "comparison", "manifold", "training", "generation, one"])
def test_the_layout_is_settled_before_the_first_save(name: str, tmp_path) -> None:
    figure = DRAWN[name]()
    first = figures.save(figure, tmp_path / "first.png", dpi=50).read_bytes()
    assert figures.save(figure, tmp_path / "second.png", dpi=50).read_bytes() == first


def test_reconstruction_puts_each_image_above_its_own_reconstruction() -> None:
    originals, decoded = images(20, seed=1), images(20, seed=2)
    labels = np.arange(20) % 2
    drawn = pictures(figures.reconstruction(originals, decoded, labels, ["even", "odd"], columns=3))
    assert len(drawn) == 2 * 2 * 3
    order = [0, 2, 4, 1, 3, 5]
    for index, above, below in zip(order, drawn[::2], drawn[1::2], strict=True):
        np.testing.assert_array_equal(above.get_array(), originals[index, 0])
        np.testing.assert_array_equal(below.get_array(), decoded[index, 0])
        left, right, bottom, top = above.get_extent()
        assert below.get_extent()[:2] == [left, right]
        assert below.get_extent()[3] > bottom > top  # the axes grow downwards


def test_reconstruction_names_rows_and_every_class() -> None:
    shown = texts(DRAWN["reconstruction"]())
    assert shown.count("test image") == shown.count("reconstruction") == 2
    assert set(NAMES) <= set(shown)


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (8, 1), (32, 3)])
def test_pictures_keep_their_pixels_and_grey_levels(size: int, channels: int) -> None:
    given = images(4, size, channels)
    drawn = pictures(figures.generation(given, "Samples"))
    expected = given[0, 0] if channels == 1 else given[0].transpose(1, 2, 0)
    np.testing.assert_array_equal(drawn[0].get_array(), expected)
    assert {image.get_interpolation() for image in drawn} == {"nearest"}
    assert {image.get_clim() for image in drawn} == {(0, 1)}


def test_values_beyond_the_unit_interval_are_clipped() -> None:
    drawn = pictures(figures.generation(3 * images(1) - 1, "Samples"))
    assert drawn[0].get_array().min() == 0
    assert drawn[0].get_array().max() == 1


def test_latent_space_draws_every_code_in_the_colour_of_its_class() -> None:
    figure = DRAWN["latent"]()
    (dots,) = figure.axes[0].collections
    colors = [matplotlib.colors.to_hex(color) for color in dots.get_facecolors()]
    drawn = {tuple(place): color for place, color in zip(dots.get_offsets(), colors, strict=True)}
    assert len(drawn) == len(CODES)
    for place, label in zip(CODES, LABELS, strict=True):
        assert drawn[tuple(place)] == figures.PALETTE[label]


def test_a_class_keeps_its_colour_when_others_are_missing() -> None:
    only_seven = figures.latent_space(CODES, np.full(600, 7), NAMES)
    assert only_seven.legends[0].legend_handles[0].get_color() == figures.PALETTE[7]


def test_more_than_ten_classes_differ_in_colour_or_marker() -> None:
    handles = DRAWN["latent, 12 classes"]().legends[0].legend_handles
    assert len({(handle.get_color(), handle.get_marker()) for handle in handles}) == 12


def test_classes_are_named_at_their_medians_too() -> None:
    figure = DRAWN["latent"]()
    named = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    for label, name in enumerate(NAMES):
        assert np.hypot(*(named[name] - np.median(CODES[label == LABELS], axis=0))) < 0.3


def test_the_prior_circles_have_their_radii_and_names() -> None:
    figure = figures.latent_space(CODES, prior_sigmas=(1, 2.5))
    assert [patch.radius for patch in figure.axes[0].patches] == [1, 2.5]
    assert {"1σ", "2.5σ"} <= set(texts(figure))
    assert figure.axes[0].get_aspect() == 1


def test_one_dimension_is_drawn_over_lines_and_its_share_is_that_of_the_line() -> None:
    codes = np.concatenate([np.zeros(90), np.full(10, 3.5)])[:, None]
    figure = figures.latent_space(codes, axis_labels=("z", ""))
    said = " ".join(texts(figure)).replace("\N{NO-BREAK SPACE}", " ")
    assert "10.0 % of 100 codes outside the 3σ lines (prior: 0.3 %)" in said
    assert "spread, without a meaning" in said
    drawn = figure.axes[0].collections[0].get_offsets()
    np.testing.assert_array_equal(np.sort(np.asarray(drawn)[:, 0]), np.sort(codes[:, 0]))


def test_tiny_circles_are_pointed_at() -> None:
    assert "the prior's circles: 1, 2, 3σ" in texts(figures.latent_space(60 * CODES, LABELS))
    assert any("a point on this scale" in text for text in texts(DRAWN["latent, spread 1e4"]()))


def test_the_share_outside_the_last_circle_is_counted() -> None:
    codes = np.zeros((8, 2))
    codes[0, 0] = 4
    assert any(
        "12.5 % of 8 codes outside the 3σ circle (prior: 1.1 %)" in t for t in texts(figures.latent_space(codes))
    )


def test_a_stray_code_does_not_shrink_the_others_and_is_counted() -> None:
    codes = CODES.copy()
    codes[5] = 4000, 10
    figure = figures.latent_space(codes, LABELS)
    assert np.ptp(figure.axes[0].get_xlim()) < 20
    assert any("beyond this frame: 1" in text for text in texts(figure))
    assert not any("beyond this frame" in text for text in texts(DRAWN["latent"]()))


def test_limits_are_heeded_and_what_they_hide_is_counted() -> None:
    figure = figures.latent_space(np.array([[0.0, 0], [5, 0], [0, -7]]), limits=(-4, 4, -4, 4))
    assert figure.axes[0].get_xlim() == (-4, 4)
    assert any("beyond this frame: 2" in text for text in texts(figure))


def test_comparison_has_one_scale_circles_in_both_and_an_inset() -> None:
    left, right = DRAWN["comparison"]().axes
    assert left.get_xlim() == right.get_xlim()
    assert left.get_ylim() == right.get_ylim()
    assert [patch.radius for axes in (left, right) for patch in axes.patches] == [1, 2, 3] * 2
    (inset,) = left.child_axes
    drawn_share = 0.41 * np.ptp(left.get_xlim()) / np.ptp(inset.get_xlim())
    assert inset.get_title() == f"enlarged {drawn_share:.0f} times"
    assert right.child_axes == []
    assert DRAWN["comparison, alike"]().axes[0].child_axes == []


def test_manifold_grows_like_a_plot() -> None:
    grid = np.zeros((3, 3, 1, 2, 2))
    grid[0, 2] = 1.0  # z = (third quantile, first quantile): lower right
    (axes,) = figures.manifold({"model": grid}, [0.1, 0.5, 0.9]).axes
    (picture,) = axes.images
    expected = np.zeros((6, 6))
    expected[4:, 4:] = 1
    np.testing.assert_array_equal(picture.get_array(), expected)
    left, right, bottom, top = picture.get_extent()
    assert (left, right, bottom, top) == (0, 3, 0, 3)
    assert axes.get_ylim() == (0, 3)


def test_manifold_ticks_name_value_and_quantile() -> None:
    (axes,) = figures.manifold({"model": np.zeros((3, 3, 1, 2, 2))}, [0.025, 0.5, 0.975]).axes
    for axis in (axes.xaxis, axes.yaxis):
        assert [t.get_text() for t in axis.get_ticklabels()] == ["−1.96\n2.5 %", "0.00\n50 %", "1.96\n97.5 %"]
        assert list(axis.get_ticklocs()) == [0.5, 1.5, 2.5]


def test_training_plots_seconds_and_nats_and_turns_to_a_logarithm_where_the_rate_explodes() -> None:
    rate, distortion = DRAWN["training"]().axes
    assert (rate.get_yscale(), distortion.get_yscale()) == ("log", "linear")
    assert "logarithmic" in rate.get_ylabel()
    np.testing.assert_allclose(rate.lines[0].get_xdata(), [3.2, 6.4, 9.6, 12.8, 16.0])
    np.testing.assert_allclose(rate.lines[2].get_ydata(), 4000)
    np.testing.assert_allclose(distortion.lines[0].get_ydata(), 130)
    calm, _ = figures.training({"with KL": history(6)}).axes
    assert calm.get_yscale() == "linear"
    assert "logarithmic" not in calm.get_ylabel()


def test_training_tells_test_from_train_and_keeps_the_names() -> None:
    figure = DRAWN["training"]()
    named = {text.get_text() for text in figure.legends[0].get_texts()}
    assert named == {"with KL, test", "with KL, train", "without KL, test", "without KL, train"}
    assert [line.get_linestyle() for line in figure.axes[0].lines] == ["-", "--", "-", "--"]


def test_training_leaves_gaps_where_there_is_no_number() -> None:
    records = history(6)
    records[1] = {**records[1], "test": {"rate": float("inf"), "distortion": None}}
    del records[2]["test"]
    rate, distortion = figures.training({"a": records}).axes
    for axes in (rate, distortion):
        np.testing.assert_array_equal(np.isnan(axes.lines[0].get_ydata()), [False, True, True, False, False])
    nothing = [{"epoch": 1, "seconds": 1.0, "train": {"distortion": 1.0}, "test": {"distortion": 1.0}}]
    assert "not available" in texts(figures.training({"autoencoder": nothing}))


def test_a_zero_rate_does_not_break_the_logarithm() -> None:
    figure = figures.training({"collapsed": history(0), "without KL": history(1e6)})
    assert figure.axes[0].get_yscale() == "symlog"
    assert clipped(figure) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_codes_that_are_not_finite_are_refused_and_counted(bad: float) -> None:
    codes = CODES.copy()
    codes[3, 1] = bad
    with pytest.raises(NonFiniteError, match=r"codes: 1 of 1,200 values"):
        figures.latent_space(codes, LABELS)
    with pytest.raises(NonFiniteError, match="codes_b"):
        figures.latent_space_comparison(CODES, codes)


def test_images_that_are_not_finite_are_refused() -> None:
    bad = images(4)
    bad[0, 0, 0, 0] = np.nan
    with pytest.raises(NonFiniteError, match="reconstructions"):
        figures.reconstruction(images(4), bad)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: figures.generation(np.zeros((4, 784)), "x"), r"expected floats \(n,C,H,W\)"),
        (lambda: figures.generation(np.zeros((4, 2, 8, 8)), "x"), "C of 1 or 3"),
        (lambda: figures.generation(np.zeros((0, 1, 8, 8)), "x"), r"\(0, 1, 8, 8\)"),
        (lambda: figures.generation(np.zeros((4, 1, 8, 8), dtype=np.uint8), "x"), "uint8"),
        (lambda: figures.reconstruction(images(4), images(5)), "differ in shape"),
        (lambda: figures.latent_space(np.zeros((5, 3))), r"expected \(N,2\) or \(N,1\), got \(5, 3\)"),
        (lambda: figures.latent_space(np.zeros((0, 2))), r"got \(0, 2\)"),
        (lambda: figures.latent_space(CODES, LABELS[:5]), r"expected \(600,\) integers"),
        (lambda: figures.latent_space(CODES, LABELS * 1.0), "float64"),
        (lambda: figures.latent_space(CODES, LABELS, NAMES[:4]), "run from 0 to 9, but 4 classes"),
        (lambda: figures.latent_space_comparison(CODES, CODES[:9]), "600 and 9"),
        (lambda: figures.manifold({"a": GRID}, [0.1, 0.9]), r"expected \(2,2,C,H,W\)"),
        (lambda: figures.manifold({"a": GRID}, [0, 0.5, 1]), "strictly between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(draw, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


def test_hostile_names_are_drawn_as_they_are() -> None:
    hostile = [r"$\frac{1}$", "$x^2$", "<script>"]
    figure = figures.latent_space(CODES, LABELS % 3, hostile, title=r"$\undefined$")
    assert clipped(figure) == []
    assert {r"$\undefined$", *hostile} <= set(texts(figure))


def test_save_is_atomic_repeatable_and_makes_the_folder(tmp_path, monkeypatch) -> None:
    path = figures.save(DRAWN["generation, 8x8"](), tmp_path / "images" / "a.png", dpi=40)
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    assert figures.save(DRAWN["generation, 8x8"](), path, dpi=40).read_bytes() == first

    figure = DRAWN["generation, 8x8"]()
    monkeypatch.setattr(figure, "savefig", lambda target, **_: (target.write_bytes(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        figures.save(figure, path)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_the_users_matplotlib_settings_neither_matter_nor_change(tmp_path) -> None:
    plain = figures.save(DRAWN["training"](), tmp_path / "plain.png", dpi=40).read_bytes()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.facecolor": "red"}):
        odd = figures.save(DRAWN["training"](), tmp_path / "odd.png", dpi=40).read_bytes()
        assert matplotlib.rcParams["font.size"] == 30
    assert odd == plain


def test_drawing_loads_neither_pyplot_nor_torch() -> None:
    code = (
        "import sys, numpy as np; from vaelab.report import figures;"
        "figures.latent_space(np.zeros((3, 2)));"
        "sys.exit(' '.join(m for m in ('matplotlib.pyplot', 'torch') if m in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
