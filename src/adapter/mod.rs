//! Adapters: small trainable additions to frozen linear layers, and the files that hold them.

mod lora;
pub(crate) mod mark;
mod peft;
mod replaced;

pub use lora::Lora;
pub use peft::{AdapterFile, HostTensor, LoraConfig, LoraModule, Replacements, Rows, WholeTensor};
pub use replaced::Replaced;

use crate::error::{Error, ErrorCode, Result};
use crate::exec::{Base, Pool};
use pocketlora_kernels::{Arithmetic, Backend, LowRank, WorkType};
use pocketlora_models::{Param, Role};
use std::path::Path;

/// What an adapter computes with.
pub struct Context<'a, B: Backend> {
    /// The device.
    pub backend: &'a B,
    /// Scratch buffers.
    pub pool: &'a mut Pool<B>,
    /// Of the products.
    pub arithmetic: Arithmetic,
    /// Dropout of the adapter's input, in training only.
    pub dropout: Option<Dropout>,
}

/// Dropout of an adapter's input: which elements fall is a function of `key` and their position alone, so that
/// recomputing a layer drops the same ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability that an element is dropped.
    pub p: f32,
    /// Selects the random stream; differs by step, micro-batch and layer.
    pub key: u64,
    /// Position in the stream of the input's first element; of a pass, that of its first token.
    pub first: u64,
}

/// Name and shape of one of an adapter's tensors, as PEFT names it under its module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Such as `lora_A.weight`.
    pub name: &'static str,
    /// Row-major shape.
    pub shape: [usize; 2],
}

/// One adapter method on one linear layer `[out, in]`.
pub trait Adapter<B: Backend>: Send + Sync {
    /// Turns `y = x Wᵀ` `[T, out]` into the adapted output, given `x` `[T, in]`.
    ///
    /// # Errors
    /// Out of memory.
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()>;

    /// The same as a low-rank term, where it is one: the base's product then takes it along, and `apply` is not called.
    fn low_rank(&self) -> Option<LowRank<'_, B>> {
        None
    }

    /// Given the gradient `dy` of the adapted output, adds to the gradients `grads` of [`Adapter::tensors`]; returns what
    /// [`Adapter::backward_x`] needs of it. In two steps, so that `x` may be gone before `dx` is there. Of an adapter with
    /// [`Adapter::low_rank`] that is `dh`, the gradient of `x Aᵀ`.
    ///
    /// # Errors
    /// Out of memory.
    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        x: &B::Buffer,
        dy: &B::Buffer,
        grads: &mut [B::Buffer],
    ) -> Result<B::Buffer>;

    /// Adds the adapter's part to the input's gradient `dx`. The base's product takes `dh A` along where
    /// [`Adapter::low_rank`] is one and nothing of `x` was dropped, and this is not called.
    ///
    /// # Errors
    /// Out of memory.
    fn backward_x(&self, cx: &mut Context<'_, B>, carried: &B::Buffer, dx: &mut B::Buffer) -> Result<()>;

    /// The tensors that training moves.
    fn tensors(&self, backend: &B) -> Vec<TensorSpec>;

    /// Lends each of [`Adapter::tensors`] of an adapter that was loaded as [`WorkType::F32`]: they are the masters
    /// themselves.
    fn update(&mut self, backend: &B, work: &mut dyn FnMut(usize, &mut B::Buffer));

    /// Copies tensor number `index` of such an adapter out.
    ///
    /// # Errors
    /// Device lost.
    fn read(&self, backend: &B, index: usize, out: &mut [f32]) -> Result<()>;
}

/// The adapters attached to a model, by linear layer. Several on one layer add up.
pub struct Adapters<B: Backend> {
    by_param: Vec<Vec<Box<dyn Adapter<B>>>>,
    /// Weights that they bring with them, in place of the base's.
    replaced: Replaced<B>,
}

impl<B: Backend> Adapters<B> {
    /// None.
    pub fn none(base: &Base<B>) -> Self {
        Self { by_param: base.model.params().iter().map(|_| Vec::new()).collect(), replaced: Replaced::default() }
    }

    /// Those on the linear layer with weight `p`, in the order in which they were attached.
    pub fn on(&self, p: Param) -> &[Box<dyn Adapter<B>>] {
        &self.by_param[p.0 as usize]
    }

    /// As [`Adapters::on`], to be changed.
    pub fn on_mut(&mut self, p: Param) -> &mut [Box<dyn Adapter<B>>] {
        &mut self.by_param[p.0 as usize]
    }

    /// All, with the parameter each sits on, in the order of the parameters.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (Param, &mut Box<dyn Adapter<B>>)> {
        let at = |i: usize| Param(i as u32);
        self.by_param.iter_mut().enumerate().flat_map(move |(i, list)| list.iter_mut().map(move |a| (at(i), a)))
    }

    /// What stands in for weights of the base.
    #[must_use]
    pub fn replaced(&self) -> &Replaced<B> {
        &self.replaced
    }

    /// Puts an adapter on the linear layer with weight `p`.
    pub(crate) fn push(&mut self, p: Param, adapter: Box<dyn Adapter<B>>) {
        self.by_param[p.0 as usize].push(adapter);
    }

    /// Attaches every module of `file` with its effect multiplied by `factor`, and puts the weights that come with it in
    /// place of the base's.
    ///
    /// # Errors
    /// A module or shape that this base does not have; a weight that another adapter brings, too, or a factor where
    /// there is nothing to multiply. All is as it was then.
    pub fn attach(&mut self, base: &Base<B>, file: &AdapterFile, factor: f32, dtype: WorkType) -> Result<()> {
        mark::check(base, file)?;
        // All are built before any is attached: a mismatch in the last one must leave the model as it was.
        let replaced = self.replaced.with(base, file, factor)?;
        let mut built = Vec::with_capacity(file.modules.len());
        for module in &file.modules {
            let param = target(base, &file.dir, &module.path)?;
            let shape = base.backend.shape(replaced.factor(param).unwrap_or_else(|| base.matrix(param)));
            module.check_shape(&file.dir, shape)?;
            built.push((param, Lora::load(&base.backend, module, factor, dtype)?));
        }
        for (i, list) in self.by_param.iter().enumerate().filter(|(_, list)| !list.is_empty()) {
            let rows = |replaced: &Replaced<B>| replaced.factor(Param(i as u32)).map(|m| base.backend.shape(m));
            if list.iter().any(|a| a.low_rank().is_some()) && rows(&replaced) != rows(&self.replaced) {
                let name = &base.model.params()[i].name;
                let message = format!("it brings another `{name}` than an attached adapter adds to; attach it first");
                return Err(Error::new(ErrorCode::AdapterMismatch, format!("`{}`", file.dir.display()), message));
            }
        }
        for (param, lora) in built {
            self.by_param[param.0 as usize].push(Box::new(lora));
        }
        self.replaced = replaced;
        Ok(())
    }
}

/// The linear layer that an adapter's module path names; a tied head is the embedding's parameter.
fn target<B: Backend>(base: &Base<B>, dir: &Path, path: &str) -> Result<Param> {
    let params = base.model.params();
    let found = params.iter().position(|p| match p.role {
        Role::Linear | Role::Head => p.module() == path,
        Role::Embedding => path == "lm_head" && base.model.config().tied_head,
        Role::Vector => false,
    });
    found.map(|i| Param(i as u32)).ok_or_else(|| foreign_module(base, dir, "a linear layer", path))
}

/// The error for a module that this base does not have.
fn foreign_module<B: Backend>(base: &Base<B>, dir: &Path, expected: &str, path: &str) -> Error {
    let message = format!(
        "expected {expected} of this `{}` base, got module `{path}`; use the base that the adapter was trained on",
        base.model.config().model_type
    );
    Error::new(ErrorCode::AdapterMismatch, format!("`{}`", dir.display()), message)
}
