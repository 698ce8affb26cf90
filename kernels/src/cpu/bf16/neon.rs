//! `bfmmla`: squares of two tokens by two lanes that each add four products.

#![allow(unsafe_code, reason = "vector loads and stores")]
#![allow(clippy::needless_range_loop, reason = "loops over registers read like the tile when they count")]

use super::super::neon::{LANES, bfcvtn, bfmmla, by_fours, load_part, tokens_of_squares};
use super::{Bf16, Bf16Rows};
use std::arch::aarch64::*;

/// Terms of a square.
const QUAD: usize = 4;
/// Terms in a vector of activations; panels have whole ones.
const VECTOR: usize = 8;

pub(crate) static KERNELS: Bf16 =
    Bf16 { lanes: LANES, group: VECTOR, round, decode_nf4: None, decode_dense: None, pack_rows, pack_cols, tile };

/// See [`Bf16::round`].
#[target_feature(enable = "neon,bf16")]
fn round(x: &[f32], y: &mut [u16]) {
    let (fours, rest) = y.as_chunks_mut::<4>();
    let (x, last) = x.as_chunks::<4>();
    for (x, y) in x.iter().zip(fours) {
        *y = to_array(bfcvtn(load_part(x)));
    }
    let last = to_array(bfcvtn(load_part(last)));
    rest.copy_from_slice(&last[..rest.len()]);
}

#[inline]
#[target_feature(enable = "neon")]
fn to_array(v: uint16x4_t) -> [u16; 4] {
    let mut array = [0; 4];
    // SAFETY: `array` has four elements.
    unsafe { vst1_u16(array.as_mut_ptr(), v) };
    array
}

/// See [`Bf16::pack_rows`].
#[target_feature(enable = "neon,bf16")]
fn pack_rows(w: Bf16Rows, panel: &mut [u16]) {
    for (quad, panel) in panel.as_chunks_mut::<{ QUAD * LANES }>().0.iter_mut().enumerate() {
        for (lane, terms) in panel.as_chunks_mut::<QUAD>().0.iter_mut().enumerate() {
            *terms = four(w.part(lane, QUAD * quad));
        }
    }
}

/// See [`Bf16::pack_cols`].
#[target_feature(enable = "neon,bf16")]
fn pack_cols(w: Bf16Rows, panel: &mut [u16]) {
    for (quad, panel) in panel.as_chunks_mut::<{ QUAD * LANES }>().0.iter_mut().enumerate() {
        for (i, to) in panel.as_chunks_mut::<{ QUAD * 4 }>().0.iter_mut().enumerate() {
            let mut terms = [[0; 4]; QUAD];
            for (j, terms) in terms.iter_mut().enumerate() {
                *terms = four(w.part(QUAD * quad + j, 4 * i));
            }
            // SAFETY: arrays of 4, and of 16; the store puts the terms of a column side by side.
            unsafe {
                let [a, b, c, d] = terms.map(|terms| vld1_u16(terms.as_ptr()));
                vst4_u16(to.as_mut_ptr(), uint16x4x4_t(a, b, c, d));
            }
        }
    }
}

/// The first four, zeros where there are fewer.
#[inline(always)]
fn four(x: &[u16]) -> [u16; 4] {
    match x.first_chunk() {
        Some(four) => *four,
        None => std::array::from_fn(|i| x.get(i).copied().unwrap_or(0)),
    }
}

/// See [`Bf16::tile`].
#[target_feature(enable = "neon,bf16")]
fn tile(panel: &[u16], x: Bf16Rows, c: &mut [&mut [f32]], col: usize, n: usize, add: bool) {
    by_fours(c, |t, c| {
        let x = Bf16Rows { values: &x.values[t * x.stride..], count: c.len(), ..x };
        match c.len() {
            4 => pairs::<2>(panel, x, c, col, n, add),
            _ => pairs::<1>(panel, x, c, col, n, add),
        }
    });
}

/// `P` pairs of tokens with all lanes of the panel; a token alone is its own partner.
#[inline]
#[target_feature(enable = "neon,bf16")]
fn pairs<const P: usize>(panel: &[u16], x: Bf16Rows, c: &mut [&mut [f32]], col: usize, n: usize, add: bool) {
    let (panel, _) = panel.as_chunks::<{ VECTOR * LANES }>();
    let row = |t: usize| &x.values[t.min(x.count - 1) * x.stride..].as_chunks::<VECTOR>().0[..panel.len()];
    let rows: [_; P] = std::array::from_fn(|p| [row(2 * p), row(2 * p + 1)]);
    let mut sums = [[vdupq_n_f32(0.0); LANES / 2]; P];
    for (at, w) in panel.iter().enumerate() {
        let mut x = [[vdupq_n_u16(0); 2]; P];
        for p in 0..P {
            let [a, b] = rows[p];
            // SAFETY: the rows are arrays of 8.
            x[p] = unsafe { pair(vld1q_u16(a[at].as_ptr()), vld1q_u16(b[at].as_ptr())) };
        }
        for (half, w) in w.as_chunks::<{ QUAD * LANES }>().0.iter().enumerate() {
            for (j, w) in w.as_chunks::<VECTOR>().0.iter().enumerate() {
                // SAFETY: `w` is an array of 8.
                let w = unsafe { vld1q_u16(w.as_ptr()) };
                for p in 0..P {
                    sums[p][j] = bfmmla(sums[p][j], x[p][half], w);
                }
            }
        }
    }
    for (c, lanes) in c.iter_mut().zip(sums.iter().flat_map(|sums| tokens_of_squares(sums))) {
        c[col..][..n].iter_mut().zip(lanes).for_each(|(c, sum)| *c = if add { *c + sum } else { sum });
    }
}

/// The first four terms of both, and the second.
#[inline]
#[target_feature(enable = "neon")]
fn pair(a: uint16x8_t, b: uint16x8_t) -> [uint16x8_t; 2] {
    let (a, b) = (vreinterpretq_u64_u16(a), vreinterpretq_u64_u16(b));
    [vtrn1q_u64(a, b), vtrn2q_u64(a, b)].map(|quads| vreinterpretq_u16_u64(quads))
}
