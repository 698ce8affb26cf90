//! Adapters: small trainable additions to a frozen base, and the files that hold them.
//!
//! A [`Method`] says what an adapter's file holds and builds forms of it: what works on a linear layer or in attention
//! while a model runs (`form.rs`). Whoever trains, saves or plans knows tensors by name and shape alone.

pub(crate) mod attach;
mod compose;
mod content;
mod exchange;
mod experts;
mod fold;
pub(crate) mod form;
mod held;
mod ia3;
mod kinds;
mod lora;
mod low_rank;
pub(crate) mod mark;
mod merge;
mod method;
mod peft;
mod prefix_tuning;
mod replaced;
mod scale;
mod tensor;

pub(crate) use attach::Adapters;
pub use compose::{Combination, Composed, Composition, MajoritySign, compose};
pub use exchange::{export_gguf, export_mlx};
pub(crate) use form::{Context, Dropout, Gradients, Prefix};
pub(crate) use held::TensorId;
pub use ia3::Ia3;
pub use kinds::{Kind, Method};
pub use lora::Lora;
pub use merge::{Merged, Rounding, rounding};
pub use method::{Group, Settings};
pub use peft::{AdapterFile, Replacements, Rows, WholeTensor};
pub use prefix_tuning::PrefixTuning;
pub(crate) use replaced::Replaced;
pub use tensor::{HostTensor, Stored, TensorSpec, Tensors};

#[cfg(feature = "cli")]
pub(crate) use method::AUTO;
pub(crate) use method::{layer_at, target_layers};
