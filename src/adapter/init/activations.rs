//! Beginnings that depend on what layers read: EVA's principal components of it, and CorDA's covariance.
//!
//! Texts are run through the base, and a term that adds nothing sums up what its layer reads. Of EVA that is `Q XᵀX`
//! for some directions `Q`, for all layers at once; each round over the texts is one of subspace iteration. Of CorDA it
//! is all of `XᵀX`, so that a layer's matrices are looked at one after the other, and the hidden states wait between
//! layers.

use super::range::{self, Operator, cholesky, columns, floats, largest, orthonormal, smallest, solve};
use super::{ITERATIONS, Progress, filled, go_on, halves};
use crate::adapter::Replaced;
use crate::adapter::attach::Adapters;
use crate::adapter::forms::{Context, Gradients, Term};
use crate::adapter::svd::{Columns, add, dot, of_product};
use crate::adapter::weight::Weight;
use crate::base::{Base, Pool};
use crate::error::{Error, Result};
use crate::exec::train::{Batch, Pass};
use crate::rng::{mix, normals};
use pocketlora_kernels::{Arithmetic, Backend, Call, FloatType, MatrixData, MatrixSource};
use pocketlora_models::{Exec, Model, Op, Param, Value};
use std::sync::{Arc, Mutex, PoisonError};

/// Rounds over the texts before the last.
const ROUNDS: usize = 3;
/// What is added to a covariance's diagonal, of its mean.
const DAMPING: f64 = 0.01;

/// Directions of a layer's inputs that are followed.
pub(super) use range::width;

/// What a term has seen.
enum Seen<B: Backend> {
    /// `Q XᵀX` `[k, in]`, the sum of the rows `[in]` and their number, for the directions `Q` `[k, in]`.
    Along { q: B::Matrix, sum: B::Buffer, mean: B::Buffer, count: usize },
    /// `XᵀX` `[in, in]`, of rows over the largest value of their text, and how many texts there were.
    All { sum: B::Buffer, texts: usize },
    /// It does not look.
    Nothing,
}

/// A term that adds nothing and sums up what its layer reads.
struct Look<B: Backend>(Arc<Mutex<Seen<B>>>);

impl<B: Backend> Term<B> for Look<B> {
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, _y: &mut B::Buffer) -> Result<()> {
        let backend = cx.backend;
        match &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            Seen::Nothing => {}
            Seen::Along { q, sum, mean, count } => {
                let (k, input) = backend.shape(q);
                let tokens = backend.len(x) / input;
                let mut along = cx.pool.take(backend, tokens * k)?;
                backend.run(Call::Matmul {
                    arithmetic: Arithmetic::Exact,
                    w: q,
                    x,
                    y: &mut along,
                    accumulate: false,
                })?;
                backend.run(Call::MatmulVjpW { tokens, dy: &along, x, dw: sum })?;
                backend.run(Call::SumColumns { a: x, b: None, y: mean })?;
                cx.pool.put(backend, along);
                *count += tokens;
            }
            Seen::All { sum, texts } => {
                let input = (backend.len(sum) as f64).sqrt() as usize;
                let mut values = vec![0.0; backend.len(x)];
                backend.read(x, &mut values)?;
                let most = values.iter().copied().fold(f32::NEG_INFINITY, f32::max).abs();
                let mut scaled = cx.pool.take(backend, values.len())?;
                backend.run(Call::Copy { x, y: &mut scaled })?;
                let factor = if most > 0.0 { most.recip() } else { 1.0 };
                backend.run(Call::Scale { factor, x: &mut scaled })?;
                let tokens = values.len() / input;
                backend.run(Call::MatmulVjpW { tokens, dy: &scaled, x: &scaled, dw: sum })?;
                cx.pool.put(backend, scaled);
                *texts += 1;
            }
        }
        Ok(())
    }

    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        _x: &B::Buffer,
        _dy: &B::Buffer,
        _grads: &mut Gradients<B>,
    ) -> Result<B::Buffer> {
        // There is nothing in it to train.
        cx.pool.take(cx.backend, 0)
    }

    fn backward_x(&self, _cx: &mut Context<'_, B>, _carried: &B::Buffer, _dx: &mut B::Buffer) -> Result<()> {
        Ok(())
    }
}

/// Texts on their way through a model whose layers are looked at.
struct Texts<'a, B: Backend> {
    base: &'a Base<B>,
    passes: Vec<Pass<'a, B>>,
    /// What the next layer reads, of each text.
    hidden: Vec<B::Buffer>,
    pool: Pool<B>,
}

impl<'a, B: Backend> Texts<'a, B> {
    fn new(base: &'a Base<B>, adapters: &'a Adapters<B>, batches: &'a [Batch]) -> Result<Self> {
        let mut pool = Pool::default();
        let pass = |batch: &'a Batch| Pass::new(base, adapters, batch, None, Arithmetic::Exact, &mut pool);
        let passes = batches.iter().map(pass).collect::<Result<Vec<_>>>()?;
        let mut hidden = Vec::with_capacity(passes.len());
        for pass in &passes {
            let mut tape = pass.tape(None, false, &mut pool);
            let x = base.model.embed(&mut tape);
            hidden.push(tape.into_value(x)?);
        }
        Ok(Self { base, passes, hidden, pool })
    }

    /// Runs layer number `layer`; all texts go on behind it if they `advance`.
    fn run(&mut self, layer: usize, advance: bool) -> Result<()> {
        let backend = &self.base.backend;
        for (pass, hidden) in self.passes.iter().zip(&mut self.hidden) {
            let mut x = self.pool.take(backend, backend.len(hidden))?;
            backend.run(Call::Copy { x: hidden, y: &mut x })?;
            let mut tape = pass.tape(Some(x), false, &mut self.pool);
            let y = self.base.model.layer(&mut tape, layer, Value(0));
            let y = tape.into_value(y)?;
            let old = if advance { std::mem::replace(hidden, y) } else { y };
            self.pool.put(backend, old);
        }
        Ok(())
    }
}

fn batches(texts: &[Vec<u32>]) -> Vec<Batch> {
    texts.iter().map(|ids| Batch { ids: ids.clone(), segments: vec![ids.len()] }).collect()
}

/// A matrix `[rows, cols]` in f32 on the device.
pub(super) fn matrix<B: Backend>(backend: &B, values: &[f32], cols: usize) -> Result<B::Matrix> {
    let data = MatrixData::Dense(FloatType::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect());
    Ok(backend.matrix(MatrixSource { rows: values.len() / cols.max(1), cols, data })?)
}

/// Of each of the `layers` with its rank, the principal components `[r, in]` of what it reads of `texts`. `progress` hears
/// of texts.
///
/// # Errors
/// An id beyond the vocabulary, stopped, out of memory.
pub(super) fn components<B: Backend>(
    base: &Base<B>,
    layers: &[(Param, usize)],
    texts: &[Vec<u32>],
    seed: u64,
    progress: &mut Progress<'_>,
) -> Result<Vec<Vec<f32>>> {
    let (backend, batches) = (&base.backend, batches(texts));
    let inputs: Vec<usize> = layers.iter().map(|(p, _)| backend.shape(base.matrix(*p)).1).collect();
    let start = |((i, (_, rank)), input): ((usize, &(Param, usize)), &usize)| {
        orthonormal(&normals(&[seed, i as u64], 1.0, width(*rank, *input) * input), *input)
    };
    let mut directions: Vec<Columns> = layers.iter().enumerate().zip(&inputs).map(start).collect();
    for round in 0..=ROUNDS {
        let mut adapters = Adapters::none(base);
        let mut seen = Vec::with_capacity(layers.len());
        for (((p, _), q), input) in layers.iter().zip(&directions).zip(&inputs) {
            let (sum, mean) = (backend.buffer(q.len() * input)?, backend.buffer(*input)?);
            let looks = Seen::Along { q: matrix(backend, &floats(q), *input)?, sum, mean, count: 0 };
            let own = Arc::new(Mutex::new(looks));
            adapters.watch(*p, Look(Arc::clone(&own)));
            seen.push(own);
        }
        // One text after the other, so that one is held.
        for (i, batch) in batches.iter().enumerate() {
            go_on(progress, round * batches.len() + i, (ROUNDS + 1) * batches.len())?;
            let mut text = Texts::new(base, &adapters, std::slice::from_ref(batch))?;
            (0..base.model.config().layers).try_for_each(|layer| text.run(layer, true))?;
        }
        for ((q, seen), input) in directions.iter_mut().zip(seen).zip(&inputs) {
            let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            let Seen::Along { sum, mean, count, .. } = &*seen else { continue };
            let (mut along, mut total) = (vec![0.0; backend.len(sum)], vec![0.0; *input]);
            backend.read(sum, &mut along)?;
            backend.read(mean, &mut total)?;
            // Around the mean m: Q XᵀX - n (Q m) mᵀ.
            let total: Vec<f64> = total.into_iter().map(f64::from).collect();
            let mut along = columns(&along, *input);
            along.iter_mut().zip(&*q).for_each(|(along, q)| add(along, -dot(q, &total) / *count as f64, &total));
            *q = if round == ROUNDS { along } else { orthonormal(&floats(&along), *input) };
        }
    }
    let of = |((rows, (_, rank)), i): ((Columns, &(Param, usize)), u64)| {
        let unit = |i: usize| (0..rows.len()).map(|j| f64::from(u8::from(i == j))).collect();
        let found = of_product((0..rows.len()).map(unit).collect(), rows, *rank);
        floats(&filled(found.v, mix(seed, i)))
    };
    Ok(directions.into_iter().zip(layers).zip(0..).map(of).collect())
}

/// `W C` of a layer and its inputs' covariance `C`, which is symmetric.
struct InContext<'a, B: Backend> {
    weight: &'a Weight<'a, B>,
    covariance: B::Matrix,
}

impl<B: Backend> InContext<'_, B> {
    /// `x C`.
    fn seen(&self, x: &[f32]) -> Result<Vec<f32>> {
        let backend = &self.weight.base.backend;
        let (mut read, mut given, mut y) = (backend.buffer(x.len())?, backend.buffer(x.len())?, vec![0.0; x.len()]);
        backend.write(&mut read, x);
        let (w, arithmetic) = (&self.covariance, Arithmetic::Exact);
        backend.run(Call::Matmul { arithmetic, w, x: &read, y: &mut given, accumulate: false })?;
        backend.read(&given, &mut y)?;
        Ok(y)
    }
}

impl<B: Backend> Operator for InContext<'_, B> {
    fn shape(&self) -> [usize; 2] {
        Operator::shape(self.weight)
    }

    fn times(&self, x: &[f32]) -> Result<Vec<f32>> {
        Operator::times(self.weight, &self.seen(x)?)
    }

    fn back(&self, y: &[f32]) -> Result<Vec<f32>> {
        self.seen(&Operator::back(self.weight, y)?)
    }
}

/// The layer of `model` whose operations multiply by each of its parameters, if one does.
fn places(model: &dyn Model) -> Vec<Option<usize>> {
    struct Recorder(Vec<Op>, u32);
    impl Exec for Recorder {
        fn run(&mut self, op: Op) -> Value {
            let first = Value(self.1);
            self.1 += op.outputs().len() as u32;
            self.0.push(op);
            first
        }
    }
    let mut places = vec![None; model.params().len()];
    let mut recorder = Recorder(Vec::new(), 0);
    let mut x = model.embed(&mut recorder);
    for layer in 0..model.config().layers {
        recorder.0.clear();
        x = model.layer(&mut recorder, layer, x);
        for op in &recorder.0 {
            if let Op::Linears { layers, .. } = op {
                layers.iter().for_each(|linear| places[linear.weight.0 as usize] = Some(layer));
            }
        }
    }
    places
}

/// The layers of `model` whose operations multiply by the parameters `own`.
///
/// # Errors
/// One is of no layer of the decoder.
pub(super) fn places_of(model: &dyn Model, own: impl Iterator<Item = Param>) -> Result<Vec<usize>> {
    let places = places(model);
    let place = |p: Param| {
        places[p.0 as usize].ok_or_else(|| {
            let got = &model.params()[p.0 as usize].name;
            Error::config("init-lora-weights", "layers of the decoder alone beside `corda`", got)
        })
    };
    own.map(place).collect()
}

/// CorDA's `A` and `B` of each of the `layers`, with their ranks and factors on `B A`: `W C = U S Vᵀ` for the
/// covariance `C` of what they read of `texts`, `A = sqrt(S / s) Vᵀ C⁻¹` and `B = U sqrt(S / s)`. Of the smallest
/// values, where the model is to `keep` what it knows of such texts, or else of the largest. `each` takes them, with
/// the layer's number among these, and `progress` hears of them.
///
/// # Errors
/// A layer that is none of the decoder's, an id beyond the vocabulary, stopped, out of memory.
pub(super) fn covariances<B: Backend>(
    base: &Base<B>,
    layers: &[(Param, usize, f32)],
    texts: &[Vec<u32>],
    keep: bool,
    seed: u64,
    each: &mut dyn FnMut(usize, [Vec<f32>; 2]),
    progress: &mut Progress<'_>,
) -> Result<()> {
    let (backend, batches) = (&base.backend, batches(texts));
    let places = places_of(base.model.as_ref(), layers.iter().map(|(p, ..)| *p))?;
    let mut adapters = Adapters::none(base);
    let mut seen = Vec::with_capacity(layers.len());
    for (p, ..) in layers {
        let own = Arc::new(Mutex::new(Seen::Nothing));
        adapters.watch(*p, Look(Arc::clone(&own)));
        seen.push(own);
    }
    let look = |i: usize, what: Seen<B>| -> Seen<B> {
        std::mem::replace(&mut *Mutex::lock(&seen[i]).unwrap_or_else(PoisonError::into_inner), what)
    };
    let mut texts = Texts::new(base, &adapters, &batches)?;
    let (replaced, mut done) = (Replaced::default(), 0);
    for layer in 0..base.model.config().layers {
        for (i, (p, rank, scale)) in layers.iter().enumerate().filter(|(i, _)| places[*i] == layer) {
            go_on(progress, done, layers.len())?;
            done += 1;
            let input = backend.shape(base.matrix(*p)).1;
            look(i, Seen::All { sum: backend.buffer(input * input)?, texts: 0 });
            texts.run(layer, false)?;
            let Seen::All { sum, texts } = look(i, Seen::Nothing) else { continue };
            let mut c = vec![0.0; input * input];
            backend.read(&sum, &mut c)?;
            drop(sum);
            c.iter_mut().for_each(|c| *c /= texts.max(1) as f32);
            let mean = (0..input).map(|i| f64::from(c[i * input + i])).sum::<f64>() / input as f64;
            (0..input).for_each(|i| c[i * input + i] += (DAMPING * mean) as f32);
            let weight = Weight { base, replaced: &replaced, layer: *p, counts: false };
            let wc = InContext { weight: &weight, covariance: matrix(backend, &c, input)? };
            let seed = mix(seed, i as u64);
            let mut svd = if keep { smallest(&wc, *rank, seed)? } else { largest(&wc, *rank, ITERATIONS, seed)? };
            drop(wc);
            let factor = cholesky(c.into_iter().map(f64::from).collect(), input, 0.0);
            svd.v.iter_mut().for_each(|v| solve(&factor, input, v));
            each(i, halves(&svd, *scale));
        }
        texts.run(layer, true)?;
    }
    Ok(())
}
