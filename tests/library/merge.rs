//! Adapters merged into a model: the merged model answers as the model with its adapters beside it.

use crate::common::{check_all, convert, golden, ids, logits, max_diff, open_exact, tensors};
use half::f16;
use pocketlora::adapter::{AdapterFile, Merged, rounding};
use pocketlora::format::{Checkpoint, Existing, Target, open_source};
use pocketlora::{Engine, ErrorCode};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

type Part<'a> = (&'a Path, f32);

fn merged(base: &Path, adapters: &[Part<'_>]) -> pocketlora::Result<Merged> {
    let open = |(dir, scale): &Part<'_>| Ok((AdapterFile::open(dir)?, *scale));
    let files = adapters.iter().map(open).collect::<pocketlora::Result<Vec<_>>>()?;
    Merged::new(open_source(base)?, base, &files)
}

fn write(merged: &Merged, out: &Path, to: Target) {
    merged.write(out, to, Existing::Keep, &mut |_| ControlFlow::Continue(())).unwrap();
}

fn merge(base: &Path, adapters: &[Part<'_>], out: &Path, to: Target) {
    write(&merged(base, adapters).unwrap(), out, to);
}

fn close(what: &str, got: &[f32], expected: &[f32], bound: f32) -> Result<(), String> {
    if got.len() != expected.len() {
        return Err(format!("{what}: {} logits instead of {}", got.len(), expected.len()));
    }
    let (diff, at) = max_diff(got, expected);
    if diff <= bound { Ok(()) } else { Err(format!("{what}: off by {diff} at {at}, bound {bound}")) }
}

fn beside(base: &Path, adapters: &[Part<'_>]) -> Engine {
    let engine = open_exact(base, 1);
    for (dir, scale) in adapters {
        engine.attach(dir, *scale).unwrap();
    }
    engine
}

#[test]
fn a_merged_model_gives_the_logits_that_peft_gives_with_the_adapter() {
    let (dir, base) = (tempfile::tempdir().unwrap(), golden("peft/base"));
    let ids = ids(&tensors(&golden("methods/inputs.safetensors"))["ids"]);
    let methods = [
        "ia3",
        "ln_tuning",
        "lora",
        "lora_embedding_head",
        "lora_modules_to_save",
        "lora_target_parameters",
        "lora_trainable_tokens",
        "trainable_tokens",
    ];
    check_all(methods, |method| {
        let (adapter, out) = (golden("methods").join(method), dir.path().join(method));
        merge(&base, &[(&adapter, 1.0)], &out, Target::F32);
        let expected = &tensors(&adapter.join("logits.safetensors"))["logits"].data;
        super::methods::close(method, &logits(&open_exact(&out, 1), &ids), expected, 1e-4)
    });
}

/// In whatever order they are attached: terms add to the product, then what is given is scaled.
#[test]
fn adapters_of_different_methods_work_beside_each_other() {
    let (dir, base) = (tempfile::tempdir().unwrap(), golden("peft/base"));
    let ids = ids(&tensors(&golden("methods/inputs.safetensors"))["ids"]);
    let of = |method: &str| golden("methods").join(method);
    let [lora, scales, norms, prefix, prompt] = ["lora", "ia3", "ln_tuning", "prefix_tuning", "prompt_tuning"].map(of);
    let cases = [
        ("both", vec![&lora, &scales], None),
        ("turned", vec![&scales, &lora], None),
        ("all", vec![&norms, &scales, &lora], None),
        ("prefix", vec![&lora, &norms], Some(&prefix)),
        ("prompt", vec![&lora, &scales], Some(&prompt)),
    ];
    check_all(cases, |(name, adapters, before)| {
        let parts: Vec<Part<'_>> = adapters.iter().map(|path| (path.as_path(), 1.0)).collect();
        let out = dir.path().join(name);
        merge(&base, &parts, &out, Target::F32);
        let engine = open_exact(&out, 1);
        let mut all = parts.clone();
        if let Some(before) = before {
            engine.attach(before, 1.0).unwrap();
            all.insert(1, (before, 1.0));
        }
        close(name, &logits(&beside(&base, &all), &ids), &logits(&engine, &ids), 1e-4)
    });
}

#[test]
fn scales_patterns_and_several_adapters_are_merged_as_they_are_attached() {
    let (dir, base) = (tempfile::tempdir().unwrap(), golden("tiny-llama"));
    let [lora, rslora, patterns] = ["lora", "rslora", "lora_patterns"].map(|name| golden("adapters").join(name));
    let cases: [(&str, Vec<Part<'_>>); 4] = [
        ("rslora", vec![(&rslora, 1.0)]),
        ("patterns", vec![(&patterns, 1.0)]),
        ("scaled", vec![(&lora, -0.5)]),
        ("several", vec![(&lora, 0.7), (&rslora, 1.3), (&lora, 0.2)]),
    ];
    let ids = [5, 80, 3, 200, 77, 511, 9, 4];
    check_all(cases.iter().enumerate(), |(i, (name, adapters))| {
        let out = dir.path().join(i.to_string());
        merge(&base, adapters, &out, Target::F32);
        close(name, &logits(&open_exact(&out, 1), &ids), &logits(&beside(&base, adapters), &ids), 1e-4)
    });
}

/// An adapter on the tiny Llama of the given tensors (name, shape), with values of no pattern.
fn adapter(dir: &Path, name: &str, shapes: &[(&str, [usize; 2])], changes: Value) -> PathBuf {
    let out = dir.join(name);
    fs::create_dir_all(&out).unwrap();
    let mut config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM"});
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    fs::write(out.join("adapter_config.json"), config.to_string()).unwrap();
    let value = |i: usize, shape: [usize; 2]| f16::from_f32(((i * 13 + shape[0]) % 17) as f32 / 40.0 - 0.2);
    let bytes: Vec<Vec<u8>> = shapes
        .iter()
        .map(|(_, shape)| (0..shape[0] * shape[1]).flat_map(|i| value(i, *shape).to_le_bytes()).collect())
        .collect();
    let views = shapes.iter().zip(&bytes).map(|((name, shape), bytes)| {
        (format!("base_model.model.{name}"), TensorView::new(Dtype::F16, shape.to_vec(), bytes).unwrap())
    });
    fs::write(out.join("adapter_model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    out
}

/// A head that is the embedding becomes a weight of its own where an adapter changes one of them alone.
#[test]
fn a_tied_head_is_set_apart_where_it_must_be() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    const TABLE: &str = "model.embed_tokens.weight";
    let on_head = [("lm_head.lora_A.weight", [2, 128]), ("lm_head.lora_B.weight", [512, 2])];
    let on_table =
        [("model.embed_tokens.lora_embedding_A", [2, 512]), ("model.embed_tokens.lora_embedding_B", [128, 2])];
    let rows = [("model.embed_tokens.token_adapter.trainable_tokens_delta", [3, 128])];
    let ids = json!({"trainable_token_indices": [80, 4, 511]});
    let cases = [
        ("lora on the head", adapter(dir, "a", &on_head, json!({"target_modules": ["lm_head"]})), false),
        ("lora on the embedding", adapter(dir, "f", &on_table, json!({"target_modules": ["embed_tokens"]})), false),
        ("new rows", adapter(dir, "g", &rows, ids), true),
        ("head", adapter(dir, "b", &[("lm_head.weight", [512, 128])], json!({"modules_to_save": ["lm_head"]})), false),
        ("copy", adapter(dir, "c", &[(TABLE, [512, 128])], json!({"modules_to_save": ["embed_tokens"]})), false),
        ("in place", adapter(dir, "d", &[(TABLE, [512, 128])], json!({})), true),
        ("grown", adapter(dir, "e", &[(TABLE, [515, 128])], json!({})), true),
    ];
    let base = golden("tiny-llama");
    let ids = [5, 80, 3, 200, 77, 511, 9, 4];
    check_all(cases, |(name, adapter, tied)| {
        let out = dir.join(format!("{name} out"));
        merge(&base, &[(adapter, 1.0)], &out, Target::F32);
        if Checkpoint::open(&out).unwrap().contains("lm_head.weight") == *tied {
            return Err(format!("{name}: the head is no weight of its own, or one too many"));
        }
        let (engine, expected) = (open_exact(&out, 1), beside(&base, &[(adapter, 1.0)]));
        if engine.vocabulary() != expected.vocabulary() {
            return Err(format!("{name}: a vocabulary of {}", engine.vocabulary()));
        }
        close(name, &logits(&engine, &ids), &logits(&expected, &ids), 1e-4)
    });
}

#[test]
fn a_4_bit_base_is_merged_into_what_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (base, lora) = (dir.path().join("nf4"), golden("adapters/rslora"));
    convert(&golden("tiny-llama"), &base, Target::Nf4);
    let adapters: [Part<'_>; 1] = [(&lora, 1.0)];
    let ids = [5, 80, 3, 200, 77, 511, 9, 4];
    let expected = logits(&beside(&base, &adapters), &ids);
    let whole = merged(&base, &adapters).unwrap();
    assert_eq!(whole.own_type(), Target::BF16);
    // bf16 rounds weights by up to 2^-9 of their size, f16 by 2^-12.
    for (to, name, bound) in [(Target::F32, "f32", 1e-4), (Target::F16, "f16", 2e-3), (Target::BF16, "bf16", 2e-2)] {
        let out = dir.path().join(name);
        write(&whole, &out, to);
        close(name, &logits(&open_exact(&out, 1), &ids), &expected, bound).unwrap();
    }

    // In NF4, what the adapter leaves alone keeps its bytes, and the rest is told of.
    let out = dir.path().join("again");
    write(&whole, &out, Target::Nf4);
    let (old, new) = (Checkpoint::open(&base).unwrap(), Checkpoint::open(&out).unwrap());
    let adapted = |name: &str| name.contains("q_proj") || name.contains("v_proj");
    assert_eq!(old.names().collect::<Vec<_>>(), new.names().collect::<Vec<_>>());
    for name in old.names() {
        let same = old.tensor(name).unwrap().bytes == new.tensor(name).unwrap().bytes;
        let constant = name.ends_with("quant_map");
        assert!(same || adapted(name), "{name} has changed");
        assert!(!same || constant || !adapted(name), "{name} has not changed");
    }
    let told = rounding(&whole, &out, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(told.len(), 4, "q and v of two layers");
    for row in &told {
        let (error, change, arrived) = (row.error(), row.change(), row.arrived().unwrap());
        assert!(row.layer.is_some_and(|n| row.module.contains(&format!("layers.{n}."))), "{row:?}");
        assert!((0.05..0.15).contains(&error), "NF4 rounds normal weights by 0.09 of their size: {row:?}");
        assert!(change > 0.0 && (0.5..1.5).contains(&arrived), "{change} {arrived} {row:?}");
    }
}

/// Layers that somebody left in 16 bits stay so.
#[test]
fn a_mixed_base_stays_mixed() {
    let dir = tempfile::tempdir().unwrap();
    let (base, out) = (dir.path().join("mixed"), dir.path().join("out"));
    let recipe = pocketlora::format::Recipe { to: Target::Nf4, skip: vec!["layers.1.mlp".to_owned()] };
    let source = open_source(&golden("tiny-llama")).unwrap();
    pocketlora::format::quantize(source.as_ref(), &base, recipe, Existing::Keep, &mut |_| ControlFlow::Continue(()))
        .unwrap();
    let lora = golden("adapters/lora");
    merge(&base, &[(&lora, 1.0)], &out, Target::Nf4);
    let (old, new) = (Checkpoint::open(&base).unwrap(), Checkpoint::open(&out).unwrap());
    assert_eq!(old.names().collect::<Vec<_>>(), new.names().collect::<Vec<_>>());
    let skipped = |c: &Checkpoint| c.config()["quantization_config"]["llm_int8_skip_modules"].clone();
    assert_eq!(skipped(&old), skipped(&new));
}

#[test]
fn what_cannot_be_merged_is_refused_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let (lora, other) = (golden("adapters/lora"), golden("methods/lora"));
    let (tiny, peft) = (golden("tiny-llama"), golden("peft/base"));
    let [ia3, prefix, saved] = ["ia3", "prefix_tuning", "lora_modules_to_save"].map(|m| golden("methods").join(m));
    let bias = golden("methods/lora_bias");
    let cases: [(&str, &Path, Vec<Part<'_>>, &str); 6] = [
        ("a bias where there is none", &peft, vec![(&bias, 1.0)], "bias"),
        ("beside the weights", &peft, vec![(&prefix, 1.0)], "prefix"),
        ("another base", &tiny, vec![(&other, 1.0)], "use the base that the adapter was trained on"),
        ("a strength of ia3", &peft, vec![(&ia3, 0.5)], "no strength"),
        ("a strength of whole weights", &peft, vec![(&saved, 0.5)], "no strength"),
        ("no layer", &peft, vec![(&lora, 1.0)], "use the base that the adapter was trained on"),
    ];
    check_all(cases, |(name, base, adapters, said)| match merged(base, adapters) {
        Ok(_) => Err(format!("{name}: merged")),
        Err(e) if e.to_string().contains(said) => Ok(()),
        Err(e) => Err(format!("{name}: expected `{said}` in: {e}")),
    });
    let whole = merged(&tiny, &[(&lora, 1.0)]).unwrap();
    let out = dir.path().join("stopped");
    let stopped = whole.write(&out, Target::F32, Existing::Keep, &mut |_| ControlFlow::Break(())).unwrap_err();
    assert_eq!(stopped.code(), ErrorCode::Cancelled);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "something is left behind");
}

/// GPT-2's 16-bit matrices lie as columns, its 4-bit ones as rows.
#[test]
fn gpt2_is_merged_in_four_bits_alone() {
    let (dir, base) = (tempfile::tempdir().unwrap(), golden("families/gpt2"));
    let (adapter, ids) = (base.join("adapter"), ids(&tensors(&base.join("logits.safetensors"))["ids"]));
    let error = merged(&base, &[(&adapter, 1.0)]).err().expect("its rows are no rows of a layer");
    assert!(error.code() == ErrorCode::Unsupported && error.to_string().contains("columns"), "{error}");
    let four_bit = dir.path().join("nf4");
    convert(&base, &four_bit, Target::Nf4);
    let out = dir.path().join("whole");
    merge(&four_bit, &[(&adapter, 1.0)], &out, Target::F32);
    let expected = logits(&beside(&four_bit, &[(&adapter, 1.0)]), &ids);
    close("merged", &logits(&open_exact(&out, 1), &ids), &expected, 1e-4).unwrap();
}
