//! Adapters know the content of their base: copies of it are the same base, other weights are told of, and `--strict`
//! refuses them.

use crate::common::{check_all, golden};
use crate::fixture::{Fixture, fixture};
use safetensors::SafeTensors;
use std::fs;
use std::path::Path;

/// A copy of the model whose `q_proj` of the first layer was trained further, so to say.
fn changed(f: &Fixture) -> String {
    let out = f.path("changed");
    fs::create_dir(&out).unwrap();
    for entry in fs::read_dir(&f.model).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        fs::write(Path::new(&out).join(path.file_name().unwrap()), bytes).unwrap();
    }
    let path = Path::new(&out).join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let start = {
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let view = file.tensor("model.layers.0.self_attn.q_proj.weight").unwrap();
        assert_eq!(view.dtype(), safetensors::Dtype::BF16);
        view.data().as_ptr() as usize - bytes.as_ptr() as usize..view.data().len() / 2
    };
    for i in 0..start.end {
        let at = start.start + 2 * i;
        let value = half::bf16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
        let moved = half::bf16::from_f32(value * (1.0 + 0.02 * (i % 7) as f32));
        bytes[at..at + 2].copy_from_slice(&moved.to_le_bytes());
    }
    fs::write(path, bytes).unwrap();
    out
}

#[test]
fn an_adapter_knows_its_base_in_any_of_its_copies() {
    let f = fixture();
    let (model, out, nf4) = (f.model.to_str().unwrap(), f.path("adapter"), f.path("nf4"));
    f.ok(&f.train_args(&out));
    let hash = f.json(&["info", &out, "--json"])["base_hash"].clone();
    assert!(hash.as_str().unwrap().starts_with("nf4-codes-1:"), "{hash}");
    f.ok(&["quantize", model, "-o", &nf4]);
    let answer = ["generate", "-a", &out, "-p", "a", "-n", "2"];
    // Quantized at first use, as it is in its file, and quantized by command.
    for base in [&["-m", model][..], &["-m", model, "--no-quantize"], &["-m", &nf4]] {
        let done = f.run(&[&answer[..], base, &["--strict"]].concat());
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success() && !said.contains("content hash"), "{base:?}: {said}");
    }
    for base in [model, &nf4] {
        let merged = f.path("merged");
        f.ok(&["merge", "-m", base, "-a", &out, "-o", &merged, "--overwrite", "--strict"]);
    }
    // One of PEFT's tells nothing of the content, and passes.
    let lora = golden("adapters/lora");
    f.ok(&["generate", "-m", model, "-a", lora.to_str().unwrap(), "-p", "a", "-n", "2", "--strict"]);
}

#[test]
fn another_base_is_spoken_of_and_refused_with_strict() {
    let f = fixture();
    let (out, other, gguf, mlx) = (f.path("adapter"), changed(&f), f.path("model.gguf"), f.path("mlx"));
    f.ok(&f.train_args(&out));
    // llama.cpp knows no tokenizer that cuts texts into no words.
    let tokenizer = f.model.join("tokenizer.json");
    let text = fs::read_to_string(&tokenizer).unwrap();
    fs::write(&tokenizer, text.replace("\"use_regex\":false", "\"use_regex\":true")).unwrap();
    f.ok(&["export", f.model.to_str().unwrap(), "--to", "gguf", "--type", "q4_0", "-o", &gguf]);
    f.ok(&["export", &out, "--to", "mlx", "-m", f.model.to_str().unwrap(), "-o", &mlx]);
    let (merged, next, data) = (f.path("merged"), f.path("next"), f.data.to_str().unwrap().to_owned());
    let train = ["train", "--auto", "off", "-d", &data, "-o", &next, "--epochs", "1", "--init", &out, "--overwrite"];
    let cases = [
        vec!["generate", "-p", "a", "-n", "2", "-a", &out],
        vec!["generate", "-p", "a", "-n", "2", "-a", &mlx],
        vec!["chat", "-a", &out],
        vec!["eval", "-d", &data, "-a", &out],
        vec!["merge", "-a", &out, "-o", &merged, "--overwrite"],
        train.to_vec(),
    ];
    check_all(cases, |args| {
        for base in [&other, &gguf] {
            let args = [&args[..], &["-m", base]].concat();
            let done = f.run(&args);
            let said = String::from_utf8_lossy(&done.stderr).into_owned();
            if !done.status.success() || !said.contains("it was trained on other weights of this shape (content hash") {
                return Err(format!("{args:?}: {:?}: {said}", done.status));
            }
            let done = f.run(&[&args[..], &["--strict"]].concat());
            let said = String::from_utf8_lossy(&done.stderr).into_owned();
            if done.status.code() != Some(1) || !said.contains("expected the base that the adapter was trained on") {
                return Err(format!("{args:?} --strict: {:?}: {said}", done.status));
            }
            if !said.contains("leave `--strict` out") {
                return Err(format!("{args:?}: no way on: {said}"));
            }
        }
        Ok(())
    });
}
