//! Adapters: small trainable additions to a frozen base, and the files that hold them.
//!
//! A [`Method`] says what an adapter's file holds and builds forms of it: what works on a linear layer or in attention
//! while a model runs (`form.rs`). Whoever trains, saves or plans knows tensors by name and shape alone.

mod activated;
pub(crate) mod attach;
mod begun;
mod cartridge;
mod compose;
mod content;
mod encoder;
mod exchange;
mod experts;
mod fold;
pub(crate) mod form;
mod held;
mod ia3;
mod kinds;
mod learned;
mod ln_tuning;
mod lora;
mod low_rank;
pub(crate) mod mark;
mod merge;
mod method;
mod p_tuning;
mod peft;
mod prefix_tuning;
mod prompt;
mod prompt_tuning;
mod replaced;
mod rows;
mod scale;
mod tensor;
mod trainable_tokens;

pub(crate) use activated::last_invocation;
pub(crate) use attach::Adapters;
pub(crate) use begun::begin;
pub use cartridge::Cartridge;
pub use compose::{Combination, Composed, Composition, MajoritySign, compose};
pub use exchange::{export_gguf, export_mlx};
pub(crate) use form::{Context, Dropout, Gradients, Prefix};
pub(crate) use held::TensorId;
pub use ia3::Ia3;
pub use kinds::{Kind, Method};
pub(crate) use learned::{Learned, fresh};
pub use ln_tuning::LnTuning;
pub use lora::Lora;
pub use merge::{Merged, Rounding, rounding};
pub use method::{Group, Settings};
pub use p_tuning::PTuning;
pub use peft::{AdapterFile, Replacements, Rows, WholeTensor};
pub use prefix_tuning::PrefixTuning;
pub use prompt::Prompt;
pub use prompt_tuning::PromptTuning;
pub(crate) use replaced::Replaced;
pub use tensor::{HostTensor, Stored, TensorSpec, Tensors};
pub use trainable_tokens::TrainableTokens;

#[cfg(feature = "cli")]
pub(crate) use method::AUTO;
pub(crate) use method::{layer_at, with_embedding};
