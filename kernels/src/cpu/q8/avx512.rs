//! 8-bit products with AVX-512 VNNI: weights 128 too large, so that they are unsigned as `dpbusd` wants its first
//! operand; what that adds too much is taken off again. Codes are looked up with VBMI.

#![allow(unsafe_code, reason = "vector loads and stores")]
#![allow(clippy::needless_range_loop, reason = "loops over registers read like the tile when they count")]

use super::super::avx2::{prefetch_line, read_ahead, read_shelf, sum4, with_ahead, with_hint};
use super::super::avx512::{halve, sum16, transpose16};
use super::super::nf4::Nf4;
use super::super::nf4::avx512::scales64;
use super::columns::each_tile;
use super::{BLOCK, Columns, GROUP, Hidden, Int8, Panel, Place, Q8, Q8Row, QUAD, QUADS, Rows, TILE};
use std::arch::x86_64::*;

/// Rows of a panel: two vectors.
pub(crate) const LANES: usize = 32;
/// Tokens that a tile takes at once: 24 sums of 16, and the weights, stay in registers.
const TOKENS: usize = 12;

/// The codebook, 128 too large, four times over.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn book(w: &Nf4) -> __m512i {
    // SAFETY: the codes are an array of 16 bytes.
    let codes = unsafe { _mm_loadu_si128(w.codebook().codes.as_ptr().cast()) };
    _mm512_broadcast_i32x4(_mm_xor_si128(codes, _mm_set1_epi8(-128)))
}

/// The codes of 32 packed bytes: those of the high halves, then those of the low ones. The look-up sees six bits of a
/// byte; as the book repeats after four, the others need not be cleared.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn look_up(book: __m512i, shifts: __m512i, packed: &[u8; 32]) -> __m512i {
    // SAFETY: `packed` is an array of 32 bytes.
    let bytes = _mm512_broadcast_i64x4(unsafe { _mm256_loadu_si256(packed.as_ptr().cast()) });
    _mm512_permutexvar_epi8(_mm512_srlv_epi16(bytes, shifts), book)
}

/// By 4 in the lower half, by 0 in the upper one.
#[inline]
#[target_feature(enable = "avx512f")]
fn shifts() -> __m512i {
    _mm512_inserti64x4::<1>(_mm512_set1_epi16(4), _mm256_setzero_si256())
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load<T>(array: &[T]) -> __m512i {
    assert!(size_of_val(array) == 64);
    // SAFETY: checked above; any 64 bytes will do.
    unsafe { _mm512_loadu_si512(array.as_ptr().cast()) }
}

/// See [`super::super::Table::q8_nf4_matvec`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi,avx2")]
pub(crate) fn nf4_matvec(w: &Nf4, row: usize, x: Q8Row, y: &mut [f32]) {
    with_hint!(nf4_rows(w, row, x, y));
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi,avx2")]
fn nf4_rows<const HINT: i32>(w: &Nf4, row: usize, x: Q8Row, y: &mut [f32]) {
    let (book, shifts, unit) = (book(w), shifts(), w.codebook().unit);
    let scales = |group: usize, out: &mut [f32]| scales64(w, group, out);
    super::each_row(w, row, x, y, scales, |mut rows, y| {
        // Four at once: what begins and ends a row takes as long as some blocks.
        let (fours, rest) = y.as_chunks_mut::<4>();
        for y in fours {
            let [a, b, c, d] = dots4::<HINT>(book, shifts, rows.take(4));
            let sums = sum4([halve(a), halve(b), halve(c), halve(d)]);
            // SAFETY: `y` is an array of four floats.
            unsafe { _mm_storeu_ps(y.as_mut_ptr(), _mm_mul_ps(sums, _mm_set1_ps(unit))) };
        }
        for y in rest {
            let Rows { packed, factors, x, .. } = rows.take(1);
            // Two sums that change places: each addition waits for the one before the last only.
            let (mut this, mut other) = (_mm512_setzero_ps(), _mm512_setzero_ps());
            for ((packed, factor), (codes, start)) in packed.iter().zip(factors).zip(x.codes.iter().zip(x.starts)) {
                read_ahead::<HINT>(packed.as_ptr());
                (this, other) = (other, add_nf4(this, book, shifts, packed, *factor, codes, *start));
            }
            *y = sum16(_mm512_add_ps(this, other)) * unit;
        }
    });
}

/// Four rows, each as a sum of 16 lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
fn dots4<const HINT: i32>(book: __m512i, shifts: __m512i, rows: Rows) -> [__m512; 4] {
    let Rows { packed, factors, x, .. } = rows;
    let n = x.codes.len();
    assert!(packed.len() == 4 * n && factors.len() == 4 * n);
    let mut sums = [_mm512_setzero_ps(); 4];
    for (block, (codes, start)) in x.codes.iter().zip(x.starts).enumerate() {
        // Memory is asked for in its own order, not row by row.
        read_ahead::<HINT>(packed.as_ptr().wrapping_add(4 * block).cast());
        read_ahead::<HINT>(packed.as_ptr().wrapping_add(4 * block + 2).cast());
        for r in 0..4 {
            let at = r * n + block;
            sums[r] = add_nf4(sums[r], book, shifts, &packed[at], factors[at], codes, *start);
        }
    }
    sums
}

/// [`add_block`] for 64 weights of 4 bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
fn add_nf4(
    sum: __m512,
    book: __m512i,
    shifts: __m512i,
    packed: &[u8; 32],
    factor: f32,
    codes: &[i8; BLOCK],
    start: i32,
) -> __m512 {
    let start = _mm512_zextsi128_si512(_mm_cvtsi32_si128(start));
    add_block(sum, look_up(book, shifts, packed), codes, start, factor)
}

/// `sum + factor (start + w . x)`, lane by lane.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_block(sum: __m512, w: __m512i, x: &[i8; BLOCK], start: __m512i, factor: f32) -> __m512 {
    let dot = _mm512_dpbusd_epi32(start, w, load(x));
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(factor), sum)
}

/// See [`super::super::Table::q8_int8_matvec`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn int8_matvec(w: &Int8, row: usize, x: Q8Row, y: &mut [f32]) {
    with_ahead!(int8_rows(w, row, x, y));
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn int8_rows<const HINT: i32>(w: &Int8, row: usize, x: Q8Row, y: &mut [f32], ahead: usize) {
    let sign = _mm512_set1_epi8(-128);
    // The same for every row, so the sum of all blocks serves.
    let surplus: f32 = x.starts.iter().zip(x.units).map(|(start, unit)| *start as f32 * unit).sum();
    for (i, y) in y.iter_mut().enumerate() {
        let (mut this, mut other) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        for ((w, codes), unit) in w.row(row + i).iter().zip(x.codes).zip(x.units) {
            prefetch_line::<HINT>(w.as_ptr().wrapping_add(ahead).cast());
            let w = _mm512_xor_si512(load(w), sign);
            (this, other) = (other, add_block(this, w, codes, _mm512_setzero_si512(), *unit));
        }
        *y = (sum16(_mm512_add_ps(this, other)) + surplus) * w.scale(row + i);
    }
}

/// See [`super::super::Table::q8_add_columns`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn add_columns(w: &Columns, row: usize, h: &[Hidden], y: &mut [f32]) {
    let sign = _mm512_set1_epi8(-128);
    each_tile(w, row, h, y, |quads, scales, y| {
        let mut sums = [_mm512_setzero_ps(); TILE / 16];
        read_shelf(scales.as_ptr().cast());
        for (quads, h) in quads.chunks(GROUP / QUAD).zip(h) {
            let h = h.get();
            let mut dots = [_mm512_set1_epi32(h.start); TILE / 16];
            for (quad, codes) in quads.iter().zip(h.codes) {
                let codes = _mm512_set1_epi32(codes);
                for (dot, w) in dots.iter_mut().zip(quad.as_chunks::<64>().0) {
                    read_shelf(w.as_ptr());
                    *dot = _mm512_dpbusd_epi32(*dot, _mm512_xor_si512(load(w), sign), codes);
                }
            }
            for (sum, dot) in sums.iter_mut().zip(dots) {
                *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(h.unit), *sum);
            }
        }
        for ((y, scales), sum) in y.as_chunks_mut::<16>().0.iter_mut().zip(scales.as_chunks::<16>().0).zip(sums) {
            // SAFETY: `scales` is 16 times two bytes, `y` an array of 16 floats.
            unsafe {
                let scales = _mm512_cvtepu16_epi32(_mm256_loadu_si256(scales.as_ptr().cast()));
                let scales = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(scales));
                _mm512_storeu_ps(y.as_mut_ptr(), _mm512_fmadd_ps(sum, scales, _mm512_loadu_ps(y.as_ptr())));
            }
        }
    });
}

/// See [`super::super::Table::q8_pack_nf4`].
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
pub(crate) fn pack_nf4(w: &Nf4, blocks: usize, at: Place, panel: Panel) {
    let (book, shifts, unit) = (book(w), shifts(), w.codebook().unit);
    let group = |lane: usize, b: usize| (at.row + lane) * blocks + at.block + b;
    pack(at, panel.codes, |lane, b| look_up(book, shifts, &w.packed64(group(lane, b))[0]));
    super::fill_scales::<LANES>(at, panel.scales, |lane, b| w.scale64(group(lane, b)) * unit);
}

/// See [`super::super::Table::q8_pack_int8`].
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn pack_int8(w: &Int8, at: Place, panel: Panel) {
    let sign = _mm512_set1_epi8(-128);
    pack(at, panel.codes, |lane, b| _mm512_xor_si512(load(&w.row(at.row + lane)[at.block + b]), sign));
    super::fill_scales::<LANES>(at, panel.scales, |lane, _| w.scale(at.row + lane));
}

/// Turns rows into lanes. `get(lane, block)` returns 64 codes of a row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn pack(at: Place, codes: &mut [u8], get: impl Fn(usize, usize) -> __m512i) {
    for (b, codes) in codes.as_chunks_mut::<{ BLOCK * LANES }>().0.iter_mut().take(at.blocks).enumerate() {
        for half in 0..2 {
            let mut rows = [_mm512_setzero_si512(); 16];
            for (i, row) in rows.iter_mut().enumerate().take(at.rows.saturating_sub(16 * half)) {
                *row = get(16 * half + i, b);
            }
            let quads = transpose16(rows);
            for (quad, lanes) in quads.into_iter().enumerate() {
                let to = &mut codes[quad * QUAD * LANES + 64 * half..][..64];
                // SAFETY: the slice has 64 bytes.
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), lanes) };
            }
        }
    }
}

/// See [`super::super::Table::q8_tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn tile(panel: Panel, x: &Q8, at: Place, c: &mut [&mut [f32]], col: usize) {
    let mut t = 0;
    while t < c.len() {
        let left = c.len() - t;
        let count = [TOKENS, 8, 4, 2, 1].into_iter().find(|n| *n <= left).unwrap_or(1);
        let c = &mut c[t..t + count];
        match count {
            TOKENS => tokens::<TOKENS>(&panel, x, t, at, c, col),
            8 => tokens::<8>(&panel, x, t, at, c, col),
            4 => tokens::<4>(&panel, x, t, at, c, col),
            2 => tokens::<2>(&panel, x, t, at, c, col),
            _ => tokens::<1>(&panel, x, t, at, c, col),
        }
        t += count;
    }
}

/// `M` tokens from `t` on with all rows of the panel.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tokens<const M: usize>(panel: &Panel, x: &Q8, t: usize, at: Place, c: &mut [&mut [f32]], col: usize) {
    let rows: [Q8Row; M] = std::array::from_fn(|m| x.row(t + m));
    // In memory, for they are touched once a block: the registers belong to the integer sums.
    let mut sums = [[0.0; LANES]; M];
    let blocks = panel.codes.as_chunks::<{ BLOCK * LANES }>().0.iter().zip(panel.scales.as_chunks::<LANES>().0);
    for (b, (w, scales)) in blocks.take(at.blocks).enumerate() {
        let codes: [*const i8; M] = std::array::from_fn(|m| rows[m].codes[at.block + b].as_ptr());
        let mut dots = [[_mm512_setzero_si512(); 2]; M];
        for m in 0..M {
            dots[m] = [_mm512_set1_epi32(rows[m].starts[at.block + b]); 2];
        }
        for quad in 0..QUADS {
            // SAFETY: `w` holds 16 quads of 128 bytes, each row of codes 16 quads of 4.
            unsafe {
                let w = w.as_ptr().add(quad * QUAD * LANES);
                let w = [_mm512_loadu_si512(w.cast()), _mm512_loadu_si512(w.add(64).cast())];
                for m in 0..M {
                    let x = _mm512_set1_epi32(codes[m].add(QUAD * quad).cast::<i32>().read_unaligned());
                    for j in 0..2 {
                        dots[m][j] = _mm512_dpbusd_epi32(dots[m][j], w[j], x);
                    }
                }
            }
        }
        for m in 0..M {
            let unit = _mm512_set1_ps(rows[m].units[at.block + b]);
            for j in 0..2 {
                // SAFETY: `scales` and `sums[m]` are arrays of 32 floats.
                unsafe {
                    let scale = _mm512_mul_ps(_mm512_loadu_ps(scales.as_ptr().add(16 * j)), unit);
                    let sum = sums[m].as_mut_ptr().add(16 * j);
                    _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[m][j]), scale, _mm512_loadu_ps(sum)));
                }
            }
        }
    }
    for (c, sums) in c.iter_mut().zip(&sums) {
        c[col..][..at.rows].iter_mut().zip(sums).for_each(|(c, sum)| *c += sum);
    }
}
