//! Models in the few bits of other programs, as sources of `quantize`.

use crate::common::{check_all, golden, logits, open_exact};
use half::f16;
use pocketlora::format::{Existing, HfSource, Source, Target, open_source, quantize};
use pocketlora::{Engine, ErrorCode, Options};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

type Parts = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// Numbers without a pattern.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }

    /// A small number that f16 holds.
    fn half(&mut self) -> f32 {
        f16::from_f32(self.below(1000) as f32 / 20_000.0 + 0.001).to_f32()
    }
}

fn halves(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// Packs `[out, in]` codes of a form; returns its tensors and the weight that they are, both by definition.
type Pack = fn(&mut Numbers, usize, usize) -> (Parts, Vec<f32>);

const GROUP: usize = 32;

fn put(parts: &mut Parts, name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) {
    parts.insert(name.to_owned(), (dtype, shape.to_vec(), bytes));
}

fn mlx(n: &mut Numbers, out: usize, input: usize, bits: usize) -> (Parts, Vec<f32>) {
    let groups = input / GROUP;
    let codes: Vec<u32> = (0..out * input).map(|_| n.below(1 << bits) as u32).collect();
    let scales: Vec<f32> = (0..out * groups).map(|_| n.half()).collect();
    let biases: Vec<f32> = (0..out * groups).map(|_| -n.half()).collect();
    let mut packed = vec![0u32; out * input * bits / 32];
    for (i, code) in codes.iter().enumerate() {
        packed[i * bits / 32] |= code << (i * bits % 32);
    }
    let mut parts = Parts::new();
    put(&mut parts, "weight", Dtype::U32, &[out, input * bits / 32], words(&packed));
    put(&mut parts, "scales", Dtype::F16, &[out, groups], halves(&scales));
    put(&mut parts, "biases", Dtype::F16, &[out, groups], halves(&biases));
    let weight = (0..out * input).map(|i| codes[i] as f32 * scales[i / GROUP] + biases[i / GROUP]).collect();
    (parts, weight)
}

/// `add` is what version 1 leaves out of its zeros; `order` says whether groups are not in their order.
fn gptq(n: &mut Numbers, out: usize, input: usize, bits: usize, order: bool) -> (Parts, Vec<f32>) {
    let groups = input / GROUP;
    let per_word = 32 / bits;
    let codes: Vec<u32> = (0..out * input).map(|_| n.below(1 << bits) as u32).collect();
    let zeros: Vec<u32> = (0..out * groups).map(|_| n.below(1 << bits) as u32).collect();
    let scales: Vec<f32> = (0..out * groups).map(|_| n.half()).collect();
    let of_input: Vec<usize> = (0..input).map(|i| if order { i % groups } else { i / GROUP }).collect();
    let (mut qweight, mut qzeros) = (vec![0u32; input / per_word * out], vec![0u32; groups * out / per_word]);
    let mut weight = vec![0.0; out * input];
    for i in 0..input {
        for o in 0..out {
            let code = codes[i * out + o];
            qweight[i / per_word * out + o] |= code << (i % per_word * bits);
            let g = of_input[i];
            weight[o * input + i] = (code as f32 - zeros[g * out + o] as f32 - 1.0) * scales[g * out + o];
        }
    }
    for (i, zero) in zeros.iter().enumerate() {
        qzeros[i / per_word] |= zero << (i % per_word * bits);
    }
    let mut parts = Parts::new();
    put(&mut parts, "qweight", Dtype::I32, &[input / per_word, out], words(&qweight));
    put(&mut parts, "qzeros", Dtype::I32, &[groups, out / per_word], words(&qzeros));
    put(&mut parts, "scales", Dtype::F16, &[groups, out], halves(&scales));
    if order {
        let index: Vec<u32> = of_input.iter().map(|g| *g as u32).collect();
        put(&mut parts, "g_idx", Dtype::I32, &[input], words(&index));
    }
    (parts, weight)
}

fn awq(n: &mut Numbers, out: usize, input: usize) -> (Parts, Vec<f32>) {
    // Column number `ORDER[i]` of eight is at place `i`.
    const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
    let groups = input / GROUP;
    let codes: Vec<u32> = (0..out * input).map(|_| n.below(16) as u32).collect();
    let zeros: Vec<u32> = (0..out * groups).map(|_| n.below(16) as u32).collect();
    let scales: Vec<f32> = (0..out * groups).map(|_| n.half()).collect();
    let pack = |rows: usize, codes: &[u32]| -> Vec<u32> {
        let word = |row: usize, w: usize| {
            ORDER.iter().enumerate().fold(0, |word, (i, column)| word | codes[row * out + w * 8 + column] << (4 * i))
        };
        (0..rows).flat_map(|row| (0..out / 8).map(move |w| (row, w))).map(|(row, w)| word(row, w)).collect()
    };
    let mut parts = Parts::new();
    put(&mut parts, "qweight", Dtype::I32, &[input, out / 8], words(&pack(input, &codes)));
    put(&mut parts, "qzeros", Dtype::I32, &[groups, out / 8], words(&pack(groups, &zeros)));
    put(&mut parts, "scales", Dtype::F16, &[groups, out], halves(&scales));
    let mut weight = vec![0.0; out * input];
    for i in 0..input {
        for o in 0..out {
            let g = i / GROUP * out + o;
            weight[o * input + i] = (codes[i * out + o] as f32 - zeros[g] as f32) * scales[g];
        }
    }
    (parts, weight)
}

fn int8(n: &mut Numbers, out: usize, input: usize) -> (Parts, Vec<f32>) {
    let codes: Vec<i8> = (0..out * input).map(|_| n.below(255) as i16 as i8).collect();
    let scales: Vec<f32> = (0..out).map(|_| n.half()).collect();
    let mut parts = Parts::new();
    put(&mut parts, "weight", Dtype::I8, &[out, input], codes.iter().map(|c| *c as u8).collect());
    put(&mut parts, "SCB", Dtype::F32, &[out], scales.iter().flat_map(|v| v.to_le_bytes()).collect());
    put(&mut parts, "weight_format", Dtype::U8, &[], vec![0]);
    let weight = (0..out * input).map(|i| f32::from(codes[i]) * scales[i / input] / 127.0).collect();
    (parts, weight)
}

/// Scales of blocks `[block, block]`, or one for all.
fn fp8(n: &mut Numbers, out: usize, input: usize, block: Option<usize>) -> (Parts, Vec<f32>) {
    // Codes without the two that are no number, and what they are: the fraction's three bits, the exponent's four.
    let codes: Vec<u8> = (0..out * input).map(|_| (n.below(127) + 128 * n.below(2)) as u8).collect();
    let value = |code: u8| {
        let (exponent, fraction) = (code >> 3 & 15, f32::from(code & 7));
        let size =
            if exponent == 0 { fraction / 512.0 } else { (8.0 + fraction) * 2f32.powi(i32::from(exponent) - 10) };
        if code >= 128 { -size } else { size }
    };
    let wide = input.div_ceil(block.unwrap_or(input));
    let tall = out.div_ceil(block.unwrap_or(out));
    let scales: Vec<f32> = (0..wide * tall).map(|_| n.half() / 100.0).collect();
    let of = |i: usize| match block {
        Some(block) => scales[i / input / block * wide + i % input / block],
        None => scales[0],
    };
    let mut parts = Parts::new();
    let shape: &[usize] = if block.is_some() { &[tall, wide] } else { &[] };
    put(&mut parts, "weight", Dtype::F8_E4M3, &[out, input], codes.clone());
    put(&mut parts, "weight_scale_inv", Dtype::F32, shape, scales.iter().flat_map(|v| v.to_le_bytes()).collect());
    (parts, (0..out * input).map(|i| value(codes[i]) * of(i)).collect())
}

/// ModelOpt's: two values of 4 bits a byte, a scale of 8 bits for 16 of them, and one for all.
fn nvfp4(n: &mut Numbers, out: usize, input: usize) -> (Parts, Vec<f32>) {
    const VALUES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let codes: Vec<u8> = (0..out * input).map(|_| n.below(16) as u8).collect();
    let exponents: Vec<u8> = (0..out * input / 16).map(|_| (n.below(4) + 4) as u8).collect();
    let whole = n.half();
    let value = |i: usize| {
        let size = VALUES[usize::from(codes[i] & 7)] * 2f32.powi(i32::from(exponents[i / 16]) - 7) * 1.25 * whole;
        if codes[i] & 8 == 0 { size } else { -size }
    };
    let packed = codes.chunks(2).map(|two| two[0] | two[1] << 4).collect();
    // 1.25 is a fraction of two eighths.
    let scales = exponents.iter().map(|exponent| exponent << 3 | 2).collect();
    let mut parts = Parts::new();
    put(&mut parts, "weight", Dtype::U8, &[out, input / 2], packed);
    put(&mut parts, "weight_scale", Dtype::F8_E4M3, &[out, input / 16], scales);
    put(&mut parts, "weight_scale_2", Dtype::F32, &[], whole.to_le_bytes().to_vec());
    put(&mut parts, "input_scale", Dtype::F32, &[], 1f32.to_le_bytes().to_vec());
    (parts, (0..out * input).map(value).collect())
}

/// The tiny Llama with its linear layers packed, and the values that they are.
fn model(dir: &Path, name: &str, pack: Pack, config: &Value) -> (PathBuf, BTreeMap<String, Vec<f32>>) {
    let out = dir.join(name);
    fs::create_dir_all(&out).unwrap();
    let base = golden("tiny-llama");
    let mut json: Value = serde_json::from_slice(&fs::read(base.join("config.json")).unwrap()).unwrap();
    json.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
    fs::write(out.join("config.json"), json.to_string()).unwrap();
    let bytes = fs::read(base.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (mut all, mut weights, mut n) = (Parts::new(), BTreeMap::new(), Numbers(7));
    // In a fixed order, so that each run has the same numbers.
    let mut tensors = file.tensors();
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    for (name, tensor) in tensors {
        match name.strip_suffix("_proj.weight") {
            Some(_) => {
                let module = name.trim_end_matches(".weight");
                let (parts, weight) = pack(&mut n, tensor.shape()[0], tensor.shape()[1]);
                all.extend(parts.into_iter().map(|(part, tensor)| (format!("{module}.{part}"), tensor)));
                weights.insert(name, weight);
            }
            None => _ = all.insert(name, (tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec())),
        }
    }
    let views = all
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(out.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    (out, weights)
}

fn forms() -> Vec<(&'static str, Pack, Value)> {
    let method = |name: &str| json!({"quantization_config": {"quant_method": name}});
    let bitsandbytes = json!({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true}});
    let affine = |bits: u32| json!({"quantization": {"group_size": GROUP, "bits": bits}});
    let blocks = json!({"quantization_config": {"quant_method": "fp8", "weight_block_size": [48, 48]}});
    vec![
        ("mlx 4", |n, o, i| mlx(n, o, i, 4), affine(4)),
        ("mlx 8", |n, o, i| mlx(n, o, i, 8), affine(8)),
        ("gptq 4", |n, o, i| gptq(n, o, i, 4, false), method("gptq")),
        ("gptq 8 in another order", |n, o, i| gptq(n, o, i, 8, true), method("gptq")),
        ("awq", awq, method("awq")),
        ("int8", int8, bitsandbytes),
        ("fp8 by blocks", |n, o, i| fp8(n, o, i, Some(48)), blocks),
        ("nvfp4", nvfp4, json!({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}})),
        ("fp8 for all", |n, o, i| fp8(n, o, i, None), method("fp8")),
    ]
}

#[test]
fn weights_are_what_their_definitions_say() {
    let dir = tempfile::tempdir().unwrap();
    check_all(forms(), |(name, pack, config)| {
        let (path, weights) = model(dir.path(), name, *pack, config);
        let source = HfSource::open(&path).map_err(|e| format!("{name}: {e}"))?;
        assert!(source.config().get("quantization").or(source.config().get("quantization_config")).is_none());
        for (tensor, expected) in &weights {
            let at = source.tensors().iter().position(|t| t.name == *tensor).unwrap();
            let (rows, mut got) = (source.tensors()[at].shape[0], vec![0.0; expected.len()]);
            source.read_rows(at, 0..rows, &mut got).unwrap();
            let mut last = vec![0.0; expected.len() / rows];
            source.read_rows(at, rows - 1..rows, &mut last).unwrap();
            let bad =
                got.iter().zip(expected).position(|(got, expected)| (got - expected).abs() > 1e-6 * expected.abs());
            if let Some(i) = bad {
                return Err(format!("{name}: {tensor} at {i}: {} instead of {}", got[i], expected[i]));
            }
            assert_eq!(last, got[got.len() - last.len()..], "{name}: rows by themselves");
        }
        Ok(())
    });
}

#[test]
fn they_are_quantized_and_run() {
    let dir = tempfile::tempdir().unwrap();
    check_all(forms(), |(name, pack, config)| {
        let (path, _) = model(dir.path(), name, *pack, config);
        let direct = Engine::open(&path, &Options::new().threads(1)).map(|_| ()).unwrap_err();
        assert_eq!(direct.code(), ErrorCode::Unsupported, "{name}: {direct}");
        let write = |to: Target, out: &Path| {
            let source = open_source(&path).unwrap();
            let go_on = &mut |_: pocketlora::format::Progress<'_>| ControlFlow::Continue(());
            quantize(source.as_ref(), out, to, Existing::Keep, go_on).map_err(|e| format!("{name}: {e}"))
        };
        let [whole, nf4] = ["whole", "nf4"].map(|to| dir.path().join(format!("{name} {to}")));
        write(Target::F32, &whole)?;
        let summary = write(Target::Nf4, &nf4)?;
        assert_eq!(summary.quantized, 14, "{name}");
        let [whole, nf4] = [whole, nf4].map(|dir| logits(&open_exact(&dir, 1), &[5, 80, 3, 200]));
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v * v)).sum::<f64>().sqrt();
        let off = norm(&mut whole.iter().zip(&nf4).map(|(a, b)| a - b)) / norm(&mut whole.iter().copied());
        if (0.0..0.8).contains(&off) { Ok(()) } else { Err(format!("{name}: NF4 is off by {off} of the logits")) }
    });
}

#[test]
fn parts_that_contradict_each_other_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let shorter: [(&str, Pack, &str); 5] = [
        ("mlx", |n, o, i| (mlx(n, o, i / 2, 4).0, Vec::new()), "weight"),
        ("gptq", |n, o, i| drop_part(gptq(n, o, i, 4, true).0, "qzeros"), "qzeros"),
        ("int8", |n, o, i| drop_part(int8(n, o, i).0, "weight"), "weight"),
        ("nvfp4", |n, o, i| resize(nvfp4(n, o, i).0, "weight_scale_2"), "weight_scale_2"),
        ("fp8", |n, o, i| resize(fp8(n, o, i, Some(48)).0, "weight_scale_inv"), "weight_scale_inv"),
    ];
    let config = json!({"quantization": {"group_size": GROUP * 3, "bits": 4}});
    check_all(shorter, |(name, pack, said)| {
        let (path, _) = model(dir.path(), name, *pack, &config);
        match HfSource::open(&path) {
            Ok(_) => Err(format!("{name}: opened")),
            Err(e) if e.code() == ErrorCode::Format && e.to_string().contains(&format!("_proj.{said}")) => Ok(()),
            Err(e) => Err(format!("{name}: expected `{said}` in: {e}")),
        }
    });
}

fn drop_part(mut parts: Parts, part: &str) -> (Parts, Vec<f32>) {
    parts.remove(part);
    (parts, Vec::new())
}

fn resize(mut parts: Parts, part: &str) -> (Parts, Vec<f32>) {
    parts.insert(part.to_owned(), (Dtype::F32, vec![2], vec![0; 8]));
    (parts, Vec::new())
}
