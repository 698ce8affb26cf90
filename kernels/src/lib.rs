//! Numbers: the NF4 codec, the [`Backend`] trait and the CPU kernels behind it.
//!
//! This crate knows no file and no model. See `backend.rs` for the list of operations.
#![deny(unsafe_code)]

mod backend;
mod error;
mod matrix;
mod random;

pub mod cpu;
pub mod quant;

pub use backend::{AdamW, Arithmetic, Attention, Backend, CacheType, LowRank, Product, WorkType};
pub use cpu::Cpu;
pub use error::Error;
pub use matrix::{Absmax, FloatType, MatrixData, MatrixSource, Nf4Source};
pub use random::mix;
