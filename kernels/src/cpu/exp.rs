//! The exponential of softmax and of the gated activations, within 2 ulp: NaN stays NaN, overflow is infinite,
//! underflow gradual.
//!
//! Cody & Waite's reduction `x = n ln 2 + r`, the degree-6 minimax polynomial of Cephes' `expf` on
//! `|r| <= ln 2 / 2`, and `2^n` applied in two halves, for `n` alone would leave the exponent's range. There are no
//! branches, so that a loop around it becomes vectors.

use super::loops::multiply_add;
use crate::quant::ROUND;

/// Below the first the result rounds to zero, above the second to infinity.
const RANGE: (f32, f32) = (-104.0, 89.0);
/// ln 2 in two parts; the first has 9 bits, so that its product with `n` is exact.
const LN_2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);
/// `(e^r - 1 - r) / r²`, highest power first.
const POLYNOMIAL: [f32; 6] = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5];

/// `e^x`.
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    // Comparisons in this order let a NaN become a bound, which keeps the integers below in range.
    let bounded = if x < RANGE.1 { x } else { RANGE.1 };
    let bounded = if bounded > RANGE.0 { bounded } else { RANGE.0 };
    let shifted = multiply_add::<FMA>(bounded, std::f32::consts::LOG2_E, ROUND);
    let (n, steps) = (shifted.to_bits().wrapping_sub(ROUND.to_bits()).cast_signed(), shifted - ROUND);
    let r = multiply_add::<FMA>(steps, -LN_2.0, bounded);
    let r = multiply_add::<FMA>(steps, -LN_2.1, r);
    let mut p = POLYNOMIAL[0];
    for c in &POLYNOMIAL[1..] {
        p = multiply_add::<FMA>(p, r, *c);
    }
    let y = multiply_add::<FMA>(p, r * r, r) + 1.0;
    let half = n >> 1;
    let y = y * power_of_two(half) * power_of_two(n - half);
    if x.is_nan() { x } else { y }
}

/// `2^n` for `n` in the range of normal numbers.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n + 127).cast_unsigned() << 23)
}

#[cfg(test)]
mod tests {
    use super::super::Table;

    /// Calls `check(isa, e^x)` for each table.
    fn each(x: &[f32], check: impl Fn(&str, &[f32])) {
        for table in Table::available() {
            let mut y = x.to_vec();
            table.light().exp_sum(&mut y, 0.0);
            check(table.isa().name(), &y);
        }
    }

    #[test]
    fn exp_is_within_two_ulp_of_f64() {
        let step = if cfg!(miri) { 200 } else { 1 };
        let xs: Vec<f32> = (-8300..7097).step_by(step).map(|i| i as f32 * 0.0125).collect();
        each(&xs, |isa, ys| {
            for (x, y) in xs.iter().zip(ys) {
                let want = f64::from(*x).exp();
                let ulp = (want * f64::from(f32::EPSILON)).max(f64::from(f32::from_bits(1)));
                assert!((f64::from(*y) - want).abs() <= 2.0 * ulp, "exp({x}) = {y} @{isa}, expected {want}");
            }
        });
    }

    #[test]
    fn exp_carries_the_special_values() {
        each(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 89.5, -104.5, 88.72, f32::NAN], |isa, y| {
            assert!(y[0].is_nan() && y[8].is_nan(), "{isa}");
            assert_eq!(y[1..7], [f32::INFINITY, 0.0, 1.0, 1.0, f32::INFINITY, 0.0], "{isa}");
            assert!(y[7].is_finite(), "{isa}");
        });
    }
}
