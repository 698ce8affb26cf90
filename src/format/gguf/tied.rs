//! An embedding and a head that are one tied matrix, rounded in two ways: llama.cpp's quantizer writes both for some
//! models, the head in more bits.

use super::config::{EMBEDDING, HEAD};
use super::container::{Container, GgufTensor};

/// Rows that are compared, spread over the vocabulary.
const SAMPLES: usize = 256;
/// Most that two roundings of a row differ by, as a share of its norm. In Q4_K_M files of Qwen2.5 Coder 0.5B and 1.5B it is at
/// most 0.054 and 0.088. Matrices that are two differ by more than their norms.
const ROUNDING: f64 = 0.15;

/// The worse of an embedding and a head that are one matrix, if they are.
pub(super) fn copy(file: &Container) -> Option<&'static str> {
    let find = |name: &str| file.tensors.iter().find(|t| t.name == name);
    let (embedding, head) = (find(EMBEDDING)?, find(HEAD)?);
    if embedding.shape != head.shape || embedding.shape.len() != 2 {
        return None;
    }
    // In one type, only equal values are a copy.
    let bound = if embedding.dtype == head.dtype { 0.0 } else { ROUNDING };
    let (rows, columns) = (head.rows(), head.columns());
    let (mut a, mut b) = (vec![0.0; columns], vec![0.0; columns]);
    let samples = SAMPLES.min(rows);
    for i in 0..samples {
        let row = i * rows / samples;
        file.read_rows(embedding, row..row + 1, &mut a);
        file.read_rows(head, row..row + 1, &mut b);
        let sum = |f: fn(f64, f64) -> f64| a.iter().zip(&b).map(|(&a, &b)| f(a.into(), b.into())).sum::<f64>();
        let (difference, norm) = (sum(|a, b| (a - b) * (a - b)), sum(|_, b| b * b));
        // Also false where a value is not a number.
        let same = difference <= bound * bound * norm;
        if !same {
            return None;
        }
    }
    let bits = |t: &GgufTensor| {
        let (values, bytes) = t.dtype.block();
        bytes as f64 / values as f64
    };
    Some(if bits(head) > bits(embedding) { EMBEDDING } else { HEAD })
}
