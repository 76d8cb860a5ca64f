"The page of a map in Chromium: at two widths, light and dark, with mouse, fingers and keys"
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import all_digits

from self_supervised_bt.maps import map_page

playwright = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
SIZES = {"wide": (1280, 800), "narrow": (390, 844)}
WIDTHS = {**SIZES, "half": (500, 700)}
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as p:
        own = p.chromium.executable_path   # of `python -m playwright install chromium`
        path = own if Path(own).exists() else shutil.which("chromium") or shutil.which("google-chrome")
        if path is None: pytest.skip("there is no browser: apt-get install chromium")
        try: browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as e: pytest.skip(f"{path} does not start: {str(e).splitlines()[0]}")
        yield browser
        browser.close()


def digits(n=300):
    x, y = all_digits()
    names = [f"/photos/{int(c)}/{i:03}{HOSTILE if i == 7 else ''}.png" for i, c in enumerate(y[:n])]
    h = list(x[:n].flatten(1).float().numpy())
    return pd.DataFrame({"file": names, "label": y[:n].tolist(), "h": h}), x[:n]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    table, x = digits()
    return map_page(table, tmp_path_factory.mktemp("page")/"map.html", images=x, clusters=5, colour="label")


@pytest.fixture
def opened(chromium, file):
    "Opens the page; at the end of the test nothing may have been said in its console, nor asked of the network"
    said, asked, contexts = [], [], []
    def listen(m):   # these tests read the canvas more than once, which Chromium remarks on
        if "willReadFrequently" not in m.text: said.append(m.text)
    def open_(width="wide", file=file, **options):
        w, h = WIDTHS[width]
        contexts.append(chromium.new_context(viewport={"width": w, "height": h}, **options))
        page = contexts[-1].new_page()
        page.on("console", listen)
        page.on("pageerror", lambda e: said.append(str(e)))
        page.on("request", lambda r: asked.append(r.url))
        page.on("dialog", lambda d: said.append("dialog"))
        page.goto(file.as_uri())
        settled(page)
        return page
    yield open_
    for context in contexts: context.close()
    assert said == [] and [u for u in asked if not u.startswith(("file:", "data:"))] == []


def settled(page):
    "Wait until the sheets are decoded, and what was asked for is drawn"
    ready = "sheets.every(s => s.complete && s.naturalWidth) && !due && !flying"
    for _ in range(200):   # not `wait_for_function`, which the page's own security policy forbids
        if page.evaluate(ready): return
        page.wait_for_timeout(25)
    raise AssertionError("the page did not come to rest in five seconds")


def colours(page):
    "How many pixels of the map have which colour (the commonest first)"
    pixels = page.evaluate("""() => {
      const c = document.getElementById('canvas'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
      const counts = {};
      for (let i = 0; i < d.length; i += 4) if (d[i+3] > 250) {
        const key = [d[i], d[i+1], d[i+2]].join();
        counts[key] = (counts[key] || 0) + 1;
      }
      return counts; }""")
    return {tuple(map(int, key.split(","))): n for key, n in pixels.items()}


def spot_of(page, i):
    "Where an image is on the screen"
    x, y = page.evaluate(f"place({i})")
    box = page.locator("#canvas").bounding_box()
    return box["x"] + x, box["y"] + y


def drawn(page): return page.evaluate("[...cells().rows.values()]")
def go(page, i): page.mouse.move(*spot_of(page, i))
def click(page, i): page.mouse.click(*spot_of(page, i))
def lines(page, place): return page.locator(f"{place} p").all_inner_texts()


@pytest.mark.parametrize("width", WIDTHS)
def test_every_image_of_the_whole_map_is_inside_it(opened, width):
    page = opened(width)
    outside = page.evaluate("""[...cells().rows.values()].filter(i => {
      const [x, y] = place(i), half = cellSize()*view.scale/2;
      return x < half || y < half || x > width - half || y > height - half; }).length""")
    assert outside == 0 and len(drawn(page)) > 30


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", SIZES)
def test_nothing_overflows_and_the_map_is_drawn(opened, width, scheme):
    page = opened(width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[width][0]
    assert page.locator("#canvas").bounding_box()["height"] > 300
    found = colours(page)
    for colour in page.evaluate("data.palette"):   # ten classes have a frame each
        assert found.get(tuple(int(colour[i:i+2], 16) for i in (1, 3, 5)), 0) > 20
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(v) for v in background[4:-1].split(","))
    assert brightness > 600 if scheme == "light" else brightness < 150
    cut = page.evaluate("""[...document.querySelectorAll('header *, #panel *')].filter(e =>
      e.offsetParent && e.clientWidth && getComputedStyle(e).overflowX === 'visible' &&
      e.scrollWidth > e.clientWidth + 1)
      .map(e => e.tagName + '#' + e.id)""")
    assert cut == [], "words are wider than their place"


@pytest.mark.parametrize("width", SIZES)
def test_pointing_shows_image_name_and_label(opened, width):
    page = opened(width)
    i = drawn(page)[5]
    table, x = digits()
    go(page, i)
    settled(page)
    assert page.locator("#tip").is_visible()
    assert lines(page, "#tip")[:2] == [table["file"][i].removeprefix("/photos/"), f"label: {table['label'][i]}"]
    shown = page.evaluate("""[...document.querySelector('#tip canvas').getContext('2d').getImageData(0, 0, 8, 8).data]
      .filter((v, i) => i % 4 === 0)""")
    assert np.array_equal(np.array(shown).reshape(8, 8), x[i, 0].numpy())
    box, edge = page.locator("#tip").bounding_box(), page.locator("#map").bounding_box()
    assert box["x"] >= edge["x"] and box["x"] + box["width"] <= edge["x"] + edge["width"]
    page.mouse.move(3, 3)
    assert page.locator("#tip").is_hidden()


@pytest.mark.parametrize("mode", ["images", "points"])
@pytest.mark.parametrize("width", SIZES)
def test_a_click_shows_the_neighbours(opened, width, mode):
    page = opened(width)
    page.click(f"#as-{mode}")
    settled(page)
    i = drawn(page)[9]
    click(page, i)
    settled(page)
    i = page.evaluate("chosen")   # a point may lie on another
    table, x = digits()
    h = torch.nn.functional.normalize(x.flatten(1).double(), dim=1)
    similarity, nearest = (h @ h[i]).index_fill(0, torch.tensor(i), -1).topk(8)
    texts = page.locator("#near button").evaluate_all("buttons => buttons.map(b => [b.title, b.innerText])")
    assert [t[0].split("\n")[0] for t in texts] == [table["file"][int(j)].removeprefix("/photos/") for j in nearest]
    assert np.allclose([float(t[1]) for t in texts], similarity, atol=.0051)
    assert lines(page, "#about")[0] == table["file"][i].removeprefix("/photos/")
    page.locator("#near button").nth(2).click()
    assert page.evaluate("chosen") == int(nearest[2]), "a neighbour is the next image to look from"
    page.click("#clear")
    assert page.locator("#chosen").is_hidden() and page.evaluate("chosen") == -1


def test_zoom_by_wheel_buttons_and_drag(opened):
    page = opened()
    i = drawn(page)[3]
    x, y = map(round, spot_of(page, i))
    world = "[(%s - canvas.getBoundingClientRect().left - width/2)/view.scale + view.x, view.scale]"
    before = page.evaluate(world % x)
    page.mouse.move(x, y)
    page.mouse.wheel(0, -300)
    settled(page)
    after = page.evaluate(world % x)
    assert after[1] > 1.5*before[1] and after[0] == pytest.approx(before[0], abs=1e-6), "it zooms at the pointer"
    page.mouse.down()
    page.mouse.move(x + 80, y, steps=4)
    page.mouse.up()
    moved = page.evaluate(world % (x + 80))
    assert moved[0] == pytest.approx(before[0], abs=1e-4) and page.evaluate("chosen") == -1, "a drag is no click"
    page.click("#in")
    assert page.evaluate("view.scale") > after[1]
    page.click("#all")
    assert page.evaluate("[view.x, view.y, view.scale/whole]") == [.5, .5, 1]


def test_more_images_appear_where_it_is_zoomed(opened):
    page = opened()
    few = len(drawn(page))
    page.evaluate("zoom(4)")
    assert len(drawn(page)) > few
    page.evaluate("zoom(100)")
    assert len(drawn(page)) > 290


def test_fingers(opened):
    page = opened("narrow", has_touch=True)
    i = drawn(page)[4]
    page.touchscreen.tap(*spot_of(page, i))
    settled(page)
    assert page.locator("#tip").is_visible() and page.locator("#near button").count() == 8
    page.evaluate("""() => {
      const box = canvas.getBoundingClientRect(), send = (type, id, x, y) => canvas.dispatchEvent(new PointerEvent(type,
        {pointerId: id, pointerType: 'touch', clientX: box.left + x, clientY: box.top + y, bubbles: true}));
      canvas.setPointerCapture = () => {};
      send('pointerdown', 1, 150, 200); send('pointerdown', 2, 200, 200);
      send('pointermove', 2, 250, 200); send('pointermove', 1, 100, 200);
      send('pointerup', 1, 100, 200); send('pointerup', 2, 250, 200); }""")
    assert page.evaluate("view.scale/whole") == pytest.approx(3, rel=1e-6), "fingers three times as far apart"


def test_keys(opened):
    page = opened()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "canvas": break
    settled(page)
    assert page.locator("#tip").is_visible(), "the map has the focus, and the image in its middle is shown"
    start = page.evaluate("hover")
    page.keyboard.press("ArrowRight")
    right = page.evaluate("hover")
    assert page.evaluate(f"place({right})[0] > place({start})[0]")
    page.keyboard.press("Enter")
    assert page.evaluate("chosen") == right and page.locator("#near button").count() == 8
    assert "most similar images are listed" in page.locator("#said").inner_text()
    page.keyboard.press("Escape")
    assert page.evaluate("chosen") == -1
    page.keyboard.press("+")
    assert page.evaluate("view.scale") > page.evaluate("whole")
    page.keyboard.press("Shift+ArrowRight")
    assert page.evaluate("view.x") > .5
    page.keyboard.press("0")
    assert page.evaluate("view.scale") == page.evaluate("whole")


def test_the_legend_filters(opened):
    page = opened()
    y = digits()[0]["label"].to_numpy()
    buttons = page.locator("#legend button")
    assert buttons.count() == 10 and buttons.first.inner_text().split() == ["0", str((y == 0).sum())]
    buttons.first.click()
    assert buttons.first.get_attribute("aria-pressed") == "false"
    assert set(y[drawn(page)]) == set(range(1, 10))
    page.click("#show-none")
    assert drawn(page) == []
    page.locator("#legend button").nth(4).click()
    assert set(y[drawn(page)]) == {4}
    page.click("#show-all")
    assert set(y[drawn(page)]) == set(range(10))
    page.select_option("#colour", label="cluster")
    assert buttons.count() == 5
    page.select_option("#colour", label="none")
    assert page.locator("#legend-part").is_hidden()


def test_find_by_name(opened):
    page = opened()
    page.fill("#find", "/00")
    assert page.locator("#found").inner_text() == "10 found"
    page.press("#find", "Enter")
    first = page.evaluate("chosen")
    page.press("#find", "Enter")
    assert first < page.evaluate("chosen") < 10
    page.fill("#find", "")
    assert page.locator("#found").inner_text() == ""


def test_names_are_text_and_nothing_else(opened):
    page = opened()
    page.evaluate("setHover(7); choose(7)")
    assert HOSTILE in lines(page, "#tip")[0] and HOSTILE in lines(page, "#about")[0]
    assert page.locator("img").count() == 0


def test_dark_mode_is_followed_while_the_page_is_open(opened):
    page = opened(color_scheme="light")
    light = page.evaluate("theme.page")
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(100)
    settled(page)
    assert page.evaluate("theme.page") != light


def test_without_images_and_classes(opened, tmp_path):
    table = digits()[0].drop(columns="label").assign(file=[f"{i}" for i in range(300)])
    with pytest.warns(UserWarning, match="300 of 300 files"): file = map_page(table, tmp_path/"plain.html")
    page = opened("narrow", file)
    assert page.evaluate("mode") == "points" and page.locator("#as-images").is_hidden()
    click(page, 11)
    settled(page)
    assert page.locator("#near button").count() == 8 and sum(colours(page).values()) > 300


def test_many_classes_have_shapes_and_a_search(opened, tmp_path):
    table, x = digits()
    table = table.assign(label=[None if i < 20 else f"class {i % 60:02}" for i in range(300)])
    page = opened("narrow", map_page(table, tmp_path/"many.html", images=x))
    assert page.evaluate("[-1, 0, 10, 20, 30, 40].map(shapeOf)") == ["ring", "circle", "square", "triangle", "diamond",
                                                                     "cross"]
    assert page.locator("#legend button").count() == 61
    page.fill("#legend-find", "class 07")
    assert page.locator("#legend button").count() == 1
    page.click("#as-points")
    settled(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_twenty_thousand_points(opened, tmp_path):
    rng = np.random.default_rng(0)
    xy = rng.standard_normal((20000, 2))
    table = pd.DataFrame({"index": range(20000), "label": rng.integers(0, 10, 20000), "map_x": xy[:, 0],
                          "map_y": xy[:, 1], "h": list(rng.standard_normal((20000, 4)).astype(np.float32))})
    page = opened(file=map_page(table, tmp_path/"large.html", limit=None))
    took = page.evaluate("""() => {
      const start = performance.now();
      for (let i = 0; i < 10; i++) { view.x += .001; draw(); }
      ctx.getImageData(0, 0, 1, 1);   // all is drawn by now
      return (performance.now() - start)/10; }""")
    assert page.evaluate("n") == 20000 and took < 200   # milliseconds on a busy core, without a graphics card
    found = colours(page)
    assert all(found[tuple(int(c[i:i+2], 16) for i in (1, 3, 5))] > 500 for c in page.evaluate("data.palette"))
    page.fill("#find", "image 1999")
    settled(page)
    assert 11*5 < sum(colours(page).values()) < 11*60, "the eleven that were found are drawn, all others faintly"
    page.evaluate("setHover(19995)")
    assert lines(page, "#tip")[0] == "image 19995"
