//! Rows in 8 bits: `w = code * scale` with one scale a row. For copies of embeddings and heads, whose rows are alike in
//! size; the error is at most half a 127th of a row's largest element.

use super::BLOCK;

/// Encodes one row into as many codes, of every 64 elements the even ones first, as [`crate::MatrixData::Int8`] wants
/// them; returns the scale. A row that holds a NaN or an infinity gets a NaN as scale, so that it is not hidden.
///
/// # Panics
/// The lengths differ or are no multiple of 64.
pub fn encode_int8(row: &[f32], codes: &mut [i8]) -> f32 {
    assert!(row.len() == codes.len() && row.len().is_multiple_of(BLOCK));
    if row.iter().any(|x| !x.is_finite()) {
        codes.fill(0);
        return f32::NAN;
    }
    let largest = row.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
    // In f64, where the quotient of no two f32 overflows.
    let unit = f64::from(largest) / 127.0;
    for (row, codes) in row.as_chunks::<BLOCK>().0.iter().zip(codes.as_chunks_mut::<BLOCK>().0) {
        for (i, x) in row.iter().enumerate() {
            let code = if unit == 0.0 { 0.0 } else { f64::from(*x) / unit };
            codes[i % 2 * (BLOCK / 2) + i / 2] = nearest(code.clamp(-127.0, 127.0));
        }
    }
    unit as f32
}

/// The nearest integer, ties to even, of what an `i8` holds. The sum with 1.5 * 2^52 has it in its lowest bits; where a CPU's
/// base set has no rounding instruction, `round_ties_even` is a call for each element.
#[inline(always)]
pub(crate) fn nearest(x: f64) -> i8 {
    (x + 6_755_399_441_055_744.0).to_bits() as i8
}

/// `1.5 * 2^23`: added to a small number it leaves that rounded to an integer, ties to even, in the last bits.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// As [`nearest`].
#[inline(always)]
pub(crate) fn nearest_f32(x: f32) -> i8 {
    (x + ROUND).to_bits() as i8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_near_and_even_elements_come_first() {
        let row: Vec<f32> = (0..128).map(|i| (i as f32 - 60.0) * 0.01).collect();
        let mut codes = vec![0; 128];
        let scale = encode_int8(&row, &mut codes);
        for (i, x) in row.iter().enumerate() {
            let code = codes[i / 64 * 64 + i % 2 * 32 + i % 64 / 2];
            assert!((f32::from(code) * scale - x).abs() <= 0.5001 * scale, "element {i}");
        }
        assert_eq!(codes.iter().map(|c| c.unsigned_abs()).max(), Some(127));
    }

    #[test]
    fn ties_go_to_even_codes() {
        for tie in -127_i8..127 {
            let x = f64::from(tie) + 0.5;
            for x in [x, x - 1e-3, x + 1e-3, f64::from(tie)] {
                assert_eq!(f64::from(nearest(x)), x.round_ties_even(), "{x}");
                assert_eq!(f32::from(nearest_f32(x as f32)), (x as f32).round_ties_even(), "{x}");
            }
        }
    }

    #[test]
    fn zeros_and_broken_rows() {
        let mut codes = vec![1; 64];
        assert_eq!(encode_int8(&[0.0; 64], &mut codes), 0.0);
        assert_eq!(codes, [0; 64]);
        let mut row = [1.0; 64];
        row[5] = f32::INFINITY;
        assert!(encode_int8(&row, &mut codes).is_nan());
    }
}
