//! `seal` and `unseal` as commands.

use crate::common::golden;
use crate::fixture::fixture;
use std::fs;
use std::path::Path;

#[test]
fn an_adapter_is_sealed_used_and_unsealed() {
    let f = fixture();
    let (adapter, file, out, model) = (f.path("adapter"), f.path("a.sealed"), f.path("out"), f.model.to_str().unwrap());
    f.ok(&f.train_args(&adapter));
    let [key, wrong, sign, public] = ["key", "wrong", "sign", "public"].map(|name| f.path(name));
    fs::write(&key, [7; 32]).unwrap();
    fs::write(&wrong, format!("{}\n", "08".repeat(32))).unwrap();
    fs::write(&sign, "09".repeat(32)).unwrap();
    let args = ["seal", &adapter, "-m", model, "--key-file", &key, "--version", "4", "-o", &file, "--json"];
    let report = f.json(&args);
    assert_eq!((report["version"].as_u64(), report["signer"].as_str()), (Some(4), None));
    let signed = f.json(&[&args[..], &["--sign-key-file", &sign]].concat());
    fs::write(&public, signed["signer"].as_str().unwrap()).unwrap();
    assert!(signed["bytes"].as_u64() > report["bytes"].as_u64(), "an older seal is replaced");

    // Used as it is, it says what the adapter in its folder says.
    let answer = |more: &[&str]| f.ok(&[&["generate", "-m", model, "-p", "hello", "--max-tokens", "8"], more].concat());
    let with = answer(&["-a", &adapter]);
    assert_eq!(answer(&["-a", &file, "--key-file", &key, "--verify-key-file", &public]), with);

    let unseal = ["unseal", &file, "--key-file", &key, "--verify-key-file", &public, "-m", model, "-o", &out, "--json"];
    let found = f.json(&unseal);
    assert_eq!((&found["base"], &found["signer"]), (&report["base"], &signed["signer"]));
    for name in ["adapter_config.json", "adapter_model.safetensors", "centroid.safetensors", "lessons.json"] {
        assert_eq!(fs::read(Path::new(&out).join(name)).ok(), fs::read(Path::new(&adapter).join(name)).ok(), "{name}");
    }
    assert!(!Path::new(&out).join("train.jsonl").exists());

    let (none, other) = (f.path("none"), golden("peft/base").to_str().unwrap().to_owned());
    let broken = f.path("broken.sealed");
    let mut bytes = fs::read(&file).unwrap();
    let at = bytes.len() - 20;
    bytes[at] ^= 1;
    fs::write(&broken, &bytes).unwrap();
    for (file, key, more, says) in [
        (&file, &wrong, [].as_slice(), "the key that it was sealed with"),
        (&file, &key, &["--least-version", "5"], "version 5 or a later one, got version 4"),
        (&file, &key, &["-m", &other], "for this base"),
        (&file, &key, &["--verify-key-file", &wrong], "expected a signature"),
        (&broken, &key, &[], "got changed ones"),
        (&file, &file, &[], "32 bytes or 64 hexadecimal digits"),
        (&adapter, &key, &[], "could not read it"),
    ] {
        let said = f.said(&[&["unseal", file, "--key-file", key, "-o", &none], more].concat());
        assert!(said.contains(says), "{says}: {said}");
    }
    assert!(!Path::new(&none).exists());
    for (args, says) in [
        (&["generate", "-m", model, "-a", &file, "-p", "x"][..], "`-a FILE --key-file KEY`"),
        (&["seal", &adapter, "-m", &other, "--key-file", &key, "-o", &none], "the adapter was trained on"),
        (&["seal", &adapter, "-m", model, "--key-file", &key, "-o", &key], "what the command reads"),
        (&["seal", &adapter, "-m", model, "--key-file", &key, "-o", &wrong], "a file of another kind"),
        (&["seal", &file, "-m", model, "--key-file", &key, "-o", &none], "the key of this sealed adapter"),
        (&unseal, "a place where nothing is"),
    ] {
        let said = f.said(args);
        assert!(said.contains(says), "{says}: {said}");
    }
    assert_eq!(fs::read(&key).unwrap(), [7; 32]);
}
