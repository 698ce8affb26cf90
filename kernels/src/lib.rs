//! Numbers: the NF4 codec, the [`Backend`] trait and the devices behind it: the CPU, and Vulkan as an experiment.
//!
//! This crate knows no file and no model. See `call.rs` for the list of operations.
#![deny(unsafe_code)]

mod backend;
mod call;
mod counted;
mod double;
mod error;
mod matrix;
mod memory;
mod random;
mod settings;
mod targets;

pub mod cpu;
pub mod quant;
#[cfg(feature = "vulkan")]
pub mod vulkan;

pub use backend::Backend;
pub use call::{ALL_ROWS, Access, Call, LowRank, Product};
pub use counted::{Count, Counted};
pub use cpu::{Cpu, Map};
pub use double::doubles;
pub use error::Error;
pub use matrix::{Absmax, FloatType, MatrixData, MatrixSource, Nf4Source};
pub use memory::{Lends, Memory};
pub use random::mix;
pub use settings::{
    Activation, AdamW, Arithmetic, Attention, Blocks, CacheType, Columns, DeltaRule, Lion, MOMENT_BLOCK, Scores, Sgd,
    StateSpace, WorkType, narrow_width,
};
pub use targets::Targets;
#[cfg(feature = "vulkan")]
pub use vulkan::Vulkan;
