"""Our numbers beside the paper's, as rows and as text. Imports without torch."""

import json
from typing import Any

from swav_eval.ledger import Reported, ledger
from swav_eval.recipes import get_protocol, settings_of, summary

BEST = "swav_r50_2x224_6x96_800ep"  # whose numbers a backbone of unknown pretraining stands beside
FORMAT = "swav.table/1"
LISTED = ("semisup_1pct", "semisup_10pct")  # whose images are SimCLR's lists (A.4), and not drawn
SIZES = {"resize_px": 256, "crop_px": 224}  # appendix A.5


def reported(recipe: str, protocol: str, metric: str) -> Reported | None:
    """What the paper has for a protocol: of this pretraining, or else of another one by SwAV; None if nothing.

    Args:
        recipe: of the pretraining.
        protocol: that measured.
        metric: of its result.
    """
    asked = metric if protocol == "knn" else protocol  # which measures knn_20 and knn_200 at once
    found = [one for one in ledger() if (one.protocol, one.metric) == (asked, metric) and one.value is not None]
    own = [one for one in found if one.pretraining == recipe]
    return next(iter(own or [one for one in found if one.row.startswith("SwAV")]), None)


def changed(protocol: str, result: dict[str, Any]) -> list[str]:
    """Settings in which an evaluation is not the paper's: those that were overridden, and other sizes of images.

    Images that are drawn where the paper has a list are not the paper's; a list that is given is taken for it.

    Args:
        protocol: by name.
        result: of it.
    """
    stated = settings_of(get_protocol(protocol))
    found = result["settings"]
    names = [name for name, value in stated.items() if name not in SIZES and found[name] != value]
    if protocol in LISTED:
        names = [name for name in names if name != "subset"] + ["subset"] * (found["subset"]["names"] is None)
    return [*names, *(name for name, value in SIZES.items() if result[name] != value)]


def rows(results: dict[str, dict[str, Any]], recipe: str) -> list[dict[str, Any]]:
    """One row for each metric.

    Args:
        results: by protocol.
        recipe: of the pretraining whose numbers they are compared with.

    Returns:
        Objects with ``protocol``, ``metric``, ``ours`` (in per cent), ``paper`` (as printed, or None), ``where`` the
        paper has it, whether that is ``of_this_pretraining``, and which settings were ``changed``.
    """
    table = []
    for protocol, result in results.items():
        for metric, value in result["metrics"].items():
            theirs = reported(recipe, protocol, metric)
            table.append(
                {
                    "protocol": protocol,
                    "metric": metric,
                    "ours": 100 * value,
                    "paper": theirs.value if theirs else None,
                    "where": f"{theirs.table}: {theirs.row}" if theirs else None,
                    "of_this_pretraining": bool(theirs and theirs.pretraining == recipe),
                    "changed": changed(protocol, result),
                }
            )
    return table


def table_of(results: dict[str, dict[str, Any]], recipe: str, left_out: dict[str, str]) -> dict[str, Any]:
    """All that ``--output`` of the table holds.

    Args:
        results: by protocol.
        recipe: of the pretraining whose numbers they are compared with.
        left_out: why, by protocol.
    """
    return {
        "format": FORMAT,
        "compared_with": recipe,
        "rows": rows(results, recipe),
        "left_out": left_out,
        "protocols": {name: {"what": summary(name), "settings": one["settings"]} for name, one in results.items()},
        "results": results,
    }


def text_of(table: dict[str, Any]) -> str:
    """The table for a person: Markdown, then each protocol to the letter, then what was left out."""
    lines = [
        f"The paper's numbers are those of {table['compared_with']}; of another pretraining where marked *.",
        "",
        "| Protocol | Metric | Ours, % | Paper's, % | Where | To the letter |",
        "|---|---|---|---|---|---|",
    ]
    for row in table["rows"]:
        mark = "" if row["of_this_pretraining"] or row["paper"] is None else " *"
        paper = "-" if row["paper"] is None else f"{row['paper']}{mark}"
        letter = f"no: {', '.join(row['changed'])}" if row["changed"] else "yes"
        cells = (row["protocol"], row["metric"], f"{row['ours']:.1f}", paper, row["where"] or "-", letter)
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for name, protocol in table["protocols"].items():
        lines.append(f"{name}: {protocol['what']} {json.dumps(protocol['settings'])}")
    lines += [f"left out: {name}: {reason}" for name, reason in table["left_out"].items()]
    return "\n".join(lines)
