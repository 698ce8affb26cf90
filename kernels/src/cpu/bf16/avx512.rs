//! `dpbf16ps` of AVX512-BF16: sixteen lanes that each add two products.

#![allow(unsafe_code, reason = "vector loads and stores")]
#![allow(clippy::needless_range_loop, reason = "loops over registers read like the tile when they count")]

use super::super::avx512::{first_lanes, transpose16};
use super::super::{dense, nf4};
use super::{Bf16, Bf16Rows};
use std::arch::x86_64::*;

/// Outputs of a panel: two vectors.
pub(super) const LANES: usize = 32;
/// Terms in a lane.
const PAIR: usize = 2;
/// Tokens that a tile takes at once: 24 sums of 16, and the weights, stay in registers.
const TOKENS: usize = 12;

pub(crate) const KERNELS: Bf16 = Bf16 {
    lanes: LANES,
    group: PAIR,
    round,
    decode_nf4: Some(nf4::avx512::decode_bf16),
    decode_dense: Some(dense::avx512::decode_bf16),
    pack_rows,
    pack_cols,
    tile,
};

/// See [`Bf16::round`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn round(x: &[f32], y: &mut [u16]) {
    let (whole, x) = x.as_chunks::<32>();
    let (vectors, y) = y.as_chunks_mut::<32>();
    for (x, y) in whole.iter().zip(vectors) {
        // SAFETY: arrays of 32 elements.
        unsafe {
            let v = round2(_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16)));
            _mm512_storeu_si512(y.as_mut_ptr().cast(), v);
        }
    }
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
pub(in super::super) fn round2(low: __m512, high: __m512) -> __m512i {
    let v = _mm512_cvtne2ps_pbh(high, low);
    // SAFETY: both are 64 bytes of plain data.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(v) }
}

/// See [`Bf16::pack_rows`].
#[target_feature(enable = "avx512f,avx512bw")]
fn pack_rows(w: Bf16Rows, panel: &mut [u16]) {
    for k in (0..w.width).step_by(32) {
        for half in 0..LANES / 16 {
            let mut lanes = [_mm512_setzero_si512(); 16];
            for i in 0..16 {
                lanes[i] = load_part(w.part(16 * half + i, k));
            }
            let pairs = transpose16(lanes);
            let panel = panel[k * LANES..].chunks_exact_mut(PAIR * LANES);
            for (pair, panel) in pairs.into_iter().zip(panel) {
                let to = &mut panel[32 * half..][..32];
                // SAFETY: the slice has 64 bytes.
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), pair) };
            }
        }
    }
}

/// See [`Bf16::pack_cols`].
#[target_feature(enable = "avx512f,avx512bw")]
fn pack_cols(w: Bf16Rows, panel: &mut [u16]) {
    // Of two rows the elements of a column side by side; from 32 on an index means the second.
    let mut order = [[0_u16; 32]; 2];
    for i in 0..32 {
        order[0][i] = (i / 2 + i % 2 * 32) as u16;
        order[1][i] = order[0][i] + 16;
    }
    // SAFETY: arrays of 64 bytes.
    let order = unsafe { [_mm512_loadu_si512(order[0].as_ptr().cast()), _mm512_loadu_si512(order[1].as_ptr().cast())] };
    let (panel, _) = panel.as_chunks_mut::<{ PAIR * LANES }>();
    for (pair, panel) in panel.iter_mut().enumerate() {
        let (a, b) = (load_part(w.part(PAIR * pair, 0)), load_part(w.part(PAIR * pair + 1, 0)));
        for half in 0..2 {
            // SAFETY: an array of twice 32 elements.
            unsafe {
                let to = panel.as_mut_ptr().add(32 * half).cast();
                _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, order[half], b));
            }
        }
    }
}

/// The first 32 elements, zeros where there are fewer.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn load_part(x: &[u16]) -> __m512i {
    let mask = if x.len() < 32 { (1 << x.len()) - 1 } else { !0 };
    // SAFETY: the mask keeps the load within the slice.
    unsafe { _mm512_maskz_loadu_epi16(mask, x.as_ptr().cast()) }
}

/// See [`Bf16::tile`].
#[target_feature(enable = "avx512f,avx512bf16")]
fn tile(panel: &[u16], x: Bf16Rows, c: &mut [&mut [f32]], col: usize, n: usize, add: bool) {
    let mut t = 0;
    while t < c.len() {
        let left = c.len() - t;
        // Few tokens wait for their sums: twice 8 take less time than 12 and 4.
        let counts = if left == 16 { &[8][..] } else { &[TOKENS, 8, 4, 2, 1] };
        let count = counts.iter().copied().find(|n| *n <= left).unwrap_or(1);
        let x = Bf16Rows { values: &x.values[t * x.stride..], count, ..x };
        let c = &mut c[t..t + count];
        match count {
            TOKENS => tokens::<TOKENS>(panel, x, c, col, n, add),
            8 => tokens::<8>(panel, x, c, col, n, add),
            4 => tokens::<4>(panel, x, c, col, n, add),
            2 => tokens::<2>(panel, x, c, col, n, add),
            _ => tokens::<1>(panel, x, c, col, n, add),
        }
        t += count;
    }
}

/// `M` tokens with all lanes of the panel.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn tokens<const M: usize>(panel: &[u16], x: Bf16Rows, c: &mut [&mut [f32]], col: usize, n: usize, add: bool) {
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
        if add {
            for m in 0..M {
                for j in 0..2 {
                    sums[m][j] = _mm512_maskz_loadu_ps(masks[j], c[m].cast_const().wrapping_add(16 * j));
                }
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
