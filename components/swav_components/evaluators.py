"""The roles of evaluations: what each component runs, with settings that are checked where they are submitted."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from torchx.specs.finder import ComponentValidationException

from swav.recipes import get_recipe
from swav_components.roles import RENDEZVOUS_PORT, Node, ProgramRole, check_fixed, on_nodes, option, program
from swav_eval.config import FinetuneProtocol, KnnProtocol, LinearProtocol, Protocol, SvmProtocol
from swav_eval.recipes import STANDARD, configure, configure_all, protocol_names

T = TypeVar("T")

# By component: its program, and the kind of protocol that this carries out.
_PROGRAMS: dict[str, tuple[str, type[Any]]] = {
    "linear": ("swav_eval.linear", LinearProtocol),
    "finetune": ("swav_eval.finetune", FinetuneProtocol),
    "lowshot": ("swav_eval.finetune", FinetuneProtocol),
    "svm": ("swav_eval.svm", SvmProtocol),
    "knn": ("swav_eval.knn", KnnProtocol),
}


@dataclass(frozen=True)
class Files:
    """What an evaluation reads and writes, by option of its program."""

    backbone: str
    train: str
    test: str | None
    output: str | None
    work: str | None


def protocol(component: str, recipe: str, overrides: Iterable[str], *, files: Files, j: str, node: Node) -> ProgramRole:
    """One protocol: a plain process, or data parallel under :mod:`swav.elastic`.

    Args:
        component: that asks for it, which also names the role.
        recipe: name of the protocol.
        overrides: ``key=value`` settings.
        files: what it reads and writes.
        j: ``[[<min nodes>:]<nodes>x]<processes per node>``.
        node: where it runs.

    Raises:
        ComponentValidationException: the protocol or an override is refused, or the protocol is another component's.
    """
    settings = list(overrides)
    module, kind = _PROGRAMS[component]
    found = _told(lambda: configure(recipe, kind, settings))
    if component == "lowshot" and not recipe.startswith("lowshot_"):
        own = [name for name in protocol_names(kind) if name.startswith("lowshot_")]
        raise ComponentValidationException(
            f"swav.lowshot has the protocols {', '.join(own)}; give {recipe} to swav.finetune"
        )
    urls = asdict(files)
    words = [word for name, url in urls.items() for word in option(name, url)]
    role = program(
        module,
        ["--recipe", recipe, *words, *settings],
        node=node,
        kind="evaluator",
        urls=urls | _lists(found),
    )
    role.name = component
    return on_nodes(role, j)


def table(
    overrides: Iterable[str],
    *,
    files: dict[str, str],
    protocols: Iterable[str] | None,
    pretraining: str | None,
    j: str,
    node: Node,
) -> list[ProgramRole]:
    """All protocols of the paper's table side by side, a role for each; whichever is last writes the table.

    Args:
        overrides: ``key=value`` settings of all protocols, ``PROTOCOL:key=value`` of one.
        files: backbone, data and output, by option.
        protocols: by name; :data:`swav_eval.recipes.STANDARD` where none are given.
        pretraining: recipe of the backbone, by which the paper's row is found.
        j: of each role.
        node: of each role.

    Raises:
        ComponentValidationException: a protocol or a setting is refused, or the number of nodes is left open.
    """
    check_fixed(j, "a job is done when so many pods have ended well, of whichever protocol")
    names = list(STANDARD if protocols is None else protocols)
    if not names or len(set(names)) < len(names):
        raise ComponentValidationException(
            f"--protocols {','.join(names) or repr('')}: give at least one, and each once, e.g. knn,linear_imagenet"
        )
    words = [word for name, url in files.items() for word in option(name, url)]
    words += [*option("pretraining", _known(pretraining)), *option("protocols", *names)]
    settings = list(overrides)
    roles = []
    for number, (name, own) in enumerate(_told(lambda: configure_all(names, settings)).items()):
        role = program(
            "swav_eval.paper",
            [*words, "--part", name, *settings],
            node=node,
            kind="evaluator",
            urls=files | _lists(own),
        )
        role.name = name.replace("_", "")  # names an environment variable and a host, which take neither "-" nor "_"
        role.independent = True
        roles.append(on_nodes(role, j, port=RENDEZVOUS_PORT + number))  # on one machine they have one host
    return roles


def _told(build: Callable[[], T], said: str = "") -> T:
    """What a program will build.

    Raises:
        ComponentValidationException: it would refuse it.
    """
    try:
        return build()
    except ValueError as error:
        raise ComponentValidationException(f"{said}{error}") from error


def neighbours(numbers: Iterable[int] | None) -> list[str]:
    """``--k`` as the setting that it is."""
    return [f"num_neighbors=[{','.join(map(str, numbers))}]"] if numbers else []


def _lists(found: Protocol) -> dict[str, str | None]:
    """The file that names the images to train on, which is read where the job runs."""
    return {"subset.names": found.subset.names} if isinstance(found, FinetuneProtocol) else {}


def _known(pretraining: str | None) -> str | None:
    if pretraining is not None:
        _told(lambda: get_recipe(pretraining), "--pretraining: ")
    return pretraining
