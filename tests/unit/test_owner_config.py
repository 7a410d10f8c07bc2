# SPDX-License-Identifier: MIT
"""config.toml and install.toml: every key, and what is wrong said with the file and the key."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from banger.contract import errors, names
from banger.owner import config, defaults, main
from banger.system import config_file

# Each key with a value that is not its default.
VALUES: dict[str, object] = {
    "image": "alpine",
    "kernel": "generic-6.12",
    "vcpus": 3,
    "memory_mib": 640,
    "disk_size_mib": 4096,
    "vms_memory_mib": 65536,
    "ipv6": True,
    "agent_deadline_s": 12.5,
    "agent_silence_s": 9.0,
    "flush_deadline_s": 3.0,
    "power_off_deadline_s": 2.0,
    "dns": ("192.0.2.53", "10.0.0.1"),
    "dns_listen": "127.0.0.2:5353",
    "dns_route": False,
    "dns_guests": False,
    "dns_upstream": ("192.0.2.53", "127.0.0.1:5353", "[2001:db8::1]:53"),
    "file_sync": (config.FileSync(source="~/.gitconfig", target=".config/git/config"),),
    "insecure_registries": ("registry.example:5000", "10.0.0.2"),
}
WRONG = [
    ("image = 1", "image: expected `str`, got `int`"),
    ("insecure_registries = ['a b']", "insecure_registries: 'a b' is not a host with or without a port"),
    ("image = ''", "image: expected `str` of length >= 1"),
    ("kernel = ['a']", "kernel: expected `str | null`, got `array`"),
    ("kernel = ''", "kernel: expected `str` of length >= 1"),
    ("vcpus = '2'", "vcpus: expected `int | null`, got `str`"),
    ("vcpus = true", "vcpus: expected `int | null`, got `bool`"),
    ("vcpus = 0", "vcpus: expected `int` >= 1"),
    ("vcpus = 33", "vcpus: expected `int` <= 32"),
    ("memory_mib = 1.5", "memory_mib: expected `int | null`, got `float`"),
    ("memory_mib = 63", "memory_mib: expected `int` >= 64"),
    ("memory_mib = 1048577", "memory_mib: expected `int` <= 1048576"),
    ("disk_size_mib = '8G'", "disk_size_mib: expected `int | null`, got `str`"),
    ("disk_size_mib = 15", "disk_size_mib: expected `int` >= 16"),
    ("disk_size_mib = 16777217", "disk_size_mib: expected `int` <= 16777216"),
    ("agent_deadline_s = '1m'", "agent_deadline_s: expected `float`, got `str`"),
    ("agent_deadline_s = 0", "agent_deadline_s: expected `float` > 0"),
    ("agent_deadline_s = nan", "agent_deadline_s: expected `float`"),
    ("flush_deadline_s = -1", "flush_deadline_s: expected `float` > 0"),
    ("flush_deadline_s = inf", "flush_deadline_s: expected `float` <= 3600"),
    ("power_off_deadline_s = 3601", "power_off_deadline_s: expected `float` <= 3600"),
    ("power_off_deadline_s = false", "power_off_deadline_s: expected `float`, got `bool`"),
    ("file_sync = [{source = '/etc/passwd'}]", "file_sync[0]: '/etc/passwd' is not a path below"),
    ("file_sync = [{source = '~/x', mode = 1}]", "file_sync[0]: object contains unknown field `mode`"),
    ("dns = '192.0.2.1'", "dns: expected `array`, got `str`"),
    ("dns = [1]", "dns[0]: expected `str`, got `int`"),
    ("dns = ['1.1.1.1', '1.1.1.2', '1.1.1.3', '1.1.1.4']", "dns: expected `array` of length <= 3"),
    ("dns = ['example.org']", "dns: 'example.org' is not an IPv4 address"),
    ("dns = ['192.0.2']", "dns: '192.0.2' is not an IPv4 address"),
    ("dns = ['192.0.2.256']", "dns: '192.0.2.256' is not an IPv4 address"),
    ("dns = ['192.0.2.1/24']", "dns: '192.0.2.1/24' is not an IPv4 address"),
    ("dns = ['192.0.2.1:53']", "dns: '192.0.2.1:53' is not an IPv4 address"),
    ("dns = ['2001:db8::1']", "dns: '2001:db8::1' is not an IPv4 address"),
    ("dns = ['127.0.0.53']", "dns: '127.0.0.53' would be the guest itself"),
    ("dns = ['0.0.0.0']", "dns: '0.0.0.0' is not the address of a host"),
    ("dns = ['224.0.0.1']", "dns: '224.0.0.1' is not the address of a host"),
    ("dns_listen = '127.0.0.1:0'", "dns_listen: '127.0.0.1:0' is not ADDRESS:PORT"),
    ("dns_listen = 'localhost:53'", "dns_listen: 'localhost:53' is not ADDRESS:PORT"),
    ("dns_listen = '0.0.0.0:53'", "dns_listen: '0.0.0.0:53' is not on the loopback"),
    ("dns_listen = '[::1]:53'", "dns_listen: '[::1]:53' is not on the loopback, 127.0.0.0/8"),
    ("dns_listen = false", "dns_listen: expected `str`, got `bool`"),
    ("dns_route = 1", "dns_route: expected `bool`, got `int`"),
    ("dns_guests = 'yes'", "dns_guests: expected `bool`, got `str`"),
    ("dns_upstream = ['dns.example']", "dns_upstream: 'dns.example' is not ADDRESS[:PORT]"),
    ("dns_upstream = ['1.1.1.1:x']", "dns_upstream: '1.1.1.1:x' is not ADDRESS[:PORT]"),
    ("dns = ['255.255.255.255']", "dns: '255.255.255.255' is not the address of a host"),
    ("vcpu = 1", "object contains unknown field `vcpu`"),
    ("[dns]\nserver = 'x'", "dns: expected `array`, got `object`"),
    ("vcpus = ", "it is not TOML: "),
    ("vcpus = 1\nvcpus = 2", "it is not TOML: "),
]
WRONG_INSTALLATION = [
    ("", "object missing required field `owner_uid`"),
    ("owner_uid = -1", "owner_uid: expected `int` >= 0"),
    ("owner_uid = 'dev'", "owner_uid: expected `int`, got `str`"),
    ("uid_count = 0", "uid_count: expected `int` >= 1"),
    ("uid_count = 4001", "uid_count: expected `int` <= 4000"),
    ("state_dir = 'banger'", "state_dir: expected `str` matching regex"),
    ("state_dir = ''", "state_dir: expected `str` matching regex"),
    ("helper_dir = 7", "helper_dir: expected `str`, got `int`"),
    ("network = 'home'", "network: 'home' is not an IPv4 network with its prefix"),
    ("network = 10", "network: expected `str`, got `int`"),
    ("network = '10.213.240.0/33'", "network: '10.213.240.0/33' is not an IPv4 network"),
    ("network = '10.213.240.1/20'", "has host bits set"),
    ("network = 'fd00::/64'", "network: 'fd00::/64' is not an IPv4 network"),
    ("network6 = '2001:db8::/64'", "network6: '2001:db8::/64' is not a /64 in fc00::/7"),
    ("network6 = 'fd00::/48'", "'fd00::/48' is not a /64 in fc00::/7"),
    ("network6 = '10.0.0.0/24'", "network6: '10.0.0.0/24' is not an IPv6 network"),
    ("network = '10.213.240.0'", "network: '10.213.240.0' is too small for 4000 VMs"),
    ("network = '10.213.240.0/21'", "network: '10.213.240.0/21' is too small for 4000 VMs"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.toml"


def _written(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, config.FileSync):
        return f"{{source = {value.source!r}, target = {value.target!r}}}"
    return repr(value)


def test_the_values_below_are_those_of_every_key() -> None:
    defaults = config.Config()
    assert set(VALUES) == set(config.Config.__struct_fields__)
    assert all(getattr(defaults, key) != value for key, value in VALUES.items())


@pytest.mark.parametrize("key", VALUES)
def test_a_key_is_read_alone(path: Path, key: str) -> None:
    path.write_text(f"{key} = {_written(VALUES[key])}\n")
    assert config.load(path) == msgspec.structs.replace(config.Config(), **{key: VALUES[key]})


def test_all_keys_together(path: Path) -> None:
    path.write_text("".join(f"{key} = {_written(value)}\n" for key, value in VALUES.items()))
    assert msgspec.structs.asdict(config.load(path)) == VALUES


def test_the_first_file_of_an_installation_sets_nothing_and_names_every_key(path: Path) -> None:
    first = config_file.text()
    path.write_text(first)
    assert config.load(path) == config.Config()
    path.write_text("\n".join(re.findall(r"^# (\w+ = .*)$", first, re.MULTILINE)))
    found = msgspec.structs.asdict(config.load(path))
    said = [line.partition(" = ")[0] for line in path.read_text().splitlines()]
    assert said == list(config.Config.__struct_fields__)
    assert all(found[key] == value for key, value in _defaults().items() if value not in (None, ()))


def _defaults() -> dict[str, object]:
    return msgspec.structs.asdict(config.Config())


def test_a_whole_number_of_seconds_is_fine(path: Path) -> None:
    path.write_text("agent_deadline_s = 90")
    assert config.load(path).limits.agent_s == 90


@pytest.mark.parametrize("text", [None, "", "# nothing\n"])
def test_nothing_configured_is_the_defaults(path: Path, text: str | None) -> None:
    if text is not None:
        path.write_text(text)
    assert config.load(path) == config.Config()


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_is_wrong_is_said_with_file_and_key(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(errors.BadRequestError) as caught:
        config.load(path)
    assert caught.value.message.startswith(f"{path}: {message}")
    assert "restart bangerd" in caught.value.hint


def test_bytes_that_are_no_text(path: Path) -> None:
    path.write_bytes(b"image = '\xff'")
    with pytest.raises(errors.BadRequestError, match="it is not TOML"):
        config.load(path)


def test_an_installation_as_it_is_written(path: Path) -> None:
    path.write_text(
        "owner_uid = 1000\nowner_name = 'dev'\nnetwork = '192.168.0.0/16'\nstate_dir = '/srv/b'\n"
    )
    found = config.load_installation(path)
    assert (found.owner_uid, found.state_dir, found.helper_dir) == (1000, "/srv/b", "/var/lib/banger-root")
    assert str(config.prefix(found)) == "192.168.0.0/16"


def test_a_small_network_suits_few_vms(path: Path) -> None:
    path.write_text("owner_uid = 1000\nuid_count = 13\nnetwork = '192.168.7.0/28'\n")
    found = config.load_installation(path)
    assert str(names.guest_address(config.prefix(found), found.uid_count)) == "192.168.7.14"


def test_no_installation_says_how_to_make_one(path: Path) -> None:
    with pytest.raises(errors.NotFoundError, match="does not exist") as caught:
        config.load_installation(path)
    assert "banger system install" in caught.value.hint


@pytest.mark.parametrize(("text", "message"), WRONG_INSTALLATION)
def test_a_wrong_installation_is_refused(path: Path, text: str, message: str) -> None:
    path.write_text(text if not text or text.startswith("owner_uid") else f"owner_uid = 1\n{text}")
    with pytest.raises(errors.BadRequestError) as caught:
        config.load_installation(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert message in caught.value.message


def test_check_config_prints_what_a_vm_gets_and_from_where(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = tmp_path / "config.toml"
    path.write_text('vcpus = 3\nkernel = "own"\nvms_memory_mib = 4096\n')
    assert main.main(["--check-config", f"--config={path}"]) == 0
    values = msgspec.json.decode(capfdbinary.readouterr().out)["values"]
    assert values["vcpus"] == {"value": 3, "source": "config"}
    assert values["kernel"] == {"value": "own", "source": "config"}
    assert values["image"] == {"value": "debian-bookworm", "source": "default"}
    assert values["vms_memory_mib"] == {"value": 4096, "source": "config"}
    assert values == msgspec.to_builtins(defaults.effective(config.load(path)))


def test_check_config_says_what_is_wrong(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    path = tmp_path / "config.toml"
    path.write_text("vcpu = 3\n")
    assert main.main(["--check-config", f"--config={path}"]) == 3
    error = msgspec.json.decode(capfdbinary.readouterr().out)["error"]
    assert "vcpu" in error["message"]
    assert error["hint"] == "correct the file, then restart bangerd"
