//! Forward with a key/value cache: prompts, decoding and evaluation.

use super::{Base, Pool, attention_spec};
use crate::adapter::Adapters;
use crate::error::{Error, Result};
use pocketlora_kernels::{Arithmetic, Backend, CacheType, Cpu};
use pocketlora_models::{AttentionShape, Exec, Linear, Param, Role, RopeTable, Tensor};

/// Tokens run through the layers at once; bounds the activations of a long prompt.
pub const PREFILL_CHUNK: usize = 256;

/// Keys and values of a growing text, with the buffers its steps reuse.
pub struct State<B: Backend> {
    caches: Vec<B::Cache>,
    pool: Pool<B>,
    last_tokens: usize,
    arithmetic: Arithmetic,
}

/// How numbers are kept and multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// Keys and values.
    pub cache: CacheType,
    /// Products with weights.
    pub arithmetic: Arithmetic,
}

impl<B: Backend> State<B> {
    /// An empty state for `base`.
    pub fn new(base: &Base<B>, numbers: Numbers) -> Self {
        let config = base.model.config();
        let cache = |_| base.backend.cache(config.kv_heads, config.head_dim, numbers.cache);
        let caches = (0..config.layers).map(cache).collect();
        Self { caches, pool: Pool::default(), last_tokens: 0, arithmetic: numbers.arithmetic }
    }

    /// Tokens held.
    pub fn len(&self, base: &Base<B>) -> usize {
        self.caches.first().map_or(0, |c| base.backend.cache_len(c))
    }

    /// Keeps the first `len` tokens, as when a chat's history was edited.
    pub fn truncate(&mut self, base: &Base<B>, len: usize) {
        for cache in &mut self.caches {
            base.backend.cache_truncate(cache, len);
        }
    }
}

impl Base<Cpu> {
    /// Measures how many threads decode fastest, with the weights of the first layer, and uses as many from then on.
    pub fn choose_threads(&self) {
        let params = self.model.params().iter().enumerate();
        let first = params.filter(|(_, p)| p.role == Role::Linear && p.name.contains(".layers.0."));
        let weights: Vec<_> = first.map(|(i, _)| self.matrix(Param(i as u32))).collect();
        self.backend.choose_threads(&weights);
    }
}

/// Hidden states `[T, C]` before the final norm, for [`Base::logits`].
pub struct Hidden<B: Backend>(B::Buffer);

impl<B: Backend> Base<B> {
    /// Runs `ids` (at most [`PREFILL_CHUNK`] is sensible) after what `state` holds.
    ///
    /// # Errors
    /// An id outside the vocabulary, out of memory. `state` keeps its earlier tokens then.
    pub fn forward(&self, adapters: &Adapters<B>, state: &mut State<B>, ids: &[u32]) -> Result<Hidden<B>> {
        self.check_ids(adapters.replaced(), ids)?;
        let start = state.len(self);
        if state.last_tokens != ids.len() {
            state.pool.clear();
            state.last_tokens = ids.len();
        }
        let positions: Vec<u32> = (start..start + ids.len()).map(|p| p as u32).collect();
        let angles = self.rope_angles(&positions, &mut state.pool)?;
        let mut run = Infer { base: self, adapters, state, ids, angles, values: Vec::new(), error: None };
        let mut x = self.model.embed(&mut run);
        for layer in 0..self.model.config().layers {
            x = self.model.layer(&mut run, layer, x);
            x = run.keep_only(x);
        }
        let result = run.finish(x);
        if result.is_err() {
            state.truncate(self, start);
        }
        result.map(Hidden)
    }

    /// Logits `[rows, V]` of the given rows of `hidden`, read back to the host.
    ///
    /// # Errors
    /// Out of memory, device lost.
    pub fn logits(
        &self,
        adapters: &Adapters<B>,
        state: &mut State<B>,
        hidden: &Hidden<B>,
        rows: &[u32],
    ) -> Result<Vec<f32>> {
        let backend = &self.backend;
        let width = self.model.config().hidden_size;
        let mut x = state.pool.take(backend, rows.len() * width)?;
        backend.gather_rows(&hidden.0, rows, &mut x);
        let mut run =
            Infer { base: self, adapters, state, ids: &[], angles: Vec::new(), values: vec![Some(x)], error: None };
        let y = self.model.head(&mut run, Tensor(0));
        let y = run.finish(y)?;
        let mut logits = vec![0.0; backend.len(&y)];
        backend.read(&y, &mut logits)?;
        state.pool.put(backend, y);
        Ok(logits)
    }

    /// Hands the buffer of `hidden` back for the next step.
    pub fn recycle(&self, state: &mut State<B>, hidden: Hidden<B>) {
        state.pool.put(&self.backend, hidden.0);
    }
}

/// One forward pass. The first failure is kept and the operations after it do nothing, so that model files stay free
/// of error handling.
struct Infer<'a, B: Backend> {
    base: &'a Base<B>,
    adapters: &'a Adapters<B>,
    state: &'a mut State<B>,
    ids: &'a [u32],
    angles: Vec<(B::Buffer, B::Buffer)>,
    values: Vec<Option<B::Buffer>>,
    error: Option<Error>,
}

impl<B: Backend> Infer<'_, B> {
    fn push(&mut self, result: Result<B::Buffer>) -> Tensor {
        let value = match result {
            Ok(buffer) => Some(buffer),
            Err(e) => {
                self.error.get_or_insert(e);
                None
            }
        };
        self.values.push(value);
        Tensor(self.values.len() as u32 - 1)
    }

    /// A new value of `len` elements that `fill` computes from `inputs`.
    fn op<const N: usize>(
        &mut self,
        inputs: [Tensor; N],
        len: impl FnOnce(&B, [&B::Buffer; N]) -> usize,
        fill: impl FnOnce(&Base<B>, [&B::Buffer; N], &mut B::Buffer),
    ) -> Tensor {
        let (base, pool) = (self.base, &mut self.state.pool);
        let inputs = inputs.map(|t| self.values[t.0 as usize].as_ref());
        if self.error.is_some() || inputs.iter().any(Option::is_none) {
            self.values.push(None);
            return Tensor(self.values.len() as u32 - 1);
        }
        let inputs = inputs.map(|i| i.expect("checked above"));
        let result = pool.take(&base.backend, len(&base.backend, inputs)).map(|mut y| {
            fill(base, inputs, &mut y);
            y
        });
        self.push(result)
    }

    /// Recycles every value but `x`, which becomes number 0.
    fn keep_only(&mut self, x: Tensor) -> Tensor {
        let kept = self.values[x.0 as usize].take();
        for buffer in self.values.drain(..).flatten() {
            self.state.pool.put(&self.base.backend, buffer);
        }
        self.values.push(kept);
        Tensor(0)
    }

    /// Recycles everything else and returns `y`, or the first error.
    fn finish(mut self, y: Tensor) -> Result<B::Buffer> {
        self.keep_only(y);
        for (cos, sin) in self.angles.drain(..) {
            self.state.pool.put(&self.base.backend, cos);
            self.state.pool.put(&self.base.backend, sin);
        }
        match self.error {
            Some(error) => Err(error),
            None => Ok(self.values[0].take().expect("without an error every value was computed")),
        }
    }
}

impl<B: Backend> Exec for Infer<'_, B> {
    fn embed(&mut self, table: Param) -> Tensor {
        let (ids, replaced) = (self.ids, self.adapters.replaced());
        let width = self.base.model.config().hidden_size;
        let fill = |base: &Base<B>, _: [&B::Buffer; 0], y: &mut B::Buffer| {
            base.backend.embed(base.table_with(replaced, table), ids, y);
        };
        self.op([], |_, _| ids.len() * width, fill)
    }

    fn linears(&mut self, layers: &[Linear], x: Tensor, ys: &mut [Tensor]) {
        let State { pool, arithmetic, .. } = &mut *self.state;
        let results = match self.values[x.0 as usize].as_ref().filter(|_| self.error.is_none()) {
            Some(x) => self.base.linears(self.adapters, *arithmetic, |_| None, layers, x, pool),
            None => Ok(Vec::new()),
        };
        let mut results = results.unwrap_or_else(|e| {
            self.error.get_or_insert(e);
            Vec::new()
        });
        let mut results = results.drain(..);
        for y in ys {
            self.values.push(results.next());
            *y = Tensor(self.values.len() as u32 - 1);
        }
    }

    fn rms_norm(&mut self, weight: Param, eps: f32, x: Tensor) -> Tensor {
        let replaced = self.adapters.replaced();
        let fill = |base: &Base<B>, [x]: [&B::Buffer; 1], y: &mut B::Buffer| {
            base.backend.rms_norm(base.vector_with(replaced, weight), eps, x, y);
        };
        self.op([x], |b, [x]| b.len(x), fill)
    }

    fn rope(&mut self, table: RopeTable, heads: usize, x: Tensor) -> Tensor {
        let angles = std::mem::take(&mut self.angles);
        let y = self.op(
            [x],
            |b, [x]| b.len(x),
            |base, [x], y| {
                let (cos, sin) = &angles[table.0 as usize];
                base.backend.rope(heads, base.rope_dim(table), cos, sin, x, false, y);
            },
        );
        self.angles = angles;
        y
    }

    fn attention(&mut self, layer: usize, shape: &AttentionShape, q: Tensor, k: Tensor, v: Tensor) -> Tensor {
        let backend = &self.base.backend;
        if let (Some(k), Some(v), None) = (&self.values[k.0 as usize], &self.values[v.0 as usize], &self.error)
            && let Err(e) = backend.cache_append(&mut self.state.caches[layer], k, v)
        {
            self.error = Some(e.into());
        }
        let spec = attention_spec(shape);
        let caches = std::mem::take(&mut self.state.caches);
        let y =
            self.op([q], |b, [q]| b.len(q), |base, [q], y| base.backend.attention_cached(&spec, q, &caches[layer], y));
        self.state.caches = caches;
        y
    }

    fn swiglu(&mut self, gate: Tensor, up: Tensor) -> Tensor {
        self.op([gate, up], |b, [gate, _]| b.len(gate), |base, [gate, up], y| base.backend.swiglu(gate, up, y))
    }

    fn add(&mut self, a: Tensor, b: Tensor) -> Tensor {
        self.op([a, b], |dev, [a, _]| dev.len(a), |base, [a, b], y| base.backend.add(a, b, y))
    }
}
