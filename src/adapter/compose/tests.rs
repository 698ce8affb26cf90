//! Compositions beside those of PEFT 0.21.2: `tests/data/oracles/composition` has layer 0 of each.

use super::write::compose_with;
use super::*;
use crate::adapter::Tensors;
use crate::format::Existing;
use crate::format::safetensors::TensorFile;
use crate::format::widen;
use serde_json::Value;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

const LAYER: &str = "model.layers.0.";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracles/composition").join(name)
}

fn open(name: &str) -> AdapterFile {
    AdapterFile::open(&golden(name)).unwrap()
}

/// Tensors of one of PEFT's cases.
fn case(name: &str) -> Tensors {
    let file = TensorFile::open(&golden(&format!("{name}.safetensors"))).unwrap();
    let one = |(name, tensor): (&str, &crate::format::safetensors::Tensor)| {
        let mut data = vec![0.0; tensor.shape.iter().product()];
        match tensor.float_type() {
            Some(float) => widen(float, &tensor.bytes, &mut data),
            None => data.iter_mut().zip(tensor.bytes.iter()).for_each(|(v, byte)| *v = f32::from(*byte)),
        }
        (name.to_owned(), HostTensor { shape: tensor.shape.clone(), data })
    };
    file.tensors().map(one).collect()
}

/// Where the mask of a part lies: in the order of the model's modules, and within that of PEFT's loops.
fn mask_number(masks: &[(String, usize, usize)], module: &str, adapter: usize, part: usize) -> usize {
    masks.iter().position(|(m, a, p)| (m.as_str(), *a, *p) == (module, adapter, part)).unwrap()
}

fn quiet(_: crate::format::Progress<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn change(a: &HostTensor, b: &HostTensor) -> Vec<f32> {
    Pair { adapter: 0, a, b, scale: 1.0, weight: 1.0 }.change()
}

fn far(one: &[f32], other: &[f32]) -> f32 {
    assert_eq!(one.len(), other.len());
    one.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn compositions_are_those_of_peft() {
    let cases: Value = serde_json::from_slice(&std::fs::read(golden("cases.json")).unwrap()).unwrap();
    let (temp, mut wrong) = (tempfile::tempdir().unwrap(), Vec::new());
    for (name, asked) in cases.as_object().unwrap() {
        let number = |key: &str| asked[key].as_f64();
        let combination = Combination::named(asked["combination_type"].as_str().unwrap()).unwrap();
        let how = Composition {
            density: number("density"),
            rank: number("svd_rank").map(|rank| rank as usize),
            clamp: number("svd_clamp"),
            majority: match asked["majority_sign_method"].as_str() {
                Some("frequency") => MajoritySign::Frequency,
                _ => MajoritySign::Total,
            },
            ..Composition::new(combination)
        };
        let weights = asked["weights"].as_array().unwrap().iter().map(|w| w.as_f64().unwrap() as f32);
        let names = asked["adapters"].as_array().unwrap().iter().map(|n| n.as_str().unwrap());
        let adapters: Vec<_> = names.map(open).zip(weights).collect();
        let expected = case(name);

        let mut masks = Vec::new();
        for end in ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"] {
            let module = format!("{LAYER}{end}");
            let has = |i: &usize| adapters[*i].0.modules().any(|m| m == module);
            for part in if combination.cuts() { 2..3 } else { 0..2 } {
                masks.extend((0..adapters.len()).filter(has).map(|i| (module.clone(), i, part)));
            }
        }
        let mut stays = |module: &str, adapter: usize, part: usize, count: usize| -> Vec<bool> {
            if !module.starts_with(LAYER) {
                return vec![true; count];
            }
            let mask = &expected[&format!("mask.{:03}", mask_number(&masks, module, adapter, part))].data;
            assert_eq!(mask.len(), count, "{name}: {module}");
            mask.iter().map(|v| *v > 0.0).collect()
        };
        let out = temp.path().join(name);
        let done = compose_with(&adapters, &how, &out, Existing::Keep, &mut quiet, &mut stays).unwrap();
        assert_eq!(done.kept.is_some(), combination.cuts());
        let file = AdapterFile::open(&out).unwrap();
        let modules: Vec<String> = file.modules().map(str::to_owned).collect();
        assert_eq!(modules.len(), done.modules);
        for module in modules.iter().filter(|module| module.starts_with(LAYER)) {
            let ours = |part: &str| &file.tensors[&format!("{module}.lora_{part}.weight")];
            let theirs = |part: &str| {
                let written = format!("{module}.{part}");
                expected.iter().find(|(n, _)| n.ends_with(&written)).map(|(_, t)| t).unwrap()
            };
            // A and B of the largest singular values are fixed but for the signs.
            let by_change = combination.cuts() && how.clamp.is_none();
            let got = if by_change {
                far(&change(ours("A"), ours("B")), &change(theirs("lora_A"), theirs("lora_B")))
            } else if combination.cuts() {
                // So is what is cut: signs decide which values are the largest.
                let sizes = |t: &HostTensor| t.data.iter().map(|v| v.abs()).collect::<Vec<_>>();
                let parts = [(ours("A"), theirs("lora_A")), (ours("B"), theirs("lora_B"))];
                parts.map(|(own, their)| far(&sizes(own), &sizes(their))).into_iter().fold(0.0, f32::max) / 5e3
            } else {
                // Where an adapter lacks the module, PEFT leaves ranks of zeros at the end.
                let (a, rank) = (theirs("lora_A"), ours("A").shape[0]);
                let (cols, more) = (a.shape[1], a.shape[0]);
                let b: Vec<f32> = theirs("lora_B").data.chunks(more).flat_map(|row| row[..rank].to_vec()).collect();
                assert!(a.data[rank * cols..].iter().all(|v| *v == 0.0), "{name}: {module}");
                far(&ours("A").data, &a.data[..rank * cols]).max(far(&ours("B").data, &b))
            };
            if got.is_nan() || got > 1e-5 {
                wrong.push(format!("{name}: {module} is off by {got}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The clamp by itself: no value is beyond the quantile, and those within are what they were.
#[test]
fn larger_values_are_cut_to_the_quantile() {
    let adapters = [(open("a"), 0.7), (open("b"), 0.6)];
    let temp = tempfile::tempdir().unwrap();
    let composed = |clamp: Option<f64>, name: &str| {
        let how = Composition { clamp, rank: Some(4), ..Composition::new(Combination::Svd) };
        compose(&adapters, &how, &temp.path().join(name), Existing::Keep, &mut quiet).unwrap();
        AdapterFile::open(&temp.path().join(name)).unwrap()
    };
    let (whole, cut) = (composed(None, "whole"), composed(Some(0.9), "cut"));
    for module in whole.modules() {
        let of = |file: &AdapterFile| -> Vec<f32> {
            let part = |part: &str| file.tensors[&format!("{module}.lora_{part}.weight")].data.clone();
            [part("A"), part("B")].concat()
        };
        let (before, after) = (of(&whole), of(&cut));
        let most = after.iter().map(|v| v.abs()).fold(0.0, f32::max);
        let beyond = before.iter().filter(|v| **v > most).count();
        assert!(beyond.abs_diff(before.len() / 10) <= 1, "{module}: {beyond} of {}", before.len());
        assert!(before.iter().zip(&after).all(|(b, a)| b.clamp(-most, most) == *a), "{module}");
    }
}

#[test]
fn the_same_seed_keeps_the_same_values_and_the_share_is_the_density() {
    let mut first = by_chance(3, 0.3);
    let (one, again) = (first("m.q_proj", 0, 0, 10_000), by_chance(3, 0.3)("m.q_proj", 0, 0, 10_000));
    assert_eq!(one, again);
    let kept = one.iter().filter(|stays| **stays).count();
    assert!((2_800..3_200).contains(&kept), "{kept}");
    for (module, adapter, part, seed) in
        [("m.k_proj", 0, 0, 3), ("m.q_proj", 1, 0, 3), ("m.q_proj", 0, 1, 3), ("m.q_proj", 0, 0, 4)]
    {
        assert_ne!(one, by_chance(seed, 0.3)(module, adapter, part, 10_000), "{module} {adapter} {part} {seed}");
    }
}

#[test]
fn what_cannot_be_composed_is_refused_before_any_work() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("out");
    let said = |adapters: &[(AdapterFile, f32)], how: Composition| {
        let error = compose(adapters, &how, &out, Existing::Keep, &mut quiet).unwrap_err();
        assert!(!out.exists(), "{error}");
        error.to_string()
    };
    let two = || [(open("a"), 0.5), (open("b"), 0.5)];
    let new = Composition::new;
    let with = |combination, density, rank| Composition { density, rank, ..new(combination) };
    for (how, part) in [
        (with(Combination::Ties, Some(0.0), None), "density"),
        (with(Combination::Ties, Some(1.5), None), "density"),
        (with(Combination::Ties, Some(f64::NAN), None), "density"),
        (with(Combination::DareLinear, None, None), "density"),
        (with(Combination::Cat, Some(0.5), None), "leaves no values out"),
        (with(Combination::Linear, None, Some(4)), "decides the rank"),
        (with(Combination::Svd, None, Some(9)), "at most 8"),
        (with(Combination::Svd, None, Some(0)), "1 or more"),
        (with(Combination::TiesSvd, Some(0.5), Some(65)), "at most 64"),
        (Composition { clamp: Some(1.1), ..new(Combination::Svd) }, "svd-clamp"),
        (Composition { clamp: Some(0.9), ..new(Combination::Cat) }, "svd-clamp"),
    ] {
        let said = said(&two(), how);
        assert!(said.contains(part), "{how:?}: {said}");
    }
    let ranks = said(&[(open("a"), 0.5), (open("c"), 0.5)], new(Combination::Linear));
    assert!(ranks.contains("rank 4") && ranks.contains("`cat`"), "{ranks}");
    assert!(said(&[(open("a"), f32::NAN)], new(Combination::Cat)).contains("finite"));
    assert!(said(&[], new(Combination::Cat)).contains("one or more"));
    let mut other = open("b");
    for tensor in other.tensors.values_mut().filter(|t| t.shape == [4, 64]) {
        *tensor = HostTensor { shape: vec![4, 32], data: tensor.data[..128].to_vec() };
    }
    assert!(said(&[(open("a"), 0.5), (other, 0.5)], new(Combination::Cat)).contains("expected terms for a layer"));
    let marked = |hash: &str, layers: usize| {
        let mut file = open("a");
        file.base_mark = Some(format!(
            r#"{{"family": "llama", "layers": {layers}, "hidden": 64, "rows": [], "values": [], "hash": "nf4-codes-1:{hash}"}}"#
        ));
        file
    };
    let bases = said(&[(marked("aa", 2), 0.5), (marked("bb", 2), 0.5)], new(Combination::Cat));
    assert!(bases.contains("nf4-codes-1:bb"), "{bases}");
    assert!(said(&[(marked("aa", 2), 0.5), (marked("aa", 3), 0.5)], new(Combination::Cat)).contains("3 layers"));
    compose(&[(marked("aa", 2), 0.5), (open("b"), 0.5)], &new(Combination::Cat), &out, Existing::Keep, &mut quiet)
        .unwrap();
    assert!(AdapterFile::open(&out).unwrap().base_hash().unwrap().ends_with("aa"));
    // An output is replaced where that is asked for, and only if it is one.
    let again = |existing| {
        compose(&two(), &new(Combination::Cat), &out, existing, &mut quiet).map(|_| ()).map_err(|e| e.to_string())
    };
    assert!(again(Existing::Keep).unwrap_err().contains("Existing::Replace"));
    again(Existing::Replace).unwrap();
    std::fs::write(out.join("notes.txt"), "mine").unwrap();
    assert!(again(Existing::Replace).unwrap_err().contains("more than an adapter"));
    let own = compose(&two(), &new(Combination::Cat), &golden("a"), Existing::Replace, &mut quiet).unwrap_err();
    assert!(own.to_string().contains("those of the adapters"), "{own}");
    // Stopped in the middle, nothing is left.
    let stopped = temp.path().join("stopped");
    let mut left = 2;
    let mut stop = |_: crate::format::Progress<'_>| {
        left -= 1;
        if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let error = compose(&two(), &new(Combination::Cat), &stopped, Existing::Keep, &mut stop).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Cancelled);
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 1, "only the first output is there");
}
