//! `merge` as a command.

use crate::common::golden;
use crate::fixture::fixture;
use std::fs;
use std::path::Path;

#[test]
fn the_command_says_what_it_did() {
    let f = fixture();
    let (model, adapter) = (f.model.to_str().unwrap(), golden("adapters/lora"));
    let scaled = format!("{}=0.5", adapter.display());
    let text = f.path("text.txt");
    fs::write(&text, "the quick brown fox jumps over the lazy dog\n".repeat(20)).unwrap();
    let out = f.path("merged");
    let args = ["merge", "-m", model, "-a", &scaled, "-o", &out, "--text", &text, "--window", "64", "--json"];
    let report = f.json(&args);
    assert_eq!((&report["dtype"], &report["quantized"]), (&"bfloat16".into(), &0.into()));
    let [before, after] = ["unmerged", "merged"].map(|key| report["perplexity"][key].as_f64().unwrap());
    assert!((before / after - 1.0).abs() < 0.02 && before != after, "{report}");
    assert!(f.said(&args).contains("--overwrite"), "an older one stays");
    let report = f.json(&[&args[..], &["--to", "nf4", "--overwrite"]].concat());
    let rows = report["rounding"].as_array().unwrap();
    assert_eq!((report["quantized"].clone(), rows.len()), (14.into(), 3), "two layers and all: {report}");
    assert!(Path::new(&out).join("tokenizer.json").exists());
    let exact = f.said(&["merge", "-m", model, "-a", &scaled, "-o", &f.path("exact"), "--to", "f32"]);
    assert!(exact.contains("trained on their NF4 copy"), "{exact}");
    let words = f.ok(&["merge", "-m", model, "-a", &scaled, "-o", &f.path("in words"), "--to", "nf4"]);
    assert!(words.contains("layer 1: rounding took") && words.contains("% of it arrived"), "{words}");
}
