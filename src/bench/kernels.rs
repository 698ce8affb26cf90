//! Single operations on the model's own matrices and at its own sizes, each against the limit that binds it.
//!
//! A product's weights come from all layers in turn, as in a forward pass: where the layers together are larger than the
//! cache they come from memory. One more kernel is one more line in [`PRODUCTS`] or one more row in [`attention`].

use super::{Figure, OnMeasure, Options, check};
use crate::base::Base;
use crate::engine::Engine;
use crate::error::Result;
use crate::exec::infer::PREFILL_CHUNK;
use pocketlora_kernels::cpu::limits::Limits;
use pocketlora_kernels::cpu::{Buffer, Matrix};
use pocketlora_kernels::{Arithmetic, Attention, Backend, Call, Cpu, Memory, Targets};
use pocketlora_models::{Param, Role};
use serde::Serialize;
use std::time::Instant;

/// One kernel's speed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Kernel {
    /// `<weight dtype>_<op>[_vjp_<arg>]@<isa>`.
    pub name: String,
    /// Its sizes: `T` tokens, `O` rows and `K` columns of the weight, heads and their width.
    pub shape: String,
    /// The layers of this shape.
    pub layers: String,
    /// Arithmetic asked for.
    pub arithmetic: &'static str,
    /// Threads.
    pub threads: usize,
    /// Median time of a call.
    pub microseconds: f64,
    /// Bytes of weights, or of keys and values, a second, in 1e9.
    pub gb_s: f64,
    /// Floating-point operations a second, in 1e9.
    pub gflops: Option<f64>,
    /// Integer operations a second, in 1e9.
    pub gops: Option<f64>,
    /// Share of the limit that `bound` names; above 1 where the weights came from a cache.
    pub share: f64,
    /// The machine's limit that this kernel can reach at most: `read`, `f32`, `int8` or `bf16`.
    pub bound: &'static str,
    /// Calls a second.
    pub calls: Figure,
}

/// A product that a model runs.
struct Product {
    op: &'static str,
    tokens: usize,
    /// Only for the head, or only for the other layers; `None` for both.
    head: Option<bool>,
    arithmetic: Arithmetic,
    backward: bool,
}

/// What the model runs, in inference and then in training.
fn products(engine: &Engine, options: &Options) -> Vec<Product> {
    let infer = engine.numbers().arithmetic;
    let (prompt, sequence) = (options.prefill.min(PREFILL_CHUNK), options.sequence);
    let product = |op, tokens, head, arithmetic, backward| Product { op, tokens, head, arithmetic, backward };
    vec![
        product("matvec", 1, None, infer, false),
        product("matmul", prompt, Some(false), infer, false),
        product("matmul", sequence, Some(false), Arithmetic::Bf16, false),
        product("matmul_vjp_x", sequence, Some(false), Arithmetic::Bf16, true),
    ]
}

/// Weights of one shape.
pub(super) struct Group<'a> {
    pub head: bool,
    pub shape: (usize, usize),
    pub layers: Vec<&'a str>,
    pub params: Vec<Param>,
}

/// Every operation that dominates the model's time, on the threads of `engine`.
pub(super) fn measure(
    engine: &Engine,
    options: &Options,
    limits: &Limits,
    progress: &mut OnMeasure<'_>,
) -> Result<Vec<Kernel>> {
    let mut bench = Bench { base: engine.base(), options, limits, progress, kernels: Vec::new() };
    let groups = groups(bench.base);
    for product in products(engine, options) {
        for group in groups.iter().filter(|g| product.head.is_none_or(|head| head == g.head)) {
            bench.product(&product, group)?;
        }
    }
    loss(&mut bench)?;
    attention(engine, &mut bench)?;
    Ok(bench.kernels)
}

/// The linear layers by shape, and the head.
pub(super) fn groups(base: &Base<Cpu>) -> Vec<Group<'_>> {
    let head = base.model.head_param();
    let mut groups: Vec<Group<'_>> = Vec::new();
    for (i, spec) in base.model.params().iter().enumerate() {
        let param = Param(i as u32);
        if spec.role != Role::Linear && param != head {
            continue;
        }
        let (shape, is_head) = (base.backend.shape(base.matrix(param)), param == head);
        let layer = if is_head { "head" } else { spec.module().rsplit('.').next().unwrap_or_default() };
        let found = groups.iter_mut().find(|g| g.shape == shape && g.head == is_head);
        match found {
            Some(group) => {
                group.params.push(param);
                if !group.layers.contains(&layer) {
                    group.layers.push(layer);
                }
            }
            None => groups.push(Group { head: is_head, shape, layers: vec![layer], params: vec![param] }),
        }
    }
    groups
}

struct Bench<'a, 'p> {
    base: &'a Base<Cpu>,
    options: &'a Options,
    limits: &'a Limits,
    progress: &'a mut OnMeasure<'p>,
    kernels: Vec<Kernel>,
}

/// What a row says of a kernel beside its speed.
struct Facts {
    name: String,
    shape: String,
    layers: String,
    arithmetic: Arithmetic,
    /// Reading is what binds it.
    reads: bool,
    bytes: f64,
    ops: f64,
}

/// A call to be timed, by its number.
type Timed<'a> = &'a mut dyn FnMut(usize) -> std::result::Result<(), pocketlora_kernels::Error>;

impl Bench<'_, '_> {
    fn product(&mut self, product: &Product, group: &Group<'_>) -> Result<()> {
        let Product { op, tokens, arithmetic, backward, .. } = *product;
        let ((o, k), backend) = (group.shape, &self.base.backend);
        let weights: Vec<&Matrix> = group.params.iter().map(|p| self.base.factor(*p, arithmetic)).collect();
        let Some(first) = weights.first() else { return Ok(()) };
        let (x, mut y) = (
            noise(backend, tokens * if backward { o } else { k })?,
            noise(backend, tokens * if backward { k } else { o })?,
        );
        let facts = Facts {
            name: format!("{}_{op}", first.type_name()),
            shape: format!("T={tokens} O={o} K={k}"),
            layers: group.layers.join(", "),
            arithmetic,
            reads: tokens == 1,
            bytes: first.bytes() as f64,
            ops: 2.0 * (tokens * o * k) as f64,
        };
        self.time(facts, weights.len(), &mut |i| {
            let (w, accumulate) = (weights[i], false);
            match backward {
                false => backend.run(Call::Matmul { arithmetic, w, x: &x, y: &mut y, accumulate }),
                true => backend.run(Call::MatmulVjpX { arithmetic, terms: &[(w, &x)], dx: &mut y, accumulate }),
            }
        })
    }

    /// Times `call(0..count)` as a whole, as often as there are trials.
    fn time(&mut self, facts: Facts, count: usize, call: Timed<'_>) -> Result<()> {
        let mut failed = Ok(());
        let mut call = |i| failed = std::mem::replace(&mut failed, Ok(())).and(call(i));
        let Facts { name, shape, layers, arithmetic, reads, bytes, ops } = facts;
        let backend = &self.base.backend;
        let name = format!("{name}@{}", backend.isa().name());
        check(self.progress, &format!("{name} {shape}"))?;
        // A trial lasts no longer than this where a part of the layers tells as much as all.
        const TRIAL: f64 = 0.1;
        call(0);
        let start = Instant::now();
        call(count - 1);
        let count = count.min((TRIAL / start.elapsed().as_secs_f64()) as usize).max(1);
        // Short rounds are repeated, for a clock's and a scheduler's grain.
        let mut rounds = 1;
        let mut trial = |rounds: usize| {
            let start = Instant::now();
            (0..rounds).for_each(|_| (0..count).for_each(&mut call));
            start.elapsed().as_secs_f64()
        };
        while trial(rounds) < TRIAL / 10.0 {
            rounds *= 2;
        }
        let rates = (0..self.options.trials).map(|_| (rounds * count) as f64 / trial(rounds)).collect();
        failed?;
        let calls = Figure::new(rates);
        let (gb_s, rate) = (calls.median * bytes / 1e9, calls.median * ops / 1e9);
        let integer = arithmetic == Arithmetic::Int8;
        let (bound, limit, reached) = match (reads, arithmetic, self.limits.bf16_gflops) {
            (true, ..) => ("read", self.limits.read_gb_s, gb_s),
            (_, Arithmetic::Int8, _) => ("int8", self.limits.int8_gops, rate),
            (_, Arithmetic::Bf16, Some(limit)) => ("bf16", limit, rate),
            _ => ("f32", self.limits.f32_gflops, rate),
        };
        self.kernels.push(Kernel {
            name,
            shape,
            layers,
            arithmetic: spelled(arithmetic),
            threads: backend.threads(),
            microseconds: 1e6 / calls.median,
            gb_s,
            gflops: (!integer).then_some(rate),
            gops: integer.then_some(rate),
            share: reached / limit,
            bound,
            calls,
        });
        Ok(())
    }
}

/// Logits, loss and gradient of a training sequence: two products with the head.
fn loss(bench: &mut Bench<'_, '_>) -> Result<()> {
    let (base, t) = (bench.base, bench.options.sequence);
    let (backend, head) = (&base.backend, base.matrix(base.model.head_param()));
    let (vocab, width) = backend.shape(head);
    let facts = Facts {
        name: format!("{}_linear_cross_entropy", head.type_name()),
        shape: format!("T={t} O={vocab} K={width}"),
        layers: "head".to_owned(),
        arithmetic: Arithmetic::Bf16,
        reads: false,
        bytes: head.bytes() as f64,
        ops: 4.0 * (t * vocab * width) as f64,
    };
    let (x, mut dx, mut losses) = (noise(backend, t * width)?, noise(backend, t * width)?, noise(backend, t)?);
    let targets: Vec<u32> = (0..t).map(|i| (i * 37 % vocab) as u32).collect();
    let weights = vec![1.0; t];
    bench.time(facts, 1, &mut |_| {
        backend.run(Call::LinearCrossEntropy {
            arithmetic: Arithmetic::Bf16,
            w: head,
            targets: Targets::of(&targets),
            weights: &weights,
            x: &x,
            losses: &mut losses,
            dx: Some(&mut dx),
        })
    })
}

/// Attention forward and back over a training sequence, and of one token over a cached text.
fn attention(engine: &Engine, bench: &mut Bench<'_, '_>) -> Result<()> {
    let (base, t) = (bench.base, bench.options.sequence);
    let (config, backend) = (base.model.config(), &base.backend);
    let (heads, kv_heads, head_dim) = (config.heads, config.kv_heads, config.head_dim);
    let spec =
        Attention { heads, kv_heads, head_dim, scale: (head_dim as f32).sqrt().recip(), softcap: None, window: None };
    let (wide, narrow) = (heads * head_dim, kv_heads * head_dim);
    let facts = |name: &str, tokens: String, reads, bytes: usize, ops: usize| Facts {
        name: name.to_owned(),
        shape: format!("{tokens} H={heads} G={kv_heads} D={head_dim}"),
        layers: String::new(),
        arithmetic: Arithmetic::Exact,
        reads,
        bytes: bytes as f64,
        ops: ops as f64,
    };
    let buffer = |len| noise(backend, len);
    let (q, k, v, dy) = (buffer(t * wide)?, buffer(t * narrow)?, buffer(t * narrow)?, buffer(t * wide)?);
    let (mut y, mut lse) = (buffer(t * wide)?, buffer(t * heads)?);
    // Half of T x T scores; two products forward, five back, each a multiplication and an addition.
    let (bytes, product) = (4 * t * (2 * wide + 2 * narrow), t * t * wide);
    bench.time(facts("attention", format!("T={t}"), false, bytes, 2 * product), 1, &mut |_| {
        backend.run(Call::Attention {
            spec: &spec,
            segments: &[t],
            q: &q,
            k: &k,
            v: &v,
            sinks: None,
            y: &mut y,
            lse: &mut lse,
        })
    })?;
    let (mut dq, mut dk, mut dv) = (buffer(t * wide)?, buffer(t * narrow)?, buffer(t * narrow)?);
    bench.time(facts("attention_vjp", format!("T={t}"), false, 2 * bytes, 5 * product), 1, &mut |_| {
        backend.run(Call::AttentionVjp {
            spec: &spec,
            segments: &[t],
            q: &q,
            k: &k,
            v: &v,
            y: &y,
            lse: &lse,
            dy: &dy,
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
        })
    })?;

    let dtype = engine.numbers().cache;
    let mut cache = backend.cache(kv_heads, head_dim, dtype, None);
    backend.run(Call::CacheAppend { cache: &mut cache, k: &k, v: &v, rows: 0..t })?;
    let (q, mut y) = (buffer(wide)?, buffer(wide)?);
    let bytes = cache.bytes();
    bench.time(facts("attention_cached", format!("T=1 of {t}"), true, bytes, 4 * t * wide), 1, &mut |_| {
        backend.run(Call::AttentionCached { spec: &spec, q: &q, cache: &cache, sinks: None, y: &mut y, rows: 0..1 })
    })
}

/// Values that no kernel can skip.
pub(super) fn noise(backend: &Cpu, len: usize) -> Result<Buffer> {
    let mut buffer = backend.buffer(len)?;
    let values: Vec<f32> = (0..len).map(|i| ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0).collect();
    backend.write(&mut buffer, &values);
    Ok(buffer)
}

pub(super) fn spelled(arithmetic: Arithmetic) -> &'static str {
    match arithmetic {
        Arithmetic::Exact => "exact",
        Arithmetic::Bf16 => "bf16",
        Arithmetic::Int8 => "int8",
    }
}
