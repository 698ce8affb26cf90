//! `prune` as a command.

use crate::common::golden;
use crate::fixture::fixture;
use std::path::Path;

#[test]
fn half_of_an_adapter_is_left_and_used() {
    let f = fixture();
    let (whole, out, model) = (f.path("whole"), f.path("half"), f.model.to_str().unwrap());
    f.ok(&f.train_args(&whole));
    let data = f.data.to_str().unwrap();
    let args = ["prune", &whole, "-m", model, "-d", data, "-o", &out, "--json", "--threads", "1"];
    let report = f.json(&args);
    let number = |path: &str| report.pointer(path).and_then(serde_json::Value::as_f64).unwrap();
    let share = number("/after/parameters") / number("/before/parameters");
    assert!(share <= 0.5 && share > 0.4, "{report}");
    let [plain, with, left] = ["/loss/base", "/loss/before", "/loss/after"].map(number);
    // What matters least went: more than half of what was learned is left.
    assert!(with < plain && left < (with + plain) / 2.0, "{report}");
    f.ok(&["generate", "-m", model, "-a", &out, "-p", "hello", "--max-tokens", "2", "--strict"]);
    assert!(f.said(&args).contains("--overwrite"), "an older one stays");
    let modules = f.json(&[&args[..], &["--by", "modules", "--keep", "0.3", "--overwrite"]].concat());
    assert!(modules.pointer("/after/modules").unwrap().as_u64() < modules.pointer("/before/modules").unwrap().as_u64());
    f.ok(&["generate", "-m", model, "-a", &out, "-p", "hello", "--max-tokens", "2"]);

    let none = f.path("none");
    let [ia3, alora] = ["methods/ia3", "methods/alora"].map(golden);
    for (adapter, keep, says) in [
        (whole.as_str(), "1.5", "above 0 and below 1"),
        (ia3.to_str().unwrap(), "0.5", "IA3"),
        // Without its invocation it would work on every token.
        (alora.to_str().unwrap(), "0.5", "an adapter with an invocation"),
    ] {
        let said = f.said(&["prune", adapter, "-m", model, "-d", data, "-o", &none, "--keep", keep]);
        assert!(said.contains(says), "{said}");
    }
    assert!(!Path::new(&none).exists());
}

#[test]
fn a_rank_is_cut_from_what_was_trained_for_all() {
    let f = fixture();
    let (whole, out, model) = (f.path("all-ranks"), f.path("first-ranks"), f.model.to_str().unwrap());
    f.ok(&[&f.train_args(&whole)[..], &["--method", "dylora", "--rank", "4"]].concat());
    let report = f.json(&["prune", &whole, "--cut-rank", "2", "-o", &out, "--json"]);
    let ranks = |path: &str| report.pointer(path).and_then(serde_json::Value::as_u64).unwrap();
    assert_eq!(ranks("/before/ranks"), 2 * ranks("/after/ranks"), "{report}");
    f.ok(&["generate", "-m", model, "-a", &out, "-p", "hello", "--max-tokens", "2", "--strict"]);
    let none = f.path("none");
    for (more, says) in [
        (&["--cut-rank", "4"][..], "`cut-rank`"),
        (&["--cut-rank", "2", "--keep", "0.5"], "--keep"),
        (&["--keep", "0.5"], "--data"),
    ] {
        let said = f.said(&[&["prune", &whole, "-o", &none][..], more].concat());
        assert!(said.contains(says), "{said}");
    }
    assert!(!Path::new(&none).exists());
}
