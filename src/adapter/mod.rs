//! Adapters: small trainable additions to a frozen base, and the files that hold them.
//!
//! A [`Method`] says what an adapter's file holds and builds forms of it: what works on a linear layer or in attention
//! while a model runs (`forms/`). Whoever trains, saves or plans knows tensors by name and shape alone.

pub(crate) mod attach;
mod begun;
mod cayley;
mod compose;
mod content;
mod encoder;
mod exchange;
mod experts;
mod fold;
pub(crate) mod forms;
mod held;
mod init;
mod kinds;
mod learned;
mod made;
pub(crate) mod mark;
mod merge;
mod method;
mod methods;
mod peft;
mod pieces;
mod prompt;
mod prune;
mod replaced;
mod singular;
mod square;
mod svd;
mod tensor;
mod weight;

pub(crate) use attach::Adapters;
pub(crate) use begun::begin;
pub use compose::{Combination, Composed, Composition, MajoritySign, compose};
pub use exchange::{Compressed, export_compressed, export_gguf, export_mlx};
pub(crate) use forms::activated::last_invocation;
pub(crate) use forms::{Context, Dropout, Gradients, Prefix};
pub(crate) use held::{Part as TensorPart, TensorId};
pub use init::Init;
pub(crate) use init::{Sketch, is_first};
pub use kinds::{Kind, Method};
pub(crate) use learned::{Learned, fresh};
pub use merge::{Merged, Rounding, rounding};
pub use method::{Budget, Group, Settings};
pub use methods::adalora::Adalora;
pub use methods::bd_lora::Bdlora;
pub use methods::beft::Beft;
pub use methods::bottleneck::Bottleneck;
pub use methods::cartridge::Cartridge;
pub use methods::delora::Delora;
pub use methods::delta_lora::DeltaLora;
pub use methods::dora::Dora;
pub use methods::dylora::Dylora;
pub use methods::gralora::Gralora;
pub use methods::hra::Hra;
pub use methods::hydra::Hydra;
pub use methods::ia3::Ia3;
pub use methods::ln_tuning::LnTuning;
pub use methods::loha::Loha;
pub use methods::lokr::Lokr;
pub use methods::lora::Lora;
pub use methods::lora_fa::LoraFa;
pub use methods::lora_xs::LoraXs;
pub use methods::melora::Melora;
pub use methods::miss::Miss;
pub use methods::oft::Oft;
pub use methods::p_tuning::PTuning;
pub use methods::prefix_tuning::PrefixTuning;
pub use methods::prompt_tuning::PromptTuning;
pub use methods::road::Road;
pub use methods::shira::Shira;
pub use methods::sora::Sora;
pub use methods::supertuning::Supertuning;
pub use methods::trainable_tokens::TrainableTokens;
pub use methods::vera::Vera;
pub use peft::{AdapterFile, Replacements, Rows, WholeTensor};
pub use prompt::Prompt;
pub use prune::{PruneBy, Size as PrunedSize, cut_rank};
pub(crate) use prune::{add_scores, check_pruning, write_pruned};
pub(crate) use replaced::Replaced;
pub use tensor::{HostTensor, Stored, TensorSpec, Tensors};

#[cfg(feature = "cli")]
pub(crate) use method::AUTO;
pub(crate) use method::{layer_at, with_embedding};
