"""Roles: which program a job runs, in how many processes, with which environment.

What a user asks for is checked here, where the job is submitted, and without torch: a wrong recipe must not wait for
64 GPUs to be found wrong.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torchx import specs
from torchx.components import dist
from torchx.specs.finder import ComponentValidationException

import swav
from swav.config import PretrainConfig
from swav.recipes import configure, get_recipe, recipe_names
from swav.storage import join

IMAGE = f"swav-pretrain:{swav.__version__}"
ASSIGN_IMAGE = f"swav-assign:{swav.__version__}"
EVAL_IMAGE = f"swav-eval:{swav.__version__}"

RENDEZVOUS_PORT = 29500

T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """What each node of a role offers."""

    image: str
    cpu: int
    gpu: int
    mem_mb: int
    disk_gb: int


@dataclass
class ProgramRole(specs.Role):
    """A role that runs a program of ours.

    Its ``python``, where it runs beside the launcher, is the launcher's own; on a cluster its pod is as
    :mod:`swav_components.pods` says.
    """

    kind: str = "trainer"  # or assigner, evaluator, shards, doctor: what a cluster lets it do
    job_name: str | None = None  # where the job's name was chosen
    disk_gb: int = 50  # of each node, for the cache
    independent: bool = False  # does its work whether or not the job's other roles run
    urls: dict[str, str] = field(default_factory=dict)  # by option: what it reads and writes

    def pre_proc(self, scheduler: str, dryrun_info: specs.AppDryRunInfo[Any]) -> specs.AppDryRunInfo[Any]:
        """Put this interpreter's folder first on the path of local processes, virtual environment active or not."""
        if scheduler == "local":
            if self.job_name is not None:
                dryrun_info.request = replaced(dryrun_info.request, dryrun_info.request.app_id, self.job_name)
            here = str(Path(sys.executable).parent)
            for replica in dryrun_info.request.role_params[self.name]:
                replica.env["PATH"] = os.pathsep.join(filter(None, [here, replica.env.get("PATH")]))
        return dryrun_info


def replaced(value: T, old: str, new: str) -> T:
    """A request with another name in every text of it."""
    found: Any = value
    if isinstance(found, str):
        found = found.replace(old, new)
    elif isinstance(found, list):
        found = [replaced(part, old, new) for part in found]
    elif isinstance(found, dict):
        found = {key: replaced(part, old, new) for key, part in found.items()}
    elif is_dataclass(found) and not isinstance(found, type):
        found = replace(found, **{one.name: replaced(getattr(found, one.name), old, new) for one in fields(found)})
    return found  # type: ignore[no-any-return]


def app(title: str, name: str | None, *roles: ProgramRole) -> specs.AppDef:
    """A job of these roles.

    Args:
        title: what kind of job it is.
        name: of this very job, so that submitting it once more is recognised; without one TorchX makes one up.
        roles: of the job.

    Raises:
        ComponentValidationException: nothing can be called so.
    """
    if name is not None and not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise ComponentValidationException(
            f"--name {name}: a job's name has lower-case letters, digits and dashes, a letter first, e.g. photos-1"
        )
    for role in roles:
        role.job_name = name
    return specs.AppDef(name=title, roles=list(roles))


def pretrain(
    recipe: str,
    overrides: Iterable[str],
    *,
    data: str | None,
    output: str | None,
    j: str,
    node: Node,
) -> ProgramRole:
    """The trainer: one plain process, or data parallel under :mod:`swav.elastic`, which starts again what crashes.

    Args:
        recipe: name of the run.
        overrides: ``key=value`` settings.
        data: in place of the recipe's images.
        output: folder of the run.
        j: ``[[<min nodes>:]<nodes>x]<processes per node>``.
        node: where it runs.

    Raises:
        ComponentValidationException: the recipe or an override is refused.
    """
    settings = list(overrides)
    configured(recipe, settings, data)
    role = program(
        "swav.pretrain",
        [*option("recipe", recipe), *option("data", data), *option("output", output), *settings],
        node=node,
        urls={"data": data, "output": output},
    )
    return on_nodes(role, j)


def on_nodes(role: ProgramRole, j: str, *, options: str = "", port: int = RENDEZVOUS_PORT) -> ProgramRole:
    """A role's program as the ranks of some nodes, under :mod:`swav.elastic` where they are more than one.

    Args:
        role: of one process; changed.
        j: ``[[<min nodes>:]<nodes>x]<processes per node>``.
        options: of the launcher, each with a blank behind it.
        port: of the first node, where several meet.

    Raises:
        ComponentValidationException: ``j`` is of another form.
    """
    try:
        min_nodes, max_nodes, num_processes, nodes = dist.parse_nnodes(j)
    except ValueError as error:
        raise ComponentValidationException(str(error)) from error
    if not 1 <= min_nodes <= max_nodes or num_processes < 1:
        raise ComponentValidationException(f"-j {j}: at least one process on one node, and the fewest nodes first")
    if max_nodes == num_processes == 1:
        return role
    launch = f"-m swav.elastic --nnodes={nodes} --nproc-per-node={num_processes} {options}".rstrip()
    if max_nodes == 1:
        role.args = [*launch.split(), "--standalone", *role.args]
        return role
    # The first node's name is known only where the job runs, so a shell reads it there; "$$" is TorchX for "$".
    endpoint = f"$${{{specs.macros.rank0_env}:-localhost}}:{port}"
    rendezvous = f"--rdzv-backend=c10d --rdzv-endpoint={endpoint} --rdzv-id={specs.macros.app_id}"
    role.entrypoint = "bash"
    role.args = ["-c", f"exec python {launch} {rendezvous} {shlex.join(role.args)}"]
    role.num_replicas, role.min_replicas = max_nodes, min_nodes
    role.port_map = {"c10d": port}
    return role


def check_fixed(j: str, why: str) -> None:
    """Refuse a number of nodes that may be smaller.

    Raises:
        ComponentValidationException: it is such a number.
    """
    if ":" in j:
        raise ComponentValidationException(f"-j {j}: {why}, so say how many, e.g. -j {j.partition(':')[2]}")


def trainer(
    kind: str,
    recipe: str,
    overrides: Iterable[str],
    *,
    data: str | None,
    output: str | None,
    j: str,
    node: Node,
) -> ProgramRole:
    """The trainer of a method that needs an assigner beside it.

    Args:
        kind: of the method.
        recipe: name of the run; one of this method, or made so by an override.
        overrides: as :func:`pretrain` takes them, and so the rest.
        data: in place of the recipe's images.
        output: folder of the run.
        j: ``[[<min nodes>:]<nodes>x]<processes per node>``.
        node: where it runs.

    Raises:
        ComponentValidationException: the recipe or an override is refused, or the run is of another method.
    """
    settings = list(overrides)
    found = configured(recipe, settings, data).method.kind
    if found != kind:
        fitting = next(name for name in recipe_names() if get_recipe(name).method.kind == kind)
        raise ComponentValidationException(
            f"swav.{kind} trains by {kind}, and recipe {recipe} with these settings by {found}; give a recipe such as "
            f'{fitting}, or set method=\'{{"kind": "{kind}"}}\''
        )
    run = run_folder(recipe, output)
    role = pretrain(recipe, settings, data=data, output=run, j=j, node=node)
    role.name = "trainer"
    return role


def assigner(
    output: str,
    *,
    data: str | None,
    workers: int,
    timeout_hours: float | None,
    node: Node,
) -> ProgramRole:
    """The assigner of a run: workers of one node under :mod:`swav.elastic`, which starts again what crashes.

    Args:
        output: folder of the run.
        data: the run's images, where the trainer was given them too, or where they are found elsewhere.
        workers: processes.
        timeout_hours: for which it waits for features; the program's own limit where none is given.
        node: where it runs.

    Raises:
        ComponentValidationException: there are no workers.
    """
    if workers < 1:
        raise ComponentValidationException(f"--workers {workers}: the assigner needs at least 1")
    seconds = None if timeout_hours is None else round(float(timeout_hours) * 3600)  # TorchX leaves it a text
    role = program(
        "swav.assign",
        [*option("output", output), *option("data", data), *option("timeout-seconds", seconds)],
        node=node,
        kind="assigner",
        urls={"data": data, "output": output},
    )
    role.args = ["-m", "swav.elastic", "--standalone", f"--nproc-per-node={workers}", *role.args]
    role.name = "assigner"
    return role


def configured(recipe: str, overrides: Iterable[str], data: str | None) -> PretrainConfig:
    """The run that the programs will build.

    Raises:
        ComponentValidationException: they would refuse it.
    """
    try:
        return configure(recipe, data=data, overrides=overrides)
    except ValueError as error:
        raise ComponentValidationException(str(error)) from error


def run_folder(recipe: str, output: str | None) -> str:
    """The run's folder: without one given, the trainer's own default, said to both sides."""
    return output or join(os.environ.get("SWAV_RUNS", "runs"), recipe)


def shards(
    source: str,
    out: str,
    *,
    options: Iterable[str],
    node: Node,
) -> ProgramRole:
    """What writes images as webdataset shards, in one process.

    Args:
        source: images, or tars.
        out: new folder for the shards.
        options: of the program.
        node: where it runs.
    """
    return program(
        "swav.data.write_shards",
        [source, out, *options],
        node=node,
        kind="shards",
        urls={"source": source, "out": out},
    )


def doctor(
    output: str,
    *,
    data: str | None,
    options: Iterable[str],
    j: str,
    node: Node,
) -> ProgramRole:
    """The check before a long run, on the nodes that it would have.

    Args:
        output: where the run would write.
        data: its images.
        options: further ones of the program.
        j: nodes and processes as of the run.
        node: where it runs.
    """
    check_fixed(j, "all nodes are to be checked")
    role = program(
        "swav.doctor",
        [*option("output", output), *option("data", data), *options],
        node=node,
        kind="doctor",
        urls={"data": data, "output": output},
    )
    return on_nodes(role, j, options="--max-restarts=0 ")


def program(
    module: str,
    arguments: Iterable[str],
    *,
    node: Node,
    kind: str = "trainer",
    urls: Mapping[str, str | None],
) -> ProgramRole:
    """One process of a module of ours.

    Args:
        module: run with ``python -m``; its last part names the role.
        arguments: of the program, taken literally.
        node: where it runs.
        kind: of :class:`ProgramRole`.
        urls: by option; those that are not given are left out.
    """
    literal = [argument.replace("$", "$$") for argument in arguments]  # TorchX substitutes ${...} in what it is given
    return ProgramRole(
        name="shards" if kind == "shards" else module.rpartition(".")[2],
        image=node.image,
        entrypoint="python",
        args=["-m", module, *literal],
        resource=specs.resource(cpu=node.cpu, gpu=node.gpu, memMB=node.mem_mb),
        kind=kind,
        disk_gb=node.disk_gb,
        urls={name: url for name, url in urls.items() if url is not None},
    )


def option(name: str, *values: object) -> list[str]:
    """``--name value...``, or nothing where no value is given."""
    given = [str(value) for value in values if value is not None]
    return [f"--{name}", *given] if given else []
