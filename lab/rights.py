# SPDX-License-Identifier: MIT
"""What the helper's unit really asks of the kernel, recorded while tests of the lab run: `make rights`.

`recorded` counts on one lab (lab/recorder.py does it there); `python -m lab.rights` puts together what all
labs of a run counted, and says what is new, and what did not happen, compared with the kept record.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from lab.session import Lab

log = logging.getLogger("lab")

TREE = Path(__file__).parents[1]
KEPT = TREE / "tests" / "rights.txt"
RECORDER = "/root/recorder.py"
UNIT = "bangerd-root.service"
_HEAD = """\
# What the helper's unit and all that it starts, VMMs included, asked of the kernel, as `make rights` records
# it: what, who, how often. docs/privileges.md says how it is recorded, and what follows.
"""
# The main process tells its pid and waits to be followed; then it becomes what the unit says.
_ASKS = "echo $$$$ >/run/rights/asking && read -r go </run/rights/go && exec"
_DROP_IN = f"/run/systemd/system/{UNIT}.d/rights.conf"


@contextlib.contextmanager
def recorded(lab: Lab, directory: Path) -> Iterator[None]:
    """What the unit does inside the block is counted, into a file of the lab's name; it may not reboot."""
    begin(lab)
    yield
    said = lab.run(["python3", RECORDER, "report"]).text
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{lab.name}.txt").write_text(said)


def asked_for(lab: Lab) -> contextlib.AbstractContextManager[None]:
    """The same, into $BANGER_RIGHTS; without that nothing is recorded."""
    directory = os.environ.get("BANGER_RIGHTS")
    return recorded(lab, Path(directory)) if directory else contextlib.nullcontext()


def begin(lab: Lab) -> None:
    """Restarts the unit, as it is installed but for the wait."""
    lab.write(RECORDER, (Path(__file__).with_name("recorder.py")).read_bytes())
    lab.run(["systemd-run", "-q", "--unit=rights", "-p", "Type=exec", "python3", RECORDER, "record"])
    lab.run(
        [
            "sh",
            "-c",
            "until [ -p /run/rights/go ]; do systemctl -q is-active rights || exit 1; sleep 0.1; done",
        ]
    )
    unit = lab.run(["systemctl", "cat", UNIT]).text
    (command,) = (line.partition("=")[2] for line in unit.splitlines() if line.startswith("ExecStart="))
    drop_in = f"[Service]\nExecStart=\nExecStart=/bin/sh -c '{_ASKS} {command}'\n"
    lab.write(_DROP_IN, drop_in.encode())
    lab.run(["systemctl", "daemon-reload"])
    lab.run(["systemctl", "try-restart", UNIT])
    log.info("lab %s: what %s does is recorded", lab.name, UNIT)


def read(path: Path) -> Counter[str]:
    """A record: each fact and its count."""
    lines = (line for line in path.read_text().splitlines() if line and not line.startswith("#"))
    return Counter({fact: int(count) for fact, _, count in (line.rpartition(" ") for line in lines)})


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m lab.rights DIRECTORY RESULT`: ends with 1 when something is new to the kept record."""
    directory, result = (sys.argv[1:] if argv is None else argv)[:2]
    counted: Counter[str] = Counter()
    for path in sorted(Path(directory).glob("*.txt")):
        counted += read(path)
    kept = read(KEPT) if KEPT.exists() else Counter()
    Path(result).write_text(_HEAD + "".join(f"{fact} {count}\n" for fact, count in sorted(counted.items())))
    new = sorted(counted.keys() - kept.keys())
    for title, listed in (("new", new), ("not this time", sorted(kept.keys() - counted.keys()))):
        print(f"{title}: {len(listed)}", *(f"  {fact}" for fact in listed), sep="\n")
    print(f"the record is {result}; take it over with: cp {result} {KEPT.relative_to(TREE)}")
    return 1 if new else 0


if __name__ == "__main__":
    sys.exit(main())
