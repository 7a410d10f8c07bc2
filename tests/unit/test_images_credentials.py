# SPDX-License-Identifier: MIT
"""Logins to registries from docker's and podman's files and helpers; secrets that do not show themselves."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest

from banger import run
from banger.contract import errors
from banger.images import authorization, credentials, reference

SECRET = "hunter2-but-longer"  # noqa: S105


def _auth(text: str) -> dict[str, str]:
    return {"auth": base64.b64encode(text.encode()).decode()}


def _find(tmp_path: Path, document: Any, name: str = "ghcr.io/team/app") -> credentials.Login | None:
    path = tmp_path / "config.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return credentials.Store((path,)).find(reference.parse(name))


@pytest.mark.parametrize(
    ("key", "name", "found"),
    [
        ("ghcr.io", "ghcr.io/team/app", True),
        ("https://ghcr.io", "ghcr.io/team/app", True),
        ("https://ghcr.io/v2/", "ghcr.io/team/app", True),
        ("ghcr.io/team", "ghcr.io/team/app", True),
        ("ghcr.io/tea", "ghcr.io/team/app", False),
        ("ghcr.io", "ghcr.io:5000/team/app", False),
        ("ghcr.io.evil.example", "ghcr.io/team/app", False),
        ("https://index.docker.io/v1/", "debian", True),
        ("docker.io", "debian", True),
        ("docker.io", "ghcr.io/debian", False),
    ],
)
def test_a_login_is_for_its_registry_alone(tmp_path: Path, key: str, name: str, found: bool) -> None:
    login = _find(tmp_path, {"auths": {key: _auth(f"me:{SECRET}")}}, name)
    assert (login is not None) is found
    if login is not None:
        assert (login.user, login.secret.reveal()) == ("me", SECRET)


def test_the_more_particular_login_wins(tmp_path: Path) -> None:
    auths = {"ghcr.io": _auth("all:x"), "ghcr.io/team": _auth("team:x"), "ghcr.io/team/app": _auth("app:x")}
    login = _find(tmp_path, {"auths": auths})
    assert login is not None
    assert login.user == "app"


def test_the_first_file_that_knows_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text(json.dumps({"auths": {"quay.io": _auth("no:x")}}))
    second.write_text(json.dumps({"auths": {"ghcr.io": _auth("yes:x")}}))
    login = credentials.Store((tmp_path / "absent", first, second)).find(reference.parse("ghcr.io/a"))
    assert login is not None
    assert (login.user, login.origin) == ("yes", str(second))


def test_files_are_podmans_then_dockers() -> None:
    files = credentials.default_files({}, Path("/home/dev"), 1000)
    assert [str(path) for path in files] == [
        "/run/user/1000/containers/auth.json",
        "/home/dev/.config/containers/auth.json",
        "/home/dev/.docker/config.json",
    ]


@pytest.mark.parametrize("text", ["{", '{"auths": []}', f'{{"auths": {{"ghcr.io": "{SECRET}"}}}}'])
def test_a_broken_file_is_named_and_not_quoted(tmp_path: Path, text: str) -> None:
    with pytest.raises(errors.BadRequestError, match=r"config\.json") as caught:
        _find(tmp_path, text)
    assert SECRET not in repr(errors.to_body(caught.value))
    assert caught.value.__cause__ is None


def test_a_broken_login_is_not_quoted(tmp_path: Path) -> None:
    with pytest.raises(errors.BadRequestError, match="cannot be read") as caught:
        _find(tmp_path, {"auths": {"ghcr.io": {"auth": f"!!{SECRET}"}}})
    assert SECRET not in str(caught.value)


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A credential helper on the search path; it keeps its arguments and its stdin."""
    program = tmp_path / "docker-credential-tests"
    program.write_text(
        f"""#!/bin/sh
echo "$@" > {tmp_path}/argv
cat > {tmp_path}/stdin
case $(cat {tmp_path}/stdin) in
  ghcr.io) echo '{{"ServerURL":"x","Username":"me","Secret":"{SECRET}"}}' ;;
  token.example) echo '{{"Username":"<token>","Secret":"{SECRET}"}}' ;;
  broken.example) echo '{SECRET}' ;;
  *) echo 'credentials not found in native keychain'; exit 1 ;;
esac
"""
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(run, "SEARCH_PATH", f"{tmp_path}:{run.SEARCH_PATH}")
    return tmp_path


def test_a_helper_is_asked_on_its_stdin(helper: Path) -> None:
    login = _find(helper, {"credHelpers": {"ghcr.io": "tests"}})
    assert login is not None
    assert (login.user, login.secret.reveal(), login.origin) == ("me", SECRET, "docker-credential-tests")
    assert (helper / "argv").read_text() == "get\n"
    assert (helper / "stdin").read_text() == "ghcr.io"


def test_a_store_serves_every_registry(helper: Path) -> None:
    assert _find(helper, {"credsStore": "tests", "auths": {"ghcr.io": {}}}) is not None
    assert _find(helper, {"credsStore": "tests"}, "quay.io/a/b") is None
    token = _find(helper, {"credsStore": "tests"}, "token.example/a")
    assert token is not None
    assert token.is_token


def test_a_helper_that_talks_nonsense_is_not_quoted(helper: Path) -> None:
    with pytest.raises(errors.UnauthorizedError, match="no login") as caught:
        _find(helper, {"credsStore": "tests"}, "broken.example/a")
    assert SECRET not in repr(errors.to_body(caught.value))


@pytest.mark.parametrize("name", ["../../bin/sh", "a b", "-x", "", "a/b", "x" * 80, "a;b"])
def test_a_helper_is_a_plain_name(tmp_path: Path, name: str) -> None:
    document = {"credHelpers": {"ghcr.io": name}}
    if not name:
        assert _find(tmp_path, document) is None
        return
    with pytest.raises(errors.BadRequestError, match="not the name of a credential helper"):
        _find(tmp_path, document)


def test_a_missing_helper_says_so(tmp_path: Path) -> None:
    with pytest.raises(errors.MissingToolError, match="docker-credential-nowhere"):
        _find(tmp_path, {"credHelpers": {"ghcr.io": "nowhere"}})


def test_a_secret_does_not_show_itself() -> None:
    login = credentials.Login("me", credentials.Secret(SECRET), "file")
    shown = [repr(login), str(login), f"{login.secret}", f"{login.secret:>30}", repr({"x": [login]})]
    assert not [text for text in shown if SECRET in text]
    with pytest.raises(TypeError):
        pickle.dumps(login.secret)
    with pytest.raises(TypeError):
        copy.copy(login.secret)


@pytest.mark.parametrize(
    ("header", "schemes"),
    [
        ("", []),
        ('Basic realm="x"', [("basic", {"realm": "x"})]),
        ("Basic realm=x", [("basic", {"realm": "x"})]),
        (
            'Bearer realm="https://a/t",service="s",scope="repository:a/b:pull,push"',
            [("bearer", {"realm": "https://a/t", "service": "s", "scope": "repository:a/b:pull,push"})],
        ),
        (
            'Basic realm="a, b", Bearer realm="c\\"d"',
            [("basic", {"realm": "a, b"}), ("bearer", {"realm": 'c"d'})],
        ),
        ("Negotiate", [("negotiate", {})]),
        ('Negotiate, NTLM, Basic realm="x"', [("negotiate", {}), ("ntlm", {}), ("basic", {"realm": "x"})]),
        ('Negotiate YWI=, Bearer realm="x"', [("negotiate", {}), ("bearer", {"realm": "x"})]),
        (
            'Negotiate YWI==,NTLM, Basic realm="x"',
            [("negotiate", {}), ("ntlm", {}), ("basic", {"realm": "x"})],
        ),
        ('BEARER   Realm = "x" ,  service = y', [("bearer", {"realm": "x", "service": "y"})]),
        ("====", []),
    ],
)
def test_challenges_are_read(header: str, schemes: list[tuple[str, dict[str, str]]]) -> None:
    assert [(each.scheme, dict(each.parameters)) for each in authorization.challenges(header)] == schemes
