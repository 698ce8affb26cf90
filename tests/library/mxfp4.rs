//! gpt-oss as it is published: all experts of a layer in one tensor, in MXFP4.

use crate::common::{convert, golden, logits, max_diff, open_exact};
use half::bf16;
use pocketlora::format::{HfSource, Source, Target};
use pocketlora::{Engine, ErrorCode, Options};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

const EXPERTS: usize = 4;
const HIDDEN: usize = 32;
const WIDTH: usize = 32;

/// What four bits are: a sign, two bits of exponent, one of fraction.
fn e2m1(code: u8) -> f32 {
    let (exponent, half) = (i32::from(code >> 1 & 3), f32::from(code & 1));
    let size = if exponent == 0 { half / 2.0 } else { (1.0 + half / 2.0) * 2f32.powi(exponent - 1) };
    if code & 8 == 0 { size } else { -size }
}

/// Numbers without a pattern.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// Matrices `[experts, out, in]` in MXFP4 under `name`, and the same by definition as columns in bf16.
fn pack(n: &mut Numbers, name: &str, [out, input]: [usize; 2], packed: &mut Tensors, plain: &mut Tensors) {
    let (rows, blocks) = (EXPERTS * out, input / 32);
    let codes: Vec<u8> = (0..rows * input).map(|_| n.below(16) as u8).collect();
    let exponents: Vec<u8> = (0..rows * blocks).map(|_| 121 + n.below(3) as u8).collect();
    let bytes = codes.chunks(2).map(|pair| pair[0] | pair[1] << 4).collect();
    packed.insert(format!("{name}_blocks"), (Dtype::U8, vec![EXPERTS, out, blocks, 16], bytes));
    packed.insert(format!("{name}_scales"), (Dtype::U8, vec![EXPERTS, out, blocks], exponents.clone()));
    let value = |i: usize| e2m1(codes[i]) * 2f32.powi(i32::from(exponents[i / 32]) - 127);
    let mut columns = Vec::new();
    for expert in 0..EXPERTS {
        for column in 0..input {
            let own = (0..out).map(|row| value((expert * out + row) * input + column));
            columns.extend(own.flat_map(|v| bf16::from_f32(v).to_le_bytes()));
        }
    }
    plain.insert(name.to_owned(), (Dtype::BF16, vec![EXPERTS, input, out], columns));
}

fn write(dir: &Path, config: &Value, tensors: &Tensors) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

/// The golden with other experts: in MXFP4 in the folder `packed`, in bf16 in the folder `plain`.
fn models(dir: &Path) -> (Value, Tensors) {
    let base = golden("families").join("gpt_oss");
    let mut config: Value = serde_json::from_slice(&fs::read(base.join("config.json")).unwrap()).unwrap();
    config["intermediate_size"] = WIDTH.into();
    let bytes = fs::read(base.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let common = file.tensors().into_iter().filter(|(name, _)| !name.contains(".experts."));
    let mut plain: Tensors =
        common.map(|(name, t)| (name, (t.dtype(), t.shape().to_vec(), t.data().to_vec()))).collect();
    let mut n = Numbers(11);
    for layer in 0..2 {
        for (name, width) in [("gate_up_proj_bias", 2 * WIDTH), ("down_proj_bias", HIDDEN)] {
            let values = (0..EXPERTS * width).map(|_| n.below(200) as f32 / 1000.0 - 0.1);
            let bytes = values.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect();
            plain
                .insert(format!("model.layers.{layer}.mlp.experts.{name}"), (Dtype::BF16, vec![EXPERTS, width], bytes));
        }
    }
    let mut packed = plain.clone();
    for layer in 0..2 {
        for (name, shape) in [("gate_up_proj", [2 * WIDTH, HIDDEN]), ("down_proj", [HIDDEN, WIDTH])] {
            pack(&mut n, &format!("model.layers.{layer}.mlp.experts.{name}"), shape, &mut packed, &mut plain);
        }
    }
    write(&dir.join("plain"), &config, &plain);
    config["quantization_config"] = json!({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]});
    write(&dir.join("packed"), &config, &packed);
    (config, packed)
}

#[test]
fn experts_in_mxfp4_are_what_their_definition_says() {
    let dir = tempfile::tempdir().unwrap();
    models(dir.path());
    let [plain, packed] = ["plain", "packed"].map(|name| dir.path().join(name));
    let direct = Engine::open(&packed, &Options::new().threads(1)).map(|_| ()).unwrap_err();
    assert!(direct.code() == ErrorCode::Unsupported && direct.to_string().contains("MXFP4"), "{direct}");

    let source = HfSource::open(&packed).unwrap();
    assert!(source.config().get("quantization_config").is_none());
    let experts = source.tensors().iter().filter(|t| t.dtype == "MXFP4").count();
    assert_eq!(experts, 2 * 2 * EXPERTS, "each expert has matrices of its own");
    let [whole, of_packed, of_plain] = ["whole", "packed nf4", "plain nf4"].map(|name| dir.path().join(name));
    convert(&packed, &whole, Target::F32);
    convert(&packed, &of_packed, Target::Nf4);
    convert(&plain, &of_plain, Target::Nf4);
    let ids = [5, 60, 3, 50, 11, 12];
    let [whole, plain] = [whole, plain].map(|dir| logits(&open_exact(&dir, 1), &ids));
    assert!(max_diff(&whole, &plain).0 < 1e-5, "{:?}", max_diff(&whole, &plain));
    let [of_packed, of_plain] = [of_packed, of_plain].map(|dir| fs::read(dir.join("model.safetensors")).unwrap());
    let [a, b] = [&of_packed, &of_plain].map(|bytes| safetensors::SafeTensors::deserialize(bytes).unwrap());
    for name in ["gate_up_projs.3.weight", "gate_up_projs.0.weight.absmax", "down_projs.1.weight"] {
        let name = format!("model.layers.1.mlp.experts.{name}");
        assert_eq!(a.tensor(&name).unwrap().data(), b.tensor(&name).unwrap().data(), "{name}");
    }
}

#[test]
fn parts_that_contradict_each_other_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (config, packed) = models(dir.path());
    let name = "model.layers.0.mlp.experts.down_proj_scales";
    for (shape, named) in [(None, "mxfp4_scales"), (Some(vec![EXPERTS, HIDDEN, 2]), "mxfp4_scales")] {
        let mut tensors = packed.clone();
        match shape {
            Some(shape) => {
                let bytes = vec![120; shape.iter().product()];
                tensors.insert(name.to_owned(), (Dtype::U8, shape, bytes));
            }
            None => _ = tensors.remove(name),
        }
        let broken = dir.path().join("broken");
        write(&broken, &config, &tensors);
        let error = HfSource::open(&broken).unwrap_err();
        assert!(error.code() == ErrorCode::Format && error.to_string().contains(named), "{error}");
    }
}
