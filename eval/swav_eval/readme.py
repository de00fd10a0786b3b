"""The tables of README.md and docs/paper-numbers.md, generated from the ledger: ``python -m swav_eval.readme``.

Run it at the root of the repository after a change of recipes, protocols or the ledger; a test compares.
"""

import re
import sys
from pathlib import Path

from swav.logs import answer, start_logging
from swav.program import run
from swav.recipes import small
from swav_eval.ledger import MEASUREMENTS, NOT_BUILT, OTHERS, Reported, ledger
from swav_eval.recipes import protocol_names, summary

FILES = ("README.md", "docs/paper-numbers.md")
_SECTION = re.compile(r"(<!-- generated: (?P<name>[a-z ]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def recipes_table() -> str:
    """Which pretraining and which protocols each table of the paper needs."""
    lines = ["| Paper | Pretraining recipes | Protocols |", "|---|---|---|"]
    for table in dict.fromkeys(one.table for one in ledger()):
        ours = [one for one in ledger() if one.table == table]
        recipes = dict.fromkeys(one.pretraining for one in ours if one.pretraining is not None)
        protocols = dict.fromkeys(_named(one.protocol) for one in ours)
        lines.append(f"| {table} | {', '.join(f'`{name}`' for name in recipes)} | {', '.join(protocols)} |")
    own = ", ".join(f"`{build.__name__}`" for build in small.RECIPES)
    return "\n".join([*lines, f"| Not in the paper: small images | {own} | `knn` |"])


def protocols_table() -> str:
    """Every protocol, what it is, and the best number that the paper has for SwAV."""
    lines = ["| Protocol | What |", "|---|---|"]
    lines += [f"| `{name}` | {summary(name)} |" for name in protocol_names()]
    return "\n".join(lines)


def numbers_table() -> str:
    """Every number."""
    lines = ["| Where | Row | Column | Value | Pretraining recipe | Protocol |", "|---|---|---|---|---|---|"]
    for one in ledger():
        recipe = f"`{one.pretraining}`" if one.pretraining is not None else OTHERS
        lines.append(
            f"| {one.table} | {one.row} | {one.column} | {_printed(one)} | {recipe} | {_named(one.protocol)} |"
        )
    return "\n".join(lines)


def _named(protocol: str) -> str:
    if protocol in MEASUREMENTS:
        return protocol.replace("_", " ")
    return f"`{protocol}`" + (" (not built yet)" if protocol in NOT_BUILT else "")


def _printed(one: Reported) -> str:
    return "not stated" if one.value is None else f"{one.value} {one.unit}".strip()


_TABLES = {"recipes": recipes_table, "protocols": protocols_table, "numbers": numbers_table}


def updated(text: str) -> str:
    """A document with its generated sections made anew.

    Raises:
        ValueError: it has a section that nothing generates, or none.
    """
    sections = [match["name"] for match in _SECTION.finditer(text)]
    unknown = [name for name in sections if name not in _TABLES]
    if unknown or not sections:
        raise ValueError(f"generated sections {sections}; they must be of {', '.join(_TABLES)}, and at least one")
    return _SECTION.sub(lambda match: f"{match[1]}{_TABLES[match['name']]()}\n{match[4]}", text)


def main() -> int:
    """Run from the command line; returns the exit status."""
    start_logging()

    def body() -> None:
        for name in FILES:
            path = Path(name)
            if not path.is_file():
                raise ValueError(f"there is no {name} here; run this at the root of the repository")
            path.write_text(updated(path.read_text()))
        answer(f"wrote {' and '.join(FILES)}")

    return run(body)


if __name__ == "__main__":
    sys.exit(main())
