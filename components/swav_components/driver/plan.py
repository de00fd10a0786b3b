"""Which jobs a run has, what each needs, what it leaves behind, and what it is called."""

import contextlib
import hashlib
import inspect
import io
import re
import shlex
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torchx import specs
from torchx.specs.builders import materialize_appdef, parse_args
from torchx.specs.finder import ComponentValidationException

from swav.recipes import configure
from swav.storage import absolute, join, name_of
from swav_components import jobs
from swav_components.pods import MAX_NAME

T = TypeVar("T")

RESULT = "result.json"
PRETRAINING = ("pretrain", "deepclusterv2", "selav2")
_ASSIGN = "assign"
_SLUG, _HASH = 20, 6
_LAST_NUMBER = 99  # of an attempt, for which names must still fit


@dataclass(frozen=True)
class Step:
    """One job of a run, which may need several attempts.

    Attributes:
        key: its name within the run: pretrain, assign, knn-1.
        component: of this project that makes the job.
        words: the component's arguments, but for the job's name.
        command: component and arguments as they were asked for: they tell whether another command is given later.
        manifest: the file in the run's folder that says that the step is done.
        needs: steps that must be done before.
        partner: the step that it works beside; neither ends well without the other.
        follows: of two partners, the one that has no manifest of its own.
    """

    key: str
    component: str
    words: tuple[str, ...]
    command: str
    manifest: str
    needs: tuple[str, ...] = ()
    partner: str | None = None
    follows: bool = False


@dataclass(frozen=True)
class Plan:
    """All steps of a run; what a step needs comes before it.

    Attributes:
        run: url of the run's folder.
        steps: in order.
    """

    run: str
    steps: tuple[Step, ...]

    def job_name(self, step: Step, number: int) -> str:
        """The name of a job: the same in every driver of this run, and in no other run's."""
        attempt = "" if number == 1 else f"-a{number}"
        return f"{run_name(self.run)}-{step.key}{attempt}"


def run_name(run: str) -> str:
    """What the jobs of a run are called: by the folder's name, and by what is left of its whole url in a checksum."""
    slug = re.sub(r"[^a-z0-9]+", "-", name_of(run).lower()).strip("-")[:_SLUG].strip("-")
    slug = slug if slug[:1].isalpha() else f"run-{slug}"[:_SLUG].strip("-")
    return f"{slug}-{hashlib.sha256(run.encode()).hexdigest()[:_HASH]}"


def make_plan(run: str, pretraining: str, words: str, *, assign: str | None, evaluations: Sequence[str]) -> Plan:
    """The jobs that a user asks for; each word is checked here, by the components themselves.

    Args:
        run: url of the run's folder.
        pretraining: component of the pretraining.
        words: its arguments, as for ``torchx run``.
        assign: arguments of ``swav.assign``, where its job is one beside the trainer's.
        evaluations: component and arguments of each.

    Raises:
        ValueError: a component refuses its arguments, or they do not fit together.
    """
    run = absolute(run)
    key = PRETRAINING[0]
    first = _step(run, key, pretraining, words, manifest=RESULT, given={"output": run}, partner=assign is not None)
    _check_method(pretraining, first, assign is not None)
    steps = [first]
    if assign is not None:
        steps.append(_step(run, _ASSIGN, _ASSIGN, assign, manifest=RESULT, given={"output": run}, partner=True))
    counts: dict[str, int] = {}
    for text in evaluations:
        component, _, rest = text.strip().partition(" ")
        counts[component] = counts.get(component, 0) + 1
        name = f"{component.replace('_', '-')}-{counts[component]}"
        manifest = f"evaluations/{name}.json"
        given = {"backbone": join(run, "backbone.pt"), "output": join(run, manifest)}
        steps.append(_step(run, name, component, rest, manifest=manifest, given=given, needs=(key,)))
    plan = Plan(run, tuple(steps))
    for step in plan.steps:
        check_names(app_of(step, plan.job_name(step, _LAST_NUMBER)), run)
    return plan


def app_of(step: Step, name: str) -> specs.AppDef:
    """The job of a step, under a name.

    Raises:
        ValueError: the component refuses its arguments.
    """
    function = _component(step.component, step.key)
    return _told(step, lambda: materialize_appdef(function, ["--name", name, *step.words]))


def check_names(app: specs.AppDef, run: str) -> None:
    """Refuse a job whose pods' names would be longer than Kubernetes has them.

    Raises:
        ValueError: they would.
    """
    for role in app.roles:
        name = getattr(role, "job_name", None) or app.name
        longest = f"{name}-{role.name}-{role.num_replicas - 1}-0"
        if len(longest) > MAX_NAME:
            raise ValueError(
                f"{run}: a pod would be called {longest}, which has {len(longest)} letters of at most {MAX_NAME}; "
                "give the run's folder a shorter name"
            )


def _step(
    run: str,
    key: str,
    component: str,
    words: str,
    *,
    manifest: str,
    given: dict[str, str],
    needs: tuple[str, ...] = (),
    partner: bool = False,
) -> Step:
    """A step whose component accepts its words together with what this driver says of the run's files."""
    function = _component(component, key)
    missing = {"name", *given} - inspect.signature(function).parameters.keys()
    if missing:
        usable = [
            name for name, one in _components().items() if {"name", *given} <= inspect.signature(one).parameters.keys()
        ]
        raise ValueError(f"swav.{component} has no --{sorted(missing)[0]}; choose from {', '.join(usable)}")
    said = shlex.split(words)
    options = [word for name, value in given.items() for word in (f"--{name}", value)]
    step = Step(
        key,
        component,
        (*options, *said),
        shlex.join([component, *said]),
        manifest,
        needs,
        partner=(PRETRAINING[0] if component == _ASSIGN else _ASSIGN) if partner else None,
        follows=component == _ASSIGN,
    )
    found = _namespace(step)
    if found.name != key:
        raise ValueError(f"{key}: --name {found.name}: the driver names its jobs itself; leave --name out")
    for name, value in given.items():
        if getattr(found, name) != value:
            raise ValueError(
                f"{key}: --{name} {getattr(found, name)} is not {value}, where this run (--run {run}) has it; leave "
                f"--{name} out"
            )
    app_of(step, key)
    return step


def _check_method(pretraining: str, step: Step, assigned: bool) -> None:
    """Refuse a trainer that would wait for labels that nobody makes, and an assigner that nobody waits for."""
    found = _namespace(step)
    offline = configure(found.recipe, data=found.data, overrides=found.overrides or ()).offline is not None
    both = pretraining != PRETRAINING[0]
    if assigned and both:
        raise ValueError(f"--assign: the job of swav.{pretraining} has an assigner already; leave --assign out")
    if assigned and not offline:
        raise ValueError(f"--assign: {step.command} trains without labels; leave --assign out")
    if offline and not assigned and not both:
        raise ValueError(
            f"{step.command} needs labels between its epochs; add --assign '' for a job that makes them, or give the "
            "words to --deepclusterv2 or --selav2 for one job of both"
        )


def _components() -> dict[str, Callable[..., specs.AppDef]]:
    return dict(inspect.getmembers(jobs, inspect.isfunction))


def _component(name: str, key: str) -> Callable[..., specs.AppDef]:
    found = _components().get(name)
    if found is None:
        raise ValueError(f"{key}: there is no component swav.{name}; choose from {', '.join(_components())}")
    return found


def _namespace(step: Step) -> Namespace:
    function = _component(step.component, step.key)
    found: Namespace = _told(step, lambda: parse_args(function, ["--name", step.key, *step.words]))
    return found


def _told(step: Step, call: Callable[[], T]) -> T:
    """Turn what TorchX and argparse do about wrong words into one error."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return call()
    except SystemExit:
        lines = said.getvalue().strip().splitlines()
        raise ValueError(f"{step.command}: {lines[-1] if lines else 'refused'}") from None
    except (ComponentValidationException, ValueError) as error:
        raise ValueError(f"{step.command}: {error}") from error
