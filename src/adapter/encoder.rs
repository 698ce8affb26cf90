//! The network of P-tuning (Liu et al. 2021; PEFT's `PromptEncoder` of the type MLP), which makes the embeddings of virtual
//! tokens: `P = relu(relu(E W0ᵀ + b0) W2ᵀ + b2) W4ᵀ + b4` with `E` `[n, C]`, `W0` `[h, C]`, `W2` `[h, h]`, `W4` `[C, h]`. It is
//! small, and backward computes all of it again.

use super::forms::{Context, Gradients};
use super::held::{Loader, TensorId};
use super::tensor::{TensorSpec, Tensors};
use crate::error::Result;
use pocketlora_kernels::{Backend, Call, Map};

/// Name of `E`.
const EMBEDDING: &str = "embedding.weight";
/// Numbers of its layers, as PEFT has them: activations count, too.
const LAYERS: [usize; 3] = [0, 2, 4];
/// `max(x, 0)`: so steep, `x / (1 + e^(-alpha x))` is that, and so is its slope.
const RELU: Map = Map::ClampedSwish { alpha: 1e20, limit: f32::MAX };

/// Its tensors on a device.
pub(super) struct Encoder {
    embedding: TensorId,
    layers: [(TensorId, TensorId); 3],
}

/// Names and shapes of its tensors, for `tokens` virtual tokens as wide as `width`.
pub(super) fn specs(tokens: usize, width: usize, hidden: usize) -> Vec<TensorSpec> {
    let spec = |name: String, shape: Vec<usize>| TensorSpec { name, shape };
    let layer = |(layer, [out, input]): (usize, [usize; 2])| {
        let name = |part: &str| format!("mlp_head.{layer}.{part}");
        [spec(name("weight"), vec![out, input]), spec(name("bias"), vec![out])]
    };
    let shapes = [[hidden, width], [hidden, hidden], [width, hidden]];
    let embedding = spec(EMBEDDING.to_owned(), vec![tokens, width]);
    [embedding].into_iter().chain(LAYERS.into_iter().zip(shapes).flat_map(layer)).collect()
}

/// What it gives, on the host.
pub(super) fn encoded(tensors: &Tensors) -> Vec<f32> {
    let mut x = tensors[EMBEDDING].data.clone();
    for layer in LAYERS {
        let (w, b) = (&tensors[&format!("mlp_head.{layer}.weight")], &tensors[&format!("mlp_head.{layer}.bias")]);
        let row = |x: &[f32]| -> Vec<f32> {
            let rows = w.data.chunks_exact(w.shape[1]).zip(&b.data);
            let product = |(w, b): (&[f32], &f32)| {
                let sum: f64 = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                (sum + f64::from(*b)) as f32
            };
            let last = layer == LAYERS[2];
            rows.map(product).map(|y| if last { y } else { y.max(0.0) }).collect()
        };
        x = x.chunks_exact(w.shape[1]).flat_map(row).collect();
    }
    x
}

impl Encoder {
    /// Loads its tensors.
    ///
    /// # Errors
    /// Out of memory.
    pub fn load<B: Backend>(load: &mut Loader<'_, B>) -> Result<Self> {
        let embedding = load.matrix(EMBEDDING)?;
        let mut layer = |layer: usize| -> Result<(TensorId, TensorId)> {
            Ok((load.matrix(&format!("mlp_head.{layer}.weight"))?, load.buffer(&format!("mlp_head.{layer}.bias"))?))
        };
        Ok(Self { embedding, layers: [layer(LAYERS[0])?, layer(LAYERS[1])?, layer(LAYERS[2])?] })
    }

    /// Number of the tensor `E`.
    pub fn embedding(&self) -> TensorId {
        self.embedding
    }

    /// `E`, then what each layer gives, before its activation.
    fn values<B: Backend>(&self, cx: &mut Context<'_, B>) -> Result<Vec<B::Buffer>> {
        let backend = cx.backend;
        let table = cx.held.matrix(self.embedding);
        let (tokens, width) = backend.shape(table);
        let mut x = cx.pool.take(backend, tokens * width)?;
        backend.run(Call::Embed { table, ids: &(0..tokens as u32).collect::<Vec<_>>(), y: &mut x })?;
        let mut values = vec![x];
        for (i, (w, b)) in self.layers.iter().enumerate() {
            let (w, bias) = (cx.held.matrix(*w), cx.held.buffer(*b));
            let x = self.read(cx, i, &values[i])?;
            let mut y = cx.pool.take(backend, tokens * backend.shape(w).0)?;
            backend.run(Call::Matmul { arithmetic: cx.arithmetic, w, x: &x, y: &mut y, accumulate: false })?;
            backend.run(Call::AddBias { bias, y: &mut y })?;
            cx.pool.put(backend, x);
            values.push(y);
        }
        Ok(values)
    }

    /// What layer number `i` reads, of the value before it.
    fn read<B: Backend>(&self, cx: &mut Context<'_, B>, i: usize, before: &B::Buffer) -> Result<B::Buffer> {
        let mut x = cx.pool.take(cx.backend, cx.backend.len(before))?;
        if i == 0 {
            cx.backend.run(Call::Copy { x: before, y: &mut x })?;
        } else {
            cx.backend.run(Call::Map { kind: RELU, x: before, y: &mut x })?;
        }
        Ok(x)
    }

    /// `P` `[n, C]`.
    ///
    /// # Errors
    /// Out of memory.
    pub fn forward<B: Backend>(&self, cx: &mut Context<'_, B>) -> Result<B::Buffer> {
        let mut values = self.values(cx)?;
        let last = values.pop().expect("one for each layer");
        values.into_iter().for_each(|buffer| cx.pool.put(cx.backend, buffer));
        Ok(last)
    }

    /// Adds to the gradients of its tensors, given the gradient `dp` of `P`.
    ///
    /// # Errors
    /// Out of memory.
    pub fn backward<B: Backend>(&self, cx: &mut Context<'_, B>, dp: B::Buffer, grads: &mut Gradients<B>) -> Result<()> {
        let backend = cx.backend;
        let values = self.values(cx)?;
        let (tokens, mut dy) = (backend.shape(cx.held.matrix(self.embedding)).0, dp);
        for (i, (weight, bias)) in self.layers.iter().enumerate().rev() {
            let x = self.read(cx, i, &values[i])?;
            // y = x Wᵀ + b
            if let Some(dw) = grads.of(*weight) {
                backend.run(Call::MatmulVjpW { tokens, dy: &dy, x: &x, dw })?;
            }
            if let Some(db) = grads.of(*bias) {
                backend.run(Call::SumColumns { a: &dy, b: None, y: db })?;
            }
            let mut dx = cx.pool.take(backend, backend.len(&x))?;
            let terms = [(cx.held.matrix(*weight), &dy)];
            backend.run(Call::MatmulVjpX {
                arithmetic: cx.arithmetic,
                terms: &terms,
                dx: &mut dx,
                accumulate: false,
            })?;
            cx.pool.put(backend, std::mem::replace(&mut dy, dx));
            if i > 0 {
                // x = relu(z)
                let mut dz = x;
                backend.run(Call::MapVjp { kind: RELU, x: &values[i], dy: &dy, dx: &mut dz })?;
                cx.pool.put(backend, std::mem::replace(&mut dy, dz));
            } else {
                cx.pool.put(backend, x);
            }
        }
        if let Some(de) = grads.of(self.embedding) {
            backend.run(Call::AddAssign { x: &dy, y: de })?;
        }
        values.into_iter().chain([dy]).for_each(|buffer| cx.pool.put(backend, buffer));
        Ok(())
    }
}
