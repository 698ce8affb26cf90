//! Pocketlora runs and fine-tunes QLoRA models on the device in your hand.
//!
//! A model is a Hugging Face directory whose linear layers are in bitsandbytes NF4; it is mapped and used in place. An
//! adapter is a PEFT directory. [`Session`] is the way in:
//!
//! ```no_run
//! use pocketlora::{Options, Session, chat::Message, generate::Sampling};
//! use std::{ops::ControlFlow, path::Path};
//!
//! # fn main() -> pocketlora::Result<()> {
//! let mut session = Session::open(Path::new("smollm2-nf4"), &Options::default())?;
//! session.attach(Path::new("my-adapter"), 1.0)?;
//! let question = [Message::new("user", "What is my dog called?")];
//! session.chat(&question, 64, &Sampling::default(), &mut |text| {
//!     print!("{text}");
//!     ControlFlow::Continue(())
//! })?;
//! # Ok(())
//! # }
//! ```
//!
//! Training goes through [`Session::trainer`], files through [`mod@format`] and [`adapter`]. Without default features the
//! library is pure Rust and has no network code; `hub` adds downloads, `cli` the command line.
#![deny(unsafe_code)]

pub mod adapter;
pub mod base;
#[cfg(feature = "bench")]
pub mod bench;
pub mod chat;
#[cfg(feature = "cli")]
pub mod cli;
mod clock;
mod data;
mod error;
pub mod eval;
pub mod exec;
pub mod format;
pub mod generate;
#[cfg(feature = "hub")]
pub mod hub;
mod import;
pub mod memory;
mod mmap;
mod rng;
mod session;
mod text;
pub mod tokenizer;
pub mod train;

pub use error::{Error, ErrorCode, Result};
pub use import::check_import;
pub use session::{Options, Precision, Session};
