# SPDX-License-Identifier: MIT
"""Pulling, importing and keeping images through the API: once for all who ask, nothing said of secrets."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import socket
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.contract import errors, resources
from banger.images import blobs, connections, credentials, publish, pull, records, reference
from banger.vm import create
from tests import oci_make
from tests.contract import api_served, conftest
from tests.fakes import registry as registries

Served = api_served.Served
Status = resources.OperationStatus
RUN = {"Entrypoint": ["/bin/app"], "Env": ["PATH=/bin", "A=image"], "User": "7:8", "WorkingDir": "/srv/app"}
BASE = oci_make.tar({"bin/app": b"app" * 1000, "etc/passwd": b"root:x:0:0::/:/bin/sh\n"})
TOP = oci_make.tar({"srv/data": b"data"})
PASSWORD = "correct-horse-battery-staple"  # noqa: S105


def add(registry: registries.Registry, tag: str, *layers: bytes) -> str:
    """An image that can really be flattened."""
    encoded = [oci_make.compressed(layer) for layer in layers]
    digest = registry.add_image(tag, *encoded, run=RUN)
    document = json.loads(registry.manifests[tag][1])
    config = json.loads(registry.blobs[document["config"]["digest"]])
    config["rootfs"]["diff_ids"] = [oci_make.digest(layer) for layer in layers]
    data = json.dumps(config).encode()
    document["config"] |= {"digest": registry.add_blob(data), "size": len(data)}
    del registry.manifests[digest]
    return registry.add_manifest(tag, document)


@pytest.fixture
def registry() -> Iterator[registries.Registry]:
    with registries.serving() as made:
        add(made, "v1", BASE, TOP)
        yield made


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: registries.Registry) -> Path:
    """The owner's login, as the daemon finds it when it starts."""
    path = tmp_path / "auth.json"
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(path))
    assert credentials.own_files()[0] == path
    auth = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    path.write_text(json.dumps({"auths": {registry.host: {"auth": auth}}}))
    return path


@pytest.fixture
async def served(login: Path, daemon: conftest.Daemon) -> AsyncIterator[Served]:
    async with api_served.serving(daemon) as made:
        yield made


async def _pull(served: Served, ref: str, /, **more: Any) -> resources.Operation:
    return await served.done("POST", "/v1/images/pull", {"reference": ref, **more})


def _image(operation: resources.Operation) -> resources.Image:
    assert operation.error is None, operation.error
    assert operation.image is not None
    return operation.image


async def test_a_pull_makes_an_image_that_goes_by_all_its_names(
    served: Served, registry: registries.Registry
) -> None:
    name = f"{registry.host}/team/app:v1"
    made = _image(await _pull(served, name))
    assert (made.name, made.reference) == (name, name)
    assert made.digest == oci_make.digest(registry.manifests["v1"][1])
    assert (made.run.entrypoint, made.run.user, made.run.working_dir) == (("/bin/app",), "7:8", "/srv/app")
    assert (made.has_init, made.has_shell, made.default_kernel) == (False, False, "generic-6.12")
    repository = name.removesuffix(":v1")
    for ref in (made.id, made.id[:6], name, made.digest, made.digest[:20], f"{repository}@{made.digest}"):
        answer = await served.http.get("/v1/images", params={"ref": ref})
        assert [each["id"] for each in answer.json()] == [made.id], ref
    for ref in (f"{repository}:v2", repository, "app", "sha256:" + "0" * 64):
        answer = await served.http.get("/v1/images", params={"ref": ref})
        assert answer.json() == [], ref


async def test_a_second_pull_asks_for_the_digest_and_nothing_else(
    served: Served, registry: registries.Registry
) -> None:
    name = f"{registry.host}/team/app:v1"
    first = _image(await _pull(served, name))
    registry.asked.clear()
    assert _image(await _pull(served, name)).id == first.id
    assert [each.method for each in registry.asked if each.path != "/v2/"] == ["HEAD"]
    add(registry, "v1", BASE)
    changed = _image(await _pull(served, name))
    assert changed.id != first.id
    assert (await served.http.get("/v1/images", params={"ref": name})).json()[0]["id"] == changed.id


async def test_two_pulls_at_once_do_the_work_once(served: Served, registry: registries.Registry) -> None:
    body = {"reference": f"{registry.host}/team/app:v1"}
    operations = [await served.begin("POST", "/v1/images/pull", body) for _ in range(3)]
    ends = [(await served.watch(each.id))[-1].result for each in operations]
    assert len({_image(end).id for end in ends if end}) == 1
    assert registry.count("HEAD", "/manifests/") == 1
    assert registry.count("GET", "/blobs/") == 3


async def test_a_pull_says_how_far_it_is(served: Served, registry: registries.Registry) -> None:
    operation = await served.begin("POST", "/v1/images/pull", {"reference": f"{registry.host}/team/app:v1"})
    events = await served.watch(operation.id)
    stages = [event.stage for event in events if event.kind == "stage"]
    assert stages == ["pull_image", "pull_image", "build_image"]
    last = [event for event in events if event.kind == "progress"][-1]
    assert last.current == last.total == sum(map(len, map(oci_make.compressed, (BASE, TOP))))


async def test_a_name_of_ones_own_and_a_size(served: Served, registry: registries.Registry) -> None:
    ref = f"{registry.host}/team/app:v1"
    made = _image(await _pull(served, ref, name="mine", disk_size_mib=64))
    assert (made.name, made.tags, made.size_bytes) == ("mine", (ref,), 64 << 20)


@pytest.mark.parametrize("body", [{"reference": "Not/A/Reference"}, {"reference": "a", "name": "../x"}, {}])
async def test_what_cannot_be_asked_is_refused(served: Served, body: dict[str, str]) -> None:
    assert (await served.error("POST", "/v1/images/pull", 400, body)).code == "bad_request"
    assert (await served.http.get("/v1/operations")).json() == []


async def test_cancelling_a_pull_leaves_no_image(served: Served, registry: registries.Registry) -> None:
    stuck, release = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def stall(handler: registries._Handler) -> None:
        loop.call_soon_threadsafe(stuck.set)
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result(20)
        handler.hang_up()

    registry.faults.append(registries.on("/blobs/", then=stall))
    operation = await served.begin("POST", "/v1/images/pull", {"reference": f"{registry.host}/team/app:v1"})
    await asyncio.wait_for(stuck.wait(), 30)
    cancelled = (await served.http.delete(f"/v1/operations/{operation.id}")).json()
    release.set()
    assert cancelled["status"] == "cancelled"
    assert len((await served.http.get("/v1/images")).json()) == 1  # the one of the fixture


async def test_a_vm_of_an_image_that_is_not_here_pulls_it(
    served: Served, registry: registries.Registry
) -> None:
    body = {"name": "fresh", "image": f"{registry.host}/team/app:v1", "kernel": "tiny", "start": False}
    operation = await served.begin("POST", "/v1/vms", body)
    events = await served.watch(operation.id)
    made = events[-1].result
    assert made is not None
    assert made.vm is not None, made.error
    assert (made.vm.name, made.vm.image) == ("fresh", body["image"])
    assert next(event.stage for event in events if event.kind == "stage") == "pull_image"
    assert (await served.error("POST", "/v1/vms", 409, body)).code == "already_exists"
    again = await served.done("POST", "/v1/vms", {**body, "name": "second"})
    assert again.vm is not None
    assert registry.count("HEAD", "/manifests/") == 1


async def test_a_name_is_one_vm_s_from_before_its_image_is_here(
    served: Served, registry: registries.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first pull takes minutes, and who starts ten VMs at once meanwhile is to have ten."""
    monkeypatch.setattr(create, "_ADJECTIVES", ["calm"])
    monkeypatch.setattr(create, "_NOUNS", ["fox"])
    released = threading.Event()
    registry.faults.append(lambda _: not released.wait(20))
    body = {"image": f"{registry.host}/team/app:v1", "kernel": "tiny", "start": False}
    try:
        nameless = [await served.begin("POST", "/v1/vms", body) for _ in range(2)]
        await served.begin("POST", "/v1/vms", {**body, "name": "web"})
        for image in (body["image"], "tiny"):
            refused = await served.error("POST", "/v1/vms", 409, {**body, "name": "web", "image": image})
            assert (refused.code, refused.message) == (
                "already_exists",
                "a VM named web is being made already",
            )
        assert (await served.done("POST", "/v1/vms", {**body, "name": "old", "image": "tiny"})).vm
        refused = await served.error("PATCH", "/v1/vms/old", 409, {"name": "web"})
        assert (refused.code, refused.message) == ("already_exists", "a VM named web is being made already")
        assert (await served.http.patch("/v1/vms/old", json={"name": "old"})).status_code == 200
    finally:
        released.set()
    ended = [(await served.watch(each.id))[-1].result for each in nameless]
    assert [each.error for each in ended if each is not None] == [None, None]
    assert len({each.vm.name for each in ended if each is not None and each.vm is not None}) == 2


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({"network": False, "nat": True}, 400),
        ({"allow": ["2001:db8::/32"]}, 400),
        ({"publish": ["8080:80", "8080:81"]}, 400),
        ({"publish": ["{taken}:80"]}, 409),
    ],
)
async def test_a_vm_that_cannot_be_is_refused_before_its_image_is_pulled(
    served: Served, registry: registries.Registry, wrong: dict[str, Any], status: int
) -> None:
    body = {"name": "fresh", "image": f"{registry.host}/team/app:v1", "kernel": "tiny", **wrong}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        body["publish"] = [each.replace("{taken}", port) for each in wrong.get("publish", [])]
        await served.error("POST", "/v1/vms", status, body)
    assert registry.asked == []
    assert (await served.http.get("/v1/operations")).json() == []


async def test_a_vm_whose_image_cannot_be_pulled_leaves_no_row(
    served: Served, registry: registries.Registry
) -> None:
    body = {"name": "fresh", "image": f"{registry.host}/team/app:v9", "kernel": "tiny"}
    failed = await served.done("POST", "/v1/vms", body)
    assert failed.error is not None
    assert failed.error.code == "not_found"
    assert (await served.http.get("/v1/vms")).json() == []


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("debina", "did you mean debian-bookworm, debian-trixie? `banger image list --available` shows"),
        ("tinny", "did you mean tiny? "),
        ("nope", "`banger image list --available` shows what there is; `banger image pull nope` asks"),
    ],
)
async def test_a_mistyped_word_asks_no_registry(served: Served, word: str, hint: str) -> None:
    error = await served.error("POST", "/v1/vms", 404, {"image": word, "kernel": "tiny"})
    assert error.hint.startswith(hint)


async def test_the_default_image_is_known(served: Served, registry: registries.Registry) -> None:
    """It is `tiny` here."""
    await _pull(served, f"{registry.host}/team/app:v1")
    listed = (await served.http.get("/v1/images")).json()
    assert [each["name"] for each in listed if each["is_default"]] == ["tiny"]
    assert (await served.get("/v1/images/tiny", resources.Image)).is_default


async def test_a_kernel_that_is_missing_is_said_before_the_pull(
    served: Served, registry: registries.Registry
) -> None:
    body = {"image": f"{registry.host}/team/app:v1", "kernel": "nope"}
    error = await served.error("POST", "/v1/vms", 404, body)
    assert "kernel" in error.message
    assert registry.asked == []


async def test_deleting_and_promoting(served: Served, registry: registries.Registry) -> None:
    name = f"{registry.host}/team/app:v1"
    made = _image(await _pull(served, name))
    vm = {"name": "web", "image": name, "kernel": "tiny", "start": False}
    await served.done("POST", "/v1/vms", vm)
    error = await served.error("DELETE", f"/v1/images/{made.id}", 409)
    assert "web" in error.message
    copy = _image(await served.done("POST", f"/v1/images/{made.id}/promote", {"name": "base"}))
    assert (copy.name, copy.run, copy.size_bytes) == ("base", made.run, made.size_bytes)
    assert copy.id != made.id
    assert (await served.http.delete(f"/v1/images/{copy.id}")).status_code in (200, 204)


@pytest.mark.parametrize("layers", [(BASE, TOP), (BASE, BASE)], ids=["two", "one twice"])
async def test_a_layer_that_a_power_cut_damaged_is_fetched_again(
    served: Served, registry: registries.Registry, layers: tuple[bytes, ...]
) -> None:
    name = f"{registry.host}/team/app:v2"
    add(registry, "v2", *layers)
    await served.http.delete(f"/v1/images/{_image(await _pull(served, name)).id}")
    blobs = served.daemon.paths.cache / "blobs/sha256"
    for blob in blobs.iterdir():
        blob.write_bytes(bytes(blob.stat().st_size))
    refused = await _pull(served, name)
    assert refused.error is not None
    assert (refused.error.code, list(blobs.iterdir())) == ("bad_request", [])
    assert _image(await _pull(served, name)).name == name


async def test_a_disk_that_is_too_small_costs_no_layer(
    served: Served, registry: registries.Registry
) -> None:
    name = f"{registry.host}/team/app:v2"
    add(registry, "v2", BASE, oci_make.tar({"large": b"x" * (17 << 20)}))
    blobs = served.daemon.paths.cache / "blobs/sha256"
    refused = await _pull(served, name, disk_size_mib=16)
    assert refused.error is not None
    assert "does not fit on a disk" in refused.error.message
    _image(await _pull(served, name))
    assert [registry.count("GET", blob.name) for blob in blobs.iterdir()] == [1, 1]


async def test_an_image_that_says_nonsense_of_its_age_is_listed(
    served: Served, registry: registries.Registry
) -> None:
    made = _image(await _pull(served, f"{registry.host}/team/app:v1"))
    path = served.daemon.services.images.records.path(made.id) / records.RECORD
    record = served.daemon.services.images.records.read(made.id)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(record, created_at="long ago")))
    listed = (await served.http.get("/v1/images")).json()
    assert [each.get("created_at") for each in listed if each["id"] == made.id] == [None]


async def test_the_cache_is_pruned(served: Served, registry: registries.Registry) -> None:
    await _pull(served, f"{registry.host}/team/app:v1")
    looked = (await served.http.post("/v1/images/cache/prune", json={"dry_run": True})).json()
    pruned = (await served.http.post("/v1/images/cache/prune", json={})).json()
    assert (looked["blobs"], len(pruned["blobs"])) == (pruned["blobs"], 2)
    assert (await served.http.post("/v1/images/cache/prune", json={})).json()["blobs"] == []


async def test_the_packages_of_recipes_are_pruned_unless_something_is_built(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build that has found its packages must not lose them before it reads them."""
    kept = served.daemon.paths.cache / "recipes" / "mine-0123.tar"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(bytes(4096))
    found, go_on = threading.Event(), threading.Event()

    def build(*_: object, **__: object) -> None:
        found.set()
        go_on.wait(20)
        raise errors.BadRequestError("built")

    monkeypatch.setattr(publish, "build", build)
    operation = await served.begin("POST", "/v1/images/build", {"recipe": "busybox"})
    assert await asyncio.to_thread(found.wait, 20)
    assert (await served.http.post("/v1/images/cache/prune", json={})).json()["packages"] == []
    go_on.set()
    await served.daemon.services.operations.wait(operation.id)
    looked = (await served.http.post("/v1/images/cache/prune", json={"dry_run": True})).json()
    assert (looked["packages"], looked["size_bytes"], kept.exists()) == ([kept.name], 4096, True)
    assert (await served.http.post("/v1/images/cache/prune", json={})).json()["packages"] == [kept.name]
    assert not kept.exists()


async def test_an_image_deleted_while_it_is_looked_into_makes_no_vm(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = served.daemon.services

    def deleted(image_id: str, program: str) -> bool:
        services.images.delete(image_id)
        return True

    monkeypatch.setattr(services.images, "may_have", deleted)
    body = {"name": "web", "kernel": "tiny", "needs_git": True}
    assert (await served.error("POST", "/v1/vms", 404, body)).code == "not_found"
    assert await served.get("/v1/vms", list[resources.Vm]) == []


async def test_an_image_that_would_lack_what_is_wanted_is_not_made(served: Served) -> None:
    body = {"name": "web", "kernel": "tiny", "image": "busybox", "needs_git": True}
    refused = await served.error("POST", "/v1/vms", 503, body)
    assert "image busybox has no git" in refused.message
    assert [each.kind for each in await served.get("/v1/operations", list[resources.Operation])] == []
    images = served.daemon.services.pulls
    assert images.will_lack("busybox", "mise")
    assert not images.will_lack("busybox", "sh")
    assert not images.will_lack("debian-bookworm", "git")


async def test_importing_a_layout_and_a_root_file_system(served: Served, tmp_path: Path) -> None:
    oci_make.layout(tmp_path / "layout", "v1", [BASE, TOP], RUN)
    body = {"path": str(tmp_path / "layout"), "name": "laid"}
    made = _image(await served.done("POST", "/v1/images/import", body))
    assert (made.name, made.run.entrypoint) == ("laid", ("/bin/app",))
    (tmp_path / "root.tar").write_bytes(BASE)
    body = {"path": str(tmp_path / "root.tar"), "name": "plain"}
    assert _image(await served.done("POST", "/v1/images/import", body)).run == resources.ImageRun()
    body["path"] = str(tmp_path / "absent")
    failed = await served.done("POST", "/v1/images/import", body)
    assert failed.error is not None
    assert failed.error.code == "not_found"
    refused = await served.error("POST", "/v1/images/import", 400, {"path": "relative", "name": "x"})
    assert "absolute" in refused.message


async def test_an_imported_image_stands_for_no_registry_s(served: Served, tmp_path: Path) -> None:
    """Whoever made the archive wrote into it what it is called."""
    claimed = "docker.io/library/alpine:latest"
    oci_make.layout(tmp_path / "layout", claimed, [BASE], RUN)
    body = {"path": str(tmp_path / "layout"), "name": "laid", "image": claimed}
    made = _image(await served.done("POST", "/v1/images/import", body))
    assert (made.name, made.reference) == ("laid", "")
    for text in ("alpine", claimed, f"alpine@{made.digest}"):
        assert (await served.http.get("/v1/images", params={"ref": text})).json() == []
    [found] = (await served.http.get("/v1/images", params={"ref": made.digest})).json()
    assert found["id"] == made.id


async def test_the_catalog_is_listed_and_extended(served: Served, registry: registries.Registry) -> None:
    catalog = served.daemon.paths.image_catalog
    assert catalog is not None
    good, bad = oci_make.digest(registry.manifests["v1"][1]), "sha256:" + "0" * 64
    entry = f'[[image]]\nname = "app"\nkind = "oci"\nsource = "{registry.host}/team/app:v1"\ndigest = '
    catalog.write_text(f'{entry}"{good}"\n{entry.replace("app", "bad", 1)}"{bad}"\n')
    listed = (await served.http.get("/v1/images", params={"available": "true"})).json()
    assert {"app", "bad", "debian-bookworm"} <= {each["name"] for each in listed if each["available"]}
    made = _image(await _pull(served, "app"))
    assert (made.name, made.digest) == ("app", good)
    failed = await _pull(served, "bad")
    assert failed.error is not None
    catalog.write_text("[[image]]\nname = 1\n")
    assert str(catalog) in (await served.error("POST", "/v1/images/pull", 400, {"reference": "x"})).message


async def test_secrets_are_nowhere(
    served: Served, registry: registries.Registry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpcore").setLevel(logging.WARNING)
    registry.login, registry.bearer = f"me:{PASSWORD}", True
    operation = await served.begin("POST", "/v1/images/pull", {"reference": f"{registry.host}/team/app:v1"})
    events = await served.watch(operation.id)
    assert events[-1].result is not None
    assert events[-1].result.error is None
    registry.login = "me:another"
    add(registry, "v2", BASE)
    refused = await _pull(served, f"{registry.host}/team/app:v2")
    assert refused.error is not None
    assert refused.error.code == "unauthorized"
    encoded = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    with sqlite3.connect(served.daemon.paths.database) as database:
        rows = "\n".join(database.iterdump())
    operations = (await served.http.get("/v1/operations")).text
    state = "".join(map(_text, served.daemon.paths.state.rglob("*.json")))
    seen = caplog.text + repr(events) + repr(refused) + rows + operations + state
    assert not [secret for secret in (PASSWORD, encoded, "Bearer granted") if secret in seen]


def _text(path: Path) -> str:
    return path.read_text(errors="replace")


class Deaf:
    """Hears how a pull goes and keeps nothing."""

    def progress(self, current: int, total: int, detail: str = "") -> None:
        pass

    def note(self, text: str) -> None:
        pass


@pytest.mark.parametrize(
    ("insecure", "spoken"), [((), False), (("near.invalid",), False), (("far.invalid",), True)]
)
async def test_plain_http_is_spoken_only_where_it_is_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, insecure: tuple[str, ...], spoken: bool
) -> None:
    """The proxy is for plain http alone, and sees all that is sent without TLS."""
    with registries.serving() as proxy:
        monkeypatch.setenv("http_proxy", f"http://{proxy.host}")
        settings, store = (
            pull.Settings(insecure=insecure, limits=connections.Limits(attempts=1)),
            blobs.Blobs(tmp_path / "blobs"),
        )
        wanted = reference.parse("far.invalid/app")
        with pytest.raises(errors.BangerError):
            async with pull.opened(wanted, settings, store, Deaf()) as puller:
                await puller.digest()
        assert bool(proxy.asked) == spoken


async def test_tls_is_looked_for_where_the_port_of_plain_http_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy for each tells which of them was asked."""
    with registries.serving() as secured:
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        monkeypatch.setenv("https_proxy", f"http://{secured.host}")
        settings = pull.Settings(insecure=("far.invalid",), limits=connections.Limits(attempts=1))
        async with pull.opened(
            reference.parse("far.invalid/app"), settings, blobs.Blobs(tmp_path / "blobs"), Deaf()
        ) as puller:
            with pytest.raises(errors.UnavailableError, match=f"through the proxy http://{secured.host}"):
                await puller.digest()
