# SPDX-License-Identifier: MIT
"""References by the distribution grammar, and what is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from banger.contract import errors
from banger.images import reference

SHA = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "full", "familiar"),
    [
        ("debian", "docker.io/library/debian:latest", "debian:latest"),
        ("debian:bookworm", "docker.io/library/debian:bookworm", "debian:bookworm"),
        ("docker.io/debian:12", "docker.io/library/debian:12", "debian:12"),
        ("index.docker.io/a/b", "docker.io/a/b:latest", "a/b:latest"),
        ("team/app:v1", "docker.io/team/app:v1", "team/app:v1"),
        (f"app@{SHA}", f"docker.io/library/app@{SHA}", f"app@{SHA}"),
        (f"app:v1@{SHA}", f"docker.io/library/app:v1@{SHA}", f"app:v1@{SHA}"),
        ("ghcr.io/a/b/c:1", "ghcr.io/a/b/c:1", "ghcr.io/a/b/c:1"),
        ("localhost/app", "localhost/app:latest", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest", "localhost:5000/app:latest"),
        ("127.0.0.1:5000/a", "127.0.0.1:5000/a:latest", "127.0.0.1:5000/a:latest"),
        ("[::1]:5000/a:b", "[::1]:5000/a:b", "[::1]:5000/a:b"),
        ("Registry/app", "Registry/app:latest", "Registry/app:latest"),
        ("x/a.b_c__d---e:T.-_", "docker.io/x/a.b_c__d---e:T.-_", "x/a.b_c__d---e:T.-_"),
    ],
)
def test_references_have_one_full_form(text: str, full: str, familiar: str) -> None:
    found = reference.parse(text)
    assert (str(found), found.familiar) == (full, familiar)
    assert reference.parse(full) == found
    assert reference.parse(familiar) == found


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a name"),
        ("Debian", "lower case"),
        ("debian:", "not a tag"),
        ("debian:-x", "not a tag"),
        ("debian:" + "x" * 129, "not a tag"),
        ("a//b", "not a name"),
        ("/a", "not a name"),
        ("a/", "not a name"),
        ("a..b/../c", "not a"),
        ("../etc/passwd", "not a"),
        ("a___b", "not a name"),
        ("a@sha256:12", "not a digest"),
        (f"a@{SHA.upper()}", "not a digest"),
        ("a@md5:" + "0" * 32, "not a digest"),
        (f"a@{SHA}@{SHA}", "not a digest"),
        ("host:99999/a", "not a port"),
        ("host:0/a", "not a port"),
        ("[::zz]/a", "not a host"),
        ("[1.2.3.4]:1/a", "IPv6"),
        ("-bad.example/a", "not a host"),
        ("user@host.example/a", "not a digest"),
        ("a b", "not a name"),
        ("a\n", "not a name"),
        ("a:b\n", "not a tag"),
        ("ä", "ASCII"),
        ("a" * 300, "longer than 255"),
        ("x" * 9000, "too long"),
    ],
)
def test_what_is_no_reference_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(errors.BadRequestError, match=re.escape(why)):
        reference.parse(text)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("localhost:5000", True),
        ("127.9.9.9", True),
        ("[::1]:80", True),
        ("localhost.example.org", False),
        ("128.0.0.1", False),
        ("127.0.0.1.example.org", False),
        ("docker.io", False),
    ],
)
def test_loopback_is_an_address_not_a_prefix(host: str, loopback: bool) -> None:
    assert reference.is_loopback(host) is loopback


_PART = st.from_regex(r"[a-z0-9]{1,8}((\.|_|__|-{1,3})[a-z0-9]{1,4}){0,2}", fullmatch=True)
_HOSTS = st.sampled_from(["", "ghcr.io/", "localhost:5000/", "[fe80::1]/", "docker.io/"])
_TAGS = st.sampled_from(["", ":v1", ":A.b-c_d"])


@given(_HOSTS, st.lists(_PART, min_size=1, max_size=4), _TAGS, st.sampled_from(["", f"@{SHA}"]))
def test_what_is_made_by_the_grammar_is_read_and_written_alike(
    host: str, parts: list[str], tag: str, digest: str
) -> None:
    assume(host or "." not in parts[0])  # that would be a host
    found = reference.parse(host + "/".join(parts) + tag + digest)
    assert reference.parse(str(found)) == found
    assert reference.parse(found.familiar) == found


@given(st.text(alphabet="ab.:/@-_[]0A\n\0%", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = reference.parse(text)
    except errors.BadRequestError:
        return
    assert reference.parse(str(found)) == found
    assert not set(str(found)) & set("\n\0 %")
