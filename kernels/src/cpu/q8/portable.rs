//! 8-bit products for any CPU; the compiler makes vectors of the loops over 16-bit products.

use super::super::nf4::Nf4;
use super::columns::{Block, Part, each_tile};
use super::{BLOCK, Down, GROUP, Hidden, Int8, Panel, Place, Q8, Q8Mut, Q8Row, QUAD, Rows, TILE, Up};
use crate::quant::nearest_f32;
use half::bf16;
use wide::{i16x8, i32x4};

/// Rows of a panel.
pub(crate) const LANES: usize = 16;

/// Units below it are taken as zero: their reciprocals would overflow.
pub(super) const TINY: f32 = 1e-36;

/// The unit of elements that share one, NaN where one of them is not finite, and what turns them into codes.
pub(super) fn unit(x: &[f32]) -> (f32, f32) {
    let largest = x.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
    // `max` passes over NaN. A product with zero is NaN for all that is not finite, and so stays a sum.
    let broken = x.iter().map(|x| x * 0.0).sum::<f32>().is_nan();
    let unit = if broken { f32::NAN } else { if largest < TINY { 0.0 } else { largest / 127.0 } };
    (unit, if unit > 0.0 { 127.0 / largest } else { 0.0 })
}

/// See [`super::super::Table::q8_quantize`].
pub(crate) fn quantize(x: &[f32], q: Q8Mut) {
    let parts = q.codes.iter_mut().zip(q.units).zip(q.starts);
    for (x, ((codes, unit), start)) in x.as_chunks::<BLOCK>().0.iter().zip(parts) {
        let inverse;
        (*unit, inverse) = self::unit(x);
        for (i, x) in x.iter().enumerate() {
            codes[i % 2 * (BLOCK / 2) + i / 2] = if unit.is_nan() { 0 } else { nearest_f32(x * inverse) };
        }
        *start = -128 * codes.iter().map(|c| i32::from(*c)).sum::<i32>();
    }
}

/// Blocks that are unfolded before they are multiplied: vectors are not read before what stored them in pieces is done.
const UNFOLDED: usize = 8;

/// See [`super::super::Table::q8_nf4_matvec`].
pub(crate) fn nf4_matvec(w: &Nf4, row: usize, x: Q8Row, y: &mut [f32]) {
    let book = w.codebook();
    // Both codes of a byte with one load and one store, in 16 bits: products of those are what SSE2 sums up in pairs.
    let pairs: [[i16; 2]; 256] =
        std::array::from_fn(|byte| [byte >> 4, byte & 15].map(|nibble| i16::from(book.codes[nibble])));
    // Activations in the order of those pairs, widened once for all rows.
    let widen = |codes: &[i8; BLOCK]| std::array::from_fn(|i| i16::from(codes[i % 2 * (BLOCK / 2) + i / 2]));
    let wide: Vec<[i16; BLOCK]> = x.codes.iter().map(widen).collect();
    let mut weights = [[0_i16; BLOCK]; UNFOLDED];
    super::each_row(
        w,
        row,
        x,
        y,
        |group, out| w.scales64(group, out),
        |mut rows, y| {
            for y in y {
                let Rows { packed, factors, block, .. } = rows.take(1);
                let wide = wide[block..][..packed.len()].chunks(UNFOLDED);
                let parts = packed.chunks(UNFOLDED).zip(factors.chunks(UNFOLDED)).zip(wide);
                *y = 0.0;
                for ((packed, factors), wide) in parts {
                    for (weights, packed) in weights.iter_mut().zip(packed) {
                        for (pair, byte) in weights.as_chunks_mut::<2>().0.iter_mut().zip(packed) {
                            *pair = pairs[usize::from(*byte)];
                        }
                    }
                    for ((weights, wide), factor) in weights.iter().zip(wide).zip(factors) {
                        *y += factor * dot(weights, wide) as f32;
                    }
                }
                *y *= book.unit;
            }
        },
    );
}

/// Exact sum of products.
#[inline(always)]
fn dot(w: &[i16; BLOCK], x: &[i16; BLOCK]) -> i32 {
    let mut sums = i32x4::ZERO;
    for (w, x) in w.as_chunks::<8>().0.iter().zip(x.as_chunks::<8>().0) {
        sums += i16x8::new(*w).dot(i16x8::new(*x));
    }
    sums.reduce_add()
}

/// See [`super::super::Table::q8_int8_matvec`].
pub(crate) fn int8_matvec(w: &Int8, row: usize, x: Q8Row, y: &mut [f32]) {
    for (i, y) in y.iter_mut().enumerate() {
        let mut sum = 0.0;
        for ((w, x), unit) in w.row(row + i).iter().zip(x.codes).zip(x.units) {
            let (mut weights, mut wide) = ([0; BLOCK], [0; BLOCK]);
            for i in 0..BLOCK {
                (weights[i], wide[i]) = (i16::from(w[i].cast_signed()), i16::from(x[i]));
            }
            sum += unit * dot(&weights, &wide) as f32;
        }
        *y = sum * w.scale(row + i);
    }
}

/// See [`super::super::Table::q8_down`].
pub(crate) fn down(w: &Down, tile: usize, x: Q8Row, y: &mut [f32; GROUP]) {
    let (blocks, scales) = w.blocks(tile, x);
    *y = [0.0; GROUP];
    for Block { octets, codes, unit, .. } in blocks {
        let mut dots = [0; GROUP];
        octets.iter().zip(codes).for_each(|(octet, codes)| add_part(&mut dots, octet, codes.map(i16::from)));
        y.iter_mut().zip(dots).for_each(|(y, dot)| *y += unit * dot as f32);
    }
    y.iter_mut().zip(scales).for_each(|(y, scale)| *y *= bf16::from_le_bytes(*scale).to_f32());
}

/// Adds the products of `N` rows and `W` columns.
#[inline(always)]
fn add_part<const N: usize, const W: usize>(dots: &mut [i32; N], part: &Part<N, W>, x: [i16; W]) {
    for (dot, w) in dots.iter_mut().zip(part) {
        let product = |(w, x): (&u8, &i16)| i32::from(i16::from(w.cast_signed()) * x);
        *dot += w.iter().zip(&x).map(product).sum::<i32>();
    }
}

/// See [`super::super::Table::q8_add_columns`].
pub(crate) fn add_columns(w: &Up, row: usize, h: &[Hidden], y: &mut [f32]) {
    each_tile(w, row, h, y, |quads, scales, y| {
        let mut sums = [0.0; TILE];
        for (quads, h) in quads.chunks(GROUP / QUAD).zip(h) {
            let (mut dots, h) = ([0; TILE], h.get());
            for (quad, codes) in quads.iter().zip(h.codes) {
                add_part(&mut dots, quad, codes.to_le_bytes().map(|code| i16::from(code.cast_signed())));
            }
            sums.iter_mut().zip(dots).for_each(|(sum, dot)| *sum += h.unit * dot as f32);
        }
        for ((y, sum), scale) in y.iter_mut().zip(sums).zip(scales) {
            *y += sum * bf16::from_le_bytes(*scale).to_f32();
        }
    });
}

/// See [`super::super::Table::q8_pack_nf4`].
pub(crate) fn pack_nf4(w: &Nf4, blocks: usize, at: Place, panel: Panel) {
    let book = w.codebook();
    pack::<LANES>(at, panel, |lane, b| {
        let block = (at.row + lane) * blocks + at.block + b;
        let mut codes = [0; BLOCK];
        for (i, byte) in w.packed64(block)[0].iter().enumerate() {
            codes[i] = book.codes[usize::from(byte >> 4)].cast_unsigned();
            codes[i + BLOCK / 2] = book.codes[usize::from(byte & 15)].cast_unsigned();
        }
        (codes, w.scale64(block) * book.unit)
    });
}

/// See [`super::super::Table::q8_pack_int8`].
pub(crate) fn pack_int8(w: &Int8, at: Place, panel: Panel) {
    pack::<LANES>(at, panel, |lane, b| (w.row(at.row + lane)[at.block + b], w.scale(at.row + lane)));
}

/// Fills a panel of `N` lanes with the blocks that `get(lane, block)` returns, with their scales.
pub(super) fn pack<const N: usize>(at: Place, panel: Panel, get: impl Fn(usize, usize) -> ([u8; BLOCK], f32)) {
    let blocks = panel.codes.chunks_exact_mut(BLOCK * N).zip(panel.scales.chunks_exact_mut(N));
    for (b, (codes, scales)) in blocks.take(at.blocks).enumerate() {
        for (lane, scale) in scales.iter_mut().enumerate() {
            let (block, s) = if lane < at.rows { get(lane, b) } else { ([0; BLOCK], 0.0) };
            *scale = s;
            for (quad, four) in block.as_chunks::<QUAD>().0.iter().enumerate() {
                codes[(quad * N + lane) * QUAD..][..QUAD].copy_from_slice(four);
            }
        }
    }
}

/// See [`super::super::Table::q8_tile`].
pub(crate) fn tile(panel: Panel, x: &Q8, at: Place, c: &mut [&mut [f32]], col: usize) {
    let blocks = panel.codes.as_chunks().0.iter().zip(panel.scales.as_chunks::<LANES>().0);
    for (b, (codes, scales)) in blocks.take(at.blocks).enumerate() {
        // Once for all tokens: SSE2 multiplies nothing narrower.
        let w = widen(codes);
        for (t, c) in c.iter_mut().enumerate() {
            let x = x.row(t);
            let sums = dots(&w, &x.codes[at.block + b]);
            let c = &mut c[col..][..at.rows];
            for ((c, sum), scale) in c.iter_mut().zip(sums.as_flattened()).zip(scales) {
                *c += scale * x.units[at.block + b] * *sum as f32;
            }
        }
    }
}

/// Two codes of four lanes, lane by lane.
type Pairs = [i16x8; LANES / 4];

/// A block of a panel, pair by pair.
fn widen(codes: &[u8; BLOCK * LANES]) -> [Pairs; BLOCK / 2] {
    std::array::from_fn(|pair| {
        std::array::from_fn(|four| {
            i16x8::new(std::array::from_fn(|i| {
                let lane = pair / 2 * LANES + 4 * four + i / 2;
                i16::from(codes[lane * QUAD + pair % 2 * 2 + i % 2].cast_signed())
            }))
        })
    })
}

/// Exact sums of products, lane by lane.
fn dots(w: &[Pairs; BLOCK / 2], x: &[i8; BLOCK]) -> [[i32; 4]; LANES / 4] {
    let x = x.map(i16::from);
    let mut sums = [i32x4::ZERO; LANES / 4];
    for (w, x) in w.iter().zip(x.as_chunks::<2>().0) {
        let x: i16x8 = bytemuck::cast(i32x4::splat(bytemuck::cast(*x)));
        for (sum, w) in sums.iter_mut().zip(w) {
            *sum += w.dot(x);
        }
    }
    sums.map(i32x4::to_array)
}
