//! Adapters: small trainable additions to a frozen base, and the files that hold them.
//!
//! A [`Method`] says what an adapter's file holds and builds forms of it: what works on a linear layer or in attention
//! while a model runs (`form.rs`). Whoever trains, saves or plans knows tensors by name and shape alone.

mod adalora;
pub(crate) mod attach;
mod bd_lora;
mod beft;
mod blocks;
mod cayley;
mod content;
mod delora;
mod dora;
mod exchange;
mod experts;
mod fold;
pub(crate) mod form;
mod gralora;
mod held;
mod hra;
mod ia3;
mod kinds;
mod loha;
mod lokr;
mod lora;
mod lora_fa;
mod low_rank;
mod made;
pub(crate) mod mark;
mod merge;
mod method;
mod miss;
mod oft;
mod output;
mod peft;
mod pieces;
mod prefix_tuning;
mod reflect;
mod replaced;
mod road;
mod scale;
mod scaled_term;
mod shira;
mod singular;
mod sparse;
mod square;
mod supertuning;
mod tensor;
mod vera;
mod weight;

pub use adalora::Adalora;
pub(crate) use attach::Adapters;
pub use bd_lora::Bdlora;
pub use beft::Beft;
pub use delora::Delora;
pub use dora::Dora;
pub use exchange::{export_gguf, export_mlx};
pub(crate) use form::{Context, Dropout, Gradients, Prefix};
pub use gralora::Gralora;
pub(crate) use held::{Part as TensorPart, TensorId};
pub use hra::Hra;
pub use ia3::Ia3;
pub use kinds::{Kind, Method};
pub use loha::Loha;
pub use lokr::Lokr;
pub use lora::Lora;
pub use lora_fa::LoraFa;
pub use merge::{Merged, Rounding, rounding};
pub use method::{Budget, Group, Settings};
pub use miss::Miss;
pub use oft::Oft;
pub use peft::{AdapterFile, Replacements, Rows, WholeTensor};
pub use prefix_tuning::PrefixTuning;
pub(crate) use replaced::Replaced;
pub use road::Road;
pub use shira::Shira;
pub use supertuning::Supertuning;
pub use tensor::{HostTensor, Stored, TensorSpec, Tensors};
pub use vera::Vera;

#[cfg(feature = "cli")]
pub(crate) use method::AUTO;
pub(crate) use method::{layer_at, target_layers};
