"""Components as TorchX finds, checks and renders them."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torchx import specs
from torchx.schedulers.local_scheduler import create_scheduler
from torchx.specs.builders import materialize_appdef
from torchx.specs.file_linter import validate
from torchx.specs.finder import ComponentValidationException, get_components

from swav_components import jobs, roles

ROOT = Path(__file__).parents[2]


def _replicas(app: specs.AppDef) -> list[tuple[list[str], dict[str, str]]]:
    """Command and environment of every local process of an app with one role."""
    (role,) = app.roles
    request = create_scheduler("test").submit_dryrun(app, {"log_dir": "unused"}).request
    return [(replica.args, replica.env) for replica in request.role_params[role.name]]


def test_components_are_found_beside_the_built_in_ones() -> None:
    components = get_components()
    assert {"swav.pretrain", "swav.knn", "dist.ddp", "utils.echo"} <= set(components)
    assert {name for name in components if name.startswith("swav.")} == {"swav.pretrain", "swav.knn"}


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


def test_knn_passes_only_what_is_given() -> None:
    ((bare, _),) = _replicas(materialize_appdef(jobs.knn, ["--backbone", "b.pt", "--train", "photos"]))
    assert bare == ["python", "-m", "swav_eval.knn", "--backbone", "b.pt", "--train", "photos"]
    arguments = ["--backbone", "b.pt", "--train", "photos", "--test", "held-out", "--output", "knn.json"]
    ((full, _),) = _replicas(materialize_appdef(jobs.knn, [*arguments, "--k", "20,200"]))
    assert full == ["python", "-m", "swav_eval.knn", *arguments, "--k", "20", "200"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"recipe": "dmo"}, "unknown recipe 'dmo'; the nearest of .* is 'demo'"),
        ({"recipe": "swav_r50_2x224_100ep"}, "give a folder of images or shards"),
        ({"recipe": "demo", "j": "two"}, "Invalid format"),
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
        "import sys; from swav_components import jobs; jobs.pretrain(recipe='demo', j='1:2x8'); jobs.knn('b', 't');"
        "sys.exit('torch' in sys.modules)"
    )
    source_roots = os.pathsep.join(str(ROOT / folder) for folder in ("", "eval", "components"))
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": source_roots})


def test_default_image_has_the_version_of_this_code() -> None:
    assert jobs.pretrain(recipe="demo").roles[0].image == roles.IMAGE
    assert roles.IMAGE.rpartition(":")[2] not in ("", "latest")
