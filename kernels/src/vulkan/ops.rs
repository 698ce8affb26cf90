//! The calls with a shader, one function each.

use super::Vulkan;
use super::buffer::Buffer;
use super::matrix::Matrix;
use super::pipeline::{GROUP, Job};
use crate::{Arithmetic, Call, Error, LowRank, Memory, Product};

impl Vulkan {
    /// `y = a + b`, or `y += a` without `b`.
    pub(super) fn record_add(&self, a: &Buffer, b: Option<&Buffer>, y: &Buffer) {
        assert!(a.len == y.len && b.is_none_or(|b| b.len == y.len));
        if y.len > 0 {
            let job = Job::Add { len: y.len as u32, in_place: b.is_none() };
            let groups = self.groups(y.len.div_ceil(GROUP));
            self.recorder.dispatch(&job, [&a.memory, &b.unwrap_or(a).memory, &y.memory], groups);
        }
    }

    /// `y = x / sqrt(mean(x²) + eps) * w` of each row.
    pub(super) fn record_rms_norm(&self, w: &Buffer, eps: f32, x: &Buffer, y: &Buffer) {
        assert!(x.len == y.len && (x.len == 0 || x.len.is_multiple_of(w.len)));
        if x.len > 0 {
            let rows = x.len / w.len;
            let job = Job::RmsNorm { rows: rows as u32, width: w.len as u32, eps };
            self.recorder.dispatch(&job, [&w.memory, &x.memory, &y.memory], self.groups(rows));
        }
    }

    /// Whether there is a shader for `y = W x`: for one token and a weight in blocks.
    pub(super) fn multiplies(&self, w: &Matrix, x: &Buffer, y: &Buffer) -> bool {
        let (rows, cols) = self.shape(w);
        w.blocks.is_some() && x.len == cols && y.len == rows && self.sees(&[x, y])
    }

    /// `y = W x` of one token, added to `y` if `accumulate`, where the device [`Vulkan::multiplies`].
    pub(super) fn record_nf4_matvec(&self, w: &Matrix, x: &Buffer, y: &Buffer, accumulate: bool) {
        let (rows, cols) = self.shape(w);
        let blocks = w.blocks.as_ref().expect("a weight that the device multiplies is in blocks");
        let job = Job::Nf4Matvec { rows: rows as u32, cols: cols as u32, accumulate, places: blocks.places };
        self.recorder.dispatch(&job, [&blocks.memory, &x.memory, &y.memory], self.groups(rows));
    }

    /// One product of a group: the weight's by the shader where there is one, its low-rank terms on the CPU.
    pub(super) fn product<'a>(
        &self,
        arithmetic: Arithmetic,
        x: &'a Buffer,
        product: &'a mut Product<'a, Self>,
    ) -> Result<(), Error> {
        if !self.multiplies(product.w, x, product.y) {
            return self.on_host(Call::MatmulGroup { arithmetic, x, products: std::slice::from_mut(product) });
        }
        let Product { w, low_rank, y } = product;
        self.record_nf4_matvec(w, x, y, false);
        // There is one token: a term has its row or none.
        for LowRank { a, b, scale, .. } in low_rank.iter().filter(|term| !term.rows_of(1).is_empty()) {
            let mut h = self.buffer(self.shape(a).0)?;
            self.on_host(Call::Matmul { arithmetic, w: a, x, y: &mut h, accumulate: false })?;
            self.on_host(Call::Scale { factor: *scale, x: &mut h })?;
            self.on_host(Call::Matmul { arithmetic, w: b, x: &h, y, accumulate: true })?;
        }
        Ok(())
    }

    /// Whether a shader can see all of each; then lengths also fit its 32 bits.
    pub(super) fn sees(&self, buffers: &[&Buffer]) -> bool {
        buffers.iter().all(|buffer| buffer.memory.size <= self.device.limits.range)
    }

    /// As many of `wanted` work groups as a dispatch may have; shaders go round until all is done.
    fn groups(&self, wanted: usize) -> u32 {
        u32::try_from(wanted).unwrap_or(u32::MAX).min(self.device.limits.groups)
    }
}
