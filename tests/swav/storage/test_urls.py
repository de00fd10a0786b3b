import logging

import pytest

from swav import storage
from swav.storage import urls


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:canary@bucket/a",
        "https://canary@host/a.tar",
        "https://host/a.tar?X-Amz-Signature=canary",
        "https://host/a.tar?canary",
        "s3://bucket/a?versionId=canary",
    ],
)
def test_a_url_with_a_secret_is_refused_without_repeating_it(url: str) -> None:
    for call in (storage.absolute, storage.read, storage.stat, storage.list_tars, storage.remove):
        with pytest.raises(ValueError, match="a url must not h") as caught:
            call(url)
        assert "canary" not in str(caught.value)


def test_an_s3_pattern_may_have_a_question_mark_and_a_key_an_at_sign() -> None:
    assert storage.absolute("s3://bucket/train-??.tar") == "s3://bucket/train-??.tar"
    assert urls.split_s3("s3://bucket/a@b/c=d") == ("bucket", "a@b/c=d")
    assert urls.split_s3("s3://bucket") == ("bucket", "")


def test_quoted_texts_lose_queries_and_users() -> None:
    text = 'GET "http://me:word@host:9000/a?X-Amz-Signature=1f&b=2" failed; see (https://host/?token=3)'
    assert urls.redacted(text) == 'GET "http://...@host:9000/a?..." failed; see (https://host/?...)'


def test_braces_stand_for_urls_in_order() -> None:
    assert list(urls.expand_braces("s3://b/{a,b}/x-{08..10}.tar"))[1:4] == [
        "s3://b/a/x-09.tar",
        "s3://b/a/x-10.tar",
        "s3://b/b/x-08.tar",
    ]
    assert [urls.has_braces(url) for url in ("{0..9}.tar", "{a,b}", "{a}", "a..b")] == [True, True, False, False]
    with pytest.raises(ValueError, match=r"{000\.\.146}"):
        list(urls.expand_braces("{0..9}{.tar"))


def test_patterns_have_a_head_for_the_store_to_look_for() -> None:
    assert [urls.literal_head(pattern) for pattern in ("train-*.tar", "[ab]", "a", "*")] == ["train-", "", "a", ""]
    assert urls.pattern_of("train-*.tar").match("train-1.tar")
    assert not urls.pattern_of("train-*.tar").match("train-1.tar.partial")


def test_a_level_that_a_user_set_stays() -> None:
    mine, other = logging.getLogger("test_urls.mine"), logging.getLogger("test_urls.other")
    mine.setLevel(logging.DEBUG)
    urls.quieten(mine.name, other.name)
    assert (mine.level, other.level) == (logging.DEBUG, logging.WARNING)
