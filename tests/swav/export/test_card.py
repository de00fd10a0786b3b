from pathlib import Path

import pytest
import yaml
from swav_testing.runs import TINY

from swav.config import to_json
from swav.export.card import check_license, model_card, run_of
from swav.models.backbone_file import BackboneFile
from swav.recipes import configure

SECRET = "s3://bucket/images"


def the_run() -> str:
    return to_json(configure("demo", data=SECRET, overrides=[*TINY]))


def test_the_card_says_what_a_user_needs(tmp_path: Path, tiny: BackboneFile) -> None:
    (tmp_path / "config.json").write_text(the_run())
    tiny = BackboneFile(
        tiny.backbone, configure("demo", data="x", overrides=[*TINY]).model, 24, 24, "swav backbone", ("head",), "ab12"
    )
    run = run_of(tmp_path / "backbone.pt", tiny)
    card = model_card(tiny, run, license_id="cc-by-nc-4.0", sha256="cd34")
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc-by-nc-4.0"
    assert front["tags"][-1] == "swav"
    for part in (
        "| architecture | resnet18, width 0.125, 3x3 stem |",
        "| parameters | 175,752 |",
        "| features | 64, pooled, before any head |",
        "| mean | [0.485, 0.456, 0.406] |",
        "| images at evaluation | shorter side 24 px, then the centre 24 px |",
        "| read from | swav backbone, SHA-256 ab12 |",
        "| left out of it | head |",
        "| SHA-256 of model.safetensors | cd34 |",
        "| recipe | demo |",
        "| epochs | 2 |",
        'network = load_backbone("model.safetensors").backbone.eval()',
    ):
        assert part in card
    assert SECRET not in card


def test_the_lines_of_a_usual_card_run(tmp_path: Path, usual: BackboneFile, monkeypatch: pytest.MonkeyPatch) -> None:
    from swav.export.safetensors_folder import for_safetensors

    files, _ = for_safetensors(usual, None, license_id="unknown")
    (tmp_path / "model.safetensors").write_bytes(files["model.safetensors"])
    monkeypatch.chdir(tmp_path)
    code = files["README.md"].decode().split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 4
    found: dict[str, object] = {}
    exec(code, found)
    assert "network" in found


def test_a_run_is_named_only_where_it_wrote_the_file(tmp_path: Path, tiny: BackboneFile) -> None:
    model = configure("demo", data="x", overrides=[*TINY]).model

    def file(layout: str) -> BackboneFile:
        return BackboneFile(tiny.backbone, model, 36, 32, layout, (), "")

    assert run_of(tmp_path / "backbone.pt", file("swav backbone")) is None
    (tmp_path / "config.json").write_text(the_run())
    run = run_of(tmp_path / "checkpoints" / "step-000000003.pt", file("swav checkpoint"))
    assert run is None or run.name == "demo"
    (tmp_path / "checkpoints").mkdir()
    run = run_of(tmp_path / "checkpoints" / "step-000000003.pt", file("swav checkpoint"))
    assert run is not None
    assert run.name == "demo"
    assert run_of(tmp_path / "official.pth", file("SwAV release")) is None
    assert run_of(tmp_path / "backbone.pt", tiny) is None  # another head
    (tmp_path / "config.json").write_text("{}")
    assert run_of(tmp_path / "backbone.pt", file("swav backbone")) is None


@pytest.mark.parametrize("license_id", ["", "MIT license", "mit\nevil: yes", "-"])
def test_a_licence_is_an_id(license_id: str) -> None:
    with pytest.raises(ValueError, match="is no id of a licence"):
        check_license(license_id)
