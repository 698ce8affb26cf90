//! NF4 kernels for AVX-512: a block's 16 values fill one register, and a lane permutation looks up 16 weights at once.

#![allow(unsafe_code, reason = "vector loads and stores")]

use super::super::avx2::{KEEP, prefetch_line, sum1};
use super::super::avx512::{first_lanes, halve};
use super::super::bf16::avx512::round2;
use super::scale_map::Planes;
use super::{EvenOdd, GRANULE, Nf4, Piece};
use crate::FloatType;
use std::arch::x86_64::*;

/// Elements of a block as every file in the wild has them.
const BLOCK: usize = 64;

/// Bytes that the matrix-vector product reads ahead.
const AHEAD: usize = 1024;

/// How far ahead [`scales64`] asks for codes of scales: they are one byte in 33, too few for the processor to see them coming.
const CODES_AHEAD: usize = 512;

/// See [`super::super::Table::nf4_decode`].
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
pub(crate) fn decode(w: &Nf4, start: usize, out: &mut [f32]) {
    // Each byte twice, for its two nibbles, the high one first.
    let twice = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7];
    let shifts = _mm512_set1_epi64(4);
    for Piece { absmax, at, len } in w.pieces(start, out.len()) {
        let out = &mut out[at - start..][..len];
        // Half a byte in front and what is left of a granule behind go through the portable text.
        let lead = (at % 2).min(len);
        let whole = (len - lead) / GRANULE * GRANULE;
        let values = values(w, absmax);
        let packed = &w.packed[(at + lead) / 2..][..whole / 2];
        for (packed, out) in packed.as_chunks::<16>().0.iter().zip(out[lead..].as_chunks_mut::<GRANULE>().0) {
            for (weights, out) in look_up(values, packed, twice, shifts).into_iter().zip(out.as_chunks_mut::<16>().0) {
                // SAFETY: `out` is an array of 16 floats.
                unsafe { _mm512_storeu_ps(out.as_mut_ptr(), weights) };
            }
        }
        if lead > 0 {
            super::portable::decode(w, at, &mut out[..lead]);
        }
        if lead + whole < len {
            super::portable::decode(w, at + lead + whole, &mut out[lead + whole..]);
        }
    }
}

/// See [`super::super::Table::bf16_decode_nf4`]: a block's values fill a register twice, for 32 weights at once.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx2,fma,f16c")]
pub(crate) fn decode_bf16(w: &Nf4, start: usize, out: &mut [u16]) {
    if w.block_log2 != BLOCK.trailing_zeros() || !start.is_multiple_of(BLOCK) {
        return decode_bf16_pieces(w, start, out);
    }
    let whole = out.len() / BLOCK * BLOCK;
    let (blocks, rest) = out.split_at_mut(whole);
    let mut scales = [0.0; 32];
    let packed = w.packed[start / 2..][..whole / 2].chunks(scales.len() * BLOCK / 2);
    for (batch, (out, packed)) in blocks.chunks_mut(scales.len() * BLOCK).zip(packed).enumerate() {
        let scales = &mut scales[..out.len() / BLOCK];
        w.scales(start / BLOCK + batch * 32, scales);
        let out = out.as_chunks_mut::<BLOCK>().0.iter_mut().zip(packed.as_chunks::<{ BLOCK / 2 }>().0);
        for ((out, packed), scale) in out.zip(scales) {
            let values = values(w, *scale);
            let values = round2(values, values);
            for (packed, out) in packed.as_chunks::<16>().0.iter().zip(out.as_chunks_mut::<GRANULE>().0) {
                look_up_bf16(values, packed, out);
            }
        }
    }
    if !rest.is_empty() {
        decode_bf16_pieces(w, start + whole, rest);
    }
}

/// 32 weights of a block with these values.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn look_up_bf16(values: __m512i, packed: &[u8; 16], out: &mut [u16; GRANULE]) {
    // SAFETY: arrays of 16 bytes and of 32 elements.
    unsafe {
        // In 16 bits the high nibble, then the low one with what is above it: the permutation looks at five bits, and the
        // fifth chooses between equal halves.
        let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(packed.as_ptr().cast()));
        let nibbles = _mm512_or_si512(_mm512_srli_epi32::<4>(bytes), _mm512_slli_epi32::<16>(bytes));
        _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_permutexvar_epi16(nibbles, values));
    }
}

/// From and to anywhere, in blocks of any size.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx2,fma,f16c")]
fn decode_bf16_pieces(w: &Nf4, start: usize, out: &mut [u16]) {
    for Piece { absmax, at, len } in w.pieces(start, out.len()) {
        let out = &mut out[at - start..][..len];
        let values = values(w, absmax);
        let values = round2(values, values);
        // As in `decode`.
        let lead = (at % 2).min(len);
        let whole = (len - lead) / GRANULE * GRANULE;
        let packed = &w.packed[(at + lead) / 2..][..whole / 2];
        for (packed, out) in packed.as_chunks::<16>().0.iter().zip(out[lead..].as_chunks_mut::<GRANULE>().0) {
            look_up_bf16(values, packed, out);
        }
        if lead + whole < len || lead > 0 {
            let mut table = [0_u16; 32];
            // SAFETY: an array of 64 bytes.
            unsafe { _mm512_storeu_si512(table.as_mut_ptr().cast(), values) };
            for i in (0..lead).chain(lead + whole..len) {
                out[i] = table[w.nibble(at + i)];
            }
        }
    }
}

/// See [`super::super::Table::nf4_matvec`].
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
pub(crate) fn matvec(w: &Nf4, cols: usize, row: usize, x: &EvenOdd, y: &mut [f32]) {
    if w.block_log2 == BLOCK.trailing_zeros() && cols.is_multiple_of(BLOCK) {
        for (i, y) in y.iter_mut().enumerate() {
            *y = dot_whole_blocks(w, (row + i) * cols, x);
        }
    } else {
        for (i, y) in y.iter_mut().enumerate() {
            *y = dot_pieces(w, (row + i) * cols, x);
        }
    }
}

/// See [`Nf4::scales64`]: 64 codes at a time look up the bytes of their values in one plane after the other.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
pub(in super::super) fn scales64(w: &Nf4, first: usize, out: &mut [f32]) {
    if w.block_log2 != BLOCK.trailing_zeros() {
        return w.scales64(first, out);
    }
    w.scales_by(first, out, |map, codes, nested, offset, out| {
        let (nested, offset) = (_mm512_set1_ps(nested), _mm512_set1_ps(offset));
        for (codes, out) in codes.chunks(64).zip(out.chunks_mut(64)) {
            prefetch_line::<KEEP>(codes.as_ptr().wrapping_add(CODES_AHEAD));
            // SAFETY: no more than the codes is read; the mask has one to 64 bits.
            let codes = unsafe { _mm512_maskz_loadu_epi8(u64::MAX >> (64 - codes.len()), codes.as_ptr().cast()) };
            let values = look_up_scales(codes, &map.planes);
            for (values, out) in values.into_iter().zip(out.chunks_mut(16)) {
                // Two roundings, as bitsandbytes has them.
                let scales = _mm512_add_ps(_mm512_mul_ps(values, nested), offset);
                // SAFETY: lanes from `out.len()` on are not written.
                unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), first_lanes(out.len()), scales) };
            }
        }
    });
}

/// The values of 64 codes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn look_up_scales(codes: __m512i, planes: &Planes) -> [__m512; 4] {
    // Quads so that interleaving, which works within parts of 128 bits, leaves them in order.
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let codes = _mm512_permutexvar_epi32(order, codes);
    let upper = _mm512_movepi8_mask(codes);
    let bytes = planes.0.each_ref().map(|plane| {
        // SAFETY: a plane is 256 bytes.
        let t: [__m512i; 4] = std::array::from_fn(|i| unsafe { _mm512_loadu_si512(plane.as_ptr().add(64 * i).cast()) });
        // Each sees seven bits; the eighth chooses.
        let (below, above) = (_mm512_permutex2var_epi8(t[0], codes, t[1]), _mm512_permutex2var_epi8(t[2], codes, t[3]));
        _mm512_mask_mov_epi8(below, upper, above)
    });
    let low = [_mm512_unpacklo_epi8(bytes[0], bytes[1]), _mm512_unpackhi_epi8(bytes[0], bytes[1])];
    let high = [_mm512_unpacklo_epi8(bytes[2], bytes[3]), _mm512_unpackhi_epi8(bytes[2], bytes[3])];
    [
        _mm512_unpacklo_epi16(low[0], high[0]),
        _mm512_unpackhi_epi16(low[0], high[0]),
        _mm512_unpacklo_epi16(low[1], high[1]),
        _mm512_unpackhi_epi16(low[1], high[1]),
    ]
    .map(|values| _mm512_castsi512_ps(values))
}

/// Of four bytes the high nibbles, then the low ones, as `EvenOdd` has the activations.
const ORDER: [i8; 16] = [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7];

/// A row of blocks of the usual size, with their scales decoded a batch at a time: what is not arithmetic costs more
/// than the arithmetic otherwise.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
fn dot_whole_blocks(w: &Nf4, start: usize, x: &EvenOdd) -> f32 {
    let shifts = shifts();
    let mut sums = [_mm512_setzero_ps(); 4];
    let (packed, _) = w.packed[start / 2..].as_chunks::<{ BLOCK / 2 }>();
    let (x, _) = x.0.as_chunks::<BLOCK>();
    let mut scales = [0.0; 32];
    for (batch, (x, packed)) in x.chunks(scales.len()).zip(packed.chunks(scales.len())).enumerate() {
        let scales = &mut scales[..x.len()];
        w.scales(start / BLOCK + batch * 32, scales);
        for ((packed, x), scale) in packed.iter().zip(x).zip(scales.iter()) {
            let values = values(w, *scale);
            // A prefetch is no access: it may point past the end.
            _mm_prefetch::<_MM_HINT_T0>(packed.as_ptr().wrapping_add(AHEAD).cast());
            let halves = packed.as_chunks::<16>().0.iter().zip(x.as_chunks::<GRANULE>().0);
            for ((packed, x), sums) in halves.zip(sums.as_chunks_mut::<2>().0) {
                let weights = look_up(values, packed, ORDER, shifts);
                for ((sum, weights), x) in sums.iter_mut().zip(weights).zip(x.as_chunks::<16>().0) {
                    // SAFETY: `x` is an array of 16 floats.
                    *sum = _mm512_fmadd_ps(weights, unsafe { _mm512_loadu_ps(x.as_ptr()) }, *sum);
                }
            }
        }
    }
    sum1(halve(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]))))
}

/// A row of blocks of any size, cut where they end.
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
fn dot_pieces(w: &Nf4, start: usize, x: &EvenOdd) -> f32 {
    let shifts = shifts();
    let mut sums = [_mm512_setzero_ps(); 2];
    for Piece { absmax, at, len } in w.pieces(start, x.len()) {
        let values = values(w, absmax);
        let packed = &w.packed[at / 2..][..len / 2];
        let x = &x.0[at - start..][..len];
        for (packed, x) in packed.as_chunks::<16>().0.iter().zip(x.as_chunks::<GRANULE>().0) {
            let weights = look_up(values, packed, ORDER, shifts);
            for ((sum, weights), x) in sums.iter_mut().zip(weights).zip(x.as_chunks::<16>().0) {
                // SAFETY: `x` is an array of 16 floats.
                *sum = _mm512_fmadd_ps(weights, unsafe { _mm512_loadu_ps(x.as_ptr()) }, *sum);
            }
        }
    }
    sum1(halve(_mm512_add_ps(sums[0], sums[1])))
}

/// Shifts that bring the nibbles which `ORDER` selects to the bottom of their lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn shifts() -> __m512i {
    _mm512_setr_epi32(4, 4, 4, 4, 0, 0, 0, 0, 4, 4, 4, 4, 0, 0, 0, 0)
}

/// The weights of 16 packed bytes. `order` says which of eight bytes each of 16 lanes takes, `shifts` (by 4 or 0) which
/// of its nibbles; the permutation looks at the low four bits only.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx2")]
fn look_up(values: __m512, packed: &[u8; 16], order: [i8; 16], shifts: __m512i) -> [__m512; 2] {
    // SAFETY: both are arrays of 16 bytes.
    let (bytes, order) = unsafe { (_mm_loadu_si128(packed.as_ptr().cast()), _mm_loadu_si128(order.as_ptr().cast())) };
    [order, _mm_add_epi8(order, _mm_set1_epi8(8))].map(|order| {
        let lanes = _mm512_cvtepu8_epi32(_mm_shuffle_epi8(bytes, order));
        _mm512_permutexvar_ps(_mm512_srlv_epi32(lanes, shifts), values)
    })
}

/// The 16 values of a block: code times absmax in f32, rounded to the checkpoint's type.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx2")]
fn values(w: &Nf4, absmax: f32) -> __m512 {
    // SAFETY: `code` is an array of 16 floats.
    let exact = _mm512_mul_ps(unsafe { _mm512_loadu_ps(w.code.as_ptr()) }, _mm512_set1_ps(absmax));
    match w.dtype {
        FloatType::F32 => exact,
        FloatType::F16 => _mm512_cvtph_ps(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(exact)),
        FloatType::BF16 => round_bf16(exact),
    }
}

/// To the nearest, ties to even, by adding half of the last place that stays; a NaN is kept from the carry. The
/// instruction for bf16 would flush subnormal values to zero.
#[inline]
#[target_feature(enable = "avx512f")]
fn round_bf16(x: __m512) -> __m512 {
    let bits = _mm512_castps_si512(x);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let carried = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    let rounded = _mm512_and_si512(carried, _mm512_set1_epi32(0xffff_0000_u32.cast_signed()));
    _mm512_mask_mov_ps(_mm512_castsi512_ps(rounded), _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x), x)
}
