//! Weights of every kind with their exact values.

use super::harness::Random;
use bytes::Bytes;
use half::{bf16, f16};
use pocketlora_kernels::{Absmax, FloatType, MatrixData, MatrixSource, Nf4Source};
use std::sync::Arc;

/// How a test weight is stored.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Dense(FloatType),
    Nf4 { block: usize, double: bool, dtype: FloatType },
}

/// One of every kind that takes a path of its own.
pub const KINDS: [Kind; 9] = [
    Kind::Dense(FloatType::F32),
    Kind::Dense(FloatType::F16),
    Kind::Dense(FloatType::BF16),
    Kind::Nf4 { block: 64, double: true, dtype: FloatType::F32 },
    Kind::Nf4 { block: 64, double: true, dtype: FloatType::BF16 },
    Kind::Nf4 { block: 64, double: false, dtype: FloatType::F16 },
    Kind::Nf4 { block: 32, double: true, dtype: FloatType::F16 },
    Kind::Nf4 { block: 128, double: false, dtype: FloatType::BF16 },
    Kind::Nf4 { block: 4096, double: true, dtype: FloatType::F32 },
];

/// Bytes that start at an odd address: allocations are even.
fn unaligned(bytes: &[u8]) -> Bytes {
    let mut owned = vec![0];
    owned.extend_from_slice(bytes);
    Bytes::from(owned).slice(1..)
}

fn round(dtype: FloatType, x: f32) -> f32 {
    match dtype {
        FloatType::F32 => x,
        FloatType::F16 => f16::from_f32(x).to_f32(),
        FloatType::BF16 => bf16::from_f32(x).to_f32(),
    }
}

/// A random weight as a source and as the values that the source stands for.
pub fn random(random: &mut Random, kind: Kind, rows: usize, cols: usize) -> (MatrixSource, Vec<f32>) {
    let n = rows * cols;
    let (data, values) = match kind {
        Kind::Dense(dtype) => {
            let values: Vec<f32> = random.vector(n).into_iter().map(|x| round(dtype, x)).collect();
            let bytes: Vec<u8> = match dtype {
                FloatType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
                FloatType::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
                FloatType::BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
            };
            (MatrixData::Dense(dtype, unaligned(&bytes)), values)
        }
        Kind::Nf4 { block, double, dtype } => {
            let packed: Vec<u8> = (0..n.div_ceil(2)).map(|_| random.bits() as u8).collect();
            let blocks = n.div_ceil(block);
            let code: [f32; 16] = std::array::from_fn(|i| (i as f32 - 7.3) / 8.7);
            let (absmax, scales) = if double {
                // A small nested block, so that small weights have several.
                let nested_block = if block == 64 { 256 } else { 3 };
                let codes: Vec<u8> = (0..blocks).map(|_| random.bits() as u8).collect();
                let map: [f32; 256] = std::array::from_fn(|i| (i as f32 - 128.0) / 127.7);
                let nested: Vec<f32> = (0..blocks.div_ceil(nested_block)).map(|i| 0.3 + 0.01 * i as f32).collect();
                let offset = 0.7;
                let scale = |b: usize| map[usize::from(codes[b])] * nested[b / nested_block] + offset;
                let scales = (0..blocks).map(scale).collect();
                let (codes, map, nested) = (unaligned(&codes), Arc::new(map), nested.into());
                (Absmax::Double { codes, map, nested, nested_block, offset }, scales)
            } else {
                let scales: Vec<f32> = (0..blocks).map(|_| 0.75 + 0.5 * random.uniform()).collect();
                let bytes: Vec<u8> = scales.iter().flat_map(|x| x.to_le_bytes()).collect();
                (Absmax::Plain(unaligned(&bytes)), scales)
            };
            let nibble = |i: usize| usize::from(packed[i / 2] >> [4, 0][i % 2] & 15);
            let values = (0..n).map(|i| round(dtype, code[nibble(i)] * scales[i / block])).collect();
            (MatrixData::Nf4(Nf4Source { packed: unaligned(&packed), block, code, absmax, dtype }), values)
        }
    };
    (MatrixSource { rows, cols, data }, values)
}
