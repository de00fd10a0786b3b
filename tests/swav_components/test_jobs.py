"""Components as TorchX finds, checks and renders them."""

import inspect
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torchx import specs
from torchx.schedulers.local_scheduler import create_scheduler
from torchx.specs.builders import materialize_appdef
from torchx.specs.file_linter import validate
from torchx.specs.finder import ComponentValidationException, get_components

from swav.recipes import recipe_names
from swav_components import jobs, roles

OFFLINE = (jobs.deepclusterv2, jobs.selav2)
ROOT = Path(__file__).parents[2]


def _replicas(app: specs.AppDef) -> list[tuple[list[str], dict[str, str]]]:
    """Command and environment of every local process of an app with one role."""
    (replicas,) = _replicas_of_roles(app).values()
    return replicas


def _replicas_of_roles(app: specs.AppDef) -> dict[str, list[tuple[list[str], dict[str, str]]]]:
    """Command and environment of every local process, by role."""
    request = create_scheduler("test").submit_dryrun(app, {"log_dir": "unused"}).request
    return {
        name: [(replica.args, replica.env) for replica in replicas] for name, replicas in request.role_params.items()
    }


def _of(kind: str, **settings: object) -> str:
    """The override that makes any recipe a run of a method."""
    return "method=" + json.dumps({"kind": kind, "num_prototypes": 20, **settings})


def test_components_are_found_beside_the_built_in_ones() -> None:
    components = get_components()
    assert {"dist.ddp", "utils.echo"} <= set(components)
    ours = {name for name in components if name.startswith("swav.")}
    assert ours == {f"swav.{name}" for name, _ in inspect.getmembers(jobs, inspect.isfunction)}
    assert {"swav.pretrain", "swav.deepclusterv2", "swav.selav2", "swav.assign", "swav.knn", "swav.shards"} <= ours
    assert {"swav.linear", "swav.finetune", "swav.lowshot", "swav.svm", "swav.evaluate"} <= ours


@pytest.mark.parametrize("name", [name for name, _ in inspect.getmembers(jobs, inspect.isfunction)])
def test_torchx_accepts_each_signature(name: str) -> None:
    assert validate(str(Path(jobs.__file__)), name) == []


def test_command_line_becomes_one_plain_process() -> None:
    arguments = ["--recipe", "demo", "--data", "photos", "--output", "runs/a", "optim.epochs=2", "seed=7"]
    app = materialize_appdef(jobs.pretrain, arguments)
    ((command, _),) = _replicas(app)
    assert command == ["python", "-m", "swav.pretrain", *arguments]


def test_the_launchers_python_runs_local_processes() -> None:
    ((_, environment),) = _replicas(jobs.pretrain(recipe="demo"))
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert "PATH" not in jobs.pretrain(recipe="demo").roles[0].env  # nothing of this machine travels to another


def test_several_processes_on_one_node_need_no_address() -> None:
    ((command, _),) = _replicas(jobs.pretrain(recipe="demo", j="1x2"))
    assert command[:3] == ["python", "-m", "swav.elastic"]
    assert {"--standalone", "--nnodes=1", "--nproc-per-node=2"} <= set(command)
    assert command[-4:] == ["-m", "swav.pretrain", "--recipe", "demo"]


def test_several_nodes_are_elastic_and_meet_at_the_first() -> None:
    app = jobs.pretrain("optim.epochs=20", recipe="demo", j="1:2x4")
    assert (app.roles[0].min_replicas, app.roles[0].num_replicas) == (1, 2)
    replicas = _replicas(app)
    assert len(replicas) == 2
    for command, _ in replicas:
        assert command[:2] == ["bash", "-c"]
        script = command[2]
        assert script.startswith("exec python -m swav.elastic --nnodes=1:2 --nproc-per-node=4 ")
        assert "--rdzv-endpoint=${TORCHX_RANK0_HOST:-localhost}:29500 " in script
        assert "${app_id}" not in script
        assert script.endswith("-m swav.pretrain --recipe demo optim.epochs=20")


@pytest.mark.parametrize("j", ["1x1", "1x2", "2x1"])
@pytest.mark.parametrize("text", ["a b", "$HOME", "${app_id}", "it's", "a;b", "$(date)"])
def test_what_a_user_writes_arrives_as_written(j: str, text: str) -> None:
    command, _ = _replicas(jobs.pretrain(recipe="demo", data=text, j=j))[0]
    if command[0] == "bash":
        script = command[2].replace("exec python", "printf '%s\\n'")
        command = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True).stdout.splitlines()
    assert command[command.index("--data") + 1] == text


@pytest.mark.parametrize("job", OFFLINE)
def test_trainer_and_assigner_stand_beside_each_other(job: Callable[..., specs.AppDef]) -> None:
    settings = [_of(job.__name__), "optim.epochs=2"]
    shared = ["--data", "photos", "--output", "runs/a"]
    app = materialize_appdef(job, ["--recipe", "demo", *shared, "--workers", "4", *settings])
    replicas = _replicas_of_roles(app)
    assert list(replicas) == ["trainer", "assigner"]
    ((trainer, environment),), ((assigner, _),) = replicas.values()
    assert trainer == ["python", "-m", "swav.pretrain", "--recipe", "demo", *shared, *settings]
    launch = ["python", "-m", "swav.elastic", "--standalone", "--nproc-per-node=4", "-m", "swav.assign"]
    assert assigner == [*launch, "--output", "runs/a", "--data", "photos"]
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


@pytest.mark.parametrize("job", OFFLINE)
@pytest.mark.parametrize("j", ["1x1", "1x2", "1:2x4"])
def test_both_sides_have_one_folder_where_none_is_given(job: Callable[..., specs.AppDef], j: str) -> None:
    replicas = _replicas_of_roles(job(_of(job.__name__), recipe="demo", j=j))
    for command, _ in [*replicas["trainer"], *replicas["assigner"]]:
        words = shlex.split(command[2]) if command[0] == "bash" else command
        assert words[words.index("--output") + 1] == "runs/demo"
        assert "--data" not in words


def test_each_side_has_an_image_and_resources_of_its_own() -> None:
    sizes = ["--cpu", "8", "--gpu", "4", "--memMB", "64000"]
    own = ["--assign_cpu", "3", "--assign_gpu", "2", "--assign_memMB", "4096", "--assign_image", "ours:1"]
    app = materialize_appdef(jobs.deepclusterv2, ["--recipe", "demo", *sizes, *own, _of("deepclusterv2")])
    trainer, assigner = app.roles
    assert (trainer.image, assigner.image) == (roles.IMAGE, "ours:1")
    assert (trainer.resource.cpu, trainer.resource.gpu, trainer.resource.memMB) == (8, 4, 64000)
    assert (assigner.resource.cpu, assigner.resource.gpu, assigner.resource.memMB) == (3, 2, 4096)


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith(("deepclusterv2_", "selav2_"))])
def test_each_recipe_of_an_offline_method_has_its_component(name: str) -> None:
    job = getattr(jobs, name.partition("_")[0])
    assert [role.name for role in job(recipe=name, data="photos").roles] == ["trainer", "assigner"]


@pytest.mark.parametrize("job", OFFLINE)
def test_run_of_another_method_is_refused_when_it_is_submitted(job: Callable[..., specs.AppDef]) -> None:
    kind = job.__name__
    (other,) = {"deepclusterv2", "selav2"} - {kind}
    for overrides, found in (((), "swav"), ((_of(other),), other)):
        said = f"recipe demo with these settings by {found}; give a recipe such as {kind}_r50_2x224_400ep"
        with pytest.raises(ComponentValidationException, match=said):
            job(*overrides, recipe="demo")


@pytest.mark.parametrize("job", OFFLINE)
def test_offline_job_that_cannot_run_is_refused_when_it_is_submitted(job: Callable[..., specs.AppDef]) -> None:
    with pytest.raises(ComponentValidationException, match="unknown recipe 'dmo'"):
        job(recipe="dmo")
    with pytest.raises(ComponentValidationException, match=r"unknown setting 'optim.epoch'"):
        job(_of(job.__name__), "optim.epoch=1", recipe="demo")
    with pytest.raises(ComponentValidationException, match="--workers 0: the assigner needs at least 1"):
        job(_of(job.__name__), recipe="demo", workers=0)


@pytest.mark.parametrize("text", ["a b", "$HOME", "${app_id}", "it's", "$(date)"])
def test_the_assigners_folder_arrives_as_written(text: str) -> None:
    ((command, _),) = _replicas(materialize_appdef(jobs.assign, ["--output", text]))
    launch = ["python", "-m", "swav.elastic", "--standalone", "--nproc-per-node=1", "-m", "swav.assign"]
    assert command == [*launch, "--output", text]


def test_shards_and_doctor_pass_their_options() -> None:
    ((command, _),) = _replicas(materialize_appdef(jobs.shards, ["--source", "photos", "--out", "s3://b/s"]))
    assert command == ["python", "-m", "swav.data.write_shards", "photos", "s3://b/s"]
    sizes = ["--samples_per_shard", "10", "--bytes_per_shard", "99", "--shuffle", "7"]
    ((command, _),) = _replicas(materialize_appdef(jobs.shards, ["--source", "photos", "--out", "s3://b/s", *sizes]))
    assert command[5:] == [word.replace("_", "-") for word in sizes]
    arguments = ["--output", "s3://b/run", "-j", "1x2", "--", "--recipe", "demo", "--min-free-disk-gb", "9"]
    ((command, _),) = _replicas(materialize_appdef(jobs.doctor, arguments))
    assert command[-8:] == ["-m", "swav.doctor", "--output", "s3://b/run", *arguments[5:]]
    assert "--max-restarts=0" in command  # what fails is to be told, not tried until it passes
    with pytest.raises(ComponentValidationException, match=r"-j 4:8x8: all nodes are to be checked.* -j 8x8"):
        jobs.doctor(output="s3://b/run", j="4:8x8")


@pytest.mark.parametrize("job", [jobs.pretrain, *OFFLINE])
@pytest.mark.parametrize("j", ["1x1", "1:2x4"])
def test_a_chosen_name_is_the_local_jobs_own(job: Callable[..., specs.AppDef], j: str) -> None:
    method = [] if job is jobs.pretrain else [_of(job.__name__)]
    app = job(*method, recipe="demo", j=j, name="photos-1")
    request = create_scheduler("test").submit_dryrun(app, {"log_dir": "logs"}).request
    assert request.app_id == "photos-1"
    assert request.log_dir == "logs/test/photos-1"
    replica = next(iter(request.role_params.values()))[0]
    assert replica.stdout == f"logs/test/photos-1/{app.roles[0].name}/0/stdout.log"
    assert ("--rdzv-id=photos-1" in " ".join(replica.args)) == (j != "1x1")


@pytest.mark.parametrize("name", ["Photos", "1photos", "a_b", "a.b", "", "a-"])
def test_a_name_that_no_cluster_takes_is_refused(name: str) -> None:
    with pytest.raises(ComponentValidationException, match="lower-case letters, digits and dashes"):
        jobs.pretrain(recipe="demo", name=name)


def test_runs_go_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAV_RUNS", "s3://bucket/runs")
    for role in jobs.selav2(_of("selav2"), recipe="demo").roles:
        assert role.args[role.args.index("--output") + 1] == "s3://bucket/runs/demo"


def test_the_assigner_waits_as_long_as_is_said() -> None:
    assert jobs.assign("run", timeout_hours=0.5).roles[0].args[-2:] == ["--timeout-seconds", "1800"]
    _, assigner = jobs.selav2(_of("selav2"), recipe="demo", assign_timeout_hours=2).roles
    assert assigner.args[-2:] == ["--timeout-seconds", "7200"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"recipe": "dmo"}, "unknown recipe 'dmo'; the nearest of .* is 'demo'"),
        ({"recipe": "swav_r50_2x224_100ep"}, "give a folder of images or shards"),
        ({"recipe": "demo", "j": "two"}, "Invalid format"),
        ({"recipe": "demo", "j": "0x1"}, "-j 0x1: at least one process on one node"),
        ({"recipe": "demo", "j": "2x0"}, "-j 2x0: at least one process on one node"),
        ({"recipe": "demo", "j": "4:2x8"}, "-j 4:2x8: .* the fewest nodes first"),
    ],
)
def test_job_that_cannot_run_is_refused_when_it_is_submitted(arguments: dict[str, str], said: str) -> None:
    with pytest.raises(ComponentValidationException, match=said):
        jobs.pretrain(**arguments)  # type: ignore[arg-type]


def test_setting_that_does_not_exist_is_refused_when_it_is_submitted() -> None:
    with pytest.raises(ComponentValidationException, match=r"unknown setting 'optim.epoch'; the nearest is"):
        jobs.pretrain("optim.epoch=1", recipe="demo")


def test_command_line_refuses_in_one_line() -> None:
    torchx = str(Path(sys.executable).with_name("torchx"))
    command = [torchx, "run", "--dryrun", "-s", "local_cwd", "swav.pretrain", "--recipe", "dmo"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "the nearest of" in result.stderr
    assert "Traceback" not in result.stderr


def test_dry_run_works_from_the_repository_root() -> None:
    torchx = str(Path(sys.executable).with_name("torchx"))
    command = [torchx, "run", "--dryrun", "-s", "local_cwd", "swav.pretrain", "--recipe", "demo"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "swav-pretrain" in result.stdout


def test_submitting_imports_no_torch() -> None:
    code = (
        "import sys; from swav_components import jobs; jobs.pretrain(recipe='demo', j='1:2x8');"
        "jobs.knn(backbone='b', train='t');"
        "jobs.assign('r'); jobs.shards('a', 'b'); jobs.doctor(output='r');"
        "from swav_components import schedulers;"
        "schedulers.create_scheduler('s').submit_dryrun(jobs.pretrain(recipe='demo'), {});"
        "jobs.selav2(recipe='selav2_r50_2x224_400ep', data='d');"
        "sys.exit('torch' in sys.modules)"
    )
    source_roots = os.pathsep.join(str(ROOT / folder) for folder in ("", "eval", "components"))
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": source_roots})


def test_default_image_has_the_version_of_this_code() -> None:
    assert jobs.pretrain(recipe="demo").roles[0].image == roles.IMAGE
    assert jobs.assign("run").roles[0].image == roles.ASSIGN_IMAGE
    assert jobs.knn(backbone="b", train="t").roles[0].image == roles.EVAL_IMAGE
    for image in (roles.IMAGE, roles.ASSIGN_IMAGE, roles.EVAL_IMAGE):
        assert image.rpartition(":")[2] not in ("", "latest")
