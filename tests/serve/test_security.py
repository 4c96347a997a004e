"""TLS, client certificates and tokens with real servers."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import numpy as np
import pytest
import trustme
from typer.testing import CliRunner

from omcda_deploy.bundle import Bundle
from omcda_deploy.cli import app
from omcda_deploy.client.channel import read_credentials
from omcda_deploy.client.remote import RemoteTeam
from omcda_deploy.errors import ConfigError, EndpointError, OmcdaError
from omcda_deploy.local import LocalTeam
from omcda_deploy.serve.config import read_server_config
from omcda_deploy.serve.security import Tls, Tokens
from tests.support.server_process import free_port, server_process

CONTRACT = "/omcda.v1.PolicyService/GetContract"
HEALTH = "/grpc.health.v1.Health/Check"
LOAD = "/omcda.v1.AdminService/Load"


def ask(channel: grpc.Channel, method: str = CONTRACT, token: str | None = None) -> bytes:
    call: Any = channel.unary_unary(method)
    metadata = None if token is None else (("authorization", f"Bearer {token}"),)
    answer: bytes = call(b"", timeout=10, metadata=metadata)
    return answer


def status_of(channel: grpc.Channel, method: str = CONTRACT, token: str | None = None) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as raised:
        ask(channel, method, token)
    assert isinstance(raised.value, grpc.Call)
    return raised.value.code()


class Authority:
    """A certificate authority with its files in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.ca = trustme.CA()
        self.file = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(self.file)
        server = self.ca.issue_cert("localhost", "127.0.0.1")
        server.private_key_pem.write_to_path(folder / "server.key")
        for blob in server.cert_chain_pems:
            blob.write_to_path(folder / "server.pem", append=True)

    def client(self) -> dict[str, bytes]:
        pair = self.ca.issue_cert("robot@example.org")
        chain = b"".join(blob.bytes() for blob in pair.cert_chain_pems)
        return {"private_key": pair.private_key_pem.bytes(), "certificate_chain": chain}


def config(folder: Path, text: str) -> tuple[str, str]:
    path = folder / "serve.toml"
    path.write_text(text)
    return ("--config", str(path))


def test_tls_needs_the_authority_and_mtls_a_certificate_of_it(
    continuous_bundle: Bundle, tmp_path: Path
) -> None:
    ours, other = Authority(tmp_path / "ours"), Authority(tmp_path / "other")
    tls = '[tls]\ncertificate = "ours/server.pem"\nkey = "ours/server.key"\nclient_ca = "ours/ca.pem"\n'
    with server_process(continuous_bundle, "agent_0", options=config(tmp_path, tls)) as server:
        root = ours.file.read_bytes()  # overwritten below
        address = server.endpoint.replace("127.0.0.1", "localhost")

        def secure(**files: bytes) -> grpc.Channel:
            return grpc.secure_channel(address, grpc.ssl_channel_credentials(**files))

        with secure(root_certificates=root, **ours.client()) as channel:
            assert ask(channel) != b""
        for refused in (
            {"root_certificates": root},  # no client certificate
            {"root_certificates": root, **other.client()},  # a certificate of another authority
            {"root_certificates": other.file.read_bytes(), **ours.client()},  # the server is not trusted
        ):
            with secure(**refused) as channel:
                assert status_of(channel) is grpc.StatusCode.UNAVAILABLE
        with grpc.insecure_channel(address) as channel:
            assert status_of(channel) is grpc.StatusCode.UNAVAILABLE
        # Another authority's files in their place: seen by the next connection. A key that does not fit is not.
        with secure(root_certificates=root, **ours.client()) as before:
            assert ask(before) != b""
            for name in ("server.pem", "ca.pem", "server.key"):
                (tmp_path / "ours" / name).write_bytes((tmp_path / "other" / name).read_bytes())
            with secure(root_certificates=other.file.read_bytes(), **other.client()) as channel:
                assert ask(channel) != b""
            assert ask(before) != b""
            with secure(root_certificates=root, **ours.client()) as channel:
                assert status_of(channel) is grpc.StatusCode.UNAVAILABLE
        (tmp_path / "ours" / "server.key").write_text("half a k")
        with secure(root_certificates=other.file.read_bytes(), **other.client()) as channel:
            assert ask(channel) != b""


def test_calls_without_a_token_are_refused_except_health(continuous_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("# of the arm\nsesame\n\nopen\n")
    port, metrics = free_port(), free_port()
    access = config(tmp_path, '[access]\ntoken_file = "tokens"\n')
    options = (*access, "--admin-port", str(port), "--metrics-port", str(metrics))
    with (
        server_process(continuous_bundle, "agent_0", options=options) as server,
        grpc.insecure_channel(server.endpoint) as channel,
        grpc.insecure_channel(f"127.0.0.1:{port}") as admin,
    ):
        assert ask(channel, token="sesame") != b""
        assert ask(channel, token="open") != b""
        ask(channel, HEALTH)
        for token in (None, "", "sesam", "# of the arm"):
            assert status_of(channel, token=token) is grpc.StatusCode.UNAUTHENTICATED
        assert status_of(admin, LOAD) is grpc.StatusCode.UNAUTHENTICATED
        assert status_of(admin, LOAD, "sesame") is grpc.StatusCode.INVALID_ARGUMENT  # version "" is empty
        stream: Any = channel.stream_stream("/omcda.v1.PolicyService/ActStream")
        with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
            next(stream(iter([b""]), timeout=10))
        with urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=10) as answer:
            assert b"omcda_denied_calls_total 6.0" in answer.read()


def test_a_call_without_a_token_is_refused_before_its_message_has_come(
    continuous_bundle: Bundle, tmp_path: Path
) -> None:
    """Otherwise it could occupy one of the concurrent calls for as long as it likes."""
    (tmp_path / "tokens").write_text("sesame\n")
    options = config(
        tmp_path, '[access]\ntoken_file = "tokens"\n[limits]\nconcurrent_calls = 1\nstreams = 1\n'
    )
    never = threading.Event()
    with (
        server_process(continuous_bundle, "agent_0", options=options) as server,
        grpc.insecure_channel(server.endpoint) as channel,
    ):
        slow: Any = channel.stream_unary(CONTRACT)
        try:
            for _ in range(5):
                with pytest.raises(grpc.RpcError) as raised:
                    slow(iter(lambda: never.wait(20) or b"", None), timeout=10)
                assert isinstance(raised.value, grpc.Call)
                assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert ask(channel, token="sesame") != b""
        finally:
            never.set()


def test_tokens_are_rotated_without_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr("omcda_deploy.followed.time.monotonic", lambda: now)
    file = tmp_path / "tokens"
    file.write_text("old\n")
    tokens = Tokens(file)

    def admitted(authorization: str) -> bool:
        return tokens.holder(authorization) is not None

    file.write_text("old\nnew\n")
    assert not admitted("Bearer new")  # not looked at again within a second
    now += 2
    assert admitted("Bearer new")
    assert admitted("bearer old")
    assert not admitted("Basic old")
    file.write_text("")  # half-written: those known so far stay
    os.utime(file, ns=(1, 1))
    now += 2
    assert admitted("Bearer new")
    file.write_bytes(b"n\xffw\n")
    now += 2
    assert admitted("Bearer new")
    with pytest.raises(ConfigError, match="in UTF-8, got a byte 0xff"):
        Tokens(file)
    file.write_text("new\n")
    now += 2
    assert not admitted("Bearer old")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[tls]\ncertificate = "a.pem"', "tls: expected certificate and key, key is missing"),
        ("[tls]\ncertificate = 1\nkey = 2", "tls.certificate: expected the name of a PEM file, got 1"),
        ('[tls]\ncertificates = "a.pem"', "did you mean 'certificate'"),
        ("[access]\ntoken_file = 3", "access.token_file: expected the name of a file, got 3"),
        ("[access]\nadmin_token_file = 3", "access.admin_token_file: expected the name of a file, got 3"),
        ("[releases]\nretire_s = -1", "retire_s: expected seconds from 0 on, got -1"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_server_config(path)


def test_files_are_looked_for_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text('[tls]\ncertificate = "a.pem"\nkey = "/etc/b.key"\n')
    tls = read_server_config(tmp_path / "serve.toml").tls
    assert tls is not None
    assert (tls.certificate, tls.key) == (str(tmp_path / "a.pem"), "/etc/b.key")
    with pytest.raises(ConfigError, match=r"tls.key: .*b.key cannot be read: No such file"):
        tls.credentials()
    (tmp_path / "tokens").write_text("# none yet\n")
    with pytest.raises(ConfigError, match=r"expected a token per line in .*tokens, found none"):
        Tokens(tmp_path / "tokens")


def test_our_client_shows_its_credentials(continuous_bundle: Bundle, tmp_path: Path) -> None:
    ours = Authority(tmp_path / "ours")
    client = ours.client()
    (tmp_path / "robot.key").write_bytes(client["private_key"])
    (tmp_path / "robot.pem").write_bytes(client["certificate_chain"])
    (tmp_path / "token").write_text("sesame\n")
    tls = '[tls]\ncertificate = "ours/server.pem"\nkey = "ours/server.key"\nclient_ca = "ours/ca.pem"\n'
    options = config(tmp_path, tls + '[access]\ntoken_file = "token"\n')
    credentials_file = tmp_path / "credentials.toml"
    whole = (
        'ca = "ours/ca.pem"\ncertificate = "robot.pem"\nkey = "robot.key"\nserver_name = "localhost"\n'
        'token_file = "token"\n'
    )
    port = free_port()
    observations = {
        a.name: np.ones((2, a.observation_size), np.float32) for a in continuous_bundle.spec.agents
    }
    expected = LocalTeam(continuous_bundle).act(observations)
    with server_process(continuous_bundle, options=(*options, "--admin-port", str(port))) as server:
        credentials_file.write_text(whole)
        for stream in (False, True):
            with RemoteTeam(
                [server.endpoint], stream=stream, credentials=read_credentials(credentials_file)
            ) as team:
                for name, decision in team.act(observations).items():
                    np.testing.assert_allclose(decision.action, expected[name].action, atol=1e-6)
        words = ["status", "--admin", f"127.0.0.1:{port}"]
        result = CliRunner().invoke(
            app, [*words, "--credentials", str(credentials_file)], catch_exceptions=False
        )
        assert result.exit_code == 0
        assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 1
        credentials_file.write_text(whole.replace('token_file = "token"\n', ""))
        with pytest.raises(EndpointError, match="UNAUTHENTICATED: expected the metadata"):
            RemoteTeam([server.endpoint], credentials=read_credentials(credentials_file))
        credentials_file.write_text(whole.replace('certificate = "robot.pem"\nkey = "robot.key"\n', ""))
        with pytest.raises(EndpointError, match="cannot be reached"):
            RemoteTeam([server.endpoint], credentials=read_credentials(credentials_file))


def test_operators_have_tokens_of_their_own_and_names(continuous_bundle: Bundle, tmp_path: Path) -> None:
    ours = Authority(tmp_path / "ours")
    tls = '[tls]\ncertificate = "ours/server.pem"\nkey = "ours/server.key"\nclient_ca = "ours/ca.pem"\n'
    (tmp_path / "tokens").write_text("sesame robots\n")
    (tmp_path / "admin").write_text("rosebud  Anna Kern\nnameless\n")
    options = config(tmp_path, tls + '[access]\ntoken_file = "tokens"\nadmin_token_file = "admin"\n')
    log, port = tmp_path / "log", free_port()
    client = ours.ca.issue_cert("robot@example.org", common_name="desk 4")
    pair: Any = {
        "private_key": client.private_key_pem.bytes(),
        "certificate_chain": b"".join(blob.bytes() for blob in client.cert_chain_pems),
        "root_certificates": ours.file.read_bytes(),
    }

    def secure(endpoint: str) -> grpc.Channel:
        address = endpoint.replace("127.0.0.1", "localhost")
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(**pair))

    with (
        server_process(
            continuous_bundle,
            "agent_0",
            options=(*options, "--admin-port", str(port), "--log-json"),
            log=log,
        ) as server,
        secure(server.endpoint) as channel,
        secure(f"127.0.0.1:{port}") as admin,
    ):
        assert ask(channel, token="sesame") != b""
        assert status_of(channel, token="rosebud") is grpc.StatusCode.UNAUTHENTICATED
        for token in ("sesame", "rosebu"):
            assert status_of(admin, LOAD, token) is grpc.StatusCode.UNAUTHENTICATED
        for token in ("rosebud", "nameless"):
            assert status_of(admin, LOAD, token) is grpc.StatusCode.INVALID_ARGUMENT
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines = [line for line in lines if "call" in line]
    denied, invalid = ("Load", "UNAUTHENTICATED", None), "INVALID_ARGUMENT"
    digest = hashlib.sha256(b"nameless").hexdigest()[:8]
    assert [(line["call"], line["outcome"], line.get("operator")) for line in lines] == [
        denied,
        denied,
        ("Load", invalid, "Anna Kern"),
        ("Load", invalid, f"token {digest}"),
    ]
    assert {line["certificate"] for line in lines} == {"desk 4"}
    assert lines[2]["message"].startswith("Load by Anna Kern, desk 4 (ipv4:127.0.0.1:")


@pytest.mark.parametrize("stream", [False, True], ids=["calls", "stream"])
def test_the_token_of_a_client_follows_its_file(
    continuous_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr("omcda_deploy.followed.LOOK_S", 0.0)  # of the client; the server looks every second
    (tmp_path / "tokens").write_text("old\n")
    (tmp_path / "token").write_text("old\n")
    (tmp_path / "credentials.toml").write_text('token_file = "token"\n')
    observations = {
        a.name: np.ones((1, a.observation_size), np.float32) for a in continuous_bundle.spec.agents
    }
    access = config(tmp_path, '[access]\ntoken_file = "tokens"\n')
    with (
        server_process(continuous_bundle, options=access) as server,
        RemoteTeam(
            [server.endpoint],
            stream=stream,
            deadline_s=5,
            credentials=read_credentials(tmp_path / "credentials.toml"),
        ) as team,
        grpc.insecure_channel(server.endpoint) as channel,
    ):
        team.act(observations)
        (tmp_path / "tokens").write_text("new\n")
        time.sleep(1.1)
        assert status_of(channel, token="old") is grpc.StatusCode.UNAUTHENTICATED
        if not stream:  # a stream that is open stays
            with pytest.raises(EndpointError, match="UNAUTHENTICATED"):
                team.act(observations)
        (tmp_path / "token").write_text("")  # half-written: the last one stays, which is refused
        with pytest.raises(EndpointError, match="UNAUTHENTICATED"):
            team.reset()
        (tmp_path / "token").write_text("new\n")
        team.reset()
        team.act(observations)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('certificate = "a.pem"', "expected certificate and key, or neither, got certificate"),
        ('CA = "a.pem"', "unknown entry of .*'CA': known are ca"),
        ('ca = "absent.pem"', "ca: .*absent.pem cannot be read: No such file"),
        ("ca = 1", "ca: expected a string, got 1"),
        ("ca = ", "is not TOML"),
    ],
)
def test_wrong_credentials_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "credentials.toml"
    path.write_text(text)
    with pytest.raises(OmcdaError, match=message):
        read_credentials(path)


def test_an_authoritys_file_may_have_comments_in_any_language(tmp_path: Path) -> None:
    """As bundles of public authorities have them."""
    ours = Authority(tmp_path / "ours")
    ours.file.write_text(f"# Főtanúsítvány\n{ours.file.read_text()}")
    (tmp_path / "credentials.toml").write_text('ca = "ours/ca.pem"\n')
    assert read_credentials(tmp_path / "credentials.toml").ca == ours.file.read_bytes()
    tls = Tls(str(tmp_path / "ours/server.pem"), str(tmp_path / "ours/server.key"), str(ours.file))
    assert tls.credentials() is not None


@pytest.mark.parametrize(
    ("certificate", "key", "authority", "message"),
    [
        ("server.pem", "other.key", "ca.pem", r"other.key is not the private key of .*server.pem"),
        ("server.pem", "ca.pem", "ca.pem", r"private key without a password in .*ca.pem, both as PEM"),
        ("text", "server.key", "ca.pem", r"expected a certificate in .*text, and its private key"),
        ("server.pem", "server.key", "text", r"expected the authority's certificates in .*text, as PEM"),
        ("server.pem", "server.key", "server.key", r"expected the authority's certificates in .*server.key"),
    ],
)
def test_files_that_do_not_fit_are_named(
    tmp_path: Path, certificate: str, key: str, authority: str, message: str
) -> None:
    """On both sides: gRPC would refuse them at a connection, or a port."""
    ours, other = tmp_path / "ours", tmp_path / "other"
    Authority(ours)
    Authority(other)
    (ours / "other.key").write_bytes((other / "server.key").read_bytes())
    (ours / "text").write_text("no PEM\n")
    pair = f'certificate = "ours/{certificate}"\nkey = "ours/{key}"\n'
    (tmp_path / "credentials.toml").write_text(f'ca = "ours/{authority}"\n{pair}')
    with pytest.raises(ConfigError, match=message) as refused:
        read_credentials(tmp_path / "credentials.toml")
    assert str(refused.value).startswith(f"{tmp_path / 'credentials.toml'}: ")
    (tmp_path / "serve.toml").write_text(f'[tls]\nclient_ca = "ours/{authority}"\n{pair}')
    tls = read_server_config(tmp_path / "serve.toml").tls
    assert tls is not None
    with pytest.raises(ConfigError, match=f"^tls: .*{message}"):
        tls.credentials()
