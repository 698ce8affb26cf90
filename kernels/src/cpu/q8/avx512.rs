//! 8-bit products with AVX-512 VNNI: weights 128 too large, so that they are unsigned as `dpbusd` wants its first
//! operand; what that adds too much depends on the activations alone and is taken off once a row. Codes are looked up with
//! VBMI. With one token, two blocks are taken at once, for which the activations lie in pairs of blocks. Short rows lie one
//! behind the other in memory and are walked that way, by loops whose length is known at compile time.

#![allow(unsafe_code, reason = "vector loads and stores")]
#![allow(clippy::needless_range_loop, reason = "loops over registers read like the tile when they count")]

use super::super::avx2::{prefetch_line, read_shelf, sum4, with_hint};
use super::super::avx512::{halve, halves, sum16, transpose16};
use super::super::nf4::Nf4;
use super::super::nf4::avx512::scales64;
use super::avx2::{first_lane, scaled};
use super::columns::{Block, each_tile};
use super::{BLOCK, Down, GROUP, Hidden, Int8, Pair, Panel, Place, Q8, Q8Row, QUAD, QUADS, Rows, TILE, Up};
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
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2")]
pub(crate) fn nf4_matvec(w: &Nf4, row: usize, x: Q8Row, y: &mut [f32]) {
    with_hint!(nf4_rows(w, row, x, y));
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2")]
fn nf4_rows<const HINT: i32>(w: &Nf4, row: usize, x: Q8Row, y: &mut [f32], ahead: usize) {
    let (book, unit) = (book(w), w.codebook().unit);
    let scales = |group: usize, out: &mut [f32]| scales64(w, group, out);
    super::each_row(w, row, x, y, scales, |rows, y| {
        // The loops over short rows have their length at compile time: around so little work, counting costs a third.
        macro_rules! short {
            ($($blocks:literal)*) => {
                match rows.x.units.len() {
                    $($blocks => short_rows::<HINT, $blocks>(book, rows, y, ahead),)*
                    _ => long_rows::<HINT>(book, rows, y, ahead),
                }
            };
        }
        short!(4 5 6 7 8 9 10 11 12 13 14 15 16);
        y.iter_mut().for_each(|y| *y *= unit);
    });
}

/// Rows of `N` blocks, one behind the other, as memory has them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2")]
fn short_rows<const HINT: i32, const N: usize>(book: __m512i, rows: Rows, y: &mut [f32], ahead: usize) {
    let mut rows_left = rows.packed.as_chunks::<N>().0.iter().zip(rows.factors.as_chunks::<N>().0);
    let (pairs, odd) = rows.x.pairs.split_at(N / 2);
    // Four at once: what ends a row takes as long as some blocks.
    for y in y.chunks_mut(4) {
        let mut sums = [_mm256_setzero_ps(); 4];
        for (sum, (packed, factors)) in sums[..y.len()].iter_mut().zip(&mut rows_left) {
            let mut turns = [_mm512_setzero_ps(); 2];
            let parts = packed.as_chunks().0.iter().zip(factors.as_chunks().0).zip(pairs);
            for (i, ((packed, factors), pair)) in parts.enumerate() {
                prefetch_line::<HINT>(packed.as_ptr().wrapping_byte_add(ahead).cast());
                turns[i % 2] = add_pair(turns[i % 2], book, packed, factors, pair);
            }
            if let ([packed], [factor], Some(pair)) =
                (packed.as_chunks::<2>().1, factors.as_chunks::<2>().1, odd.first())
            {
                prefetch_line::<HINT>(packed.as_ptr().wrapping_byte_add(ahead).cast());
                turns[1] = add_single(turns[1], book, packed, *factor, pair);
            }
            *sum = halve(_mm512_add_ps(turns[0], turns[1]));
        }
        store(sum4(sums), y);
    }
}

/// Rows of any length, four side by side, so that each load of the activations serves four times.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2")]
fn long_rows<const HINT: i32>(book: __m512i, rows: Rows, y: &mut [f32], ahead: usize) {
    let Rows { packed, factors, x, .. } = rows;
    let n = x.units.len();
    assert!(packed.len() == y.len() * n && factors.len() == y.len() * n && x.pairs.len() >= n.div_ceil(2));
    for (i, y) in y.chunks_mut(4).enumerate() {
        let mut sums = [_mm512_setzero_ps(); 4];
        // Without four rows left, some are read again, and what comes of it is not stored.
        let starts: [usize; 4] = std::array::from_fn(|r| (4 * i + r.min(y.len() - 1)) * n);
        // Memory is asked for in its own order, not row by row.
        let line = |i: usize| packed.as_ptr().wrapping_add(starts[0] + 2 * i).wrapping_byte_add(ahead).cast();
        for (b, pair) in x.pairs[..n / 2].iter().enumerate() {
            for (r, start) in starts.into_iter().enumerate() {
                prefetch_line::<HINT>(line(4 * b + r));
                let at = start + 2 * b;
                let (packed, factors) = (&packed[at..][..2], &factors[at..][..2]);
                if let (Some(packed), Some(factors)) = (packed.first_chunk(), factors.first_chunk()) {
                    sums[r] = add_pair(sums[r], book, packed, factors, pair);
                }
            }
        }
        if !n.is_multiple_of(2) {
            // The last blocks of four rows: two lines.
            prefetch_line::<HINT>(line(2 * n - 2));
            prefetch_line::<HINT>(line(2 * n - 1));
            for (sum, start) in sums.iter_mut().zip(starts) {
                let at = start + n - 1;
                *sum = add_single(*sum, book, &packed[at], factors[at], &x.pairs[n / 2]);
            }
        }
        let [a, b, c, d] = sums;
        store(sum4([halve(a), halve(b), halve(c), halve(d)]), y);
    }
}

/// As many lanes as `y` has elements, at most four.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn store(sums: __m128, y: &mut [f32]) {
    // SAFETY: lanes from `y.len()` on are not written.
    unsafe { _mm_mask_storeu_ps(y.as_mut_ptr(), (1 << y.len().min(4)) - 1, sums) };
}

/// [`add_dots`] of two blocks as they are stored.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
fn add_pair(sum: __m512, book: __m512i, packed: &[[u8; BLOCK / 2]; 2], factors: &[f32; 2], x: &Pair) -> __m512 {
    // For the lower half of a register the first factor, for the upper half the second.
    let which = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    // SAFETY: an array of eight bytes; any alignment will do.
    let both = unsafe { factors.as_ptr().cast::<f64>().read_unaligned() };
    let factors = _mm512_permutevar_ps(_mm512_castpd_ps(_mm512_set1_pd(both)), which);
    add_dots(sum, book, load(packed.as_flattened()), x, factors)
}

/// The same of one without a neighbour, beside zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
fn add_single(sum: __m512, book: __m512i, packed: &[u8; BLOCK / 2], factor: f32, x: &Pair) -> __m512 {
    // SAFETY: an array of 32 bytes.
    let packed = _mm512_zextsi256_si512(unsafe { _mm256_loadu_si256(packed.as_ptr().cast()) });
    add_dots(sum, book, packed, x, _mm512_set1_ps(factor))
}

/// `sum + factors (starts + w . x)`, lane by lane, for two blocks of 4 bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
fn add_dots(sum: __m512, book: __m512i, packed: __m512i, x: &Pair, factors: __m512) -> __m512 {
    // Not cleared either: see `look_up`.
    let (even, odd) = (_mm512_srli_epi16::<4>(packed), packed);
    let [even, odd] = [even, odd].map(|codes| _mm512_permutexvar_epi8(codes, book));
    // SAFETY: an array of 64 bytes.
    let starts = unsafe { _mm512_loadu_si512(x.starts.as_ptr().cast()) };
    let dots = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(starts, even, load(&x.even)), odd, load(&x.odd));
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), factors, sum)
}

/// `sum + factor (w . x)`, lane by lane.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_block(sum: __m512, w: __m512i, x: &[i8; BLOCK], factor: f32) -> __m512 {
    let dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, load(x));
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(factor), sum)
}

/// See [`super::super::Table::q8_int8_matvec`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn int8_matvec(w: &Int8, row: usize, x: Q8Row, y: &mut [f32]) {
    with_hint!(int8_rows(w, row, x, y));
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
            (this, other) = (other, add_block(this, w, codes, *unit));
        }
        *y = (sum16(_mm512_add_ps(this, other)) + surplus) * w.scale(row + i);
    }
}

/// See [`super::super::Table::q8_down`]. A row's octet is in two lanes.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2")]
pub(crate) fn down(w: &Down, tile: usize, x: Q8Row, y: &mut [f32; GROUP]) {
    let sign = _mm512_set1_epi8(-128);
    let (blocks, scales) = w.blocks(tile, x);
    let mut sum = _mm512_setzero_ps();
    for Block { octets, codes, start, unit } in blocks {
        let mut dots = [_mm512_set1_epi64(first_lane(start)), _mm512_setzero_si512()];
        for (i, (w, x)) in octets.iter().zip(codes).enumerate() {
            read_shelf(w.as_ptr().cast());
            let x = _mm512_set1_epi64(i64::from_le_bytes(x.map(i8::cast_unsigned)));
            dots[i % 2] = _mm512_dpbusd_epi32(dots[i % 2], _mm512_xor_si512(load(w), sign), x);
        }
        let dots = _mm512_cvtepi32_ps(_mm512_add_epi32(dots[0], dots[1]));
        sum = _mm512_fmadd_ps(dots, _mm512_set1_ps(unit), sum);
    }
    scaled(halves(sum), scales, y);
}

/// See [`super::super::Table::q8_add_columns`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn add_columns(w: &Up, row: usize, h: &[Hidden], y: &mut [f32]) {
    let sign = _mm512_set1_epi8(-128);
    each_tile(w, row, h, y, |quads, scales, y| {
        let mut sums = [_mm512_setzero_ps(); TILE / 16];
        read_shelf(scales.as_ptr().cast());
        for (quads, h) in quads.chunks(GROUP / QUAD).zip(h) {
            let h = h.get();
            let mut dots = [_mm512_set1_epi32(h.start); TILE / 16];
            for (quad, codes) in quads.iter().zip(h.codes) {
                let codes = _mm512_set1_epi32(codes);
                for (dot, w) in dots.iter_mut().zip(quad.as_flattened().as_chunks::<64>().0) {
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
