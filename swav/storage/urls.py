"""What a url says, and what it must not say."""

import logging
import os
import re
from collections.abc import Iterator
from fnmatch import translate
from urllib.parse import urlsplit

from swav.storage.types import Location

_REMOTE = ("s3://", "http://", "https://")
_PATTERN_MARKS = "*?["
# What may follow a "?" in a text that an error or a log quotes: signatures and tokens stand there.
_QUERY = re.compile(r"\?[^\s'\"<>)\]]+")
_USER = re.compile(r"(?<=//)[^/\s'\"]*@")


def is_remote(url: Location) -> bool:
    """Whether a url names an object in a store, and not a file of this machine."""
    return os.fspath(url).startswith(_REMOTE)


def redacted(text: object) -> str:
    """A text of another library without the queries and the user parts of its urls."""
    return _USER.sub("...@", _QUERY.sub("?...", str(text)))


def quieten(*names: str) -> None:
    """Keep what libraries say below WARNING, which holds signatures, out of logs; a level that somebody set stays."""
    for name in names:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.WARNING)


def check_remote(url: str) -> str:
    """Refuse a url that holds a secret, as those end up in indexes, checkpoints and logs.

    Returns:
        the url.

    Raises:
        ValueError: it names a user, or has a query; the message does not repeat it.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ValueError(
            f"{parts.scheme}://...@{parts.netloc.rpartition('@')[2]}: a url must not hold a name or a password; give "
            "credentials to the store's own tools (for s3://, AWS_ACCESS_KEY_ID or a profile)"
        )
    is_s3 = parts.scheme == "s3"  # where a "?" may also be a pattern's
    if "?" in url and (not is_s3 or "=" in parts.query):
        raise ValueError(
            f"{url.partition('?')[0]}?...: a url must not have a query, which may hold a signature or a token; "
            "give the bare url and the credentials apart"
        )
    if not parts.netloc:
        raise ValueError(f"{url}: there is no {'bucket' if is_s3 else 'host'} in it; write {_example(parts.scheme)}")
    return url


def _example(scheme: str) -> str:
    return "s3://bucket/key" if scheme == "s3" else f"{scheme}://host/path"


def split_s3(url: str) -> tuple[str, str]:
    """The bucket and the key of an ``s3://`` url; the key may be empty.

    Raises:
        ValueError: there is no bucket, or a secret in the url.
    """
    bucket, _, key = check_remote(url).removeprefix("s3://").partition("/")
    return bucket, key


def has_braces(url: str) -> bool:
    """Whether a url has webdataset's brace notation, ``{000..146}`` or ``{a,b}``."""
    return re.search(r"\{[^{}]*(\.\.|,)[^{}]*\}", url) is not None


def has_marks(url: str) -> bool:
    """Whether the last part of a url has a pattern's ``*``, ``?`` or ``[``."""
    return any(mark in url.rpartition("/")[2] for mark in _PATTERN_MARKS)


def expand_braces(url: str) -> Iterator[str]:
    """The urls that brace notation stands for, in order.

    Raises:
        ValueError: the braces are not balanced.
    """
    from braceexpand import braceexpand

    try:
        yield from braceexpand(url)
    except ValueError as error:  # UnbalancedBracesError is one
        raise ValueError(f"{url}: the braces are not balanced; write train-{{000..146}}.tar") from error


def literal_head(pattern: str) -> str:
    """What every name that fits a pattern starts with."""
    return re.split(r"[*?\[]", pattern, maxsplit=1)[0]


def pattern_of(pattern: str) -> re.Pattern[str]:
    """A pattern of names, as :mod:`fnmatch` has it, ready for many names."""
    return re.compile(translate(pattern))
