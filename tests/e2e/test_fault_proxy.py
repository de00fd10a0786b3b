"""The proxy that other tests rely on: transparent without faults, and each fault is what its name says."""

import http.client
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from swav_testing.faults import ALL, FaultProxy, Kind
from swav_testing.s3 import ACCESS_KEY, SECRET_KEY, S3Server, moto_server, s3rver_server

DATA = bytes(range(256)) * 20
KEY = "some shard ü+1.tar"


@pytest.fixture(scope="module", params=[moto_server, s3rver_server])
def server(request: pytest.FixtureRequest) -> Iterator[S3Server]:
    with request.param() as server:
        server.make_bucket("bucket")
        server.put("bucket", KEY, DATA)
        yield server


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(server.endpoint_url, rate=0, slow_start_seconds=0.3, stall_seconds=30) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[boto3.client]:
    client = boto3.client(
        "s3",
        endpoint_url=proxy.url,
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=Config(
            retries={"total_max_attempts": 1}, read_timeout=1.5, request_checksum_calculation="when_required"
        ),
    )
    yield client
    client.close()


@pytest.fixture
def url(client: boto3.client) -> str:
    """A signed GET of the object, path and query only."""
    return _signed(client, "get_object", Key=KEY)


def _signed(client: boto3.client, method: str, **parameters: str) -> str:
    parts = urlsplit(client.generate_presigned_url(method, Params={"Bucket": "bucket", **parameters}))
    return f"{parts.path}?{parts.query}"


def raw_get(proxy: FaultProxy, url: str, *, timeout: float = 10) -> tuple[bytes, bytes]:
    return raw(proxy, f"GET {url}", timeout=timeout)


def raw(proxy: FaultProxy, request: str, *, timeout: float = 10) -> tuple[bytes, bytes]:
    """Head and body of an answer as they came, up to the end of the connection."""
    address = urlsplit(proxy.url)
    received = b""
    with socket.create_connection((address.hostname, address.port), timeout=timeout) as connection:
        connection.sendall(f"{request} HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n\r\n".encode())
        try:
            while piece := connection.recv(1 << 16):
                received += piece
        except TimeoutError:
            pass
    head, _, body = received.partition(b"\r\n\r\n")
    return head, body


def test_without_faults_it_is_transparent(server: S3Server, proxy: FaultProxy, client: boto3.client) -> None:
    found = client.get_object(Bucket="bucket", Key=KEY)
    assert found["Body"].read() == DATA
    part = client.get_object(Bucket="bucket", Key=KEY, Range="bytes=100-1099", IfMatch=found["ETag"])
    assert part["ResponseMetadata"]["HTTPStatusCode"] == 206
    assert part["ContentRange"] == f"bytes 100-1099/{len(DATA)}"
    assert part["Body"].read() == DATA[100:1100]
    assert client.head_object(Bucket="bucket", Key=KEY)["ContentLength"] == len(DATA)
    with pytest.raises(ClientError, match="404"):
        client.head_object(Bucket="bucket", Key="none")
    with pytest.raises(ClientError, match="NoSuchKey"):
        client.get_object(Bucket="bucket", Key="none")
    client.put_object(Bucket="bucket", Key="empty", Body=b"")
    assert client.get_object(Bucket="bucket", Key="empty")["Body"].read() == b""
    assert [entry["Key"] for entry in client.list_objects_v2(Bucket="bucket")["Contents"]] == ["empty", KEY]
    upload = client.create_multipart_upload(Bucket="bucket", Key="parts")["UploadId"]
    where = {"Bucket": "bucket", "Key": "parts", "UploadId": upload}
    etag = client.upload_part(**where, PartNumber=1, Body=DATA)["ETag"]
    client.complete_multipart_upload(**where, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": etag}]})
    assert server.get("bucket", "parts") == DATA
    for key in ("empty", "parts"):
        client.delete_object(Bucket="bucket", Key=key)
    assert server.keys("bucket") == [KEY]
    proxy.settle()
    assert not proxy.counts
    objects = [answered.request.range for answered in proxy.log if answered.request.is_object]
    assert objects == ["", "bytes=100-1099", "", ""]
    assert {answered.request.key for answered in proxy.log} == {KEY, "none", "empty", "parts", ""}


def test_conditions_reach_the_store(server: S3Server, proxy: FaultProxy, url: str) -> None:
    statuses = []
    for endpoint in (server.endpoint_url, proxy.url):
        connection = http.client.HTTPConnection(urlsplit(endpoint).netloc)
        connection.request("GET", url, headers={"If-Match": '"other"'})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        statuses.append(answer.status)
    assert statuses == [412 if server.knows_conditions else 200] * 2
    proxy.settle()
    assert [answered.status for answered in proxy.log] == statuses[1:]


def test_the_store_sees_what_was_signed() -> None:
    seen: list[tuple[str, list[tuple[str, str]]]] = []

    class Store(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.path, self.headers.items()))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    headers = [
        ("Host", "bucket.store.example"),
        ("x-amz-meta-a", "b  c"),
        ("Content-Length", "3"),
        ("X-AMZ-Date", "now"),
    ]
    with HTTPServer(("127.0.0.1", 0), Store) as store:
        threading.Thread(target=store.serve_forever, args=(0.01,)).start()
        with FaultProxy(f"http://127.0.0.1:{store.server_port}", rate=0) as proxy:
            connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc)
            connection.putrequest("PUT", "/a%20b/%C3%BC+?x=%2F&y", skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                connection.putheader(name, value)
            connection.endheaders(b"abc")
            assert connection.getresponse().status == 200
            connection.close()
        store.shutdown()
    assert seen == [("/a%20b/%C3%BC+?x=%2F&y", headers)]


def test_one_connection_carries_many_requests(proxy: FaultProxy, url: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc)
    connection.connect()
    address = connection.sock.getsockname()
    for _ in range(5):
        connection.request("GET", url)
        assert connection.getresponse().read() == DATA
        assert connection.sock.getsockname() == address
    connection.close()


def test_many_connections_at_once(proxy: FaultProxy, url: str) -> None:
    bodies: list[bytes] = []
    threads = [threading.Thread(target=lambda: bodies.append(raw_get(proxy, url)[1])) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bodies == [DATA] * 40


def test_a_drop_ends_the_body_at_its_byte(proxy: FaultProxy, url: str) -> None:
    proxy.plan(Kind.DROP, key=KEY, at_byte=100)
    head, body = raw_get(proxy, url)
    assert f"Content-Length: {len(DATA)}".encode() in head
    assert body == DATA[:100]
    assert raw_get(proxy, url)[1] == DATA
    proxy.settle()
    assert proxy.counts == {"drop": 1}
    assert [answered.num_bytes for answered in proxy.log] == [100, len(DATA)]


def test_a_dropped_upload_does_not_arrive(server: S3Server, proxy: FaultProxy, client: boto3.client) -> None:
    proxy.plan(Kind.DROP, method="PUT", at_byte=10)
    with pytest.raises(Exception, match=r"closed|reset|Broken"):
        client.put_object(Bucket="bucket", Key="new", Body=DATA)
    assert server.keys("bucket") == [KEY]
    proxy.settle()
    assert proxy.counts == {"drop": 1}


def test_a_stall_sends_a_part_and_then_nothing(proxy: FaultProxy, url: str) -> None:
    proxy.plan(Kind.STALL, at_byte=1000)
    head, body = raw_get(proxy, url, timeout=0.5)
    assert f"Content-Length: {len(DATA)}".encode() in head
    assert body == DATA[:1000]
    proxy.behaviour.stall_seconds = 0.1
    proxy.plan(Kind.STALL, at_byte=1000)
    assert raw_get(proxy, url)[1] == DATA[:1000]  # the proxy ended it
    proxy.settle()
    assert proxy.counts == {"stall": 2}


@pytest.mark.parametrize(
    ("kind", "status", "code"), [(Kind.ERROR_500, 500, "InternalError"), (Kind.SLOW_DOWN, 503, "SlowDown")]
)
def test_errors_are_s3s(proxy: FaultProxy, client: boto3.client, kind: Kind, status: int, code: str) -> None:
    proxy.plan(kind, key=KEY)
    with pytest.raises(ClientError, match=code) as raised:
        client.get_object(Bucket="bucket", Key=KEY)
    assert raised.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    proxy.plan(kind, key=KEY, method="HEAD")
    with pytest.raises(ClientError, match=str(status)):
        client.head_object(Bucket="bucket", Key=KEY)
    proxy.plan(kind, key="new", method="PUT")
    with pytest.raises(ClientError, match=code):
        client.put_object(Bucket="bucket", Key="new", Body=DATA)
    proxy.plan(kind, key="")
    with pytest.raises(ClientError, match=code):
        client.list_objects_v2(Bucket="bucket")
    assert [entry["Key"] for entry in client.list_objects_v2(Bucket="bucket")["Contents"]] == [KEY]
    proxy.settle()
    assert proxy.counts == {kind: 4}


@pytest.mark.parametrize("claimed", [len(DATA) - 7, len(DATA) + 7])
def test_a_wrong_length_is_only_a_claim(proxy: FaultProxy, url: str, claimed: int) -> None:
    proxy.plan(Kind.LENGTH, at_byte=claimed)
    head, body = raw_get(proxy, url)
    assert f"Content-Length: {claimed}".encode() in head
    assert body == DATA


def test_corruption_keeps_the_length(proxy: FaultProxy, client: boto3.client, url: str) -> None:
    proxy.plan(Kind.CORRUPT, at_byte=5)
    _, body = raw_get(proxy, url)
    assert body[:5] + body[6:] == DATA[:5] + DATA[6:]
    assert (body[5] ^ DATA[5]).bit_count() == 1
    proxy.rate, proxy.kinds = 1, (Kind.CORRUPT,)
    for _ in range(10):
        head, body = raw_get(proxy, url)
        flipped = sum((a ^ b).bit_count() for a, b in zip(body, DATA, strict=True))
        assert 1 <= flipped <= 4
        assert f"Content-Length: {len(DATA)}".encode() in head
    assert [entry["Key"] for entry in client.list_objects_v2(Bucket="bucket")["Contents"]] == [KEY]
    with pytest.raises(ClientError, match="NoSuchKey"):
        client.get_object(Bucket="bucket", Key="none")
    proxy.settle()
    assert proxy.counts == {"corrupt": 11}


def test_a_slow_start_is_late_and_whole(proxy: FaultProxy, url: str) -> None:
    proxy.plan(Kind.SLOW_START)
    assert raw_get(proxy, url, timeout=0.1) == (b"", b"")
    proxy.plan(Kind.SLOW_START)
    assert raw_get(proxy, url)[1] == DATA
    proxy.settle()
    assert proxy.counts == {"slow_start": 2}


def test_a_trickle_comes_in_small_pieces(proxy: FaultProxy, url: str) -> None:
    address = urlsplit(proxy.url)
    proxy.plan(Kind.TRICKLE)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(f"GET {url} HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
        assert len(connection.recv(1 << 16)) <= 25 < len(DATA)
    proxy.behaviour.trickle_bytes_per_second = 50_000
    proxy.plan(Kind.TRICKLE)
    assert raw_get(proxy, url)[1] == DATA
    proxy.settle()
    assert proxy.counts == {"trickle": 2}


def test_a_reset_says_nothing(proxy: FaultProxy, url: str) -> None:
    proxy.plan(Kind.RESET)
    with pytest.raises(ConnectionResetError):
        raw_get(proxy, url)
    proxy.settle()
    assert proxy.counts == {"reset": 1}
    assert proxy.log[-1].status == 0


def test_a_store_that_is_gone_is_a_closed_connection(server: S3Server, proxy: FaultProxy, url: str) -> None:
    proxy.behaviour.upstream_url = "http://127.0.0.1:9"  # discard: nobody listens there
    assert raw_get(proxy, url) == (b"", b"")
    proxy.behaviour.upstream_url = server.endpoint_url
    assert raw_get(proxy, url)[1] == DATA
    assert not proxy.counts


def test_chance_harms_its_share_in_every_way(server: S3Server, url: str) -> None:
    seen = []
    for seed in (3, 3, 4):
        with FaultProxy(
            server.endpoint_url,
            rate=0.3,
            seed=seed,
            slow_start_seconds=0.01,
            stall_seconds=0.01,
            trickle_bytes_per_second=1_000_000,
        ) as proxy:
            for _ in range(150):
                try:
                    raw_get(proxy, url)
                except ConnectionResetError:
                    continue
        seen.append(proxy.counts)
        assert proxy.counts.keys() == set(ALL)
        assert 22 < proxy.counts.total() < 70
    assert seen[0] == seen[1] != seen[2]


def test_a_head_can_be_cut_too(proxy: FaultProxy, client: boto3.client) -> None:
    url = _signed(client, "head_object", Key=KEY)
    proxy.plan(Kind.DROP, method="HEAD", at_byte=40)
    head, body = raw(proxy, f"HEAD {url}")
    assert len(head) == 40
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert body == b""
    proxy.plan(Kind.DROP, at_byte=-3)
    head, body = raw_get(proxy, _signed(client, "get_object", Key=KEY))
    assert not head.endswith(b"\r\n")
    assert head[-1:] == b"\r" or body == b""
