"""The pack in ComfyUI's page: the help pages, and our script in a headless browser.

The browser tests run when COMFYUI_DIR is set, `playwright` is installed (`pip install playwright`)
and a Chromium is found: the system's, or Playwright's own (`playwright install chromium`).
COMFYUI_FRONTEND may name a folder with another frontend than the one that ComfyUI brings.
"""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageStat

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "web/docs"
STRINGS = {
    language: json.loads((ROOT / f"locales/{language}/nodeDefs.json").read_text("utf-8"))
    for language in ("en", "zh")
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EXAMPLE = "1 erase an object (bundled model)"


# ------------------------------------------------------------------------ the help pages


def help_pages(name):
    """language -> the page that ComfyUI shows: the one of the language, or the fallback beside."""
    return {
        "en": (DOCS / f"{name}.md").read_text("utf-8"),
        "zh": (DOCS / name / "zh.md").read_text("utf-8"),
    }


@pytest.mark.parametrize("name", STRINGS["en"])
def test_every_node_has_a_help_page_in_both_languages_under_its_name(name):
    for language, page in help_pages(name).items():
        assert page.startswith(f"# {STRINGS[language][name]['display_name']}\n"), language


@pytest.mark.parametrize("name", STRINGS["en"])
def test_both_help_pages_show_the_same_pictures_and_each_exists(name):
    # ComfyUI looks for pictures in docs/, whichever folder the page itself is in.
    shown = {
        language: re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
        for language, page in help_pages(name).items()
    }
    assert shown["zh"] == shown["en"] != []
    for picture in shown["en"]:
        assert (DOCS / picture).is_file(), picture


@pytest.mark.parametrize("name", STRINGS["en"])
def test_both_help_pages_have_the_same_sections_and_examples(name):
    english, chinese = help_pages(name).values()
    for mark in (r"(?m)^- ", r"(?m)^\*\*", r"(?m)^!\["):
        assert len(re.findall(mark, english)) == len(re.findall(mark, chinese)), mark
    assert ("**Example.**" in english) and ("**示例。**" in chinese)


@pytest.mark.parametrize("name", STRINGS["en"])
def test_what_a_chinese_help_page_sets_in_bold_is_what_the_node_shows(name):
    node = STRINGS["zh"][name]
    named = {entry["name"] for kind in ("inputs", "outputs") for entry in node[kind].values()}
    headings = {"示例。", "出错时。", "顺序。", "用 0.1 保存的工作流。"}
    for bold in re.findall(r"\*\*([^*]+)\*\*", help_pages(name)["zh"]):
        assert bold in headings or set(bold.split("、")) <= named, bold


def test_no_help_page_is_left_over():
    pages = {path.relative_to(DOCS).parts[0] for path in DOCS.rglob("*.md")}
    assert {page.removesuffix(".md") for page in pages} == STRINGS["en"].keys()


# ------------------------------------------------------------------------ the examples

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_checkpoint_that_a_workflow_names_can_be_downloaded_from_its_node(path):
    for node in json.loads(path.read_text("utf-8"))["nodes"]:
        named = node["type"] in ("CheckpointLoaderSimple", "RealEraSaveErasedCheckpoint")
        if named and not node["widgets_values"][0].startswith("bundled"):
            [model] = node["properties"]["models"]
            assert model["name"] == node["widgets_values"][0]
            assert model["directory"] == "checkpoints"
            assert re.fullmatch(
                rf"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/{re.escape(model['name'])}"
                r"(\?download=true)?",
                model["url"],
            )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_picture_of_a_workflow_can_be_seen(path):
    with Image.open(path.with_suffix(".jpg")) as picture:
        grey = ImageStat.Stat(picture.convert("L"))
    assert grey.mean[0] > 120 and grey.stddev[0] > 20


# ------------------------------------------------------------------------ the browser


class Window:
    """ComfyUI's page in a browser, with what a user does to it."""

    def __init__(self, page, address):
        self.page = page
        self.errors = []
        page.on("pageerror", lambda error: self.errors.append(f"{error.message}\n{error.stack}"))
        page.on("console", self._note)
        page.goto(address, timeout=180_000)
        self.until("() => window.app?.graph && app.extensionManager?.command")
        # Every text that a canvas shows: its box, its colour and what it stands on.
        self.do(
            """() => {
                const { fillText, clearRect } = CanvasRenderingContext2D.prototype;
                CanvasRenderingContext2D.prototype.fillText = function (text, x, y, ...more) {
                    if (this.canvas.closest('.realera-view')) {
                        const { width } = this.measureText(text);
                        const left = x - (this.textAlign === 'center' ? width / 2 : 0);
                        (this.canvas.texts ??= []).push(
                            { text, color: this.fillStyle, box: [left, y - 8, left + width, y] });
                    }
                    return fillText.call(this, text, x, y, ...more);
                };
            }"""
        )

    def _note(self, message):
        if message.type == "error":
            self.errors.append(f"{message.text}\n{message.location['url']}")

    @property
    def our_errors(self):
        """Errors that our script or a call of it has a part in."""
        return [error for error in self.errors if "realera" in error.lower()]

    def do(self, script, argument=None):
        return self.page.evaluate(script, argument)

    def until(self, condition, argument=None, seconds=180):
        self.page.wait_for_function(condition, arg=argument, timeout=1000 * seconds, polling=100)

    def open_example(self):
        """From the template browser, as a user does."""
        self.do("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        self.page.get_by_text("RealEra", exact=True).click(timeout=180_000)
        self.page.get_by_text(EXAMPLE).first.click()
        self.until("() => app.graph._nodes.some(n => n.comfyClass === 'RealEraCompare')")

    def look_at(self, kind):
        """Scrolls to a node at full size; returns where its corner is in the window."""
        corner = self.do(
            """kind => {
                const { canvas, graph } = app;
                const node = graph._nodes.find((n) => n.comfyClass === kind);
                canvas.ds.scale = 1;
                canvas.ds.offset = [200 - node.pos[0], 200 - node.pos[1]];
                canvas.setDirty(true, true);
                const { x, y } = canvas.canvas.getBoundingClientRect();
                return [x + 200, y + 200];
            }""",
            kind,
        )
        self.settle()
        return corner

    def settle(self):
        """Until the page has been drawn again, twice: elements follow the canvas later."""
        for _ in range(2):
            self.do("() => new Promise((r) => requestAnimationFrame(() => setTimeout(r, 150)))")

    def speak(self, language):
        """Changes the page's language, and waits until all has been drawn anew in it."""
        self.do("id => app.extensionManager.setting.set('Comfy.Locale', id)", language)
        self.until(
            """chinese => /[\u4e00-\u9fff]{2}/.test(document.body.innerText) === chinese""",
            language == "zh",
        )
        self.settle()

    def set(self, kind, **values):
        self.do(
            """([kind, values]) => {
                const node = app.graph._nodes.find((n) => n.comfyClass === kind);
                for (const widget of node.widgets) {
                    if (widget.name in values) widget.value = values[widget.name];
                }
            }""",
            [kind, values],
        )

    def value(self, kind, name):
        return self.do(
            """([kind, name]) => app.graph._nodes.find((n) => n.comfyClass === kind)
                .widgets.find((w) => w.name === name).value""",
            [kind, name],
        )

    def press(self, kind, name, value=None):
        """Sets a switch of ours, or presses a button."""
        self.do(
            """([kind, name, value]) => {
                const node = app.graph._nodes.find((n) => n.comfyClass === kind);
                const widget = node.widgets.find((w) => w.name === name);
                if (value !== null) widget.value = value;
                widget.callback(value);
            }""",
            [kind, name, value],
        )
        self.settle()

    def type_number(self, kind, name, number):
        """Clicks on a number of a node and types another one."""
        x, y = self.look_at(kind)
        width, down = self.do(
            """([kind, name]) => {
                const node = app.graph._nodes.find((n) => n.comfyClass === kind);
                return [node.size[0], node.widgets.find((w) => w.name === name).last_y + 10];
            }""",
            [kind, name],
        )
        self.page.mouse.click(x + width / 2, y + down)
        entry = self.page.locator(".graphdialog input")
        entry.fill(str(number))
        entry.press("Enter")
        self.settle()

    def view(self, kind, name):
        """The pixels of one of our canvases, as a PNG in base64."""
        return self.do(
            """([kind, name]) => {
                const node = app.graph._nodes.find((n) => n.comfyClass === kind);
                const { element } = node.widgets.find((w) => w.name === name);
                return element.querySelector('canvas').toDataURL();
            }""",
            [kind, name],
        )

    def texts(self, kind):
        """What the canvas of a node's view shows: the texts of its last drawing."""
        return self.do(
            """kind => {
                const node = app.graph._nodes.find((n) => n.comfyClass === kind);
                const view = node.widgets.find((w) => w.element?.matches('.realera-view')).element;
                const canvas = view.querySelector('canvas');
                canvas.texts = [];
                view.repaint();
                return canvas.texts;
            }""",
            kind,
        )

    def run(self, seconds=600):
        """Presses Run, waits until everything has ended, and returns what the loss chart showed:
        the columns of its canvas that its curve had reached after every tenth step."""
        self.do(
            """() => {
                const node = app.graph._nodes.find((n) => n.comfyClass === 'RealEraLoraAlign');
                const { element } = node.widgets.find((w) => w.name === 'realera_loss');
                const canvas = element.querySelector('canvas');
                window.reached = new Set();
                app.api.addEventListener('realera.step', ({ detail }) => {
                    if (detail.step % 10) return;
                    const { width, height } = canvas;
                    const { data } = canvas.getContext('2d').getImageData(0, 0, width, height);
                    let last = 0;
                    for (let k = 0; k < data.length; k += 4) {
                        const [r, g, b] = data.subarray(k, k + 3);
                        if (r > 200 && g < 140 && b < 150) last = Math.max(last, (k / 4) % width);
                    }
                    reached.add(last);
                });
                for (const end of ['success', 'error', 'interrupted'])
                    app.api.addEventListener(`execution_${end}`, ({ detail }) => {
                        window.outcome = detail.exception_message ?? end;
                    });
            }"""
        )
        self.page.get_by_test_id("queue-button").click()
        self.until("() => window.outcome", seconds=seconds)
        assert self.do("() => window.outcome") == "success"
        self.settle()
        return self.do("() => [...reached].sort((a, b) => a - b)")


@pytest.fixture(scope="module")
def browser(server):
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=found, args=["--no-sandbox", "--disable-gpu"]
            )
        except api.Error as error:
            pytest.skip(f"no browser: {error.message.splitlines()[0]}")
        server.post("/settings/Comfy.TutorialCompleted", True)  # else its templates lie on top
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def window(server, browser):
    made = Window(browser.new_page(viewport={"width": 1400, "height": 1100}), server.address)
    made.open_example()
    return made


def shorten(window):
    """A seed that no other test has left in the server's cache, and less to do."""
    window.set("RealEraNeighborSampler", seed=5)
    window.set("RealEraLoraAlign", steps=60, images=2)
    window.set("RealEraCompare", steps=6, seeds=1)


@pytest.fixture(scope="module")
def ran(window):
    """The window after a short run of workflow 1, and what its loss chart showed meanwhile."""
    shorten(window)
    window.look_at("RealEraLoraAlign")
    return window, window.run()


def test_workflow_1_opens_from_the_template_browser_without_a_red_node(window):
    kinds = window.do("() => app.graph._nodes.map((n) => n.comfyClass ?? n.type)")
    graph = json.loads((ROOT / f"workflows/{EXAMPLE}.json").read_text("utf-8"))
    assert sorted(kinds) == sorted(node["type"] for node in graph["nodes"])
    red = window.do(
        """() => app.graph._nodes.filter((n) => n.has_errors || !(n.type in
            LiteGraph.registered_node_types)).map((n) => n.type)"""
    )
    assert red == []
    assert window.our_errors == []


def test_the_loss_chart_grows_while_the_training_runs(ran):
    _, reached = ran
    assert len(reached) == 6, reached  # of 60 steps


def test_the_neighbourhood_moves_with_s1_and_s2_and_comes_back(ran):
    window, _ = ran
    kind, view = "RealEraNeighborSampler", "realera_neighborhood"
    window.look_at(kind)
    window.press(kind, "realera_button")  # shows the advanced inputs of a classic node
    window.press(kind, "realera_toggle", False)
    first = window.view(kind, view)
    window.type_number(kind, "s2", 0.9)
    narrow = window.view(kind, view)
    window.type_number(kind, "s1", 0.95)
    ring = window.view(kind, view)
    assert len({first, narrow, ring}) == 3
    window.press(kind, "realera_toggle", True)
    window.press(kind, "realera_toggle", False)  # what was mined, in a view of the same height
    assert window.view(kind, view) == first
    window.press(kind, "realera_toggle", True)
    window.press(kind, "realera_button")


def test_a_click_on_a_word_of_the_scope_report_keeps_it_and_another_gives_it_back(ran):
    window, _ = ran
    assert window.value("RealEraNeighborSampler", "leave_out") == ""
    window.look_at("RealEraClosedFormEdit")
    row = window.page.locator(".realera-scope > div[title]").nth(2)
    word = row.locator("span").first.inner_text()
    row.click()
    assert window.value("RealEraNeighborSampler", "leave_out") == word
    window.page.locator(".realera-scope > div[title]").nth(2).click()
    assert window.value("RealEraNeighborSampler", "leave_out") == ""


def test_a_page_opened_anew_shows_what_is_taken_from_the_cache(server, ran):
    window, _ = ran  # the server has everything in its cache
    fresh = Window(window.page.context.browser.new_page(), server.address)
    fresh.open_example()
    shorten(fresh)
    kind, view = "RealEraNeighborSampler", "realera_neighborhood"
    fresh.look_at(kind)
    before = fresh.view(kind, view)
    fresh.run()
    fresh.look_at(kind)
    assert fresh.view(kind, view) != before
    assert fresh.page.locator(".realera-scope > div[title]").count() > 10
    fresh.page.close()


def test_the_slider_shows_before_and_after_of_every_prompt(ran):
    window, _ = ran
    window.look_at("RealEraCompare")
    slider = window.page.locator(".realera-slider")
    slider.scroll_into_view_if_needed()
    prompts = window.value("RealEraCompare", "prompts").split("\n")
    names = slider.locator(".realera-prompt option").all_inner_texts()
    assert names == [f"{k + 1}: {prompt}" for k, prompt in enumerate(prompts)]
    seen = []
    for name in names:
        slider.locator(".realera-prompt").select_option(name)
        window.until(
            """() => [...document.querySelectorAll('.realera-slider img')]
                .every((image) => image.complete && image.naturalWidth === 64)"""
        )
        seen += slider.locator("img").evaluate_all("images => images.map((i) => i.src)")
    assert len(set(seen)) == 2 * len(prompts)
    after = slider.locator("img").nth(1)
    for share in (10, 80):
        slider.locator("input").fill(str(share))
        assert after.evaluate("image => image.style.clipPath") == f"inset(0px 0px 0px {share}%)"


def test_the_views_are_still_there_when_the_user_comes_back_from_another_tab(ran):
    window, _ = ran
    kind = "RealEraNeighborSampler"

    def tab(name):
        return window.page.get_by_text(name).filter(visible=True).first

    window.look_at(kind)
    before = window.texts(kind)
    tab("Unsaved Workflow").click()
    window.until("() => !app.graph._nodes.some((n) => n.comfyClass === 'RealEraCompare')")
    tab(EXAMPLE[:12]).click()
    window.until("() => app.graph._nodes.some((n) => n.comfyClass === 'RealEraCompare')")
    window.look_at(kind)
    assert {one["text"] for one in window.texts(kind)} == {one["text"] for one in before} != set()
    assert window.page.locator(".realera-scope > div[title]").count() > 10
    assert window.page.locator(".realera-slider .realera-prompt option").count() == 4


def test_the_help_of_a_node_opens_in_chinese_with_its_picture(ran):
    window, _ = ran
    window.speak("zh")
    try:
        x, y = window.look_at("RealEraCompare")
        window.page.mouse.click(x + 100, y - 15)
        window.page.get_by_test_id("info-button").click()
        page = window.page.locator(".node-help-content")
        title = STRINGS["zh"]["RealEraCompare"]["display_name"]
        page.get_by_role("heading", name=title).wait_for()
        window.until(
            """() => [...document.querySelectorAll('.node-help-content img')]
                .some((image) => image.complete && image.naturalWidth > 100)"""
        )
    finally:
        window.do("() => app.extensionManager.setting.set('Comfy.Locale', 'en')")


def test_nothing_that_the_page_did_ended_in_an_error_of_ours(ran):
    window, _ = ran
    assert window.our_errors == []


# ------------------------------------------------------------------------ both renderings

MINING = [f"{word} {k}" for k in range(6) for word in ("plane", "jet", "runway", "ship", "Zoë")]
RING = {
    "source": "vocabulary",
    "concepts": [["airplane", "ground"]],
    "radius": 10.0,
    "s1": 1.0,
    "s2": 0.55,
    "d1": 4.0,
    "d2": 9.0,
    "words": [[word, 0.98 - 0.02 * k, k < 20] for k, word in enumerate(MINING)],
    "exclude": [],
    "neighbors": [],
    "beyond": [],
}
DOUBT = "the anchor 'ground' is none that the bundled model was trained to draw"
POINTS = {"words": [], "source": "isotropic", "s1": 0.7, "s2": 0.4, "neighbors": [[1.0, 3.0]] * 3}
FILES = [{"filename": f"{name}.png", "subfolder": "", "type": "input"} for name in ("red", "blue")]
SENT = {  # what a run sends to each node that has a view
    "RealEraNeighborSampler": {"realera_geometry": [RING], "text": ["30 words", DOUBT]},
    "RealEraBeyondSampler": {"realera_geometry": [RING | POINTS]},
    "RealEraClosedFormEdit": {
        "realera_scope": [
            [w, "airplane", 1 - k / 90, 0.5, None, k < 45, "tree"]
            for k, w in enumerate([*MINING] * 3)
        ]
    },
    "RealEraLoraAlign": {"realera_loss": [[k + 1, 1 / (k + 1)] for k in range(50)]},
    "RealEraCompare": {
        "realera_models": ["original", "erased", "aligned"],
        "realera_images": [
            {
                "prompt": f"prompt {k}",
                "files": [FILES[0], FILES[1], FILES[0]],
                "verdicts": [f"airplane {k}", f"tree {k}", f"bush {k}"],
            }
            for k in range(4)
        ],
    },
}
PALETTES = ("dark", "light", "solarized", "arc", "nord", "github")
LEAST, MOST = 150, 450  # pixels that a view is high, of a node as it is added


class Sheet(Window):
    """A page with one node of each kind that has a view, as it is added, and what happens to it."""

    def __init__(self, page, address, vue):
        super().__init__(page, address)
        self.do("v => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', v)", vue)

    def add(self, fill=True):
        """Empties the page and adds the nodes anew; shows what a run would send them."""
        self.do("() => app.graph.clear()")
        self.settle()  # else Nodes 2.0 of 1.49 keeps what it shows of a node with the same number
        self.do(
            """kinds => {
                let x = 0;
                for (const kind of kinds) {
                    const node = LiteGraph.createNode(kind);
                    node.pos = [x, 0];
                    x += node.size[0] + 100;
                    app.graph.add(node);
                }
                app.canvas.ds.scale = 0.5;
                app.canvas.ds.offset = [100, 200];
                app.canvas.setDirty(true, true);
            }""",
            list(SENT),
        )
        self.settle()
        if fill:
            self.fill()

    def fill(self):
        self.do(
            """sent => {
                for (const node of app.graph._nodes) node.onExecuted?.(sent[node.comfyClass] ?? {});
            }""",
            SENT,
        )
        self.page.wait_for_function(
            "() => document.querySelector('.realera-slider img')?.naturalWidth"
        )
        self.settle()

    def heights(self):
        """kind -> how high its view is, in the canvas's own pixels."""
        return self.do(
            """() => Object.fromEntries(app.graph._nodes.flatMap((node) => {
                const view = node.widgets?.find((w) => w.element?.matches('.realera-view'));
                if (!view) return [];
                const { height } = view.element.getBoundingClientRect();
                return [[node.comfyClass, height / app.canvas.ds.scale]];
            }))"""
        )

    def rested(self, locator):
        """Where an element is, once it has stopped moving."""
        box = None
        while box != (box := locator.bounding_box()) or box is None:
            self.settle()
        return box

    def hanging_out(self):
        """The kinds whose view reaches below their node."""
        return self.do(
            """() => app.graph._nodes.filter((node) => {
                const { ds, canvas } = app.canvas;
                const { element } = node.widgets.find((w) => w.element?.matches('.realera-view'));
                const around = element.closest('[data-node-id]')?.getBoundingClientRect().bottom;
                const below = canvas.getBoundingClientRect().top
                    + ds.scale * (ds.offset[1] + node.pos[1] + node.size[1]);
                return element.getBoundingClientRect().bottom > (around ?? below) + 1;
            }).map((node) => node.comfyClass)"""
        )


@pytest.fixture(scope="module", params=["classic", "Nodes 2.0"])
def sheet(request, server, browser):
    for file, color in zip(FILES, ("#ff0000", "#0000ff"), strict=True):
        Image.new("RGB", (64, 64), color).save(server.home / "input" / file["filename"])
    vue = request.param != "classic"
    page = browser.new_page(viewport={"width": 1700, "height": 1000})
    made = Sheet(page, server.address, vue)
    version = made.do("() => window.__COMFYUI_FRONTEND_VERSION__ ?? '0.0.0'")
    try:
        if vue and tuple(map(int, version.split(".")[:2])) < (1, 40):
            pytest.skip(f"Nodes 2.0 of frontend {version} shows no node of anybody rightly")
        yield made
    finally:
        made.do("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")
        page.close()


def test_views_keep_a_sensible_height_when_added_filled_and_reloaded(sheet):
    sheet.add(fill=False)
    added = sheet.heights()
    assert added.keys() == SENT.keys()
    sheet.fill()
    filled = sheet.heights()
    sheet.do("() => app.loadGraphData(app.graph.serialize())")
    sheet.settle()
    sheet.fill()
    reloaded = sheet.heights()
    for heights in (added, filled, reloaded):
        assert all(LEAST <= height <= MOST for height in heights.values()), heights
    assert sheet.hanging_out() == []


def test_a_view_grows_with_its_node(sheet):
    sheet.add()
    before = sheet.heights()
    sheet.do(
        """() => {
            for (const node of app.graph._nodes) node.setSize([node.size[0], 1300]);
            app.canvas.setDirty(true, true);
        }"""
    )
    sheet.settle()
    after = sheet.heights()
    assert all(after[kind] > before[kind] + 40 for kind in SENT), (before, after)


def boxes(sheet):
    """Kind of a node -> left, top, right and bottom as drawn with its title, in window pixels."""
    return sheet.do(
        """() => app.graph._nodes.map((node) => {
            const drawn = document.querySelector(`[data-node-id="${node.id}"]`);
            if (drawn) {
                const { left, top, right, bottom } = drawn.getBoundingClientRect();
                return [node.type, left, top, right, bottom];
            }
            const { ds, canvas } = app.canvas;
            const corner = canvas.getBoundingClientRect();
            const x = (at) => corner.left + ds.scale * (at + ds.offset[0]);
            const y = (at) => corner.top + ds.scale * (at + ds.offset[1]);
            const [left, top] = node.pos;
            return [node.type, x(left), y(top - 30), x(left + node.size[0]), y(top + node.size[1])];
        })"""
    )


SHOWN_BELOW = {"RealEraCompare": 240, "RealEraLoraAlign": 224}  # pixels that a run adds to a node


@pytest.mark.parametrize(
    "path", [p for p in WORKFLOWS if p.name[0] in "1467"], ids=lambda p: p.stem
)
def test_the_nodes_of_an_example_stay_in_their_groups_and_off_each_other(sheet, path):
    sheet.do("graph => app.loadGraphData(graph)", json.loads(path.read_text("utf-8")))
    sheet.do("() => { app.canvas.ds.scale = 0.4; app.canvas.ds.offset = [300, 300]; }")
    sheet.settle()
    if path.name[0] == "1":
        sheet.fill()
    found = boxes(sheet)
    groups = sheet.do(
        """() => app.graph._groups.map(({ pos, size }) => {
            const { ds, canvas } = app.canvas;
            const corner = canvas.getBoundingClientRect();
            const x = (at) => corner.left + ds.scale * (at + ds.offset[0]);
            const y = (at) => corner.top + ds.scale * (at + ds.offset[1]);
            return [x(pos[0]), y(pos[1]), x(pos[0] + size[0]), y(pos[1] + size[1])];
        })"""
    )
    assert len(found) > 7 and len(groups) > 2
    for number, (kind, left, top, right, bottom) in enumerate(found):
        for other, a, b, c, d in found[number + 1 :]:
            assert right <= a or c <= left or bottom <= b or d <= top, (kind, other)
        grid = 0.4 * SHOWN_BELOW.get(kind, 0)
        for a, b, c, d in groups:
            if a <= left <= c and b <= top <= d:
                assert right <= c + 1 and bottom + grid <= d + 1, kind


def test_an_example_opens_whole_and_large_enough_to_be_read_on_a_small_screen(sheet):
    size = sheet.page.viewport_size
    sheet.page.set_viewport_size({"width": 1366, "height": 768})
    try:
        sheet.do("() => app.graph.clear()")  # nodes of Nodes 2.0 name the pack as well
        sheet.settle()
        sheet.open_example()
        sheet.settle()
        # Below 8/14, ComfyUI draws no text.
        assert sheet.do("() => app.canvas.ds.scale") >= 8 / 14
        for kind, left, top, right, bottom in boxes(sheet):
            assert left >= 40 and top >= 80 and right <= 1366 and bottom <= 768, kind
    finally:
        sheet.page.set_viewport_size(size)


def test_compare_shows_no_frame_before_it_has_run_and_says_what_to_do(sheet):
    sheet.add(fill=False)
    view = sheet.page.locator(".realera-slider")
    assert not any(image.is_visible() for image in view.locator("img, select, input").all())
    view.get_by_text("Run the graph to see this.").wait_for()


def test_compare_has_room_for_four_prompts_and_not_much_more(sheet):
    sheet.add()
    sheet.set("RealEraCompare", prompts="one\ntwo\nthree\nfour")
    sheet.settle()
    box = sheet.page.locator("textarea").last
    assert box.input_value() == "one\ntwo\nthree\nfour"
    assert box.evaluate("box => box.scrollHeight - box.clientHeight") <= 1
    height = box.evaluate("box => box.getBoundingClientRect().height / app.canvas.ds.scale")
    assert height < 130


def test_no_label_of_the_neighbourhood_stands_on_another_text(sheet):
    sheet.add()
    for kind in ("RealEraNeighborSampler", "RealEraBeyondSampler"):
        texts = sheet.texts(kind)
        labels = [one for one in texts if re.match(r"[SD][12] |airplane$", one["text"])]
        assert len(labels) >= 2
        for label in labels:
            for other in texts:
                (a, b, c, d), (e, f, g, h) = label["box"], other["box"]
                apart = c <= e or g <= a or d <= f or h <= b
                assert apart or other == label, (label, other)


def test_words_of_a_crowded_neighbourhood_stay_above_what_the_node_says(sheet):
    sheet.add()
    words = [[f"word {k}", 0.98 - 0.01 * k, True] for k in range(60)]
    sheet.do(
        """sent => {
            const node = app.graph._nodes.find((n) => n.comfyClass === 'RealEraBeyondSampler');
            node.setSize([node.size[0], node.computeSize()[1]]);
            node.onExecuted(sent);
        }""",
        {"realera_geometry": [RING | {"words": words}], "text": ["60 words"]},
    )
    sheet.settle()
    texts = sheet.texts("RealEraBeyondSampler")
    [below] = [one["box"][1] for one in texts if one["text"] == "60 words"]
    drawn = [one["box"] for one in texts if one["text"].startswith("word ")]
    assert len(drawn) > 30  # of 40 in the ring and 16 beyond; no word stands on another
    assert not any(
        left < c and a < right and top < d and b < low
        for n, (left, top, right, low) in enumerate(drawn)
        for a, b, c, d in drawn[n + 1 :]
    )
    assert [box for box in drawn if box[1] < 0 or box[3] > below] == []


def test_a_doubt_about_an_anchor_stands_whole_below_the_neighbourhood(sheet):
    sheet.add()
    texts = sheet.texts("RealEraNeighborSampler")
    first = next(n for n, one in enumerate(texts) if one["text"].startswith("⚠"))
    rest = [one for one in texts[first:] if one["box"][0] == texts[first]["box"][0]]
    lines = [one["text"] for one in rest if one["text"] in f"⚠ {DOUBT}"]
    assert " ".join(lines) == f"⚠ {DOUBT}"


def test_a_node_shows_what_it_found_or_saved_and_no_progress_when_it_has_ended(sheet):
    sheet.add(fill=False)
    told = {
        "RealEraNeighborSampler": "30 words",
        "RealEraClosedFormEdit": "7 words go",
        "RealEraSaveErasure": "saved output/loras/a_1.safetensors\nsaved output/erasures/a_1",
        "RealEraSaveErasedCheckpoint": "saved output/checkpoints/a.safetensors",
    }
    sheet.do(
        """kinds => {
            for (const kind of kinds) {
                const node = LiteGraph.createNode(kind);
                node.pos = [0, 1300];
                app.graph.add(node);
            }
        }""",
        [kind for kind in told if "Save" in kind],
    )
    shown = "() => app.graph._nodes.map(n => n.widgets.some(w => w.name.includes('text-preview')))"
    sheet.do(
        """() => {
            for (const { id } of app.graph._nodes) {
                const detail = { nodeId: String(id), text: "aligning: 3 of 3, 0:00 left" };
                app.api.dispatchCustomEvent('progress_text', detail);
            }
        }"""
    )
    assert all(sheet.do(shown))
    sheet.do(
        """([sent, told]) => {
            for (const node of app.graph._nodes) {
                const { comfyClass } = node;
                const text = told[comfyClass]?.split("\\n");
                node.onExecuted({ ...sent[comfyClass], ...(text ? { text } : {}) });
            }
        }""",
        [SENT, told],
    )
    sheet.settle()
    assert not any(sheet.do(shown))
    assert "30 words" in {one["text"] for one in sheet.texts("RealEraNeighborSampler")}
    for kind in list(told)[1:]:
        inside = sheet.do(
            """kind => {
                const node = app.graph._nodes.find((n) => n.comfyClass === kind);
                const view = node.widgets.find((w) => w.element?.matches('.realera-view')).element;
                const bottom = view.getBoundingClientRect().bottom;
                const box = view.firstChild.getBoundingClientRect();
                return [view.innerText, box.bottom <= bottom + 1];
            }""",
            kind,
        )
        assert told[kind] in inside[0] and inside[1], inside


def test_the_wheel_over_the_scope_list_scrolls_it_by_whole_rows_and_zooms_nothing(sheet):
    sheet.add()
    scale = sheet.do("() => app.canvas.ds.scale")
    rows = sheet.page.locator(".realera-scope")
    cut = """list => [...list.children].filter((row) => {
        const [own, all] = [row.getBoundingClientRect(), list.getBoundingClientRect()];
        const slack = own.height / 8;
        return own.bottom > all.top + slack && own.top < all.bottom - slack
            && (own.top < all.top - slack || own.bottom > all.bottom + slack);
    }).length"""
    assert rows.evaluate(cut) == 0
    rows.hover()
    sheet.page.mouse.wheel(0, 200)
    sheet.until("() => document.querySelector('.realera-scope').scrollTop > 0", seconds=20)
    sheet.page.mouse.wheel(0, 5000)
    end = "list.scrollTop > list.scrollHeight - list.clientHeight - 1"
    sheet.until(f"() => {{ const list = document.querySelector('.realera-scope'); return {end} }}")
    assert rows.evaluate(cut) == 0
    lengths = rows.evaluate(
        """list => [...list.children].map(({ children: [, bar, share] }) =>
            [bar.firstChild.offsetWidth / bar.offsetWidth, parseFloat(share.textContent) / 100])"""
    )
    assert all(abs(length - share) < 0.02 for length, share in lengths)
    assert sheet.do("() => app.canvas.ds.scale") == scale


def test_a_drag_on_the_picture_moves_the_slider_and_nothing_else(sheet):
    sheet.add()
    # Wide and low, so that the picture is narrower than its node.
    sheet.do(
        """() => {
            const node = app.graph._nodes.find((n) => n.comfyClass === 'RealEraCompare');
            node.setSize([900, node.size[1]]);
        }"""
    )
    sheet.look_at("RealEraCompare")
    sheet.do("() => { app.canvas.ds.scale = 0.8; app.canvas.setDirty(true, true); }")
    sheet.settle()
    tabs = sheet.do("() => app.extensionManager.workflow.openWorkflows.length")
    spot = sheet.do("() => [...app.canvas.ds.offset, ...app.graph._nodes.at(-1).pos]")
    picture = sheet.page.locator(".realera-slider img").first
    box = sheet.rested(picture)
    assert abs(box["width"] - box["height"]) < 2  # the shape of the picture itself
    assert box["width"] > 100
    mouse = sheet.page.mouse
    for share in (0.25, 0.75):
        box = sheet.rested(picture)  # on a busy machine the page may only now have been drawn
        middle = box["y"] + box["height"] / 2
        mouse.move(box["x"] + box["width"] / 2, middle)
        mouse.down()
        mouse.move(box["x"] + box["width"] * share, middle, steps=8)
        mouse.up()
        sheet.settle()
        shot = Image.open(io.BytesIO(sheet.page.screenshot())).convert("RGB")
        for away, color in ((-0.05, (255, 0, 0)), (0.05, (0, 0, 255))):  # before, after
            x = box["x"] + box["width"] * (share + away)
            assert shot.getpixel((round(x), round(middle - 20))) == color
        value = sheet.page.locator(".realera-slider input").evaluate("slider => +slider.value")
        assert abs(value - 100 * share) < 2
    assert sheet.do("() => app.extensionManager.workflow.openWorkflows.length") == tabs
    assert sheet.do("() => [...app.canvas.ds.offset, ...app.graph._nodes.at(-1).pos]") == spot
    assert picture.evaluate("image => image.draggable") is False


def luminance(color):
    channels = [float(part) / 255 for part in re.findall(r"[\d.]+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted(luminance(color) + 0.05 for color in (one, other))
    return high / low


@pytest.mark.parametrize("palette", PALETTES)
def test_every_text_of_a_view_can_be_read_in_every_theme(sheet, palette):
    sheet.add()
    sheet.do("id => app.extensionManager.setting.set('Comfy.ColorPalette', id)", palette)
    sheet.settle()
    try:
        low = []
        for kind in SENT:
            ground, texts = sheet.do(
                """kind => {
                    const node = app.graph._nodes.find((n) => n.comfyClass === kind);
                    const { element } = node.widgets.find((w) =>
                        w.element?.matches('.realera-view'));
                    const texts = [...element.querySelectorAll('span, select, div')]
                        .filter((one) => one.checkVisibility() && [...one.childNodes].some((text) =>
                            text.nodeType === 3 && text.data.trim()) || one.matches('select'))
                        .map((one) => [one.textContent.slice(0, 20), getComputedStyle(one).color]);
                    return [getComputedStyle(element).backgroundColor, texts];
                }""",
                kind,
            )
            texts = [tuple(text) for text in texts]
            texts += (
                [(one["text"], hex_of(one["color"])) for one in sheet.texts(kind)]
                if (kind not in ("RealEraClosedFormEdit", "RealEraCompare"))
                else []
            )
            assert texts
            low += [(kind, *text) for text in texts if contrast(text[1], ground) < 4.5]
        assert low == []
    finally:
        sheet.do("() => app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")


def hex_of(color):
    """A colour as a canvas returns it, as CSS computes it."""
    if not color.startswith("#"):
        return color
    return f"rgb({', '.join(str(int(color[k : k + 2], 16)) for k in (1, 3, 5))})"


def connect_miner(sheet):
    sheet.do(
        """() => {
            const of = (kind) => app.graph._nodes.find((n) => n.comfyClass === kind);
            const neighbors = of('RealEraNeighborSampler'), edit = of('RealEraClosedFormEdit');
            const slot = edit.inputs.findIndex(({ name }) => /neighbors|mining/.test(name));
            neighbors.connect(0, edit, slot);
        }"""
    )


def test_words_that_were_drawn_are_marked_and_stand_there_by_what_was_drawn(sheet):
    sheet.add()
    connect_miner(sheet)
    drawn = [
        ["jet", "airplane", 0.4, 0.3, 0.93, True, "tree"],
        ["gull", "airplane", 0.9, 0.3, 0.12, False, "tree"],
    ]
    foretold = [["ship", "airplane", 0.6, 0.3, None, True, "tree"]]
    sheet.do(
        """sent => app.graph._nodes.find((n) => n.comfyClass === 'RealEraClosedFormEdit')
            .onExecuted({ realera_scope: sent })""",
        drawn + foretold,
    )
    rows = sheet.page.locator(".realera-scope > div[title]")
    assert rows.locator("span:last-child").all_inner_texts() == ["✓ 93 %", "60 %", "✓ 12 %"]
    titles = [row.get_attribute("title") for row in rows.all()]
    assert titles[2] == "90 % of the way to tree, 30 % moved, 12 % when drawn"
    assert titles[1] == "60 % of the way to tree, 30 % moved"
    fills = rows.locator("div > div").evaluate_all("bars => bars.map((bar) => bar.style.cssText)")
    assert ["concept" in one for one in fills] == [
        True,
        True,
        False,
    ]  # red: lost, by the best known
    assert ["93%" in fills[0], "60%" in fills[1], "12%" in fills[2]] == [True] * 3
    cut = "spans => spans.map((s) => s.scrollWidth - s.clientWidth)"
    assert max(rows.locator("span:last-child").evaluate_all(cut)) <= 1  # no number is cut off
    rows.nth(2).click()
    assert sheet.value("RealEraNeighborSampler", "leave_out") == "gull"
    rows.nth(2).click()
    assert sheet.value("RealEraNeighborSampler", "leave_out") == ""


def test_the_button_asks_for_anchors_and_a_click_on_one_takes_it(sheet):
    sheet.add()
    sheet.set("RealEraNeighborSampler", concepts="# mine\nairplane -> tree\nship")
    sheet.do(
        """() => {
            window.sent = null;
            const { queuePrompt } = app.api;
            app.api.queuePrompt = async (number, data) => {
                window.sent = data.output;
                app.api.queuePrompt = queuePrompt;
            };
        }"""
    )
    box = sheet.page.locator(".realera-suggestions")
    box.get_by_text("Suggest anchors").click()
    sheet.until("() => window.sent")
    [asked] = sheet.do("() => Object.values(window.sent)")  # no other node of the graph
    assert asked["class_type"] == "RealEraNeighborSampler"
    assert asked["inputs"]["concepts"] == "# mine\nairplane\nship"
    assert sheet.value("RealEraNeighborSampler", "concepts").endswith("airplane -> tree\nship")
    sheet.do(
        """sent => app.graph._nodes.find((n) => n.comfyClass === 'RealEraNeighborSampler')
            .onExecuted(sent)""",
        SENT["RealEraNeighborSampler"]
        | {"realera_suggestions": [["airplane", ["drone", "rocket"]], ["ship", ["canoe", "sea"]]]},
    )
    box.get_by_text("rocket").click()
    box.get_by_text("canoe").click()
    chosen = sheet.value("RealEraNeighborSampler", "concepts")
    assert chosen == "# mine\nairplane -> rocket\nship -> canoe"
    sheet.fill()  # a run without suggestions
    assert box.get_by_text("rocket").count() == 0


def test_a_word_that_was_left_out_by_hand_is_kept_in_whatever_case(sheet):
    sheet.add()
    connect_miner(sheet)
    sheet.set("RealEraNeighborSampler", leave_out="JET 0， zoë 1")
    sheet.fill()
    row = sheet.page.locator(".realera-scope > div[title]").filter(has_text="jet 0").first
    assert row.get_attribute("aria-pressed") == "true"
    row.click()
    assert sheet.value("RealEraNeighborSampler", "leave_out") == "zoë 1"
    row = sheet.page.locator(".realera-scope > div[title]").filter(has_text="Zoë 1").first
    row.click()
    assert sheet.value("RealEraNeighborSampler", "leave_out") == ""


def test_the_hints_of_empty_boxes_are_in_the_language_of_the_page(sheet):
    sheet.speak("zh")
    try:
        sheet.add(fill=False)
        sheet.until("() => document.querySelectorAll('textarea').length > 3", seconds=30)
        hints = sheet.page.locator("textarea").evaluate_all(
            "boxes => boxes.filter((box) => !box.value).map((box) => box.placeholder)"
        )
        assert len(hints) >= 2
        # Nodes 2.0 has a box's name above it, and shows no hint.
        assert [hint for hint in hints if hint and not re.search("[\u4e00-\u9fff]", hint)] == []
        labels = sheet.do(
            """() => app.graph._nodes.flatMap((n) => n.widgets ?? [])
                .filter(({ name }) => name === 'source' || name === 'precision')
                .map(({ options, value }) => [options.getOptionLabel(value), value])"""
        )  # shown by frontends that know this option, 1.27 not among them
        assert labels == [["词表 (vocabulary)", "vocabulary"], ["自动 (auto)", "auto"]]
        sheet.do(
            """message => app.api.dispatchCustomEvent('execution_error',
                { node_id: String(app.graph._nodes[0].id), exception_message: message,
                  traceback: [] })""",
            "line 2, 'cat -> cat': the anchor of 'cat' is the concept itself: name what to draw "
            "instead, for example 'airplane -> tree'",
        )
        [message] = errors_of(sheet, "RealEraNeighborSampler")
        assert message == (
            "第 2 行 'cat -> cat'：'cat' 的锚点就是它自己：请写出应画的事物，例如 airplane -> tree"
        )
        sheet.page.keyboard.press("Escape")  # the frontend's dialog
        sheet.do("() => app.api.dispatchCustomEvent('execution_start', {})")
    finally:
        sheet.speak("en")


def test_nothing_that_the_views_did_ended_in_an_error_of_ours(sheet):
    sheet.add()
    assert sheet.our_errors == []


def test_words_are_sorted_by_the_number_shown_and_grouped_by_their_concept(sheet):
    sheet.add(fill=False)
    sent = [
        ["jet", "airplane", 0.4, 0.9, None, False, "tree"],
        ["puppy", "dog", 0.7, 0.8, None, True, "flower"],
        ["gull", "airplane", 0.6, 0.7, None, True, "tree"],
        ["paw", "dog", 0.2, 0.6, 0.9, True, "flower"],
    ]
    sheet.do(
        """sent => app.graph._nodes.find((n) => n.comfyClass === 'RealEraClosedFormEdit')
            .onExecuted({ realera_scope: sent })""",
        sent,
    )
    shown = sheet.page.locator(".realera-scope > div").all_inner_texts()
    assert [" ".join(row.split()) for row in shown] == [
        "airplane → tree",
        "gull 60 %",
        "jet 40 %",
        "dog → flower",
        "paw ✓ 90 %",
        "puppy 70 %",
    ]


def test_a_word_of_the_scope_list_can_be_left_out_from_the_keyboard(sheet):
    sheet.add()
    connect_miner(sheet)
    row = sheet.page.locator(".realera-scope > div[title]").nth(1)
    word = row.locator("span").first.inner_text()
    row.focus()
    sheet.page.keyboard.press("Enter")
    assert sheet.value("RealEraNeighborSampler", "leave_out") == word
    sheet.page.keyboard.press("Space")
    assert sheet.value("RealEraNeighborSampler", "leave_out") == ""


def test_compare_shows_any_two_models_by_name_with_what_the_classifier_sees(sheet):
    sheet.add()
    slider = sheet.page.locator(".realera-slider")
    for side in ("left", "right"):
        names = slider.locator(f".realera-{side} option").all_inner_texts()
        assert names == ["original", "erased", "aligned"]
    verdicts = slider.locator(".realera-verdicts span")
    assert verdicts.all_inner_texts() == ["airplane 0", "tree 0"]
    slider.locator(".realera-right").select_option("aligned")
    assert slider.locator("img").nth(1).get_attribute("src").count("red.png") == 1
    slider.locator(".realera-prompt").select_option(index=2)
    assert verdicts.all_inner_texts() == ["airplane 2", "bush 2"]


def test_the_loss_chart_names_both_equations_and_says_where_training_stands(sheet):
    sheet.add(fill=False)

    def texts():
        return {one["text"] for one in sheet.texts("RealEraLoraAlign")}

    def event(name, detail):
        sheet.do("([name, detail]) => app.api.dispatchCustomEvent(name, detail)", [name, detail])

    number = sheet.do(
        "() => String(app.graph._nodes.find((n) => n.comfyClass === 'RealEraLoraAlign').id)"
    )
    assert texts() == {"Run the graph to see this."}
    event("executing", number)
    assert texts() == {"Running…"}
    for step in range(1, 18):
        event("realera.step", {"node": number, "step": step, "steps": 100, "loss": 2 / step})
    legend = {"● concept (Eq. 8)", "● neighbours and beyond points (Eq. 9)"}
    assert texts() == legend | {"2.0", "0", "step 17 of 100"}
    event("execution_interrupted", {"node_id": number})
    assert texts() == legend | {"2.0", "0", "step 17 of 100, stopped"}


def middle_of(sheet, kind):
    """Where the middle of a node's view is in the window."""
    return sheet.do(
        """kind => {
            const node = app.graph._nodes.find((n) => n.comfyClass === kind);
            const view = node.widgets.find((w) => w.element?.matches('.realera-view')).element;
            const { x, y, width, height } = view.getBoundingClientRect();
            return [x + width / 2, y + height / 2];
        }""",
        kind,
    )


@pytest.mark.parametrize("kind", SENT)
def test_the_wheel_and_the_middle_button_move_the_graph_over_every_view(sheet, kind):
    sheet.add(fill=False)
    sheet.look_at(kind)
    sheet.do("() => { app.canvas.ds.scale = 0.5; app.canvas.setDirty(true, true); }")
    sheet.settle()
    mouse = sheet.page.mouse
    mouse.move(*middle_of(sheet, kind))
    mouse.wheel(0, 120)
    sheet.until("() => app.canvas.ds.scale !== 0.5", seconds=20)
    sheet.settle()
    before = sheet.do("() => [...app.canvas.ds.offset]")
    x, y = middle_of(sheet, kind)
    mouse.move(x, y)
    mouse.down(button="middle")
    mouse.move(x + 60, y + 40, steps=5)
    mouse.up(button="middle")
    sheet.settle()
    assert sheet.do("() => [...app.canvas.ds.offset]") != before


def test_a_view_keeps_its_width_and_stays_in_its_node_beside_the_open_panel(sheet):
    sheet.add()
    if sheet.do("() => app.extensionManager.setting.get('Comfy.RightSidePanel.IsOpen')") is None:
        pytest.skip("this frontend has no panel at the right")
    panel = "open => app.extensionManager.setting.set('Comfy.RightSidePanel.IsOpen', open)"
    widths = """() => Object.fromEntries(app.graph._nodes.map((node) => {
        const view = node.widgets.find((w) => w.element?.matches('.realera-view')).element;
        const { width } = view.getBoundingClientRect();
        return [node.comfyClass, Math.round(width / app.canvas.ds.scale)];
    }))"""
    before = sheet.do(widths)
    sheet.do(panel, True)
    try:
        for kind in SENT:
            sheet.do(
                """kind => app.canvas.selectNode(
                    app.graph._nodes.find((n) => n.comfyClass === kind))""",
                kind,
            )
            sheet.settle()
            assert sheet.do(widths) == before, kind
            assert "realera_" not in sheet.page.locator("body").inner_text()
        sheet.add()
        assert sheet.do(widths) == before
    finally:
        sheet.do(panel, False)


def visible_inputs(sheet, kind):
    """Names of the inputs that a node shows, in order."""
    return sheet.do(
        """kind => {
            const node = app.graph._nodes.find((n) => n.comfyClass === kind);
            const drawn = document.querySelector(`[data-node-id="${node.id}"]`);
            return node.widgets.filter((w) => !w.name.startsWith('realera_') && (drawn
                ? !w.hidden && (node.showAdvanced || !w.options.advanced)
                : node.isWidgetVisible(w) && w.computedHeight > 0)).map((w) => w.name);
        }""",
        kind,
    )


def test_advanced_inputs_are_folded_and_the_button_of_a_classic_node_shows_them(sheet):
    sheet.add(fill=False)
    kind = "RealEraClosedFormEdit"
    assert visible_inputs(sheet, kind) == []
    low = sheet.do("() => app.graph._nodes[2].computeSize()[1]")
    if sheet.do("() => LiteGraph.vueNodesMode"):
        return
    before = sheet.heights()[kind]
    sheet.press(kind, "realera_button")
    shown = ["lambda1", "lambda2", "bank", "check", "away"]
    assert visible_inputs(sheet, kind) == shown
    assert sheet.do("() => app.graph._nodes[2].computeSize()[1]") == low + 24 * len(shown)
    assert abs(sheet.heights()[kind] - before) <= 20 and sheet.hanging_out() == []
    sheet.press(kind, "realera_button")
    assert visible_inputs(sheet, kind) == []
    assert abs(sheet.heights()[kind] - before) <= 20 and sheet.hanging_out() == []


def test_a_number_that_is_automatic_is_not_shown_and_a_switch_shows_what_it_stands_for(sheet):
    sheet.add(fill=False)
    kind, numbers = "RealEraNeighborSampler", ["s1", "s2", "d1", "d1_anchor"]
    sheet.do("() => { app.graph._nodes[0].showAdvanced = true; }")
    sheet.do("() => app.graph._nodes[0].realeraArrange()")
    sheet.settle()
    assert not {*numbers} & {*visible_inputs(sheet, kind)}
    saved = "() => app.graph.serialize().nodes[0].widgets_values"
    automatic = sheet.do(saved)
    assert automatic[5:9] == [-1, -1, 0, 0] and len(automatic) == 11
    sheet.press(kind, "realera_toggle", False)
    assert [name for name in visible_inputs(sheet, kind) if name in numbers] == numbers
    assert [sheet.value(kind, name) for name in numbers[:2]] == [1, 0.55]
    sheet.set(kind, s2=0.8)
    sheet.do("() => app.loadGraphData(app.graph.serialize())")
    sheet.settle()
    assert sheet.value(kind, "s2") == 0.8 and "s2" in visible_inputs(sheet, kind)
    sheet.press(kind, "realera_toggle", True)
    assert not {*numbers} & {*visible_inputs(sheet, kind)}
    assert sheet.do(saved) == automatic
    sheet.set(kind, source="bank")
    sheet.do(
        "sent => app.graph._nodes[0].onExecuted(sent)",
        {"realera_geometry": [RING | POINTS | {"source": "bank", "d1": 3.5}]},
    )
    sheet.press(kind, "realera_toggle", False)
    assert [sheet.value(kind, name) for name in numbers] == [0.7, 0.4, 3.5, 0]


def test_the_node_library_offers_the_method_as_one_node_that_runs(server, sheet):
    if sheet.do("async () => (await app.api.fetchApi('/global_subgraphs')).status") != 200:
        pytest.skip("this release of ComfyUI has no blueprints")
    sheet.do("() => app.graph.clear()")
    sheet.do("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    sheet.settle()
    sheet.page.keyboard.type("Erase a Concept")
    sheet.page.get_by_text("Erase a Concept (RealEra)").first.wait_for()
    sheet.page.keyboard.press("Enter")
    sheet.settle()
    sheet.page.mouse.click(600, 400)  # where it is to lie
    sheet.until("() => app.graph._nodes.length === 1", seconds=30)
    widgets = sheet.do("() => app.graph._nodes[0].widgets.map((w) => [w.name, w.value])")
    assert widgets == [
        ["concepts", "airplane -> tree"],
        ["leave_out", ""],
        ["preserve", ""],
        ["edit_strength", 1],
    ]
    (path,) = (ROOT / "workflows/api").glob("0 *.json")
    graph = json.loads(path.read_text("utf-8"))
    inside = {name.split(":")[1]: node for name, node in graph.items() if ":" in name}
    sent = sheet.do("async () => (await app.graphToPrompt()).output")
    for name, node in sent.items():
        due = inside.pop(name.split(":")[1])
        values = {k: v for k, v in due["inputs"].items() if not isinstance(v, list)}
        assert node["class_type"] == due["class_type"]
        assert {k: v for k, v in node["inputs"].items() if not isinstance(v, list)} == values
    assert inside == {}
    graph["4"]["inputs"]["steps"] = 2
    outputs, _ = server.run(graph)
    assert len(outputs["4"]["realera_images"]) == 3


# ------------------------------------------------------------------------ errors


def errors_of(sheet, kind):
    """What a node's own view says went wrong."""
    return sheet.do(
        """kind => app.graph._nodes.filter((n) => n.comfyClass === kind).flatMap((node) =>
            node.widgets.filter((w) => w.element?.matches('.realera-view')).flatMap((w) =>
                [...w.element.querySelectorAll('.realera-error')].map((e) => e.textContent)))""",
        kind,
    )


def test_what_comfyui_refuses_stands_in_the_view_of_its_node_until_it_is_mended(sheet):
    graph = json.loads((ROOT / f"workflows/{EXAMPLE}.json").read_text("utf-8"))
    sheet.do("graph => app.loadGraphData(graph)", graph)
    sheet.settle()
    sheet.set("RealEraNeighborSampler", concepts="airplane > tree")
    sheet.do("() => void app.queuePrompt(0)")
    shown = """() => app.graph._nodes.flatMap((n) => n.widgets ?? []).flatMap((w) =>
        [...(w.element?.querySelectorAll?.('.realera-error') ?? [])].map((e) => e.textContent))"""
    sheet.until(f"() => ({shown})().length", seconds=60)
    [message] = errors_of(sheet, "RealEraNeighborSampler")
    assert message == (
        "line 1, 'airplane > tree', has no '->': write 'concept -> anchor', or the concept alone, "
        "which gets a suggested anchor"
    )
    sheet.page.keyboard.press("Escape")  # the frontend's dialog
    sheet.set("RealEraNeighborSampler", concepts="airplane -> tree", s1=0.2, s2=0.5)
    sheet.set("RealEraCompare", prompts=" ")
    sheet.set("RealEraSaveErasure", filename="../out")
    sheet.do("() => void app.queuePrompt(0)")
    sheet.until(f"() => ({shown})().length === 3", seconds=60)
    [ring] = errors_of(sheet, "RealEraNeighborSampler")
    assert ring.startswith("S2 = 0.5 and S1 = 0.2: cosines of neighbours lie between them")
    assert errors_of(sheet, "RealEraCompare") == ["no prompt to draw: write one per line"]
    [name] = errors_of(sheet, "RealEraSaveErasure")
    assert name.startswith("the file name '../out' leads out of the folder output/loras")
    sheet.page.keyboard.press("Escape")
    sheet.do("() => app.api.dispatchCustomEvent('execution_start', {})")
    assert sheet.do(shown) == []


def test_what_a_run_failed_of_stands_on_its_node_whether_it_has_a_view_or_not(sheet):
    sheet.add()
    number = sheet.do(
        """() => {
            const node = LiteGraph.createNode('RealEraMergeErasures');
            node.pos = [0, 1300];
            app.graph.add(node);
            return String(node.id);
        }"""
    )
    sheet.settle()
    size = "() => [...app.graph._nodes.at(-1).size]"
    before = sheet.do(size)
    message = "made with different preservation banks: erase anew"
    sheet.do(
        "detail => app.api.dispatchCustomEvent('execution_error', detail)",
        {"node_id": number, "exception_message": message, "traceback": []},
    )
    assert errors_of(sheet, "RealEraMergeErasures") == [message]
    sheet.page.keyboard.press("Escape")
    sheet.do("() => app.api.dispatchCustomEvent('execution_start', {})")
    assert errors_of(sheet, "RealEraMergeErasures") == []
    assert sheet.do(size) == before


def test_progress_text_reaches_the_page_that_runs_and_no_other(server, browser):
    model = {"class_type": "RealEraBundledModel", "inputs": {"checkpoint": "bundled"}}
    inputs = {"before": ["1", 0], "after": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
    inputs |= {"prompts": "a photo of the dog", "seeds": 1, "seed": 77, "steps": 2}
    graph = {"1": model, "2": {"class_type": "RealEraCompare", "inputs": inputs}}
    pages = [Window(browser.new_page(), server.address) for _ in range(2)]
    for page in pages:
        page.do(
            """() => {
                window.told = [];
                app.api.addEventListener('progress_text', ({ detail }) => told.push(detail.text));
                for (const end of ['success', 'error'])
                    app.api.addEventListener(`execution_${end}`, () => { window.outcome = end; });
            }"""
        )
    pages[0].do(
        """graph => app.api.fetchApi('/prompt', { method: 'POST', body: JSON.stringify(
            { prompt: graph, client_id: app.api.clientId }) })""",
        graph,
    )
    pages[0].until("() => window.outcome === 'success'")
    pages[1].settle()
    told = [page.do("() => told") for page in pages]
    for page in pages:
        page.page.close()
    assert told[0] and not told[1]
