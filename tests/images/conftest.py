"""All images, built once, and the engine that runs them."""

import os
from collections.abc import Iterator
from typing import NoReturn

import pytest
from swav_testing.containers import Engine, Missing, build, engine


@pytest.fixture(scope="session")
def docker() -> Iterator[Engine]:
    """An engine; where there is none, what needs one is skipped.

    SWAV_TEST_IMAGES=1 says that it must not be, and 0 that it is to be.
    """
    if os.environ.get("SWAV_TEST_IMAGES") == "0":
        pytest.skip("SWAV_TEST_IMAGES=0")
    try:
        with engine() as found:
            yield found
    except Missing as missing:
        _give_up(missing)


@pytest.fixture(scope="session")
def images(docker: Engine) -> dict[str, str]:
    """Names of the images by job."""
    try:
        return build(docker)
    except Missing as missing:
        _give_up(missing)


def _give_up(missing: Missing) -> NoReturn:
    if os.environ.get("SWAV_TEST_IMAGES") == "1":
        pytest.fail(str(missing))
    pytest.skip(str(missing))
