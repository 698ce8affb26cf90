//! Adapters in the files of other programs: out and in again, and what they do on the way.

use crate::common::{check_all, golden, logits, max_diff, open_exact};
use pocketlora::adapter::{AdapterFile, HostTensor, Method, export_gguf, export_mlx};
use pocketlora::format::gguf::Container;
use pocketlora::format::safetensors::{Dtype, TensorFile};
use pocketlora::internals;
use pocketlora::{Engine, ErrorCode};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const IDS: [u32; 8] = [5, 80, 3, 20, 77, 90, 9, 4];

/// Goldens and adapters made for a base each, by what is special about them.
fn cases(dir: &Path) -> Vec<(&'static str, PathBuf, PathBuf)> {
    let llama = golden("tiny-llama");
    let of = |name: &str| golden("adapters").join(name);
    vec![
        ("all layers, rows of q and k in llama.cpp's order", llama.clone(), of("lora")),
        ("rslora", llama.clone(), of("rslora")),
        ("ranks and alphas of some layers", llama, of("lora_patterns")),
        ("another family, only its last layer", golden("tiny-qwen2"), last_layer(dir)),
        ("heads of another width", golden("tiny-mistral"), with_head(dir)),
        ("matrices that are one in both", golden("families/phi3"), joined(dir)),
    ]
}

/// An adapter with a term of rank 2 on each of `layers` (module, in, out).
fn made(dir: &Path, layers: &[(&str, usize, usize)]) -> PathBuf {
    let config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM", "lora_dropout": 0.25});
    let value = |i: usize| ((i * 13 + 5) % 17) as f32 / 20.0 - 0.4 + 1e-4;
    let tensor = |rows: usize, cols: usize| HostTensor {
        shape: vec![rows, cols],
        data: (0..rows * cols).map(|i| value(i + rows)).collect(),
    };
    let parts = layers.iter().flat_map(|(module, input, out)| {
        [(format!("{module}.lora_A.weight"), tensor(2, *input)), (format!("{module}.lora_B.weight"), tensor(*out, 2))]
    });
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let bytes: Vec<_> = parts
        .map(|(name, t)| (name, t.shape, t.data.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()))
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (name.clone(), safetensors::tensor::TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    fs::write(dir.join("adapter_model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    dir.to_owned()
}

fn last_layer(dir: &Path) -> PathBuf {
    let layers = [("model.layers.1.self_attn.k_proj", 64, 32), ("model.layers.1.mlp.down_proj", 64, 64)];
    made(&dir.join("last layer"), &layers)
}

fn with_head(dir: &Path) -> PathBuf {
    let layers = [("model.layers.0.self_attn.q_proj", 64, 128), ("lm_head", 64, 96)];
    made(&dir.join("with head"), &layers)
}

fn joined(dir: &Path) -> PathBuf {
    let layers = [("model.layers.1.self_attn.qkv_proj", 64, 192), ("model.layers.0.mlp.gate_up_proj", 64, 192)];
    made(&dir.join("joined"), &layers)
}

fn attached(base: &Path, adapter: &Path) -> Engine {
    let engine = open_exact(base, 1);
    engine.attach(adapter, 1.0).unwrap_or_else(|e| panic!("{e}"));
    engine
}

fn model(engine: &Engine) -> Arc<dyn pocketlora_models::Model> {
    Arc::clone(&internals::base(engine).model)
}

/// Module, rank, factor, A and B.
type Term = (String, usize, f32, Vec<f32>, Vec<f32>);

/// The terms of all modules, in the base's order of rows.
fn terms(file: &AdapterFile, engine: &Engine) -> Vec<Term> {
    let file = file.fitted(model(engine).as_ref()).unwrap();
    let Method::Lora(lora) = &file.method else { panic!("no LoRA") };
    let part = |module: &str, part: &str| file.tensors[&format!("{module}.{part}.weight")].data.clone();
    file.modules()
        .map(|module| {
            let (rank, factor) = lora.of_module(module);
            (module.to_owned(), rank, factor, part(module, "lora_A"), part(module, "lora_B"))
        })
        .collect()
}

#[test]
fn what_goes_out_and_in_again_does_the_same() {
    let dir = tempfile::tempdir().unwrap();
    check_all(cases(dir.path()).iter().enumerate(), |(i, (name, base, adapter))| {
        let file = AdapterFile::open(adapter).unwrap();
        let engine = open_exact(base, 1);
        let at = |ending: &str| dir.path().join(format!("{i}{ending}"));
        export_gguf(&file, model(&engine).as_ref(), &at(".gguf")).map_err(|e| format!("{name}: {e}"))?;
        export_mlx(&file, model(&engine).as_ref(), &at(".mlx")).map_err(|e| format!("{name}: {e}"))?;
        let expected = logits(&attached(base, adapter), &IDS);
        let own = terms(&file, &engine);
        for format in [".gguf", ".mlx"] {
            let back = AdapterFile::open(&at(format)).map_err(|e| format!("{name}: {e}"))?;
            let (diff, at_index) = max_diff(&logits(&attached(base, &at(format)), &IDS), &expected);
            if diff > 1e-4 {
                return Err(format!("{name}{format}: off by {diff} at {at_index}"));
            }
            // One scale for all is exact; a layer with its own has it in its B.
            let again = terms(&back, &engine);
            let exact = !name.contains("some layers");
            if exact && again != own {
                return Err(format!("{name}{format}: other values"));
            }
            // On to PEFT, where nothing is lost, and to the other format again.
            let peft = at(&format!("{format}.peft"));
            back.fitted(model(&engine).as_ref()).unwrap().save_exact(&peft).unwrap();
            let third = AdapterFile::open(&peft).map_err(|e| format!("{name}: {e}"))?;
            if terms(&third, &engine) != again {
                return Err(format!("{name}{format}.peft: other values"));
            }
        }
        Ok(())
    });
}

/// The names, shapes and numbers that llama.cpp and mlx-lm look for.
#[test]
fn the_files_are_as_the_other_programs_have_them() {
    let dir = tempfile::tempdir().unwrap();
    let (gguf, mlx) = (dir.path().join("a.gguf"), dir.path().join("mlx"));
    let engine = open_exact(&golden("tiny-llama"), 1);
    let rslora = AdapterFile::open(&golden("adapters/rslora")).unwrap();
    export_gguf(&rslora, model(&engine).as_ref(), &gguf).unwrap();
    let file = Container::parse(fs::read(&gguf).unwrap().into(), &gguf).unwrap();
    let text = |key: &str| match file.metadata.get(key) {
        Some(pocketlora::format::gguf::Value::String(text)) => text.clone(),
        other => panic!("{key}: {other:?}"),
    };
    assert_eq!(
        [text("general.type"), text("general.architecture"), text("adapter.type")],
        ["adapter", "llama", "lora"]
    );
    let config: Value =
        serde_json::from_slice(&fs::read(golden("adapters/rslora/adapter_config.json")).unwrap()).unwrap();
    let (rank, alpha) = (config["r"].as_f64().unwrap(), config["lora_alpha"].as_f64().unwrap());
    let folded = file.metadata.get("adapter.lora.alpha").unwrap().as_f64().unwrap();
    assert!((folded - alpha * rank.sqrt()).abs() < 1e-5, "{folded}: rsLoRA's scale is folded into alpha");
    let shapes: Vec<_> = file.tensors.iter().map(|t| (t.name.as_str(), &t.shape[..])).collect();
    let r = rank as usize;
    assert_eq!(shapes[0], ("blk.0.attn_q.weight.lora_a", &[r, 128][..]));
    assert_eq!(shapes[1], ("blk.0.attn_q.weight.lora_b", &[128, r][..]));
    // Rows 0 and 16 of a head of 32 are neighbours there.
    let mut stored = vec![0.0; 128 * r];
    file.read_rows(&file.tensors[1], 0..128, &mut stored);
    let own = &rslora.tensors["model.layers.0.self_attn.q_proj.lora_B.weight"].data;
    assert_eq!((&stored[..r], &stored[r..2 * r]), (&own[..r], &own[16 * r..17 * r]));

    let adapter = last_layer(dir.path());
    let engine = open_exact(&golden("tiny-qwen2"), 1);
    export_mlx(&AdapterFile::open(&adapter).unwrap(), model(&engine).as_ref(), &mlx).unwrap();
    let config: Value = serde_json::from_slice(&fs::read(mlx.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&config["fine_tune_type"], &config["num_layers"]), (&"lora".into(), &1.into()));
    let parameters = json!({"dropout": 0.25, "keys": ["mlp.down_proj", "self_attn.k_proj"], "rank": 2, "scale": 1.5});
    assert_eq!(config["lora_parameters"], parameters);
    let file = TensorFile::open(&mlx.join("adapters.safetensors")).unwrap();
    let shapes: Vec<_> = file.tensors().map(|(name, t)| (name, &t.shape[..])).collect();
    assert_eq!(shapes[0], ("model.layers.1.mlp.down_proj.lora_a", &[64, 2][..]));
    assert_eq!(shapes[1], ("model.layers.1.mlp.down_proj.lora_b", &[2, 64][..]));
}

#[test]
fn what_a_format_cannot_say_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (peft, tiny) = (open_exact(&golden("peft/base"), 1), open_exact(&golden("tiny-llama"), 1));
    let tied_head = made(&dir.join("tied head"), &[("lm_head", 128, 512)]);
    let of = |name: &str| golden("methods").join(name);
    let out = dir.join("out");
    type Write = fn(&AdapterFile, &dyn pocketlora_models::Model, &Path) -> pocketlora::Result<()>;
    let formats: [(&str, Write); 2] = [("GGUF", export_gguf), ("mlx", export_mlx)];
    for (format, write) in formats {
        check_all(
            [
                ("ia3", of("ia3"), &peft, "IA3"),
                ("biases", of("lora_bias"), &peft, "lora_bias"),
                ("the embedding", of("lora_embedding_head"), &peft, "embed_tokens"),
                ("whole weights", of("lora_modules_to_save"), &peft, "lm_head.weight"),
                ("a tied head", tied_head.clone(), &tiny, "head that is the embedding"),
                ("another base", of("lora"), &tiny, "trained on"),
            ],
            |(name, adapter, engine, said)| {
                let file = AdapterFile::open(adapter).unwrap();
                match write(&file, model(engine).as_ref(), &out) {
                    Ok(()) => Err(format!("{name} as {format}: written")),
                    Err(e) if e.to_string().contains(said) && !out.exists() => Ok(()),
                    Err(e) => Err(format!("{name} as {format}: expected `{said}` in: {e}")),
                }
            },
        );
    }
}

/// Changes one thing of a good file at a time.
#[test]
fn broken_files_of_other_programs_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let engine = open_exact(&golden("tiny-llama"), 1);
    let lora = AdapterFile::open(&golden("adapters/lora")).unwrap();
    let (gguf, mlx) = (dir.join("good.gguf"), dir.join("good"));
    export_gguf(&lora, model(&engine).as_ref(), &gguf).unwrap();
    export_mlx(&lora, model(&engine).as_ref(), &mlx).unwrap();
    let good = fs::read(&gguf).unwrap();
    let replaced = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = good.windows(from.len()).position(|w| w == from.as_bytes()).unwrap_or_else(|| panic!("no {from}"));
        let mut bytes = good.clone();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        bytes
    };
    let of_another = replaced("llama", "qwen2");
    check_all(
        [
            ("a model", replaced("adapter", "model  "), "general.type"),
            ("another kind", replaced("lora", "dora"), "adapter.type"),
            ("an unknown architecture", replaced("llama", "wrong"), "architecture `wrong`"),
            ("half a pair", replaced("lora_b", "lora_c"), "lora_c"),
            ("two halves", replaced("lora_b", "lora_a"), "a second one"),
            ("a strange place", replaced("attn_q", "attn_x"), "attn_x"),
            ("cut", good[..good.len() - 8].to_vec(), "within"),
        ],
        |(name, bytes, said)| {
            let path = dir.join("bad.gguf");
            fs::write(&path, bytes).unwrap();
            match AdapterFile::open(&path) {
                Ok(_) => Err(format!("{name}: opened")),
                Err(e) if e.to_string().contains(said) || *name == "a model" => Ok(()),
                Err(e) => Err(format!("{name}: expected `{said}` in: {e}")),
            }
        },
    );
    fs::write(dir.join("other.gguf"), of_another).unwrap();
    let error = engine.attach(&dir.join("other.gguf"), 1.0).unwrap_err();
    assert_eq!(error.code(), ErrorCode::AdapterMismatch);
    assert!(error.to_string().contains("`qwen2`"), "{error}");

    let config = fs::read_to_string(mlx.join("adapter_config.json")).unwrap();
    check_all(
        [
            ("dora", "\"lora\"", "\"dora\"", "fine_tune_type: dora"),
            ("no scale", "\"scale\"", "\"strength\"", "scale"),
            ("no parameters", "lora_parameters", "parameters", "lora_parameters"),
            ("all drops", "\"dropout\": 0.0", "\"dropout\": 1.0", "dropout"),
        ],
        |(name, from, to, said)| {
            if !config.contains(from) {
                return Err(format!("{name}: no {from} in {config}"));
            }
            fs::write(mlx.join("adapter_config.json"), config.replacen(from, to, 1)).unwrap();
            match AdapterFile::open(&mlx) {
                Ok(_) => Err(format!("{name}: opened")),
                Err(e) if e.to_string().contains(said) => Ok(()),
                Err(e) => Err(format!("{name}: expected `{said}` in: {e}")),
            }
        },
    );
}
