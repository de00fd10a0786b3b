import json
from pathlib import Path

import pytest

from swav_eval.config import LinearProtocol
from swav_eval.recipes import configure, get_protocol
from swav_eval.results import finished_result, identity, write_result

DATA = {"train": "a", "test": "b"}


def test_a_finished_result_is_found_and_not_taken_for_another(tmp_path: Path) -> None:
    output = tmp_path / "new" / "result.json"
    wanted = identity(get_protocol("linear_imagenet"), backbone_sha256="1", data=DATA)
    assert finished_result(output, wanted) is None
    write_result(output, {**wanted, "metrics": {"top1": 0.5}})
    found = finished_result(output, wanted)
    assert found is not None
    assert found["metrics"] == {"top1": 0.5}
    other_rate = configure("linear_imagenet", LinearProtocol, ["learning_rates=[0.1]"])
    for other, what in (
        (identity(get_protocol("knn"), backbone_sha256="1", data=DATA), "protocol, settings"),
        (identity(other_rate, backbone_sha256="1", data=DATA), "settings"),
        (identity(get_protocol("linear_imagenet"), backbone_sha256="2", data=DATA), "backbone_sha256"),
        (identity(get_protocol("linear_imagenet"), backbone_sha256="1", data={"train": "a"}), "data_identities"),
    ):
        with pytest.raises(ValueError, match=rf"another evaluation \({what} differ\)"):
            finished_result(output, other)


def test_how_it_is_carried_out_makes_no_other_evaluation_but_precision_does() -> None:
    def of(*overrides: str) -> str:
        protocol = configure("linear_imagenet", LinearProtocol, overrides)
        return json.dumps(identity(protocol, backbone_sha256="1", data=DATA))

    assert of("runtime.loader_threads=3", "runtime.device=cpu", "runtime.checkpoint_every_steps=1") == of()
    assert of("runtime.precision=bf16") != of()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"trained backbone": {"knn_20": 0.5}}', "\0"])
def test_what_is_no_result_is_not_overwritten(tmp_path: Path, content: str) -> None:
    output = tmp_path / "result.json"
    output.write_text(content)
    wanted = identity(get_protocol("knn"), backbone_sha256="1", data=DATA)
    with pytest.raises(ValueError, match="holds something else than a result; give another --output"):
        finished_result(output, wanted)
    assert output.read_text() == content
