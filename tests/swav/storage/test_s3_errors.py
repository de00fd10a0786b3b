from typing import Any

import pytest
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from swav.storage.answer import BeyondEndError, Fault
from swav.storage.s3_errors import translated
from swav.storage.types import ChangedError

URL = "s3://data/a.tar"


def _answer(status: int, code: str = "") -> boto.ClientError:
    response: Any = {"Error": {"Code": code or str(status)}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return boto.ClientError(response, "GetObject")


@pytest.mark.parametrize(
    "error",
    [
        _answer(503, "SlowDown"),
        _answer(500, "InternalError"),
        _answer(429),
        _answer(400, "RequestTimeout"),
        _answer(403, "RequestLimitExceeded"),
        ResponseParserError("cut"),
        boto.ReadTimeoutError(endpoint_url="http://host/a?X-Amz-Signature=secret"),
        boto.ConnectionClosedError(endpoint_url="http://host/a?X-Amz-Signature=secret"),
        boto.EndpointConnectionError(endpoint_url="http://host/a?X-Amz-Signature=secret"),
        boto.ResponseStreamingError(error="reset"),
        boto.SSLError(endpoint_url="https://host", error="EOF occurred"),
    ],
)
def test_what_may_go_well_next_time_is_a_fault_without_secrets(error: Exception) -> None:
    with pytest.raises(Fault) as caught, translated(URL):
        raise error
    assert "secret" not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (_answer(404, "NoSuchKey"), FileNotFoundError, "no such object"),
        (_answer(404, "NoSuchBucket"), ValueError, "no such bucket"),
        (
            _answer(403, "AccessDenied"),
            PermissionError,
            "403 AccessDenied: the credentials in use may not.*AWS_PROFILE",
        ),
        (_answer(403, "SignatureDoesNotMatch"), PermissionError, "secret key does not belong"),
        (_answer(400, "ExpiredToken"), PermissionError, "has expired; renew"),
        (_answer(403, "RequestTimeTooSkewed"), PermissionError, "clock is wrong"),
        (_answer(301, "PermanentRedirect"), ValueError, "another region.*AWS_REGION"),
        (_answer(412, "PreconditionFailed"), ChangedError, "was replaced"),
        (_answer(416, "InvalidRange"), BeyondEndError, "^$"),
        (_answer(418, "Teapot"), OSError, "answered 418 Teapot"),
        (boto.NoCredentialsError(), PermissionError, "AWS_ACCESS_KEY_ID.*SWAV_S3_UNSIGNED=1"),
        (boto.ProfileNotFound(profile="mine"), PermissionError, "mine"),
        (boto.ParamValidationError(report="Invalid bucket name"), ValueError, "no bucket can have that name"),
        (
            boto.SSLError(endpoint_url="https://host", error="CERTIFICATE_VERIFY_FAILED"),
            ConnectionError,
            "AWS_CA_BUNDLE",
        ),
        (boto.UnknownEndpointError(service_name="s3", region_name="x"), OSError, URL),
    ],
)
def test_what_a_user_must_mend_is_said_with_the_remedy(error: Exception, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message), translated(URL):
        raise error
