"""The pack in ComfyUI's page: the help pages, and our script in a headless browser.

The browser tests run when COMFYUI_DIR is set, `playwright` is installed (`pip install playwright`)
and a Chromium is found: the system's, or Playwright's own (`playwright install chromium`).
"""

import json
import re
import shutil
from pathlib import Path

import pytest

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
    headings = {"示例。", "出错时。", "顺序。"}
    for bold in re.findall(r"\*\*([^*]+)\*\*", help_pages(name)["zh"]):
        assert bold in headings or set(bold.split("、")) <= named, bold


def test_no_help_page_is_left_over():
    pages = {path.relative_to(DOCS).parts[0] for path in DOCS.rglob("*.md")}
    assert {page.removesuffix(".md") for page in pages} == STRINGS["en"].keys()


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
        self.page.get_by_text("RealEra", exact=True).click()
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
        """Until the page has been drawn again."""
        self.do("() => new Promise((r) => requestAnimationFrame(() => setTimeout(r, 300)))")

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
            """([kind, name]) => app.graph._nodes.find((n) => n.comfyClass === kind)
                .widgets.find((w) => w.name === name).element.toDataURL()""",
            [kind, name],
        )

    def run(self, seconds=600):
        """Presses Run, waits until everything has ended, and returns what the loss chart showed:
        the columns of its canvas that its curve had reached, as time went on."""
        self.do(
            """() => {
                const node = app.graph._nodes.find((n) => n.comfyClass === 'RealEraLoraAlign');
                const canvas = node.widgets.find((w) => w.name === 'realera_loss').element;
                window.reached = new Set();
                window.watching = setInterval(() => {
                    const { width, height } = canvas;
                    const { data } = canvas.getContext('2d').getImageData(0, 0, width, height);
                    let last = 0;
                    for (let k = 0; k < data.length; k += 4) {
                        const [r, g, b] = data.subarray(k, k + 3);
                        if (r > 200 && g < 90 && b < 110) last = Math.max(last, (k / 4) % width);
                    }
                    reached.add(last);
                }, 250);
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
        return self.do("() => (clearInterval(watching), [...reached].sort((a, b) => a - b))")


@pytest.fixture(scope="module")
def window(server):
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=found, args=["--no-sandbox", "--disable-gpu"]
            )
        except api.Error as error:
            pytest.skip(f"no browser: {error.message.splitlines()[0]}")
        made = Window(browser.new_page(viewport={"width": 1400, "height": 1100}), server.address)
        made.open_example()
        yield made
        browser.close()


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
    assert len(reached) > 5, reached


def test_the_neighbourhood_moves_with_s1_and_s2_and_comes_back(ran):
    window, _ = ran
    kind, view = "RealEraNeighborSampler", "realera_neighborhood"
    window.look_at(kind)
    first = window.view(kind, view)
    window.type_number(kind, "s2", 0.9)
    narrow = window.view(kind, view)
    window.type_number(kind, "s1", 0.95)
    ring = window.view(kind, view)
    assert len({first, narrow, ring}) == 3
    window.type_number(kind, "s1", -1)
    window.type_number(kind, "s2", -1)
    assert window.view(kind, view) == first


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
    names = slider.locator("option").all_inner_texts()
    assert names == [f"{k + 1}: {prompt}" for k, prompt in enumerate(prompts)]
    seen = []
    for name in names:
        slider.locator("select").select_option(name)
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
    kind, view = "RealEraNeighborSampler", "realera_neighborhood"
    window.look_at(kind)
    before = window.view(kind, view)
    window.page.get_by_role("button", name="Unsaved Workflow").click()
    window.until("() => !app.graph._nodes.some((n) => n.comfyClass === 'RealEraCompare')")
    window.page.get_by_role("button", name=EXAMPLE).click()
    window.until("() => app.graph._nodes.some((n) => n.comfyClass === 'RealEraCompare')")
    window.look_at(kind)
    assert window.view(kind, view) == before
    assert window.page.locator(".realera-scope > div[title]").count() > 10
    assert window.page.locator(".realera-slider option").count() == 4


def test_the_help_of_a_node_opens_in_chinese_with_its_picture(ran):
    window, _ = ran
    window.do("() => app.extensionManager.setting.set('Comfy.Locale', 'zh')")
    x, y = window.look_at("RealEraCompare")
    window.page.mouse.click(x + 100, y - 15)
    window.page.get_by_test_id("info-button").click()
    page = window.page.locator(".node-help-content")
    page.get_by_role("heading", name=STRINGS["zh"]["RealEraCompare"]["display_name"]).wait_for()
    window.until(
        """() => [...document.querySelectorAll('.node-help-content img')]
            .some((image) => image.complete && image.naturalWidth > 100)"""
    )
    window.do("() => app.extensionManager.setting.set('Comfy.Locale', 'en')")


def test_nothing_that_the_page_did_ended_in_an_error_of_ours(ran):
    window, _ = ran
    assert window.our_errors == []
