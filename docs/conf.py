"""Sphinx configuration; ``make docs`` builds with warnings as errors and needs no network."""

import vitkernels

project = "vitkernels"
author = "the vitkernels authors"
copyright = "2026, the vitkernels authors"
version = release = vitkernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature shows them
autodoc_default_options = {"members": True}

html_theme = "furo"
html_title = f"vitkernels {version}"
