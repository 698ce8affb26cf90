#!/usr/bin/env bash
# Builds the JNI library for the ABIs of phones and emulators into the Gradle module. Needs cargo-ndk and an NDK
# (ANDROID_NDK_HOME); not run in CI, which has neither.
set -euo pipefail
cd "$(dirname "$0")/.."

rustup target add aarch64-linux-android armv7-linux-androideabi x86_64-linux-android
# Devices of Android 15 and later may have pages of 16 KiB. NDKs before 28 align to 4 KiB unless told.
export RUSTFLAGS="${RUSTFLAGS:-} -C link-arg=-Wl,-z,max-page-size=16384"
cargo ndk --platform 26 -t arm64-v8a -t armeabi-v7a -t x86_64 -o android/pocketlora/src/main/jniLibs \
    build -p pocketlora-jni --profile mobile
