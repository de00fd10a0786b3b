"""What boto3's errors mean: try again, or say to the user what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from swav.storage.answer import BeyondEndError, Fault
from swav.storage.types import ChangedError, changed
from swav.storage.urls import redacted

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

_AGAIN_STATUSES = frozenset({408, 409, 425, 429})  # and all from 500
_AGAIN_CODES = frozenset(
    {
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "RequestLimitExceeded",
        "RequestTimeout",
        "BandwidthLimitExceeded",
    }
)
_REGION_CODES = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"})
_REFUSED = {
    "InvalidAccessKeyId": "the store does not know AWS_ACCESS_KEY_ID; check the credentials and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key; check the credentials",
    "ExpiredToken": "the session token has expired; renew the credentials",
    "InvalidToken": "the session token is not valid; renew the credentials",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it (NTP)",
}
_MAY_NOT = (
    "the credentials in use may not do this, or there is no such object and they may not list the bucket; check the "
    "bucket's policy, the role of the pod and AWS_PROFILE"
)
_NO_CREDENTIALS = (
    "there are no credentials for s3://; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the pod's "
    "role, or SWAV_S3_UNSIGNED=1 for a public bucket"
)


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn what boto3 raises into a fault or an error that names the url and what to do; no text holds a signature.

    Raises:
        Fault: try again.
        BeyondEndError: a range starts after the end.
        OSError: the world's fault: ``PermissionError``, ``FileNotFoundError``, ``ChangedError``, ``ConnectionError``.
        ValueError: the user's: no such bucket, a bad name, the wrong region.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    try:
        yield
    except ClientError as error:
        raise _of_answer(url, error) from None
    except ResponseParserError:
        raise Fault("the answer's XML is cut or unreadable") from None
    except BotoCoreError as error:
        raise _of_client(url, error) or _of_network(url, error) from None


def _of_client(url: str, error: Exception) -> Exception | None:
    """What stands in the way on this side."""
    from botocore import exceptions as boto

    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.NoAuthTokenError):
        return PermissionError(f"{url}: {_NO_CREDENTIALS}")
    if isinstance(error, boto.CredentialRetrievalError | boto.ProfileNotFound | boto.SSOError):
        return PermissionError(f"{url}: the credentials cannot be had: {redacted(error)}")
    if isinstance(error, boto.ParamValidationError) and "bucket name" in str(error):
        return ValueError(
            f"{url}: no bucket can have that name: small letters, digits, dots and dashes, 3 to 63 of them"
        )
    if isinstance(error, boto.ParamValidationError | boto.InvalidRegionError):
        return ValueError(f"{url}: {redacted(error)}")
    if isinstance(error, boto.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return ConnectionError(
            f"{url}: the store's certificate is not trusted; name its authority's file in AWS_CA_BUNDLE"
        )
    return None


def _of_network(url: str, error: Exception) -> Exception:
    """What happened on the way."""
    from botocore import exceptions as boto

    if isinstance(error, boto.ConnectTimeoutError | boto.ReadTimeoutError):
        return Fault("the store did not answer in time", TimeoutError)
    if isinstance(error, boto.SSLError):
        return Fault("the encrypted connection broke", ConnectionError)
    if isinstance(error, boto.EndpointConnectionError | boto.ProxyConnectionError):
        return Fault(redacted(error), ConnectionError)
    if isinstance(error, boto.HTTPClientError | boto.IncompleteReadError | boto.ResponseStreamingError):
        return Fault(f"the connection broke ({type(error).__name__})", ConnectionError)
    return OSError(f"{url}: {redacted(error)}")


def _of_answer(url: str, error: "ClientError") -> Exception:
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(error.response.get("Error", {}).get("Code", ""))
    answer = f"the store answered {status} {code}".rstrip() if code != str(status) else f"the store answered {status}"
    if code in _AGAIN_CODES or status in _AGAIN_STATUSES or status >= 500:
        return Fault(answer)
    if code == "NoSuchBucket":
        return ValueError(f"{url}: there is no such bucket; check the name, and AWS_ENDPOINT_URL if it is not Amazon's")
    if code in _REGION_CODES or status == 301:
        return ValueError(f"{url}: the bucket is in another region ({answer}); set AWS_REGION or AWS_ENDPOINT_URL")
    return _of_status(url, status, code, answer)


def _of_status(url: str, status: int, code: str, answer: str) -> Exception:
    if code in _REFUSED or status in (401, 403):
        return PermissionError(f"{url}: {answer}: {_REFUSED.get(code, _MAY_NOT)}")
    if status == 404:
        return FileNotFoundError(f"{url}: there is no such object")
    if status == 412:
        return ChangedError(changed(url, "was replaced"))
    if status == 416:
        return BeyondEndError()
    return OSError(f"{url}: {answer}")
