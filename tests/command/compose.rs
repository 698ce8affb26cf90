//! `compose` as a command.

use crate::common::golden;
use crate::fixture::fixture;
use std::path::Path;

#[test]
fn two_adapters_become_one_and_are_taken_as_one() {
    let f = fixture();
    let [a, b] = ["a", "b"].map(|name| f.path(name));
    for (out, seed) in [(&a, "1"), (&b, "2")] {
        f.ok(&[&f.train_args(out)[..], &["--seed", seed]].concat());
    }
    let (model, out) = (f.model.to_str().unwrap(), f.path("both"));
    let args = ["compose", "-a", &format!("{a}=0.7"), "-a", &format!("{b}=-0.3"), "-o", &out, "--json"];
    let report = f.json(&args);
    assert_eq!((&report["method"], &report["rank"]), (&"cat".into(), &16.into()), "{report}");
    assert!(Path::new(&out).join("adapter_config.json").exists());
    assert!(f.said(&args).contains("--overwrite"), "an older one stays");
    let cut = [&args[..], &["--method", "ties_svd", "--density", "0.5", "--rank", "4", "--overwrite"]].concat();
    let report = f.json(&cut);
    assert!(report["kept"].as_f64().is_some_and(|kept| kept > 0.1 && kept < 1.0), "{report}");
    let generate = ["generate", "-m", model, "-a", &out, "-p", "hello", "--max-tokens", "2", "--strict"];
    f.ok(&generate);
    // Of another base.
    let foreign = golden("composition/a");
    let said = f.said(&["compose", "-a", &a, "-a", foreign.to_str().unwrap(), "-o", &f.path("none")]);
    assert!(said.contains("error:"), "{said}");
    assert!(!Path::new(&f.path("none")).exists());
    assert_eq!(f.run(&["compose", "-a", &a, "-o", &out, "--method", "mix"]).status.code(), Some(2));
}
