//! `dpbf16ps` of AVX512-BF16: sixteen lanes that each add two products.

#![allow(unsafe_code, reason = "vector loads and stores")]
#![allow(clippy::needless_range_loop, reason = "loops over registers read like the tile when they count")]

use super::super::avx512::{first_lanes, transpose16};
use super::super::tile::Rows;
use super::{Bf16, Bf16Rows};
use std::arch::x86_64::*;

/// Outputs of a panel: two vectors.
const LANES: usize = 32;
/// Terms in a lane.
const PAIR: usize = 2;
/// Tokens that a tile takes at once: 24 sums of 16, and the weights, stay in registers.
const TOKENS: usize = 12;

pub(crate) static KERNELS: Bf16 = Bf16 { lanes: LANES, group: PAIR, round, pack_rows, pack_cols, tile };

/// See [`Bf16::round`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn round(x: &[f32], y: &mut [u16]) {
    for (x, y) in x.chunks(16).zip(y.chunks_mut(16)) {
        let mask = first_lanes(x.len());
        // SAFETY: the mask keeps both within their slices, which have the same length.
        unsafe {
            let v = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x.as_ptr()));
            _mm256_mask_storeu_epi16(y.as_mut_ptr().cast(), mask, std::mem::transmute::<__m256bh, __m256i>(v));
        }
    }
}

/// Two vectors in bf16, the elements of `low` first.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn round2(low: __m512, high: __m512) -> __m512i {
    let v = _mm512_cvtne2ps_pbh(high, low);
    // SAFETY: both are 64 bytes of plain data.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(v) }
}

/// See [`Bf16::pack_rows`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pack_rows(w: Rows, panel: &mut [u16]) {
    let width = w.width();
    for k in (0..width).step_by(32) {
        let n = (width - k).min(32);
        let masks = (first_lanes(n), first_lanes(n.saturating_sub(16)));
        for half in 0..LANES / 16 {
            let mut lanes = [_mm512_setzero_si512(); 16];
            for (i, lane) in lanes.iter_mut().enumerate().take(w.count().saturating_sub(16 * half)) {
                let row = &w.row(16 * half + i)[k..];
                // SAFETY: the masks keep the loads within the row; an unread address may lie past it.
                unsafe {
                    let low = _mm512_maskz_loadu_ps(masks.0, row.as_ptr());
                    let high = _mm512_maskz_loadu_ps(masks.1, row.as_ptr().wrapping_add(16));
                    *lane = round2(low, high);
                }
            }
            let pairs = transpose16(lanes);
            for (pair, lanes) in pairs.into_iter().enumerate().take(n.div_ceil(PAIR)) {
                let to = &mut panel[(k / PAIR + pair) * PAIR * LANES + 32 * half..][..32];
                // SAFETY: the slice has 64 bytes.
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), lanes) };
            }
        }
    }
}

/// See [`Bf16::pack_cols`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pack_cols(w: Rows, panel: &mut [u16]) {
    let width = w.width();
    // Of two rows one after the other, the elements of a column side by side.
    let order: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 16) as u16);
    // SAFETY: `order` has 64 bytes.
    let order = unsafe { _mm512_loadu_si512(order.as_ptr().cast()) };
    for (pair, panel) in panel.chunks_exact_mut(PAIR * LANES).take(w.count().div_ceil(PAIR)).enumerate() {
        for (half, panel) in panel.chunks_exact_mut(32).enumerate() {
            let mask = first_lanes(width.saturating_sub(16 * half));
            let load = |row: usize| {
                if row >= w.count() || mask == 0 {
                    return _mm512_setzero_ps();
                }
                // SAFETY: the mask keeps the load within the row.
                unsafe { _mm512_maskz_loadu_ps(mask, w.row(row).as_ptr().wrapping_add(16 * half)) }
            };
            let lanes = _mm512_permutexvar_epi16(order, round2(load(PAIR * pair), load(PAIR * pair + 1)));
            // SAFETY: the chunk has 64 bytes.
            unsafe { _mm512_storeu_si512(panel.as_mut_ptr().cast(), lanes) };
        }
    }
}

/// See [`Bf16::tile`].
#[target_feature(enable = "avx512f,avx512bf16")]
fn tile(panel: &[u16], x: Bf16Rows, c: &mut [&mut [f32]], col: usize, n: usize) {
    let mut t = 0;
    while t < c.len() {
        let left = c.len() - t;
        let count = [TOKENS, 8, 4, 2, 1].into_iter().find(|n| *n <= left).unwrap_or(1);
        let x = Bf16Rows { values: &x.values[t * x.stride..], count, ..x };
        let c = &mut c[t..t + count];
        match count {
            TOKENS => tokens::<TOKENS>(panel, x, c, col, n),
            8 => tokens::<8>(panel, x, c, col, n),
            4 => tokens::<4>(panel, x, c, col, n),
            2 => tokens::<2>(panel, x, c, col, n),
            _ => tokens::<1>(panel, x, c, col, n),
        }
        t += count;
    }
}

/// `M` tokens with all lanes of the panel.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn tokens<const M: usize>(panel: &[u16], x: Bf16Rows, c: &mut [&mut [f32]], col: usize, n: usize) {
    let pairs = panel.len() / (PAIR * LANES);
    let rows: [*const u16; M] = std::array::from_fn(|m| x.values[m * x.stride..][..PAIR * pairs].as_ptr());
    let masks = [first_lanes(n), first_lanes(n.saturating_sub(16))];
    let c: [*mut f32; M] = {
        let mut c = c.iter_mut();
        std::array::from_fn(|_| c.next().expect("the caller counted the rows")[col..][..n].as_mut_ptr())
    };
    // SAFETY: rows and panel hold `pairs` pairs, by the slices above; the masks keep to the `n` columns of `c`.
    unsafe {
        // Loops instead of `from_fn`, whose closure would become a call that saves all registers.
        let mut sums = [[_mm512_setzero_ps(); 2]; M];
        for m in 0..M {
            for j in 0..2 {
                sums[m][j] = _mm512_maskz_loadu_ps(masks[j], c[m].cast_const().wrapping_add(16 * j));
            }
        }
        let mut w = panel.as_ptr();
        for pair in 0..pairs {
            let wv = [load(w), load(w.add(32))];
            for m in 0..M {
                let bits = rows[m].add(PAIR * pair).cast::<i32>().read_unaligned();
                let xv = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(bits));
                for j in 0..2 {
                    sums[m][j] = _mm512_dpbf16_ps(sums[m][j], wv[j], xv);
                }
            }
            w = w.add(PAIR * LANES);
        }
        for m in 0..M {
            for j in 0..2 {
                _mm512_mask_storeu_ps(c[m].wrapping_add(16 * j), masks[j], sums[m][j]);
            }
        }
    }
}

/// # Safety
/// `at` points to 32 values.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn load(at: *const u16) -> __m512bh {
    // SAFETY: the caller's promise; both types are 64 bytes of plain data.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(at.cast())) }
}
