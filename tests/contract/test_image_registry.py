# SPDX-License-Identifier: MIT
"""Pulling from a registry that behaves, and from one that does not."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import logging
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from banger.contract import errors
from banger.images import blobs, connections, manifest, pull, reference
from tests.contract.image_client import BASE, LIMITS, TOP, Client
from tests.fakes import registry as registries

PASSWORD = "correct-horse-battery-staple"  # noqa: S105


@pytest.fixture
def registry() -> Iterator[registries.Registry]:
    with registries.serving() as made:
        made.add_image("v1", BASE, TOP, run={"Entrypoint": ["/bin/app"], "Env": ["A=1"], "User": "7"})
        yield made


@pytest.fixture
def client(tmp_path: Path, registry: registries.Registry) -> Client:
    return Client(tmp_path, registry)


def _digest(data: bytes) -> reference.Digest:
    return reference.digest_of(data)


async def test_a_pull_brings_the_layers_and_what_to_run(client: Client) -> None:
    made = await client.pull()
    assert [layer.path.read_bytes() for layer in made.layers] == [BASE, TOP]
    assert [layer.compression for layer in made.layers] == ["gzip", "zstd"]
    assert made.run.argv == ("/bin/app",)
    assert (made.run.env, made.run.user) == (("A=1",), "7")
    assert made.reference == f"{client.registry.host}/team/app:v1"
    assert client.watch.told[-1] == (len(BASE) + len(TOP), len(BASE) + len(TOP), "layers")
    whole = {detail: (current, size) for current, size, detail in client.watch.told}
    for number, layer in enumerate((BASE, TOP), 1):
        name = f"layer {number} of 2 {_digest(layer).partition(':')[2][:12]}"
        assert whole[name] == (len(layer), len(layer))
    assert client.left() == []


async def test_asking_again_is_one_request(client: Client) -> None:
    made = await client.pull()
    client.registry.asked.clear()
    async with client.opened() as puller:
        assert await puller.digest() == made.digest
    assert [each.method for each in client.registry.asked if each.path != "/v2/"] == ["HEAD"]


async def test_a_registry_that_does_not_say_digests_is_asked_for_the_manifest(client: Client) -> None:
    client.registry.says_digest = False
    made = await client.pull()
    assert made.digest == _digest(client.registry.manifests["v1"][1])


async def test_a_changed_top_layer_costs_that_layer(client: Client) -> None:
    await client.pull()
    client.registry.sent.clear()
    client.registry.add_image("v2", BASE, TOP + b"more")
    await client.pull("team/app:v2")
    assert client.registry.sent[_digest(BASE)] == 0
    assert client.registry.sent[_digest(TOP + b"more")] == len(TOP) + 4


async def test_two_that_share_a_layer_fetch_it_once(client: Client) -> None:
    client.registry.add_image("v2", BASE, b"other")
    await asyncio.gather(client.pull(), client.pull("team/app:v2"), client.pull())
    assert client.registry.sent[_digest(BASE)] == len(BASE)
    assert client.registry.sent[_digest(TOP)] == len(TOP)


async def test_a_layer_that_occurs_twice_is_fetched_once(client: Client) -> None:
    client.registry.add_image("twice", TOP, TOP)
    made = await client.pull("team/app:twice")
    assert [layer.digest for layer in made.layers] == [_digest(TOP)] * 2
    assert client.registry.sent[_digest(TOP)] == len(TOP)


@pytest.mark.parametrize("media_type", [registries.INDEX, manifest.DOCKER_INDEX])
async def test_an_index_gives_what_this_machine_runs(client: Client, media_type: str) -> None:
    registry = client.registry
    arm, amd = registry.add_image("arm", TOP, arch="arm64"), registry.add_image("amd", BASE)
    entries = [
        {"mediaType": registries.MANIFEST, "digest": digest, "size": 1, "platform": platform}
        for digest, platform in (
            (registry.add_image("attested", b"x"), {"architecture": "unknown", "os": "unknown"}),
            (arm, {"architecture": "arm64", "os": "linux", "variant": "v8"}),
            (amd, {"architecture": "amd64", "os": "linux"}),
        )
    ]
    document = {"schemaVersion": 2, "mediaType": media_type, "manifests": entries}
    index = registry.add_manifest("multi", document, media_type)
    made = await client.pull("team/app:multi")
    assert (made.digest, [layer.digest for layer in made.layers]) == (index, [_digest(BASE)])
    document["manifests"] = entries[:2]
    registry.add_manifest("multi", document, media_type)
    with pytest.raises(errors.NotFoundError, match="nothing for linux/amd64") as caught:
        await client.pull("team/app:multi")
    assert caught.value.hint == "it has: linux/arm64/v8"


async def test_an_image_for_another_machine_is_refused_before_its_layers(client: Client) -> None:
    client.registry.add_image("arm", BASE, arch="arm64")
    with pytest.raises(errors.BadRequestError, match="the image is for linux/arm64"):
        await client.pull("team/app:arm")
    assert client.registry.sent[_digest(BASE)] == 0


# --- what a registry answers ---


@pytest.mark.parametrize("code", [429, 500, 503])
async def test_what_passes_is_tried_again(client: Client, code: int) -> None:
    client.registry.faults += [registries.on("/manifests/v1", times=2, then=registries.status(code))]
    await client.pull()
    assert len([note for note in client.watch.notes if "trying again" in note]) == 2


@pytest.mark.parametrize(
    ("code", "headers", "kind", "text", "hint"),
    [
        (429, {"Retry_After": "3600"}, errors.UnavailableError, "too often", "come back in 3600 s"),
        (403, {}, errors.UnauthorizedError, "forbids reading team/app", "podman login"),
        (404, {}, errors.NotFoundError, "has no .*team/app:v1", "spelling"),
        (503, {}, errors.UnavailableError, "answered 503", "later"),
        (418, {}, errors.ProtocolError, "answered 418", ""),
    ],
)
async def test_what_does_not_pass_says_what_to_do(
    client: Client, code: int, headers: dict[str, str], kind: type[errors.BangerError], text: str, hint: str
) -> None:
    client.registry.faults += [
        registries.on("/manifests/v1", times=9, then=registries.status(code, **headers))
    ]
    with pytest.raises(kind, match=text) as caught:
        await client.pull()
    assert hint in caught.value.hint


def _waits(client: Client) -> list[str]:
    return [note.rpartition("trying again in ")[2] for note in client.watch.notes if "trying again" in note]


async def test_retry_after_is_heeded(client: Client) -> None:
    client.limits = dataclasses.replace(LIMITS, first_wait_s=5.0)
    client.registry.faults += [registries.on("/manifests/v1", then=registries.status(429, Retry_After="0"))]
    await client.pull()
    assert _waits(client) == ["0.0 s"]


@pytest.mark.parametrize(
    "when", ["soon", "-1", "Mon, 01 Jan 99999999999 00:00:00 GMT", f"Mon, 01 Jan 2024 00:00:00 +{'9' * 30}"]
)
async def test_a_retry_after_that_is_none_is_left_alone(client: Client, when: str) -> None:
    fault = registries.on("/manifests/v1", then=registries.status(429, Retry_After=when))
    client.registry.faults += [fault]
    await client.pull()
    assert _waits(client) == ["0.0 s"]


async def test_each_wait_is_twice_the_one_before_up_to_a_limit(client: Client) -> None:
    client.limits = dataclasses.replace(LIMITS, attempts=5, first_wait_s=0.1, longest_wait_s=0.3)
    client.registry.faults += [registries.on("/manifests/v1", times=4, then=registries.status(503))]
    await client.pull()
    assert _waits(client) == ["0.1 s", "0.2 s", "0.3 s", "0.3 s"]


async def test_a_few_layers_come_at_once_and_not_all(client: Client) -> None:
    """Those that came first are held; what is asked after them would have come after the others too."""
    held, arrived, go = [], threading.Semaphore(0), threading.Event()
    layers = [b"\x1f\x8b layer %d" % number for number in range(9)]
    client.registry.add_image("many", *layers)
    digests = {_digest(layer) for layer in layers}

    def holds(handler: registries._Handler) -> bool:
        if handler.path.rpartition("/")[2] in digests:
            held.append(handler.path)
            arrived.release()
            go.wait(20)
        return False

    client.registry.faults.append(holds)
    async with asyncio.TaskGroup() as group:
        pulled = group.create_task(client.pull("team/app:many"))
        for _ in range(4):
            assert await asyncio.to_thread(arrived.acquire, timeout=20)
        for _ in range(5):
            async with client.opened() as other:
                await other.digest()
        assert len(held) == 4
        go.set()
    assert [layer.path.read_bytes() for layer in pulled.result().layers] == layers


async def test_nobody_there_says_so(client: Client) -> None:
    client.registry.port = 1
    with pytest.raises(errors.UnavailableError, match=r"127\.0\.0\.1 cannot be reached") as caught:
        await client.pull()
    assert "without a proxy, whatever your shell has: `systemctl edit bangerd`" in caught.value.hint


def test_a_name_that_nobody_knows_is_said_without_a_number_of_the_system() -> None:
    said = r"^registry\.example cannot be reached: Name or service not known$"
    with (
        pytest.raises(errors.UnavailableError, match=said),
        connections._explained("registry.example", None),
    ):
        raise httpx.ConnectError("[Errno -2] Name or service not known")


def _says_nothing(handler: registries._Handler) -> None:
    handler.rfile.read(1)  # until the client gives up


async def test_silence_is_an_error_that_says_so(client: Client) -> None:
    client.limits = dataclasses.replace(LIMITS, silence_s=0.5)
    client.registry.faults += [registries.on("/manifests/v1", times=9, then=_says_nothing)]
    with pytest.raises(errors.DeadlineError, match="went silent"):
        await client.pull()


# --- logins ---


def _auths(host: str, login: str) -> str:
    return json.dumps({"auths": {host: {"auth": base64.b64encode(login.encode()).decode()}}})


@pytest.mark.parametrize("bearer", [False, True])
async def test_a_login_is_used_when_asked_for(client: Client, bearer: bool) -> None:
    registry = client.registry
    registry.login, registry.bearer = f"me:{PASSWORD}", bearer
    with pytest.raises(errors.UnauthorizedError, match="wants a login"):
        await client.pull()
    client.log_in(_auths(registry.host, f"me:{PASSWORD}"))
    await client.pull()
    client.log_in(_auths(registry.host, "me:wrong"))
    with pytest.raises(errors.UnauthorizedError, match="does not let this login") as caught:
        await client.pull("team/app:v2")
    assert str(client.logins[0]) in caught.value.message


async def test_nobody_is_given_a_login_without_asking(client: Client) -> None:
    client.log_in(_auths(client.registry.host, f"me:{PASSWORD}"))
    await client.pull()
    assert all("authorization" not in each.headers for each in client.registry.asked)


async def test_anonymous_tokens_are_asked_for_once(client: Client) -> None:
    client.registry.bearer = True
    await client.pull()
    assert client.registry.count("GET", "/token") == 1
    assert "scope=repository%3Ateam%2Fapp%3Apull" in next(
        each.path for each in client.registry.asked if each.path.startswith("/token")
    )


async def test_where_no_login_can_be_found_everybody_s_images_are_pulled(client: Client) -> None:
    registry = client.registry
    registry.bearer = True
    client.log_in(json.dumps({"credsStore": "nowhere"}))
    await client.pull()
    assert any(
        "docker-credential-nowhere" in note and "without a login" in note for note in client.watch.notes
    )
    assert all("authorization" not in each.headers for each in registry.asked if "/token" in each.path)


@pytest.mark.parametrize("bearer", [False, True])
async def test_where_no_login_can_be_found_others_images_say_why(client: Client, bearer: bool) -> None:
    client.registry.login, client.registry.bearer = f"me:{PASSWORD}", bearer
    client.log_in(json.dumps({"credsStore": "nowhere"}))
    with pytest.raises(errors.MissingToolError, match="docker-credential-nowhere"):
        await client.pull()


async def test_where_an_anonymous_token_is_not_enough_it_says_why_there_is_no_login(client: Client) -> None:
    registry = client.registry
    registry.bearer = True
    client.log_in(json.dumps({"credsStore": "nowhere"}))
    refuse = registries.status(401, WWW_Authenticate=f'Bearer realm="http://{registry.host}/token"')
    registry.faults += [registries.on("/manifests/", then=refuse, times=9)]
    with pytest.raises(errors.MissingToolError, match="docker-credential-nowhere"):
        await client.pull()


async def test_an_identity_token_is_exchanged(client: Client) -> None:
    client.registry.bearer, client.registry.identity_token = True, "refresh-me"
    client.log_in(json.dumps({"auths": {client.registry.host: {"identitytoken": "refresh-me"}}}))
    await client.pull()
    assert client.registry.count("POST", "/token") == 1


async def test_a_token_that_ran_out_is_replaced(client: Client) -> None:
    registry = client.registry
    registry.bearer = True

    def expire(handler: registries._Handler) -> bool:
        if "/blobs/" in handler.path and registry.token == "granted":  # noqa: S105
            registry.token = "granted-again"  # noqa: S105
        return False

    registry.faults += [expire]
    await client.pull()
    assert registry.count("GET", "/token") == 2


async def test_a_redirect_to_another_place_does_not_carry_the_login(client: Client) -> None:
    registry = client.registry
    registry.login = f"me:{PASSWORD}"
    client.log_in(_auths(registry.host, f"me:{PASSWORD}"))
    with registries.serving() as elsewhere:
        elsewhere.blobs = registry.blobs
        to = registries.redirects(lambda handler: f"http://{elsewhere.host}{handler.path}")
        registry.faults += [registries.on(f"/blobs/{_digest(BASE)}", then=to)]
        await client.pull()
        assert [each.path for each in elsewhere.asked] == [f"/v2/team/app/blobs/{_digest(BASE)}"]
        assert all("authorization" not in each.headers for each in elsewhere.asked)


@pytest.mark.parametrize("login", [{"auth": "bWU6cHc="}, {"identitytoken": "refresh-me"}])
async def test_nobody_redirected_to_is_given_a_login(client: Client, login: dict[str, str]) -> None:
    client.log_in(json.dumps({"auths": {client.registry.host: login}}))
    with registries.serving() as elsewhere:
        elsewhere.bearer = True
        to = registries.redirects(lambda handler: f"http://{elsewhere.host}{handler.path}")
        client.registry.faults += [registries.on(f"/blobs/{_digest(BASE)}", then=to, times=9)]
        with pytest.raises(errors.ProtocolError, match="which asks for a login"):
            await client.pull()
        assert ["authorization" in each.headers for each in elsewhere.asked] == [False]


@pytest.mark.parametrize("target", ["http://registry.invalid/x", "ftp://127.0.0.1/x", "file:///etc/passwd"])
async def test_a_redirect_out_of_tls_is_refused(client: Client, target: str) -> None:
    client.registry.faults += [
        registries.on("/blobs/", then=registries.redirects(lambda _: target), times=9)
    ]
    with pytest.raises(errors.ProtocolError, match="redirects to"):
        await client.pull()


@pytest.mark.parametrize("host", ["xn--a.example", "300.1.1.1"])
async def test_a_host_that_cannot_be_one_is_refused_by_name(client: Client, host: str) -> None:
    elsewhere = reference.parse(f"{host}/team/app:v1")
    settings = pull.Settings(limits=client.limits)
    async with pull.opened(elsewhere, settings, client.store, client.watch) as puller:
        with pytest.raises(errors.BadRequestError, match=f"{host}.* is no address") as caught:
            await puller.digest()
    assert "name" in caught.value.hint
    away = registries.redirects(lambda _: f"https://{host}/x")
    client.registry.faults += [registries.on("/blobs/", then=away, times=9)]
    with pytest.raises(errors.BangerError, match=r"redirects to nowhere|Invalid URL in location header"):
        await client.pull()


def _tls(root: Path) -> ssl.SSLContext:
    """With a certificate that is signed by itself."""
    certificate, key = root / "cert.pem", root / "key.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=tests"]
    argv += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(argv, check=True, capture_output=True, timeout=60)
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(certificate, key)
    return made


async def test_a_plain_port_that_leads_to_the_same_host_s_tls_is_not_spoken_to(tmp_path: Path) -> None:
    """As web servers have it, also in front of a registry whose certificate nobody vouches for."""
    with registries.serving(_tls(tmp_path)) as registry:
        registry.add_image("v1", BASE)
        registry.login, registry.faults = f"me:{PASSWORD}", [registries.leads_to_tls]
        client = Client(tmp_path, registry)
        client.insecure = (registry.host,)
        client.log_in(_auths(registry.host, registry.login))
        made = await client.pull()
        assert [layer.path.read_bytes() for layer in made.layers] == [BASE]


async def test_redirects_in_a_circle_end(client: Client) -> None:
    circle = registries.redirects(lambda handler: handler.path)
    client.registry.faults += [registries.on("/blobs/", then=circle, times=99)]
    with pytest.raises(errors.ProtocolError, match="redirects more than"):
        await client.pull()


@pytest.mark.parametrize(
    "realm", ["http://elsewhere.invalid/token", "", "https://xn--a/t", "https://user:x@a.invalid/t"]
)
async def test_a_token_service_unfit_for_a_login_is_not_asked(client: Client, realm: str) -> None:
    challenge = registries.status(401, WWW_Authenticate=f'Bearer realm="{realm}",service="x"')
    client.registry.faults += [registries.on("/manifests/", then=challenge, times=9)]
    client.log_in(_auths(client.registry.host, f"me:{PASSWORD}"))
    with pytest.raises(errors.ProtocolError, match="not fit to see a login"):
        await client.pull()


@pytest.mark.parametrize("token", ["hush-hush ", " hush-hush", "hush hush", "hush-hush\n", ""])
async def test_a_token_that_is_none_is_not_told(client: Client, token: str) -> None:
    client.registry.bearer, client.registry.token = True, token
    with pytest.raises(errors.ProtocolError, match="gave no token") as caught:
        await client.pull()
    assert "hush" not in repr(errors.to_body(caught.value))
    assert not any("hush" in note for note in client.watch.notes)


@pytest.mark.parametrize(("part", "said"), [("/manifests/", "answered 500"), ("/token", "gave no token")])
async def test_an_answer_that_is_nested_without_end_is_one_that_says_nothing(
    client: Client, part: str, said: str
) -> None:
    client.registry.bearer = part == "/token"
    deep = b'{"x":' + b"[" * 60_000
    status = 200 if part == "/token" else 500
    fault = registries.on(part, times=9, then=lambda handler: handler.answer(status, deep))
    client.registry.faults.append(fault)
    with pytest.raises(errors.BangerError, match=said):
        async with client.opened() as puller:
            await puller._registry.document("v1")


async def test_secrets_are_in_no_log_and_no_error(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="banger")
    registry = client.registry
    registry.login, registry.bearer = f"me:{PASSWORD}", True
    client.log_in(_auths(registry.host, f"me:{PASSWORD}"))
    registry.faults += [registries.on("/blobs/", times=99, then=registries.status(503))]
    with pytest.raises(errors.UnavailableError) as caught:
        await client.pull()
    seen = repr(errors.to_body(caught.value)) + caplog.text + "".join(client.watch.notes)
    encoded = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    assert not [secret for secret in (PASSWORD, encoded, "granted") if secret in seen]


# --- the cache ---


async def test_prune_leaves_what_a_pull_uses(client: Client) -> None:
    async with client.opened() as puller, puller.bundle("x86_64", await puller.digest()) as made:
        client.store.path(_digest(b"old")).write_bytes(b"old")
        assert client.store.prune(dry_run=True).names == (_digest(b"old"),)
        assert client.store.prune().names == (_digest(b"old"),)
        assert all(layer.path.exists() for layer in made.layers)
    pruned = client.store.prune()
    assert sorted(pruned.names) == sorted((_digest(BASE), _digest(TOP)))
    assert pruned.size_bytes >= len(BASE)
    assert client.store.prune().names == ()


async def test_a_disk_that_others_need_meanwhile_is_left_to_them(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fills_up(handler: registries._Handler) -> bool:
        if handler.path.endswith(f"/blobs/{_digest(BASE)}"):
            monkeypatch.setattr(blobs, "_RESERVE_BYTES", 1 << 60)
        return False

    client.registry.faults.append(fills_up)
    with pytest.raises(errors.NoSpaceError, match=r"no space left for a layer.* stay free") as caught:
        await client.pull()
    assert "prune" in caught.value.hint
    assert client.left() == []


async def test_too_little_room_is_said_before_anything_is_fetched(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A disk that is nearly full cannot be had without root; the real one is filled in the root tier.
    monkeypatch.setattr(blobs, "_RESERVE_BYTES", 1 << 60)
    with pytest.raises(errors.NoSpaceError, match="the layers need") as caught:
        await client.pull()
    assert "prune" in caught.value.hint
    assert client.registry.count("GET", "/blobs/") == 1  # the configuration
