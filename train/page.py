"""HTML pages that stand alone: one file each, no network."""

from __future__ import annotations

import importlib.resources
from html import escape
from string import Template


def fill_page(template: str, title: str, **parts: str) -> str:
    """A template of this folder with its `$names` filled in: `title` is text, `parts` are markup.

    `$head` is what all pages begin with: encoding, width, title, colours and type.
    """

    def fill(name: str, values: dict[str, str]) -> str:
        text = importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
        return Template(text).substitute(values)

    texts = {"title": escape(title)}
    return fill(template, texts | {"head": fill("head.html", texts).strip()} | parts)
