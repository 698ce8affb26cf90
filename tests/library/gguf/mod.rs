//! GGUF files as checkpoints: values, names, row order, `config.json`, tokenizer, and files that lie.

mod families;
mod goldens;
mod hostile;
mod model;
mod sentencepiece;
mod tokens;
mod writer;

use bytes::Bytes;
use pocketlora::format::gguf::{Container, Value};
use std::path::Path;
use writer::*;

fn parse(w: &Writer) -> Container {
    Container::parse(Bytes::from(w.build()), Path::new("test.gguf")).unwrap()
}

#[test]
fn every_metadata_type_is_read() {
    let nested = array(ARRAY, &[array(U8, &[vec![1], vec![2]]), array(STRING, &[string("x")])]);
    let cases: Vec<(u32, Vec<u8>, Value)> = vec![
        (U8, vec![200], Value::U8(200)),
        (I8, vec![0x80], Value::I8(-128)),
        (U16, 65_000u16.to_le_bytes().into(), Value::U16(65_000)),
        (I16, (-2i16).to_le_bytes().into(), Value::I16(-2)),
        (U32, u32::MAX.to_le_bytes().into(), Value::U32(u32::MAX)),
        (I32, i32::MIN.to_le_bytes().into(), Value::I32(i32::MIN)),
        (F32, 0.1f32.to_le_bytes().into(), Value::F32(0.1)),
        (BOOL, vec![1], Value::Bool(true)),
        (STRING, string("Grüße"), Value::String("Grüße".to_owned())),
        (U64, u64::MAX.to_le_bytes().into(), Value::U64(u64::MAX)),
        (I64, i64::MIN.to_le_bytes().into(), Value::I64(i64::MIN)),
        (F64, 0.1f64.to_le_bytes().into(), Value::F64(0.1)),
    ];
    for version in [2, 3] {
        let mut w = Writer::new();
        w.version = version;
        for (kind, bytes, _) in &cases {
            w.set(&format!("one.{kind}"), *kind, bytes.clone());
            w.set(&format!("two.{kind}"), ARRAY, array(*kind, &[bytes.clone(), bytes.clone()]));
            w.set(&format!("none.{kind}"), ARRAY, array(*kind, &[]));
        }
        w.set("nested", ARRAY, nested.clone());
        let file = parse(&w);
        let elements = |key: &str| match file.metadata.get(key) {
            Some(Value::Array(a)) => a.values(Path::new("test.gguf"), &key).collect::<Result<Vec<_>, _>>().unwrap(),
            other => panic!("{key}: {other:?}"),
        };
        for (kind, _, want) in &cases {
            assert_eq!(file.metadata.get(&format!("one.{kind}")), Some(want));
            assert_eq!(elements(&format!("two.{kind}")), [want.clone(), want.clone()]);
            assert!(elements(&format!("none.{kind}")).is_empty());
        }
        let inner = elements("nested");
        let Value::Array(bytes) = &inner[0] else { panic!("{inner:?}") };
        let bytes: Vec<_> = bytes.values(Path::new("test.gguf"), &"nested").map(Result::unwrap).collect();
        assert_eq!(bytes, [Value::U8(1), Value::U8(2)]);
        assert_eq!(inner.len(), 2);
    }
}

#[test]
fn integers_of_any_width_and_short_decimals() {
    assert_eq!(Value::I8(-1).as_u64(), None);
    assert_eq!(Value::I64(7).as_u64(), Some(7));
    assert_eq!(Value::F32(1e-5).as_f64(), Some(1e-5));
}

#[test]
fn alignment_moves_the_data() {
    for alignment in [1, 8, 64, 4096] {
        let mut w = Writer::new();
        w.alignment = alignment;
        w.u32("general.alignment", alignment as u32).tensor("a", &[3], &[1.0, 2.0, 3.0]).tensor(
            "b",
            &[2, 1],
            &[4.0, 5.0],
        );
        let file = parse(&w);
        let mut out = [0.0; 2];
        file.read_rows(&file.tensors[1], 0..2, &mut out);
        assert_eq!((out, &file.tensors[1].shape[..]), ([4.0, 5.0], &[2, 1][..]), "alignment {alignment}");
    }
}

/// `gguf_types.gguf` was written by gguf-py (`gguf_goldens.py`), which also computed the expected values: random codes
/// under the extremes of f16 scales, and quantized normal values.
#[test]
fn dequantizes_every_type_to_the_same_bits_as_ggml() {
    let types = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"];
    check_types("tests/data/gguf_types.gguf", types);
}

/// `gguf_few_bits.gguf` is from the same program: random codes.
#[test]
fn dequantizes_types_of_few_bits_to_the_same_bits_as_ggml() {
    let types = [
        "Q2_K", "Q3_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
        "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
    ];
    check_types("tests/data/gguf_few_bits.gguf", types);
}

fn check_types<const N: usize>(path: &str, types: [&'static str; N]) {
    let path = Path::new(path);
    let file = Container::parse(Bytes::from(std::fs::read(path).unwrap()), path).unwrap();
    assert_eq!(file.tensors.len(), 2 * types.len());
    all(types.map(|name| {
        let tensor = |name: &str| file.tensors.iter().find(|t| t.name == name).unwrap();
        let (coded, plain) = (tensor(name), tensor(&format!("{name}.f32")));
        assert_eq!((coded.dtype.to_string().as_str(), &coded.shape), (name, &plain.shape));
        let read = |t, rows: std::ops::Range<usize>| {
            let mut out = vec![f32::NAN; rows.len() * coded.columns()];
            file.read_rows(t, rows, &mut out);
            out
        };
        // Whole, and row by row.
        let want = read(plain, 0..plain.rows());
        let rows: Vec<f32> = (0..coded.rows()).flat_map(|r| read(coded, r..r + 1)).collect();
        let differ = |got: &[f32]| got.iter().zip(&want).position(|(g, w)| g.to_bits() != w.to_bits());
        let outcome = match differ(&read(coded, 0..coded.rows())).or_else(|| differ(&rows)) {
            Some(i) => Err(format!("value {i}: expected {:e}, got {:e}", want[i], rows[i])),
            None => Ok(()),
        };
        (name, outcome)
    }));
}
