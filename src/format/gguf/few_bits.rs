//! ggml's types of about one to four bits: super-blocks of 256 values with small scales (Q2_K, Q3_K), points of a lattice
//! (IQ1, IQ2, IQ3), a codebook (IQ4), three values (TQ1, TQ2), and MXFP4. Names and order of operations as in `dequant`.

use super::dequant::{QK, QK_K, half_at};
use super::grids::{self, points};

static IQ1: [[i8; 8]; 2048] = points(grids::IQ1, &[-1, 0, 1]);
const OF_IQ2: [i8; 3] = [8, 25, 43];
static IQ2_XXS: [[i8; 8]; 256] = points(grids::IQ2_XXS, &OF_IQ2);
static IQ2_XS: [[i8; 8]; 512] = points(grids::IQ2_XS, &OF_IQ2);
static IQ2_S: [[i8; 8]; 1024] = points(grids::IQ2_S, &OF_IQ2);
static IQ3_XXS: [[i8; 4]; 256] = points(grids::IQ3_XXS, &[4, 12, 20, 28, 36, 44, 52, 62]);
static IQ3_S: [[i8; 4]; 512] = points(grids::IQ3_S, &[1, 3, 5, 7, 9, 11, 13, 15]);
/// Values of the four bits of IQ4.
const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// Twice the values of the four bits of MXFP4.
const E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

fn u16_at(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

fn u32_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| block[at + i]))
}

/// The nibble number `i` of `bytes`, low ones first.
fn nibble(bytes: &[u8], i: usize) -> u8 {
    bytes[i / 2] >> (4 * (i % 2)) & 15
}

/// Seven signs as the low bits, and an eighth that makes the number of negative ones even.
fn even(signs: u32) -> u8 {
    let signs = (signs & 127) as u8;
    signs | ((signs.count_ones() as u8 & 1) << 7)
}

/// The values `d point` with the signs that the bits of `signs` say.
fn signed(d: f32, point: &[i8], signs: u8, y: &mut [f32]) {
    for (i, (y, value)) in y.iter_mut().zip(point).enumerate() {
        let size = d * f32::from(*value);
        *y = if signs >> i & 1 == 0 { size } else { -size };
    }
}

/// scales [16] of 4 bits with 4-bit minima, qs [64], d f16, dmin f16: halves of 128 values, whose four rows of 32 are the
/// two-bit parts of the same bytes.
pub(super) fn q2_k(b: &[u8; 84], y: &mut [f32; QK_K]) {
    let (d, min) = (half_at(b, 80), half_at(b, 82));
    for (i, y) in y.iter_mut().enumerate() {
        let (scale, code) = (b[i / 16], b[16 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3);
        *y = d * f32::from(scale & 15) * f32::from(code) - min * f32::from(scale >> 4);
    }
}

/// hmask [32], qs [64] as in Q2_K, scales [12] of 6 bits, d f16: bit `i / 32` of hmask says that 4 is not taken away.
pub(super) fn q3_k(b: &[u8; 110], y: &mut [f32; QK_K]) {
    let d = half_at(b, 108);
    let scale = |j: usize| {
        let low = b[96 + j % 8] >> (4 * (j / 8)) & 15;
        let high = b[104 + j % 4] >> (2 * (j / 4)) & 3;
        d * f32::from((low | high << 4) as i8 - 32)
    };
    for (i, y) in y.iter_mut().enumerate() {
        let code = b[32 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        let high = if b[i % 32] >> (i / 32) & 1 == 0 { 4 } else { 0 };
        *y = scale(i / 16) * f32::from(code as i8 - high);
    }
}

/// d f16, then for each 32 values four numbers of points u8, and four times 7 signs under a scale of 4 bits.
pub(super) fn iq2_xxs(b: &[u8; 66], y: &mut [f32; QK_K]) {
    let d = half_at(b, 0);
    for (i, y) in y.chunks_exact_mut(8).enumerate() {
        let group = &b[2 + i / 4 * 8..];
        let signs = u32_at(group, 4);
        let scale = d * (0.5 + (signs >> 28) as f32) * 0.25;
        signed(scale, &IQ2_XXS[usize::from(group[i % 4])], even(signs >> (7 * (i % 4))), y);
    }
}

/// d f16, qs u16 [32]: 9 bits for a point, 7 signs; scales [8] of 4 bits for 16 values.
pub(super) fn iq2_xs(b: &[u8; 74], y: &mut [f32; QK_K]) {
    let d = half_at(b, 0);
    for (i, y) in y.chunks_exact_mut(8).enumerate() {
        let q = u16_at(b, 2 + 2 * i);
        let scale = d * (0.5 + f32::from(nibble(&b[66..], i / 2))) * 0.25;
        signed(scale, &IQ2_XS[usize::from(q & 511)], even(u32::from(q >> 9)), y);
    }
}

/// d f16, qs [32], signs [32], qh [8] with two more bits for each point, scales [8] as in IQ2_XS.
pub(super) fn iq2_s(b: &[u8; 82], y: &mut [f32; QK_K]) {
    let d = half_at(b, 0);
    for (i, y) in y.chunks_exact_mut(8).enumerate() {
        let high = b[66 + i / 4] >> (2 * (i % 4)) & 3;
        let scale = d * (0.5 + f32::from(nibble(&b[74..], i / 2))) * 0.25;
        signed(scale, &IQ2_S[usize::from(b[2 + i]) | usize::from(high) << 8], b[34 + i], y);
    }
}

/// d f16, qs [64], then for each 32 values signs and a scale as in IQ2_XXS; a byte is a point of four values.
pub(super) fn iq3_xxs(b: &[u8; 98], y: &mut [f32; QK_K]) {
    let d = half_at(b, 0);
    for (i, y) in y.chunks_exact_mut(4).enumerate() {
        let signs = u32_at(b, 66 + i / 8 * 4);
        let scale = d * (0.5 + (signs >> 28) as f32) * 0.5;
        let own = even(signs >> (7 * (i % 8 / 2))) >> (4 * (i % 2));
        signed(scale, &IQ3_XXS[usize::from(b[2 + i])], own, y);
    }
}

/// d f16, qs [64], qh [8] with one more bit for each point, signs [32], scales [4] of 4 bits for 32 values.
pub(super) fn iq3_s(b: &[u8; 110], y: &mut [f32; QK_K]) {
    let d = half_at(b, 0);
    for (i, y) in y.chunks_exact_mut(4).enumerate() {
        let high = b[66 + i / 8] >> (i % 8) & 1;
        let scale = d * f32::from(1 + 2 * nibble(&b[106..], i / 8));
        let point = &IQ3_S[usize::from(b[2 + i]) | usize::from(high) << 8];
        signed(scale, point, b[74 + i / 2] >> (4 * (i % 2)), y);
    }
}

/// `dl (point + delta)`: what IQ1 has for each value of a point.
fn shifted(dl: f32, point: usize, minus: bool, y: &mut [f32]) {
    let delta = if minus { -0.125 } else { 0.125 };
    y.iter_mut().zip(&IQ1[point]).for_each(|(y, value)| *y = dl * (f32::from(*value) + delta));
}

/// d f16, qs [32], qh u16 [8]: three more bits for each of four points, a scale of 3 bits, the sign of what is added.
pub(super) fn iq1_s(b: &[u8; 50], y: &mut [f32; QK_K]) {
    let d = half_at(b, 0);
    for (i, y) in y.chunks_exact_mut(8).enumerate() {
        let high = u16_at(b, 34 + i / 4 * 2);
        let dl = d * f32::from(2 * (high >> 12 & 7) + 1);
        let point = usize::from(b[2 + i]) | usize::from(high >> (3 * (i % 4)) & 7) << 8;
        shifted(dl, point, high & 0x8000 != 0, y);
    }
}

/// qs [32], qh [16] with three more bits for each point and the sign of what is added, scales u16 [4]: four times 3 bits
/// for 16 values under a quarter of an f16.
pub(super) fn iq1_m(b: &[u8; 56], y: &mut [f32; QK_K]) {
    let scales: [u16; 4] = std::array::from_fn(|i| u16_at(b, 48 + 2 * i));
    let d = half::f16::from_bits((0..4).fold(0, |bits, i| bits | scales[i] >> 12 << (4 * i))).to_f32();
    for (i, y) in y.chunks_exact_mut(8).enumerate() {
        let high = nibble(&b[32..48], i);
        let dl = d * f32::from(2 * (scales[i / 8] >> (3 * (i / 2 % 4)) & 7) + 1);
        shifted(dl, usize::from(b[i]) | usize::from(high & 7) << 8, high & 8 != 0, y);
    }
}

/// d f16, qs [16] as in Q4_0.
pub(super) fn iq4_nl(b: &[u8; 18], y: &mut [f32; QK]) {
    let d = half_at(b, 0);
    for j in 0..QK / 2 {
        let q = b[2 + j];
        (y[j], y[j + QK / 2]) = (d * f32::from(IQ4[usize::from(q & 15)]), d * f32::from(IQ4[usize::from(q >> 4)]));
    }
}

/// d f16, high bits u16 and low nibbles [4] of eight scales of 6 bits, qs [128]: eight blocks as in IQ4_NL.
pub(super) fn iq4_xs(b: &[u8; 136], y: &mut [f32; QK_K]) {
    let (d, high) = (half_at(b, 0), u16_at(b, 2));
    for (j, y) in y.chunks_exact_mut(QK).enumerate() {
        let scale = nibble(&b[4..8], j) | ((high >> (2 * j) & 3) as u8) << 4;
        let dl = d * f32::from(scale as i8 - 32);
        for (i, y) in y.iter_mut().enumerate() {
            *y = dl * f32::from(IQ4[usize::from(b[8 + j * 16 + i % 16] >> (4 * (i / 16)) & 15)]);
        }
    }
}

/// qs [48], qh [4], d f16: bytes of five values of three, the last four bytes of four. A byte is a fraction of 256, whose
/// digits to base 3 are the values.
pub(super) fn tq1_0(b: &[u8; 54], y: &mut [f32; QK_K]) {
    const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
    let d = half_at(b, 52);
    let mut y = y.iter_mut();
    for (bytes, digits) in [(&b[..32], 5), (&b[32..48], 5), (&b[48..52], 4)] {
        for power in &POWERS[..digits] {
            for (q, y) in bytes.iter().zip(y.by_ref()) {
                let digit = (u16::from(q.wrapping_mul(*power)) * 3) >> 8;
                *y = d * f32::from(digit as i8 - 1);
            }
        }
    }
}

/// qs [64] as in Q2_K, d f16.
pub(super) fn tq2_0(b: &[u8; 66], y: &mut [f32; QK_K]) {
    let d = half_at(b, 64);
    for (i, y) in y.iter_mut().enumerate() {
        let code = b[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        *y = d * f32::from(code as i8 - 1);
    }
}

/// An exponent u8, qs [16] as in Q4_0.
pub(super) fn mxfp4(b: &[u8; 17], y: &mut [f32; QK]) {
    // Half of the scale, for the values are twice as large.
    let bits = if b[0] < 2 { 0x0020_0000 << b[0] } else { u32::from(b[0] - 1) << 23 };
    let d = f32::from_bits(bits);
    for j in 0..QK / 2 {
        let q = b[1 + j];
        (y[j], y[j + QK / 2]) = (d * f32::from(E2M1[usize::from(q & 15)]), d * f32::from(E2M1[usize::from(q >> 4)]));
    }
}

/// Scales [4] in E4M3 without a sign, qs [32]: four blocks of 16 as in Q4_0. A scale for the whole tensor is a tensor of its own.
pub(super) fn nvfp4(b: &[u8; 36], y: &mut [f32; 64]) {
    for (block, y) in y.chunks_exact_mut(16).enumerate() {
        // Half of the scale, for the values are twice as large.
        let (scale, exponent, fraction) = (b[block], i32::from(b[block] >> 3 & 15), f32::from(b[block] & 7));
        let d = match (scale, exponent) {
            (0 | 0x7f, _) => 0.0,
            (_, 0) => fraction * 2f32.powi(-10),
            _ => (1.0 + fraction / 8.0) * 2f32.powi(exponent - 8),
        };
        for j in 0..8 {
            let q = b[4 + block * 8 + j];
            (y[j], y[j + 8]) = (d * f32::from(E2M1[usize::from(q & 15)]), d * f32::from(E2M1[usize::from(q >> 4)]));
        }
    }
}

/// d f16, qs [16]: a bit for each value, the lowest first; 1 is d, 0 is -d.
pub(super) fn q1_0(b: &[u8; 18], y: &mut [f32; 128]) {
    let d = half_at(b, 0);
    for (i, y) in y.iter_mut().enumerate() {
        *y = if b[2 + i / 8] >> (i % 8) & 1 == 1 { d } else { -d };
    }
}
