//! How light ops walk slices: plain loops that the compiler turns into vectors of whatever instruction set the caller is
//! compiled for, see [`super::light`].
//!
//! Everything is inlined into that caller. What is left over after whole vectors runs through the same operations, so the
//! value of an element does not depend on where in a slice it stands.

/// Partial sums of a reduction: four vectors of AVX2, enough to hide the latency of an addition.
const LANES: usize = 32;

/// `a b + c`, rounded once if `FMA`. Where the CPU has no such instruction, that would be a call.
#[inline(always)]
pub(crate) fn multiply_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// `y[i] = f(xs[0][i], xs[1][i], ..)`.
#[inline(always)]
pub(crate) fn map<const N: usize>(xs: [&[f32]; N], y: &mut [f32], f: impl Fn([f32; N]) -> f32) {
    update(y, xs, |_, xs| f(xs));
}

/// `y[i] = f(y[i], xs[0][i], xs[1][i], ..)`.
#[inline(always)]
pub(crate) fn update<const N: usize>(y: &mut [f32], xs: [&[f32]; N], f: impl Fn(f32, [f32; N]) -> f32) {
    assert!(xs.iter().all(|x| x.len() == y.len()));
    // Cut to the one length anew: what the compiler sees here it need not check in the loop.
    let xs = xs.map(|x| &x[..y.len()]);
    for i in 0..y.len() {
        y[i] = f(y[i], xs.map(|x| x[i]));
    }
}

/// `sum_i f(xs[0][i], xs[1][i], ..)`, in an order that depends on the length alone.
#[inline(always)]
pub(crate) fn sum<const N: usize>(xs: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    reduce(xs, 0.0, |total, x| total + f(x), |a, b| a + b)
}

/// Largest element, `-inf` of an empty row. A NaN may be skipped.
#[inline(always)]
pub(crate) fn largest(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    reduce([x], f32::NEG_INFINITY, |most, [x]| larger(most, x), larger)
}

/// Adds the elements to partial results that are `start` at first, then joins those.
#[inline(always)]
pub(crate) fn reduce<const N: usize>(
    xs: [&[f32]; N],
    start: f32,
    add: impl Fn(f32, [f32; N]) -> f32,
    join: impl Fn(f32, f32) -> f32,
) -> f32 {
    let n = xs[0].len();
    assert!(xs.iter().all(|x| x.len() == n));
    let chunks = xs.map(|x| x.as_chunks::<LANES>().0);
    let mut lanes = [start; LANES];
    for i in 0..n / LANES {
        let x = chunks.map(|x| &x[i]);
        for j in 0..LANES {
            lanes[j] = add(lanes[j], x.map(|x| x[j]));
        }
    }
    for (lane, i) in lanes.iter_mut().zip(n / LANES * LANES..n) {
        *lane = add(*lane, xs.map(|x| x[i]));
    }
    let [a, b] = halves::<LANES, 16>(lanes);
    let [a, b] = halves::<16, 8>(std::array::from_fn(|j| join(a[j], b[j])));
    let [a, b] = halves::<8, 4>(std::array::from_fn(|j| join(a[j], b[j])));
    let four: [f32; 4] = std::array::from_fn(|j| join(a[j], b[j]));
    join(join(four[0], four[2]), join(four[1], four[3]))
}

#[inline(always)]
fn halves<const N: usize, const HALF: usize>(x: [f32; N]) -> [[f32; HALF]; 2] {
    [0, HALF].map(|at| std::array::from_fn(|j| x[at + j]))
}
