# Recipes for every day. The steps of CI live in `.ci/run` and have the same names there.

# List the recipes.
default:
    @just --list --unsorted

# Watch a model learn facts that it did not know.
demo *ARGS:
    cargo run --release -- demo {{ ARGS }}

# Everything that CI checks, two steps at a time; or the named steps, one after the other.
ci *STEPS:
    .ci/run {{ STEPS }}

# Install what the steps need: cross compiler, emulator, compiler targets (Debian).
install:
    .ci/run install

# Lay out the source as CI wants it.
fmt:
    cargo fmt --all

# Lints, for the whole product and for the library as phones get it.
clippy:
    .ci/run clippy

# Fetch the real model that tests and demo use.
model:
    .ci/run model

# All tests; those that need the real model say so and are skipped where it was not pulled.
test *ARGS:
    cargo test --workspace --release {{ ARGS }}

# The library's tests and goldens without this processor's own instructions.
portable:
    .ci/run portable

# Team, buffers and codecs under Miri, an interpreter that finds undefined behaviour and races. Takes minutes.
miri:
    .ci/run miri

# The kernels' tests on a Vulkan device; a software driver will do.
vulkan:
    .ci/run vulkan

# Compile the Vulkan shaders after a change; commit the result with it.
shaders:
    .ci/run shaders

# Speed on this machine, against its own limits.
bench *ARGS:
    cargo run --release -- bench {{ ARGS }}

# Speed of single operations, on every instruction set.
ops *ARGS:
    cargo bench -p pocketlora-kernels -- {{ ARGS }}

# Build and test the comparison with ggml; then `target/release/pocketlora bench --against ggml`. Takes minutes.
ggml:
    .ci/run ggml

# Run the kernels' tests on three emulated 64-bit ARM processors.
aarch64:
    .ci/run aarch64

# An app in C and the command line on an emulated ARM processor.
arm:
    .ci/run arm

# The static libraries for Android, and what an app would meet in them. Takes minutes for each processor.
android:
    .ci/run android

# The static libraries for iOS and macOS.
ios:
    .ci/run ios

# Write `pocketlora.h` anew after a change of `src/ffi`; commit it with that.
header:
    POCKETLORA_WRITE_HEADER=1 cargo test --release --test capi header

# The Kotlin library's tests on a desktop's JVM; `android/test.sh ChatTest` runs a class of them.
kotlin:
    .ci/run kotlin

# Lints of the library for Android and iOS, and a static library.
phones:
    .ci/run phones

# Fuzz one target of `fuzz/` for ten minutes, or as `cargo fuzz run` is told. Needs cargo-fuzz and a nightly compiler.
fuzz TARGET *ARGS="-- -max_total_time=600 -rss_limit_mb=4096":
    mkdir -p fuzz/corpus/{{ TARGET }}
    cargo +nightly fuzz run {{ TARGET }} fuzz/corpus/{{ TARGET }} fuzz/seeds/{{ TARGET }} {{ ARGS }}

# Compare with transformers, bitsandbytes, PEFT, llama.cpp and mlx-lm, in a venv of pinned versions. Takes long the first time.
interop *ARGS:
    cargo build --release
    tests/interop/run {{ ARGS }}

# The documentation, without broken links.
doc:
    .ci/run doc
