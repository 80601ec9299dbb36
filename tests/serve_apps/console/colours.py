"""Colours as the style sheets say them, resolved for light and dark, and their contrast."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import serve_apps.console

_STATIC = Path(serve_apps.console.__file__).parent / "static"
_NUMBER = re.compile(r"[\d.]+")
_NOT_RULES = re.compile(r"/\*.*?\*/|@charset[^;]*;", re.DOTALL)


class Colour(NamedTuple):
    """OKLab, and how much it covers, from 0 to 1."""

    lightness: float
    a: float
    b: float
    alpha: float = 1.0

    @property
    def linear(self) -> tuple[float, float, float]:
        """Linear sRGB, cut to what a screen shows."""
        light, a, b = self.lightness, self.a, self.b
        long = (light + 0.3963377774 * a + 0.2158037573 * b) ** 3
        medium = (light - 0.1055613458 * a - 0.0638541728 * b) ** 3
        short = (light - 0.0894841775 * a - 1.2914855480 * b) ** 3
        red = 4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short
        green = -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short
        blue = -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short
        return tuple(min(1.0, max(0.0, channel)) for channel in (red, green, blue))  # type: ignore[return-value]


class Theme:
    """The custom properties of one theme: those of `:root`, in the order of the files."""

    def __init__(self, dark: bool) -> None:
        self._dark = dark
        self._values: dict[str, str] = {}
        for name in ("vendor/tabler.min.css", "console.css"):
            text = _NOT_RULES.sub("", (_STATIC / name).read_text())
            for selectors, body in re.findall(r"([^{}]*)\{([^{}]*)\}", text):
                chosen = {selector.strip() for selector in selectors.split(",")}
                if ":root" in chosen or ("[data-bs-theme=dark]" in chosen and dark):
                    self._values.update(_properties(body))

    def colour(self, text: str) -> Colour:
        """Of a value of CSS: oklch(), #rgb, var(), light-dark(), color-mix() in OKLab. ValueError for others."""
        text = text.strip()
        if text == "transparent":
            return Colour(0, 0, 0, 0)
        if text.startswith("#"):
            return _of_hex(text[1:])
        name, _, inside = text.partition("(")
        parts = _parts(inside.removesuffix(")"))
        match name:
            case "var":
                return self.colour(self._values.get(parts[0], parts[-1]))
            case "light-dark":
                return self.colour(parts[self._dark])
            case "oklch" if not inside.startswith("from"):
                light, chroma, hue = map(float, _NUMBER.findall(inside)[:3])
                return Colour(light / 100, *(chroma * turn(math.radians(hue)) for turn in (math.cos, math.sin)))
            case "color-mix":
                return self._mixed(parts[1:])
        raise ValueError(f"{text} is no colour that this reads")

    def contrast(self, text: str, *grounds: str) -> float:
        """Of a text on a ground, which lies on the next ones where it is not opaque; from 1 to 21."""
        below = self.colour(grounds[-1]).linear
        for ground in reversed(grounds[:-1]):
            below = _over(self.colour(ground), below)
        above = _over(self.colour(text), below)
        bright, dim = sorted((_luminance(above), _luminance(below)), reverse=True)
        return (bright + 0.05) / (dim + 0.05)

    def _mixed(self, parts: list[str]) -> Colour:
        """In OKLab with premultiplied alpha; the first part has its percentage."""
        (first, share), second = parts[0].rsplit(maxsplit=1), self.colour(parts[1])
        colour, p = self.colour(first), float(share.removesuffix("%")) / 100
        alpha = colour.alpha * p + second.alpha * (1 - p)
        values = (
            (x * colour.alpha * p + y * second.alpha * (1 - p)) / (alpha or 1)
            for x, y in zip(colour[:3], second[:3], strict=True)
        )
        return Colour(*values, alpha)


def _properties(body: str) -> Mapping[str, str]:
    pairs = (declaration.partition(":") for declaration in body.split(";"))
    return {name.strip(): value.strip() for name, _, value in pairs if name.strip().startswith("--")}


def _parts(text: str) -> list[str]:
    """Split at commas outside of parentheses."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _of_hex(digits: str) -> Colour:
    if len(digits) == 3:
        digits = "".join(2 * digit for digit in digits)
    red, green, blue = (_linear(int(digits[n : n + 2], 16) / 255) for n in (0, 2, 4))
    long = (0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue) ** (1 / 3)
    medium = (0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue) ** (1 / 3)
    short = (0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue) ** (1 / 3)
    return Colour(
        0.2104542553 * long + 0.7936177850 * medium - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * medium + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * medium - 0.8086757660 * short,
    )


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4


def _encoded(channel: float) -> float:
    return 12.92 * channel if channel <= 0.0031308 else 1.055 * channel ** (1 / 2.4) - 0.055


def _over(above: Colour, below: Iterable[float]) -> tuple[float, float, float]:
    """Browsers composite encoded channels."""
    mixed = (
        _linear(above.alpha * _encoded(x) + (1 - above.alpha) * _encoded(y))
        for x, y in zip(above.linear, below, strict=True)
    )
    return tuple(mixed)  # type: ignore[return-value]


def _luminance(linear: Iterable[float]) -> float:
    return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
