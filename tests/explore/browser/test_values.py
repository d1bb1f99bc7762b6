"""The numbers in the page: equal to torch's on the same inputs."""

import numpy as np
import pytest
import torch

PAIR = ("with KL", "without KL")
PLACES = ([0.5, -0.8], [-1.2, 0.3], [0.0, 1.5])


def close(given, expected) -> None:
    np.testing.assert_allclose(np.asarray(given), np.asarray(expected), rtol=1e-4, atol=1e-4)


def test_hovering_shows_what_torch_decodes_at_that_place_in_both_runs(visit, page_of, torch_of) -> None:
    view = visit(page_of(*PAIR))
    for place in PLACES:
        z = view.hover(place)
        close(np.abs(np.subtract(z, place)) < 0.05, [True, True])
        for run, name in enumerate(PAIR):
            expected = torch_of(name).mean(z)
            close(view.decoded(run), expected)
            shown = view.canvas(f".decoding:nth-child({run + 1}) .pictures canvas")
            assert np.abs(shown.astype(float).ravel() - 255 * expected).max() <= 0.51


@pytest.mark.parametrize(("name", "values"), [("with KL", {0, 1}), ("label", None), ("coloured", None)])
def test_the_sample_beside_the_mean_is_drawn_anew_from_the_likelihood(visit, page_of, torch_of, name, values) -> None:
    view = visit(page_of(name))
    z, drawn = view.hover([0.5, -0.8]), []
    for i in range(40):
        view.hover([0.5, -0.8 + 0.01 * (i % 2)])
        shown = view.ask("decodings()")[0]["samples"][0]
        drawn.append(shown)
        if i % 8 == 0:
            red = np.clip(np.round(255 * np.array(shown[:64])), 0, 255)
            assert np.abs(view.canvas(".pictures figure:nth-child(2) canvas").ravel() - red).max() <= 1
    found = np.array(drawn)
    assert len(np.unique(found, axis=0)) == 40
    if values:
        assert set(np.unique(found)) == values
    if name == "label":
        np.testing.assert_allclose(found * 255, np.rint(found * 255), atol=1e-4)  # grey levels
    c = 0 if name == "label" else None
    with torch.no_grad():
        px = torch_of(name).model.decode(torch.tensor([[z]]), None if c is None else torch.tensor([c]))
        many = px.rsample(4000, torch.Generator().manual_seed(0)).flatten(1)
    error = (found.mean(0) - many.mean(0).numpy()) / (many.std(0).numpy() / np.sqrt(40) + 0.02)
    assert np.abs(error).max() < 4
    spread = found.std(0).mean() / many.std(0).numpy().mean()
    assert 0.9 < spread < 1.1
    captions = view.page.locator(".pictures figcaption").all_inner_texts()
    assert captions == ["mean of p(x|z)", "a sample of p(x|z)"]


def test_images_of_three_channels_keep_their_colours(visit, page_of, torch_of, bundle_of) -> None:
    view = visit(page_of("coloured"), state="x=11&layers=points,digits")
    z = view.hover([0.5, -0.8])
    expected = torch_of("coloured").mean(z).reshape(3, 8, 8)
    close(view.decoded(), expected.ravel())
    shown = view.canvas(".pictures canvas", colours=True)
    assert np.abs(shown - np.clip(255 * expected.transpose(1, 2, 0), 0, 255)).max() <= 0.51
    images = np.frombuffer(bundle_of("coloured").pieces["test.u8"], np.uint8).reshape(-1, 3, 8, 8)
    np.testing.assert_array_equal(view.canvas("#pad", colours=True), images[11].transpose(1, 2, 0))
    np.testing.assert_array_equal(
        view.canvas("#picker button:nth-child(3) canvas", colours=True), images[2].transpose(1, 2, 0)
    )
    stroke(view, SEVEN)
    x = np.array(view.ask("input()"), np.float32).reshape(3, 8, 8)
    assert (x == x[0]).all() and x.max() == 1
    close(view.ask("posteriors()")[0]["mean"], torch_of("coloured").posterior(x).mean[0])


def test_more_classes_than_colours_are_told_apart_by_their_markers(visit, page_of) -> None:
    view = visit(page_of("coloured"))
    names = view.page.locator("#legend span").all_inner_texts()
    assert len(names) == 13 and names[10] == "zero in another colour"
    style = "(all) => all.map((i) => getComputedStyle(i).backgroundColor + getComputedStyle(i).borderRadius)"
    assert len(set(view.page.locator("#legend i").evaluate_all(style))) == 13


def test_where_there_is_no_sample_the_page_says_why(visit, page_of) -> None:
    view = visit(page_of("grey line"))
    assert "a cross-entropy on grey levels is of no distribution" in view.page.locator(".pictures").inner_text()
    assert view.page.locator(".pictures canvas").count() == 1


def test_a_full_covariance_tilts_the_ellipse_and_the_draws(visit, page_of, torch_of, bundle_of) -> None:
    view = visit(page_of("tilted"), state="x=3")
    (found,) = view.ask("posteriors()")
    x = np.array(view.ask("input()"), np.float32).reshape(1, 8, 8)
    q = torch_of("tilted").posterior(x)
    factor = q.scale_tril[0].tril().numpy()
    covariance = factor @ factor.T
    assert np.abs(np.corrcoef(np.linalg.inv(factor))).max() > 0.05  # or there is nothing to be seen
    close(np.reshape(found["tril"], (3, 3)), factor)
    close(found["distortion"], -torch_of("tilted").log_px(found["draws"], x).mean())
    close(found["rate"], torch_of("tilted").kl(x).sum())
    draws = []
    for _ in range(40):
        view.page.keyboard.press("r")
        view.settle()
        draws += view.ask("posteriors()")[0]["draws"]
    white = (np.array(draws) - found["mean"]) @ np.linalg.inv(factor).T
    np.testing.assert_allclose(np.cov(white.T), np.eye(3), atol=5 / np.sqrt(640))
    shown = view.page.evaluate(
        """async ([axes, sigma, tril]) => {
          const { Plane, ellipse } = await import("vaelab/latent");
          return ellipse(Plane.ofDimensions(axes, 3).spread({ sigma, tril }));
        }""",
        [[2, 0], found["sigma"], found["tril"]],
    )
    lengths, directions = np.linalg.eigh(covariance[np.ix_([2, 0], [2, 0])])
    np.testing.assert_allclose([shown["b"], shown["a"]], np.sqrt(lengths), rtol=1e-4)
    along = np.array([np.cos(shown["angle"]), np.sin(shown["angle"])])
    assert abs(along @ directions[:, 1]) == pytest.approx(1, abs=1e-6)


def stroke(view, points) -> None:
    """Draws on the pad: points in shares of its side."""
    box = view.page.locator("#pad").bounding_box()
    place = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    view.page.mouse.move(*place[0])
    view.page.mouse.down()
    for x, y in place[1:]:
        view.page.mouse.move(x, y, steps=4)
    view.page.mouse.up()
    view.settle()


SEVEN = ((0.2, 0.2), (0.75, 0.2), (0.4, 0.85))


@pytest.mark.parametrize("name", ["with KL", "without KL"])
def test_a_drawn_digit_has_torchs_posterior_and_nats(visit, page_of, torch_of, name) -> None:
    view = visit(page_of(name))
    stroke(view, SEVEN)
    x = np.array(view.ask("input()"), np.float32).reshape(1, 8, 8)
    assert set(np.unique(x)) == {0, 1}  # the model sees bits
    assert 5 < x.sum() < 40
    np.testing.assert_array_equal(view.canvas("#pad"), 255 * x[0])
    q = torch_of(name).posterior(x)
    (found,) = view.ask("posteriors()")
    close(found["mean"], q.mean[0])
    close(np.log(found["sigma"]), q.log_std[0])
    close(found["rate"], torch_of(name).kl(x).sum())
    close(found["atMean"], -torch_of(name).log_px([found["mean"]], x)[0])
    assert len(found["draws"]) == 16
    close(found["distortion"], -torch_of(name).log_px(found["draws"], x).mean())
    assert view.page.locator(".posterior h3").inner_text() == "posterior, in nats"
    text = view.page.locator(".posterior .number").inner_text().replace("−", "-")
    for key in ("distortion", "atMean", "rate"):
        assert f"{found[key]:.2f}" in text
    shown = view.canvas(".pair figure:nth-child(2) canvas")
    assert np.abs(shown.ravel() - 255 * torch_of(name).mean(found["mean"])).max() <= 0.51


def test_resampling_draws_anew_from_the_posterior(visit, page_of) -> None:
    view = visit(page_of("with KL"), state="x=3")
    before = view.ask("posteriors()")[0]
    draws = []
    for _ in range(40):
        view.page.keyboard.press("r")
        view.settle()
        draws += view.ask("posteriors()")[0]["draws"]
    scaled = (np.array(draws) - before["mean"]) / before["sigma"]
    assert scaled.shape == (640, 2)
    assert len(np.unique(scaled)) == 1280
    np.testing.assert_allclose(scaled.mean(0), 0, atol=5 / np.sqrt(640))
    np.testing.assert_allclose(scaled.std(0), 1, atol=5 / np.sqrt(1280))


def test_a_test_image_is_the_bundles_own(visit, page_of, bundle_of) -> None:
    view = visit(page_of("with KL"))
    chosen = view.page.locator("#picker button").nth(5)
    chosen.click()
    view.settle()
    made = bundle_of("with KL")
    images = np.frombuffer(made.pieces["test.u8"], np.uint8).reshape(-1, 64)
    np.testing.assert_array_equal(np.array(view.ask("input()")) * 255, images[5])
    codes = np.frombuffer(made.pieces["a/mean.f32"], np.float32).reshape(-1, 2)
    close(view.ask("posteriors()")[0]["mean"], codes[5])
    assert chosen.get_attribute("aria-pressed") == "true"


def test_nearest_test_images_are_nearest_in_latent_space(visit, page_of, bundle_of) -> None:
    view = visit(page_of("six"))
    z = view.hover(view.ask("state()")["z"])
    codes = np.frombuffer(bundle_of("six").pieces["a/mean.f32"], np.float32).reshape(-1, 6)
    nearest = np.square(codes - np.array(z, np.float32)).sum(1).argsort()[:6]
    shown = view.page.locator(".neighbours button").evaluate_all("(all) => all.map((b) => Number(b.dataset.index))")
    assert shown == nearest.tolist()


def test_nearest_test_images_of_a_test_image_begin_with_itself(visit, page_of) -> None:
    view = visit(page_of(*PAIR), state="x=7")
    caption = "test images nearest to your image"
    assert view.page.locator(".decoding small").all_inner_texts() == [caption, caption]
    first = view.page.locator(".neighbours button:first-child").evaluate_all("(all) => all.map((b) => b.dataset.index)")
    assert first == ["7", "7"]
    view.hover([0.0, 0.0])
    assert view.page.locator(".decoding small").first.inner_text() == "test images nearest to z"


def test_the_film_ends_at_its_pins_and_keeps_to_its_paths(visit, page_of, torch_of) -> None:
    a, b = [1.5, 0.5], [-0.4, 1.1]
    view = visit(page_of(*PAIR), state=f"a={a[0]},{a[1]}&b={b[0]},{b[1]}")
    frames = view.ask("frames()")
    assert set(frames) == {f"{key} {path}" for key in "ab" for path in ("straight", "spherical")}
    omega = np.arccos(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
    t = np.arange(11)[:, None] / 10
    arc = (np.sin((1 - t) * omega) * a + np.sin(t * omega) * b) / np.sin(omega)
    for key, name in zip("ab", PAIR, strict=True):
        close(frames[f"{key} straight"]["codes"], (1 - t) * a + t * b)
        close(frames[f"{key} spherical"]["codes"], arc)
        for film in (frames[f"{key} straight"], frames[f"{key} spherical"]):
            for z, mean in zip(film["codes"], film["means"], strict=True):
                close(mean, torch_of(name).mean(z))


def test_the_grid_decodes_the_visible_window(visit, page_of, torch_of) -> None:
    view = visit(page_of("with KL"), state="view=0.2,-0.3,1.5&layers=grid")
    (grid,) = view.ask("grid()")
    assert len(grid) >= 11 * 5
    box = view.page.locator(".over").bounding_box()
    for cell in grid[:: len(grid) // 7]:
        x, y = view.ask("pixel", 0, cell["z"])
        assert 0 < x < box["width"] and 0 < y < box["height"]
        close(cell["mean"], torch_of("with KL").mean(cell["z"]))


def test_both_decoders_are_given_the_same_z(visit, page_of, torch_of) -> None:
    view = visit(page_of(*PAIR))
    z = view.hover([-0.7, 0.9], run=1)
    for run, name in enumerate(PAIR):
        close(view.decoded(run), torch_of(name).mean(z))


def test_amber_says_where_no_data_lives(visit, page_of, bundle_of) -> None:
    view = visit(page_of("with KL"))
    codes = np.frombuffer(bundle_of("with KL").pieces["a/mean.f32"], np.float32).reshape(-1, 2)
    here = [view.ask("hasData", 0, code.tolist()) for code in codes]
    assert 0.97 < np.mean(here) <= 1
    view.hover(np.median(codes, 0).tolist())
    assert view.page.locator(".stack.nodata").count() == 0
    far = view.ask("state()")["view"]
    view.hover([far[0] - 0.97 * far[2], far[1] - 0.97 * far[2]])
    assert view.page.locator(".stack.nodata").count() == 1
    assert view.page.locator(".tag").inner_text() == "no data lives here"


def test_a_label_conditions_decoder_and_encoder(visit, page_of, torch_of) -> None:
    view = visit(page_of("label"))
    z = view.hover([0.5, -0.5])
    means = []
    for c in (2, 7):
        view.page.locator("#condition").select_option(str(c))
        z = view.hover([0.5, -0.5])
        means.append(view.decoded())
        close(means[-1], torch_of("label").mean(z, c))
    assert np.abs(means[0] - means[1]).max() > 0.01
    view.page.locator("#picker button").nth(4).click()
    view.settle()
    label = view.ask("state()")["c"]
    x = np.array(view.ask("input()"), np.float32).reshape(1, 8, 8)
    close(view.ask("posteriors()")[0]["mean"], torch_of("label").posterior(x, label).mean[0])


@pytest.mark.parametrize(
    ("name", "word"), [("point", "distortion"), ("grey line", "cross-entropy"), ("label", "distortion")]
)
def test_every_family_has_its_nats_by_their_names(visit, page_of, torch_of, name, word) -> None:
    view = visit(page_of(name))
    view.page.locator("#picker button").nth(9).click()
    view.settle()
    c = view.ask("state()")["c"] if name == "label" else None
    (found,) = view.ask("posteriors()")
    x = np.array(view.ask("input()"), np.float32).reshape(1, 8, 8)
    close(found["atMean"], -torch_of(name).log_px([found["mean"]], x, c)[0])
    text = view.page.locator(".posterior .number").inner_text()
    assert word in text
    assert ("n/a" in text) == (name == "point")
    if name == "point":
        assert "a point has no KL" in text
        close(found["distortion"], found["atMean"])
    else:
        close(found["rate"], torch_of(name).kl(x, c).sum())
        close(found["distortion"], -torch_of(name).log_px(found["draws"], x, c).mean())


def test_a_slider_moves_one_dimension_and_its_strip_is_the_traversal(visit, page_of, torch_of) -> None:
    view = visit(page_of("six"))
    dimension = int(view.page.locator("#sliders input").first.get_attribute("id").removeprefix("slider-"))
    before = view.ask("state()")["z"]
    view.page.locator("#sliders input").first.focus()
    for _ in range(3):
        view.page.keyboard.press("ArrowRight")
    view.settle()
    z = view.ask("state()")["z"]
    assert [d for d in range(6) if z[d] != before[d]] == [dimension]
    assert z[dimension] == pytest.approx(0.03)
    strip = view.canvas("#sliders .slider canvas")
    reach = float(view.page.locator("#sliders input").first.get_attribute("max"))
    for k in range(9):
        z[dimension] = -reach + 2 * reach * k / 8
        frame = strip[:, 9 * k : 9 * k + 8]
        assert np.abs(frame.ravel() - 255 * torch_of("six").mean(z)).max() <= 0.51


def test_dead_dimensions_are_greyed_and_axes_are_sorted_by_rate(visit, page_of, bundle_of) -> None:
    rates = np.array(bundle_of("six").manifest["runs"][0]["rates"])
    assert np.flatnonzero(rates < 0.01).tolist() == [1, 4]
    view = visit(page_of("six"))
    options = view.page.locator("#across option").evaluate_all("(all) => all.map((o) => [o.value, o.text])")
    order = np.argsort(-rates, kind="stable")
    assert [int(value) for value, _ in options[:-1]] == order.tolist()
    assert options[-1] == ["principal", "principal plane"]
    assert [text[:2] for _, text in options[:-1]] == ["z" + "₀₁₂₃₄₅"[d] for d in order]  # as in Python
    assert f"axes={order[0]},{order[1]}" in view.ask("address()")
    assert [("(dead)" in text) for _, text in options[:-1]] == (rates[order] < 0.01).tolist()
    assert view.page.locator(".slider.dead").count() == (rates < 0.01).sum()
    assert view.ask("state()")["axes"] == order[:2].tolist()


def test_on_the_principal_plane_a_hover_keeps_what_lies_across_it(visit, page_of, bundle_of, torch_of) -> None:
    view = visit(page_of("six"), state="axes=principal&z=0.1,0.2,0.3,-0.1,-0.2,0.5")
    plane = bundle_of("six").manifest["runs"][0]["components"]
    axes, start = np.array(plane["axes"]), np.array([0.1, 0.2, 0.3, -0.1, -0.2, 0.5])
    goal = start + 0.8 * axes[0] - 0.5 * axes[1]
    z = view.hover(goal.tolist())
    across = np.eye(6) - axes.T @ axes
    np.testing.assert_allclose(across @ z, across @ start, atol=2e-4)
    np.testing.assert_allclose(axes @ z, axes @ goal, atol=0.05)
    close(view.decoded(), torch_of("six").mean(z))


def test_the_pages_own_test_notices_a_wrong_network(visit, bundle_of, parts, tmp_path) -> None:
    from vaelab.explore import bundle, pack

    made = bundle_of("with KL")
    run = made.manifest["runs"][0]
    golden = run["golden"] | {"mean_sum": [value + 0.1 for value in run["golden"]["mean_sum"]]}
    changed = bundle.Bundle(made.manifest | {"runs": [run | {"golden": golden}]}, made.pieces)
    view = visit(pack.write_single(tmp_path / "wrong.html", changed, parts), ready=False)
    view.until("window.__vaelab.ready")
    assert len(view.ask("selfTest")) == 8
    assert "do not give what torch gave" in view.page.locator("#notice").inner_text()


def test_torch_is_the_judge(torch_of) -> None:
    """The comparisons above would fail on the other run's values."""
    z = [0.5, -0.8]
    with torch.no_grad():
        assert np.abs(torch_of("with KL").mean(z) - torch_of("without KL").mean(z)).max() > 0.01
