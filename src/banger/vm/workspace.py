# SPDX-License-Identifier: MIT
"""What is done in a guest to take a repository in: scripts, and what they print.

Each script is one constant; whatever varies is an argument, so that nothing is ever quoted. The guest's own
git configuration is kept out of it. Beside the repository's own git directory lies ours, `.git/banger`: a
second index over the same objects that takes files byte for byte.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from banger.contract import errors, guest, transfers

INCOMING: Final = ".git/banger/incoming"
_MAX_CHANGES: Final = 20

COMMON: Final = r"""
set -eu
export LC_ALL=C GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null GIT_TERMINAL_PROMPT=0 GIT_PAGER=cat
export GIT_NO_REPLACE_OBJECTS=1 GIT_LITERAL_PATHSPECS=1
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_OBJECT_DIRECTORY GIT_ALTERNATE_OBJECT_DIRECTORIES
umask 022
deaf() { git -c core.hooksPath=/dev/null -c core.fsmonitor=false -c safe.directory='*' -c gc.auto=0 "$@"; }
raw() {
  GIT_DIR=$PWD/.git/banger GIT_WORK_TREE=$PWD GIT_OBJECT_DIRECTORY=$PWD/.git/objects deaf \
    -c core.autocrlf=false -c core.safecrlf=false -c core.filemode=true -c core.symlinks=true "$@"
}
# Of the paths on stdin those that a filter makes, `any` or one that has git keep something else than
# content: kept elsewhere, or encrypted. All end in NUL.
filtered() {
  deaf check-attr -z --stdin filter | xargs -0 -n 90 sh -c '
    while [ $# -ge 3 ]; do
      case $3:$0 in
        unspecified:* | unset:*) ;;
        lfs:* | annex:* | git-crypt*:* | crypt*:* | *:any) printf "%s\0" "$1" ;;
      esac
      shift 3
    done' "$1"
}
need_git() {
  command -v git >/dev/null 2>&1 || { echo "the guest has no git" >&2; exit 90; }
}
"""

_ALONE: Final = r"""
# A script whose daemon died is ended by the agent, but not at once: what comes after it waits for it.
beside=${1%/*}
mkdir -p -- "$beside" 2>/dev/null || :
if [ -r "$beside" ] && command -v flock >/dev/null 2>&1; then
  exec 9<"$beside"
  tries=0
  until flock -n 9; do
    [ $tries -lt 100 ] || { echo "an earlier prepare is still at work beside $1" >&2; exit 94; }
    tries=$((tries + 1))
    sleep 0.2
  done
fi
"""

INSPECT: Final = (
    COMMON
    + _ALONE
    + r"""
path=$1
[ "$2" = copy ] || need_git
if [ ! -e "$path" ] || { [ -d "$path" ] && [ -z "$(ls -A "$path")" ]; }; then echo "absent"; exit 0; fi
if [ ! -d "$path/.git/banger" ] || ! command -v git >/dev/null 2>&1; then echo "foreign"; exit 0; fi
cd "$path"
own=.git/banger
echo "ours"
[ -e $own/unsettled ] && echo "change an earlier prepare was interrupted"
cut -d' ' -f1 $own/sent | sort -u | sed 's/^/tip /'
{ read -r head; read -r branch; read -r index; } <$own/state
raw update-index -q --refresh >/dev/null 2>&1 || :
raw diff-files --name-status | head -n 20 | sed 's/^/change /'
[ -e $own/unmerged ] ||
  deaf diff-index --cached --name-status "$index" | head -n 20 | sed 's/^/change staged: /'
now=$(deaf symbolic-ref -q HEAD || deaf rev-parse -q --verify HEAD) || now=
[ "$now" = "${branch:-$head}" ] || echo "change HEAD is at $now"
deaf for-each-ref --format='%(objectname) %(refname)' refs/heads refs/tags | sort >$own/now
grep -E '^[0-9a-f]+ refs/(heads|tags)/' $own/sent | sort | comm -23 - $own/now |
  sed 's/^[0-9a-f]* /change /'
rm -f $own/now
"""
)

SNAP: Final = (
    COMMON
    + _ALONE
    + r"""
cd "$1"
cp -p .git/banger/index .git/banger/index.now
export GIT_INDEX_FILE=$PWD/.git/banger/index.now
raw add -A
raw write-tree
"""
)
"""Every file as it lies there, as a tree; SETTLE can begin from it instead of from what was sent."""

RECEIVE: Final = (
    COMMON
    + _ALONE
    + r"""
root=$1 format=$2 new=$3
if [ "$new" = 1 ]; then
  rm -rf -- "$root"
  mkdir -p -- "$root"
  option=
  [ "$format" = sha1 ] || option=--object-format=$format
  deaf init -q --template= $option -- "$root"
fi
cd "$root"
mkdir -p .git/banger/incoming .git/banger/info .git/banger/refs .git/banger/objects .git/info
if [ ! -e .git/banger/HEAD ]; then
  echo 'ref: refs/heads/none' >.git/banger/HEAD
  echo '* -text -eol -crlf -filter -ident -working-tree-encoding' >.git/banger/info/attributes
  deaf config --file .git/banger/config core.bare false
  if [ "$format" = sha1 ]; then version=0; else version=1; fi
  deaf config --file .git/banger/config core.repositoryformatversion $version
  [ "$format" = sha1 ] || deaf config --file .git/banger/config extensions.objectformat "$format"
fi
exec git -c core.bigFileThreshold=16m -c pack.threads=1 index-pack --stdin --fix-thin >/dev/null
"""
)

MISSING: Final = COMMON + _ALONE + 'cd "$1"; exec git cat-file --batch-check="%(objectname)"\n'

SETTLE: Final = (
    COMMON
    + _ALONE
    + r"""
root=$1 final=$2 head=$3 branch=$4 worktree=$5 index=$6 discard=$7 taken=$8
cd "$root"
own=.git/banger
new=$own/incoming
if [ "$root" = "$final" ] && [ "$discard" = 0 ]; then
  old=${taken:-$(deaf rev-parse refs/banger/worktree)}
  if [ -n "$taken" ]; then mv $own/index.now $own/index; fi
  raw update-index -q --refresh >/dev/null 2>&1 || :
  raw read-tree -m -u -n "$old" "$worktree"
  : >$own/unsettled
  raw read-tree -m -u "$old" "$worktree"
else
  : >$own/unsettled
  raw read-tree --reset -u "$worktree"
fi
if [ -s $new/shallow ]; then cp $new/shallow .git/shallow; else rm -f .git/shallow; fi
while IFS= read -r key && IFS= read -r value; do
  # A key that has more values here is the guest's own, and git would set none of them.
  [ "$(deaf config --get-all "$key" | wc -l)" -gt 1 ] || deaf config "$key" "$value"
done <$new/config
deaf update-ref refs/banger/worktree "$worktree"
if [ -e $own/sent ]; then
  cut -d' ' -f2- $own/sent | sort >$own/before
  cut -d' ' -f2- $new/sent | sort | comm -23 $own/before - |
    while IFS= read -r ref; do deaf update-ref -d "$ref"; done
  rm $own/before
fi
deaf update-ref --stdin -z <$new/refs
while IFS= read -r ref && IFS= read -r target; do deaf symbolic-ref "$ref" "$target"; done <$new/symbolic
if [ -n "$branch" ]; then deaf symbolic-ref HEAD "$branch"; else deaf update-ref --no-deref HEAD "$head"; fi
cp -p $own/index .git/index
deaf read-tree --reset "$index"
# A merge or the like goes with what it was made of; a rebase may hold work that was set aside for it.
if [ "$discard" = 1 ] || [ -n "$taken" ]; then
  (cd .git && rm -f MERGE_* AUTO_MERGE SQUASH_MSG CHERRY_PICK_HEAD REVERT_HEAD)
fi
if [ "$discard" = 1 ]; then (cd .git && rm -rf BISECT_* REBASE_HEAD rebase-apply rebase-merge sequencer); fi
rm -f $own/unmerged
if [ -s $new/unmerged ]; then deaf update-index -z --index-info <$new/unmerged; : >$own/unmerged; fi
if [ -s $new/intended ]; then xargs -0 git -c core.fsmonitor=false add --intent-to-add -- <$new/intended; fi
deaf update-index -q --refresh >/dev/null || :
if [ -s $new/skipped ]; then deaf update-index -z --skip-worktree --stdin <$new/skipped; fi
if [ -s $new/assumed ]; then deaf update-index -z --assume-unchanged --stdin <$new/assumed; fi
# A filter that is not here makes git take its files for changes, and commit them as they lie here.
if ! (unset GIT_CONFIG_GLOBAL GIT_CONFIG_NOSYSTEM; git config --get-regexp '^filter[.]' >/dev/null); then
  deaf diff-files --name-only --diff-filter=M -z | filtered any >$new/filtered
  deaf update-index -z --assume-unchanged --stdin <$new/filtered
fi
cp $new/sent $own/sent
printf '%s\n%s\n%s\n' "$head" "$branch" "$index" >$own/state
rm -rf $new $own/unsettled
if [ "$root" != "$final" ]; then
  cd /
  if [ -e "$final" ]; then rmdir -- "$final"; fi
  mv -- "$root" "$final"
fi
"""
)

LOCK: Final = (
    'set -eu; umount "$1" 2>/dev/null || :; '
    '[ "$2" = 0 ] || { mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"; }'
)
"""Makes a directory read-only, or writable again."""

CLEAR: Final = f'set -eu; {_ALONE}rm -rf -- "$1"'

PLACE: Final = (
    f"set -eu; {_ALONE}"
    'if [ "$3" = 1 ]; then rm -rf -- "$2"; elif [ -e "$2" ]; then rmdir -- "$2"; fi; '
    'mv -- "$1" "$2"'
)
"""A copied tree gets its final name."""

NO_GIT: Final = 90
NO_DIRECTORY: Final = 91
NO_COMMIT: Final = 92
STAYS_BEHIND: Final = 93
_AT_WORK: Final = 94


@dataclass(frozen=True, slots=True)
class Found:
    """What INSPECT says. `changes` are what a prepare would take from the guest's user."""

    exists: bool
    foreign: bool = False
    tips: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


def argv(script: str, *arguments: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", script, "banger-workspace", *arguments)


def parse_found(said: bytes) -> Found:
    """Raises ProtocolError for what no script of ours prints."""
    lines = said.decode(errors="replace").splitlines()
    if not lines or lines[0] not in {"absent", "foreign", "ours"}:
        raise errors.ProtocolError("the guest did not say what its workspace holds")
    changes = [line.removeprefix("change ") for line in lines[1:] if line.startswith("change ")]
    tips = tuple(line.removeprefix("tip ") for line in lines[1:] if line.startswith("tip "))
    if not all(map(transfers.is_object_id, tips)):
        raise errors.ProtocolError("the guest named as a commit what is no object's id")
    return Found(
        exists=lines[0] == "ours",
        foreign=lines[0] == "foreign",
        tips=tips,
        changes=tuple(changes[:_MAX_CHANGES]),
    )


def clean_path(text: str) -> str:
    """An absolute path in the guest that is a directory of its own. Raises BadRequestError."""
    path = posixpath.normpath(text)
    if path.startswith("//") or not path.startswith("/"):
        path = "/" + path.strip("/")
    if path.count("/") < 2 or path.split("/")[1] in {"proc", "sys", "dev", ".banger"}:
        raise errors.BadRequestError(
            f"{text!r} cannot hold a workspace", hint="name a directory of its own, such as /root/repo"
        )
    return path


def staging(path: str) -> str:
    """Where a new workspace grows until it is whole."""
    parent, name = posixpath.split(path)
    return posixpath.join(parent, f".{name}.banger-new")


def refuse_to_lose(name: str, path: str, found: Found, *, discard: bool) -> None:
    """Raises ConflictError when a prepare would replace somebody's work in the guest."""
    if found.foreign:
        raise errors.ConflictError(
            f"{path} in {name} is not a workspace of banger's",
            hint="choose another directory with --guest-path, or move that one away",
        )
    if found.changes and not discard:
        more = f" and {len(found.changes) - 3} more" if len(found.changes) > 3 else ""
        shown = "; ".join(guest.printable(" ".join(change.split()).encode()) for change in found.changes[:3])
        raise errors.ConflictError(
            f"{path} in {name} has changes of its own: {shown}{more}",
            hint=f"get them first with `banger vm workspace pull {name}`, or throw them away with --discard",
        )


def script_failure(name: str, status: int, said: Sequence[str]) -> errors.BangerError:
    """Why a script ended badly, from its status and the last it said."""
    last = said[-1] if said else "it said nothing"
    if status == NO_GIT:
        hint = "use an image with git, or `--mode full-copy`, which needs none"
        return errors.MissingToolError(f"{name} has no git in it", hint=hint, tool="git")
    if status in {NO_DIRECTORY, NO_COMMIT}:
        return errors.NotFoundError(f"{name}: {last}")
    if status == STAYS_BEHIND:
        hint = f"take it with `banger vm cp {name}:… .`; there, move it away or check out what git had"
        return errors.ConflictError(f"work in {name} would stay behind: {last}", hint=hint)
    if status == _AT_WORK:
        return errors.ConflictError(f"{name}: {last}", hint="try again in a moment")
    if status == 127:
        return errors.MissingToolError(f"{name} has no /bin/sh, or a basic tool is missing: {last}")
    if "No space left" in " ".join(said):
        hint = f"`banger vm set {name} --disk-size …` makes it larger"
        return errors.NoSpaceError(f"the work disk of {name} is full", hint=hint)
    return errors.OperationFailedError(f"git in {name} failed: {last.removeprefix('fatal: ')}")
