"""The report of a run: one HTML file with embedded figures, which loads nothing else."""

import base64
import html
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from launch.run.progress import format_seconds, format_value

STYLE = """
:root { color-scheme: light dark;
  --page: #fff; --text: #1c1e21; --quiet: #5d6470; --line: #dfe3e8; --panel: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181c; --text: #e7e9ec; --quiet: #a0a7b2; --line: #343a43; --panel: #20242a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 4rem;
  background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .6rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .7rem; }
p { margin: 0 0 1rem; max-width: 46rem; }
.caption { color: var(--quiet); font-size: .93rem; margin: .6rem 0 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .32rem 1.6rem .32rem 0; overflow-wrap: anywhere; }
th { font-weight: normal; color: var(--quiet); overflow-wrap: normal; }
table.summary { width: 100%; }
table.summary > tbody > tr { border-top: 1px solid var(--line); }
table.summary > tbody > tr > th { width: 16rem; }
td table th, td table td { padding: 0 1.2rem 0 0; }
table.comparison th, table.comparison td { text-align: right; padding: .32rem 0 .32rem 1.6rem;
  white-space: nowrap; }
table.comparison th:first-child, table.comparison td:first-child { text-align: left; padding-left: 0;
  white-space: normal; min-width: 7rem; }
table.comparison tbody tr { border-top: 1px solid var(--line); }
.wide { overflow-x: auto; }
pre { margin: 0; padding: .85rem 1rem;
  background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  white-space: pre-wrap; overflow-wrap: anywhere; font: .88rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; background: #fff; padding: .7rem; border-radius: 8px;
  border: 1px solid var(--line); }
@media (max-width: 40rem) {
  body { padding: 1.25rem .9rem 3rem; }
  table.comparison th, table.comparison td { padding-left: .9rem; }
  table.summary > tbody > tr > * { display: block; width: auto; padding: .2rem 0; }
  /* A figure keeps a readable size and scrolls within its frame. */
  figure { overflow-x: auto; }
  figure img { width: 44rem; max-width: none; }
  figcaption { position: sticky; left: 0; }
}
"""


class Comparison(NamedTuple):
    """A table whose first column names the rows; the other columns are right-aligned."""

    title: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_report(
    path: str | os.PathLike,
    title: str,
    introduction: str,
    summary: Mapping[str, Any],
    sections: Sequence[tuple[str, str, str | os.PathLike]],
    command: str,
    tables: Sequence[Comparison] = (),
) -> None:
    """Writes the report of a run atomically.

    Args:
      path: the HTML file.
      title: its heading.
      introduction: a paragraph of plain text.
      summary: values by name for the table at the top; a nested dict becomes a nested table, and
        `versions` is shown at the end of the page.
      sections: (title, caption, PNG file) of each figure.
      command: the command line of the run.
      tables: shown before the figures.
    """
    versions = summary.get("versions", {})
    top = {name: value for name, value in summary.items() if name != "versions"}
    body = [
        f"<h1>{_text(title)}</h1>",
        f"<p>{_text(introduction)}</p>",
        _table(top, "summary"),
        f"<h2>Command</h2>\n<pre>{_text(command)}</pre>",
        *[_comparison(*table) for table in tables],
        *[_figure(*section) for section in sections],
        f"<h2>Versions</h2>\n{_table(versions, 'versions')}" if versions else "",
    ]
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{chr(10).join(body)}
</body>
</html>
"""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _table(values: Mapping[str, Any], kind: str = "nested") -> str:
    rows = "\n".join(_row(str(name), value) for name, value in values.items())
    return f'<table class="{kind}"><tbody>\n{rows}\n</tbody></table>'


def _row(name: str, value: Any) -> str:
    name, cell = _readable(name, value)
    return f"<tr><th>{_text(name.replace('_', ' '))}</th><td>{cell}</td></tr>"


def _readable(name: str, value: Any) -> tuple[str, str]:
    """Returns name and cell of a value; a unit in the name, such as `_s`, moves to the value."""
    if isinstance(value, Mapping):
        return name, _table(value)
    if isinstance(value, list | tuple):
        return name, _text(", ".join(format_value(item) for item in value))
    if name.startswith("bytes_") and value is not None:
        return f"sent {name.removeprefix('bytes_')}", f"{value / 1e6:,.1f} MB"
    if name.endswith("_s") and not name.endswith("_per_s") and value is not None:
        return name.removesuffix("_s"), format_seconds(value)
    return name, _text(format_value(value))


def _comparison(title: str, caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    lines = "\n".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"""<h2>{_text(title)}</h2>
<div class="wide"><table class="comparison">
<thead><tr>{head}</tr></thead>
<tbody>
{lines}
</tbody>
</table></div>
<p class="caption">{_text(caption)}</p>"""


def _figure(title: str, caption: str, path: str | os.PathLike) -> str:
    data = base64.b64encode(pathlib.Path(path).read_bytes()).decode()
    return f"""<h2>{_text(title)}</h2>
<figure>
<img src="data:image/png;base64,{data}" alt="{_text(title)}">
<figcaption class="caption">{_text(caption)}</figcaption>
</figure>"""
