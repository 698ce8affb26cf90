//! Adapters as they are found: names that wrappers left behind, weights that come along, keys that ask for more, and what
//! is no adapter of ours at all.

use crate::common::{check_all, convert, golden, logits, max_diff, open_exact, tensors, tiny_chat_model, tiny_chats};
use half::f16;
use pocketlora::adapter::AdapterFile;
use pocketlora::chat::Message;
use pocketlora::format::Target;
use pocketlora::train::{Observer, StepReport, TrainConfig};
use pocketlora::{Engine, ErrorCode, internals};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// A tensor in f16: name, shape, values.
type F16 = (String, Vec<usize>, Vec<f32>);

const Q: &str = "model.layers.0.self_attn.q_proj";
const EMBEDDING: &str = "model.embed_tokens.weight";
const ROWS: usize = 512;
const WIDTH: usize = 128;

/// The LoRA on layer 0's `q_proj` of the tiny Llama, its names made by `name` from `Q.lora_A` and a tail.
fn q_proj(name: impl Fn(&str) -> String) -> Vec<F16> {
    let half = |part: &str, shape: [usize; 2]| {
        let values = (0..shape[0] * shape[1]).map(|i| ((i * 7 + 3) % 11) as f32 / 50.0 - 0.1).collect();
        (name(&format!("{Q}.lora_{part}")), shape.to_vec(), values)
    };
    vec![half("A", [2, WIDTH]), half("B", [WIDTH, 2])]
}

fn plain() -> Vec<F16> {
    q_proj(|path| format!("base_model.model.{path}.weight"))
}

fn write_tensors(path: &Path, tensors: &[F16]) {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, _, v)| v.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect()).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), bytes)| (name.as_str(), TensorView::new(Dtype::F16, shape.clone(), bytes).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// An adapter of rank 2 on `q_proj` in the folder `name` of `dir`, its config changed.
fn adapter(dir: &Path, name: &str, tensors: &[F16], changes: Value) -> PathBuf {
    let out = dir.join(name);
    fs::create_dir_all(&out).unwrap();
    let mut config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
                            "layers_to_transform": [0], "task_type": "CAUSAL_LM"});
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    fs::write(out.join("adapter_config.json"), config.to_string()).unwrap();
    write_tensors(&out.join("adapter_model.safetensors"), tensors);
    out
}

/// An embedding of `rows` rows that differs from the tiny Llama's.
fn embedding(rows: usize) -> Vec<f32> {
    (0..rows * WIDTH).map(|i| ((i * 13 + 5) % 17) as f32 / 40.0 - 0.2).collect()
}

fn whole(name: &str, rows: usize) -> F16 {
    (format!("base_model.model.{name}"), vec![rows, WIDTH], embedding(rows))
}

/// The tiny Llama with other matrices for tokens, tied or not.
fn model_with(dir: &Path, name: &str, table: Option<Vec<f32>>, head: Option<Vec<f32>>) -> PathBuf {
    let out = dir.join(name);
    fs::create_dir_all(&out).unwrap();
    let of_base = tensors(&golden("tiny-llama/model.safetensors"));
    let (rows, untied) = (table.as_ref().map_or(ROWS, |t| t.len() / WIDTH), head.is_some());
    let mut all: Vec<F16> = of_base.into_iter().map(|(name, t)| (name, t.shape, t.data)).collect();
    for (name, shape, data) in &mut all {
        if let (EMBEDDING, Some(table)) = (name.as_str(), &table) {
            (*shape, *data) = (vec![rows, WIDTH], table.clone());
        }
    }
    all.extend(head.map(|head| ("lm_head.weight".to_owned(), vec![rows, WIDTH], head)));
    let text = fs::read_to_string(golden("tiny-llama/config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["vocab_size"] = rows.into();
    config["tie_word_embeddings"] = (!untied).into();
    fs::write(out.join("config.json"), config.to_string()).unwrap();
    write_tensors(&out.join("model.safetensors"), &all);
    out
}

fn with(model: &Path, adapter: &Path) -> Engine {
    let engine = open_exact(model, 1);
    engine.attach(adapter, 1.0).unwrap();
    engine
}

const IDS: [u32; 8] = [5, 80, 3, 200, 77, 511, 9, 4];

fn same(name: &str, got: &[f32], expected: &[f32], bound: f32) -> Result<(), String> {
    if got.len() != expected.len() {
        return Err(format!("{name}: {} logits instead of {}", got.len(), expected.len()));
    }
    let (diff, at) = max_diff(got, expected);
    if diff <= bound { Ok(()) } else { Err(format!("{name}: off by {diff} at {at}")) }
}

#[test]
fn modules_to_save_give_the_logits_of_peft() {
    let engine = with(&golden("peft/base"), &golden("peft/modules_to_save"));
    let ids = [61, 152, 251, 238, 199, 33, 157, 166, 103, 208, 74, 180, 173, 26, 19, 74];
    let expected = &tensors(&golden("peft/modules_to_save/logits.safetensors"))["logits"].data;
    same("logits", &logits(&engine, &ids), expected, 2e-3).unwrap();
    assert!(warnings(&engine).is_empty(), "{:?}", warnings(&engine));
}

#[test]
fn names_that_wrappers_left_behind_say_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let model = golden("tiny-llama");
    let expected = logits(&with(&model, &adapter(dir.path(), "plain", &plain(), json!({}))), &IDS);
    let below = |path: &str, inside: &str| path.replacen("model.layers", &format!("{inside}.layers"), 1);
    type Named = Box<dyn Fn(&str) -> String>;
    let cases: [(&str, Named); 9] = [
        ("default", Box::new(|p| format!("base_model.model.{p}.default.weight"))),
        ("another name", Box::new(|p| format!("base_model.model.{p}.sql.weight"))),
        ("compiled", Box::new(|p| format!("base_model.model._orig_mod.{p}.weight"))),
        ("compiled outside", Box::new(|p| format!("_orig_mod.base_model.model.{p}.weight"))),
        ("ddp", Box::new(|p| format!("module.base_model.model.{p}.weight"))),
        ("fsdp", Box::new(move |p| below(&format!("base_model.model.{p}.weight"), "model._fsdp_wrapped_module"))),
        ("twice", Box::new(|p| format!("base_model.model.base_model.model.{p}.weight"))),
        ("bare", Box::new(|p| format!("{p}.weight"))),
        ("text part", Box::new(move |p| below(&format!("base_model.model.{p}.weight"), "model.language_model"))),
    ];
    check_all(cases, |(name, named)| {
        let engine = with(&model, &adapter(dir.path(), name, &q_proj(named), json!({})));
        same(name, &logits(&engine, &IDS), &expected, 0.0)
    });
}

/// A tied head sees what PEFT loads into the base, and nothing of a trained copy.
#[test]
fn embeddings_that_come_with_an_adapter_are_used() {
    let dir = tempfile::tempdir().unwrap();
    let old = tensors(&golden("tiny-llama/model.safetensors"))[EMBEDDING].data.clone();
    let tied = golden("tiny-llama");
    let untied = model_with(dir.path(), "untied", None, Some(old.iter().map(|v| -v).collect()));
    let negative: Vec<f32> = old.iter().map(|v| -v).collect();
    let copy = json!({"modules_to_save": ["embed_tokens"]});
    let both = json!({"modules_to_save": ["embed_tokens", "lm_head"]});
    let tie = json!({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": true});
    let table = |n| whole(EMBEDDING, n);
    let head = |n| whole("lm_head.weight", n);
    let new = Some(embedding(ROWS));
    let cases = [
        ("in place, tied", &tied, vec![table(ROWS)], json!({}), new.clone(), None),
        ("in place, untied", &untied, vec![table(ROWS)], json!({}), new.clone(), Some(negative.clone())),
        ("copy, tied", &tied, vec![table(ROWS)], copy.clone(), new.clone(), Some(old.clone())),
        ("copy, tied again", &tied, vec![table(ROWS)], tie, new.clone(), None),
        ("head, tied", &tied, vec![head(ROWS)], json!({"modules_to_save": ["lm_head"]}), None, new.clone()),
        ("head, untied", &untied, vec![head(ROWS)], json!({"modules_to_save": ["lm_head"]}), None, new.clone()),
        ("grown", &tied, vec![table(515)], json!({}), Some(embedding(515)), None),
        ("grown, both", &untied, vec![table(515), head(515)], both, Some(embedding(515)), Some(embedding(515))),
        ("shrunk", &tied, vec![table(512 - 64)], json!({}), Some(embedding(448)), None),
        (
            "a name of its own",
            &tied,
            vec![whole("model.embed_tokens.modules_to_save.default.weight", ROWS)],
            copy,
            new.clone(),
            Some(old.clone()),
        ),
    ];
    check_all(cases.into_iter().enumerate(), |(i, (name, model, extra, config, table, head))| {
        let ids: Vec<u32> =
            IDS.iter().map(|&id| id.min(447)).chain((name.starts_with("grown")).then_some(514)).collect();
        let tensors = [&plain()[..], extra].concat();
        let engine = with(model, &adapter(dir.path(), &format!("adapter {i}"), &tensors, config.clone()));
        let twin = model_with(dir.path(), &format!("twin {i}"), table.clone(), head.clone());
        let twin = with(&twin, &adapter(dir.path(), &format!("plain {i}"), &plain(), json!({})));
        same(name, &logits(&engine, &ids), &logits(&twin, &ids), 1e-4)?;
        if engine.vocabulary() != internals::base(&twin).model.config().vocab_size {
            return Err(format!("{name}: a vocabulary of {}", engine.vocabulary()));
        }
        engine.detach_all();
        same(name, &logits(&engine, &IDS), &logits(&open_exact(model, 1), &IDS), 0.0)
    });
}

#[test]
fn what_would_be_ignored_or_wrong_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let and = |extra: Vec<F16>| [plain(), extra].concat();
    let two_names: Vec<F16> = ["a", "b"]
        .iter()
        .flat_map(|n| {
            q_proj(move |p| {
                format!(
                    "base_model.model.{}.{n}.weight",
                    p.replace("layers.0", if *n == "a" { "layers.0" } else { "layers.1" })
                )
            })
        })
        .collect();
    let beyond: Vec<F16> = [0, 7, 8]
        .iter()
        .flat_map(|n| {
            q_proj(move |p| format!("base_model.model.{}.weight", p.replace("layers.0", &format!("layers.{n}"))))
        })
        .collect();
    let all_layers = json!({"layers_to_transform": null});
    let twice = and(q_proj(|path| format!("base_model.model.{path}.default.weight")));
    let vector = |name: &str| (format!("base_model.model.{name}"), vec![WIDTH], vec![1.0; WIDTH]);
    let layer = |name: &str| (format!("base_model.model.{name}.weight"), vec![WIDTH; 2], vec![0.0; WIDTH * WIDTH]);
    const Q_WEIGHT: &str = "model.layers.0.self_attn.q_proj";
    const V_WEIGHT: &str = "model.layers.0.self_attn.v_proj";
    const V_BASE: &str = "model.layers.0.self_attn.v_proj.base_layer";
    let rows = ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", 2);
    let rows = (rows.0.to_owned(), vec![rows.1, WIDTH], embedding(2));
    let no_changes = json!({});
    let cases = [
        ("a key of tomorrow", plain(), json!({"use_magic": true}), "use_magic"),
        ("two adapters", two_names, json!({"layers_to_transform": null}), "`a` and `b`"),
        (
            "layers that are left over",
            beyond.clone(),
            all_layers.clone(),
            "layers.7.self_attn.q_proj`, `model.layers.8",
        ),
        ("how many they are", beyond, all_layers, "got 2 modules that are none of 3"),
        ("twice", twice, no_changes.clone(), "twice"),
        ("not named", plain(), json!({"target_modules": ["v_proj"]}), "target_modules"),
        ("excluded", plain(), json!({"exclude_modules": ".*q_proj"}), "target_modules"),
        ("other layers", plain(), json!({"layers_to_transform": [1]}), "target_modules"),
        ("half a pair", plain()[..1].to_vec(), no_changes.clone(), "lora_B"),
        ("nothing saved", plain(), json!({"modules_to_save": ["lm_head"]}), "lm_head"),
        ("a classifier", and(vec![whole("score.weight", 2)]), json!({"task_type": "SEQ_CLS"}), "score"),
        ("another norm", and(vec![vector("model.layers.0.extra_norm.weight")]), no_changes.clone(), "extra_norm"),
        (
            "another width",
            and(vec![(format!("base_model.model.{EMBEDDING}"), vec![ROWS, 64], vec![0.0; ROWS * 64])]),
            no_changes.clone(),
            EMBEDDING,
        ),
        (
            "a half-grown vocabulary",
            and(vec![whole(EMBEDDING, 515)]),
            json!({"modules_to_save": ["embed_tokens"]}),
            "515",
        ),
        ("a layer's weight", and(vec![layer(Q_WEIGHT)]), no_changes.clone(), "modules_to_save"),
        ("an adapted layer's", and(vec![layer(V_WEIGHT)]), no_changes.clone(), "modules_to_save"),
        ("below no adapter", and(vec![layer(V_BASE)]), no_changes.clone(), "modules_to_save"),
        ("a bias", and(vec![vector("model.layers.0.self_attn.q_proj.bias")]), no_changes.clone(), "`bias`"),
        (
            "new rows of other tokens",
            and(vec![rows.clone()]),
            json!({"trainable_token_indices": [3, 512]}),
            "got `512`",
        ),
        ("rows without ids", and(vec![rows]), no_changes.clone(), "trainable_token_indices"),
        (
            "a text model's vision",
            q_proj(|p| format!("base_model.model.model.vision_tower.{p}.weight")),
            no_changes,
            "vision_tower",
        ),
    ];
    check_all(cases, |(name, tensors, config, said)| {
        let engine = open_exact(&golden("tiny-llama"), 1);
        match engine.attach(&adapter(dir, name, tensors, config.clone()), 1.0) {
            Ok(_) => Err(format!("{name}: accepted")),
            Err(_) if !engine.attached().is_empty() => Err(format!("{name}: half attached")),
            Err(e) if e.to_string().contains(said) => Ok(()),
            Err(e) => Err(format!("{name}: expected `{said}` in: {e}")),
        }
    });
}

#[test]
fn weights_that_come_along_have_no_strength_and_no_second() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = [plain(), vec![whole(EMBEDDING, ROWS)]].concat();
    let mut other = tensors.clone();
    other[2].2[0] += 1.0;
    let first = adapter(dir.path(), "first", &tensors, json!({}));
    let other = adapter(dir.path(), "other", &other, json!({}));
    let engine = open_exact(&golden("tiny-llama"), 1);
    let error = engine.attach(&first, 0.5).unwrap_err();
    assert!(error.to_string().contains(EMBEDDING) && error.code() == ErrorCode::Config, "{error}");
    engine.attach(&first, 1.0).unwrap();
    let before = logits(&engine, &IDS);
    let error = engine.attach(&other, 1.0).unwrap_err();
    assert!(error.to_string().contains(EMBEDDING) && error.to_string().contains("first"), "{error}");
    same("unchanged", &logits(&engine, &IDS), &before, 0.0).unwrap();
    // The same weights in both are no contradiction.
    engine.attach(&first, 1.0).unwrap();
}

#[test]
fn what_is_odd_is_said() {
    let dir = tempfile::tempdir().unwrap();
    for (name, config, said) in [
        ("layer 1 has nothing", json!({"layers_to_transform": null}), Some("model.layers.1.self_attn.q_proj")),
        ("another task", json!({"task_type": "SEQ_CLS"}), Some("SEQ_CLS")),
        ("biases", json!({"bias": "lora_only"}), Some("bias")),
        ("another family", json!({"auto_mapping": {"base_model_class": "Qwen2ForCausalLM"}}), Some("Qwen2ForCausalLM")),
        ("its family", json!({"auto_mapping": {"base_model_class": "LlamaForCausalLM"}}), None),
        ("no such rank", json!({"rank_pattern": {"v_proj": 8}}), Some("`v_proj` in `rank_pattern`")),
        ("no such alpha", json!({"alpha_pattern": {"layers.7.*": 8}}), Some("`alpha_pattern`")),
        ("a rank", json!({"rank_pattern": {"q_proj": 2}}), None),
        ("nothing", json!({}), None),
    ] {
        let engine = with(&golden("tiny-llama"), &adapter(dir.path(), name, &plain(), config));
        let all = warnings(&engine).join("\n");
        assert!(said.map_or(all.is_empty(), |said| all.contains(said)), "{name}: {all}");
        engine.detach_all();
        assert!(warnings(&engine).is_empty());
    }
}

struct OneStep;

impl Observer for OneStep {
    fn on_step(&mut self, _: &StepReport) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// Training from such an adapter sees its weights, leaves them as they are, and writes them again.
#[test]
fn training_keeps_the_weights_that_came_along() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (tiny_chat_model(dir.path()), tiny_chats(dir.path(), 4));
    let norm = ("base_model.model.model.norm.weight".to_owned(), vec![WIDTH], vec![0.5; WIDTH]);
    for (name, extra, config) in [
        (
            "copies",
            vec![whole(EMBEDDING, 515), whole("lm_head.weight", 515)],
            json!({"modules_to_save": ["embed_tokens", "lm_head"]}),
        ),
        ("in place", vec![whole(EMBEDDING, ROWS), norm], json!({})),
    ] {
        let start = adapter(dir.path(), name, &[&plain()[..], &extra].concat(), config);
        let init = AdapterFile::open(&start).unwrap();
        let out = dir.path().join(format!("{name} out"));
        let engine = open_exact(&model, 1);
        let data = engine.dataset(&data, 64).unwrap();
        let config = TrainConfig { steps: Some(1), lr: 1e-9, ..TrainConfig::default() };
        engine.trainer(config, data, None, Some(&init), &out).unwrap().run(&mut OneStep).unwrap();
        // Next to nothing was learned, so both must say the same.
        let (a, b) = (logits(&with(&model, &start), &IDS), logits(&with(&model, &out), &IDS));
        same(name, &b, &a, 1e-3).unwrap();
        assert_ne!(logits(&engine, &IDS)[..8], b[..8], "{name}");
    }
}

/// An adapter knows its base by the embedding: the NF4 copy is the same base, and so is one that was trained a little
/// further, but a model of the same shape with other numbers is not.
#[test]
fn an_adapter_that_was_trained_here_knows_its_base() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (tiny_chat_model(dir.path()), tiny_chats(dir.path(), 4));
    let engine = open_exact(&model, 1);
    let data = engine.dataset(&data, 64).unwrap();
    let (out, config) = (dir.path().join("trained"), TrainConfig { steps: Some(1), ..TrainConfig::default() });
    engine.trainer(config, data, None, None, &out).unwrap().run(&mut OneStep).unwrap();
    let nf4 = dir.path().join("nf4");
    convert(&model, &nf4, Target::Nf4);
    let old = tensors(&golden("tiny-llama/model.safetensors"))[EMBEDDING].data.clone();
    let further = old.iter().enumerate().map(|(i, v)| v * (1.0 + (i % 5) as f32 / 10.0)).collect();
    for (name, base, fits) in [
        ("itself", model, true),
        ("in NF4", nf4, true),
        ("trained further", model_with(dir.path(), "further", Some(further), None), true),
        ("of the same shape", model_with(dir.path(), "other", Some(embedding(ROWS)), None), false),
    ] {
        match open_exact(&base, 1).attach(&out, 1.0) {
            Ok(_) => assert!(fits, "{name}: accepted"),
            Err(e) => assert!(!fits && e.code() == ErrorCode::AdapterMismatch, "{name}: {e}"),
        }
    }
}

/// What is odd about the attached adapters.
fn warnings(engine: &Engine) -> Vec<String> {
    engine.attached().into_iter().flat_map(|adapter| adapter.warnings).collect()
}

/// The prompt of a short conversation.
fn prompt(engine: &Engine) -> String {
    engine.text().unwrap().template.render(&[Message::new("user", "hello")], None, true).unwrap().text
}

const OWN_TEMPLATE: &str = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}\
                            {% if add_generation_prompt %}[assistant]{% endif %}";

#[test]
fn the_adapters_own_text_is_used_while_it_is_attached() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_chat_model(dir.path());
    let tokenizer = fs::read_to_string(model.join("tokenizer.json")).unwrap();
    let mut padded: Value = serde_json::from_str(&tokenizer).unwrap();
    padded["truncation"] = json!({"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0});
    let mut more = padded.clone();
    more["added_tokens"].as_array_mut().unwrap().push(json!({"id": 258, "content": "<new>", "special": true,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}));
    let mut other: Value = serde_json::from_str(&tokenizer).unwrap();
    let vocab = other["model"]["vocab"].as_object_mut().unwrap();
    (vocab["a"], vocab["b"]) = (vocab["b"].clone(), vocab["a"].clone());

    let with_files = |name: &str, files: &[(&str, String)]| {
        let out = adapter(dir.path(), name, &plain(), json!({}));
        files.iter().for_each(|(file, text)| fs::write(out.join(file), text).unwrap());
        out
    };
    let config = |eos: Option<&str>| {
        let mut config = json!({ "chat_template": OWN_TEMPLATE });
        if let Some(eos) = eos {
            config["eos_token"] = eos.into();
        }
        config.to_string()
    };
    let base = prompt(&open_exact(&model, 1));
    let own = "[user] hello<|im_end|>[assistant]";
    let same_config = fs::read_to_string(model.join("tokenizer_config.json")).unwrap();
    let cases = [
        ("nothing", vec![], base.as_str()),
        ("the same", vec![("tokenizer.json", padded.to_string()), ("tokenizer_config.json", same_config)], &base),
        ("in the config", vec![("tokenizer_config.json", config(None))], own),
        ("a file of its own", vec![("chat_template.jinja", OWN_TEMPLATE.to_owned())], own),
        ("json", vec![("chat_template.json", json!({ "chat_template": OWN_TEMPLATE }).to_string())], own),
        (
            "another end",
            vec![("tokenizer_config.json", config(Some("<|im_start|>")))],
            "[user] hello<|im_start|>[assistant]",
        ),
        ("a new token", vec![("tokenizer.json", more.to_string())], &base),
        ("a new token by another file", vec![("added_tokens.json", json!({"<new>": 258}).to_string())], &base),
    ];
    check_all(cases, |(name, files, expected)| {
        let out = with_files(name, files);
        let engine = with(&model, &out);
        let got = prompt(&engine);
        if got != *expected {
            return Err(format!("{name}: {got}"));
        }
        let ids = engine.text().unwrap().tokenizer.encode("<new>", false).unwrap();
        if (ids.len() == 1) != name.starts_with("a new token") {
            return Err(format!("{name}: {ids:?}"));
        }
        // A second adapter with other text is refused, one with the same is not.
        let again = engine.attach(&out, 1.0).map(|_| ()).map_err(|e| format!("{name}: again: {e}"));
        engine.detach_all();
        if prompt(&engine) == base { again } else { Err(format!("{name}: stays after it was detached")) }
    });
    let engine = with(&model, &dir.path().join("a file of its own"));
    let error = engine.attach(&dir.path().join("another end"), 1.0).unwrap_err();
    assert!(error.to_string().contains("chat template"), "{error}");
    assert_eq!((engine.attached().len(), prompt(&engine).as_str()), (1, own));

    let engine = open_exact(&model, 1);
    let swapped = with_files("swapped", &[("tokenizer.json", other.to_string())]);
    let error = engine.attach(&swapped, 1.0).unwrap_err();
    assert!(error.to_string().contains("tokenizer.json") && engine.attached().is_empty(), "{error}");
}

/// Data is rendered as the adapter of the start was taught, and what it brings goes along to the new one.
#[test]
fn training_on_keeps_the_adapters_own_text() {
    let dir = tempfile::tempdir().unwrap();
    let (model, chats) = (tiny_chat_model(dir.path()), tiny_chats(dir.path(), 4));
    let start = adapter(dir.path(), "start", &plain(), json!({}));
    fs::write(start.join("chat_template.jinja"), OWN_TEMPLATE).unwrap();
    let further = "additional_chat_templates/tool_use.jinja";
    fs::create_dir(start.join("additional_chat_templates")).unwrap();
    fs::write(start.join(further), OWN_TEMPLATE).unwrap();
    let init = AdapterFile::open(&start).unwrap();
    let engine = open_exact(&model, 1);
    let reader = engine.reader(Some(&init)).unwrap();
    let data = reader.dataset(&chats, 64).unwrap();
    let text = reader.text().tokenizer.decode_with_special(&data.samples[0].ids).unwrap();
    assert!(text.contains("[user] what"), "{text}");
    let out = dir.path().join("out");
    let config = TrainConfig { steps: Some(1), ..TrainConfig::default() };
    engine.trainer(config.clone(), data.clone(), None, Some(&init), &out).unwrap().run(&mut OneStep).unwrap();
    engine.detach_all();
    assert!(prompt(&with(&model, &out)).contains("[user]") && out.join(further).exists());
    // A new adapter in that folder would be taken for one that was taught with this template.
    let error = engine.trainer(config, data, None, None, &out).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("chat template"), "{error}");
}

#[test]
fn what_is_no_peft_adapter_is_told_by_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let good = adapter(dir.path(), "good", &plain(), json!({}));
    let folder = |name: &str, files: &[(&str, &str)]| {
        let out = dir.path().join(name);
        fs::create_dir_all(&out).unwrap();
        files.iter().for_each(|(file, text)| fs::write(out.join(file), text).unwrap());
        out
    };
    let config = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4}"#;
    let checkpoints = dir.path().join("run");
    for step in ["checkpoint-9", "checkpoint-100"] {
        fs::create_dir_all(checkpoints.join(step)).unwrap();
        fs::write(checkpoints.join(step).join("adapter_config.json"), config).unwrap();
    }
    let mlx = r#"{"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}}"#;
    let gguf = folder("gguf", &[("a.gguf", "GGUF")]).join("a.gguf");
    let unet = q_proj(|p| format!("lora_unet_{}.lora_down.weight", p.replace('.', "_")));
    check_all(
        [
            (
                folder("pickle", &[("adapter_config.json", config), ("adapter_model.bin", "x")]),
                "pickle/adapter_model.bin",
            ),
            (folder("mlx", &[("adapter_config.json", mlx), ("adapters.safetensors", "x")]), "adapters.safetensors"),
            (folder("image", &[("pytorch_lora_weights.safetensors", "x")]), "image model"),
            (folder("no config", &[("adapter_model.safetensors", "x")]), "adapter_config.json"),
            (folder("a model", &[("config.json", "{}"), ("model.safetensors", "x")]), "`-m`"),
            (folder("empty", &[]), "an empty folder"),
            (folder("no weights", &[("adapter_config.json", config)]), "no `adapter_model.safetensors`"),
            (
                folder("of llama.cpp", &[("adapter_config.json", config), ("adapter.gguf", "GGUF")]),
                "a folder with GGUF files",
            ),
            (
                folder("parts", &[("adapter_config.json", config), ("adapter_model.safetensors.index.json", "{}")]),
                "in several files",
            ),
            (checkpoints.clone(), "checkpoint-100"),
            (gguf, "version"),
            (good.join("adapter_model.safetensors"), "good"),
            (adapter(dir.path(), "kohya", &unet[..1], json!({})), "image model"),
        ],
        |(path, said)| match AdapterFile::open(path) {
            Ok(_) => Err(format!("{}: accepted", path.display())),
            Err(e) if e.to_string().contains(said) => Ok(()),
            Err(e) => Err(format!("{}: expected `{said}` in: {e}", path.display())),
        },
    );
}
