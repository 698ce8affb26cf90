//! Pocketlora runs and fine-tunes QLoRA models on the device in your hand.
//!
//! A model is a Hugging Face directory whose linear layers are in bitsandbytes NF4; it is mapped and used in place. An
//! adapter is a PEFT directory. [`Engine`] is the way in:
//!
//! ```no_run
//! use pocketlora::{Engine, Options};
//! use std::{ops::ControlFlow, path::Path};
//!
//! # fn main() -> pocketlora::Result<()> {
//! let engine = Engine::open(Path::new("smollm2-nf4"), &Options::new())?;
//! engine.attach(Path::new("my-adapter"), 1.0)?;
//! let mut chat = engine.chat()?;
//! chat.sampling = engine.recommended()?.sampling;
//! chat.ask("What is my dog called?", &mut |text: &str| {
//!     print!("{text}");
//!     ControlFlow::Continue(())
//! })?;
//! # Ok(())
//! # }
//! ```
//!
//! An engine is shared by any number of chats and trainers, each on a thread of its own if wanted: `examples/app.rs` shows
//! how. Training goes through [`Engine::trainer`], files through [`mod@format`] and [`adapter`]. Without default features
//! the library is pure Rust and has no network code; `hub` adds downloads, `metrics`, `bench` and `charts` what their names
//! say, `seal` adapters in encrypted files, `cli` the command line and all of these.
#![deny(unsafe_code)]

pub mod adapter;
mod base;
#[cfg(feature = "bench")]
pub mod bench;
pub mod chat;
mod checksum;
#[cfg(feature = "cli")]
pub mod cli;
mod clock;
mod data;
mod engine;
mod error;
pub mod eval;
mod exec;
pub mod ffi;
pub mod format;
pub mod generate;
#[cfg(feature = "hub")]
pub mod hub;
mod import;
pub mod memory;
mod mmap;
mod rng;
pub mod study;
mod text;
pub mod tokenizer;
pub mod train;
mod turn;

pub use adapter::{AdapterFile, Kind as AdapterKind};
pub use chat::Message;
pub use engine::{
    AdapterId, Answer, Attached, Begun, Cancel, Chat, DATA, Decoder, Device, Engine, Estimate, GivenFile, Lesson,
    LessonData, Listener, Options, Pick, Pooling, Precision, Pruned, Reader, Routed, Start, Trainer, check_threads,
};
pub use error::{Error, ErrorCode, Result};
pub use generate::{Dry, Finish, Generated, LogitFilter, Recommended, Sampling, SamplingSource, TokenBias};
pub use import::check_import;
pub use text::Text;
pub use tokenizer::SpecialText;
pub use train::{
    Dataset, Directive, Material, MemoryPlan, Observer, Policy, StepReport, Summary, TrainConfig, TrainHandle,
    TrainPrecision,
};

/// What this crate's own tests look into. It changes without notice.
#[doc(hidden)]
pub mod internals {
    pub use crate::adapter::attach::Adapters;
    pub use crate::adapter::forms::Gradients;
    pub use crate::base::{Base, Pool};
    pub use crate::checksum::add as add_to_checksum;
    pub use crate::exec::infer::{Logits, Numbers, Sequence, Step, Workspace};
    pub use crate::train::layers::Depth;
    pub use crate::train::step::{Layout, MicroBatch, Watch, micro_step};
    pub use crate::train::sums::Sums;

    use crate::Engine;
    use pocketlora_kernels::Cpu;
    use std::sync::Arc;

    /// The frozen base of an engine.
    #[must_use]
    pub fn base(engine: &Engine) -> &Arc<Base<Cpu>> {
        engine.base()
    }

    /// How an engine keeps and multiplies numbers.
    #[must_use]
    pub fn numbers(engine: &Engine) -> Numbers {
        engine.numbers()
    }
}
