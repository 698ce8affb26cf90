//! Weights as the CPU backend holds them: mapped bytes, or a small matrix that changes every step.

use super::Cpu;
use super::buffer::{Buffer, reserve};
use super::nf4::Nf4;
use super::q8::{BLOCK, Down, Int8, Up};
use super::table::Table;
use crate::{Error, FloatType, MatrixData, MatrixSource, WorkType};
use bytes::Bytes;
use half::f16;
use std::sync::OnceLock;

/// A weight `[O, K]` whose parts fit its shape.
pub struct Matrix {
    rows: usize,
    cols: usize,
    data: Data,
}

/// Where the elements are.
pub(crate) enum Data {
    Nf4(Nf4),
    Int8(Int8),
    Mapped(FloatType, Bytes),
    /// Little-endian like a mapped weight, so that the same kernels read both.
    Work(Vec<u8>, Eight),
    /// A matrix that is its own master.
    Master(Buffer),
}

/// Copies in 8 bits of a work matrix, for products of one token: as a down-projection and as an up-projection of an
/// adapter. Each is made when it is first asked for, which only inference does, and dropped with the values it was made
/// of.
#[derive(Default)]
pub(crate) struct Eight {
    down: OnceLock<Down>,
    up: OnceLock<Up>,
}

impl Matrix {
    pub(crate) fn new(source: MatrixSource) -> Result<Self, Error> {
        let MatrixSource { rows, cols, data } = source;
        // A product that overflows saturates and then differs from every length there can be.
        let len = rows.saturating_mul(cols);
        let data = match data {
            MatrixData::Nf4(source) => Data::Nf4(Nf4::new(rows, cols, len, source)?),
            MatrixData::Dense(dtype, bytes) => {
                let (got, expected) = (bytes.len(), len.saturating_mul(dtype.size()));
                if got != expected {
                    return Err(Error::Matrix { rows, cols, what: "data", unit: "bytes", got, expected });
                }
                Data::Mapped(dtype, bytes)
            }
            MatrixData::Int8 { codes, scales } => Data::Int8(Int8::new(rows, cols, codes, scales)?),
        };
        Ok(Self { rows, cols, data })
    }

    pub(crate) fn zeros(rows: usize, cols: usize, dtype: WorkType) -> Result<Self, Error> {
        let len = rows.saturating_mul(cols);
        let data = match dtype {
            WorkType::F32 => Data::Master(Buffer::zeros(len)?),
            WorkType::F16 => {
                let size = len.saturating_mul(size_of::<f16>());
                let mut bytes = reserve(size)?;
                bytes.resize(size, 0);
                Data::Work(bytes, Eight::default())
            }
        };
        Ok(Self { rows, cols, data })
    }

    /// A matrix in memory of a device that leaves operations to this backend.
    #[cfg(feature = "vulkan")]
    pub(crate) fn of(rows: usize, cols: usize, values: Buffer) -> Self {
        assert_eq!(values.len(), rows * cols);
        Self { rows, cols, data: Data::Master(values) }
    }

    /// The values of a matrix that is its own master.
    pub(crate) fn values(&self) -> &Buffer {
        match &self.data {
            Data::Master(values) => values,
            _ => panic!("only a work matrix in f32 is its own master"),
        }
    }

    pub(crate) fn values_mut(&mut self) -> &mut Buffer {
        match &mut self.data {
            Data::Master(values) => values,
            _ => panic!("only a work matrix in f32 is its own master"),
        }
    }

    /// Rounds `master` into a work matrix.
    pub(crate) fn set(&mut self, master: &[f32]) {
        assert_eq!(master.len(), self.rows * self.cols);
        if let Data::Work(.., eight) = &mut self.data {
            *eight = Eight::default();
        }
        match &mut self.data {
            Data::Master(values) => values.copy_from_slice(master),
            Data::Work(bytes, _) => {
                for (b, value) in bytes.as_chunks_mut().0.iter_mut().zip(master) {
                    *b = f16::from_f32(*value).to_le_bytes();
                }
            }
            Data::Nf4(_) | Data::Int8(_) | Data::Mapped(..) => panic!("a frozen weight cannot be set"),
        }
    }

    /// Bytes that a product reads of it: codes, scales and tables, or plain floats.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.data {
            Data::Nf4(w) => w.bytes(),
            Data::Int8(w) => w.bytes(),
            Data::Mapped(_, bytes) => bytes.len(),
            Data::Work(bytes, _) => bytes.len(),
            Data::Master(values) => size_of_val(&values[..]),
        }
    }

    /// Its elements' type as kernel names spell it: `nf4`, `int8`, `f32`, `f16` or `bf16`.
    #[must_use]
    pub fn type_name(&self) -> &'static str {
        match self.elements() {
            Elements::Nf4(_) => "nf4",
            Elements::Int8(_) => "int8",
            Elements::Dense(FloatType::F32, _) => "f32",
            Elements::Dense(FloatType::F16, _) => "f16",
            Elements::Dense(FloatType::BF16, _) => "bf16",
        }
    }

    /// `(O, K)`.
    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// All rows.
    pub(crate) fn whole(&self) -> Band<'_> {
        self.band(0, self.rows)
    }

    /// Rows `first..first + rows`.
    pub(crate) fn band(&self, first: usize, rows: usize) -> Band<'_> {
        assert!(first + rows <= self.rows);
        Band { matrix: self, first, rows }
    }

    /// Blocks, or the type and bytes of plain floats.
    pub(crate) fn elements(&self) -> Elements<'_> {
        match &self.data {
            Data::Nf4(w) => Elements::Nf4(w),
            Data::Int8(w) => Elements::Int8(w),
            Data::Mapped(dtype, bytes) => Elements::Dense(*dtype, bytes),
            Data::Work(bytes, _) => Elements::Dense(FloatType::F16, bytes),
            // Kernels read little-endian bytes, as files hold them.
            Data::Master(values) => Elements::Dense(FloatType::F32, bytemuck::cast_slice(values)),
        }
    }

    /// This work matrix `[r, K]` in 8 bits, as the down-projection of an adapter; `None` of others, and of rows that are no
    /// whole blocks.
    pub(crate) fn down(&self, cpu: &Cpu) -> Result<Option<&Down>, Error> {
        let Data::Work(.., eight) = &self.data else { return Ok(None) };
        if self.cols == 0 || !self.cols.is_multiple_of(BLOCK) {
            return Ok(None);
        }
        let columns = || {
            let mut values = self.work_values(cpu)?;
            // In the order of the activations.
            for block in values.as_chunks_mut::<BLOCK>().0 {
                *block = std::array::from_fn(|i| block[i % (BLOCK / 2) * 2 + i / (BLOCK / 2)]);
            }
            Down::new(&cpu.shelf, &values, self.cols)
        };
        init(&eight.down, columns).map(Some)
    }

    /// This work matrix `[O, r]` in 8 bits, as the up-projection of an adapter; `None` of others.
    pub(crate) fn up(&self, cpu: &Cpu) -> Result<Option<&Up>, Error> {
        let Data::Work(.., eight) = &self.data else { return Ok(None) };
        init(&eight.up, || Up::new(&cpu.shelf, &self.work_values(cpu)?, self.cols)).map(Some)
    }

    /// All elements.
    fn work_values(&self, cpu: &Cpu) -> Result<Vec<f32>, Error> {
        let mut values = reserve(self.rows * self.cols)?;
        values.resize(self.rows * self.cols, 0.0);
        self.decode(cpu.table, 0, 0, self.cols, &mut values);
        Ok(values)
    }

    /// Expands rows `row..row + n` by columns `col..col + width` into `out`, `n` rows of `width`.
    pub(crate) fn decode(&self, table: &Table, row: usize, col: usize, width: usize, out: &mut [f32]) {
        assert!(col + width <= self.cols);
        match self.elements() {
            Elements::Dense(dtype, bytes) => {
                let start = (row * self.cols + col) * dtype.size();
                table.dense_decode(dtype, &bytes[start..], self.cols, width, out);
            }
            Elements::Int8(w) => {
                out.chunks_exact_mut(width).enumerate().for_each(|(i, out)| w.decode(row + i, col, out));
            }
            Elements::Nf4(w) if width == self.cols => table.nf4_decode(w, row * self.cols, out),
            Elements::Nf4(w) => {
                for (i, out) in out.chunks_exact_mut(width).enumerate() {
                    table.nf4_decode(w, (row + i) * self.cols + col, out);
                }
            }
        }
    }
}

/// Consecutive rows of a weight: a product that must not hold all of its outputs takes one after the other.
#[derive(Clone, Copy)]
pub(crate) struct Band<'a> {
    matrix: &'a Matrix,
    first: usize,
    rows: usize,
}

impl Band<'_> {
    /// `(rows, K)`.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.matrix.cols)
    }

    /// As [`Matrix::decode`], with rows counted from the band's first.
    pub fn decode(&self, table: &Table, row: usize, col: usize, width: usize, out: &mut [f32]) {
        self.matrix.decode(table, self.first + row, col, width, out);
    }

    /// The same in bf16, for tables that multiply so.
    pub fn decode_bf16(&self, table: &Table, row: usize, col: usize, width: usize, out: &mut [u16]) {
        let (row, cols) = (self.first + row, self.matrix.cols);
        assert!(col + width <= cols);
        match self.matrix.elements() {
            Elements::Dense(dtype, bytes) => {
                let start = (row * cols + col) * dtype.size();
                table.bf16_decode_dense(dtype, &bytes[start..], cols, width, out);
            }
            Elements::Nf4(w) if width == cols => table.bf16_decode_nf4(w, row * cols, out),
            Elements::Nf4(w) => {
                for (i, out) in out.chunks_exact_mut(width).enumerate() {
                    table.bf16_decode_nf4(w, (row + i) * cols + col, out);
                }
            }
            Elements::Int8(w) => {
                for (i, out) in out.chunks_exact_mut(width).enumerate() {
                    table.by_f32(out, |at, wide| w.decode(row + i, col + at, wide));
                }
            }
        }
    }
}

/// What `cell` holds, made by `make` if it is empty. Two threads may make it at once, alike.
fn init<T>(cell: &OnceLock<T>, make: impl FnOnce() -> Result<T, Error>) -> Result<&T, Error> {
    match cell.get() {
        Some(value) => Ok(value),
        None => make().map(|value| cell.get_or_init(|| value)),
    }
}

/// What [`Matrix::elements`] finds.
pub(crate) enum Elements<'a> {
    Nf4(&'a Nf4),
    Int8(&'a Int8),
    Dense(FloatType, &'a [u8]),
}

const _: () = assert!(cfg!(target_endian = "little"), "a matrix that is its own master is read as little-endian bytes");
