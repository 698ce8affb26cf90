//! Which instruction sets there are kernels for here, and that none is missing which must be tested.

use pocketlora_kernels::cpu::Table;
use std::io::Write as _;

#[test]
fn portable_comes_first_and_the_best_last() {
    let names: Vec<_> = Table::available().iter().map(|table| table.isa().name()).collect();
    assert_eq!(names[0], "portable");
    if cfg!(target_arch = "aarch64") {
        assert_eq!(names, ["portable", "neon"]);
    }
    for table in Table::available() {
        // Not `eprintln!`, which the test harness swallows when a test passes.
        let _ = writeln!(std::io::stderr(), "testing `{}` with {:?}", table.isa().name(), table.features());
    }
}

/// `POCKETLORA_REQUIRE=neon` wants that table, `neon=dotprod+i8mm` wants it to use exactly these features.
#[test]
fn required_instruction_sets_are_here() {
    let required = std::env::var("POCKETLORA_REQUIRE").unwrap_or_default();
    for item in required.split(',').map(str::trim) {
        let (name, features) = item.split_once('=').map_or((item, None), |(name, features)| (name, Some(features)));
        // Other items are other tests' business.
        if !["portable", "avx2", "avxvnni", "avx512", "amx", "neon"].contains(&name) {
            continue;
        }
        let table = Table::by_name(name).unwrap_or_else(|why| panic!("POCKETLORA_REQUIRE has `{item}`, but {why}"));
        if let Some(features) = features {
            assert_eq!(table.features().join("+"), features, "POCKETLORA_REQUIRE has `{item}`");
        }
    }
}
