"""The HTML page: what is in the file, and what a headless Chromium makes of it."""

import re
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from support import browser, outside
from support.browser import data_of
from support.known import X, known_parts
from support.toy_models import TinyGPT, decomposition_of
from torch.testing import assert_close
from transformer_lens import HookedTransformer, HookedTransformerConfig

import apd_lens as apd

pd = pytest.importorskip("pandas")
pytest.importorskip("plotly")
pytest.importorskip("jinja2")

from apd_lens.report._collect import alike_in_activity, alike_in_weights, collect  # noqa: E402

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>alert(2)</script>",
    "quotes \"'` and & &lt; {{ 7 * 7 }} {% if %}",
    "nul\0l",
    "\u202eright to left\u202c",
    "\u2028lines\u2029",
    "🙂 עברית",
    "long" * 300,
    "\ud800 alone",
    " the",
    "\n",
    "",
]


def transformer() -> HookedTransformer:
    config = HookedTransformerConfig(
        n_layers=1, d_model=16, n_ctx=6, d_head=4, n_heads=2, d_mlp=12, d_vocab=12, act_fn="relu", seed=0, device="cpu"
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        return HookedTransformer(config)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with browser.chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def tokens_page(tmp_path_factory) -> Path:
    """A transformer of which every token is hostile; component 5 is nothing, so it is never active."""
    torch.manual_seed(0)
    selection = apd.TopK(2, granularity="position")
    decomposition = decomposition_of(transformer(), "blocks.*W_*", n_components=6, selection=selection)
    for factor in decomposition.components.parameters():
        factor.data[5] = 0
    matches = pd.DataFrame({"latent": [HOSTILE[0], "b"], "component": [2, 2], "cosine": [0.987654321, float("nan")]})
    page = tmp_path_factory.mktemp("tokens") / "sub" / "report.html"
    batches = [torch.randint(0, 12, (8, 6)) for _ in range(3)]
    assert decomposition.report(batches, page, decode=HOSTILE.__getitem__, matches=matches, title=HOSTILE[0]) == page
    return page


@pytest.fixture(scope="module")
def features_page(tmp_path_factory) -> Path:
    page = tmp_path_factory.mktemp("features") / "report.html"
    return known_parts(8 / 6).report(X.split(2), page, output_names=["a", "b", "c", "d"], examples=2, outputs=1)


def rows(driver) -> list[list[str]]:
    """The texts of the list's cells, row by row."""
    script = (
        "return [...document.querySelectorAll('.row')].map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    return driver.execute_script(script)


def click(driver, selector: str) -> None:
    driver.find_element("css selector", selector).click()


def choose(driver, selector: str, value: str, event: str) -> None:
    script = """
        const element = document.querySelector(arguments[0]);
        element.value = arguments[1];
        element.dispatchEvent(new Event(arguments[2]));
    """
    driver.execute_script(script, selector, value, event)


def detail(driver, component: int) -> str:
    return driver.execute_script("return document.getElementById(arguments[0]).innerText", f"detail-{component}")


def assert_quiet(driver) -> None:
    """No error, no dialog, nothing asked of a network."""
    from selenium.common.exceptions import NoAlertPresentException

    assert driver.get_log("browser") == []
    with pytest.raises(NoAlertPresentException):
        _ = driver.switch_to.alert
    asked = browser.requests(driver)
    assert len(asked) >= 1
    assert [url for url in asked if not url.startswith(("file:///", "data:", "blob:"))] == []


def test_the_numbers_are_those_of_a_diagonal_matrix(features_page: Path):
    data = data_of(features_page)
    assert data["activity"] == pytest.approx([2 / 6, 3 / 6, 1 / 6, 0], abs=1e-3)
    assert data["order"] == [1, 0, 2, 3]
    assert data["ablation"]["change"][0] == pytest.approx([2.5, 3.5, 3.0, 0.0])
    assert (data["ranks"], data["norms"]) == ([[1.0]] * 4, [[1.0], [2.0], [3.0], [4.0]])
    words, first = data["words"], data["components"][2]
    assert [words[word] for word in first["inputs"][0][3]] == ["x[1] -4", "x[2] 2"]
    assert [[words[word], by] for word, by in first["promoted"]] == [["c", 6.0]]


def test_curves_and_null():
    numbers = collect(
        known_parts(8 / 6), X.split(2), examples=2, outputs=1, k=None, centred=None, loss=None, memory=2**20, seed=0
    )
    y = X * torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert numbers.ks == [1, 2, 3, 4]
    assert numbers.nothing == pytest.approx(y.square().mean().item())
    assert numbers.found.by_k[1:] == pytest.approx([0.0, 0.0, 0.0], abs=1e-10)  # at most two are on
    assert numbers.found.by_k[0] == pytest.approx((9 + 9 + 36) / 24 - 36 / 24)
    assert numbers.found.residuals["all"] == pytest.approx(0, abs=1e-6)
    assert numbers.found.first_active.tolist() == [0, 2, 5, 6]
    assert numbers.null.residuals["all"] > 0.5
    assert min(numbers.null.by_k) > 0.1
    assert_close(numbers.shares, torch.ones(4, 1))
    assert numbers.sample.shape == (6, 4)


def test_nothing_that_the_data_holds_ends_the_script(tokens_page: Path):
    (packed,) = re.findall(r'<script id="data" type="text/plain">(.*?)</script>', tokens_page.read_text())
    assert not set("<&\0\n") & set(packed)
    assert set(data_of(tokens_page)["words"]) >= {word for word in HOSTILE if len(word) < 100}


def test_the_file_points_nowhere(tokens_page: Path):
    pointing = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            pointing.extend(name for name, _ in attrs if name in ("src", "href", "srcset", "data", "action"))

    Parser().feed(tokens_page.read_text())
    assert pointing == []
    assert tokens_page.read_text().count('id="plotly"') == 1
    assert tokens_page.stat().st_size < 2_100_000


def test_hostile_tokens_are_text(driver, tokens_page: Path):
    browser.open_page(driver, tokens_page)
    choose(driver, "#alive", "all", "change")
    n_rows = len(rows(driver))
    assert n_rows == 6
    for component in range(n_rows):
        driver.execute_script("toggle(arguments[0])", component)
    text = driver.execute_script("return document.querySelector('#components').textContent")
    for shown in (HOSTILE[0], HOSTILE[1], HOSTILE[2], "nul␀l", "‹202E›right to left‹202C›", "‹2028›lines", HOSTILE[6]):
        assert shown in text
    assert f"{'long' * 50}…" in text
    assert "‹D800› alone" in text
    assert driver.title == HOSTILE[0] == driver.find_element("css selector", "h1").text
    assert driver.find_elements("css selector", "img") == []
    assert driver.execute_script("return document.querySelectorAll('script').length") == 3  # one more was unpacked
    assert "‹202E›" in detail(driver, 2) or "nul" in text
    assert_quiet(driver)


def test_matches_heads_and_nulls_are_shown(driver, tokens_page: Path):
    browser.open_page(driver, tokens_page)
    driver.execute_script("jump(2)")
    shown = detail(driver, 2)
    assert HOSTILE[0] in shown
    assert "0.9877" in shown
    assert re.search(r"attention head\s+share\s+a0\.[01]\s+[\d.]+%", shown)
    assert "random twin" in shown
    driver.execute_script("jump(3)")
    assert re.search(r"Matches\s+None", detail(driver, 3))
    top = driver.find_element("css selector", "main section").text
    assert "residual of all matrices" in top
    assert re.search(r"components alive .* [345] [3456]\n", top)
    assert_quiet(driver)


def test_what_is_shown_of_a_diagonal_matrix(driver, features_page: Path):
    browser.open_page(driver, features_page)
    shown = rows(driver)
    assert [row[0] for row in shown] == ["1", "0", "2"]  # 3 is dead
    assert [row[1] for row in shown] == ["50.0%", "33.3%", "16.7%"]
    assert [row[6] for row in shown] == ["x[1] · x[2]", "x[0]", "x[1] · x[2]"]
    assert [row[7] for row in shown] == ["", "a", "c"]
    click(driver, "#component-2 button")
    text = detail(driver, 2)
    assert re.search(r"Raises\s+c\s+\+6\.00", text)
    assert re.search(r"Fires with.*#1\s+1\s+2\s+0\.3333", text, re.DOTALL)
    click(driver, "[data-jump='1']")
    assert re.search(r"Lowers\s+b\s+−1\.00", detail(driver, 1))
    assert driver.execute_script("return document.activeElement.textContent") == "1"
    assert_quiet(driver)


def test_the_list_sorts_searches_and_filters(driver, features_page: Path):
    browser.open_page(driver, features_page)
    choose(driver, "#alive", "all", "change")
    assert [row[0] for row in rows(driver)] == ["1", "0", "2", "3"]
    click(driver, "[data-sort='number']")
    assert [row[0] for row in rows(driver)] == ["0", "1", "2", "3"]
    click(driver, "[data-sort='change']")
    assert [row[0] for row in rows(driver)] == ["1", "2", "0", "3"]
    click(driver, "[data-sort='change']")
    assert [row[0] for row in rows(driver)] == ["3", "0", "2", "1"]
    assert driver.find_element("css selector", "[aria-sort='ascending']").text.startswith("change")
    choose(driver, "#alive", "dead", "change")
    assert [row[0] for row in rows(driver)] == ["3"]
    choose(driver, "#alive", "alive", "change")
    choose(driver, "#search", "#2", "input")
    browser.wait_for(driver, "return document.querySelectorAll('.row').length === 1")
    assert [row[0] for row in rows(driver)] == ["2"]
    choose(driver, "#search", "X[0] 5", "input")
    browser.wait_for(driver, "return document.querySelector('#count').textContent === '1 of 4'")
    assert [row[0] for row in rows(driver)] == ["0"]
    choose(driver, "#search", "nothing has this", "input")
    browser.wait_for(driver, "return !document.getElementById('none').hidden")
    assert_quiet(driver)


def test_a_row_opens_by_keyboard_and_closes(driver, features_page: Path):
    from selenium.webdriver.common.keys import Keys

    browser.open_page(driver, features_page)
    button = driver.find_element("css selector", "#component-0 button")
    button.send_keys(Keys.ENTER)
    assert button.get_attribute("aria-expanded") == "true"
    assert "Top examples" in detail(driver, 0)
    button.send_keys(Keys.SPACE)
    assert button.get_attribute("aria-expanded") == "false"
    assert driver.find_elements("css selector", "#detail-0") == []


def test_figures_are_drawn(driver, features_page: Path, tokens_page: Path):
    browser.open_page(driver, features_page)
    assert len(driver.find_elements("css selector", "figure")) == 5  # one matrix: nothing to share out
    browser.open_page(driver, tokens_page)
    assert len(driver.find_elements("css selector", "figure .plot .main-svg")) >= 6
    assert len(driver.find_elements("css selector", "figure .plot .heatmaplayer image")) == 2
    assert len(driver.find_elements("css selector", "figure")) == 6
    titles = [caption.text for caption in driver.find_elements("css selector", "figcaption h3")]
    assert titles[0] == "How often components are active"
    assert driver.find_elements("css selector", "figure a") == []


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[apd.Decomposition, apd.Decomposition, list[torch.Tensor], Path]:
    """Two decompositions of one model side by side, of 6 and of 4 components, on other data too."""
    torch.manual_seed(0)
    model, selection = TinyGPT(), apd.TopK(2, granularity="position")
    one, other = (decomposition_of(model, n_components=n, rank=1, selection=selection) for n in (6, 4))
    data, elsewhere = ([torch.randint(0, 11, (5, 6))] for _ in range(2))
    page = one.report(
        data,
        tmp_path_factory.mktemp("pair") / "report.html",
        others=elsewhere,
        beside=other,
        names=("one <b>", "two"),
        decode=lambda token: f" w{token}",
        centred=True,
    )
    return one, other, data + elsewhere, page


def test_each_token_has_its_components(pair):
    one, _, seen, page = pair
    for batch, here in zip(seen, data_of(page)["here"], strict=True):
        attributions = one.attributions(batch)
        assert len(here) == 5
        for example, rows in here.items():
            expected = attributions[int(example)]
            assert [row[0] for row in rows] == expected.argmax(-1).tolist()
            assert [row[1] for row in rows] == pytest.approx(expected.amax(-1).tolist(), rel=1e-3)
            assert all(len(row) <= 10 for row in rows)


def test_what_turning_a_component_off_does_on_an_example(pair):
    one, _, (data, elsewhere), page = pair
    found = data_of(page)
    with one.ablate(2):
        without = one.target.model(data).softmax(-1)
    whole = one.target.model(data).softmax(-1)
    for number, _, on, *_, off in found["components"][2]["inputs"]:
        assert bool(off) == bool(on)
        if on:
            _, position, changed = off
            units = [int(found["words"][word].removeprefix(" w")) for word, _, _ in changed]
            where = number, position, units
            assert [before for _, before, _ in changed] == pytest.approx(whole[where].tolist(), rel=1e-2)
            assert [after for *_, after in changed] == pytest.approx(without[where].tolist(), rel=1e-2)
    shares = one.select(elsewhere).flatten(0, 1).float().mean(0)
    assert found["othersActive"] == pytest.approx(shares.tolist(), abs=1e-3)


def test_the_closest_component_of_another_decomposition(pair):
    one, other, (data, _), page = pair
    alike, active = alike_in_weights(one, other), alike_in_activity(one, other, [data], None)
    weights = one.target.weights
    first, second = (
        torch.cat([some.components.component_weights(n).flatten(1) / weights[n].value().norm() for n in weights], 1)
        for some in (one, other)
    )
    assert_close(alike, torch.cosine_similarity(first[:, None], second[None], dim=-1), rtol=1e-3, atol=1e-4)
    masks = [some.select(data).flatten(0, 1) for some in (one, other)]
    both = (masks[0][:, :, None] & masks[1][:, None]).sum(0)
    either = (masks[0][:, :, None] | masks[1][:, None]).sum(0)
    assert_close(active, both / either.clamp_min(1))
    assert [peer for peer, *_ in data_of(page)["peers"]] == alike.argmax(1).tolist()
    coarse = replace(other, settings=replace(other.settings, selection=apd.TopK(2)))
    assert alike_in_activity(one, coarse, [data], None).isnan().all()  # other data points


def test_two_that_cannot_be_compared_are_refused(tmp_path: Path):
    model = TinyGPT(d_vocab=7, n_ctx=5)
    one = decomposition_of(model, "fc.weight", n_components=3, selection=apd.TopK(1, granularity="position"))
    other = decomposition_of(model, "proj.weight", n_components=3, selection=apd.TopK(1))
    with pytest.raises(apd.errors.InvalidSetting, match="no matrix in common with this one, and other data points"):
        one.report([torch.randint(7, (2, 5))], tmp_path / "report.html", beside=other)


def test_two_side_by_side(driver, pair):
    one, other, _, page = pair
    browser.open_page(driver, page)
    assert driver.find_element("css selector", "#of").is_displayed()
    text = driver.find_element("css selector", "main section").text
    assert re.search(r"cosine with the closest component of two .* -?[\d.]+ -?[\d.]+", text)
    driver.execute_script("jump(1)")
    headings = [part.text for part in driver.find_elements("css selector", ".beside > section > h3")]
    peer = alike_in_weights(one, other)[1].argmax()
    assert headings == ["one <b>, #1", f"two, #{peer}"]
    assert detail(driver, 1).count("Where it is") == 2
    click(driver, ".beside h3 .jump")
    assert driver.execute_script("return [side, C]") == [1, 4]
    assert f"two, #{peer}" in detail(driver, int(peer))
    choose(driver, "#side", "0", "change")
    assert driver.execute_script("return [side, C]") == [0, 6]
    assert_quiet(driver)


def test_a_token_opens_by_mouse_and_keys(driver, pair):
    from selenium.webdriver.common.keys import Keys

    browser.open_page(driver, pair[3])
    driver.execute_script("document.activeElement.blur()")
    driver.find_element("css selector", "body").send_keys("/")
    assert driver.execute_script("return document.activeElement.id") == "search"
    driver.switch_to.active_element.send_keys("w", Keys.ESCAPE)
    assert driver.execute_script("return search.value") == ""
    driver.execute_script("order.forEach((c) => toggle(c, false)); listed(order[0]).querySelector('button').focus()")
    driver.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    second = driver.execute_script("return order[1]")
    assert driver.switch_to.active_element.text == str(second)
    driver.switch_to.active_element.send_keys(Keys.ENTER)
    click(driver, f"#detail-{second} button.token")
    shown = driver.find_element("css selector", ".here").text
    assert re.match(r"at “w\d+”, position 0: #\d", shown.replace("\n", " "))
    driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT, Keys.ENTER)
    assert "position 1" in driver.find_element("css selector", ".here").text
    driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert driver.find_elements("css selector", ".here") == []
    driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert driver.find_elements("css selector", ".detail") == []
    assert driver.switch_to.active_element.text == str(second)
    assert_quiet(driver)


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_screen(driver, pair, width: int, scheme: str):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        browser.open_page(driver, pair[3])
        driver.execute_script("jump(0)")
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        ground = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == (scheme == "dark")
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.thorough
def test_two_thousand_components_are_listed(driver, tmp_path: Path):
    decomposition = decomposition_of(
        TinyGPT(d_vocab=100, n_ctx=16), n_components=2000, rank=1, selection=apd.TopK(40, granularity="position")
    )
    batches = [torch.randint(0, 100, (16, 16))]
    page = decomposition.report(batches, tmp_path / "report.html")
    assert page.stat().st_size < 5_000_000
    plain = tmp_path / "without_figures.html"
    plain.write_text(page.read_text().replace("    await draw();\n", ""))
    assert plain.stat().st_size < page.stat().st_size
    listed, drawn = [], []  # seconds of processor time, which other work on the machine does not change
    browser.work(driver)
    for _ in range(3):
        for opened, seconds in ((plain, listed), (page, drawn)):
            browser.open_page(driver, opened)
            seconds.append(browser.work(driver))
    print(f"seconds to the list: {listed}, with all figures: {drawn}")
    assert driver.execute_script("return order.length") == 2000
    choose(driver, "#alive", "all", "change")
    click(driver, "[data-sort='number']")
    assert [row[0] for row in rows(driver)[:3]] == ["0", "1", "2"]
    driver.execute_script("jump(1999)")
    assert "Top examples" in detail(driver, 1999)
    assert_quiet(driver)


def test_what_cannot_work_is_said(tmp_path: Path):
    (tmp_path / "old.html").write_text("old")
    came = outside.errors_of(
        f"""
        import pandas, torch
        import apd_lens as apd
        report = apd.init(torch.nn.Linear(2, 2), n_components=3).decomposition().report
        folder, x = {str(tmp_path)!r}, torch.ones(4, 2)
        """,
        [
            "report([x], folder)",
            "report([], folder + '/old.html')",
            "report([x], folder + '/old.html', output_names=['a'])",
            "report([x], folder + '/old.html', output_names=lambda unit: unit)",
            "report([x], folder + '/old.html', input_names=['a'])",
            "report([x], folder + '/old.html', matches=pandas.DataFrame({'latent': [1]}))",
            "report([x], folder + '/old.html', matches=pandas.DataFrame({'component': [3]}))",
        ],
    )
    expected = [
        f"ArtifactError: Expected a file to write the report to, but {tmp_path} is a folder",
        "InvalidBatches: The stream of batches is empty",
        "InvalidSetting: Expected 2 output_names, one for each output unit, got 1",
        "InvalidSetting: Expected output_names to give a string, got 0 for 0",
        "InvalidSetting: Expected 2 input_names, one for each number of an input, got 1",
        "InvalidSetting: Expected matches to have a column 'component', got ['latent']",
        "InvalidSetting: matches has components [3], expected numbers from 0 to 2",
    ]
    for message, start in zip(came, expected, strict=True):
        assert message.startswith(start)
    assert [path.name for path in tmp_path.iterdir()] == ["old.html"]
    assert (tmp_path / "old.html").read_text() == "old"


def test_one_of_everything(driver, tmp_path: Path):
    """One component of one matrix with one output, on one example."""
    decomposition = decomposition_of(torch.nn.Linear(3, 1), n_components=1, rank=1, selection=apd.BatchTopK(1.0))
    browser.open_page(driver, decomposition.report([torch.randn(1, 3)], tmp_path / "report.html"))
    assert (
        "1 parameter component of 1 weight matrix, seen on 1 example."
        in driver.find_element("css selector", ".lead").text
    )
    assert [row[1] for row in rows(driver)] == ["100%"]
    driver.execute_script("jump(0)")
    assert "output 0" in detail(driver, 0)
    assert_quiet(driver)
