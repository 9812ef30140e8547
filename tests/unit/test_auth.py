"""Addresses, token files and PEM files: what is taken, what is refused, and in which words."""

from __future__ import annotations

import hmac
import json
import logging
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trustme
from token_swarm_server.cli import app, options
from token_swarm_server.cli.client import connect
from token_swarm_server.cli.errors import CliError
from token_swarm_server.config.addresses import ListenAddress, parse_listen, stays_on_this_machine
from token_swarm_server.config.settings import ClientTls, ServerTls, exposure_problem
from token_swarm_server.rpc import bearer_tokens as tokens
from token_swarm_server.rpc.channels import open_channel
from token_swarm_server.rpc.host import Access, GrpcHost
from typer.testing import CliRunner

from token_swarm.errors import BadParameter, UnknownName

TLS = ServerTls(certificate=Path("c"), key=Path("k"))
MUTUAL = ServerTls(certificate=Path("c"), key=Path("k"), client_ca=Path("a"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:50061", ListenAddress(None, "127.0.0.1", 50061, public=False)),
        ("127.9.9.9:0", ListenAddress(None, "127.9.9.9", 0, public=False)),
        ("localhost:65535", ListenAddress(None, "localhost", 65535, public=False)),
        ("[::1]:1", ListenAddress(None, "::1", 1, public=False)),
        ("0.0.0.0:1", ListenAddress(None, "0.0.0.0", 1, public=True)),
        ("[::]:1", ListenAddress(None, "::", 1, public=True)),
        ("10.1.2.3:80", ListenAddress(None, "10.1.2.3", 80, public=True)),
        ("unix:/run/s", ListenAddress(Path("/run/s"), "", 0, public=False)),
    ],
)
def test_an_address_says_who_can_reach_it(text, expected):
    assert parse_listen(text) == expected
    assert stays_on_this_machine(text) != expected.public


@pytest.mark.parametrize(
    "text",
    [
        *("", "127.0.0.1", ":1", "127.0.0.1:", "127.0.0.1:-1", "127.0.0.1:65536", "127.0.0.1:٣", "127.0.0.1:1 "),
        *("::1:1", "[127.0.0.1]:1", "[::1:1", "0:1", "127.1:1", "example.org:1", "localhost.evil:1"),
        *("http://127.0.0.1:1", "dns:///x:1", "vsock:1:1", "unix-abstract:x"),
        *("unix:s", "unix:", f"unix:/{'x' * 107}", "unix:/a\0b"),
    ],
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match=r"^must be unix:/absolute/path"):
        parse_listen(text)
    assert stays_on_this_machine(text) == text.startswith("unix")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "is not encrypted and lets everybody call"),
        ({"tokens": True}, "is not encrypted"),
        ({"tls": TLS}, "lets everybody call"),
        ({"tls": TLS, "tokens": True}, None),
        ({"tls": MUTUAL}, None),
        ({"allow_insecure": True}, None),
    ],
)
def test_a_public_address_needs_encryption_and_known_callers(given, problem):
    given = {"tls": None, "tokens": False, "allow_insecure": False} | given
    said = exposure_problem("0.0.0.0:1", **given)
    assert said == (problem and f"0.0.0.0:1 can be reached from other machines, but {problem}")
    assert exposure_problem("127.0.0.1:1", **given) is None
    assert exposure_problem("unix:/run/s", **given) is None


def test_a_server_itself_refuses_to_be_exposed(tmp_path):
    tokens.create_token(tmp_path / "t", "alice")
    for access in (Access(), Access(tokens=tmp_path / "t")):
        with pytest.raises(BadParameter, match=r"address: .* unix:PATH or a loopback address: .* not encrypted"):
            GrpcHost("s", "0.0.0.0:0", field="address", max_message_bytes=1, access=access)


# Tokens.


@pytest.fixture
def file(tmp_path):
    return tmp_path / "new" / "tokens.json"


def test_the_file_holds_no_token_and_is_private_whatever_the_umask(file):
    before = os.umask(0)
    try:
        token = tokens.create_token(file, "alice")
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert token.startswith("tsw_")
    assert len(token) == len("tsw_") + 43
    assert token not in file.read_text()
    assert token.removeprefix("tsw_") not in file.read_text()
    entry = tokens.read_tokens(file)["alice"]
    assert entry.sha256 == tokens.digest(token)
    assert list(file.parent.iterdir()) == [file]


def test_every_token_is_another_one_and_only_it_is_accepted(file):
    made = [tokens.create_token(file, name) for name in ("a", "b", "c")]
    assert len(set(made)) == 3
    store = tokens.TokenStore(file, "tokens")
    assert all(map(store.accepts, made))
    first = made[0]
    for wrong in ("", first[:-1], first + "x", first.upper(), f" {first}", tokens.digest(first), "\udcff", "a"):
        assert not store.accepts(wrong)


def test_a_name_is_taken_once_and_free_again_after_it_was_revoked(file):
    first = tokens.create_token(file, "alice")
    with pytest.raises(BadParameter, match=r"NAME: 'alice' .* revoke that one first"):
        tokens.create_token(file, "alice")
    tokens.revoke_token(file, "alice")
    with pytest.raises(UnknownName, match="no token named 'alice'"):
        tokens.revoke_token(file, "alice")
    second = tokens.create_token(file, "alice")
    store = tokens.TokenStore(file, "tokens")
    assert (store.accepts(first), store.accepts(second)) == (False, True)


@pytest.mark.parametrize("name", ["", "A", "a b", "../a", "a\n", "-a", "x" * 65, "é"])
def test_a_name_is_a_plain_word(file, name):
    with pytest.raises(BadParameter, match=r"NAME: .* 1 to 64 of a-z"):
        tokens.create_token(file, name)
    assert not file.exists()


def test_two_at_a_time_lose_no_token(file):
    names = [f"n{i}" for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda name: tokens.create_token(file, name), names))
    assert sorted(tokens.read_tokens(file)) == sorted(names)
    store = tokens.TokenStore(file, "tokens")
    assert all(map(store.accepts, made))


def test_every_stored_token_is_compared_in_constant_time(file, monkeypatch):
    made = [tokens.create_token(file, name) for name in ("a", "b", "c", "d")]
    store = tokens.TokenStore(file, "tokens")
    compared = []

    def watched(stored, presented):
        compared.append((stored, presented))
        return compare(stored, presented)

    compare = hmac.compare_digest
    monkeypatch.setattr(tokens.hmac, "compare_digest", watched)
    stored = [tokens.digest(token).encode() for token in made]
    # The first, the last and none of them: always all four, and only digests of one length.
    for token in (made[0], made[-1], "no token"):
        compared.clear()
        store.accepts(token)
        assert compared == [(each, tokens.digest(token).encode()) for each in stored]


def test_the_store_follows_its_file(file, caplog):
    old = tokens.create_token(file, "old")
    kept = tokens.create_token(file, "kept")
    store = tokens.TokenStore(file, "coordinator.tokens")
    new = tokens.create_token(file, "new")
    tokens.revoke_token(file, "old")
    assert [store.accepts(each) for each in (old, kept, new)] == [False, True, True]
    good = file.read_bytes()
    file.write_text("{")
    with caplog.at_level(logging.ERROR):
        assert not store.accepts(kept)
    assert "no token is valid until this is mended: coordinator.tokens" in caplog.text
    file.unlink()
    assert not store.accepts(kept)
    file.write_bytes(good)
    file.chmod(0o600)
    assert store.accepts(kept)


def test_reload_reads_a_file_whose_change_cannot_be_seen(file):
    token = tokens.create_token(file, "alice")
    store = tokens.TokenStore(file, "tokens")
    before = file.stat()
    text = file.read_text().replace(tokens.digest(token), "0" * 64)
    with file.open("r+") as same_inode:
        same_inode.write(text)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.accepts(token)
    store.reload()
    assert not store.accepts(token)


BAD_FILES = {
    "not JSON": "tokens",
    "another document": "[]",
    "no schema": '{"tokens": []}',
    "a later schema": '{"schema": 2, "tokens": []}',
    "a token in place of its hash": '{"schema": 1, "tokens": [{"name": "a", "sha256": "tsw_x", "created": ""}]}',
    "a name that is none": json.dumps({"schema": 1, "tokens": [{"name": "A b", "sha256": "0" * 64, "created": ""}]}),
    "an unknown key": json.dumps({"schema": 1, "tokens": [{"name": "a", "sha256": "0" * 64, "created": "", "x": 1}]}),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("text", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "t"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(BadParameter, match=r"coordinator.tokens: .* that `token-swarm tokens` wrote"):
        tokens.TokenStore(path, "coordinator.tokens")


def test_a_file_that_others_may_write_is_refused(file):
    tokens.create_token(file, "alice")
    for mode in (0o620, 0o602, 0o666):
        file.chmod(mode)
        with pytest.raises(BadParameter, match="writable by its owner alone: chmod 600"):
            tokens.TokenStore(file, "tokens")
    # As a Kubernetes secret is mounted: hashes may be read.
    file.chmod(0o444)
    tokens.TokenStore(file, "tokens")


def test_a_server_without_any_token_does_not_start(file):
    with pytest.raises(BadParameter, match="No such file"):
        tokens.TokenStore(file, "tokens")
    tokens.create_token(file, "alice")
    tokens.revoke_token(file, "alice")
    with pytest.raises(BadParameter, match="token-swarm tokens create"):
        tokens.TokenStore(file, "tokens")


# The command.


def run(*arguments, **environment):
    return CliRunner().invoke(app, arguments, env=environment)


def test_the_command_makes_lists_and_revokes(tmp_path):
    file, out = tmp_path / "tokens.json", tmp_path / "bob.token"
    made = run("tokens", "create", "alice", "--file", str(file))
    assert made.exit_code == 0
    assert run("tokens", "create", "bob", "--file", str(file), "--out", str(out)).stdout == ""
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    store = tokens.TokenStore(file, "tokens")
    assert store.accepts(made.stdout.strip())
    assert store.accepts(out.read_text().strip())
    listed = json.loads(run("tokens", "list", "--file", str(file), "--json").stdout)
    assert [each["name"] for each in listed["tokens"]] == ["alice", "bob"]
    assert "alice" in run("tokens", "list", "--file", str(file)).stdout
    assert run("tokens", "revoke", "alice", "--file", str(file)).exit_code == 0
    assert not store.accepts(made.stdout.strip())
    again = run("tokens", "create", "carol", "--file", str(file), "--out", str(out))
    assert (again.exit_code, again.stderr) == (2, f"error: --out: {out} exists already; name a new file\n")
    assert set(tokens.read_tokens(file)) == {"bob"}
    nowhere = run("tokens", "create", "carol", "--file", str(file), "--out", str(tmp_path / "no" / "folder"))
    assert nowhere.exit_code == 1
    assert set(tokens.read_tokens(file)) == {"bob"}


def test_help_of_the_command_teaches_by_example():
    for command in ("create", "list", "revoke"):
        assert f"token-swarm tokens {command}" in run("tokens", command, "--help").stdout


@pytest.mark.parametrize("command", ["generate", "score", "particles", "search"])
def test_no_flag_takes_a_token_itself(command):
    text = run(command, "--help").stdout
    assert "--token-file" in text
    assert "--token " not in text


def test_credentials_come_from_flags_and_variables(tmp_path, monkeypatch):
    monkeypatch.delenv("TOKEN_SWARM_TOKEN", raising=False)
    (tmp_path / "t").write_text(" abc.DEF-_~+/== \n")

    def read(token_file=None, tls=False, ca=None, certificate=None, key=None):
        return options.credentials(token_file, tls, ca, certificate, key)

    assert read() == options.PLAIN
    assert read(tmp_path / "t") == options.Credentials(None, "abc.DEF-_~+/==")
    monkeypatch.setenv("TOKEN_SWARM_TOKEN", "fromvariable")
    assert read().token == "fromvariable"
    assert read(tmp_path / "t").token == "abc.DEF-_~+/=="
    assert read(tls=True).tls == ClientTls()
    assert read(ca=Path("a")).tls == ClientTls(ca=Path("a"))
    with pytest.raises(CliError, match="--tls-certificate: give it and --tls-key"):
        read(certificate=Path("c"))
    for bad in ("two words", "line\nline", "", "é", "a\x00"):
        (tmp_path / "t").write_text(bad)
        with pytest.raises(CliError, match="--token-file: holds no token") as caught:
            read(tmp_path / "t")
        assert not bad or bad not in str(caught.value)


@pytest.mark.parametrize("address", ["example.org:1", "10.0.0.1:1", "0.0.0.0:1", "dns:///localhost:1"])
async def test_a_token_does_not_leave_this_machine_in_the_clear(address):
    with pytest.raises(CliError, match=r"would travel to .* unencrypted; give --tls-ca"):
        async with connect(address, options.Credentials(None, "secret")):
            pass


# PEM files.


@pytest.fixture(scope="module")
def pem(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pem")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name in ("one", "two"):
        issued = authority.issue_cert("127.0.0.1")
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
    (folder / "junk").write_bytes(b"\xff junk")
    return folder


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("none.pem", "one.key"), r"--tls-certificate: .*No such file"),
        (("one.pem", "none.key"), r"--tls-key: .*No such file"),
        (("one.pem", "two.key"), r"--tls-key: .* private key of .*one.pem \(key values mismatch\)"),
        (("one.pem", "junk"), r"--tls-key: .* private key of .*one.pem"),
        (("junk", "one.key"), r"--tls-key: .* private key of .*junk"),
        (("one.pem", "one.key", "junk"), r"--tls-client-ca: .* PEM file of certificates"),
        (("one.pem", "one.key", "one.key"), r"--tls-client-ca: .* PEM file of certificates"),
    ],
)
def test_files_that_cannot_be_used_are_found_before_anything_is_loaded(pem, files, said):
    certificate, key, *rest = [pem / name for name in files]
    tls = ServerTls(certificate=certificate, key=key, client_ca=rest[0] if rest else None)
    with pytest.raises(BadParameter, match=said):
        Access(tls, tls_prefix="--tls-").require_usable("127.0.0.1:0", "--address")
    if not rest:
        with pytest.raises(BadParameter, match=said):
            open_channel("127.0.0.1:1", ClientTls(certificate=certificate, key=key), tls_prefix="--tls-")


def test_a_client_checks_its_authorities(pem):
    with pytest.raises(BadParameter, match=r"experts.a.tls.ca: .* PEM file of certificates"):
        open_channel("127.0.0.1:1", ClientTls(ca=pem / "junk"), tls_prefix="experts.a.tls.")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--address", "0.0.0.0:0"], "--address: '0.0.0.0:0' is not allowed"),
        (["--address", "0.0.0.0:0", "--tls-certificate", "one.pem", "--tls-key", "one.key"], "lets everybody call"),
        (["--tls-certificate", "one.pem"], "--tls-certificate: give it and --tls-key"),
        (["--tls-client-ca", "ca.pem"], "--tls-certificate: give it and --tls-key"),
        (["--tls-certificate", "one.pem", "--tls-key", "two.key"], "--tls-key: "),
        (
            ["--tls-certificate", "one.pem", "--tls-key", "one.key", "--tls-client-name", "a"],
            "--tls-client-name: needs --tls-client-ca",
        ),
    ],
)
def test_an_expert_is_not_exposed_by_mistake(pem, monkeypatch, flags, said):
    monkeypatch.chdir(pem)
    result = run("expert", "one", "--model", "/no/model", *flags)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_serve_says_what_is_wrong_before_it_loads_anything(pem, tmp_path):
    config = tmp_path / "c.yaml"

    def refused(coordinator, *flags):
        config.write_text(f"experts: {{a: {{model: /no/model}}}}\ncoordinator: {coordinator}\n")
        result = run("serve", "--config", str(config), *flags)
        assert (result.exit_code, result.stdout) == (2, "")
        return result.stderr

    assert "coordinator.listen: 0.0.0.0:0 can be reached from other machines" in refused("{}", "--listen", "0.0.0.0:0")
    assert "/no/model is not a directory" in refused("{}", "--listen", "0.0.0.0:0", "--allow-insecure")
    assert "coordinator.tokens: " in refused("{tokens: none.json}")
    assert str(tmp_path / "none.json") in refused("{tokens: none.json}")
    assert f"coordinator.tls.certificate: '{tmp_path}/c.pem'" in refused("{tls: {certificate: c.pem, key: c.key}}")
    tls = f"{{certificate: {pem}/one.pem, key: {pem}/two.key}}"
    assert "coordinator.tls.key: " in refused(f"{{tls: {tls}}}")
