//! What people give as a model and is none, or is another one than its config says.

use super::{Fixture, answer, check_all, fixture, open, refused};
use pocketlora::chat::Message;
use pocketlora::format::{Checkpoint, Target, open_source};
use pocketlora::{Error, ErrorCode, check_import};
use serde_json::{Map, Value, json};
use std::fs;
use std::path::Path;

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
const Q: &str = "model.layers.0.self_attn.q_proj";

/// A safetensors file with tensors added, changed or taken away.
struct Tensors(Vec<(String, String, Vec<usize>, Vec<u8>)>);

impl Tensors {
    fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensor = |(name, t): (String, safetensors::tensor::TensorView<'_>)| {
            (name, format!("{:?}", t.dtype()), t.shape().to_vec(), t.data().to_vec())
        };
        Self(file.tensors().into_iter().map(tensor).collect())
    }

    fn data(&self, name: &str) -> Vec<u8> {
        self.0.iter().find(|t| t.0 == name).unwrap().3.clone()
    }

    fn add(&mut self, name: &str, dtype: &str, shape: &[usize], data: Vec<u8>) {
        self.0.retain(|t| t.0 != name);
        self.0.push((name.to_owned(), dtype.to_owned(), shape.to_vec(), data));
    }

    fn write(&self, path: &Path) {
        let (mut header, mut data) = (Map::new(), Vec::new());
        for (name, dtype, shape, bytes) in &self.0 {
            let at = [data.len(), data.len() + bytes.len()];
            header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": at}));
            data.extend(bytes);
        }
        let header = Value::Object(header).to_string();
        fs::write(path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()).unwrap();
    }
}

fn import(path: &Path) -> Result<(), Error> {
    let source = open_source(path)?;
    check_import(source.as_ref(), path)
}

/// Both ways in, running as it is and converting, refuse with `words`.
fn refused_both_ways(what: &str, path: &Path, code: ErrorCode, words: &[&str]) -> Result<(), String> {
    refused(&format!("{what}, opened"), open(path), code, words)?;
    refused(&format!("{what}, imported"), import(path), code, words)
}

#[test]
fn contents_of_another_kind_are_named_in_every_file_of_a_model() {
    let contents: [(&[u8], &str, &str); 4] = [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4976698672\n", "Git LFS", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html><title>Sign in</title></html>", "a web page", "HF_TOKEN"),
        (b"Entry not found", "a server's answer", "pocketlora pull"),
        (b"", "an empty file", "again"),
    ];
    let files = ["config.json", "tokenizer.json", "model.safetensors"];
    let cases = contents.iter().flat_map(|c| files.iter().map(move |file| (*c, *file)));
    let f = fixture();
    check_all(cases, |((content, name, next), file)| {
        let good = fs::read(f.model.join(file)).unwrap();
        f.write(file, content);
        let result = refused_both_ways(&format!("{name} as {file}"), &f.model, ErrorCode::Format, &[name, next, file]);
        f.write(file, good);
        result
    });
    for (content, name, next) in contents {
        f.write("chat_template.jinja", content);
        let words = ["chat_template.jinja", name, next];
        refused_both_ways(name, &f.model, ErrorCode::Format, &words).unwrap();
    }
    fs::remove_file(f.model.join("chat_template.jinja")).unwrap();
    let gguf = f.dir.path().join("model.gguf");
    for (content, name, next) in contents {
        fs::write(&gguf, content).unwrap();
        refused(name, import(&gguf), ErrorCode::Format, &["model.gguf", name, next]).unwrap();
    }
    fs::copy(f.model.join("model.safetensors"), &gguf).unwrap();
    refused("safetensors", import(&gguf), ErrorCode::Unsupported, &["safetensors under", "config.json"]).unwrap();
    // Weights of other programs under our names.
    let others: [(&[u8], &str); 4] = [
        (b"\x80\x02\x8a\x0al\xfc\x9cF", "a Python pickle"),
        (b"PK\x03\x04\0\0\0\0", "a zip archive"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"tjgg\x03\0\0\0", "before GGUF"),
    ];
    for (content, name) in others {
        f.write("model.safetensors", content);
        refused_both_ways(name, &f.model, ErrorCode::Unsupported, &[name, "model.safetensors"]).unwrap();
    }
    f.write("model.safetensors", b"GGUF\x03\0\0\0");
    refused_both_ways("GGUF", &f.model, ErrorCode::Format, &["got GGUF", "`.gguf`"]).unwrap();
    f.write("config.json", br#"{"error": "Access to model a/b is restricted"}"#);
    f.write("model.safetensors", b"GGUF");
    refused("an answer in JSON", open(&f.model), ErrorCode::Format, &["Access to model a/b"]).unwrap();
}

#[test]
fn a_byte_order_mark_before_a_config_is_left_out() {
    let f = fixture();
    let config = fs::read(f.model.join("config.json")).unwrap();
    f.write("config.json", [b"\xef\xbb\xbf", &config[..]].concat());
    f.answer().unwrap();
}

#[test]
fn other_quantizations_are_named() {
    let f = fixture();
    let (config, path) = (f.json("config.json"), f.model.join("model.safetensors"));
    let methods = [
        ("quantization_config", json!({"quant_method": "gptq", "bits": 4}), "GPTQ", "pocketlora quantize"),
        ("quantization_config", json!({"quant_method": "compressed-tensors"}), "compressed-tensors", "pocketlora pull"),
        (
            "quantization_config",
            json!({"quant_method": "bitsandbytes", "load_in_8bit": true}),
            "in 8 bits",
            "pocketlora quantize",
        ),
        ("quantization", json!({"group_size": 64, "bits": 4}), "MLX", "pocketlora quantize"),
    ];
    check_all(methods, |(key, value, name, next)| {
        f.with("config.json", &config, key, Some(value));
        refused(name, open(&f.model), ErrorCode::Unsupported, &["config.json", name, "16-bit", next])
    });
    let value = json!({"quant_method": "compressed-tensors"});
    f.with("config.json", &config, "quantization_config", Some(&value));
    refused_both_ways("as a source", &f.model, ErrorCode::Unsupported, &["compressed-tensors"]).unwrap();
    // The config says nothing of it.
    f.write("config.json", Value::Object(config).to_string());
    let good = Tensors::read(&path);
    let traces: [(&[&str], &str); 5] = [
        (&["g_idx", "qweight", "qzeros"], "GPTQ"),
        (&["qweight", "qzeros"], "AWQ"),
        (&["scales", "biases"], "MLX"),
        (&["weight_scale_inv"], "FP8"),
        (&["SCB"], "bitsandbytes in 8 bits"),
    ];
    check_all(traces, |(endings, name)| {
        let mut file = Tensors(good.0.clone());
        endings.iter().for_each(|ending| file.add(&format!("{Q}.{ending}"), "U8", &[1], vec![1]));
        file.write(&path);
        refused(name, open(&f.model), ErrorCode::Unsupported, &["model.safetensors", name])?;
        // As a source, its parts are looked at.
        let source = open_source(&f.model).map(|_| ());
        refused(name, source, ErrorCode::Format, &["model.safetensors", Q])
    });
    let mut file = Tensors(good.0);
    file.0.retain(|tensor| tensor.0 != "model.norm.weight");
    file.add("model.norm.weight", "F64", &[128], vec![0; 8 * 128]);
    file.write(&path);
    refused_both_ways("F64", &f.model, ErrorCode::Unsupported, &["model.safetensors", "`F64`", ".float()"]).unwrap();
}

/// Files of a folder, and how it is refused.
type FolderCase<'a> = (&'a [(&'a str, &'a [u8])], ErrorCode, [&'a str; 2]);

#[test]
fn a_folder_says_what_it_is_or_lacks() {
    use ErrorCode::{Config, Format, Io, Unsupported};
    let f = fixture();
    let config = fs::read(f.model.join("config.json")).unwrap();
    let index = br#"{"weight_map": {"a": "m-1-of-2.safetensors", "b": "m-2-of-2.safetensors"}}"#;
    // Files of an empty folder, and files beside a config.
    let alone: [FolderCase<'_>; 4] = [
        (&[], Config, ["an empty folder", "pocketlora pull"]),
        (&[("adapter_config.json", br#"{"base_model_name_or_path": "a/b"}"#)], Config, ["an adapter", "-m a/b -a"]),
        (&[("model_index.json", b"{}")], Unsupported, ["Diffusers", "pictures"]),
        (&[("tiny.gguf", b"GGUF")], Config, ["tiny.gguf`", "give"]),
    ];
    let beside: [FolderCase<'_>; 5] = [
        (&[], Io, ["weights", "pocketlora pull"]),
        (&[("pytorch_model.bin", b"PK")], Unsupported, ["pytorch_model.bin", "save_pretrained"]),
        (&[("tf_model.h5", b"\x89HDF")], Unsupported, ["TensorFlow", "safetensors"]),
        (&[("model-00001-of-00002.safetensors", b"")], Format, ["model.safetensors.index.json", "fetch"]),
        (
            &[("model.safetensors.index.json", index), ("m-1-of-2.safetensors", b"")],
            Io,
            ["`m-2-of-2.safetensors`", "pocketlora pull"],
        ),
    ];
    let cases = alone.iter().map(|c| (c, false)).chain(beside.iter().map(|c| (c, true)));
    check_all(cases.enumerate(), |(i, ((files, code, words), with_config))| {
        let dir = f.dir.path().join(format!("folder{i}"));
        fs::create_dir(&dir).unwrap();
        files.iter().for_each(|(name, content)| fs::write(dir.join(name), content).unwrap());
        if *with_config {
            fs::write(dir.join("config.json"), &config).unwrap();
        }
        refused_both_ways(&format!("{:?}", words), &dir, *code, words)
    });
    let lone = f.dir.path().join("lone.safetensors");
    fs::copy(f.model.join("model.safetensors"), &lone).unwrap();
    refused_both_ways("lone", &lone, Format, &["lone.safetensors", "beside the weights"]).unwrap();
    let nowhere = f.dir.path().join("nowhere");
    refused_both_ways("nowhere", &nowhere, Io, &["nowhere`", "nothing is"]).unwrap();
}

/// Writes `f`'s model with a head of its own beside an embedding that the config ties to it.
fn with_head(f: &Fixture, head: Vec<u8>) {
    let path = f.model.join("model.safetensors");
    let mut file = Tensors::read(&path);
    let (_, dtype, shape, _) = file.0.iter().find(|t| t.0 == EMBEDDING).unwrap().clone();
    file.add(HEAD, &dtype, &shape, head);
    file.write(&path);
}

#[test]
fn a_head_beside_a_tied_embedding_is_used_unless_it_is_a_copy() {
    let f = fixture();
    let config = f.json("config.json");
    assert_eq!(config["tie_word_embeddings"], true);
    let score = |path: &Path| {
        let engine = super::common::open_exact(path, 1);
        pocketlora::eval::score_text(&engine, &[5, 6, 7, 9], 512, &mut |_| true).unwrap().nll()
    };
    let tied = score(&f.model);

    let embedding = Tensors::read(&f.model.join("model.safetensors")).data(EMBEDDING);
    with_head(&f, embedding.clone());
    assert_eq!(score(&f.model), tied);
    assert!(!Checkpoint::open(&f.model).unwrap().contains(HEAD));

    // A head alone is both.
    let path = f.model.join("model.safetensors");
    let mut file = Tensors::read(&path);
    file.0.retain(|t| t.0 != EMBEDDING);
    file.write(&path);
    assert_eq!(score(&f.model), tied);
    file.add(EMBEDDING, "BF16", &[512, 128], embedding.clone());
    file.write(&path);

    let other: Vec<u8> = embedding.chunks(2).rev().flatten().copied().collect();
    with_head(&f, other);
    let own = score(&f.model);
    assert_ne!(own, tied);
    f.with("config.json", &config, "tie_word_embeddings", Some(&json!(false)));
    assert_eq!(score(&f.model), own);

    // A conversion keeps it, and says so in its config.
    f.write("config.json", Value::Object(config).to_string());
    for to in [Target::F32, Target::Nf4] {
        let out = f.dir.path().join(format!("{to:?}"));
        super::common::convert(&f.model, &out, to);
        let made = Checkpoint::open(&out).unwrap();
        assert!(made.contains(HEAD) && made.config()["tie_word_embeddings"] == false, "{to:?}");
        if to == Target::F32 {
            assert!((score(&out) - own).abs() < 1e-6);
        }
    }
}

#[test]
fn tensors_without_a_place_in_the_model_are_refused_by_name() {
    let f = fixture();
    let path = f.model.join("model.safetensors");
    let good = Tensors::read(&path);
    let cases = [
        (format!("{Q}.bias"), "attention_bias"),
        ("model.layers.0.mlp.up_proj.bias".to_owned(), "mlp_bias"),
        ("model.layers.2.input_layernorm.weight".to_owned(), "expected 2 layers"),
        ("model.layers.0.self_attn.q_norm.weight".to_owned(), "a variant of the family"),
        ("base_model.model.model.norm.weight".to_owned(), "merge_and_unload"),
        (format!("{Q}.base_layer.weight"), "merge_and_unload"),
        (format!("{Q}.lora_A.default.weight"), "merge_and_unload"),
        ("score.weight".to_owned(), "a classifier"),
        ("vision_tower.patch.weight".to_owned(), "for more than text"),
        ("model.layers.0.mlp.nothing.weight.absmax".to_owned(), "no other"),
    ];
    check_all(cases, |(name, word)| {
        let mut file = Tensors(good.0.clone());
        file.add(name, "F32", &[2], vec![0; 8]);
        file.write(&path);
        let code = if word.contains("layers") { ErrorCode::Format } else { ErrorCode::Unsupported };
        refused(name, f.answer(), code, &[name, word])?;
        // A companion without its weight is not among the weights that are converted.
        if name.ends_with(".absmax") { Ok(()) } else { refused(name, import(&f.model), code, &[name, word]) }
    });
    // Buffers that old versions of transformers have saved are computed again.
    let mut file = Tensors(good.0);
    file.add("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", &[2], vec![0; 8]);
    file.write(&path);
    f.answer().unwrap();
    import(&f.model).unwrap();
}

#[test]
fn what_could_not_run_is_refused_before_it_is_converted() {
    let f = fixture();
    let config = f.json("config.json");
    let cases = [
        ("model_type", json!("bloom"), ErrorCode::Unsupported, "`mistral`"),
        ("architectures", json!(["LlamaForSequenceClassification"]), ErrorCode::Unsupported, "ForCausalLM"),
        ("num_attention_heads", json!(0), ErrorCode::Format, "num_attention_heads"),
        ("vocab_size", json!(300), ErrorCode::Format, "set `vocab_size` to 512"),
        ("intermediate_size", json!(64), ErrorCode::Format, "different models"),
        ("tie_word_embeddings", json!(false), ErrorCode::Format, "set `tie_word_embeddings` to true"),
        ("attention_bias", json!(true), ErrorCode::Format, "asks for biases"),
    ];
    check_all(cases, |(key, value, code, word)| {
        f.with("config.json", &config, key, Some(value));
        refused_both_ways(key, &f.model, *code, &[word])
    });
    f.write("config.json", Value::Object(config).to_string());
    for (file, content) in [
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", r#"{"chat_template": "{% if %}"}"#),
        ("generation_config.json", r#"{"eos_token_id": "two"}"#),
    ] {
        let f = fixture();
        f.write(file, content);
        refused(file, import(&f.model), ErrorCode::Format, &["tiny-chat"]).unwrap();
    }
}

#[test]
fn a_model_opens_by_any_of_its_files() {
    let f = fixture();
    let nf4 = f.dir.path().join("nf4");
    super::common::convert(&f.model, &nf4, Target::Nf4);
    let ask = |path: &Path| answer(&mut super::chat(path).unwrap(), &[Message::new("user", "hello")]).unwrap();
    for dir in [&f.model, &nf4] {
        let whole = ask(dir);
        for file in ["model.safetensors", "config.json", "tokenizer.json"] {
            assert_eq!(ask(&dir.join(file)), whole, "{file}");
        }
        fs::rename(dir.join("model.safetensors"), dir.join("mine.safetensors")).unwrap();
        assert_eq!(ask(&dir.join("mine.safetensors")), whole);
    }
}

/// The command line, with a cache of its own in `home`: exit code, stdout and stderr.
#[cfg(feature = "cli")]
fn command(home: &Path, args: &[&str]) -> (Option<i32>, String, String) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_pocketlora"));
    let done = command.args(args).current_dir(home).env("POCKETLORA_HOME", home.join("cache")).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (done.status.code(), text(&done.stdout), text(&done.stderr))
}

#[cfg(feature = "cli")]
#[test]
fn a_refused_model_leaves_nothing_in_the_cache() {
    let f = fixture();
    let model = f.model.to_str().unwrap();
    fs::write(f.dir.path().join("x"), "hello").unwrap();
    let cases: [(&str, &[u8], &str); 4] = [
        ("config.json", br#"{"model_type": "bloom"}"#, "`mistral`"),
        ("tokenizer.json", b"{", "tokenizer.json"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("tokenizer_config.json", br#"{"chat_template": "{% if %}"}"#, "tokenizer_config.json"),
    ];
    check_all(cases, |(file, content, word)| {
        let good = fs::read(f.model.join(file)).unwrap();
        f.write(file, content);
        for args in [
            &["generate", "-m", model, "-p", "x"][..],
            &["eval", "-m", model, "--text", "x"],
            &["quantize", model, "-o", "out"],
        ] {
            let (code, _, stderr) = command(f.dir.path(), args);
            if code != Some(1) || !stderr.contains(word) {
                return Err(format!("{args:?}: {code:?}: no `{word}` in {stderr}"));
            }
        }
        f.write(file, good);
        let made = ["cache/quantized", "cache/int8", "out"].map(|name| f.dir.path().join(name));
        let holds = |path: &&std::path::PathBuf| fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some());
        made.iter().find(holds).map_or(Ok(()), |path| Err(format!("{file}: {}", path.display())))
    });
    fs::remove_file(f.model.join("tokenizer.json")).unwrap();
    let (_, _, stderr) = command(f.dir.path(), &["generate", "-m", model, "-p", "x"]);
    assert!(stderr.contains("tiny-chat/tokenizer.json`: expected the model's tokenizer"), "{stderr}");
    let (_, _, stderr) = command(f.dir.path(), &["generate", "-m", "./nowhere", "-p", "x"]);
    assert!(stderr.contains("`./nowhere`: expected a model's folder or file"), "{stderr}");
    assert_eq!(fs::read_dir(f.dir.path().join("cache/quantized")).map_or(0, Iterator::count), 0);
}

#[cfg(feature = "cli")]
#[test]
fn what_cannot_work_is_refused_before_a_model_is_quantized() {
    let f = fixture();
    let model = f.model.to_str().unwrap();
    let write = |name: &str, text: &str| {
        let path = f.dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write("text.txt", "hello");
    write("data.jsonl", r#"{"text": "hello"}"#);
    write("lily/adapter_config.json", r#"{"peft_type": "LILY"}"#);
    write("lily/adapter_model.safetensors", "x");
    let train = ["train", "--auto", "off", "-m", model, "-o", "out", "-d"];
    let with = |more: &[&'static str]| [&train[..], more].concat();
    let cases = [
        (vec!["generate", "-m", model, "-p", "x", "--threads", "9999"], "`threads`"),
        (vec!["bench", "-m", model, "--threads", "1,9999"], "`threads`"),
        (vec!["bench", "-m", model, "--train", "--optimizer", "adam9"], "`optimizer`"),
        (vec!["generate", "-m", model, "-p", "x", "-a", "lily"], "`LILY`"),
        (vec!["eval", "-m", model, "--text", "none.txt"], "none.txt"),
        (vec!["eval", "-m", model, "--ids", "none.json"], "none.json"),
        (vec!["eval", "-m", model, "-d", "data.jsonl", "--answers", "no/a.jsonl"], "a folder to write"),
        (with(&["none.jsonl"]), "none.jsonl"),
        (with(&["data.jsonl", "--eval-data", "none.jsonl"]), "none.jsonl"),
        (with(&["data.jsonl", "--memory-budget", "0"]), "`memory-budget`"),
        (with(&["data.jsonl", "--resume"]), "a checkpoint to resume from"),
        (with(&["data.jsonl", "--targets", "z_proj"]), "`targets`"),
        (with(&["data.jsonl", "--threads", "9999"]), "`threads`"),
        (with(&["data.jsonl", "--init", "lily"]), "`LILY`"),
        (vec!["generate", "-p", "x", "-m", "https://hub.example/owner/tiny/tree/main"], "pull owner/tiny`"),
        (vec!["pull", "https://hub.example/owner/tiny"], "pull owner/tiny`"),
    ];
    check_all(cases, |(args, word)| {
        let (code, _, stderr) = command(f.dir.path(), args);
        let left: Vec<_> =
            ["cache/quantized", "cache/int8", "out"].into_iter().filter(|p| f.dir.path().join(p).exists()).collect();
        match code {
            Some(1) if stderr.contains(word) && left.is_empty() => Ok(()),
            _ => Err(format!("{args:?}: {code:?}, left {left:?}, no `{word}` in {stderr}")),
        }
    });
}

#[cfg(feature = "cli")]
#[test]
fn eval_says_when_its_figures_are_of_an_nf4_copy() {
    let f = fixture();
    fs::write(f.dir.path().join("ids.json"), "[[5, 6, 7]]").unwrap();
    let model = f.model.join("config.json").to_str().unwrap().to_owned();
    let eval = |more: &[&str]| {
        let (code, stdout, stderr) =
            command(f.dir.path(), &[&["eval", "-m", &model, "--ids", "ids.json", "--json"], more].concat());
        assert_eq!(code, Some(0), "{stderr}");
        (serde_json::from_str::<Value>(&stdout).unwrap()["weights"].clone(), stderr)
    };
    let (weights, stderr) = eval(&[]);
    assert!(weights == "nf4 copy" && stderr.contains("--no-quantize"), "{weights}: {stderr}");
    assert_eq!(eval(&["--no-quantize"]), ("as given".into(), String::new()));
}
