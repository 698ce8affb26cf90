//! Codes to numbers.

use super::{Form, Packed};
use std::ops::Range;

/// Where in a word of eight codes AWQ keeps each column: its order was made for a kernel.
const AWQ_PLACES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

impl Packed {
    /// Dequantizes `rows` into `out`.
    pub(in crate::format) fn decode(&self, rows: Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.zip(out.chunks_exact_mut(self.cols)) {
            self.row(row, out);
        }
    }

    fn row(&self, row: usize, out: &mut [f32]) {
        let (cols, scales) = (self.cols, &self.scales);
        match &self.form {
            Form::Mxfp4 { exponents } => {
                let blocks = cols / 32;
                let codes = self.codes[row * blocks * 16..].chunks_exact(16);
                let of_row = exponents[row * blocks..].iter().zip(codes);
                for (out, (exponent, codes)) in out.chunks_exact_mut(32).zip(of_row) {
                    let scale = e8m0(*exponent);
                    for (y, code) in out.chunks_exact_mut(2).zip(codes) {
                        (y[0], y[1]) = (E2M1[usize::from(code & 15)] * scale, E2M1[usize::from(code >> 4)] * scale);
                    }
                }
            }
            Form::Nvfp4 => {
                let codes = self.codes[row * cols / 2..].chunks_exact(8).zip(&scales[row * cols / 16..]);
                for (out, (codes, scale)) in out.chunks_exact_mut(16).zip(codes) {
                    for (y, code) in out.chunks_exact_mut(2).zip(codes) {
                        (y[0], y[1]) = (E2M1[usize::from(code & 15)] * scale, E2M1[usize::from(code >> 4)] * scale);
                    }
                }
            }
            Form::Fp8 { block: [rows, width] } => {
                let own = &scales[row / rows * cols.div_ceil(*width)..];
                let codes = &self.codes[row * cols..];
                out.iter_mut().zip(codes).enumerate().for_each(|(i, (y, code))| *y = e4m3(*code) * own[i / width]);
            }
            Form::Int8 => {
                let codes = &self.codes[row * cols..];
                out.iter_mut().zip(codes).for_each(|(y, code)| *y = f32::from(*code as i8) * scales[row] / 127.0);
            }
            Form::Affine { bits, group, biases } => {
                let first = row * cols / group;
                for (i, y) in out.iter_mut().enumerate() {
                    let code = code_at(&self.codes, row * cols * bits / 32, i, *bits);
                    *y = code as f32 * scales[first + i / group] + biases[first + i / group];
                }
            }
            Form::Gptq { bits, groups, zeros, add } => {
                let (per_word, out_words) = (32 / bits, self.rows * bits / 32);
                for (i, y) in out.iter_mut().enumerate() {
                    let group = groups[i] as usize;
                    let word = word(&self.codes, i / per_word * self.rows + row);
                    let code = word >> (i % per_word * bits) & mask(*bits);
                    let zero = code_at(zeros, group * out_words, row, *bits) + add;
                    *y = (code as f32 - zero as f32) * scales[group * self.rows + row];
                }
            }
            Form::Awq { group, zeros } => {
                let (words, shift) = (self.rows / 8, AWQ_PLACES[row % 8] * 4);
                for (i, y) in out.iter_mut().enumerate() {
                    let group = i / group;
                    let code = word(&self.codes, i * words + row / 8) >> shift & 15;
                    let zero = word(zeros, group * words + row / 8) >> shift & 15;
                    *y = (code as f32 - zero as f32) * scales[group * self.rows + row];
                }
            }
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at * 4 + i]))
}

fn mask(bits: usize) -> u32 {
    (1 << bits) - 1
}

/// Code number `i` of those that begin at the word `first`; the lowest bits come first.
fn code_at(bytes: &[u8], first: usize, i: usize, bits: usize) -> u32 {
    let per_word = 32 / bits;
    word(bytes, first + i / per_word) >> (i % per_word * bits) & mask(bits)
}

/// A sign, two bits of exponent, one of fraction.
const E2M1: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Eight bits of exponent: `2^(e - 127)`, and a NaN as the last.
fn e8m0(exponent: u8) -> f32 {
    match exponent {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        e => f32::from_bits(u32::from(e) << 23),
    }
}

/// A sign, four bits of exponent, three of fraction; no infinity.
pub(super) fn e4m3(code: u8) -> f32 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7) / 8.0);
    let size = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction * 2f32.powi(-6),
        _ => (1.0 + fraction) * 2f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { size } else { -size }
}

#[cfg(test)]
mod tests {
    use super::{e4m3, e8m0};

    #[test]
    fn exponents_are_powers_of_two() {
        for (code, value) in [(0, 2f32.powi(-126) / 2.0), (1, 2f32.powi(-126)), (127, 1.0), (254, 2f32.powi(127))] {
            assert_eq!(e8m0(code), value, "{code}");
        }
        assert!(e8m0(255).is_nan());
    }

    #[test]
    fn e4m3_is_what_the_standard_says() {
        let cases =
            [(0, 0.0), (1, 2f32.powi(-9)), (7, 7.0 * 2f32.powi(-9)), (8, 2f32.powi(-6)), (0x38, 1.0), (0x7e, 448.0)];
        for (code, value) in cases {
            assert_eq!(e4m3(code), value, "{code:#x}");
            assert_eq!(e4m3(code | 0x80), -value, "{code:#x} with a sign");
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
    }
}
