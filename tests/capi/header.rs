//! The committed header is what `src/ffi` says.

use std::path::{Path, PathBuf};

const HEADER: &str = "ios/Sources/CPocketLora/pocketlora.h";
/// Set, it has the header written in the place of compared (`just header`).
const WRITE: &str = "POCKETLORA_WRITE_HEADER";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

/// The rules in the module's own words, for those who read C.
fn preface() -> String {
    let text = std::fs::read_to_string(root().join("src/ffi/mod.rs")).unwrap();
    let lines = text.lines().take_while(|line| line.starts_with("//!")).map(|line| line.trim_start_matches("//!"));
    let lines: Vec<String> = lines.map(|line| format!(" *{}", line.trim_end().replace("](", "] ("))).collect();
    format!("/**\n{}\n */", lines.join("\n"))
}

fn made() -> String {
    let config = cbindgen::Config::from_file(root().join("cbindgen.toml")).unwrap();
    let mut builder = cbindgen::Builder::new().with_config(config).with_header(preface());
    for source in ["src/error.rs", "src/ffi/mod.rs"] {
        builder = builder.with_src(root().join(source));
    }
    let mut text = Vec::new();
    builder.generate().expect("the module is readable").write(&mut text);
    String::from_utf8(text).unwrap()
}

#[test]
fn the_header_is_what_the_library_exports() {
    let (path, made) = (root().join(HEADER), made());
    if std::env::var_os(WRITE).is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = committed.lines().zip(made.lines()).position(|(a, b)| a != b);
    assert!(
        committed == made,
        "{HEADER} is stale from line {:?} on: `just header` writes it",
        differs.map(|at| at + 1)
    );
}
