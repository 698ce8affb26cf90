//! LoRA in the files of other programs, llama.cpp's GGUF and mlx-lm's folders, and in few bits, in and out.
//!
//! Inside, an adapter is always as PEFT has it. What a format cannot say is folded into what it can: a scale of its own for
//! a layer goes into the layer's B, rsLoRA's scale into alpha.

mod compressed;
mod gguf;
mod mlx;
mod signs;

pub use compressed::{Compressed, export_compressed};
pub(super) use compressed::{is_compressed, open as open_compressed};
pub(super) use gguf::{fit, is_adapter as is_gguf_adapter, open as open_gguf};
pub(super) use mlx::{is_adapter as is_mlx_adapter, open as open_mlx};

use super::attach::{check_shapes, layers_of};
use super::{AdapterFile, HostTensor, Lora, Method, Tensors};
use crate::error::{Error, ErrorCode, Result};
use pocketlora_models::{Model, Role};
use std::borrow::Cow;
use std::path::Path;

/// Writes the LoRA `file`, which is for `model`, as the GGUF file `out` of llama.cpp, in f32.
///
/// # Errors
/// The adapter is no LoRA or has parts that the format cannot hold, its modules are not the model's, llama.cpp has no such
/// model, or the file cannot be written.
pub fn export_gguf(file: &AdapterFile, model: &dyn Model, out: &Path) -> Result<()> {
    gguf::write(&Plain::of(file, model, "GGUF")?, out)
}

/// Writes the LoRA `file`, which is for `model`, as the folder `out` of mlx-lm, in f32.
///
/// # Errors
/// As of [`export_gguf`]; `out` holds something.
pub fn export_mlx(file: &AdapterFile, model: &dyn Model, out: &Path) -> Result<()> {
    mlx::write(&Plain::of(file, model, "mlx")?, out)
}

/// A LoRA that is nothing but low-rank terms on linear layers of a model.
struct Plain<'a> {
    file: Cow<'a, AdapterFile>,
    model: &'a dyn Model,
}

/// The term on one layer: `factor B A`.
struct Layer<'a> {
    module: &'a str,
    rank: usize,
    factor: f32,
    /// `[r, in]`.
    a: &'a HostTensor,
    /// `[out, r]`.
    b: &'a HostTensor,
}

impl<'a> Plain<'a> {
    /// `file` on `model`, to be written as `format`.
    fn of(file: &'a AdapterFile, model: &'a dyn Model, format: &str) -> Result<Self> {
        let refused = |what: String| {
            let next = "merge it into its base with `pocketlora merge`, and give that away";
            Err(Error::unsupported(&file.dir, format!("to write {what} as {format}"), next))
        };
        file.check_alone("an export takes one adapter")?;
        let Method::Lora(lora) = &file.method else { return refused(file.method.kind().name().to_owned()) };
        if lora.invocation.is_some() {
            let what = format!("to write an adapter that works behind an invocation as {format}");
            return Err(Error::unsupported(&file.dir, what, "use it here or with PEFT"));
        }
        if lora.bias {
            return refused("a LoRA with biases (`lora_bias`)".to_owned());
        }
        if !file.replaced.is_empty() {
            let names = file.replaced.names().collect::<Vec<_>>().join("`, `");
            return refused(format!("an adapter with weights in place of the base's (`{names}`)"));
        }
        let fitted = file.fitted(model)?;
        for (param, module) in layers_of(model, &fitted)? {
            let spec = &model.params()[param.0 as usize];
            check_shapes(&fitted, module, [spec.shape[0], spec.shape[1]])?;
            if spec.role == Role::Embedding {
                return refused("an adapter on the embedding, or on a head that is the embedding,".to_owned());
            }
        }
        Ok(Self { file: fitted, model })
    }

    /// The terms, in the order of the names of their layers.
    fn layers(&self) -> Vec<Layer<'_>> {
        let Method::Lora(lora) = &self.file.method else { unreachable!("asked when it was made") };
        let part = |module: &str, part: &str| &self.file.tensors[&format!("{module}.{part}")];
        let layer = |module| {
            let (rank, factor) = lora.of_module(module);
            Layer { module, rank, factor, a: part(module, "lora_A.weight"), b: part(module, "lora_B.weight") }
        };
        self.file.modules().map(layer).collect()
    }
}

/// The value that most of `values` have, the first of several: what is said once for all, so that few need to say
/// otherwise.
fn most_frequent(values: &[f32]) -> Option<f32> {
    let count = |value: &f32| values.iter().filter(|v| *v == value).count();
    values.iter().rev().max_by_key(|value| count(value)).copied()
}

/// The adapter with terms of the given ranks and alphas, by module, that lies at `path`.
fn lora_of(path: &Path, modules: &[(String, usize, f64)], tensors: Tensors) -> Result<AdapterFile> {
    if modules.is_empty() {
        return Err(Error::format(path, "tensors", "those of a LoRA", "none"));
    }
    let lora = Lora::of_modules(modules);
    Ok(AdapterFile::new(path.to_owned(), Method::Lora(lora), tensors))
}

/// The error for a pair of which one half is missing or contradicts the other.
fn bad_pair(path: &Path, module: &str, got: String) -> Error {
    let place = format!("`{}`: module `{module}`", path.display());
    let message = format!("expected two matrices of one rank, got {got}; fetch the file again, or export it anew");
    Error::new(ErrorCode::Format, place, message)
}
