//! Executors: a model's operations run on a device, with NF4 weights and adapters below the linear layers.
//!
//! [`infer`] runs operations at once, with what sequences remember of earlier tokens; [`train`] records them and runs them
//! forward and backward. Both have them run by one [`interpreter`], which has one file for each operation in [`ops`].

mod back;
pub mod infer;
mod interpreter;
mod kept;
mod lives;
mod ops;
mod pass;
mod sequence;
mod tape;

/// Forward with a tape and the backward pass over it.
///
/// A tape holds one layer (or the head) at a time: training keeps some layers' inputs, runs each layer again when its
/// gradient is due, and drops the tape.
pub mod train {
    pub use super::pass::{Batch, Pass};
}

pub(crate) use kept::{Find, KeptFacts, Parts};
#[cfg(feature = "bench")]
pub(crate) use lives::multiplied_once;
pub(crate) use pass::{virtual_ids, virtual_number};
use tape::Tape;
