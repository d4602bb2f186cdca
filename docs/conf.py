"""Sphinx configuration; ``make docs`` builds with warnings as errors, and neither it nor its pages need a network."""

import re
from pathlib import Path

import vitkernels
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.errors import ExtensionError
from sphinx.util.logging import getLogger

project = "vitkernels"
author = "the vitkernels authors"
copyright = "2026, the vitkernels authors"
version = release = vitkernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature shows them
autodoc_inherit_docstrings = False  # what torch says of `extra_repr` is of no use here
autodoc_default_options = {
    "members": True,
    "exclude-members": "encoded, ignored, init_non_persistent_buffers",  # between classes of the package
}

html_theme = "furo"
html_title = f"vitkernels {version}"
html_math_renderer = "mathml"  # browsers show it without a script

_ELSEWHERE = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["'](?:https?:)?//[^>]*>""")


def mathml(formula, display):
    """A formula of TeX as MathML."""
    found = convert(formula, display=display)
    if "\\" in found:  # the converter passes on the commands that it does not know
        raise ExtensionError(f"no MathML for {formula!r}: {found}")
    return found


def loaded_from_elsewhere(page):
    """The elements of a page of HTML that make a browser ask another server."""
    return _ELSEWHERE.findall(page)


def _visit_math(translator, node):
    translator.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _visit_math_block(translator, node):
    translator.body.append(f"<div class='math'>{mathml(node.astext(), 'block')}</div>")
    raise nodes.SkipNode


def _check_pages(app, exception):
    if exception is not None or app.builder.format != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        if found := loaded_from_elsewhere(page.read_text()):
            getLogger(__name__).warning(f"{page.name} loads {found}")


def setup(app):
    app.add_html_math_renderer("mathml", (_visit_math, None), (_visit_math_block, None))
    app.connect("build-finished", _check_pages)
