//! NF4 kernels for any CPU.

use super::super::lanes::{LANES, load};
use super::{EvenOdd, GRANULE, Nf4, Piece};
use wide::f32x8;

/// See [`super::super::Table::nf4_decode`].
pub(crate) fn decode(w: &Nf4, start: usize, out: &mut [f32]) {
    for Piece { absmax, at, len } in w.pieces(start, out.len()) {
        let values = w.values(absmax);
        let out = &mut out[at - start..][..len];
        // A piece that begins in the middle of a byte: its first element, then whole bytes.
        let lead = (at % 2).min(len);
        if lead == 1 {
            out[0] = values[w.nibble(at)];
        }
        let packed = &w.packed[(at + lead) / 2..];
        let (pairs, last) = out[lead..].as_chunks_mut::<2>();
        for (pair, byte) in pairs.iter_mut().zip(packed) {
            *pair = [values[usize::from(byte >> 4)], values[usize::from(byte & 15)]];
        }
        if let [last] = last {
            *last = values[w.nibble(at + len - 1)];
        }
    }
}

/// See [`super::super::Table::nf4_matvec`].
pub(crate) fn matvec(w: &Nf4, cols: usize, row: usize, x: &EvenOdd, y: &mut [f32]) {
    for (i, y) in y.iter_mut().enumerate() {
        let start = (row + i) * cols;
        let mut sums = [f32x8::ZERO; 4];
        for Piece { absmax, at, len } in w.pieces(start, cols) {
            let values = w.values(absmax);
            let packed = w.packed[at / 2..][..len / 2].as_chunks::<{ GRANULE / 2 }>().0;
            for (packed, x) in packed.iter().zip(x.0[at - start..].as_chunks::<GRANULE>().0) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let byte = |j: usize| packed[4 * i + j % 4] >> (4 - j / 4 * 4) & 15;
                    let weights = f32x8::new(std::array::from_fn(|j| values[usize::from(byte(j))]));
                    *sum = weights.mul_add(load(&x[LANES * i..]), *sum);
                }
            }
        }
        *y = ((sums[0] + sums[1]) + (sums[2] + sums[3])).reduce_add();
    }
}
