//! The two inner forms of matrix products, on f32 rows that stay in cache.
//!
//! `dot` sums along rows of both operands (`X Wᵀ`), `axpy` adds multiples of rows (`C += A P`). Everything
//! with more than one token reduces to them: matmul forward and by both arguments, attention forward and
//! backward. Both accumulate, so that callers may cut the sum into pieces.
//!
//! A product `X Wᵀ` can be made of either. `dot` takes both operands as they lie in memory. `axpy` needs a panel of the
//! weight transposed first, but keeps its sums in registers. With AVX-512 and NEON, `axpy` is the faster one from 48
//! tokens on, in the portable text from 16; with AVX2 both are equally fast (`transposes_from` of the tables).

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod portable;

/// Rows of `dot`'s sum taken at a time, so that a block of either operand stays in second-level cache.
const DOT_DEPTH: usize = 1024;
/// Rows of `X` between two passes over `W`, for the same reason.
const DOT_ROWS: usize = 48;
/// Rows of `P` that `axpy` takes at a time: 16 columns of them fill half of a first-level cache.
const AXPY_DEPTH: usize = 256;

/// `count` rows of `width` floats, `stride` apart, inside a slice.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    data: &'a [f32],
    stride: usize,
    count: usize,
    width: usize,
}

impl<'a> Rows<'a> {
    /// Asserts that the rows lie inside `data`; the kernels rely on it.
    pub fn new(data: &'a [f32], stride: usize, count: usize, width: usize) -> Self {
        let end = if count == 0 { Some(0) } else { (count - 1).checked_mul(stride).and_then(|n| n.checked_add(width)) };
        assert!(end.is_some_and(|end| end <= data.len()), "{count} rows of {width}, {stride} apart, in {}", data.len());
        Self { data, stride, count, width }
    }

    /// Rows that follow one another.
    pub fn packed(data: &'a [f32], width: usize) -> Self {
        Self::new(data, width, data.len().checked_div(width).unwrap_or(0), width)
    }

    pub fn count(&self) -> usize {
        self.count
    }

    pub fn width(&self) -> usize {
        self.width
    }

    /// Row `i`.
    #[inline(always)]
    pub fn row(&self, i: usize) -> &'a [f32] {
        assert!(i < self.count);
        &self.data[i * self.stride..][..self.width]
    }
}

/// The matrix `A` of `axpy`: element `(i, j)` is `data[i * row + j * col]`, so a transpose is free.
#[derive(Clone, Copy)]
pub(crate) struct Coefficients<'a> {
    pub data: &'a [f32],
    pub row: usize,
    pub col: usize,
}

impl Coefficients<'_> {
    /// Whether `rows` by `cols` elements lie inside the data.
    pub fn covers(&self, rows: usize, cols: usize) -> bool {
        if rows == 0 || cols == 0 {
            return true;
        }
        let last = (rows - 1).checked_mul(self.row).zip((cols - 1).checked_mul(self.col));
        last.and_then(|(a, b)| a.checked_add(b)).is_some_and(|last| last < self.data.len())
    }

    #[inline(always)]
    fn at(&self, i: usize, j: usize) -> f32 {
        self.data[i * self.row + j * self.col]
    }
}
