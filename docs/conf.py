"""Settings of the documentation site. `make docs` builds it, warnings as errors.

The source directory is the root of the repository, so that the tour of the causal engine, CONTRIBUTING.md and
CHANGELOG.md are pages where they stand. Their links work on the site as they do on GitHub.
"""

import hashlib
import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

import inventories  # noqa: E402

from implicit_attention import __version__  # noqa: E402
from implicit_attention.causal import cpu  # noqa: E402

project = "implicit-attention"
author = copyright = "The implicit-attention developers"
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx", "sphinx_copybutton"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "docs/api/*.md", "docs/tutorials/*.md", "CHANGELOG.md", "CONTRIBUTING.md"]
include_patterns += ["implicit_attention/causal/README.md", "implicit_attention/causal/*/README.md"]
exclude_patterns = [".venv", "build", "demo", ".git", "tests", "docs/data"]

# Pages: Markdown as GitHub reads it, with its anchors of headings.
myst_heading_anchors = 4
myst_links_external_new_tab = False
suppress_warnings: list[str] = []

# Notebooks run when the site is built. What they showed is kept until their code or the package changes.
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
# A warning in a notebook is a warning of the build, and so an error; but a machine without the C++ kernels says so.
nb_output_stderr = "remove" if cpu.problem() else "remove-warn"


def _fingerprint() -> str:
    sources = [DOCS / "matplotlibrc", *sorted((ROOT / "implicit_attention").rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


nb_execution_cache_path = str(ROOT / "build" / "notebooks" / _fingerprint())
_IPYTHON = ROOT / "build" / "ipython"  # in place of what the user has set up for notebooks
(_IPYTHON / "profile_default").mkdir(parents=True, exist_ok=True)
(_IPYTHON / "profile_default" / "ipython_kernel_config.py").write_text('c.Application.log_level = "ERROR"\n')
os.environ.pop("MPLBACKEND", None)  # else figures would not appear in notebooks
os.environ |= {
    "MATPLOTLIBRC": str(DOCS / "matplotlibrc"),
    "IPYTHONDIR": str(_IPYTHON),
    "PYTHONWARNINGS": "ignore:IProgress not found",  # of tqdm, which would like to draw in notebooks
}

# The reference. In docstrings, single backquotes are code.
default_role = "code"
nitpicky = True
napoleon_use_rtype = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autoclass_content = "both"
python_maximum_signature_line_length = 90
toc_object_entries_show_parents = "hide"
nitpick_ignore = [
    ("py:class", f"implicit_attention.{name}")
    for name in ("attention.map.AttentionMap", "equation.packing.PackedMap", "hf.modeling.Headed")
]
nitpick_ignore += [("py:class", "transformers.utils.generic.TransformersKwargs")]  # has no page
intersphinx_mapping = inventories.mapping(ROOT / "build" / "inventories")

html_theme = "furo"
pygments_style = "friendly"
pygments_dark_style = "github-dark"
html_title = "implicit-attention"
html_static_path = ["_static"]
html_extra_path = ["_root"]  # the page that leads from / to the start page
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
if "GITHUB_REPOSITORY" in os.environ:
    html_theme_options |= {
        "source_repository": f"https://github.com/{os.environ['GITHUB_REPOSITORY']}/",
        "source_branch": "main",
        "source_directory": "",
    }
