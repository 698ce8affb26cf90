//! Executors: a model's operations turned into backend operations, with NF4 weights and adapters below `linear`.
//!
//! [`infer`] runs with a key/value cache, [`train`] with a tape. Both share the frozen [`Base`].

mod back;
mod fit;
pub mod infer;
mod pool;
mod tape;
pub mod train;

#[cfg(feature = "hub")]
pub(crate) use fit::architecture_of;
pub(crate) use fit::{architecture, check_source};
pub use pool::Pool;

use crate::adapter::{Adapters, Context, Dropout, Replaced};
use crate::error::{Error, ErrorCode, Result};
use crate::format::Checkpoint;
use pocketlora_kernels::{Arithmetic, Attention, Backend, Counted, MatrixSource, Product, WorkType};
use pocketlora_models::{AttentionShape, Linear, Model, Param, ParamSpec, Role, RopeTable};
use std::sync::Arc;

/// A model's architecture with its frozen weights on a device; shared by everything that runs it.
pub struct Base<B: Backend> {
    /// The device.
    pub backend: B,
    /// The architecture.
    pub model: Arc<dyn Model>,
    weights: Vec<Weight<B>>,
    /// The head in 8 bits, for [`Arithmetic::Int8`].
    int8_head: Option<B::Matrix>,
}

enum Weight<B: Backend> {
    Matrix(B::Matrix),
    Vector(B::Buffer),
}

impl<B: Backend> Base<B> {
    /// Builds the architecture that the checkpoint's `config.json` names and maps its weights.
    ///
    /// # Errors
    /// The family is unknown, or a tensor is missing or does not have the shape that the config asks for.
    pub fn load(backend: B, checkpoint: &Checkpoint) -> Result<Self> {
        let model = architecture(checkpoint)?;
        let mut weights = Vec::with_capacity(model.params().len());
        for spec in model.params() {
            let wrong_shape = |got: &[usize]| Err(fit::wrong_shape(checkpoint.dir(), spec, got));
            weights.push(match spec.role {
                Role::Vector => {
                    let values = checkpoint.vector(&spec.name)?;
                    if values.len() != spec.shape[0] {
                        return wrong_shape(&[values.len()]);
                    }
                    let mut buffer = backend.buffer(values.len())?;
                    backend.write(&mut buffer, &values);
                    Weight::Vector(buffer)
                }
                Role::Embedding | Role::Linear | Role::Head => {
                    let source = checkpoint.matrix(&spec.name)?;
                    if spec.shape != [source.rows, source.cols] {
                        return wrong_shape(&[source.rows, source.cols]);
                    }
                    let matrix = backend.matrix(source).map_err(|e| {
                        let place = format!("`{}`: tensor `{}`", checkpoint.dir().display(), spec.name);
                        let message = "its parts contradict each other; quantize the model again, or fetch it again";
                        Error::new(Error::from(e).code(), place, message)
                    })?;
                    Weight::Matrix(matrix)
                }
            });
        }
        Ok(Self { backend, model: model.into(), weights, int8_head: None })
    }

    /// The shapes of `model` without its weights, to count what work on it takes.
    pub(crate) fn counted(backend: Counted, model: Arc<dyn Model>) -> Result<Base<Counted>> {
        let weight = |spec: &ParamSpec| {
            Ok(match spec.shape[..] {
                [rows, cols] => Weight::Matrix(backend.work_matrix(rows, cols, WorkType::F32)?),
                _ => Weight::Vector(backend.buffer(spec.shape[0])?),
            })
        };
        let weights = model.params().iter().map(weight).collect::<Result<_>>()?;
        Ok(Base { backend, model, weights, int8_head: None })
    }

    /// Gives the head a copy in 8 bits for products in [`Arithmetic::Int8`].
    ///
    /// # Errors
    /// It does not have the head's shape.
    pub fn set_int8_head(&mut self, source: MatrixSource) -> Result<()> {
        let expected = self.backend.shape(self.matrix(self.model.head_param()));
        if expected != (source.rows, source.cols) {
            let message = format!("expected shape `{expected:?}`, got `{:?}`", (source.rows, source.cols));
            return Err(Error::new(ErrorCode::Format, "head in 8 bits", message));
        }
        self.int8_head = Some(self.backend.matrix(source)?);
        Ok(())
    }

    /// The matrix of `p` that products in `arithmetic` read.
    pub(crate) fn factor(&self, p: Param, arithmetic: Arithmetic) -> &B::Matrix {
        match &self.int8_head {
            Some(head) if arithmetic == Arithmetic::Int8 && p == self.model.head_param() => head,
            _ => self.matrix(p),
        }
    }

    /// As [`Base::factor`], unless an adapter brings another.
    pub(crate) fn factor_with<'a>(&'a self, replaced: &'a Replaced<B>, p: Param, by: Arithmetic) -> &'a B::Matrix {
        replaced.factor(p).unwrap_or_else(|| self.factor(p, by))
    }

    /// The matrix that tokens are looked up in: `p`, unless an adapter brings another.
    pub(crate) fn table_with<'a>(&'a self, replaced: &'a Replaced<B>, p: Param) -> &'a B::Matrix {
        replaced.table().unwrap_or_else(|| self.matrix(p))
    }

    /// The vector `p`, unless an adapter brings another.
    fn vector_with<'a>(&'a self, replaced: &'a Replaced<B>, p: Param) -> &'a B::Buffer {
        replaced.vector(p).unwrap_or_else(|| self.vector(p))
    }

    /// How many tokens it knows with what adapters bring: rows of its embedding and of its head.
    pub fn vocabulary(&self, replaced: &Replaced<B>) -> usize {
        self.backend.shape(self.factor_with(replaced, self.model.head_param(), Arithmetic::Exact)).0
    }

    pub(crate) fn matrix(&self, p: Param) -> &B::Matrix {
        match &self.weights[p.0 as usize] {
            Weight::Matrix(m) => m,
            Weight::Vector(_) => unreachable!("`load` stores a matrix for every parameter that is not a vector"),
        }
    }

    fn vector(&self, p: Param) -> &B::Buffer {
        match &self.weights[p.0 as usize] {
            Weight::Vector(v) => v,
            Weight::Matrix(_) => unreachable!("`load` stores a buffer for every vector"),
        }
    }

    /// Checks that `ids` are rows of the embedding; tokenizers and checkpoints do disagree in the wild.
    pub(crate) fn check_ids(&self, replaced: &Replaced<B>, ids: &[u32]) -> Result<()> {
        let vocab = self.vocabulary(replaced);
        match ids.iter().position(|&id| id as usize >= vocab) {
            None => Ok(()),
            Some(at) => Err(Error::new(
                ErrorCode::Data,
                format!("token {at}"),
                format!(
                    "expected an id below the vocabulary's {vocab}, got `{}`; use the tokenizer of this model",
                    ids[at]
                ),
            )),
        }
    }

    /// `cos` and `sin` `[T, D / 2]` of every rotary table at `positions`, as the tables' f32 products have them.
    fn rope_angles(&self, positions: &[u32], pool: &mut Pool<B>) -> Result<Vec<(B::Buffer, B::Buffer)>> {
        let angles = |rope: &pocketlora_models::Rope, f: fn(f64) -> f64| -> Vec<f32> {
            let scale = rope.attention_factor;
            let at = |&p: &u32| rope.inv_freq.iter().map(move |&w| f(f64::from(p as f32 * w)) as f32 * scale);
            positions.iter().flat_map(at).collect()
        };
        let mut load = |values: &[f32]| -> Result<B::Buffer> {
            let mut buffer = pool.take(&self.backend, values.len())?;
            self.backend.write(&mut buffer, values);
            Ok(buffer)
        };
        self.model.ropes().iter().map(|r| Ok((load(&angles(r, f64::cos))?, load(&angles(r, f64::sin))?))).collect()
    }

    /// Width of the heads that a rotary table turns.
    fn rope_dim(&self, table: RopeTable) -> usize {
        2 * self.model.ropes()[table.0 as usize].inv_freq.len()
    }

    /// `y = x Wᵀ` plus the adapters' parts plus bias, for each of `layers`: what both executors mean by linear layers.
    /// `dropout` gives each layer's, in training.
    fn linears(
        &self,
        adapters: &Adapters<B>,
        arithmetic: Arithmetic,
        dropout: impl Fn(Param) -> Option<Dropout>,
        layers: &[Linear],
        x: &B::Buffer,
        pool: &mut Pool<B>,
    ) -> Result<Vec<B::Buffer>> {
        let backend = &self.backend;
        let weight = |layer: &Linear| self.factor_with(adapters.replaced(), layer.weight, arithmetic);
        let mut ys = Vec::with_capacity(layers.len());
        for layer in layers {
            let (out, input) = backend.shape(weight(layer));
            ys.push(pool.take(backend, backend.len(x) / input * out)?);
        }
        // Low-rank terms go along with the product, unless their input is another because some of it is dropped.
        let fused = |layer: &Linear| {
            let low_rank = adapters.on(layer.weight).iter().all(|adapter| adapter.low_rank().is_some());
            low_rank && dropout(layer.weight).is_none()
        };
        let product = |(layer, y): (&Linear, _)| {
            let adapters = if fused(layer) { adapters.on(layer.weight) } else { &[] };
            Product { w: weight(layer), low_rank: adapters.iter().filter_map(|a| a.low_rank()).collect(), y }
        };
        let mut products: Vec<_> = layers.iter().zip(&mut ys).map(product).collect();
        backend.matmul_group(arithmetic, x, &mut products)?;
        for (layer, y) in layers.iter().zip(&mut ys) {
            if !fused(layer) {
                for adapter in adapters.on(layer.weight) {
                    let dropout = dropout(layer.weight);
                    adapter.apply(&mut Context { backend, pool, arithmetic, dropout }, x, y)?;
                }
            }
            if let Some(bias) = layer.bias {
                backend.add_bias(self.vector_with(adapters.replaced(), bias), y);
            }
        }
        Ok(ys)
    }
}

/// The kernels' form of a model's attention shape.
fn attention_spec(shape: &AttentionShape) -> Attention {
    let AttentionShape { heads, kv_heads, head_dim, scale, window } = *shape;
    Attention { heads, kv_heads, head_dim, scale, window }
}
