"""report.html in a real Chromium, from disk: of a comparison and of a run, on a phone and a desktop, light and dark."""

import shutil
from functools import cache
from pathlib import Path

import pytest

from tests.runs import ROOT, forked, read_json, succeeded

playwright = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-browser.txt")

PHONE, DESKTOP = (390, 844), (1280, 800)
NO_CHROMIUM = "no Chromium: apt-get install chromium, or playwright install chromium"
NAMES = ("chromium", "chromium-browser", "google-chrome")


@cache
def chromium() -> str | None:
    """The system's, or the one that `playwright install chromium` has fetched."""
    if found := next(filter(None, map(shutil.which, NAMES)), None):
        return found
    with playwright.sync_playwright() as driver:
        return path if Path(path := driver.chromium.executable_path).is_file() else None


@pytest.fixture(scope="module")
def browser():
    if not chromium():
        pytest.skip(NO_CHROMIUM)
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium())
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Of a vanilla and an MSE teacher's students, of one of these runs, and of a larger matrix's old records."""
    folder = tmp_path_factory.mktemp("pages")
    options = ["image_size=8", "batch_size=128", "epochs=1", "train_fraction=0.3"]
    matrix = ["--teachers", "vanilla", "mse", "--students", "resnet8", "--teacher_options", "model=resnet8"]
    places = ["--output_dir", folder / "small", "--runs", folder / "runs"]
    succeeded(forked("compare.py", *matrix, "--options", *options, *places))
    run = next((folder / "runs").glob("*-kd-*/summary.json")).parent
    succeeded(forked("-m", "reports", run))
    old = ["--records", ROOT / "benchmarks/results/evidence/digits", "--output_dir", folder / "large", "--report"]
    succeeded(forked("compare.py", "benchmarks/plans/digits.yaml", *old))
    return {"small": folder / "small/report.html", "run": run / "report.html", "large": folder / "large/report.html"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("name", ["small", "run", "large"])
def test_a_page_shows_all_it_has_and_asks_for_nothing(browser, pages, name, size, scheme):
    context = browser.new_context(viewport=dict(zip(("width", "height"), size, strict=True)), color_scheme=scheme)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    assert said == [] and asked == [pages[name].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]  # what is wider scrolls by itself
    assert page.evaluate(
        "[...document.querySelectorAll('.wide, pre')].every(e => getComputedStyle(e).overflowX == 'auto')"
    )
    # Plots can be read: letters as high as small print, light ones on a dark page.
    heights = page.eval_on_selector_all("svg text", "all => all.map(each => each.getBoundingClientRect().height)")
    assert heights and min(heights) >= 8
    ink = page.eval_on_selector("svg text", "each => getComputedStyle(each).fill")
    assert ink == {"light": "rgb(0, 0, 0)", "dark": "rgb(255, 255, 255)"}[scheme]
    context.close()


def test_a_click_on_a_head_sorts_its_table(browser, pages):
    page = browser.new_page()
    page.goto(pages["small"].as_uri())
    images = page.locator("th", has_text="training images")
    cost = page.locator("table", has=images)

    def values(table, place: int) -> list[str]:
        return table.locator(f"tbody tr td:nth-child({place})").all_inner_texts()

    assert values(cost, 4) == ["864", "1,296"]  # 2 teachers, 3 students, of 432 images each
    images.click()
    assert values(cost, 4) == ["864", "1,296"] and images.get_attribute("aria-sort") == "ascending"
    images.click()
    assert values(cost, 4) == ["1,296", "864"] and images.get_attribute("aria-sort") == "descending"
    assert values(cost, 1) == ["students", "teachers"]  # whole rows move
    page.goto(pages["large"].as_uri())
    means = read_json(pages["large"].with_name("comparison.json"))["means"]
    table = page.locator("table").first
    table.locator("th", has_text="alone").click()
    assert [each[:5] for each in values(table, 2)] == sorted(f"{row['cells']['alone']['mean']:.2f}" for row in means)
    table.locator("th").first.click()
    assert [each[:6] for each in values(table, 1)] == ["averag", "pool:2", "pool:4"]
    page.close()
