//! Eight floats at a time on `wide`: how light ops walk slices, and the exponential they share.
//!
//! Tails are padded with zeros and run through the same instructions as full vectors, so that the value of
//! an element does not depend on where in a slice it stands.

use wide::{bytemuck, f32x8, i32x8};

/// Floats in a vector.
pub(crate) const LANES: usize = 8;

/// The first eight of `x`, zeros where `x` is shorter.
#[inline(always)]
pub(crate) fn load(x: &[f32]) -> f32x8 {
    match x.first_chunk::<LANES>() {
        Some(full) => f32x8::new(*full),
        None => {
            let mut padded = [0.0; LANES];
            padded[..x.len()].copy_from_slice(x);
            f32x8::new(padded)
        }
    }
}

/// Writes as many of the eight as fit in `y`.
#[inline(always)]
pub(crate) fn store(y: &mut [f32], value: f32x8) {
    match y.first_chunk_mut::<LANES>() {
        Some(full) => *full = value.to_array(),
        None => {
            let n = y.len();
            y.copy_from_slice(&value.to_array()[..n]);
        }
    }
}

/// `y[i] = f(xs[0][i], xs[1][i], ..)`.
#[inline(always)]
pub(crate) fn map<const N: usize>(xs: [&[f32]; N], y: &mut [f32], f: impl Fn([f32x8; N]) -> f32x8) {
    assert!(xs.iter().all(|x| x.len() == y.len()));
    for i in (0..y.len()).step_by(LANES) {
        let value = f(xs.map(|x| load(&x[i..])));
        store(&mut y[i..], value);
    }
}

/// `y[i] = f(y[i], xs[0][i], xs[1][i], ..)`.
#[inline(always)]
pub(crate) fn update<const N: usize>(y: &mut [f32], xs: [&[f32]; N], f: impl Fn(f32x8, [f32x8; N]) -> f32x8) {
    assert!(xs.iter().all(|x| x.len() == y.len()));
    for i in (0..y.len()).step_by(LANES) {
        let value = f(load(&y[i..]), xs.map(|x| load(&x[i..])));
        store(&mut y[i..], value);
    }
}

/// `sum_i f(xs[0][i], xs[1][i], ..)`, in an order that depends on the length alone; `f` of zeros must be zero.
#[inline(always)]
pub(crate) fn sum<const N: usize>(xs: [&[f32]; N], f: impl Fn([f32x8; N]) -> f32x8) -> f32 {
    let n = xs[0].len();
    assert!(xs.iter().all(|x| x.len() == n));
    let mut total = f32x8::ZERO;
    for i in (0..n).step_by(LANES) {
        total += f(xs.map(|x| load(&x[i..])));
    }
    total.reduce_add()
}

/// `e^x` within 2 ulp; NaN stays NaN, overflow is infinite, underflow gradual.
///
/// Cody & Waite's reduction `x = n ln 2 + r`, the degree-6 Taylor-like minimax of Cephes' `expf` on
/// `|r| <= ln 2 / 2`, and `2^n` applied in two halves, for `n` alone would leave the exponent's range.
#[inline(always)]
pub(crate) fn exp(x: f32x8) -> f32x8 {
    // Below -104 the result rounds to zero, above 89 to infinity. Bounds first: a NaN lane keeps `x` below.
    let bounded = f32x8::splat(-104.0).fast_max(f32x8::splat(89.0).fast_min(x));
    let n = (bounded * f32x8::splat(std::f32::consts::LOG2_E)).fast_round_int();
    let steps = f32x8::from_i32x8(n);
    // ln 2 in two parts; the first has 9 bits, so that its product with `steps` is exact.
    let r = steps.mul_neg_add(f32x8::splat(0.693_359_4), bounded);
    let r = steps.mul_neg_add(f32x8::splat(-2.121_944_4e-4), r);
    let mut p = f32x8::splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p.mul_add(r, f32x8::splat(c));
    }
    let y = p.mul_add(r * r, r) + f32x8::ONE;
    let half: i32x8 = n >> 1;
    let y = y * power_of_two(half) * power_of_two(n - half);
    x.is_nan().select(x, y)
}

/// `2^n` for `n` in the range of normal numbers.
#[inline(always)]
fn power_of_two(n: i32x8) -> f32x8 {
    bytemuck::cast((n + i32x8::splat(127)) << 23)
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32x8) -> f32x8 {
    f32x8::ONE / (f32x8::ONE + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_of_f64() {
        for i in -8300..7097 {
            let x = i as f32 * 0.0125;
            let (got, want) = (exp(f32x8::splat(x)).to_array()[3], f64::from(x).exp());
            let ulp = (want * f64::from(f32::EPSILON)).max(f64::from(f32::from_bits(1)));
            assert!((f64::from(got) - want).abs() <= 2.0 * ulp, "exp({x}) = {got}, expected {want}");
        }
    }

    #[test]
    fn exp_carries_the_special_values() {
        let got = exp(f32x8::new([f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 89.5, -104.5, 88.72]));
        let got = got.to_array();
        assert!(got[0].is_nan());
        assert_eq!(got[1..7], [f32::INFINITY, 0.0, 1.0, 1.0, f32::INFINITY, 0.0]);
        assert!(got[7].is_finite());
    }
}
