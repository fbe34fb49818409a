"""Tables as text."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
  """Write a markdown table; a bar inside a cell stays one."""
  rows = [head, ["---"] * len(head), *lines]
  cells = ([cell.replace("|", "\\|") for cell in row] for row in rows)
  return "".join(f"| {' | '.join(row)} |\n" for row in cells)
