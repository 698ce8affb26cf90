//! Keys and values of one layer.

use super::buffer::grow;
use super::table::Table;
use crate::{CacheType, Error, FloatType};
use half::f16;

/// Rows of keys and as many of values, appended token by token.
pub struct Cache {
    kv_heads: usize,
    head_dim: usize,
    dtype: CacheType,
    len: usize,
    keys: Rows,
    values: Rows,
}

/// Elements as [`CacheType`] says, little-endian, so that the dense kernels read them.
#[derive(Default)]
struct Rows {
    bytes: Vec<u8>,
    /// In 8 bits one a token and head, else none.
    scales: Vec<f32>,
}

impl Cache {
    pub(crate) fn new(kv_heads: usize, head_dim: usize, dtype: CacheType) -> Self {
        Self { kv_heads, head_dim, dtype, len: 0, keys: Rows::default(), values: Rows::default() }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Bytes of the keys and values held, with their scales.
    #[must_use]
    pub fn bytes(&self) -> usize {
        [&self.keys, &self.values].iter().map(|rows| rows.bytes.len() + size_of_val(&rows.scales[..])).sum()
    }

    /// Elements of a row.
    pub(crate) fn width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    fn size(&self) -> usize {
        match self.dtype {
            CacheType::F32 => 4,
            CacheType::F16 => 2,
            CacheType::I8 => 1,
        }
    }

    /// Scales of a token.
    fn scales(&self) -> usize {
        if self.dtype == CacheType::I8 { self.kv_heads } else { 0 }
    }

    pub(crate) fn append(&mut self, k: &[f32], v: &[f32]) -> Result<(), Error> {
        let width = self.width().max(1);
        assert!(k.len() == v.len() && k.len().is_multiple_of(width));
        let (more, scales) = (k.len() * self.size(), k.len() / width * self.scales());
        for rows in [&mut self.keys, &mut self.values] {
            make_room(&mut rows.bytes, more)?;
            make_room(&mut rows.scales, scales)?;
        }
        for (rows, x) in [(&mut self.keys, k), (&mut self.values, v)] {
            match self.dtype {
                CacheType::F32 => rows.bytes.extend(x.iter().flat_map(|x| x.to_le_bytes())),
                CacheType::F16 => rows.bytes.extend(x.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes())),
                CacheType::I8 => x.chunks_exact(self.head_dim).for_each(|x| rows.push_int8(x)),
            }
        }
        self.len += k.len() / width;
        Ok(())
    }

    pub(crate) fn truncate(&mut self, len: usize) {
        assert!(len <= self.len);
        self.len = len;
        let (bytes, scales) = (len * self.width() * self.size(), len * self.scales());
        for rows in [&mut self.keys, &mut self.values] {
            rows.bytes.truncate(bytes);
            rows.scales.truncate(scales);
        }
    }

    /// Keys and values of head `head` of tokens from `row` on, as f32.
    pub(crate) fn read(&self, table: &Table, row: usize, head: usize, k: &mut [f32], v: &mut [f32]) {
        let at = (row * self.width() + head * self.head_dim) * self.size();
        for (rows, out) in [(&self.keys, k), (&self.values, v)] {
            let bytes = &rows.bytes[at..];
            let dtype = match self.dtype {
                CacheType::F32 => FloatType::F32,
                CacheType::F16 => FloatType::F16,
                CacheType::I8 => {
                    let scales = rows.scales[row * self.kv_heads + head..].iter().step_by(self.kv_heads);
                    let rows = out.chunks_exact_mut(self.head_dim).zip(bytes.chunks(self.width())).zip(scales);
                    for ((out, bytes), scale) in rows {
                        out.iter_mut().zip(bytes).for_each(|(out, b)| *out = f32::from(b.cast_signed()) * scale);
                    }
                    continue;
                }
            };
            table.dense_decode(dtype, bytes, self.width(), self.head_dim, out);
        }
    }
}

impl Rows {
    /// Rounds a head's row to 8 bits; one with a NaN or an infinity gets a NaN as scale.
    fn push_int8(&mut self, x: &[f32]) {
        let largest = x.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
        let finite = x.iter().all(|x| x.is_finite());
        let inverse = if finite && largest > f32::MIN_POSITIVE * 256.0 { 127.0 / largest } else { 0.0 };
        self.bytes.extend(x.iter().map(|x| ((x * inverse).round_ties_even() as i8).cast_unsigned()));
        self.scales.push(if finite { largest / 127.0 } else { f32::NAN });
    }
}

/// Half as much again, not the double of `Vec`: this memory is the session's largest after weights.
fn make_room<T>(values: &mut Vec<T>, more: usize) -> Result<(), Error> {
    if values.capacity() - values.len() < more {
        let spare = values.len() / 2;
        grow(values, more.max(spare)).or_else(|_| grow(values, more))?;
    }
    Ok(())
}
