"""The page of a report: what is in it, and what a reader sees of it in a real browser."""

import json
from dataclasses import replace

import pytest
import torch

from implicit_attention import ImplicitQueryAttention, inspect
from implicit_attention.inspection.page import pooled
from implicit_attention.inspection.report import Report
from tests.inspection import browser as browsing

pytest.importorskip("bokeh", reason="bokeh is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:unclosed:ResourceWarning")
TOKENS = ["</script><script>window.stolen = 1</script>", "<b>", " ", "\n", *(f"t{i}" for i in range(8))]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = ImplicitQueryAttention(16, 2, is_causal=True, qk_norm=True)
        self.second = ImplicitQueryAttention(16, 4, qk_norm=True, on_failure="ignore")

    def forward(self, x):
        return self.second(x + self.first(x))


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        model.second.temperature.fill_(8.0)  # too sharp to settle
    return inspect(model, torch.randn(1, len(TOKENS), 16), tokens=TOKENS)


@pytest.fixture(scope="module")
def path(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report.to_html("A <title>"), encoding="utf-8")
    return path


def test_the_page_is_one_file_with_the_words(report, path):
    html = path.read_text(encoding="utf-8")
    assert "<title>A &lt;title&gt;</title>" in html
    assert "window.stolen = 1</script>" not in html
    assert "does not settle" in report.summary
    assert html.count("Look here.") == sum(not la.settles for la in report.layers)
    assert "default-src 'none'" in html  # the browser itself refuses to load anything
    assert not any(mark in html for mark in ("<script src", '<link rel="stylesheet"', "@import"))


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (128, 128), (129, 129), (500, 300), (512, 512)])
def test_cells_hold_the_mean_of_rows_and_the_sum_of_columns(rows, columns):
    weights = torch.rand(2, rows, columns).softmax(-1)
    down, across = -(-rows // 128), -(-columns // 128)
    for i, j in [(0, 0), (-1, -1), (1, 2)]:
        r = slice(range(0, rows, down)[i], range(0, rows, down)[i] + down)
        c = slice(range(0, columns, across)[j], range(0, columns, across)[j] + across)
        expected = 255 * weights[:, r, c].sum(-1).mean(-1).sqrt()
        assert ((pooled(weights)[:, i, j] - expected).abs() <= 0.501).all()


def test_four_layers_of_eight_heads_and_512_tokens_fit_in_8_mb(report):
    layer, N = report.layers[0], 512
    maps = torch.randn(len(layer.iterations) + 1, 8, N, N).mul_(2).softmax(-1)  # no mask: the most to say
    wide = {name: getattr(layer, name)[:1].expand(N) for name in
            ("tolerance", "steps", "residual", "converged", "gain", "fold", "leading", "other_start")}  # fmt: skip
    large = replace(layer, **wide, trace=torch.rand(51, 8, N), plain_steps=torch.ones(8, N), maps=maps[1:],
                    settled_map=maps[0], iterations=layer.iterations)  # fmt: skip
    assert len(layer.iterations) == 7
    small, one = (len(Report((r,), tuple("a" * n)).to_html()) for r, n in [(layer, len(TOKENS)), (large, N)])
    assert small + 4 * (one - small) < 8e6


@pytest.fixture(scope="module")
def browser():
    with browsing.chromium() as found:
        yield found


def pick(browser, control, value):
    browser.execute_script(
        "const c = document.getElementById(arguments[0]); c.value = arguments[1]; c.dispatchEvent(new Event('input'))",
        control, value,
    )  # fmt: skip


def image(browser, name):
    script = "return Array.from(Bokeh.documents[0].get_model_by_name(arguments[0]).data.image[0])"
    return torch.tensor(
        [float("nan") if v is None else v for v in browser.execute_script(script, f"{name}-source")]
    ).float()


def text(browser, name):
    return browser.execute_script("return document.getElementById(arguments[0]).textContent", name)


def complaints(browser):
    """What the console says besides Bokeh's greetings, and requests for anything but the page."""
    requests = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    urls = [r["params"]["request"]["url"] for r in requests if r["method"] == "Network.requestWillBeSent"]
    loud = [e["message"] for e in browser.get_log("browser") if e["level"] not in ("INFO", "DEBUG")]
    return loud + [url for url in urls if not url.startswith(("file:", "data:", "blob:"))]


def test_the_slider_moves_the_map_and_numbers_are_those_of_the_report(browser, path, report):
    browsing.look(browser, path)
    assert browser.execute_script("return window.stolen") is None
    for number, layer in enumerate(report.layers):
        pick(browser, "layer", number)
        for head in (0, len(layer.settled_map) - 1):
            pick(browser, "head", head)
            seen = []
            for i, name in enumerate([*layer.iterations, "settled"]):
                pick(browser, "iteration", i)
                assert text(browser, "iteration-name") == ("0, ordinary pass" if name == 0 else str(name))
                seen.append(image(browser, "map"))
                torch.testing.assert_close(seen[-1], pooled(layer.at(name)[head]).flatten().float())
            assert not torch.equal(seen[0], seen[-1])
        for token in (0, 5, 11):
            pick(browser, "token", token)
            weights, where = layer.settled_map[head, token].topk(4)
            rows = browser.execute_script(
                "return [...document.querySelectorAll('#seen tr')].map(r => [...r.cells].map(c => c.textContent))"
            )
            for (label, shown, _), weight, j in zip(rows, weights, where, strict=True):
                assert float(shown) == pytest.approx(float(weight), abs=6e-5)
                assert float(weight) < 1e-4 or label.startswith(f"{int(j)}: ")
            for name in ("gain", "fold", "steps", "residual"):
                assert float(text(browser, name)) == pytest.approx(float(getattr(layer, name)[token]), rel=1e-3)
            steps, other = layer.plain_steps[:, token], float(layer.other_start[token])
            said = text(browser, "plain_steps")
            assert said == ("does not settle" if (steps < 0).any() else str(int(steps.max())))
            said = text(browser, "other_start")
            assert said == "does not settle" if other != other else float(said) == pytest.approx(other, rel=1e-3)
            data = "return Array.from(Bokeh.documents[0].get_model_by_name('curve-source').data.y)"
            curve = browser.execute_script(data)
            expected = layer.trace[:, :, token].amax(1).clamp_min(1e-16)
            torch.testing.assert_close(torch.tensor(curve), expected, rtol=1e-5, atol=0)
        trace = image(browser, "trace").view(-1, len(TOKENS))[: len(layer.trace)]
        torch.testing.assert_close(trace, layer.trace.amax(1).clamp_min(1e-16).log10(), rtol=1e-4, atol=1e-4)
    pick(browser, "quantity", "gain")
    torch.testing.assert_close(image(browser, "strip"), torch.cat([layer.gain for layer in report.layers]))
    assert not complaints(browser)


def test_pointing_pressing_and_keys_pick_a_token(browser, path):
    from selenium.webdriver import ActionChains, Keys

    browsing.look(browser, path)
    buttons = browser.find_elements("css selector", "#tokens button")
    assert [b.text for b in buttons][:4] == [TOKENS[0].replace(" ", "·"), "<b>", "·", "↵"]
    buttons[6].click()
    assert text(browser, "chosen").startswith("6: ")
    ActionChains(browser).send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT).perform()
    assert text(browser, "chosen").startswith("4: ")
    assert browser.find_element("css selector", "#tokens [aria-current=true]").text == "t0"
    before = text(browser, "iteration-name")
    ActionChains(browser).send_keys("[").perform()
    assert text(browser, "iteration-name") != before
    frame = browser.execute_script(  # where rows of the map are, in pixels
        """const view = Bokeh.index.find_one_by_id(Bokeh.documents[0].get_model_by_name("map").id);
        const box = view.el.getBoundingClientRect(), y = (row) => box.top + view.frame.y_scale.compute(row);
        return [box.left + view.frame.bbox.x_center, y(9.5), y(2.5)]"""
    )
    for i, y in [(9, frame[1]), (2, frame[2])]:
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": frame[0], "y": y})
        browsing.wait(lambda i=i: text(browser, "chosen").startswith(f"{i}: "), 10)
    assert not complaints(browser)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_both_themes_at_both_widths(browser, path, theme, width):
    browsing.look(browser, path, width=width, theme=theme)
    script = """const style = getComputedStyle(document.body), plot = Bokeh.documents[0].get_model_by_name("curve");
        return [style.backgroundColor, style.color, plot.below[0].major_label_text_color, document.body.scrollWidth]"""
    paper, ink, axis, across = browser.execute_script(script)
    light = [sum(map(int, c.removeprefix("rgb(").rstrip(")").split(","))) for c in (paper, ink)]
    assert (light[0] > 700 and light[1] < 150) if theme == "light" else (light[0] < 150 and light[1] > 650)
    assert axis == {"light": "#1b1b1b", "dark": "#ececec"}[theme]
    assert across <= width  # nothing sticks out
    browser.find_element("id", "theme").click()
    assert browser.execute_script(script)[0] != paper
    assert not complaints(browser)
