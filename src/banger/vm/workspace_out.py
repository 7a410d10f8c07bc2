# SPDX-License-Identifier: MIT
"""What is done in a guest to give a workspace's changes out: one script, and what it prints before the data.

Repositories inside it, submodules or others, are looked into the same way: git's own view of the outer one
ends at their commit, and says nothing of what is not committed there.
"""

from __future__ import annotations

from typing import Final

from banger.contract import errors, guest, transfers
from banger.vm import workspace

NOTHING: Final = "none"
_MAX_HEAD_BYTES: Final = 1 << 20

EXPORT: Final = (
    workspace.COMMON
    + r"""
path=$1 form=$2 asked=$3 message=$4 copied=$5
tab=$(printf '\t')
fail() { echo "$2" >&2; exit "$1"; }

# Of the paths in the file $1 those that lie here as a prepare of ours sent them.
as_sent() {
  [ -s "$1" ] && [ -s "$own/sent-index" ] || return 0
  (
    export GIT_DIR="$git/banger" GIT_WORK_TREE="$PWD" GIT_INDEX_FILE="$own/sent-index"
    xargs -0 git -c safe.directory='*' ls-files -z -- <"$1"
  )
}

# What the host's git does not see as changed, because it is told not to look or has a filter, is no work
# when it lies here as it was sent: then git keeps of it what it kept there.
restore() {
  as_sent "$1" >"$own/restored"
  [ -s "$own/restored" ] || return 0
  deaf update-index -z --force-remove --stdin <"$own/restored"
  xargs -0 git -c safe.directory='*' ls-tree -r -z "$kept" -- <"$own/restored" |
    deaf update-index -z --index-info
}

sent() {
  kept= head=$(deaf rev-parse -q --verify HEAD) || head=
  if [ -e "$git/banger/index" ] && [ -e "$git/banger/state" ]; then
    { read -r _; read -r _; read -r kept; } <"$git/banger/state"
    cp -p "$git/banger/index" "$own/sent-index"
    (
      export GIT_INDEX_FILE="$own/sent-index"
      raw update-index -q --refresh >/dev/null 2>&1 || :
      raw diff-files --name-only -z >"$own/changed"
      raw update-index -z --force-remove --stdin <"$own/changed"
    )
  fi
}

# Files that git is told not to look at, in the index; it looks now.
uncover() {
  : >"$own/covered"
  deaf ls-files -v | grep -q '^[a-zS]' || return 0
  deaf ls-files -v -z | xargs -0 sh -c '
    for each; do
      name=${each#? }
      case $each in
        [a-rt-z]" "*) ;;
        [Ss]" "*) [ -e "$name" ] || [ -L "$name" ] || continue ;;
        *) continue ;;
      esac
      printf "%s\0" "$name"
    done' sh >"$own/covered"
  deaf update-index -z --no-assume-unchanged --stdin <"$own/covered"
  deaf update-index -z --no-skip-worktree --stdin <"$own/covered"
}

changed() { deaf diff-index --cached --name-only --no-renames --diff-filter=d -z "$1"; }

# The repository that we stand in: its HEAD in $head, in $tree all its files but ignored ones. They are held
# against what the commit $1 has of those that a filter makes.
look() {
  unset GIT_OBJECT_DIRECTORY GIT_ALTERNATE_OBJECT_DIRECTORIES GIT_INDEX_FILE
  git=$(deaf rev-parse --absolute-git-dir)
  objects=$(cd "$(deaf rev-parse --git-path objects)" && pwd)
  cd "$(deaf rev-parse --show-toplevel)"
  own=$(mktemp -d "$work/XXXXXX")
  mkdir "$own/objects"
  export GIT_OBJECT_DIRECTORY="$own/objects" GIT_ALTERNATE_OBJECT_DIRECTORIES="$objects"
  export GIT_INDEX_FILE="$own/index"
  nothing=$(deaf hash-object -w -t tree --stdin </dev/null)
  if [ -e "$git/index" ]; then cp -p "$git/index" "$own/index"; fi
  for shared in "$git"/sharedindex.*; do [ -e "$shared" ] && cp -p "$shared" "$own/"; done
  sent
  uncover
  if ! deaf -c advice.addEmbeddedRepo=false -c filter.lfs.required=false \
    -c filter.lfs.clean='sh "$POINTER" %f' add -A 2>"$own/said"; then
    cat "$own/said" >&2
    without=$(sed -n "s,^error: '\(.*\)/' does not have a commit checked out,\1,p" "$own/said" | head -n 1)
    [ -z "$without" ] || fail 93 "$without is a repository of its own without a commit"
    exit 1
  fi
  restore "$own/covered"
  before=${kept:-${1:-${head:-$nothing}}}
  deaf cat-file -e "$before" 2>/dev/null || before=${head:-$nothing}
  changed "$before" | filtered any >"$own/filtered"
  restore "$own/filtered"
  changed "$before" | filtered foreign >"$own/filtered"
  [ ! -s "$own/filtered" ] || fail 93 "$(tr '\0' '\n' <"$own/filtered" | head -n 1) needs a filter, \
such as git-lfs, which is not here, for git to keep it"
  tree=$(deaf write-tree)
}

# In each repository inside this one: "$@", with its path in $below, and in $since what commit $1 has there.
inside() {
  outer=$1; shift
  deaf -c core.quotePath=false ls-tree -r "$tree" | sed -n 's/^160000 commit //p' >"$own/below"
  while IFS="$tab" read -r _ below <&3; do
    case $below in '"'*) fail 93 "a repository of its own with the odd name $below" ;; esac
    if [ ! -e "$below/.git" ]; then
      [ -z "$(ls -A "$below" 2>/dev/null)" ] || fail 93 "$below holds files, and should be a repository"
      continue
    fi
    since=$(deaf ls-tree "$outer" -- "$below" | sed -n 's/^160000 commit //p' | cut -f 1)
    (
      cd "$below"
      [ "$(deaf rev-parse --show-toplevel 2>/dev/null)" = "$(pwd -P)" ] ||
        fail 93 "$below is a repository of its own that git cannot read there"
      look "$since"
      "$@"
    ) 3<&-
  done 3<"$own/below"
}

patch() {
  deaf diff-tree -r -p --binary --full-index -M --no-ext-diff --no-textconv \
    --src-prefix="a/$2" --dst-prefix="b/$2" "$1" "$tree"
  inside "$1" patch_inside "$2"
}
patch_inside() {
  [ -z "$since" ] || deaf rev-parse -q --verify "$since^{commit}" >/dev/null ||
    fail 92 "$1$below does not have the commit $since that it was at"
  patch "${since:-$nothing}" "$1$below/"
}

# A line for a repository with work that the outer one does not have.
tell() {
  kind=work
  if [ -n "$head" ] && [ "$tree" = "$(deaf rev-parse "$head^{tree}")" ]; then
    deeper=$(inside "$head" tell)
    if [ -z "$deeper" ]; then
      [ "$head" != "$since" ] || return 0
      [ -n "$(deaf rev-list -n 1 "$head" --not --remotes)" ] || kind=fetched
    fi
  fi
  printf '%s %s\n' "$kind" "$below"
}

need_git
cd "$path" || exit 91
git=$(deaf rev-parse --absolute-git-dir)
work=$(mktemp -d "$git/banger-export.XXXXXX" 2>/dev/null || mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
export POINTER="$work/pointer"
cat >"$POINTER" <<'END'
# What git keeps of a file that git-lfs has elsewhere: its own pointer, or that of content.
cat >/dev/null
line="version https://git-lfs.github.com/spec/v1"
if [ ! -s "$1" ] || [ "$(head -c 42 "$1" | tr -d '\0')" = "$line" ]; then exec cat "$1"; fi
sum=$(sha256sum <"$1") || exit 1
printf '%s\noid sha256:%s\nsize %s\n' "$line" "${sum%% *}" "$(wc -c <"$1" | tr -d ' ')"
END
look "${copied#none}"
base=
if [ -n "$asked" ]; then base=$asked
elif [ -n "$copied" ]; then [ "$copied" = none ] || base=$copied
elif [ -e "$git/banger/state" ]; then read -r base <"$git/banger/state"
elif [ "$form" = patch ]; then base=$head
fi
if [ -n "$base" ]; then
  base=$(deaf rev-parse -q --verify "$base^{commit}") || fail 92 "the guest has no commit ${asked:-$copied}"
fi
if [ "$form" = patch ]; then
  printf '%s %s %s\n\n' "${base:-none}" "${head:-none}" "$PWD"
  patch "${base:-$nothing}" ""
  exit
fi
repositories=$(inside "${base:-$nothing}" tell)
set -- --format='%(objectname) %(refname)' ${head:+--no-merged "$head"}
deaf for-each-ref "$@" refs/heads refs/stash >"$own/aside"
if [ -s "$git/banger/sent" ]; then
  mv "$own/aside" "$own/branches"
  grep -v -x -F -f "$git/banger/sent" "$own/branches" >"$own/aside" || :
fi
aside=$(head -n 1000 "$own/aside" | sed 's/^/aside /')
unset GIT_CONFIG_GLOBAL GIT_CONFIG_NOSYSTEM
if [ -z "$head" ] || [ "$tree" != "$(deaf rev-parse "$head^{tree}")" ]; then
  name=$(deaf config user.name) || name=banger
  mail=$(deaf config user.email) || mail=banger@localhost
  export GIT_AUTHOR_NAME="$name" GIT_AUTHOR_EMAIL="$mail"
  export GIT_COMMITTER_NAME="$name" GIT_COMMITTER_EMAIL="$mail"
  # Of one state always the same commit: the host knows by it what it has been given already.
  now="$tree ${head:-none}"
  when=$(sed -n "s/ $now\$//p" "$git/banger/offered" 2>/dev/null) || when=
  [ -n "$when" ] || when=$(date +%s)
  if [ "$form" = pack ] && [ -d "$git/banger" ]; then echo "$when $now" >"$git/banger/offered"; fi
  export GIT_AUTHOR_DATE="@$when +0000" GIT_COMMITTER_DATE="@$when +0000"
  if [ -n "$head" ] || [ "$tree" != "$nothing" ]; then
    head=$(deaf -c commit.gpgSign=false commit-tree "$tree" ${head:+-p "$head"} -m "$message")
  fi
fi
printf '%s %s %s\n' "${base:-none}" "${head:-none}" "$PWD"
[ -z "$repositories" ] || printf '%s\n' "$repositories"
[ -z "$aside" ] || printf '%s\n' "$aside"
echo
[ -n "$head" ] && [ "$form" = pack ] || exit 0
{ echo "$head"; [ -z "$base" ] || echo "^$base"; } |
  deaf -c pack.threads=1 pack-objects --revs --stdout -q --delta-base-offset
"""
)


class Head:
    """What EXPORT says before the data: lines up to an empty one."""

    def __init__(self) -> None:
        self._held = bytearray()

    def take(self, data: bytes) -> tuple[transfers.Exported, bytes] | None:
        """What it came to and the first of the data, or None while more is to come.

        Raises ProtocolError for what no script of ours prints.
        """
        self._held += data
        said, end, rest = bytes(self._held).partition(b"\n\n")
        if not end and len(said) <= _MAX_HEAD_BYTES:
            return None
        lines = said.split(b"\n")
        words = lines[0].decode(errors="replace").split(" ", 2)
        if not end or len(words) != 3:
            raise errors.ProtocolError("the guest did not say what its export holds")
        if not all(word == NOTHING or transfers.is_object_id(word) for word in words[:2]):
            raise errors.ProtocolError("the guest named as a commit what is no object's id")
        base, head = ("" if word == NOTHING else word for word in words[:2])
        nested, aside = [], []
        for line in lines[1:]:
            kind, _, said_of_it = line.partition(b" ")
            if kind == b"aside":
                aside.append(_aside(said_of_it))
            elif kind in {b"work", b"fetched"} and said_of_it:
                nested.append(_nested(said_of_it, is_fetched=kind == b"fetched"))
            else:
                raise errors.ProtocolError("the guest did not say what its export holds")
        exported = transfers.Exported(
            base=base, head=head, path=words[2], nested=tuple(nested), aside=tuple(aside)
        )
        return exported, rest


def _aside(line: bytes) -> transfers.Aside:
    commit, _, name = line.decode(errors="replace").partition(" ")
    if not transfers.is_object_id(commit):
        raise errors.ProtocolError("the guest named as a commit what is no object's id")
    return transfers.Aside(commit=commit, name=name.removeprefix("refs/heads/").removeprefix("refs/"))


def _nested(path: bytes, *, is_fetched: bool) -> transfers.Nested:
    try:
        return transfers.Nested(path=path.decode(), is_fetched=is_fetched)
    except UnicodeDecodeError as error:
        named = guest.printable(path)
        raise errors.ConflictError(f"{named} is a repository of its own whose name is no text") from error
