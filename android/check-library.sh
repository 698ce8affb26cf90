#!/usr/bin/env bash
# Links the static library $1 for 64-bit Android into a shared one, without an NDK, and checks what an app would meet:
# nothing is asked of the system beyond `symbols.txt`, nothing is exported but `pl_*`, segments lie on pages of 16 KiB.
# What it links is to be looked at, not to be run: Android's own linker script and libraries are not in it.
set -euo pipefail
cd "$(dirname "$0")"
library=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

lld=$(find "$(rustc --print sysroot)" -name rust-lld | head -n 1)
header=../ios/Sources/CPocketLora/pocketlora.h
printf '{ global: pl_*; local: *; };\n' >"$work/exports.map"
mapfile -t roots < <(grep -o '\bpl_[a-z_0-9]*(' "$header" | tr -d '(' | sort -u | sed 's/^/--undefined=/')
"$lld" -flavor gnu -shared --gc-sections --icf=all --pack-dyn-relocs=relr -z max-page-size=16384 \
    --version-script="$work/exports.map" --unresolved-symbols=ignore-all "${roots[@]}" "$library" -o "$work/library.so"

symbols() { aarch64-linux-gnu-nm --dynamic "$@" "$work/library.so" | awk '{ print $NF }' | sort -u; }
unknown=$(comm -23 <(symbols --undefined-only) <(grep -v '^#' symbols.txt | sort -u))
[ -z "$unknown" ] || { echo "the library asks for what symbols.txt does not allow:" $unknown >&2; exit 1; }
declared=$(printf '%s\n' "${roots[@]#--undefined=}" | sort -u)
exported=$(symbols --defined-only)
[ "$exported" = "$declared" ] ||
    { echo "the library does not export just what the header declares:" >&2; diff <(echo "$declared") <(echo "$exported") >&2; exit 1; }
aarch64-linux-gnu-readelf -lW "$work/library.so" | awk '$1 == "LOAD" && $NF != "0x4000" { bad = 1 } END { exit bad }' ||
    { echo "a segment is not on pages of 16 KiB" >&2; exit 1; }
aarch64-linux-gnu-strip "$work/library.so"
printf '%s functions, %s bytes stripped\n' "$(echo "$exported" | wc -l)" "$(stat -c %s "$work/library.so")"
