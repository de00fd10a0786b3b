import pytest

from swav_eval.config import FinetuneProtocol, KnnProtocol, LinearProtocol, SvmProtocol
from swav_eval.recipes import configure


@pytest.mark.parametrize(
    ("name", "kind", "override", "message"),
    [
        ("linear_imagenet", LinearProtocol, "epochs=0", "epochs >= 1"),
        ("linear_imagenet", LinearProtocol, "num_classes=1", "num_classes >= 2"),
        ("linear_imagenet", LinearProtocol, "momentum=1", "from 0 to below 1"),
        ("linear_imagenet", LinearProtocol, "weight_decay=-1", "weight_decay >= 0"),
        ("linear_imagenet", LinearProtocol, "global_batch=0", "global_batch >= 1"),
        ("linear_imagenet", LinearProtocol, "learning_rates=[]", "at least one"),
        ("linear_imagenet", LinearProtocol, "learning_rates=[0.1,0.1]", "must be different rates above 0"),
        ("linear_imagenet", LinearProtocol, "learning_rates=[0.1,0]", "must be different rates above 0"),
        ("linear_imagenet", LinearProtocol, "held_out_fraction=1", "not between 0 and 1"),
        ("linear_places205", LinearProtocol, "schedule.epochs=[7,7]", "rising epochs above 0"),
        ("linear_places205", LinearProtocol, "schedule.factor=0", "a factor above 0"),
        (
            "linear_places205",
            LinearProtocol,
            "epochs=20",
            r"schedule.epochs=\[7.0, 14.0, 21.0\] must lie below epochs=20",
        ),
        ("linear_places205", LinearProtocol, "schedule.kind=cosine", 'set it whole: schedule={"kind": "cosine"}'),
        ("linear_places205", LinearProtocol, "epoch=3", "the nearest is 'epochs'"),
        ("linear_places205", LinearProtocol, "epochs", "for example num_classes=2"),
        ("semisup_1pct", FinetuneProtocol, "subset.per_class=3", "per_class or fraction, and not both"),
        ("semisup_1pct", FinetuneProtocol, "subset.fraction=0", "is not in"),
        ("lowshot_13", FinetuneProtocol, "subset.per_class=0", "must be at least 1"),
        ("lowshot_13", FinetuneProtocol, "head_lr=0", "head_lr > 0"),
        ("knn", KnnProtocol, "num_neighbors=[]", "of at least 1"),
        ("knn", KnnProtocol, "temperature=0", "a temperature above 0"),
        ("svm_voc07", SvmProtocol, "costs=[1,0]", "above 0"),
        ("svm_voc07", SvmProtocol, "num_folds=1", "num_folds >= 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    name: str, kind: type[LinearProtocol], override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        configure(name, kind, [override])


def test_a_list_of_names_takes_the_place_of_the_draw() -> None:
    subset = configure("semisup_1pct", FinetuneProtocol, ["subset.names=s3://bucket/1percent.txt"]).subset
    assert subset.names == "s3://bucket/1percent.txt"


def test_a_schedule_can_be_set_whole() -> None:
    run = configure("linear_places205", LinearProtocol, ['schedule={"kind":"cosine"}', "epochs=3"])
    assert (run.schedule.kind, run.epochs) == ("cosine", 3)
