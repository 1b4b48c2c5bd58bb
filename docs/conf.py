"""Sphinx configuration of the documentation: `tox -e docs`."""

from __future__ import annotations

import os
import re
import shutil
import sys
import warnings
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

import lib_lightning

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).with_name("_extensions"))]

# Pages of names that no longer exist would be in no table of contents.
shutil.rmtree(ROOT / "docs" / "reference" / "generated", ignore_errors=True)

# Tutorials run in processes without a display, and draw into the page.
os.environ.setdefault("MPLBACKEND", "agg")
# Lightning and torch, speaking to each other.
warnings.filterwarnings("ignore", ".*LeafSpec.*")

project = "lib-lightning"
author = "The lib-lightning authors"
copyright = author
version = release = lib_lightning.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "mathml",
    "keyboard",
    "external_links",
]
exclude_patterns = ["_build", "tutorials/*.ipynb", "tutorials/*.py", "tutorials/*.zip"]
templates_path = ["_templates"]

# Pages are Markdown. A heading can be linked to as on a code host: page.md#words-of-the-heading.
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
# A dollar beside a letter is no formula.
myst_dmath_allow_digits = False

# A page for each public name, from its docstring.
autosummary_generate = True
autodoc_default_options = {"show-inheritance": True}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# `name` in a docstring is a link, where there is something of this name.
default_role = "py:obj"
add_function_parentheses = False
add_module_names = False

html_theme = "furo"
html_title = "lib-lightning"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
html_math_renderer = "mathml"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# What a tutorial needs at most, so that all of them are executed whenever the pages are built.
sphinx_gallery_conf = {
    "examples_dirs": str(ROOT / "tutorials"),
    "gallery_dirs": "tutorials",
    "filename_pattern": r"\.py$",
    "ignore_pattern": r"__init__\.py",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": ("figures",),
    "capture_repr": ("_repr_html_", "__repr__"),
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_signature": False,
    "min_reported_time": 1e6,
    "plot_gallery": True,
    # Each tutorial trains for itself.
    "parallel": 2,
    "write_computation_times": False,
}


def _is_hook(app: object, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Whether a member is one of Lightning's hooks, which its trainer calls and no user does."""
    from lightning.pytorch import Callback

    return True if name in vars(Callback) and getattr(obj, "__module__", "").startswith("lib_lightning.") else None


def _results_are_prose(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """What is returned is a sentence, although sphinx.ext.napoleon takes all before a colon for a type."""
    for i, line in enumerate(lines[:-1]):
        if line in ("Returns:", "Yields:"):
            lines[i + 1] = lines[i + 1].replace("    ", "    : ", 1)


def _shorten_types(app: object, doctree: nodes.document) -> None:
    """Behind a Literal, Sphinx leaves names of types as they are marked for being shortened."""
    for text in list(doctree.findall(lambda node: isinstance(node, nodes.Text) and "~" in node)):
        text.parent.replace(text, nodes.Text(re.sub(r"~(?:\w+\.)+(\w+)", r"\1", text)))


def setup(app: Sphinx) -> None:
    """Leave hooks out of the reference, prepare docstrings before napoleon reads them, and shorten names of types."""
    app.connect("doctree-read", _shorten_types)
    app.connect("autodoc-skip-member", _is_hook)
    app.connect("autodoc-process-docstring", _results_are_prose, priority=400)
