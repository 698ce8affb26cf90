//! Values as ggml's element types, by the definitions of `quantize_row_*_ref` in ggml's `ggml-quants.c`.

use super::super::dequant::GgmlType;
use half::f16;

/// Values in a block.
const QK: usize = 32;

/// Whole rows of `values` as `dtype`; where one is not finite there, its place.
pub(super) fn encode(dtype: GgmlType, values: &[f32]) -> Result<Vec<u8>, usize> {
    if let Some(at) = values.iter().position(|v| !v.is_finite()) {
        return Err(at);
    }
    match dtype {
        GgmlType::F16 => {
            let halves: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
            match halves.iter().position(|v| !v.is_finite()) {
                Some(at) => Err(at),
                None => Ok(halves.iter().flat_map(|v| v.to_le_bytes()).collect()),
            }
        }
        GgmlType::Q8_0 => Ok(values.chunks(QK).flat_map(q8_0).collect()),
        GgmlType::Q4_0 => Ok(values.chunks(QK).flat_map(q4_0).collect()),
        _ => Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect()),
    }
}

/// `d = max|x| / 127`, `q = round(x / d)`.
fn q8_0(block: &[f32]) -> Vec<u8> {
    let most = block.iter().fold(0.0f32, |most, v| most.max(v.abs()));
    let d = most / 127.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    let codes = block.iter().map(|v| (v * inverse).round() as i8 as u8);
    f16::from_f32(d).to_le_bytes().into_iter().chain(codes).collect()
}

/// `d = m / -8` with `m` the value of the largest magnitude, `q = floor(x / d + 8.5)`; the first half of a block lies in the
/// low nibbles.
fn q4_0(block: &[f32]) -> Vec<u8> {
    let most = block.iter().fold(0.0f32, |most, v| if v.abs() > most.abs() { *v } else { most });
    let d = most / -8.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    let code = |v: f32| ((v * inverse + 8.5) as u8).min(15);
    let (low, high) = block.split_at(QK / 2);
    let codes = low.iter().zip(high).map(|(low, high)| code(*low) | code(*high) << 4);
    f16::from_f32(d).to_le_bytes().into_iter().chain(codes).collect()
}
