//! The 8-bit dynamic maps, and double quantization with the signed one: the absmax of NF4 blocks in 8 bits.
//!
//! Their mean is taken off, then blocks of 256 are scaled by their own absmax and coded with a dynamic map, whose
//! steps are finer near zero (8-bit optimizers, Dettmers et al. 2021, <https://arxiv.org/abs/2110.02861>, section 1.3).

use super::NESTED_BLOCK;

/// Decades of the map.
const EXPONENTS: i32 = 7;

/// Block scales in 8 bits; `map[codes[i]] * nested[i / 256] + offset` gives them back.
#[derive(Clone, Debug, PartialEq)]
pub struct DoubleQuantized {
    /// One code a block.
    pub codes: Vec<u8>,
    /// Scale of each nested block of 256.
    pub nested: Vec<f32>,
    /// Mean of the block scales.
    pub offset: f32,
}

/// bitsandbytes' `create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8)`: 256 sorted values from about
/// -0.993 to 1. Decade i has the 2^i midpoints of evenly spaced points from 0.1 to 1, of both signs.
#[must_use]
pub fn dynamic_map() -> [f32; 256] {
    map_of(|exponent| midpoints(exponent, 1 << exponent).into_iter().flat_map(|x| [x, -x]).collect())
}

/// The same with `signed=False`, as the second moments of optimizers have it: 256 sorted values from 0 to 1, decade i
/// with 2^(i + 1) midpoints.
#[must_use]
pub fn unsigned_dynamic_map() -> [f32; 256] {
    map_of(|exponent| midpoints(exponent, 2 << exponent))
}

/// The values of all decades, 0 and 1, sorted.
fn map_of(decade: impl Fn(i32) -> Vec<f32>) -> [f32; 256] {
    let mut map: Vec<f32> = (0..EXPONENTS).flat_map(decade).chain([0.0, 1.0]).collect();
    map.sort_by(f32::total_cmp);
    map.try_into().expect("2 * (1 + 2 + .. + 64) + 2 values")
}

/// Midpoints of `steps + 1` evenly spaced points of a decade.
fn midpoints(exponent: i32, steps: usize) -> Vec<f32> {
    let scale = 10f64.powi(exponent + 1 - EXPONENTS) as f32;
    linspace(steps).windows(2).map(|pair| scale * ((pair[0] + pair[1]) / 2.0)).collect()
}

/// `torch.linspace(0.1, 1, steps + 1)`: counted from whichever end is nearer, each value rounded once.
fn linspace(steps: usize) -> Vec<f32> {
    let (start, end) = (0.1f32, 1.0f32);
    let step = (end - start) / steps as f32;
    let at = |i: usize| match i < steps.div_ceil(2) {
        true => step.mul_add(i as f32, start),
        false => (-step).mul_add((steps - i) as f32, end),
    };
    (0..=steps).map(at).collect()
}

/// Quantizes the block scales `absmax` to 8 bits: the nearest code, the lower one at a tie.
///
/// bitsandbytes' CPU code picks a neighbour for about one scale in a thousand that lies within 8e-6 of a midpoint;
/// this does not imitate it. The mean is exact, rounded once; torch's f32 sum, whose order depends on vector width and
/// thread count, may be an ulp or two off.
#[must_use]
pub fn double_quantize(absmax: &[f32]) -> DoubleQuantized {
    let map = dynamic_map();
    let midpoints: Vec<f32> = map.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
    let mean = absmax.iter().map(|&x| f64::from(x)).sum::<f64>() / absmax.len().max(1) as f64;
    let offset = mean as f32;

    let mut codes = Vec::with_capacity(absmax.len());
    let mut nested = Vec::with_capacity(absmax.len().div_ceil(NESTED_BLOCK));
    for block in absmax.chunks(NESTED_BLOCK) {
        let scale = block.iter().fold(0.0f32, |max, x| max.max((x - offset).abs()));
        nested.push(scale);
        if scale == 0.0 {
            // Any code would decode to the offset; bitsandbytes writes 0.
            codes.resize(codes.len() + block.len(), 0);
            continue;
        }
        let code = |x: &f32| midpoints.partition_point(|&m| m < (x - offset) / scale) as u8;
        codes.extend(block.iter().map(code));
    }
    DoubleQuantized { codes, nested, offset }
}
