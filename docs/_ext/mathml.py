"""Formulas as MathML, which browsers show by themselves: no script is fetched when a page is read."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import SphinxError

# the converter has no fixed sizes of brackets, and MathML stretches them as needed
FIXED_SIZES = re.compile(r"\\[bB]igg?[lrm]?(?![A-Za-z])")


def convert(tex: str, block: bool) -> str:
    """MathML of a formula."""
    text = FIXED_SIZES.sub("", tex).strip()
    if block and "\\\\" in text and "\\begin" not in text:
        text = f"\\begin{{aligned}}{text}\\end{{aligned}}"
    try:
        return tex2mathml(text, as_block=block)
    except MathError as error:
        raise SphinxError(f"no MathML for the formula {tex!r}: {error}") from error


def visit_math(self: Any, node: nodes.math) -> None:
    self.body.append(convert(node.astext(), block=False))
    raise nodes.SkipNode


def visit_displaymath(self: Any, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math-block"))
    self.body.append(convert(node.astext(), block=True) + "</div>\n")
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    app.connect(
        "config-inited",
        lambda app, config: setattr(config, "html_math_renderer", "mathml"),
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
