# SPDX-License-Identifier: MIT
"""Pulling from Debian's docker-registry what skopeo put there, and importing what skopeo wrote."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.contract import errors
from banger.images import blobs, bundle, connections, decompress, publish, pull, reference, sources
from tests import oci_make
from tests.fakes import registry as fake_registry
from tests.root import registry_server

LIMITS = connections.Limits(attempts=2, first_wait_s=0.05)
RUN = {"Entrypoint": ["/bin/app"], "Cmd": ["serve"], "Env": ["PATH=/bin", "A=1"], "WorkingDir": "/srv"}
BASE = oci_make.tar({"bin/app": os.urandom(9 << 20), "etc/a": b"a"})
TOP = oci_make.tar({"srv/b": b"b" * 100_000})


class Silent:
    def progress(self, current: int, total: int, detail: str = "") -> None:
        return

    def note(self, text: str) -> None:
        return


async def _pull(
    name: str,
    cache: Path,
    logins: tuple[Path, ...] = (),
    watch: pull.Watch | None = None,
    insecure: tuple[str, ...] = (),
) -> bundle.Bundle:
    store = blobs.Blobs(cache / "blobs", blobs.Tries(attempts=2, first_wait_s=0.05))
    settings = pull.Settings(login_files=logins, limits=LIMITS, insecure=insecure)
    opened = pull.opened(reference.parse(name), settings, store, watch or Silent())
    async with asyncio.timeout(50), opened as puller, puller.bundle("x86_64", await puller.digest()) as made:
        return made


def _tars(made: bundle.Bundle) -> list[bytes]:
    """What the layers hold, checked against what the configuration says they hold."""
    found = []
    for layer in made.layers:
        with decompress.opened(layer, max_bytes=1 << 30) as pieces:
            found.append(b"".join(pieces))
    return found


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images that share their base."""
    root = tmp_path_factory.mktemp("layout")
    oci_make.layout(root, "v1", [BASE, TOP], RUN)
    oci_make.layout(root, "v2", [BASE, oci_make.tar({"srv/b": b"other"})], RUN)
    oci_make.layout(root, "v3", [BASE, TOP], RUN, compression="zstd")
    return root


@pytest.fixture(scope="module")
def open_registry(
    tmp_path_factory: pytest.TempPathFactory, layout: Path
) -> Iterator[registry_server.Registry]:
    """Everybody may read."""
    with registry_server.registry(tmp_path_factory.mktemp("registry")) as made:
        made.push(layout, "v1", "team/app:v1")
        made.push(layout, "v2", "team/app:v2")
        yield made


async def test_a_certificate_must_be_vouched_for_unless_configured(
    layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls, certificate = registry_server.with_tls(tmp_path / "tls")
    with registry_server.registry(tmp_path / "registry", tls=tls) as made:
        made.push(layout, "v1", "team/app:v1")
        wanted = f"{made.host}/team/app:v1"
        with pytest.raises(errors.BangerError, match="certificate") as caught:
            await _pull(wanted, tmp_path / "refused")
        assert "insecure_registries" in caught.value.hint
        asked = await _pull(wanted, tmp_path / "insecure", insecure=(made.host,))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        connections._context.cache_clear()
        trusted = await _pull(wanted, tmp_path / "trusted")
        connections._context.cache_clear()
    assert _tars(asked) == _tars(trusted) == [BASE, TOP]


@pytest.mark.parametrize(
    ("name", "tag", "options", "compression"),
    [
        ("oci", "v1", (), bundle.Compression.GZIP),
        ("docker", "v1", ("--format", "v2s2"), bundle.Compression.GZIP),
        ("zstd", "v3", (), bundle.Compression.ZSTD),
    ],
)
async def test_what_skopeo_pushed_comes_back(
    open_registry: registry_server.Registry,
    layout: Path,
    tmp_path: Path,
    name: str,
    tag: str,
    options: tuple[str, ...],
    compression: bundle.Compression,
) -> None:
    open_registry.push(layout, tag, f"formats/{name}:v1", *options)
    made = await _pull(f"{open_registry.host}/formats/{name}:v1", tmp_path)
    assert _tars(made) == [BASE, TOP]
    assert {layer.compression for layer in made.layers} == {compression}
    assert made.run.argv == ("/bin/app", "serve")
    assert (made.run.env, made.run.working_dir) == (("PATH=/bin", "A=1"), "/srv")
    again = await _pull(f"{open_registry.host}/formats/{name}@{made.digest}", tmp_path)
    assert again.layers == made.layers


async def test_a_tag_that_is_not_there(open_registry: registry_server.Registry, tmp_path: Path) -> None:
    with pytest.raises(errors.NotFoundError, match=r"has no .*team/app:v9"):
        await _pull(f"{open_registry.host}/team/app:v9", tmp_path)


def _log_in(host: str, path: Path) -> Path:
    argv = ["skopeo", "login", "--authfile", str(path), "--tls-verify=false", "-u", registry_server.USER]
    subprocess.run(
        [*argv, "--password-stdin", host],
        input=registry_server.PASSWORD,
        text=True,
        check=True,
        capture_output=True,
        timeout=60,
    )
    return path


async def test_a_registry_with_passwords_takes_the_login_of_skopeo(tmp_path: Path, layout: Path) -> None:
    root = tmp_path / "registry"
    with registry_server.registry(root, registry_server.with_passwords(root)) as made:
        made.push(layout, "v1", "team/app:v1")
        name = f"{made.host}/team/app:v1"
        with pytest.raises(errors.UnauthorizedError, match="wants a login"):
            await _pull(name, tmp_path)
        login = _log_in(made.host, tmp_path / "auth.json")
        assert _tars(await _pull(name, tmp_path, (login,))) == [BASE, TOP]


async def test_a_registry_with_tokens_takes_the_login_of_skopeo(tmp_path: Path, layout: Path) -> None:
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(registry_server.tokens(tmp_path / "tokens"))
        made = stack.enter_context(registry_server.registry(tmp_path / "registry", service.auth))
        made.push(layout, "v1", "team/app:v1")
        login = tmp_path / "auth.json"
        login.write_text(json.dumps({"auths": {made.host: {"auth": _basic()}}}))
        service.asked.clear()
        assert _tars(await _pull(f"{made.host}/team/app:v1", tmp_path, (login,))) == [BASE, TOP]
        assert len(service.asked) == 1
        with pytest.raises(errors.UnauthorizedError, match="wants a login"):
            await _pull(f"{made.host}/team/app:v1", tmp_path / "other")


def _basic() -> str:
    return base64.b64encode(f"{registry_server.USER}:{registry_server.PASSWORD}".encode()).decode()


def _sizes(directory: Path) -> list[int]:
    return [path.stat().st_size for path in directory.iterdir()]


async def test_a_registry_killed_in_mid_layer_is_resumed(tmp_path: Path, layout: Path) -> None:
    size = len(oci_make.compressed(BASE))
    with registry_server.registry(tmp_path / "registry") as made, registry_server.line(made) as line:
        made.push(layout, "v1", "team/app:v1")
        line.limit, line.at_limit = size // 2, made.kill
        with pytest.raises(errors.BangerError) as caught:
            await _pull(f"{line.host}/team/app:v1", tmp_path)
        assert caught.value.code in ("unavailable", "timed_out")
        assert max(_sizes(tmp_path / "blobs" / "partial")) > size // 4
        before = line.received
        made.start()
        assert _tars(await _pull(f"{line.host}/team/app:v1", tmp_path)) == [BASE, TOP]
        # All but what lay in buffers when it was killed came once.
        assert before + (line.received - before) < 1.35 * size
        assert line.received - before < 0.85 * size


async def test_images_that_share_a_layer_cost_it_once(
    open_registry: registry_server.Registry, tmp_path: Path
) -> None:
    with registry_server.line(open_registry) as line:
        await _pull(f"{line.host}/team/app:v1", tmp_path)
        before = line.received
        await _pull(f"{line.host}/team/app:v2", tmp_path)
        assert line.received - before < 20_000


# --- disk full ---


def _files(root: Path) -> list[str]:
    return [path.name for path in root.rglob("*") if path.is_file()]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A memory file system of 12 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(path)], check=True, timeout=20)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True, timeout=20)


async def test_a_disk_that_is_too_small_is_seen_before(
    open_registry: registry_server.Registry, small_disk: Path
) -> None:
    with pytest.raises(errors.NoSpaceError, match="the layers need"):
        await _pull(f"{open_registry.host}/team/app:v1", small_disk)
    assert _files(small_disk) == []


async def test_a_disk_that_fills_up_meanwhile_is_not_left_full(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "_RESERVE_BYTES", 0)
    layer = os.urandom(8 << 20)

    def fill(handler: fake_registry._Handler) -> bool:
        if oci_make.digest(layer) in handler.path:
            (small_disk / "filler").write_bytes(bytes(7 << 20))
        return False

    with fake_registry.serving() as registry:
        registry.add_image("v1", layer)
        registry.faults.append(fill)
        with pytest.raises(errors.NoSpaceError, match="no space left for a layer") as caught:
            await _pull(f"{registry.host}/team/app:v1", small_disk)
        assert "prune" in caught.value.hint
        assert _files(small_disk) == ["filler"]
        registry.faults.clear()
        os.unlink(small_disk / "filler")
        made = await _pull(f"{registry.host}/team/app:v1", small_disk)
        assert made.layers[0].path.read_bytes() == layer


# --- import ---


def _saved(layout: Path, kind: str, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    name = f"{target}:team/app:v1" if kind == "docker-archive" else f"{target}:v1"
    subprocess.run(["skopeo", "copy", "-q", f"oci:{layout}:v1", f"{kind}:{name}"], check=True, timeout=60)
    return target


@pytest.mark.parametrize("kind", ["docker-archive", "oci-archive", "oci"])
@pytest.mark.parametrize("compressed", [False, True])
def test_what_skopeo_wrote_is_read(layout: Path, tmp_path: Path, kind: str, compressed: bool) -> None:
    path = _saved(layout, kind, tmp_path / "saved")
    if compressed and path.is_file():
        path = tmp_path / "saved.gz"
        path.write_bytes(gzip.compress((tmp_path / "saved").read_bytes(), 1))
    with sources.opened(path, arch="x86_64", scratch=tmp_path / "scratch") as made:
        assert _tars(made) == [BASE, TOP]
        assert made.run.argv == ("/bin/app", "serve")
        assert made.reference == ("docker.io/team/app:v1" if kind == "docker-archive" else "")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_file_of_somebody_else_says_so(layout: Path, tmp_path: Path) -> None:
    path = tmp_path / "secret.tar"
    path.write_bytes(BASE[:10240])
    path.chmod(0o600)
    opened = sources.opened(path, arch="x86_64", scratch=Path("/tmp"))
    with _as_nobody(), pytest.raises(errors.UnauthorizedError, match="may not read") as caught, opened:
        pass
    assert "chmod" in caught.value.hint
    with _as_nobody(), pytest.raises(errors.UnauthorizedError, match=f"may not read {path}"):
        publish.copy_sparse(path, tmp_path / "copied")


@contextlib.contextmanager
def _as_nobody() -> Iterator[None]:
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
