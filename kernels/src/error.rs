//! What can go wrong on a device.

/// Failures of a [`crate::Backend`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An allocation was refused.
    #[error("out of memory: could not get `{bytes}` bytes")]
    OutOfMemory {
        /// Size of the refused allocation.
        bytes: usize,
    },
    /// The parts of a weight contradict its shape.
    #[error("weight of shape `[{rows}, {cols}]`: {what} has `{got}` {unit}, expected `{expected}`")]
    Matrix {
        /// Output features.
        rows: usize,
        /// Input features.
        cols: usize,
        /// The part that is wrong.
        what: &'static str,
        /// What is counted.
        unit: &'static str,
        /// What was found.
        got: usize,
        /// What the shape asks for.
        expected: usize,
    },
    /// The device failed or was lost.
    #[error("device: {0}")]
    Device(String),
}
