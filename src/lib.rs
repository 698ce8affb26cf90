//! Pocketlora runs and fine-tunes QLoRA models on the device in your hand.
#![deny(unsafe_code)]

mod error;
pub mod format;
#[cfg(feature = "hub")]
pub mod hub;
mod mmap;

pub use error::{Error, ErrorCode, Result};
