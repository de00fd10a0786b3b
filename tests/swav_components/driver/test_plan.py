import re

import pytest
from torchx import specs

from swav_components.driver.plan import Plan, app_of, check_names, make_plan, run_name

RUN = "s3://bucket/runs/Photos 2026.v1"
OFFLINE = """--recipe demo method='{"kind": "deepclusterv2", "num_prototypes": 20}'"""


def _plan(
    words: str = "--recipe demo", *evaluations: str, component: str = "pretrain", assign: str | None = None
) -> Plan:
    return make_plan(RUN, component, words, assign=assign, evaluations=evaluations)


def test_evaluations_need_the_pretraining_and_are_numbered_by_component() -> None:
    plan = _plan("--recipe demo optim.epochs=2", "knn --train s3://b/x", "knn --train s3://b/y -k 5")
    assert [(step.key, step.component, step.needs) for step in plan.steps] == [
        ("pretrain", "pretrain", ()),
        ("knn-1", "knn", ("pretrain",)),
        ("knn-2", "knn", ("pretrain",)),
    ]
    assert [step.manifest for step in plan.steps] == ["result.json", "evaluations/knn-1.json", "evaluations/knn-2.json"]
    assert plan.steps[2].command == "knn --train s3://b/y -k 5"


def test_jobs_are_told_where_the_runs_files_are() -> None:
    plan = _plan("--recipe demo optim.epochs=2", "knn --train s3://b/x")
    trainer, evaluator = (app_of(step, "a").roles[0] for step in plan.steps)
    assert f"--output {RUN}" in " ".join(trainer.args)
    assert "optim.epochs=2" in trainer.args
    assert f"--backbone {RUN}/backbone.pt" in " ".join(evaluator.args)
    assert f"--output {RUN}/evaluations/knn-1.json" in " ".join(evaluator.args)


EVALUATIONS = {
    "linear": "--recipe linear_imagenet --train s3://b/x --test s3://b/y -j 2x8 learning_rates=[0.1,0.3]",
    "finetune": "--recipe semisup_10pct --train s3://b/x --test s3://b/y subset.names=s3://b/10percent.txt",
    "lowshot": "--recipe lowshot_13 --train s3://b/x --test s3://b/y",
    "svm": "--train s3://b/voc07/trainval --test s3://b/voc07/test",
    "knn": "--train s3://b/x -k 5",
    "evaluate": "--data s3://b/labelled -j 1x8",
}


@pytest.mark.parametrize("component", EVALUATIONS)
def test_every_evaluation_is_a_step_of_a_run(component: str) -> None:
    (_, step) = _plan("--recipe demo", f"{component} {EVALUATIONS[component]}").steps
    assert (step.key, step.needs, step.manifest) == (
        f"{component}-1",
        ("pretrain",),
        f"evaluations/{component}-1.json",
    )
    for role in app_of(step, "a").roles:
        said = " ".join(role.args)
        assert f"--backbone '{RUN}/backbone.pt'" in said or f"--backbone {RUN}/backbone.pt" in said
        assert f"{RUN}/{step.manifest}" in said


def test_all_evaluations_fan_out_from_one_pretraining() -> None:
    plan = _plan("--recipe demo", *(f"{component} {words}" for component, words in EVALUATIONS.items()))
    assert [step.key for step in plan.steps[1:]] == [f"{component}-1" for component in EVALUATIONS]
    assert {step.needs for step in plan.steps[1:]} == {("pretrain",)}
    noted = [step.command for step in plan.steps]  # what another driver makes the same plan from
    assert _plan(noted[0].partition(" ")[2], *noted[1:]) == plan


@pytest.mark.parametrize("run", ["s3://b/imagenet-1", "s3://b/" + "long-name-" * 20])
def test_pods_of_all_parts_have_names_that_fit(run: str) -> None:
    evaluations = [f"evaluate {EVALUATIONS['evaluate']}"] * 9
    plan = make_plan(run, "pretrain", "--recipe demo", assign=None, evaluations=evaluations)
    for step in plan.steps:
        check_names(app_of(step, plan.job_name(step, 99)), run)


def test_names_are_the_same_for_the_same_run_and_no_other() -> None:
    plan = _plan("--recipe demo", "knn --train s3://b/x")
    names = [plan.job_name(plan.steps[1], number) for number in (1, 2, 10)]
    prefix = run_name(RUN)
    assert names == [f"{prefix}-knn-1", f"{prefix}-knn-1-a2", f"{prefix}-knn-1-a10"]
    assert re.fullmatch(r"photos-2026-v1-[0-9a-f]{6}", prefix)
    assert run_name("s3://another/runs/Photos 2026.v1") != prefix


@pytest.mark.parametrize("run", ["s3://b/2026", "/runs/_", "/runs/ÄÖ", "s3://b/" + "long-name-" * 20, "/runs/a-b-"])
def test_any_folder_gives_a_name_that_kubernetes_takes(run: str) -> None:
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", run_name(run))
    plan = make_plan(run, "pretrain", "--recipe demo -j 512x8", assign=None, evaluations=["knn --train s3://b/x"] * 12)
    assert len(plan.job_name(plan.steps[-1], 99)) < 48


def test_pods_with_names_that_are_too_long_are_refused() -> None:
    app = specs.AppDef("a" * 40, roles=[specs.Role("r" * 20, image="", num_replicas=11)])
    with pytest.raises(ValueError, match="has 66 letters of at most 63"):
        check_names(app, "s3://bucket/run")


def test_an_offline_method_has_an_assigner_beside_it_or_in_its_job() -> None:
    plan = _plan(OFFLINE, assign="--workers 2")
    trainer, assigner = plan.steps
    assert (trainer.partner, trainer.follows, assigner.partner, assigner.follows) == ("assign", False, "pretrain", True)
    assert assigner.manifest == "result.json"
    assert f"--output {RUN}" in " ".join(app_of(assigner, "a").roles[0].args)
    both = _plan(OFFLINE, component="deepclusterv2")
    assert [role.name for role in app_of(both.steps[0], "a").roles] == ["trainer", "assigner"]


@pytest.mark.parametrize(
    ("words", "assign", "evaluations", "told"),
    [
        ("--recipe dem", None, [], "dem"),
        ("--recipe demo optim.epoch=1", None, [], "optim.epoch"),
        ("--recipe demo --j x", None, [], "pretrain --recipe demo --j x"),
        ("--data x", None, [], "required: --recipe"),
        ("--recipe demo --output elsewhere", None, [], "leave --output out"),
        ("--recipe demo --name mine", None, [], "leave --name out"),
        ("--recipe 'demo", None, [], "quotation"),
        ("--help", None, [], "pretrain --help"),
        (OFFLINE, None, [], "add --assign"),
        ("--recipe demo", "", [], "trains without labels"),
        (OFFLINE, "--workers 0", [], "needs at least 1"),
        ("--recipe demo", None, ["nn --train x"], "no component swav.nn"),
        ("--recipe demo", None, ["knn"], "required: --train"),
        ("--recipe demo", None, ["knn --train x --output y"], "leave --output out"),
        ("--recipe demo", None, ["knn --train x --backbone y"], "leave --backbone out"),
        ("--recipe demo", None, ["linear --train x --test y"], "required: --recipe"),
        ("--recipe demo", None, ["linear --recipe linear_imagenet --train x"], "required: --test"),
        ("--recipe demo", None, ["linear --recipe svm_voc07 --train x --test y"], "svm_voc07 is not one of this"),
        ("--recipe demo", None, ["svm --train x --test y costs=[]"], "SVMs need costs"),
        ("--recipe demo", None, ["evaluate"], "required: --data"),
        ("--recipe demo", None, ["evaluate --data x --protocols knm"], "unknown protocol 'knm'"),
        ("--recipe demo", None, ["evaluate --data x -j 1:2x8"], "so say how many, e.g. -j 2x8"),
        ("--recipe demo", None, ["assign"], "choose from"),
        ("--recipe demo", None, ["_"], "no component"),
    ],
)
def test_wrong_words_are_refused(words: str, assign: str | None, evaluations: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        _plan(words, *evaluations, assign=assign)


def test_one_job_of_both_needs_no_other_assigner() -> None:
    with pytest.raises(ValueError, match="has an assigner already"):
        _plan(OFFLINE, component="deepclusterv2", assign="")


def test_a_url_with_a_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="must not hold a name or a password"):
        make_plan("s3://me:word@bucket/run", "pretrain", "--recipe demo", assign=None, evaluations=[])
