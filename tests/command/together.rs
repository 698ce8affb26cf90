//! `train --beside` as a command.

use crate::fixture::fixture;
use std::path::Path;

#[test]
fn methods_beside_each_other_are_trained_shown_and_used() {
    let f = fixture();
    let (model, out) = (f.model.to_str().unwrap(), f.path("together"));
    let beside =
        ["--beside", "prefix-tuning,bottleneck,ln-tuning", "--num-virtual-tokens", "3", "--option", "scaling=2"];
    f.ok(&[&f.train_args(&out)[..], &beside].concat());
    let toml = std::fs::read_to_string(Path::new(&out).join("train.toml")).unwrap();
    assert!(toml.contains("beside = [") && toml.contains("num-virtual-tokens = 3"), "{toml}");
    let info = f.ok(&["info", &out]);
    assert!(info.contains("prefix") && info.contains("bottleneck"), "{info}");
    f.ok(&["generate", "-m", model, "-a", &out, "-p", "hello", "--max-tokens", "2"]);
    f.ok(&["generate", "-m", model, "-a", &format!("{out}/beside/bottleneck"), "-p", "hello", "--max-tokens", "2"]);
    let merged = f.said(&["merge", "-m", model, "-a", &out, "-o", &f.path("merged")]);
    assert!(merged.contains("error"), "virtual tokens and narrow networks cannot be merged: {merged}");
    for (flags, says) in [
        (&["--beside", "prefix-tuning,prompt-tuning"][..], "both have virtual tokens"),
        (&["--beside", "nothing"], "nothing"),
        (&["--beside", "vera"], "`prefix-tuning`"),
        (&["--beside", "ia3", "--relora", "1"], "without `beside`"),
        (&["--beside", "ia3", "--num-virtual-tokens", "3"], "`num-virtual-tokens`"),
    ] {
        let said = f.said(&[&f.train_args(&f.path("other"))[..], flags].concat());
        assert!(said.contains(says), "{flags:?}: {said}");
    }
    assert!(!Path::new(&f.path("other")).exists());
}
