//! Adapters that are read from memory: no folder is touched.

use super::methods::{base, config, data};
use crate::common::logits;
use pocketlora::adapter::{AdapterFile, Kind, Parts};
use pocketlora::train::TrainConfig;
use pocketlora::{Engine, ErrorCode};
use std::fs;
use std::path::Path;

/// The files below `dir`, by their names in it.
pub fn parts(dir: &Path) -> Parts {
    let mut parts = Parts::new();
    for name in
        ["adapter_config.json", "adapter_model.safetensors", "centroid.safetensors", "lessons.json", "beside.json"]
    {
        for folder in ["", "beside/prefix-tuning/"] {
            let name = format!("{folder}{name}");
            parts.extend(fs::read(dir.join(&name)).ok().map(|bytes| (name, bytes.into())));
        }
    }
    parts
}

#[test]
fn an_adapter_from_memory_does_what_that_of_its_folder_does() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("together");
    let settings =
        TrainConfig { steps: Some(2), num_virtual_tokens: Some(3), beside: vec![Kind::PrefixTuning], ..config() };
    base(1).trainer(settings, data(), None, None, &out).unwrap().run(&mut super::begun::Losses::default()).unwrap();
    let mut files = parts(&out);
    assert!(files.len() > 4, "{:?}", files.keys());
    let of = |attach: &dyn Fn(&Engine)| {
        let engine = base(1);
        attach(&engine);
        logits(&engine, &[1, 5, 9])
    };
    let want = of(&|engine| assert!(engine.attach(&out, 1.0).is_ok()));
    assert_ne!(want, of(&|_| ()));
    let read = |files: &Parts| AdapterFile::from_parts(files.clone(), "mine");
    assert_eq!(want, of(&|engine| assert!(engine.attach_file(read(&files).unwrap(), 1.0).is_ok())));
    let there = AdapterFile::open(&out).unwrap();
    let file = read(&files).unwrap();
    assert_eq!((file.folder(), there.folder()), (None, Some(out.as_path())));
    assert_eq!((file.centroid().unwrap(), file.warnings.len()), (there.centroid().unwrap(), there.warnings.len()));

    // What it goes on to learn, and how it is saved, are the same as well.
    let go_on = |init: &AdapterFile, name: &str| {
        let settings = TrainConfig { steps: Some(2), ..config() };
        let out = dir.path().join(name);
        let trainer = base(1).trainer(settings, data(), None, Some(init), &out);
        trainer.unwrap().run(&mut super::begun::Losses::default()).unwrap();
        parts(&out)
    };
    let alone = |file: &AdapterFile| file.clone().each().remove(0);
    assert_eq!(go_on(&alone(&file), "from-memory"), go_on(&alone(&there), "from-folder"));
    let plain = AdapterFile::from_bytes(&files["adapter_config.json"], files["adapter_model.safetensors"].clone(), "x");
    assert_eq!(plain.unwrap().tensors, there.tensors);

    files.insert("tokenizer.json".to_owned(), b"{}".to_vec().into());
    assert!(read(&files).unwrap().warnings.iter().any(|warning| warning.contains("`tokenizer.json` is not read")));
    for (name, bytes, says) in [
        ("adapter_model.safetensors", None, "`mine`: expected `adapter_model.safetensors` among the files"),
        ("beside/prefix-tuning/adapter_config.json", None, "prefix-tuning`: expected `adapter_config.json`"),
        ("adapter_config.json", Some(&b"[]"[..]), "`mine/adapter_config.json`"),
        ("beside.json", Some(br#"{"beside": ["../up"]}"#), "folders below this one"),
        ("beside/prefix-tuning/beside.json", Some(b"{}"), "beside itself"),
    ] {
        let mut broken = files.clone();
        match bytes {
            Some(bytes) => broken.insert(name.to_owned(), bytes.into()),
            None => broken.remove(name),
        };
        let error = read(&broken).unwrap_err();
        assert!(error.to_string().contains(says), "{says}: {error}");
        assert!([ErrorCode::Format, ErrorCode::Unsupported].contains(&error.code()));
    }
}
