//! The operations with a shader, one function each. They return whether the device can do it with buffers of this size;
//! the CPU does it otherwise.

use super::Vulkan;
use super::buffer::Buffer;
use super::matrix::Matrix;
use super::pipeline::{GROUP, Shader};
use crate::Backend;

impl Vulkan {
    /// `y = a + b`, or `y += a` without `b`.
    pub(super) fn record_add(&self, a: &Buffer, b: Option<&Buffer>, y: &Buffer) -> bool {
        assert!(a.len == y.len && b.is_none_or(|b| b.len == y.len));
        if !self.sees(&[a, y]) {
            return false;
        }
        if y.len > 0 {
            let constants = [y.len as u32, u32::from(b.is_none())];
            let groups = self.groups(y.len.div_ceil(GROUP));
            self.recorder.dispatch(Shader::Add, [&a.memory, &b.unwrap_or(a).memory, &y.memory], &constants, groups);
        }
        true
    }

    /// `y = x / sqrt(mean(x²) + eps) * w` of each row.
    pub(super) fn record_rms_norm(&self, w: &Buffer, eps: f32, x: &Buffer, y: &Buffer) -> bool {
        assert!(x.len == y.len && (x.len == 0 || x.len.is_multiple_of(w.len)));
        if !self.sees(&[w, x, y]) {
            return false;
        }
        if x.len > 0 {
            let rows = x.len / w.len;
            let constants = [rows as u32, w.len as u32, eps.to_bits()];
            let groups = self.groups(rows);
            self.recorder.dispatch(Shader::RmsNorm, [&w.memory, &x.memory, &y.memory], &constants, groups);
        }
        true
    }

    /// `y = W x` of one token, added to `y` if `accumulate`.
    pub(super) fn record_nf4_matvec(&self, w: &Matrix, x: &Buffer, y: &Buffer, accumulate: bool) -> bool {
        let (rows, cols) = self.cpu.shape(&w.host);
        let Some(blocks) = &w.blocks else { return false };
        if x.len != cols || y.len != rows || !self.sees(&[x, y]) {
            return false;
        }
        let constants: Vec<u32> =
            [rows as u32, cols as u32, u32::from(accumulate)].into_iter().chain(blocks.constants).collect();
        let groups = self.groups(rows);
        self.recorder.dispatch(Shader::Nf4Matvec, [&blocks.memory, &x.memory, &y.memory], &constants, groups);
        true
    }

    /// Whether a shader can see all of each; then lengths also fit its 32 bits.
    fn sees(&self, buffers: &[&Buffer]) -> bool {
        buffers.iter().all(|buffer| buffer.memory.size <= self.device.limits.range)
    }

    /// As many of `wanted` work groups as a dispatch may have; shaders go round until all is done.
    fn groups(&self, wanted: usize) -> u32 {
        u32::try_from(wanted).unwrap_or(u32::MAX).min(self.device.limits.groups)
    }
}
