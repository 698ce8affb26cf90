//! ggml's element types: block layouts and their reference dequantization.
//!
//! Every function does the f32 operations of `dequantize_row_*` in ggml's `ggml-quants.c`, in the same order, so the
//! values are the same bits. Names follow ggml: `d` scale, `m` minimum, `qs` low bits, `qh` high bits, `sc` sub-scale.

use super::few_bits;
use half::{bf16, f16};

/// Values in a block of the simple types.
pub(super) const QK: usize = 32;
/// Values in a super-block of the K types.
pub(super) const QK_K: usize = 256;

/// An element type this version reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, non_camel_case_types)] // ggml's own names
pub enum GgmlType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ1_S,
    IQ1_M,
    IQ2_XXS,
    IQ2_XS,
    IQ2_S,
    IQ3_XXS,
    IQ3_S,
    IQ4_NL,
    IQ4_XS,
    TQ1_0,
    TQ2_0,
    MXFP4,
    NVFP4,
    Q1_0,
}

use GgmlType as T;

/// Each type with its number in files, and the values and bytes of a block.
const TYPES: [(T, u32, usize, usize); 27] = [
    (T::F32, 0, 1, 4),
    (T::F16, 1, 1, 2),
    (T::Q4_0, 2, QK, 18),
    (T::Q4_1, 3, QK, 20),
    (T::Q5_0, 6, QK, 22),
    (T::Q5_1, 7, QK, 24),
    (T::Q8_0, 8, QK, 34),
    (T::Q2_K, 10, QK_K, 84),
    (T::Q3_K, 11, QK_K, 110),
    (T::Q4_K, 12, QK_K, 144),
    (T::Q5_K, 13, QK_K, 176),
    (T::Q6_K, 14, QK_K, 210),
    (T::IQ2_XXS, 16, QK_K, 66),
    (T::IQ2_XS, 17, QK_K, 74),
    (T::IQ3_XXS, 18, QK_K, 98),
    (T::IQ1_S, 19, QK_K, 50),
    (T::IQ4_NL, 20, QK, 18),
    (T::IQ3_S, 21, QK_K, 110),
    (T::IQ2_S, 22, QK_K, 82),
    (T::IQ4_XS, 23, QK_K, 136),
    (T::IQ1_M, 29, QK_K, 56),
    (T::BF16, 30, 1, 2),
    (T::TQ1_0, 34, QK_K, 54),
    (T::TQ2_0, 35, QK_K, 66),
    (T::MXFP4, 39, QK, 17),
    (T::NVFP4, 40, 64, 36),
    (T::Q1_0, 41, 128, 18),
];

/// `enum ggml_type`, for the types that are only named in errors.
const UNSUPPORTED: &[(u32, &str)] =
    &[(9, "Q8_1"), (15, "Q8_K"), (24, "I8"), (25, "I16"), (26, "I32"), (27, "I64"), (28, "F64")];

impl GgmlType {
    /// The type numbered `id` in the file, or the name of one that is not supported.
    pub(super) fn from_id(id: u32) -> Result<Self, String> {
        let known = TYPES.iter().find(|(_, known, ..)| *known == id).map(|(dtype, ..)| *dtype);
        known.ok_or_else(|| {
            let named = UNSUPPORTED.iter().find(|(known, _)| *known == id);
            named.map_or_else(|| format!("number {id}"), |(_, name)| (*name).to_owned())
        })
    }

    fn row(self) -> (T, u32, usize, usize) {
        *TYPES.iter().find(|(known, ..)| *known == self).expect("the table has every type")
    }

    /// Its number in files.
    pub(super) fn id(self) -> u32 {
        self.row().1
    }

    /// Values and bytes of one block.
    #[must_use]
    pub fn block(self) -> (usize, usize) {
        let (_, _, values, bytes) = self.row();
        (values, bytes)
    }

    /// Dequantizes whole blocks: `bytes` holds `out.len()` values.
    pub(super) fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        let (values, size) = self.block();
        debug_assert!(out.len().is_multiple_of(values) && out.len() / values * size == bytes.len());
        match self {
            Self::F32 => each(bytes, out, |b: &[u8; 4], y: &mut [f32; 1]| y[0] = f32::from_le_bytes(*b)),
            Self::F16 => each(bytes, out, |b: &[u8; 2], y: &mut [f32; 1]| y[0] = f16::from_le_bytes(*b).to_f32()),
            Self::BF16 => each(bytes, out, |b: &[u8; 2], y: &mut [f32; 1]| y[0] = bf16::from_le_bytes(*b).to_f32()),
            Self::Q4_0 => each(bytes, out, q4_0),
            Self::Q4_1 => each(bytes, out, q4_1),
            Self::Q5_0 => each(bytes, out, q5_0),
            Self::Q5_1 => each(bytes, out, q5_1),
            Self::Q8_0 => each(bytes, out, q8_0),
            Self::Q4_K => each(bytes, out, q4_k),
            Self::Q5_K => each(bytes, out, q5_k),
            Self::Q6_K => each(bytes, out, q6_k),
            Self::Q2_K => each(bytes, out, few_bits::q2_k),
            Self::Q3_K => each(bytes, out, few_bits::q3_k),
            Self::IQ1_S => each(bytes, out, few_bits::iq1_s),
            Self::IQ1_M => each(bytes, out, few_bits::iq1_m),
            Self::IQ2_XXS => each(bytes, out, few_bits::iq2_xxs),
            Self::IQ2_XS => each(bytes, out, few_bits::iq2_xs),
            Self::IQ2_S => each(bytes, out, few_bits::iq2_s),
            Self::IQ3_XXS => each(bytes, out, few_bits::iq3_xxs),
            Self::IQ3_S => each(bytes, out, few_bits::iq3_s),
            Self::IQ4_NL => each(bytes, out, few_bits::iq4_nl),
            Self::IQ4_XS => each(bytes, out, few_bits::iq4_xs),
            Self::TQ1_0 => each(bytes, out, few_bits::tq1_0),
            Self::TQ2_0 => each(bytes, out, few_bits::tq2_0),
            Self::MXFP4 => each(bytes, out, few_bits::mxfp4),
            Self::NVFP4 => each(bytes, out, few_bits::nvfp4),
            Self::Q1_0 => each(bytes, out, few_bits::q1_0),
        }
    }
}

impl std::fmt::Display for GgmlType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// Runs `decode` over all blocks; the block's sizes are compile-time constants, so its indices need no checks.
fn each<const BYTES: usize, const VALUES: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; VALUES]),
) {
    for (block, y) in bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        decode(block, y);
    }
}

pub(super) fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// d f16, qs [16]: the low nibbles are the first half of the block, the high ones the second.
fn q4_0(b: &[u8; 18], y: &mut [f32; QK]) {
    let d = half_at(b, 0);
    for j in 0..QK / 2 {
        let q = b[2 + j];
        y[j] = (i32::from(q & 15) - 8) as f32 * d;
        y[j + QK / 2] = (i32::from(q >> 4) - 8) as f32 * d;
    }
}

/// d f16, m f16, qs [16].
fn q4_1(b: &[u8; 20], y: &mut [f32; QK]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    for j in 0..QK / 2 {
        let q = b[4 + j];
        y[j] = f32::from(q & 15) * d + m;
        y[j + QK / 2] = f32::from(q >> 4) * d + m;
    }
}

/// The 5-bit codes of value `j` of the first and of the second half, from `qh` (one bit a value) and `qs`.
fn five_bits(qh: u32, q: u8, j: usize) -> (u8, u8) {
    let bit = |at: usize| ((qh >> at) & 1) as u8;
    ((q & 15) | (bit(j) << 4), (q >> 4) | (bit(j + QK / 2) << 4))
}

/// d f16, qh u32, qs [16].
fn q5_0(b: &[u8; 22], y: &mut [f32; QK]) {
    let d = half_at(b, 0);
    let qh = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
    for j in 0..QK / 2 {
        let (low, high) = five_bits(qh, b[6 + j], j);
        y[j] = (i32::from(low) - 16) as f32 * d;
        y[j + QK / 2] = (i32::from(high) - 16) as f32 * d;
    }
}

/// d f16, m f16, qh u32, qs [16].
fn q5_1(b: &[u8; 24], y: &mut [f32; QK]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    let qh = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
    for j in 0..QK / 2 {
        let (low, high) = five_bits(qh, b[8 + j], j);
        y[j] = f32::from(low) * d + m;
        y[j + QK / 2] = f32::from(high) * d + m;
    }
}

/// d f16, qs i8 [32].
fn q8_0(b: &[u8; 34], y: &mut [f32; QK]) {
    let d = half_at(b, 0);
    for j in 0..QK {
        y[j] = f32::from(b[2 + j] as i8) * d;
    }
}

/// The 6-bit scale and minimum of sub-block `j` of 8 (ggml's `get_scale_min_k4`): the first four lie in the low
/// bits of bytes 0-7, the other four in the nibbles of bytes 8-11 with their top bits in bytes 0-7.
fn scale_min(j: usize, s: &[u8]) -> (f32, f32) {
    let (sc, m) = if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        ((s[j + 4] & 15) | ((s[j - 4] >> 6) << 4), (s[j + 4] >> 4) | ((s[j] >> 6) << 4))
    };
    (f32::from(sc), f32::from(m))
}

/// d f16, dmin f16, scales [12], qs [128]: 32 bytes hold sub-blocks 2g (low nibbles) and 2g+1 (high).
fn q4_k(b: &[u8; 144], y: &mut [f32; QK_K]) {
    let (d, min) = (half_at(b, 0), half_at(b, 2));
    for j in 0..8 {
        let (sc, m) = scale_min(j, &b[4..16]);
        let (d1, m1) = (d * sc, min * m);
        let qs = &b[16 + j / 2 * 32..][..32];
        for (y, q) in y[j * 32..][..32].iter_mut().zip(qs) {
            *y = d1 * f32::from((q >> (4 * (j % 2))) & 15) - m1;
        }
    }
}

/// d f16, dmin f16, scales [12], qh [32], qs [128]: as Q4_K, with bit j of qh as the fifth bit of sub-block j.
fn q5_k(b: &[u8; 176], y: &mut [f32; QK_K]) {
    let (d, min) = (half_at(b, 0), half_at(b, 2));
    let qh = &b[16..48];
    for j in 0..8 {
        let (sc, m) = scale_min(j, &b[4..16]);
        let (d1, m1) = (d * sc, min * m);
        let qs = &b[48 + j / 2 * 32..][..32];
        for ((y, q), h) in y[j * 32..][..32].iter_mut().zip(qs).zip(qh) {
            let code = ((q >> (4 * (j % 2))) & 15) | (((h >> j) & 1) << 4);
            *y = d1 * f32::from(code) - m1;
        }
    }
}

/// ql [128], qh [64], scales i8 [16], d f16: halves of 128 values; in each, value 32k + l takes a nibble of ql (the
/// low ones for k < 2) and bits 2k, 2k+1 of qh[l]; one scale for 16 values.
fn q6_k(b: &[u8; 210], y: &mut [f32; QK_K]) {
    let d = half_at(b, 208);
    for (i, y) in y.iter_mut().enumerate() {
        let (half, k, l) = (i / 128, i % 128 / 32, i % 32);
        let low = (b[half * 64 + k % 2 * 32 + l] >> (4 * (k / 2))) & 15;
        let high = (b[128 + half * 32 + l] >> (2 * k)) & 3;
        let sc = f32::from(b[192 + i / 16] as i8);
        *y = d * sc * (i32::from(low | (high << 4)) - 32) as f32;
    }
}

#[cfg(all(test, feature = "ggml"))]
mod tests {
    use super::GgmlType;
    use crate::bench::ggml;
    use crate::rng::Rng;

    #[test]
    fn every_type_dequantizes_to_the_bits_of_ggml() {
        let mut checked = 0;
        for id in 0..64 {
            let Ok(dtype) = GgmlType::from_id(id) else { continue };
            let (values, size) = dtype.block();
            let (len, mut rng) = (values.max(256) * 8, Rng::new(u64::from(id)));
            // Random bits are valid blocks of every type; some scales are infinite or NaN.
            let bytes: Vec<u8> = (0..len / values * size).map(|_| rng.bits() as u8).collect();
            let Some(expected) = ggml::dequantize(id, &bytes, len) else { continue };
            let mut actual = vec![0.0; len];
            dtype.dequantize(&bytes, &mut actual);
            for (i, (a, e)) in actual.iter().zip(&expected).enumerate() {
                let same = a.to_bits() == e.to_bits() || a.is_nan() && e.is_nan();
                assert!(same, "{dtype} value {i}: {a}, expected {e}");
            }
            checked += 1;
        }
        assert!(checked >= 24, "ggml knew {checked} of our types only");
    }
}
