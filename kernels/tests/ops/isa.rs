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

/// A name that is written wrong would have nothing tested.
#[test]
fn there_is_what_the_tests_are_restricted_to() {
    for name in crate::harness::test_on().unwrap_or_default() {
        match Table::by_name(&name) {
            Err(_) if name == "vulkan" && cfg!(feature = "vulkan") => {}
            Err(why) => panic!("POCKETLORA_TEST_ON has `{name}`, but {why}"),
            Ok(_) => {}
        }
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
