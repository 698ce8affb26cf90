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
        let (mut even_sum, mut odd_sum) = (f32x8::ZERO, f32x8::ZERO);
        for Piece { absmax, at, len } in w.pieces(start, cols) {
            let values = w.values(absmax);
            for at in (at..at + len).step_by(GRANULE) {
                let bytes = &w.packed[at / 2..][..LANES];
                let k = (at - start) / 2;
                let even = f32x8::new(std::array::from_fn(|j| values[usize::from(bytes[j] >> 4)]));
                let odd = f32x8::new(std::array::from_fn(|j| values[usize::from(bytes[j] & 15)]));
                even_sum = even.mul_add(load(&x.even[k..]), even_sum);
                odd_sum = odd.mul_add(load(&x.odd[k..]), odd_sum);
            }
        }
        *y = (even_sum + odd_sum).reduce_add();
    }
}
