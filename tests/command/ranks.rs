//! `train --rank auto` as a command.

use crate::fixture::fixture;
use serde_json::Value;
use std::fs;
use std::path::Path;

#[test]
fn ranks_are_measured_shown_and_kept() {
    let f = fixture();
    let out = f.path("ranked");
    let args = [&f.train_args(&out)[..], &["--rank", "auto", "--budget-mb", "0.012"]].concat();
    let report = f.json(&args);
    let shown = f.ok(&["info", &out]);
    assert!(shown.contains(" have rank"), "{shown}");
    let layers = report.pointer("/ranks/layers").and_then(Value::as_array).unwrap();
    assert_eq!(report.pointer("/ranks/budget").and_then(Value::as_u64), Some(6000));
    assert!(layers.iter().any(|layer| layer["rank"] != layers[0]["rank"]), "{report}");
    let read = |name: &str| fs::read_to_string(Path::new(&out).join(name)).unwrap();
    assert!(read("ranks.txt").contains("of 6000 values"));
    assert!(read("ranks.svg").contains("q_proj"));
    let config: Value = serde_json::from_str(&read("adapter_config.json")).unwrap();
    assert!(!config["rank_pattern"].as_object().unwrap().is_empty(), "{config}");
    assert!(read("train.toml").contains("[rank-pattern]"));
    f.ok(&["generate", "-m", f.model.to_str().unwrap(), "-a", &out, "-p", "hello", "--max-tokens", "2"]);

    // A budget asks for the same, which is said.
    let implied = f.path("implied");
    let said = f.said(&[&f.train_args(&implied)[..], &["--budget-mb", "0.012"]].concat());
    assert!(said.contains("as `--rank auto` says"), "{said}");
    let file = |out: &str| fs::read(Path::new(out).join("adapter_model.safetensors")).unwrap();
    assert_eq!(file(&implied), file(&out));
    let other = f.path("other");
    for (flags, says) in [
        (&["--rank", "auto"][..], "`budget-parameters` or `budget-mb`"),
        (&["--rank", "8", "--budget-parameters", "6000"], "`rank` as `auto`"),
        (&["--rank", "some"], "a whole number or `auto`"),
        (&["--rank", "auto", "--budget-parameters", "6000", "--method", "dora"], "DoRA"),
        (&["--rank", "auto", "--budget-parameters", "6000", "--init", &out], "has its ranks"),
    ] {
        let said = f.said(&[&f.train_args(&other)[..], flags].concat());
        assert!(said.contains(says), "{flags:?}: {said}");
    }
    assert!(!Path::new(&other).exists());
}
