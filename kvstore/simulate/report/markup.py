"""HTML of pages: one file, nothing fetched, every text escaped, readable in light and dark."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from kvstore._version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvstore.simulate.report.figures import Plot

_CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --quiet: #59636e; --grid: #d5dae0; --card: #f5f7f9;
  --alert: #b42318; --alert-paper: #fdecea; --well: #1a7f37;
  --series-1: #0067b0; --series-2: #d15704; --series-3: #008561; --series-4: #b4508f; --series-5: #6f56b5;
  --series-6: #96750b; --series-7: #2f97c9; --series-8: #66707b; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e4e8ec; --quiet: #9aa4af; --grid: #383f47;
  --card: #1e2329; --alert: #ff8a80; --alert-paper: #3a1d1b; --well: #6fd08c;
  --series-1: #5fb3f2; --series-2: #ff9e5c; --series-3: #4fd0a7; --series-4: #ec97cb; --series-5: #b3a0f0;
  --series-6: #e0bd55; --series-7: #86d3f7; --series-8: #a9b3bd; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 1000px; padding: 24px 20px 48px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 36px 0 10px; }
h3 { font-size: 15px; margin: 22px 0 6px; }
.under, figcaption, footer, .note { color: var(--quiet); font-size: 13.5px; }
.alert { background: var(--alert-paper); border-left: 4px solid var(--alert); margin: 18px 0; padding: 10px 14px; }
.cards { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); margin: 20px 0; }
.card { background: var(--card); border-radius: 6px; padding: 10px 12px; }
.card b { display: block; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.card span { color: var(--quiet); font-size: 13px; }
figure { margin: 20px 0; } figure svg { display: block; height: auto; width: 100%; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 8px 0; }
th, td { border-bottom: 1px solid var(--grid); padding: 4px 14px 4px 0; text-align: right; vertical-align: top;
  white-space: nowrap; }
th { color: var(--quiet); font-weight: 500; } th:first-child, td:first-child, .text td, .text th { text-align: left; }
.text td { white-space: normal; }
.well { color: var(--well); } .ill { color: var(--alert); }
footer { border-top: 1px solid var(--grid); margin-top: 40px; padding-top: 10px; }
"""

# Nothing on the page may ask for anything, whatever a name in a scenario looks like.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page of parts that are HTML already."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<footer>Made by kvstore {escape(__version__)}.</footer>\n</body>\n</html>\n"
    )


def heading(title: str, under: str) -> str:
    return f'<h1>{escape(title)}</h1>\n<p class="under">{escape(under)}</p>'


def section(title: str) -> str:
    return f"<h2>{escape(title)}</h2>"


def subsection(title: str) -> str:
    return f"<h3>{escape(title)}</h3>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def alert(text: str) -> str:
    return f'<div class="alert" role="note">{escape(text)}</div>'


def bullets(texts: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def cards(figures: Iterable[tuple[str, str]]) -> str:
    """Headline figures: value and what it is."""
    shown = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in figures
    )
    return f'<div class="cards">{shown}</div>'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, is_text: bool = False, note: str = "") -> str:
    """A table; numbers are right-aligned, text (`is_text`) left."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    kind = ' class="text"' if is_text else ""
    under = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<div class="table"><table{kind}><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>{under}'


def picture(plot: Plot) -> str:
    """A plot with its caption, which is also what a screen reader says of it."""
    caption = escape(plot.caption)
    svg = plot.svg.replace("<svg ", f'<svg aria-label="{caption}" ', 1)
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"
