"""Pages of pictures that need nothing else: HTML with everything in it, in light and dark."""

from __future__ import annotations

import base64
import html
import io
import string
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from spvit_jax.drawing.gallery import Picture, Section
from spvit_jax.drawing.mosaic import Mosaic, Scale
from spvit_jax.drawing.style import colours, inline_svg

_PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #22262b; --soft: #5c6570; --line: #e1e5ea;
  --accent: #0b63ce;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1d2126; --ink: #e6e9ed; --soft: #9aa4b0; --line: #2e343c;
    --accent: #6cb2ff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
header, main { max-width: 68rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
h1 { margin: 0 0 1.2rem; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.01em; }
h2 { margin: 3.2rem 0 .4rem; font-size: 1.4rem; }
h3 { margin: 0 0 .2rem; font-size: 1.02rem; }
p { margin: 0; max-width: 46rem; overflow-wrap: anywhere; }
.soft, figcaption p { color: var(--soft); }
dl {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr));
  gap: .9rem 1.5rem; margin: 0; font-variant-numeric: tabular-nums;
}
dt { color: var(--soft); font-size: .82rem; }
dd { margin: 0; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin-top: 1.6rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.figures {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr));
  grid-auto-flow: dense; align-items: start; gap: 1rem; margin-top: 1.1rem;
}
figure {
  min-width: 0; margin: 0; padding: 1.1rem 1.25rem 1.25rem;
  background: var(--card); border: 1px solid var(--line); border-radius: .75rem;
}
figure.wide { grid-column: 1 / -1; }
code {
  display: block; margin-top: .6rem; padding: .45rem .7rem; border-radius: .4rem;
  background: var(--page); font: .84rem/1.5 ui-monospace, Menlo, Consolas, monospace;
  overflow-wrap: anywhere; user-select: all;
}
figcaption { margin-bottom: .9rem; }
figcaption p { font-size: .92rem; }
.drawing { overflow-x: auto; }
svg { max-width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.mosaic { display: grid; grid-template-columns: max-content minmax(0, max-content); gap: .3rem; }
.mosaic .columns {
  grid-column: 2; display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr);
  text-align: center; align-items: end;
}
.mosaic .rows { display: grid; grid-auto-rows: minmax(0, 1fr); align-items: center; }
.mosaic span { font-size: .74rem; line-height: 1.15; color: var(--soft); white-space: pre-line; }
.mosaic img { display: block; width: 100%; image-rendering: pixelated; }
.scale { display: flex; align-items: center; gap: .5rem; margin-top: .8rem; font-size: .8rem; }
.scale i { width: 12rem; height: .7rem; border-radius: .2rem; }
footer { max-width: 68rem; margin: 3rem auto 0; padding: 0 1.25rem 3rem; }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<dl>$facts</dl>
<nav>$links</nav>
</header>
<main>
$sections
</main>
<footer class="soft"><p>$footer</p></footer>
</body>
</html>
""")


_HALF = 27  # rem: what is wider has a row of its own
_TILE = 7  # rem: a tile's width, of which half is the least


def render(
    title: str, facts: Mapping[str, str], sections: Sequence[Section], footer: str = ""
) -> str:
    """Returns a page as HTML that loads nothing from anywhere.

    Args:
      title: title of the page.
      facts: short facts about what is drawn, by name.
      sections: pictures with their words.
      footer: last line of the page.
    """
    return _PAGE.substitute(
        title=html.escape(title),
        facts="".join(
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(fact)}</dd></div>"
            for name, fact in facts.items()
        ),
        links="".join(
            f'<a href="#part-{number}">{html.escape(section.title)}</a>'
            for number, section in enumerate(sections)
        ),
        sections="\n".join(
            _section(section, f"part-{number}") for number, section in enumerate(sections)
        ),
        footer=html.escape(footer),
    )


def _section(section: Section, name: str) -> str:
    figures = "\n".join(_figure(picture) for picture in section.pictures)
    text = f'<p class="soft">{html.escape(section.text)}</p>' if section.text else ""
    title = f"<h2>{html.escape(section.title)}</h2>"
    return f'<section id="{name}">{title}{text}<div class="figures">{figures}</div></section>'


def _figure(picture: Picture) -> str:
    drawing = picture.drawing
    if isinstance(drawing, Mosaic):
        width = float(_TILE * len(drawing.columns))
        drawn = _mosaic(drawing, picture.title)
    else:
        width = 6 * drawing.get_figwidth()  # 96 pixels, of which 16 are a rem
        drawn = inline_svg(drawing, picture.name)
    kind = ' class="wide"' if width > _HALF else ""
    code = f"<code>{html.escape(picture.code)}</code>" if picture.code else ""
    return (
        f'<figure id="{html.escape(picture.name)}"{kind}><figcaption>'
        f"<h3>{html.escape(picture.title)}</h3><p>{html.escape(picture.meaning)}</p>{code}"
        f'</figcaption><div class="drawing">{drawn}</div></figure>'
    )


def _mosaic(mosaic: Mosaic, description: str) -> str:
    """Returns a mosaic as one image between its labels."""
    columns, rows = (
        "".join(f"<span>{html.escape(label)}</span>" for label in labels)
        for labels in (mosaic.columns, mosaic.rows)
    )
    image = mosaic.image()
    width = _TILE * len(mosaic.columns)
    return (
        f'<div class="mosaic" style="min-width:{width / 2:.1f}rem">'
        f'<div class="columns">{columns}</div><div class="rows">{rows}</div>'
        f'<img style="width:{width:.1f}rem" src="{_data_url(image)}" '
        f'alt="{html.escape(description)}"></div>'
    ) + (_scale(mosaic.scale) if mosaic.scale else "")


def _scale(scale: Scale) -> str:
    """Returns a bar of a scale's colours with the values at its ends and in its middle."""
    values = np.linspace(scale.least, scale.most, 17)
    steps = ",".join(
        "rgb({},{},{})".format(*colour)
        for colour in colours(values, scale.name, scale.least, scale.most)
    )
    return (
        f'<div class="scale soft">{html.escape(scale.label)} {scale.least:.2f}'
        f'<i style="background:linear-gradient(90deg,{steps})"></i>{scale.most:.2f}</div>'
    )


def _data_url(image: np.ndarray) -> str:
    """Returns an image uint8 [h, w, 4] as a URL that holds it."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "webp", quality=88, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
