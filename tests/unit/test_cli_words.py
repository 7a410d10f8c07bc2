# SPDX-License-Identifier: MIT
"""What users type: words of other programs, times, and what ends a command of `banger system`."""

from __future__ import annotations

import asyncio
import itertools
import os
import pathlib
import signal

import click
import pytest

from banger.cli import command, foreign, main, params
from banger.system import alone, install


def found(*words: str) -> click.Command:
    """The command of this path."""
    here: click.Command = main.root
    for word in words:
        assert isinstance(here, click.Group)
        meant = here.get_command(click.Context(here), word)
        assert meant is not None
        here = meant
    return here


@pytest.mark.parametrize(
    ("group", "alias"),
    [
        *itertools.product(["vm", "image", "kernel"], ["rm", "ls"]),
        ("vm", "inspect"),
        ("image", "inspect"),
        ("vm", "shell"),
        ("vm", "copy"),
        ("vm", "port"),
        ("vm", "ps"),
        ("vm", "top"),
        ("vm", "info"),
    ],
)
def test_what_others_call_the_same_is_known_and_not_shown(group: str, alias: str) -> None:
    nouns = found(group)
    assert isinstance(nouns, click.Group)
    context = click.Context(nouns)
    name, meant, rest = nouns.resolve_command(context, [alias, "x"])
    assert (name, rest) == (command.ALIASES[alias], ["x"])
    assert meant is found(group, command.ALIASES[alias])
    assert alias not in nouns.list_commands(context)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (("vm", "delete"), ["-f", "web"]),
        (("image", "delete"), ["-f", "old"]),
        (("kernel", "delete"), ["-f", "old"]),
        (("vm", "list"), ["-a"]),
        (("image", "list"), ["-a"]),
        (("vm", "cp"), ["-r", "site", "web:/srv"]),
    ],
)
def test_an_option_that_others_need_is_taken_and_not_shown(
    words: tuple[str, ...], arguments: list[str]
) -> None:
    shown = found(*words).make_context(words[-1], list(arguments)).get_help()
    assert arguments[0] not in shown.replace(",", " ").split()


@pytest.mark.parametrize(
    ("word", "verb"), [("run", "run"), ("exec", "exec"), ("ssh", "ssh"), ("ls", "list"), ("rm", "delete")]
)
def test_who_leaves_out_vm_is_told(word: str, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([word, "x"]) == 2
    assert f"it is `banger vm {verb}`" in capsys.readouterr().err


@pytest.mark.parametrize(("word", "verb"), [("images", "list"), ("pull", "pull"), ("build", "build")])
def test_who_leaves_out_image_is_told(word: str, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([word, "x"]) == 2
    assert f"it is `banger image {verb}`" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["-v", "--volume", "--mount"])
def test_who_wants_to_share_a_directory_is_told_what_there_is(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["vm", "run", option, ".:/work"]) == 2
    assert "share no directory with this host: `banger vm run PATH`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vm", "pause", "web"], "`banger vm stop` keeps its disks"),
        (["vm", "status", "web"], "`banger vm list` shows all"),
        (["vm", "rename", "web", "shop"], "`banger vm set old --name new`"),
        (["vm", "clone", "web"], "belongs into an image"),
        (["status"], "`banger system status`"),
        (["network", "ls"], "`--network NAME`"),
        (["image", "tag", "a", "b"], "`banger image promote IMAGE --name NAME`"),
        (["image", "build", "."], "docker save app"),
        (["vm", "create", "--cpus", "2"], "it is `--vcpu`"),
        (["vm", "set", "web", "-m", "2G"], "it is `--memory`"),
        (["vm", "create", "--rm"], "`banger vm run --rm`"),
        (["vm", "stop", "--all"], "stop $(banger vm list -q)"),
        (["vm", "stop", "--force", "web"], "`banger vm kill` ends"),
        (["vm", "restart", "-f", "web"], "`banger vm kill` ends"),
        (["vm", "stop", "--timeout", "9", "web"], "`power_off_deadline_s`"),
        (["vm", "start", "--timeout", "300", "web"], "`agent_deadline_s`"),
        (["vm", "create", "--wait"], "`agent_deadline_s`"),
        (["vm", "run", "--gpus", "all"], "no device of this host"),
    ],
)
def test_what_is_called_otherwise_or_not_done_is_said_and_nothing_guessed(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By spelling the next to `pause` is `prune`, and to `top` it is `stop`."""
    assert main.run(words) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "Did you mean" not in shown


def test_a_foreign_word_is_none_of_ours() -> None:
    """That each line of it can be typed, tests/contract/test_documents.py looks."""
    for group, theirs in foreign.COMMANDS.items():
        nouns = main.root if group == "banger" else found(group)
        assert isinstance(nouns, click.Group)
        assert not theirs.keys() & {*nouns.list_commands(click.Context(nouns))}


@pytest.mark.parametrize("words", [["help", "vm", "run"], ["vm", "help", "run"]])
def test_help_is_a_word_too(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(words) == 0
    assert capsys.readouterr().out.startswith("Usage: banger vm run ")
    assert main.run(words[:-1]) == 0
    assert capsys.readouterr().out.startswith("Usage: banger vm [OPTIONS] COMMAND")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--rm", "ls", "-la"], "`banger vm run --rm -- ls -la`"),
        (["--name", "q", "-e", "A=1", "make", "-j4"], "`banger vm run --name q -e A=1 -- make -j4`"),
        ([".", "make", "-j4"], "`banger vm run . -- make -j4`"),
        (["--privileged", "ls"], "'--privileged'.\n"),
    ],
)
def test_a_command_without_its_dashes_keeps_what_was_ours(
    given: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["vm", "run", *given]) == 2
    assert meant in capsys.readouterr().err


def test_the_help_that_is_named_is_the_command_s_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["vm", "set", "web", "--nat"]) == 2
    assert "`banger vm set --help`" in capsys.readouterr().err


def test_a_choice_that_is_missing_is_listed_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["completion"]) == 2
    assert "Choose from: bash, zsh, fish\n" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--ttl", "--idle-stop"])
def test_a_limit_of_no_time_is_told_how_to_have_none(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["vm", "create", option, "0"]) == 2
    assert "1h30m or 7d; or off\n" in capsys.readouterr().err
    assert main.run(["vm", "exec", "--timeout", "0", "web"]) == 2
    assert "1h30m or 7d\n" in capsys.readouterr().err


def test_a_name_that_none_can_have_is_said_in_english(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["kernel", "show", "NOPE"]) == 2
    assert "'NOPE' is not a name for a kernel: use" in capsys.readouterr().err
    assert main.run(["vm", "create", "web", "--network", "a.b"]) == 2
    assert "'a.b' is not a network's name: use" in capsys.readouterr().err


@pytest.mark.parametrize("group", ["image", "kernel", "vm workspace", "system", "runtime"])
def test_on_a_narrow_terminal_no_summary_of_a_command_is_cut(
    group: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert main.run([*group.split(), "--help"]) == 0
    shown = capsys.readouterr().out.partition("Commands:")[2]
    assert shown
    assert "..." not in shown


def test_other_words_are_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["rnu"], ["system", "rm"], ["runtime", "ls"]):
        assert main.run(words) == 2
        assert "No such command" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "image"), [("alpine:3.20", True), ("alpine", True), ("/nonexistent", False)]
)
def test_words_that_are_no_directory_are_a_command_or_an_image(
    word: str, image: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["vm", "run", word]) == 2
    said = capsys.readouterr().err
    assert f"banger vm run -- {word}" in said
    assert (f"banger vm run --image {word}`" in said) is image
    assert main.run(["vm", "run", "-it", "--rm", word, "ls", "a b"]) == 2
    said = capsys.readouterr().err
    assert f"banger vm run --rm -- {word} ls 'a b'`" in said
    assert (f"banger vm run --rm --image {word} -- ls 'a b'`" in said) is image
    assert main.run(["vm", "run", "--rm", "--image", "debian", word]) == 2
    assert f"before it: `banger vm run --rm --image debian -- {word}`" in capsys.readouterr().err
    for address in ("https://example.org/team/app", "git@example.org:team/app"):
        assert main.run(["vm", "run", address]) == 2
        assert "`git clone` it first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("1.5h", 5400), (".5m", 30), ("1h30m", 5400), ("1d2h3m4s", 93_784)],
)
def test_times_parse(text: str, seconds: float) -> None:
    assert params.SPAN.convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "0", "h", "1h30", "1 h", "-5m", "1e3", "1x", "1..5h", "1h" * 5, "٣h"])
def test_times_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="not a time"):
        params.SPAN.convert(text, None, None)


@pytest.mark.parametrize(
    ("words", "pattern"), [(["list", "web*"], "'web*'"), (["delete", "db", "[ab]?"], "'[ab]?'")]
)
def test_a_pattern_in_the_place_of_a_name_is_told_where_one_is_taken(
    words: list[str], pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["vm", *words]) == 2
    assert f"a pattern, and no VM's name: `banger vm list --name {pattern}`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vm", "set", "web", "--allow-nothing", "--allow", "10.0.0.0/8"], "exclude each other"),
        (["vm", "run", "--from", "a", "--include-untracked", "."], "exclude each other"),
        (["vm", "run", "--mode", "full-copy"], "these options are for a repository"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BANGER_SOCKET", "/nonexistent")
    assert main.run(words) != 0
    assert said in capsys.readouterr().err


def test_of_what_excludes_each_other_none_is_done(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for chosen in (["--install", "--uninstall"], ["--uninstall", "--install"], ["--stdout", "--install"]):
        assert main.run(["ssh-config", *chosen]) == 2
        assert "exclude each other\n  hint: see `banger ssh-config --help`" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-it", "sh", "-c", "a b"], "before the command: `banger vm exec -it web sh -c 'a b'`"),
        (["-i", "-t"], "before the command: `banger vm exec -i -t web`"),
        (["--timeout", "5", "sh"], "before the command\n"),
    ],
)
def test_options_behind_the_name_are_told_where_they_belong(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["vm", "exec", "web", *words]) != 0
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("completes", "said"), [(True, ""), (False, "banger: error: interrupted\n")])
def test_ctrl_c_while_the_shell_completes_leaves_its_line_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, completes: bool, said: str
) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main.root, "main", interrupted)
    if completes:
        monkeypatch.setenv("_BANGER_COMPLETE", "bash_complete")
    assert main.run(["vm", "list"]) == 130
    assert capsys.readouterr().err == said


def test_an_installation_that_a_signal_ends_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def run(_: install.Install) -> str:
        with alone.cancelled_by_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()
        return ""

    monkeypatch.setattr(install.Install, "run", run)
    assert main.run(["system", "install"]) == 130
    assert "the installation was ended by a signal" in capsys.readouterr().err


def test_restarting_the_services_is_root_s(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main.run(["system", "restart"]) == 1
    assert "run it with sudo" in capsys.readouterr().err
