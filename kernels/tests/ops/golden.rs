//! Dequantized weights against bitsandbytes' own, bit by bit (`data/nf4_small.safetensors`).

use super::harness::{Expected, Report, affordable, case, poisoned, read};
use bytes::Bytes;
use half::{bf16, f16};
use pocketlora_kernels::{Absmax, Backend, Call, FloatType, MatrixData, MatrixSource, Memory, Nf4Source};
use safetensors::{Dtype, SafeTensors};

const FILE: &[u8] = include_bytes!("../data/nf4_small.safetensors");

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

#[test]
fn dequantized_weights_are_those_of_bitsandbytes() {
    let file = SafeTensors::deserialize(FILE).unwrap();
    let data = |name: &str| file.tensor(name).unwrap().data().to_vec();
    let map: [f32; 256] = floats(&data("code.dynamic")).try_into().unwrap();
    let code: [f32; 16] = floats(&data("code.nf4")).try_into().unwrap();
    let names = file.names();
    let cases: Vec<&str> = names.iter().filter_map(|name| name.strip_suffix(".packed")).collect();
    assert!(cases.len() >= 14, "only {} cases", cases.len());
    let mut report = Report::default();
    for case in cases {
        let part = |name: &str| data(&format!("{case}.{name}"));
        for variant in ["dequant", "dequant_plain"] {
            let Ok(dequantized) = file.tensor(&format!("{case}.{variant}")) else { continue };
            let (rows, cols) = (dequantized.shape()[0], dequantized.shape()[1]);
            if !affordable(2 * rows * cols) {
                continue;
            }
            let (dtype, values): (_, Vec<f32>) = match dequantized.dtype() {
                Dtype::F32 => (FloatType::F32, floats(dequantized.data())),
                Dtype::F16 => {
                    let values = dequantized.data().as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32());
                    (FloatType::F16, values.collect())
                }
                Dtype::BF16 => {
                    let values = dequantized.data().as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32());
                    (FloatType::BF16, values.collect())
                }
                other => panic!("{case}: {other:?}"),
            };
            let absmax = if variant == "dequant" {
                Absmax::Double {
                    codes: Bytes::from(part("absmax_q")),
                    map: map.into(),
                    nested: floats(&part("nested_absmax")).into(),
                    nested_block: 256,
                    offset: floats(&part("nested_offset"))[0],
                }
            } else {
                Absmax::Plain(Bytes::from(part("absmax_f32")))
            };
            let source = Nf4Source { packed: Bytes::from(part("packed")), block: 64, code, absmax, dtype };
            let source = MatrixSource { rows, cols, data: MatrixData::Nf4(source) };
            let values: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
            let expected = [Expected::new(values, vec![0.0; rows * cols])];
            let ids: Vec<u32> = (0..rows as u32).collect();
            case!(report, &format!("{case}.{variant}"), &expected, |cpu| {
                let mut y = poisoned(cpu, rows * cols);
                cpu.run(Call::Embed { table: &cpu.matrix(source.clone()).unwrap(), ids: &ids, y: &mut y }).unwrap();
                vec![read(cpu, &y)]
            });
        }
    }
}
