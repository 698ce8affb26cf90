//! Panels for NEON: rows as lanes, and their products where the CPU has `smmla`, whose sums are squares of two tokens
//! by two lanes.

#![allow(unsafe_code, reason = "vector loads and stores")]
#![allow(clippy::needless_range_loop, reason = "loops over registers read like the tile when they count")]

use super::super::neon::{by_fours, smmla, tokens_of_squares};
use super::super::nf4::Nf4;
use super::neon::{LANES, VECTOR, add_scaled, blocks, book, load, load_part, look_up};
use super::{BLOCK, Int8, Panel, Place, Q8, Q8Row};
use std::arch::aarch64::*;

/// Codes of a lane that lie together in panels for `smmla`.
pub(crate) const OCTET: usize = 8;

/// See [`super::super::Table::q8_pack_nf4`]; `GROUP` codes of a lane lie together.
#[target_feature(enable = "neon")]
pub(crate) fn pack_nf4<const GROUP: usize>(w: &Nf4, blocks: usize, at: Place, panel: Panel) {
    let (book, unit) = (book(w), w.codebook().unit);
    pack::<GROUP>(at, panel, |lane, b| {
        let block = (at.row + lane) * blocks + at.block + b;
        (look_up(book, &w.packed64(block)[0]), w.scale64(block) * unit)
    });
}

/// See [`super::super::Table::q8_pack_int8`]; `GROUP` codes of a lane lie together.
#[target_feature(enable = "neon")]
pub(crate) fn pack_int8<const GROUP: usize>(w: &Int8, at: Place, panel: Panel) {
    pack::<GROUP>(at, panel, |lane, b| (load(&w.row(at.row + lane)[at.block + b]), w.scale(at.row + lane)));
}

/// Turns rows into lanes. `get(lane, block)` returns 64 codes of a row and their scale.
#[inline]
#[target_feature(enable = "neon")]
fn pack<const GROUP: usize>(at: Place, panel: Panel, get: impl Fn(usize, usize) -> ([int8x16_t; 4], f32)) {
    let blocks = panel.codes.as_chunks_mut::<{ BLOCK * LANES }>().0.iter_mut();
    let blocks = blocks.zip(panel.scales.as_chunks_mut::<LANES>().0).take(at.blocks);
    for (b, (codes, scales)) in blocks.enumerate() {
        for (first, scales) in (0..LANES).step_by(4).zip(scales.as_chunks_mut::<4>().0) {
            let mut rows = [[vdupq_n_s8(0); 4]; 4];
            *scales = [0.0; 4];
            for (i, (row, scale)) in rows.iter_mut().zip(scales).enumerate() {
                if first + i < at.rows {
                    (*row, *scale) = get(first + i, b);
                }
            }
            for part in 0..BLOCK / VECTOR {
                let lanes = if GROUP == OCTET { octets(rows.map(|r| r[part])) } else { quads(rows.map(|r| r[part])) };
                for (i, lanes) in lanes.into_iter().enumerate() {
                    // An octet of four rows fills two vectors, a quad one.
                    let group = if GROUP == OCTET { i / 2 * 8 * LANES + i % 2 * VECTOR } else { i * 4 * LANES };
                    let to = &mut codes[part * VECTOR * LANES + group + first * GROUP..][..VECTOR];
                    // SAFETY: the slice has 16 bytes.
                    unsafe { vst1q_s8(to.as_mut_ptr().cast(), lanes) };
                }
            }
        }
    }
}

/// Of four rows of 16 codes the first four of each, then the next four.
#[inline]
#[target_feature(enable = "neon")]
fn quads(rows: [int8x16_t; 4]) -> [int8x16_t; 4] {
    let [a, b, c, d] = rows.map(|row| vreinterpretq_s32_s8(row));
    let pairs = [vtrn1q_s32(a, b), vtrn2q_s32(a, b), vtrn1q_s32(c, d), vtrn2q_s32(c, d)];
    let [ab0, ab1, cd0, cd1] = pairs.map(|pair| vreinterpretq_s64_s32(pair));
    [vtrn1q_s64(ab0, cd0), vtrn1q_s64(ab1, cd1), vtrn2q_s64(ab0, cd0), vtrn2q_s64(ab1, cd1)]
        .map(|quad| vreinterpretq_s8_s64(quad))
}

/// Of four rows of 16 codes the first eight of two rows and of two more, then the next eight.
#[inline]
#[target_feature(enable = "neon")]
fn octets(rows: [int8x16_t; 4]) -> [int8x16_t; 4] {
    let [ab, cd] = [pair(rows[0], rows[1]), pair(rows[2], rows[3])];
    [ab[0], cd[0], ab[1], cd[1]]
}

/// The first eight codes of both, and the second.
#[inline]
#[target_feature(enable = "neon")]
fn pair(a: int8x16_t, b: int8x16_t) -> [int8x16_t; 2] {
    let (a, b) = (vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b));
    [vtrn1q_s64(a, b), vtrn2q_s64(a, b)].map(|octets| vreinterpretq_s8_s64(octets))
}

/// See [`crate::cpu::Table::q8_tile`].
#[target_feature(enable = "neon,i8mm")]
pub(crate) fn tile(panel: Panel, x: &Q8, at: Place, c: &mut [&mut [f32]], col: usize) {
    by_fours(c, |t, c| match c.len() {
        4 => pairs::<2>(&panel, x, t, at, c, col),
        _ => pairs::<1>(&panel, x, t, at, c, col),
    });
}

/// `P` pairs of tokens from `t` on with all rows of the panel; a token alone is its own partner.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn pairs<const P: usize>(panel: &Panel, x: &Q8, t: usize, at: Place, c: &mut [&mut [f32]], col: usize) {
    let last = t + c.len() - 1;
    let rows: [[Q8Row; 2]; P] = std::array::from_fn(|p| [0, 1].map(|i| x.row(last.min(t + 2 * p + i))));
    let mut sums = [[vdupq_n_f32(0.0); LANES / 2]; P];
    for (b, (w, scales)) in blocks(panel, &at).enumerate() {
        let mut dots = [[vdupq_n_s32(0); LANES / 2]; P];
        for (part, w) in w.as_chunks::<{ VECTOR * LANES }>().0.iter().enumerate() {
            let mut x = [[vdupq_n_s8(0); 2]; P];
            for p in 0..P {
                let [first, second] = rows[p];
                x[p] = pair(load_part(first, at.block + b, part), load_part(second, at.block + b, part));
            }
            for (half, w) in w.as_chunks::<{ OCTET * LANES }>().0.iter().enumerate() {
                for (j, w) in w.as_chunks::<VECTOR>().0.iter().enumerate() {
                    // SAFETY: `w` is an array of 16 bytes.
                    let w = unsafe { vld1q_s8(w.as_ptr().cast()) };
                    for p in 0..P {
                        dots[p][j] = smmla(dots[p][j], x[p][half], w);
                    }
                }
            }
        }
        for ((sums, dots), [first, second]) in sums.iter_mut().zip(dots).zip(rows) {
            let (first, second) = (first.units[at.block + b], second.units[at.block + b]);
            let units = vcombine_f32(vdup_n_f32(first), vdup_n_f32(second));
            for ((sum, dot), scales) in sums.iter_mut().zip(dots).zip(scales.as_chunks::<2>().0) {
                // SAFETY: `scales` is an array of 2 floats.
                let scales = unsafe { vld1_f32(scales.as_ptr()) };
                *sum = add_scaled(*sum, dot, vmulq_f32(vcombine_f32(scales, scales), units));
            }
        }
    }
    for (c, lanes) in c.iter_mut().zip(sums.iter().flat_map(|sums| tokens_of_squares(sums))) {
        c[col..][..at.rows].iter_mut().zip(lanes).for_each(|(c, sum)| *c += sum);
    }
}
