//! Keys and values of one layer.

use super::buffer::grow;
use super::table::Table;
use crate::{CacheType, Error, FloatType};
use half::f16;

/// Rows of keys and as many of values, appended token by token.
pub struct Cache {
    width: usize,
    dtype: CacheType,
    len: usize,
    /// Little-endian, so that the dense kernels read it.
    keys: Vec<u8>,
    values: Vec<u8>,
}

impl Cache {
    pub(crate) fn new(width: usize, dtype: CacheType) -> Self {
        Self { width, dtype, len: 0, keys: Vec::new(), values: Vec::new() }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Elements of a row.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    fn size(&self) -> usize {
        match self.dtype {
            CacheType::F32 => 4,
            CacheType::F16 => 2,
        }
    }

    pub(crate) fn append(&mut self, k: &[f32], v: &[f32]) -> Result<(), Error> {
        assert!(k.len() == v.len() && k.len().is_multiple_of(self.width.max(1)));
        let more = k.len() * self.size();
        for bytes in [&mut self.keys, &mut self.values] {
            // Half as much again, not the double of `Vec`: this memory is the session's largest after weights.
            if bytes.capacity() - bytes.len() < more {
                let spare = bytes.len() / 2;
                grow(bytes, more.max(spare)).or_else(|_| grow(bytes, more))?;
            }
        }
        for (bytes, rows) in [(&mut self.keys, k), (&mut self.values, v)] {
            match self.dtype {
                CacheType::F32 => bytes.extend(rows.iter().flat_map(|x| x.to_le_bytes())),
                CacheType::F16 => bytes.extend(rows.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes())),
            }
        }
        self.len += k.len().checked_div(self.width).unwrap_or(0);
        Ok(())
    }

    pub(crate) fn truncate(&mut self, len: usize) {
        assert!(len <= self.len);
        self.len = len;
        let bytes = len * self.width * self.size();
        self.keys.truncate(bytes);
        self.values.truncate(bytes);
    }

    /// Columns `col..col + width` of the keys and values of tokens from `row` on, as f32.
    pub(crate) fn read(&self, table: &Table, row: usize, col: usize, width: usize, k: &mut [f32], v: &mut [f32]) {
        let dtype = match self.dtype {
            CacheType::F32 => FloatType::F32,
            CacheType::F16 => FloatType::F16,
        };
        let at = (row * self.width + col) * self.size();
        table.dense_decode(dtype, &self.keys[at..], self.width, width, k);
        table.dense_decode(dtype, &self.values[at..], self.width, width, v);
    }
}
