//! Opening Hugging Face directories: what is read, and that nothing hostile gets further than a typed error.

use pocketlora::ErrorCode;
use pocketlora::format::Checkpoint;
use pocketlora_kernels::{Absmax, FloatType, MatrixData};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn oracle(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracles").join(name)
}

const Q_PROJ: &str = "model.layers.0.self_attn.q_proj.weight";

#[test]
fn dense_and_quantized_weights_are_told_apart_by_tensor() {
    let dense = Checkpoint::open(&oracle("tiny-mistral")).unwrap();
    let q = dense.matrix(Q_PROJ).unwrap();
    assert_eq!((q.rows, q.cols), (128, 64));
    assert!(matches!(q.data, MatrixData::Dense(FloatType::BF16, ref b) if b.len() == 128 * 64 * 2));
    assert_eq!(dense.vector("model.norm.weight", 1).unwrap().0, [64]);
    assert_eq!(dense.config()["model_type"], "mistral");

    let four_bit = Checkpoint::open(&oracle("tiny-mistral-bnb4")).unwrap();
    let q = four_bit.matrix(Q_PROJ).unwrap();
    assert_eq!((q.rows, q.cols), (128, 64));
    let MatrixData::Nf4(q) = q.data else { panic!("q_proj is 4-bit") };
    assert_eq!((q.packed.len(), q.block, q.dtype), (4096, 64, FloatType::F32));
    assert_eq!((q.code[0], q.code[7], q.code[15]), (-1.0, 0.0, 1.0));
    let Absmax::Double { codes, nested, nested_block, offset, .. } = q.absmax else { panic!("double quantized") };
    assert_eq!((codes.len(), nested.len(), nested_block, offset), (128, 1, 256, 0.311_141_97));
    let head = four_bit.matrix("lm_head.weight").unwrap();
    assert!(matches!(head.data, MatrixData::Dense(FloatType::F32, _)));

    assert!(four_bit.contains("model.layers.0.self_attn.q_proj.weight.absmax"));
    assert_eq!(four_bit.weights().collect::<Vec<_>>(), dense.names().collect::<Vec<_>>());
    let file = fs::metadata(oracle("tiny-mistral").join("model.safetensors")).unwrap().len();
    assert_eq!(dense.mapped_bytes() as u64, file);
}

#[test]
fn wrong_uses_name_the_file_and_the_tensor() {
    let model = Checkpoint::open(&oracle("tiny-mistral-bnb4")).unwrap();
    for error in [
        model.matrix("model.layers.9.self_attn.q_proj.weight").unwrap_err(),
        model.vector(Q_PROJ, 1).unwrap_err(),
        model.matrix("model.norm.weight").unwrap_err(),
    ] {
        assert_eq!(error.code(), ErrorCode::Format);
        assert!(error.place().contains("tiny-mistral-bnb4") && error.place().contains("tensor `model."), "{error}");
    }
    let missing = Checkpoint::open(Path::new("/nonexistent/model")).unwrap_err();
    assert_eq!(missing.code(), ErrorCode::Io);
}

/// A safetensors file taken apart so that a test can change it and put it together again.
struct Parts(BTreeMap<String, (String, Vec<u64>, Vec<u8>)>);

impl Parts {
    fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: BTreeMap<String, Value> = serde_json::from_slice(&bytes[8..data]).unwrap();
        let tensors = header.into_iter().filter(|(name, _)| name != "__metadata__").map(|(name, info)| {
            let at = |i: usize| data + info["data_offsets"][i].as_u64().unwrap() as usize;
            let shape = info["shape"].as_array().unwrap().iter().map(|d| d.as_u64().unwrap()).collect();
            (name, (info["dtype"].as_str().unwrap().to_owned(), shape, bytes[at(0)..at(1)].to_vec()))
        });
        Self(tensors.collect())
    }

    fn write(&self, path: &Path) {
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, (dtype, shape, bytes)) in &self.0 {
            let offsets = [data.len(), data.len() + bytes.len()];
            header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
            data.extend_from_slice(bytes);
        }
        let header = serde_json::to_vec(&header).unwrap();
        fs::write(path, [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()).unwrap();
    }

    fn set(&mut self, name: &str, dtype: &str, shape: &[u64], bytes: Vec<u8>) {
        self.0.insert(name.to_owned(), (dtype.to_owned(), shape.to_vec(), bytes));
    }

    fn state(&mut self, change: impl FnOnce(&mut Value)) {
        let key = format!("{Q_PROJ}.quant_state.bitsandbytes__nf4");
        let mut state: Value = serde_json::from_slice(&self.0[&key].2).unwrap();
        change(&mut state);
        let bytes = serde_json::to_vec(&state).unwrap();
        self.set(&key, "U8", &[bytes.len() as u64], bytes);
    }
}

#[test]
fn contradictory_companions_are_refused() {
    type Change = fn(&mut Parts);
    let key = |ending: &str| format!("{Q_PROJ}{ending}");
    let cases: Vec<(&str, Change)> = vec![
        ("shape against packed", |p| p.state(|s| s["shape"] = json!([128, 65]))),
        ("shape that overflows", |p| p.state(|s| s["shape"] = json!([u64::MAX, u64::MAX]))),
        ("shape of zero", |p| p.state(|s| s["shape"] = json!([0, 64]))),
        ("shape of one number", |p| p.state(|s| s["shape"] = json!([8192]))),
        ("shape that is text", |p| p.state(|s| s["shape"] = json!("128x64"))),
        ("blocksize 0", |p| p.state(|s| s["blocksize"] = json!(0))),
        ("blocksize 48", |p| p.state(|s| s["blocksize"] = json!(48))),
        ("blocksize 128 against 128 absmax", |p| p.state(|s| s["blocksize"] = json!(128))),
        ("blocksize beyond u64", |p| p.state(|s| s["blocksize"] = json!(1e300))),
        ("nested_blocksize 0", |p| p.state(|s| s["nested_blocksize"] = json!(0))),
        ("nested_blocksize against nested_absmax", |p| p.state(|s| s["nested_blocksize"] = json!(64))),
        ("nested_dtype", |p| p.state(|s| s["nested_dtype"] = json!("bfloat16"))),
        ("nested_offset beyond f32", |p| p.state(|s| s["nested_offset"] = json!(1e300))),
        ("nested_offset alone", |p| p.state(|s| drop(s.as_object_mut().unwrap().remove("nested_blocksize")))),
        ("dtype", |p| p.state(|s| s["dtype"] = json!("float64"))),
        ("quant_type against key", |p| p.state(|s| s["quant_type"] = json!("fp4"))),
        ("state that is no JSON", |p| {
            p.set(&format!("{Q_PROJ}.quant_state.bitsandbytes__nf4"), "U8", &[2], b"{]".into())
        }),
        ("not nested by state, nested by tensors", |p| {
            p.state(|s| {
                for key in ["nested_blocksize", "nested_dtype", "nested_offset"] {
                    s.as_object_mut().unwrap().remove(key);
                }
            });
        }),
        ("packed too short", |p| p.set(Q_PROJ, "U8", &[4095, 1], vec![0; 4095])),
        ("packed as integers", |p| p.set(Q_PROJ, "I32", &[1024, 1], vec![0; 4096])),
        ("absmax as floats", |p| p.set(&format!("{Q_PROJ}.absmax"), "F32", &[128], vec![0; 512])),
        ("absmax one short", |p| p.set(&format!("{Q_PROJ}.absmax"), "U8", &[127], vec![0; 127])),
        ("quant_map of 15", |p| p.set(&format!("{Q_PROJ}.quant_map"), "F32", &[15], vec![0; 60])),
        ("quant_map of NaN", |p| p.set(&format!("{Q_PROJ}.quant_map"), "F32", &[16], vec![0xff; 64])),
        ("nested_absmax of two", |p| p.set(&format!("{Q_PROJ}.nested_absmax"), "F32", &[2], vec![0; 8])),
        ("nested_absmax of infinity", |p| {
            p.set(&format!("{Q_PROJ}.nested_absmax"), "F32", &[1], f32::INFINITY.to_le_bytes().into());
        }),
        ("fp4 beside nf4", |p| p.set(&format!("{Q_PROJ}.quant_state.bitsandbytes__fp4"), "U8", &[2], b"{}".into())),
    ];
    let dir = copy_of_bnb4();
    let file = dir.path().join("model.safetensors");
    let mut failures = Vec::new();
    let mut expect_refused = |what: &str, change: &dyn Fn(&mut Parts)| {
        let mut parts = Parts::read(&oracle("tiny-mistral-bnb4").join("model.safetensors"));
        change(&mut parts);
        parts.write(&file);
        match Checkpoint::open(dir.path()).and_then(|m| m.matrix(Q_PROJ)) {
            Ok(_) => failures.push(format!("{what}: accepted")),
            Err(e) if e.code() != ErrorCode::Format || !e.place().contains(Q_PROJ) => {
                failures.push(format!("{what}: {e}"));
            }
            Err(_) => {}
        }
    };
    for (what, change) in &cases {
        expect_refused(what, change);
    }
    let companions = [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"];
    for ending in companions {
        expect_refused(&format!("no {ending}"), &|p| drop(p.0.remove(&key(ending)).unwrap()));
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn packed_bytes_may_carry_another_storage_type() {
    let dir = copy_of_bnb4();
    let file = dir.path().join("model.safetensors");
    for (dtype, size) in [("BF16", 2), ("F16", 2), ("F32", 4)] {
        let mut parts = Parts::read(&oracle("tiny-mistral-bnb4").join("model.safetensors"));
        let (_, _, bytes) = parts.0[Q_PROJ].clone();
        parts.set(Q_PROJ, dtype, &[bytes.len() as u64 / size, 1], bytes.clone());
        parts.write(&file);
        let q = Checkpoint::open(dir.path()).unwrap().matrix(Q_PROJ).unwrap();
        assert!(matches!(q.data, MatrixData::Nf4(ref q) if q.packed == bytes), "{dtype}");
    }
}

#[test]
fn plain_absmax_and_fp4_are_read() {
    let dir = copy_of_bnb4();
    let mut parts = Parts::read(&oracle("tiny-mistral-bnb4").join("model.safetensors"));
    let state = json!({"quant_type": "fp4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 64]}).to_string();
    parts.0.retain(|name, _| {
        !name.starts_with(&format!("{Q_PROJ}.quant_state")) && !name.contains("q_proj.weight.nested")
    });
    parts.set(&format!("{Q_PROJ}.quant_state.bitsandbytes__fp4"), "U8", &[state.len() as u64], state.into());
    parts.set(&format!("{Q_PROJ}.absmax"), "F32", &[128], 0.5f32.to_le_bytes().repeat(128));
    parts.write(&dir.path().join("model.safetensors"));
    let q = Checkpoint::open(dir.path()).unwrap().matrix(Q_PROJ).unwrap();
    let MatrixData::Nf4(q) = q.data else { panic!("4-bit") };
    assert!(matches!(q.absmax, Absmax::Plain(ref b) if b.len() == 512));
    assert_eq!(q.dtype, FloatType::BF16);
}

#[test]
fn shards_are_read_and_an_index_cannot_point_outside() {
    let dir = tempfile::tempdir().unwrap();
    let source = oracle("tiny-mistral");
    fs::copy(source.join("config.json"), dir.path().join("config.json")).unwrap();
    fs::copy(source.join("model.safetensors"), dir.path().join("model-00001-of-00001.safetensors")).unwrap();
    let open_with = |weight_map: Value| {
        let index = json!({"metadata": {"total_size": 1}, "weight_map": weight_map}).to_string();
        fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        Checkpoint::open(dir.path())
    };
    let model = open_with(json!({Q_PROJ: "model-00001-of-00001.safetensors"})).unwrap();
    // What the index forgets is in the file all the same.
    assert!(model.contains(Q_PROJ) && model.contains("model.norm.weight"));
    assert_eq!(model.matrix(Q_PROJ).unwrap().rows, 128);

    // Whole weights beside the parts: the file that is given is read, and the folder alone means neither.
    let single = dir.path().join("model.safetensors");
    let mut bytes = fs::read(source.join("model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[header..].fill(0);
    fs::write(&single, bytes).unwrap();
    let zeros = |file: &str| {
        let model = Checkpoint::open(&dir.path().join(file)).unwrap();
        model.tensor(Q_PROJ).unwrap().bytes.iter().all(|&byte| byte == 0)
    };
    assert!(zeros("model.safetensors"));
    assert!(!zeros("model.safetensors.index.json") && !zeros("model-00001-of-00001.safetensors"));
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("`model.safetensors`") && error.contains("index.json`"), "{error}");
    fs::copy(&single, dir.path().join("model-00001-of-00009.safetensors")).unwrap();
    fs::remove_file(&single).unwrap();
    let error = Checkpoint::open(&dir.path().join("model-00001-of-00009.safetensors")).unwrap_err().to_string();
    assert!(error.contains("of-00009") && error.contains("another"), "{error}");

    let outside = source.join("model.safetensors").display().to_string();
    for bad in ["../model.safetensors", "..", ".", "", "a/b", "./model-00001-of-00001.safetensors", &outside] {
        let error = open_with(json!({Q_PROJ: bad})).unwrap_err();
        assert!(error.code() == ErrorCode::Format && error.to_string().contains("without folders"), "{bad}: {error}");
    }
    for bad in [json!({"x": "model-00001-of-00001.safetensors"}), json!({Q_PROJ: 1}), json!([])] {
        assert_eq!(open_with(bad).unwrap_err().code(), ErrorCode::Format);
    }
    assert_eq!(open_with(json!({Q_PROJ: "missing.safetensors"})).unwrap_err().code(), ErrorCode::Io);
}

#[test]
fn truncated_files_are_refused() {
    let dir = copy_of_bnb4();
    let file = dir.path().join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let cuts = (0..64).chain((64..bytes.len()).step_by(997)).chain([bytes.len() - 1]);
    for cut in cuts {
        fs::write(&file, &bytes[..cut]).unwrap();
        let error = Checkpoint::open(dir.path()).expect_err(&format!("cut to {cut} bytes"));
        assert_eq!(error.code(), ErrorCode::Format, "{error}");
    }
    fs::write(&file, [&bytes[..], &[0]].concat()).unwrap();
    Checkpoint::open(dir.path()).expect_err("a byte too many");
}

#[test]
fn offsets_near_the_end_of_the_address_space_are_refused() {
    let dir = copy_of_bnb4();
    // Eight tensors of 2^61 - 1 bytes and one whose end, plus header, wraps around to the file's length.
    let mut header = String::from("{");
    let mut at = 0u64;
    for i in 0..9 {
        let size = if i < 8 { (1 << 61) - 1 } else { u64::MAX - at };
        header += &format!("\"t{i}\":{{\"dtype\":\"U8\",\"shape\":[{size}],\"data_offsets\":[{at},{}]}},", at + size);
        at += size;
    }
    header.pop();
    header.push('}');
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap_err().code(), ErrorCode::Format);
}

#[test]
fn flipped_bits_never_panic() {
    let dir = copy_of_bnb4();
    let mut parts = Parts::read(&oracle("tiny-mistral-bnb4").join("model.safetensors"));
    parts.0.retain(|name, _| name.starts_with(Q_PROJ) || name == "model.norm.weight");
    let file = dir.path().join("model.safetensors");
    parts.write(&file);
    let bytes = fs::read(&file).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let state = bytes.windows(13).position(|w| w == b"{\"quant_type\"").unwrap();
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = |n: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as usize % n
    };
    let (mut opened, mut refused) = (0, 0);
    for round in 0..4000 {
        let mut copy = bytes.clone();
        for _ in 0..=next(3) {
            let at = if round % 2 == 0 { next(header) } else { state + next(166) };
            copy[at] ^= 1 << next(8);
        }
        let parsed = pocketlora::format::safetensors::TensorFile::parse(&file, copy.clone().into());
        if parsed.is_err() {
            refused += 1;
            continue;
        }
        fs::write(&file, &copy).unwrap();
        match Checkpoint::open(dir.path()).and_then(|m| Ok((m.matrix(Q_PROJ)?, m.vector("model.norm.weight", 1)?.1))) {
            Ok(_) => opened += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(opened > 20 && refused > 1000, "the flips reach both outcomes: {opened} opened, {refused} refused");
}

fn copy_of_bnb4() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(oracle("tiny-mistral-bnb4").join(file), dir.path().join(file)).unwrap();
        // The oracles may be read-only; the copy is there to be changed.
        let mut permissions = fs::metadata(dir.path().join(file)).unwrap().permissions();
        #[allow(clippy::permissions_set_readonly_false, reason = "a file in a temporary folder of our own")]
        permissions.set_readonly(false);
        fs::set_permissions(dir.path().join(file), permissions).unwrap();
    }
    dir
}
