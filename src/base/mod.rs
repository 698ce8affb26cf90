//! The frozen base: a model's architecture with its weights on a device, and the memory that work on it takes. Adapters
//! and executors both know it, and it knows neither.

mod fit;
mod pool;

pub(crate) use fit::{architecture, architecture_of, check_source};
pub use pool::Pool;

use crate::error::{Error, ErrorCode, Result};
use crate::format::Checkpoint;
use pocketlora_kernels::{Arithmetic, Backend, Counted, Cpu, MatrixSource, Memory, WorkType};
use pocketlora_models::{Layout, Model, Param, ParamSpec, Role};
use std::ops::Range;
use std::sync::Arc;

/// A model's architecture with its frozen weights on a device; shared by everything that runs it.
pub struct Base<B: Backend> {
    /// The device.
    pub backend: B,
    /// The architecture.
    pub model: Arc<dyn Model>,
    weights: Vec<BaseTensor<B>>,
    /// The head in 8 bits, for [`Arithmetic::Int8`].
    int8_head: Option<B::Matrix>,
}

enum BaseTensor<B: Backend> {
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
                    let (shape, values) = checkpoint.vector(&spec.name, spec.shape.len())?;
                    if shape != spec.shape {
                        return wrong_shape(shape);
                    }
                    let mut buffer = backend.buffer(values.len())?;
                    backend.write(&mut buffer, &values);
                    BaseTensor::Vector(buffer)
                }
                Role::Embedding | Role::Linear | Role::Fixed | Role::Head | Role::Router => {
                    let source = match &spec.layout {
                        Layout::Stacked(stack) => checkpoint.of_stack(&spec.name, stack, spec.shape[0])?,
                        Layout::Transposed => checkpoint.transposed(&spec.name)?,
                        Layout::Whole => checkpoint.matrix(&spec.name)?,
                    };
                    if spec.shape != [source.rows, source.cols] {
                        return wrong_shape(&[source.rows, source.cols]);
                    }
                    let matrix = backend.matrix(source).map_err(|e| {
                        let place = format!("`{}`: tensor `{}`", checkpoint.dir().display(), spec.name);
                        let message = "its parts contradict each other; quantize the model again, or fetch it again";
                        Error::new(Error::from(e).code(), place, message)
                    })?;
                    BaseTensor::Matrix(matrix)
                }
            });
        }
        Ok(Self { backend, model: model.into(), weights, int8_head: None })
    }

    /// The shapes of `model` without its weights, to count what work on it takes.
    pub(crate) fn counted(backend: Counted, model: Arc<dyn Model>) -> Result<Base<Counted>> {
        let weight = |spec: &ParamSpec| {
            Ok(match spec.shape[..] {
                [rows, cols] => BaseTensor::Matrix(backend.work_matrix(rows, cols, WorkType::F32)?),
                _ => BaseTensor::Vector(backend.buffer(spec.shape.iter().product())?),
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

    pub(crate) fn matrix(&self, p: Param) -> &B::Matrix {
        match &self.weights[p.0 as usize] {
            BaseTensor::Matrix(m) => m,
            BaseTensor::Vector(_) => unreachable!("`load` stores a matrix for every parameter that is not a vector"),
        }
    }

    pub(crate) fn vector(&self, p: Param) -> &B::Buffer {
        match &self.weights[p.0 as usize] {
            BaseTensor::Vector(v) => v,
            BaseTensor::Matrix(_) => unreachable!("`load` stores a buffer for every vector"),
        }
    }

    /// `cos` and `sin` `[T, D / 2]` of every rotary table at the positions of `texts`, as the tables' f32 products have
    /// them. Each text has its positions and the number of tokens that it is taken to reach.
    pub(crate) fn rope_angles(
        &self,
        texts: &[(Range<usize>, usize)],
        pool: &mut Pool<B>,
    ) -> Result<Vec<(B::Buffer, B::Buffer)>> {
        if texts.is_empty() {
            return Ok(Vec::new());
        }
        let angles = |rope: &pocketlora_models::Rope, f: fn(f64) -> f64| -> Vec<f32> {
            let mut all = Vec::new();
            for (positions, reach) in texts {
                let frequencies = rope.frequencies(*reach);
                for p in positions.clone() {
                    let factor = rope.factor(p);
                    all.extend(frequencies.iter().map(|&w| f(f64::from(p as f32 * w)) as f32 * factor));
                }
            }
            all
        };
        let mut load = |values: &[f32]| -> Result<B::Buffer> {
            let mut buffer = pool.take(&self.backend, values.len())?;
            self.backend.write(&mut buffer, values);
            Ok(buffer)
        };
        self.model.ropes().iter().map(|r| Ok((load(&angles(r, f64::cos))?, load(&angles(r, f64::sin))?))).collect()
    }
}

impl Base<Cpu> {
    /// Measures how many threads, `least` of them or more, decode fastest with the weights of the first layer, and uses as
    /// many from then on.
    pub fn choose_threads(&self, least: usize) {
        let params = self.model.params().iter().enumerate();
        let first = params.filter(|(_, p)| {
            p.role == Role::Linear && [".layers.0.", ".h.0."].iter().any(|first| p.name.contains(first))
        });
        let weights: Vec<_> = first.map(|(i, _)| self.matrix(Param(i as u32))).collect();
        self.backend.choose_threads(&weights, least);
    }
}
