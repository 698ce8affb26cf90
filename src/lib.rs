//! Pocketlora runs and fine-tunes QLoRA models on the device in your hand.
#![deny(unsafe_code)]

mod error;
pub mod format;
mod mmap;

pub use error::{Error, ErrorCode, Result};
