from pathlib import Path

import pytest

from swav_eval.ledger import ledger
from swav_eval.readme import FILES, main, numbers_table, updated

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", FILES)
def test_the_documents_are_those_that_the_ledger_gives(name: str) -> None:
    """Make them anew by ``python -m swav_eval.readme``."""
    text = (ROOT / name).read_text()
    assert updated(text) == text


def test_every_number_has_its_line() -> None:
    assert len(numbers_table().splitlines()) == len(ledger()) + 2


def test_sections_are_made_anew_and_the_rest_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main() == 64  # not the root of the repository
    (tmp_path / "docs").mkdir()
    for name in FILES:
        (tmp_path / name).write_text("before\n<!-- generated: protocols -->\nold\n<!-- end -->\nafter\n")
    assert main() == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n<!-- generated: protocols -->\n| Protocol | What |\n")
    assert text.endswith("\n<!-- end -->\nafter\n")
    assert "old" not in text


def test_a_document_without_sections_is_refused() -> None:
    with pytest.raises(ValueError, match="must be of recipes, protocols, numbers"):
        updated("nothing")
    with pytest.raises(ValueError, match="must be of recipes, protocols, numbers"):
        updated("<!-- generated: poems -->\n<!-- end -->")
