//! 8-bit products with the 256-bit dot products of processors without AVX-512: as there, weights are 128 too large, and
//! sums begin with what takes that off again.

#![allow(unsafe_code, reason = "vector loads and stores")]
#![allow(clippy::needless_range_loop, reason = "loops over registers read like the tile when they count")]

use super::super::avx2::{prefetch_line, read_shelf, sum1, sum4, with_hint};
use super::super::nf4::Nf4;
use super::avx2::{LANES, add_scaled, book, first_lane, load32, look_up, scaled};
use super::columns::{Block, each_tile};
use super::{BLOCK, Down, GROUP, Hidden, Int8, Panel, Place, Q8, Q8Row, QUAD, QUADS, Rows, TILE, Up};
use std::arch::x86_64::*;

/// Tokens that a tile takes at once: 12 sums of 8, the weights and a broadcast stay in registers.
const TOKENS: usize = 6;

/// Makes signed bytes unsigned by adding 128.
#[inline]
#[target_feature(enable = "avx2")]
fn unsigned(codes: __m256i) -> __m256i {
    _mm256_xor_si256(codes, _mm256_set1_epi8(-128))
}

/// See [`super::super::Table::q8_nf4_matvec`].
#[target_feature(enable = "avx2,fma,avxvnni")]
pub(crate) fn nf4_matvec(w: &Nf4, row: usize, x: Q8Row, y: &mut [f32]) {
    with_hint!(nf4_rows(w, row, x, y));
}

#[inline]
#[target_feature(enable = "avx2,fma,avxvnni")]
fn nf4_rows<const HINT: i32>(w: &Nf4, row: usize, x: Q8Row, y: &mut [f32], ahead: usize) {
    let (book, unit) = (unsigned(book(w.codebook())), w.codebook().unit);
    let scales = |group: usize, out: &mut [f32]| w.scales64(group, out);
    super::each_row(w, row, x, y, scales, |mut rows, y| {
        // Four at once: what begins and ends a row takes as long as some blocks.
        let (fours, rest) = y.as_chunks_mut::<4>();
        for y in fours {
            let sums = _mm_mul_ps(sum4(dots4::<HINT>(book, rows.take(4), ahead)), _mm_set1_ps(unit));
            // SAFETY: `y` is an array of four floats.
            unsafe { _mm_storeu_ps(y.as_mut_ptr(), sums) };
        }
        for y in rest {
            let Rows { packed, factors, x, .. } = rows.take(1);
            // Two sums that change places: each addition waits for the one before the last only.
            let (mut this, mut other) = (_mm256_setzero_ps(), _mm256_setzero_ps());
            for ((packed, factor), (codes, start)) in packed.iter().zip(factors).zip(x.codes.iter().zip(x.starts)) {
                prefetch_line::<HINT>(packed.as_ptr().wrapping_byte_add(ahead).cast());
                (this, other) = (other, add_block(this, look_up(book, packed), codes, *start, *factor));
            }
            *y = sum1(_mm256_add_ps(this, other)) * unit;
        }
    });
}

/// Four rows, each as a sum of 8 lanes.
#[inline]
#[target_feature(enable = "avx2,fma,avxvnni")]
fn dots4<const HINT: i32>(book: __m256i, rows: Rows, ahead: usize) -> [__m256; 4] {
    let Rows { packed, factors, x, .. } = rows;
    let n = x.codes.len();
    assert!(packed.len() == 4 * n && factors.len() == 4 * n);
    let mut sums = [_mm256_setzero_ps(); 4];
    for (block, (codes, start)) in x.codes.iter().zip(x.starts).enumerate() {
        // Memory is asked for in its own order, not row by row.
        prefetch_line::<HINT>(packed.as_ptr().wrapping_add(4 * block).wrapping_byte_add(ahead).cast());
        prefetch_line::<HINT>(packed.as_ptr().wrapping_add(4 * block + 2).wrapping_byte_add(ahead).cast());
        for r in 0..4 {
            let at = r * n + block;
            sums[r] = add_block(sums[r], look_up(book, &packed[at]), codes, *start, factors[at]);
        }
    }
    sums
}

/// `sum + factor (w . x)`, lane by lane, with `w` 128 too large.
#[inline]
#[target_feature(enable = "avx2,fma,avxvnni")]
fn add_block(sum: __m256, w: [__m256i; 2], x: &[i8; BLOCK], start: i32, factor: f32) -> __m256 {
    let dots = _mm256_zextsi128_si256(_mm_cvtsi32_si128(start));
    let dots = _mm256_dpbusd_avx_epi32(dots, w[0], load32(x, 0));
    let dots = _mm256_dpbusd_avx_epi32(dots, w[1], load32(x, 1));
    _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), _mm256_set1_ps(factor), sum)
}

/// See [`super::super::Table::q8_int8_matvec`].
#[target_feature(enable = "avx2,fma,avxvnni")]
pub(crate) fn int8_matvec(w: &Int8, row: usize, x: Q8Row, y: &mut [f32]) {
    with_hint!(int8_rows(w, row, x, y));
}

#[inline]
#[target_feature(enable = "avx2,fma,avxvnni")]
fn int8_rows<const HINT: i32>(w: &Int8, row: usize, x: Q8Row, y: &mut [f32], ahead: usize) {
    for (i, y) in y.iter_mut().enumerate() {
        let (mut this, mut other) = (_mm256_setzero_ps(), _mm256_setzero_ps());
        for (((w, codes), start), unit) in w.row(row + i).iter().zip(x.codes).zip(x.starts).zip(x.units) {
            prefetch_line::<HINT>(w.as_ptr().wrapping_add(ahead).cast());
            // SAFETY: `w` is an array of 64 bytes.
            let w = [0, 32].map(|at| unsafe { _mm256_loadu_si256(w.as_ptr().add(at).cast()) });
            (this, other) = (other, add_block(this, [unsigned(w[0]), unsigned(w[1])], codes, *start, *unit));
        }
        *y = sum1(_mm256_add_ps(this, other)) * w.scale(row + i);
    }
}

super::avx2::define_columns!("avx2,fma,avxvnni", |start: i32| start, add_quad);

/// `sum`, which began with what takes 128 off again, and the products of a quad of eight rows with `codes`.
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn add_quad(sum: __m256i, w: __m256i, codes: __m256i) -> __m256i {
    _mm256_dpbusd_avx_epi32(sum, unsigned(w), codes)
}

/// See [`super::super::Table::q8_pack_nf4`].
#[target_feature(enable = "avx2")]
pub(crate) fn pack_nf4(w: &Nf4, blocks: usize, at: Place, panel: Panel) {
    super::avx2::unfold_nf4(w, unsigned(book(w.codebook())), w.codebook().unit, blocks, at, panel);
}

/// See [`super::super::Table::q8_pack_int8`].
#[target_feature(enable = "avx2")]
pub(crate) fn pack_int8(w: &Int8, at: Place, panel: Panel) {
    super::avx2::unfold_int8(w, _mm256_set1_epi8(-128), at, panel);
}

/// See [`super::super::Table::q8_tile`].
#[target_feature(enable = "avx2,fma,avxvnni")]
pub(crate) fn tile(panel: Panel, x: &Q8, at: Place, c: &mut [&mut [f32]], col: usize) {
    let mut t = 0;
    while t < c.len() {
        let left = c.len() - t;
        let count = [TOKENS, 4, 2, 1].into_iter().find(|n| *n <= left).unwrap_or(1);
        let c = &mut c[t..t + count];
        match count {
            TOKENS => tokens::<TOKENS>(&panel, x, t, at, c, col),
            4 => tokens::<4>(&panel, x, t, at, c, col),
            2 => tokens::<2>(&panel, x, t, at, c, col),
            _ => tokens::<1>(&panel, x, t, at, c, col),
        }
        t += count;
    }
}

/// `M` tokens from `t` on with all rows of the panel.
#[inline]
#[target_feature(enable = "avx2,fma,avxvnni")]
fn tokens<const M: usize>(panel: &Panel, x: &Q8, t: usize, at: Place, c: &mut [&mut [f32]], col: usize) {
    let rows: [Q8Row; M] = std::array::from_fn(|m| x.row(t + m));
    // In memory, for they are touched once a block: the registers belong to the integer sums.
    let mut sums = [[0.0; LANES]; M];
    let blocks = panel.codes.as_chunks::<{ BLOCK * LANES }>().0.iter().zip(panel.scales.as_chunks::<LANES>().0);
    for (b, (w, scales)) in blocks.take(at.blocks).enumerate() {
        let codes: [*const i8; M] = std::array::from_fn(|m| rows[m].codes[at.block + b].as_ptr());
        let mut dots = [[_mm256_setzero_si256(); 2]; M];
        for m in 0..M {
            dots[m] = [_mm256_set1_epi32(rows[m].starts[at.block + b]); 2];
        }
        for quad in 0..QUADS {
            // SAFETY: `w` holds 16 quads of 64 bytes, each row of codes 16 quads of 4.
            unsafe {
                let w = w.as_ptr().add(quad * QUAD * LANES);
                let w = [_mm256_loadu_si256(w.cast()), _mm256_loadu_si256(w.add(32).cast())];
                for m in 0..M {
                    let x = _mm256_set1_epi32(codes[m].add(QUAD * quad).cast::<i32>().read_unaligned());
                    for j in 0..2 {
                        dots[m][j] = _mm256_dpbusd_avx_epi32(dots[m][j], w[j], x);
                    }
                }
            }
        }
        for m in 0..M {
            let unit = _mm256_set1_ps(rows[m].units[at.block + b]);
            for j in 0..2 {
                // SAFETY: `scales` and `sums[m]` are arrays of 16 floats.
                unsafe {
                    let scale = _mm256_mul_ps(_mm256_loadu_ps(scales.as_ptr().add(8 * j)), unit);
                    let sum = sums[m].as_mut_ptr().add(8 * j);
                    _mm256_storeu_ps(sum, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[m][j]), scale, _mm256_loadu_ps(sum)));
                }
            }
        }
    }
    for (c, sums) in c.iter_mut().zip(&sums) {
        c[col..][..at.rows].iter_mut().zip(sums).for_each(|(c, sum)| *c += sum);
    }
}
