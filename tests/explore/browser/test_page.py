"""The page as a whole: both packings, both sizes, what models cannot show, and what a broken bundle says."""

import re

import numpy as np
import pytest

from vaelab.explore import bundle, pack

PAIR, MANY = ("with KL", "without KL"), ("twenty", "twenty again")


def failed(view) -> str:
    """The one sentence of a page that could not be shown."""
    view.until("document.documentElement.dataset.state === 'failed'")
    assert not view.page.locator("main").is_visible()
    text = view.page.locator("#failure").inner_text()
    assert view.page.locator("body").inner_text().strip() == text
    return text


def test_there_is_something_to_see_before_the_first_gesture(visit, page_of) -> None:
    view = visit(page_of("with KL"), state="")
    state = view.ask("state()")
    assert state["input"] == {"index": 0}
    assert state["a"] and state["b"] and len(view.ask("frames()")) == 2
    assert visit(view.page.url).ask("state()") == state


def test_a_page_from_the_disk_asks_for_nothing(visit, page_of) -> None:
    view = visit(page_of(*PAIR))
    assert [url for url in view.requests if not url.startswith(("data:", "blob:"))] == [page_of(*PAIR).as_uri()]


def test_a_browser_of_before_2025_unpacks_the_same(visit, page_of) -> None:
    older = visit(page_of("with KL"), state="z=0.5,-0.8", before="delete Uint8Array.fromBase64")
    assert (older.decoded() == visit(page_of("with KL"), state="z=0.5,-0.8").decoded()).all()


def test_the_folder_shows_the_same_over_http(visit, page_of, bundle_of, parts, served) -> None:
    folder, address = served
    for name, content in pack.folder(bundle_of(*PAIR), parts).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    state = "z=0.5,-0.8&x=3&a=1,1&b=0,-1"
    hosted, single = visit(f"{address}/index.html", state=state), visit(page_of(*PAIR), state=state)
    assert (hosted.decoded(1) == single.decoded(1)).all()
    assert hosted.ask("state()") == single.ask("state()")
    assert hosted.page.locator("#foot").inner_text() == single.page.locator("#foot").inner_text()


@pytest.mark.parametrize("share", [0.0002, 0.3, 0.97])
def test_a_page_that_was_cut_off_says_so(visit, page_of, tmp_path, share) -> None:
    whole = page_of("with KL").read_bytes()
    head = whole.index(b'<script type="application/json"')
    cut = tmp_path / "cut.html"
    cut.write_bytes(whole[: head + int(share * (len(whole) - head))])
    assert "incomplete" in failed(visit(cut, ready=False))


def changed(tmp_path, made: bundle.Bundle, parts, manifest=None, **pieces):
    path = tmp_path / "changed.html"
    return pack.write_single(path, bundle.Bundle(made.manifest | (manifest or {}), made.pieces | pieces), parts)


def test_a_newer_bundle_says_so(visit, bundle_of, parts, tmp_path) -> None:
    path = changed(tmp_path, bundle_of("with KL"), parts, {"format": 2})
    text = failed(visit(path, ready=False))
    assert "format 2" in text and "newer" in text


def test_a_piece_of_another_length_says_so(visit, page_of, tmp_path) -> None:
    text = page_of("with KL").read_text()
    length = re.search(r'"a/decoder.onnx": {"bytes": (\d+)', text)
    assert length is not None
    path = tmp_path / "short.html"
    path.write_text(text.replace(length[0], length[0].replace(length[1], str(int(length[1]) + 1))))
    said = failed(visit(path, ready=False))
    assert "a/decoder.onnx" in said and length[1] in said


def test_a_piece_that_does_not_unpack_says_so(visit, page_of, tmp_path) -> None:
    text = page_of("with KL").read_text()
    start = text.index('id="piece:a/mean.f32"')
    end = text.index("</script>", start)
    path = tmp_path / "torn.html"
    path.write_text(text[: (start + end) // 2 // 4 * 4] + text[end:])
    view = visit(path, ready=False)
    said = failed(view)
    assert "a/mean.f32" in said and "damaged" in said
    view.errors.clear()  # the browser logs what cannot be unpacked


def test_a_graph_that_is_none_says_so(visit, bundle_of, parts, tmp_path) -> None:
    path = changed(tmp_path, bundle_of("with KL"), parts, **{"a/decoder.onnx": b"no graph" * 100})
    view = visit(path, ready=False)
    assert "decoder of with KL" in failed(view)
    view.errors.clear()  # onnxruntime logs what it thinks of the bytes


def test_a_folder_without_a_piece_says_so(visit, bundle_of, parts, served) -> None:
    folder, address = served
    for name, content in pack.folder(bundle_of("with KL"), parts).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "a" / "decoder.onnx").unlink()
    view = visit(f"{address}/index.html", ready=False)
    assert "a/decoder.onnx" in failed(view)
    view.errors.clear()  # the browser logs the 404


def test_a_flows_page_says_why_it_cannot_encode_and_shows_the_rest(visit, page_of, torch_of) -> None:
    view = visit(page_of("flow"), state="x=2")
    assert "flow" in view.page.locator(".posterior .missing").inner_text()
    z = view.hover([0.3, 0.3])
    assert abs(view.decoded() - torch_of("flow").mean(z)).max() < 1e-4
    assert view.page.locator(".neighbours button").count() == 6


def test_a_model_without_a_decoder_says_why(visit, bundle_of, parts, tmp_path) -> None:
    made = bundle_of("with KL")
    run = made.manifest["runs"][0] | {"decoder": None, "decoder_missing": "the reason why"}
    path = changed(tmp_path, made, parts, {"runs": [run]})
    view = visit(path, state="x=2")
    assert view.page.locator(".decoding .missing").inner_text() == "the reason why"
    view.hover([0.3, 0.3])
    assert view.ask("posteriors()")[0]["mean"]
    assert "rate" in view.page.locator(".posterior .number").inner_text()


def test_the_numbers_and_how_they_were_measured_are_on_the_page(visit, bundle_of, parts, tmp_path) -> None:
    made = bundle_of("with KL")
    metrics = [
        {"key": "nll", "label": "exact -log p(x)", "unit": "nats", "help": "", "value": "12.34", "se": "0.05", "n": 360,
         "reason": ""},
        {"key": "nll_is", "label": "importance-sampled", "unit": "nats", "help": "", "value": "", "se": "", "n": 0,
         "reason": "not asked for"},
    ]  # fmt: skip
    run = made.manifest["runs"][0] | {"metrics": metrics, "protocol_text": "Measured with K = 5."}
    view = visit(changed(tmp_path, made, parts, {"runs": [run]}))
    assert "12.34 ± 0.05" in view.page.locator("#facts").inner_text()
    fingerprint = view.page.evaluate("window.__vaelab.manifest.fingerprint")
    foot = view.page.locator("#foot").inner_text()
    assert fingerprint in foot and "protocol dynamic" in foot
    view.page.locator("#numbers-open").click()
    text = view.page.locator("#numbers").inner_text()
    assert "n/a: not asked for" in text and "Measured with K = 5." in text and "360 images" in text


def test_a_run_that_was_not_evaluated_says_how_to(visit, page_of) -> None:
    assert "vaelab evaluate" in visit(page_of("with KL")).page.locator("#facts").inner_text()


def test_a_training_that_was_interrupted_is_said_beside_the_numbers(visit, page_of, bundle_of, parts, tmp_path) -> None:
    assert "interrupted" not in visit(page_of("with KL")).page.locator("body").inner_text()
    made = bundle_of("with KL")
    run = made.manifest["runs"][0] | {"interrupted": "training was interrupted after 3 of 30 epochs"}
    view = visit(changed(tmp_path, made, parts, {"runs": [run]}))
    assert "training was interrupted" in view.page.locator("#facts").inner_text()
    view.page.locator("#numbers-open").click()
    assert "after 3 of 30 epochs" in view.page.locator("#numbers").inner_text()


def test_names_in_a_manifest_are_text(visit, bundle_of, parts, tmp_path) -> None:
    made = bundle_of("with KL")
    evil = "</script><img src=x onerror=alert(1)>"
    run = made.manifest["runs"][0] | {"label": evil}
    view = visit(changed(tmp_path, made, parts, {"title": evil, "runs": [run]}))
    assert view.page.locator("#title").inner_text() == evil
    assert view.page.locator("img").count() == 0


OVERFLOWING = """() => {
  const width = document.documentElement.clientWidth;
  return Array.from(document.querySelectorAll("body *")).filter((e) => {
    const box = e.getBoundingClientRect();
    return e.checkVisibility() && box.width && (box.right > width + 0.5 || box.left < -0.5);
  }).map((e) => e.id || e.className || e.tagName);
}"""
CUT = """() => Array.from(document.querySelectorAll("section")).filter((e) =>
  e.scrollHeight > e.clientHeight + 1).map((e) => e.id)"""
CLIPPED = """() => Array.from(document.querySelectorAll("button, h1, h2, h3, label, figcaption, #facts p")).filter((e) =>
  e.checkVisibility() && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline").map((e) => e.outerHTML)"""


SHOWN = [PAIR, ("six",), ("twenty",), MANY, ("grey line",), ("label",), ("coloured",), ("flow",)]


@pytest.mark.parametrize("names", SHOWN, ids="-".join)
@pytest.mark.parametrize("size", [(1280, 720), (360, 740)], ids=["wide", "narrow"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window(visit, page_of, artefacts, names, size, scheme) -> None:
    view = visit(page_of(*names), size=size, scheme=scheme, state="")
    path = artefacts / f"{'-'.join(names).replace(' ', '-')}-{size[0]}-{scheme}.png"
    view.page.screenshot(path=path, full_page=size[0] < 1000)
    assert view.page.evaluate(OVERFLOWING) == []
    assert view.page.evaluate(CLIPPED) == []
    root = "document.scrollingElement"
    assert view.page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth")
    if size[0] > 1000:
        assert view.page.evaluate(f"{root}.scrollHeight <= {root}.clientHeight")
        assert view.page.evaluate(CUT) == []
    dark = view.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    assert dark == (scheme == "dark")


@pytest.mark.parametrize(
    ("names", "axes"),
    [(PAIR, "0,1"), (("six",), "0,1"), (("six",), "principal"), (MANY, "0,1"), (MANY, "principal")],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else value,
)
def test_words_on_a_narrow_map_are_apart_and_whole(visit, page_of, names, axes) -> None:
    view = visit(page_of(*names), size=(360, 740), state=f"axes={axes}")
    u, v, span = view.ask("state()")["view"]
    view.page.evaluate(f"location.hash = '#axes={axes}&x=3&view={u},{v + 1.5 * span},{span}'")
    view.settle()
    box = view.page.locator(".over").first.bounding_box()
    view.page.mouse.move(box["x"] + 20, box["y"] + 40)
    view.settle()
    assert view.page.locator(".tag").first.inner_text() == "no data lives here"
    for run in range(len(names)):
        width, height, *tag = (
            view.page.locator(".stack")
            .nth(run)
            .evaluate(
                "(s) => { const t = s.querySelector('.tag'); return [s.clientWidth, s.clientHeight, t.offsetLeft, t.offsetTop,"
                " t.offsetLeft + t.offsetWidth, t.offsetTop + t.offsetHeight]; }"
            )
        )
        assert width > 300 and height > 200
        boxes = [[word[side] for side in ("left", "top", "right", "bottom")] for word in view.ask("words", run)]
        assert len(boxes) >= 3
        assert all(x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height for x0, y0, x1, y1 in boxes)
        for i, one in enumerate([tag, *boxes]):
            for other in boxes[i:]:
                apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
                assert apart, (one, other, view.ask("words", run))


def test_many_dimensions_come_a_page_at_a_time(visit, page_of, torch_of, bundle_of) -> None:
    view = visit(page_of("twenty"))
    order = np.argsort(-np.array(bundle_of("twenty").manifest["runs"][0]["rates"]), kind="stable")

    def shown() -> list[int]:
        return view.page.locator("#sliders input").evaluate_all(
            "(all) => all.filter((e) => e.checkVisibility()).map((e) => Number(e.id.slice(7)))"
        )

    assert shown() == order[:10].tolist()
    assert view.page.locator("#sliders-note").inner_text() == "1–10 of 20, most rate first"
    assert view.page.locator("#sliders-before").is_disabled()
    view.page.locator("#sliders-after").click()
    view.settle()
    assert shown() == order[10:].tolist()
    assert view.page.locator("#sliders-after").is_disabled()
    slider, z = view.page.locator(f"#slider-{order[10]}"), view.ask("state()")["z"]
    z[order[10]] = -float(slider.get_attribute("max"))
    strip = view.canvas(f".slider:has(#slider-{order[10]}) canvas")
    assert np.abs(strip[:, :8].ravel() - 255 * torch_of("twenty").mean(z)).max() <= 0.51
    view.page.locator("#sliders-before").click()
    assert shown() == order[:10].tolist()


def test_two_runs_of_many_dimensions_show_six_at_a_time(visit, page_of) -> None:
    view = visit(page_of(*MANY))
    assert view.page.locator("#sliders-note").inner_text() == "1–6 of 20, most rate first"
    assert "the sliders set the other 18 dimensions" in view.page.locator("#where").inner_text()


def test_the_theme_can_be_switched(visit, page_of) -> None:
    view = visit(page_of("with KL"))
    colour = "getComputedStyle(document.body).backgroundColor"
    assert view.page.evaluate(colour) == "rgb(255, 255, 255)"
    view.page.locator("#theme").click()
    assert view.page.evaluate(colour) == "rgb(20, 23, 28)"
    view.settle()
    assert visit(view.page.url).page.evaluate(colour) == "rgb(20, 23, 28)"
