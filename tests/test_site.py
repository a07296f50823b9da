"""The documentation site builds without a warning, its notebooks run, and readers find what they look for."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock

from tests.inspection.browser import chromium, show

pytest.importorskip("sphinx", reason="the extra docs is not installed")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
START = Path("docs/index.html")
PAGES = [Path(*p.relative_to(ROOT / "docs").parts).with_suffix(".html") for p in sorted((ROOT / "docs").rglob("*.md"))]
TUTORIALS = [page for page in PAGES if page.parent.name == "tutorials"]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The built site; one of pytest's processes builds it, the others wait."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    out = shared / "site"
    with FileLock(shared / "site.lock"):
        if not (shared / "built").exists():
            build(out, shared / "doctrees")
            (shared / "built").touch()
    return out


def build(out: Path, doctrees: Path) -> None:
    """Build it by the command of `make docs`."""
    recipe = re.search(r"^docs:.*\n\t(.*-m sphinx .*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    assert recipe
    options = recipe[1].partition("-m sphinx ")[2].split()
    assert {"-W", "--keep-going"} <= set(options)
    places = {"build/site": str(out), "build/doctrees": str(doctrees), "$(WORKERS)": "1", "$(ARGS)": ""}
    command = [sys.executable, "-m", "sphinx", *[word for o in options if (word := places.get(o, o))]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@dataclass
class Page(HTMLParser):
    """What a page has: links with their texts, anchors, what it loads, and its words."""

    links: list[tuple[str, str]] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    loads: list[str] = field(default_factory=list)
    words: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._link: str | None = None
        self._text = ""

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors.add(found.get("id") or "")
        if tag == "a":
            self._link, self._text = found.get("href"), ""
        loads = found.get("src") or (found.get("href") if tag == "link" and found.get("rel") != "canonical" else None)
        self.loads += [loads] if loads else []

    def handle_endtag(self, tag):
        if tag == "a" and self._link is not None:
            self.links.append((self._link, " ".join(self._text.split())))
            self._link = None

    def handle_data(self, data):
        self.words += data
        self._text += data


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


@pytest.fixture(scope="session")
def pages(site) -> dict[Path, Page]:
    return {path.relative_to(site): read(path) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_there(pages):
    assert set(pages) >= {Path("docs") / page for page in PAGES} | {Path("index.html"), Path("CHANGELOG.html")}


def test_links_lead_somewhere(pages, site):
    for name, page in pages.items():
        for link, text in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                assert parts.scheme in ("https", "mailto"), f"{name}: {link}"
                continue
            there = (site / name.parent / unquote(parts.path)).resolve() if parts.path else site / name
            assert there.exists(), f"{name}: {text!r} leads to {link}"
            if parts.fragment and there.suffix == ".html":
                assert unquote(parts.fragment) in pages[there.relative_to(site)].anchors, f"{name}: {link}"


def test_pages_load_nothing_from_elsewhere(pages):
    assert [(name, link) for name, page in pages.items() for link in page.loads if urlsplit(link).netloc] == []


def names(package: str) -> set[str]:
    """What `__all__` of a package lists, read without importing it."""
    path = ROOT / package.replace(".", "/") / "__init__.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return {f"{package}.{name}" for name in ast.literal_eval(node.value)}
    raise AssertionError(f"{path} has no __all__")


def test_every_public_name_is_in_the_reference(pages):
    reference = {anchor for name, page in pages.items() if name.parent.name == "api" for anchor in page.anchors}
    modules = {"implicit_attention.diagnostics", "implicit_attention.plots"}
    assert names("implicit_attention") >= modules
    assert names("implicit_attention") | names("implicit_attention.hf") <= reference | modules
    for module in modules:
        assert [anchor for anchor in reference if anchor.startswith(f"{module}.")], f"nothing of {module}"


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("Tensor", "https://docs.pytorch.org/docs/stable/tensors.html#torch.Tensor"),
        ("Module", "https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html#torch.nn.Module"),
        ("Figure", "https://matplotlib.org/stable/api/_as_gen/matplotlib.figure.Figure.html#matplotlib.figure.Figure"),
        ("PreTrainedModel", "https://huggingface.co/docs/transformers/main_classes/model#transformers.PreTrainedModel"),
        ("str", "https://docs.python.org/3/library/stdtypes.html#str"),
    ],
)
def test_types_of_other_packages_are_links(pages, name, address):
    found = {link for page in pages.values() for link, text in page.links if text == name}
    assert address in found


@pytest.mark.parametrize(
    ("wanted", "page", "sentence"),
    [
        ("Install", "docs/index.html", "pip install -e '.[cli]'"),
        ("Masks", "docs/using.html", "True means hidden"),
        ("What is a gain?", "docs/faq.html", "how strongly it feeds itself"),
        ("Convert a model in a minute", "docs/tutorials/convert.html", "convert(trained, layers=[1, 2])"),
        ("to add a solver, a kernel or a task", "CONTRIBUTING.html", "init returns the state before the first step"),
    ],
)
def test_a_newcomer_finds_it_from_the_start_page(pages, wanted, page, sentence):
    """One click from the start page, in its text or in its menu."""
    start = pages[START]
    assert wanted in start.words
    reached = {(START.parent / urlsplit(link).path) if urlsplit(link).path else START for link, _ in start.links}
    assert Path(page) in {Path(os.path.normpath(path)) for path in reached}
    assert sentence in pages[Path(page)].words


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=str)
def test_tutorials_ran_and_drew(pages, site, tutorial):
    text = (site / "docs" / tutorial).read_text(encoding="utf-8")
    assert "cell_output" in text
    assert re.search(r"<img [^>]*_images/", text) or "<iframe" in text
    assert pages[Path("docs") / tutorial].links


def test_the_extra_has_what_the_settings_name():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    listed = {re.split(r"[>=\[]", name)[0].replace("-", "_").lower() for name in extras["docs"]}
    settings = (ROOT / "docs" / "conf.py").read_text(encoding="utf-8")
    used = re.search(r"^extensions = \[(.*?)\]", settings, flags=re.M | re.S)
    assert used
    modules = {name.split(".")[0] for name in re.findall(r'"([\w.]+)"', used[1])} | {"furo"}
    assert modules <= listed


# What reaches over the edge of the screen and cannot be scrolled to: its tag and its first words.
STICKING_OUT = """
const scrolls = element => element && element.tagName != 'ARTICLE' &&
  (/auto|scroll/.test(getComputedStyle(element).overflowX) || scrolls(element.parentElement));
return [...document.querySelectorAll('article *')]
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1 && !scrolls(e))
  .map(e => `${e.tagName}: ${e.textContent.slice(0, 40)}`);
"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_pages_fit_the_screen(browser, pages, site, width, theme):
    """No page is wider than the screen, and none has errors in the browser's console."""
    backgrounds = set()
    for name in [START, *(Path("docs") / page for page in PAGES if theme == "light")]:
        show(browser, site / name, width=width, theme=theme)
        assert browser.execute_script(STICKING_OUT) == [], name
        backgrounds.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 1
    shade = sum(int(part) for part in re.findall(r"\d+", backgrounds.pop())[:3]) / 3
    assert shade > 200 if theme == "light" else shade < 60
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []
