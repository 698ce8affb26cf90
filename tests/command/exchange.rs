//! `export`, and what is opened of other programs, as commands.

use crate::common::golden;
use crate::fixture::fixture;
use serde_json::Value;
use std::path::Path;

#[test]
fn the_command_writes_and_reads_them() {
    let f = fixture();
    let (model, lora) = (f.model.to_str().unwrap().to_owned(), golden("adapters/lora"));
    let lora = lora.to_str().unwrap();
    let [gguf, mlx, peft] = ["a.gguf", "mlx", "peft"].map(|name| f.path(name));
    f.ok(&["export", lora, "--to", "gguf", "-o", &gguf, "-m", &model]);
    f.ok(&["export", &gguf, "--to", "mlx", "-o", &mlx, "-m", &model]);
    f.ok(&["export", &mlx, "--to", "peft", "-o", &peft]);
    let shipped = f.json(&["info", lora, "--json"]);
    for path in [&gguf, &mlx, &peft] {
        let info = f.json(&["info", path, "--json"]);
        for key in ["rank", "alpha", "modules", "parameters", "targets"] {
            let sorted = |v: &Value| match v.as_array() {
                Some(list) => {
                    let mut list: Vec<_> = list.iter().map(Value::to_string).collect();
                    list.sort();
                    list.join(" ")
                }
                None => v.as_f64().unwrap().to_string(),
            };
            assert_eq!(sorted(&info[key]), sorted(&shipped[key]), "{key} of {path}");
        }
        let answer = |adapter: &str| f.ok(&["generate", "-m", &model, "-a", adapter, "-p", "ab", "-n", "8"]);
        assert_eq!(answer(path), answer(lora), "{path}");
    }
    assert!(f.said(&["export", lora, "--to", "mlx", "-o", &mlx, "-m", &model]).contains("holds something"));
    assert!(f.said(&["export", lora, "--to", "gguf", "-o", &f.path("none.gguf")]).contains("-m"), "no base is named");
    assert!(!Path::new(&f.path("none.gguf")).exists());

    // A model, too, in one of llama.cpp's types.
    let (tiny, out) = (golden("tiny-llama"), f.path("model.gguf"));
    let export = ["export", tiny.to_str().unwrap(), "--to", "gguf", "--type", "q8_0", "-o", &out];
    f.ok(&export);
    let types = f.json(&["info", &out, "--json"])["types"].clone();
    let dtypes: Vec<_> = types.as_array().unwrap().iter().map(|t| t["dtype"].as_str().unwrap().to_owned()).collect();
    assert_eq!(dtypes, ["F32", "Q8_0"]);
    assert!(f.said(&export).contains("something is"), "an older one stays");
    assert!(
        f.said(&["export", lora, "--to", "gguf", "--type", "f16", "-o", &f.path("x.gguf")]).contains("model alone")
    );
    // What llama.cpp leaves out of a model is said.
    let windows = golden("tiny-mistral");
    let said = f.said(&["export", windows.to_str().unwrap(), "--to", "gguf", "-o", &f.path("mistral.gguf")]);
    assert!(said.contains("without its window of 8 tokens"), "{said}");
    assert!(
        f.said(&["export", tiny.to_str().unwrap(), "--to", "mlx", "-o", &f.path("m")]).contains("`gguf` for a model")
    );
}

#[test]
fn an_adapter_in_few_bits_is_written_measured_and_used() {
    let f = fixture();
    let (model, data) = (f.model.to_str().unwrap(), f.data.to_str().unwrap());
    let [run, out] = ["run", "a.signs"].map(|name| f.path(name));
    f.ok(&[
        "train", "--auto", "off", "-m", model, "-d", data, "-o", &run, "--lr", "3e-3", "--steps", "8", "--seed", "3",
    ]);
    let export = ["export", &run, "--to", "compressed", "-o", &out, "-m", model, "-d", data, "--density", "0.4"];
    let said = f.ok(&export);
    assert!(said.contains("bits each") && said.contains("with the compressed one"), "{said}");
    let size = |path: &str| std::fs::metadata(path).unwrap().len();
    assert!(size(&out) * 4 < size(&format!("{run}/adapter_model.safetensors")), "{} bytes", size(&out));
    assert_eq!(f.json(&["info", &out, "--json"])["rank"], f.json(&["info", &run, "--json"])["rank"]);
    f.ok(&["generate", "-m", model, "-a", &out, "-p", "ab", "-n", "8"]);
    assert!(f.said(&export).contains("something is"), "an older one stays");
    let said = f.said(&["export", &run, "--to", "peft", "-o", &f.path("p"), "--density", "0.4"]);
    assert!(said.contains("`--to compressed` alone"), "{said}");
}
