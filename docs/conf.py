"""Settings of Sphinx for the documentation's site. `make docs` builds it in build/site, offline."""

from __future__ import annotations

import html
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import ziamath
from docutils import nodes
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fusedrnn  # noqa: E402 (the one in this repository, not an installed one)

project = "fusedrnn"
author = copyright = "The fusedrnn authors"
version = release = fusedrnn.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# A name in single backticks becomes a link if the name is known.
default_role = "py:obj"
html_theme = "furo"
html_title = f"fusedrnn {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_favicon = "static/favicon.svg"
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "ziamath"
pygments_style = "default"
pygments_dark_style = "github-dark"

myst_enable_extensions = ["attrs_block", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
myst_number_code_blocks = []

autodoc_member_order = "bysource"
# fusedrnn.sb3 imports these packages, which the site does not need.
autodoc_mock_imports = ["sb3_contrib", "stable_baselines3"]
maximum_signature_line_length = 80
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_ivar = True
napoleon_use_rtype = False

# The size of an em of the formulas, in the units of their drawing.
EM = 16
ziamath.config.svg2 = False  # no formula refers to glyphs of another
ziamath.config.math.color = "currentColor"

# The files of the repository that a page includes, with the page.
INCLUDED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "csrc/cuda/README.md": "cuda-engine.md",
    "examples/README.md": "examples.md",
    "README.md": "index.md",
    "SECURITY.md": "security.md",
}
_LINK = re.compile(r"(?<=\]\()([^)#\s:]+\.md)")


def _lead_to_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    """Makes links to a file that a page includes lead to the page."""
    folder = Path(app.srcdir, docname).parent

    def page(match: re.Match[str]) -> str:
        path = os.path.relpath(folder / match[0], ROOT)
        target = INCLUDED.get(path)
        return os.path.relpath(Path(app.srcdir, target), folder) if target else match[0]

    source[0] = _LINK.sub(page, source[0])


def _name_the_rest(app: Sphinx, docname: str, source: list[str]) -> None:
    """Adds the exported names that the API's page lacks to the end of the page."""
    if docname != "api":
        return
    named = set(re.findall(r"^\.\. auto\w+:: fusedrnn\.(\w+)", source[0], re.M))
    rest = ""
    for name in fusedrnn.__all__:
        if name in named or name.startswith("__"):
            continue
        thing = getattr(fusedrnn, name)
        if isinstance(thing, ModuleType):
            rest += f".. automodule:: fusedrnn.{name}\n   :members:\n\n"
        elif isinstance(thing, type):
            rest += f".. autoclass:: fusedrnn.{name}\n   :members:\n\n"
        else:
            rest += f".. autofunction:: fusedrnn.{name}\n\n"
    if rest:
        source[0] += f"\n## More\n\n```{{eval-rst}}\n{rest}```\n"


def _part_names(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Splits a line of two attributes in two, because Sphinx would take the first for a type."""
    parted = []
    for line in lines:
        names, colon, text = line.removeprefix(":ivar ").partition(":")
        if line.startswith(":ivar ") and ", " in names:
            parted += [f":ivar {each}{colon}{text}" for each in names.split(", ")]
        else:
            parted.append(line)
    lines[:] = parted


def _formula(self: Any, node: nodes.Element, inline: bool) -> None:
    latex = node.astext().strip()
    drawn = ziamath.Latex(latex, size=EM, inline=inline)
    svg = drawn.svgxml()
    width, height = (float(svg.get(side)) / EM for side in ("width", "height"))
    for name, value in {
        "width": f"{width:.3f}em",
        "height": f"{height:.3f}em",
        "role": "img",
        "aria-label": latex,
    }.items():
        svg.set(name, value)
    if inline:
        svg.set("style", f"vertical-align: {drawn.getyofst() / EM:.3f}em")
    tag = "span" if inline else "div"
    picture = ElementTree.tostring(svg, encoding="unicode")
    self.body.append(f'<{tag} class="formula">{picture}</{tag}>')
    raise nodes.SkipNode


def _take_in_pictures(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Puts an SVG into its page, so that it takes the page's light or dark colours."""
    if app.builder.format != "html":
        return
    for image in list(doctree.findall(nodes.image)):
        if not image["uri"].endswith(".svg"):
            continue
        svg = Path(app.srcdir, image["uri"]).read_text()
        label = f'<svg role="img" aria-label="{html.escape(image["alt"])}"'
        svg = svg[svg.index("<svg") :].replace("<svg", label, 1)
        image.replace_self(nodes.raw("", f'<div class="picture">{svg}</div>', format="html"))


def _name_the_language(
    app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Sets a page's language, which its head may give: `lang: pt-BR`."""
    meta = app.env.metadata.get(pagename, {})
    context["language"] = meta.get("lang", "en")


def setup(app: Sphinx) -> None:
    """Connects the functions above to Sphinx."""
    app.connect("source-read", _lead_to_pages)
    app.connect("source-read", _name_the_rest)
    app.connect("autodoc-process-docstring", _part_names, priority=900)
    app.connect("doctree-resolved", _take_in_pictures)
    app.connect("html-page-context", _name_the_language)
    # Formulas are drawn in a font of ziamath when the site is built, so the pages need no script.
    app.add_html_math_renderer(
        "ziamath",
        (lambda self, node: _formula(self, node, inline=True), None),
        (lambda self, node: _formula(self, node, inline=False), None),
    )
