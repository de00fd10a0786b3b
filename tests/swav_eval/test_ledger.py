import re
from pathlib import Path

import pytest

from swav.recipes import recipe_names, small
from swav_eval.ledger import MEASUREMENTS, NOT_BUILT, ledger
from swav_eval.recipes import STANDARD, get_protocol, protocol_names

SUPPLEMENT = Path(__file__).parents[3] / "shared/paper/swav-supplement.txt"


def test_every_row_resolves() -> None:
    for one in ledger():
        assert one.pretraining is None or one.pretraining in recipe_names(), one
        assert sum(one.protocol in known for known in (protocol_names(), MEASUREMENTS, NOT_BUILT)) == 1, one


def test_no_recipe_is_an_orphan() -> None:
    """Each pretraining gives a number of the paper, but for those of small images, which it does not have."""
    own = {build.__name__ for build in small.RECIPES}
    assert {one.pretraining for one in ledger()} - {None} == set(recipe_names()) - own


def test_no_protocol_is_an_orphan() -> None:
    """Each protocol gives a number of the paper, but for the one that is two at once."""
    assert {one.protocol for one in ledger()} & set(protocol_names()) == set(protocol_names()) - {"knn"}
    assert set(STANDARD) <= set(protocol_names())
    assert all(get_protocol(name).name == name for name in protocol_names())


def test_no_number_stands_twice() -> None:
    places = [(one.table, one.row, one.column) for one in ledger()]
    assert len(set(places)) == len(places)


def test_tables_have_as_many_numbers_as_the_paper() -> None:
    counts = {f"Table {number}": 0 for number in range(1, 11)}
    for one in ledger():
        if one.table in counts:
            counts[one.table] += 1
    assert list(counts.values()) == [8, 22, 37, 24, 18, 8, 5, 6, 4, 4]


def test_every_number_stands_in_the_supplement() -> None:
    """Of the supplement's own tables; a value that was mistyped is very likely not there."""
    if not SUPPLEMENT.is_file():
        pytest.skip(f"the supplement's text is not at {SUPPLEMENT}")
    text = SUPPLEMENT.read_text()
    for number in range(1, 11):
        caption = re.search(rf"^(Table {number}: .*)", text, re.MULTILINE)
        assert caption is not None
        table = text[caption.start() : caption.start() + 1600]
        for one in ledger():
            if one.table == f"Table {number}" and one.value is not None:
                assert re.search(rf"(?<![\d.]){re.escape(str(one.value))}(?![\d])", table), one
