#!/usr/bin/env bash
# The Kotlin library and its tests on this machine's JVM, against the library as it is built for this machine: the sources
# that a device would get, without Android. Needs a JDK 17 or later, node's npm, and JUnit 4; on Debian it installs them.
# The compiler and the coroutines are those of the npm package `kotlin-compiler`.
#
# `android/test.sh` runs all tests, `android/test.sh ChatTest` one class. CARGO_ARGS may name another profile than release.
set -euo pipefail
cd "$(dirname "$0")/.."

KOTLIN=2.4.20
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
work=$target/kotlin
junit=/usr/share/java

needed=()
command -v java >/dev/null || needed+=(openjdk-17-jdk-headless)
command -v npm >/dev/null || needed+=(npm)
[ -e $junit/junit4.jar ] || needed+=(junit4)
if [ ${#needed[@]} -gt 0 ]; then
    sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get update -qq
    DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${needed[@]}" >/dev/null
fi

compiler=$work/$KOTLIN/node_modules/kotlin-compiler
[ -e "$compiler/lib/kotlin-compiler.jar" ] ||
    npm install --silent --no-save --ignore-scripts --prefix "$work/$KOTLIN" "kotlin-compiler@$KOTLIN"

# The library with a function that panics, for one of the tests.
read -ra args <<<"${CARGO_ARGS---release}"
message=$(cargo build -p pocketlora-jni --features panics "${args[@]}" --message-format json-render-diagnostics | grep '"name":"pocketlora_jni"' | tail -1)
library=$(sed -n 's/.*"filenames":\["\([^"]*\)".*/\1/p' <<<"$message")
folder=$(dirname "$library")

libraries=$compiler/lib/kotlin-stdlib.jar:$compiler/lib/kotlin-test.jar:$compiler/lib/kotlinx-coroutines-core-jvm.jar
libraries=$libraries:$junit/junit4.jar:$junit/hamcrest-core.jar
sources=android/pocketlora/src
# Warnings are errors: an app's build would show them as ours.
java -Xmx1g -cp "$compiler/lib/kotlin-compiler.jar" org.jetbrains.kotlin.cli.jvm.K2JVMCompiler \
    -no-stdlib -no-reflect -jvm-target 17 -Werror -progressive -module-name pocketlora \
    -cp "$libraries" -d "$work/classes" $sources/main/kotlin $sources/androidTest/kotlin

tests=("$@")
if [ ${#tests[@]} = 0 ]; then
    mapfile -t tests < <(basename -s .kt -a $sources/androidTest/kotlin/io/pocketlora/*Test.kt)
fi
# Checks of arguments of the bridge's own calls are on.
exec java -Xcheck:jni -Djava.library.path="$folder" -Dpocketlora.oracles=tests/data/oracles \
    -Dpocketlora.root=android -Dpocketlora.errors=src/error.rs ${POCKETLORA_TEST_MODEL:+-Dpocketlora.model="$POCKETLORA_TEST_MODEL"} \
    -cp "$work/classes:$libraries" org.junit.runner.JUnitCore "${tests[@]/#/io.pocketlora.}"
