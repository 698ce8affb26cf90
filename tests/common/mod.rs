//! What several test programs share.
#![allow(dead_code)] // each program uses a part of it

use std::env;
use std::io::{self, Write as _};
use std::path::PathBuf;

/// Whether `POCKETLORA_REQUIRE` (a comma-separated list) forbids to skip `what`.
pub fn required(what: &str) -> bool {
    env::var("POCKETLORA_REQUIRE").is_ok_and(|list| list.split(',').any(|item| item.trim() == what))
}

/// The SmolLM2 GGUF of the oracles (sha256 b179c952...), from `POCKETLORA_TEST_GGUF`; without it the caller skips.
///
/// # Panics
/// It is required and not there.
pub fn real_gguf() -> Option<PathBuf> {
    let path = env::var_os("POCKETLORA_TEST_GGUF").map(PathBuf::from).filter(|path| path.is_file());
    if path.is_none() {
        assert!(!required("model"), "POCKETLORA_REQUIRE has `model`, but POCKETLORA_TEST_GGUF names no file");
        // Not `eprintln!`, which the test harness swallows when a test passes.
        let _ = writeln!(io::stderr(), "SKIPPED: POCKETLORA_TEST_GGUF names no file; this test needs the SmolLM2 GGUF");
    }
    path
}
