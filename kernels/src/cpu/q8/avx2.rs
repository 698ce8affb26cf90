//! 8-bit products with AVX2, made of `maddubs`, which wants one side unsigned and saturates beyond 16 bits.
//!
//! Where both sides have 8 bits, signs move to the other side: no pair of products exceeds 2 * 127 * 127. Panels of NF4,
//! which the products of many tokens are made of, have codes of 7 bits instead, 64 too large: then signs cost nothing,
//! and what is too much is taken off as with `dpbusd`. This saves a quarter of the instructions. The weights are then off
//! by 0.95 % of their norm where 8 bits would be off by 0.59 %; NF4 itself is off by 9 %.

#![allow(unsafe_code, reason = "vector loads and stores")]
#![allow(clippy::needless_range_loop, reason = "loops over registers read like the tile when they count")]

use super::super::avx2::{prefetch_line, read_shelf, sum1, sum4, with_hint};
use super::super::nf4::{Codebook, Nf4};
use super::columns::{Block, Scales, each_tile};
use super::portable::TINY;
use super::{BLOCK, Down, GROUP, Hidden, Int8, Panel, Place, Q8, Q8Mut, Q8Row, QUAD, QUADS, Rows, TILE, Up};
use std::arch::x86_64::*;

/// Rows of a panel: two vectors.
pub(crate) const LANES: usize = 16;
/// Tokens that a tile takes at once.
const TOKENS: usize = 4;
/// What makes codes of 7 bits unsigned.
const LIFT: i8 = 64;
/// See [`super::super::Table::q8_quantize`].
#[target_feature(enable = "avx2,fma")]
pub(crate) fn quantize(x: &[f32], q: Q8Mut) {
    let parts = q.codes.iter_mut().zip(q.units).zip(q.starts);
    for (x, ((codes, unit), start)) in x.as_chunks::<BLOCK>().0.iter().zip(parts) {
        // SAFETY: `x` is an array of 64 floats.
        let v: [__m256; 8] = std::array::from_fn(|i| unsafe { _mm256_loadu_ps(x.as_ptr().add(8 * i)) });
        let magnitude = |v| _mm256_andnot_ps(_mm256_set1_ps(-0.0), v);
        // The difference of a NaN or an infinity with itself is NaN, and so stays their sum.
        let (mut most, mut odd) = (_mm256_setzero_ps(), _mm256_setzero_ps());
        for v in v {
            most = _mm256_max_ps(most, magnitude(v));
            odd = _mm256_add_ps(odd, _mm256_sub_ps(v, v));
        }
        let mut lanes = [0.0; 8];
        // SAFETY: `lanes` is an array of 8 floats.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), most) };
        let largest = lanes.iter().fold(0.0_f32, |m, x| m.max(*x));
        let broken = sum1(odd).is_nan();
        *unit = if broken { f32::NAN } else { if largest < TINY { 0.0 } else { largest / 127.0 } };
        let inverse = if *unit > 0.0 { 127.0 / largest } else { 0.0 };
        let inverse = _mm256_set1_ps(inverse);
        let mut packed = [_mm256_setzero_si256(); 2];
        for (half, packed) in packed.iter_mut().enumerate() {
            let n: [__m256i; 4] = std::array::from_fn(|i| _mm256_cvtps_epi32(_mm256_mul_ps(v[4 * half + i], inverse)));
            // Packing works within 128-bit lanes: quads come out as 0 2 4 6 1 3 5 7.
            let n = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
            let n = _mm256_permutevar8x32_epi32(n, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
            // Even elements to the front of each lane, then to the front of all.
            let order =
                _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
            *packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_shuffle_epi8(n, order));
        }
        let keep = if broken { _mm256_setzero_si256() } else { _mm256_set1_epi8(-1) };
        let even = _mm256_and_si256(keep, _mm256_permute2x128_si256::<0x20>(packed[0], packed[1]));
        let odd = _mm256_and_si256(keep, _mm256_permute2x128_si256::<0x31>(packed[0], packed[1]));
        let mut sum = _mm256_setzero_si256();
        for (codes, half) in codes.as_chunks_mut::<32>().0.iter_mut().zip([even, odd]) {
            // SAFETY: `codes` is an array of 32 bytes.
            unsafe { _mm256_storeu_si256(codes.as_mut_ptr().cast(), half) };
            let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), half);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(-128)));
        }
        let mut lanes = [0; 8];
        // SAFETY: `lanes` is an array of 8 integers.
        unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sum) };
        *start = lanes.iter().sum();
    }
}

/// Products of unsigned with signed bytes, summed by fours.
#[inline]
#[target_feature(enable = "avx2")]
fn fours(unsigned: __m256i, signed: __m256i) -> __m256i {
    _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned, signed), _mm256_set1_epi16(1))
}

/// Products of signed bytes, summed by fours.
#[inline]
#[target_feature(enable = "avx2")]
fn dot(w: __m256i, x: __m256i, magnitude: __m256i) -> __m256i {
    fours(magnitude, _mm256_sign_epi8(w, x))
}

/// The codes of 32 packed bytes: those of the high halves, then those of the low ones.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn look_up(book: __m256i, packed: &[u8; 32]) -> [__m256i; 2] {
    // SAFETY: `packed` is an array of 32 bytes.
    let bytes = unsafe { _mm256_loadu_si256(packed.as_ptr().cast()) };
    let low = _mm256_set1_epi8(15);
    [_mm256_srli_epi16::<4>(bytes), bytes].map(|b| _mm256_shuffle_epi8(book, _mm256_and_si256(b, low)))
}

/// The codebook in both lanes.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn book(codebook: &Codebook) -> __m256i {
    // SAFETY: the codes are an array of 16 bytes.
    _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(codebook.codes.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load32(codes: &[i8; BLOCK], half: usize) -> __m256i {
    let half = &codes[32 * half..][..32];
    // SAFETY: the slice has 32 bytes.
    unsafe { _mm256_loadu_si256(half.as_ptr().cast()) }
}

/// See [`super::super::Table::q8_nf4_matvec`].
#[target_feature(enable = "avx2,fma")]
pub(crate) fn nf4_matvec(w: &Nf4, row: usize, x: Q8Row, y: &mut [f32]) {
    with_hint!(nf4_rows(w, row, x, y));
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn nf4_rows<const HINT: i32>(w: &Nf4, row: usize, x: Q8Row, y: &mut [f32], ahead: usize) {
    let (book, unit) = (book(w.codebook()), w.codebook().unit);
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
            for ((packed, factor), codes) in packed.iter().zip(factors).zip(x.codes) {
                prefetch_line::<HINT>(packed.as_ptr().wrapping_byte_add(ahead).cast());
                (this, other) = (other, add_block(this, look_up(book, packed), codes, *factor));
            }
            *y = sum1(_mm256_add_ps(this, other)) * unit;
        }
    });
}

/// Four rows, each as a sum of 8 lanes.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn dots4<const HINT: i32>(book: __m256i, rows: Rows, ahead: usize) -> [__m256; 4] {
    let Rows { packed, factors, x, .. } = rows;
    let n = x.codes.len();
    assert!(packed.len() == 4 * n && factors.len() == 4 * n);
    let mut sums = [_mm256_setzero_ps(); 4];
    for (block, codes) in x.codes.iter().enumerate() {
        // Memory is asked for in its own order, not row by row.
        prefetch_line::<HINT>(packed.as_ptr().wrapping_add(4 * block).wrapping_byte_add(ahead).cast());
        prefetch_line::<HINT>(packed.as_ptr().wrapping_add(4 * block + 2).wrapping_byte_add(ahead).cast());
        for r in 0..4 {
            let at = r * n + block;
            sums[r] = add_block(sums[r], look_up(book, &packed[at]), codes, factors[at]);
        }
    }
    sums
}

/// `sum + factor (w . x)`, lane by lane.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_block(sum: __m256, w: [__m256i; 2], x: &[i8; BLOCK], factor: f32) -> __m256 {
    let [low, high] = [load32(x, 0), load32(x, 1)];
    let dots = _mm256_add_epi32(dot(w[0], low, _mm256_abs_epi8(low)), dot(w[1], high, _mm256_abs_epi8(high)));
    _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), _mm256_set1_ps(factor), sum)
}

/// See [`super::super::Table::q8_int8_matvec`].
#[target_feature(enable = "avx2,fma")]
pub(crate) fn int8_matvec(w: &Int8, row: usize, x: Q8Row, y: &mut [f32]) {
    with_hint!(int8_rows(w, row, x, y));
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn int8_rows<const HINT: i32>(w: &Int8, row: usize, x: Q8Row, y: &mut [f32], ahead: usize) {
    for (i, y) in y.iter_mut().enumerate() {
        let (mut this, mut other) = (_mm256_setzero_ps(), _mm256_setzero_ps());
        for ((w, codes), unit) in w.row(row + i).iter().zip(x.codes).zip(x.units) {
            prefetch_line::<HINT>(w.as_ptr().wrapping_add(ahead).cast());
            // SAFETY: `w` is an array of 64 bytes.
            let w = [0, 32].map(|at| unsafe { _mm256_loadu_si256(w.as_ptr().add(at).cast()) });
            (this, other) = (other, add_block(this, w, codes, *unit));
        }
        *y = sum1(_mm256_add_ps(this, other)) * w.scale(row + i);
    }
}

/// Defines `down` and `add_columns` for vectors of 256 bits, given what sums begin with and `fn add(sum, w, codes)` for eight
/// rows. A function may use the instructions of its own `$features` only, which is why they are written out for each.
macro_rules! define_columns {
    ($features:literal, $start:expr, $add:path) => {
        /// See [`super::super::Table::q8_down`].
        #[target_feature(enable = $features)]
        pub(crate) fn down(w: &Down, tile: usize, x: Q8Row, y: &mut [f32; GROUP]) {
            let (blocks, scales) = w.blocks(tile, x);
            // A row's octet is in two lanes.
            let mut sums = [_mm256_setzero_ps(); 2];
            for Block { octets, codes, start, unit } in blocks {
                let mut dots = [_mm256_set1_epi64x(first_lane($start(start))); 2];
                for (w, x) in octets.iter().zip(codes) {
                    read_shelf(w.as_ptr().cast());
                    let x = _mm256_set1_epi64x(i64::from_le_bytes(x.map(i8::cast_unsigned)));
                    for (dot, w) in dots.iter_mut().zip(w.as_flattened().as_chunks::<32>().0) {
                        // SAFETY: `w` is an array of 32 bytes.
                        *dot = $add(*dot, unsafe { _mm256_loadu_si256(w.as_ptr().cast()) }, x);
                    }
                }
                for (sum, dot) in sums.iter_mut().zip(dots) {
                    *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(unit), *sum);
                }
            }
            scaled(sums, scales, y);
        }

        /// See [`super::super::Table::q8_add_columns`].
        #[target_feature(enable = $features)]
        pub(crate) fn add_columns(w: &Up, row: usize, h: &[Hidden], y: &mut [f32]) {
            each_tile(w, row, h, y, |quads, scales, y| {
                let mut sums = [_mm256_setzero_ps(); TILE / 8];
                read_shelf(scales.as_ptr().cast());
                for (quads, h) in quads.chunks(GROUP / QUAD).zip(h) {
                    let h = h.get();
                    let mut dots = [_mm256_set1_epi32($start(h.start)); TILE / 8];
                    for (quad, codes) in quads.iter().zip(h.codes) {
                        read_shelf(quad.as_ptr().cast());
                        read_shelf(quad[TILE / 2..].as_ptr().cast());
                        let codes = _mm256_set1_epi32(codes);
                        for (dot, w) in dots.iter_mut().zip(quad.as_flattened().as_chunks::<32>().0) {
                            // SAFETY: `w` is an array of 32 bytes.
                            *dot = $add(*dot, unsafe { _mm256_loadu_si256(w.as_ptr().cast()) }, codes);
                        }
                    }
                    for (sum, dot) in sums.iter_mut().zip(dots) {
                        *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(h.unit), *sum);
                    }
                }
                add_scaled(sums, scales, y);
            });
        }
    };
}
pub(super) use define_columns;

define_columns!("avx2,fma", |_: i32| 0, add_quad);

/// `sum` and the products of a quad of eight rows with `codes`.
#[inline]
#[target_feature(enable = "avx2")]
fn add_quad(sum: __m256i, w: __m256i, codes: __m256i) -> __m256i {
    _mm256_add_epi32(sum, dot(w, codes, _mm256_abs_epi8(codes)))
}

/// `y += scales sums` for a tile of rows.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn add_scaled(sums: [__m256; TILE / 8], scales: &Scales<TILE>, y: &mut [f32; TILE]) {
    for ((y, scales), sum) in y.as_chunks_mut::<8>().0.iter_mut().zip(scales.as_chunks::<8>().0).zip(sums) {
        // SAFETY: `y` is an array of 8 floats.
        unsafe { _mm256_storeu_ps(y.as_mut_ptr(), _mm256_fmadd_ps(sum, widen(scales), _mm256_loadu_ps(y.as_ptr()))) };
    }
}

/// `y = scales sums` for eight rows, with the sums of each in two neighbouring lanes.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn scaled(sums: [__m256; 2], scales: &Scales<GROUP>, y: &mut [f32; GROUP]) {
    // Adding neighbours works within 128-bit lanes: pairs of rows come out as 0 2 1 3.
    let pairs = _mm256_castps_pd(_mm256_hadd_ps(sums[0], sums[1]));
    let rows = _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(pairs));
    // SAFETY: `y` is an array of 8 floats.
    unsafe { _mm256_storeu_ps(y.as_mut_ptr(), _mm256_mul_ps(rows, widen(scales))) };
}

/// `start` in the first of two lanes.
#[inline(always)]
pub(super) fn first_lane(start: i32) -> i64 {
    i64::from(start.cast_unsigned())
}

/// Eight bf16.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(scales: &[[u8; 2]; 8]) -> __m256 {
    // SAFETY: `scales` is 8 times two bytes.
    let scales = unsafe { _mm_loadu_si128(scales.as_ptr().cast()) };
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(scales)))
}

/// See [`super::super::Table::q8_pack_nf4`].
#[target_feature(enable = "avx2")]
pub(crate) fn pack_nf4(w: &Nf4, blocks: usize, at: Place, panel: Panel) {
    let codebook = w.narrow_codebook();
    let lifted = _mm256_add_epi8(book(codebook), _mm256_set1_epi8(LIFT));
    unfold_nf4(w, lifted, codebook.unit, blocks, at, panel);
}

/// See [`super::super::Table::q8_pack_int8`].
#[target_feature(enable = "avx2")]
pub(crate) fn pack_int8(w: &Int8, at: Place, panel: Panel) {
    unfold_int8(w, _mm256_setzero_si256(), at, panel);
}

/// Fills a panel with the codes that `book` holds, each worth `unit`.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn unfold_nf4(w: &Nf4, book: __m256i, unit: f32, blocks: usize, at: Place, panel: Panel) {
    let group = |lane: usize, b: usize| (at.row + lane) * blocks + at.block + b;
    turn(at, panel.codes, |lane, b| look_up(book, &w.packed64(group(lane, b))[0]));
    super::fill_scales::<LANES>(at, panel.scales, |lane, b| w.scale64(group(lane, b)) * unit);
}

/// Fills a panel with codes whose bits are those of `flip` different from the weight's.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn unfold_int8(w: &Int8, flip: __m256i, at: Place, panel: Panel) {
    turn(at, panel.codes, |lane, b| {
        let codes = &w.row(at.row + lane)[at.block + b];
        // SAFETY: `codes` is an array of 64 bytes.
        [0, 32].map(|half| _mm256_xor_si256(flip, unsafe { _mm256_loadu_si256(codes.as_ptr().add(half).cast()) }))
    });
    super::fill_scales::<LANES>(at, panel.scales, |lane, _| w.scale(at.row + lane));
}

/// Turns rows into lanes. `get(lane, block)` returns 64 codes of a row.
#[inline]
#[target_feature(enable = "avx2")]
fn turn(at: Place, codes: &mut [u8], get: impl Fn(usize, usize) -> [__m256i; 2]) {
    for (b, codes) in codes.as_chunks_mut::<{ BLOCK * LANES }>().0.iter_mut().take(at.blocks).enumerate() {
        for lane in (0..LANES).step_by(8) {
            let mut rows = [[_mm256_setzero_si256(); 8]; 2];
            for i in 0..8.min(at.rows.saturating_sub(lane)) {
                [rows[0][i], rows[1][i]] = get(lane + i, b);
            }
            for (half, rows) in rows.into_iter().enumerate() {
                for (quad, lanes) in transpose8(rows).into_iter().enumerate() {
                    let to = &mut codes[((8 * half + quad) * LANES + lane) * QUAD..][..32];
                    // SAFETY: the slice has 32 bytes.
                    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), lanes) };
                }
            }
        }
    }
}

/// The transpose of 8 by 8 integers of 32 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose8(rows: [__m256i; 8]) -> [__m256i; 8] {
    let mut pairs = [_mm256_setzero_si256(); 8];
    for i in 0..4 {
        pairs[2 * i] = _mm256_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // Columns 0 and 4, 1 and 5, 2 and 6, 3 and 7 of four rows each.
    let mut fours = [[_mm256_setzero_si256(); 4]; 2];
    for (half, fours) in fours.iter_mut().enumerate() {
        for i in 0..2 {
            let (upper, lower) = (pairs[4 * half + i], pairs[4 * half + 2 + i]);
            fours[2 * i] = _mm256_unpacklo_epi64(upper, lower);
            fours[2 * i + 1] = _mm256_unpackhi_epi64(upper, lower);
        }
    }
    let mut columns = [_mm256_setzero_si256(); 8];
    for i in 0..4 {
        columns[i] = _mm256_permute2x128_si256::<0x20>(fours[0][i], fours[1][i]);
        columns[4 + i] = _mm256_permute2x128_si256::<0x31>(fours[0][i], fours[1][i]);
    }
    columns
}

/// See [`super::super::Table::q8_tile`].
#[target_feature(enable = "avx2,fma")]
pub(crate) fn tile(panel: Panel, x: &Q8, at: Place, c: &mut [&mut [f32]], col: usize) {
    any_tokens::<false>(panel, x, at, c, col);
}

/// See [`super::super::Table::q8_tile_int8`].
#[target_feature(enable = "avx2,fma")]
pub(crate) fn tile_int8(panel: Panel, x: &Q8, at: Place, c: &mut [&mut [f32]], col: usize) {
    any_tokens::<true>(panel, x, at, c, col);
}

/// A tile whose weights are `SIGNED` in 8 bits, or else unsigned in 7.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn any_tokens<const SIGNED: bool>(panel: Panel, x: &Q8, at: Place, c: &mut [&mut [f32]], col: usize) {
    let mut t = 0;
    while t < c.len() {
        let count = (c.len() - t).min(TOKENS);
        let c = &mut c[t..t + count];
        match count {
            4 => tokens::<4, SIGNED>(&panel, x, t, at, c, col),
            3 => tokens::<3, SIGNED>(&panel, x, t, at, c, col),
            2 => tokens::<2, SIGNED>(&panel, x, t, at, c, col),
            _ => tokens::<1, SIGNED>(&panel, x, t, at, c, col),
        }
        t += count;
    }
}

/// `M` tokens from `t` on with all rows of the panel.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn tokens<const M: usize, const SIGNED: bool>(
    panel: &Panel,
    x: &Q8,
    t: usize,
    at: Place,
    c: &mut [&mut [f32]],
    col: usize,
) {
    let rows: [Q8Row; M] = std::array::from_fn(|m| x.row(t + m));
    // In memory, for they are touched once a block: the registers belong to the integer sums.
    let mut sums = [[0.0; LANES]; M];
    let blocks = panel.codes.as_chunks::<{ BLOCK * LANES }>().0.iter().zip(panel.scales.as_chunks::<LANES>().0);
    for (b, (w, scales)) in blocks.take(at.blocks).enumerate() {
        let codes: [*const i8; M] = std::array::from_fn(|m| rows[m].codes[at.block + b].as_ptr());
        let mut dots = [[_mm256_setzero_si256(); 2]; M];
        if !SIGNED {
            for m in 0..M {
                // Of -128 times the codes' sum, the part that is due to `LIFT`.
                dots[m] = [_mm256_set1_epi32(rows[m].starts[at.block + b] / (128 / i32::from(LIFT))); 2];
            }
        }
        for quad in 0..QUADS {
            // SAFETY: `w` holds 16 quads of 64 bytes, each row of codes 16 quads of 4.
            unsafe {
                let w = w.as_ptr().add(quad * QUAD * LANES);
                let w = [_mm256_loadu_si256(w.cast()), _mm256_loadu_si256(w.add(32).cast())];
                for m in 0..M {
                    let x = _mm256_set1_epi32(codes[m].add(QUAD * quad).cast::<i32>().read_unaligned());
                    let magnitude = _mm256_abs_epi8(x);
                    for j in 0..2 {
                        let dot = if SIGNED { dot(w[j], x, magnitude) } else { fours(w[j], x) };
                        dots[m][j] = _mm256_add_epi32(dots[m][j], dot);
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
