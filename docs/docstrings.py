"""Docstrings are written for `help`; this puts their formulas, examples and lists into the form that the site reads."""

import re
import textwrap
from typing import Any

import griffe

_INLINE = re.compile(r":math:`([^`]*)`")
_BLOCK = re.compile(r"^([ ]*)\.\. math::(.*)\n((?:\1[ ]+\S.*\n|[ ]*\n)*)", re.MULTILINE)


_EXAMPLE = re.compile(r"^([ ]*)Example:$", re.MULTILINE)
_MODULE = re.compile(r"(?<!\[)`(elsa_pl\.functional\.\w+)`")
_SHARED = re.compile(r"^([ ]+)(\w+(?:, \w+)+)(: see .*)$", re.MULTILINE)


class SiteForm(griffe.Extension):
    """Changes docstrings as they are read, and no file."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = for_site(obj.docstring.value)


def for_site(text: str) -> str:
    r"""A docstring as the site reads it.

    Formulas get dollars instead of ``:math:``; ``Example:`` is ``Examples:``, of which the site shows the code as code;
    ``a, b: see C`` in a list of arguments is a line for each; double backticks are single ones, and
    modules of functions are links.

    Example:
        >>> print(for_site(":math:`x^2` of ``x``"))
        $x^2$ of `x`
    """

    def block(found: re.Match[str]) -> str:
        indent, first, rest = found.groups()
        latex = " ".join(f"{first}\n{textwrap.dedent(rest)}".split())
        return f"{indent}$$\n{indent}{latex}\n{indent}$$\n\n"

    text = _BLOCK.sub(block, text + "\n").rstrip("\n")
    text = _INLINE.sub(lambda found: f"${' '.join(found[1].split())}$", text)
    text = _EXAMPLE.sub(r"\1Examples:", text).replace("``", "`")
    text = _MODULE.sub(r"[`\1`][\1]", text)
    return _SHARED.sub(lambda found: "\n".join(found[1] + name + found[3] for name in found[2].split(", ")), text)
