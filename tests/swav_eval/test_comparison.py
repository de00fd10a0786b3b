from typing import Any

import pytest

from swav_eval.comparison import BEST, changed, reported, table_of, text_of
from swav_eval.recipes import get_protocol, settings_of


def result(protocol: str, sizes: tuple[int, int] = (256, 224), **metrics: float) -> dict[str, Any]:
    settings = settings_of(get_protocol(protocol))
    return {"metrics": metrics, "settings": settings, "resize_px": sizes[0], "crop_px": sizes[1]}


@pytest.mark.parametrize(
    ("recipe", "protocol", "metric", "value", "table"),
    [
        (BEST, "linear_imagenet", "top1", 75.3, "Figure 2"),
        (BEST, "knn", "knn_20", 59.2, "Table 7"),
        (BEST, "knn", "knn_200", 55.8, "Table 7"),
        (BEST, "knn_200", "knn_200", 55.8, "Table 7"),
        (BEST, "svm_voc07", "map_11_point", 88.9, "Table 3"),
        ("supervised_r50_1x224_100ep_bs256", "svm_voc07", "map_11_point", 87.5, "Table 3"),
        ("mocov2_r50_2x224_800ep_bs256", "linear_inat18", "top1", 38.9, "Table 3"),
        ("swav_r50_2x224_6x96_ig1b", "lowshot_13", "top5", 67.1, "Table 6"),
        (BEST, "lowshot_128", "top1", 64.7, "Table 6"),  # of another pretraining by SwAV
        ("swav_abl_400ep_hard", "linear_imagenet", "top1", 73.3, "Table 9"),
    ],
)
def test_the_papers_number_is_the_right_one(recipe: str, protocol: str, metric: str, value: float, table: str) -> None:
    found = reported(recipe, protocol, metric)
    assert found is not None
    assert (found.value, found.table) == (value, table)


def test_what_the_paper_does_not_state_has_no_number() -> None:
    assert reported(BEST, "linear_imagenet", "top5") is None
    assert reported(BEST, "svm_voc07", "map_all_point") is None
    assert reported(BEST, "knn", "knn_5") is None


def test_the_table_marks_what_is_of_another_pretraining() -> None:
    results = {
        "linear_imagenet": result("linear_imagenet", top1=0.7412, top5=0.9),
        "lowshot_13": result("lowshot_13", top1=0.3),
    }
    text = text_of(table_of(results, BEST, {"linear_inat18": "there is no inat18/train"})).splitlines()
    assert "| linear_imagenet | top1 | 74.1 | 75.3 | Figure 2: SwAV, 800 epochs | yes |" in text
    assert "| linear_imagenet | top5 | 90.0 | - | - | yes |" in text
    assert "| lowshot_13 | top1 | 30.0 | 38.2 * | Table 6: SwAV IG-1B | yes |" in text
    assert text[-1] == "left out: linear_inat18: there is no inat18/train"
    assert any(line.startswith("linear_imagenet: ImageNet (A.3)") and '"epochs": 100' in line for line in text)


def test_what_is_not_the_papers_protocol_is_said() -> None:
    one = result("linear_imagenet", (48, 40), top1=0.5)
    one["settings"] |= {"num_classes": 10, "precision": "bf16"}
    assert changed("linear_imagenet", one) == ["num_classes", "precision", "resize_px", "crop_px"]
    text = text_of(table_of({"linear_imagenet": one}, BEST, {}))
    assert "| linear_imagenet | top1 | 50.0 | 75.3 | Figure 2: SwAV, 800 epochs | no: num_classes, precision, " in text


def test_drawn_images_are_not_the_papers_where_it_has_a_list() -> None:
    one = result("semisup_1pct", top1=0.5)
    assert changed("semisup_1pct", one) == ["subset"]
    one["settings"]["subset"] |= {"names": "1percent.txt"}
    assert changed("semisup_1pct", one) == []
    assert changed("lowshot_13", result("lowshot_13", top1=0.5)) == []
