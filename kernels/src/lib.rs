//! Numbers: the NF4 codec, the [`Backend`] trait and the devices behind it: the CPU, and Vulkan as an experiment.
//!
//! This crate knows no file and no model. See `backend.rs` for the list of operations.
#![deny(unsafe_code)]

mod backend;
mod counted;
mod error;
mod matrix;
mod random;

pub mod cpu;
pub mod quant;
#[cfg(feature = "vulkan")]
pub mod vulkan;

pub use backend::{
    AdamW, Arithmetic, Attention, Backend, CacheType, Lion, LowRank, MOMENT_BLOCK, Product, Sgd, WorkType, narrow_width,
};
pub use counted::{Count, Counted};
pub use cpu::Cpu;
pub use error::Error;
pub use matrix::{Absmax, FloatType, MatrixData, MatrixSource, Nf4Source};
pub use random::mix;
#[cfg(feature = "vulkan")]
pub use vulkan::Vulkan;
