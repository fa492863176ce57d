"""HTML and SVG as trees: what comes from files is escaped when they are written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from xml.etree.ElementTree import Element, tostring

Child = Element | str | None
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def node(tag: str, *children: Child | Iterable[Child], **attributes: object) -> Element:
    """An element with texts and elements in it; attributes that are None are left out, `class_` is `class`, and `_` in
    names stands for `-`."""
    kept = {name: value for name, value in attributes.items() if value is not None}
    element = Element(tag, {name.strip("_").replace("_", "-"): _text(value) for name, value in kept.items()})
    for child in children:
        for one in [child] if isinstance(child, (Element, str)) or child is None else child:
            _append(element, one)
    return element


def _append(element: Element, child: Child) -> None:
    if isinstance(child, Element):
        element.append(child)
    elif child is not None and len(element):
        element[-1].tail = (element[-1].tail or "") + _text(child)
    elif child is not None:
        element.text = (element.text or "") + _text(child)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return UNPRINTABLE.sub("\ufffd", str(value))


def html(root: Element) -> str:
    """The whole document."""
    return "<!DOCTYPE html>\n" + tostring(root, encoding="unicode", method="html") + "\n"
