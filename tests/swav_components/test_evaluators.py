"""Evaluations as components: what each runs, and what is refused before it is submitted."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from swav_testing.manifests import check_template, check_volcano
from torchx import specs
from torchx.schedulers.local_scheduler import create_scheduler
from torchx.specs.builders import materialize_appdef
from torchx.specs.finder import ComponentValidationException

from swav_components import evaluators, jobs, roles, schedulers
from swav_eval.config import FinetuneProtocol, KnnProtocol, LinearProtocol, SvmProtocol
from swav_eval.recipes import STANDARD, protocol_names

ROOT = Path(__file__).parents[2]
FILES = ["--backbone", "b.pt", "--train", "photos", "--test", "held-out"]
SHARED = ["--backbone", "s3://b/run/backbone.pt", "--data", "s3://b/data", "--output", "s3://b/run/paper.json"]
# By component: its program, a protocol of it, one of another component, and a setting of it.
PROTOCOLS: dict[str, tuple[str, str, str, str]] = {
    "linear": ("swav_eval.linear", "linear_places205", "svm_voc07", "learning_rates=[0.1,1]"),
    "finetune": ("swav_eval.finetune", "semisup_1pct", "linear_imagenet", "trunk_lr=0.5"),
    "lowshot": ("swav_eval.finetune", "lowshot_13", "knn", "subset.per_class=5"),
    "svm": ("swav_eval.svm", "svm_voc07", "knn_20", "num_folds=5"),
    "knn": ("swav_eval.knn", "knn_20", "linear_imagenet", "temperature=0.1"),
}


def _job(component: str) -> Callable[..., specs.AppDef]:
    found: Callable[..., specs.AppDef] = getattr(jobs, component)
    return found


def _commands(app: specs.AppDef) -> dict[str, list[list[str]]]:
    """Commands of local processes, by role."""
    request = create_scheduler("test").submit_dryrun(app, {"log_dir": "unused"}).request
    return {name: [replica.args for replica in replicas] for name, replicas in request.role_params.items()}


def _kubernetes(job: Callable[..., specs.AppDef], arguments: list[str]) -> dict[str, dict[str, object]]:
    """Tasks of the Volcano job by name, and the job's own fields under the empty name."""
    app = materialize_appdef(job, ["--name", "a-run", *arguments])
    found = schedulers.create_scheduler("test").submit_dryrun(app, {}).request.resource
    check_volcano(found)
    for task in found["spec"]["tasks"]:
        check_template(task["template"])
    return {"": found["spec"], **{task["name"]: task for task in found["spec"]["tasks"]}}


def _container(task: dict[str, object]) -> dict[str, list[str]]:
    (found,) = task["template"]["spec"]["containers"]  # type: ignore[index]
    container: dict[str, list[str]] = found
    return container


@pytest.mark.parametrize("component", PROTOCOLS)
def test_a_command_line_becomes_one_plain_process(component: str) -> None:
    module, recipe, _, setting = PROTOCOLS[component]
    files = [*FILES, "--output", "found.json", "--work", "scratch"]
    (commands,) = _commands(materialize_appdef(_job(component), [*files, "--recipe", recipe, setting])).items()
    assert commands == (component, [["python", "-m", module, "--recipe", recipe, *files, setting]])


@pytest.mark.parametrize("component", PROTOCOLS)
def test_several_processes_are_elastic(component: str) -> None:
    module, recipe, _, setting = PROTOCOLS[component]
    ((one,),) = _commands(materialize_appdef(_job(component), [*FILES, "--recipe", recipe, "-j", "1x4"])).values()
    launch = ["python", "-m", "swav.elastic", "--nnodes=1", "--nproc-per-node=4", "--standalone"]
    assert one == [*launch, "-m", module, "--recipe", recipe, *FILES]
    arguments = [*FILES, "--recipe", recipe, "-j", "1:2x4", setting]
    ((first, _),) = _commands(materialize_appdef(_job(component), arguments)).values()
    assert first[:2] == ["bash", "-c"]
    assert first[2].startswith("exec python -m swav.elastic --nnodes=1:2 --nproc-per-node=4 --rdzv-backend=c10d ")
    assert first[2].endswith(f"-m {module} {shlex.join(['--recipe', recipe, *FILES, setting])}")


@pytest.mark.parametrize("component", PROTOCOLS)
def test_evaluators_are_what_a_cluster_knows_as_such(component: str) -> None:
    (role,) = materialize_appdef(_job(component), [*FILES, "--recipe", PROTOCOLS[component][1]]).roles
    assert isinstance(role, roles.ProgramRole)
    assert (role.kind, role.image, role.name) == ("evaluator", roles.EVAL_IMAGE, component)
    assert role.urls == {"backbone": "b.pt", "train": "photos", "test": "held-out"}


@pytest.mark.parametrize("component", PROTOCOLS)
def test_what_the_program_would_refuse_is_refused_when_it_is_submitted(component: str) -> None:
    _, recipe, other, setting = PROTOCOLS[component]
    files = {"backbone": "b.pt", "train": "photos", "test": "held-out"}
    name, value = setting.split("=")
    for overrides, wrong, said in (
        ((), recipe[:-1] + "X", f"unknown protocol '{recipe[:-1]}X'; the nearest of {len(protocol_names())} is"),
        ((), other, f"protocol {other} is not one of this program's; choose from {{}}"),
        ((f"{name}s={value}",), recipe, f"unknown setting '{name}s'; the nearest is '{name}'"),
        ((f"{name}=seven",), recipe, name.rpartition(".")[2]),
    ):
        own = ", ".join(protocol_names(evaluators._PROGRAMS[component][1]))
        with pytest.raises(ComponentValidationException, match=re.escape(said.format(own))):
            _job(component)(*overrides, recipe=wrong, **files)


def test_every_protocol_has_a_component() -> None:
    kinds = {"linear": LinearProtocol, "finetune": FinetuneProtocol, "svm": SvmProtocol, "knn": KnnProtocol}
    found = [
        (name, _job(component)(recipe=name, backbone="b", train="a", test="t").roles[0].args[3])
        for component, kind in kinds.items()
        for name in protocol_names(kind)
    ]
    assert sorted(name for name, _ in found) == sorted(protocol_names())
    assert all(name == said for name, said in found)


def test_lowshot_has_its_own_protocols() -> None:
    for name in protocol_names(FinetuneProtocol):
        if name.startswith("lowshot_"):
            assert jobs.lowshot(recipe=name, backbone="b", train="a", test="t").roles[0].name == "lowshot"
    with pytest.raises(ComponentValidationException, match=r"lowshot_13, .*; give semisup_1pct to swav\.finetune"):
        jobs.lowshot(recipe="semisup_1pct", backbone="b", train="a", test="t")


def test_protocols_that_stand_alone_need_no_name() -> None:
    assert jobs.svm(backbone="b", train="a", test="t").roles[0].args[2:4] == ["--recipe", "svm_voc07"]
    assert jobs.knn(backbone="b", train="a").roles[0].args[2:4] == ["--recipe", "knn"]


def test_numbers_of_neighbours_become_a_setting() -> None:
    bare = ["--backbone", "b.pt", "--train", "photos"]
    (((command),),) = _commands(materialize_appdef(jobs.knn, [*bare, "--k", "20,200", "temperature=0.1"])).values()
    assert command == [
        *("python", "-m", "swav_eval.knn", "--recipe", "knn", *bare),
        *("num_neighbors=[20,200]", "temperature=0.1"),
    ]
    with pytest.raises(ComponentValidationException, match="numbers of neighbours of at least 1"):
        jobs.knn(backbone="b", train="a", k=[0])


@pytest.mark.parametrize("component", ["linear", "finetune", "lowshot", "svm"])
def test_test_images_must_be_named(component: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        materialize_appdef(_job(component), [*FILES[:4], "--recipe", PROTOCOLS[component][1]])
    assert "required: --test" in capsys.readouterr().err


def test_a_list_of_images_must_be_where_pods_reach_it() -> None:
    files = ["--backbone", "s3://b/run", "--train", "s3://b/train", "--test", "s3://b/test", "--recipe", "semisup_1pct"]
    scheduler = schedulers.create_scheduler("test")
    found = materialize_appdef(jobs.finetune, [*files, "subset.names=s3://b/1percent.txt"])
    assert scheduler.submit_dryrun(found, {}).request.resource
    local = materialize_appdef(jobs.finetune, [*files, "subset.names=1percent.txt"])
    with pytest.raises(ComponentValidationException, match=r"^subset\.names=1percent\.txt is a path of this machine"):
        scheduler.submit_dryrun(local, {})


def test_the_fan_out_has_a_role_for_each_protocol() -> None:
    settings = ["runtime.precision=bf16", "semisup_1pct:trunk_lr=0.5"]
    commands = _commands(materialize_appdef(jobs.evaluate, [*SHARED, *settings]))
    assert list(commands) == [name.replace("_", "") for name in STANDARD]
    for name, (command,) in zip(STANDARD, commands.values(), strict=True):
        assert command == [
            *("python", "-m", "swav_eval.paper", *SHARED, "--protocols", *STANDARD, "--part", name, *settings),
        ]


def test_the_fan_out_runs_what_is_asked_for() -> None:
    asked = ["--protocols", "knn_20,svm_voc07", "--pretraining", "swav_r50_2x224_6x96_200ep"]
    commands = _commands(materialize_appdef(jobs.evaluate, [*SHARED, *asked, "-j", "1x2"]))
    assert list(commands) == ["knn20", "svmvoc07"]
    ((command,), _) = commands.values()
    assert command[6:] == [
        *("-m", "swav_eval.paper", *SHARED, "--pretraining", "swav_r50_2x224_6x96_200ep"),
        *("--protocols", "knn_20", "svm_voc07", "--part", "knn_20"),
    ]


@pytest.mark.parametrize(
    ("protocols", "overrides", "said"),
    [
        (["knn_2"], (), "unknown protocol 'knn_2'; the nearest"),
        (["knn", "knn"], (), "--protocols knn,knn: give at least one, and each once"),
        ([], (), "--protocols '': give at least one"),
        (["knn", "svm_voc07"], ("temperature=0.1",), "unknown setting 'temperature'"),
        (["knn", "svm_voc07"], ("knn:temperature=-1",), "a temperature above 0"),
        (["knn"], ("svm_voc07:num_folds=5",), "svm_voc07 is not asked for; leave it out, or add it to --protocols"),
        (["knn"], ("fast:temperature=1",), "unknown setting 'fast:temperature'"),
    ],
)
def test_a_fan_out_that_cannot_run_is_refused(protocols: list[str], overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ComponentValidationException, match=re.escape(said)):
        jobs.evaluate(*overrides, backbone="b", data="d", output="o", protocols=protocols)


def test_a_fan_out_says_how_many_pods_must_end_well() -> None:
    """Of 2 to 3 nodes each, 3 protocols that had 3 would otherwise end the job before the fourth is done."""
    with pytest.raises(ComponentValidationException, match=r"-j 2:3x8: .* so say how many, e\.g\. -j 3x8"):
        jobs.evaluate(backbone="b", data="d", output="o", j="2:3x8")


def test_a_fan_out_beside_an_unknown_row_of_the_paper_is_refused() -> None:
    with pytest.raises(ComponentValidationException, match="--pretraining: unknown recipe 'swav'"):
        jobs.evaluate(backbone="b", data="d", output="o", pretraining="swav")


def test_parts_of_one_pod_start_as_there_is_room_and_all_must_end_well() -> None:
    found = _kubernetes(jobs.evaluate, SHARED)
    assert list(found)[1:] == [f"{name.replace('_', '')}-0" for name in STANDARD]
    assert (found[""]["minAvailable"], found[""]["minSuccess"]) == (1, len(STANDARD))


def test_parts_of_several_pods_start_together_and_meet_each_at_its_own_first_pod() -> None:
    found = _kubernetes(jobs.evaluate, [*SHARED, "-j", "2x8", "--protocols", "knn,svm_voc07"])
    assert list(found)[1:] == ["knn-0", "knn-1", "svmvoc07-0", "svmvoc07-1"]
    assert (found[""]["minAvailable"], found[""]["minSuccess"]) == (4, 4)
    for name, host in (
        ("knn-0", "${TORCHX_RANK0_HOST:-localhost}"),
        ("knn-1", "${VC_KNN_0_HOSTS:-localhost}"),
        ("svmvoc07-0", "${TORCHX_RANK0_HOST:-localhost}"),
        ("svmvoc07-1", "${VC_SVMVOC07_0_HOSTS:-localhost}"),
    ):
        assert f"--rdzv-endpoint={host}:2950" in _container(found[name])["command"][2]


def test_parts_of_several_nodes_do_not_meet_one_another_on_one_machine() -> None:
    commands = _commands(materialize_appdef(jobs.evaluate, [*SHARED, "-j", "2x1", "--protocols", "knn,svm_voc07"]))
    ports = [
        {port for command in replicas for port in re.findall(r"localhost}:(\d+)", command[2])}
        for replicas in commands.values()
    ]
    assert len(ports[0]) == len(ports[1]) == 1
    assert ports[0].isdisjoint(ports[1])


@pytest.mark.parametrize("name", protocol_names())
def test_names_of_parts_fit_hosts_and_environments(name: str) -> None:
    """Volcano puts a task's name into a variable, where a shell reads the rest of a name behind "-" as a default."""
    (role,) = jobs.evaluate(backbone="b", data="d", output="o", protocols=[name]).roles
    assert re.fullmatch(r"[a-z][a-z0-9]*", role.name)


@pytest.mark.parametrize("scheduler", ["local_cwd", "kubernetes"])
def test_dry_runs_work_from_the_repository_root(scheduler: str) -> None:
    torchx = str(Path(sys.executable).with_name("torchx"))
    command = [
        torchx,
        "run",
        "--dryrun",
        "-s",
        scheduler,
        "swav.evaluate",
        *SHARED,
        "--protocols",
        "knn,linear_imagenet",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--part" in result.stdout
    assert "linearimagenet" in result.stdout


def test_submitting_an_evaluation_imports_no_torch() -> None:
    code = (
        "import sys; from swav_components import jobs; import swav_eval.ledger;"
        "jobs.evaluate(backbone='b', data='d', output='o'); jobs.linear(recipe='linear_imagenet', backbone='b',"
        "train='t', test='t'); sys.exit('torch' in sys.modules)"
    )
    source_roots = os.pathsep.join(str(ROOT / folder) for folder in ("", "eval", "components"))
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": source_roots})
