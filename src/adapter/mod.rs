//! Adapters: small trainable additions to frozen linear layers, and the files that hold them.

mod lora;
mod low_rank;
pub(crate) mod mark;
mod method;
mod peft;
mod replaced;
mod tensor;

pub use lora::Lora;
pub use method::{Group, Kind, Method, Settings};
pub use peft::{AdapterFile, Replacements, Rows, WholeTensor};
pub use replaced::Replaced;
pub use tensor::{HostTensor, Stored, TensorSpec, Tensors};

pub(crate) use method::{layer_at, target_layers};

use crate::error::{Error, ErrorCode, Result};
use crate::exec::{Base, Pool};
use pocketlora_kernels::{Arithmetic, Backend, LowRank, WorkType};
use pocketlora_models::Param;
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

    /// Given the gradient `dy` of the adapted output, adds to the gradients `grads` of its tensors; returns what
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

    /// Lends each tensor of an adapter that was loaded as [`WorkType::F32`]: they are the masters themselves.
    fn update(&mut self, backend: &B, work: &mut dyn FnMut(usize, &mut B::Buffer));

    /// Copies tensor number `index` of such an adapter out.
    ///
    /// # Errors
    /// Device lost.
    fn read(&self, backend: &B, index: usize, out: &mut [f32]) -> Result<()>;
}

/// What a method makes for a layer.
pub(crate) type Built<B> = Box<dyn Adapter<B>>;

/// Puts the tensors of one module on a device, for a method that builds what works with them.
pub(crate) struct Loader<'a, B: Backend> {
    backend: &'a B,
    module: &'a str,
    values: Values<'a>,
    dtype: WorkType,
}

/// Where an adapter's values come from.
#[derive(Clone, Copy)]
pub(crate) enum Values<'a> {
    /// These.
    Of(&'a Tensors),
    /// All are zeros, to count what an adapter takes.
    Zeros(&'a [TensorSpec]),
}

impl<'a> Values<'a> {
    fn shape(self, name: &str) -> Option<&'a [usize]> {
        match self {
            Self::Of(tensors) => tensors.get(name).map(|t| &t.shape[..]),
            Self::Zeros(specs) => specs.iter().find(|spec| spec.name == name).map(|spec| &spec.shape[..]),
        }
    }
}

impl<B: Backend> Loader<'_, B> {
    /// The matrix `part` of the module.
    ///
    /// # Errors
    /// Out of memory.
    pub fn matrix(&mut self, part: &str) -> Result<B::Matrix> {
        let (backend, name) = (self.backend, format!("{}.{part}", self.module));
        let [rows, cols] = self.values.shape(&name).expect("shapes were checked before")[..] else {
            unreachable!("shapes were checked before")
        };
        let mut matrix = backend.work_matrix(rows, cols, self.dtype)?;
        let Values::Of(tensors) = self.values else { return Ok(matrix) };
        let data = &tensors[&name].data;
        if self.dtype == WorkType::F32 {
            backend.with_values(&mut matrix, &mut |values| backend.write(values, data));
        } else {
            let mut master = backend.buffer(data.len())?;
            backend.write(&mut master, data);
            backend.set_matrix(&mut matrix, &master);
        }
        Ok(matrix)
    }
}

/// The number of an attached tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorId(usize);

/// A tensor of an attached adapter: what it is called, and where its values are.
struct Attached {
    spec: TensorSpec,
    param: Param,
    /// Number of the adapter on that layer, and of the tensor among its own.
    place: (usize, usize),
}

/// The adapters attached to a model, by linear layer. Several on one layer add up.
pub struct Adapters<B: Backend> {
    by_param: Vec<Vec<Built<B>>>,
    tensors: Vec<Attached>,
    /// Weights that they bring with them, in place of the base's.
    replaced: Replaced<B>,
}

impl<B: Backend> Adapters<B> {
    /// None.
    pub fn none(base: &Base<B>) -> Self {
        let by_param = base.model.params().iter().map(|_| Vec::new()).collect();
        Self { by_param, tensors: Vec::new(), replaced: Replaced::default() }
    }

    /// Those on the linear layer with weight `p`, in the order in which they were attached.
    pub fn on(&self, p: Param) -> &[Built<B>] {
        &self.by_param[p.0 as usize]
    }

    /// What stands in for weights of the base.
    #[must_use]
    pub fn replaced(&self) -> &Replaced<B> {
        &self.replaced
    }

    /// The tensors of all, with the weight of the layer that each belongs to: those of one adapter in the order of the
    /// base's parameters.
    pub fn tensors(&self) -> impl Iterator<Item = (TensorId, Param, &TensorSpec)> {
        self.tensors.iter().enumerate().map(|(i, t)| (TensorId(i), t.param, &t.spec))
    }

    /// Lends the values of a tensor that was loaded as [`WorkType::F32`]: they are the master itself.
    pub fn update(&mut self, backend: &B, id: TensorId, work: &mut dyn FnMut(&mut B::Buffer)) {
        let Attached { param, place: (adapter, part), .. } = self.tensors[id.0];
        self.by_param[param.0 as usize][adapter].update(backend, &mut |i, values| {
            if i == part {
                work(values);
            }
        });
    }

    /// Copies the values of such a tensor out.
    ///
    /// # Errors
    /// Device lost.
    pub fn read(&self, backend: &B, id: TensorId) -> Result<Vec<f32>> {
        let Attached { param, place: (adapter, part), spec } = &self.tensors[id.0];
        let mut values = vec![0.0; spec.values()];
        self.by_param[param.0 as usize][*adapter].read(backend, *part, &mut values)?;
        Ok(values)
    }

    /// Attaches what `file` does with its effect multiplied by `factor`, and puts the weights that come with it in place of
    /// the base's.
    ///
    /// # Errors
    /// A module or shape that this base does not have; a weight that another adapter brings, too, or a factor where
    /// there is nothing to multiply. All is as it was then.
    pub fn attach(&mut self, base: &Base<B>, file: &AdapterFile, factor: f32, dtype: WorkType) -> Result<()> {
        mark::check(base, file)?;
        // All are built before any is attached: a mismatch in the last one must leave the model as it was.
        let replaced = self.replaced.with(base, file, factor)?;
        let mut built = Vec::new();
        for module in file.modules() {
            let param = layer_at(base.model.as_ref(), module);
            let param = param.ok_or_else(|| foreign_module(base, &file.dir, "a linear layer", module))?;
            let layer = base.backend.shape(replaced.factor(param).unwrap_or_else(|| base.matrix(param)));
            check_shapes(file, module, layer.into())?;
            built.push((param, module));
        }
        for (i, list) in self.by_param.iter().enumerate().filter(|(_, list)| !list.is_empty()) {
            let rows = |replaced: &Replaced<B>| replaced.factor(Param(i as u32)).map(|m| base.backend.shape(m));
            if list.iter().any(|a| a.low_rank().is_some()) && rows(&replaced) != rows(&self.replaced) {
                let name = &base.model.params()[i].name;
                let message = format!("it brings another `{name}` than an attached adapter adds to; attach it first");
                return Err(Error::new(ErrorCode::AdapterMismatch, format!("`{}`", file.dir.display()), message));
            }
        }
        self.place(base, &file.method, Values::Of(&file.tensors), built, factor, dtype)?;
        self.replaced = replaced;
        Ok(())
    }

    /// Attaches an adapter of `method` with tensors `specs`, all zeros, to count what it takes.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn attach_zeros(&mut self, base: &Base<B>, method: &Method, specs: &[TensorSpec]) -> Result<()> {
        let first = method.kind().parts().first().copied().unwrap_or_default();
        let module = |spec: &'_ TensorSpec| Some(spec.name.strip_suffix(first)?.strip_suffix('.')?.to_owned());
        let modules: Vec<String> = specs.iter().filter_map(module).collect();
        let layers = modules.iter().filter_map(|module| {
            let param = layer_at(base.model.as_ref(), module)?;
            Some((param, module.as_str()))
        });
        self.place(base, method, Values::Zeros(specs), layers.collect(), 1.0, WorkType::F32)
    }

    /// Builds what `method` does at each of the layers `at`, then attaches it.
    fn place(
        &mut self,
        base: &Base<B>,
        method: &Method,
        values: Values<'_>,
        mut at: Vec<(Param, &str)>,
        factor: f32,
        dtype: WorkType,
    ) -> Result<()> {
        at.sort_by_key(|(param, _)| param.0);
        let mut built = Vec::with_capacity(at.len());
        for (param, module) in at {
            let mut loader = Loader { backend: &base.backend, module, values, dtype };
            built.push((param, module, method.on_layer(module, &mut loader, factor)?));
        }
        for (param, module, adapter) in built {
            let list = &mut self.by_param[param.0 as usize];
            for (i, part) in method.kind().parts().iter().enumerate() {
                let name = format!("{module}.{part}");
                let shape = values.shape(&name).expect("`on_layer` has loaded it").to_vec();
                self.tensors.push(Attached { spec: TensorSpec { name, shape }, param, place: (list.len(), i) });
            }
            list.push(adapter);
        }
        Ok(())
    }
}

/// Checks that the tensors of `module` fit its layer `[out, in]`.
fn check_shapes(file: &AdapterFile, module: &str, layer: [usize; 2]) -> Result<()> {
    for (part, expected) in file.method.kind().parts().iter().zip(file.method.shapes(module, layer)) {
        let got = file.tensors.get(&format!("{module}.{part}")).map(|t| &t.shape);
        if got != Some(&expected) {
            let got = got.map_or_else(|| "none".to_owned(), |shape| format!("`{shape:?}`"));
            let message = format!(
                "expected `{part}` of shape `{expected:?}` for a layer `{layer:?}`, got {got}; use the base that the \
                 adapter was trained on"
            );
            let place = format!("`{}`: module `{module}`", file.dir.display());
            return Err(Error::new(ErrorCode::AdapterMismatch, place, message));
        }
    }
    Ok(())
}

/// The error for a module that this base does not have.
fn foreign_module<B: Backend>(base: &Base<B>, dir: &Path, expected: &str, path: &str) -> Error {
    let message = format!(
        "expected {expected} of this `{}` base, got module `{path}`; use the base that the adapter was trained on",
        base.model.config().model_type
    );
    Error::new(ErrorCode::AdapterMismatch, format!("`{}`", dir.display()), message)
}
