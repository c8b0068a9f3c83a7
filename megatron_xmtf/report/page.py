"""Build one offline HTML page out of sections, tables, key figures and pictures.

    page = Page("Evaluation", subtitle="step 40")
    page.section("Accuracy", "Chance is 25 %.", Page.table(["task", "n"], [["months", 120]]), Page.figure(svg, "…"))
    page.write("report.html")

Everything that is not `Html` is escaped, so text out of data cannot become markup. The page loads nothing: a
Content-Security-Policy in it forbids scripts and every address, and pictures are inline SVG.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_xmtf.files import atomic_write

__all__ = ["Html", "Page", "escape", "format_number"]

STYLE = """
:root { color-scheme: light; --ink: #1d2430; --soft: #5c6675; --line: #dfe3e8; --wash: #f5f7f9; --accent: #0b5f8a; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; }
h2 { font-size: 20px; margin: 0 0 8px; }
p { margin: 8px 0; max-width: 75ch; }
.subtitle { color: var(--soft); margin: 6px 0 0; }
nav { margin: 16px 0 0; display: flex; flex-wrap: wrap; gap: 4px 18px; }
nav a { color: var(--accent); text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { border-top: 1px solid var(--line); margin-top: 28px; padding-top: 22px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 8px; }
.tile { background: var(--wash); border-radius: 8px; padding: 12px 16px; min-width: 150px; flex: 1 1 150px; }
.tile b { display: block; font-size: 24px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { display: block; font-weight: 600; }
.tile small { display: block; color: var(--soft); font-size: 13px; line-height: 1.35; margin-top: 2px; }
.scroll { overflow: auto; max-height: 70vh; margin: 12px 0; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { position: sticky; top: 0; background: var(--wash); font-weight: 600; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
tbody tr:hover td { background: #fafbfc; }
.number { text-align: right; white-space: nowrap; }
caption { caption-side: top; text-align: left; color: var(--soft); padding: 8px 12px; }
figure { margin: 14px 0; overflow-x: auto; }
figure svg { max-width: 100%; height: auto; display: block; }
figcaption, .note { color: var(--soft); font-size: 13.5px; max-width: 85ch; margin-top: 6px; }
pre { background: var(--wash); border-radius: 8px; padding: 12px 16px; overflow: auto; font-size: 13px; }
@media (max-width: 720px) { figure svg { max-width: none; min-width: 660px; } }
@media print { .scroll { max-height: none; } section { break-inside: avoid; } nav { display: none; } }
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Html(str):
    """Text that is markup already; every other string is escaped where it enters a page."""

    __slots__ = ()


def escape(value: object) -> Html:
    """Turn a value into markup: `Html` unchanged, anything else escaped (quotes too).

    Half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes `?`.
    """
    if isinstance(value, Html):
        return value
    return Html(html.escape(str(value).encode("utf-8", "replace").decode("utf-8"), quote=True))


def format_number(value: float) -> str:
    """Word a number for a table: thousands marks, four significant digits, `–` for NaN.

    >>> [format_number(value) for value in (12345, 0.51234, 1234567.0, 0.00002)]
    ['12,345', '0.5123', '1,234,567', '2e-05']
    """
    if isinstance(value, int):
        return f"{value:,}"
    if value != value:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


class Page:
    """One HTML file: a title, key figures, sections."""

    def __init__(self, title: str, *, subtitle: str = "", language: str = "en") -> None:
        self.title, self.subtitle, self.language = title, subtitle, language
        self._tiles: list[Html] = []
        self._sections: list[tuple[str, Html]] = []

    def key_figure(self, value: str, label: str, *, detail: str = "") -> Page:
        """Add a figure to the row under the title, as `58 %`, `accuracy`, `chance 25 %`."""
        small = f"<small>{escape(detail)}</small>" if detail else ""
        self._tiles.append(Html(f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span>{small}</div>'))
        return self

    def section(self, title: str, *parts: str) -> Page:
        """Add a section; a part that is `Html` enters as it is, any other string as a paragraph of text."""
        body = [part if isinstance(part, Html) else f"<p>{escape(part)}</p>" for part in parts]
        self._sections.append((title, Html("\n".join(body))))
        return self

    @staticmethod
    def table(headers: Sequence[object], rows: Iterable[Sequence[object]], *, caption: str = "") -> Html:
        """Draw a table; numbers are aligned right and shortened, `None` is an en dash.

        Raises:  ValueError: a row has another number of cells than there are headers (a defect of the caller).
        """
        rows = list(rows)
        for row in rows:
            if len(row) != len(headers):
                raise ValueError(f"a table row has {len(row)} cells, the header {len(headers)}: {list(row)!r}")
        numeric = [any(_is_number(row[column]) for row in rows) for column in range(len(headers))]
        head = "".join(_cell("th", header, number) for header, number in zip(headers, numeric, strict=True))
        body = [
            "<tr>" + "".join(_cell("td", cell, number) for cell, number in zip(row, numeric, strict=True)) + "</tr>"
            for row in rows
        ]
        words = f"<caption>{escape(caption)}</caption>" if caption else ""
        top = f'<div class="scroll"><table>{words}<thead><tr>{head}</tr></thead>\n<tbody>'
        return Html(top + "\n".join(body) + "</tbody></table></div>")

    @staticmethod
    def figure(picture: Html, caption: str = "") -> Html:
        """Frame a picture (inline SVG) with a caption."""
        return Html(f"<figure>{escape(picture)}<figcaption>{escape(caption)}</figcaption></figure>")

    @staticmethod
    def note(text: str) -> Html:
        """Word a remark in small type."""
        return Html(f'<p class="note">{escape(text)}</p>')

    @staticmethod
    def preformatted(text: str) -> Html:
        """Show text as it is (commands, logs, samples)."""
        return Html(f"<pre>{escape(text)}</pre>")

    def html(self) -> str:
        """Return the whole page."""
        links = "".join(
            f'<a href="#section-{number}">{escape(title)}</a>' for number, (title, _) in enumerate(self._sections, 1)
        )
        sections = "\n".join(
            f'<section id="section-{number}"><h2>{escape(title)}</h2>\n{body}</section>'
            for number, (title, body) in enumerate(self._sections, 1)
        )
        subtitle = f'<p class="subtitle">{escape(self.subtitle)}</p>' if self.subtitle else ""
        navigation = f"<nav>{links}</nav>" if len(self._sections) > 1 else ""
        tiles = f'<div class="tiles">{"".join(self._tiles)}</div>' if self._tiles else ""
        return (
            f'<!doctype html>\n<html lang="{escape(self.language)}">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
            f"<h1>{escape(self.title)}</h1>\n{subtitle}{navigation}{tiles}\n{sections}\n</main>\n</body>\n</html>\n"
        )

    def write(self, path: Path | str) -> Path:
        """Write the page, atomically, and return its path."""
        path = Path(path)
        with atomic_write(path) as stream:
            stream.write(self.html())
        return path


def _is_number(cell: object) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def _cell(tag: str, value: object, number: bool) -> str:
    """Draw one cell of a column that holds numbers or not."""
    if value is None:
        text = Html("–")
    elif isinstance(value, bool):
        text = Html("yes" if value else "no")
    elif isinstance(value, int | float):
        text = escape(format_number(value))
    else:
        text = escape(value)
    return f'<{tag} class="number">{text}</{tag}>' if number else f"<{tag}>{text}</{tag}>"
