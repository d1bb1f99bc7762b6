"""Gestures: pointer, touch and keyboard alone; and the address that holds what they did."""

import numpy as np
import pytest

PAIR = ("with KL", "without KL")


def test_a_hover_becomes_a_picture_within_a_frame(visit, page_of) -> None:
    view = visit(page_of(*PAIR))
    x, y = view.pixel([0.0, 0.0])
    for i in range(120):
        angle = i / 7
        view.page.mouse.move(x + 80 * np.cos(angle), y + 80 * np.sin(angle))
    view.settle()
    hover = view.ask("timings")["hover"]
    assert len(hover) >= 60
    assert np.median(hover) < 16


def test_leaving_the_map_returns_to_the_chosen_z(visit, page_of) -> None:
    view = visit(page_of("with KL"), state="z=0.25,-0.5")
    assert view.hover([1.0, 1.0]) != [0.25, -0.5]
    view.page.mouse.move(5, 5)
    view.settle()
    assert view.ask("state()")["z"] == [0.25, -0.5]


def test_clicks_pin_a_then_b_and_a_pin_can_be_dragged(visit, page_of) -> None:
    view = visit(page_of("with KL"))
    for place in ([0.5, 0.5], [-1.0, 0.2]):
        view.page.mouse.click(*view.pixel(place))
    view.settle()
    state = view.ask("state()")
    np.testing.assert_allclose(state["a"], [0.5, 0.5], atol=0.05)
    np.testing.assert_allclose(state["b"], [-1.0, 0.2], atol=0.05)
    assert state["view"] == view.ask("state()")["view"]
    view.page.mouse.move(*view.pixel(state["a"]))
    view.page.mouse.down()
    view.page.mouse.move(*view.pixel([0.0, -1.0]), steps=5)
    view.page.mouse.up()
    view.settle()
    moved = view.ask("state()")
    np.testing.assert_allclose(moved["a"], [0.0, -1.0], atol=0.05)
    assert (moved["b"], moved["view"]) == (state["b"], state["view"])
    view.page.keyboard.press("x")
    view.settle()
    assert view.ask("state()")["a"] is None


def test_dragging_pans_and_the_wheel_zooms_both_maps_alike(visit, page_of) -> None:
    view = visit(page_of(*PAIR))
    start = view.ask("state()")["view"]
    under = [0.4, 0.4]
    x, y = view.pixel(under)
    view.page.mouse.move(x, y)
    view.page.mouse.wheel(0, -400)
    view.settle()
    zoomed = view.ask("state()")["view"]
    assert zoomed[2] < 0.8 * start[2]
    np.testing.assert_allclose(view.pixel(under), (x, y), atol=1.5)  # the place under the pointer stays
    view.page.mouse.down()
    view.page.mouse.move(x + 60, y + 30, steps=4)
    view.page.mouse.up()
    view.settle()
    np.testing.assert_allclose(view.pixel(under), (x + 60, y + 30), atol=1.5)
    np.testing.assert_allclose(view.ask("pixel", 0, under), view.ask("pixel", 1, under), atol=1e-6)
    assert view.ask("state()")["a"] is None  # a drag is not a click
    view.page.keyboard.press("f")
    view.settle()
    assert view.ask("state()")["view"] == start


def test_a_finger_moves_z_and_a_tap_pins(visit, page_of) -> None:
    view = visit(page_of("with KL"), size=(360, 740), touch=True)
    view.page.locator("#maps").scroll_into_view_if_needed()
    view.page.touchscreen.tap(*view.pixel([0.5, -0.5]))
    view.settle()
    state = view.ask("state()")
    np.testing.assert_allclose(state["a"], [0.5, -0.5], atol=0.1)
    assert state["z"] == state["a"]


def test_two_fingers_zoom_and_pan_and_pin_nothing(visit, page_of) -> None:
    view = visit(page_of("with KL"), size=(360, 740), touch=True)
    view.page.locator("#maps").scroll_into_view_if_needed()
    start = view.ask("state()")
    middle = [0.3, 0.2]
    x, y = view.pixel(middle)
    session = view.page.context.new_cdp_session(view.page)

    def touch(kind: str, *places: tuple[float, float]) -> None:
        points = [{"x": px, "y": py, "id": i} for i, (px, py) in enumerate(places)]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", (x - 20, y))
    touch("touchStart", (x - 20, y), (x + 20, y))
    for half in (25, 30, 40):
        touch("touchMove", (x - half, y), (x + half, y))
    view.settle()
    zoomed = view.ask("state()")
    assert zoomed["view"][2] == pytest.approx(start["view"][2] / 2, rel=0.02)
    np.testing.assert_allclose(view.pixel(middle), (x, y), atol=2)  # the place between the fingers stays
    touch("touchMove", (x - 40 + 30, y + 24), (x + 40 + 30, y + 24))
    touch("touchEnd")
    view.settle()
    np.testing.assert_allclose(view.pixel(middle), (x + 30, y + 24), atol=2)
    end = view.ask("state()")
    assert (end["a"], end["b"], end["z"]) == (start["a"], start["b"], start["z"])


def test_the_address_restores_the_view(visit, page_of) -> None:
    view = visit(page_of(*PAIR))
    start = view.ask("state()")["view"]
    view.page.mouse.click(*view.pixel([0.5, 0.5]))
    view.page.mouse.click(*view.pixel([-1.0, 0.2]))
    view.page.keyboard.press("g")
    view.page.keyboard.press("m")
    view.page.mouse.wheel(0, -200)
    view.until(f"window.__vaelab.state().view[2] < {start[2]}")
    view.page.locator("#picker button").nth(2).click()
    view.settle()
    state, address = view.ask("state()"), view.page.url
    again = visit(address)
    assert again.ask("state()") == state
    assert again.page.url == address
    np.testing.assert_array_equal(again.decoded(1), view.decoded(1))


def test_the_address_restores_a_drawing_and_a_plane(visit, page_of) -> None:
    view = visit(page_of("six"))
    box = view.page.locator("#pad").bounding_box()
    view.page.mouse.move(box["x"] + 30, box["y"] + 30)
    view.page.mouse.down()
    view.page.mouse.move(box["x"] + 80, box["y"] + 90, steps=5)
    view.page.mouse.up()
    view.page.locator("#across").select_option("principal")
    view.settle()
    drawn = view.ask("input()")
    assert sum(drawn) > 3
    again = visit(view.page.url)
    assert again.ask("input()") == drawn
    assert again.ask("state()")["axes"] == "principal"
    assert again.ask("posteriors()")[0]["mean"] == view.ask("posteriors()")[0]["mean"]


@pytest.mark.parametrize(
    "state", ["z=1", "z=a,b&axes=9,9&view=0,0,-1", "x=99999&c=77&layers=none", "x=drawn:!!", "%%%"]
)
def test_an_address_that_makes_no_sense_gives_the_first_view(visit, page_of, state) -> None:
    view = visit(page_of("with KL"), state=state)
    found = view.ask("state()")
    assert (found["z"], found["axes"], found["input"], found["c"]) == ([0, 0], [0, 1], None, 0)


def test_everything_by_keyboard_alone(visit, page_of) -> None:
    view = visit(page_of("six"), state="z=0.5,0,0,0,0,0.4")
    keyboard = view.page.keyboard
    reached: list[str] = []
    for _ in range(150):
        keyboard.press("Tab")
        name = view.page.evaluate(
            "(() => { const e = document.activeElement; return e === document.body ? '' : "
            "(e.id || e.dataset.layer || e.className) + '|' + getComputedStyle(e).outlineStyle; })()"
        )
        if not name:
            break
        reached.append(name)
    assert all(name.endswith("|solid") for name in reached)  # focus is seen
    ids = [name.partition("|")[0] for name in reached]
    controls = view.page.evaluate(
        "Array.from(document.querySelectorAll('button, select, input, [tabindex]')).filter((e) => "
        "e.checkVisibility() && !e.disabled).map((e) => e.id || e.dataset.layer || e.className)"
    )
    assert sorted(set(ids)) == sorted(set(controls))
    view.page.locator(".over").focus()
    before = view.ask("state()")["z"]
    keyboard.press("Enter")
    for key in ("ArrowRight", "ArrowUp", "Shift+ArrowRight"):
        keyboard.press(key)
    keyboard.press("Enter")
    view.settle()
    state = view.ask("state()")
    span = state["view"][2]
    axes = state["axes"]
    np.testing.assert_allclose(np.subtract(state["z"], before)[axes], [6 * span / 40, span / 40], atol=1e-3)
    assert (state["a"], state["b"]) == (before, state["z"])
    assert len(view.ask("frames()")) == 2
    keyboard.press("+")
    view.settle()
    assert view.ask("state()")["view"][2] == pytest.approx(span / 1.25, abs=1e-3)
    view.page.locator("#pad").focus()
    for key in (" ", "ArrowRight", "ArrowRight", "ArrowDown", " "):
        keyboard.press(key)
    view.settle()
    assert sum(view.ask("input()")) >= 4
    keyboard.press("Delete")
    view.settle()
    assert view.ask("input()") is None
    keyboard.press("]")
    keyboard.press("]")
    view.settle()
    assert view.ask("state()")["input"] == {"index": 1}
    keyboard.press("?")
    assert view.page.locator("#help").is_visible()
    keyboard.press("Escape")
    assert not view.page.locator("#help").is_visible()


def test_every_control_has_a_name(visit, page_of) -> None:
    view = visit(page_of(*PAIR))
    nameless = view.page.evaluate(
        "Array.from(document.querySelectorAll('button, select, input, [tabindex], [role=img]')).filter((e) => "
        "e.checkVisibility() && !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).map((e) => e.outerHTML)"
    )
    assert nameless == []


def test_n_draws_the_prior_and_h_goes_to_a_hole(visit, page_of, bundle_of) -> None:
    view = visit(page_of("with KL"))
    drawn = []
    for _ in range(30):
        view.page.keyboard.press("n")
        drawn.append(view.ask("state()")["z"])
    assert len(np.unique(np.array(drawn), axis=0)) == 30
    assert 0.6 < np.std(drawn) < 1.4
    view.page.keyboard.press("h")
    view.settle()
    z = np.array(view.ask("state()")["z"])
    assert np.linalg.norm(z) <= 2.0001
    codes = np.frombuffer(bundle_of("with KL").pieces["a/mean.f32"], np.float32).reshape(-1, 2)
    gap = np.linalg.norm(codes - z, axis=1).min()
    others = [np.linalg.norm(codes - place, axis=1).min() for place in np.array(drawn) if np.linalg.norm(place) < 1.95]
    assert gap >= max(others) - 0.05


def test_playing_the_film_moves_z_from_a_to_b(visit, page_of) -> None:
    view = visit(page_of("with KL"), state="a=1,1&b=-1,0.5")
    view.page.keyboard.press("v")
    view.until("window.__vaelab.state().z.join() === '-1,0.5'")


def test_the_picture_of_the_view_is_a_png(visit, page_of, tmp_path) -> None:
    from PIL import Image

    view = visit(page_of(*PAIR))
    with view.page.expect_download() as download:
        view.page.keyboard.press("s")
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert path.suffix == ".png"
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 800
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50
