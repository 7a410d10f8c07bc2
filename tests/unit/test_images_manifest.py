# SPDX-License-Identifier: MIT
"""Manifests, indexes and configurations of both families; anything else is refused, never a crash."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.contract import errors
from banger.images import manifest

SHA = "sha256:" + "ab" * 32
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"


def _layer(kind: str = GZIP, size: int = 5, digest: str = SHA) -> dict[str, Any]:
    return {"mediaType": kind, "digest": digest, "size": size}


def _manifest(**changes: Any) -> bytes:
    config = {"mediaType": OCI_CONFIG, "digest": SHA, "size": 2}
    return json.dumps({"schemaVersion": 2, "config": config, "layers": [_layer()], **changes}).encode()


def _config(**changes: Any) -> bytes:
    whole = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [SHA]}}
    return json.dumps({**whole, **changes}).encode()


@pytest.mark.parametrize("media_type", ["", manifest.OCI_MANIFEST, manifest.DOCKER_MANIFEST])
def test_both_families_are_read(media_type: str) -> None:
    docker = "application/vnd.docker.image.rootfs.diff.tar.gzip"
    found = manifest.parse(_manifest(layers=[_layer(), _layer(docker)]), media_type)
    assert isinstance(found, manifest.Manifest)
    assert [layer.size for layer in found.layers] == [5, 5]
    assert found.layers_bytes == 5


@pytest.mark.parametrize("kind", ["application/octet-stream", "application/json", "text/html", ""])
def test_an_image_whose_configuration_an_old_registry_called_otherwise_is_one(kind: str) -> None:
    found = manifest.parse(_manifest(config={"mediaType": kind, "digest": SHA, "size": 2}))
    assert isinstance(found, manifest.Manifest)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "cannot be read"),
        (b"[]", "cannot be read"),
        (b"{}", "neither"),
        (b"[" * 100_000, "cannot be read"),
        (b" " * (manifest.MAX_DOCUMENT_BYTES + 1), "larger than 4 MiB"),
        (b'{"schemaVersion": 1, "fsLayers": []}', "schema 1"),
        (_manifest(layers=None), "neither"),
        (_manifest(manifests=[]), "neither"),
        (_manifest(mediaType="text/html"), "not an image"),
        (_manifest(mediaType=manifest.OCI_INDEX), "not an image"),
        (_manifest(layers=[_layer(digest="sha256:12")]), "not a digest"),
        (_manifest(layers=[_layer(digest="../../x")]), "not a digest"),
        (_manifest(layers=[_layer(size=-1)]), "cannot be read"),
        (_manifest(layers=[_layer(size=1 << 50)]), "cannot be read"),
        (_manifest(layers=[_layer()] * (manifest.MAX_LAYERS + 1)), "cannot be read"),
        (_manifest(layers=[_layer("application/x-helm")]), "unknown kind"),
        (
            _manifest(layers=[_layer("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")]),
            "not in its registry",
        ),
        (_manifest(layers=[_layer(GZIP + "+encrypted")]), "encrypted"),
        (_manifest(config={"mediaType": "application/x", "digest": SHA, "size": 1}), "something else"),
    ],
)
def test_what_is_no_image_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(errors.BadRequestError, match=why):
        manifest.parse(data)


@pytest.mark.parametrize(
    ("platforms", "arch", "chosen"),
    [
        (["linux/arm64", "linux/amd64"], "x86_64", 1),
        (["linux/arm64", "linux/amd64"], "aarch64", 0),
        (["linux/arm/v7", "linux/arm64/v8"], "aarch64", 1),
        (["linux/amd64/v3", "linux/amd64"], "x86_64", 1),
        (["windows/amd64", "linux/amd64"], "x86_64", 1),
        (["linux/amd64", "linux/amd64"], "x86_64", 0),
    ],
)
def test_the_platform_of_the_host_is_chosen(platforms: list[str], arch: str, chosen: int) -> None:
    entries = []
    for number, platform in enumerate(platforms):
        system, architecture, *variant = platform.split("/")
        entries.append(
            manifest.Descriptor(
                digest=f"sha256:{number:064x}",
                size=1,
                platform=manifest.Platform(architecture, system, "".join(variant)),
            )
        )
    assert manifest.Index(tuple(entries)).choose(arch).digest == f"sha256:{chosen:064x}"


def test_a_configuration_says_what_to_run() -> None:
    run: dict[str, Any] = {
        "Entrypoint": ["/e"],
        "Cmd": ["c"],
        "Env": ["A=b", "=x"],
        "WorkingDir": "/w",
        "User": "u:g",
    }
    run |= {"ExposedPorts": {"80/tcp": {}}, "StopSignal": "SIGINT", "Labels": {"a": "b"}, "OnBuild": None}
    found = manifest.parse_config(_config(config=run), layers=1, arch="x86_64")
    assert found.run.argv == ("/e", "c")
    assert (found.run.env, found.run.working_dir, found.run.user) == (("A=b",), "/w", "u:g")
    assert (found.run.exposed_ports, found.run.stop_signal) == (("80/tcp",), "SIGINT")
    nothing = manifest.parse_config(_config(config={"Cmd": None}), layers=1, arch="x86_64")
    assert nothing.run.argv == ()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (_config(architecture="s390x"), "the image is for linux/s390x"),
        (_config(os="windows"), "the image is for windows/amd64"),
        (_config(rootfs={"diff_ids": []}), "1 layers"),
        (_config(rootfs={"diff_ids": ["x"]}), "not a digest"),
        (_config(config={"Cmd": ["a\0b"]}), "NUL"),
        (_config(config={"Cmd": "sh"}), "cannot be read"),
        (b"nonsense", "cannot be read"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(errors.BadRequestError, match=why):
        manifest.parse_config(data, layers=1, arch="x86_64")


_NAMES = (
    *("schemaVersion", "mediaType", "config", "layers", "manifests", "digest", "size", "platform", "os"),
    *("architecture", "rootfs", "diff_ids", "Cmd", "Env", "Entrypoint", "annotations"),
)
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([SHA, GZIP, OCI_CONFIG, manifest.OCI_INDEX, "", "linux", "amd64"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(_NAMES),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(_JSON)
def test_any_document_is_read_or_refused(document: object) -> None:
    data = json.dumps(document).encode()
    for read in (manifest.parse, lambda data: manifest.parse_config(data, layers=1, arch="x86_64")):
        with contextlib.suppress(errors.BangerError):
            read(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with pytest.raises(errors.BadRequestError):
        manifest.parse(data)
